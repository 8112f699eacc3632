//! What the tiers know of each block, under the store's lock.
//!
//! The index names blocks and counts who holds them; here stands where their bytes are. A block has a node while at least
//! one tier has it. Only who has the lock inserts and unlinks, so under it a node that is there stays there.
//!
//! What is unlinked while somebody holds it is found no more; its slot waits in limbo until the last lease went.

use super::gone::Gone;
use super::owners::{OwnerId, Owners};
use crate::block::BlockHash;
use crate::codec::Layout;
use crate::gpu::Placed;
use crate::pool::Slot;
use crate::ram::Walk;
use crate::ssd::Place;
use crate::stats::{Lifter, Miss, Tier};
use crate::sync::Arc;
pub(crate) use crate::trie::NodeId;
use crate::trie::{Inserted, Trie};
use std::collections::{HashMap, HashSet};

/// How many namespaces have a name, beside those that have blocks.
const NAMES: usize = 1 << 14;
/// How many blocks that continue the same one are looked through for one in RAM.
const SIBLINGS: usize = 64;

/// One cached block.
#[derive(Debug, Default)]
pub(crate) struct Node {
    pub(crate) owner: OwnerId,
    /// Its place among the owner's blocks, by tier.
    pub(super) nth: [u32; 2],
    pub(crate) last_use: u64,
    /// When it came and when it was used last, in seconds since 1970; and by how many matches.
    pub(super) since_s: u32,
    pub(super) used_s: u32,
    pub(super) uses: u32,
    /// When it came to each tier, and when a match found it last; of timed blocks alone, and 0 before the first.
    pub(super) came_s: [u32; 2],
    pub(super) matched_s: u32,
    /// Who had it brought to RAM ahead of a request, as long as none has asked for it.
    pub(super) lifted: Option<Lifter>,
    pub(crate) ram: Option<Slot>,
    /// How the payload in that slot is encoded; `None`: it is as it was put.
    pub(crate) layout: Option<Arc<Layout>>,
    pub(crate) ram_children: u32,
    /// Where a copy of it is on the GPU.
    pub(super) gpu: Option<Placed>,
    pub(crate) ssd: Option<Place>,
    pub(crate) ssd_reads: u32,
    /// Asked for, or put again, since its record on SSD was written.
    pub(crate) warm: bool,
    /// Waits to be written once more.
    pub(crate) again: bool,
    /// Stands in its model's queue of blocks to demote.
    pub(crate) queued: bool,
    first_child: Option<NodeId>,
    next: Option<NodeId>,
    previous: Option<NodeId>,
}

impl Node {
    /// Whether RAM may lose it: it is on SSD, or, where only what was asked for again is `selective`ly written, nobody
    /// asked for it again.
    pub(crate) fn is_clean(&self, selective: bool) -> bool {
        self.ssd.is_some() || selective && !self.queued
    }

    /// Counts how long ago a match found it before this; `matches`: so many did by now.
    pub(super) fn matched(&mut self, now_s: u32, matches: u32, owners: &mut Owners) {
        let tier = if self.ram.is_some() { Tier::Ram } else { Tier::Ssd };
        let gaps = &mut owners.counts(self.owner).tier(tier).reuse_gap;
        let before_s = std::mem::replace(&mut self.matched_s, now_s);
        if before_s > 0 {
            gaps.note(now_s.saturating_sub(before_s), 1);
        }
        // All but one of them follow another at once, as far as is known.
        gaps.note(0, u64::from(matches.saturating_sub(1)));
    }
}

/// Nodes of all models.
#[derive(Debug)]
pub(crate) struct Nodes {
    trie: Arc<Trie>,
    nodes: Vec<Option<Node>>,
    // Slots of unlinked blocks that are still held: the node, and the life of it that held them.
    limbo: Vec<(NodeId, u16, Slot)>,
    // The namespaces of blocks that continue no other, by their seeds; and of each the first of these blocks, which are
    // siblings.
    namespaces: HashMap<NodeId, BlockHash>,
    first: HashMap<BlockHash, NodeId>,
    /// Adapter and tenant of namespaces that were asked for, by their seeds.
    names: HashMap<BlockHash, Arc<(String, String)>>,
    gone: Arc<Gone>,
}

impl std::ops::Index<NodeId> for Nodes {
    type Output = Node;
    fn index(&self, id: NodeId) -> &Node {
        self.nodes[id as usize].as_ref().expect("a node is there as long as its block is linked")
    }
}

impl std::ops::IndexMut<NodeId> for Nodes {
    fn index_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id as usize].as_mut().expect("a node is there as long as its block is linked")
    }
}

