//! The arithmetic on AVX2 and F16C: eight binary32 at a time, and greatest values as integers, since the bits of floats
//! of one sign order as they do.

use super::scalar::{self, code_bytes, width};
use super::{BF16, F16, F32, Kernels, Rows, S8, U4, U8};
use std::arch::x86_64::*;
use std::ops::Range;

/// Whether this processor has what is needed here.
pub(super) fn detected() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("f16c")
}

/// Values that a step takes; what is left of a row is done as by definition.
const STEP: usize = 32;

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_bytes(bytes: &[u8]) -> __m256i {
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
fn store_bytes(bytes: &mut [u8], vector: __m256i) {
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
fn max<const D: u8>(a: __m256i, b: __m256i) -> __m256i {
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
fn greatest<const D: u8>(lanes: __m256i) -> i32 {
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
fn value<const D: u8>(ordered: i32) -> f32 {
    let sign = (ordered >> 31) as u32;
    match D {
        F16 => _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128((ordered as u32 ^ sign & 0x7fff) as i32))),
        BF16 => f32::from_bits((ordered as u32 ^ sign & 0x7fff) << 16),
        _ => f32::from_bits(ordered as u32 ^ sign & 0x7fff_ffff),
    }
}

// The range of two parts.
fn joined(one: (f32, f32), other: (f32, f32)) -> (f32, f32) {
    let nan = one.0.is_nan() || one.1.is_nan() || other.0.is_nan();
    let lo = if other.0.total_cmp(&one.0).is_lt() { other.0 } else { one.0 };
    let hi = if other.1.total_cmp(&one.1).is_gt() { other.1 } else { one.1 };
    if nan { (f32::NAN, f32::NAN) } else { (lo, hi) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn absmax_of<const D: u8>(row: &[u8]) -> f32 {
    let (pairs, vectors) = (row.chunks_exact(64), row.chunks_exact(64).remainder().chunks_exact(32));
    let tail = vectors.remainder();
    let mut most = [_mm256_setzero_si256(); 2];
    for pair in pairs {
        most[0] = max::<D>(most[0], magnitudes::<D>(load_bytes(&pair[..32])));
        most[1] = max::<D>(most[1], magnitudes::<D>(load_bytes(&pair[32..])));
    }
    for vector in vectors {
        most[0] = max::<D>(most[0], magnitudes::<D>(load_bytes(vector)));
    }
    let most = value::<D>(greatest::<D>(max::<D>(most[0], most[1])));
    if tail.is_empty() { most } else { joined((0.0, most), (0.0, scalar::absmax_of::<D>(tail))).1 }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn range_of<const D: u8>(row: &[u8]) -> (f32, f32) {
    let vectors = row.chunks_exact(32);
    let tail = vectors.remainder();
    if row.len() < 32 {
        return scalar::range_of::<D>(row);
    }
    let (mut lo, mut hi) = (_mm256_set1_epi32(i32::MAX), _mm256_set1_epi32(i32::MIN));
    if D != F32 {
        (lo, hi) = (_mm256_set1_epi16(i16::MAX), _mm256_set1_epi16(i16::MIN));
    }
    for vector in vectors {
        let bits = ordered::<D>(load_bytes(vector));
        (lo, hi) = (min::<D>(lo, bits), max::<D>(hi, bits));
    }
    let all = (value::<D>(least::<D>(lo)), value::<D>(greatest::<D>(hi)));
    if tail.is_empty() { all } else { joined(all, scalar::range_of::<D>(tail)) }
}

#[target_feature(enable = "avx2,f16c")]
fn absmax<const D: u8>(rows: &[&[u8]], group_bytes: usize, hi: &mut [f32]) {
    let mut hi = hi.iter_mut();
    for row in rows {
        let mut rest = *row;
        while let Some((part, more)) = rest.split_at_checked(group_bytes) {
            rest = more;
            if let Some(hi) = hi.next() {
                *hi = absmax_of::<D>(part);
            }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
fn range<const D: u8>(rows: &[&[u8]], group_bytes: usize, lo: &mut [f32], hi: &mut [f32]) {
    let mut both = lo.iter_mut().zip(hi);
    for row in rows {
        let mut rest = *row;
        while let Some((part, more)) = rest.split_at_checked(group_bytes) {
            rest = more;
            if let Some((lo, hi)) = both.next() {
                (*lo, *hi) = range_of::<D>(part);
            }
        }
    }
}

// Values of a vector of ordered integers.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn spill<const D: u8>(lanes: __m256i, to: &mut [f32]) {
    let mut bytes = [0; 32];
    store_bytes(&mut bytes, ordered::<D>(lanes));
    for (n, to) in to.chunks_exact_mut(8).enumerate() {
        let floats = load::<D>(&bytes[n * 8 * width(D)..]);
        let to: &mut [f32; 8] = to.try_into().expect("a chunk of eight");
        // SAFETY: the array is as long as the vector; the store needs no alignment.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), floats) };
    }
}

/// Vectors of the columns that are taken at once.
const VECTORS: usize = super::BATCH * 4 / 32;

#[target_feature(enable = "avx2,f16c")]
fn absmax_columns<const D: u8>(rows: &[&[u8]], columns: Range<usize>, hi: &mut [f32]) {
    let lanes = 32 / width(D);
    let whole = columns.len() / lanes * lanes;
    let bytes = columns.start * width(D)..(columns.start + whole) * width(D);
    let mut most = [_mm256_setzero_si256(); VECTORS];
    // Row by row: memory is read in order.
    for row in rows {
        for (most, vector) in most.iter_mut().zip(row[bytes.clone()].chunks_exact(32)) {
            *most = max::<D>(*most, magnitudes::<D>(load_bytes(vector)));
        }
    }
    for (most, hi) in most.into_iter().zip(hi.chunks_exact_mut(lanes)) {
        spill::<D>(most, hi);
    }
    scalar::absmax_columns::<D>(rows, columns.start + whole..columns.end, &mut hi[whole..]);
}

#[target_feature(enable = "avx2,f16c")]
fn range_columns<const D: u8>(rows: &[&[u8]], columns: Range<usize>, lo: &mut [f32], hi: &mut [f32]) {
    let lanes = 32 / width(D);
    let whole = columns.len() / lanes * lanes;
    let bytes = columns.start * width(D)..(columns.start + whole) * width(D);
    let (least, most) = if D == F32 {
        (_mm256_set1_epi32(i32::MAX), _mm256_set1_epi32(i32::MIN))
    } else {
        (_mm256_set1_epi16(i16::MAX), _mm256_set1_epi16(i16::MIN))
    };
    let mut both = [(least, most); VECTORS];
    for row in rows {
        for ((least, most), vector) in both.iter_mut().zip(row[bytes.clone()].chunks_exact(32)) {
            let bits = ordered::<D>(load_bytes(vector));
            (*least, *most) = (min::<D>(*least, bits), max::<D>(*most, bits));
        }
    }
    for ((both, lo), hi) in both.into_iter().zip(lo.chunks_exact_mut(lanes)).zip(hi.chunks_exact_mut(lanes)) {
        spill::<D>(both.0, lo);
        spill::<D>(both.1, hi);
    }
    scalar::range_columns::<D>(rows, columns.start + whole..columns.end, &mut lo[whole..], &mut hi[whole..]);
}

#[target_feature(enable = "avx2,f16c")]
fn parameters<const D: u8>(steps: f32, lo: &[f32], hi: &[f32], scale: &mut [f32], inverse: &mut [f32]) -> bool {
    // The same lines: the compiler makes them eight at a time.
    scalar::parameters::<D>(steps, lo, hi, scale, inverse)
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

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn quantise_part<const D: u8, const K: u8>(row: &[u8], inverse: f32, base: f32, codes: &mut [u8]) {
    let (inverses, bases) = (_mm256_set1_ps(inverse), _mm256_set1_ps(base));
    let mut steps = row.chunks_exact(STEP * width(D));
    let mut out = codes.chunks_exact_mut(code_bytes(K, STEP));
    for (values, codes) in steps.by_ref().zip(out.by_ref()) {
        let at = |n: usize| in_steps::<K>(load::<D>(&values[8 * n * width(D)..]), inverses, bases);
        put_codes::<K>([at(0), at(1), at(2), at(3)], codes);
    }
    if !steps.remainder().is_empty() {
        scalar::quantise_part::<D, K>(steps.remainder(), inverse, base, out.into_remainder());
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn quantise_each<const D: u8, const K: u8>(row: &[u8], inverse: &[f32], base: &[f32], codes: &mut [u8]) {
    let mut steps = row.chunks_exact(STEP * width(D));
    let mut out = codes.chunks_exact_mut(code_bytes(K, STEP));
    let (mut inverses, mut bases) = (inverse.chunks_exact(STEP), base.chunks_exact(STEP));
    for (((values, codes), inverse), base) in
        steps.by_ref().zip(out.by_ref()).zip(inverses.by_ref()).zip(bases.by_ref())
    {
        let at = |n: usize| {
            let values = load::<D>(&values[8 * n * width(D)..]);
            in_steps::<K>(values, load_floats(&inverse[8 * n..]), load_floats(&base[8 * n..]))
        };
        put_codes::<K>([at(0), at(1), at(2), at(3)], codes);
    }
    if !steps.remainder().is_empty() {
        let (inverse, base) = (inverses.remainder(), bases.remainder());
        scalar::quantise_each::<D, K>(steps.remainder(), inverse, base, out.into_remainder());
    }
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

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn dequantise_part<const D: u8, const K: u8>(codes: &[u8], scale: f32, base: f32, row: &mut [u8]) {
    let (scales, bases) = (_mm256_set1_ps(scale), _mm256_set1_ps(base));
    let mut steps = codes.chunks_exact(code_bytes(K, STEP));
    let mut out = row.chunks_exact_mut(STEP * width(D));
    for (values, codes) in out.by_ref().zip(steps.by_ref()) {
        let [a, b, c, d] = get_codes::<K>(codes).map(|codes| out_of_steps::<K>(codes, scales, bases));
        store::<D>(values, [a, b]);
        store::<D>(&mut values[16 * width(D)..], [c, d]);
    }
    let rest = out.into_remainder();
    if !rest.is_empty() {
        scalar::dequantise_part::<D, K>(steps.remainder(), scale, base, rest);
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn dequantise_each<const D: u8, const K: u8>(codes: &[u8], scale: &[f32], base: &[f32], row: &mut [u8]) {
    let mut steps = codes.chunks_exact(code_bytes(K, STEP));
    let mut out = row.chunks_exact_mut(STEP * width(D));
    let (mut scales, mut bases) = (scale.chunks_exact(STEP), base.chunks_exact(STEP));
    for (((values, codes), scale), base) in out.by_ref().zip(steps.by_ref()).zip(scales.by_ref()).zip(bases.by_ref()) {
        let codes = get_codes::<K>(codes);
        let at = |n: usize| out_of_steps::<K>(codes[n], load_floats(&scale[8 * n..]), load_floats(&base[8 * n..]));
        store::<D>(values, [at(0), at(1)]);
        store::<D>(&mut values[16 * width(D)..], [at(2), at(3)]);
    }
    let rest = out.into_remainder();
    if !rest.is_empty() {
        scalar::dequantise_each::<D, K>(steps.remainder(), scales.remainder(), bases.remainder(), rest);
    }
}

// Has a row come from memory.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn fetch(row: Option<&[u8]>) {
    for line in row.into_iter().flat_map(|row| row.chunks(64)) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}

#[target_feature(enable = "avx2,f16c")]
fn quantise<const D: u8, const K: u8>(
    rows: Rows<'_>,
    group_bytes: usize,
    inverse: &[f32],
    base: &[f32],
    codes: &mut [u8],
) {
    let mut groups = inverse.iter().zip(base).zip(codes.chunks_exact_mut(code_bytes(K, group_bytes / width(D))));
    for (n, row) in rows.now.iter().enumerate() {
        fetch(rows.next.get(n).copied());
        let mut rest = *row;
        while let Some((part, more)) = rest.split_at_checked(group_bytes) {
            rest = more;
            if let Some(((&inverse, &base), codes)) = groups.next() {
                quantise_part::<D, K>(part, inverse, base, codes);
            }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
fn quantise_columns<const D: u8, const K: u8>(
    rows: Rows<'_>,
    first: usize,
    inverse: &[f32],
    base: &[f32],
    codes: &mut [u8],
    stride: usize,
) {
    let bytes = first * width(D)..(first + inverse.len()) * width(D);
    for (n, (row, codes)) in rows.now.iter().zip(codes.chunks_mut(stride)).enumerate() {
        fetch(rows.next.get(n).copied());
        quantise_each::<D, K>(&row[bytes.clone()], inverse, base, &mut codes[..code_bytes(K, inverse.len())]);
    }
}

#[target_feature(enable = "avx2,f16c")]
fn dequantise<const D: u8, const K: u8>(
    codes: &[u8],
    group_bytes: usize,
    scale: &[f32],
    base: &[f32],
    rows: &mut [&mut [u8]],
) {
    let mut groups = scale.iter().zip(base).zip(codes.chunks_exact(code_bytes(K, group_bytes / width(D))));
    for row in rows {
        let mut rest = &mut row[..];
        while let Some((part, more)) = rest.split_at_mut_checked(group_bytes) {
            rest = more;
            if let Some(((&scale, &base), codes)) = groups.next() {
                dequantise_part::<D, K>(codes, scale, base, part);
            }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
fn dequantise_columns<const D: u8, const K: u8>(
    codes: &[u8],
    stride: usize,
    scale: &[f32],
    base: &[f32],
    first: usize,
    rows: &mut [&mut [u8]],
) {
    let bytes = first * width(D)..(first + scale.len()) * width(D);
    for (row, codes) in rows.iter_mut().zip(codes.chunks(stride)) {
        dequantise_each::<D, K>(&codes[..code_bytes(K, scale.len())], scale, base, &mut row[bytes.clone()]);
    }
}

#[target_feature(enable = "avx2,f16c")]
fn read<const D: u8>(values: &[u8], floats: &mut [f32]) {
    let (eights, rest) = floats.as_chunks_mut::<8>();
    let mut steps = values.chunks_exact(8 * width(D));
    for (eight, values) in eights.iter_mut().zip(steps.by_ref()) {
        // SAFETY: the array is as long as the vector; the store needs no alignment.
        unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), load::<D>(values)) };
    }
    scalar::read::<D>(steps.remainder(), rest);
}

#[target_feature(enable = "avx2,f16c")]
fn write<const D: u8>(floats: &[f32], values: &mut [u8]) {
    let (sixteens, rest) = floats.as_chunks::<16>();
    let mut steps = values.chunks_exact_mut(16 * width(D));
    for (sixteen, values) in sixteens.iter().zip(steps.by_ref()) {
        store::<D>(values, [load_floats(sixteen), load_floats(&sixteen[8..])]);
    }
    scalar::write::<D>(rest, steps.into_remainder());
}

#[target_feature(enable = "avx2,f16c")]
fn halve(row: &[u8], halves: &mut [u8]) -> bool {
    let mut steps = row.chunks_exact(32);
    let mut out = halves.chunks_exact_mut(16);
    let exponent = _mm_set1_epi16(0x7c00);
    let mut bad = _mm_setzero_si128();
    for (values, halves) in steps.by_ref().zip(out.by_ref()) {
        let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load::<F32>(values));
        bad = _mm_or_si128(bad, _mm_cmpeq_epi16(_mm_and_si128(rounded, exponent), exponent));
        store_half_bytes(halves, rounded);
    }
    scalar::halve(steps.remainder(), out.into_remainder()) && _mm_testz_si128(bad, bad) == 1
}

#[target_feature(enable = "avx2,f16c")]
fn double(halves: &[u8], row: &mut [u8]) {
    let mut steps = halves.chunks_exact(32);
    let mut out = row.chunks_exact_mut(64);
    for (values, halves) in out.by_ref().zip(steps.by_ref()) {
        store::<F32>(values, [load::<F16>(halves), load::<F16>(&halves[16..])]);
    }
    scalar::double(steps.remainder(), out.into_remainder());
}

/// A function of this file, as one that can be called.
macro_rules! callable {
    ($function:expr, $($argument:ident),*) => {
        |$($argument),*| {
            // SAFETY: `KERNELS` is only used where `detected` has found the instructions.
            unsafe { $function($($argument),*) }
        }
    };
}

const fn kernels<const D: u8>() -> Kernels {
    Kernels {
        absmax: callable!(absmax::<D>, rows, group_bytes, hi),
        range: callable!(range::<D>, rows, group_bytes, lo, hi),
        absmax_columns: callable!(absmax_columns::<D>, rows, columns, hi),
        range_columns: callable!(range_columns::<D>, rows, columns, lo, hi),
        parameters: callable!(parameters::<D>, steps, lo, hi, scale, inverse),
        quantise: [
            callable!(quantise::<D, S8>, rows, group_bytes, inverse, base, codes),
            callable!(quantise::<D, U8>, rows, group_bytes, inverse, base, codes),
            callable!(quantise::<D, U4>, rows, group_bytes, inverse, base, codes),
        ],
        quantise_columns: [
            callable!(quantise_columns::<D, S8>, rows, first, inverse, base, codes, stride),
            callable!(quantise_columns::<D, U8>, rows, first, inverse, base, codes, stride),
            callable!(quantise_columns::<D, U4>, rows, first, inverse, base, codes, stride),
        ],
        dequantise: [
            callable!(dequantise::<D, S8>, codes, group_bytes, scale, base, rows),
            callable!(dequantise::<D, U8>, codes, group_bytes, scale, base, rows),
            callable!(dequantise::<D, U4>, codes, group_bytes, scale, base, rows),
        ],
        dequantise_columns: [
            callable!(dequantise_columns::<D, S8>, codes, stride, scale, base, first, rows),
            callable!(dequantise_columns::<D, U8>, codes, stride, scale, base, first, rows),
            callable!(dequantise_columns::<D, U4>, codes, stride, scale, base, first, rows),
        ],
        read: callable!(read::<D>, values, floats),
        write: callable!(write::<D>, floats, values),
        halve: callable!(halve, row, halves),
        double: callable!(double, halves, row),
    }
}

/// By dtype.
pub(super) static KERNELS: [Kernels; 3] = [kernels::<F32>(), kernels::<F16>(), kernels::<BF16>()];
