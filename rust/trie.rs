//! The prefix index. A node outlives its children: only leaves and whole subtrees leave, so a match is always a whole
//! prefix.
//!
//! A node is one block, found by its hash. It exists while at least one tier has its bytes, or while it is leased:
//!
//! ```text
//!            insert                 unlink                    last lease released
//!  (absent) ────────▶ findable ───────────────▶ doomed, leased ─────────────▶ (absent)
//!                        │         unlink, no lease                              ▲
//!                        └───────────────────────────────────────────────────────┘
//! ```
//! A lease holds every node of its path.

use crate::block::BlockHash;
use crate::pool::Slot;
use crate::ssd::Place;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// Index of a node; reused after the node is gone.
pub(crate) type NodeId = u32;

/// How many evictions are remembered, to tell `evicted` from `never_stored`.
const GHOSTS: usize = 1 << 16;

/// One cached block.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) hash: BlockHash,
    pub(crate) model: u32,
    pub(crate) depth: u32,
    pub(crate) parent: Option<NodeId>,
    pub(crate) refs: u32,
    pub(crate) last_use: u64,
    pub(crate) ram: Option<Slot>,
    pub(crate) ram_children: u32,
    pub(crate) ssd: Option<Place>,
    pub(crate) ssd_reads: u32,
    /// Stands in its model's queue of blocks to demote.
    pub(crate) queued: bool,
    /// Under which use, and in which list, the RAM tier has it as evictable.
    pub(crate) listed: Option<(bool, u64)>,
    /// No longer findable; goes with its last lease.
    pub(crate) doomed: bool,
    first_child: Option<NodeId>,
    next: Option<NodeId>,
    previous: Option<NodeId>,
}

// Hashes are uniform already; hashing them again would only cost time.
#[derive(Default)]
struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 ^= u64::from_le_bytes(word);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 ^= value;
    }
    fn write_u128(&mut self, value: u128) {
        self.0 ^= value as u64 ^ (value >> 64) as u64;
    }
}

type UniformMap<K, V> = HashMap<K, V, BuildHasherDefault<Uniform>>;

/// Blocks of all models, by hash.
#[derive(Default)]
pub(crate) struct Trie {
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    by_hash: UniformMap<BlockHash, NodeId>,
    ghosts: Ghosts,
}

impl std::fmt::Debug for Trie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trie").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl std::ops::Index<NodeId> for Trie {
    type Output = Node;
    fn index(&self, id: NodeId) -> &Node {
        self.nodes[id as usize].as_ref().expect("a node id is only kept while its node lives")
    }
}

impl std::ops::IndexMut<NodeId> for Trie {
    fn index_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id as usize].as_mut().expect("a node id is only kept while its node lives")
    }
}

impl Trie {
    /// Findable blocks.
    pub(crate) fn len(&self) -> usize {
        self.by_hash.len()
    }

    pub(crate) fn find(&self, hash: BlockHash) -> Option<NodeId> {
        self.by_hash.get(&hash).copied()
    }

    /// The longest leading run of `hashes` that is cached.
    pub(crate) fn longest_prefix(&self, hashes: &[BlockHash]) -> Vec<NodeId> {
        hashes.iter().map_while(|&hash| self.find(hash)).collect()
    }

    /// Adds a block under its parent. The hash must be absent.
    pub(crate) fn insert(&mut self, parent: Option<NodeId>, hash: BlockHash, model: u32) -> NodeId {
        let next = parent.and_then(|p| self[p].first_child);
        let node = Node {
            hash,
            model,
            depth: parent.map_or(0, |p| self[p].depth + 1),
            parent,
            refs: 0,
            last_use: 0,
            ram: None,
            ram_children: 0,
            ssd: None,
            ssd_reads: 0,
            queued: false,
            listed: None,
            doomed: false,
            first_child: None,
            next,
            previous: None,
        };
        let id = self.vacant.pop().unwrap_or(self.nodes.len() as NodeId);
        if id as usize == self.nodes.len() {
            self.nodes.push(Some(node));
        } else {
            self.nodes[id as usize] = Some(node);
        }
        if let Some(next) = next {
            self[next].previous = Some(id);
        }
        if let Some(parent) = parent {
            self[parent].first_child = Some(id);
        }
        let before = self.by_hash.insert(hash, id);
        debug_assert!(before.is_none(), "a hash is inserted once");
        id
    }

