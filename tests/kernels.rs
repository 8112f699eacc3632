//! The kernels of the GPU tier against the codec, byte for byte, without a GPU: their own source runs on a processor.
//!
//! ```text
//! codec ─▶ vectors: launches, memory before and after ─▶ program: kernels on an executor, under sanitizers ─▶ verdict
//!                                                           └─ again with a bug in the kernels, which must fail
//! ```

#[path = "kernels/mutants.rs"]
mod mutants;
#[path = "kernels/vectors.rs"]
mod vectors;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock};
use stratakv::codec::{Codec, Granularity, Layout, Scheme};
use stratakv::{Dtype, Geometry};
use vectors::{Chance, How, Job, Packed, Place, Vector, file};

const CUDA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda");
const SEEDS: [&str; 6] = ["1", "2", "3", "4", "5", "6"];
const FEW: [&str; 2] = ["1", "2"];
const INT8: [Codec; 2] = [Codec::Int8Sym, Codec::Int8Asym];
const HALVES: [Dtype; 2] = [Dtype::Fp16, Dtype::Bf16];
const ADDRESS: &[&str] = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
const THREADS: &[&str] = &["-fsanitize=thread", "-DKV_TSAN"];

/// Whether there is a compiler; what is skipped without one is said.
fn compiler() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    let there = *THERE.get_or_init(|| Command::new("g++").arg("--version").output().is_ok_and(|o| o.status.success()));
    if !there {
        eprintln!("kernels: skipped {}: no g++ (apt-get install g++)", std::thread::current().name().unwrap_or("?"));
    }
    there
}

