//! A GPU, through its driver.
//!
//! Each lane is a stream of its own. What the device has to read beside the bytes themselves, tables of addresses, stands
//! in a ring of pinned memory, a part of which is used again when the work that it was for is over. A ticket is an event
//! that was recorded behind its work; nothing else is asked of the device to know what is over.
//!
//! ```text
//! submit ─▶ tables into the lane's ring ─▶ wait for the tickets' events ─▶ copies and launches ─▶ event: the ticket
//! ```

mod launch;

use super::device::{Device, Fault, Lane, Status, Submission, Ticket, Work};
use super::ffi::{self, Facts, Gpu, Image, ended};
use super::images::IMAGES;
use crate::codec::Layout;
use crate::copy::Stream;
use crate::sync::{AtomicU32, Home, Mutex, Ordering};
use launch::VECTOR;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int};
use std::time::Duration;

/// Tables that may wait in one lane.
const RING_BYTES: usize = 4 << 20;
/// Tickets whose events are kept before those that are over are looked for, and how many are looked at then.
const KEPT: usize = 64;
const SWEPT: usize = 4;
/// How often, if nothing else is said, and how long apart, a wait is tried that the driver refuses: for a minute.
const WAITS: u32 = 6000;
const PAUSE: Duration = Duration::from_millis(10);
/// Parts of a table begin at multiples of this.
const ALIGN: usize = 64;

/// Why there is no GPU to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Absent {
    /// There is no driver, or one that is too old.
    #[error("no driver: {0}")]
    Driver(String),
    /// There is no such device.
    #[error("no device: {0}")]
    Device(String),
    /// The device is one for which there is no image.
    #[error("no image: {0}")]
    Image(String),
    /// The driver says so.
    #[error("{0}")]
    Fault(Fault),
}

/// How pieces are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// By copy engines, a call for each piece.
    Engine,
    /// By copy engines, one call for all.
    Batch,
    /// By a kernel.
    Kernel,
}

impl Path {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Engine, Self::Batch, Self::Kernel];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Batch => "batch",
            Self::Kernel => "kernel",
        }
    }

    // Its number in `kv_host.h`.
    fn number(self) -> c_int {
        match self {
            Self::Engine => ffi::BY_ENGINE,
            Self::Batch => ffi::BY_BATCH,
            Self::Kernel => ffi::BY_KERNEL,
        }
    }
}

/// From how many bytes of a piece on copy engines are faster than a kernel, on average over a copy's pieces, where there
/// are at least so many.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Paths {
    /// Bytes, to the device and from it.
    pub engines_from: [u64; 2],
    /// Pieces; of fewer a kernel is never worth its start.
    pub least_pieces: usize,
}

impl Default for Paths {
    /// What others measured on PCIe 5 (vLLM's pull request 42212); [`Cuda::set_paths`] for what is measured here.
    fn default() -> Self {
        Self { engines_from: [28 << 10; 2], least_pieces: 16 }
    }
}

/// A device of the driver.
pub struct Cuda {
    gpu: Handle,
    number: c_int,
    facts: Facts,
    lanes: [Mutex<LaneState>; Lane::ALL.len()],
    /// Events of work that may not be over, by ticket.
    events: Mutex<Events>,
    paths: Mutex<Paths>,
    waits: AtomicU32,
    home: Home,
}

#[derive(Clone, Copy)]
struct Handle(*mut Gpu);

// SAFETY: any thread may call `kv_host`'s functions.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

#[derive(Default)]
struct Events {
    last: u64,
    pending: BTreeMap<u64, u64>,
    /// Those that nobody waits for.
    spare: Vec<u64>,
}

struct LaneState {
    stream: u64,
    /// The ring, as the process and as the device reach it.
    memory: *mut u8,
    address: u64,
    next: usize,
    /// What is under way in it is not known any more.
    lost: bool,
    /// Of work that may not be over: its ticket, where its table begins, and statuses to be read then.
    used: VecDeque<Used>,
}

// SAFETY: the ring is the lane's alone, and only who has its lock touches it.
unsafe impl Send for LaneState {}

