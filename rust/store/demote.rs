//! Demotion: one thread writes blocks from RAM to SSD, behind the requests.
//!
//! Blocks are taken in the order in which they were put, parents before children, and written from their slots in runs
//! to the open segment. A block stays in RAM, held, while it is written; afterwards it is *clean* and may leave RAM at
//! once. With `write_back` the thread keeps a quarter of RAM clean or free, with `write_through` everything. Nothing
//! waits for it: a block that has to leave RAM before its turn is lost, and counted.
//!
//! The same thread takes back what a model or tenant has beyond a quota that was lowered, once its blocks are on SSD.

use super::behind::Kind;
use super::nodes::NodeId;
use super::owners::OwnerId;
use super::promote::Promotion;
use super::room::{Leaver, Room};
use super::state::{ModelState, State, Writing};
use super::write::{Encoding, Written};
use super::{Shared, WritePolicy};
use crate::block::Geometry;
use crate::codec::Layout;
use crate::pool::{Pool, Slot};
use crate::ssd::record::{Entry, PAGE, RecordIdentity};
use crate::ssd::{ModelFile, Phase, Place, Segment};
use crate::stats::Tier;
use crate::sync::{Arc, Guard};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// A run is at most this long, unless one record is longer.
const RUN_BYTES: usize = 32 << 20;
/// A disk that takes no writes is asked again after this long.
const RETRY: Duration = Duration::from_secs(5);

/// Records to write to one place, all of one model.
pub(super) struct Run {
    model: u32,
    pub(super) file: Arc<ModelFile>,
    pub(super) geometry: Geometry,
    /// Of the first record; with room for all of them as they are.
    pub(super) place: Place,
    pub(super) epoch: u64,
    /// How those are encoded that are not yet.
    pub(super) layout: Option<Arc<Layout>>,
    pub(super) blocks: Vec<Block>,
    /// Whether the segment is new.
    pub(super) opening: bool,
    /// Set when the run fills the segment before it: its footer.
    pub(super) sealing: Option<Footer>,
}

/// One record to write.
pub(super) struct Block {
    node: NodeId,
    pub(super) slot: Slot,
    /// How it is encoded already.
    pub(super) layout: Option<Arc<Layout>>,
    pub(super) identity: RecordIdentity,
    ticket: u64,
    /// Whose it is, and what is booked for it while it is written.
    owner: OwnerId,
    bytes: u64,
}

impl Run {
    fn writing(&self) -> Writing {
        Writing {
            model: self.model,
            segments: self.sealing.iter().map(|footer| footer.segment).chain([self.place.segment]).collect(),
            blocks: self.blocks.iter().map(|b| b.node).collect(),
            oldest: self.blocks.first().map_or(0, |b| b.ticket),
        }
    }
}

/// What demotion does after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// The next one.
    Busy,
    /// Nothing, for a while.
    Nap,
    /// Nothing, until there is work.
    Rest,
}

/// What the demotion thread does next for a model.
enum Next {
    Write(Run),
    MakeRoom(Leaver),
    Promote(Promotion),
    /// The block at hand stays in RAM alone.
    Skip,
}

/// The spans of RAM that a run may hold blocks of: all but one, which another model may need.
struct Spans {
    held: BTreeSet<usize>,
    most: usize,
}

impl Spans {
    // Whether a slot of a span may be held.
    fn take(&mut self, pool: &Pool, slot: Slot) -> bool {
        let span = pool.span_of(slot);
        self.held.contains(&span) || self.held.len() < self.most && self.held.insert(span)
    }
}

/// A segment's footer, ready to be written.
pub(super) struct Footer {
    pub(super) file: Arc<ModelFile>,
    pub(super) segment: u32,
    pub(super) epoch: u64,
    pub(super) entries: Vec<Entry>,
}

impl Footer {
    pub(super) fn write(&self) -> std::io::Result<()> {
        self.file.write_footer(self.segment, self.epoch, &self.entries)
    }
}

