//! The definition: what every faster path equals, bit for bit.
//!
//! Arithmetic is in binary32, one correctly rounded operation at a time, nothing fused; rounding is to nearest, ties to
//! even, but for scales. So a GPU's kernels and every processor's can be the same.
//!
//! ```text
//! scale   s = (hi - lo) / steps, or absmax / 127 where signed, rounded up to bfloat16
//! code    q = round((x - base) * (1 / s)), at most `steps`           base = lo, or 0 where signed
//! value   x = q * s + base, rounded to the dtype
//! ```

use super::{BF16, F16, F32, Kernels, Rows, S8, U4, U8};
use std::ops::Range;

/// A group whose values are not all at most this is not encoded. The span must be finite, and what decodes, too: the
/// greatest value may come back greater by 2^-7 of the span.
pub(super) const fn largest(dtype: u8) -> f32 {
    if dtype == F16 { 64_000.0 } else { 1e38 }
}

/// Nor is one whose values differ, but by less than this (2^-110): the inverse of its scale must stay finite.
const SMALLEST: f32 = f32::from_bits((127 - 110) << 23);

/// Bytes of a value.
pub(super) const fn width(dtype: u8) -> usize {
    if dtype == F32 { 4 } else { 2 }
}

/// A half as binary32, exactly.
pub(super) fn from_half(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let (exponent, fraction) = (u32::from(half >> 10 & 31), u32::from(half & 0x3ff));
    let bits = match (exponent, fraction) {
        (0, 0) => 0,
        (0, _) => {
            // As 0.fraction × 2^-14; the first one becomes the hidden bit.
            let shift = fraction.leading_zeros() - 21;
            (113 - shift) << 23 | fraction << (13 + shift) & 0x7f_ffff
        }
        (31, 0) => 0x7f80_0000,
        (31, _) => 0x7fc0_0000 | fraction << 13,
        _ => (exponent + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | bits)
}

/// Binary32 to the nearest half, ties to even. A NaN stays one, quiet, with the first bits of its payload.
pub(super) fn to_half(value: f32) -> u16 {
    let (bits, magnitude) = (value.to_bits(), value.to_bits() & 0x7fff_ffff);
    let round = |value: u32, shift: u32| {
        let (kept, rest, tie) = (value >> shift, value & ((1 << shift) - 1), 1 << (shift - 1));
        kept + u32::from(rest > tie || rest == tie && kept & 1 == 1)
    };
    let half = match magnitude {
        0x7f80_0001.. => 0x7e00 | magnitude >> 13 & 0x3ff,
        // 2^16 and more; what is below and rounds up to it gets there by its carry.
        0x4780_0000.. => 0x7c00,
        0x3880_0000.. => round(magnitude - 0x3800_0000, 13),
        // Below 2^-14 the exponent says how far the fraction shifts; below 2^-25 all of it.
        0x3300_0000.. => round(magnitude & 0x7f_ffff | 0x80_0000, 126 - (magnitude >> 23)),
        _ => 0,
    };
    (bits >> 16 & 0x8000) as u16 | half as u16
}

/// Binary32 to the nearest bfloat16, ties to even; never asked for a NaN.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

pub(super) fn get<const D: u8>(bytes: &[u8], at: usize) -> f32 {
    let half = |at: usize| u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]);
    match D {
        F16 => from_half(half(at)),
        BF16 => f32::from_bits(u32::from(half(at)) << 16),
        _ => f32::from_le_bytes([bytes[4 * at], bytes[4 * at + 1], bytes[4 * at + 2], bytes[4 * at + 3]]),
    }
}

pub(super) fn set<const D: u8>(bytes: &mut [u8], at: usize, value: f32) {
    match D {
        F16 => bytes[2 * at..2 * at + 2].copy_from_slice(&to_half(value).to_le_bytes()),
        BF16 => bytes[2 * at..2 * at + 2].copy_from_slice(&to_bf16(value).to_le_bytes()),
        _ => bytes[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes()),
    }
}

/// Scale, its inverse and base of groups, from their least and greatest values (signed: 0 and the greatest magnitude).
/// `false`: one of them cannot be encoded.
#[inline(always)]
pub(super) fn parameters<const D: u8>(
    steps: f32,
    lo: &[f32],
    hi: &[f32],
    scale: &mut [f32],
    inverse: &mut [f32],
) -> bool {
    let mut fit = true;
    for (((&lo, &hi), scale), inverse) in lo.iter().zip(hi).zip(scale).zip(inverse) {
        let spread = hi - lo;
        let up = (spread / steps).to_bits().wrapping_add(0xffff) & 0xffff_0000;
        let some = spread > 0.0;
        *scale = if some { f32::from_bits(up) } else { 0.0 };
        *inverse = if some { 1.0 / f32::from_bits(up) } else { 0.0 };
        // Written so that a NaN does not fit.
        fit &= lo >= -largest(D) && hi <= largest(D) && (spread == 0.0 || spread >= SMALLEST);
    }
    fit
}

