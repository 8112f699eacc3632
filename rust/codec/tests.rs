//! Every path against the definition, and the definition against what it promises.

use super::scalar::{from_half, to_half};
use super::*;
use crate::block::Dtype;
use proptest::prelude::*;

const DTYPES: [Dtype; 3] = [Dtype::Fp32, Dtype::Fp16, Dtype::Bf16];

fn geometry(dtype: Dtype, kv_heads: u32, block_tokens: u32, head_dim: u32) -> Geometry {
    Geometry { layers: 2, planes: 2, kv_heads, head_dim, dtype, block_tokens }
}

/// Values as a model's, but for what `wild` throws in.
fn payload(geometry: &Geometry, seed: u64, wild: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) as u32
    };
    let mut bytes = Vec::new();
    for n in 0..geometry.block_bytes() / geometry.dtype.bytes() {
        let near = (0..6).map(|_| next() as f32 / (1u32 << 31) as f32).sum::<f32>() - 3.0;
        let value = if n % geometry.head_dim as usize == 3 { near * 20.0 } else { near };
        let value = match wild {
            1 if next().is_multiple_of(50) => value * 1e-30,
            1 if next().is_multiple_of(50) => value * 1e30,
            2 => value * 1e-7,
            3 => f32::from_bits(next() << 1),
            4 => 0.0 * value,
            5 => 100.0 + value * 1e-3,
            _ => value,
        };
        match geometry.dtype {
            Dtype::Fp32 => bytes.extend(value.to_le_bytes()),
            Dtype::Fp16 => bytes.extend(to_half(value).to_le_bytes()),
            _ => bytes.extend(((value.to_bits() >> 16) as u16).to_le_bytes()),
        }
    }
    bytes
}

fn value(dtype: Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::Fp32 => scalar::get::<F32>(bytes, 0),
        Dtype::Fp16 => scalar::get::<F16>(bytes, 0),
        _ => scalar::get::<BF16>(bytes, 0),
    }
}

fn granularity() -> impl Strategy<Value = Granularity> {
    prop_oneof![
        Just(Granularity::Tensor),
        Just(Granularity::Head),
        (0..3u32).prop_map(|n| Granularity::Token([0, 2, 8][n as usize])),
        (0..3u32).prop_map(|n| Granularity::Channel([0, 2, 4][n as usize])),
    ]
}

fn shape() -> impl Strategy<Value = Geometry> {
    let dims = prop::sample::select(vec![8u32, 32, 40, 64, 72, 128, 264, 576]);
    (0..3usize, 1..3u32, prop::sample::select(vec![4u32, 8, 16]), dims)
        .prop_map(|(dtype, heads, tokens, dim)| geometry(DTYPES[dtype], heads, tokens, dim))
}

fn scheme() -> impl Strategy<Value = (usize, Granularity, Granularity)> {
    (0..Codec::ALL.len(), granularity(), granularity())
}

/// Encodes a payload plane by plane; what is `None` does not fit.
fn encode(layout: &Layout, plane_bytes: usize, payload: &[u8]) -> Vec<Option<Vec<u8>>> {
    let planes = payload.chunks_exact(plane_bytes).enumerate();
    let each = |(n, plane): (usize, &[u8])| {
        let rows: Vec<&[u8]> = plane.chunks_exact(layout.row_bytes()).collect();
        // Whatever lay there before makes no difference.
        let mut out = vec![0xA5; layout.plane(n).len()];
        layout.encode(n, &rows, &mut out).then_some(out)
    };
    planes.map(each).collect()
}

fn decode(layout: &Layout, plane: usize, plane_bytes: usize, encoded: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x5A; plane_bytes];
    let mut rows: Vec<&mut [u8]> = bytes.chunks_exact_mut(layout.row_bytes()).collect();
    layout.decode(plane, encoded, &mut rows);
    bytes
}

