//! What a device does for the tier: it has memory, and works behind the call.

use crate::codec::Layout;
use crate::copy::Stream;
use crate::sync::{Arc, AtomicU32, Ordering};
use std::fmt;

/// Names work that was submitted at once; later work has a greater one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub(crate) u64);

impl Ticket {
    /// That of nothing: it is always over.
    pub const NONE: Self = Self(0);
}

/// Queues of the device's own: what is in one is done in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// From RAM to the device.
    Up,
    /// From the device to RAM.
    Down,
    /// Within the device, and what is encoded or decoded on it.
    Across,
}

impl Lane {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Up, Self::Down, Self::Across];
}

/// Why a device does not do what it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// There is no room for that much memory now.
    #[error("the device has no room for {0} bytes")]
    NoRoom(u64),
    /// The device, or its context, is of no use any more: nothing of it can be read.
    #[error("the device is lost: {0}")]
    Lost(String),
    /// Whether what was submitted is over cannot be known: what it touches may change at any time. Else as lost.
    #[error("the device does not say what is over: {0}")]
    Unknown(String),
    /// What it was asked for makes no sense, or it cannot do that.
    #[error("{0}")]
    Refused(String),
}

/// Bytes to copy, by addresses that the device knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Piece {
    /// Where they are.
    pub from: u64,
    /// Where they go.
    pub to: u64,
    /// How many.
    pub bytes: u64,
}

/// Where one plane of some blocks lies. Row (block b, head h, token t) is at `base` + the offset of (b, t)'s run + h ×
/// `head_stride` + (t's number in its run) × `token_stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// An address, or a part of one.
    pub base: u64,
    /// Bytes from one head to the next.
    pub head_stride: u64,
    /// Bytes from one token to the next of a run.
    pub token_stride: u64,
}

/// Whether each of some blocks could be encoded; known when the ticket is over.
#[derive(Debug, Clone)]
pub struct Status(Arc<[AtomicU32]>);

impl Status {
    /// Of so many blocks.
    pub fn new(blocks: usize) -> Self {
        Self(std::iter::repeat_with(AtomicU32::default).take(blocks).collect())
    }

    /// A block cannot be encoded.
    pub(crate) fn refuse(&self, block: usize) {
        // Relaxed: who reads it has seen the ticket end.
        self.0[block].fetch_or(1, Ordering::Relaxed);
    }

    /// Whether what is at the block's place is its encoding.
    pub fn is_encoded(&self, block: usize) -> bool {
        self.0[block].load(Ordering::Relaxed) == 0
    }
}

/// Blocks in rows and their payloads, plain or encoded: which way they go, the work says.
#[derive(Debug, Clone)]
pub struct Coded {
    /// How payloads are encoded; `None`: they are as their rows, plane by plane.
    pub layout: Option<Arc<Layout>>,
    /// Heads of a plane.
    pub heads: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of a row: one token of one head.
    pub row_bytes: usize,
    /// Where each plane's rows are.
    pub planes: Arc<[Rows]>,
    /// Tokens that lie at one stride.
    pub run_tokens: u32,
    /// Of each run of each block, what is added to its rows' addresses.
    pub offsets: Vec<u64>,
    /// Of each block, the address of its payload.
    pub payloads: Vec<u64>,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub enum Work {
    /// Copies bytes as they are.
    Copy(Vec<Piece>),
    /// From rows to payloads. Where a plane of a block does not fit, its payload means nothing, and the status says so.
    Encode(Coded, Status),
    /// From payloads to rows.
    Decode(Coded),
}

/// What is submitted at once.
#[derive(Debug)]
pub struct Submission {
    /// Where it is queued.
    pub lane: Lane,
    /// What it waits for.
    pub after: Vec<Ticket>,
    /// What is done, in order.
    pub work: Vec<Work>,
}

/// A device. Any thread may call it; no call waits for work but [`wait`](Self::wait).
pub trait Device: fmt::Debug + Send + Sync {
    /// Its name, for people.
    fn name(&self) -> String;

    /// Its number, as the driver counts; 0 where there is none.
    fn number(&self) -> u32;

    /// Memory of the device, zero or not; its address.
    ///
    /// # Errors
    /// There is no room for it, or the device is lost.
    fn reserve(&self, bytes: u64) -> Result<u64, Fault>;

    /// Gives that back, and waits until what touches it is over.
    ///
    /// # Errors
    /// There is no such memory, or the device is lost.
    fn release(&self, address: u64) -> Result<(), Fault>;

    /// Makes memory of the process known, and keeps it where it is; the address by which the device reaches it.
    ///
    /// # Safety
    /// It stays valid until [`forget`](Self::forget).
    ///
    /// # Errors
    /// It cannot be locked, or the device is lost.
    unsafe fn register(&self, memory: *mut u8, bytes: usize) -> Result<u64, Fault>;

    /// Takes that back, when what touches it is over.
    ///
    /// # Errors
    /// No such memory is known, or the device is lost.
    fn forget(&self, memory: *mut u8) -> Result<(), Fault>;

    /// Whether memory at an address is the device's.
    ///
    /// # Errors
    /// The device is lost.
    fn owns(&self, address: u64) -> Result<bool, Fault>;

    /// Whether it encodes and decodes by that layout.
    fn takes(&self, layout: &Layout) -> bool;

    /// Queues work; it is over some time after.
    ///
    /// # Safety
    /// Every address is of memory that the device has or knows, or of the caller's tensors there, and stays so until the
    /// ticket is over; nobody else writes what is read, or touches what is written, meanwhile.
    ///
    /// # Errors
    /// The device refuses it, and then nothing of it is done; or it is lost.
    unsafe fn submit(&self, submission: Submission) -> Result<Ticket, Fault>;

    /// Whether that work is over. What was given once stays true.
    ///
    /// # Errors
    /// The device is lost.
    fn is_over(&self, ticket: Ticket) -> Result<bool, Fault>;

    /// Waits until that work is over.
    ///
    /// # Errors
    /// The device is lost.
    fn wait(&self, ticket: Ticket) -> Result<(), Fault>;

    /// What was put into the caller's stream up to now, as a ticket.
    ///
    /// # Errors
    /// There is no such stream, it is another device's, or the device is lost.
    fn mark(&self, stream: Stream) -> Result<Ticket, Fault>;

    /// Has what comes into the caller's stream from now on wait for that work.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    fn join(&self, stream: Stream, ticket: Ticket) -> Result<(), Fault>;
}
