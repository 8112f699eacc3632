// See kv_host.h. Without the standard library of C++, so that nothing is needed to load what this is a part of.
#include "kv_host.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

typedef int status;
typedef uint64_t address_t;
typedef void *handle;

// Numbers of CUDA's driver interface, by their names there without "CU" or "CUDA".
enum : status { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_READY = 600, NOT_SUPPORTED = 801 };
// What is wrong with an image, or with the driver's compiler of PTX: another image may do.
enum : status { INVALID_IMAGE = 200, NO_BINARY = 209, INVALID_PTX = 218 };
enum : status { NO_COMPILER = 221, PTX_TOO_NEW = 222, NO_JIT = 223 };
enum { ATTRIBUTE_MULTIPROCESSORS = 16, ATTRIBUTE_INTEGRATED = 18, ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76 };
enum { EVENT_DISABLE_TIMING = 2, STREAM_NON_BLOCKING = 1, HOST_PORTABLE = 1, HOST_MAPPED = 2 };
enum { POINTER_MEMORY_TYPE = 2, POINTER_DEVICE = 9, MEMORY_TYPE_DEVICE = 2 };
enum { CAPTURE_RELAXED = 2 };
enum { POOL_RELEASE_THRESHOLD = 4, ALLOCATION_PINNED = 1, LOCATION_DEVICE = 1 };

struct location {
    int kind, id;
};
struct pool_properties {
    int allocation, handles;
    location where;
    void *security;
    size_t most;
    unsigned short usage;
    unsigned char reserved[54];
};
// Of a batch of copies: all in the order of the stream, read when it is their turn.
struct copy_attributes {
    int order;
    location from, to;
    unsigned flags;
};

// What is called, and as what the driver has it.
#define KV_CALLS(X) \
    X(Init, "cuInit", (unsigned)) \
    X(DriverGetVersion, "cuDriverGetVersion", (int *)) \
    X(GetErrorName, "cuGetErrorName", (status, const char **)) \
    X(DeviceGetCount, "cuDeviceGetCount", (int *)) \
    X(DeviceGet, "cuDeviceGet", (int *, int)) \
    X(DeviceGetName, "cuDeviceGetName", (char *, int, int)) \
    X(DeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, int)) \
    X(DeviceGetPCIBusId, "cuDeviceGetPCIBusId", (char *, int, int)) \
    X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t *, int)) \
    X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (handle *, int)) \
    X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int)) \
    X(CtxPushCurrent, "cuCtxPushCurrent_v2", (handle)) \
    X(CtxPopCurrent, "cuCtxPopCurrent_v2", (handle *)) \
    X(MemGetInfo, "cuMemGetInfo_v2", (size_t *, size_t *)) \
    X(MemAlloc, "cuMemAlloc_v2", (address_t *, size_t)) \
    X(MemFree, "cuMemFree_v2", (address_t)) \
    X(MemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned)) \
    X(MemFreeHost, "cuMemFreeHost", (void *)) \
    X(MemHostRegister, "cuMemHostRegister_v2", (void *, size_t, unsigned)) \
    X(MemHostUnregister, "cuMemHostUnregister", (void *)) \
    X(MemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2", (address_t *, void *, unsigned)) \
    X(MemPoolCreate, "cuMemPoolCreate", (handle *, const pool_properties *)) \
    X(MemPoolSetAttribute, "cuMemPoolSetAttribute", (handle, int, void *)) \
    X(MemPoolDestroy, "cuMemPoolDestroy", (handle)) \
    X(MemAllocFromPoolAsync, "cuMemAllocFromPoolAsync", (address_t *, size_t, handle, handle)) \
    X(MemFreeAsync, "cuMemFreeAsync", (address_t, handle)) \
    X(PointerGetAttribute, "cuPointerGetAttribute", (void *, int, address_t)) \
    X(StreamCreateWithPriority, "cuStreamCreateWithPriority", (handle *, unsigned, int)) \
    X(StreamDestroy, "cuStreamDestroy_v2", (handle)) \
    X(StreamSynchronize, "cuStreamSynchronize", (handle)) \
    X(StreamGetCtx, "cuStreamGetCtx", (handle, handle *)) \
    X(StreamWaitEvent, "cuStreamWaitEvent", (handle, handle, unsigned)) \
    X(EventCreate, "cuEventCreate", (handle *, unsigned)) \
    X(EventDestroy, "cuEventDestroy_v2", (handle)) \
    X(EventRecord, "cuEventRecord", (handle, handle)) \
    X(EventQuery, "cuEventQuery", (handle)) \
    X(EventSynchronize, "cuEventSynchronize", (handle)) \
    X(EventElapsedTime, "cuEventElapsedTime", (float *, handle, handle)) \
    X(MemcpyAsync, "cuMemcpyAsync", (address_t, address_t, size_t, handle)) \
    X(ModuleLoadData, "cuModuleLoadData", (handle *, const void *)) \
    X(ModuleUnload, "cuModuleUnload", (handle)) \
    X(ModuleGetFunction, "cuModuleGetFunction", (handle *, handle, const char *)) \
    X(LaunchKernel, "cuLaunchKernel", \
        (handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void **, void **))

struct driver {
#define X(name, symbol, arguments) status(*name) arguments;
    KV_CALLS(X)
#undef X
    // The first is of CUDA 12.8 and 12.9; the second, which says nothing of which copy failed, is of 13.
    status (*batch_12)(address_t *, address_t *, size_t *, size_t, copy_attributes *, size_t *, size_t, size_t *, handle);
    status (*batch_13)(address_t *, address_t *, size_t *, size_t, copy_attributes *, size_t *, size_t, handle);
    // What a stand-in may lack: of graphs that are captured.
    status (*capture_mode)(int *);
    status (*is_capturing)(handle, int *);
};

thread_local char sentence[512];

int because(int end, const char *text, const char *more = "") {
    snprintf(sentence, sizeof sentence, "%s%s", text, more);
    return end;
}

// Errors after which a context does nothing any more: of what ran on it, of its memory, or of the device.
bool is_sticky(status code) {
    switch (code) {
    case 4: case 46: case 201: case 214: case 220: case 226: case 700: case 702: case 709: case 710: case 714: case 715:
    case 716: case 717: case 718: case 719: case 721: case 805: case 806: case 810: case 999:
        return true;
    default:
        return false;
    }
}

} // namespace

