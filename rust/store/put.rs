//! Putting blocks: from the caller's tensors into slots, encoded on the way if the model's blocks are, then findable.

use super::lease::Held;
use super::model::Model;
use super::namespace::Namespace;
use super::owners::OwnerId;
use super::sequence::Sequence;
use super::state::{State, tag, unix_s};
use super::{Shared, Store, WritePolicy, check_view};
use crate::block::{BlockHash, Geometry, RECORD_HEADER_BYTES};
use crate::codec::Layout;
use crate::copy::{BlockCopy, Direction, KvView};
use crate::error::{Result, input};
use crate::evict::Retention;
use crate::fused::encode_blocks;
use crate::pool::Slot;
use crate::ssd::record::write_tokens;
use crate::stats::{Miss, Tier};
use crate::sync::Arc;
use crate::trie::NodeId;
use std::ops::Range;
use std::time::Instant;

/// What a put did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PutOutcome {
    /// Leading tokens that are cached now.
    pub tokens: usize,
    /// Blocks that were new.
    pub new_blocks: usize,
}

impl Store {
    /// Stores the blocks of `tokens` that are not cached yet, and makes them findable. The SSD follows behind.
    ///
    /// # Errors
    /// The view does not fit the model, or covers fewer tokens; the store is closed.
    pub fn put(&self, model: &Model, tokens: &[u32], adapter: &str, tenant: &str, view: &KvView) -> Result<PutOutcome> {
        let sequence = self.sequence(model, adapter, tenant, tokens.to_vec());
        self.put_sequence(model, &sequence, view, 0, Retention::default())
    }

    /// As [`put`](Self::put), of a sequence, of whose tokens the view holds those from `start` on: rows before are not read,
    /// and if a block before is not cached, nothing is stored. What is asked beyond the default for its blocks replaces what was asked for
    /// them before, and holds while they are in RAM.
    ///
    /// # Errors
    /// As there; or the sequence is of another model, or the priority too high.
    pub fn put_sequence(
        &self,
        model: &Model,
        sequence: &Sequence,
        view: &KvView,
        start: usize,
        retention: Retention,
    ) -> Result<PutOutcome> {
        let began = Instant::now();
        let outcome = self.put_blocks(model, sequence, view, start, retention)?;
        sequence.namespace.matches.put(began.elapsed());
        Ok(outcome)
    }

