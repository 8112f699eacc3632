//! Room on the SSD: what leaves when a cap is full.
//!
//! The books never run ahead of the disk. What leaves is unfindable at once, but counts until its disk blocks went back:
//! choose under the lock, give back without it, book the outcome, ask again. So the cap holds at every instant, and a
//! step that fails loses nothing but time.
//!
//! A model's own segments leave in the order in which they were written. What was asked for since is written again, from
//! RAM, to which it is promoted first; of one that leaves for another model nothing is.
//!
//! A model below its share takes from files of unregistered models, then from models above theirs, then its own. One that
//! is not takes from those above theirs whose turn is before its own, then its own, then as the former. Nobody comes below
//! its share for another.

use super::Shared;
use super::nodes::NodeId;
use super::promote::Promotion;
use super::quota::Taker;
use super::state::{Disk, FILE_HEAD_BYTES, State};
use crate::error::{Error, Result};
use crate::ssd::{MAX_SEGMENTS, ModelFile, Phase, Segment, Ssd};
use crate::stats::Tier;
use crate::sync::Arc;
use std::path::PathBuf;

/// How a model comes to a segment.
pub(super) enum Room {
    /// There is room: in this one of its own segments, whose blocks are forgotten, or else in a new one.
    Here(Option<u32>),
    /// These have to be promoted first.
    Rescue(Promotion),
    /// This has to leave first.
    After(Leaver),
    /// Leased blocks hold every byte.
    Nowhere,
}

/// What leaves the disk.
pub(super) enum Leaver {
    /// A segment of a model.
    Segment(u32, Arc<ModelFile>, u32),
    /// A file of an unregistered model, but for so many bytes.
    File(PathBuf, u64),
}

impl State {
    /// Finds room for one more segment of a model.
    pub(super) fn room_for_segment(&mut self, model: u32) -> Room {
        let Some(disk) = self.models.get(&model).and_then(|m| m.disk.as_ref()) else { return Room::Nowhere };
        let need = disk.file.layout.segment_bytes;
        let below_share = disk.file_bytes() + need <= self.share(Tier::Ssd, model);
        let full = self.is_file_full(model)
            || disk.segments.iter().all(|s| s.phase != Phase::Empty) && disk.segments.len() as u64 >= MAX_SEGMENTS;
        let over = (self.ssd_file_bytes() + need).saturating_sub(self.ssd_capacity_bytes);
        if over == 0 && !full {
            return Room::Here(None);
        }
        let others = |state: &mut Self, at_any_turn: bool| {
            let before = |id: u32| at_any_turn || state.turn(id) < state.turn(model);
            let givers = state.payers_on_ssd().into_iter();
            let givers = givers.filter(|&(id, spare)| id != model && spare && before(id));
            let givers: Vec<u32> = givers.map(|(id, _)| id).collect();
            state.segment_of_any(givers, Taker::Model)
        };
        if below_share
            && !full
            && let Some(leaver) = self.absent_file(over).or_else(|| others(self, true))
        {
            return Room::After(leaver);
        }
        if !below_share
            && !full
            && let Some(leaver) = others(self, false)
        {
            return Room::After(leaver);
        }
        // More is counted than there may be, since a disk did not take back what was empty when the store was opened: to
        // fill that would pass the cap.
        if self.ssd_file_bytes() > self.ssd_capacity_bytes {
            return self.segment_of_any(vec![model], Taker::Model).map_or(Room::Nowhere, Room::After);
        }
        if let Some(index) = self.oldest_segment(model, None) {
            if let Some(rescue) = self.rescue(model, index) {
                return Room::Rescue(rescue);
            }
            let warm = self.warm_blocks(model, index);
            self.clear_segment(model, index);
            // Parents first; what is not in RAM is gone.
            let warm: Vec<NodeId> = warm.into_iter().filter(|&id| self.nodes.is_linked(id)).collect();
            warm.into_iter().rev().for_each(|id| self.enqueue_again(id));
            return Room::Here(Some(index));
        }
        if full {
            // What others give is of no use.
            return Room::Nowhere;
        }
        others(self, true).or_else(|| self.absent_file(over)).map_or(Room::Nowhere, Room::After)
    }

