//! Writing a run: its records are made ready in their order, and written meanwhile, several at a time.

use super::Shared;
use super::demote::{Block, Run};
use crate::block::{Geometry, RECORD_HEADER_BYTES};
use crate::codec::Layout;
use crate::ssd::queue::{Part, Queue, Transfer};
use crate::ssd::record::{Form, RecordIdentity, SegmentIdentity, record_head};
use std::io;
use std::time::Instant;

/// One write is at least this long, but for the last of a run and where records end.
const WRITE_BYTES: usize = 4 << 20;
/// Writes under way at once.
const WRITES: usize = 4;
/// The kernel takes so many parts at a time.
const PARTS: usize = 1024;

/// What was written of a block.
pub(super) struct Written {
    pub(super) bytes: u64,
    pub(super) encoding: Encoding,
}

/// What became of a block on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Kept,
    Done,
    Impossible,
}

impl Shared {
    /// Returns what was written of each block, and the nanoseconds of encoding.
    pub(super) fn write(&self, run: &Run) -> io::Result<(Vec<Written>, u64)> {
        if run.opening {
            if let Some(footer) = &run.sealing {
                // Without its footer the segment is recovered by walking its records.
                footer.write()?;
            }
            run.file.start_segment(run.place.segment, run.epoch)?;
        }
        let bytes = run.geometry.record_bytes();
        let segment = run.file.identity(run.epoch);
        let mut encoded = match (&self.ssd, &run.layout) {
            (Some(ssd), Some(_)) => Some(ssd.scratch(run.blocks.len() * bytes).map_err(io::Error::other)?),
            _ => None,
        };
        let mut rooms = encoded.iter_mut().flat_map(|buffer| buffer.chunks_exact_mut(bytes));
        let mut written = Vec::with_capacity(run.blocks.len());
        let mut encode_ns = 0;
        // Gone before the memory that it writes from.
        let mut writes = Writes::new(run.file.queue(), run.file.offset_of(run.place));
        for block in &run.blocks {
            let mut encoding = Encoding::Kept;
            // What is encoded already stays so.
            if let (None, Some(layout), Some(room)) = (&block.layout, &run.layout, rooms.next()) {
                let started = Instant::now();
                let body = self.body(block, &run.geometry, &Form::plain(&run.geometry));
                if let Some(record) = encode(body, &run.geometry, layout, &segment, &block.identity, room) {
                    encode_ns += started.elapsed().as_nanos() as u64;
                    written.push(Written { bytes: record.len() as u64, encoding: Encoding::Done });
                    writes.add(Part::of(record))?;
                    continue;
                }
                encoding = Encoding::Impossible;
            }
            let plain = || Form::plain(&run.geometry);
            let form = block.layout.as_ref().map_or_else(plain, |layout| Form::encoded(layout, block.identity.depth));
            let head =
                record_head(self.body(block, &run.geometry, &form), &run.geometry, &form, &segment, &block.identity);
            let at = self.arena.at(block.slot);
            // SAFETY: the header lies within the slot, and only this thread ever reads or writes it; from here on nothing
            // of the slot is written before the run ends.
            unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), at, head.len()) };
            let bytes = run.geometry.record_bytes_of(form.payload_bytes);
            written.push(Written { bytes: bytes as u64, encoding });
            writes.add(Part { at, bytes })?;
        }
        writes.finish()?;
        if let (Some(ssd), Some(buffer)) = (&self.ssd, encoded) {
            ssd.give_back(buffer);
        }
        Ok((written, encode_ns))
    }

    // What follows the header of a block in its slot.
    fn body(&self, block: &Block, geometry: &Geometry, form: &Form) -> &[u8] {
        let bytes = geometry.payload_offset() + form.payload_bytes - RECORD_HEADER_BYTES;
        // SAFETY: the slot is held by the run's lease, as long as its record, and published: what follows the header
        // stays as it is.
        unsafe { std::slice::from_raw_parts(self.arena.at(block.slot).add(RECORD_HEADER_BYTES), bytes) }
    }
}

// The record of a block in its encoded form, in `room`; `body` is what follows the header in its slot. `None`: it cannot
// be encoded.
pub(super) fn encode<'a>(
    body: &[u8],
    geometry: &Geometry,
    layout: &Layout,
    segment: &SegmentIdentity,
    block: &RecordIdentity,
    room: &'a mut [u8],
) -> Option<&'a [u8]> {
    let payload_at = geometry.payload_offset();
    let (tokens, payload) = body.split_at(payload_at - RECORD_HEADER_BYTES);
    let form = Form::encoded(layout, block.depth);
    let end = payload_at + form.payload_bytes;
    if !layout.encode_payload(payload, block.depth == 0, &mut room[payload_at..end]) {
        return None;
    }
    room[RECORD_HEADER_BYTES..payload_at].copy_from_slice(tokens);
    let record = &mut room[..geometry.record_bytes_of(form.payload_bytes)];
    record[end..].fill(0);
    let head = record_head(&record[RECORD_HEADER_BYTES..end], geometry, &form, segment, block);
    record[..RECORD_HEADER_BYTES].copy_from_slice(&head);
    Some(record)
}

/// The writes of a run, one after the other in the file.
struct Writes<'a> {
    queue: Box<dyn Queue + 'a>,
    ready: Vec<Part>,
    ready_bytes: usize,
    under_way: usize,
    /// Where in the file the next one goes.
    offset: u64,
}

impl<'a> Writes<'a> {
    fn new(queue: Box<dyn Queue + 'a>, offset: u64) -> Self {
        Self { queue, ready: Vec::new(), ready_bytes: 0, under_way: 0, offset }
    }

    // Memory of the run's, which stays as it is until the run ends.
    fn add(&mut self, record: Part) -> io::Result<()> {
        let mut rest = record;
        // A long record is several writes.
        while rest.bytes > 0 {
            let now = rest.bytes.min(WRITE_BYTES - self.ready_bytes);
            self.ready.push(Part { at: rest.at, bytes: now });
            self.ready_bytes += now;
            rest = Part { at: rest.at.wrapping_add(now), bytes: rest.bytes - now };
            if self.ready_bytes == WRITE_BYTES || self.ready.len() == PARTS {
                self.start()?;
            }
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        while self.under_way >= WRITES {
            self.wait()?;
        }
        let parts = std::mem::take(&mut self.ready);
        // The tag is the length: that many bytes must be written.
        let transfer = Transfer { tag: self.ready_bytes, write: true, parts, offset: self.offset };
        self.offset += self.ready_bytes as u64;
        self.ready_bytes = 0;
        self.under_way += 1;
        // SAFETY: the memory is held until the run ends, which is after the queue is gone.
        unsafe { self.queue.push(transfer) };
        self.queue.start();
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        self.under_way -= 1;
        let Some(done) = self.queue.pop() else { return Err(io::ErrorKind::WriteZero.into()) };
        if done.result? == done.tag { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.ready.is_empty() {
            self.start()?;
        }
        while self.under_way > 0 {
            self.wait()?;
        }
        Ok(())
    }
}
