//! Encoding and decoding one plane of a block: which values share a scale, and where its parts lie.
//!
//! ```text
//! rows of a plane   [head][token], wherever they lie ─▶ least and greatest of each group ─▶ scales ─▶ codes, row by row
//! encoded           | scales | bases | codes |           read once from memory, once more from the processor's cache
//! ```

use super::scalar::code_bytes;
use super::{
    BATCH, BF16, Clip, Codec, F16, F32, Granularity, Isa, Kernels, Percentile, Rows, S8, Scheme, U4, U8, scalar,
};
use crate::block::{Dtype, Geometry};
use crate::error::{Result, input};
use crate::sync::Arc;
use std::ops::Range;

/// How one plane of a block is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Raw,
    Half,
    /// Kind of code, and what shares a scale.
    Codes(u8, Granularity),
}

/// The shape of one plane of a block: rows of `[head][token]`, each of `dim` values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    heads: usize,
    tokens: usize,
    pub(super) dim: usize,
    pub(super) dtype: u8,
}

/// How the planes of a model's blocks are encoded, and where each lies.
#[derive(Debug, Clone)]
pub struct Layout {
    scheme: Scheme,
    shape: Shape,
    planes: Vec<(Coding, Range<usize>)>,
    isa: Isa,
    /// What each plane is clipped to, where that is calibrated.
    bounds: Option<Arc<[f32]>>,
}

/// How kernels encode a plane.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct OnDevice {
    pub(crate) coding: u8,
    pub(crate) by: u8,
    pub(crate) group: u32,
    pub(crate) bound: f32,
}

/// Tokens at the start of a sequence that `int4` keeps exact.
const EXACT: usize = 4;
/// Parts of an encoded plane begin at multiples of this.
const ALIGN: usize = 64;
/// Bytes of rows that stay near while their groups' parameters are computed.
const NEAR: usize = 16 << 10;

impl Layout {
    /// The layout of blocks of a geometry under a scheme.
    ///
    /// # Errors
    /// `fp16` for 16-bit values, a codec for `uint8`, groups that do not divide, or four bits for an odd number.
    pub fn new(scheme: Scheme, geometry: &Geometry) -> Result<Self> {
        Self::on(Isa::chosen(), scheme, geometry)
    }