    /// Opens a segment where there is room.
    pub(super) fn open_segment(&mut self, model: u32, reused: Option<u32>) -> Option<u32> {
        let disk = self.models.get_mut(&model)?.disk.as_mut()?;
        let vacant = || disk.segments.iter().position(|s| s.phase == Phase::Empty).map(|i| i as u32);
        let index = reused.or_else(vacant).unwrap_or(disk.segments.len() as u32);
        if index as usize == disk.segments.len() {
            disk.segments.push(Segment::empty());
        }
        disk.last_epoch += 1;
        disk.segments[index as usize].start(disk.last_epoch);
        Some(index)
    }

    // Models with a file, in the order in which they make room: those that stay at their shares without a segment, by their
    // turns, then the others. And which are of the former.
    fn payers_on_ssd(&self) -> Vec<(u32, bool)> {
        let above = |id: u32, disk: &Disk| disk.file_bytes() as i64 - self.share(Tier::Ssd, id) as i64;
        let disks = self.models.iter().filter_map(|(&id, m)| Some((id, m.disk.as_ref()?)));
        let mut models: Vec<_> = disks
            .map(|(id, disk)| (id, above(id, disk), above(id, disk) >= disk.file.layout.segment_bytes as i64))
            .collect();
        models.sort_by_key(|&(id, above, spare)| (!spare, self.turn(id), std::cmp::Reverse(above), id));
        models.into_iter().map(|(id, _, spare)| (id, spare)).collect()
    }

    // The oldest segment of the first of these models that can spare one.
    fn segment_of_any(&mut self, models: Vec<u32>, taker: Taker) -> Option<Leaver> {
        let (model, index) = models.into_iter().find_map(|id| Some((id, self.oldest_segment(id, Some(taker))?)))?;
        self.clear_segment(model, index);
        let disk = self.models.get_mut(&model)?.disk.as_mut()?;
        disk.segments[index as usize] = Segment { phase: Phase::Leaving, ..Segment::empty() };
        Some(Leaver::Segment(model, disk.file.clone(), index))
    }

    /// A segment of a model whose file is longer than it may be.
    pub(super) fn beyond_file_quota(&mut self) -> Option<(u32, Leaver)> {
        self.above_file_quota().into_iter().find_map(|id| Some((id, self.segment_of_any(vec![id], Taker::Quota)?)))
    }

    // The oldest file of an unregistered model, made smaller by `need`.
    fn absent_file(&self, need: u64) -> Option<Leaver> {
        let stale = self.stale.iter().find(|s| s.bytes > 0)?;
        // What would be little more than its head goes as a whole.
        let keep = stale.bytes.saturating_sub(need);
        let keep = if stale.unwanted || keep < 4 * FILE_HEAD_BYTES { 0 } else { keep };
        Some(Leaver::File(stale.path.clone(), keep))
    }

    // The segment written longest ago in which no block is leased, and to which nothing is being written. Nothing that is
    // reserved for a tenant leaves with it. If it leaves for a `taker`, it has none of that; else at most half of it is, and
    // is in RAM, too, or can be brought there: the other half is what is gained.
    fn oldest_segment(&self, model: u32, taker: Option<Taker>) -> Option<u32> {
        let disk = self.models.get(&model)?.disk.as_ref()?;
        let writing = |i: &u32| self.writing.as_ref().is_some_and(|w| w.model == model && w.segments.contains(i));
        let gone = |i: &u32| matches!(disk.segments[*i as usize].phase, Phase::Empty | Phase::Leaving);
        let mut held: Vec<_> = (0..disk.segments.len() as u32).filter(|i| !gone(i) && !writing(i)).collect();
        held.sort_by_key(|&i| disk.segments[i as usize].epoch);
        let blocks = |i: u32| disk.segments[i as usize].blocks.iter().filter_map(|&hash| self.nodes.find(hash));
        let segment_bytes = disk.file.layout.segment_bytes;
        held.into_iter().find(|&i| {
            let ids: Vec<NodeId> = blocks(i).filter(|&id| self.nodes[id].ssd.is_some_and(|p| p.segment == i)).collect();
            let reserved = self.reserved_of(&ids, Tier::Ssd, taker.unwrap_or(Taker::Model));
            let bytes: u64 = reserved.iter().filter_map(|&id| self.held(id)[Tier::Ssd as usize]).sum();
            let rescued =
                || !disk.segments[i as usize].rescued || reserved.iter().all(|&id| self.nodes[id].ram.is_some());
            let may_go = reserved.is_empty() || taker.is_none() && 2 * bytes <= segment_bytes && rescued();
            may_go && !self.nodes.are_held(ids, &[])
        })
    }

