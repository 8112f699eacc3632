//! The RAM tier's books: who holds which slot, and which blocks of a model may leave it.
//!
//! A model's evictable blocks stand in two lists: *clean* ones, whose bytes are on SSD too, and *dirty* ones, which
//! leaving would lose. Clean ones go first.

use crate::evict::Lru;
use crate::pool::{Pool, Slot};
use crate::trie::NodeId;
use std::collections::HashMap;

/// Evictable blocks of one model.
#[derive(Debug, Default)]
pub(crate) struct Evictable {
    clean: Lru,
    dirty: Lru,
}

impl Evictable {
    pub(crate) fn list(&mut self, clean: bool) -> &mut Lru {
        if clean { &mut self.clean } else { &mut self.dirty }
    }

    /// The block that leaves next.
    pub(crate) fn victim(&self, may_lose: bool, may_leave: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        let dirty = || if may_lose { self.dirty.coldest(&may_leave) } else { None };
        self.clean.coldest(&may_leave).or_else(dirty)
    }
}

/// Slots, their holders and the evictable blocks of every model.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) pool: Pool,
    holders: HashMap<Slot, NodeId>,
    evictable: HashMap<u32, Evictable>,
}

impl Ram {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { pool: Pool::new(capacity), holders: HashMap::new(), evictable: HashMap::new() }
    }

    pub(crate) fn evictable(&mut self, model: u32) -> &mut Evictable {
        self.evictable.entry(model).or_default()
    }

    /// A model is gone, and all of its blocks.
    pub(crate) fn forget(&mut self, model: u32) {
        self.evictable.remove(&model);
    }

    pub(crate) fn hold(&mut self, slot: Slot, node: NodeId) {
        self.holders.insert(slot, node);
    }

    pub(crate) fn let_go(&mut self, slot: Slot) {
        self.holders.remove(&slot);
    }

    /// The block in a slot; `None` while the slot is being filled and belongs to no block yet.
    pub(crate) fn holder(&self, slot: Slot) -> Option<NodeId> {
        self.holders.get(&slot).copied()
    }
}