impl Nodes {
    pub(crate) fn new(trie: Arc<Trie>, gone: Arc<Gone>) -> Self {
        Self {
            trie,
            nodes: Vec::new(),
            limbo: Vec::new(),
            namespaces: HashMap::new(),
            first: HashMap::new(),
            names: HashMap::new(),
            gone,
        }
    }

    pub(crate) fn find(&self, hash: BlockHash) -> Option<NodeId> {
        self.trie.find(hash)
    }

    /// Whether a node is still linked, of which the caller has a lease.
    pub(crate) fn is_linked(&self, id: NodeId) -> bool {
        self.trie.is_live(id)
    }

    /// Whether a node is the one that was linked when its generation was this.
    pub(crate) fn is_this_life(&self, id: NodeId, life: u16) -> bool {
        self.trie.generation(id) == life && self.trie.is_live(id)
    }

    pub(crate) fn hash(&self, id: NodeId) -> BlockHash {
        self.trie.hash(id)
    }

    pub(crate) fn model(&self, id: NodeId) -> u32 {
        self.trie.model(id)
    }

    pub(crate) fn depth(&self, id: NodeId) -> u32 {
        self.trie.depth(id)
    }

    pub(crate) fn parent(&self, id: NodeId) -> Option<NodeId> {
        self.trie.parent(id)
    }

    /// Whether somebody has a lease on this very block.
    pub(crate) fn is_leased(&self, id: NodeId) -> bool {
        self.trie.leases(id) > 0
    }

    /// Whether somebody has a lease on one of these blocks, or on one that continues it. Who writes a block holds it, and
    /// not those before it: `written` has one lease each that counts for itself alone.
    pub(crate) fn are_held(&self, ids: impl IntoIterator<Item = NodeId>, written: &[NodeId]) -> bool {
        // Most have no child: no memory is asked for before one does.
        let (mut seen, mut rest) = (HashSet::new(), Vec::new());
        for id in ids {
            if self.is_leased(id) {
                return true;
            }
            rest.extend(self.children(id));
        }
        while let Some(id) = rest.pop() {
            if !seen.insert(id) {
                continue;
            }
            if self.trie.leases(id) > u64::from(written.contains(&id)) {
                return true;
            }
            rest.extend(self.children(id));
        }
        false
    }

    /// A block and those before it, back to the first of the sequence.
    pub(crate) fn path(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::successors(Some(id), |&id| self.parent(id))
    }

    fn children(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::successors(self[id].first_child, |&child| self[child].next)
    }

    /// The block that ends a path from `id` on in RAM. `from` is where an earlier walk along it left off, and notes where
    /// this one ends, so that a long path that leaves from its end is walked once. `None`: the tier has none near.
    pub(crate) fn last_in_ram(&self, id: NodeId, from: &mut Option<Walk>) -> Option<NodeId> {
        let known = from.filter(|w| w.head == id && self.is_this_life(w.at, w.life) && self[w.at].ram.is_some());
        let mut at = known.map_or(id, |walk| walk.at);
        while self[at].ram_children > 0 {
            at = self.children(at).take(SIBLINGS).find(|&child| self[child].ram.is_some())?;
        }
        // It is about to leave: the next walk begins before it.
        *from = self.parent(at).filter(|_| at != id).map(|at| Walk { head: id, at, life: self.trie.generation(at) });
        Some(at)
    }

    /// A block that ends a path from `id` on, in any tier.
    pub(super) fn last(&self, id: NodeId) -> NodeId {
        std::iter::successors(Some(id), |&id| self[id].first_child).last().unwrap_or(id)
    }

    /// The hash that a block's continues: of the block before it, or the seed of its namespace.
    pub(crate) fn hash_before(&self, id: NodeId) -> BlockHash {
        self.parent(id).map_or_else(|| self.namespaces[&id], |parent| self.hash(parent))
    }

    /// Adds a block below its parent, or one that begins a sequence of the namespace of that seed. `None`: it is there
    /// already, or the index has no room.
    pub(crate) fn insert(
        &mut self,
        parent: Option<NodeId>,
        hash: BlockHash,
        (model, owner): (u32, OwnerId),
        seed: BlockHash,
    ) -> Option<NodeId> {
        let id = match self.trie.insert(parent, hash, model) {
            Inserted::New(id) => id,
            Inserted::Known(id) => {
                self.trie.release(id);
                return None;
            }
            Inserted::Full | Inserted::Orphan => return None,
        };
        // Under the lock it cannot be unlinked.
        self.trie.release(id);
        let next = match parent {
            Some(parent) => self[parent].first_child,
            None => {
                self.namespaces.insert(id, seed);
                self.first.insert(seed, id)
            }
        };
        if self.nodes.len() <= id as usize {
            self.nodes.resize_with(id as usize + 1, || None);
        }
        self.nodes[id as usize] = Some(Node { owner, next, ..Node::default() });
        if let Some(next) = next {
            self[next].previous = Some(id);
        }
        if let Some(parent) = parent {
            self[parent].first_child = Some(id);
        }
        Some(id)
    }