    // Forgets every block whose bytes lie there.
    fn clear_segment(&mut self, model: u32, index: u32) {
        let Some(segment) = self.segment(model, index) else { return };
        for hash in std::mem::take(&mut segment.blocks) {
            let Some(id) = self.nodes.find(hash) else { continue };
            if self.nodes[id].ssd.is_none_or(|p| p.segment != index) {
                continue;
            }
            self.leave_ssd(id);
        }
    }
}

impl Shared {
    /// Gives disk blocks back, and books what came of it. Where a file leaves, the caller holds the registration lock.
    fn give_back(&self, leaver: &Leaver) -> std::io::Result<()> {
        match leaver {
            Leaver::Segment(model, file, index) => {
                let punched = file.punch(*index);
                if let Some(segment) = self.state.lock().segment(*model, *index) {
                    // What could not be given back counts, and is the first that is tried again.
                    segment.phase = if punched.is_ok() { Phase::Empty } else { Phase::Retired };
                }
                punched
            }
            Leaver::File(path, keep) => {
                let left = self.ssd.as_ref().map_or(Ok(0), |ssd| ssd.shrink(path, *keep))?;
                let mut state = self.state.lock();
                state.stale.iter_mut().filter(|s| &s.path == path).for_each(|s| s.bytes = left);
                state.stale.retain(|s| s.bytes > 0);
                Ok(())
            }
        }
    }

    /// Gives disk blocks back in the demotion thread, which may have to wait for a registration.
    pub(super) fn give_way(&self, leaver: &Leaver) -> std::io::Result<()> {
        let Leaver::File(path, _) = leaver else { return self.give_back(leaver) };
        let _registration = self.registration.lock();
        // A model that came back meanwhile keeps its file; there may be other room.
        let absent = self.state.lock().stale.iter().any(|s| &s.path == path);
        if absent { self.give_back(leaver) } else { Ok(()) }
    }

    /// Makes room for `need` bytes more of files, in the thread of a registration, which holds that lock. Segments of
    /// any model go, then files of unregistered ones. What cannot be freed is counted, and shows in the status.
    pub(super) fn make_room(&self, need: u64) {
        loop {
            let mut state = self.state.lock();
            let over = (state.ssd_file_bytes() + need).saturating_sub(state.ssd_capacity_bytes);
            if self.ssd.is_none() || over == 0 {
                return;
            }
            let models = state.payers_on_ssd().into_iter().map(|(id, _)| id).collect();
            let Some(leaver) = state.segment_of_any(models, Taker::Model).or_else(|| state.absent_file(over)) else {
                return;
            };
            drop(state);
            if self.give_back(&leaver).is_err() {
                let mut state = self.state.lock();
                match leaver {
                    Leaver::Segment(model, ..) => state.counts(model).io_errors += 1,
                    Leaver::File(..) => state.owners.retired.io_errors += 1,
                }
                return;
            }
        }
    }
}

/// A cap that was lowered while the store was closed holds from the start.
pub(super) fn fit_stale_files(state: &mut State, ssd: &Ssd) -> Result<()> {
    for at in 0..state.stale.len() {
        let over = state.ssd_file_bytes().saturating_sub(state.ssd_capacity_bytes);
        if over == 0 {
            break;
        }
        let stale = &mut state.stale[at];
        let keep = stale.bytes.saturating_sub(over);
        let shrunk = ssd.shrink(&stale.path, keep);
        stale.bytes = shrunk.map_err(|e| Error::io(format!("cannot shrink {}", stale.path.display()), e))?;
    }
    Ok(())
}
