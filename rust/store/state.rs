//! Everything the store knows about its blocks, under one lock that is never held across I/O or a copy.
//!
//! One rule keeps the books right: whatever alters a node goes through [`State::alter`], which takes the node out of
//! the sums, applies the change, and puts it back as it then is. So a model's block and byte counts, and the blocks not
//! yet on SSD, follow from the nodes alone, at every instant.

use super::events::Log;
use super::gone::Gone;
use super::gpu::Gpu;
use super::lease::Touched;
use super::model::Matches;
use super::nodes::{Node, NodeId, Nodes};
use super::owners::{OwnerId, Owners};
use super::quota::Account;
use super::worth::ReadRate;
use super::{Options, WritePolicy};
use crate::block::{BlockHash, Geometry};
use crate::codec::Layout;
use crate::evict::{Curve, Retention};
use crate::pool::{Class, Holding, Slot};
use crate::ram::{Leaving, Ram};
use crate::ssd::record::Entry;
use crate::ssd::{ModelFile, Phase, Place, Segment, Ssd, Stale};
use crate::stats::{Counts, Lifted, Miss, Tier};
use crate::sync::Arc;
use crate::trie::Trie;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

/// One registered model.
#[derive(Debug)]
pub(crate) struct ModelState {
    pub(crate) name: String,
    pub(crate) geometry: Geometry,
    /// What it gets back of RAM and of SSD when it needs it; `None`: as much as any other.
    pub(crate) shares: Option<[u64; 2]>,
    /// When it is to make room, of those that hold more than their shares: the least is first.
    pub(crate) turn: usize,
    /// What caches of other sizes would hit.
    pub(crate) curve: Curve,
    /// Slots for which it found no room in RAM; and whether nobody has room to give, as far as is known.
    pub(crate) wants: Option<Arc<Class>>,
    pub(crate) refused: bool,
    /// What it holds of RAM, and its slots there by their size.
    pub(crate) holding: Arc<Holding>,
    pub(crate) classes: BTreeMap<usize, Arc<Class>>,
    /// Bytes of its slots, those that are being filled among them.
    pub(crate) slot_bytes_held: u64,
    /// What it may have.
    pub(crate) account: Account,
    /// Of what belongs to no block, and of its blocks of no tenant.
    pub(crate) owner: OwnerId,
    pub(crate) disk: Option<Disk>,
    /// How blocks are encoded that are put, and those that go to SSD as they were put; `None`: not at all.
    pub(crate) hot: Option<Arc<Layout>>,
    pub(crate) cold: Option<Arc<Layout>>,
    /// What its planes are clipped to, if it was calibrated.
    pub(crate) bounds: Option<Arc<[f32]>>,
    /// Blocks put and not yet on SSD, by rising ticket. An entry may be outdated; its node's `queued` tells.
    pub(crate) dirty: VecDeque<(u64, BlockHash)>,
    pub(crate) dirty_blocks: u64,
    /// Blocks that stand in that queue.
    pub(super) queued_blocks: u64,
    /// How fast its records are read, and how long computing a block takes, as far as that is known.
    pub(crate) read_rate: ReadRate,
    pub(crate) computed_s: Option<f64>,
}

impl ModelState {
    /// Bytes of the slots that its puts take at present.
    pub(crate) fn slot_bytes(&self) -> usize {
        let encoded = self.hot.as_ref().map(|layout| layout.record_bytes(&self.geometry, false));
        encoded.unwrap_or_else(|| self.geometry.record_bytes())
    }

    /// Notes the blocks of a request, from its end to its start.
    pub(crate) fn asked(&mut self, tags: impl ExactSizeIterator<Item = u64>) {
        let (blocks, sample) = (tags.len(), self.curve.sample());
        tags.filter(|tag| tag & sample == 0).for_each(|tag| self.curve.ask(tag));
        self.curve.count(blocks);
    }
}

/// One model's file and the books of its segments.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) file: Arc<ModelFile>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) last_epoch: u64,
    /// Bytes that may be written again: a share of what was written, as far as it was not used.
    pub(crate) spare_bytes: u64,
}

/// What the superblocks and the calibration of a model's file and the file system's own books of it may take.
pub(super) const FILE_HEAD_BYTES: u64 = 24 << 10;

impl Disk {
    pub(super) fn file_bytes(&self) -> u64 {
        let live = self.segments.iter().filter(|s| s.phase != Phase::Empty).count() as u64;
        FILE_HEAD_BYTES + live * self.file.layout.segment_bytes
    }
}

