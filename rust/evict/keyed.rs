//! The order of eviction for those who keep the bytes themselves: an engine's own blocks, known by its keys.
//!
//! Blocks that follow one another in a sequence are linked as the engine tells it, so that a sequence leaves from its end
//! here, too. The links are a forest at all times. What comes without the block that it continues is stranded: nobody finds
//! it, so it leaves first. An eviction is whole or not at all: whether enough blocks may leave is counted first, and then so
//! many do leave, whatever the links and the policy say.
//!
//! ```text
//! insert ─▶ held ◀─▶ free ─▶ evict      what is held, or protected by the call, stays
//!             └──────┴─────▶ remove     never evicted: the policy learns nothing from it
//! ```

use super::{Kind, NodeId, Order};
use crate::error::{Result, input};
use std::collections::{HashMap, HashSet};

const NONE: NodeId = NodeId::MAX;

/// A block's place in the forest: what it continues, and what continues it, as a list.
#[derive(Debug, Clone)]
struct Block {
    key: Box<[u8]>,
    held: bool,
    /// Whether what it continues is not here.
    stranded: bool,
    parent: NodeId,
    first_child: NodeId,
    before: NodeId,
    next: NodeId,
    /// The look in which its path was found to end at what may not leave.
    ends_held: u64,
}

/// Blocks of a cache that holds so many, in the order of a policy.
#[derive(Debug)]
pub struct Keyed {
    order: Order,
    capacity: usize,
    nodes: HashMap<Box<[u8]>, NodeId>,
    blocks: Vec<Block>,
    vacant: Vec<NodeId>,
    held: usize,
    /// Those that were stranded; some may be found again since, or gone.
    stranded: Vec<NodeId>,
    looks: u64,
}

/// How much an eviction respects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Care {
    /// Ends of sequences, but for what is spared.
    Spare,
    /// Ends of sequences.
    Ends,
    /// Anything that may leave.
    Any,
}

fn tag(key: &[u8]) -> u64 {
    let hash = blake3::hash(key);
    hash.as_bytes()[..8].iter().fold(0, |tag, &byte| tag << 8 | u64::from(byte))
}

impl Keyed {
    /// No blocks yet, of a cache that holds `capacity`.
    pub fn new(kind: Kind, capacity: usize) -> Self {
        Self {
            order: Order::new(kind, capacity),
            capacity,
            nodes: HashMap::new(),
            blocks: Vec::new(),
            vacant: Vec::new(),
            held: 0,
            stranded: Vec::new(),
            looks: 0,
        }
    }

    /// The policy that runs at present; another than the one that was asked for only for `adaptive`.
    pub fn running(&self) -> Kind {
        self.order.running()
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// A block came, which continues that of the key `after`; or begins a sequence, or nobody knows what it continues.
    ///
    /// # Errors
    /// It is there already.
    pub fn insert(&mut self, key: &[u8], after: Option<&[u8]>, held: bool) -> Result<()> {
        if self.nodes.contains_key(key) {
            return Err(input("a block is inserted that is there already"));
        }
        let [parent, first_child, before, next] = [NONE; 4];
        let block = Block { key: key.into(), held, stranded: false, parent, first_child, before, next, ends_held: 0 };
        let node = match self.vacant.pop() {
            Some(node) => {
                self.blocks[node as usize] = block;
                node
            }
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as NodeId
            }
        };
        self.nodes.insert(key.into(), node);
        self.held += usize::from(held);
        self.order.insert(node, tag(key), 1.0);
        match after.map(|key| self.nodes.get(key).copied()) {
            Some(Some(parent)) if parent != node => self.link(node, parent),
            Some(None) => self.strand(node),
            _ => {}
        }
        Ok(())
    }

