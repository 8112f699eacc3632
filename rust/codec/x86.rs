//! The primitives on AVX2 and F16C.

use super::scalar as narrow;
use super::scalar::{self, code_bytes, width};
use super::{BF16, F16, F32, Kernels, Rows, S8, U4, U8};
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes of a vector.
const BYTES: usize = 32;

/// Whether this processor has what is needed here.
pub(super) fn detected() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("f16c")
}

type Raw = __m256i;

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn load_bytes(bytes: &[u8]) -> __m256i {
    let bytes: &[u8; 32] = bytes.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_half_bytes(bytes: &[u8]) -> __m128i {
    let bytes: &[u8; 16] = bytes.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store_half_bytes(bytes: &mut [u8], vector: __m128i) {
    let bytes: &mut [u8; 16] = bytes.first_chunk_mut().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the store needs no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn store_bytes(bytes: &mut [u8], vector: __m256i) {
    let bytes: &mut [u8; 32] = bytes.first_chunk_mut().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the store needs no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_floats(floats: &[f32]) -> __m256 {
    let floats: &[f32; 8] = floats.first_chunk().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the load needs no alignment.
    unsafe { _mm256_loadu_ps(floats.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store_floats(floats: &mut [f32], vector: __m256) {
    let floats: &mut [f32; 8] = floats.first_chunk_mut().expect("a whole vector");
    // SAFETY: the array is as long as the vector; the store needs no alignment.
    unsafe { _mm256_storeu_ps(floats.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn splat(float: f32) -> __m256 {
    _mm256_set1_ps(float)
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn zero() -> __m256i {
    _mm256_setzero_si256()
}

// The greatest ordered integers and the least.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn ends<const D: u8>() -> (__m256i, __m256i) {
    if D == F32 {
        (_mm256_set1_epi32(i32::MAX), _mm256_set1_epi32(i32::MIN))
    } else {
        (_mm256_set1_epi16(i16::MAX), _mm256_set1_epi16(i16::MIN))
    }
}

/// Eight values as binary32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load<const D: u8>(values: &[u8]) -> __m256 {
    match D {
        F16 => _mm256_cvtph_ps(load_half_bytes(values)),
        BF16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_half_bytes(values)))),
        _ => _mm256_castsi256_ps(load_bytes(values)),
    }
}

/// Sixteen binary32 as values, rounded to the nearest.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store<const D: u8>(values: &mut [u8], floats: [__m256; 2]) {
    match D {
        F16 => {
            let [low, high] = floats.map(|floats| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(floats));
            store_bytes(values, _mm256_set_m128i(high, low));
        }
        BF16 => {
            let [low, high] = floats.map(|floats| {
                let bits = _mm256_castps_si256(floats);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                _mm256_srli_epi32::<16>(rounded)
            });
            // Packing works in halves; back in order.
            store_bytes(values, _mm256_permute4x64_epi64::<0b_11_01_10_00>(_mm256_packus_epi32(low, high)));
        }
        _ => {
            store_bytes(values, _mm256_castps_si256(floats[0]));
            store_bytes(&mut values[32..], _mm256_castps_si256(floats[1]));
        }
    }
}

// Bits that order as signed integers do; the same again undoes it.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn ordered<const D: u8>(bits: __m256i) -> __m256i {
    if D == F32 {
        _mm256_xor_si256(bits, _mm256_srli_epi32::<1>(_mm256_srai_epi32::<31>(bits)))
    } else {
        _mm256_xor_si256(bits, _mm256_srli_epi16::<1>(_mm256_srai_epi16::<15>(bits)))
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn magnitudes<const D: u8>(bits: __m256i) -> __m256i {
    let mask = if D == F32 { _mm256_set1_epi32(0x7fff_ffff) } else { _mm256_set1_epi16(0x7fff) };
    _mm256_and_si256(bits, mask)
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn max<const D: u8>(a: __m256i, b: __m256i) -> __m256i {
    if D == F32 { _mm256_max_epi32(a, b) } else { _mm256_max_epi16(a, b) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn min<const D: u8>(a: __m256i, b: __m256i) -> __m256i {
    if D == F32 { _mm256_min_epi32(a, b) } else { _mm256_min_epi16(a, b) }
}

// The greatest lane, as an ordered integer.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn greatest<const D: u8>(lanes: __m256i) -> i32 {
    let (low, high) = (_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    if D == F32 {
        let most = _mm_max_epi32(low, high);
        let most = _mm_max_epi32(most, _mm_shuffle_epi32::<0b_01_00_11_10>(most));
        return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32::<0b_10_11_00_01>(most)));
    }
    // The least of what is left of each to the top, unsigned: there is an instruction for that.
    let rest = _mm_sub_epi16(_mm_set1_epi16(i16::MAX), _mm_max_epi16(low, high));
    i32::from(i16::MAX) - (_mm_cvtsi128_si32(_mm_minpos_epu16(rest)) & 0xffff)
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn least<const D: u8>(lanes: __m256i) -> i32 {
    // The complement turns the order around.
    !greatest::<D>(_mm256_xor_si256(lanes, _mm256_set1_epi32(-1)))
}

// The value of an ordered integer.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn value<const D: u8>(ordered: i32) -> f32 {
    let sign = (ordered >> 31) as u32;
    match D {
        F16 => _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128((ordered as u32 ^ sign & 0x7fff) as i32))),
        BF16 => f32::from_bits((ordered as u32 ^ sign & 0x7fff) << 16),
        _ => f32::from_bits(ordered as u32 ^ sign & 0x7fff_ffff),
    }
}

// Codes of 32 values, from what they are in steps.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn put_codes<const K: u8>(steps: [__m256; 4], codes: &mut [u8]) {
    // What is clipped may be beyond any integer: above it is cut here, below packing does it.
    let most = _mm256_set1_ps(scalar::steps(K));
    let [a, b, c, d] = steps.map(|steps| _mm256_cvtps_epi32(_mm256_min_ps(steps, most)));
    let (first, second) = (_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    let bytes = if K == S8 {
        // -128 is no code; what is clipped would get it.
        _mm256_max_epi8(_mm256_packs_epi16(first, second), _mm256_set1_epi8(-127))
    } else {
        _mm256_packus_epi16(first, second)
    };
    // Packing works in halves; back in order.
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if K != U4 {
        return store_bytes(codes, bytes);
    }
    let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
    let packed = _mm256_permute4x64_epi64::<0b_00_00_10_00>(_mm256_packus_epi16(pairs, pairs));
    store_half_bytes(codes, _mm256_castsi256_si128(packed));
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn in_steps<const K: u8>(values: __m256, inverse: __m256, base: __m256) -> __m256 {
    _mm256_mul_ps(if K == S8 { values } else { _mm256_sub_ps(values, base) }, inverse)
}

// Eight codes each of 32, as binary32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn get_codes<const K: u8>(codes: &[u8]) -> [__m256; 4] {
    if K == U4 {
        let (pairs, mask) = (load_half_bytes(codes), _mm_set1_epi8(15));
        let (even, odd) = (_mm_and_si128(pairs, mask), _mm_and_si128(_mm_srli_epi16::<4>(pairs), mask));
        let (first, second) = (_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd));
        let eights = [first, _mm_srli_si128::<8>(first), second, _mm_srli_si128::<8>(second)];
        return eights.map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)));
    }
    [0, 8, 16, 24].map(|at| {
        let eight: &[u8; 8] = codes[at..].first_chunk().expect("eight codes");
        // SAFETY: the array is as long as what is loaded; the load needs no alignment.
        let eight = unsafe { _mm_loadl_epi64(eight.as_ptr().cast()) };
        _mm256_cvtepi32_ps(if K == S8 { _mm256_cvtepi8_epi32(eight) } else { _mm256_cvtepu8_epi32(eight) })
    })
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn out_of_steps<const K: u8>(codes: __m256, scale: __m256, base: __m256) -> __m256 {
    let product = _mm256_mul_ps(codes, scale);
    if K == S8 { product } else { _mm256_add_ps(product, base) }
}

// Has a row come from memory.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn fetch(row: Option<&[u8]>) {
    for line in row.into_iter().flat_map(|row| row.chunks(64)) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn halve(row: &[u8], halves: &mut [u8]) -> bool {
    let mut steps = row.chunks_exact(32);
    let mut out = halves.chunks_exact_mut(16);
    let exponent = _mm_set1_epi16(0x7c00);
    let mut bad = _mm_setzero_si128();
    for (values, halves) in steps.by_ref().zip(out.by_ref()) {
        let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load::<F32>(values));
        bad = _mm_or_si128(bad, _mm_cmpeq_epi16(_mm_and_si128(rounded, exponent), exponent));
        store_half_bytes(halves, rounded);
    }
    narrow::halve(steps.remainder(), out.into_remainder()) && _mm_testz_si128(bad, bad) == 1
}

paths!("avx2,f16c");
