//! Order of eviction inside one tier and model: least recently used first, among the leaves.
//!
//! Only blocks that may leave are listed: in the tier, not leased, and with no child in the tier. When the last child
//! leaves, its parent is listed with its own last use, so a cold chain leaves as a whole, tail first.

use std::collections::BTreeSet;

/// Blocks that may leave, coldest first.
#[derive(Debug, Default)]
pub(crate) struct Lru {
    order: BTreeSet<(u64, u32)>,
}

impl Lru {
    pub(crate) fn insert(&mut self, last_use: u64, node: u32) {
        self.order.insert((last_use, node));
    }

    pub(crate) fn remove(&mut self, last_use: u64, node: u32) {
        let listed = self.order.remove(&(last_use, node));
        debug_assert!(listed, "a block is removed under the use it was listed with");
    }

    pub(crate) fn coldest(&self) -> Option<u32> {
        self.order.first().map(|&(_, node)| node)
    }
}