    fn put_blocks(
        &self,
        model: &Model,
        sequence: &Sequence,
        view: &KvView,
        start: usize,
        retention: Retention,
    ) -> Result<PutOutcome> {
        if retention.priority > Retention::MAX_PRIORITY {
            let (given, most) = (retention.priority, Retention::MAX_PRIORITY);
            return Err(input(format!("priority is {given}, expected 0 to {most}")));
        }
        let geometry = model.spec.geometry;
        let Sequence { namespace, tokens, hashes, .. } = sequence;
        check_view(&geometry, view, tokens.len())?;
        if view.is_on_device() {
            self.shared.check_device(&geometry, view)?;
        }
        self.shared.check_open()?;
        sequence.check_model(model)?;
        if let Some(rate) = model.prefills.put(hashes) {
            self.shared.set_computed(model, Some(rate))?;
        }
        let block_tokens = geometry.block_tokens as usize;
        let found = self.shared.find(model, namespace, hashes, false)?;
        let known = found.map_or(0, |(_, blocks)| blocks);
        let parent = Held { trie: &self.shared.trie, id: found.map(|(id, _)| id) };
        if known == hashes.len() {
            if retention != Retention::default() {
                let mut state = self.shared.open_state()?;
                if let Some(deepest) = parent.id.filter(|&id| state.nodes.is_linked(id)) {
                    state.retain(deepest, retention);
                }
            }
            return Ok(PutOutcome { tokens: known * block_tokens, new_blocks: 0 });
        }
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        if known * block_tokens < start {
            state.owners.counts(namespace.owner).put_refused += (hashes.len() - known) as u64;
            return Ok(PutOutcome { tokens: known * block_tokens, new_blocks: 0 });
        }
        let layout = state.models.get(&model.id).and_then(|m| m.hot.clone());
        // What its kernels do not encode is put as it is, and encoded on its way to SSD.
        let layout = layout.filter(|layout| !view.is_on_device() || self.shared.takes(&geometry, layout, view));
        let owner = namespace.owner;
        let granted = state.granted(owner, hashes.len() - known, block_tokens);
        let slots = state.slots_for(owner, &geometry, layout.as_deref(), known..known + granted);
        state.spend(owner, slots.len() * block_tokens);
        drop(state);

        let filled = self.shared.fill(owner, &geometry, view, layout, slots, (known, tokens));

        let mut state = self.shared.state.lock();
        let (encoded, not_encodable) = (filled.encoded(), filled.not_encodable);
        let (published, new_blocks) = state.publish(model, namespace, parent.id, &hashes[known..], filled.places);
        let (cached, refused) = (known + published, hashes.len() - known - published);
        if retention != Retention::default()
            && let Some(deepest) = hashes[..cached].last().and_then(|&hash| state.nodes.find(hash))
        {
            state.retain(deepest, retention);
        }
        let over_quota = match refused {
            0 => false,
            _ => granted < hashes.len() - known || state.is_over(owner, Tier::Ram, geometry.record_bytes() as u64),
        };
        if over_quota {
            self.shared.gone.note(hashes[cached], Miss::Quota);
        }
        let counts = state.owners.counts(owner);
        counts.put_over_quota += if over_quota { refused as u64 } else { 0 };
        counts.put_blocks += new_blocks as u64;
        counts.put_bytes += (new_blocks * geometry.block_bytes()) as u64;
        counts.put_refused += refused as u64;
        counts.encoded += encoded;
        counts.not_encodable += not_encodable;
        counts.tier(Tier::Ram).encode_ns += filled.encode_ns;
        counts.tier(Tier::Ram).encoded_bytes += encoded * geometry.block_bytes() as u64;
        // A call costs more than all the rest of a small put.
        let work = state.has_work();
        drop(state);
        if work {
            self.shared.work.notify_all();
        }
        Ok(PutOutcome { tokens: cached * block_tokens, new_blocks })
    }
}

/// Slots with blocks in them, and how they are encoded.
struct Filled {
    places: Vec<(Slot, Option<Arc<Layout>>)>,
    not_encodable: u64,
    encode_ns: u64,
}

impl Filled {
    fn encoded(&self) -> u64 {
        self.places.iter().filter(|(_, layout)| layout.is_some()).count() as u64
    }
}

impl Shared {
    // Fills slots with the blocks of a sequence from one on. What cannot be encoded goes to another slot, as it is.
    fn fill(
        &self,
        owner: OwnerId,
        geometry: &Geometry,
        view: &KvView,
        layout: Option<Arc<Layout>>,
        slots: Vec<Slot>,
        (known, tokens): (usize, &[u32]),
    ) -> Filled {
        let copy = |n: usize, slot: Slot, layout: Option<&Layout>| {
            let first_token = (known + n) * geometry.block_tokens as usize;
            self.begin(geometry, layout, slot, first_token, tokens)
        };
        if view.is_on_device() {
            return self.fill_from_device(owner, geometry, view, layout, slots, (known, tokens));
        }
        let Some(layout) = layout else {
            let blocks: Vec<BlockCopy> = slots.iter().enumerate().map(|(n, &slot)| copy(n, slot, None)).collect();
            self.workers.copy(geometry, view, &blocks, Direction::Gather);
            let places = slots.into_iter().map(|slot| (slot, None)).collect();
            return Filled { places, not_encodable: 0, encode_ns: 0 };
        };
        let blocks: Vec<BlockCopy> = slots.iter().enumerate().map(|(n, &slot)| copy(n, slot, Some(&layout))).collect();
        let (fit, encode_ns) = encode_blocks(&self.workers, geometry, view, &layout, &blocks);
        let places = slots.into_iter().map(|slot| (slot, Some(layout.clone()))).collect();
        let mut filled = Filled { places, not_encodable: 0, encode_ns };
        let unfit: Vec<usize> = (0..fit.len()).filter(|&n| !fit[n]).collect();
        if unfit.is_empty() {
            return filled;
        }
        let plain = self.plain_slots(owner, geometry, &mut filled.places, unfit);
        let plain: Vec<BlockCopy> = plain.into_iter().map(|(n, slot)| copy(n, slot, None)).collect();
        filled.not_encodable = plain.len() as u64;
        self.workers.copy(geometry, view, &plain, Direction::Gather);
        filled
    }

