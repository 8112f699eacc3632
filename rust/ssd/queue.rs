//! Transfers between memory and a file, several at a time.
//!
//! ```text
//! push ─▶ under way, at most `DEPTH` and about `FLIGHT_BYTES` ─▶ pop, in any order
//! ```
//! What a queue does with them is its engine's: io_uring hands them to the kernel, [`Threads`] to a few threads, and
//! [`Inline`] does each when it is pushed. All finish what was cut short, and end a read where the file ends.

use super::io::{Handle, IoFile};
use crate::sync::{Arc, Mutex};
use std::collections::VecDeque;
use std::io;
use std::sync::mpsc;

/// Transfers that are under way at once.
pub(crate) const DEPTH: usize = 32;
/// Bytes that are under way at once, unless one transfer is longer.
pub(crate) const FLIGHT_BYTES: usize = 16 << 20;
/// Threads that an engine without a queue in the kernel has.
const THREADS: usize = 4;

/// Memory that a transfer reads to or writes from; address and length are multiples of 4 KiB.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Part {
    /// Its first byte.
    pub at: *mut u8,
    /// Its length.
    pub bytes: usize,
}

// SAFETY: a part names memory; whoever pushes it vouches for that.
unsafe impl Send for Part {}

impl Part {
    /// Memory that is read from alone.
    pub fn of(bytes: &[u8]) -> Self {
        Self { at: bytes.as_ptr().cast_mut(), bytes: bytes.len() }
    }
}

/// One transfer.
#[derive(Debug)]
pub struct Transfer {
    /// What `pop` calls it by.
    pub tag: usize,
    /// To the file, or from it.
    pub write: bool,
    /// At most 1,024, one after the other in the file.
    pub parts: Vec<Part>,
    /// Where in the file, a multiple of 4 KiB.
    pub offset: u64,
}

impl Transfer {
    /// Bytes of all its parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// Takes off what was done.
    pub(super) fn advance(&mut self, bytes: usize) {
        let mut left = bytes;
        self.offset += bytes as u64;
        self.parts.retain_mut(|part| {
            let now = left.min(part.bytes);
            left -= now;
            part.at = part.at.wrapping_add(now);
            part.bytes -= now;
            part.bytes > 0
        });
    }

    /// What a call that moved `bytes` means: the whole transfer is done, or it has to go on.
    pub(super) fn moved(&mut self, bytes: usize, direct: bool) -> io::Result<Progress> {
        self.advance(bytes);
        match bytes {
            _ if self.parts.is_empty() => Ok(Progress::Done),
            0 if self.write => Err(io::ErrorKind::WriteZero.into()),
            0 => Ok(Progress::Done),
            // A direct read that ends at an odd length has met the end of the file.
            n if direct && !self.write && n % 512 != 0 => Ok(Progress::Done),
            _ => Ok(Progress::More),
        }
    }
}

/// Whether a transfer goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    More,
}

/// A transfer that ended.
#[derive(Debug)]
pub struct Done {
    /// As it was pushed.
    pub tag: usize,
    /// Bytes that were moved; fewer than asked where the file ends.
    pub result: io::Result<usize>,
}

/// Transfers of one file that are under way. Dropping it waits for them.
pub trait Queue: Send + std::fmt::Debug {
    /// Begins one.
    ///
    /// # Safety
    /// The memory of its parts lives, and nobody else touches it, until the transfer was popped or the queue is gone.
    unsafe fn push(&mut self, transfer: Transfer);

    /// Has those that were pushed begin before one is waited for.
    fn start(&mut self) {}

    /// Waits for the end of one; `None`: none is under way.
    fn pop(&mut self) -> Option<Done>;
}

/// Does each transfer when it is pushed, by the plain calls of a file.
#[derive(Debug)]
pub(super) struct Inline<'a> {
    file: &'a dyn IoFile,
    done: VecDeque<Done>,
}

impl<'a> Inline<'a> {
    pub(super) fn new(file: &'a dyn IoFile) -> Self {
        Self { file, done: VecDeque::new() }
    }
}

