//! The codecs against a copy of the same bytes: blocks of 2 MiB through 256 MiB, so that no cache holds them.
//!
//! Prints lines of `name|value|unit|limit|limit_value|ratio|n`; benches/codec.py makes rows of them. GB/s are of the
//! unencoded side; each call is beside a copy of as many bytes, and the ratio is the median over such pairs.

use std::hint::black_box;
use std::time::Instant;
use stratakv::codec::{Codec, Granularity, Layout, Percentile, Scheme};
use stratakv::evict::Kind;
use stratakv::stats::Tier;
use stratakv::{Dtype, Geometry, KvView, Model, ModelSpec, Options, PlaneView, Store, WritePolicy};

const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 128;
const ROUNDS: usize = 2 * BLOCKS;

fn shape(dtype: Dtype) -> Geometry {
    let block_tokens = if dtype == Dtype::Fp32 { 32 } else { 64 };
    Geometry { layers: 8, planes: 2, kv_heads: 8, head_dim: 128, dtype, block_tokens }
}

/// Keys and values like those of a model: around zero, with outlier channels.
fn values(dtype: Dtype) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let width = dtype.bytes();
    let mut bytes = Vec::with_capacity(BLOCK);
    for n in 0..BLOCK / width {
        let value = (next() + next() + next()) * if n % 128 == 7 { 20.0 } else { 2.0 };
        // Cut, not rounded: any values near these do.
        match dtype {
            Dtype::Fp32 => bytes.extend(value.to_le_bytes()),
            Dtype::Bf16 => bytes.extend(&value.to_le_bytes()[2..]),
            _ => {
                let bits = value.to_bits();
                let exponent = (bits >> 23 & 0xff).saturating_sub(112).min(30);
                bytes.extend((((bits >> 16 & 0x8000) | exponent << 10 | bits >> 13 & 0x3ff) as u16).to_le_bytes());
            }
        }
    }
    bytes
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds(call: impl FnOnce()) -> f64 {
    let started = Instant::now();
    call();
    started.elapsed().as_secs_f64()
}

#[expect(clippy::print_stdout, reason = "its output is its result")]
fn report(name: &str, limit: &str, pairs: &[(f64, f64)]) {
    let rate = |spent: Vec<f64>| BLOCK as f64 / median(spent) / 1e9;
    let (ours, theirs) = pairs.iter().copied().unzip();
    let ratio = median(pairs.iter().map(|(ours, theirs)| theirs / ours).collect());
    println!("{name}|{}|GB/s|{limit}|{}|{ratio}|{}", rate(ours), rate(theirs), pairs.len());
}

/// Blocks of one dtype, their encoded forms and room to decode into, all touched.
struct Memory {
    plain: Vec<Vec<u8>>,
    other: Vec<Vec<u8>>,
}

fn encode(layout: &Layout, block: &[u8], out: &mut [u8]) {
    let plane_bytes = block.len() / 16;
    for (n, plane) in block.chunks_exact(plane_bytes).enumerate() {
        let rows: Vec<&[u8]> = plane.chunks_exact(layout.row_bytes()).collect();
        assert!(layout.encode(n, &rows, &mut out[layout.plane(n)]), "these values have scales");
    }
}

fn decode(layout: &Layout, encoded: &[u8], block: &mut [u8]) {
    let plane_bytes = block.len() / 16;
    for (n, plane) in block.chunks_exact_mut(plane_bytes).enumerate() {
        let mut rows: Vec<&mut [u8]> = plane.chunks_exact_mut(layout.row_bytes()).collect();
        layout.decode(n, &encoded[layout.plane(n)], &mut rows);
    }
}

fn copy(from: &[u8], to: &mut [u8]) {
    to.copy_from_slice(black_box(from));
    black_box(to);
}

/// `hot`: results go to the same memory each time, as do those of libraries that allocate them.
fn measure(name: &str, scheme: Scheme, geometry: &Geometry, memory: &mut Memory, hot: bool) {
    let layout = Layout::new(scheme, geometry).expect("it fits");
    let mut encoded = vec![vec![1u8; layout.bytes()]; BLOCKS];
    let half = BLOCKS / 2;
    let each = |turn: usize| (turn % BLOCKS, (turn + half) % BLOCKS);
    let to = |at: usize| if hot { 0 } else { at };
    let pairs: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|turn| {
            let (at, away) = each(turn);
            let ours = seconds(|| encode(&layout, &memory.plain[at], &mut encoded[to(at)]));
            (ours, seconds(|| copy(&memory.plain[away], &mut memory.other[to(away)])))
        })
        .collect();
    report(&format!("encode {name}"), "memcpy", &pairs);
    let pairs: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|turn| {
            let (at, away) = each(turn);
            let ours = seconds(|| decode(&layout, &encoded[at], &mut memory.other[to(at)]));
            (ours, seconds(|| copy(&memory.plain[away], &mut memory.other[to(away)])))
        })
        .collect();
    report(&format!("decode {name}"), "memcpy", &pairs);
}

/// Two threads, each over blocks of its own, against one.
fn threads(name: &str, scheme: Scheme, geometry: &Geometry, memory: &mut Memory) {
    let layout = Layout::new(scheme, geometry).expect("it fits");
    let mut encoded = vec![vec![1u8; layout.bytes()]; BLOCKS];
    let work = |from: &[Vec<u8>], to: &mut [Vec<u8>]| {
        from.iter().zip(to).for_each(|(from, to)| encode(&layout, from, to));
    };
    let pairs: Vec<(f64, f64)> = (0..9)
        .map(|_| {
            let one = seconds(|| work(&memory.plain, &mut encoded));
            let (first, second) = encoded.split_at_mut(BLOCKS / 2);
            let two = seconds(|| {
                std::thread::scope(|scope| {
                    scope.spawn(|| work(&memory.plain[..BLOCKS / 2], first));
                    work(&memory.plain[BLOCKS / 2..], second);
                });
            });
            (two / BLOCKS as f64, one / BLOCKS as f64)
        })
        .collect();
    report(&format!("encode {name}, 2 threads"), "1 thread", &pairs);
}

