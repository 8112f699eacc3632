// Runs CUDA kernels on the CPU, from their own source: every CUDA thread is a fiber, blocks run one after another.
//
//     ready fibers ─▶ one at random runs to its next barrier ─▶ waits ─▶ a whole warp or block waits ─▶ ready again
//
// Blocks, and the fibers in one, come in an order that a seed says: now and then one warp runs as far ahead of the
// others as its barriers let it. Shared memory is poisoned before each block; an access that is not aligned ends the
// program with its address, and a barrier that some threads never reach ends the launch with who waits where. What
// reads or writes beyond its memory is found by the sanitizers, which are told of every switch.
// Built with KV_TSAN each CUDA thread is a thread instead, so that ThreadSanitizer sees what no barrier orders.
//
// It has full warps, barriers of blocks, shuffles and one atomic. It has no memory model between blocks, no partial
// warps, and no time: nothing measured on it says anything of a GPU.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(KV_TSAN)
#include <barrier>
#include <thread>
#else
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#endif

struct kv_dim {
    u32 x;
};

#if defined(KV_TSAN)
static thread_local kv_dim threadIdx;
#else
static kv_dim threadIdx;
#endif
static kv_dim blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __launch_bounds__(...)
// In a section of its own, to be found and poisoned.
#define __shared__ static __attribute__((section("kv_shared_memory")))
#define KV_INLINE static inline

extern "C" {
extern char __start_kv_shared_memory[] __attribute__((weak));
extern char __stop_kv_shared_memory[] __attribute__((weak));
}

struct alignas(16) kv_v4 {
    u32 x, y, z, w;
};

// Where memory is that has an address: who keeps it elsewhere, or watches who touches it, defines this before.
#if !defined(KV_WHERE)
#define KV_WHERE(at, bytes) reinterpret_cast<void*>(at)
#endif

template <class T> static T* kv_at(u64 at) {
    if (at % sizeof(T) != 0) {
        std::fprintf(stderr, "executor: an access of %zu bytes to %#llx, block %u thread %u\n", sizeof(T), at,
                     blockIdx.x, threadIdx.x);
        std::abort();
    }
    return static_cast<T*>(KV_WHERE(at, sizeof(T)));
}

KV_INLINE kv_v4 kv_ld16(u64 at) { return *kv_at<kv_v4>(at); }
KV_INLINE u64 kv_ld8(u64 at) { return *kv_at<u64>(at); }
KV_INLINE u16 kv_ld2(u64 at) { return *kv_at<u16>(at); }
KV_INLINE u64 kv_table8(u64 at) { return *kv_at<u64>(at); }
KV_INLINE void kv_st16(u64 at, kv_v4 v) { *kv_at<kv_v4>(at) = v; }
KV_INLINE void kv_st8(u64 at, u32 low, u32 high) { *kv_at<u64>(at) = low | (u64)high << 32; }
KV_INLINE void kv_st2(u64 at, u32 v) { *kv_at<u16>(at) = (u16)v; }
KV_INLINE void kv_st1(u64 at, u32 v) { *kv_at<u8>(at) = (u8)v; }
KV_INLINE void kv_or(u64 at, u32 bits) { __atomic_fetch_or(kv_at<u32>(at), bits, __ATOMIC_RELAXED); }

