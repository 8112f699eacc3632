//! The primitives on NEON. Halves are converted by instructions that the compiler has no names for yet.

use super::scalar as narrow;
use super::scalar::{self, code_bytes, width};
use super::{BF16, F16, F32, Kernels, Rows, S8, U4, U8};
use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

/// Bytes of a vector.
const BYTES: usize = 32;

/// Whether this processor has what is needed here.
pub(super) fn detected() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

#[derive(Clone, Copy)]
struct Raw([uint8x16_t; 2]);

type Floats = [float32x4_t; 2];

#[inline]
#[target_feature(enable = "neon")]
fn load_half_bytes(bytes: &[u8]) -> uint8x16_t {
    let bytes: &[u8; 16] = bytes.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bytes(bytes: &[u8]) -> Raw {
    Raw([load_half_bytes(bytes), load_half_bytes(&bytes[16..])])
}

#[inline]
#[target_feature(enable = "neon")]
fn store_half_bytes(bytes: &mut [u8], vector: uint8x16_t) {
    let bytes: &mut [u8; 16] = bytes.first_chunk_mut().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the store needs no alignment.
    unsafe { vst1q_u8(bytes.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_bytes(bytes: &mut [u8], Raw([low, high]): Raw) {
    store_half_bytes(bytes, low);
    store_half_bytes(&mut bytes[16..], high);
}

#[inline]
#[target_feature(enable = "neon")]
fn load_floats(floats: &[f32]) -> Floats {
    let floats: &[f32; 8] = floats.first_chunk().expect("two whole vectors");
    // SAFETY: the array is as long as both vectors; loads need no alignment.
    unsafe { [vld1q_f32(floats.as_ptr()), vld1q_f32(floats[4..].as_ptr())] }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_floats(floats: &mut [f32], [low, high]: Floats) {
    let floats: &mut [f32; 8] = floats.first_chunk_mut().expect("two whole vectors");
    // SAFETY: the array is as long as both vectors; stores need no alignment.
    unsafe {
        vst1q_f32(floats.as_mut_ptr(), low);
        vst1q_f32(floats[4..].as_mut_ptr(), high);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn splat(float: f32) -> Floats {
    [vdupq_n_f32(float); 2]
}

#[inline]
#[target_feature(enable = "neon")]
fn zero() -> Raw {
    Raw([vdupq_n_u8(0); 2])
}

// The greatest ordered integers and the least.
#[inline]
#[target_feature(enable = "neon")]
fn ends<const D: u8>() -> (Raw, Raw) {
    if D == F32 {
        let all = |bits: i32| Raw([vreinterpretq_u8_s32(vdupq_n_s32(bits)); 2]);
        (all(i32::MAX), all(i32::MIN))
    } else {
        let all = |bits: i16| Raw([vreinterpretq_u8_s16(vdupq_n_s16(bits)); 2]);
        (all(i16::MAX), all(i16::MIN))
    }
}

// Eight halves as binary32.
#[inline]
#[target_feature(enable = "neon")]
fn from_halves(halves: uint8x16_t) -> Floats {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: every processor of 64-bit ARM has both; they touch no memory.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) low, in(vreg) halves, options(pure, nomem, nostack));
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) high, in(vreg) halves, options(pure, nomem, nostack));
    }
    [low, high]
}

// Eight binary32 as halves, to the nearest, ties to even: the mode that a process starts in, and Rust relies on.
#[inline]
#[target_feature(enable = "neon")]
fn to_halves([low, high]: Floats) -> uint8x16_t {
    let mut halves: uint8x16_t;
    // SAFETY: as above.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) halves, in(vreg) low, options(pure, nomem, nostack));
        asm!("fcvtn2 {0:v}.8h, {1:v}.4s", inout(vreg) halves, in(vreg) high, options(pure, nomem, nostack));
    }
    halves
}

/// Eight values as binary32.
#[inline]
#[target_feature(enable = "neon")]
fn load<const D: u8>(values: &[u8]) -> Floats {
    match D {
        F16 => from_halves(load_half_bytes(values)),
        BF16 => {
            let bits = vreinterpretq_u16_u8(load_half_bytes(values));
            let (low, high) = (vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits));
            [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
        }
        _ => load_bytes(values).0.map(|bits| vreinterpretq_f32_u8(bits)),
    }
}

// Four binary32 as bfloat16, to the nearest, ties to even.
#[inline]
#[target_feature(enable = "neon")]
fn rounded(floats: float32x4_t) -> uint16x4_t {
    let bits = vreinterpretq_u32_f32(floats);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    vshrn_n_u32::<16>(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))))
}

