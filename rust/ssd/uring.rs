//! io_uring: transfers are handed to the kernel in batches, and their ends read from shared memory.
//!
//! A ring serves one queue at a time, and is kept for the next; there are as many as loads and writes at once. Nothing is
//! registered with it, see docs/architecture.md.

use super::io::Handle;
use super::queue::{DEPTH, Done, Progress, Queue, Transfer};
use crate::sync::Mutex;
use io_uring::{IoUring, opcode, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

/// Rings that are kept.
const KEPT: usize = 16;
/// The kernel is asked so often before what it does not take, or not finish, counts as failed.
const PATIENCE: u32 = 100;

/// The rings of a store.
#[derive(Default)]
pub(super) struct Rings(Mutex<Vec<IoUring>>);

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rings")
    }
}

impl Rings {
    /// Makes one to see whether the kernel allows it: containers often do not.
    pub(super) fn new() -> io::Result<Self> {
        let rings = Self::default();
        let ring = Self::ring()?;
        rings.0.lock().push(ring);
        Ok(rings)
    }

    fn ring() -> io::Result<IoUring> {
        let mut probe = io_uring::Probe::new();
        let ring = IoUring::builder().dontfork().build(DEPTH as u32)?;
        ring.submitter().register_probe(&mut probe)?;
        if [opcode::Readv::CODE, opcode::Writev::CODE].into_iter().all(|code| probe.is_supported(code)) {
            Ok(ring)
        } else {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// A queue; `None`: no ring is to be had now.
    pub(super) fn queue<'a>(&'a self, file: &'a Handle) -> Option<RingQueue<'a>> {
        let kept = self.0.lock().pop();
        let ring = kept.or_else(|| Self::ring().ok())?;
        let slots = (0..DEPTH).map(|_| None).collect();
        Some(RingQueue { rings: self, ring: Some(ring), file, slots, waiting: VecDeque::new(), failed: Vec::new() })
    }
}

/// Transfers that the kernel has.
pub(super) struct RingQueue<'a> {
    rings: &'a Rings,
    ring: Option<IoUring>,
    file: &'a Handle,
    /// Under way, by the number that the kernel knows them by.
    slots: Vec<Option<Flying>>,
    /// More than a ring takes at once.
    waiting: VecDeque<Flying>,
    failed: Vec<Done>,
}

struct Flying {
    transfer: Transfer,
    moved: usize,
    /// How often the kernel said to come again.
    again: u32,
}

impl std::fmt::Debug for RingQueue<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingQueue").field("file", self.file).finish_non_exhaustive()
    }
}

impl RingQueue<'_> {
    // Hands over what waits, as far as there are slots.
    fn fill(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let mut vacant = (0..self.slots.len()).filter(|&n| self.slots[n].is_none()).collect::<Vec<_>>();
        let mut submission = ring.submission();
        while let Some(&slot) = vacant.last()
            && !submission.is_full()
            && let Some(flying) = self.waiting.pop_front()
        {
            vacant.pop();
            let file = types::Fd(self.file.as_raw_fd());
            let Transfer { parts, write, offset, .. } = &flying.transfer;
            let (at, count) = (parts.as_ptr().cast(), parts.len() as u32);
            let entry = if *write {
                opcode::Writev::new(file, at, count).offset(*offset).build()
            } else {
                opcode::Readv::new(file, at, count).offset(*offset).build()
            };
            // SAFETY: the parts, and the list of them, stay where they are until the kernel is done with them: the list
            // with `flying`, in its slot, and what they name as whoever pushed them vouched. The file outlives `self`.
            let pushed = unsafe { submission.push(&entry.user_data(slot as u64)) };
            if pushed.is_err() {
                self.waiting.push_front(flying);
                break;
            }
            self.slots[slot] = Some(flying);
        }
    }

    // Waits until the kernel has finished something. Memory that it may still touch is never given back before.
    fn wait(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        for _ in 0..PATIENCE {
            match ring.submit_and_wait(1) {
                Ok(_) => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => return,
                // Short of memory, or its ring of ends is full.
                Err(_) if !ring.completion().is_empty() => return,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        // What it did not take up to now goes with the ring; what it took is waited for.
        let untaken = ring.submission().len();
        let under_way = self.slots.iter().flatten().count();
        if under_way == untaken {
            self.ring = None;
            let all = self.slots.iter_mut().filter_map(Option::take).chain(self.waiting.drain(..));
            let refused = || io::Error::other("io_uring takes no transfers");
            self.failed.extend(all.map(|flying| Done { tag: flying.transfer.tag, result: Err(refused()) }));
        }
    }

    fn reap(&mut self) -> Option<Done> {
        let direct = self.file.is_direct();
        loop {
            let end = self.ring.as_mut()?.completion().next()?;
            let slot = end.user_data() as usize;
            let Some(mut flying) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            let tag = flying.transfer.tag;
            let result = match usize::try_from(end.result()) {
                Ok(bytes) => {
                    flying.moved += bytes;
                    flying.transfer.moved(bytes, direct)
                }
                Err(_) => Err(io::Error::from_raw_os_error(-end.result())),
            };
            match result {
                Ok(Progress::Done) => return Some(Done { tag, result: Ok(flying.moved) }),
                Ok(Progress::More) => self.waiting.push_front(flying),
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
                        && flying.again < PATIENCE =>
                {
                    flying.again += 1;
                    self.waiting.push_front(flying);
                }
                Err(e) => return Some(Done { tag, result: Err(e) }),
            }
        }
    }
}

impl Queue for RingQueue<'_> {
    /// # Safety
    /// As of every queue.
    unsafe fn push(&mut self, transfer: Transfer) {
        self.waiting.push_back(Flying { transfer, moved: 0, again: 0 });
    }

    fn start(&mut self) {
        self.fill();
        // What is not taken now is taken when its end is waited for.
        let _ = self.ring.as_mut().map(|ring| ring.submit());
    }

    fn pop(&mut self) -> Option<Done> {
        loop {
            if let Some(done) = self.failed.pop().or_else(|| self.reap()) {
                return Some(done);
            }
            if self.ring.is_none() {
                let flying = self.waiting.pop_front()?;
                let result = Err(io::Error::other("io_uring takes no transfers"));
                return Some(Done { tag: flying.transfer.tag, result });
            }
            self.fill();
            if self.slots.iter().all(Option::is_none) {
                return None;
            }
            self.wait();
        }
    }
}

impl Drop for RingQueue<'_> {
    fn drop(&mut self) {
        self.waiting.clear();
        while self.pop().is_some() {
            self.waiting.clear();
        }
        let mut kept = self.rings.0.lock();
        if let Some(ring) = self.ring.take().filter(|_| kept.len() < KEPT) {
            kept.push(ring);
        }
    }
}
