//! The prefix index: which blocks are cached, found without a lock.
//!
//! A node is one block, named by the hash of its whole prefix. Every hash of a request is known before it asks, so the
//! longest cached prefix is searched for by depth, not walked: the set of nodes is prefix-closed at every instant,
//! because a child's entry leaves the table before its parent may, and a parent is there before its child.
//!
//! ```text
//! hashes of a request   h0 h1 h2 h3 h4 h5 h6 h7 ...
//! in the table           x  x  x  x  x  .  .  .          8-ary search, then a lease on the deepest
//! ```
//! A lease on a node holds its ancestors too: they have a child. Matching and leasing are wait-free, inserting and
//! unlinking lock-free. Nodes lie in a slab that is never unmapped and always of one type, so a reader that comes late
//! finds some node there, and its phase and hash tell whether it is the one. See `word` for the life of a node.
//!
//! Two threads that insert one hash at once may both stay; either answers rightly, and the one that is not used is
//! evicted like any other. Memory is fixed at the start: a full table or slab refuses, and counts.
//!
//! The scheme is that of a chained-hash prefix cache (vLLM's automatic prefix caching) over a two-choice table
//! (Azar et al., "Balanced Allocations", 1994) with reference counts in type-stable memory (Greenwald & Cheriton, 1996).

mod planted;
mod table;
mod word;
mod words;

#[cfg(test)]
mod proofs;

use crate::block::BlockHash;
use crate::error::Result;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};
use planted::{Bug, planted};
use table::Table;
use word::{Asked, Word};
use words::Words;

/// Index of a node; reused after the node is gone.
pub type NodeId = u32;

// Words of a node: one cache line.
const NODE: usize = 8;
const STATE: usize = 0;
const HASH: [usize; 2] = [1, 2];
/// Parent + 1 in the low half, depth in the high.
const PARENT: usize = 3;
/// Place of the table's entry in the low half; in a free node, the next free one + 1 in the high.
const PLACE: usize = 4;
/// Whose block it is.
const MODEL: usize = 5;

/// Probes of one round of the search: their cache misses overlap.
const PROBES: usize = 7;

/// More than 2^20 leases on one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyLeases;

/// What became of an insertion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// A new node, leased.
    New(NodeId),
    /// There is one already, now leased.
    Known(NodeId),
    /// The table, the slab or the parent has no room.
    Full,
    /// The parent was unlinked.
    Orphan,
}

/// The index; see the page above.
#[derive(Debug)]
pub struct Trie {
    table: Table,
    nodes: Words,
    capacity: usize,
    /// The free list: a count against reuse in the high half, the first free node + 1 in the low.
    free: AtomicU64,
    /// Nodes from here on were never used.
    fresh: AtomicUsize,
    live: AtomicUsize,
    refused: AtomicU64,
}