    // The same from tensors on a device.
    fn fill_from_device(
        &self,
        owner: OwnerId,
        geometry: &Geometry,
        view: &KvView,
        layout: Option<Arc<Layout>>,
        slots: Vec<Slot>,
        (known, tokens): (usize, &[u32]),
    ) -> Filled {
        let first_token = |n: usize| (known + n) * geometry.block_tokens as usize;
        let gather = |layout: Option<&Arc<Layout>>, blocks: &[(usize, Slot)]| {
            let at: Vec<(Slot, usize)> = blocks
                .iter()
                .map(|&(n, slot)| {
                    self.begin(geometry, layout.map(|layout| &**layout), slot, first_token(n), tokens);
                    (slot, first_token(n))
                })
                .collect();
            if at.is_empty() { Ok(Vec::new()) } else { self.gather_on_device(geometry, view, layout, &at) }
        };
        let started = Instant::now();
        let all: Vec<(usize, Slot)> = slots.iter().copied().enumerate().collect();
        let fit = gather(layout.as_ref(), &all);
        let encode_ns = if layout.is_some() { started.elapsed().as_nanos() as u64 } else { 0 };
        let mut places: Vec<(Slot, Option<Arc<Layout>>)> =
            slots.into_iter().map(|slot| (slot, layout.clone())).collect();
        // Slots that the device may touch still are nobody's for good.
        let cut = |places: &mut Vec<(Slot, Option<Arc<Layout>>)>, n: usize, untouched: bool| {
            let mut state = self.state.lock();
            places.drain(n..).filter(|_| untouched).for_each(|(slot, _)| state.free(slot));
        };
        let fit = match fit {
            Ok(fit) => fit,
            Err(untouched) => {
                cut(&mut places, 0, untouched);
                return Filled { places, not_encodable: 0, encode_ns };
            }
        };
        let unfit = (0..fit.len()).filter(|&n| !fit[n]).collect();
        let mut plain = self.plain_slots(owner, geometry, &mut places, unfit);
        if let Err(untouched) = gather(None, &plain) {
            // What comes before the first of them is right.
            cut(&mut places, plain[0].0, untouched);
            plain.clear();
        }
        Filled { places, not_encodable: plain.len() as u64, encode_ns }
    }

    // Slots for blocks that could not be encoded, in the place of theirs, as long as there is room.
    fn plain_slots(
        &self,
        owner: OwnerId,
        geometry: &Geometry,
        places: &mut Vec<(Slot, Option<Arc<Layout>>)>,
        unfit: Vec<usize>,
    ) -> Vec<(usize, Slot)> {
        let mut state = self.state.lock();
        let mut plain = Vec::new();
        for n in unfit {
            state.free(places[n].0);
            let Some(slot) = state.allocate(owner, geometry.record_bytes(), true) else {
                // Without it nothing after it is found.
                places.drain(n..).skip(1).for_each(|(slot, _)| state.free(slot));
                break;
            };
            places[n] = (slot, None);
            plain.push((n, slot));
        }
        plain
    }

