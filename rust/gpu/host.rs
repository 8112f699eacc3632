//! A device that is the process: its memory is RAM, and its work is done by who asks.
//!
//! It is what the tier runs on where there is no GPU to test with. When work is done is chosen: at once, as late as the
//! rules allow, or by chance; so that a wait that is missing is seen every time, and not once in a thousand runs.

use super::device::{Coded, Device, Fault, Lane, Piece, Rows, Status, Submission, Ticket, Work};
use crate::codec::Layout;
use crate::copy::Stream;
use crate::sync::Mutex;
use std::alloc::{Layout as Memory, alloc, dealloc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

/// When work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// When it is submitted.
    AtOnce,
    /// When somebody waits for it; or one piece after each question whether something is over, so that asking ends.
    Late,
    /// Some time in between, by this seed.
    Random(u64),
}

/// What memory is filled with before anything is written to it.
const POISON: u8 = 0xdb;
const ALIGN: usize = 4096;

/// The process as a device.
pub struct Host {
    schedule: Schedule,
    capacity_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: u64,
    /// By lane, and then by stream.
    queues: BTreeMap<u64, VecDeque<Item>>,
    pending: BTreeSet<u64>,
    /// What it gave, and what it knows, by address.
    reserved: BTreeMap<u64, u64>,
    known: BTreeMap<u64, u64>,
    lost: Option<String>,
    seed: u64,
    /// How often it was asked for memory.
    asked: u64,
}

enum Do {
    Work(Vec<Work>),
    Call(Box<dyn FnOnce() + Send>),
}

struct Item {
    ticket: u64,
    after: Vec<Ticket>,
    work: Do,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("schedule", &self.schedule).field("capacity_bytes", &self.capacity_bytes).finish()
    }
}

impl Host {
    /// A device with so much memory.
    pub fn new(schedule: Schedule, capacity_bytes: u64) -> Self {
        let seed = if let Schedule::Random(seed) = schedule { seed } else { 0 };
        Self { schedule, capacity_bytes, state: Mutex::new(State { seed, ..State::default() }) }
    }

    /// From now on it is lost.
    pub fn lose(&self, reason: &str) {
        let mut state = self.state.lock();
        state.lost = Some(reason.to_owned());
        state.queues.clear();
        state.pending.clear();
    }

    /// Bytes that are reserved.
    pub fn reserved_bytes(&self) -> u64 {
        self.state.lock().reserved.values().sum()
    }

    /// How often it was asked for memory, or to know some.
    pub fn memory_calls(&self) -> u64 {
        self.state.lock().asked
    }

    /// Puts something into a caller's stream, as its own kernels would be.
    ///
    /// # Errors
    /// The device is lost.
    pub fn call(&self, stream: Stream, work: impl FnOnce() + Send + 'static) -> Result<Ticket, Fault> {
        let mut state = self.state.lock();
        let ticket = state.push(of_stream(stream), Vec::new(), Do::Call(Box::new(work)))?;
        self.proceed(&mut state, ticket);
        Ok(Ticket(ticket))
    }

    fn proceed(&self, state: &mut State, ticket: u64) {
        match self.schedule {
            Schedule::AtOnce => state.run(ticket),
            Schedule::Late => {}
            Schedule::Random(_) => (0..state.chance(3)).for_each(|_| state.run_some()),
        }
    }
}

fn of_lane(lane: Lane) -> u64 {
    lane as u64
}

// Streams have numbers above those of the lanes.
fn of_stream(Stream(stream): Stream) -> u64 {
    stream + Lane::ALL.len() as u64
}

impl State {
    fn serves(&self) -> Result<(), Fault> {
        self.lost.as_ref().map_or(Ok(()), |reason| Err(Fault::Lost(reason.clone())))
    }

    fn push(&mut self, queue: u64, after: Vec<Ticket>, work: Do) -> Result<u64, Fault> {
        self.serves()?;
        if let Some(ticket) = after.iter().find(|ticket| ticket.0 > self.last) {
            return Err(Fault::Refused(format!("ticket {} was not given", ticket.0)));
        }
        self.last += 1;
        self.pending.insert(self.last);
        self.queues.entry(queue).or_default().push_back(Item { ticket: self.last, after, work });
        Ok(self.last)
    }