impl Shared {
    /// Body of the demotion thread. Should it panic, the SSD takes no more writes and says so; serving goes on.
    pub(super) fn demote(&self) {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.demote_until_closed()));
        if ended.is_err() {
            let mut state = self.state.lock();
            let held = state.writing.take().map_or_else(Vec::new, |w| w.blocks);
            state.nodes.release(&held);
            state.ssd_read_only = Some(("the demotion thread panicked".into(), Instant::now()));
            self.idle.notify_all();
        }
    }

    fn demote_until_closed(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let (then, pace) = self.step(state);
            state = match pace {
                Pace::Busy => then,
                Pace::Nap => self.work.wait_timeout(then, RETRY),
                Pace::Rest => self.work.wait(then),
            };
        }
    }

    /// One step of demotion: at most one run is written, one promotion done or one leaver given back.
    pub(super) fn step<'a>(&'a self, mut state: Guard<'a, State>) -> (Guard<'a, State>, Pace) {
        state.catch_up(&self.touched);
        if state.shrink_one() {
            // Requests come first.
            drop(state);
            return (self.state.lock(), Pace::Busy);
        }
        if let Some(since) = state.ssd_read_only.as_ref().map(|(_, since)| *since) {
            self.idle.notify_all();
            if since.elapsed() < RETRY {
                return (state, Pace::Nap);
            }
            state.ssd_read_only = None;
        }
        if let Some((model, leaver)) = state.beyond_file_quota() {
            drop(state);
            let made = self.give_way(&leaver);
            state = self.state.lock();
            if let Err(error) = made {
                fail(&mut state, model, &error);
            }
            return (state, Pace::Busy);
        }
        let Some(model) = state.model_to_demote() else {
            self.idle.notify_all();
            // What is still held today may be free later, and nobody calls for that.
            let takers = state.takers();
            let shrinking = state.models.keys().any(|&id| state.has_to_give(id, &takers)) || state.is_ssd_above_quota();
            return (state, if shrinking { Pace::Nap } else { Pace::Rest });
        };
        match self.next(&mut state, model) {
            Next::Write(run) => {
                state.writing = Some(run.writing());
                drop(state);
                let begun = self.behind.begin();
                let outcome = match self.write(&run) {
                    Ok((records, encode_ns)) => {
                        let names = run.blocks.iter().map(|block| block.identity.hash);
                        self.behind.end(begun, Kind::Demote, model, names, records.iter().map(|r| r.bytes).sum());
                        Outcome::Written { records, encode_ns }
                    }
                    // What a failed opening has reserved goes back, so that the books agree with the disk.
                    Err(error) => {
                        let vacant = run.opening && run.file.punch(run.place.segment).is_ok();
                        Outcome::Failed { error, vacant }
                    }
                };
                state = self.state.lock();
                commit(&mut state, run, outcome);
            }
            Next::MakeRoom(leaver) => {
                drop(state);
                let made = self.give_way(&leaver);
                state = self.state.lock();
                if let Err(error) = made {
                    fail(&mut state, model, &error);
                }
            }
            Next::Promote(rescue) => {
                drop(state);
                self.promote(rescue);
                state = self.state.lock();
            }
            Next::Skip => {}
        }
        if state.flushing > 0 {
            self.idle.notify_all();
        }
        (state, Pace::Busy)
    }

    fn next(&self, state: &mut State, model: u32) -> Next {
        let Some((first, ticket)) = next_dirty(state, model) else { return Next::Skip };
        let bytes = state.models.get(&model).map_or(0, |m| m.geometry.record_bytes());
        if let Some(index) = open_place(state, model, bytes) {
            return self.run(state, model, (first, ticket), index, false).map_or(Next::Skip, Next::Write);
        }
        // Held meanwhile, and so all that it continues: what gives way for it must not be that.
        let held = state.nodes.lease(&[first]).to_vec();
        let room = state.room_for_segment(model);
        state.nodes.release(&held);
        match room {
            Room::Here(reused) => {
                let Some(index) = state.open_segment(model, reused) else { return Next::Skip };
                self.run(state, model, (first, ticket), index, true).map_or(Next::Skip, Next::Write)
            }
            Room::After(leaver) => {
                state.requeue_dirty(first, ticket);
                Next::MakeRoom(leaver)
            }
            Room::Rescue(rescue) => {
                state.requeue_dirty(first, ticket);
                Next::Promote(rescue)
            }
            Room::Nowhere => Next::Skip,
        }
    }

    // Records for one segment: the first one, and what follows it in the queue.
    fn run(&self, state: &mut State, model: u32, first: (NodeId, u64), index: u32, opening: bool) -> Option<Run> {
        let secret = &self.secret;
        let sealing = if opening { seal_open_segment(state, model, Some(index)) } else { None };
        let geometry = state.models.get(&model)?.geometry;
        let bytes = geometry.record_bytes();
        let file = state.models.get(&model)?.disk.as_ref()?.file.clone();
        let segment = state.segment(model, index)?;
        let (epoch, place) = (segment.epoch, Place { segment: index, offset: segment.tail, pages: 0 });
        let room = (file.layout.footer_offset() - segment.tail) as usize / bytes;
        let room = room.min(file.layout.max_records as usize - segment.entries.len());
        // Blocks of a run are held: no more than an eighth of RAM at a time.
        let most = room.min((RUN_BYTES.min(state.ram_bytes as usize / 8) / bytes).max(1));
        let mut spans = state.spans_to_write(model);
        let mut blocks: Vec<Block> = Vec::new();
        let mut next = Some(first);
        while let Some((id, ticket)) = next {
            let nodes = &state.nodes;
            let fits = |slot: &Slot| blocks.len() < most && spans.take(&state.ram.pool, *slot);
            let Some(slot) = nodes[id].ram.filter(fits) else {
                state.requeue_dirty(id, ticket);
                break;
            };
            if nodes.lease(&[id]).is_empty() {
                // A million matches hold it: it stays in RAM alone.
                next = next_dirty(state, model);
                continue;
            }
            let (owner, bytes) = (nodes[id].owner, bytes as u64);
            if !state.room_for_record(owner, bytes) {
                // Its tenant may have no more there: it stays in RAM alone, too.
                state.nodes.release(&[id]);
                next = next_dirty(state, model);
                continue;
            }
            state.owners.hold_records(owner, bytes, true);
            let nodes = &state.nodes;
            let identity = RecordIdentity {
                hash: secret.seal(nodes.hash(id)),
                parent: secret.seal(nodes.hash_before(id)),
                depth: nodes.depth(id),
            };
            let layout = nodes[id].layout.clone();
            blocks.push(Block { node: id, slot, layout, identity, ticket, owner, bytes });
            next = next_dirty(state, model);
        }
        if blocks.is_empty() && !opening {
            return None;
        }
        if let Some(segment) = state.segment(model, index) {
            segment.tail += (blocks.len() * bytes) as u64;
        }
        let layout = state.models.get(&model)?.cold.clone();
        Some(Run { model, file, geometry, place, epoch, layout, blocks, opening, sealing })
    }
}