/// What the demotion thread is doing.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) model: u32,
    /// The segments it writes to.
    pub(crate) segments: Vec<u32>,
    /// The blocks it writes, and holds.
    pub(crate) blocks: Vec<NodeId>,
    /// The ticket of the first of them.
    pub(crate) oldest: u64,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) nodes: Nodes,
    pub(crate) ram: Ram,
    pub(crate) ram_bytes: u64,
    pub(crate) policy: WritePolicy,
    pub(crate) models: BTreeMap<u32, ModelState>,
    pub(crate) next_model: u32,
    pub(crate) owners: Owners,
    pub(super) log: Log,
    /// What became of blocks that were brought to RAM ahead of requests.
    pub(super) lifts: [Lifted; 2],
    pub(crate) clock: u64,
    pub(crate) ssd_capacity_bytes: u64,
    /// What the files of no model may take.
    pub(crate) ssd_control_bytes: u64,
    pub(crate) stale: Vec<Stale>,
    /// Why the SSD takes no writes, and since when.
    pub(crate) ssd_read_only: Option<(String, Instant)>,
    /// What is on the GPU, if there is one; and how often it refused something.
    pub(super) gpu: Option<Gpu>,
    pub(super) gpu_refused: u64,
    pub(crate) flushing: usize,
    /// The last ticket given to a block that is to be demoted.
    pub(crate) last_ticket: u64,
    pub(crate) writing: Option<Writing>,
    pub(crate) closed: bool,
}

/// How often a path was found between two uses of the lock.
#[derive(Debug, Default)]
struct Found {
    notes: u32,
    asked: u32,
    /// Tags of its blocks in the sample of the curve, once they were looked up.
    sampled: Option<Vec<u64>>,
}

/// The system's clock: for people, nothing depends on it.
pub(super) fn unix_s() -> u32 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() as u32)
}

/// Blocks of whose tags these bits are zero are timed.
pub(super) const TIMED: u64 = 15;

/// What policies know a block by.
pub(super) fn tag(hash: BlockHash) -> u64 {
    hash.0 as u64
}

impl State {
    pub(crate) fn new(
        (trie, gone): (Arc<Trie>, Arc<Gone>),
        options: &Options,
        ram_bytes: usize,
        ssd: Option<&Ssd>,
        stale: Vec<Stale>,
    ) -> Self {
        Self {
            nodes: Nodes::new(trie, gone),
            ram: Ram::new(ram_bytes, options.eviction),
            policy: options.policy,
            ram_bytes: ram_bytes as u64,
            models: BTreeMap::new(),
            next_model: 0,
            owners: Owners::default(),
            log: Log::default(),
            lifts: Default::default(),
            clock: 0,
            ssd_capacity_bytes: ssd.map_or(0, Ssd::capacity_bytes),
            ssd_control_bytes: ssd.map_or(0, Ssd::control_bytes),
            stale,
            ssd_read_only: None,
            gpu: None,
            gpu_refused: 0,
            flushing: 0,
            last_ticket: 0,
            writing: None,
            closed: false,
        }
    }

    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Tokens of the longest blocks.
    pub(super) fn block_tokens(&self) -> u32 {
        self.models.values().map(|m| m.geometry.block_tokens).max().unwrap_or(0)
    }

    /// Where a model counts what belongs to no block.
    pub(crate) fn counts(&mut self, model: u32) -> &mut Counts {
        let owner = self.models.get(&model).map_or(OwnerId::MAX, |m| m.owner);
        self.owners.counts(owner)
    }

    /// Where what happens to a block is counted.
    pub(crate) fn counts_of(&mut self, id: NodeId) -> &mut Counts {
        self.owners.counts(self.nodes[id].owner)
    }

    /// The owner of a model's blocks of a tenant, and what its matches count. `name`: what the tenant is called.
    pub(super) fn owner(
        &mut self,
        model: u32,
        plain_bytes: u64,
        tag: u64,
        name: Option<&str>,
    ) -> (OwnerId, Arc<Matches>) {
        let id = self.owners.of(model, tag, plain_bytes);
        if let Some(name) = name {
            self.owners.name(self.owners.tenant_id(id), name);
        }
        (id, self.owners.get(id).map(|owner| owner.matches.clone()).unwrap_or_default())
    }

