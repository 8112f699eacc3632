//! The index and the pool against the machine: how long a cache miss takes, and one atomic addition.
//!
//! Prints lines of `name|value|unit|limit|limit_value|n`; benches/index.py makes rows of them. Arguments name parts:
//! `index`, `store`, `pool`. Every value is a median over rounds, each beside its limit.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;
use stratakv::block::BlockHash;
use stratakv::evict::{Curve, Kind};
use stratakv::pool::{Holding, Pool};
use stratakv::trie::{Inserted, NodeId, Trie};
use stratakv::{
    Dtype, Geometry, KvView, Model, ModelSpec, Options, PlaneView, Secret, Store, WritePolicy, block::Hasher,
};

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

const GEOMETRY: Geometry =
    Geometry { layers: 1, planes: 1, kv_heads: 1, head_dim: 8, dtype: Dtype::Fp16, block_tokens: 16 };
/// Tokens of one prompt.
const TOKENS: usize = PATH * 16;
/// Prompts that fill the RAM of a store: 10,000 and 100,000 blocks.
const STORED: [usize; 2] = [40, 400];

fn prompt(n: usize) -> Vec<u32> {
    (0..TOKENS).map(|at| mix((n << 16 | at) as u64) as u32 % 50_000).collect()
}

struct Filled {
    store: Arc<Store>,
    model: Arc<Model>,
    kv: Vec<u8>,
}

impl Filled {
    /// Full, since more was put than fits; the last of it is the first prompts.
    fn new(eviction: Kind, prompts: &[Vec<u32>], stored: usize) -> Self {
        let slots = (stored * PATH) as u64;
        let options = Options {
            ram_capacity_bytes: slots * GEOMETRY.record_bytes() as u64,
            ssd: None,
            eviction,
            policy: WritePolicy::WriteBack,
            secret: Some("bench".into()),
            threads: 1,
            index_bytes: None,
            stepped: false,
            gpu: None,
        };
        let store = Arc::new(Store::open(options).expect("memory is to be had"));
        let spec = ModelSpec { name: "m".into(), weights_version: String::new(), geometry: GEOMETRY };
        let model = store.register(spec).expect("it is the only one");
        let mut filled = Self { store, model, kv: vec![7; TOKENS * GEOMETRY.token_bytes()] };
        (0..stored * 5 / 4).rev().for_each(|n| filled.put(&prompts[n]));
        filled
    }

    fn put(&mut self, tokens: &[u32]) {
        let row = GEOMETRY.row_bytes() as isize;
        let plane = PlaneView { base: self.kv.as_mut_ptr(), head_stride: row, token_stride: row, page_stride: 0 };
        // SAFETY: the vector holds every row of a prompt, and outlives the call.
        let view = unsafe { KvView::new(vec![plane], None, TOKENS) }.expect("it covers the tokens");
        self.store.put(&self.model, tokens, "", "", &view).expect("the store is open");
    }

    fn ask(&self, tokens: &[u32]) {
        black_box(self.store.match_prefix(&self.model, tokens, "", "").expect("the store is open"));
    }
}

/// Through the whole store, what is left to whoever next has the lock included.
fn store(chase: &Chase, stored: usize) {
    let prompts: Vec<Vec<u32>> = (0..stored * 3 + 400).map(prompt).collect();
    let [lru, adaptive] = [Kind::Lru, Kind::Adaptive].map(|kind| Filled::new(kind, &prompts, stored));
    let matches = |filled: &Filled, round: usize| {
        time_each(400, |n| {
            filled.ask(&prompts[mix((round << 20 | n) as u64) as usize % (stored * 3 / 4)]);
            if n % 16 == 15 {
                black_box(filled.store.snapshot());
            }
        })
    };
    let mut round = 0;
    let (value, limit) = rounds(
        |n| matches(&adaptive, n),
        || {
            round += 1;
            matches(&lru, round - 1)
        },
    );
    let blocks = stored * PATH;
    report(
        &format!("match and what it leaves behind, {blocks} blocks, adaptive"),
        value,
        "ns",
        "lru",
        limit,
        ROUNDS * 400,
    );

    // What the curve of the model adds to that: more blocks are in either sample, its own and that of `adaptive`, and these
    // are asked for.
    let mut curve = Curve::new(blocks as u64, GEOMETRY.block_tokens);
    let tags: Vec<Vec<u64>> = (0..stored).map(|n| (0..PATH).map(|at| mix((n << 20 | at) as u64)).collect()).collect();
    let mut scan = |round: usize, told: bool| {
        time_each(400, |n| {
            let path = &tags[mix((round << 20 | n) as u64) as usize % (stored * 3 / 4)];
            let sample = if told { curve.sample() } else { u64::MAX };
            let either = sample & 0xf;
            for &tag in path.iter().filter(|&tag| tag & either == 0) {
                if tag & sample == 0 {
                    curve.ask(tag);
                }
                black_box(tag);
            }
            curve.count(path.len());
        })
    };
    let (value, limit) = rounds(
        |round| {
            let told = scan(round, true);
            told - scan(round, false)
        },
        || matches(&adaptive, ROUNDS),
    );
    let name = format!("miss-ratio curve, of a match and what it leaves behind, {blocks} blocks");
    report(&name, value, "ns", "match", limit, ROUNDS * 400);

    // A put into a full store evicts as many blocks as it brings; beside it, a reader matches what is used last.
    for (kind, mut filled) in [("lru", lru), ("adaptive", adaptive)] {
        let name = format!("put of a block that evicts one, beside a reader, {blocks} blocks, {kind}");
        let (store, model) = (filled.store.clone(), filled.model.clone());
        let stop = AtomicU64::new(0);
        let spent = std::thread::scope(|scope| {
            scope.spawn(|| {
                while stop.load(Ordering::Relaxed) == 0 {
                    black_box(store.match_prefix(&model, &prompts[0], "", "").is_ok());
                }
            });
            let spent = (stored..prompts.len()).map(|n| time_each(1, |_| filled.put(&prompts[n])) / PATH as f64);
            let spent = median(spent.collect());
            stop.store(1, Ordering::Relaxed);
            spent
        });
        report(&name, spent, "ns", "cache miss", chase.time(), prompts.len() - stored);
    }
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
    let class = pool.class(&Holding::new(0), 128 << 10);
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
            "store" => {
                let chase = Chase::new();
                STORED.into_iter().for_each(|stored| store(&chase, stored));
            }
            "pool" => pool(),
            _ => {}
        }
    }
}