fn compile(cuda: &Path, sanitizer: &[&str], program: &Path) -> Output {
    let mut compiler = Command::new("g++");
    compiler.args(["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
    compiler.args(sanitizer).arg(cuda.join("tests/vectors.cpp")).arg("-o").arg(program);
    compiler.output().expect("g++ runs")
}

/// Runs a program on vectors.
fn outcome(program: &Path, vectors: &Path, seeds: &[&str]) -> Output {
    let mut command = Command::new(program);
    // No stack of a fiber outlives its run, and what is freed comes back soon: a case is small.
    command.env("ASAN_OPTIONS", "quarantine_size_mb=8").arg(vectors).args(seeds);
    command.output().expect("the program runs")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The program for all tests here: compiled once.
fn program() -> PathBuf {
    static COMPILED: Mutex<bool> = Mutex::new(false);
    let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernel_vectors");
    let mut compiled = COMPILED.lock().expect("no panic while it was held");
    if !*compiled {
        let output = compile(Path::new(CUDA), ADDRESS, &program);
        assert!(output.status.success(), "{}", text(&output));
        *compiled = true;
    }
    program
}

fn check(vectors: &[Vector], seeds: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vectors");
    std::fs::write(&path, file(vectors)).expect("room for vectors");
    let output = outcome(&program(), &path, seeds);
    assert!(output.status.success(), "{}", text(&output));
}

/// Pieces of so many 16-byte vectors, permuted, each in a memory of its own.
fn copies(pieces: usize, size: usize, chance: &mut Chance) -> Vector {
    let block = chance.of(&[32, 64, 256]);
    let mut vector = Vector::new(format!("copy {pieces} of {size}"), "kv_copy", 1 + chance.below(4), block);
    let mut pairs = Packed::default();
    let bytes: Vec<Vec<u8>> = (0..pieces).map(|_| chance.bytes(16 * size)).collect();
    let from: Vec<usize> = bytes.iter().map(|bytes| vector.kept_bytes(bytes.clone())).collect();
    for piece in chance.shuffled(pieces) {
        let to = vector.changed(chance.bytes(16 * size), bytes[piece].clone(), Vec::new());
        pairs.address(from[piece], 0);
        pairs.address(to, 0);
    }
    let pairs = vector.kept(pairs);
    vector.parameters.address(pairs, 0);
    vector.parameters.words([pieces as u32, size as u32]);
    vector
}

/// A value's bits, near zero as a model's are.
fn near(dtype: Dtype, chance: &mut Chance) -> u16 {
    let (sign, bits) = ((chance.next() & 1) << 15, chance.next());
    let half = match dtype {
        Dtype::Fp16 => (10 + chance.below(7) as u32) << 10 | bits & 0x3ff,
        _ => (120 + chance.below(10) as u32) << 7 | bits & 0x7f,
    };
    (sign | half) as u16
}

/// Kinds of values, by what is special about them.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Near,
    Zeros,
    Same,
    Subnormal,
    Limits,
    Least,
    Any,
    Beyond,
    NotFinite,
}

const KINDS: [Kind; 9] = [
    Kind::Near,
    Kind::Zeros,
    Kind::Same,
    Kind::Subnormal,
    Kind::Limits,
    Kind::Least,
    Kind::Any,
    Kind::Beyond,
    Kind::NotFinite,
];

fn special(dtype: Dtype, kind: Kind, chance: &mut Chance) -> u16 {
    let half = dtype == Dtype::Fp16;
    match kind {
        Kind::Near => near(dtype, chance),
        Kind::Zeros => chance.of(&[0, 0x8000]),
        Kind::Same => 0x4321,
        Kind::Subnormal => (chance.next() & if half { 0x83ff } else { 0x807f }) as u16,
        // 64,000 and what is next to it, either way; likewise of 1e38.
        Kind::Limits if half => chance.of(&[0x7bd0, 0xfbd0, 0x7bcf, 0, 0x3c00, 0x8000]),
        Kind::Limits => chance.of(&[0x7e96, 0xfe96, 0x7e95, 0, 0x3f80, 0x8000]),
        // 2^-110, as the spread of values that are not half.
        Kind::Least if half => chance.of(&[0, 1]),
        Kind::Least => chance.of(&[0, 0x0880, 0x8000]),
        Kind::Any => chance.next() as u16,
        Kind::Beyond if half => chance.of(&[0x7bd1, 0xfbd1, 0x3c00, 0xbc00]),
        Kind::Beyond => chance.of(&[0x7e97, 0xfe97, 0x3f80, 0xbf80]),
        Kind::NotFinite if chance.below(40) > 0 => near(dtype, chance),
        Kind::NotFinite if half => chance.of(&[0x7c00, 0xfc00, 0x7c01, 0xfe00, 0x7bd1, 0xfbd1]),
        Kind::NotFinite => chance.of(&[0x7f80, 0xff80, 0x7f81, 0xffc0, 0x7e97, 0xfe97]),
    }
}

/// Rows of all blocks and planes; each plane's values are of one kind.
fn values(job: &Job, kinds: &[Kind], chance: &mut Chance) -> Vec<Vec<u8>> {
    let mut rows = Vec::new();
    for _ in 0..job.blocks * job.planes.len() {
        let kind = chance.of(kinds);
        rows.extend((0..job.heads * job.tokens).map(|_| {
            let row = (0..job.dim).map(|_| special(job.dtype, kind, chance).to_le_bytes());
            row.flatten().collect::<Vec<u8>>()
        }));
    }
    rows
}

fn divisor(of: usize, least: usize, chance: &mut Chance) -> u32 {
    let all: Vec<u32> = (1..=of as u32).filter(|&n| of.is_multiple_of(n as usize) && of / n as usize <= 256).collect();
    let all: Vec<u32> = all.into_iter().filter(|&n| n as usize >= least).collect();
    chance.of(&all)
}

fn how(tokens: usize, dim: usize, chance: &mut Chance) -> How {
    let by = match chance.below(6) {
        0 => Granularity::Tensor,
        1 => Granularity::Head,
        2 => Granularity::Token(0),
        3 => Granularity::Token(divisor(dim, 1, chance)),
        4 => Granularity::Channel(0),
        _ => Granularity::Channel(divisor(tokens, 1, chance)),
    };
    let codec = chance.of(&[Codec::Int8Sym, Codec::Int8Asym, Codec::Int8Sym, Codec::Int8Asym, Codec::None]);
    let bound = if chance.below(4) == 0 { chance.of(&[0.5, 2.0, 0.0, 1e-40, 3e38]) } else { f32::INFINITY };
    How { codec, by, bound }
}

/// A job of any shape.
fn job(chance: &mut Chance) -> Job {
    let dim = chance.of(&[64, 80, 96, 128, 192, 256, 576, 8, 16, 72]);
    let heads = chance.of(&[1, 2, 8]);
    let most = if dim * heads > 600 { 17 } else { 64 };
    let tokens = 1 + chance.below(most);
    let run = if chance.below(2) == 0 { divisor(tokens, 1, chance) as usize } else { 1 + chance.below(tokens) };
    let (blocks, planes) = (1 + chance.below(2), 1 + chance.below(3));
    Job {
        dtype: chance.of(&HALVES),
        blocks,
        heads,
        tokens,
        dim,
        place: match chance.below(5) {
            0 => Place::Slab,
            1 => Place::TokenFirst(run),
            2 => Place::HeadFirst(run),
            3 => Place::PageFirst(run),
            _ => Place::Gaps(run),
        },
        planes: (0..planes).map(|_| how(tokens, dim, chance)).collect(),
        grid: 1 + chance.below(blocks * planes + 2),
        block: chance.of(&[32, 64, 64, 96, 128, 256]),
    }
}

/// Both ways.
fn both(job: &Job, kinds: &[Kind], chance: &mut Chance, vectors: &mut Vec<Vector>) {
    let values = values(job, kinds, chance);
    vectors.push(job.encoded(&values, chance));
    vectors.extend(job.decoded(&values, chance));
}

/// Jobs of random shapes.
fn shapes(random: u64) -> Vec<Vector> {
    let mut vectors = Vec::new();
    for seed in 0..random {
        let mut chance = Chance(seed);
        let job = job(&mut chance);
        let kinds: &[Kind] = if seed % 3 == 0 { &KINDS[..1] } else { &KINDS };
        both(&job, kinds, &mut chance, &mut vectors);
    }
    vectors
}

/// Small jobs of values with something special about them.
fn limits(count: usize) -> Vec<Vector> {
    let mut chance = Chance(6);
    let mut vectors = Vec::new();
    for seed in 0..count {
        let mut job = Job { heads: 2, dim: chance.of(&[8, 24, 64]), ..job(&mut chance) };
        job.tokens = 1 + chance.below(6);
        job.place = Place::Gaps(1 + chance.below(job.tokens));
        job.planes = (0..3).map(|_| how(job.tokens, job.dim, &mut chance)).collect();
        job.block = chance.of(&[32, 64]);
        both(&job, &KINDS[1 + seed % 8..][..1], &mut chance, &mut vectors);
    }
    vectors
}

/// Rows longer than a block has threads, and more groups than are staged at once.
fn long() -> Vec<Vector> {
    let mut chance = Chance(3);
    let mut vectors = Vec::new();
    for (tokens, dim) in [(3, 2056), (40, 256)] {
        let all =
            [Granularity::Token(8), Granularity::Channel(0), Granularity::Head, Granularity::Token(dim as u32 / 2)];
        let all = all.into_iter().filter(|by| !matches!(by, Granularity::Token(8)) || dim / 8 <= 256);
        let planes =
            all.flat_map(|by| INT8.map(|codec| How::new(codec, by))).chain([How::new(Codec::None, Granularity::Head)]);
        let place = Place::TokenFirst(2);
        let planes = planes.collect();
        let job = Job { dtype: Dtype::Bf16, blocks: 1, heads: 1, tokens, dim, place, planes, grid: 3, block: 256 };
        both(&job, &KINDS[..1], &mut chance, &mut vectors);
    }
    vectors
}

/// Codes of all kinds under scales of any size, and none.
fn scales() -> Vec<Vector> {
    let mut chance = Chance(9);
    let mut vectors = Vec::new();
    for dtype in HALVES {
        for codec in INT8 {
            for by in [Granularity::Tensor, Granularity::Token(4), Granularity::Channel(0), Granularity::Token(0)] {
                let planes = vec![How::new(codec, by); 3];
                let place = Place::HeadFirst(5);
                let job = Job { dtype, blocks: 2, heads: 2, tokens: 16, dim: 64, place, planes, grid: 4, block: 64 };
                vectors.push(job.decoded_from_any(&mut chance));
            }
        }
    }
    vectors
}

/// Rows of eight patterns that follow one another, each block a few rows.
fn patterns(dtype: Dtype, codec: Codec, by: Granularity, tokens: usize) -> (Job, Vec<Vec<u8>>) {
    let rows: Vec<Vec<u8>> =
        (0..0x2000u32).map(|row| (0..8).flat_map(|n| ((8 * row + n) as u16).to_le_bytes()).collect()).collect();
    let job = Job {
        dtype,
        blocks: rows.len() / tokens,
        heads: 1,
        tokens,
        dim: 8,
        place: Place::Slab,
        planes: vec![How::new(codec, by)],
        grid: 16,
        block: 32,
    };
    (job, rows)
}

#[test]
fn what_is_expected_is_the_payload_that_the_codec_makes_of_a_whole_model() {
    let mut chance = Chance(10);
    let geometry = Geometry { layers: 3, planes: 2, kv_heads: 2, head_dim: 24, dtype: Dtype::Bf16, block_tokens: 5 };
    for codec in INT8 {
        let scheme = Scheme { raw_layers: [1, 0], ..Scheme::new(codec, &geometry) };
        let layout = Layout::new(scheme, &geometry).expect("a layout");
        let (raw, key, value) = (Codec::None, Granularity::Channel(0), Granularity::Token(0));
        let planes = [(raw, key), (raw, value), (codec, key), (codec, value), (codec, key), (codec, value)];
        let job = Job {
            dtype: Dtype::Bf16,
            blocks: 1,
            heads: 2,
            tokens: 5,
            dim: 24,
            place: Place::Slab,
            planes: planes.map(|(codec, by)| How::new(codec, by)).to_vec(),
            grid: 1,
            block: 32,
        };
        let values = values(&job, &KINDS[..1], &mut chance);
        let mut whole = vec![0; layout.bytes()];
        assert!(layout.encode_payload(&values.concat(), false, &mut whole));
        assert!(job.payload_of(&values) == whole);
    }
}

#[test]
fn copies_of_any_size_are_whole_and_no_more() {
    if !compiler() {
        return;
    }
    let mut chance = Chance(1);
    let vectors: Vec<Vector> = (1..=300).map(|size| copies(1 + size % 4, size, &mut chance)).collect();
    check(&vectors, &SEEDS);
    check(&[copies(300, 3, &mut chance), copies(2, 5000, &mut chance), copies(0, 7, &mut chance)], &SEEDS);
}

#[test]
fn blocks_of_any_shape_and_place_are_encoded_and_decoded_as_by_the_codec() {
    if !compiler() {
        return;
    }
    check(&shapes(160), &SEEDS);
}

#[test]
fn every_granularity_of_the_usual_shapes_is_as_by_the_codec() {
    if !compiler() {
        return;
    }
    let mut chance = Chance(2);
    let mut vectors = Vec::new();
    for (n, dim) in [64, 80, 96, 128, 192, 256, 576].into_iter().enumerate() {
        let (heads, tokens) = [(1, 16), (2, 15), (2, 16), (8, 16), (1, 32), (2, 8), (1, 64)][n];
        let all = [
            Granularity::Tensor,
            Granularity::Head,
            Granularity::Token(0),
            Granularity::Token(dim as u32 / 2),
            Granularity::Token(8),
            Granularity::Channel(0),
            Granularity::Channel(divisor(tokens, 2, &mut chance)),
        ];
        let planes = all.into_iter().flat_map(|by| INT8.map(|codec| How::new(codec, by))).collect();
        let place = [Place::TokenFirst(16), Place::HeadFirst(5), Place::PageFirst(4), Place::Gaps(7)][n % 4];
        let job = Job { dtype: HALVES[n % 2], blocks: 1, heads, tokens, dim, place, planes, grid: 5, block: 128 };
        both(&job, &KINDS[..1], &mut chance, &mut vectors);
    }
    check(&vectors, &SEEDS);
}

#[test]
fn rows_longer_than_a_block_has_threads_and_groups_beyond_what_is_staged_are_whole() {
    if !compiler() {
        return;
    }
    check(&long(), &FEW);
}

#[test]
fn all_patterns_of_16_bits_are_encoded_as_by_the_codec() {
    if !compiler() {
        return;
    }
    let mut chance = Chance(4);
    let mut vectors = Vec::new();
    for dtype in HALVES {
        for (codec, by) in [
            (Codec::Int8Sym, Granularity::Token(0)),
            (Codec::Int8Asym, Granularity::Channel(0)),
            (Codec::Int8Sym, Granularity::Head),
            (Codec::Int8Asym, Granularity::Token(0)),
        ] {
            let (job, rows) = patterns(dtype, codec, by, 4);
            vectors.push(job.encoded(&rows, &mut chance));
        }
        // Each alone among ones, so that the verdict is its own.
        let (mut job, _) = patterns(dtype, Codec::Int8Asym, Granularity::Token(0), 1);
        (job.blocks, job.planes) = (0x10000 / 8, vec![How::new(Codec::Int8Asym, Granularity::Token(0)); 8]);
        let one = if dtype == Dtype::Fp16 { 0x3c00u16 } else { 0x3f80 };
        let row = |pattern: u32| {
            (0..8).flat_map(|n| (if n == pattern % 8 { pattern as u16 } else { one }).to_le_bytes()).collect()
        };
        // A block has one status: those that fit stand together.
        vectors.push(job.encoded(&(0..0x10000).map(row).collect::<Vec<_>>(), &mut chance));
    }
    check(&vectors, &FEW[..1]);
}

#[test]
fn all_patterns_that_fit_come_back_and_so_do_codes_under_any_scale() {
    if !compiler() {
        return;
    }
    let mut chance = Chance(5);
    let mut vectors = Vec::new();
    for dtype in HALVES {
        for codec in INT8 {
            let (mut job, rows) = patterns(dtype, codec, Granularity::Token(0), 8);
            // Of either sign what is below the limit, and far enough from what is next.
            let end = if dtype == Dtype::Fp16 { 0x7bc0 / 8 } else { 0x7e80 / 8 };
            let rows: Vec<Vec<u8>> = [&rows[0xe00 / 8..end], &rows[0x8e00 / 8..end + 0x1000]].concat();
            job.blocks = rows.len() / job.tokens;
            let whole = &rows[..job.blocks * job.tokens];
            vectors.push(job.decoded(whole, &mut chance).expect("they fit"));
        }
    }
    vectors.extend(scales());
    check(&vectors, &FEW);
}

#[test]
fn values_at_the_limits_and_beyond_have_the_codec_s_verdict() {
    if !compiler() {
        return;
    }
    check(&limits(240), &SEEDS);
}

#[test]
fn no_two_threads_touch_the_same_without_a_barrier() {
    if !compiler() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (program, path) = (folder.path().join("threads"), folder.path().join("vectors"));
    let output = compile(Path::new(CUDA), THREADS, &program);
    assert!(output.status.success(), "{}", text(&output));
    let mut chance = Chance(7);
    let mut vectors = vec![copies(3, 150, &mut chance)];
    // All planes by one block, so that each follows others.
    let all = [Granularity::Head, Granularity::Token(0), Granularity::Channel(0), Granularity::Token(3)];
    let planes = all.into_iter().chain(all.into_iter().rev()).map(|by| How::new(chance.of(&INT8), by)).collect();
    let place = Place::TokenFirst(4);
    let job = Job { dtype: Dtype::Fp16, blocks: 1, heads: 2, tokens: 12, dim: 24, place, planes, grid: 1, block: 64 };
    both(&job, &KINDS[..1], &mut chance, &mut vectors);
    std::fs::write(&path, file(&vectors)).expect("room for vectors");
    let output = outcome(&program, &path, &FEW[..1]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
#[ignore = "compiles the kernels once for each planted bug: make prove"]
fn every_planted_bug_is_caught() {
    if !compiler() {
        return;
    }
    let mut chance = Chance(8);
    let mut vectors: Vec<Vector> = (1..=300).step_by(7).map(|size| copies(2, size, &mut chance)).collect();
    vectors.extend([copies(300, 3, &mut chance), copies(2, 5000, &mut chance)]);
    vectors.extend(limits(120));
    vectors.extend(scales());
    vectors.extend(shapes(60));
    vectors.extend(long());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vectors");
    std::fs::write(&path, file(&vectors)).expect("room for vectors");
    let output = outcome(&program(), &path, &FEW);
    assert!(output.status.success(), "without a bug: {}", text(&output));
    mutants::all_are_caught(&path);
}