/// A table in the ring: where it begins, and where in the ring the status words of which blocks are.
struct Used {
    ticket: Ticket,
    begin: usize,
    status: Option<(Status, usize, std::ops::Range<usize>)>,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("name", &self.name()).finish_non_exhaustive()
    }
}

fn text(bytes: &[c_char]) -> String {
    // SAFETY: a `char` is a byte, with a sign or without.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), bytes.len()) };
    CStr::from_bytes_until_nul(bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Cuda {
    /// Opens a device of the system's driver, or of the library that stands in for it in tests.
    ///
    /// # Errors
    /// Why there is none.
    pub fn open(device: u32, driver: Option<&std::path::Path>) -> Result<Self, Absent> {
        Self::open_with(device, driver, false)
    }

    /// The same by PTX, which the driver compiles, though an image fits.
    ///
    /// # Errors
    /// As there.
    pub fn open_by_ptx(device: u32, driver: Option<&std::path::Path>) -> Result<Self, Absent> {
        Self::open_with(device, driver, true)
    }

    fn open_with(device: u32, driver: Option<&std::path::Path>, by_ptx: bool) -> Result<Self, Absent> {
        let driver = driver.map(|path| CString::new(path.as_os_str().as_encoded_bytes()).unwrap_or_default());
        let image = |&(arch, is_ptx, bytes): &(u32, bool, &[u8])| Image {
            bytes: bytes.as_ptr().cast(),
            size: bytes.len(),
            arch,
            is_ptx: u32::from(is_ptx),
        };
        let images: Vec<Image> = IMAGES.iter().map(image).collect();
        let number = c_int::try_from(device).unwrap_or(c_int::MAX);
        let mut gpu = std::ptr::null_mut();
        // SAFETY: all of it is there during the call, after which the driver needs none of it.
        let end = unsafe {
            ffi::kv_open(
                driver.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()),
                number,
                images.as_ptr(),
                images.len(),
                c_int::from(by_ptx),
                &mut gpu,
            )
        };
        match end {
            ffi::NO_DRIVER => return Err(Absent::Driver(ffi::why())),
            ffi::NO_DEVICE => return Err(Absent::Device(ffi::why())),
            ffi::NO_IMAGE => return Err(Absent::Image(ffi::why())),
            end => ended(end, 0).map_err(Absent::Fault)?,
        }
        let gpu = Handle(gpu);
        let made = Self::lanes(gpu);
        // SAFETY: it was opened above; of plain numbers and texts zeros are some.
        let facts = unsafe {
            let mut facts: Facts = std::mem::zeroed();
            ffi::kv_tell(gpu.0, &mut facts);
            facts
        };
        let (events, paths) = (Mutex::default(), Mutex::default());
        match made {
            Ok(lanes) => Ok(Self {
                gpu,
                number,
                facts,
                lanes,
                events,
                paths,
                waits: AtomicU32::new(WAITS),
                home: Home::default(),
            }),
            Err(fault) => {
                // SAFETY: it was opened above, and nothing has it.
                unsafe { ffi::kv_close(gpu.0) };
                Err(Absent::Fault(fault))
            }
        }
    }

    fn lanes(gpu: Handle) -> Result<[Mutex<LaneState>; Lane::ALL.len()], Fault> {
        let mut lanes = Vec::new();
        for _ in Lane::ALL {
            let (mut stream, mut memory, mut address) = (0, std::ptr::null_mut(), 0);
            // SAFETY: the device was opened.
            let made = ended(unsafe { ffi::kv_stream(gpu.0, &mut stream) }, 0).and_then(|()| {
                // SAFETY: as above.
                ended(unsafe { ffi::kv_pinned(gpu.0, RING_BYTES, &mut memory, &mut address) }, RING_BYTES as u64)
            });
            let lane =
                LaneState { stream, memory: memory.cast(), address, next: 0, lost: false, used: VecDeque::new() };
            lanes.push(Mutex::new(lane));
            if let Err(fault) = made {
                lanes.into_iter().for_each(|lane| end_lane(gpu, &lane.into_inner()));
                return Err(fault);
            }
        }
        let lanes: Result<[_; Lane::ALL.len()], _> = lanes.try_into();
        Ok(lanes.unwrap_or_else(|_| unreachable!("one for each lane")))
    }

    /// The driver's version, as 12090.
    pub fn driver(&self) -> u32 {
        self.facts.driver
    }

    /// Its compute capability, as 90.
    pub fn arch(&self) -> u32 {
        10 * self.facts.major + self.facts.minor
    }

    /// For which architecture the image is that runs there, and whether it was compiled from PTX.
    pub fn image(&self) -> (u32, bool) {
        (self.facts.image_arch, self.facts.image_is_ptx != 0)
    }

    /// Its place on the bus.
    pub fn pci(&self) -> String {
        text(&self.facts.pci)
    }

    /// Bytes of its memory, and those of them that nobody has.
    ///
    /// # Errors
    /// The device is lost.
    pub fn memory(&self) -> Result<(u64, u64), Fault> {
        let mut free = 0;
        // SAFETY: the device was opened.
        ended(unsafe { ffi::kv_free_bytes(self.gpu.0, &mut free) }, 0)?;
        Ok((self.facts.total_bytes, free))
    }

    /// Whether its driver copies many pieces in one call.
    pub fn has_batch(&self) -> bool {
        self.facts.has_batch != 0
    }

    /// Whether it is a GPU, and not what stands in for one in tests.
    pub fn is_real(&self) -> bool {
        !self.name().contains("not a GPU")
    }

    /// Tickets whose events are kept: of work that may not be over.
    pub fn tickets(&self) -> usize {
        self.events.lock().pending.len()
    }

    /// Has copies take other paths from now on; those up to now.
    pub fn set_paths(&self, paths: Paths) -> Paths {
        std::mem::replace(&mut *self.paths.lock(), paths)
    }

    /// How often a wait is tried that the driver refuses, 10 ms apart; then nobody knows what is over.
    pub fn set_patience(&self, waits: u32) {
        // Relaxed: it orders nothing.
        self.waits.store(waits, Ordering::Relaxed);
    }

    // Waits, and tries again where a wait is refused: that may be over soon, and nobody may go on as if the work were over.
    fn patiently(&self, wait: impl Fn() -> c_int) -> Result<(), Fault> {
        for _ in 0..self.waits.load(Ordering::Relaxed) {
            match ended(wait(), 0) {
                Err(Fault::Refused(_) | Fault::NoRoom(_)) => std::thread::sleep(PAUSE),
                end => return end,
            }
        }
        Err(Fault::Unknown(ffi::why()))
    }

    // An event that nobody waits for.
    fn event(&self, events: &mut Events) -> Result<u64, Fault> {
        if let Some(event) = events.spare.pop() {
            return Ok(event);
        }
        let mut event = 0;
        // SAFETY: the device was opened.
        ended(unsafe { ffi::kv_event(self.gpu.0, 0, &mut event) }, 0)?;
        Ok(event)
    }

    // Takes events back that nobody asked for again: those of the oldest tickets, as far as they are over.
    fn sweep(&self, events: &mut Events) -> Result<(), Fault> {
        for _ in 0..SWEPT {
            let Some((&ticket, &event)) = events.pending.first_key_value().filter(|_| events.pending.len() > KEPT)
            else {
                break;
            };
            // SAFETY: the device was opened; the event stays as it is while its ticket is pending, which the lock holds.
            match unsafe { ffi::kv_over(self.gpu.0, event) } {
                ffi::NOT_YET => break,
                end => ended(end, 0)?,
            }
            events.pending.remove(&ticket);
            events.spare.push(event);
        }
        Ok(())
    }

    // The ticket of what was put into a stream up to now.
    fn record(&self, stream: u64) -> Result<Ticket, Fault> {
        let events = &mut *self.events.lock();
        self.sweep(events)?;
        let event = self.event(events)?;
        // SAFETY: the device was opened; a stream that is none is refused.
        if let Err(fault) = ended(unsafe { ffi::kv_record(self.gpu.0, event, stream) }, 0) {
            events.spare.push(event);
            return Err(fault);
        }
        events.last += 1;
        events.pending.insert(events.last, event);
        Ok(Ticket(events.last))
    }

    // Has a stream wait for a ticket.
    fn after(&self, stream: u64, ticket: Ticket) -> Result<(), Fault> {
        let events = self.events.lock();
        if ticket.0 > events.last {
            return Err(Fault::Refused(format!("ticket {} was not given", ticket.0)));
        }
        match events.pending.get(&ticket.0) {
            // SAFETY: the device was opened; the event stays as it is while its ticket is pending, which the lock holds.
            Some(&event) => ended(unsafe { ffi::kv_after(self.gpu.0, stream, event) }, 0),
            None => Ok(()),
        }
    }

    // Room for a table in the lane's ring. Where there is none, the oldest work that has some is waited for.
    fn room(&self, lane: &mut LaneState, bytes: usize) -> Result<usize, Fault> {
        let bytes = bytes.next_multiple_of(ALIGN);
        loop {
            // Tables lie in the order of their work, and go on at the start where they come to the end.
            let begin = match lane.used.front().map(|used| used.begin) {
                None => Some(0),
                Some(oldest) if lane.next > oldest && lane.next + bytes <= RING_BYTES => Some(lane.next),
                Some(oldest) if lane.next > oldest => (bytes <= oldest).then_some(0),
                Some(oldest) => (lane.next + bytes <= oldest).then_some(lane.next),
            };
            if let Some(begin) = begin {
                lane.next = begin + bytes;
                return Ok(begin);
            }
            if let Some(used) = lane.used.front() {
                self.await_event(used.ticket)?;
            }
            self.settle(lane)?;
        }
    }

    // Waits without a lock; whoever else does so, too, may see it over first.
    fn await_event(&self, ticket: Ticket) -> Result<(), Fault> {
        let Some(event) = self.events.lock().pending.get(&ticket.0).copied() else { return Ok(()) };
        // SAFETY: the device was opened. The event may be recorded anew meanwhile; then it is waited for longer.
        self.patiently(|| unsafe { ffi::kv_wait(self.gpu.0, event) })
    }

    fn poll(&self, ticket: Ticket) -> Result<bool, Fault> {
        let events = &mut *self.events.lock();
        let Some(&event) = events.pending.get(&ticket.0) else { return Ok(ticket.0 <= events.last) };
        // SAFETY: the device was opened; the event stays as it is while its ticket is pending, which the lock holds.
        match unsafe { ffi::kv_over(self.gpu.0, event) } {
            ffi::NOT_YET => Ok(false),
            end => {
                ended(end, 0)?;
                events.pending.remove(&ticket.0);
                events.spare.push(event);
                Ok(true)
            }
        }
    }

    // Reads the statuses of what is over in a lane, and gives its tables' room back.
    fn settle(&self, lane: &mut LaneState) -> Result<(), Fault> {
        while let Some(used) = lane.used.front() {
            if !self.poll(used.ticket)? {
                break;
            }
            if let Some((status, at, blocks)) = &used.status {
                for (n, block) in blocks.clone().enumerate() {
                    // SAFETY: it lies in the ring, where the device wrote it before the event.
                    let word = unsafe { lane.memory.add(at + 4 * n).cast::<u32>().read_volatile() };
                    if word != 0 {
                        status.refuse(block);
                    }
                }
            }
            lane.used.pop_front();
        }
        Ok(())
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        text(&self.facts.name)
    }

    fn number(&self) -> u32 {
        self.number as u32
    }

    fn reserve(&self, bytes: u64) -> Result<u64, Fault> {
        let mut address = 0;
        // SAFETY: the device was opened.
        ended(unsafe { ffi::kv_reserve(self.gpu.0, bytes, &mut address) }, bytes)?;
        Ok(address)
    }

    fn release(&self, address: u64) -> Result<(), Fault> {
        // SAFETY: the device was opened; what was not reserved is refused.
        ended(unsafe { ffi::kv_release(self.gpu.0, address) }, 0)
    }

    /// # Safety
    /// As [`Device`] says.
    unsafe fn register(&self, memory: *mut u8, bytes: usize) -> Result<u64, Fault> {
        let mut address = 0;
        // SAFETY: the device was opened; the caller promised that the memory stays.
        ended(unsafe { ffi::kv_register(self.gpu.0, memory.cast(), bytes, &mut address) }, bytes as u64)?;
        Ok(address)
    }

    fn forget(&self, memory: *mut u8) -> Result<(), Fault> {
        // SAFETY: the device was opened; what is not known is refused.
        ended(unsafe { ffi::kv_forget(self.gpu.0, memory.cast()) }, 0)
    }

    fn owns(&self, address: u64) -> Result<bool, Fault> {
        let mut device = -1;
        // SAFETY: the device was opened; an address that nobody has is told as such.
        ended(unsafe { ffi::kv_device_of(self.gpu.0, address, &mut device) }, 0)?;
        Ok(device == self.number)
    }

    fn takes(&self, layout: &Layout) -> bool {
        layout.bytes_of(true) == layout.bytes()
            && layout.row_bytes().is_multiple_of(VECTOR as usize)
            && (0..layout.plane_count()).all(|n| layout.on_device(n).is_some())
    }

    /// # Safety
    /// As [`Device`] says.
    unsafe fn submit(&self, submission: Submission) -> Result<Ticket, Fault> {
        let Submission { lane: which, after, work } = submission;
        work.iter().try_for_each(|work| match work {
            Work::Copy(_) => Ok(()),
            Work::Encode(coded, _) | Work::Decode(coded) => self.check(coded),
        })?;
        let lane = &mut *self.lanes[which as usize].lock();
        if lane.lost {
            return Err(Fault::Unknown("an earlier wait was refused".into()));
        }
        self.settle(lane)?;
        self.enqueue(lane, which, &after, &work).map_err(|fault| {
            // A part of it may be under way: nobody may take the places meanwhile.
            // SAFETY: the device was opened, and the lane's stream is its own.
            match self.patiently(|| unsafe { ffi::kv_drain(self.gpu.0, lane.stream) }) {
                Ok(()) => fault,
                Err(unknown) => {
                    lane.lost = true;
                    unknown
                }
            }
        })
    }

    fn is_over(&self, ticket: Ticket) -> Result<bool, Fault> {
        // No lane's lock: whoever has it may wait for room.
        self.poll(ticket)
    }

    fn wait(&self, ticket: Ticket) -> Result<(), Fault> {
        self.await_event(ticket)?;
        self.poll(ticket)?;
        // So that statuses are known.
        self.lanes.iter().try_for_each(|lane| self.settle(&mut lane.lock()))
    }

    fn mark(&self, stream: Stream) -> Result<Ticket, Fault> {
        // SAFETY: the device was opened.
        ended(unsafe { ffi::kv_knows(self.gpu.0, stream.0) }, 0)?;
        self.record(stream.0)
    }

    fn join(&self, stream: Stream, ticket: Ticket) -> Result<(), Fault> {
        // SAFETY: the device was opened.
        ended(unsafe { ffi::kv_knows(self.gpu.0, stream.0) }, 0)?;
        self.after(stream.0, ticket)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if !self.home.is_here() {
            return;
        }
        let Events { pending, spare, .. } = std::mem::take(&mut *self.events.lock());
        // SAFETY: nobody has the device any more. What is under way is waited for; of a lost one all of it fails.
        unsafe {
            for &event in pending.values() {
                ffi::kv_wait(self.gpu.0, event);
            }
            self.lanes.iter().for_each(|lane| end_lane(self.gpu, &lane.lock()));
            for event in pending.into_values().chain(spare) {
                ffi::kv_end_event(self.gpu.0, event);
            }
            ffi::kv_close(self.gpu.0);
        }
    }
}

fn end_lane(gpu: Handle, lane: &LaneState) {
    // SAFETY: the device is open; what was not made is zero, and nothing is under way any more.
    unsafe {
        if !lane.memory.is_null() {
            ffi::kv_unpinned(gpu.0, lane.memory.cast());
        }
        if lane.stream != 0 {
            ffi::kv_end_stream(gpu.0, lane.stream);
        }
    }
}
