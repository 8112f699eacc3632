//! Greedy-Dual-Size-Frequency, and with equal costs an aged LFU: worth = age + uses × cost, the least leaves, and its
//! worth becomes the age. So a block that was used often long ago is overtaken by what is used now.
//!
//! A touch only notes the new worth. The order is mended when a block comes up for eviction.

use super::{NodeId, Policy};
use std::collections::BTreeSet;

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    uses: u32,
    cost: f32,
    /// Worth and, among equals, when it was last used.
    worth: (u64, u64),
    /// What it stands under in the order.
    listed: Option<(u64, u64)>,
}

#[derive(Debug)]
pub(super) struct Gdsf {
    with_cost: bool,
    age: u64,
    clock: u64,
    blocks: Vec<Block>,
    order: BTreeSet<((u64, u64), NodeId)>,
}

/// Worth is a fixed-point number with so many steps for one use at cost 1.
const STEPS: f32 = 1024.0;

impl Gdsf {
    pub(super) fn new(with_cost: bool) -> Self {
        Self { with_cost, age: 0, clock: 0, blocks: Vec::new(), order: BTreeSet::new() }
    }

    fn value(&mut self, node: NodeId) {
        self.clock += 1;
        let block = &mut self.blocks[node as usize];
        let cost = if self.with_cost { block.cost } else { 1.0 };
        block.worth = (self.age.saturating_add((block.uses as f32 * cost * STEPS) as u64), self.clock);
    }
}

impl Policy for Gdsf {
    fn insert(&mut self, node: NodeId, _: u64, cost: f32) {
        if self.blocks.len() <= node as usize {
            self.blocks.resize(node as usize + 1, Block::default());
        }
        self.blocks[node as usize] = Block { uses: 1, cost, ..Block::default() };
        self.value(node);
        let worth = self.blocks[node as usize].worth;
        self.blocks[node as usize].listed = Some(worth);
        self.order.insert((worth, node));
    }

    fn touch(&mut self, node: NodeId, _: u64) {
        self.blocks[node as usize].uses = self.blocks[node as usize].uses.saturating_add(1);
        self.value(node);
    }

    fn remove(&mut self, node: NodeId, _: u64, evicted: bool) {
        let block = &mut self.blocks[node as usize];
        if evicted {
            self.age = self.age.max(block.worth.0);
        }
        if let Some(listed) = block.listed.take() {
            self.order.remove(&(listed, node));
        }
    }

    fn victim(&mut self, leaf_of: &mut dyn FnMut(NodeId) -> Option<NodeId>) -> Option<NodeId> {
        let mut after = None;
        loop {
            let next = match after {
                None => self.order.first().copied(),
                Some(last) => {
                    self.order.range((std::ops::Bound::Excluded(last), std::ops::Bound::Unbounded)).next().copied()
                }
            };
            let (listed, node) = next?;
            let worth = self.blocks[node as usize].worth;
            if worth != listed {
                self.order.remove(&(listed, node));
                self.order.insert((worth, node));
                self.blocks[node as usize].listed = Some(worth);
            } else if let Some(leaf) = leaf_of(node) {
                return Some(leaf);
            } else {
                after = next;
            }
        }
    }

    fn set_capacity(&mut self, _: usize) {}

    fn coldest_first(&self) -> Vec<NodeId> {
        let mut blocks: Vec<_> = self.order.iter().map(|&(_, node)| (self.blocks[node as usize].worth, node)).collect();
        blocks.sort_unstable();
        blocks.into_iter().map(|(_, node)| node).collect()
    }
}
