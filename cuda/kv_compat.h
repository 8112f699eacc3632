// What the kernels say to the machine, in two dialects: PTX under NVRTC and nvcc, the executor of the tests under g++.
//
// Every access to memory names its address space: addresses come out of tables, and what the compiler takes for generic
// it loads by slower instructions. Every operation on floats is one correctly rounded operation, never fused, with
// subnormals kept: so the kernels equal rust/codec/scalar.rs bit for bit. No CUDA header is included.
#pragma once

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#if defined(__CUDACC__)
#define KV_DEVICE 1

struct __align__(16) kv_v4 {
    u32 x, y, z, w;
};

#define KV_INLINE static __device__ __forceinline__

// What this launch may also write, or a peer: in the order of the program.
KV_INLINE kv_v4 kv_ld16(u64 at) {
    kv_v4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
KV_INLINE u64 kv_ld8(u64 at) {
    u64 v;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(v) : "l"(at));
    return v;
}
KV_INLINE u16 kv_ld2(u64 at) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}
// Of a table that nobody writes while a kernel runs: the compiler may load it earlier, or once for all.
KV_INLINE u64 kv_table8(u64 at) {
    u64 v;
    asm("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(at));
    return v;
}
KV_INLINE void kv_st16(u64 at, kv_v4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
KV_INLINE void kv_st8(u64 at, u32 low, u32 high) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(at), "r"(low), "r"(high) : "memory");
}
KV_INLINE void kv_st2(u64 at, u32 v) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(at), "h"((u16)v) : "memory");
}
KV_INLINE void kv_st1(u64 at, u32 v) {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}
KV_INLINE void kv_or(u64 at, u32 bits) {
    asm volatile("red.global.or.b32 [%0], %1;" ::"l"(at), "r"(bits) : "memory");
}

KV_INLINE float kv_add(float a, float b) { return __fadd_rn(a, b); }
KV_INLINE float kv_sub(float a, float b) { return __fsub_rn(a, b); }
KV_INLINE float kv_mul(float a, float b) { return __fmul_rn(a, b); }
KV_INLINE float kv_div(float a, float b) { return __fdiv_rn(a, b); }
// Of a number and a NaN: the number. Of two zeros the negative one is less.
KV_INLINE float kv_least(float a, float b) {
    float v;
    asm("min.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
KV_INLINE float kv_most(float a, float b) {
    float v;
    asm("max.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
KV_INLINE u32 kv_bits(float v) { return __float_as_uint(v); }
KV_INLINE float kv_float(u32 bits) { return __uint_as_float(bits); }

// A half as binary32, exactly.
KV_INLINE float kv_of_half(u32 half) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"((u16)half));
    return v;
}
// Two floats to the nearest halves or bfloat16, ties to even; the first in the lower bits.
KV_INLINE u32 kv_to_halves(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
KV_INLINE u32 kv_to_bf16s(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
// Four bytes of eight, `a` being the lower four: each digit of `digits` is a byte's number, and with 8 added the byte's
// sign, eight times.
KV_INLINE u32 kv_bytes(u32 a, u32 b, u32 digits) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(digits));
    return v;
}
KV_INLINE u32 kv_other(u32 v, u32 distance) { return __shfl_xor_sync(0xffffffffu, v, distance); }
// The same number, of which the compiler knows nothing: so it makes no copy of a loop for each that it may be.
KV_INLINE u32 kv_opaque(u32 v) {
    u32 out;
    asm volatile("mov.u32 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

#elif defined(KV_EXECUTOR)
#define KV_DEVICE 1
#include "tests/executor.h"
#endif