    /// A node and all below it, children before parents.
    pub(crate) fn subtree(&self, root: NodeId) -> Vec<NodeId> {
        let mut order = vec![root];
        let mut visited = 0;
        while visited < order.len() {
            let parent = order[visited];
            order.extend(self.children(parent));
            visited += 1;
        }
        order.reverse();
        order
    }

    /// Takes a childless block out of the index, and remembers why. Returns its slot, unless somebody holds the block.
    pub(crate) fn remove(&mut self, id: NodeId, why: Miss) -> Option<Slot> {
        let (hash, parent, life) = (self.hash(id), self.parent(id), self.trie.generation(id));
        let node = self.nodes[id as usize].take()?;
        debug_assert!(node.first_child.is_none(), "children leave before their parent");
        match (node.previous, parent) {
            (Some(previous), _) => self[previous].next = node.next,
            (None, Some(parent)) => self[parent].first_child = node.next,
            (None, None) => {
                let seed = self.namespaces[&id];
                match node.next {
                    Some(next) => self.first.insert(seed, next),
                    None => self.first.remove(&seed),
                };
            }
        }
        if parent.is_none() {
            self.namespaces.remove(&id);
        }
        if let Some(next) = node.next {
            self[next].previous = node.previous;
        }
        // Who does not find it any more finds this.
        self.gone.note(hash, why);
        let unlinked = self.trie.unlink(id, true);
        debug_assert!(unlinked, "only who has the lock gives a block children, or unlinks it");
        match node.ram {
            Some(slot) if self.trie.generation(id) == life => {
                self.limbo.push((id, life, slot));
                None
            }
            slot => slot,
        }
    }

    /// Slots in limbo that nobody holds any more.
    pub(crate) fn freed(&mut self) -> Vec<Slot> {
        let trie = &self.trie;
        self.limbo.extract_if(.., |&mut (id, life, _)| trie.generation(id) != life).map(|(_, _, slot)| slot).collect()
    }

    /// Takes leases on linked nodes; returns the leading ones that could be leased.
    pub(crate) fn lease<'a>(&self, path: &'a [NodeId]) -> &'a [NodeId] {
        let leased = path.iter().take_while(|&&id| self.trie.lease(id)).count();
        &path[..leased]
    }

    pub(crate) fn release(&self, path: &[NodeId]) {
        path.iter().for_each(|&id| self.trie.release(id));
    }

    /// The blocks of a namespace that continue no other.
    pub(crate) fn first_of(&self, seed: BlockHash) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::successors(self.first.get(&seed).copied(), |&id| self[id].next)
    }

    /// Notes what the namespace of a seed is called.
    pub(super) fn name(&mut self, seed: BlockHash, adapter: &str, tenant: &str) {
        if self.names.len() >= NAMES {
            self.names.retain(|seed, _| self.first.contains_key(seed));
        }
        self.names.insert(seed, Arc::new((adapter.to_owned(), tenant.to_owned())));
    }

    /// Adapter and tenant of a namespace, if somebody asked for it.
    pub(super) fn name_of(&self, seed: BlockHash) -> Option<&(String, String)> {
        self.names.get(&seed).map(|names| &**names)
    }

    /// Blocks that no other continues, from that number on, as far as so many numbers go; and where to go on.
    pub(super) fn ends(&self, from: u32, most: usize) -> (Vec<NodeId>, Option<u32>) {
        let to = self.nodes.len().min(from as usize + most);
        let is_end = |id: &u32| self.nodes[*id as usize].as_ref().is_some_and(|node| node.first_child.is_none());
        let ends = (from..to as u32).filter(is_end).collect();
        (ends, (to < self.nodes.len()).then_some(to as u32))
    }

    /// The seeds of a model's namespaces.
    pub(crate) fn seeds_of(&self, model: u32) -> Vec<BlockHash> {
        self.first.iter().filter(|&(_, &id)| self.model(id) == model).map(|(&seed, _)| seed).collect()
    }
}