    /// A model is gone, and all of its blocks.
    pub(super) fn forget_model(&mut self, model: u32) {
        self.models.remove(&model);
        self.ram.forget(model);
        self.forget_on_gpu(model);
        self.owners.leave(model);
    }

    /// Changes one node; see the page above.
    pub(crate) fn alter<R>(&mut self, id: NodeId, change: impl FnOnce(&mut Node) -> R) -> R {
        let before = self.held(id);
        let result = change(&mut self.nodes[id]);
        self.book(id, before, self.held(id));
        result
    }

    /// Bytes that a block takes, by tier; `None`: it is not there.
    pub(super) fn held(&self, id: NodeId) -> [Option<u64>; 2] {
        let node = &self.nodes[id];
        let slot_bytes = |slot| self.ram.pool.slot_bytes(slot) as u64;
        [node.ram.map(slot_bytes), node.ssd.map(|place| place.bytes())]
    }

    // Takes a block out of the sums as it was, and puts it in as it is.
    fn book(&mut self, id: NodeId, before: [Option<u64>; 2], after: [Option<u64>; 2]) {
        if before == after {
            return;
        }
        let (model, owner) = (self.nodes.model(id), self.nodes[id].owner);
        let timed = tag(self.nodes.hash(id)) & TIMED == 0;
        let is_dirty = |held: [Option<u64>; 2]| u64::from(held[0].is_some() && held[1].is_none());
        if let Some(model) = self.models.get_mut(&model) {
            model.dirty_blocks = model.dirty_blocks + is_dirty(after) - is_dirty(before);
        }
        for tier in Tier::ALL {
            let (was, is) = (before[tier as usize], after[tier as usize]);
            if was == is {
                continue;
            }
            if tier == Tier::Ssd {
                self.owners.hold_records(owner, is.unwrap_or(0), true);
                self.owners.hold_records(owner, was.unwrap_or(0), false);
            }
            if was.is_some() != is.is_some() {
                self.log(id, tier, is.is_some());
            }
            let Some(owner) = self.owners.get_mut(owner) else { continue };
            let (plain, counts) = (owner.plain_bytes, owner.counts.tier(tier));
            counts.used_bytes = counts.used_bytes + is.unwrap_or(0) - was.unwrap_or(0);
            counts.in_bytes += is.unwrap_or(0);
            counts.out_bytes += was.unwrap_or(0);
            let blocks = &mut owner.blocks[tier as usize];
            match (was, is) {
                (None, Some(_)) => {
                    (counts.blocks, counts.plain_bytes) = (counts.blocks + 1, counts.plain_bytes + plain);
                    self.nodes[id].nth[tier as usize] = blocks.len() as u32;
                    blocks.push(id);
                    if timed {
                        self.nodes[id].came_s[tier as usize] = unix_s();
                    }
                }
                (Some(_), None) => {
                    (counts.blocks, counts.plain_bytes) = (counts.blocks - 1, counts.plain_bytes - plain);
                    let nth = self.nodes[id].nth[tier as usize];
                    blocks.swap_remove(nth as usize);
                    if timed {
                        counts.residence.note(unix_s().saturating_sub(self.nodes[id].came_s[tier as usize]), 1);
                    }
                    if let Some(&moved) = blocks.get(nth as usize) {
                        self.nodes[moved].nth[tier as usize] = nth;
                    }
                }
                _ => {}
            }
        }
    }

    /// Gives a slot back to the arena.
    pub(super) fn free(&mut self, slot: Slot) {
        self.book_slot(slot, false);
        self.ram.pool.free(slot);
    }

    /// Notes whose a slot is that was taken.
    pub(super) fn take(&mut self, slot: Slot, owner: OwnerId) {
        self.ram.set_owner(slot, owner);
        self.book_slot(slot, true);
    }

    fn book_slot(&mut self, slot: Slot, taken: bool) {
        let (owner, bytes) = (self.ram.owner(slot), self.ram.pool.slot_bytes(slot) as u64);
        self.owners.hold_slots(owner, bytes, taken);
        let model = self.owners.get(owner).map(|owner| owner.model);
        if let Some(model) = model.and_then(|model| self.models.get_mut(&model)) {
            let held = &mut model.slot_bytes_held;
            *held = if taken { *held + bytes } else { *held - bytes };
        }
    }

