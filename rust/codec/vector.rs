//! What every vector path does, over primitives of its own: loops over rows, groups and columns, written once.
//!
//! A path is a file with the primitives, and `paths!` of its instructions. Vectors are of `BYTES` (`Raw`) and of as many
//! bytes of binary32; greatest values are found as integers, since the bits of floats of one sign order as they do. A step
//! takes four vectors of values; what is left of a row is done by the path that is `narrow`er, at last as by definition.

/// A function of such a file, as one that can be called.
macro_rules! callable {
    ($function:expr, $($argument:ident),*) => {
        |$($argument),*| {
            // SAFETY: `KERNELS` is only used where `detected` has found the instructions.
            unsafe { $function($($argument),*) }
        }
    };
}

/// The kernels of a path, over its primitives.
macro_rules! paths {
    ($features:literal) => {
        /// Values of binary32 in a vector.
        const LANES: usize = BYTES / 4;

        /// Values that a step takes.
        const STEP: usize = 4 * LANES;

        // The range of two parts.
        fn joined(one: (f32, f32), other: (f32, f32)) -> (f32, f32) {
            let nan = one.0.is_nan() || one.1.is_nan() || other.0.is_nan();
            let lo = if other.0.total_cmp(&one.0).is_lt() { other.0 } else { one.0 };
            let hi = if other.1.total_cmp(&one.1).is_gt() { other.1 } else { one.1 };
            if nan { (f32::NAN, f32::NAN) } else { (lo, hi) }
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn absmax_of<const D: u8>(row: &[u8]) -> f32 {
            let (pairs, vectors) =
                (row.chunks_exact(2 * BYTES), row.chunks_exact(2 * BYTES).remainder().chunks_exact(BYTES));
            let tail = vectors.remainder();
            let mut most = [zero(); 2];
            for pair in pairs {
                most[0] = max::<D>(most[0], magnitudes::<D>(load_bytes(&pair[..BYTES])));
                most[1] = max::<D>(most[1], magnitudes::<D>(load_bytes(&pair[BYTES..])));
            }
            for vector in vectors {
                most[0] = max::<D>(most[0], magnitudes::<D>(load_bytes(vector)));
            }
            let most = value::<D>(greatest::<D>(max::<D>(most[0], most[1])));
            if tail.is_empty() { most } else { joined((0.0, most), (0.0, narrow::absmax_of::<D>(tail))).1 }
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn range_of<const D: u8>(row: &[u8]) -> (f32, f32) {
            let vectors = row.chunks_exact(BYTES);
            let tail = vectors.remainder();
            if row.len() < BYTES {
                return narrow::range_of::<D>(row);
            }
            let (mut lo, mut hi) = ends::<D>();
            for vector in vectors {
                let bits = ordered::<D>(load_bytes(vector));
                (lo, hi) = (min::<D>(lo, bits), max::<D>(hi, bits));
            }
            let all = (value::<D>(least::<D>(lo)), value::<D>(greatest::<D>(hi)));
            if tail.is_empty() { all } else { joined(all, narrow::range_of::<D>(tail)) }
        }

        #[target_feature(enable = $features)]
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

        #[target_feature(enable = $features)]
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
        #[target_feature(enable = $features)]
        fn spill<const D: u8>(lanes: Raw, to: &mut [f32]) {
            let mut bytes = [0; BYTES];
            store_bytes(&mut bytes, ordered::<D>(lanes));
            for (n, to) in to.chunks_exact_mut(LANES).enumerate() {
                let floats = load::<D>(&bytes[n * LANES * width(D)..]);
                store_floats(to, floats);
            }
        }

        /// Vectors of the columns that are taken at once.
        const VECTORS: usize = super::BATCH * 4 / BYTES;

        #[target_feature(enable = $features)]
        pub(super) fn absmax_columns<const D: u8>(rows: &[&[u8]], columns: Range<usize>, hi: &mut [f32]) {
            let lanes = BYTES / width(D);
            let whole = columns.len() / lanes * lanes;
            let bytes = columns.start * width(D)..(columns.start + whole) * width(D);
            let mut most = [zero(); VECTORS];
            // Row by row: memory is read in order.
            for row in rows {
                for (most, vector) in most.iter_mut().zip(row[bytes.clone()].chunks_exact(BYTES)) {
                    *most = max::<D>(*most, magnitudes::<D>(load_bytes(vector)));
                }
            }
            for (most, hi) in most.into_iter().zip(hi.chunks_exact_mut(lanes)) {
                spill::<D>(most, hi);
            }
            narrow::absmax_columns::<D>(rows, columns.start + whole..columns.end, &mut hi[whole..]);
        }

        #[target_feature(enable = $features)]
        pub(super) fn range_columns<const D: u8>(
            rows: &[&[u8]],
            columns: Range<usize>,
            lo: &mut [f32],
            hi: &mut [f32],
        ) {
            let lanes = BYTES / width(D);
            let whole = columns.len() / lanes * lanes;
            let bytes = columns.start * width(D)..(columns.start + whole) * width(D);
            let (least, most) = ends::<D>();
            let mut both = [(least, most); VECTORS];
            for row in rows {
                for ((least, most), vector) in both.iter_mut().zip(row[bytes.clone()].chunks_exact(BYTES)) {
                    let bits = ordered::<D>(load_bytes(vector));
                    (*least, *most) = (min::<D>(*least, bits), max::<D>(*most, bits));
                }
            }
            for ((both, lo), hi) in both.into_iter().zip(lo.chunks_exact_mut(lanes)).zip(hi.chunks_exact_mut(lanes)) {
                spill::<D>(both.0, lo);
                spill::<D>(both.1, hi);
            }
            narrow::range_columns::<D>(rows, columns.start + whole..columns.end, &mut lo[whole..], &mut hi[whole..]);
        }

        #[target_feature(enable = $features)]
        fn parameters<const D: u8>(steps: f32, lo: &[f32], hi: &[f32], scale: &mut [f32], inverse: &mut [f32]) -> bool {
            // The same lines: the compiler makes them eight at a time.
            scalar::parameters::<D>(steps, lo, hi, scale, inverse)
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn quantise_part<const D: u8, const K: u8>(row: &[u8], inverse: f32, base: f32, codes: &mut [u8]) {
            let (inverses, bases) = (splat(inverse), splat(base));
            let mut steps = row.chunks_exact(STEP * width(D));
            let mut out = codes.chunks_exact_mut(code_bytes(K, STEP));
            for (values, codes) in steps.by_ref().zip(out.by_ref()) {
                let at = |n: usize| in_steps::<K>(load::<D>(&values[LANES * n * width(D)..]), inverses, bases);
                put_codes::<K>([at(0), at(1), at(2), at(3)], codes);
            }
            if !steps.remainder().is_empty() {
                narrow::quantise_part::<D, K>(steps.remainder(), inverse, base, out.into_remainder());
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn quantise_each<const D: u8, const K: u8>(
            row: &[u8],
            inverse: &[f32],
            base: &[f32],
            codes: &mut [u8],
        ) {
            let mut steps = row.chunks_exact(STEP * width(D));
            let mut out = codes.chunks_exact_mut(code_bytes(K, STEP));
            let (mut inverses, mut bases) = (inverse.chunks_exact(STEP), base.chunks_exact(STEP));
            for (((values, codes), inverse), base) in
                steps.by_ref().zip(out.by_ref()).zip(inverses.by_ref()).zip(bases.by_ref())
            {
                let at = |n: usize| {
                    let values = load::<D>(&values[LANES * n * width(D)..]);
                    in_steps::<K>(values, load_floats(&inverse[LANES * n..]), load_floats(&base[LANES * n..]))
                };
                put_codes::<K>([at(0), at(1), at(2), at(3)], codes);
            }
            if !steps.remainder().is_empty() {
                let (inverse, base) = (inverses.remainder(), bases.remainder());
                narrow::quantise_each::<D, K>(steps.remainder(), inverse, base, out.into_remainder());
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn dequantise_part<const D: u8, const K: u8>(codes: &[u8], scale: f32, base: f32, row: &mut [u8]) {
            let (scales, bases) = (splat(scale), splat(base));
            let mut steps = codes.chunks_exact(code_bytes(K, STEP));
            let mut out = row.chunks_exact_mut(STEP * width(D));
            for (values, codes) in out.by_ref().zip(steps.by_ref()) {
                let [a, b, c, d] = get_codes::<K>(codes).map(|codes| out_of_steps::<K>(codes, scales, bases));
                store::<D>(values, [a, b]);
                store::<D>(&mut values[2 * LANES * width(D)..], [c, d]);
            }
            let rest = out.into_remainder();
            if !rest.is_empty() {
                narrow::dequantise_part::<D, K>(steps.remainder(), scale, base, rest);
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn dequantise_each<const D: u8, const K: u8>(
            codes: &[u8],
            scale: &[f32],
            base: &[f32],
            row: &mut [u8],
        ) {
            let mut steps = codes.chunks_exact(code_bytes(K, STEP));
            let mut out = row.chunks_exact_mut(STEP * width(D));
            let (mut scales, mut bases) = (scale.chunks_exact(STEP), base.chunks_exact(STEP));
            for (((values, codes), scale), base) in
                out.by_ref().zip(steps.by_ref()).zip(scales.by_ref()).zip(bases.by_ref())
            {
                let codes = get_codes::<K>(codes);
                let at = |n: usize| {
                    out_of_steps::<K>(codes[n], load_floats(&scale[LANES * n..]), load_floats(&base[LANES * n..]))
                };
                store::<D>(values, [at(0), at(1)]);
                store::<D>(&mut values[2 * LANES * width(D)..], [at(2), at(3)]);
            }
            let rest = out.into_remainder();
            if !rest.is_empty() {
                narrow::dequantise_each::<D, K>(steps.remainder(), scales.remainder(), bases.remainder(), rest);
            }
        }

        #[target_feature(enable = $features)]
        fn quantise<const D: u8, const K: u8>(
            rows: Rows<'_>,
            group_bytes: usize,
            inverse: &[f32],
            base: &[f32],
            codes: &mut [u8],
        ) {
            let mut groups =
                inverse.iter().zip(base).zip(codes.chunks_exact_mut(code_bytes(K, group_bytes / width(D))));
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

        #[target_feature(enable = $features)]
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

        #[target_feature(enable = $features)]
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

        #[target_feature(enable = $features)]
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

        #[target_feature(enable = $features)]
        pub(super) fn read<const D: u8>(values: &[u8], floats: &mut [f32]) {
            let (vectors, tail) = floats.as_chunks_mut::<LANES>();
            let mut steps = values.chunks_exact(LANES * width(D));
            for (vector, values) in vectors.iter_mut().zip(steps.by_ref()) {
                store_floats(vector, load::<D>(values));
            }
            narrow::read::<D>(steps.remainder(), tail);
        }

        #[target_feature(enable = $features)]
        pub(super) fn write<const D: u8>(floats: &[f32], values: &mut [u8]) {
            let (pairs, tail) = floats.as_chunks::<{ 2 * LANES }>();
            let mut steps = values.chunks_exact_mut(2 * LANES * width(D));
            for (pair, values) in pairs.iter().zip(steps.by_ref()) {
                store::<D>(values, [load_floats(pair), load_floats(&pair[LANES..])]);
            }
            narrow::write::<D>(tail, steps.into_remainder());
        }

        #[target_feature(enable = $features)]
        pub(super) fn double(halves: &[u8], row: &mut [u8]) {
            let mut steps = halves.chunks_exact(BYTES);
            let mut out = row.chunks_exact_mut(2 * BYTES);
            for (values, halves) in out.by_ref().zip(steps.by_ref()) {
                store::<F32>(values, [load::<F16>(halves), load::<F16>(&halves[BYTES / 2..])]);
            }
            narrow::double(steps.remainder(), out.into_remainder());
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
    };
}
