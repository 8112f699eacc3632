//! What a cache of any size would hit, from a sample of what is asked for: a miss-ratio curve, online.
//!
//! Of the blocks of which a share is sampled by tag, the distance of each is measured when it is asked for again: how many
//! others were asked for since. A cache that evicts what was used longest ago hits if it holds more than that. Distances
//! of a sample are those of all blocks, divided by what was sampled (SHARDS: Waldspurger et al., FAST 2015). What was asked
//! for long ago counts less and less, as `age` is called.
//!
//! ```text
//! position   0 1 2 3 4 5 6 7      each block stands where it was last asked for
//! block      . a . b c . d e      b again: c, d and e were asked for since, so its distance is 3
//! ```
//! Memory: 70 bytes for each sampled block, of which there are at most 8,192; what was asked for before these is forgotten.
//!
//! What a cache without an end would hit needs no order and no memory: all but the first ask for each block. It is counted
//! from the beginning on, and never aged.

use super::distinct::Distinct;
use super::ghosts::TagMap;

/// Sampled blocks that are known at a time.
const MOST: usize = 8192;
/// One ask of the sample for so many tokens that are asked for, no more: a match of them takes fifty times as long.
const TOKENS_AN_ASK: u32 = 4096;

/// Asks of the sample before which nothing is said of all.
const TOLD_FROM: u64 = 100;

/// The curve of one model.
#[derive(Debug)]
pub struct Curve {
    shift: u32,
    /// Where each sampled block stands.
    positions: TagMap<u32>,
    /// Who stands at each position; 0: nobody any more.
    tags: Vec<u64>,
    /// A Fenwick tree over the positions that are taken (Fenwick, 1994).
    taken: Vec<u32>,
    next: usize,
    /// How often each distance was seen, aged.
    hits: Vec<f32>,
    /// Blocks asked for, in the sample or not; aged.
    asked: f64,
    /// Asks of the sample, and for how many different blocks; never aged.
    asks: u64,
    distinct: Distinct,
}

impl Curve {
    /// A curve up to a cache of so many blocks, of so many tokens each.
    pub fn new(blocks: u64, block_tokens: u32) -> Self {
        let least = TOKENS_AN_ASK.div_ceil(block_tokens.max(1));
        let shift = blocks.div_ceil(MOST as u64).max(u64::from(least)).next_power_of_two().ilog2();
        let mut curve = Self {
            shift,
            positions: TagMap::default(),
            tags: Vec::new(),
            taken: Vec::new(),
            next: 0,
            hits: Vec::new(),
            asked: 0.0,
            asks: 0,
            distinct: Distinct::default(),
        };
        curve.make_room();
        curve
    }

    /// The bits that are zero in the tags of its sample.
    #[inline]
    pub fn sample(&self) -> u64 {
        (1 << self.shift) - 1
    }

    /// So many blocks were asked for, in the sample or not.
    pub fn count(&mut self, blocks: usize) {
        self.asked += blocks as f64;
    }

    /// A block of the sample was asked for; those of a request from its end to its start.
    pub fn ask(&mut self, tag: u64) {
        self.asks += 1;
        self.distinct.add(tag);
        // Nobody has tag 0; and none of the sample has tag 1.
        let tag = tag.max(1);
        if self.next == self.tags.len() {
            self.make_room();
        }
        let position = self.next;
        self.next += 1;
        if let Some(before) = self.positions.insert(tag, position as u32) {
            let before = before as usize;
            let distance = self.positions.len() - self.taken_to(before);
            if self.hits.len() <= distance {
                self.hits.resize(distance + 1, 0.0);
            }
            self.hits[distance] += 1.0;
            self.tags[before] = 0;
            self.shift_taken(before, false);
        }
        self.tags[position] = tag;
        self.shift_taken(position, true);
    }

    /// What was seen up to now counts by this factor, 0 to 1, from here on.
    pub fn age(&mut self, factor: f64) {
        self.hits.iter_mut().for_each(|hits| *hits *= factor as f32);
        self.asked *= factor;
    }

    /// Blocks asked for, aged.
    pub fn asked(&self) -> f64 {
        self.asked
    }

    /// The share of all asks, from the first on, that were for what was asked for before, 0 to 1: a cache that never forgets
    /// would have hit them. `None`: too few are known.
    pub fn ceiling(&self) -> Option<f64> {
        let told = self.asks >= TOLD_FROM;
        told.then(|| (1.0 - self.distinct.count() / self.asks as f64).clamp(0.0, 1.0))
    }

