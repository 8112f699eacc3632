//! The fixed table from block hashes to nodes: two choices of a bucket, eight entries in a bucket of one cache line.
//!
//! ```text
//! hash   | unused | tag | second bucket | first bucket |        32 bits each
//! entry  | tag | node + 1 |                                     0: empty
//! ```
//! An entry says that a node *may* have that hash: who leases the node compares. Entries come by compare-exchange and
//! go by a store of the one who retired the node; nothing moves, so a reader never misses an entry that stays.

use super::NodeId;
use super::words::Words;
use crate::block::BlockHash;
use crate::error::Result;
use crate::sync::Ordering;

/// Entries of a bucket.
const WIDTH: usize = 8;

#[derive(Debug)]
pub(super) struct Table {
    words: Words,
    buckets: usize,
}

/// An entry's place.
pub(super) type Place = u32;

impl Table {
    /// A table for so many nodes at 62 % load: there, both buckets of a hash are hardly ever full.
    pub(super) fn new(nodes: usize) -> Result<Self> {
        let buckets = (nodes * 100 / 62).div_ceil(WIDTH).max(1);
        Ok(Self { words: Words::new(buckets * WIDTH)?, buckets })
    }

    pub(super) fn bytes(&self) -> usize {
        self.buckets * WIDTH * 8
    }

    // Multiply-shift, so that the number of buckets need not be a power of two.
    fn buckets_of(&self, hash: BlockHash) -> [usize; 2] {
        let choose = |bits: u32| ((u64::from(bits) * self.buckets as u64) >> 32) as usize * WIDTH;
        [choose(hash.0 as u32), choose((hash.0 >> 32) as u32)]
    }

    fn tag(hash: BlockHash) -> u64 {
        (hash.0 >> 64) as u64 & 0xffff_ffff
    }

    /// Has the processor fetch both buckets, without waiting for them.
    pub(super) fn warm(&self, hash: BlockHash) -> u64 {
        let [first, second] = self.buckets_of(hash);
        self.words[first].load(Ordering::Relaxed) | self.words[second].load(Ordering::Relaxed)
    }

    /// Nodes that may have this hash, and where their entries are.
    pub(super) fn candidates(&self, hash: BlockHash) -> impl Iterator<Item = (NodeId, Place)> + '_ {
        let [first, second] = self.buckets_of(hash);
        let both = (first..first + WIDTH).chain(if first == second { 0..0 } else { second..second + WIDTH });
        both.filter_map(move |at| {
            // Acquire pairs with the Release of `add`, though the node's own word is what its reader relies on.
            let entry = self.words[at].load(Ordering::Acquire);
            (entry != 0 && entry >> 32 == Self::tag(hash)).then(|| (entry as u32 - 1, at as Place))
        })
    }

    /// Enters a node; `place` is told where before the entry can be seen. `None`: both buckets are full.
    pub(super) fn add(&self, hash: BlockHash, node: NodeId, place: impl Fn(Place)) -> Option<Place> {
        let entry = Self::tag(hash) << 32 | u64::from(node + 1);
        let empty = |start: usize| (start..start + WIDTH).filter(|&at| self.words[at].load(Ordering::Relaxed) == 0);
        loop {
            let [first, second] = self.buckets_of(hash);
            let emptier = if empty(first).count() >= empty(second).count() { first } else { second };
            let at = empty(emptier).next()?;
            place(at as Place);
            // Release: the node was written before.
            if self.words[at].compare_exchange(0, entry, Ordering::Release, Ordering::Relaxed).is_ok() {
                return Some(at as Place);
            }
        }
    }

    /// Removes an entry; its node's retirer does, once.
    pub(super) fn remove(&self, place: Place) {
        self.words[place as usize].store(0, Ordering::Release);
    }

    /// Entries of all nodes.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        (0..self.buckets * WIDTH).filter(|&at| self.words[at].load(Ordering::Relaxed) != 0).count()
    }
}