struct kv_gpu {
    driver cu;
    void *library;
    int device;
    handle context, module, pool, kernels[3];
    kv_facts facts;
};

namespace {

int ended(const kv_gpu *gpu, status code, const char *call) {
    if (code == SUCCESS) return KV_OK;
    if (code == NOT_READY) return KV_NOT_YET;
    const char *name = nullptr;
    if (gpu->cu.GetErrorName(code, &name) != SUCCESS || !name) name = "no name";
    snprintf(sentence, sizeof sentence, "%s: %s (%d)", call, name, code);
    return code == OUT_OF_MEMORY ? KV_NO_ROOM : is_sticky(code) ? KV_LOST : KV_REFUSED;
}

// The device's context is current while this lives; and another thread that captures a graph does not forbid waiting.
struct within {
    const kv_gpu *gpu;
    status code;
    int mode = CAPTURE_RELAXED;
    explicit within(const kv_gpu *of) : gpu(of), code(of->cu.CtxPushCurrent(of->context)) { exchange(); }
    ~within() {
        handle before;
        exchange();
        if (code == SUCCESS) gpu->cu.CtxPopCurrent(&before);
    }
    void exchange() {
        if (gpu->cu.capture_mode) gpu->cu.capture_mode(&mode);
    }
};

#define KV_WITHIN(gpu) \
    within current(gpu); \
    if (current.code != SUCCESS) return ended(gpu, current.code, "cuCtxPushCurrent")
#define KV_CALL(gpu, name, ...) ended(gpu, (gpu)->cu.name(__VA_ARGS__), "cu" #name)
#define KV_TRY(gpu, name, ...) \
    do { \
        if (int end = KV_CALL(gpu, name, __VA_ARGS__)) return end; \
    } while (0)

int open_driver(kv_gpu *gpu, const char *library) {
    gpu->library = dlopen(library ? library : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!gpu->library) return because(KV_NO_DRIVER, dlerror());
#define X(name, symbol, arguments) \
    *(void **)&gpu->cu.name = dlsym(gpu->library, symbol); \
    if (!gpu->cu.name) return because(KV_NO_DRIVER, "the driver has no ", symbol);
    KV_CALLS(X)
#undef X
    int version = 0;
    if (status code = gpu->cu.Init(0)) {
        ended(gpu, code, "cuInit");
        // 100: no device is there; what else is said means that the driver does not work.
        return code == 100 ? KV_NO_DEVICE : KV_NO_DRIVER;
    }
    KV_TRY(gpu, DriverGetVersion, &version);
    gpu->facts.driver = (uint32_t)version;
    if (version >= 13000) *(void **)&gpu->cu.batch_13 = dlsym(gpu->library, "cuMemcpyBatchAsync_v2");
    if (version >= 12080 && !gpu->cu.batch_13) *(void **)&gpu->cu.batch_12 = dlsym(gpu->library, "cuMemcpyBatchAsync");
    *(void **)&gpu->cu.capture_mode = dlsym(gpu->library, "cuThreadExchangeStreamCaptureMode");
    *(void **)&gpu->cu.is_capturing = dlsym(gpu->library, "cuStreamIsCapturing");
    gpu->facts.has_batch = gpu->cu.batch_12 || gpu->cu.batch_13;
    return KV_OK;
}

int open_device(kv_gpu *gpu, int device) {
    int count = 0, value = 0;
    size_t bytes = 0;
    KV_TRY(gpu, DeviceGetCount, &count);
    if (device < 0 || device >= count) {
        snprintf(sentence, sizeof sentence, "device is %d, expected a number from 0, below %d", device, count);
        return KV_NO_DEVICE;
    }
    KV_TRY(gpu, DeviceGet, &gpu->device, device);
    kv_facts *facts = &gpu->facts;
    KV_TRY(gpu, DeviceGetName, facts->name, (int)sizeof facts->name, gpu->device);
    KV_TRY(gpu, DeviceGetPCIBusId, facts->pci, (int)sizeof facts->pci, gpu->device);
    KV_TRY(gpu, DeviceTotalMem, &bytes, gpu->device);
    facts->total_bytes = bytes;
    const struct {
        int attribute;
        uint32_t *to;
    } asked[] = {
        {ATTRIBUTE_MAJOR, &facts->major},
        {ATTRIBUTE_MINOR, &facts->minor},
        {ATTRIBUTE_MULTIPROCESSORS, &facts->multiprocessors},
        {ATTRIBUTE_INTEGRATED, &facts->integrated},
    };
    for (const auto &each : asked) {
        KV_TRY(gpu, DeviceGetAttribute, &value, each.attribute, gpu->device);
        *each.to = (uint32_t)value;
    }
    return KV_CALL(gpu, DevicePrimaryCtxRetain, &gpu->context, gpu->device);
}

// Whether an image runs there: a program of the same major architecture, or PTX of that or an earlier one.
bool fits(const kv_image *image, uint32_t arch) {
    return image->is_ptx ? image->arch <= arch : image->arch <= arch && image->arch / 10 == arch / 10;
}

bool is_of_image(status code) {
    switch (code) {
    case INVALID_IMAGE: case NO_BINARY: case INVALID_PTX: case NO_COMPILER: case PTX_TOO_NEW: case NO_JIT:
        return true;
    default:
        return false;
    }
}

// The best of a kind that fits and is not as good as those before; null: there is none.
const kv_image *next_best(const kv_image *images, size_t count, uint32_t is_ptx, uint32_t arch, uint32_t below) {
    const kv_image *best = nullptr;
    for (const kv_image *image = images; image < images + count; ++image) {
        if (image->is_ptx != is_ptx || image->arch >= below || !fits(image, arch)) continue;
        if (!best || image->arch > best->arch) best = image;
    }
    return best;
}

status load_module(kv_gpu *gpu, const kv_image *image) {
    if (!image->is_ptx) return gpu->cu.ModuleLoadData(&gpu->module, image->bytes);
    // The driver reads a text up to a zero, which a file of it may not have.
    auto *text = (char *)malloc(image->size + 1);
    if (!text) return OUT_OF_MEMORY;
    memcpy(text, image->bytes, image->size);
    text[image->size] = 0;
    const status code = gpu->cu.ModuleLoadData(&gpu->module, text);
    free(text);
    return code;
}

int load_image(kv_gpu *gpu, const kv_image *images, size_t count, int force_ptx) {
    KV_WITHIN(gpu);
    const uint32_t arch = 10 * gpu->facts.major + gpu->facts.minor;
    // Programs first; PTX last, since it has to be compiled.
    for (uint32_t is_ptx = force_ptx ? 1 : 0; is_ptx < 2; ++is_ptx) {
        uint32_t below = UINT32_MAX;
        while (const kv_image *image = next_best(images, count, is_ptx, arch, below)) {
            below = image->arch;
            const status code = load_module(gpu, image);
            if (is_of_image(code)) continue;
            if (code != SUCCESS) return ended(gpu, code, "cuModuleLoadData");
            gpu->facts.image_arch = image->arch;
            gpu->facts.image_is_ptx = is_ptx;
            const char *names[] = {"kv_copy", "kv_encode", "kv_decode"};
            for (int k = 0; k < 3; ++k) KV_TRY(gpu, ModuleGetFunction, &gpu->kernels[k], gpu->module, names[k]);
            return KV_OK;
        }
    }
    snprintf(sentence, sizeof sentence, "no image runs on architecture %u with driver %u", arch, gpu->facts.driver);
    return KV_NO_IMAGE;
}

int open_pool(kv_gpu *gpu) {
    KV_WITHIN(gpu);
    pool_properties properties = {};
    properties.allocation = ALLOCATION_PINNED;
    properties.where = {LOCATION_DEVICE, gpu->device};
    // Some devices have none; then nothing can be borrowed.
    const status code = gpu->cu.MemPoolCreate(&gpu->pool, &properties);
    if (code == NOT_SUPPORTED) return KV_OK;
    if (code != SUCCESS) return ended(gpu, code, "cuMemPoolCreate");
    uint64_t all = UINT64_MAX;
    return KV_CALL(gpu, MemPoolSetAttribute, gpu->pool, POOL_RELEASE_THRESHOLD, &all);
}

int copy_each(kv_gpu *gpu, const kv_piece *pieces, size_t count, handle stream) {
    for (size_t n = 0; n < count;) {
        const size_t first = n;
        kv_piece whole = pieces[n++];
        for (; n < count; ++n) {
            const bool follows = pieces[n].from == whole.from + whole.bytes && pieces[n].to == whole.to + whole.bytes;
            if (!follows) break;
            whole.bytes += pieces[n].bytes;
        }
        const status code = gpu->cu.MemcpyAsync(whole.to, whole.from, whole.bytes, stream);
        if (code == INVALID_VALUE && n - first > 1) {
            // Neighbours may be of two allocations: no copy goes from one into the other.
            for (const kv_piece *one = pieces + first; one < pieces + n; ++one)
                KV_TRY(gpu, MemcpyAsync, one->to, one->from, one->bytes, stream);
        } else if (code != SUCCESS) {
            return ended(gpu, code, "cuMemcpyAsync");
        }
    }
    return KV_OK;
}

int copy_batch(kv_gpu *gpu, const kv_piece *pieces, size_t count, handle stream) {
    auto *table = (uint64_t *)malloc(3 * count * sizeof(uint64_t));
    if (!table) return because(KV_NO_ROOM, "no memory for a table of copies");
    for (size_t n = 0; n < count; ++n) {
        table[n] = pieces[n].to;
        table[count + n] = pieces[n].from;
        table[2 * count + n] = pieces[n].bytes;
    }
    static_assert(sizeof(size_t) == sizeof(uint64_t), "sizes stand in the table, too");
    copy_attributes in_order = {1, {}, {}, 0};
    size_t first = 0, failed = 0;
    address_t *to = table, *from = table + count;
    auto *sizes = (size_t *)(table + 2 * count);
    const status code = gpu->cu.batch_13
        ? gpu->cu.batch_13(to, from, sizes, count, &in_order, &first, 1, stream)
        : gpu->cu.batch_12(to, from, sizes, count, &in_order, &first, 1, &failed, stream);
    free(table);
    return ended(gpu, code, "cuMemcpyBatchAsync");
}

int launch(kv_gpu *gpu, int kernel, void **arguments, uint32_t blocks, handle stream) {
    const unsigned threads = 256;
    return KV_CALL(gpu, LaunchKernel, gpu->kernels[kernel], blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr);
}

} // namespace

