//! Order of eviction inside one tier and model: least recently used first, among the leaves.
//!
//! Only leaves are listed: blocks in the tier with no child in the tier. Whether one is leased is asked when it is to go. When the last child
//! leaves, its parent is listed with its own last use, so a cold chain leaves as a whole, tail first.

use std::collections::BTreeSet;

/// Leaves, coldest first.
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

    /// The coldest of those that may leave.
    pub(crate) fn coldest(&self, may_leave: impl Fn(u32) -> bool) -> Option<u32> {
        self.order.iter().map(|&(_, node)| node).find(|&node| may_leave(node))
    }
}