/// Sixteen binary32 as values, rounded to the nearest.
#[inline]
#[target_feature(enable = "neon")]
fn store<const D: u8>(values: &mut [u8], floats: [Floats; 2]) {
    for (eight, values) in floats.into_iter().zip(values.chunks_exact_mut(8 * width(D))) {
        match D {
            F16 => store_half_bytes(values, to_halves(eight)),
            BF16 => {
                let [low, high] = eight.map(|four| rounded(four));
                store_half_bytes(values, vreinterpretq_u8_u16(vcombine_u16(low, high)));
            }
            _ => store_bytes(values, Raw(eight.map(|four| vreinterpretq_u8_f32(four)))),
        }
    }
}

// Bits that order as signed integers do; the same again undoes it.
#[inline]
#[target_feature(enable = "neon")]
fn ordered<const D: u8>(Raw(bits): Raw) -> Raw {
    Raw(bits.map(|bits| {
        let mask = if D == F32 {
            let sign = vshrq_n_s32::<31>(vreinterpretq_s32_u8(bits));
            vreinterpretq_u8_u32(vshrq_n_u32::<1>(vreinterpretq_u32_s32(sign)))
        } else {
            let sign = vshrq_n_s16::<15>(vreinterpretq_s16_u8(bits));
            vreinterpretq_u8_u16(vshrq_n_u16::<1>(vreinterpretq_u16_s16(sign)))
        };
        veorq_u8(bits, mask)
    }))
}

#[inline]
#[target_feature(enable = "neon")]
fn magnitudes<const D: u8>(Raw(bits): Raw) -> Raw {
    let mask = if D == F32 {
        vreinterpretq_u8_u32(vdupq_n_u32(0x7fff_ffff))
    } else {
        vreinterpretq_u8_u16(vdupq_n_u16(0x7fff))
    };
    Raw(bits.map(|bits| vandq_u8(bits, mask)))
}