    /// A block left without being evicted; whether it was there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        self.nodes.get(key).copied().inspect(|&node| self.leave(node, false)).is_some()
    }

    /// From now on a block may leave, or may not; whether it is there.
    pub fn hold(&mut self, key: &[u8], held: bool) -> bool {
        let Some(&node) = self.nodes.get(key) else { return false };
        let block = &mut self.blocks[node as usize];
        self.held = self.held + usize::from(held) - usize::from(block.held);
        block.held = held;
        true
    }

    /// A request asked for these blocks, which follow one another, there or not. Of those that are there, all but the
    /// `fresh` ones, which came for this request, were used.
    pub fn access<K: AsRef<[u8]>>(&mut self, path: &[K], fresh: &[K]) {
        let fresh = self.nodes_of(fresh);
        for key in path.iter().rev() {
            let key = key.as_ref();
            self.order.asked(tag(key));
            if let Some(&node) = self.nodes.get(key).filter(|node| !fresh.contains(node)) {
                self.order.touch(node);
            }
        }
        self.order.choose();
        self.follow(path);
    }

    /// These blocks follow one another, as far as they are there. What begins a tree is linked below another tree alone,
    /// so no links ever form a ring, whatever an engine tells.
    pub fn follow<K: AsRef<[u8]>>(&mut self, path: &[K]) {
        let (mut last, mut root) = (NONE, NONE);
        for key in path {
            let Some(&node) = self.nodes.get(key.as_ref()) else {
                (last, root) = (NONE, NONE);
                continue;
            };
            let parent = self.blocks[node as usize].parent;
            if parent == NONE && last != NONE && node != root {
                self.link(node, last);
            } else if parent == NONE || parent != last {
                root = self.root(node);
            }
            last = node;
        }
    }

    /// Takes out `count` blocks, none of the protected ones. What is `spared` leaves after all that is not in the way of
    /// a sequence's end. `None`: not so many may leave, and nothing has changed.
    pub fn evict<K: AsRef<[u8]>>(&mut self, count: usize, protected: &[K], spared: &[K]) -> Option<Vec<Box<[u8]>>> {
        let protected = self.nodes_of(protected);
        let free = |node: &&NodeId| !self.blocks[**node as usize].held;
        if count > self.nodes.len() - self.held - protected.iter().filter(free).count() {
            return None;
        }
        let spared = self.nodes_of(spared);
        let mut gone = Vec::with_capacity(count);
        self.evict_stranded(count, &protected, &mut gone);
        let mut care = Care::Spare;
        self.looks += 1;
        // Where the last walk from a block began and left off: a sequence that leaves from its end is walked once.
        let mut walk = (NONE, NONE);
        let mut rest = Vec::new().into_iter();
        while gone.len() < count {
            let Self { order, blocks, looks, .. } = self;
            let stays = |block: &Block, node: NodeId| {
                block.held || protected.contains(&node) || care == Care::Spare && spared.contains(&node)
            };
            let chosen = match care {
                Care::Any => rest.next(),
                _ => order.victim(|node| end_of(blocks, node, &mut walk, *looks, &stays), |_| true),
            };
            if let Some(node) = chosen {
                walk.1 = blocks[node as usize].parent;
                gone.push(blocks[node as usize].key.clone());
                self.leave(node, true);
                continue;
            }
            // A policy gives up after many blocks that may not leave, and what others continue may have to go.
            self.looks += 1;
            care = if care == Care::Spare { Care::Ends } else { Care::Any };
            if care == Care::Any {
                let left = |&node: &NodeId| !self.blocks[node as usize].held && !protected.contains(&node);
                let all = self.order.policy.coldest_first();
                rest = all.into_iter().filter(left).collect::<Vec<_>>().into_iter();
                // They were counted.
                debug_assert!(rest.len() >= count - gone.len());
            }
        }
        Some(gone)
    }

    // Of what is stranded the newest first: where a sequence is longer than the cache, its start stays.
    fn evict_stranded(&mut self, count: usize, protected: &HashSet<NodeId>, gone: &mut Vec<Box<[u8]>>) {
        let mut stay = Vec::new();
        while gone.len() < count
            && let Some(node) = self.stranded.pop()
        {
            if !self.blocks[node as usize].stranded {
                continue;
            }
            let child = |&at: &NodeId| Some(self.blocks[at as usize].first_child).filter(|&child| child != NONE);
            let end = std::iter::successors(Some(node), child).last().unwrap_or(node);
            if self.blocks[end as usize].held || protected.contains(&end) {
                stay.push(node);
                continue;
            }
            gone.push(self.blocks[end as usize].key.clone());
            self.leave(end, true);
            if end != node {
                self.stranded.push(node);
            }
        }
        self.stranded.extend(stay.into_iter().rev());
    }

    /// Forgets all blocks, and what was learnt from them.
    pub fn clear(&mut self) {
        *self = Self::new(self.order.kind(), self.capacity);
    }

    fn nodes_of<K: AsRef<[u8]>>(&self, keys: &[K]) -> HashSet<NodeId> {
        keys.iter().filter_map(|key| self.nodes.get(key.as_ref()).copied()).collect()
    }

    fn leave(&mut self, node: NodeId, evicted: bool) {
        self.order.remove(node, evicted);
        self.unlink(node);
        let mut child = self.blocks[node as usize].first_child;
        while child != NONE {
            let block = &mut self.blocks[child as usize];
            let next = std::mem::replace(&mut block.next, NONE);
            (block.parent, block.before) = (NONE, NONE);
            self.strand(child);
            child = next;
        }
        let block = &mut self.blocks[node as usize];
        block.stranded = false;
        self.held -= usize::from(block.held);
        self.nodes.remove(&std::mem::take(&mut block.key));
        self.vacant.push(node);
    }

    fn root(&self, node: NodeId) -> NodeId {
        let parent = |&node: &NodeId| Some(self.blocks[node as usize].parent).filter(|&parent| parent != NONE);
        std::iter::successors(Some(node), parent).last().unwrap_or(node)
    }

    fn strand(&mut self, node: NodeId) {
        self.blocks[node as usize].stranded = true;
        self.stranded.push(node);
    }

    fn link(&mut self, node: NodeId, parent: NodeId) {
        let next = std::mem::replace(&mut self.blocks[parent as usize].first_child, node);
        if next != NONE {
            self.blocks[next as usize].before = node;
        }
        let block = &mut self.blocks[node as usize];
        (block.parent, block.before, block.next, block.stranded) = (parent, NONE, next, false);
    }

    fn unlink(&mut self, node: NodeId) {
        let Block { parent, before, next, .. } = self.blocks[node as usize];
        if before != NONE {
            self.blocks[before as usize].next = next;
        } else if parent != NONE {
            self.blocks[parent as usize].first_child = next;
        }
        if next != NONE {
            self.blocks[next as usize].before = before;
        }
    }
}

