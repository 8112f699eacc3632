//! The GPU tier at its Rust boundary, over the process as a device: what a place costs, what a hit costs, and how often a
//! place is used again. Nothing here says anything of a device's speed.
//!
//! Prints lines of `name|value|unit|limit|limit_value|n`; benches/gpu.py makes rows of them. With a file of request traces,
//! one request's block numbers a line, those are replayed. Times are of one thread, warm, with the clock's own share in.

use std::collections::HashMap;
use std::hint::black_box;
use std::io::BufRead as _;
use std::sync::Arc;
use std::time::Instant;
use stratakv::block::BlockHash;
use stratakv::gpu::{Adopted, Host, Lane, Placed, Schedule, Slab, Ticket};
use stratakv::pool::{Class, Holding};
use stratakv::trie::{Inserted, NodeId, Trie};

/// 65,536 blocks: so many that a slab's books do not fit the processor's nearest cache.
const BLOCK_BYTES: usize = 64 << 10;
const SLAB_BYTES: u64 = 4 << 30;
const CALLS: usize = 200_000;
/// Blocks of a prompt of 1,024 tokens by 16.
const PATH: usize = 64;
const PROMPTS: usize = 1000;
const ROUNDS: usize = 5;

fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ word >> 29
}

fn share(mut values: Vec<u64>, of_1000: usize) -> f64 {
    values.sort_unstable();
    values[values.len() * of_1000 / 1000] as f64
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
fn timed(count: usize, mut call: impl FnMut(usize)) -> Vec<u64> {
    let mut each = Vec::with_capacity(count);
    for n in 0..count {
        let begun = Instant::now();
        call(n);
        each.push(begun.elapsed().as_nanos() as u64);
    }
    each
}

// Memory that nobody touches costs nothing; so it is adopted, not filled with a pattern.
fn slab() -> Slab {
    let device = Arc::new(Host::new(Schedule::AtOnce, 0));
    let memory = Adopted { address: 1 << 40, bytes: SLAB_BYTES, owner: Arc::new(()) };
    Slab::adopt(device, memory).expect("it is large enough")
}

struct Tier {
    slab: Slab,
    class: Arc<Class>,
}

impl Tier {
    fn new() -> Self {
        let slab = slab();
        let class = slab.class(&Holding::new(0), BLOCK_BYTES);
        Self { slab, class }
    }

    fn place(&mut self, node: NodeId) -> Option<Placed> {
        let placed = self.slab.place(&self.class, 0, &[node]).expect("nothing is lost").pop()?;
        self.slab.wrote(&[placed], Lane::Up, Ticket::NONE);
        Some(placed)
    }

    fn evict(&mut self) -> NodeId {
        let placed = self.slab.coldest(0, |_| true).expect("it is full");
        let node = self.slab.node(placed);
        self.slab.leave(placed, true);
        node
    }
}

fn places() {
    let (mut given, mut evicting) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut tier = Tier::new();
        let mut live: Vec<Placed> = (0..).map_while(|node| tier.place(node)).collect();
        // 85 % stay.
        let places = live.len();
        for n in 0..places * 15 / 100 {
            let nth = mix((round * 7 + n) as u64) as usize % live.len();
            tier.slab.leave(live.swap_remove(nth), false);
        }
        tier.slab.reclaim().expect("nothing is lost");
        let mut took = Vec::with_capacity(CALLS);
        for n in 0..CALLS {
            let begun = Instant::now();
            let given = tier.slab.place(&tier.class, 0, &[n as u32]);
            took.push(begun.elapsed().as_nanos() as u64);
            let placed = given.expect("nothing is lost").pop().expect("there is room");
            tier.slab.wrote(&[placed], Lane::Up, Ticket::NONE);
            let nth = mix((round * 1_000_003 + n) as u64) as usize % live.len();
            tier.slab.leave(std::mem::replace(&mut live[nth], placed), false);
            tier.slab.reclaim().expect("nothing is lost");
        }
        given.push((share(took.clone(), 500), share(took.clone(), 990), share(took, 999)));
        while tier.place(0).is_some() {}
        let took = timed(CALLS, |n| {
            tier.evict();
            black_box(tier.place(n as u32));
        });
        evicting.push((share(took.clone(), 500), share(took, 990)));
    }
    let clock = median((0..1001).map(|_| Instant::now().elapsed().as_nanos() as f64).collect());
    let calls = ROUNDS * CALLS;
    report(
        "place in a slab that is 85 % full, p50",
        median(given.iter().map(|g| g.0).collect()),
        "ns",
        "the clock",
        clock,
        calls,
    );
    report(
        "place in a slab that is 85 % full, p99",
        median(given.iter().map(|g| g.1).collect()),
        "ns",
        "the clock",
        clock,
        calls,
    );
    report(
        "place in a slab that is 85 % full, p99.9",
        median(given.iter().map(|g| g.2).collect()),
        "ns",
        "the clock",
        clock,
        calls,
    );
    report("evict, and place, p50", median(evicting.iter().map(|e| e.0).collect()), "ns", "the clock", clock, calls);
    report("evict, and place, p99", median(evicting.iter().map(|e| e.1).collect()), "ns", "the clock", clock, calls);
}