    /// The same on a certain path.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn on(isa: Isa, scheme: Scheme, geometry: &Geometry) -> Result<Self> {
        let (codec, name) = (scheme.codec, scheme.codec.name());
        let dtype = match (geometry.dtype, codec) {
            (Dtype::Uint8, Codec::None) | (Dtype::Fp32, _) => F32,
            (Dtype::Uint8, _) => {
                return Err(input(format!(
                    "codec {name:?}: keys and values of uint8 have eight bits already; use none"
                )));
            }
            (_, Codec::Fp16) => {
                let had = geometry.dtype.name();
                return Err(input(format!(
                    "codec \"fp16\": {had} has 16 bits already, so nothing is saved; use int8_sym"
                )));
            }
            (Dtype::Fp16, _) => F16,
            (Dtype::Bf16, _) => BF16,
        };
        let shape = Shape {
            heads: geometry.kv_heads as usize,
            tokens: geometry.block_tokens as usize,
            dim: geometry.head_dim as usize,
            dtype,
        };
        let last = geometry.layers.saturating_sub(scheme.raw_layers[1]);
        let raw_bytes = geometry.block_bytes() / geometry.plane_count();
        let (mut planes, mut end) = (Vec::new(), 0);
        for plane in 0..geometry.plane_count() {
            let layer = plane as u32 / geometry.planes;
            let is_key = (plane as u32).is_multiple_of(geometry.planes);
            let by = if is_key { scheme.keys } else { scheme.values };
            let coding = match codec {
                _ if layer < scheme.raw_layers[0] || layer >= last => Coding::Raw,
                Codec::None => Coding::Raw,
                Codec::Fp16 => Coding::Half,
                Codec::Int8Sym => Coding::Codes(S8, by),
                Codec::Int8Asym => Coding::Codes(U8, by),
                Codec::K8V4 if is_key => Coding::Codes(S8, by),
                Codec::K8V4 | Codec::Int4 => Coding::Codes(U4, by),
            };
            if let Coding::Codes(kind, by) = coding {
                shape.check(kind, by)?;
            }
            let bytes = shape.parts(coding, raw_bytes)[2].end;
            planes.push((coding, end..end + bytes));
            end += bytes;
        }
        Ok(Self { scheme, shape, planes, isa, bounds: None })
    }

    /// With what a calibration found: a bound for each plane.
    #[must_use]
    pub fn calibrated(self, bounds: Arc<[f32]>) -> Self {
        assert_eq!(bounds.len(), self.planes.len(), "a calibration is of the same geometry");
        Self { bounds: Some(bounds), ..self }
    }

    /// How a device's kernels encode a plane, by the numbers that `cuda/kv_pool.cu` has for it; `None`: they do not.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self, n: usize) -> Option<OnDevice> {
        if self.shape.dtype == F32 {
            return None;
        }
        let (coding, by) = match self.planes[n].0 {
            Coding::Raw => (0, Granularity::Tensor),
            Coding::Codes(S8, by) => (1, by),
            Coding::Codes(U8, by) => (2, by),
            Coding::Half | Coding::Codes(..) => return None,
        };
        let (by, group) = match by {
            Granularity::Tensor => (0, 0),
            Granularity::Head => (1, 0),
            Granularity::Token(group) => (2, group),
            Granularity::Channel(group) => (3, group),
        };
        let bound = match (self.scheme.clip, &self.bounds) {
            (Some(Clip::Percentile(_)), _) => return None,
            (Some(Clip::Calibrated), Some(bounds)) => bounds[n],
            (Some(Clip::Calibrated) | None, _) => f32::INFINITY,
        };
        Some(OnDevice { coding, by, group, bound })
    }

    /// The dtype's number there.
    #[cfg(feature = "cuda")]
    pub(crate) fn device_dtype(&self) -> u32 {
        if self.shape.dtype == BF16 { 3 } else { 2 }
    }

    /// Planes of a block.
    #[cfg(feature = "cuda")]
    pub(crate) fn plane_count(&self) -> usize {
        self.planes.len()
    }

    /// Codec and granularity.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// Bytes of an encoded payload.
    pub fn bytes(&self) -> usize {
        self.planes.last().map_or(0, |(_, range)| range.end)
    }

    /// Bytes of a row: one token of one head of a plane.
    pub fn row_bytes(&self) -> usize {
        self.shape.dim * scalar::width(self.shape.dtype)
    }

    /// Where an encoded plane lies in the payload.
    pub fn plane(&self, plane: usize) -> Range<usize> {
        self.planes[plane].1.clone()
    }

    /// Bytes of an encoded payload; `first`: of a block that begins a sequence, some of whose tokens stay exact.
    pub fn bytes_of(&self, first: bool) -> usize {
        let exact = if first { self.planes.len() * self.shape.heads * self.exact() * self.row_bytes() } else { 0 };
        self.bytes() + exact
    }

    /// Bytes of a record with an encoded payload; `first` as in [`bytes_of`](Self::bytes_of).
    pub(crate) fn record_bytes(&self, geometry: &Geometry, first: bool) -> usize {
        geometry.record_bytes_of(self.bytes_of(first))
    }

    // Tokens at the start of a sequence that stay exact: attention leans on them, whatever they say.
    fn exact(&self) -> usize {
        if self.scheme.codec == Codec::Int4 { EXACT.min(self.shape.tokens) } else { 0 }
    }

    // Rows of a plane's head, and of the tokens in it that stay exact.
    fn exact_rows(&self) -> impl Iterator<Item = Range<usize>> {
        let (tokens, exact) = (self.shape.tokens, self.exact());
        (0..self.shape.heads).map(move |head| head * tokens..head * tokens + exact)
    }

    /// Encodes the payload of a block. `false`: a plane of it cannot be encoded.
    ///
    /// # Panics
    /// The payload or `out` is of another length than a block's.
    #[must_use]
    pub fn encode_payload(&self, payload: &[u8], first: bool, out: &mut [u8]) -> bool {
        let (coded, exact) = out.split_at_mut(self.bytes());
        let planes = payload.chunks_exact(self.plane_bytes()).enumerate();
        planes.fold(true, |fit, (n, plane)| {
            let mut rows: Vec<&[u8]> = plane.chunks_exact(self.row_bytes()).collect();
            let parts = (&mut coded[self.plane(n)], &mut exact[self.exact_part(n, first)]);
            fit && self.encode_plane(n, &mut rows, parts)
        })
    }

    /// Where what stays exact of a plane lies, from the end of what is encoded.
    pub(crate) fn exact_part(&self, plane: usize, first: bool) -> Range<usize> {
        let bytes = if first { self.shape.heads * self.exact() * self.row_bytes() } else { 0 };
        plane * bytes..(plane + 1) * bytes
    }

    /// Encodes one plane into the two places of its own; none of it stays exact where the second is empty.
    #[must_use]
    pub(crate) fn encode_plane(&self, n: usize, rows: &mut [&[u8]], (coded, exact): (&mut [u8], &mut [u8])) -> bool {
        let first = !exact.is_empty();
        let mut places = exact.chunks_exact_mut(self.row_bytes());
        for kept in self.exact_rows().filter(|_| first) {
            rows[kept.clone()].iter().zip(&mut places).for_each(|(row, place)| place.copy_from_slice(row));
            // They widen no scale: another token stands for them.
            if kept.len() < self.shape.tokens {
                let other = rows[kept.end];
                rows[kept].fill(other);
            }
        }
        self.encode(n, rows, coded)
    }

    /// Decodes the payload of a block.
    ///
    /// # Panics
    /// As [`encode_payload`](Self::encode_payload).
    pub fn decode_payload(&self, encoded: &[u8], first: bool, payload: &mut [u8]) {
        for (n, plane) in payload.chunks_exact_mut(self.plane_bytes()).enumerate() {
            let mut rows: Vec<&mut [u8]> = plane.chunks_exact_mut(self.row_bytes()).collect();
            self.decode_plane(n, encoded, first, &mut rows);
        }
    }

    /// Decodes one plane of an encoded payload into its rows.
    pub(crate) fn decode_plane(&self, n: usize, encoded: &[u8], first: bool, rows: &mut [&mut [u8]]) {
        let (coded, exact) = encoded.split_at(self.bytes());
        self.decode(n, &coded[self.plane(n)], rows);
        let exact = exact[self.exact_part(n, first)].chunks_exact(self.row_bytes());
        for (row, kept) in self.exact_rows().filter(|_| first).flatten().zip(exact) {
            rows[row].copy_from_slice(kept);
        }
    }

    fn plane_bytes(&self) -> usize {
        self.shape.heads * self.shape.tokens * self.row_bytes()
    }

    /// Encodes one plane; `rows` are its rows, by head and then token, wherever they lie. `false`: it cannot be encoded,
    /// and what `out` holds means nothing.
    ///
    /// # Panics
    /// Rows or `out` are of another number or length than the plane's.
    #[must_use]
    pub fn encode(&self, plane: usize, rows: &[&[u8]], out: &mut [u8]) -> bool {
        let (coding, range) = &self.planes[plane];
        assert!(rows.len() == self.shape.heads * self.shape.tokens && out.len() == range.len(), "a plane is whole");
        assert!(rows.iter().all(|row| row.len() == self.row_bytes()), "a row is whole");
        let kernels = self.isa.kernels(self.shape.dtype);
        match *coding {
            Coding::Raw => {
                let (values, padding) = out.split_at_mut(rows.len() * self.row_bytes());
                values.chunks_exact_mut(self.row_bytes()).zip(rows).for_each(|(out, row)| out.copy_from_slice(row));
                padding.fill(0);
                true
            }
            Coding::Half => {
                let (values, padding) = out.split_at_mut(rows.len() * self.row_bytes() / 2);
                padding.fill(0);
                let halves = values.chunks_exact_mut(self.row_bytes() / 2).zip(rows);
                halves.fold(true, |fit, (out, row)| (kernels.halve)(row, out) && fit)
            }
            Coding::Codes(kind, by) => {
                let clip = match (self.scheme.clip, &self.bounds) {
                    (Some(Clip::Percentile(percentile)), _) => percentile.of(kernels, &self.shape, rows),
                    (Some(Clip::Calibrated), Some(bounds)) => bounds[plane],
                    (Some(Clip::Calibrated) | None, _) => f32::INFINITY,
                };
                // An infinite bound clips nothing, and what is infinite does not fit.
                !clip.is_nan() && self.shape.quantise(kernels, kind, by, clip, rows, out)
            }
        }
    }

    /// The magnitude that a percentile of the values of some rows is at most; not finite, if a value is not.
    pub fn percentile(&self, percentile: Percentile, rows: &[&[u8]]) -> f32 {
        percentile.of(self.isa.kernels(self.shape.dtype), &self.shape, rows)
    }

    /// Decodes one plane into its rows.
    ///
    /// # Panics
    /// As [`encode`](Self::encode).
    pub fn decode(&self, plane: usize, encoded: &[u8], rows: &mut [&mut [u8]]) {
        let (coding, range) = &self.planes[plane];
        assert!(rows.len() == self.shape.heads * self.shape.tokens && encoded.len() == range.len(), "a plane is whole");
        assert!(rows.iter().all(|row| row.len() == self.row_bytes()), "a row is whole");
        let kernels = self.isa.kernels(self.shape.dtype);
        match *coding {
            Coding::Raw => {
                encoded.chunks_exact(self.row_bytes()).zip(rows).for_each(|(from, row)| row.copy_from_slice(from));
            }
            Coding::Half => {
                encoded
                    .chunks_exact(self.row_bytes() / 2)
                    .zip(rows)
                    .for_each(|(from, row)| (kernels.double)(from, row));
            }
            Coding::Codes(kind, by) => self.shape.dequantise(kernels, kind, by, encoded, rows),
        }
    }
}

