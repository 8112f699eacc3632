//! What the driver is told: copies by one path or another, kernels with their tables, and how long copies take.

use super::{ALIGN, Cuda, LaneState, Path, RING_BYTES, Used};
use crate::gpu::device::{Coded, Device as _, Fault, Lane, Piece, Rows, Status, Ticket, Work};
use crate::gpu::ffi::{self, CodeWork, Plane, ended};
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Tables are cut so that several fit.
const MOST_TABLE: usize = RING_BYTES / 4;
/// Blocks of threads that a kernel takes: what is left of the device is the model's.
const GRID: u32 = 16;
/// Bytes of the device that a lane borrows at a time, if one payload is no larger.
const STAGED: u64 = 32 << 20;
/// Vectors of a kernel.
pub(super) const VECTOR: u64 = 16;

// What a table is made of, one behind the other.
struct Table<'a> {
    lane: &'a LaneState,
    begin: usize,
    next: usize,
}

impl Table<'_> {
    // Puts some plain values in; where they are, as the device reaches them, and in the ring.
    fn put<T: Copy>(&mut self, values: &[T]) -> (u64, usize) {
        let at = self.begin + self.next;
        // SAFETY: `room` found so many bytes from `begin` on, which nobody else has; see `table_bytes`.
        unsafe {
            let to = self.lane.memory.add(at).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
        self.next += size_of_val(values).next_multiple_of(ALIGN);
        (self.lane.address + at as u64, at)
    }
}

fn table_bytes(parts: &[usize]) -> usize {
    parts.iter().map(|bytes| bytes.next_multiple_of(ALIGN)).sum()
}

// Neighbours as one.
fn merged(pieces: &[Piece]) -> Vec<Piece> {
    let mut whole: Vec<Piece> = Vec::with_capacity(pieces.len());
    for &piece in pieces.iter().filter(|piece| piece.bytes > 0) {
        match whole.last_mut() {
            Some(last) if last.from + last.bytes == piece.from && last.to + last.bytes == piece.to => {
                last.bytes += piece.bytes;
            }
            _ => whole.push(piece),
        }
    }
    whole
}

impl Cuda {
    fn copy(&self, lane: &mut LaneState, which: Lane, pieces: &[Piece]) -> Result<(), Fault> {
        let whole = merged(pieces);
        let paths = *self.paths.lock();
        let bytes: u64 = whole.iter().map(|piece| piece.bytes).sum();
        let from = paths.engines_from[usize::from(which == Lane::Down)];
        let small = whole.len() >= paths.least_pieces && bytes / (whole.len() as u64) < from;
        // A kernel takes pieces of one size.
        let size = pieces.iter().find(|piece| piece.bytes > 0).map_or(0, |piece| piece.bytes);
        let alike = |piece: &Piece| piece.bytes == size && (piece.from | piece.to | size).is_multiple_of(VECTOR);
        if !small || !whole.iter().all(alike) {
            let path = if self.facts.has_batch != 0 { ffi::BY_BATCH } else { ffi::BY_ENGINE };
            // SAFETY: the device was opened; `submit`'s caller promised that addresses are valid.
            let end = unsafe { ffi::kv_copy(self.gpu.0, whole.as_ptr(), whole.len(), path, 0, 0, lane.stream) };
            return ended(end, 0);
        }
        for some in whole.chunks(MOST_TABLE / 16) {
            let begin = self.room(lane, table_bytes(&[16 * some.len()]))?;
            let pairs: Vec<[u64; 2]> = some.iter().map(|piece| [piece.from, piece.to]).collect();
            let (table, _) = Table { lane, begin, next: 0 }.put(&pairs);
            let (count, path) = (some.len(), ffi::BY_KERNEL);
            // SAFETY: as above.
            let end = unsafe { ffi::kv_copy(self.gpu.0, some.as_ptr(), count, path, table, GRID, lane.stream) };
            ended(end, 0)?;
            let ticket = self.record(lane.stream)?;
            lane.used.push_back(Used { ticket, begin, status: None });
        }
        Ok(())
    }

    // Whether that can be done at all.
    pub(super) fn check(&self, coded: &Coded) -> Result<(), Fault> {
        let refuse = |what: &str| Err(Fault::Refused(what.to_owned()));
        if coded.run_tokens == 0 || coded.offsets.len() != coded.payloads.len() * coded.runs() {
            return refuse("offsets are not of all runs of all blocks");
        }
        if coded.layout.is_some() && !is_divisible(coded) {
            return refuse("a plane has more rows than kernels can number");
        }
        if coded.layout.as_ref().is_some_and(|layout| !self.takes(layout)) {
            return refuse("the device has no kernel for that codec");
        }
        if coded.layout.is_some() && !is_aligned(coded) {
            return refuse("rows begin or end at no multiples of 16 bytes, or payloads begin at none of 64");
        }
        Ok(())
    }

