//! Reading a load's records: runs of neighbours, several at a time, and whoever is free takes what has arrived.
//!
//! ```text
//! runs ─▶ queue, kept full ─▶ arrived ─▶ any thread: check, scatter, and ask for the next
//! ```
//! A record that is to stay in RAM is read straight into its slot, any other into a buffer that is used again.

use super::Lease;
use super::load::Source;
use crate::ssd::queue::{DEPTH, FLIGHT_BYTES, Part, Queue, Transfer};
use crate::ssd::{Buffer, ModelFile, Place};
use crate::sync::{Mutex, Ordering};
use std::io;
use std::ops::Range;
use std::time::Instant;

/// One read is at most this long, unless one record is longer.
const RUN_BYTES: usize = 4 << 20;

/// Blocks that lie on SSD, in runs of neighbouring records: long enough for the disk, and enough for all threads.
pub(super) fn runs(sources: &[Source], record_bytes: usize, threads: usize) -> Vec<Range<usize>> {
    let below = sources.iter().filter(|s| matches!(s, Source::Ssd { .. })).count();
    let most = (below * record_bytes / (2 * threads)).clamp(record_bytes, RUN_BYTES.max(record_bytes)) / record_bytes;
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (n, source) in sources.iter().enumerate() {
        let Source::Ssd { place, .. } = source else { continue };
        match runs.last_mut() {
            Some(run)
                if run.end == n
                    && run.len() < most
                    && matches!(&sources[n - 1], Source::Ssd { place: before, .. } if before.is_before(place)) =>
            {
                run.end += 1;
            }
            _ => runs.push(n..n + 1),
        }
    }
    runs
}

/// Where the records of a run were read to.
pub(super) struct Landing {
    records: Vec<Part>,
    /// What holds those that have no slot.
    buffer: Option<Buffer>,
}

/// A run that has arrived.
pub(super) struct Arrived {
    pub(super) run: Range<usize>,
    landing: Landing,
    result: io::Result<usize>,
}

/// The reads of a load.
pub(super) struct Reads<'a> {
    // Dropped first: it waits for what is under way, and what that is read to goes after it.
    queue: Box<dyn Queue + 'a>,
    under_way: Vec<Option<Landing>>,
    lease: &'a Lease,
    file: &'a ModelFile,
    sources: &'a [Source],
    runs: &'a [Range<usize>],
    next: usize,
    bytes: usize,
    count: usize,
    started: Instant,
    spent: &'a super::load::Spent,
}

impl<'a> Reads<'a> {
    /// `None`: there are none.
    pub(super) fn new(
        lease: &'a Lease,
        sources: &'a [Source],
        runs: &'a [Range<usize>],
        spent: &'a super::load::Spent,
    ) -> Option<Mutex<Self>> {
        // A load is of one model, and a model has one file.
        let Source::Ssd { file, .. } = sources.get(runs.first()?.start)? else { return None };
        Some(Mutex::new(Self {
            queue: file.queue(),
            under_way: runs.iter().map(|_| None).collect(),
            lease,
            file,
            sources,
            runs,
            next: 0,
            bytes: 0,
            count: 0,
            started: Instant::now(),
            spent,
        }))
    }

    /// Asks for more, and waits for one that arrives; `None`: all have.
    pub(super) fn next(&mut self) -> Option<Arrived> {
        while let Some(run) = self.runs.get(self.next) {
            let bytes = self.places(run).map(|place| place.bytes() as usize).sum();
            if self.count >= DEPTH || self.count > 0 && self.bytes + bytes > FLIGHT_BYTES {
                break;
            }
            let number = self.next;
            self.next += 1;
            match self.land(run, bytes) {
                Ok(landing) => {
                    let parts = joined(&landing.records);
                    let transfer = Transfer { tag: number, write: false, parts, offset: self.offset(run) };
                    self.under_way[number] = Some(landing);
                    (self.bytes, self.count) = (self.bytes + bytes, self.count + 1);
                    // SAFETY: the slots are this load's alone and the buffer the landing's; both stay until the run has
                    // arrived, or the queue is gone.
                    unsafe { self.queue.push(transfer) };
                }
                Err(e) => {
                    let landing = Landing { records: Vec::new(), buffer: None };
                    return Some(Arrived { run: run.clone(), landing, result: Err(e) });
                }
            }
        }
        let done = self.queue.pop()?;
        let run = self.runs[done.tag].clone();
        let landing = self.under_way[done.tag].take()?;
        self.bytes -= self.places(&run).map(|place| place.bytes() as usize).sum::<usize>();
        self.count -= 1;
        // Relaxed: read when all threads are done.
        let elapsed = self.started.elapsed().as_nanos() as u64;
        self.spent.read_ns.fetch_max(elapsed, Ordering::Relaxed);
        self.spent.read_bytes.fetch_add(*done.result.as_ref().unwrap_or(&0) as u64, Ordering::Relaxed);
        Some(Arrived { run, landing, result: done.result })
    }