impl Trie {
    /// An index of at most so many blocks.
    pub fn new(capacity: usize) -> Result<Self> {
        let capacity = capacity.clamp(1, u32::MAX as usize / 2);
        Ok(Self {
            table: Table::new(capacity)?,
            nodes: Words::new(capacity * NODE)?,
            capacity,
            free: AtomicU64::new(0),
            fresh: AtomicUsize::new(0),
            live: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// Blocks that so many bytes of memory have room for.
    pub(crate) fn blocks_in(bytes: u64) -> u64 {
        bytes * 62 / (NODE as u64 * 8 * 62 + 800)
    }

    /// Blocks in the index.
    pub fn len(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that it takes when full.
    pub fn bytes(&self) -> usize {
        self.table.bytes() + self.capacity * NODE * 8
    }

    /// Insertions refused for want of room.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn field(&self, id: NodeId, field: usize) -> &AtomicU64 {
        &self.nodes[id as usize * NODE + field]
    }

    fn word(&self, id: NodeId) -> Word<'_> {
        Word(self.field(id, STATE))
    }

    /// The longest leading run of `hashes` that is cached: its deepest node, leased, and its length.
    ///
    /// # Errors
    /// That node has too many leases.
    pub fn longest_prefix(&self, hashes: &[BlockHash]) -> std::result::Result<Option<(NodeId, usize)>, TooManyLeases> {
        let mut length = self.search(hashes);
        // What the search saw may have left since.
        let mut found = None;
        while length > 0 && found.is_none() {
            found = self.lease_hash(hashes[length - 1])?;
            length -= usize::from(found.is_none());
        }
        // And more may have come: the first absence after this lease is the answer.
        while let Some(&hash) = hashes.get(length)
            && let Some(deeper) =
                self.lease_hash(hash).inspect_err(|_| found.into_iter().for_each(|id| self.release(id)))?
        {
            found.replace(deeper).into_iter().for_each(|id| self.release(id));
            length += 1;
        }
        Ok(found.map(|id| (id, length)))
    }

    // How many leading hashes are in the table, by their tags alone.
    fn search(&self, hashes: &[BlockHash]) -> usize {
        let present = |at: usize| self.table.candidates(hashes[at]).next().is_some();
        let Some(last) = hashes.len().checked_sub(1) else { return 0 };
        // Most requests have all or nothing.
        self.warm(hashes, [0, last]);
        if present(last) {
            return last + 1;
        }
        if !present(0) {
            return 0;
        }
        // Present at `low`, absent at `high`.
        let (mut low, mut high) = (0, last);
        while high - low > 1 {
            let (from, step) = (low, (high - low).div_ceil(PROBES + 1));
            let (end, probe) = (high, |n| from + n * step);
            let probes = (1..=PROBES).map(probe).take_while(move |&at| at < end);
            self.warm(hashes, probes.clone());
            for at in probes {
                if !present(at) {
                    high = at;
                    break;
                }
                low = at;
            }
        }
        low + 1
    }

    fn warm(&self, hashes: &[BlockHash], at: impl IntoIterator<Item = usize>) {
        // Loads without a consumer in between run side by side.
        std::hint::black_box(at.into_iter().fold(0, |seen, at| seen | self.table.warm(hashes[at])));
    }

    // Leases the live node of a hash.
    fn lease_hash(&self, hash: BlockHash) -> std::result::Result<Option<NodeId>, TooManyLeases> {
        for (id, _) in self.table.candidates(hash) {
            match self.word(id).lease() {
                Asked::Leased if self.hash(id) == hash || planted(Bug::NoKeyCheck) => return Ok(Some(id)),
                Asked::Leased => self.release(id),
                Asked::NotLive(last) => {
                    if last {
                        self.reclaim(id);
                    }
                }
                Asked::TooMany => return Err(TooManyLeases),
            }
        }
        Ok(None)
    }

    /// Leases a node once more; the caller has a lease on it, or the lock under which nodes are unlinked. `false`: it
    /// was unlinked, or has too many leases.
    #[must_use]
    pub fn lease(&self, id: NodeId) -> bool {
        match self.word(id).lease() {
            Asked::Leased => true,
            Asked::NotLive(last) => {
                if last {
                    self.reclaim(id);
                }
                false
            }
            Asked::TooMany => false,
        }
    }

    /// Gives a lease back. The last one on an unlinked node frees it.
    pub fn release(&self, id: NodeId) {
        if self.word(id).release() {
            self.reclaim(id);
        }
    }

    /// Adds a block below its parent, on which the caller has a lease (none: the first block of a sequence).
    pub fn insert(&self, parent: Option<NodeId>, hash: BlockHash, model: u32) -> Inserted {
        match self.lease_hash(hash) {
            Ok(Some(id)) => return Inserted::Known(id),
            Ok(None) => {}
            Err(TooManyLeases) => return self.refuse(),
        }
        if let Some(parent) = parent
            && !self.word(parent).add_child()
        {
            return if self.word(parent).is_live() { self.refuse() } else { Inserted::Orphan };
        }
        let depth = parent.map_or(0, |p| self.depth(p) + 1);
        let placed = self.take_free().and_then(|id| {
            // Relaxed: `go_live` publishes them.
            let set = |field: usize, value: u64| self.field(id, field).store(value, Ordering::Relaxed);
            set(HASH[0], hash.0 as u64);
            set(HASH[1], (hash.0 >> 64) as u64);
            set(PARENT, u64::from(depth) << 32 | parent.map_or(0, |p| u64::from(p) + 1));
            set(MODEL, u64::from(model));
            // The node is live before its entry can be seen: what readers find there, they may lease.
            self.word(id).go_live();
            let place = |place: u32| set(PLACE, u64::from(place));
            let entered = self.table.add(hash, id, place);
            if entered.is_none() {
                // Nobody knows of it.
                let retired = self.word(id).retire(true);
                debug_assert!(retired);
                self.release(id);
                self.release(id);
            }
            Some((id, entered?))
        });
        let Some((id, place)) = placed else {
            if let Some(parent) = parent {
                self.word(parent).remove_child();
            }
            return self.refuse();
        };
        // Relaxed: a count for people.
        self.live.fetch_add(1, Ordering::Relaxed);
        match self.twin(hash, place) {
            Some(twin) => self.give_in(id, twin),
            None => Inserted::New(id),
        }
    }

    fn refuse(&self) -> Inserted {
        self.refused.fetch_add(1, Ordering::Relaxed);
        Inserted::Full
    }

    // Another live node of this hash, entered at a lower place, leased.
    fn twin(&self, hash: BlockHash, place: u32) -> Option<NodeId> {
        let lower = self.table.candidates(hash).filter(|&(_, at)| at < place);
        for (id, _) in lower {
            match self.word(id).lease() {
                Asked::Leased if self.hash(id) == hash => return Some(id),
                Asked::Leased => self.release(id),
                Asked::NotLive(true) => self.reclaim(id),
                Asked::NotLive(false) | Asked::TooMany => {}
            }
        }
        None
    }

    // Leaves the place to a twin, unless others have found this node meanwhile: then both stay.
    fn give_in(&self, id: NodeId, twin: NodeId) -> Inserted {
        if planted(Bug::BlindRetreat) {
            self.table.remove(self.field(id, PLACE).load(Ordering::Relaxed) as u32);
            self.leave_parent(id);
            self.field(id, STATE).fetch_sub(self.field(id, STATE).load(Ordering::Relaxed), Ordering::AcqRel);
            self.reclaim(id);
            return Inserted::Known(twin);
        }
        self.release(id);
        self.unlink(id, false);
        Inserted::Known(twin)
    }

    /// Takes a block without children out of the index: matches find it no more. With `force`, leased ones too: their
    /// leases stay safe, and the last one given back frees the node. `false`: it has children or, without
    /// force, leases, or was unlinked already.
    pub fn unlink(&self, id: NodeId, force: bool) -> bool {
        if !self.word(id).retire(force) {
            return false;
        }
        self.table.remove(self.field(id, PLACE).load(Ordering::Relaxed) as u32);
        self.leave_parent(id);
        self.live.fetch_sub(1, Ordering::Relaxed);
        self.release(id);
        true
    }

    fn leave_parent(&self, id: NodeId) {
        if let Some(parent) = self.parent(id) {
            self.word(parent).remove_child();
        }
    }

    // A node that nobody else has. The list is Treiber's, with a count against reuse (IBM System/370).
    fn take_free(&self) -> Option<NodeId> {
        let mut top = self.free.load(Ordering::Acquire);
        while let Some(id) = (top as u32).checked_sub(1) {
            // It may be taken meanwhile, and this no longer its link: then the exchange fails.
            let next = self.field(id, PLACE).load(Ordering::Relaxed) >> 32;
            let counted = (top >> 32).wrapping_add(1) << 32 | next;
            match self.free.compare_exchange_weak(top, counted, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(id),
                Err(now) => top = now,
            }
        }
        let more = |fresh: usize| (fresh < self.capacity).then_some(fresh + 1);
        let fresh = self.fresh.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        fresh.ok().map(|id| id as NodeId)
    }

    // Gives a node back that its last holder found unlinked.
    fn reclaim(&self, id: NodeId) {
        let mut top = self.free.load(Ordering::Relaxed);
        loop {
            self.field(id, PLACE).store((top & 0xffff_ffff) << 32, Ordering::Relaxed);
            let counted = (top >> 32).wrapping_add(1) << 32 | u64::from(id + 1);
            // Release: the link, and all that was done with the node before.
            match self.free.compare_exchange_weak(top, counted, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }

    /// Hash of a node that is leased, or held in place by the lock under which nodes are unlinked; as all below.
    pub(crate) fn hash(&self, id: NodeId) -> BlockHash {
        let half = |field: usize| u128::from(self.field(id, field).load(Ordering::Relaxed));
        BlockHash(half(HASH[1]) << 64 | half(HASH[0]))
    }

    /// The node before it in the sequence.
    pub(crate) fn parent(&self, id: NodeId) -> Option<NodeId> {
        (self.field(id, PARENT).load(Ordering::Relaxed) as u32).checked_sub(1)
    }

    /// Blocks before it in the sequence.
    pub(crate) fn depth(&self, id: NodeId) -> u32 {
        (self.field(id, PARENT).load(Ordering::Relaxed) >> 32) as u32
    }

    /// Whose block it is.
    pub(crate) fn model(&self, id: NodeId) -> u32 {
        self.field(id, MODEL).load(Ordering::Relaxed) as u32
    }

    /// Leases at this moment; one may come at any time.
    pub(crate) fn leases(&self, id: NodeId) -> u64 {
        self.word(id).leases()
    }

    /// Whether it was not unlinked.
    pub(crate) fn is_live(&self, id: NodeId) -> bool {
        self.word(id).is_live()
    }

    /// Changes when the node is freed.
    pub(crate) fn generation(&self, id: NodeId) -> u16 {
        self.word(id).generation()
    }

    /// The node of a hash, for who holds the lock under which nodes are inserted and unlinked.
    pub fn find(&self, hash: BlockHash) -> Option<NodeId> {
        let is_it = |&(id, _): &(NodeId, u32)| self.word(id).is_live() && self.hash(id) == hash;
        self.table.candidates(hash).find(is_it).map(|(id, _)| id)
    }

    #[cfg(test)]
    fn children(&self, id: NodeId) -> u64 {
        self.word(id).children()
    }
}
