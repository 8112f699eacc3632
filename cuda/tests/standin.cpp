// A stand-in for the library of the CUDA driver: the same entry points, carried out by the process. FOR TESTS ONLY.
//
//     host code ─▶ entry point: counted, failed, checked ─▶ work in a stream ─▶ copies and kernels on checked memory
//
// It does what NVIDIA's header says of each call, and no more than that promises: work is done at once, as late as the
// rules allow, or by chance (standin.h says how to choose). What the header calls undefined is reported: memory freed
// too early or twice, touched too late, beyond its end, or without an order; see standin_report. Kernels are those of
// kv_pool.cu, whatever the image holds, and run on the executor while everything else waits.
//
// Default streams: 0 and 1 are the legacy stream of the current context, in order with all its streams but those made
// non-blocking; 2 is the calling thread's own, a blocking stream. The host is one: what one thread waited for
// counts for all. Memory of pools gets an address of its own each time, and only its bytes are used again.
//
// It is compiled by g++ with hidden names, into a shared object, since kernels and host code have names in common:
//     g++ -std=c++20 -shared -fPIC -fvisibility=hidden -ffp-contract=off cuda/tests/standin.cpp -o standin.so
#include <cstddef>

static void* place_for_kernel(unsigned long long at, size_t bytes);
#define KV_WHERE(at, bytes) place_for_kernel(at, bytes)
#define KV_EXECUTOR 1
#include "launch.h"

#include "standin.h"
#include "standin_work.h"

// The driver and its devices

EXPORT int cuInit(unsigned flags) {
    ENTER(NOTHING);
    if (flags) return INVALID_VALUE;
    machine.initialised = machine.devices != 0;
    return machine.devices ? SUCCESS : NO_DEVICE;
}

EXPORT int cuDriverGetVersion(int* version) {
    ENTER(NOTHING);
    *version = (int)machine.version;
    return SUCCESS;
}