#[inline]
#[target_feature(enable = "neon")]
fn larger<const D: u8>(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    if D == F32 {
        vreinterpretq_u8_s32(vmaxq_s32(vreinterpretq_s32_u8(a), vreinterpretq_s32_u8(b)))
    } else {
        vreinterpretq_u8_s16(vmaxq_s16(vreinterpretq_s16_u8(a), vreinterpretq_s16_u8(b)))
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn smaller<const D: u8>(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    if D == F32 {
        vreinterpretq_u8_s32(vminq_s32(vreinterpretq_s32_u8(a), vreinterpretq_s32_u8(b)))
    } else {
        vreinterpretq_u8_s16(vminq_s16(vreinterpretq_s16_u8(a), vreinterpretq_s16_u8(b)))
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn max<const D: u8>(Raw(a): Raw, Raw(b): Raw) -> Raw {
    Raw([larger::<D>(a[0], b[0]), larger::<D>(a[1], b[1])])
}

#[inline]
#[target_feature(enable = "neon")]
fn min<const D: u8>(Raw(a): Raw, Raw(b): Raw) -> Raw {
    Raw([smaller::<D>(a[0], b[0]), smaller::<D>(a[1], b[1])])
}

// The greatest lane, as an ordered integer.
#[inline]
#[target_feature(enable = "neon")]
fn greatest<const D: u8>(Raw([low, high]): Raw) -> i32 {
    let most = larger::<D>(low, high);
    if D == F32 { vmaxvq_s32(vreinterpretq_s32_u8(most)) } else { i32::from(vmaxvq_s16(vreinterpretq_s16_u8(most))) }
}

#[inline]
#[target_feature(enable = "neon")]
fn least<const D: u8>(Raw([low, high]): Raw) -> i32 {
    let least = smaller::<D>(low, high);
    if D == F32 { vminvq_s32(vreinterpretq_s32_u8(least)) } else { i32::from(vminvq_s16(vreinterpretq_s16_u8(least))) }
}

// The value of an ordered integer.
fn value<const D: u8>(ordered: i32) -> f32 {
    let sign = (ordered >> 31) as u32;
    match D {
        F16 => scalar::from_half((ordered as u32 ^ sign & 0x7fff) as u16),
        BF16 => f32::from_bits((ordered as u32 ^ sign & 0x7fff) << 16),
        _ => f32::from_bits(ordered as u32 ^ sign & 0x7fff_ffff),
    }
}

// Codes of 32 values, from what they are in steps.
#[inline]
#[target_feature(enable = "neon")]
fn put_codes<const K: u8>(steps: [Floats; 4], codes: &mut [u8]) {
    let most = vdupq_n_f32(scalar::steps(K));
    let bytes = [[steps[0], steps[1]], [steps[2], steps[3]]].map(|sixteen| {
        let [first, second] = sixteen.map(|eight| {
            // To the nearest, ties to even; what is beyond the integers is the last of them.
            let [low, high] = eight.map(|four| vqmovn_s32(vcvtnq_s32_f32(vminq_f32(four, most))));
            vcombine_s16(low, high)
        });
        if K == S8 {
            // -128 is no code; what is clipped would get it.
            let codes = vcombine_s8(vqmovn_s16(first), vqmovn_s16(second));
            vreinterpretq_u8_s8(vmaxq_s8(codes, vdupq_n_s8(-127)))
        } else {
            vcombine_u8(vqmovun_s16(first), vqmovun_s16(second))
        }
    });
    if K == U4 {
        let (even, odd) = (vuzp1q_u8(bytes[0], bytes[1]), vuzp2q_u8(bytes[0], bytes[1]));
        return store_half_bytes(codes, vorrq_u8(even, vshlq_n_u8::<4>(odd)));
    }
    store_bytes(codes, Raw(bytes));
}

#[inline]
#[target_feature(enable = "neon")]
fn in_steps<const K: u8>(values: Floats, inverse: Floats, base: Floats) -> Floats {
    let offset = |n: usize| if K == S8 { values[n] } else { vsubq_f32(values[n], base[n]) };
    [vmulq_f32(offset(0), inverse[0]), vmulq_f32(offset(1), inverse[1])]
}

// Eight codes each of 32, as binary32.
#[inline]
#[target_feature(enable = "neon")]
fn get_codes<const K: u8>(codes: &[u8]) -> [Floats; 4] {
    let sixteens = if K == U4 {
        let pairs = load_half_bytes(codes);
        let (even, odd) = (vandq_u8(pairs, vdupq_n_u8(15)), vshrq_n_u8::<4>(pairs));
        [vzip1q_u8(even, odd), vzip2q_u8(even, odd)]
    } else {
        load_bytes(codes).0
    };
    let eight = |bytes: uint8x8_t| {
        if K == S8 {
            let wide = vmovl_s8(vreinterpret_s8_u8(bytes));
            [vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))]
        } else {
            let wide = vmovl_u8(bytes);
            [vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))]
        }
    };
    let [first, second] = sixteens;
    [eight(vget_low_u8(first)), eight(vget_high_u8(first)), eight(vget_low_u8(second)), eight(vget_high_u8(second))]
}

#[inline]
#[target_feature(enable = "neon")]
fn out_of_steps<const K: u8>(codes: Floats, scale: Floats, base: Floats) -> Floats {
    let value = |n: usize| {
        let product = vmulq_f32(codes[n], scale[n]);
        if K == S8 { product } else { vaddq_f32(product, base[n]) }
    };
    [value(0), value(1)]
}

// Has a row come from memory.
#[inline]
#[target_feature(enable = "neon")]
fn fetch(row: Option<&[u8]>) {
    for line in row.into_iter().flat_map(|row| row.chunks(64)) {
        // SAFETY: a hint; it changes nothing.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) line.as_ptr(), options(nostack, readonly, preserves_flags)) };
    }
}

#[target_feature(enable = "neon")]
fn halve(row: &[u8], halves: &mut [u8]) -> bool {
    let mut steps = row.chunks_exact(32);
    let mut out = halves.chunks_exact_mut(16);
    let exponent = vdupq_n_u16(0x7c00);
    let mut bad = vdupq_n_u16(0);
    for (values, halves) in steps.by_ref().zip(out.by_ref()) {
        let rounded = to_halves(load::<F32>(values));
        bad = vorrq_u16(bad, vceqq_u16(vandq_u16(vreinterpretq_u16_u8(rounded), exponent), exponent));
        store_half_bytes(halves, rounded);
    }
    narrow::halve(steps.remainder(), out.into_remainder()) && vmaxvq_u16(bad) == 0
}

paths!("neon");