extern "C" {

const char *kv_why(void) { return sentence; }

int kv_open(const char *library, int device, const kv_image *images, size_t count, int force_ptx, kv_gpu **out) {
    *out = nullptr;
    auto *gpu = (kv_gpu *)calloc(1, sizeof(kv_gpu));
    if (!gpu) return because(KV_NO_ROOM, "no memory");
    int end = open_driver(gpu, library);
    if (!end) end = open_device(gpu, device);
    if (!end) end = load_image(gpu, images, count, force_ptx);
    if (!end) end = open_pool(gpu);
    if (end) {
        char why[sizeof sentence];
        memcpy(why, sentence, sizeof why);
        kv_close(gpu);
        memcpy(sentence, why, sizeof why);
        return end;
    }
    *out = gpu;
    return KV_OK;
}

void kv_close(kv_gpu *gpu) {
    if (gpu->context) {
        {
            within current(gpu);
            if (gpu->pool) gpu->cu.MemPoolDestroy(gpu->pool);
            if (gpu->module) gpu->cu.ModuleUnload(gpu->module);
        }
        gpu->cu.DevicePrimaryCtxRelease(gpu->device);
    }
    // The driver's library stays: others may have pointers into it.
    free(gpu);
}

int kv_tell(kv_gpu *gpu, kv_facts *facts) {
    *facts = gpu->facts;
    return KV_OK;
}

int kv_free_bytes(kv_gpu *gpu, uint64_t *bytes) {
    KV_WITHIN(gpu);
    size_t left = 0, all = 0;
    KV_TRY(gpu, MemGetInfo, &left, &all);
    *bytes = left;
    return KV_OK;
}

int kv_reserve(kv_gpu *gpu, uint64_t bytes, uint64_t *address) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, MemAlloc, address, bytes);
}