    /// Takes in what happened without the lock: what was matched is used as of now, and what nobody holds any more
    /// comes back.
    pub(crate) fn catch_up(&mut self, touched: &Touched) {
        let notes = touched.take();
        let mut paths: HashMap<(NodeId, u16), Found> = HashMap::with_capacity(notes.len());
        for note in &notes {
            let path = paths.entry((note.deepest, note.life)).or_default();
            (path.notes, path.asked) = (path.notes + 1, path.asked + u32::from(note.asked));
        }
        for note in notes {
            let Some(path) = paths.get_mut(&(note.deepest, note.life)) else { continue };
            path.notes -= 1;
            if !self.nodes.is_this_life(note.deepest, note.life) {
                continue;
            }
            // A path is touched at its last use; the curve is told of each. Mostly that is once.
            let once = path.asked <= 1;
            if note.asked && !once {
                self.ask_again(note.deepest, &mut path.sampled);
            }
            if path.notes == 0 {
                self.touch(note.deepest, path.asked, path.asked > 0 && once);
            }
        }
        for slot in self.nodes.freed() {
            self.free(slot);
        }
    }

    // Tells the curve of a path that is asked for more than once. Of its blocks those in the sample are looked up once.
    fn ask_again(&mut self, deepest: NodeId, sampled: &mut Option<Vec<u64>>) {
        let Some(model) = self.models.get_mut(&self.nodes.model(deepest)) else { return };
        let (nodes, sample) = (&self.nodes, model.curve.sample());
        let tags = || nodes.path(deepest).map(|id| tag(nodes.hash(id))).filter(|tag| tag & sample == 0).collect();
        sampled.get_or_insert_with(tags).iter().for_each(|&tag| model.curve.ask(tag));
        model.curve.count(nodes.depth(deepest) as usize + 1);
    }

    /// Marks a path as used now; `matches`: by so many; `told`: the curve is told of it.
    pub(crate) fn touch(&mut self, deepest: NodeId, matches: u32, told: bool) {
        let (now, now_s, asked) = (self.tick(), unix_s(), matches > 0);
        let model = self.nodes.model(deepest);
        let (time, second) = (self.ram.now(), asked && self.selective());
        let Leaving { order, retained, .. } = self.ram.leaving(model);
        let (nodes, owners) = (&mut self.nodes, &mut self.owners);
        let mut curve = self.models.get_mut(&model).filter(|_| told).map(|m| &mut m.curve);
        let sample = curve.as_ref().map_or(u64::MAX, |curve| curve.sample());
        // All are the lowest bits of a tag: most blocks are in no sample.
        let any = if asked { sample & order.sample() & TIMED } else { u64::MAX };
        let mut next = Some(deepest);
        let (mut due, mut lifted) = (Vec::new(), Vec::new());
        while let Some(id) = next {
            let node = &mut nodes[id];
            (node.last_use, node.used_s, node.uses) = (now, now_s, node.uses.saturating_add(matches));
            node.warm = true;
            if asked && let Some(lifter) = node.lifted.take() {
                lifted.push((id, lifter));
            }
            // From its end to its start: what continues a block is never hotter than the block.
            order.touch(id);
            if !retained.is_empty() {
                retained.touch(id, time);
            }
            let tag = if asked { tag(nodes.hash(id)) } else { u64::MAX };
            if tag & any == 0 {
                order.asked(tag);
                if tag & TIMED == 0 {
                    nodes[id].matched(now_s, matches, owners);
                }
                if tag & sample == 0
                    && let Some(curve) = &mut curve
                {
                    curve.ask(tag);
                }
            }
            let node = &nodes[id];
            if second && node.ram.is_some() && node.ssd.is_none() && !node.queued {
                due.push(id);
            }
            next = nodes.parent(id);
        }
        order.choose();
        if let Some(curve) = curve {
            curve.count(nodes.depth(deepest) as usize + 1);
        }
        if asked {
            self.log.note_use(self.nodes.hash(deepest), matches);
        }
        for (id, lifter) in lifted {
            self.lifts[lifter as usize].hit_bytes += self.held(id)[Tier::Ram as usize].unwrap_or(0);
        }
        if self.ssd_in_use() {
            // Parents first, as they are put.
            due.into_iter().rev().for_each(|id| self.enqueue_dirty(id));
        }
    }

    pub(crate) fn segment(&mut self, model: u32, index: u32) -> Option<&mut Segment> {
        self.models.get_mut(&model)?.disk.as_mut()?.segments.get_mut(index as usize)
    }

