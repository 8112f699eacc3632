// What the stand-in for the driver puts into streams: copies, batches of them, and kernels of images that it accepts.
//
// A copy of memory that the driver does not know is as the header says: what is read is read during the call, what is
// written is written before it returns. In a batch the caller says when memory is read.
#pragma once

#include "standin_call.h"

// One copy, both ends looked up when it was asked for.
struct Copy {
    End to, from;
    // What was read during the call.
    std::shared_ptr<std::vector<char>> read;
};

static bool overlap(address a, address b, size_t bytes) { return a < b + bytes && b < a + bytes; }

static void take_now(Copy& copy) {
    const char* from = copy.from.place();
    copy.read = std::make_shared<std::vector<char>>(from, from + copy.from.bytes);
}

static void note_uses(const Copy& copy, const Stream& stream) {
    for (const End* end : {&copy.to, &copy.from})
        if (end->range) note_use(*end->range, stream.handle, stream.submitted + 1);
}

static void carry_out(const Copy& copy) {
    for (const End* end : {&copy.to, &copy.from})
        if (end->range && !touch(*end->range)) return;
    const char* from = copy.read ? copy.read->data() : copy.from.place();
    memmove(copy.to.place(), from, copy.to.bytes);
}

EXPORT int cuMemcpyAsync(address to, address from, size_t bytes, Handle handle) {
    ENTER(DRIVER);
    STREAM(stream, handle);
    if (bytes == 0) return SUCCESS;
    Copy copy = {end_of(to, bytes), end_of(from, bytes), nullptr};
    if (!copy.to.fits || !copy.from.fits) return INVALID_VALUE;
    if (overlap(to, from, bytes)) broken(text("%#llx and %#llx overlap in %zu bytes", to, from, bytes));
    note_uses(copy, *stream);
    const bool is_sync = !copy.to.range;
    if (!copy.from.range) take_now(copy);
    submit(*stream, text("%s %llu", __func__, machine.calls[__func__]), [copy] { carry_out(copy); });
    if (is_sync) wait_for_work(*stream);
    return stream->context->lost;
}

struct CopyAttributes {
    // 1: memory is read in the order of the stream; 2: during the call; 3: at any time until then.
    int order;
    int hints[4];
    unsigned flags;
};

// Whether copies of a batch depend on each other: nothing says which comes first.
static bool depend(const address* to, const address* from, const size_t* sizes, size_t count) {
    std::map<address, address> written;
    for (size_t n = 0; n < count; ++n) {
        const auto next = written.lower_bound(to[n]);
        if (next != written.end() && next->first < to[n] + sizes[n]) return true;
        if (next != written.begin() && std::prev(next)->second > to[n]) return true;
        written[to[n]] = to[n] + sizes[n];
    }
    for (size_t n = 0; n < count; ++n) {
        const auto next = written.lower_bound(from[n] + sizes[n]);
        if (next != written.begin() && std::prev(next)->second > from[n]) return true;
    }
    return false;
}

// `failed`: the number of the copy that cannot be; SIZE_MAX: it is not one of them.
static int copy_batch(const char* name, const address* to, const address* from, const size_t* sizes, size_t count,
                      const CopyAttributes* attributes, const size_t* firsts, size_t kinds, size_t* failed,
                      Handle handle) {
    *failed = SIZE_MAX;
    if (of(handle) < 2) return INVALID_VALUE;
    STREAM(stream, handle);
    if (count == 0 || kinds == 0 || kinds > count || firsts[0] != 0) return INVALID_VALUE;
    for (size_t k = 0; k < kinds; ++k) {
        if (k > 0 && firsts[k] <= firsts[k - 1]) return INVALID_VALUE;
        if (firsts[k] >= count || attributes[k].order < 1 || attributes[k].order > 3) return INVALID_VALUE;
    }
    std::vector<Copy> copies;
    for (size_t n = 0, kind = 0; n < count; ++n) {
        if (kind + 1 < kinds && firsts[kind + 1] == n) ++kind;
        Copy copy = {end_of(to[n], sizes[n]), end_of(from[n], sizes[n]), nullptr};
        if (!copy.to.fits || !copy.from.fits || sizes[n] == 0) {
            *failed = n;
            return INVALID_VALUE;
        }
        const int order = attributes[kind].order;
        if (order == 2 || (order == 3 && chance(2))) take_now(copy);
        copies.push_back(std::move(copy));
    }
    if (depend(to, from, sizes, count)) broken("copies of a batch depend on each other");
    for (const Copy& copy : copies) note_uses(copy, *stream);
    for (size_t n = count; n > 1; --n) std::swap(copies[n - 1], copies[chance(n)]);
    submit(*stream, text("%s %llu", name, machine.calls[name]), [copies] {
        for (const Copy& copy : copies) carry_out(copy);
    });
    return stream->context->lost;
}

// That of CUDA 12.8.
EXPORT int cuMemcpyBatchAsync(address* to, address* from, size_t* sizes, size_t count, CopyAttributes* attributes,
                              size_t* firsts, size_t kinds, size_t* failed, Handle stream) {
    ENTER(DRIVER);
    return copy_batch(__func__, to, from, sizes, count, attributes, firsts, kinds, failed, stream);
}

