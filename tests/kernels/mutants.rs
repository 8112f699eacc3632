//! Bugs planted in the kernels, each of which the vectors must catch.
//!
//! A list that is all caught says what the vectors look at; without one a suite looks complete and is not.

use super::{ADDRESS, CUDA, FEW, compile, outcome, text};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What it breaks, a text that `kv_pool.cu` has once, and what stands there instead.
const MUTANTS: [(&str, &str, &str); 34] = [
    ("copy: one vector too many in four", "if (at + 96 < vectors)", "if (at + 96 <= vectors)"),
    ("copy: one vector too many alone", "at + i < vectors && i < KV_PART", "at + i <= vectors && i < KV_PART"),
    ("copy: the last part is never begun", "(vectors + KV_PART - 1) / KV_PART", "vectors / KV_PART"),
    ("copy: parts that pass a piece's end stay in it", "part -= parts;\n            piece += 1;", "part -= parts;"),
    ("copy: from where it goes", "from = kv_table8(pair) +", "from = kv_table8(pair + 8) +"),
    ("copy: a vector twice, another never", "kv_st16(to + 1024, c)", "kv_st16(to + 1024, b)"),
    ("division is off where it is exact", "~0u / number + 1", "~0u / number"),
    ("a row has the run of another", "offsets + 8ull * run)", "offsets + 8ull * within)"),
    ("tokens go on behind their run", "within * token_stride", "token * token_stride"),
    ("heads lie as tokens do", "head * head_stride", "head * token_stride"),
    ("a block has another's runs", "8ull * block * work.runs", "8ull * block"),
    ("parts are not padded", "return (bytes + 63) / 64 * 64;", "return (bytes + 15) / 16 * 16;"),
    ("padding is not written", "at < kv_padded(bytes)", "at < bytes"),
    ("threads leave out rows", "next_row = blockDim.x / item.columns;", "next_row = blockDim.x / item.columns + 1;"),
    ("the row after the last is read", "const bool more = row < n;", "const bool more = row <= n;"),
    ("raw rows are left out", "row += 4 * item.next_row", "row += 5 * item.next_row"),
    ("-0 is as 0", "return two ^ (", "return two == 0x80008000u ? two : two ^ ("),
    (
        "the upper value of a word is not looked at",
        "            add(two);\n            add(two << 16);",
        "            add(two << 16);",
    ),
    ("negative values are ordered upside down", "0xbb99) | 0x80008000u", "0) | 0x80008000u"),
    ("half of a warp is not joined", "distance = threads / 2", "distance = threads / 4"),
    ("the least is forgotten", "lo = other.lo < lo ? other.lo : lo;", ""),
    ("the greatest is not cut", "hi = kv_least(kv_most(hi, -item.bound), item.bound);", ""),
    ("what is infinite is cut", "out.fit = kv_finite(lo) && kv_finite(hi);", "out.fit = true;"),
    ("the limit of halves is that of bfloat16", "KV_FP16 ? 64000.0f : 1e38f", "KV_FP16 ? 1e38f : 1e38f"),
    ("the limit itself does not fit", "hi <= largest", "hi < largest"),
    ("the smallest spread does not fit", "spread >= smallest", "spread > smallest"),
    ("a spread below the smallest fits", "(spread == 0.0f || spread >= smallest)", "true"),
    ("scales are rounded to the nearest", "+ 0xffff) & 0xffff0000u", "+ 0x7fff) & 0xffff0000u"),
    ("a division by an inverse", "kv_div(spread, item.high)", "kv_mul(spread, kv_div(1.0f, item.high))"),
    ("codes are rounded down", "kv_least(kv_most(code,", "kv_least(kv_most(kv_sub(code, 0.5f),"),
    (
        "codes wrap around",
        "kv_add(kv_least(kv_most(code, item.low), item.high), 12582912.0f)",
        "kv_add(code, 12582912.0f)",
    ),
    ("a base of zero loses signs", "eight.base[k] = -0.0f;", "eight.base[k] = 0.0f;"),
    ("signed codes are unsigned", "is_signed ? 0x80808080u : 0", "0u"),
    ("tokens have the scale of the first", "(by_token ? row : tile)", "tile"),
];

/// Barriers in the kernels, each of which is left out once.
const BARRIERS: usize = 6;

/// What a bug breaks, and the kernels with it.
fn mutated(n: usize) -> (String, String) {
    let source = std::fs::read_to_string(Path::new(CUDA).join("kv_pool.cu")).expect("the kernels");
    if let Some((what, before, after)) = MUTANTS.get(n) {
        assert_eq!(source.matches(before).count(), 1, "{what}: {before:?}");
        return ((*what).to_string(), source.replace(before, after));
    }
    let barriers: Vec<usize> = source.match_indices("__syncthreads();").map(|(at, _)| at).collect();
    assert_eq!(barriers.len(), BARRIERS, "barriers in the kernels");
    let at = barriers[n - MUTANTS.len()];
    let line = source[..at].lines().count();
    (format!("no barrier in line {line}"), format!("{}{}", &source[..at], &source[at + 16..]))
}

/// What a bug breaks; an error, if the vectors do not fail on it.
fn caught(n: usize, vectors: &Path) -> Result<String, String> {
    let (what, source) = mutated(n);
    let folder = tempfile::tempdir().expect("a folder");
    let (cuda, program) = (folder.path().join("cuda"), folder.path().join("program"));
    std::fs::create_dir_all(cuda.join("tests")).expect("room");
    for name in ["kv_compat.h", "tests/executor.h", "tests/launch.h", "tests/vectors.cpp"] {
        std::fs::copy(Path::new(CUDA).join(name), cuda.join(name)).expect("room");
    }
    std::fs::write(cuda.join("kv_pool.cu"), source).expect("room");
    let compiled = compile(&cuda, &[ADDRESS, &["-w"]].concat(), &program);
    assert!(compiled.status.success(), "{what}: {}", text(&compiled));
    let output = outcome(&program, vectors, &FEW);
    if output.status.success() { Err(what) } else { Ok(what) }
}

/// Plants every bug, on two threads.
pub(crate) fn all_are_caught(vectors: &Path) {
    let all = MUTANTS.len() + BARRIERS;
    let next = AtomicUsize::new(0);
    let work = || {
        // Relaxed: a number for each, and nothing else is shared.
        let mine = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&n| n < all));
        mine.filter_map(|n| caught(n, vectors).err()).collect::<Vec<String>>()
    };
    let survivors = std::thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(work));
        threads.map(|thread| thread.join().expect("no panic")).concat()
    });
    eprintln!("kernels: {} of {all} planted bugs caught", all - survivors.len());
    assert!(survivors.is_empty(), "not caught: {survivors:#?}");
}