// Each path with the one before it: the definition at last. Where one is asked for, that one alone, since what an emulator
// makes of the others is not ours to prove.
fn pairs() -> Vec<(Isa, Isa)> {
    let asked = Isa::asked().expect("a path that is there");
    let pairs = Isa::all().windows(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>();
    pairs.into_iter().filter(|(_, path)| asked.is_none_or(|asked| asked == *path)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn every_path_equals_the_one_before_it_and_so_the_definition(
        geometry in shape(), (codec, keys, values) in scheme(), seed: u64, wild in 0..6u32, clip in 0..4usize,
    ) {
        let clip = [None, Some(99.99), Some(90.0), Some(40.0)][clip].map(|p| Clip::Percentile(Percentile::new(p).expect("a percentile")));
        let scheme = Scheme { codec: Codec::ALL[codec], keys, values, clip, raw_layers: [0; 2] };
        let payload = payload(&geometry, seed, wild);
        let plane_bytes = geometry.block_bytes() / geometry.plane_count();
        for (before, isa) in pairs() {
            let Ok(defined) = Layout::on(before, scheme, &geometry) else { return Ok(()) };
            let right = encode(&defined, plane_bytes, &payload);
            let layout = Layout::on(isa, scheme, &geometry).expect("as the definition");
            prop_assert_eq!(layout.bytes(), defined.bytes());
            let encoded = encode(&layout, plane_bytes, &payload);
            prop_assert!(encoded == right, "{:?} encodes otherwise", isa);
            for (plane, encoded) in right.iter().enumerate() {
                if let Some(encoded) = encoded {
                    let (one, other) = (decode(&layout, plane, plane_bytes, encoded), decode(&defined, plane, plane_bytes, encoded));
                    prop_assert!(one == other, "{:?} decodes otherwise", isa);
                }
            }
        }
    }

    #[test]
    fn what_is_decoded_is_finite_and_within_half_a_step(
        geometry in shape(), (codec, keys, values) in scheme(), seed: u64, wild in 0..6u32,
    ) {
        let scheme = Scheme { codec: Codec::ALL[codec], keys, values, clip: None, raw_layers: [0; 2] };
        let Ok(layout) = Layout::new(scheme, &geometry) else { return Ok(()) };
        let payload = payload(&geometry, seed, wild);
        let width = geometry.dtype.bytes();
        let plane_bytes = geometry.block_bytes() / geometry.plane_count();
        for (n, encoded) in encode(&layout, plane_bytes, &payload).into_iter().enumerate() {
            let plane = &payload[n * plane_bytes..(n + 1) * plane_bytes];
            let all: Vec<f32> = plane.chunks_exact(width).map(|bytes| value(geometry.dtype, bytes)).collect();
            let Some(encoded) = encoded else {
                // Only what has no finite, or no usable, scale.
                let most = all.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                let tame = all.iter().all(|value| value.is_finite() && (*value == 0.0 || value.abs() > 1e-30));
                prop_assert!(!tame || most > 60_000.0 || matches!(scheme.codec, Codec::Int8Asym | Codec::K8V4 | Codec::Int4));
                continue;
            };
            let decoded = decode(&layout, n, plane_bytes, &encoded);
            let is_key = n % 2 == 0;
            let (steps, by, signed) = match scheme.codec {
                Codec::None => { prop_assert_eq!(&decoded[..], plane); continue }
                Codec::Fp16 => {
                    for (x, y) in all.iter().zip(decoded.chunks_exact(width)) {
                        prop_assert_eq!(value(geometry.dtype, y).to_bits(), from_half(to_half(*x)).to_bits());
                    }
                    continue
                }
                Codec::Int8Sym => (127.0, if is_key { keys } else { values }, true),
                Codec::Int8Asym => (255.0, if is_key { keys } else { values }, false),
                Codec::K8V4 if is_key => (127.0, keys, true),
                Codec::K8V4 | Codec::Int4 => (15.0, if is_key { keys } else { values }, false),
            };
            let (dim, tokens) = (geometry.head_dim as usize, geometry.block_tokens as usize);
            let group_of = |at: usize| {
                let (row, column) = (at / dim, at % dim);
                let size = |group: u32, of: usize| if group == 0 { of } else { group as usize };
                match by {
                    Granularity::Tensor => (0, 0),
                    Granularity::Head => (row / tokens, 0),
                    Granularity::Token(group) => (row, column / size(group, dim)),
                    Granularity::Channel(group) => (row / size(group, tokens), column),
                }
            };
            let mut groups = std::collections::HashMap::new();
            for (at, &x) in all.iter().enumerate() {
                let (lo, hi) = groups.entry(group_of(at)).or_insert(if signed { (0.0, 0.0) } else { (x, x) });
                *lo = if signed { 0.0 } else { x.min(*lo) };
                *hi = if signed { x.abs().max(*hi) } else { x.max(*hi) };
            }
            for (at, &x) in all.iter().enumerate() {
                let y = value(geometry.dtype, &decoded[at * width..]);
                let (lo, hi) = groups[&group_of(at)];
                // The scale is at most 2^-7 too great, and the value is rounded to its dtype, and by the arithmetic.
                let step = f64::from(hi - lo) / steps * (1.0 + 1.0 / 128.0);
                let own = match geometry.dtype { Dtype::Fp32 => 1e-6, Dtype::Fp16 => 1e-3, _ => 8e-3 };
                let most = f64::from(hi.abs().max(lo.abs()));
                let bound = step * 0.5 * (1.0 + 1e-4) + most * own + 6e-8;
                prop_assert!(y.is_finite() && f64::from((y - x).abs()) <= bound, "{x} became {y}, step {step}");
            }
        }
    }

    #[test]
    fn any_bytes_decode_alike_on_every_path_and_never_panic(
        geometry in shape(), (codec, keys, values) in scheme(), seed: u64,
    ) {
        let scheme = Scheme { codec: Codec::ALL[codec], keys, values, clip: None, raw_layers: [0; 2] };
        let Ok(any) = Layout::new(scheme, &geometry) else { return Ok(()) };
        let plane_bytes = geometry.block_bytes() / geometry.plane_count();
        let mut state = seed;
        let bytes: Vec<u8> = (0..any.plane(1).len()).map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        }).collect();
        for (before, isa) in pairs() {
            let defined = Layout::on(before, scheme, &geometry).expect("as any");
            let right = decode(&defined, 1, plane_bytes, &bytes);
            let layout = Layout::on(isa, scheme, &geometry).expect("as the definition");
            let other = decode(&layout, 1, plane_bytes, &bytes);
            for (x, y) in right.chunks_exact(geometry.dtype.bytes()).zip(other.chunks_exact(geometry.dtype.bytes())) {
                let nan = value(geometry.dtype, x).is_nan() && value(geometry.dtype, y).is_nan();
                prop_assert!(x == y || nan, "{isa:?}: {x:?} and {y:?}");
            }
        }
    }
}

