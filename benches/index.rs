//! The index and the pool against the machine: how long a cache miss takes, and one atomic addition.
//!
//! Prints lines of `name|value|unit|limit|limit_value|n`; benches/index.py makes rows of them. Arguments name parts:
//! `index`, `pool`. Every value is a median over rounds, each beside its limit.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;
use stratakv::block::BlockHash;
use stratakv::pool::Pool;
use stratakv::trie::{Inserted, NodeId, Trie};
use stratakv::{Dtype, Geometry, Secret, block::Hasher};

const BLOCKS: usize = 1_000_000;
/// A prompt of 4,096 tokens in blocks of 16.
const PATH: usize = 256;
const ROUNDS: usize = 9;
/// Prompts of each thread, few enough to stay in the processor's caches; no two threads lease the same block.
const WARM: usize = 64;

fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ word >> 29
}

fn hash(prompt: u64, block: u64) -> BlockHash {
    let low = mix((prompt << 20) | (block + 1));
    BlockHash(u128::from(mix(low ^ 0x1234_5678)) << 64 | u128::from(low))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::print_stdout, reason = "its output is its result")]
fn report(name: &str, value: f64, unit: &str, limit: &str, limit_value: f64, n: usize) {
    println!("{name}|{value}|{unit}|{limit}|{limit_value}|{n}");
}

/// Nanoseconds of each call.
fn time_each(count: usize, mut call: impl FnMut(usize)) -> f64 {
    let started = Instant::now();
    (0..count).for_each(&mut call);
    started.elapsed().as_nanos() as f64 / count as f64
}

/// Nanoseconds of a load that misses every cache: a chain of loads through 256 MiB.
struct Chase(Vec<u32>);

impl Chase {
    fn new() -> Self {
        let count = 64 << 20;
        let mut order: Vec<u32> = (0..count).collect();
        let mut seed = 1;
        // Sattolo's shuffle: one cycle.
        for at in (1..count as usize).rev() {
            seed = mix(seed + at as u64);
            order.swap(at, seed as usize % at);
        }
        Self(order)
    }

    fn time(&self) -> f64 {
        let mut at = 0;
        let spent = time_each(200_000, |_| at = self.0[at as usize]);
        black_box(at);
        spent
    }
}

fn prompts() -> Vec<Vec<BlockHash>> {
    let one = |prompt| (0..PATH as u64).map(|block| hash(prompt, block)).collect();
    (0..(BLOCKS / PATH) as u64).map(one).collect()
}

fn filled(prompts: &[Vec<BlockHash>]) -> Trie {
    let trie = Trie::new(BLOCKS * 6 / 5).expect("memory is to be had");
    for prompt in prompts {
        let mut parent: Option<NodeId> = None;
        for &hash in prompt {
            let Inserted::New(id) = trie.insert(parent, hash, 0) else { panic!("there is room") };
            parent.replace(id).into_iter().for_each(|id| trie.release(id));
        }
        parent.into_iter().for_each(|id| trie.release(id));
    }
    trie
}

/// Prompts in an order that no cache foresees.
fn scattered(round: usize, n: usize) -> usize {
    mix((round * 1_000_003 + n) as u64) as usize % (BLOCKS / PATH)
}

/// Each call's time, the clock's own share taken out.
fn median_call(count: usize, mut call: impl FnMut(usize)) -> f64 {
    let clock = median((0..1000).map(|_| Instant::now().elapsed().as_nanos() as f64).collect());
    let mut each = Vec::with_capacity(count);
    for n in 0..count {
        let started = Instant::now();
        call(n);
        each.push(started.elapsed().as_nanos() as f64 - clock);
    }
    median(each)
}

fn rounds(mut value: impl FnMut(usize) -> f64, mut limit: impl FnMut() -> f64) -> (f64, f64) {
    let (values, limits) = (0..ROUNDS).map(|round| (value(round), limit())).unzip();
    (median(values), median(limits))
}