pub(super) const fn steps(kind: u8) -> f32 {
    match kind {
        S8 => 127.0,
        U8 => 255.0,
        _ => 15.0,
    }
}

fn code<const K: u8>(value: f32, inverse: f32, base: f32) -> u8 {
    let code = ((value - base) * inverse).round_ties_even();
    match K {
        S8 => code.clamp(-127.0, 127.0) as i8 as u8,
        U8 => code.clamp(0.0, 255.0) as u8,
        _ => code.clamp(0.0, 15.0) as u8,
    }
}

fn decoded<const K: u8>(codes: &[u8], at: usize, scale: f32, base: f32) -> f32 {
    let code = match K {
        S8 => f32::from(codes[at] as i8),
        U8 => f32::from(codes[at]),
        _ => f32::from(codes[at / 2] >> (at % 2 * 4) & 15),
    };
    if K == S8 { code * scale } else { code * scale + base }
}

fn put_code<const K: u8>(codes: &mut [u8], at: usize, code: u8) {
    match K {
        U4 if at.is_multiple_of(2) => codes[at / 2] = code,
        U4 => codes[at / 2] |= code << 4,
        _ => codes[at] = code,
    }
}

pub(super) fn absmax_of<const D: u8>(row: &[u8]) -> f32 {
    let mut most = 0.0f32;
    for at in 0..row.len() / width(D) {
        let value = get::<D>(row, at).abs();
        // A NaN stays.
        most = if most >= value { most } else { value };
        if value.is_nan() {
            return f32::NAN;
        }
    }
    most
}

pub(super) fn range_of<const D: u8>(row: &[u8]) -> (f32, f32) {
    let (mut lo, mut hi) = (f32::INFINITY, f32::NEG_INFINITY);
    for at in 0..row.len() / width(D) {
        let value = get::<D>(row, at);
        if value.is_nan() {
            return (f32::NAN, f32::NAN);
        }
        // By total order: of two zeros the negative one is less.
        lo = if value.total_cmp(&lo).is_lt() { value } else { lo };
        hi = if value.total_cmp(&hi).is_gt() { value } else { hi };
    }
    (lo, hi)
}

/// Parts of rows, of so many bytes each.
fn parts<'a>(rows: &[&'a [u8]], group_bytes: usize) -> impl Iterator<Item = &'a [u8]> {
    rows.iter().flat_map(move |row| row.chunks_exact(group_bytes))
}

fn absmax<const D: u8>(rows: &[&[u8]], group_bytes: usize, hi: &mut [f32]) {
    parts(rows, group_bytes).zip(hi).for_each(|(part, hi)| *hi = absmax_of::<D>(part));
}

fn range<const D: u8>(rows: &[&[u8]], group_bytes: usize, lo: &mut [f32], hi: &mut [f32]) {
    parts(rows, group_bytes).zip(lo).zip(hi).for_each(|((part, lo), hi)| (*lo, *hi) = range_of::<D>(part));
}

pub(super) fn absmax_columns<const D: u8>(rows: &[&[u8]], columns: Range<usize>, hi: &mut [f32]) {
    for (column, hi) in columns.zip(hi) {
        let bytes: Vec<u8> = rows.iter().flat_map(|row| cell(row, column, width(D)).to_vec()).collect();
        *hi = absmax_of::<D>(&bytes);
    }
}

pub(super) fn range_columns<const D: u8>(rows: &[&[u8]], columns: Range<usize>, lo: &mut [f32], hi: &mut [f32]) {
    for ((column, lo), hi) in columns.zip(lo).zip(hi) {
        let bytes: Vec<u8> = rows.iter().flat_map(|row| cell(row, column, width(D)).to_vec()).collect();
        (*lo, *hi) = range_of::<D>(&bytes);
    }
}

fn cell(row: &[u8], column: usize, width: usize) -> &[u8] {
    &row[column * width..(column + 1) * width]
}

/// Bytes of the codes of so many values.
pub(super) const fn code_bytes(kind: u8, values: usize) -> usize {
    if kind == U4 { values / 2 } else { values }
}

/// Codes of a part of a row that shares its parameters.
pub(super) fn quantise_part<const D: u8, const K: u8>(part: &[u8], inverse: f32, base: f32, codes: &mut [u8]) {
    for at in 0..part.len() / width(D) {
        put_code::<K>(codes, at, code::<K>(get::<D>(part, at), inverse, base));
    }
}

/// Codes of a part of a row in which each value has its own.
pub(super) fn quantise_each<const D: u8, const K: u8>(part: &[u8], inverse: &[f32], base: &[f32], codes: &mut [u8]) {
    for (at, (&inverse, &base)) in inverse.iter().zip(base).enumerate() {
        put_code::<K>(codes, at, code::<K>(get::<D>(part, at), inverse, base));
    }
}