int kv_release(kv_gpu *gpu, uint64_t address) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, MemFree, address);
}

int kv_pinned(kv_gpu *gpu, size_t bytes, void **memory, uint64_t *address) {
    KV_WITHIN(gpu);
    KV_TRY(gpu, MemHostAlloc, memory, bytes, HOST_PORTABLE | HOST_MAPPED);
    const int end = KV_CALL(gpu, MemHostGetDevicePointer, address, *memory, 0);
    if (end) {
        gpu->cu.MemFreeHost(*memory);
        *memory = nullptr;
    }
    return end;
}

int kv_unpinned(kv_gpu *gpu, void *memory) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, MemFreeHost, memory);
}

int kv_register(kv_gpu *gpu, void *memory, size_t bytes, uint64_t *address) {
    KV_WITHIN(gpu);
    KV_TRY(gpu, MemHostRegister, memory, bytes, HOST_PORTABLE | HOST_MAPPED);
    const int end = KV_CALL(gpu, MemHostGetDevicePointer, address, memory, 0);
    if (end) gpu->cu.MemHostUnregister(memory);
    return end;
}

int kv_forget(kv_gpu *gpu, void *memory) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, MemHostUnregister, memory);
}

int kv_borrow(kv_gpu *gpu, uint64_t bytes, uint64_t stream, uint64_t *address) {
    KV_WITHIN(gpu);
    if (!gpu->pool) return because(KV_REFUSED, "the device has no pools of memory");
    return KV_CALL(gpu, MemAllocFromPoolAsync, address, bytes, gpu->pool, (handle)stream);
}