    fn places(&self, run: &Range<usize>) -> impl Iterator<Item = Place> + use<'a> {
        self.sources[run.clone()].iter().filter_map(|source| match source {
            Source::Ssd { place, .. } => Some(*place),
            _ => None,
        })
    }

    fn offset(&self, run: &Range<usize>) -> u64 {
        self.places(run).next().map_or(0, |place| self.file.offset_of(place))
    }

    // Memory for a run's records.
    fn land(&self, run: &Range<usize>, bytes: usize) -> io::Result<Landing> {
        let slots = || {
            self.sources[run.clone()].iter().filter_map(|source| match source {
                Source::Ssd { place, promote, .. } => Some((place.bytes() as usize, *promote)),
                _ => None,
            })
        };
        let homeless: usize = slots().filter(|(_, slot)| slot.is_none()).map(|(bytes, _)| bytes).sum();
        let mut buffer = match homeless {
            0 => None,
            _ => {
                let Some(ssd) = &self.lease.shared.ssd else { return Err(io::ErrorKind::NotFound.into()) };
                Some(ssd.scratch(bytes.max(RUN_BYTES)).map_err(io::Error::other)?)
            }
        };
        let mut at = buffer.as_mut().map_or(std::ptr::null_mut(), |buffer| buffer.as_mut_ptr());
        let records = slots().map(|(bytes, slot)| match slot {
            Some(slot) => Part { at: self.lease.shared.arena.at(slot), bytes },
            None => {
                let part = Part { at, bytes };
                at = at.wrapping_add(bytes);
                part
            }
        });
        let records = records.collect();
        Ok(Landing { records, buffer })
    }
}

// Neighbours in memory are one part.
fn joined(records: &[Part]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for record in records {
        match parts.last_mut() {
            Some(part) if part.at.wrapping_add(part.bytes) == record.at => part.bytes += record.bytes,
            _ => parts.push(*record),
        }
    }
    parts
}

impl Lease {
    /// The records of a run that arrived, shorter where the file ended; an error where one cannot be read.
    pub(super) fn records<R>(
        &self,
        sources: &[Source],
        arrived: Arrived,
        mut each: impl FnMut(usize, io::Result<&[u8]>) -> R,
    ) -> Vec<R> {
        let Arrived { run, landing, result } = arrived;
        let mut results = Vec::with_capacity(run.len());
        let Landing { records, buffer } = landing;
        let mut left = *result.as_ref().unwrap_or(&0);
        for n in run.clone() {
            let record = records.get(n - run.start);
            let read = match (&result, record, &sources[n]) {
                (Ok(_), Some(record), _) => {
                    let bytes = record.bytes.min(left);
                    left -= bytes;
                    Ok((record, bytes))
                }
                // One bad sector must not cost its neighbours.
                (Err(_), Some(record), Source::Ssd { file, place, .. }) if run.len() > 1 => {
                    // SAFETY: the memory is this run's, which nobody else reads or writes any more.
                    let memory = unsafe { std::slice::from_raw_parts_mut(record.at, record.bytes) };
                    file.read_records(*place, memory).map(|bytes| (record, bytes))
                }
                (Err(e), ..) => Err(io::Error::from(e.kind())),
                _ => Err(io::ErrorKind::NotFound.into()),
            };
            let read = read.map(|(record, bytes)| {
                // SAFETY: so many bytes of it were read, and nobody writes them any more.
                unsafe { std::slice::from_raw_parts(record.at.cast_const(), bytes) }
            });
            results.push(each(n, read));
        }
        if let (Some(ssd), Some(buffer)) = (&self.shared.ssd, buffer) {
            ssd.give_back(buffer);
        }
        results
    }
}