/// Rows of which the groups' parameters stand together, from the first of them on.
struct Tile {
    rows: Range<usize>,
    first_group: usize,
}

impl Shape {
    fn check(&self, kind: u8, by: Granularity) -> Result<()> {
        let (group, of, what) = match by {
            Granularity::Tensor | Granularity::Head => (0, 0, ""),
            Granularity::Token(group) => (group as usize, self.dim, "channels of a head"),
            Granularity::Channel(group) => (group as usize, self.tokens, "tokens of a block"),
        };
        if group > of || group > 0 && !of.is_multiple_of(group) {
            return Err(input(format!(
                "codec: groups of {group} do not divide {of} {what}; give a divisor, or 0 for all"
            )));
        }
        if matches!(by, Granularity::Token(1..)) && self.dim / group > BATCH {
            let least = self.dim.div_ceil(BATCH);
            return Err(input(format!("codec: groups of {group} channels are too small; give {least} at least")));
        }
        if kind == U4 && (!self.dim.is_multiple_of(2) || matches!(by, Granularity::Token(n) if n % 2 == 1)) {
            let dim = self.dim;
            return Err(input(format!("codec: four bits need even groups and an even head_dim; it is {dim}")));
        }
        Ok(())
    }

    fn group(&self, by: Granularity) -> usize {
        match by {
            Granularity::Token(0) => self.dim,
            Granularity::Channel(0) => self.tokens,
            Granularity::Token(group) | Granularity::Channel(group) => group as usize,
            Granularity::Head | Granularity::Tensor => 1,
        }
    }

