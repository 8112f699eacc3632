//! Which policy suits the present load: each one runs on a sample of it, as a cache in small, and the one that hits most
//! there runs in the tier. A sampled cache of a share of the blocks with that share of the capacity hits about as often
//! as the whole (SHARDS: Waldspurger et al., FAST 2015); all shadows see the same sample, so they differ by policy alone.
//!
//! A change costs a pass over the tier's blocks, so it takes a lead that is more than chance. Memory: six shadows of at
//! most 512 blocks up to a capacity of a quarter of a million, of 1/1,024 of it beyond, with as many ghosts again.

use super::ghosts::TagMap;
use super::{Kind, NodeId, Policy, policy};

/// Those that take turns.
const CANDIDATES: [Kind; 6] = [Kind::Lru, Kind::S3Fifo, Kind::S3FifoLong, Kind::Arc, Kind::WTinyLfu, Kind::Gdsf];
/// Blocks that a shadow should hold.
const SHADOW: usize = 256;
/// The shares that are sampled: one in 2^4 to one in 2^10.
const SHIFTS: (u32, u32) = (4, 10);
/// How much of a window's score counts on in the next.
const MEMORY: f64 = 0.7;
/// A lead must be by this share, and by so many standard deviations.
const LEAD: f64 = 0.01;
const DEVIATIONS: f64 = 1.0;

#[derive(Debug)]
struct Shadow {
    policy: Box<dyn Policy>,
    len: usize,
    hits: u32,
    score: f64,
}

#[derive(Debug)]
pub(super) struct Adaptive {
    shift: u32,
    /// Blocks that each shadow holds.
    size: usize,
    shadows: [Shadow; CANDIDATES.len()],
    /// One number for a sampled block in all shadows; which of them hold it, a bit each; and its tag.
    numbers: TagMap<NodeId>,
    held_by: Vec<u8>,
    tags: Vec<u64>,
    free: Vec<NodeId>,
    asked: usize,
    window: usize,
}

impl Adaptive {
    pub(super) fn new(capacity: usize) -> Self {
        let shift = (capacity / SHADOW).max(1).ilog2().clamp(SHIFTS.0, SHIFTS.1);
        let size = (capacity >> shift).max(4);
        let shadows = CANDIDATES.map(|kind| Shadow { policy: policy(kind, size), len: 0, hits: 0, score: 0.0 });
        let numbers = size * CANDIDATES.len() + 1;
        Self {
            shift,
            size,
            shadows,
            numbers: TagMap::default(),
            held_by: vec![0; numbers],
            tags: vec![0; numbers],
            free: (0..numbers as NodeId).rev().collect(),
            asked: 0,
            window: (4 * size).max(1024),
        }
    }

    /// Asks each shadow for a block of the sample; it keeps it.
    pub(super) fn ask(&mut self, tag: u64) {
        self.asked += 1;
        let Self { numbers, free, tags, held_by, .. } = self;
        let Some(node) = numbers.get(&tag).copied().or_else(|| free.pop()) else { return };
        if held_by[node as usize] == 0 {
            numbers.insert(tag, node);
            tags[node as usize] = tag;
        }
        for (n, shadow) in self.shadows.iter_mut().enumerate() {
            if held_by[node as usize] >> n & 1 == 1 {
                shadow.hits += 1;
                shadow.policy.touch(node, tag);
                continue;
            }
            if shadow.len == self.size
                && let Some(victim) = shadow.policy.victim(&mut Some)
            {
                let gone = tags[victim as usize];
                shadow.policy.remove(victim, gone, true);
                shadow.len -= 1;
                held_by[victim as usize] &= !(1 << n);
                if held_by[victim as usize] == 0 {
                    numbers.remove(&gone);
                    free.push(victim);
                }
            }
            shadow.policy.insert(node, tag, 1.0);
            shadow.len += 1;
            held_by[node as usize] |= 1 << n;
        }
    }

    /// Starts anew where the sample would be another; else the shadows go on at their new size.
    pub(super) fn set_capacity(&mut self, capacity: usize) {
        let next = Self::new(capacity);
        if next.shift != self.shift || next.size != self.size {
            *self = next;
        }
    }

    /// The bits that are zero in the tags of its sample.
    pub(super) fn sample(&self) -> u64 {
        (1 << self.shift) - 1
    }

    /// The policy that should run in place of this one, at the end of a window.
    pub(super) fn choose(&mut self, running: Kind) -> Option<Kind> {
        if self.asked < self.window {
            return None;
        }
        self.asked = 0;
        for shadow in &mut self.shadows {
            shadow.score = shadow.score * MEMORY + f64::from(std::mem::take(&mut shadow.hits));
        }
        let score = |kind: Kind| CANDIDATES.iter().position(|&c| c == kind).map_or(0.0, |n| self.shadows[n].score);
        let best = CANDIDATES.into_iter().max_by(|&a, &b| score(a).total_cmp(&score(b)))?;
        let now = score(running);
        (score(best) > now * (1.0 + LEAD) + DEVIATIONS * now.sqrt()).then_some(best)
    }
}