int kv_return(kv_gpu *gpu, uint64_t address, uint64_t stream) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, MemFreeAsync, address, (handle)stream);
}

int kv_device_of(kv_gpu *gpu, uint64_t address, int *device) {
    KV_WITHIN(gpu);
    int kind = 0;
    *device = -1;
    // Memory that the driver does not know is the process's.
    const status code = gpu->cu.PointerGetAttribute(&kind, POINTER_MEMORY_TYPE, address);
    if (code == INVALID_VALUE || (code == SUCCESS && kind != MEMORY_TYPE_DEVICE)) return KV_OK;
    if (code != SUCCESS) return ended(gpu, code, "cuPointerGetAttribute");
    return KV_CALL(gpu, PointerGetAttribute, device, POINTER_DEVICE, address);
}

int kv_stream(kv_gpu *gpu, uint64_t *stream) {
    KV_WITHIN(gpu);
    // 0 is the least priority: the model's own kernels go first.
    return KV_CALL(gpu, StreamCreateWithPriority, (handle *)stream, STREAM_NON_BLOCKING, 0);
}

int kv_end_stream(kv_gpu *gpu, uint64_t stream) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, StreamDestroy, (handle)stream);
}

int kv_drain(kv_gpu *gpu, uint64_t stream) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, StreamSynchronize, (handle)stream);
}