impl State {
    // What runs of a model may hold.
    fn spans_to_write(&self, model: u32) -> Spans {
        let spans = self.models.get(&model).map_or(0, |m| self.ram.pool.spans_of(&m.holding).len());
        Spans { held: BTreeSet::new(), most: spans.saturating_sub(1).max(1) }
    }

    // A model whose turn it is to have blocks written. With `write_back` that is one of which less than a quarter of
    // what it can reach of RAM is clean or free.
    fn model_to_demote(&self) -> Option<u32> {
        let takers = self.takers();
        let due = |(id, model): &(&u32, &ModelState)| {
            let slots = self.ram.pool.slots_in_reach(&model.holding, model.slot_bytes()) as u64;
            let wanted = self.flushing > 0
                || self.policy != WritePolicy::WriteBack
                || model.dirty_blocks * 4 >= slots * 3
                || self.has_to_give(**id, &takers);
            wanted && !model.dirty.is_empty() && model.disk.is_some()
        };
        self.models.iter().filter(due).max_by_key(|(id, model)| (model.dirty_blocks, **id)).map(|(id, _)| *id)
    }

    // Whether one more record of an owner may be written; a tenant at its limit forgets cold ones for it.
    fn room_for_record(&mut self, owner: OwnerId, bytes: u64) -> bool {
        while self.is_over(owner, Tier::Ssd, bytes) {
            if self.never_fits(owner, Tier::Ssd, bytes) {
                return false;
            }
            if !self.forget_record_of(self.owners.tenant_id(owner)) {
                return false;
            }
        }
        true
    }

