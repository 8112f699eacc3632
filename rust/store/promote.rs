//! Promotion of blocks that only the SSD has: read into slots of RAM, and checked as in a load.
//!
//! Ahead of a load, if it is asked for. And where a segment leaves: what was asked for since it was written is written
//! again, from RAM: FIFO with reinsertion, as in CacheLib's block cache (Berg et al., OSDI 2020).

use super::behind::Kind;
use super::nodes::NodeId;
use super::quota::Taker;
use super::state::{Disk, State};
use super::{Lease, Shared};
use crate::error::Result;
use crate::pool::Slot;
use crate::ssd::queue::{Part, Transfer};
use crate::ssd::record::read_record;
use crate::ssd::{ModelFile, Place};
use crate::stats::{Lifter, Miss, Tier};
use crate::sync::Arc;
use std::collections::BTreeSet;

/// One byte is written again for so many that are new: in the long run 1.125 are written for each.
const REINSERTED_SHARE: u64 = 8;

/// Blocks on their way to RAM.
pub(super) struct Promotion {
    model: u32,
    file: Arc<ModelFile>,
    /// Held meanwhile.
    held: Vec<NodeId>,
    blocks: Vec<Promoted>,
    /// Who had them brought up ahead of a request.
    lifter: Option<Lifter>,
}

struct Promoted {
    id: NodeId,
    place: Place,
    epoch: u64,
    slot: Slot,
}

impl Disk {
    /// Notes that a record was written, for the first time or `again`.
    pub(super) fn wrote(&mut self, bytes: u64, again: bool) {
        self.spare_bytes = match again {
            true => self.spare_bytes.saturating_sub(bytes),
            // What is warm may lie in one segment; of that half may stay.
            false => (self.spare_bytes + bytes / REINSERTED_SHARE).min(self.file.layout.segment_bytes / 2),
        };
    }
}

impl State {
    /// What of a segment is to be written again: blocks that were asked for since it was written, those first that were so
    /// last and parents before children, as far as there are bytes to spare; and what is reserved for tenants.
    pub(super) fn warm_blocks(&self, model: u32, index: u32) -> Vec<NodeId> {
        let Some(disk) = self.models.get(&model).and_then(|m| m.disk.as_ref()) else { return Vec::new() };
        let blocks = disk.segments[index as usize].blocks.iter().filter_map(|&hash| self.nodes.find(hash));
        let here = |id: &NodeId| self.nodes[*id].ssd.is_some_and(|p| p.segment == index);
        let all: Vec<NodeId> = blocks.filter(here).collect();
        // What is above a soft quota has no second life.
        let lent = |id: NodeId| self.has_lent(self.owners.tenant_id(self.nodes[id].owner), Tier::Ssd);
        let mut warm: Vec<NodeId> = all.iter().copied().filter(|&id| self.nodes[id].warm && !lent(id)).collect();
        warm.sort_by_key(|&id| (std::cmp::Reverse(self.nodes[id].last_use), self.nodes.depth(id)));
        let mut bytes = 0;
        warm.retain(|&id| {
            bytes += self.nodes[id].ssd.map_or(0, |place| place.bytes());
            bytes <= disk.spare_bytes
        });
        let reserved = self.reserved_of(&all, Tier::Ssd, Taker::Model);
        if !reserved.is_empty() {
            warm = warm.into_iter().chain(reserved).collect::<BTreeSet<_>>().into_iter().collect();
        }
        warm.sort_by_key(|&id| self.nodes.depth(id));
        warm
    }

    /// Slots for the warm blocks of a segment that are on SSD alone; `None`: there are none, or no slots. Once for each life
    /// of a segment: what finds no slot now goes with it.
    pub(super) fn rescue(&mut self, model: u32, index: u32) -> Option<Promotion> {
        let segment = self.segment(model, index)?;
        if std::mem::replace(&mut segment.rescued, true) {
            return None;
        }
        let warm = self.warm_blocks(model, index);
        self.promotion(model, &warm, None)
    }

    /// Slots for those of these blocks that are on SSD alone, as far as RAM has room that costs nothing it alone has.
    pub(super) fn promotion(&mut self, model: u32, ids: &[NodeId], lifter: Option<Lifter>) -> Option<Promotion> {
        let below = ids.iter().copied().filter(|&id| self.nodes[id].ram.is_none() && self.nodes[id].ssd.is_some());
        let below: Vec<NodeId> = below.collect();
        // Held, so that room made for one does not take another away.
        let held = self.nodes.lease(&below).to_vec();
        let mut blocks = Vec::new();
        for &id in &held {
            let Some(place) = self.nodes[id].ssd else { continue };
            let Some(epoch) = self.segment(model, place.segment).map(|segment| segment.epoch) else { continue };
            let Some(slot) = self.allocate(self.nodes[id].owner, place.bytes() as usize, false) else { break };
            blocks.push(Promoted { id, place, epoch, slot });
        }
        let file = self.models.get(&model).and_then(|m| Some(m.disk.as_ref()?.file.clone()));
        match file.filter(|_| !blocks.is_empty()) {
            Some(file) => Some(Promotion { model, file, held, blocks, lifter }),
            None => {
                self.nodes.release(&held);
                None
            }
        }
    }
}