int kv_knows(kv_gpu *gpu, uint64_t stream) {
    KV_WITHIN(gpu);
    handle context = nullptr;
    KV_TRY(gpu, StreamGetCtx, (handle)stream, &context);
    int capturing = 0;
    if (gpu->cu.is_capturing && gpu->cu.is_capturing((handle)stream, &capturing) == SUCCESS && capturing) {
        return because(KV_REFUSED, "the stream is being captured into a graph: what is waited for cannot be a part of one");
    }
    return context == gpu->context ? KV_OK : because(KV_REFUSED, "the stream is of another context");
}

int kv_event(kv_gpu *gpu, int timed, uint64_t *event) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, EventCreate, (handle *)event, timed ? 0 : EVENT_DISABLE_TIMING);
}

int kv_end_event(kv_gpu *gpu, uint64_t event) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, EventDestroy, (handle)event);
}

int kv_record(kv_gpu *gpu, uint64_t event, uint64_t stream) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, EventRecord, (handle)event, (handle)stream);
}

int kv_after(kv_gpu *gpu, uint64_t stream, uint64_t event) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, StreamWaitEvent, (handle)stream, (handle)event, 0);
}

int kv_over(kv_gpu *gpu, uint64_t event) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, EventQuery, (handle)event);
}

int kv_wait(kv_gpu *gpu, uint64_t event) {
    KV_WITHIN(gpu);
    return KV_CALL(gpu, EventSynchronize, (handle)event);
}

int kv_seconds(kv_gpu *gpu, uint64_t from, uint64_t to, double *seconds) {
    KV_WITHIN(gpu);
    float milliseconds = 0;
    KV_TRY(gpu, EventElapsedTime, &milliseconds, (handle)from, (handle)to);
    *seconds = milliseconds / 1e3;
    return KV_OK;
}

int kv_copy(kv_gpu *gpu, const kv_piece *pieces, size_t count, int path, uint64_t table, uint32_t blocks, uint64_t stream) {
    if (count == 0) return KV_OK;
    KV_WITHIN(gpu);
    // The driver takes no batch on its legacy default stream.
    const bool takes_batch = gpu->facts.has_batch && stream > 1;
    if (path == KV_BY_BATCH && takes_batch) return copy_batch(gpu, pieces, count, (handle)stream);
    if (path != KV_BY_KERNEL) return copy_each(gpu, pieces, count, (handle)stream);
    if (pieces[0].bytes % 16 || pieces[0].bytes / 16 > UINT32_MAX || count > UINT32_MAX) {
        return because(KV_REFUSED, "a kernel copies multiples of 16 bytes");
    }
    uint32_t n = (uint32_t)count, vectors = (uint32_t)(pieces[0].bytes / 16);
    void *arguments[] = {&table, &n, &vectors};
    return launch(gpu, 0, arguments, blocks, (handle)stream);
}

int kv_code(kv_gpu *gpu, int decode, const void *work, uint32_t blocks, uint64_t stream) {
    KV_WITHIN(gpu);
    void *arguments[] = {(void *)work};
    return launch(gpu, decode ? 2 : 1, arguments, blocks, (handle)stream);
}

} // extern "C"
