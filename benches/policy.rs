//! Drives the eviction policies over a trace, as the RAM tier does: a request hits its longest resident prefix, touches
//! it, and puts the rest; what it hit is held meanwhile. Belady's optimum beside it: the block that is asked for again
//! last leaves, or never enters; what continues a block is asked for no sooner, so its resident set is prefix-closed.
//!
//! `policy TRACE CAPACITY...` reads little-endian u32: for each request the number of its blocks, then their numbers, each
//! of which names a whole prefix. Prints lines of `policy capacity hits refs seconds switches`.

use std::collections::BinaryHeap;
use std::time::Instant;
use stratakv::evict::{Kind, NodeId, Order};

struct Trace {
    requests: Vec<Vec<NodeId>>,
    blocks: usize,
    refs: usize,
}

fn read(path: &str) -> std::io::Result<Trace> {
    let bytes = std::fs::read(path)?;
    let mut words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut requests = Vec::new();
    while let Some(count) = words.next() {
        requests.push(words.by_ref().take(count as usize).collect::<Vec<_>>());
    }
    let blocks = requests.iter().flatten().max().map_or(0, |&max| max as usize + 1);
    let refs = requests.iter().map(Vec::len).sum();
    Ok(Trace { requests, blocks, refs })
}

fn tag(block: NodeId) -> u64 {
    let mixed = (u64::from(block) ^ 0x5851_f42d_4c95_7f2d).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ mixed >> 29
}

struct Outcome {
    hits: usize,
    seconds: f64,
    switches: usize,
}

fn run(trace: &Trace, kind: Kind, capacity: usize) -> Outcome {
    let mut order = Order::new(kind, capacity);
    let mut resident = vec![false; trace.blocks];
    let mut parents = vec![None; trace.blocks];
    let mut children: Vec<Vec<NodeId>> = vec![Vec::new(); trace.blocks];
    let (mut hits, mut switches, mut running) = (0, 0, order.running());
    let started = Instant::now();
    for path in &trace.requests {
        let found = path.iter().take_while(|&&block| resident[block as usize]).count();
        hits += found;
        // The store tells what was found when it takes in a match, and the rest when that is put.
        for &block in path[..found].iter().rev() {
            order.asked(tag(block));
            order.touch(block);
        }
        order.choose();
        let held = found.checked_sub(1).map(|last| path[last]);
        let mut room = capacity - order.len();
        let wanted = path.len() - found;
        while room < wanted {
            let below = |&block: &NodeId| children[block as usize].last().copied();
            let leaf_of = |block: NodeId| std::iter::successors(Some(block), below).last().filter(|&b| Some(b) != held);
            let Some(victim) = order.victim(leaf_of, |_| true) else { break };
            order.remove(victim, true);
            resident[victim as usize] = false;
            if let Some(parent) = parents[victim as usize] {
                children[parent as usize].retain(|&child| child != victim);
            }
            room += 1;
        }
        path[found..].iter().rev().for_each(|&block| order.asked(tag(block)));
        order.choose();
        for at in (found..path.len().min(found + room)).rev() {
            let block = path[at];
            order.insert(block, tag(block), 1.0);
            resident[block as usize] = true;
            parents[block as usize] = at.checked_sub(1).map(|before| path[before]);
            if let Some(parent) = parents[block as usize] {
                children[parent as usize].push(block);
            }
        }
        switches += usize::from(running != order.running());
        running = order.running();
    }
    Outcome { hits, seconds: started.elapsed().as_secs_f64(), switches }
}

fn optimum(trace: &Trace, capacity: usize) -> usize {
    let flat: Vec<NodeId> = trace.requests.iter().flatten().copied().collect();
    let mut next = vec![usize::MAX; flat.len()];
    let mut last = vec![usize::MAX; trace.blocks];
    for (at, &block) in flat.iter().enumerate().rev() {
        next[at] = std::mem::replace(&mut last[block as usize], at);
    }
    // When each resident block is asked for next; entries of the heap may be outdated.
    let mut due = vec![None; trace.blocks];
    let mut heap: BinaryHeap<(usize, NodeId)> = BinaryHeap::new();
    let (mut hits, mut size) = (0, 0);
    for (at, &block) in flat.iter().enumerate() {
        if due[block as usize].is_some() {
            hits += 1;
        } else {
            size += 1;
        }
        due[block as usize] = Some(next[at]);
        heap.push((next[at], block));
        while size > capacity {
            let Some((when, victim)) = heap.pop() else { break };
            if due[victim as usize] == Some(when) {
                due[victim as usize] = None;
                size -= 1;
            }
        }
    }
    hits
}

#[expect(clippy::print_stdout, reason = "its output is its result")]
fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(path) = arguments.next() else { return Ok(()) };
    let trace = read(&path)?;
    for capacity in arguments.filter_map(|capacity| capacity.parse::<usize>().ok()) {
        for kind in Kind::ALL {
            let Outcome { hits, seconds, switches } = run(&trace, kind, capacity);
            println!("{} {capacity} {hits} {} {seconds} {switches}", kind.name(), trace.refs);
        }
        println!("opt {capacity} {} {} 0 0", optimum(&trace, capacity), trace.refs);
    }
    Ok(())
}
