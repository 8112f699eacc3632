//! Least recently used.

use super::list::Lists;
use super::{NodeId, Policy};

#[derive(Debug, Default)]
pub(super) struct Lru {
    list: Lists<1>,
}

impl Policy for Lru {
    fn insert(&mut self, node: NodeId, _: u64, _: f32) {
        self.list.push(0, node);
    }

    fn touch(&mut self, node: NodeId, _: u64) {
        self.list.push(0, node);
    }

    fn remove(&mut self, node: NodeId, _: u64, _: bool) {
        self.list.remove(node);
    }

    fn victim(&mut self, leaf_of: &mut dyn FnMut(NodeId) -> Option<NodeId>) -> Option<NodeId> {
        self.list.iter(0).find_map(leaf_of)
    }

    fn set_capacity(&mut self, _: usize) {}

    fn coldest_first(&self) -> Vec<NodeId> {
        self.list.iter(0).collect()
    }
}