KV_INLINE float kv_add(float a, float b) { return a + b; }
KV_INLINE float kv_sub(float a, float b) { return a - b; }
KV_INLINE float kv_mul(float a, float b) { return a * b; }
KV_INLINE float kv_div(float a, float b) { return a / b; }
KV_INLINE bool kv_is_less(float a, float b) { return a < b || (a == b && std::signbit(a) && !std::signbit(b)); }
KV_INLINE float kv_least(float a, float b) { return std::isnan(a) || kv_is_less(b, a) ? b : a; }
KV_INLINE float kv_most(float a, float b) { return std::isnan(a) || kv_is_less(a, b) ? b : a; }
KV_INLINE u32 kv_bits(float v) {
    u32 bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
KV_INLINE float kv_float(u32 bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
KV_INLINE u32 kv_opaque(u32 v) { return v; }

// Written out, from the format: no processor's conversion, and no compiler's.
KV_INLINE float kv_of_half(u32 half) {
    const int exponent = half >> 10 & 31;
    const float fraction = (float)(half & 0x3ff);
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction == 0.0f ? sign * INFINITY : NAN;
    return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0f + fraction, exponent - 25));
}
KV_INLINE u32 kv_to_half(float v) {
    const u32 sign = kv_bits(v) >> 16 & 0x8000;
    const float magnitude = std::fabs(v);
    if (std::isnan(v)) return 0x7fff;
    if (magnitude == 0.0f) return sign;
    // Halfway between the greatest and what would be next.
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(magnitude, &exponent);
    // In units of the last place, that of subnormals being 2^-24.
    const int unit = (exponent < -13 ? -13 : exponent) - 11;
    const u32 whole = (u32)std::nearbyint(std::ldexp(magnitude, -unit));
    return sign | (whole + ((u32)(unit + 24) << 10));
}
KV_INLINE u32 kv_to_halves(float low, float high) { return kv_to_half(low) | kv_to_half(high) << 16; }
KV_INLINE u32 kv_to_bf16(float v) {
    const u32 bits = kv_bits(v);
    return std::isnan(v) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
KV_INLINE u32 kv_to_bf16s(float low, float high) { return kv_to_bf16(low) | kv_to_bf16(high) << 16; }
KV_INLINE u32 kv_bytes(u32 a, u32 b, u32 digits) {
    const u64 eight = a | (u64)b << 32;
    u32 v = 0;
    for (u32 k = 0; k < 4; ++k) {
        const u32 digit = digits >> 4 * k & 15, byte = (u32)(eight >> 8 * (digit & 7)) & 0xff;
        v |= (digit & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * k;
    }
    return v;
}

// Numbers from a seed: the same everywhere.
struct kv_chance {
    u64 state;

    u32 below(u32 n) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (u32)((state >> 33) % n);
    }
};

// What threads of a warp say to each other in a shuffle. Two in turn: nobody writes one before all have read it.
static u32 kv_said[2][1024];

#if defined(KV_TSAN)

static std::barrier<>* kv_all;
static std::vector<std::unique_ptr<std::barrier<>>> kv_warps;
static thread_local u32 kv_turn;

KV_INLINE void __syncthreads() { kv_all->arrive_and_wait(); }
KV_INLINE u32 kv_other(u32 v, u32 distance) {
    u32* said = kv_said[kv_turn++ % 2];
    said[threadIdx.x] = v;
    kv_warps[threadIdx.x / 32]->arrive_and_wait();
    return said[threadIdx.x ^ distance];
}

// Empty, or what went wrong.
static const char* kv_run(u32 grid, u32 block, u64, const std::function<void()>& body) {
    gridDim.x = grid;
    blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        std::barrier<> all(block);
        kv_all = &all;
        kv_warps.clear();
        for (u32 warp = 0; warp < block / 32; ++warp) kv_warps.push_back(std::make_unique<std::barrier<>>(32));
        if (__start_kv_shared_memory)
            std::memset(__start_kv_shared_memory, 0xa5, __stop_kv_shared_memory - __start_kv_shared_memory);
        std::vector<std::thread> threads;
        for (u32 t = 0; t < block; ++t)
            threads.emplace_back([&body, t] {
                threadIdx.x = t;
                kv_turn = 0;
                body();
            });
        for (std::thread& thread : threads) thread.join();
    }
    return "";
}

#else

enum kv_state { KV_READY, KV_AT_BLOCK, KV_AT_WARP, KV_DONE };

struct kv_fiber {
    ucontext_t context;
    kv_state state;
    u32 turn;
    std::unique_ptr<char[]> stack;
};

#define KV_STACK (128u << 10)

struct kv_executor {
    ucontext_t main;
    std::vector<kv_fiber> fibers;
    // By warp: who can run, and how many wait.
    std::vector<std::vector<u32>> ready;
    std::vector<u32> waiting_warps;
    u32 current, waiting, done, favoured;
    kv_chance chance;
    const std::function<void()>* body;
    // Where the program itself runs, as the sanitizers know it.
    const void* main_stack;
    size_t main_bytes;
};
static kv_executor kv_here;

#if defined(__SANITIZE_ADDRESS__)
KV_INLINE void kv_leave(void** fake, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, stack, bytes);
}
KV_INLINE void kv_arrive(void* fake, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake, stack, bytes);
}
#else
KV_INLINE void kv_leave(void**, const void*, size_t) {}
KV_INLINE void kv_arrive(void*, const void**, size_t*) {}
#endif

// From a fiber back to the loop, which says who is next.
static void kv_yield(kv_state state) {
    kv_fiber& mine = kv_here.fibers[kv_here.current];
    mine.state = state;
    void* fake = nullptr;
    kv_leave(state == KV_DONE ? nullptr : &fake, kv_here.main_stack, kv_here.main_bytes);
    swapcontext(&mine.context, &kv_here.main);
    kv_arrive(fake, nullptr, nullptr);
}