fn hits() {
    let hash = |prompt: usize, block: usize| {
        let low = mix((prompt << 20 | (block + 1)) as u64);
        BlockHash(u128::from(mix(low ^ 0x1234_5678)) << 64 | u128::from(low))
    };
    let trie = Trie::new(PROMPTS * PATH * 2).expect("memory is to be had");
    let mut tier = Tier::new();
    let mut on_gpu: HashMap<NodeId, Placed> = HashMap::new();
    let prompts: Vec<Vec<BlockHash>> =
        (0..PROMPTS).map(|prompt| (0..PATH).map(|block| hash(prompt, block)).collect()).collect();
    let mut places: Vec<Option<Placed>> = vec![None; PROMPTS * PATH * 2];
    for prompt in &prompts {
        let mut parent: Option<NodeId> = None;
        for &hash in prompt {
            let Inserted::New(id) = trie.insert(parent, hash, 0) else { panic!("there is room") };
            parent.replace(id).into_iter().for_each(|id| trie.release(id));
            if let Some(placed) = tier.place(id) {
                on_gpu.insert(id, placed);
                places[id as usize] = Some(placed);
            }
        }
        parent.into_iter().for_each(|id| trie.release(id));
    }
    // Those of which the last block is on the device.
    let last = |prompt: &Vec<BlockHash>| {
        let found = trie.longest_prefix(prompt).ok().flatten();
        found.into_iter().for_each(|(id, _)| trie.release(id));
        found.and_then(|(id, _)| places[id as usize])
    };
    let warm: Vec<&Vec<BlockHash>> = prompts.iter().filter(|prompt| last(prompt).is_some()).collect();
    let rounds: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|round| {
            let took = timed(CALLS, |n| {
                let prompt = warm[mix((round * 1_000_003 + n) as u64) as usize % warm.len()];
                if let Ok(Some((id, length))) = trie.longest_prefix(prompt) {
                    if let Some(placed) = places[id as usize] {
                        tier.slab.hold(placed);
                        tier.slab.touch(placed);
                        tier.slab.let_go(placed, Ticket::NONE);
                    }
                    trie.release(black_box(id));
                    black_box(length);
                }
            });
            (share(took.clone(), 500), share(took, 990))
        })
        .collect();
    let clock = median((0..1001).map(|_| Instant::now().elapsed().as_nanos() as f64).collect());
    let calls = ROUNDS * CALLS;
    let name = "hit: look up 64 blocks, lease, hold, touch";
    report(&format!("{name}, p50"), median(rounds.iter().map(|r| r.0).collect()), "ns", "the clock", clock, calls);
    report(&format!("{name}, p99"), median(rounds.iter().map(|r| r.1).collect()), "ns", "the clock", clock, calls);
}

/// A tier of a tenth of what is asked for, least recently used first out; a request's blocks from its start on.
fn replay(path: &str) {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("it is readable"));
    let requests: Vec<Vec<u32>> = file
        .lines()
        .map(|line| line.expect("it is text").split(' ').filter_map(|number| number.parse().ok()).collect())
        .collect();
    let device = Arc::new(Host::new(Schedule::AtOnce, SLAB_BYTES));
    let mut slab = Slab::reserve(device.clone(), SLAB_BYTES, SLAB_BYTES).expect("there is room");
    let (class, calls) = (slab.class(&Holding::new(0), 1 << 20), device.memory_calls());
    let mut there: HashMap<u32, Placed> = HashMap::new();
    let (mut asked, mut hit) = (0usize, 0usize);
    let begun = Instant::now();
    for request in &requests {
        for &block in request.iter().rev() {
            asked += 1;
            if let Some(&placed) = there.get(&block) {
                hit += 1;
                slab.touch(placed);
                continue;
            }
            let placed = loop {
                if let Some(placed) = slab.place(&class, 0, &[block]).expect("nothing is lost").pop() {
                    break placed;
                }
                let victim = slab.coldest(0, |_| true).expect("it is full");
                there.remove(&slab.node(victim));
                slab.leave(victim, true);
            };
            slab.wrote(&[placed], Lane::Up, Ticket::NONE);
            there.insert(block, placed);
        }
    }
    let spent = begun.elapsed().as_nanos() as f64 / asked as f64;
    let counts = slab.counts();
    let reused = (counts.taken - counts.fresh) as f64 / counts.taken as f64;
    report("replay: places that had a block before", reused, "", "", 0.0, counts.taken as usize);
    let calls = (device.memory_calls() - calls) as f64;
    report("replay: calls of the device for memory after the slab's", calls, "", "", 0.0, asked);
    report("replay: blocks hit", hit as f64 / asked as f64, "", "", 0.0, asked);
    report("replay: a block asked for", spent, "ns", "", 0.0, asked);
}

fn main() {
    places();
    hits();
    if let Some(path) = std::env::args().skip(1).find(|argument| argument != "--bench") {
        replay(&path);
    }
}