    // SplitMix64's, below a number.
    fn chance(&mut self, below: u64) -> u64 {
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.seed ^ self.seed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ mixed >> 27) % below
    }

    // Does what is first in a queue, and before it what it waits for.
    fn run_first(&mut self, queue: u64) {
        let Some(item) = self.queues.get_mut(&queue).and_then(VecDeque::pop_front) else { return };
        item.after.iter().for_each(|ticket| self.run(ticket.0));
        match item.work {
            Do::Call(call) => call(),
            Do::Work(work) => work.iter().for_each(carry_out),
        }
        self.pending.remove(&item.ticket);
    }

    // Does that work, and what is before it. Whatever waits, waits for what was submitted earlier: so this ends.
    fn run(&mut self, ticket: u64) {
        while self.pending.contains(&ticket) {
            let holds = |items: &VecDeque<Item>| items.iter().any(|item| item.ticket == ticket);
            let Some(queue) = self.queues.iter().find(|(_, items)| holds(items)).map(|(&queue, _)| queue) else {
                return;
            };
            self.run_first(queue);
        }
    }

    fn run_some(&mut self) {
        let busy: Vec<u64> =
            self.queues.iter().filter(|(_, items)| !items.is_empty()).map(|(&queue, _)| queue).collect();
        if !busy.is_empty() {
            let nth = self.chance(busy.len() as u64) as usize;
            self.run_first(busy[nth]);
        }
    }

    // Whether a range that begins in memory that it has, or knows, ends there, too.
    fn check(&self, address: u64, bytes: u64) -> Result<(), Fault> {
        for memory in [&self.reserved, &self.known] {
            if let Some((&first, &size)) = memory.range(..=address).next_back()
                && address < first + size
                && address + bytes > first + size
            {
                let past = address + bytes - first - size;
                return Err(Fault::Refused(format!("{bytes} bytes go {past} beyond the end of their memory")));
            }
        }
        Ok(())
    }

    fn check_work(&self, work: &Work) -> Result<(), Fault> {
        match work {
            Work::Copy(pieces) => pieces.iter().try_for_each(|piece| {
                self.check(piece.from, piece.bytes)?;
                self.check(piece.to, piece.bytes)
            }),
            Work::Encode(coded, _) | Work::Decode(coded) => {
                let payload = coded.payload_bytes() as u64;
                coded.payloads.iter().try_for_each(|&address| self.check(address, payload))?;
                let row = coded.row_bytes as u64;
                (0..coded.payloads.len()).try_for_each(|block| {
                    (0..coded.planes.len()).try_for_each(|plane| {
                        coded.rows(block, plane).try_for_each(|address| self.check(address as u64, row))
                    })
                })
            }
        }
    }
}

fn carry_out(work: &Work) {
    match work {
        Work::Copy(pieces) => {
            for &Piece { from, to, bytes } in pieces {
                // SAFETY: `submit`'s caller promised that both are valid, and nobody else's meanwhile.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes as usize) };
            }
        }
        Work::Encode(coded, status) => (0..coded.payloads.len()).for_each(|block| encode(coded, status, block)),
        Work::Decode(coded) => (0..coded.payloads.len()).for_each(|block| decode(coded, block)),
    }
}

fn encode(coded: &Coded, status: &Status, block: usize) {
    // SAFETY: as `submit`'s caller promised, this payload is valid and nobody else's meanwhile.
    let payload = unsafe { std::slice::from_raw_parts_mut(coded.payloads[block] as *mut u8, coded.payload_bytes()) };
    for plane in 0..coded.planes.len() {
        // SAFETY: as promised, rows are valid, and nobody writes them meanwhile.
        let row = |address| unsafe { std::slice::from_raw_parts(address as *const u8, coded.row_bytes) };
        let rows: Vec<&[u8]> = coded.rows(block, plane).map(row).collect();
        let out = &mut payload[coded.plane(plane)];
        match &coded.layout {
            None => out.chunks_exact_mut(coded.row_bytes).zip(rows).for_each(|(out, row)| out.copy_from_slice(row)),
            Some(layout) => {
                if !layout.encode(plane, &rows, out) {
                    status.refuse(block);
                }
            }
        }
    }
}

fn decode(coded: &Coded, block: usize) {
    // SAFETY: as `submit`'s caller promised, this payload is valid, and nobody writes it meanwhile.
    let payload = unsafe { std::slice::from_raw_parts(coded.payloads[block] as *const u8, coded.payload_bytes()) };
    for plane in 0..coded.planes.len() {
        // SAFETY: as promised, rows are valid, apart from each other, and nobody else's meanwhile.
        let row = |address| unsafe { std::slice::from_raw_parts_mut(address as *mut u8, coded.row_bytes) };
        let mut rows: Vec<&mut [u8]> = coded.rows(block, plane).map(row).collect();
        let from = &payload[coded.plane(plane)];
        match &coded.layout {
            None => from.chunks_exact(coded.row_bytes).zip(rows).for_each(|(from, row)| row.copy_from_slice(from)),
            Some(layout) => layout.decode(plane, from, &mut rows),
        }
    }
}

impl Device for Host {
    fn name(&self) -> String {
        "host memory".into()
    }

    fn number(&self) -> u32 {
        0
    }

    fn reserve(&self, bytes: u64) -> Result<u64, Fault> {
        let mut state = self.state.lock();
        state.serves()?;
        state.asked += 1;
        let used: u64 = state.reserved.values().sum();
        let memory = Memory::from_size_align(bytes as usize, ALIGN).ok().filter(|memory| memory.size() > 0);
        let memory = memory.filter(|_| used + bytes <= self.capacity_bytes).ok_or(Fault::NoRoom(bytes))?;
        // SAFETY: it is of more than zero bytes.
        let address = unsafe { alloc(memory) };
        if address.is_null() {
            return Err(Fault::NoRoom(bytes));
        }
        // SAFETY: so many bytes were just given.
        unsafe { address.write_bytes(POISON, bytes as usize) };
        state.reserved.insert(address as u64, bytes);
        Ok(address as u64)
    }

