// Each rule of the stand-in for the driver, in each of its schedules; and the host's part of the pool, driven over it.
//
//     standin_check STANDIN IMAGES [CASE]     the shared object, as the host's part opens it; a folder
//
// A case begins on a fresh driver. What it leaves, or breaks without saying so, is a failure of it; the program ends
// with 1 at a failure.
#include "../kv_host.h"
#include "../kv_pool.cu"
#include "standin.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

typedef void* Handle;

struct Attributes {
    int order, hints[4];
    unsigned flags;
};

extern "C" {
int cuInit(unsigned);
int cuDriverGetVersion(int*);
int cuDeviceGetCount(int*);
int cuDevicePrimaryCtxRetain(Handle*, int);
int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxPushCurrent_v2(Handle);
int cuCtxPopCurrent_v2(Handle*);
int cuCtxGetCurrent(Handle*);
int cuCtxSynchronize(void);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemAlloc_v2(u64*, size_t);
int cuMemFree_v2(u64);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemHostRegister_v2(void*, size_t, unsigned);
int cuMemHostUnregister(void*);
int cuMemHostGetDevicePointer_v2(u64*, void*, unsigned);
int cuPointerGetAttribute(void*, int, u64);
int cuMemPoolCreate(Handle*, const void*);
int cuMemPoolSetAttribute(Handle, int, void*);
int cuMemPoolGetAttribute(Handle, int, void*);
int cuMemPoolDestroy(Handle);
int cuMemAllocFromPoolAsync(u64*, size_t, Handle, Handle);
int cuMemFreeAsync(u64, Handle);
int cuStreamCreateWithPriority(Handle*, unsigned, int);
int cuStreamDestroy_v2(Handle);
int cuStreamGetCtx(Handle, Handle*);
int cuStreamSynchronize(Handle);
int cuStreamQuery(Handle);
int cuStreamWaitEvent(Handle, Handle, unsigned);
int cuEventCreate(Handle*, unsigned);
int cuEventDestroy_v2(Handle);
int cuEventRecord(Handle, Handle);
int cuEventQuery(Handle);
int cuEventSynchronize(Handle);
int cuEventElapsedTime(float*, Handle, Handle);
int cuMemcpyAsync(u64, u64, size_t, Handle);
int cuMemcpyBatchAsync(u64*, u64*, size_t*, size_t, Attributes*, size_t*, size_t, size_t*, Handle);
int cuModuleLoadData(Handle*, const void*);
int cuModuleUnload(Handle);
int cuModuleGetFunction(Handle*, Handle, const char*);
int cuLaunchKernel(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                   void**);
}

static const char *library, *images_folder;
static const char* now_case = "";
static std::string now_schedule;
static bool is_eager, is_lazy;
static int failures;