/// The exact percentile of a block's magnitudes, against the greatest of them.
fn clip(geometry: &Geometry, plain: &[Vec<u8>]) {
    let layout = Layout::new(Scheme::new(Codec::Int8Sym, geometry), geometry).expect("it fits");
    let of = |percent: f64, block: &[u8]| {
        let rows: Vec<&[u8]> = block.chunks_exact(layout.row_bytes()).collect();
        black_box(layout.percentile(Percentile::new(percent).expect("a percentile"), &rows));
    };
    let pairs = (0..ROUNDS).map(|turn| {
        let (at, away) = (turn % BLOCKS, (turn + BLOCKS / 2) % BLOCKS);
        (seconds(|| of(99.99, &plain[at])), seconds(|| of(100.0, &plain[away])))
    });
    report("exact percentile, 99.99 %, fp16", "greatest magnitude", &pairs.collect::<Vec<_>>());
}

/// A put into RAM that is encoded, from a token-major tensor, against a plain one and an encoding of what that gathered.
fn fused(geometry: Geometry, memory: &mut Memory) {
    let scheme = Scheme::new(Codec::Int8Sym, &geometry);
    let layout = Layout::new(scheme, &geometry).expect("it fits");
    let open = |scheme| {
        let options = Options {
            ram_capacity_bytes: (BLOCKS * BLOCK) as u64,
            ssd: None,
            eviction: Kind::Lru,
            policy: WritePolicy::WriteBack,
            secret: None,
            threads: 1,
            index_bytes: None,
            stepped: false,
            gpu: None,
        };
        let store = Store::open(options).expect("a store");
        let spec = ModelSpec { name: "m".into(), weights_version: String::new(), geometry };
        let model = store.register(spec).expect("a model");
        store.set_codec(&model, Tier::Ram, scheme).expect("a codec");
        (store, model)
    };
    let (plain, encoding) = (open(Scheme::new(Codec::None, &geometry)), open(scheme));
    let mut encoded = vec![vec![1u8; layout.bytes()]; BLOCKS];
    let mut tokens = vec![0; geometry.block_tokens as usize];
    let mut put = |(store, model): &(Store, std::sync::Arc<Model>), turn: usize, block: &mut [u8]| {
        let (row, plane_bytes) = (geometry.row_bytes() as isize, block.len() / geometry.plane_count());
        let planes = block.chunks_exact_mut(plane_bytes).map(|plane| PlaneView {
            base: plane.as_mut_ptr(),
            head_stride: row,
            token_stride: row * geometry.kv_heads as isize,
            page_stride: 0,
        });
        // SAFETY: a plane of the block has a row for each head of each token, and nobody writes it meanwhile.
        let view = unsafe { KvView::new(planes.collect(), None, tokens.len()) }.expect("no page table");
        tokens[0] = turn as u32;
        seconds(|| assert_eq!(store.put(model, &tokens, "", "", &view).expect("a put").new_blocks, 1))
    };
    let pairs: Vec<(f64, f64)> = (0..3 * ROUNDS)
        .map(|turn| {
            let (at, away) = (turn % BLOCKS, (turn + BLOCKS / 2) % BLOCKS);
            let ours = put(&encoding, turn, &mut memory.plain[at]);
            let gathered = put(&plain, turn, &mut memory.plain[away]);
            // What a gather wrote is no longer in the cache, as is this.
            (ours, gathered + seconds(|| encode(&layout, &memory.other[at], &mut encoded[at])))
        })
        .skip(ROUNDS)
        .collect();
    report("put from strided bf16, int8_sym", "a plain put, then an encoding", &pairs);
}

fn main() {
    for dtype in [Dtype::Fp32, Dtype::Fp16, Dtype::Bf16] {
        let (geometry, name) = (shape(dtype), dtype.name());
        let plain = vec![values(dtype); BLOCKS];
        let mut memory = Memory { other: plain.clone(), plain };
        for codec in [Codec::Int8Sym, Codec::Int8Asym] {
            for (by, granularity) in
                [("token", Granularity::Token(0)), ("channel", Granularity::Channel(0)), ("head", Granularity::Head)]
            {
                let scheme = Scheme { keys: granularity, values: granularity, ..Scheme::new(codec, &geometry) };
                measure(&format!("{name}, {} per {by}", codec.name()), scheme, &geometry, &mut memory, false);
            }
        }
        for codec in [Codec::K8V4, Codec::Int4] {
            measure(&format!("{name}, {}", codec.name()), Scheme::new(codec, &geometry), &geometry, &mut memory, false);
        }
        if dtype == Dtype::Fp16 {
            clip(&geometry, &memory.plain);
            let by = Granularity::Token(0);
            let scheme = Scheme { keys: by, values: by, ..Scheme::new(Codec::Int8Asym, &geometry) };
            measure("fp16, int8_asym per token, to the same memory", scheme, &geometry, &mut memory, true);
        }
        if dtype == Dtype::Fp32 {
            measure(&format!("{name}, fp16"), Scheme::new(Codec::Fp16, &geometry), &geometry, &mut memory, false);
        }
        if dtype == Dtype::Bf16 {
            fused(geometry, &mut memory);
        }
        threads(&format!("{name}, int8_sym"), Scheme::new(Codec::Int8Sym, &geometry), &geometry, &mut memory);
    }
}