impl Transfer {
    /// Does it by plain calls.
    ///
    /// # Safety
    /// As of `Queue::push`.
    unsafe fn perform(
        &self,
        read_at: impl Fn(&mut [u8], u64) -> io::Result<usize>,
        write_at: impl Fn(&[&[u8]], u64) -> io::Result<()>,
    ) -> io::Result<usize> {
        if self.write {
            // SAFETY: the memory lives, says the caller.
            let part = |part: &Part| unsafe { std::slice::from_raw_parts(part.at.cast_const(), part.bytes) };
            let parts: Vec<&[u8]> = self.parts.iter().map(part).collect();
            write_at(&parts, self.offset)?;
            return Ok(self.bytes());
        }
        let mut done = 0;
        for part in &self.parts {
            // SAFETY: the memory lives and nobody else touches it, says the caller.
            let buffer = unsafe { std::slice::from_raw_parts_mut(part.at, part.bytes) };
            let read = read_at(buffer, self.offset + done as u64)?;
            done += read;
            if read < part.bytes {
                break;
            }
        }
        Ok(done)
    }
}

impl Queue for Inline<'_> {
    /// # Safety
    /// As of every queue.
    unsafe fn push(&mut self, transfer: Transfer) {
        // SAFETY: passed on.
        let result = unsafe {
            transfer.perform(|buffer, at| self.file.read_at(buffer, at), |parts, at| self.file.write_at(parts, at))
        };
        self.done.push_back(Done { tag: transfer.tag, result });
    }

    fn pop(&mut self) -> Option<Done> {
        self.done.pop_front()
    }
}

/// The engine of systems without io_uring: a few threads that read and write.
#[derive(Debug, Default)]
pub(super) struct Threads {
    /// What they wait for; they are started by the first who asks.
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
}

#[derive(Debug)]
struct Job {
    file: Arc<Handle>,
    transfer: Transfer,
    reply: mpsc::Sender<Done>,
}

impl Threads {
    // They end with the engine.
    fn begin() -> io::Result<mpsc::Sender<Job>> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for n in 0..THREADS {
            let queue = queue.clone();
            let thread = std::thread::Builder::new().name(format!("stratakv-io-{n}"));
            thread.spawn(move || {
                loop {
                    let job = queue.lock().recv();
                    let Ok(Job { file, transfer, reply }) = job else { break };
                    let tag = transfer.tag;
                    // SAFETY: whoever pushed it vouches for its memory, and waits for the reply.
                    let result = unsafe {
                        transfer.perform(|buffer, at| file.read_at(buffer, at), |parts, at| file.write_at(parts, at))
                    };
                    // Nobody waits where the queue is gone; it does not go before.
                    drop(reply.send(Done { tag, result }));
                }
            })?;
        }
        Ok(jobs)
    }

    /// A queue; `None`: no threads are to be had now.
    pub(super) fn queue(&self, file: Arc<Handle>) -> Option<ThreadQueue> {
        let mut jobs = self.jobs.lock();
        if jobs.is_none() {
            *jobs = Self::begin().ok();
        }
        let (reply, done) = mpsc::channel();
        Some(ThreadQueue { jobs: jobs.clone()?, file, reply, done, under_way: 0 })
    }
}

/// Transfers that the threads have.
#[derive(Debug)]
pub(super) struct ThreadQueue {
    jobs: mpsc::Sender<Job>,
    file: Arc<Handle>,
    reply: mpsc::Sender<Done>,
    done: mpsc::Receiver<Done>,
    under_way: usize,
}

impl Queue for ThreadQueue {
    /// # Safety
    /// As of every queue.
    unsafe fn push(&mut self, transfer: Transfer) {
        self.under_way += 1;
        let job = Job { file: self.file.clone(), transfer, reply: self.reply.clone() };
        if let Err(mpsc::SendError(job)) = self.jobs.send(job) {
            let result = Err(io::Error::other("the threads of the SSD tier are gone"));
            drop(self.reply.send(Done { tag: job.transfer.tag, result }));
        }
    }

    fn pop(&mut self) -> Option<Done> {
        self.under_way = self.under_way.checked_sub(1)?;
        self.done.recv().ok()
    }
}

impl Drop for ThreadQueue {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
