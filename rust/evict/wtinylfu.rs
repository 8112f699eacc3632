//! W-TinyLFU: new blocks pass a small window; behind it, a block is admitted only against one that was asked for less
//! often. Counts are a count-min sketch of four bits (Cormode & Muthukrishnan, 2005), halved now and then. Admitted blocks
//! are on probation until they are used, then protected.

use super::list::Lists;
use super::{NodeId, Policy};

const WINDOW: usize = 0;
const PROBATION: usize = 1;
const PROTECTED: usize = 2;

#[derive(Debug)]
struct Sketch {
    counts: Vec<u8>,
    added: usize,
    limit: usize,
}

impl Sketch {
    fn new(capacity: usize) -> Self {
        // Four rows of a power of two, so that a place is a mask away.
        let width = capacity.max(16).next_power_of_two() * 2;
        Self { counts: vec![0; 4 * width], added: 0, limit: 10 * capacity.max(16) }
    }

    fn places(&self, tag: u64) -> [usize; 4] {
        let width = self.counts.len() / 4;
        [0, 1, 2, 3].map(|row| {
            let hash = (tag ^ row as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17 * row as u32 + 20);
            row * width + (hash as usize & (width - 1))
        })
    }

    fn add(&mut self, tag: u64) {
        for place in self.places(tag) {
            self.counts[place] = (self.counts[place] + 1).min(15);
        }
        self.added += 1;
        if self.added >= self.limit {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.added /= 2;
        }
    }

    fn count(&self, tag: u64) -> u8 {
        self.places(tag).map(|place| self.counts[place]).into_iter().min().unwrap_or(0)
    }
}

#[derive(Debug)]
pub(super) struct WTinyLfu {
    lists: Lists<3>,
    tags: Vec<u64>,
    sketch: Sketch,
    capacity: usize,
}

impl WTinyLfu {
    pub(super) fn new(capacity: usize) -> Self {
        Self { lists: Lists::default(), tags: Vec::new(), sketch: Sketch::new(capacity), capacity }
    }

    fn window_most(&self) -> usize {
        (self.capacity / 100).max(1)
    }
}

impl Policy for WTinyLfu {
    fn insert(&mut self, node: NodeId, tag: u64, _: f32) {
        if self.tags.len() <= node as usize {
            self.tags.resize(node as usize + 1, 0);
        }
        self.tags[node as usize] = tag;
        self.sketch.add(tag);
        self.lists.push(WINDOW, node);
        // Behind the window there is room for all, until there is none.
        let admitted = self.lists.len(PROBATION) + self.lists.len(PROTECTED);
        if self.lists.len(WINDOW) > self.window_most()
            && admitted + self.window_most() < self.capacity
            && let Some(oldest) = self.lists.coldest(WINDOW)
        {
            self.lists.push(PROBATION, oldest);
        }
    }

    fn touch(&mut self, node: NodeId, tag: u64) {
        self.sketch.add(tag);
        match self.lists.of(node) {
            Some(WINDOW) => self.lists.push(WINDOW, node),
            _ => {
                self.lists.push(PROTECTED, node);
                if self.lists.len(PROTECTED) * 5 > self.capacity * 4
                    && let Some(coldest) = self.lists.coldest(PROTECTED)
                {
                    self.lists.push(PROBATION, coldest);
                }
            }
        }
    }

    fn remove(&mut self, node: NodeId, _: u64, _: bool) {
        self.lists.remove(node);
    }

    fn victim(&mut self, leaf_of: &mut dyn FnMut(NodeId) -> Option<NodeId>) -> Option<NodeId> {
        // One that may not leave is in the way of those behind it: it gets another round.
        let mut guest = None;
        for list in [PROBATION, PROTECTED] {
            for _ in 0..self.lists.len(list).min(super::PATIENCE) {
                let Some(node) = self.lists.coldest(list).filter(|_| guest.is_none()) else { break };
                guest = leaf_of(node);
                if guest.is_none() {
                    self.lists.push(list, node);
                }
            }
        }
        // Candidates beyond the window: in, against the one that would have to go, or out.
        let beyond = self.lists.len(WINDOW).saturating_sub(self.window_most());
        let candidate = self.lists.iter(WINDOW).take(beyond).find_map(&mut *leaf_of);
        match (candidate, guest) {
            (Some(candidate), Some(guest)) => {
                let count = |node: NodeId| self.sketch.count(self.tags[node as usize]);
                if count(candidate) > count(guest) {
                    self.lists.push(PROBATION, candidate);
                    return Some(guest);
                }
                Some(candidate)
            }
            (only, None) | (None, only) => {
                let mut all = [WINDOW, PROBATION, PROTECTED].into_iter().flat_map(|list| self.lists.iter(list));
                only.or_else(|| all.find_map(leaf_of))
            }
        }
    }

    fn set_capacity(&mut self, blocks: usize) {
        self.capacity = blocks;
        self.sketch = Sketch::new(blocks);
    }

    fn coldest_first(&self) -> Vec<NodeId> {
        [WINDOW, PROBATION, PROTECTED].into_iter().flat_map(|list| self.lists.iter(list)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_never_too_low_and_old_ones_fade() {
        let mut sketch = Sketch::new(100);
        let tag = |n: u64| n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for n in 0..20 {
            (0..n).for_each(|_| sketch.add(tag(n)));
        }
        assert!((0..20).all(|n| u64::from(sketch.count(tag(n))) >= n.min(15)));
        (0..5000).for_each(|n| sketch.add(tag(1000 + n % 50)));
        assert!(sketch.count(tag(19)) <= 2, "{}", sketch.count(tag(19)));
    }
}