#[test]
fn every_half_is_read_and_written_exactly() {
    for isa in Isa::all() {
        let kernels = isa.kernels(F32);
        let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut floats = vec![0; 2 * halves.len()];
        (kernels.double)(&halves, &mut floats);
        for half in 0..=u16::MAX {
            let float = scalar::get::<F32>(&floats, half.into());
            let right = from_half(half);
            assert_eq!(float.to_bits(), right.to_bits(), "{isa:?}: {half:04x}");
            // By what a half is: its fraction in steps of its exponent.
            let (exponent, fraction) = (i32::from(half >> 10 & 31), f64::from(half & 0x3ff));
            let sign = if half < 0x8000 { 1.0 } else { -1.0 };
            match exponent {
                31 if fraction > 0.0 => assert!(right.is_nan()),
                31 => assert_eq!(f64::from(right), sign * f64::INFINITY),
                0 => assert_eq!(f64::from(right), sign * fraction * 2f64.powi(-24)),
                _ => assert_eq!(f64::from(right), sign * (1024.0 + fraction) * 2f64.powi(exponent - 25)),
            }
            assert!(to_half(right) == half || right.is_nan());
        }
        let finite: Vec<u8> = (0..=u16::MAX).filter(|h| h & 0x7c00 != 0x7c00).flat_map(u16::to_le_bytes).collect();
        let (mut floats, mut back) = (vec![0; 2 * finite.len()], vec![0; finite.len()]);
        (kernels.double)(&finite, &mut floats);
        assert!((kernels.halve)(&floats, &mut back) && back == finite);
    }
}

#[test]
fn binary32_rounds_to_the_nearest_half_on_every_path() {
    // Every 4,099th pattern, and those about each half and between neighbours.
    let spread = (0..=u32::MAX / 4099).map(|n| n * 4099);
    let edges = (0..0x7c00u16).flat_map(|half| {
        let (low, high) = (from_half(half).to_bits(), from_half(half + 1).to_bits());
        [low.wrapping_sub(1), low, low + 1, low + (high - low) / 2, low + (high - low) / 2 + 1]
    });
    let patterns: Vec<u32> = spread.chain(edges).collect();
    let bytes: Vec<u8> = patterns.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    for (n, &bits) in patterns.iter().enumerate() {
        let mut halves = [0; 2];
        let _ = (Isa::Scalar.kernels(F32).halve)(&bytes[4 * n..4 * n + 4], &mut halves);
        assert_eq!(u16::from_le_bytes(halves), to_half(f32::from_bits(bits)), "{bits:08x}");
    }
    for pair in pairs() {
        let [right, halves] = <[Isa; 2]>::from(pair).map(|isa| {
            let mut halves = vec![0; bytes.len() / 2];
            let _ = (isa.kernels(F32).halve)(&bytes, &mut halves);
            halves
        });
        assert!(right == halves, "{pair:?}");
    }
    for half in 0..0x7bffu16 {
        let (low, high) = (f64::from(from_half(half)), f64::from(from_half(half + 1)));
        let middle = ((low + high) / 2.0) as f32;
        assert_eq!(to_half(middle), half + half % 2, "a tie goes to the even one");
        assert_eq!(to_half(f32::from_bits(middle.to_bits() + 1)), half + 1);
        assert_eq!(to_half(f32::from_bits(middle.to_bits() - 1)), half);
    }
}

