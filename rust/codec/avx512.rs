//! The primitives on AVX-512 (F, BW, DQ and VL: every server of Intel since 2017, of AMD since 2022).

use super::scalar::{self, code_bytes, width};
use super::x86::{self as narrow, fetch, load_bytes as load_half_bytes, store_bytes as store_half_bytes, value};
use super::{BF16, F16, F32, Kernels, Rows, S8, U4, U8};
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes of a vector.
const BYTES: usize = 64;

/// Whether this processor has what is needed here.
pub(super) fn detected() -> bool {
    narrow::detected()
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
}

type Raw = __m512i;

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn load_bytes(bytes: &[u8]) -> __m512i {
    let bytes: &[u8; 64] = bytes.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn load_quarter_bytes(bytes: &[u8]) -> __m128i {
    let bytes: &[u8; 16] = bytes.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn store_bytes(bytes: &mut [u8], vector: __m512i) {
    let bytes: &mut [u8; 64] = bytes.first_chunk_mut().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the store needs no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn load_floats(floats: &[f32]) -> __m512 {
    let floats: &[f32; 16] = floats.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { _mm512_loadu_ps(floats.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn store_floats(floats: &mut [f32], vector: __m512) {
    let floats: &mut [f32; 16] = floats.first_chunk_mut().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the store needs no alignment.
    unsafe { _mm512_storeu_ps(floats.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn splat(float: f32) -> __m512 {
    _mm512_set1_ps(float)
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn zero() -> __m512i {
    _mm512_setzero_si512()
}

// The greatest ordered integers and the least.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn ends<const D: u8>() -> (__m512i, __m512i) {
    if D == F32 {
        (_mm512_set1_epi32(i32::MAX), _mm512_set1_epi32(i32::MIN))
    } else {
        (_mm512_set1_epi16(i16::MAX), _mm512_set1_epi16(i16::MIN))
    }
}

/// Sixteen values as binary32.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn load<const D: u8>(values: &[u8]) -> __m512 {
    match D {
        F16 => _mm512_cvtph_ps(load_half_bytes(values)),
        BF16 => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_half_bytes(values)))),
        _ => _mm512_castsi512_ps(load_bytes(values)),
    }
}

/// Binary32 of two vectors as values, rounded to the nearest.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn store<const D: u8>(values: &mut [u8], floats: [__m512; 2]) {
    for (floats, values) in floats.into_iter().zip(values.chunks_exact_mut(16 * width(D))) {
        match D {
            F16 => store_half_bytes(values, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(floats)),
            BF16 => {
                let bits = _mm512_castps_si512(floats);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                store_half_bytes(values, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
            }
            _ => store_bytes(values, _mm512_castps_si512(floats)),
        }
    }
}

// Bits that order as signed integers do; the same again undoes it.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn ordered<const D: u8>(bits: __m512i) -> __m512i {
    if D == F32 {
        _mm512_xor_si512(bits, _mm512_srli_epi32::<1>(_mm512_srai_epi32::<31>(bits)))
    } else {
        _mm512_xor_si512(bits, _mm512_srli_epi16::<1>(_mm512_srai_epi16::<15>(bits)))
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn magnitudes<const D: u8>(bits: __m512i) -> __m512i {
    let mask = if D == F32 { _mm512_set1_epi32(0x7fff_ffff) } else { _mm512_set1_epi16(0x7fff) };
    _mm512_and_si512(bits, mask)
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn max<const D: u8>(a: __m512i, b: __m512i) -> __m512i {
    if D == F32 { _mm512_max_epi32(a, b) } else { _mm512_max_epi16(a, b) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn min<const D: u8>(a: __m512i, b: __m512i) -> __m512i {
    if D == F32 { _mm512_min_epi32(a, b) } else { _mm512_min_epi16(a, b) }
}

// The greatest lane, as an ordered integer.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn greatest<const D: u8>(lanes: __m512i) -> i32 {
    let (low, high) = (_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
    narrow::greatest::<D>(narrow::max::<D>(low, high))
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn least<const D: u8>(lanes: __m512i) -> i32 {
    // The complement turns the order around.
    !greatest::<D>(_mm512_xor_si512(lanes, _mm512_set1_epi32(-1)))
}

// Codes of 64 values, from what they are in steps.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn put_codes<const K: u8>(steps: [__m512; 4], codes: &mut [u8]) {
    // What is clipped may be beyond any integer: above it is cut here, below narrowing does it.
    let most = _mm512_set1_ps(scalar::steps(K));
    let [a, b, c, d] = steps.map(|steps| {
        let steps = _mm512_cvtps_epi32(_mm512_min_ps(steps, most));
        // What is narrowed unsigned must not be negative.
        if K == S8 { steps } else { _mm512_max_epi32(steps, zero()) }
    });
    let narrowed = [a, b, c, d].map(|codes| {
        if K == S8 {
            // -128 is no code; what is clipped would get it.
            _mm_max_epi8(_mm512_cvtsepi32_epi8(codes), _mm_set1_epi8(-127))
        } else {
            _mm512_cvtusepi32_epi8(codes)
        }
    });
    let [a, b, c, d] = narrowed;
    let bytes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c));
    if K != U4 {
        return store_bytes(codes, bytes);
    }
    let pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));
    store_half_bytes(codes, _mm512_cvtepi16_epi8(pairs));
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn in_steps<const K: u8>(values: __m512, inverse: __m512, base: __m512) -> __m512 {
    _mm512_mul_ps(if K == S8 { values } else { _mm512_sub_ps(values, base) }, inverse)
}

// Sixteen codes each of 64, as binary32.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn get_codes<const K: u8>(codes: &[u8]) -> [__m512; 4] {
    if K == U4 {
        let pairs = _mm512_cvtepu8_epi16(load_half_bytes(codes));
        let apart = _mm512_or_si512(pairs, _mm512_slli_epi16::<4>(pairs));
        let bytes = _mm512_and_si512(apart, _mm512_set1_epi8(15));
        let sixteens = [
            _mm512_extracti32x4_epi32::<0>(bytes),
            _mm512_extracti32x4_epi32::<1>(bytes),
            _mm512_extracti32x4_epi32::<2>(bytes),
            _mm512_extracti32x4_epi32::<3>(bytes),
        ];
        return sixteens.map(|sixteen| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen)));
    }
    [0, 16, 32, 48].map(|at| {
        let sixteen = load_quarter_bytes(&codes[at..]);
        _mm512_cvtepi32_ps(if K == S8 { _mm512_cvtepi8_epi32(sixteen) } else { _mm512_cvtepu8_epi32(sixteen) })
    })
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn out_of_steps<const K: u8>(codes: __m512, scale: __m512, base: __m512) -> __m512 {
    let product = _mm512_mul_ps(codes, scale);
    if K == S8 { product } else { _mm512_add_ps(product, base) }
}

#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn halve(row: &[u8], halves: &mut [u8]) -> bool {
    let mut steps = row.chunks_exact(64);
    let mut out = halves.chunks_exact_mut(32);
    let exponent = _mm256_set1_epi16(0x7c00);
    let mut bad = 0;
    for (values, halves) in steps.by_ref().zip(out.by_ref()) {
        let rounded = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load::<F32>(values));
        bad |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(rounded, exponent), exponent);
        store_half_bytes(halves, rounded);
    }
    narrow::halve(steps.remainder(), out.into_remainder()) && bad == 0
}

paths!("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl");
