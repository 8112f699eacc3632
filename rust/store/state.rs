//! Everything the store knows about its blocks, under one lock that is never held across I/O or a copy.
//!
//! One rule keeps the books right: whatever alters a node goes through [`State::alter`], which takes the node out of
//! the sums, applies the change, and puts it back as it then is. So a model's block and byte counts, and the blocks not
//! yet on SSD, follow from the nodes alone, at every instant.

use super::lease::Touched;
use super::model::Matches;
use super::nodes::{Node, NodeId, Nodes};
use super::worth::ReadRate;
use super::{Options, WritePolicy};
use crate::block::{BlockHash, Geometry};
use crate::codec::Layout;
use crate::evict::Retention;
use crate::pool::{Class, Holding, Run, Slot};
use crate::ram::{Leaving, Ram};
use crate::ssd::record::Entry;
use crate::ssd::{ModelFile, Phase, Place, Segment, Ssd, Stale};
use crate::stats::{Counts, Miss, Tier};
use crate::sync::Arc;
use crate::trie::Trie;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// One registered model.
#[derive(Debug)]
pub(crate) struct ModelState {
    pub(crate) name: String,
    pub(crate) geometry: Geometry,
    pub(crate) weight: u64,
    /// What it holds of RAM, and its slots there by their size.
    pub(crate) holding: Arc<Holding>,
    pub(crate) classes: BTreeMap<usize, Arc<Class>>,
    pub(crate) counts: Counts,
    /// What its matches count without the lock.
    pub(crate) matches: Arc<Matches>,
    pub(crate) disk: Option<Disk>,
    /// How blocks are encoded that are put, and those that go to SSD as they were put; `None`: not at all.
    pub(crate) hot: Option<Arc<Layout>>,
    pub(crate) cold: Option<Arc<Layout>>,
    /// What its planes are clipped to, if it was calibrated.
    pub(crate) bounds: Option<Arc<[f32]>>,
    /// Blocks put and not yet on SSD, by rising ticket. An entry may be outdated; its node's `queued` tells.
    pub(crate) dirty: VecDeque<(u64, BlockHash)>,
    pub(crate) dirty_blocks: u64,
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
    /// Counters of models that were unregistered; and of those of which somebody still has a handle.
    pub(crate) retired: Counts,
    pub(crate) leaving: Vec<Arc<Matches>>,
    pub(crate) clock: u64,
    pub(crate) ssd_capacity_bytes: u64,
    /// What the files of no model may take.
    pub(crate) ssd_control_bytes: u64,
    pub(crate) stale: Vec<Stale>,
    /// Why the SSD takes no writes, and since when.
    pub(crate) ssd_read_only: Option<(String, Instant)>,
    pub(crate) flushing: usize,
    /// The last ticket given to a block that is to be demoted.
    pub(crate) last_ticket: u64,
    pub(crate) writing: Option<Writing>,
    pub(crate) closed: bool,
}

/// How many dear blocks are passed over for one victim.
const PASSES: usize = 16;

/// What policies know a block by.
pub(super) fn tag(hash: BlockHash) -> u64 {
    hash.0 as u64
}