    fn groups(&self, by: Granularity) -> usize {
        match by {
            Granularity::Tensor => 1,
            Granularity::Head => self.heads,
            Granularity::Token(_) => self.heads * self.tokens * (self.dim / self.group(by)),
            Granularity::Channel(_) => self.heads * (self.tokens / self.group(by)) * self.dim,
        }
    }

    /// Where scales, bases and codes lie.
    fn parts(&self, coding: Coding, raw_bytes: usize) -> [Range<usize>; 3] {
        let (scales, bases, codes) = match coding {
            Coding::Raw => (0, 0, raw_bytes),
            Coding::Half => (0, 0, raw_bytes / 2),
            Coding::Codes(kind, by) => {
                let (groups, values) = (self.groups(by), self.heads * self.tokens * self.dim);
                let base = if kind == S8 { 0 } else { groups * scalar::width(self.dtype) };
                (2 * groups, base, code_bytes(kind, values))
            }
        };
        let bases_at = scales.next_multiple_of(ALIGN);
        let codes_at = bases_at + bases.next_multiple_of(ALIGN);
        [0..scales, bases_at..bases_at + bases, codes_at..codes_at + codes.next_multiple_of(ALIGN)]
    }

    fn tiles(&self, by: Granularity) -> impl Iterator<Item = Tile> {
        let all = self.heads * self.tokens;
        let (rows, groups) = match by {
            Granularity::Tensor => (all, 1),
            Granularity::Head => (self.tokens, 1),
            Granularity::Token(_) => (all, 0),
            Granularity::Channel(_) => (self.group(by), self.dim),
        };
        (0..all / rows).map(move |n| Tile { rows: n * rows..(n + 1) * rows, first_group: n * groups })
    }