#[test]
fn what_has_no_scale_is_not_encoded() {
    for (dtype, worst) in DTYPES.into_iter().flat_map(|d| [f32::NAN, -f32::NAN, f32::INFINITY, -3.3e38].map(|w| (d, w)))
    {
        let geometry = geometry(dtype, 2, 16, 64);
        for codec in [Codec::Int8Sym, Codec::Int8Asym, Codec::K8V4, Codec::Int4] {
            for by in [Granularity::Tensor, Granularity::Head, Granularity::Token(0), Granularity::Channel(0)] {
                let scheme = Scheme { codec, keys: by, values: by, clip: None, raw_layers: [0; 2] };
                for isa in Isa::all() {
                    let layout = Layout::on(isa, scheme, &geometry).expect("it fits");
                    let plane_bytes = geometry.block_bytes() / 4;
                    for place in [0, 7, 63, 64 * 15 + 33, 64 * 31 + 63] {
                        let mut bytes = payload(&geometry, 1, 0);
                        let at = (2 * plane_bytes) + place * dtype.bytes();
                        match dtype {
                            Dtype::Fp32 => scalar::set::<F32>(&mut bytes[at..], 0, worst),
                            Dtype::Fp16 => scalar::set::<F16>(&mut bytes[at..], 0, worst),
                            _ => bytes[at..at + 2].copy_from_slice(&worst.to_bits().to_le_bytes()[2..]),
                        }
                        let fit: Vec<bool> = encode(&layout, plane_bytes, &bytes).iter().map(Option::is_some).collect();
                        assert_eq!(
                            fit,
                            [true, true, false, true],
                            "{isa:?} {dtype:?} {codec:?} {by:?} {worst} at {place}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_percentile_is_exact_and_what_is_beyond_is_clipped() {
    for (dtype, percent) in DTYPES.into_iter().flat_map(|d| [100.0, 99.99, 99.0, 60.0, 0.001].map(|p| (d, p))) {
        let geometry = geometry(dtype, 4, 32, 64);
        let plane_bytes = geometry.block_bytes() / geometry.plane_count();
        let bytes = &payload(&geometry, 7, 1)[..plane_bytes];
        let all: Vec<f32> = bytes.chunks_exact(dtype.bytes()).map(|bytes| value(dtype, bytes)).collect();
        let mut sorted: Vec<f32> = all.iter().map(|value| value.abs()).collect();
        sorted.sort_by(f32::total_cmp);
        // The least value that so many per cent are at most.
        let right = sorted[((sorted.len() as f64 * percent / 100.0).ceil() as usize).max(1) - 1];
        if !sorted.iter().all(|value| value.is_finite()) {
            continue;
        }
        let percentile = Percentile::new(percent).expect("a percentile");
        let by = Granularity::Head;
        let scheme = Scheme {
            codec: Codec::Int8Sym,
            keys: by,
            values: by,
            clip: Some(Clip::Percentile(percentile)),
            raw_layers: [0; 2],
        };
        for isa in Isa::all() {
            let layout = Layout::on(isa, scheme, &geometry).expect("it fits");
            let rows: Vec<&[u8]> = bytes.chunks_exact(layout.row_bytes()).collect();
            assert_eq!(layout.percentile(percentile, &rows), right, "{isa:?} {dtype:?} {percent}");
            let mut out = vec![0; layout.plane(0).len()];
            if layout.encode(0, &rows, &mut out) {
                let decoded = decode(&layout, 0, plane_bytes, &out);
                let most =
                    decoded.chunks_exact(dtype.bytes()).map(|bytes| value(dtype, bytes).abs()).fold(0.0, f32::max);
                assert!(most <= right * (1.0 + 1.0 / 64.0), "{most} is beyond {right}");
            }
        }
    }
    for wrong in [0.0, -1.0, 100.5, f64::NAN] {
        assert!(Percentile::new(wrong).expect_err("refused").to_string().contains("above 0, up to 100"));
    }
}

#[test]
fn sizes_are_what_the_table_says_and_raw_layers_stay() {
    let shape = Geometry { layers: 4, ..geometry(Dtype::Fp16, 8, 64, 128) };
    let share = |codec| {
        let layout = Layout::new(Scheme::new(codec, &shape), &shape).expect("it fits");
        (layout.bytes() * 100 + shape.block_bytes() / 2) / shape.block_bytes()
    };
    assert_eq!(
        [Codec::None, Codec::Int8Sym, Codec::Int8Asym, Codec::K8V4, Codec::Int4].map(share),
        [100, 51, 52, 40, 28]
    );
    let scheme = Scheme { raw_layers: [1, 2], ..Scheme::new(Codec::Int4, &shape) };
    let layout = Layout::new(scheme, &shape).expect("it fits");
    let plane = shape.block_bytes() / 8;
    let lengths: Vec<bool> = (0..8).map(|n| layout.plane(n).len() == plane).collect();
    assert_eq!(lengths, [true, true, false, false, true, true, true, true]);
    let bytes = payload(&shape, 3, 0);
    let encoded = encode(&layout, plane, &bytes);
    assert_eq!(encoded[0].as_deref(), Some(&bytes[..plane]));
}

#[test]
fn every_byte_of_an_encoding_is_written() {
    // A plane has 16 bytes, and parts begin at multiples of 64: what was there before must not be in a record.
    for (dtype, codec) in [(Dtype::Fp16, Codec::Int8Sym), (Dtype::Bf16, Codec::Int8Asym), (Dtype::Fp32, Codec::Fp16)] {
        let shape = Geometry { layers: 4, planes: 2, kv_heads: 1, head_dim: 4, dtype, block_tokens: 2 };
        let scheme = Scheme { raw_layers: [1, 1], ..Scheme::new(codec, &shape) };
        let layout = Layout::new(scheme, &shape).expect("it fits");
        let payload = vec![1u8; shape.block_bytes()];
        let [one, other] = [0xaa, 0x55].map(|before| {
            let mut out = vec![before; layout.bytes()];
            assert!(layout.encode_payload(&payload, false, &mut out));
            out
        });
        assert_eq!(one, other, "{codec:?}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_what_to_do() {
    let message = |scheme: Scheme, shape: &Geometry| Layout::new(scheme, shape).expect_err("refused").to_string();
    let shape = geometry(Dtype::Bf16, 2, 16, 64);
    assert!(message(Scheme::new(Codec::Fp16, &shape), &shape).contains("nothing is saved"));
    let eight = geometry(Dtype::Uint8, 2, 16, 64);
    assert!(message(Scheme::new(Codec::Int8Sym, &eight), &eight).contains("eight bits already"));
    for (keys, said) in
        [(Granularity::Token(48), "48 do not divide 64"), (Granularity::Channel(32), "32 do not divide 16")]
    {
        assert!(message(Scheme { keys, ..Scheme::new(Codec::Int8Sym, &shape) }, &shape).contains(said));
    }
    let wide = geometry(Dtype::Bf16, 2, 16, 1024);
    let scheme = Scheme { values: Granularity::Token(2), ..Scheme::new(Codec::Int8Sym, &wide) };
    assert!(message(scheme, &wide).contains("too small; give 4"));
    let odd = geometry(Dtype::Bf16, 2, 16, 33);
    assert!(message(Scheme::new(Codec::Int4, &odd), &odd).contains("even"));
    let unknown = Codec::parse("zstd").expect_err("there is none").to_string();
    assert!(unknown.contains("\"zstd\"") && unknown.contains("none, fp16, int8_sym, int8_asym, k8v4, int4"));
    for codec in Codec::ALL {
        assert_eq!((Codec::parse(codec.name()).ok(), Codec::of_id(codec as u16)), (Some(codec), Some(codec)));
    }
    assert_eq!(Codec::of_id(6), None);
}

#[test]
fn the_path_that_is_asked_for_is_there() {
    let asked = Isa::asked().expect("STRATAKV_CODEC_ISA names a path that this processor has");
    assert_eq!(Isa::chosen(), asked.unwrap_or_else(Isa::fastest));
}