impl State {
    pub(crate) fn new(
        trie: Arc<Trie>,
        options: &Options,
        ram_bytes: usize,
        ssd: Option<&Ssd>,
        stale: Vec<Stale>,
    ) -> Self {
        Self {
            nodes: Nodes::new(trie),
            ram: Ram::new(ram_bytes, options.eviction),
            policy: options.policy,
            ram_bytes: ram_bytes as u64,
            models: BTreeMap::new(),
            next_model: 0,
            retired: Counts::default(),
            leaving: Vec::new(),
            clock: 0,
            ssd_capacity_bytes: ssd.map_or(0, Ssd::capacity_bytes),
            ssd_control_bytes: ssd.map_or(0, Ssd::control_bytes),
            stale,
            ssd_read_only: None,
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

    pub(crate) fn counts(&mut self, model: u32) -> &mut Counts {
        // A lease may outlive its model; what it still does is counted with the models that are gone.
        self.models.get_mut(&model).map_or(&mut self.retired, |m| &mut m.counts)
    }

    /// Changes one node; see the page above.
    pub(crate) fn alter<R>(&mut self, id: NodeId, change: impl FnOnce(&mut Node) -> R) -> R {
        self.account(id, false);
        let result = change(&mut self.nodes[id]);
        self.account(id, true);
        result
    }

    fn account(&mut self, id: NodeId, add: bool) {
        let model = self.nodes.model(id);
        let (in_ram, on_ssd) = (self.nodes[id].ram.is_some(), self.nodes[id].ssd.is_some());
        let ssd_bytes = self.nodes[id].ssd.map_or(0, |place| place.bytes());
        let Some(geometry) = self.models.get(&model).map(|m| m.geometry) else { return };
        let ram_bytes = self.nodes[id].ram.map_or(0, |slot| self.ram.pool.slot_bytes(slot) as u64);
        let plain = geometry.record_bytes() as u64;
        let shift = |value: &mut u64, by: u64| *value = if add { *value + by } else { *value - by };
        if in_ram
            && !on_ssd
            && let Some(model) = self.models.get_mut(&model)
        {
            shift(&mut model.dirty_blocks, 1);
        }
        let counts = self.counts(model);
        for (tier, present, bytes) in [(Tier::Ram, in_ram, ram_bytes), (Tier::Ssd, on_ssd, ssd_bytes)] {
            if present {
                shift(&mut counts.tier(tier).blocks, 1);
                shift(&mut counts.tier(tier).used_bytes, bytes);
                shift(&mut counts.tier(tier).plain_bytes, plain);
            }
        }
    }

    /// Takes in what happened without the lock: what was matched is used as of now, and what nobody holds any more
    /// comes back.
    pub(crate) fn catch_up(&mut self, touched: &Touched) {
        for (id, life) in touched.take().into_iter().rev() {
            if self.nodes.is_this_life(id, life) {
                self.touch(id, true);
            }
        }
        for slot in self.nodes.freed() {
            self.ram.pool.free(slot);
        }
    }

    /// Marks a path as used now; `asked`: a request asked for it.
    pub(crate) fn touch(&mut self, deepest: NodeId, asked: bool) {
        let now = self.tick();
        let model = self.nodes.model(deepest);
        let (time, second) = (self.ram.now(), asked && self.selective());
        let Leaving { order, retained, .. } = self.ram.leaving(model);
        let nodes = &mut self.nodes;
        let mut next = Some(deepest);
        let mut due = Vec::new();
        while let Some(id) = next {
            nodes[id].last_use = now;
            nodes[id].warm |= asked;
            // From its end to its start: what continues a block is never hotter than the block.
            order.touch(id);
            if !retained.is_empty() {
                retained.touch(id, time);
            }
            if asked {
                order.asked(tag(nodes.hash(id)));
            }
            let node = &nodes[id];
            if second && node.ram.is_some() && node.ssd.is_none() && !node.queued {
                due.push(id);
            }
            next = nodes.parent(id);
        }
        order.choose();
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
        let counts = self.counts(model);
        counts.tier(Tier::Ram).evicted += 1;
        counts.demotions_dropped += u64::from(ssd_expected && lost);
        let leaving = self.ram.leaving(model);
        leaving.order.remove(id, true);
        leaving.retained.remove(id);
        if clean {
            self.leave_ram(id);
        } else {
            self.drop_subtree(id);
        }
    }

    fn leave_ram(&mut self, id: NodeId) {
        let Some(slot) = self.alter(id, |node| {
            node.layout = None;
            node.ram.take()
        }) else {
            return;
        };
        self.ram.let_go(slot);
        self.ram.pool.free(slot);
        if let Some(parent) = self.nodes.parent(id) {
            self.alter(parent, |node| node.ram_children -= 1);
        }
    }

    /// Makes a block and all below it unfindable. Held blocks keep their slots until nobody holds them.
    /// Returns how many they were.
    pub(crate) fn drop_subtree(&mut self, root: NodeId) -> u64 {
        let ids = self.nodes.subtree(root);
        for &id in &ids {
            self.account(id, false);
            if let Some(slot) = self.nodes[id].ram {
                self.ram.let_go(slot);
                let leaving = self.ram.leaving(self.nodes.model(id));
                leaving.order.remove(id, false);
                leaving.retained.remove(id);
                if let Some(parent) = self.nodes.parent(id) {
                    self.alter(parent, |node| node.ram_children -= 1);
                }
            }
            if let Some(slot) = self.nodes.remove(id) {
                self.ram.pool.free(slot);
            }
        }
        ids.len() as u64
    }

    /// Takes a slot of so many bytes for a model, making room if need be. A model below its share of the arena takes from
    /// those above theirs; otherwise it evicts its own. `may_lose` allows evicting blocks that are not on SSD.
    pub(crate) fn allocate(&mut self, model: u32, bytes: usize, may_lose: bool) -> Option<Slot> {
        self.allocate_some(model, bytes, 1, may_lose).pop()
    }

    /// Takes so many slots, neighbours as far as there are, or as many as there can be.
    pub(crate) fn allocate_some(&mut self, model: u32, bytes: usize, wanted: usize, may_lose: bool) -> Vec<Slot> {
        let mut slots = Vec::with_capacity(wanted);
        let Some(class) = self.class(model, bytes) else { return slots };
        while slots.len() < wanted
            && let Some(run) = self.allocate_run(model, &class, bytes, wanted - slots.len(), may_lose)
        {
            slots.extend(run);
        }
        slots
    }

    /// A model's slots of a size.
    pub(crate) fn class(&mut self, model: u32, bytes: usize) -> Option<Arc<Class>> {
        let ModelState { classes, holding, .. } = self.models.get_mut(&model)?;
        Some(classes.entry(bytes).or_insert_with(|| self.ram.pool.class(holding, bytes)).clone())
    }

    fn allocate_run(
        &mut self,
        model: u32,
        class: &Arc<Class>,
        bytes: usize,
        most: usize,
        may_lose: bool,
    ) -> Option<Run> {
        let holding = self.models.get(&model)?.holding.clone();
        loop {
            if let Some(run) = self.ram.pool.allocate_run(class, most) {
                return Some(run);
            }
            let below_share = self.ram.pool.held_bytes(&holding) as u64 + bytes as u64 <= self.ram_share(model);
            let own_first = !below_share && self.evict_own(model, class, may_lose);
            let made_room = own_first
                || self.take_from_others(model, class, may_lose)
                || below_share && self.evict_own(model, class, may_lose);
            if !made_room {
                return None;
            }
        }
    }

    fn share(&self, capacity: u64, model: u32) -> u64 {
        let all: u64 = self.models.values().map(|m| m.weight).sum();
        self.models.get(&model).map_or(0, |m| (u128::from(capacity) * u128::from(m.weight) / u128::from(all)) as u64)
    }

    fn ram_share(&self, model: u32) -> u64 {
        self.share(self.ram_bytes, model)
    }

    pub(super) fn ssd_share(&self, model: u32) -> u64 {
        self.share(self.ssd_capacity_bytes.saturating_sub(self.ssd_control_bytes), model)
    }

    fn selective(&self) -> bool {
        self.policy == WritePolicy::WriteThroughSecondTouch
    }

    fn ssd_in_use(&self) -> bool {
        self.ssd_capacity_bytes > 0
    }

    fn evict_own(&mut self, model: u32, class: &Class, may_lose: bool) -> bool {
        let (now, ssd_in_use, selective) = (self.ram.now(), self.ssd_in_use(), self.selective());
        let nodes = &self.nodes;
        let Leaving { order, retained, walk } = self.ram.leaving(model);
        order.set_capacity(order.len());
        let clean = |id: NodeId| nodes[id].is_clean(selective);
        let may_leave = |id: &NodeId| (may_lose || clean(*id)) && !nodes.are_held([*id]);
        let mut victim = retained.overdue(now, |id| nodes[id].ram_children == 0 && may_leave(&id));
        for passed in 0..=PASSES {
            if victim.is_none() {
                let leaf_of = |id: NodeId| nodes.last_in_ram(id, walk).filter(may_leave);
                // Without an SSD no block is better to lose than another.
                victim = order.victim(leaf_of, |id| clean(id) || !ssd_in_use);
                if let Some(dear) = victim.filter(|&id| passed < PASSES && retained.pass_over(id)) {
                    nodes.path(dear).for_each(|id| order.touch(id));
                    victim = None;
                    continue;
                }
            }
            break;
        }
        let Some(victim) = victim else { return false };
        if nodes[victim].ram.is_some_and(|slot| self.ram.pool.is_of(slot, class)) {
            self.evict_from_ram(victim, ssd_in_use);
            return true;
        }
        // Its slot is of another size: a whole place is emptied for slots of this one.
        self.take_place(&[model], class, may_lose)
    }

    // Takes the coldest place for one slot from the models above their shares.
    fn take_from_others(&mut self, taker: u32, class: &Class, may_lose: bool) -> bool {
        let above = |&(&id, model): &(&u32, &ModelState)| {
            id != taker && self.ram.pool.held_bytes(&model.holding) as u64 > self.ram_share(id)
        };
        let givers: Vec<u32> = self.models.iter().filter(above).map(|(&id, _)| id).collect();
        self.take_place(&givers, class, may_lose)
    }

    fn take_place(&mut self, givers: &[u32], class: &Class, may_lose: bool) -> bool {
        let places = self.ram.pool.places_for(class).into_iter();
        let places = places.filter(|spans| !spans.is_empty() && spans.iter().all(|(id, _)| givers.contains(id)));
        let places = places.map(|spans| spans.into_iter().flat_map(|(_, slots)| slots).collect());
        self.empty_coldest(places.collect(), may_lose)
    }

    /// Empties one span of a model that holds more than its budget, as far as its blocks are on SSD where there is one
    /// that takes them. `false`: there is none, or none that can be emptied now.
    pub(super) fn shrink_one(&mut self) -> bool {
        let may_lose = !self.ssd_in_use() || self.ssd_read_only.is_some();
        let over = self.models.values().filter(|m| self.ram.pool.over_budget(&m.holding));
        let places: Vec<Vec<Slot>> = over.flat_map(|m| self.ram.pool.spans_of(&m.holding)).collect();
        let emptied = self.empty_coldest(places, may_lose);
        self.ram.pool.settle();
        emptied
    }

    // Empties the place that was used longest ago, of those where nothing is held.
    fn empty_coldest(&mut self, places: Vec<Vec<Slot>>, may_lose: bool) -> bool {
        let selective = self.selective();
        let last_use = |slot: &Slot| {
            let node = &self.nodes[self.ram.holder(*slot)?];
            (may_lose || node.is_clean(selective)).then_some(node.last_use)
        };
        let mut known: Vec<(u64, Vec<Slot>)> = places
            .into_iter()
            .filter_map(|slots| {
                let uses: Option<Vec<u64>> = slots.iter().map(last_use).collect();
                Some((uses?.into_iter().max()?, slots))
            })
            .collect();
        known.sort_unstable_by_key(|(last_use, _)| *last_use);
        let blocks = |slots: Vec<Slot>| slots.into_iter().filter_map(|slot| self.ram.holder(slot)).collect::<Vec<_>>();
        let mut coldest_first = known.into_iter().map(|(_, slots)| blocks(slots));
        let Some(leaving) = coldest_first.find(|ids| !self.nodes.are_held(ids.iter().copied())) else { return false };
        let hashes: Vec<_> = leaving.into_iter().map(|id| self.nodes.hash(id)).collect();
        for hash in hashes {
            // Dropping one block may have taken others along.
            if let Some(id) = self.nodes.find(hash).filter(|&id| self.nodes[id].ram.is_some()) {
                self.evict_from_ram(id, self.ssd_in_use());
            }
        }
        true
    }

    /// Bytes of all files of the SSD tier.
    pub(crate) fn ssd_file_bytes(&self) -> u64 {
        if !self.ssd_in_use() {
            return 0;
        }
        let models: u64 = self.models.values().filter_map(|m| Some(m.disk.as_ref()?.file_bytes())).sum();
        self.ssd_control_bytes + models + self.stale.iter().map(|s| s.bytes).sum::<u64>()
    }

    /// Notes that a block's record was written.
    pub(crate) fn place_on_ssd(&mut self, id: NodeId, place: Place, entry: Entry) {
        let (model, hash) = (self.nodes.model(id), self.nodes.hash(id));
        let again = self.alter(id, |node| {
            (node.ssd, node.warm) = (Some(place), false);
            std::mem::take(&mut node.again)
        });
        let counts = self.counts(model);
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

    /// Why a block is not cached.
    pub(crate) fn miss_reason(&self, hash: BlockHash) -> Miss {
        if self.nodes.was_evicted(hash) { Miss::Evicted } else { Miss::NeverStored }
    }
}
