//! S3-FIFO: new blocks are on trial in a small queue; what is used there moves to the main queue, what is not leaves a
//! ghost. A ghost that comes back goes to the main queue at once. Blocks of the main queue get another round for each use.

use super::list::Lists;
use super::{Ghosts, NodeId, Policy};

const SMALL: usize = 0;
const MAIN: usize = 1;

/// The small queue has this share of the tier, and so many ghosts are remembered for each ten blocks of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    small: usize,
    ghosts: usize,
}

impl Shape {
    pub(super) const AS_PUBLISHED: Self = Self { small: 10, ghosts: 9 };
    pub(super) const LONG: Self = Self { small: 30, ghosts: 36 };
}

#[derive(Debug)]
pub(super) struct S3Fifo {
    shape: Shape,
    queues: Lists<2>,
    uses: Vec<u8>,
    ghosts: Ghosts,
    capacity: usize,
}

impl S3Fifo {
    pub(super) fn new(capacity: usize, shape: Shape) -> Self {
        Self { shape, queues: Lists::default(), uses: Vec::new(), ghosts: Ghosts::default(), capacity }
    }

    fn ghosts_most(&self) -> usize {
        self.capacity * self.shape.ghosts / 10
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, node: NodeId, tag: u64, _: f32) {
        if self.uses.len() <= node as usize {
            self.uses.resize(node as usize + 1, 0);
        }
        self.uses[node as usize] = 0;
        let queue = if self.ghosts.remove(tag) { MAIN } else { SMALL };
        self.queues.push(queue, node);
    }

    fn touch(&mut self, node: NodeId, _: u64) {
        let uses = &mut self.uses[node as usize];
        *uses = (*uses + 1).min(3);
    }

    fn remove(&mut self, node: NodeId, tag: u64, evicted: bool) {
        if evicted && self.queues.of(node) == Some(SMALL) {
            self.ghosts.insert(tag, self.ghosts_most());
        }
        self.queues.remove(node);
    }

    fn victim(&mut self, leaf_of: &mut dyn FnMut(NodeId) -> Option<NodeId>) -> Option<NodeId> {
        // Uses are given up one by one, so this ends; who may not leave gets another round, but not for ever.
        let mut refused = 0;
        while refused < super::PATIENCE && self.queues.len(SMALL) + self.queues.len(MAIN) > 0 {
            let trial = self.queues.len(SMALL) * self.shape.small >= self.capacity && self.queues.len(SMALL) > refused;
            let queue = if trial || self.queues.len(MAIN) == 0 { SMALL } else { MAIN };
            let node = self.queues.coldest(queue)?;
            let uses = &mut self.uses[node as usize];
            match (queue, *uses) {
                (SMALL, 1..) => {
                    *uses = 0;
                    self.queues.push(MAIN, node);
                }
                (_, 1..) => {
                    *uses -= 1;
                    self.queues.push(MAIN, node);
                }
                _ => {
                    if let Some(leaf) = leaf_of(node) {
                        return Some(leaf);
                    }
                    self.queues.push(queue, node);
                    refused += 1;
                }
            }
        }
        self.queues.iter(SMALL).chain(self.queues.iter(MAIN)).find_map(leaf_of)
    }

    fn set_capacity(&mut self, blocks: usize) {
        self.capacity = blocks;
        self.ghosts.trim(self.ghosts_most());
    }

    fn coldest_first(&self) -> Vec<NodeId> {
        self.queues.iter(SMALL).chain(self.queues.iter(MAIN)).collect()
    }
}