    fn quantise(
        &self,
        kernels: &Kernels,
        kind: u8,
        by: Granularity,
        clip: f32,
        rows: &[&[u8]],
        out: &mut [u8],
    ) -> bool {
        let [scales_at, bases_at, codes_at] = self.parts(Coding::Codes(kind, by), 0);
        let (head, codes) = out.split_at_mut(codes_at.start);
        let (scales, bases) = head.split_at_mut(bases_at.start);
        scales[scales_at.end..].fill(0);
        bases[bases_at.len()..].fill(0);
        let row_codes = code_bytes(kind, self.dim);
        codes[rows.len() * row_codes..].fill(0);
        let mut some = Parameters { clip, ..Parameters::default() };
        let mut note = |first: usize, count: usize, some: &Parameters| {
            let scales = scales[2 * first..].as_chunks_mut::<2>().0;
            for (to, scale) in scales.iter_mut().zip(&some.scale[..count]) {
                *to = ((scale.to_bits() >> 16) as u16).to_le_bytes();
            }
            if kind != S8 {
                let width = scalar::width(self.dtype);
                (kernels.write)(&some.lo[..count], &mut bases[first * width..(first + count) * width]);
            }
        };
        let (steps, which) = (scalar::steps(kind), kind as usize);
        let width = scalar::width(self.dtype);
        let mut fit = true;
        match by {
            Granularity::Channel(_) => {
                for Tile { rows: tile, first_group } in self.tiles(by) {
                    let codes = &mut codes[tile.start * row_codes..tile.end * row_codes];
                    let (now, next) = (&rows[tile.clone()], &rows[tile.end..]);
                    for first in (0..self.dim).step_by(BATCH) {
                        let count = BATCH.min(self.dim - first);
                        let (lo, hi) = (&mut some.lo[..count], &mut some.hi[..count]);
                        match kind {
                            S8 => (kernels.absmax_columns)(now, first..first + count, hi),
                            _ => (kernels.range_columns)(now, first..first + count, lo, hi),
                        }
                        fit &= some.compute(kernels, steps, count);
                        note(first_group + first, count, &some);
                        let (inverse, base) = (&some.inverse[..count], &some.lo[..count]);
                        let from = &mut codes[code_bytes(kind, first)..];
                        (kernels.quantise_columns[which])(Rows { now, next }, first, inverse, base, from, row_codes);
                    }
                }
            }
            Granularity::Token(_) => {
                let (group_bytes, parts) = (self.group(by) * width, self.dim / self.group(by));
                let near = (NEAR / (self.dim * width)).clamp(1, (BATCH / parts).max(1));
                let chunks = rows.chunks(near).zip(codes.chunks_mut(near * row_codes)).enumerate();
                for (n, (now, codes)) in chunks {
                    let (count, next) = (now.len() * parts, &rows[n * near + now.len()..]);
                    match kind {
                        S8 => (kernels.absmax)(now, group_bytes, &mut some.hi[..count]),
                        _ => (kernels.range)(now, group_bytes, &mut some.lo[..count], &mut some.hi[..count]),
                    }
                    fit &= some.compute(kernels, steps, count);
                    note(n * near * parts, count, &some);
                    let (inverse, base) = (&some.inverse[..count], &some.lo[..count]);
                    (kernels.quantise[which])(Rows { now, next }, group_bytes, inverse, base, codes);
                }
            }
            Granularity::Head | Granularity::Tensor => {
                for Tile { rows: tile, first_group } in self.tiles(by) {
                    let codes = &mut codes[tile.start * row_codes..tile.end * row_codes];
                    let rows = &rows[tile];
                    let row_bytes = self.dim * width;
                    let mut all = if kind == S8 { (0.0, 0.0) } else { (f32::INFINITY, f32::NEG_INFINITY) };
                    for rows in rows.chunks(BATCH) {
                        let (lo, hi) = (&mut some.lo[..rows.len()], &mut some.hi[..rows.len()]);
                        match kind {
                            S8 => (kernels.absmax)(rows, row_bytes, hi),
                            _ => (kernels.range)(rows, row_bytes, lo, hi),
                        }
                        for (&lo, &hi) in lo.iter().zip(&*hi) {
                            // By total order, as within a row.
                            all.0 = if lo.total_cmp(&all.0).is_lt() { lo } else { all.0 };
                            all.1 = if hi.total_cmp(&all.1).is_gt() { hi } else { all.1 };
                            fit &= lo.is_finite() && hi.is_finite();
                        }
                    }
                    (some.lo[0], some.hi[0]) = all;
                    fit &= some.compute(kernels, steps, 1);
                    note(first_group, 1, &some);
                    let (inverse, base) = ([some.inverse[0]; BATCH], [some.lo[0]; BATCH]);
                    for (now, codes) in rows.chunks(BATCH).zip(codes.chunks_mut(BATCH * row_codes)) {
                        let count = now.len();
                        (kernels.quantise[which])(
                            Rows { now, next: &[] },
                            row_bytes,
                            &inverse[..count],
                            &base[..count],
                            codes,
                        );
                    }
                    // The base of what is signed.
                    some.lo = [0.0; BATCH];
                }
            }
        }
        fit
    }