fn index() {
    let chase = Chase::new();
    let prompts = prompts();
    let trie = filled(&prompts);
    let find = |hashes: &[BlockHash]| {
        if let Ok(Some((id, length))) = trie.longest_prefix(hashes) {
            trie.release(black_box(id));
            black_box(length);
        }
    };
    let half: Vec<Vec<BlockHash>> = (0..1000)
        .map(|n| {
            let prompt = &prompts[n % prompts.len()];
            let known = 1 + mix(n as u64) as usize % PATH;
            let rest = (known..PATH).map(|block| hash((1 << 40) | n as u64, block as u64));
            prompt[..known].iter().copied().chain(rest).collect()
        })
        .collect();
    let absent: Vec<Vec<BlockHash>> =
        (0..1000).map(|n| (0..PATH as u64).map(|block| hash((1 << 41) | n, block)).collect()).collect();
    for (name, set) in [("all cached", &prompts), ("in part cached", &half), ("not cached", &absent)] {
        let value = |round| median_call(2000, |n| find(&set[scattered(round, n) % set.len()]));
        let (value, limit) = rounds(value, || chase.time());
        report(&format!("match + lease, 256 hashes, {name}"), value, "ns", "cache miss", limit, ROUNDS * 2000);
    }

    let geometry = Geometry { layers: 1, planes: 1, kv_heads: 1, head_dim: 8, dtype: Dtype::Fp16, block_tokens: 16 };
    let hasher = Hasher::new(&Secret::new(b"secret"), "model", "", &geometry, "", "");
    let sequences: Vec<Vec<u32>> =
        (0..64).map(|n| (0..4096).map(|t| mix((n << 32) | t) as u32 % 50_000).collect()).collect();
    let by_tokens = Trie::new(1 << 16).expect("memory is to be had");
    for tokens in &sequences {
        let mut parent: Option<NodeId> = None;
        for hash in hasher.hashes(tokens) {
            let Inserted::New(id) = by_tokens.insert(parent, hash, 0) else { panic!("there is room") };
            parent.replace(id).into_iter().for_each(|id| by_tokens.release(id));
        }
        parent.into_iter().for_each(|id| by_tokens.release(id));
    }
    let call = |tokens: &[u32]| {
        if let Ok(Some((id, length))) = by_tokens.longest_prefix(&hasher.hashes(tokens)) {
            assert_eq!(length, PATH);
            by_tokens.release(id);
        }
    };
    let (value, limit) = rounds(|_| median_call(1000, |n| call(&sequences[n % 64])), || chase.time());
    report("match + lease from 4,096 tokens", value, "ns", "cache miss", limit, ROUNDS * 1000);

    let counter = AtomicU64::new(0);
    let addition = || {
        time_each(1_000_000, |_| {
            black_box(counter.fetch_add(1, Ordering::AcqRel));
        })
    };
    let Ok(Some((hot, _))) = trie.longest_prefix(&prompts[0]) else { panic!("it is cached") };
    let pair = |id: NodeId| {
        if trie.lease(id) {
            trie.release(id);
        }
    };
    let (value, limit) = rounds(|_| time_each(1_000_000, |_| pair(black_box(hot))), addition);
    report("lease + release, hot", value, "ns", "atomic addition", limit, ROUNDS);
    let any = |round, n| mix((round * 1_000_003 + n) as u64) as usize % (BLOCKS / PATH * PATH);
    let (value, limit) = rounds(|round| time_each(1_000_000, |n| pair(any(round, n) as NodeId)), || chase.time());
    report("lease + release, random", value, "ns", "cache miss", limit, ROUNDS);

    let throughput = |threads: usize| {
        let (trie, prompts, gate) = (&trie, &prompts, Arc::new(Barrier::new(threads)));
        std::thread::scope(|scope| {
            let each = |thread: usize| {
                let gate = gate.clone();
                scope.spawn(move || {
                    gate.wait();
                    let spent = time_each(200_000, |n| {
                        if let Ok(Some((id, _))) =
                            trie.longest_prefix(&prompts[scattered(thread, n) % WARM * 2 + thread])
                        {
                            trie.release(id);
                        }
                    });
                    1e3 / spent
                })
            };
            let threads: Vec<_> = (0..threads).map(each).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum::<f64>()
        })
    };
    let (two, one) = rounds(|_| throughput(2), || throughput(1));
    report("match, 2 threads", two, "M/s", "match, 1 thread", one, ROUNDS);

    // Beside a reader: what is evicted is put back, outside of what is timed.
    let stop = AtomicU64::new(0);
    let evict = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0;
            while stop.load(Ordering::Relaxed) == 0 {
                n += 1;
                find(&prompts[scattered(7, n) % 16]);
            }
        });
        let mut each = Vec::new();
        for round in 0..200 {
            let prompt = &prompts[100 + round];
            let ids: Vec<NodeId> = prompt.iter().filter_map(|&hash| trie.find(hash)).collect();
            let started = Instant::now();
            for &id in ids.iter().rev() {
                black_box(trie.unlink(id, false));
            }
            each.push(started.elapsed().as_nanos() as f64 / PATH as f64);
        }
        stop.store(1, Ordering::Relaxed);
        median(each)
    });
    report("evict a block beside a reader", evict, "ns", "cache miss", chase.time(), 200);
    report("index bytes a block", trie.bytes() as f64 / (BLOCKS * 6 / 5) as f64, "bytes", "", 0.0, 1);
}

fn pool() {
    let counter = AtomicU64::new(0);
    let addition = || {
        time_each(1_000_000, |_| {
            black_box(counter.fetch_add(1, Ordering::AcqRel));
        })
    };
    let (value, limit) = rounds(|_| pairs(1), addition);
    report("alloc + free, 1 thread", value, "ns", "atomic addition", limit, ROUNDS);
    let (value, limit) = rounds(|_| pairs(2), addition);
    report("alloc + free, 2 threads", value, "ns", "atomic addition", limit, ROUNDS);
}

/// Nanoseconds of taking and giving back a slot, in each of so many threads, over a pool that is half full.
fn pairs(threads: usize) -> f64 {
    let pool = Pool::new(1 << 30);
    let class = pool.class(0, 128 << 10);
    let held: Vec<_> = (0..4000).filter_map(|_| pool.allocate(&class)).collect();
    let gate = Barrier::new(threads);
    let spent = std::thread::scope(|scope| {
        let each = || {
            scope.spawn(|| {
                gate.wait();
                time_each(1_000_000, |_| {
                    if let Some(slot) = black_box(pool.allocate(&class)) {
                        pool.free(slot);
                    }
                })
            })
        };
        let threads: Vec<_> = (0..threads).map(|_| each()).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).fold(0.0, f64::max)
    });
    held.into_iter().for_each(|slot| pool.free(slot));
    spent
}

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    for part in parts {
        match part.as_str() {
            "index" => index(),
            "pool" => pool(),
            _ => {}
        }
    }
}
