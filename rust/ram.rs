//! The RAM tier's books: who holds which slot, and the order in which a model's blocks leave.

use crate::evict::{Kind, Order, Retained};
use crate::pool::{Pool, SMALLEST_SLOT, Slot};
use crate::trie::NodeId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How far a walk along a cold path came: from a block to one that continues it, and which life of that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    pub(crate) head: NodeId,
    pub(crate) at: NodeId,
    pub(crate) life: u16,
}

/// In which order a model's blocks leave.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) order: Order,
    pub(crate) retained: Retained,
    /// Along the path that leaves at present.
    pub(crate) walk: Option<Walk>,
}

/// Slots, their holders and the order of eviction of every model.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) pool: Pool,
    /// The node in each slot, and one; by the slot's number.
    holders: Vec<NodeId>,
    /// Who took each slot; by the slot's number.
    owners: Vec<u32>,
    leaving: BTreeMap<u32, Leaving>,
    eviction: Kind,
    since: Instant,
}

impl Ram {
    pub(crate) fn new(capacity: usize, eviction: Kind) -> Self {
        let slots = capacity.div_ceil(SMALLEST_SLOT);
        let (holders, owners, leaving) = (vec![0; slots], vec![0; slots], BTreeMap::new());
        Self { pool: Pool::new(capacity), holders, owners, leaving, eviction, since: Instant::now() }
    }

    /// Time of the retention hints.
    pub(crate) fn now(&self) -> Duration {
        self.since.elapsed()
    }

    /// In which order a model's blocks leave.
    pub(crate) fn leaving(&mut self, model: u32) -> &mut Leaving {
        let eviction = self.eviction;
        self.leaving.entry(model).or_insert_with(|| Leaving {
            order: Order::new(eviction, 0),
            retained: Retained::default(),
            walk: None,
        })
    }

    /// Which policy runs for a model at present.
    pub(crate) fn running(&self, model: u32) -> Kind {
        self.leaving.get(&model).map_or(self.eviction, |leaving| leaving.order.running())
    }

    /// A model is gone, and all of its blocks.
    pub(crate) fn forget(&mut self, model: u32) {
        self.leaving.remove(&model);
    }

    /// Notes who took a slot.
    pub(crate) fn set_owner(&mut self, slot: Slot, owner: u32) {
        self.owners[slot.number()] = owner;
    }

    /// Who took a slot that is taken.
    pub(crate) fn owner(&self, slot: Slot) -> u32 {
        self.owners[slot.number()]
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