static void expect_at(int line, bool holds, const char* what, const std::string& more = "") {
    if (holds) return;
    ++failures;
    fprintf(stderr, "%s, %s, line %d: %s %s\n", now_case, now_schedule.c_str(), line, what, more.c_str());
}
#define EXPECT(...) expect_at(__LINE__, (__VA_ARGS__), #__VA_ARGS__)
#define EXPECT_CODE(code, ...) \
    [&](int was) { expect_at(__LINE__, was == (code), #__VA_ARGS__, "gave " + std::to_string(was)); }(__VA_ARGS__)
#define OK(...) EXPECT_CODE(0, __VA_ARGS__)

static std::string all_of(size_t (*ask)(char*, size_t)) {
    std::string text(1 << 16, '\0');
    ask(text.data(), text.size());
    text.resize(strlen(text.c_str()));
    return text;
}

// So many rules were broken, and the report has those words; it counts from here again.
static size_t known_breaks;
static void expect_broken_at(int line, size_t count, std::initializer_list<const char*> words) {
    const size_t was = standin_report(nullptr, 0) - known_breaks;
    const std::string report = all_of(standin_report);
    expect_at(line, was == count, "rules broken:", std::to_string(was) + "\n" + report);
    for (const char* word : words) {
        expect_at(line, report.find(word) != std::string::npos, word, "is not in\n" + report);
    }
    known_breaks += was;
}
#define BROKEN(count, ...) expect_broken_at(__LINE__, count, {__VA_ARGS__})

// A cubin's header, as compilers mark it: up to ABI 7 the first byte of the flags is the architecture, then the second.
static std::vector<char> program_for(unsigned arch) {
    std::vector<char> elf(64);
    memcpy(elf.data(), "\x7f" "ELF\x02\x01\x01", 7);
    elf[8] = arch >= 100 ? 8 : 7;
    elf[18] = (char)190;
    elf[arch >= 100 ? 49 : 48] = (char)arch;
    return elf;
}

static std::string ptx_for(unsigned version, unsigned arch) {
    const std::string number = std::to_string(version / 10) + "." + std::to_string(version % 10);
    return "//\n// Generated\n\n.version " + number + "\n.target sm_" + std::to_string(arch) + "\n.address_size 64\n";
}

static std::string file_of(const std::string& name) {
    std::ifstream file(images_folder + ("/" + name), std::ios::binary);
    expect_at(__LINE__, file.good(), name.c_str(), "is not there");
    return {std::istreambuf_iterator<char>(file), {}};
}

// A context that is current, a stream and an event; what a case made of them is gone after it.
struct Driver {
    Handle context = nullptr, module = nullptr, copy = nullptr;
    std::vector<Handle> streams, events;
    std::vector<u64> memory;
    std::vector<void*> pinned_memory;

    Driver() {
        OK(cuInit(0));
        OK(cuDevicePrimaryCtxRetain(&context, 0));
        OK(cuCtxPushCurrent_v2(context));
        OK(cuModuleLoadData(&module, program_for(90).data()));
        OK(cuModuleGetFunction(&copy, module, "kv_copy"));
    }
    // A lost context refuses even what it takes back: that is no failure of the case.
    ~Driver() {
        cuCtxSynchronize();
        for (Handle event : events) cuEventDestroy_v2(event);
        for (Handle stream : streams) cuStreamDestroy_v2(stream);
        for (u64 at : memory) cuMemFree_v2(at);
        for (void* at : pinned_memory) cuMemFreeHost(at);
        cuModuleUnload(module);
        cuCtxPopCurrent_v2(nullptr);
        cuDevicePrimaryCtxRelease_v2(0);
    }
    Handle stream(unsigned flags = 1) {
        Handle made = nullptr;
        OK(cuStreamCreateWithPriority(&made, flags, 0));
        streams.push_back(made);
        return made;
    }
    Handle event(unsigned flags = 2) {
        Handle made = nullptr;
        OK(cuEventCreate(&made, flags));
        events.push_back(made);
        return made;
    }
    u64 device(size_t bytes) {
        u64 at = 0;
        OK(cuMemAlloc_v2(&at, bytes));
        memory.push_back(at);
        return at;
    }
    // Host memory that is one byte all over.
    unsigned char* pinned(size_t bytes, int byte) {
        void* at = nullptr;
        OK(cuMemHostAlloc(&at, bytes, 3));
        pinned_memory.push_back(at);
        return (unsigned char*)memset(at, byte, bytes);
    }
    void forget(u64 at) { std::erase(memory, at); }
    // By the kernel, from a table that is passed in host memory.
    int by_kernel(const kv_pair* table, u32 n, u32 vectors, Handle stream) {
        u64 device_table = 0;
        if (int code = cuMemHostGetDevicePointer_v2(&device_table, (void*)table, 0)) return code;
        void* parameters[] = {&device_table, &n, &vectors};
        return cuLaunchKernel(copy, 2, 1, 1, 64, 1, 1, 0, stream, parameters, nullptr);
    }
};

static u64 at(const void* memory) { return (u64)memory; }

// The byte that memory begins with now.
static int byte_at(u64 address) {
    unsigned char byte = 0;
    EXPECT(standin_read(address, &byte, 1) == 0);
    return byte;
}

struct Case {
    const char* name;
    void (*run)();
};
static std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}
#define CASE(name) \
    static void name(); \
    static const bool name##_is_one = (cases().push_back({#name, name}), true); \
    static void name()

#include "standin_memory_rules.h"
#include "standin_rules.h"
#include "standin_host.h"

static void run(const Case& each, uint64_t schedule, uint64_t seed, const char* name) {
    standin_reset();
    standin_set("schedule", schedule);
    standin_set("seed", seed);
    known_breaks = 0;
    now_case = each.name;
    now_schedule = std::string(name) + (schedule == STANDIN_RANDOM ? " " + std::to_string(seed) : "");
    is_eager = schedule == STANDIN_EAGER;
    is_lazy = schedule == STANDIN_LAZY;
    each.run();
    BROKEN(0);
    expect_at(__LINE__, standin_leaks(nullptr, 0) == 0, "is left:", all_of(standin_leaks));
}

int main(int count, char** arguments) {
    if (count < 3) return 2;
    library = arguments[1];
    images_folder = arguments[2];
    int ran = 0;
    for (const Case& each : cases()) {
        if (count > 3 && strcmp(arguments[3], each.name) != 0) continue;
        ++ran;
        run(each, STANDIN_EAGER, 1, "eager");
        run(each, STANDIN_LAZY, 1, "lazy");
        for (uint64_t seed = 1; seed <= 8; ++seed) run(each, STANDIN_RANDOM, seed, "random");
    }
    printf("%d cases, %d failures\n", ran, failures);
    return failures || !ran;
}