    /// Notes what a put asks for the blocks of a path that are in RAM.
    pub(super) fn retain(&mut self, deepest: NodeId, asked: Retention) {
        let (now, model) = (self.ram.now(), self.nodes.model(deepest));
        let (retained, nodes) = (&mut self.ram.leaving(model).retained, &self.nodes);
        for id in nodes.path(deepest).filter(|&id| nodes[id].ram.is_some()) {
            retained.set(id, nodes.depth(id), asked, now);
        }
    }

    /// Gives a block its bytes in RAM, and says how they are encoded.
    pub(crate) fn place_in_ram(&mut self, id: NodeId, slot: Slot, layout: Option<Arc<Layout>>) {
        self.ram.hold(slot, id);
        let (model, hash) = (self.nodes.model(id), self.nodes.hash(id));
        // Attention over what came before costs as much as the rest of a model at about 32 k tokens.
        let block_tokens = self.models.get(&model).map_or(1, |m| m.geometry.block_tokens);
        let cost = 1.0 + (self.nodes.depth(id) * block_tokens) as f32 / 32_768.0;
        self.alter(id, |node| (node.ram, node.layout) = (Some(slot), layout));
        // For as many bytes as a block has that is not encoded.
        let shorter = self
            .models
            .get(&model)
            .map_or(1.0, |m| m.geometry.record_bytes() as f32 / self.ram.pool.slot_bytes(slot) as f32);
        self.ram.leaving(model).order.insert(id, tag(hash), cost * shorter);
        if let Some(parent) = self.nodes.parent(id) {
            self.alter(parent, |node| node.ram_children += 1);
        }
    }

    /// Takes a block's bytes out of RAM; without a copy on SSD the block and all below it are gone.
    pub(crate) fn evict_from_ram(&mut self, id: NodeId, ssd_expected: bool) {
        let model = self.nodes.model(id);
        let clean = self.nodes[id].ssd.is_some();
        let lost = !self.nodes[id].is_clean(self.selective());
        let counts = self.counts_of(id);
        counts.tier(Tier::Ram).evicted += 1;
        counts.demotions_dropped += u64::from(ssd_expected && lost);
        let now = self.ram.now();
        let leaving = self.ram.leaving(model);
        leaving.order.remove(id, true);
        let why = if leaving.retained.is_overdue(id, now) { Miss::Expired } else { Miss::Evicted };
        leaving.retained.remove(id);
        if clean {
            self.leave_ram(id);
        } else {
            self.drop_subtree(id, why);
        }
    }

    fn leave_ram(&mut self, id: NodeId) {
        let Some(slot) = self.alter(id, |node| {
            (node.layout, node.lifted) = (None, None);
            node.ram.take()
        }) else {
            return;
        };
        self.ram.let_go(slot);
        self.free(slot);
        if let Some(parent) = self.nodes.parent(id) {
            self.alter(parent, |node| node.ram_children -= 1);
        }
    }

    /// Makes a block and all below it unfindable, and remembers why. Held blocks keep their slots until nobody holds them.
    /// Returns how many they were.
    pub(crate) fn drop_subtree(&mut self, root: NodeId, why: Miss) -> u64 {
        let ids = self.nodes.subtree(root);
        for &id in &ids {
            self.counts_of(id).dropped += u64::from(why == Miss::Dropped);
            self.set_queued(id, false);
            self.leave_gpu(id, false);
            self.book(id, self.held(id), [None; 2]);
            if let Some(slot) = self.nodes[id].ram {
                self.ram.let_go(slot);
                let leaving = self.ram.leaving(self.nodes.model(id));
                leaving.order.remove(id, false);
                leaving.retained.remove(id);
                if let Some(parent) = self.nodes.parent(id) {
                    self.alter(parent, |node| node.ram_children -= 1);
                }
            }
            if let Some(slot) = self.nodes.remove(id, why) {
                self.free(slot);
            }
        }
        ids.len() as u64
    }

    pub(super) fn selective(&self) -> bool {
        self.policy == WritePolicy::WriteThroughSecondTouch
    }

    pub(super) fn ssd_in_use(&self) -> bool {
        self.ssd_capacity_bytes > 0
    }

    /// Bytes of all files of the SSD tier.
    pub(crate) fn ssd_file_bytes(&self) -> u64 {
        if !self.ssd_in_use() {
            return 0;
        }
        let models: u64 = self.models.values().filter_map(|m| Some(m.disk.as_ref()?.file_bytes())).sum();
        self.ssd_control_bytes + models + self.stale.iter().map(|s| s.bytes).sum::<u64>()
    }