static void kv_fiber_main() {
    kv_arrive(nullptr, &kv_here.main_stack, &kv_here.main_bytes);
    (*kv_here.body)();
    kv_yield(KV_DONE);
}

KV_INLINE void __syncthreads() { kv_yield(KV_AT_BLOCK); }
KV_INLINE u32 kv_other(u32 v, u32 distance) {
    const u32 me = threadIdx.x;
    u32* said = kv_said[kv_here.fibers[me].turn++ % 2];
    said[me] = v;
    kv_yield(KV_AT_WARP);
    return said[me ^ distance];
}

static void kv_wake(u32 first, u32 end) {
    for (u32 t = first; t < end; ++t) {
        kv_here.fibers[t].state = KV_READY;
        kv_here.ready[t / 32].push_back(t);
    }
}

// Who runs next, of whoever can; false: nobody.
static bool kv_next(u32 block) {
    kv_executor& here = kv_here;
    const u32 warps = block / 32;
    if (here.chance.below(200) == 0) here.favoured = here.chance.below(warps);
    u32 warp = here.chance.below(8) != 0 ? here.favoured : here.chance.below(warps);
    for (u32 tries = 0; here.ready[warp].empty(); warp = (warp + 1) % warps)
        if (++tries > warps) return false;
    std::vector<u32>& ready = here.ready[warp];
    std::swap(ready[here.chance.below((u32)ready.size())], ready.back());
    here.current = ready.back();
    ready.pop_back();
    return true;
}

static const char* kv_run_block(u32 block) {
    kv_executor& here = kv_here;
    here.waiting = here.done = 0;
    here.waiting_warps.assign(block / 32, 0);
    for (u32 t = 0; t < block; ++t) {
        kv_fiber& fiber = here.fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = KV_STACK;
        fiber.context.uc_link = nullptr;
        fiber.turn = 0;
        makecontext(&fiber.context, kv_fiber_main, 0);
    }
    here.ready.assign(block / 32, {});
    here.favoured = here.chance.below(block / 32);
    kv_wake(0, block);
    while (kv_next(block)) {
        const u32 next = threadIdx.x = here.current;
        void* fake = nullptr;
        kv_leave(&fake, here.fibers[next].stack.get(), KV_STACK);
        swapcontext(&here.main, &here.fibers[next].context);
        kv_arrive(fake, nullptr, nullptr);
        switch (here.fibers[next].state) {
        case KV_AT_WARP:
            if (++here.waiting_warps[next / 32] == 32) {
                here.waiting_warps[next / 32] = 0;
                kv_wake(next / 32 * 32, next / 32 * 32 + 32);
            }
            break;
        case KV_AT_BLOCK:
            if (++here.waiting == block) {
                here.waiting = 0;
                kv_wake(0, block);
            }
            break;
        default:
            ++here.done;
        }
    }
    if (here.done == block) return "";
    static char message[128];
    u32 warps = 0;
    for (u32 n : here.waiting_warps) warps += n;
    std::snprintf(message, sizeof message, "block %u: %u threads ended, %u wait for their block, %u for their warp",
                  blockIdx.x, here.done, here.waiting, warps);
    return message;
}

// Empty, or what went wrong: a barrier that some threads did not reach.
static const char* kv_run(u32 grid, u32 block, u64 seed, const std::function<void()>& body) {
    if (block == 0 || block % 32 != 0 || block > 1024) return "a block has whole warps, and 1024 threads at most";
    kv_here.chance.state = seed * 2 + 1;
    kv_here.body = &body;
    while (kv_here.fibers.size() < block) {
        kv_here.fibers.emplace_back();
        kv_here.fibers.back().stack.reset(new char[KV_STACK]);
    }
    gridDim.x = grid;
    blockDim.x = block;
    std::vector<u32> order;
    for (u32 n = 0; n < grid; ++n) order.push_back(n);
    for (u32 n = grid; n > 1; --n) std::swap(order[n - 1], order[kv_here.chance.below(n)]);
    for (u32 n : order) {
        blockIdx.x = n;
        if (__start_kv_shared_memory)
            std::memset(__start_kv_shared_memory, 0xa5, __stop_kv_shared_memory - __start_kv_shared_memory);
        const char* wrong = kv_run_block(block);
        if (*wrong) return wrong;
    }
    return "";
}

#endif