/// The block that ends a path from `node` on, if it may leave. What was seen to end otherwise in this look is not walked
/// again.
fn end_of(
    blocks: &mut [Block],
    node: NodeId,
    walk: &mut (NodeId, NodeId),
    look: u64,
    stays: &impl Fn(&Block, NodeId) -> bool,
) -> Option<NodeId> {
    let start = if walk.0 == node && walk.1 != NONE { walk.1 } else { node };
    let mut at = start;
    while blocks[at as usize].first_child != NONE && blocks[at as usize].ends_held != look {
        at = blocks[at as usize].first_child;
    }
    if blocks[at as usize].ends_held != look && !stays(&blocks[at as usize], at) {
        *walk = (node, at);
        return Some(at);
    }
    let mut seen = node;
    while seen != NONE && blocks[seen as usize].ends_held != look {
        blocks[seen as usize].ends_held = look;
        seen = blocks[seen as usize].first_child;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const NOTHING: [Vec<u8>; 0] = [];

    fn key(n: u32) -> Vec<u8> {
        format!("block {n}").into_bytes()
    }

    fn keys(blocks: impl IntoIterator<Item = u32>) -> Vec<Vec<u8>> {
        blocks.into_iter().map(key).collect()
    }

    fn come(cache: &mut Keyed, block: u32, after: Option<u32>, held: bool) {
        assert!(cache.insert(&key(block), after.map(key).as_deref(), held).is_ok());
    }

    // What was evicted, as numbers; nothing where it could not be.
    fn evicted(cache: &mut Keyed, count: usize, protected: &[u32], spared: &[u32]) -> Vec<u32> {
        let gone = cache.evict(count, &keys(protected.iter().copied()), &keys(spared.iter().copied()));
        let number = |key: Box<[u8]>| (0..100).find(|&n| *key == *self::key(n)).unwrap_or(u32::MAX);
        gone.unwrap_or_default().into_iter().map(number).collect()
    }

    fn sorted(mut blocks: Vec<u32>) -> Vec<u32> {
        blocks.sort_unstable();
        blocks
    }

    // Links and nodes of what is there tell the same, and no ring is among them.
    fn assert_forest(cache: &Keyed) {
        assert_eq!(cache.nodes.len(), cache.order.len());
        assert_eq!(cache.held, cache.nodes.values().filter(|&&node| cache.blocks[node as usize].held).count());
        let mut children = 0;
        for &node in cache.nodes.values() {
            let up =
                std::iter::successors(Some(node), |&at| Some(cache.blocks[at as usize].parent).filter(|&p| p != NONE));
            assert!(up.take(cache.nodes.len() + 1).count() <= cache.nodes.len(), "a ring");
            let (mut child, mut before) = (cache.blocks[node as usize].first_child, NONE);
            while child != NONE {
                let block = &cache.blocks[child as usize];
                assert_eq!((block.parent, block.before), (node, before));
                (before, child, children) = (child, block.next, children + 1);
            }
        }
        let linked = cache.nodes.values().filter(|&&node| cache.blocks[node as usize].parent != NONE).count();
        assert_eq!(children, linked);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn an_eviction_takes_as_many_as_it_was_asked_for_and_none_that_stays_or_changes_nothing(
            which in 0..Kind::ALL.len(),
            steps in prop::collection::vec(
                (0u8..6, prop::collection::vec(0u32..40, 1..8), prop::collection::vec(0u32..40, 0..8), 0usize..12), 1..120,
            ),
        ) {
            let mut cache = Keyed::new(Kind::ALL[which], 24);
            // What is there, and whether it is held.
            let mut model: BTreeMap<u32, bool> = BTreeMap::new();
            for (action, path, others, count) in steps {
                match action {
                    0 | 1 => for (at, &n) in path.iter().enumerate() {
                        let after = at.checked_sub(1).map(|before| key(path[before]));
                        let came = cache.insert(&key(n), after.as_deref(), action == 1);
                        prop_assert_eq!(came.is_ok(), !model.contains_key(&n));
                        model.entry(n).or_insert(action == 1);
                    },
                    2 => cache.access(&keys(path), &keys(others)),
                    3 => for n in path {
                        prop_assert_eq!(cache.hold(&key(n), count % 2 == 0), model.contains_key(&n));
                        model.entry(n).and_modify(|held| *held = count % 2 == 0);
                    },
                    4 => for n in path {
                        prop_assert_eq!(cache.remove(&key(n)), model.remove(&n).is_some());
                    },
                    _ => {
                        let may: BTreeSet<u32> =
                            model.iter().filter(|&(n, &held)| !held && !others.contains(n)).map(|(&n, _)| n).collect();
                        let before = (cache.order.policy.coldest_first(), cache.len());
                        match cache.evict(count, &keys(others), &keys(path)) {
                            None => {
                                prop_assert!(may.len() < count);
                                prop_assert_eq!(before, (cache.order.policy.coldest_first(), cache.len()));
                            }
                            Some(gone) => {
                                let gone: BTreeSet<u32> = model.keys().copied().filter(|&n| gone.contains(&key(n).into())).collect();
                                prop_assert_eq!(gone.len(), count);
                                prop_assert!(gone.is_subset(&may));
                                model.retain(|n, _| !gone.contains(n));
                            }
                        }
                    }
                }
                prop_assert_eq!(cache.len(), model.len());
                assert_forest(&cache);
            }
            for held in [true, false] {
                let all: Vec<u32> = model.keys().copied().collect();
                all.iter().for_each(|&n| assert!(cache.hold(&key(n), held)));
                prop_assert_eq!(cache.evict(all.len(), &NOTHING, &NOTHING).is_some(), !held || all.is_empty());
            }
            prop_assert!(cache.is_empty());
        }
    }

    #[test]
    fn a_sequence_leaves_from_its_end_and_what_is_continued_now_leaves_last() {
        for kind in Kind::ALL {
            let mut cache = Keyed::new(kind, 20);
            // Head first, as an engine computes them.
            for n in 0..20 {
                come(&mut cache, n, (n % 10 > 0).then(|| n - 1), false);
            }
            assert_eq!(evicted(&mut cache, 4, &[], &[19]), [9, 8, 7, 6], "{kind:?}");
            // Six others may leave before it has to.
            assert_eq!(sorted(evicted(&mut cache, 6, &[], &[19])), [0, 1, 2, 3, 4, 5], "{kind:?}");
            assert_eq!(evicted(&mut cache, 3, &[], &[19]), [19, 18, 17], "{kind:?}");
        }
    }

    #[test]
    fn what_others_continue_leaves_if_nothing_else_may() {
        for kind in Kind::ALL {
            let mut cache = Keyed::new(kind, 4);
            for n in 0..4 {
                come(&mut cache, n, n.checked_sub(1), n == 3);
            }
            assert_eq!(cache.evict(4, &NOTHING, &NOTHING), None);
            assert_eq!(cache.evict(3, &keys([1]), &NOTHING), None);
            assert_eq!(sorted(evicted(&mut cache, 2, &[1], &[])), [0, 2], "{kind:?}");
        }
    }

    #[test]
    fn what_nobody_can_find_leaves_first_until_what_it_continues_is_back() {
        for kind in Kind::ALL {
            let mut cache = Keyed::new(kind, 8);
            come(&mut cache, 1, Some(0), false);
            come(&mut cache, 2, Some(1), false);
            come(&mut cache, 3, None, false);
            come(&mut cache, 5, Some(4), true);
            assert_eq!(evicted(&mut cache, 1, &[2], &[]), [3], "{kind:?}");
            assert_eq!(evicted(&mut cache, 1, &[], &[2]), [2], "{kind:?}");
            come(&mut cache, 3, None, false);
            come(&mut cache, 0, None, false);
            (0..2).for_each(|_| cache.access(&keys([0, 1]), &NOTHING));
            assert_eq!(evicted(&mut cache, 1, &[], &[]), [3], "{kind:?}");
            assert!(cache.hold(&key(5), false));
            assert_eq!(evicted(&mut cache, 1, &[], &[]), [5], "{kind:?}");
        }
    }

    #[test]
    fn links_that_an_engine_tells_in_rings_form_none() {
        let mut cache = Keyed::new(Kind::Lru, 4);
        (0..4).for_each(|n| come(&mut cache, n, None, false));
        for ring in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
            cache.access(&keys(ring), &NOTHING);
            assert_forest(&cache);
        }
        assert_eq!(evicted(&mut cache, 1, &[], &[]), [3]);
    }
}