    /// How many of the blocks that were asked for a cache of each of these sizes would have hit; sizes rise.
    pub fn hits(&self, blocks: &[f64]) -> Vec<f64> {
        let scale = f64::from(1u32 << self.shift);
        let (mut sum, mut next) = (0.0, 0);
        let hits = blocks.iter().map(|&size| {
            // A block at distance d hits where there is room for d others and itself.
            let room = size / scale;
            while next < self.hits.len() && (next + 1) as f64 <= room {
                sum += f64::from(self.hits[next]);
                next += 1;
            }
            let part = self.hits.get(next).map_or(0.0, |&hits| f64::from(hits) * (room - next as f64).clamp(0.0, 1.0));
            ((sum + part) * scale).min(self.asked)
        });
        hits.collect()
    }

    // How many positions up to and with this one are taken.
    fn taken_to(&self, position: usize) -> usize {
        let (mut sum, mut at) = (0, position + 1);
        while at > 0 {
            sum += self.taken[at - 1];
            at &= at - 1;
        }
        sum as usize
    }

    fn shift_taken(&mut self, position: usize, add: bool) {
        let mut at = position + 1;
        while at <= self.taken.len() {
            self.taken[at - 1] = if add { self.taken[at - 1] + 1 } else { self.taken[at - 1] - 1 };
            at += at & at.wrapping_neg();
        }
    }