    fn dequantise(&self, kernels: &Kernels, kind: u8, by: Granularity, encoded: &[u8], rows: &mut [&mut [u8]]) {
        let [scales, bases, codes] = self.parts(Coding::Codes(kind, by), 0).map(|part| &encoded[part]);
        let (row_codes, width, which) = (code_bytes(kind, self.dim), scalar::width(self.dtype), kind as usize);
        let (mut scale, mut base) = ([0.0; BATCH], [0.0; BATCH]);
        let read = |first: usize, scale: &mut [f32], base: &mut [f32]| {
            let scales = &scales[2 * first..2 * (first + scale.len())];
            for (scale, bytes) in scale.iter_mut().zip(scales.as_chunks::<2>().0) {
                *scale = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
            if kind != S8 {
                (kernels.read)(&bases[width * first..width * (first + base.len())], base);
            }
        };
        for Tile { rows: tile, first_group } in self.tiles(by) {
            let codes = &codes[tile.start * row_codes..tile.end * row_codes];
            let rows = &mut rows[tile];
            match by {
                Granularity::Channel(_) => {
                    for first in (0..self.dim).step_by(BATCH) {
                        let count = BATCH.min(self.dim - first);
                        let (scale, base) = (&mut scale[..count], &mut base[..count]);
                        read(first_group + first, scale, base);
                        let from = &codes[code_bytes(kind, first)..];
                        (kernels.dequantise_columns[which])(from, row_codes, scale, base, first, rows);
                    }
                }
                Granularity::Token(_) => {
                    let (group_bytes, parts) = (self.group(by) * width, self.dim / self.group(by));
                    let most = (BATCH / parts).max(1);
                    let chunks = rows.chunks_mut(most).zip(codes.chunks(most * row_codes)).enumerate();
                    for (n, (rows, codes)) in chunks {
                        let count = rows.len() * parts;
                        let (scale, base) = (&mut scale[..count], &mut base[..count]);
                        read(first_group + n * most * parts, scale, base);
                        (kernels.dequantise[which])(codes, group_bytes, scale, base, rows);
                    }
                }
                Granularity::Head | Granularity::Tensor => {
                    read(first_group, &mut scale[..1], &mut base[..1]);
                    let (scale, base) = ([scale[0]; BATCH], [base[0]; BATCH]);
                    for (rows, codes) in rows.chunks_mut(BATCH).zip(codes.chunks(BATCH * row_codes)) {
                        let count = rows.len();
                        (kernels.dequantise[which])(codes, self.dim * width, &scale[..count], &base[..count], rows);
                    }
                }
            }
        }
    }
}

/// Parameters of some groups; the least value is the base.
struct Parameters {
    lo: [f32; BATCH],
    hi: [f32; BATCH],
    scale: [f32; BATCH],
    inverse: [f32; BATCH],
    /// What least and greatest values are cut to.
    clip: f32,
}

impl Default for Parameters {
    fn default() -> Self {
        let none = [0.0; BATCH];
        Self { lo: none, hi: none, scale: none, inverse: none, clip: f32::INFINITY }
    }
}

impl Parameters {
    fn compute(&mut self, kernels: &Kernels, steps: f32, count: usize) -> bool {
        let Self { lo, hi, scale, inverse, clip } = self;
        if clip.is_finite() {
            // What is not finite is no value to clip.
            if lo[..count].iter().chain(&hi[..count]).any(|value| !value.is_finite()) {
                return false;
            }
            lo[..count].iter_mut().chain(&mut hi[..count]).for_each(|value| *value = value.clamp(-*clip, *clip));
        }
        (kernels.parameters)(steps, &lo[..count], &hi[..count], &mut scale[..count], &mut inverse[..count])
    }
}