// That of CUDA 13.
EXPORT int cuMemcpyBatchAsync_v2(address* to, address* from, size_t* sizes, size_t count, CopyAttributes* attributes,
                                 size_t* firsts, size_t kinds, Handle stream) {
    ENTER(DRIVER);
    size_t failed;
    return copy_batch(__func__, to, from, sizes, count, attributes, firsts, kinds, &failed, stream);
}

// The newest PTX that a driver takes, 10 * major + minor, as NVIDIA's table has it.
static unsigned newest_ptx(address driver) {
    const unsigned major = (unsigned)driver / 1000, minor = (unsigned)driver % 1000 / 10;
    if (major == 11) return 70 + minor;
    // 12.5 and 12.6 share one.
    if (major == 12) return 80 + minor - (minor > 5);
    return 10 * (major - 4) + minor;
}

// The text after its blank lines and comments.
static const char* after_comments(const char* at) {
    for (;;) {
        at += strspn(at, " \t\r\n");
        if (strncmp(at, "//", 2) == 0) at += strcspn(at, "\n");
        else if (strncmp(at, "/*", 2) == 0 && strstr(at, "*/")) at = strstr(at, "*/") + 2;
        else return at;
    }
}

static int take_ptx(const char* ptx) {
    unsigned major, minor, arch;
    const char* version = after_comments(ptx);
    if (version == ptx && *version != '.') return INVALID_IMAGE;
    // It has to end: a text that does not is read beyond its end, here as by the driver.
    if (sscanf(version, ".version %u.%u", &major, &minor) != 2) return strlen(ptx) ? INVALID_PTX : INVALID_IMAGE;
    if (10 * major + minor > newest_ptx(machine.version)) return UNSUPPORTED_PTX_VERSION;
    const char* target = strstr(version, ".target");
    if (!target || sscanf(target, ".target sm_%u", &arch) != 1 || arch > machine.capability) return INVALID_PTX;
    return SUCCESS;
}

static int take_program(const unsigned char* elf) {
    const unsigned machine_kind = elf[18] | elf[19] << 8, cuda = 190;
    if (elf[4] != 2 || machine_kind != cuda) return INVALID_IMAGE;
    // Of the flags at 48 the first byte names the architecture; from ABI 8 on, the second.
    const unsigned arch = elf[8] >= 8 ? elf[49] : elf[48], capability = (unsigned)machine.capability;
    return arch / 10 == capability / 10 && arch <= capability ? SUCCESS : NO_BINARY_FOR_GPU;
}

EXPORT int cuModuleLoadData(Handle* out, const void* image) {
    ENTER(CONTEXT);
    IN_ORDER();
    if (!image) return INVALID_VALUE;
    const bool is_elf = strncmp((const char*)image, "\x7f" "ELF", 4) == 0;
    const int code = is_elf ? take_program(static_cast<const unsigned char*>(image)) : take_ptx((const char*)image);
    if (code) return code;
    const address name = handle();
    machine.modules[name] = Module{current(), false, {}};
    *out = as_handle(name);
    return SUCCESS;
}

EXPORT int cuModuleUnload(Handle handle) {
    ENTER(CONTEXT);
    const auto found = machine.modules.find(of(handle));
    if (found == machine.modules.end() || found->second.gone) {
        broken(text("%#llx is no module", of(handle)));
        return INVALID_HANDLE;
    }
    for (const auto& [stream, at] : found->second.uses) {
        if (is_known_over(stream, at)) continue;
        broken(text("module %#llx, and nobody knows that its kernels are over", of(handle)));
        break;
    }
    found->second.gone = true;
    return current()->lost;
}

EXPORT int cuModuleGetFunction(Handle* out, Handle handle, const char* kernel) {
    ENTER(CONTEXT);
    IN_ORDER();
    const auto found = machine.modules.find(of(handle));
    if (found == machine.modules.end() || found->second.gone) return INVALID_HANDLE;
    if (!kv_has(kernel)) return NOT_FOUND;
    const address name = ::handle();
    machine.functions[name] = Function{of(handle), kernel};
    *out = as_handle(name);
    return SUCCESS;
}

// A grid has one dimension here, blocks have whole warps, and there is no dynamic shared memory.
EXPORT int cuLaunchKernel(Handle function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block,
                          unsigned block_y, unsigned block_z, unsigned shared, Handle handle, void** parameters,
                          void** extra) {
    ENTER(DRIVER);
    STREAM(stream, handle);
    const auto found = machine.functions.find(of(function));
    if (found == machine.functions.end()) return INVALID_HANDLE;
    const Function& kernel = found->second;
    Module& module = machine.modules.at(kernel.module);
    if (module.gone) {
        broken(text("module %#llx was unloaded", kernel.module));
        return INVALID_HANDLE;
    }
    if (module.context != stream->context) return INVALID_HANDLE;
    const bool is_flat = grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1 && shared == 0;
    if (grid == 0 || block == 0 || block > 1024 || !is_flat || !parameters || extra) return INVALID_VALUE;
    const std::string name = kernel.name;
    const std::vector<char> packed = kv_pack(name, parameters);
    const address nth = machine.calls[__func__], seed = machine.seed + nth;
    module.uses[stream->handle] = stream->submitted + 1;
    submit(*stream, text("%s %llu, of %s", __func__, nth, name.c_str()), [=] {
        const char* wrong = kv_launch_packed(name, grid, block, seed, packed.data(), packed.size());
        if (!*wrong) return;
        broken(wrong);
        running->stream->context->lost = LAUNCH_FAILED;
    });
    return SUCCESS;
}