    /// Whether the thread would find something to do.
    pub(super) fn has_work(&self) -> bool {
        self.model_to_demote().is_some()
            || self.models.iter().any(|(&id, m)| m.wants.is_some() || self.is_above_quota(id))
    }

    /// Notes whether a block stands in its model's queue; and tells whether it did.
    pub(super) fn set_queued(&mut self, id: NodeId, queued: bool) -> bool {
        let was = std::mem::replace(&mut self.nodes[id].queued, queued);
        if let Some(books) = self.models.get_mut(&self.nodes.model(id)) {
            books.queued_blocks = books.queued_blocks + u64::from(queued) - u64::from(was);
        }
        was
    }

    /// Notes a block that is in RAM only.
    pub(super) fn enqueue_dirty(&mut self, id: NodeId) {
        let (model, hash) = (self.nodes.model(id), self.nodes.hash(id));
        self.set_queued(id, true);
        self.last_ticket += 1;
        let Some(books) = self.models.get_mut(&model) else { return };
        books.dirty.push_back((self.last_ticket, hash));
        if books.dirty.len() as u64 > 1024 + 4 * books.dirty_blocks {
            let nodes = &self.nodes;
            books.dirty.retain(|&(_, hash)| nodes.find(hash).is_some_and(|id| nodes[id].queued));
        }
    }

    /// Has a block in RAM written once more, before all others.
    pub(super) fn enqueue_again(&mut self, id: NodeId) {
        let ticket = self.last_ticket;
        if self.nodes[id].ram.is_some() && self.nodes[id].ssd.is_none() && !self.nodes[id].queued {
            self.nodes[id].again = true;
            self.requeue_dirty(id, ticket);
        }
    }

    fn requeue_dirty(&mut self, id: NodeId, ticket: u64) {
        let (model, hash) = (self.nodes.model(id), self.nodes.hash(id));
        self.set_queued(id, true);
        if let Some(books) = self.models.get_mut(&model) {
            books.dirty.push_front((ticket, hash));
        }
    }

    /// Whether blocks that were put up to this ticket are still on their way to the SSD.
    pub(super) fn demoting(&self, ticket: u64) -> bool {
        let due = |m: &ModelState| m.disk.is_some() && m.dirty.front().is_some_and(|&(first, _)| first <= ticket);
        self.writing.as_ref().is_some_and(|w| w.oldest <= ticket) || self.models.values().any(due)
    }
}

fn next_dirty(state: &mut State, model: u32) -> Option<(NodeId, u64)> {
    while let Some((ticket, hash)) = state.models.get_mut(&model)?.dirty.pop_front() {
        if let Some(id) = state.nodes.find(hash) {
            let was = state.set_queued(id, false);
            if was && state.nodes[id].ram.is_some() && state.nodes[id].ssd.is_none() {
                return Some((id, ticket));
            }
        }
    }
    None
}