impl Shared {
    /// Reads records into their slots, checks them, and books what came of it; returns the bytes that came to RAM.
    pub(super) fn promote(&self, promotion: Promotion) -> u64 {
        let Promotion { model, file, held, blocks, lifter } = promotion;
        let geometry = file.geometry();
        let begun = self.behind.begin();
        let mut queue = file.queue();
        for (tag, Promoted { place, slot, .. }) in blocks.iter().enumerate() {
            let parts = vec![Part { at: self.arena.at(*slot), bytes: place.bytes() as usize }];
            let transfer = Transfer { tag, write: false, parts, offset: file.offset_of(*place) };
            // SAFETY: the slot is this promotion's alone until it is booked, after the queue is gone.
            unsafe { queue.push(transfer) };
        }
        let mut read: Vec<std::io::Result<usize>> = blocks.iter().map(|_| Ok(0)).collect();
        while let Some(done) = queue.pop() {
            read[done.tag] = done.result;
        }
        drop(queue);
        let checked = blocks.iter().zip(&read).map(|(Promoted { place, epoch, slot, .. }, read)| {
            let bytes = read.as_ref().map_err(|_| Miss::Io)?;
            // SAFETY: so many bytes of the slot were read, and nobody writes them any more.
            let record = unsafe { std::slice::from_raw_parts(self.arena.at(*slot).cast_const(), *bytes) };
            let (block, form) = read_record(record, &geometry, &file.identity(*epoch)).ok_or(Miss::Corrupt)?;
            let whole = *bytes as u64 == place.bytes() && *bytes == geometry.record_bytes_of(form.payload_bytes);
            let layout = form.scheme.map(|_| file.layout_of(&form, block.depth).ok_or(Miss::Corrupt)).transpose()?;
            if whole { Ok((block.hash, layout)) } else { Err(Miss::Corrupt) }
        });
        let checked: Vec<std::result::Result<_, Miss>> = checked.collect();
        let mut state = self.state.lock();
        let (mut came, mut names) = (0, Vec::new());
        for ((Promoted { id, place, slot, .. }, checked), read) in blocks.into_iter().zip(checked).zip(read) {
            state.counts(model).tier(Tier::Ssd).read_bytes += read.unwrap_or(0) as u64;
            let here = state.nodes.is_linked(id) && state.nodes[id].ssd == Some(place);
            let right = checked.and_then(|(hash, layout)| {
                if here && hash != self.secret.seal(state.nodes.hash(id)) { Err(Miss::Corrupt) } else { Ok(layout) }
            });
            match right {
                Ok(layout) if here && state.nodes[id].ram.is_none() => {
                    state.place_in_ram(id, slot, layout);
                    state.counts_of(id).promoted += 1;
                    state.lifted(id, lifter);
                    came += state.held(id)[Tier::Ram as usize].unwrap_or(0);
                    if begun.is_some() {
                        names.push(self.secret.seal(state.nodes.hash(id)));
                    }
                    continue;
                }
                Err(miss) if here => {
                    let counts = state.counts(model);
                    counts.corrupt += u64::from(miss == Miss::Corrupt);
                    counts.io_errors += u64::from(miss == Miss::Io);
                    state.drop_subtree(id, miss);
                }
                _ => {}
            }
            state.free(slot);
        }
        state.nodes.release(&held);
        self.behind.end(begun, Kind::Promote, model, names.into_iter(), came);
        came
    }
}

impl Lease {
    /// Reads into RAM what of the match is on SSD alone, as far as there is room for it beside what RAM alone has, and up to
    /// half of RAM: a load that follows finds it there. Returns how many blocks are in RAM then, from the first on. What
    /// cannot be read is dropped, and counted.
    ///
    /// # Errors
    /// The store is closed.
    pub fn prefetch(&self) -> Result<usize> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        let model = self.model.id;
        let matched = self.hashes[..self.blocks()].iter().map_while(|&hash| state.nodes.find(hash));
        let mut left = state.ram_bytes / 2;
        let fits = |id: &NodeId| {
            let bytes = if state.nodes[*id].ram.is_some() { 0 } else { state.nodes[*id].ssd.map_or(0, |p| p.bytes()) };
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            fits
        };
        let matched: Vec<NodeId> = matched.take_while(fits).collect();
        let promotion = if state.models.contains_key(&model) { state.promotion(model, &matched, None) } else { None };
        drop(state);
        if let Some(promotion) = promotion {
            self.shared.promote(promotion);
        }
        Ok(self.places().iter().take_while(|&&tier| tier == Tier::Ram).count())
    }
}
