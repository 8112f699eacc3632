//! The RAM tier's books: who holds which slot, and the order in which a model's blocks leave.

use crate::evict::{Kind, Order};
use crate::pool::{Pool, SMALLEST_SLOT, Slot};
use crate::trie::NodeId;
use std::collections::BTreeMap;

/// How far a walk along a cold path came: from a block to one that continues it, and which life of that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    pub(crate) head: NodeId,
    pub(crate) at: NodeId,
    pub(crate) life: u16,
}

/// Slots, their holders and the order of eviction of every model.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) pool: Pool,
    /// The node in each slot, and one; by the slot's number.
    holders: Vec<NodeId>,
    orders: BTreeMap<u32, (Order, Option<Walk>)>,
    eviction: Kind,
}

impl Ram {
    pub(crate) fn new(capacity: usize, eviction: Kind) -> Self {
        let holders = vec![0; capacity.div_ceil(SMALLEST_SLOT)];
        Self { pool: Pool::new(capacity), holders, orders: BTreeMap::new(), eviction }
    }

    /// The order of eviction of a model.
    pub(crate) fn order(&mut self, model: u32) -> &mut Order {
        self.order_and_walk(model).0
    }

    /// The same, and how far along the path that leaves at present.
    pub(crate) fn order_and_walk(&mut self, model: u32) -> (&mut Order, &mut Option<Walk>) {
        let eviction = self.eviction;
        let (order, walk) = self.orders.entry(model).or_insert_with(|| (Order::new(eviction, 0), None));
        (order, walk)
    }

    /// Which policy runs for a model at present.
    pub(crate) fn running(&self, model: u32) -> Kind {
        self.orders.get(&model).map_or(self.eviction, |(order, _)| order.running())
    }

    /// A model is gone, and all of its blocks.
    pub(crate) fn forget(&mut self, model: u32) {
        self.orders.remove(&model);
    }

    pub(crate) fn hold(&mut self, slot: Slot, node: NodeId) {
        self.holders[slot.number()] = node + 1;
    }

    pub(crate) fn let_go(&mut self, slot: Slot) {
        self.holders[slot.number()] = 0;
    }

    /// The block in a slot; `None` while the slot is being filled and belongs to no block yet.
    pub(crate) fn holder(&self, slot: Slot) -> Option<NodeId> {
        self.holders[slot.number()].checked_sub(1)
    }
}
