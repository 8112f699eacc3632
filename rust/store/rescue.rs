//! What stays of a segment that leaves: blocks that were asked for since it was written.
//!
//! Those that RAM has are written again from there. Those that only the segment has are read into slots first, checked as
//! in a load, and are blocks of RAM like any other from then on: FIFO with reinsertion, as in CacheLib's block cache
//! (Berg et al., OSDI 2020).

use super::Shared;
use super::nodes::NodeId;
use super::state::{Disk, State};
use crate::pool::Slot;
use crate::ssd::queue::{Part, Transfer};
use crate::ssd::record::read_record;
use crate::ssd::{ModelFile, Place};
use crate::stats::Miss;
use crate::sync::Arc;

/// One byte is written again for so many that are new: in the long run 1.125 are written for each.
const REINSERTED_SHARE: u64 = 8;

/// Blocks that are brought up to RAM, to be written again when their segment is gone.
pub(super) struct Rescue {
    model: u32,
    file: Arc<ModelFile>,
    epoch: u64,
    /// Held meanwhile.
    held: Vec<NodeId>,
    blocks: Vec<(NodeId, Place, Slot)>,
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
    /// last and parents before children, as far as there are bytes to spare.
    pub(super) fn warm_blocks(&self, model: u32, index: u32) -> Vec<NodeId> {
        let Some(disk) = self.models.get(&model).and_then(|m| m.disk.as_ref()) else { return Vec::new() };
        let here = |id: &NodeId| self.nodes[*id].warm && self.nodes[*id].ssd.is_some_and(|p| p.segment == index);
        let blocks = disk.segments[index as usize].blocks.iter().filter_map(|&hash| self.nodes.find(hash));
        let mut warm: Vec<NodeId> = blocks.filter(here).collect();
        warm.sort_by_key(|&id| (std::cmp::Reverse(self.nodes[id].last_use), self.nodes.depth(id)));
        let mut bytes = 0;
        warm.retain(|&id| {
            bytes += self.nodes[id].ssd.map_or(0, |place| place.bytes());
            bytes <= disk.spare_bytes
        });
        warm.sort_by_key(|&id| self.nodes.depth(id));
        warm
    }

    /// Slots for the warm blocks of a segment that are on SSD alone; `None`: there are none, or no slots. Once for each life
    /// of a segment: what finds no slot now goes with it.
    pub(super) fn rescue(&mut self, model: u32, index: u32) -> Option<Rescue> {
        let segment = self.segment(model, index)?;
        let (epoch, rescued) = (segment.epoch, std::mem::replace(&mut segment.rescued, true));
        if rescued {
            return None;
        }
        let below = |state: &Self, id: &NodeId| state.nodes[*id].ram.is_none();
        let warm: Vec<NodeId> = self.warm_blocks(model, index).into_iter().filter(|id| below(self, id)).collect();
        // Held, so that room made for one does not take another away.
        let held = self.nodes.lease(&warm).to_vec();
        let mut blocks = Vec::new();
        for &id in &held {
            let Some(place) = self.nodes[id].ssd else { continue };
            let Some(slot) = self.allocate(model, place.bytes() as usize, false) else { break };
            blocks.push((id, place, slot));
        }
        if blocks.is_empty() {
            self.nodes.release(&held);
            return None;
        }
        let file = self.models.get(&model)?.disk.as_ref()?.file.clone();
        Some(Rescue { model, file, epoch, held, blocks })
    }
}

impl Shared {
    /// Reads the records of blocks that are to stay into their slots, checks them, and books what came of it.
    pub(super) fn bring_up(&self, rescue: Rescue) {
        let geometry = rescue.file.geometry();
        let mut queue = rescue.file.queue();
        for (tag, (_, place, slot)) in rescue.blocks.iter().enumerate() {
            let parts = vec![Part { at: self.arena.at(*slot), bytes: place.bytes() as usize }];
            let transfer = Transfer { tag, write: false, parts, offset: rescue.file.offset_of(*place) };
            // SAFETY: the slot is this rescue's alone until it is booked, after the queue is gone.
            unsafe { queue.push(transfer) };
        }
        let mut read: Vec<std::io::Result<usize>> = rescue.blocks.iter().map(|_| Ok(0)).collect();
        while let Some(done) = queue.pop() {
            read[done.tag] = done.result;
        }
        drop(queue);
        let checked = rescue.blocks.iter().zip(&read).map(|((_, place, slot), read)| {
            let bytes = read.as_ref().map_err(|_| Miss::Io)?;
            // SAFETY: so many bytes of the slot were read, and nobody writes them any more.
            let record = unsafe { std::slice::from_raw_parts(self.arena.at(*slot).cast_const(), *bytes) };
            let (block, form) =
                read_record(record, &geometry, &rescue.file.identity(rescue.epoch)).ok_or(Miss::Corrupt)?;
            let whole = *bytes as u64 == place.bytes() && *bytes == geometry.record_bytes_of(form.payload_bytes);
            let layout =
                form.scheme.map(|_| rescue.file.layout_of(&form, block.depth).ok_or(Miss::Corrupt)).transpose()?;
            if whole { Ok((block.hash, layout)) } else { Err(Miss::Corrupt) }
        });
        let checked: Vec<std::result::Result<_, Miss>> = checked.collect();
        let mut state = self.state.lock();
        for ((id, place, slot), checked) in rescue.blocks.into_iter().zip(checked) {
            let here = state.nodes.is_linked(id) && state.nodes[id].ssd == Some(place);
            let right = checked.and_then(|(hash, layout)| {
                if here && hash != self.secret.seal(state.nodes.hash(id)) { Err(Miss::Corrupt) } else { Ok(layout) }
            });
            match right {
                Ok(layout) if here && state.nodes[id].ram.is_none() => {
                    state.place_in_ram(id, slot, layout);
                    continue;
                }
                Err(miss) if here => {
                    let counts = state.counts(rescue.model);
                    counts.corrupt += u64::from(miss == Miss::Corrupt);
                    counts.io_errors += u64::from(miss == Miss::Io);
                    state.drop_subtree(id);
                }
                _ => {}
            }
            state.ram.pool.free(slot);
        }
        state.nodes.release(&rescue.held);
    }
}