// The open segment of a model, if it has room for one more record.
fn open_place(state: &State, model: u32, bytes: usize) -> Option<u32> {
    let disk = state.models.get(&model)?.disk.as_ref()?;
    let index = disk.segments.iter().position(|s| s.phase == Phase::Open)?;
    let segment = &disk.segments[index];
    let layout = &disk.file.layout;
    let fits =
        segment.tail + bytes as u64 <= layout.footer_offset() && segment.entries.len() < layout.max_records as usize;
    fits.then_some(index as u32)
}

/// Seals a model's open segment, but for a `new` one; the caller writes the footer.
pub(super) fn seal_open_segment(state: &mut State, model: u32, new: Option<u32>) -> Option<Footer> {
    let disk = state.models.get_mut(&model)?.disk.as_mut()?;
    let old = |(i, segment): &(usize, &Segment)| segment.phase == Phase::Open && new != Some(*i as u32);
    let (index, _) = disk.segments.iter().enumerate().find(old)?;
    let segment = &mut disk.segments[index];
    segment.phase = Phase::Sealed;
    let entries = std::mem::take(&mut segment.entries);
    Some(Footer { file: disk.file.clone(), segment: index as u32, epoch: segment.epoch, entries })
}

enum Outcome {
    Written {
        records: Vec<Written>,
        encode_ns: u64,
    },
    /// `vacant`: the segment holds no disk blocks.
    Failed {
        error: std::io::Error,
        vacant: bool,
    },
}

fn commit(state: &mut State, run: Run, outcome: Outcome) {
    state.writing = None;
    for block in &run.blocks {
        state.owners.hold_records(block.owner, block.bytes, false);
    }
    match outcome {
        Outcome::Written { records, encode_ns } => {
            let bytes: u64 = records.iter().map(|record| record.bytes).sum();
            let opening = if run.opening { PAGE as u64 + run.file.layout.footer_bytes() } else { 0 };
            let counts = state.counts(run.model).tier(Tier::Ssd);
            counts.encode_ns += encode_ns;
            counts.written_bytes += bytes + opening;
            counts.rewritten_bytes += opening;
            let mut offset = run.place.offset;
            for (block, Written { bytes, encoding }) in run.blocks.iter().zip(records) {
                let place = Place { offset, pages: (bytes / PAGE as u64) as u32, ..run.place };
                offset += bytes;
                if state.nodes.is_linked(block.node) {
                    let entry = Entry { block: block.identity, offset: place.offset, bytes };
                    state.place_on_ssd(block.node, place, entry);
                    let counts = state.counts_of(block.node);
                    counts.not_encodable += u64::from(encoding == Encoding::Impossible);
                    if encoding == Encoding::Done {
                        counts.encoded += 1;
                        counts.tier(Tier::Ssd).encoded_bytes += run.geometry.block_bytes() as u64;
                    }
                }
            }
            // Only this thread appends: what the records did not need is there for the next.
            if let Some(segment) = state.segment(run.model, run.place.segment) {
                segment.tail = offset;
            }
        }
        Outcome::Failed { error, vacant } => {
            fail(state, run.model, &error);
            for block in run.blocks.iter().rev() {
                if state.nodes.is_linked(block.node) {
                    state.requeue_dirty(block.node, block.ticket);
                }
            }
            if let Some(segment) = state.segment(run.model, run.place.segment) {
                // What was written before stays readable; nothing is appended after a failed write.
                if vacant {
                    *segment = Segment::empty();
                } else {
                    segment.phase = Phase::Retired;
                }
            }
        }
    }
    let ids: Vec<NodeId> = run.blocks.iter().map(|b| b.node).collect();
    state.nodes.release(&ids);
}

fn fail(state: &mut State, model: u32, error: &std::io::Error) {
    state.counts(model).io_errors += 1;
    state.ssd_read_only = Some((error.to_string(), Instant::now()));
}