    // Writes what a slot has beside its payload: the tokens, and zeros behind it.
    fn begin(
        &self,
        geometry: &Geometry,
        layout: Option<&Layout>,
        slot: Slot,
        first_token: usize,
        tokens: &[u32],
    ) -> BlockCopy {
        let payload_bytes = layout.map_or_else(|| geometry.block_bytes(), |layout| layout.bytes_of(first_token == 0));
        let (payload_at, at) = (geometry.payload_offset(), self.arena.at(slot));
        // SAFETY: the slot was allocated for this put, for a payload of this form, and is not published: this thread alone
        // has it.
        let record = unsafe { std::slice::from_raw_parts_mut(at, geometry.record_bytes_of(payload_bytes)) };
        let ids = &tokens[first_token..first_token + geometry.block_tokens as usize];
        write_tokens(&mut record[RECORD_HEADER_BYTES..payload_at], ids);
        record[payload_at + payload_bytes..].fill(0);
        // SAFETY: the payload lies within the slot.
        BlockCopy { payload: unsafe { at.add(payload_at) }, first_token }
    }
}

impl State {
    // Slots for some blocks of a sequence. The first of a sequence may be longer than the others: it takes one that a plain
    // block fits, so that there are two sizes and no more.
    fn slots_for(
        &mut self,
        owner: OwnerId,
        geometry: &Geometry,
        layout: Option<&Layout>,
        blocks: Range<usize>,
    ) -> Vec<Slot> {
        let bytes =
            |first| layout.map_or_else(|| geometry.record_bytes(), |layout| layout.record_bytes(geometry, first));
        let mut slots = Vec::new();
        if blocks.is_empty() {
            return slots;
        }
        if blocks.start == 0 && bytes(true) != bytes(false) {
            slots = self.allocate_some(owner, geometry.record_bytes(), 1, true);
            if slots.is_empty() {
                return slots;
            }
        }
        let rest = self.allocate_some(owner, bytes(false), blocks.len() - slots.len(), true);
        slots.extend(rest);
        slots
    }

    // Makes blocks findable whose bytes are complete; gives the slots of those back that others have put meanwhile.
    // Returns how many of the blocks are cached now, and how many of them are new.
    pub(super) fn publish(
        &mut self,
        model: &Model,
        namespace: &Namespace,
        mut parent: Option<NodeId>,
        hashes: &[BlockHash],
        slots: Vec<(Slot, Option<Arc<Layout>>)>,
    ) -> (usize, usize) {
        let mut cached = 0;
        let mut attached = parent.is_none_or(|p| self.nodes.is_linked(p)) && self.models.contains_key(&model.id);
        attached &= model.serves() && !namespace.is_dropped();
        // Matches tell what was found; this is what was not.
        let order = &mut self.ram.leaving(model.id).order;
        hashes.iter().rev().for_each(|&hash| order.asked(tag(hash)));
        order.choose();
        if let Some(books) = self.models.get_mut(&model.id) {
            books.asked(hashes.iter().rev().map(|&hash| tag(hash)));
        }
        if let Some(known) = parent.filter(|_| attached) {
            self.touch(known, 0, false);
        }
        let (now, now_s, seed) = (self.tick(), unix_s(), namespace.hasher.seed());
        let mut placed = Vec::with_capacity(slots.len());
        for (&hash, (slot, layout)) in hashes.iter().zip(slots) {
            match if attached { self.nodes.insert(parent, hash, (model.id, namespace.owner), seed) } else { None } {
                Some(id) => placed.push((id, slot, layout)),
                None => self.free(slot),
            }
            parent = self.nodes.find(hash);
            attached &= parent.is_some();
            cached += usize::from(attached);
        }
        // From the end to the start, as paths are touched.
        let ids: Vec<NodeId> = placed.iter().map(|&(id, ..)| id).collect();
        for (id, slot, layout) in placed.into_iter().rev() {
            let node = &mut self.nodes[id];
            (node.last_use, node.since_s, node.used_s) = (now, now_s, now_s);
            self.place_in_ram(id, slot, layout);
        }
        if let Some(&last) = ids.last() {
            self.log.note_use(self.nodes.hash(last), 0);
        }
        if self.ssd_capacity_bytes > 0 && self.policy != WritePolicy::WriteThroughSecondTouch {
            ids.iter().for_each(|&id| self.enqueue_dirty(id));
        }
        (cached, ids.len())
    }
}