EXPORT int cuGetErrorName(int code, const char** name) {
    ENTER(NOTHING);
    static const std::map<int, const char*> names = {
        {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {3, "CUDA_ERROR_NOT_INITIALIZED"}, {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"}, {100, "CUDA_ERROR_NO_DEVICE"},
        {101, "CUDA_ERROR_INVALID_DEVICE"}, {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"},
        {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {214, "CUDA_ERROR_ECC_UNCORRECTABLE"}, {218, "CUDA_ERROR_INVALID_PTX"},
        {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
        {600, "CUDA_ERROR_NOT_READY"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED"},
        {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"}, {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
        {719, "CUDA_ERROR_LAUNCH_FAILED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"}, {999, "CUDA_ERROR_UNKNOWN"},
    };
    const auto found = names.find(code);
    *name = found == names.end() ? nullptr : found->second;
    return *name ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuDeviceGetCount(int* count) {
    ENTER(DRIVER);
    *count = (int)machine.devices;
    return SUCCESS;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
    ENTER(DRIVER);
    *device = ordinal;
    return is_device(ordinal) ? SUCCESS : INVALID_DEVICE;
}

EXPORT int cuDeviceGetName(char* name, int size, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    snprintf(name, (size_t)size, "stand-in (CPU, not a GPU)");
    return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    switch (attribute) {
    case 16: *value = 4; break; // multiprocessors
    case 19: case 41: case 115: *value = 1; break; // maps host memory; unified addresses; pools
    case 75: *value = (int)machine.capability / 10; break;
    case 76: *value = (int)machine.capability % 10; break;
    case 91: *value = !machine.apart; break; // has the process's addresses for its memory
    default: *value = 0;
    }
    return SUCCESS;
}

EXPORT int cuDeviceGetPCIBusId(char* id, int size, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    snprintf(id, (size_t)size, "0000:%02x:00.0", device + 1);
    return SUCCESS;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    *bytes = machine.bytes;
    return SUCCESS;
}

// Contexts

EXPORT int cuDevicePrimaryCtxRetain(Handle* context, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    Context* own = primary(device);
    ++own->retained;
    *context = own;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    Context* own = primary(device);
    if (own->retained == 0) {
        broken(text("device %d's context is not retained", device));
        return INVALID_CONTEXT;
    }
    if (--own->retained == 0) {
        for (auto& [handle, stream] : machine.streams) {
            if (stream.context != own || stream.queue.empty()) continue;
            if (!own->lost) broken(text("stream %#llx has work queued, and its context ends", handle));
            stream.queue.clear();
            stream.done = stream.submitted;
        }
        own->gone = true;
    }
    return SUCCESS;
}

static bool is_context(const void* given) {
    return std::any_of(machine.contexts.begin(), machine.contexts.end(),
                       [&](const auto& each) { return each.get() == given && !each->gone && each->retained; });
}

// A lost context can still be made current: it is what is asked of it that fails.
EXPORT int cuCtxPushCurrent_v2(Handle context) {
    ENTER(DRIVER);
    if (!is_context(context)) return INVALID_CONTEXT;
    currents.push_back(static_cast<Context*>(context));
    return SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(Handle* context) {
    ENTER(DRIVER);
    if (currents.empty()) return INVALID_CONTEXT;
    if (context) *context = current();
    currents.pop_back();
    return SUCCESS;
}

EXPORT int cuCtxGetCurrent(Handle* context) {
    ENTER(DRIVER);
    *context = current();
    return SUCCESS;
}

EXPORT int cuCtxSynchronize() {
    ENTER(CONTEXT);
    for (auto& [handle, stream] : machine.streams)
        if (stream.context == current()) wait_for_work(stream);
    return current()->lost;
}

// Memory

EXPORT int cuMemGetInfo_v2(size_t* left, size_t* all) {
    ENTER(CONTEXT);
    IN_ORDER();
    *left = machine.bytes - machine.used[current()->device];
    *all = machine.bytes;
    return SUCCESS;
}

EXPORT int cuMemAlloc_v2(address* out, size_t bytes) {
    ENTER(CONTEXT);
    IN_ORDER();
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > machine.bytes || !takes_room(current(), rounded(bytes))) return OUT_OF_MEMORY;
    const auto range = new_device_range(DEVICE, current(), bytes);
    if (!range) return OUT_OF_MEMORY;
    *out = range->base;
    return SUCCESS;
}

// What is to be freed, by the address where it begins.
static std::shared_ptr<Range> find_to_free(address at, bool (*is)(Kind), const char* what) {
    const auto found = machine.ranges.find(at);
    if (found == machine.ranges.end() || !is(found->second->kind)) {
        broken(text("%#llx is no %s", at, what));
        return nullptr;
    }
    if (found->second->freed) {
        broken(named(*found->second) + " was freed before");
        return nullptr;
    }
    return found->second;
}

static bool is_on_device(Kind kind) { return kind == DEVICE || kind == POOLED; }
static bool is_pooled(Kind kind) { return kind == POOLED; }
static bool is_pinned(Kind kind) { return kind == PINNED; }
static bool is_registered(Kind kind) { return kind == REGISTERED; }

static void free_now(Range& range) {
    expect_unused(range);
    range.freed = true;
    range.before_end = machine.host;
    if (range.kind == DEVICE) machine.used[range.context->device] -= rounded(range.bytes);
    if (range.kind == POOLED) machine.pools.at(range.pool).used -= rounded(range.bytes);
    give_back(range);
}

EXPORT int cuMemFree_v2(address at) {
    ENTER(CONTEXT);
    const auto range = find_to_free(at, is_on_device, "device memory");
    if (!range) return INVALID_VALUE;
    free_now(*range);
    return current()->lost;
}

EXPORT int cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
    ENTER(CONTEXT);
    IN_ORDER();
    if (bytes == 0 || flags > 7) return INVALID_VALUE;
    char* place = mapped(bytes, PROT_READ | PROT_WRITE);
    if (!place) return OUT_OF_MEMORY;
    memset(place, 0xdb, bytes);
    is_vacant(reinterpret_cast<address>(place), bytes);
    *out = place;
    const auto range = new_range(PINNED, current(), reinterpret_cast<address>(place), place, bytes);
    return name_apart(range) ? SUCCESS : OUT_OF_MEMORY;
}

EXPORT int cuMemFreeHost(void* memory) {
    ENTER(CONTEXT);
    const auto range = find_to_free(reinterpret_cast<address>(memory), is_pinned, "host memory of the driver");
    if (!range) return INVALID_VALUE;
    free_now(*range);
    return current()->lost;
}

EXPORT int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned flags) {
    ENTER(CONTEXT);
    IN_ORDER();
    const auto first = reinterpret_cast<address>(memory);
    if (!memory || bytes == 0 || flags > 15 || first > ~0ull - bytes) return INVALID_VALUE;
    if (!is_vacant(first, bytes)) return ALREADY_REGISTERED;
    const auto range = new_range(REGISTERED, current(), first, static_cast<char*>(memory), bytes);
    return name_apart(range) ? SUCCESS : OUT_OF_MEMORY;
}

EXPORT int cuMemHostUnregister(void* memory) {
    ENTER(CONTEXT);
    const auto range = find_to_free(reinterpret_cast<address>(memory), is_registered, "registered memory");
    if (!range) return NOT_REGISTERED;
    free_now(*range);
    return current()->lost;
}

EXPORT int cuMemHostGetDevicePointer_v2(address* out, void* memory, unsigned flags) {
    ENTER(CONTEXT);
    IN_ORDER();
    const auto at = reinterpret_cast<address>(memory);
    const Range* range = at_address(at);
    if (flags || !range || range->freed || range->kind < PINNED) return INVALID_VALUE;
    *out = range->device_base + (at - range->base);
    return SUCCESS;
}

EXPORT int cuPointerGetAttribute(void* data, int attribute, address at) {
    ENTER(DRIVER);
    const Range* range = at_address(at);
    if (!range || range->freed) return INVALID_VALUE;
    switch (attribute) {
    case 2: *static_cast<unsigned*>(data) = range->kind < PINNED ? 2 : 1; return SUCCESS; // device or host
    case 9: *static_cast<int*>(data) = range->context->device; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

// Pools

struct PoolProperties {
    int allocation, handles, location, id;
    void* security;
    size_t most;
    unsigned short usage;
    unsigned char reserved[54];
};

EXPORT int cuMemPoolCreate(Handle* out, const PoolProperties* properties) {
    ENTER(DRIVER);
    if (properties->allocation != 1 || properties->location != 1) return INVALID_VALUE;
    if (!is_device(properties->id)) return INVALID_DEVICE;
    const address name = handle();
    machine.pools[name] = Pool{primary(properties->id), 0, 0, 0, false};
    *out = as_handle(name);
    return SUCCESS;
}

static Pool* find_pool(Handle handle) {
    const auto found = machine.pools.find(of(handle));
    return found == machine.pools.end() || found->second.gone ? nullptr : &found->second;
}

EXPORT int cuMemPoolSetAttribute(Handle handle, int attribute, void* value) {
    ENTER(DRIVER);
    Pool* pool = find_pool(handle);
    // 1 to 3: who may use freed memory again; 4: how much is kept.
    if (!pool || attribute < 1 || attribute > 4) return INVALID_VALUE;
    if (attribute == 4) pool->threshold = *static_cast<uint64_t*>(value);
    return SUCCESS;
}

EXPORT int cuMemPoolGetAttribute(Handle handle, int attribute, void* value) {
    ENTER(DRIVER);
    const Pool* pool = find_pool(handle);
    if (!pool) return INVALID_VALUE;
    switch (attribute) {
    case 4: *static_cast<uint64_t*>(value) = pool->threshold; return SUCCESS;
    case 5: *static_cast<uint64_t*>(value) = pool->reserved; return SUCCESS;
    case 7: *static_cast<uint64_t*>(value) = pool->used; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

EXPORT int cuMemPoolDestroy(Handle handle) {
    ENTER(DRIVER);
    Pool* pool = find_pool(handle);
    if (!pool) {
        broken(text("%#llx is no pool", of(handle)));
        return INVALID_VALUE;
    }
    // What is allocated from it stays until it is freed.
    pool->gone = true;
    trim_pools();
    return SUCCESS;
}

EXPORT int cuMemAllocFromPoolAsync(address* out, size_t bytes, Handle pool_handle, Handle stream_handle) {
    ENTER(DRIVER);
    STREAM(stream, stream_handle);
    Pool* pool = find_pool(pool_handle);
    if (!pool || bytes == 0) return INVALID_VALUE;
    // Bytes that were freed in some stream are used again: the driver orders that itself.
    const size_t room = pool->reserved - pool->used;
    if (bytes > machine.bytes) return OUT_OF_MEMORY;
    if (rounded(bytes) > room) {
        if (!takes_room(pool->context, rounded(bytes) - room)) return OUT_OF_MEMORY;
        pool->reserved += rounded(bytes) - room;
    }
    const auto range = new_device_range(POOLED, pool->context, bytes);
    if (!range) return OUT_OF_MEMORY;
    pool->used += rounded(bytes);
    range->pool = of(pool_handle);
    range->stream = stream->handle;
    range->at = submit(*stream, text("%s of %#llx", __func__, range->base), nullptr);
    *out = range->base;
    return SUCCESS;
}

EXPORT int cuMemFreeAsync(address at, Handle stream_handle) {
    ENTER(DRIVER);
    STREAM(stream, stream_handle);
    const auto range = find_to_free(at, is_pooled, "memory of a pool");
    if (!range) return INVALID_VALUE;
    arrive(*stream);
    const Clock before = stream->clock;
    if (!covers(before, range->stream, range->at) || !covers(before, range->uses)) {
        broken(named(*range) + ", and nothing orders that after work that touches it");
        range->told = true;
    }
    range->freed = true;
    range->before_end = before;
    machine.pools.at(range->pool).used -= rounded(range->bytes);
    const auto give = [range] { give_back(*range); };
    submit(*stream, text("%s of %#llx", __func__, at), give);
    return SUCCESS;
}

// Streams and events

EXPORT int cuStreamCreateWithPriority(Handle* out, unsigned flags, int) {
    ENTER(CONTEXT);
    IN_ORDER();
    if (flags > 1) return INVALID_VALUE;
    *out = as_handle(new_stream(current(), flags == 0, false).handle);
    return SUCCESS;
}

EXPORT int cuStreamDestroy_v2(Handle handle) {
    ENTER(DRIVER);
    if (of(handle) <= 2) return INVALID_HANDLE;
    Stream* stream = nullptr;
    const int code = find_stream(handle, &stream);
    // What is queued is still done.
    if (stream) stream->gone = true;
    return code;
}

EXPORT int cuStreamGetCtx(Handle handle, Handle* context) {
    ENTER(DRIVER);
    STREAM(stream, handle);
    *context = stream->context;
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(Handle handle) {
    ENTER(DRIVER);
    STREAM(stream, handle);
    wait_for_work(*stream);
    return stream->context->lost;
}

EXPORT int cuStreamQuery(Handle handle) {
    ENTER(DRIVER);
    STREAM(stream, handle);
    const bool over = is_over(stream->handle, stream->submitted, stream->clock);
    return stream->context->lost ? stream->context->lost : over ? SUCCESS : NOT_READY;
}

EXPORT int cuStreamWaitEvent(Handle handle, Handle event_handle, unsigned flags) {
    ENTER(DRIVER);
    STREAM(stream, handle);
    EVENT(event, event_handle);
    if (flags) return INVALID_VALUE;
    if (event->mark) join(stream->clock, event->mark->clock);
    submit(*stream, text("%s of %#llx", __func__, of(event_handle)), nullptr);
    return SUCCESS;
}

EXPORT int cuEventCreate(Handle* out, unsigned flags) {
    ENTER(CONTEXT);
    IN_ORDER();
    if (flags > 3) return INVALID_VALUE;
    const address name = handle();
    machine.events[name] = Event{current(), (flags & 2) == 0, false, nullptr};
    *out = as_handle(name);
    return SUCCESS;
}

EXPORT int cuEventDestroy_v2(Handle handle) {
    ENTER(DRIVER);
    Event* event = nullptr;
    const int code = find_event(handle, &event);
    if (event) event->gone = true;
    return code;
}

EXPORT int cuEventRecord(Handle handle, Handle stream_handle) {
    ENTER(DRIVER);
    EVENT(event, handle);
    STREAM(stream, stream_handle);
    if (event->context != stream->context) return INVALID_HANDLE;
    // Who captured the mark before keeps that one.
    const auto mark = event->mark = std::make_shared<Mark>();
    mark->stream = stream->handle;
    submit(*stream, text("%s of %#llx", __func__, of(handle)), [mark] { mark->time = machine.time; });
    mark->at = stream->submitted;
    mark->clock = stream->clock;
    return SUCCESS;
}

EXPORT int cuEventQuery(Handle handle) {
    ENTER(DRIVER);
    EVENT(event, handle);
    const auto mark = event->mark;
    const bool over = !mark || is_over(mark->stream, mark->at, mark->clock);
    return event->context->lost ? event->context->lost : over ? SUCCESS : NOT_READY;
}

EXPORT int cuEventSynchronize(Handle handle) {
    ENTER(DRIVER);
    EVENT(event, handle);
    if (event->mark) wait(event->mark->stream, event->mark->at, event->mark->clock);
    trim_pools();
    return event->context->lost;
}

// A piece of work takes a microsecond, whatever it is: no time of the stand-in means anything.
EXPORT int cuEventElapsedTime(float* milliseconds, Handle from, Handle to) {
    ENTER(DRIVER);
    EVENT(first, from);
    EVENT(last, to);
    if (!first->timed || !last->timed || !first->mark || !last->mark) return INVALID_HANDLE;
    for (const auto& mark : {first->mark, last->mark})
        if (machine.streams.at(mark->stream).done < mark->at) return NOT_READY;
    *milliseconds = ((float)last->mark->time - (float)first->mark->time) / 1000;
    return SUCCESS;
}

// What a test says and asks

EXPORT int standin_set(const char* what, uint64_t value) {
    const std::lock_guard<std::mutex> lock(everything);
    const std::map<std::string, address*> settings = {
        {"schedule", &machine.schedule}, {"devices", &machine.devices},       {"bytes", &machine.bytes},
        {"seed", &machine.seed},         {"capability", &machine.capability}, {"driver", &machine.version},
    };
    const auto found = settings.find(what);
    if (found != settings.end()) *found->second = value;
    else if (std::string(what) == "apart") machine.apart = value;
    else return -1;
    machine.chance = machine.seed;
    return 0;
}

EXPORT void standin_fail(const char* call, uint64_t nth, int code) {
    const std::lock_guard<std::mutex> lock(everything);
    machine.faults[call][machine.calls[call] + nth] = code;
}

EXPORT uint64_t standin_calls(const char* call) {
    const std::lock_guard<std::mutex> lock(everything);
    return machine.calls[call];
}

static size_t tell(const std::vector<std::string>& lines, char* to, size_t size) {
    std::string all;
    for (const std::string& line : lines) all += line + "\n";
    if (size) snprintf(to, size, "%s", all.c_str());
    return lines.size();
}

EXPORT size_t standin_report(char* to, size_t size) {
    const std::lock_guard<std::mutex> lock(everything);
    tell(machine.broken, to, size);
    return machine.breaks;
}

EXPORT size_t standin_leaks(char* to, size_t size) {
    const std::lock_guard<std::mutex> lock(everything);
    std::vector<std::string> lines;
    for (const auto& [base, range] : machine.ranges)
        if (!range->freed && base == range->base) lines.push_back(named(*range));
    for (const auto& [name, stream] : machine.streams)
        if (!stream.gone && !stream.own) lines.push_back(text("stream %#llx", name));
    for (const auto& [name, event] : machine.events)
        if (!event.gone) lines.push_back(text("event %#llx", name));
    for (const auto& [name, module] : machine.modules)
        if (!module.gone) lines.push_back(text("module %#llx", name));
    for (const auto& [name, pool] : machine.pools)
        if (!pool.gone) lines.push_back(text("pool %#llx", name));
    for (const auto& context : machine.contexts)
        if (context->retained && !context->foreign)
            lines.push_back(text("context of device %d, retained %d times", context->device, context->retained));
    return tell(lines, to, size);
}

EXPORT uint64_t standin_queued(void) {
    const std::lock_guard<std::mutex> lock(everything);
    uint64_t queued = 0;
    for (const auto& [name, stream] : machine.streams) queued += stream.queue.size();
    return queued;
}

EXPORT uint64_t standin_used(int device) {
    const std::lock_guard<std::mutex> lock(everything);
    return machine.used[device];
}

EXPORT uint64_t standin_foreign_stream(int device) {
    const std::lock_guard<std::mutex> lock(everything);
    return new_stream(foreign(device), true, true).handle;
}

// Where bytes are, for a test that looks at them.
static char* seen(uint64_t at, size_t bytes) {
    const Range* range = at_address(at);
    if (!range || range->freed) return nullptr;
    const size_t offset = place_of(*range, at) - range->place;
    return bytes <= range->bytes - offset ? range->place + offset : nullptr;
}

EXPORT int standin_read(uint64_t at, void* to, size_t bytes) {
    const std::lock_guard<std::mutex> lock(everything);
    const char* place = seen(at, bytes);
    if (place) memcpy(to, place, bytes);
    return place ? 0 : -1;
}

EXPORT int standin_write(uint64_t at, const void* from, size_t bytes) {
    const std::lock_guard<std::mutex> lock(everything);
    char* place = seen(at, bytes);
    if (place) memcpy(place, from, bytes);
    return place ? 0 : -1;
}

EXPORT void standin_reset(void) {
    const std::lock_guard<std::mutex> lock(everything);
    for (const auto& [base, range] : machine.ranges) {
        const bool mapped_here = range->kind == PINNED || range->place;
        if (base == range->base && range->kind != REGISTERED && mapped_here) munmap(range->place, range->bytes);
    }
    machine = Machine();
    running = nullptr;
    ++epoch;
}