    // Rows as they are, one by one where they are no neighbours: what kernels cannot work on.
    fn copy_rows(&self, lane: &mut LaneState, which: Lane, coded: &Coded, to_payloads: bool) -> Result<(), Fault> {
        for (block, &payload) in coded.payloads.iter().enumerate() {
            let rows = (0..coded.planes.len()).flat_map(|plane| coded.rows(block, plane));
            let pieces = rows.enumerate().map(|(n, row)| {
                let (row, place) = (row as u64, payload + (n * coded.row_bytes) as u64);
                let (from, to) = if to_payloads { (row, place) } else { (place, row) };
                Piece { from, to, bytes: coded.row_bytes as u64 }
            });
            self.copy(lane, which, &pieces.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    // Encodes or decodes. Payloads as large as engines are faster for go by way of memory of the device, which the stream
    // borrows: kernels work on that, and engines fill or empty it. Others are read and written by the kernels where they are.
    fn code(&self, lane: &mut LaneState, which: Lane, coded: &Coded, status: Option<&Status>) -> Result<(), Fault> {
        let (bytes, from) = (coded.payload_bytes() as u64, self.paths.lock().engines_from);
        let engines = which != Lane::Across && bytes >= from[usize::from(which == Lane::Down)];
        let stride = bytes.next_multiple_of(ALIGN as u64);
        let table = MOST_TABLE.saturating_sub(size_of::<Plane>() * coded.planes.len() + 4 * ALIGN);
        let most = table / (8 * coded.runs() + 8 + 4);
        if most == 0 {
            return Err(Fault::Refused("a block's tables are larger than there is room for".into()));
        }
        let most = if engines { most.min((STAGED / stride).max(1) as usize) } else { most };
        for first in (0..coded.payloads.len()).step_by(most) {
            let blocks = first..(first + most).min(coded.payloads.len());
            let payloads = &coded.payloads[blocks.clone()];
            let staging = if engines { self.borrow(lane, stride * blocks.len() as u64) } else { None };
            let Some(staging) = staging else {
                self.launch(lane, coded, blocks.clone(), payloads, status)?;
                continue;
            };
            let staged: Vec<u64> = (0..blocks.len() as u64).map(|n| staging + n * stride).collect();
            let piece = |(&here, &there): (&u64, &u64)| match status {
                Some(_) => Piece { from: there, to: here, bytes },
                None => Piece { from: here, to: there, bytes },
            };
            let pieces: Vec<Piece> = payloads.iter().zip(&staged).map(piece).collect();
            let done = match status {
                Some(_) => self
                    .launch(lane, coded, blocks.clone(), &staged, status)
                    .and_then(|()| self.copy(lane, which, &pieces)),
                None => self
                    .copy(lane, which, &pieces)
                    .and_then(|()| self.launch(lane, coded, blocks.clone(), &staged, status)),
            };
            // SAFETY: the device was opened; it was borrowed in this stream.
            let returned = ended(unsafe { ffi::kv_return(self.gpu.0, staging, lane.stream) }, 0);
            done.and(returned)?;
        }
        Ok(())
    }

    // Memory of the device for what is put into the lane next, if there is some to be had.
    fn borrow(&self, lane: &LaneState, bytes: u64) -> Option<u64> {
        let mut address = 0;
        // SAFETY: the device was opened.
        ended(unsafe { ffi::kv_borrow(self.gpu.0, bytes, lane.stream, &mut address) }, bytes).ok().map(|()| address)
    }

    // Launches a kernel over some blocks, whose payloads are there.
    fn launch(
        &self,
        lane: &mut LaneState,
        coded: &Coded,
        blocks: Range<usize>,
        payloads: &[u64],
        status: Option<&Status>,
    ) -> Result<(), Fault> {
        let planes = (0..coded.planes.len()).map(|n| plane(coded, n)).collect::<Vec<_>>();
        let (runs, count) = (coded.runs(), blocks.len());
        let bytes = table_bytes(&[size_of_val(&planes[..]), 8 * runs * count, 8 * count, 4 * count]);
        let begin = self.room(lane, bytes)?;
        let mut table = Table { lane, begin, next: 0 };
        let (plane, _) = table.put(&planes);
        let (offset, _) = table.put(&coded.offsets[blocks.start * runs..blocks.end * runs]);
        let (payload, _) = table.put(payloads);
        let (words, at) = table.put(&vec![0u32; count]);
        let work = CodeWork {
            plane,
            offset,
            coded: payload,
            // Of planes that are not padded there is nothing to say.
            status: if coded.layout.is_some() { words } else { 0 },
            blocks: count as u32,
            planes: planes.len() as u32,
            heads: coded.heads,
            tokens: coded.block_tokens,
            dim: (coded.row_bytes / 2) as u32,
            dtype: coded.layout.as_ref().map_or(ffi::FP16, |layout| layout.device_dtype()),
            runs: runs as u32,
            run_tokens: coded.run_tokens,
        };
        let decode = c_int::from(status.is_none());
        let at_work = (&raw const work).cast::<c_void>();
        // SAFETY: the device was opened; tables stay until the ticket is over; `submit`'s caller promised the rest.
        ended(unsafe { ffi::kv_code(self.gpu.0, decode, at_work, GRID, lane.stream) }, 0)?;
        let ticket = self.record(lane.stream)?;
        let status = status.map(|status| (status.clone(), at, blocks));
        lane.used.push_back(Used { ticket, begin, status });
        Ok(())
    }

    /// Seconds on the device that copies by one path take, in a lane that has nothing else to do.
    pub(in crate::gpu) fn timed(&self, lane: Lane, path: Path, pieces: &[Piece]) -> Result<f64, Fault> {
        let lane = &mut *self.lanes[lane as usize].lock();
        while let Some(used) = lane.used.front() {
            self.await_event(used.ticket)?;
            self.settle(lane)?;
        }
        let mut events = [0u64; 2];
        for event in &mut events {
            // SAFETY: the device was opened.
            ended(unsafe { ffi::kv_event(self.gpu.0, 1, event) }, 0)?;
        }
        let [begun, over] = events;
        let record = |event| {
            // SAFETY: the device was opened, and the event is.
            ended(unsafe { ffi::kv_record(self.gpu.0, event, lane.stream) }, 0)
        };
        // Tables of kernels lie in the ring; there is room for them all, since nothing else is under way.
        let most = if path == Path::Kernel { RING_BYTES / 16 } else { pieces.len() };
        let pairs: Vec<[u64; 2]> = pieces.iter().take(most).map(|piece| [piece.from, piece.to]).collect();
        let copied = (|| {
            let table = Table { lane, begin: 0, next: 0 }.put(if path == Path::Kernel { &pairs } else { &[] }).0;
            record(begun)?;
            let count = pieces.len().min(most);
            let path = path.number();
            // SAFETY: as above; who asks keeps the memory until this returns.
            let end = unsafe { ffi::kv_copy(self.gpu.0, pieces.as_ptr(), count, path, table, GRID, lane.stream) };
            ended(end, 0)?;
            record(over)?;
            // SAFETY: as above.
            ended(unsafe { ffi::kv_wait(self.gpu.0, over) }, 0)?;
            let mut seconds = 0.0;
            // SAFETY: as above.
            ended(unsafe { ffi::kv_seconds(self.gpu.0, begun, over, &mut seconds) }, 0)?;
            Ok(seconds * pieces.len() as f64 / count as f64)
        })();
        for event in events {
            // SAFETY: as above; nothing waits for it.
            unsafe { ffi::kv_end_event(self.gpu.0, event) };
        }
        copied
    }

    pub(super) fn enqueue(
        &self,
        lane: &mut LaneState,
        which: Lane,
        after: &[Ticket],
        work: &[Work],
    ) -> Result<Ticket, Fault> {
        after.iter().try_for_each(|&ticket| self.after(lane.stream, ticket))?;
        work.iter().try_for_each(|work| match work {
            Work::Copy(pieces) => self.copy(lane, which, pieces),
            Work::Encode(coded, _) if !is_aligned(coded) => self.copy_rows(lane, which, coded, true),
            Work::Decode(coded) if !is_aligned(coded) => self.copy_rows(lane, which, coded, false),
            Work::Encode(coded, status) => self.code(lane, which, coded, Some(status)),
            Work::Decode(coded) => self.code(lane, which, coded, None),
        })?;
        self.record(lane.stream)
    }
}

// Whether kernels can tell a row's head and token, which they do by a multiplication.
fn is_divisible(coded: &Coded) -> bool {
    let tokens = u64::from(coded.block_tokens);
    u64::from(coded.heads) * tokens * tokens < 1 << 32
}

// Whether rows and payloads lie as kernels want them.
fn is_aligned(coded: &Coded) -> bool {
    let places = coded.planes.iter().flat_map(|rows| [rows.base, rows.head_stride, rows.token_stride]);
    let rows = places.chain(coded.offsets.iter().copied()).chain([coded.row_bytes as u64]);
    is_divisible(coded)
        && rows.fold(0, |all, each| all | each).is_multiple_of(VECTOR)
        && coded.payloads.iter().fold(0, |all, each| all | each).is_multiple_of(ALIGN as u64)
}

fn plane(coded: &Coded, n: usize) -> Plane {
    let Rows { base, head_stride, token_stride } = coded.planes[n];
    let raw = || Plane {
        at: (n * coded.plane_bytes()) as u32,
        ..Plane { base, head_stride, token_stride, at: 0, coding: 0, by: 0, unused: 0, group: 0, bound: f32::INFINITY }
    };
    let Some(layout) = &coded.layout else { return raw() };
    let on = layout.on_device(n).expect("the device takes that layout");
    let (coding, by, group, bound) = (on.coding, on.by, on.group, on.bound);
    Plane { at: layout.plane(n).start as u32, coding, by, group, bound, ..raw() }
}
