//! ARC: blocks that were used once, and blocks that were used again, each least recently used first; ghosts of both say
//! which of the two should have more room.

use super::list::Lists;
use super::{Ghosts, NodeId, Policy};

const RECENT: usize = 0;
const FREQUENT: usize = 1;

#[derive(Debug)]
pub(super) struct Arc {
    lists: Lists<2>,
    ghosts: [Ghosts; 2],
    /// How many blocks of the recent list are to stay.
    target: usize,
    capacity: usize,
}

impl Arc {
    pub(super) fn new(capacity: usize) -> Self {
        Self { lists: Lists::default(), ghosts: Default::default(), target: 0, capacity }
    }
}

impl Policy for Arc {
    fn insert(&mut self, node: NodeId, tag: u64, _: f32) {
        let [recent, frequent] = [0, 1].map(|list: usize| self.ghosts[list].len().max(1));
        if self.ghosts[RECENT].remove(tag) {
            self.target = (self.target + (frequent / recent).max(1)).min(self.capacity);
            self.lists.push(FREQUENT, node);
        } else if self.ghosts[FREQUENT].remove(tag) {
            self.target = self.target.saturating_sub((recent / frequent).max(1));
            self.lists.push(FREQUENT, node);
        } else {
            self.lists.push(RECENT, node);
        }
    }

    fn touch(&mut self, node: NodeId, _: u64) {
        self.lists.push(FREQUENT, node);
    }

    fn remove(&mut self, node: NodeId, tag: u64, evicted: bool) {
        if evicted && let Some(list) = self.lists.of(node) {
            let most = match list {
                RECENT => self.capacity.saturating_sub(self.lists.len(RECENT)),
                _ => (2 * self.capacity)
                    .saturating_sub(self.lists.len(RECENT) + self.lists.len(FREQUENT) + self.ghosts[RECENT].len()),
            };
            self.ghosts[list].insert(tag, most.max(1));
        }
        self.lists.remove(node);
    }

    fn victim(&mut self, leaf_of: &mut dyn FnMut(NodeId) -> Option<NodeId>) -> Option<NodeId> {
        let recent_first = self.lists.len(RECENT) > self.target.max(1);
        let order = if recent_first { [RECENT, FREQUENT] } else { [FREQUENT, RECENT] };
        order.into_iter().flat_map(|list| self.lists.iter(list)).find_map(leaf_of)
    }

    fn set_capacity(&mut self, blocks: usize) {
        self.capacity = blocks;
        self.target = self.target.min(blocks);
        self.ghosts.iter_mut().for_each(|ghosts| ghosts.trim(blocks));
    }

    fn coldest_first(&self) -> Vec<NodeId> {
        self.lists.iter(RECENT).chain(self.lists.iter(FREQUENT)).collect()
    }
}