/// Values of a part of a row that shares its parameters.
pub(super) fn dequantise_part<const D: u8, const K: u8>(codes: &[u8], scale: f32, base: f32, part: &mut [u8]) {
    for at in 0..part.len() / width(D) {
        set::<D>(part, at, decoded::<K>(codes, at, scale, base));
    }
}

/// Values of a part of a row in which each has its own.
pub(super) fn dequantise_each<const D: u8, const K: u8>(codes: &[u8], scale: &[f32], base: &[f32], part: &mut [u8]) {
    for (at, (&scale, &base)) in scale.iter().zip(base).enumerate() {
        set::<D>(part, at, decoded::<K>(codes, at, scale, base));
    }
}

fn quantise<const D: u8, const K: u8>(
    rows: Rows<'_>,
    group_bytes: usize,
    inverse: &[f32],
    base: &[f32],
    codes: &mut [u8],
) {
    let codes = codes.chunks_exact_mut(code_bytes(K, group_bytes / width(D)));
    for (((part, codes), &inverse), &base) in parts(rows.now, group_bytes).zip(codes).zip(inverse).zip(base) {
        quantise_part::<D, K>(part, inverse, base, codes);
    }
}

fn quantise_columns<const D: u8, const K: u8>(
    rows: Rows<'_>,
    first: usize,
    inverse: &[f32],
    base: &[f32],
    codes: &mut [u8],
    stride: usize,
) {
    for (row, codes) in rows.now.iter().zip(codes.chunks_mut(stride)) {
        let part = &row[first * width(D)..(first + inverse.len()) * width(D)];
        quantise_each::<D, K>(part, inverse, base, codes);
    }
}

fn dequantise<const D: u8, const K: u8>(
    codes: &[u8],
    group_bytes: usize,
    scale: &[f32],
    base: &[f32],
    rows: &mut [&mut [u8]],
) {
    let codes = codes.chunks_exact(code_bytes(K, group_bytes / width(D)));
    let parts = rows.iter_mut().flat_map(|row| row.chunks_exact_mut(group_bytes));
    for (((part, codes), &scale), &base) in parts.zip(codes).zip(scale).zip(base) {
        dequantise_part::<D, K>(codes, scale, base, part);
    }
}

fn dequantise_columns<const D: u8, const K: u8>(
    codes: &[u8],
    stride: usize,
    scale: &[f32],
    base: &[f32],
    first: usize,
    rows: &mut [&mut [u8]],
) {
    for (row, codes) in rows.iter_mut().zip(codes.chunks(stride)) {
        let part = &mut row[first * width(D)..(first + scale.len()) * width(D)];
        dequantise_each::<D, K>(codes, scale, base, part);
    }
}

/// Values as binary32.
pub(super) fn read<const D: u8>(values: &[u8], floats: &mut [f32]) {
    floats.iter_mut().enumerate().for_each(|(at, float)| *float = get::<D>(values, at));
}

/// Binary32 as values, rounded to the nearest.
pub(super) fn write<const D: u8>(floats: &[f32], values: &mut [u8]) {
    floats.iter().enumerate().for_each(|(at, &float)| set::<D>(values, at, float));
}

/// Binary32 to halves. `false`: one of them is finite no more, or was not.
pub(super) fn halve(row: &[u8], halves: &mut [u8]) -> bool {
    let mut fit = true;
    for at in 0..row.len() / 4 {
        let half = to_half(get::<F32>(row, at));
        fit &= half & 0x7c00 != 0x7c00;
        halves[2 * at..2 * at + 2].copy_from_slice(&half.to_le_bytes());
    }
    fit
}

/// Halves to binary32.
pub(super) fn double(halves: &[u8], row: &mut [u8]) {
    for at in 0..row.len() / 4 {
        set::<F32>(row, at, get::<F16>(halves, at));
    }
}

const fn kernels<const D: u8>() -> Kernels {
    Kernels {
        absmax: absmax::<D>,
        range: range::<D>,
        absmax_columns: absmax_columns::<D>,
        range_columns: range_columns::<D>,
        parameters: parameters::<D>,
        quantise: [quantise::<D, S8>, quantise::<D, U8>, quantise::<D, U4>],
        quantise_columns: [quantise_columns::<D, S8>, quantise_columns::<D, U8>, quantise_columns::<D, U4>],
        dequantise: [dequantise::<D, S8>, dequantise::<D, U8>, dequantise::<D, U4>],
        dequantise_columns: [dequantise_columns::<D, S8>, dequantise_columns::<D, U8>, dequantise_columns::<D, U4>],
        read: read::<D>,
        write: write::<D>,
        halve,
        double,
    }
}

/// By dtype.
pub(super) static KERNELS: [Kernels; 3] = [kernels::<F32>(), kernels::<F16>(), kernels::<BF16>()];