    // Moves the blocks together, and forgets those that were asked for before the last `MOST`.
    fn make_room(&mut self) {
        let mut live: Vec<u64> = self.tags[..self.next].iter().copied().filter(|&tag| tag != 0).collect();
        let forgotten = live.len().saturating_sub(MOST);
        live.drain(..forgotten).for_each(|tag| {
            self.positions.remove(&tag);
        });
        let room = (live.len() * 2).next_power_of_two().clamp(64, 2 * MOST);
        self.next = live.len();
        self.tags.clear();
        self.tags.resize(room, 0);
        self.taken.clear();
        self.taken.resize(room, 0);
        for (position, tag) in live.into_iter().enumerate() {
            self.tags[position] = tag;
            self.positions.insert(tag, position as u32);
            self.shift_taken(position, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One block in so many, as a power of two, is in the sample.
    const SHIFT: u32 = 4;

    // Tags of which all are in the sample.
    fn tag(block: u64) -> u64 {
        (block + 1) << SHIFT
    }

    fn hits_of_lru(asked: &[u64], capacity: usize) -> usize {
        let mut held: Vec<u64> = Vec::new();
        let mut hits = 0;
        for &block in asked {
            if let Some(at) = held.iter().position(|&other| other == block) {
                held.remove(at);
                hits += 1;
            } else if held.len() == capacity {
                held.remove(0);
            }
            held.push(block);
        }
        hits
    }

    proptest! {
        #[test]
        fn where_all_is_sampled_it_hits_as_often_as_the_cache(asked in prop::collection::vec(0u64..300, 1..2000)) {
            let mut curve = Curve::new(0, TOKENS_AN_ASK >> SHIFT);
            let scale = 1 << SHIFT;
            asked.iter().for_each(|&block| curve.ask(tag(block)));
            curve.count(asked.len() * scale);
            let sizes = [1usize, 2, 5, 17, 100, 299, 300, 5000];
            let hits = curve.hits(&sizes.map(|size| (size * scale) as f64));
            for (size, hits) in sizes.into_iter().zip(hits) {
                prop_assert_eq!(hits, (hits_of_lru(&asked, size) * scale) as f64);
            }
        }
    }

    // SplitMix64's.
    fn mix(number: u64) -> u64 {
        let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    #[test]
    fn samples_tell_of_the_whole() {
        let number = |n: u64| mix(n) % 4000;
        // Some blocks are asked for far more often than others.
        let asked: Vec<u64> = (1..=40_000).map(|n| number(2 * n) * number(2 * n + 1) / 4000).collect();
        let sizes = [100, 500, 2_000];
        let exact = sizes.map(|size| hits_of_lru(&asked, size) as f64);
        let samples = 32;
        let mut mean = [0.0; 3];
        for sample in 0..samples {
            let mut curve = Curve::new(4000, TOKENS_AN_ASK >> SHIFT);
            curve.count(asked.len());
            let tags = asked.iter().map(|block| mix(mix(sample + 1) ^ block));
            tags.filter(|tag| tag & curve.sample() == 0).collect::<Vec<_>>().into_iter().for_each(|tag| curve.ask(tag));
            let found = curve.hits(&sizes.map(|size| size as f64));
            mean.iter_mut().zip(found).for_each(|(mean, found)| *mean += found / samples as f64);
        }
        for (found, exact) in mean.into_iter().zip(exact) {
            assert!((found - exact).abs() < 0.02 * asked.len() as f64, "{found} for {exact}");
        }
    }

    #[test]
    fn the_ceiling_is_that_of_all_asks_however_many_blocks_there_are() {
        // Of more blocks than a curve knows, some far more often than others; then all of them in turn.
        for blocks in [50, 1_000, 40_000] {
            let mut curve = Curve::new(0, TOKENS_AN_ASK >> SHIFT);
            let mut seen = std::collections::HashSet::new();
            let number = |n: u64| mix(n) % blocks;
            let skewed = (1..=3 * blocks).map(|n| number(2 * n) * number(2 * n + 1) / blocks);
            for (asks, block) in skewed.chain(0..blocks).chain(0..blocks).enumerate() {
                // As a sample's tags are.
                curve.ask(mix(block + 1) << SHIFT);
                seen.insert(block);
                assert_eq!(curve.ceiling().is_some(), asks + 1 >= 100);
                if asks % 997 == 0 {
                    curve.age(0.5);
                }
            }
            let (found, exact) = (curve.ceiling().expect("enough"), 1.0 - seen.len() as f64 / (5 * blocks) as f64);
            assert!((found - exact).abs() < 0.01, "{found} for {exact}");
        }
    }

    #[test]
    fn the_ceiling_of_a_sample_is_near_that_of_the_whole() {
        let number = |n: u64| mix(n) % 4000;
        let asked: Vec<u64> = (1..=40_000).map(|n| number(2 * n) * number(2 * n + 1) / 4000).collect();
        let exact = 1.0 - asked.iter().collect::<std::collections::HashSet<_>>().len() as f64 / asked.len() as f64;
        let (samples, mut mean) = (32, 0.0);
        for sample in 0..samples {
            let mut curve = Curve::new(4000, TOKENS_AN_ASK >> SHIFT);
            let tags = asked.iter().map(|block| mix(mix(sample + 1) ^ block));
            tags.filter(|tag| tag & curve.sample() == 0).collect::<Vec<_>>().into_iter().for_each(|tag| curve.ask(tag));
            mean += curve.ceiling().expect("enough") / samples as f64;
        }
        assert!((mean - exact).abs() < 0.02, "{mean} for {exact}");
    }

    #[test]
    fn it_takes_less_than_a_mebibyte() {
        let mut curve = Curve::new(1 << 20, TOKENS_AN_ASK);
        (0..200_000).for_each(|n| curve.ask(mix(mix(n) % 20_000)));
        let bytes = curve.tags.capacity() * 8 + curve.taken.capacity() * 4 + curve.hits.capacity() * 4;
        let bytes = bytes + size_of_val(&*curve.distinct.registers);
        // A table of twelve bytes an entry, padded to sixteen, and one more, at most 7/8 full.
        assert!(bytes + curve.positions.capacity() * 8 / 7 * 17 < 1 << 20);
        assert_eq!(curve.tags.len(), 2 * MOST);
    }

    #[test]
    fn what_was_long_ago_counts_less_and_is_forgotten() {
        let mut curve = Curve::new(0, TOKENS_AN_ASK >> SHIFT);
        for _ in 0..2 {
            (0..10).for_each(|block| curve.ask(tag(block)));
        }
        curve.count(320);
        assert_eq!(curve.hits(&[0.0, 80.0, 160.0]), [0.0, 0.0, 160.0]);
        curve.age(0.5);
        assert_eq!((curve.asked(), curve.hits(&[1000.0])), (160.0, vec![80.0]));
        (0..4 * MOST as u64).for_each(|block| curve.ask(tag(100 + block)));
        assert!(curve.positions.len() <= 2 * MOST);
        curve.ask(tag(0));
        assert_eq!(curve.hits.iter().sum::<f32>(), 5.0, "its last use is forgotten");
    }
}