    fn release(&self, address: u64) -> Result<(), Fault> {
        let mut state = self.state.lock();
        let bytes = state.reserved.remove(&address);
        let bytes = bytes.ok_or_else(|| Fault::Refused(format!("nothing was reserved at {address:#x}")))?;
        state.serves()?;
        // What touches it is over then, as all else is.
        while let Some(&ticket) = state.pending.last() {
            state.run(ticket);
        }
        let memory = Memory::from_size_align(bytes as usize, ALIGN).expect("as it was given");
        // SAFETY: it was given by `reserve` with that layout, and is taken out of the books.
        unsafe { dealloc(address as *mut u8, memory) };
        Ok(())
    }

    /// # Safety
    /// As [`Device`] says.
    unsafe fn register(&self, memory: *mut u8, bytes: usize) -> Result<u64, Fault> {
        let mut state = self.state.lock();
        state.serves()?;
        state.asked += 1;
        state.known.insert(memory as u64, bytes as u64);
        Ok(memory as u64)
    }

    fn forget(&self, memory: *mut u8) -> Result<(), Fault> {
        let mut state = self.state.lock();
        let known = state.known.remove(&(memory as u64));
        known.map(|_| ()).ok_or_else(|| Fault::Refused("that memory is not known".into()))
    }

    fn owns(&self, _: u64) -> Result<bool, Fault> {
        // All of the process is.
        self.state.lock().serves().map(|()| true)
    }

    fn takes(&self, layout: &Layout) -> bool {
        // What stays exact of the first block of a sequence lies behind the planes.
        layout.bytes_of(true) == layout.bytes()
    }

    /// # Safety
    /// As [`Device`] says.
    unsafe fn submit(&self, submission: Submission) -> Result<Ticket, Fault> {
        let mut state = self.state.lock();
        let Submission { lane, after, work } = submission;
        state.serves()?;
        work.iter().try_for_each(|work| state.check_work(work))?;
        let ticket = state.push(of_lane(lane), after, Do::Work(work))?;
        self.proceed(&mut state, ticket);
        Ok(Ticket(ticket))
    }

    fn is_over(&self, ticket: Ticket) -> Result<bool, Fault> {
        let mut state = self.state.lock();
        state.serves()?;
        let over = !state.pending.contains(&ticket.0);
        if !over {
            state.run_some();
        }
        Ok(over)
    }

    fn wait(&self, ticket: Ticket) -> Result<(), Fault> {
        let mut state = self.state.lock();
        state.serves()?;
        state.run(ticket.0);
        Ok(())
    }

    fn mark(&self, stream: Stream) -> Result<Ticket, Fault> {
        let mut state = self.state.lock();
        let ticket = state.push(of_stream(stream), Vec::new(), Do::Work(Vec::new()))?;
        self.proceed(&mut state, ticket);
        Ok(Ticket(ticket))
    }

    fn join(&self, stream: Stream, ticket: Ticket) -> Result<(), Fault> {
        let mut state = self.state.lock();
        let joined = state.push(of_stream(stream), vec![ticket], Do::Work(Vec::new()))?;
        self.proceed(&mut state, joined);
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (address, bytes) in std::mem::take(&mut self.state.lock().reserved) {
            let memory = Memory::from_size_align(bytes as usize, ALIGN).expect("as it was given");
            // SAFETY: it was given by `reserve` with that layout, and nobody can reach the device any more.
            unsafe { dealloc(address as *mut u8, memory) };
        }
    }
}

impl Coded {
    /// Bytes of a plane that is not encoded.
    pub(super) fn plane_bytes(&self) -> usize {
        self.heads as usize * self.block_tokens as usize * self.row_bytes
    }

    /// Runs of a block.
    pub(super) fn runs(&self) -> usize {
        self.block_tokens.div_ceil(self.run_tokens) as usize
    }

    /// Bytes of a payload.
    pub(super) fn payload_bytes(&self) -> usize {
        let plain = || self.planes.len() * self.plane_bytes();
        self.layout.as_ref().map_or_else(plain, |layout| layout.bytes())
    }

    // Where a plane lies in a payload.
    fn plane(&self, plane: usize) -> std::ops::Range<usize> {
        let bytes = self.plane_bytes();
        self.layout.as_ref().map_or(plane * bytes..(plane + 1) * bytes, |layout| layout.plane(plane))
    }

    // Addresses of a plane's rows of a block, by head and then token.
    pub(super) fn rows(&self, block: usize, plane: usize) -> impl Iterator<Item = usize> + '_ {
        let Rows { base, head_stride, token_stride } = self.planes[plane];
        let runs = self.runs();
        (0..u64::from(self.heads)).flat_map(move |head| {
            (0..u64::from(self.block_tokens)).map(move |token| {
                let run = token / u64::from(self.run_tokens);
                let offset = self.offsets[block * runs + run as usize];
                let within = token % u64::from(self.run_tokens);
                let strides = head.wrapping_mul(head_stride).wrapping_add(within.wrapping_mul(token_stride));
                base.wrapping_add(offset).wrapping_add(strides) as usize
            })
        })
    }
}