    /// Takes a block's record off the SSD; without a copy in RAM the block and all below it are gone.
    pub(super) fn leave_ssd(&mut self, id: NodeId) {
        self.counts_of(id).tier(Tier::Ssd).evicted += 1;
        if self.nodes[id].ram.is_some() {
            self.alter(id, |node| node.ssd = None);
        } else {
            self.drop_subtree(id, Miss::Evicted);
        }
    }

    /// Notes that a block's record was written.
    pub(crate) fn place_on_ssd(&mut self, id: NodeId, place: Place, entry: Entry) {
        let (model, hash) = (self.nodes.model(id), self.nodes.hash(id));
        let again = self.alter(id, |node| {
            (node.ssd, node.warm) = (Some(place), false);
            std::mem::take(&mut node.again)
        });
        let counts = self.counts_of(id);
        counts.demoted += u64::from(!again);
        counts.reinserted += u64::from(again);
        counts.tier(Tier::Ssd).rewritten_bytes += if again { place.bytes() } else { 0 };
        if let Some(disk) = self.models.get_mut(&model).and_then(|m| m.disk.as_mut()) {
            disk.wrote(place.bytes(), again);
        }
        if let Some(segment) = self.segment(model, place.segment) {
            segment.entries.push(entry);
            segment.blocks.push(hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evict::Kind;
    use crate::stats::Histogram;

    const RAM: usize = 4 << 20;

    // Two blocks in RAM, one after the other, of which the first alone is timed.
    fn two_blocks() -> (State, [NodeId; 2]) {
        let options = Options {
            ram_capacity_bytes: RAM as u64,
            ssd: None,
            eviction: Kind::Lru,
            policy: WritePolicy::default(),
            secret: None,
            threads: 1,
            index_bytes: None,
            stepped: true,
            gpu: None,
        };
        let trie = Arc::new(Trie::new(64).expect("memory is to be had"));
        let mut state = State::new((trie, Arc::new(Gone::default())), &options, RAM, None, Vec::new());
        let owner = state.owners.of(0, 0, 4096);
        let class = state.ram.pool.class(&Holding::new(0), 4096);
        let mut parent = None;
        let ids = [TIMED + 1, TIMED + 2].map(|hash| {
            let hash = BlockHash(u128::from(hash));
            let id = state.nodes.insert(parent, hash, (0, owner), BlockHash(0)).expect("there is room");
            let slot = state.ram.pool.allocate(&class).expect("there is room");
            state.take(slot, owner);
            state.place_in_ram(id, slot, None);
            parent = Some(id);
            id
        });
        (state, ids)
    }

    // So much of a histogram is at most 16 seconds, and so much longer, but no more than 64.
    fn near(histogram: &Histogram) -> (u64, u64) {
        let [a, b, c, d, rest @ ..] = histogram.counts;
        assert!(rest.iter().all(|&count| count == 0));
        (a + b + c, d)
    }

    #[test]
    fn a_gap_is_from_match_to_match_and_a_stay_from_coming_to_leaving() {
        let (mut state, [first, last]) = two_blocks();
        let past = unix_s() - 40;
        let ram = |state: &mut State| *state.owners.counts(state.nodes[first].owner).tier(Tier::Ram);
        state.touch(last, 1, false);
        assert_eq!(near(&ram(&mut state).reuse_gap), (0, 0), "the first match follows none");
        state.nodes[first].matched_s = past;
        // A put is no match.
        state.touch(last, 0, false);
        assert_eq!(near(&ram(&mut state).reuse_gap), (0, 0));
        state.touch(last, 3, false);
        assert_eq!(near(&ram(&mut state).reuse_gap), (2, 1), "two of the three came at once");
        assert!((40..50).contains(&ram(&mut state).reuse_gap.sum_s));
        state.nodes[first].came_s[Tier::Ram as usize] = past;
        state.nodes[first].since_s = 1;
        let owner = state.nodes[first].owner;
        state.evict_from_ram(last, false);
        assert_eq!(near(&state.owners.counts(owner).tier(Tier::Ram).residence), (0, 0), "it is not timed");
        state.evict_from_ram(first, false);
        assert_eq!(near(&state.owners.counts(owner).tier(Tier::Ram).residence), (0, 1));
        assert_eq!(state.owners.counts(owner).tier(Tier::Ram).evicted, 2);
    }
}