    /// A node and all below it, children before parents.
    pub(crate) fn subtree(&self, root: NodeId) -> Vec<NodeId> {
        let mut order = vec![root];
        let mut visited = 0;
        while visited < order.len() {
            let mut child = self[order[visited]].first_child;
            while let Some(id) = child {
                order.push(id);
                child = self[id].next;
            }
            visited += 1;
        }
        order.reverse();
        order
    }

    /// Makes a childless node unfindable and cuts it from its parent.
    pub(crate) fn unlink(&mut self, id: NodeId) {
        let (hash, parent, next, previous) = {
            let node = &mut self[id];
            debug_assert!(node.first_child.is_none(), "children leave before their parent");
            node.doomed = true;
            (node.hash, node.parent.take(), node.next.take(), node.previous.take())
        };
        self.by_hash.remove(&hash);
        if let Some(next) = next {
            self[next].previous = previous;
        }
        match (previous, parent) {
            (Some(previous), _) => self[previous].next = next,
            (None, Some(parent)) => self[parent].first_child = next,
            (None, None) => {}
        }
    }

    /// Forgets an unlinked node.
    pub(crate) fn remove(&mut self, id: NodeId) {
        let gone = self.nodes[id as usize].take();
        debug_assert!(gone.is_some_and(|n| n.doomed && n.refs == 0));
        self.vacant.push(id);
    }

    pub(crate) fn remember_eviction(&mut self, hash: BlockHash) {
        self.ghosts.insert(hash.0 as u64);
    }

    pub(crate) fn was_evicted(&self, hash: BlockHash) -> bool {
        self.ghosts.counts.contains_key(&(hash.0 as u64))
    }

    /// All findable blocks of a model.
    pub(crate) fn of_model(&self, model: u32) -> Vec<BlockHash> {
        self.by_hash.iter().filter(|&(_, &id)| self[id].model == model).map(|(&hash, _)| hash).collect()
    }
}

// The last evictions, in a ring; a tag may be in it more than once.
#[derive(Default)]
struct Ghosts {
    ring: VecDeque<u64>,
    counts: UniformMap<u64, u32>,
}

impl Ghosts {
    fn insert(&mut self, tag: u64) {
        if self.ring.len() == GHOSTS
            && let Some(oldest) = self.ring.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
        self.ring.push_back(tag);
        *self.counts.entry(tag).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    // Model: the set of prefixes over a three-letter alphabet. The hash of a prefix is the prefix, written base 4.
    fn hash(prefix: &[u8]) -> BlockHash {
        BlockHash(prefix.iter().fold(1, |acc, &c| acc << 2 | u128::from(c)))
    }

    proptest! {
        #[test]
        fn the_index_equals_a_set_of_prefixes(
            steps in prop::collection::vec((0u8..3, prop::collection::vec(0u8..3, 1..7)), 1..200),
        ) {
            let mut trie = Trie::default();
            let mut model: BTreeSet<Vec<u8>> = BTreeSet::new();
            for (action, sequence) in steps {
                let hashes: Vec<_> = (1..=sequence.len()).map(|n| hash(&sequence[..n])).collect();
                let known = (1..=sequence.len()).take_while(|&n| model.contains(&sequence[..n])).count();
                let path = trie.longest_prefix(&hashes);
                prop_assert_eq!(path.len(), known);
                for (n, &id) in path.iter().enumerate() {
                    prop_assert_eq!(trie[id].depth as usize, n);
                    prop_assert_eq!(trie[id].parent, n.checked_sub(1).map(|p| path[p]));
                }
                if action < 2 {
                    let mut parent = path.last().copied();
                    for n in known..sequence.len() {
                        parent = Some(trie.insert(parent, hashes[n], 0));
                        model.insert(sequence[..=n].to_vec());
                    }
                } else if let Some(&last) = path.last() {
                    let gone = trie.subtree(last);
                    let below = model.iter().filter(|p| p.starts_with(&sequence[..known])).count();
                    prop_assert_eq!(gone.len(), below);
                    for id in gone {
                        trie.unlink(id);
                        trie.remove(id);
                    }
                    model.retain(|p| !p.starts_with(&sequence[..known]));
                }
                prop_assert_eq!(trie.len(), model.len());
            }
        }
    }

    #[test]
    fn an_eviction_is_remembered_until_enough_others_followed() {
        let mut trie = Trie::default();
        trie.remember_eviction(BlockHash(7));
        assert!(trie.was_evicted(BlockHash(7)));
        for i in 0..GHOSTS as u128 {
            trie.remember_eviction(BlockHash(100 + i));
        }
        assert!(!trie.was_evicted(BlockHash(7)));
    }
}
