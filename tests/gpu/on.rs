//! Devices to test with: the process as one, and a GPU's driver that something stands in for; and memory of both kinds.

#[cfg(feature = "cuda")]
use crate::standin::{Standin, When};
use std::sync::Arc;
#[cfg(feature = "cuda")]
use stratakv::gpu::Cuda;
use stratakv::gpu::{Device, Host, Lane, Piece, Schedule, Submission, Ticket, Work};

pub(crate) fn schedules() -> [Schedule; 4] {
    [Schedule::AtOnce, Schedule::Late, Schedule::Random(1), Schedule::Random(2)]
}

/// A device, and when it does what.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Host(Schedule),
    #[cfg(feature = "cuda")]
    Standin(When, u64),
}

pub(crate) fn kinds() -> Vec<Kind> {
    let kinds = schedules().map(Kind::Host).into_iter();
    #[cfg(feature = "cuda")]
    let kinds = kinds.chain(
        [(When::AtOnce, 1), (When::Late, 1), (When::Random, 1), (When::Random, 2)].map(|(w, s)| Kind::Standin(w, s)),
    );
    kinds.collect()
}

/// One that is open.
pub(crate) enum On {
    Host(Arc<Host>),
    #[cfg(feature = "cuda")]
    Standin(Arc<Cuda>, Standin),
}

impl On {
    /// `None`: there is no compiler for the stand-in.
    pub(crate) fn open(kind: Kind, bytes: u64) -> Option<Self> {
        match kind {
            Kind::Host(schedule) => Some(Self::Host(Arc::new(Host::new(schedule, bytes)))),
            #[cfg(feature = "cuda")]
            Kind::Standin(when, seed) => {
                let standin = Standin::new(when, seed)?;
                standin.set("bytes", bytes);
                let device = Cuda::open(0, Some(standin.path())).expect("it stands in for one");
                Some(Self::Standin(Arc::new(device), standin))
            }
        }
    }

    pub(crate) fn device(&self) -> Arc<dyn Device> {
        match self {
            Self::Host(device) => device.clone(),
            #[cfg(feature = "cuda")]
            Self::Standin(device, _) => device.clone(),
        }
    }

    pub(crate) fn lose(&self) {
        match self {
            Self::Host(device) => device.lose("an illegal address"),
            #[cfg(feature = "cuda")]
            Self::Standin(_, standin) => standin.fail("cuEventQuery", 1, 700),
        }
    }

    /// Bytes that are reserved of the process as a device.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        match self {
            Self::Host(device) => device.reserved_bytes(),
            #[cfg(feature = "cuda")]
            Self::Standin(..) => 0,
        }
    }

    /// How often a driver was asked for memory.
    pub(crate) fn allocations(&self) -> u64 {
        match self {
            Self::Host(_) => 0,
            #[cfg(feature = "cuda")]
            Self::Standin(_, standin) => {
                ["cuMemAlloc_v2", "cuMemHostAlloc"].map(|call| standin.calls(call)).iter().sum()
            }
        }
    }

    /// Nothing of it is in use any more, and no rule was broken.
    pub(crate) fn end(self) {
        match self {
            Self::Host(_) => assert_eq!(self.reserved_bytes(), 0),
            #[cfg(feature = "cuda")]
            Self::Standin(device, standin) => {
                drop(device);
                standin.assert_given_back();
            }
        }
    }
}

/// Memory of the process that a device knows, at a multiple of 64.
pub(crate) struct Known {
    device: Arc<dyn Device>,
    memory: Vec<u8>,
    at: usize,
    bytes: usize,
    pub(crate) address: u64,
}

impl Known {
    pub(crate) fn new(device: &Arc<dyn Device>, content: &[u8]) -> Self {
        let mut memory = vec![0u8; content.len() + 64];
        let at = memory.as_ptr().align_offset(64);
        memory[at..at + content.len()].copy_from_slice(content);
        // SAFETY: it is forgotten before it goes.
        let address = unsafe { device.register(memory[at..].as_mut_ptr(), content.len()) }.expect("it is there");
        Self { device: device.clone(), memory, at, bytes: content.len(), address }
    }

    pub(crate) fn content(&self) -> &[u8] {
        &self.memory[self.at..self.at + self.bytes]
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        drop(self.device.forget(self.memory[self.at..].as_mut_ptr()));
    }
}

/// Memory of the device.
pub(crate) struct Remote {
    device: Arc<dyn Device>,
    pub(crate) address: u64,
    bytes: usize,
}

impl Remote {
    pub(crate) fn new(device: &Arc<dyn Device>, content: &[u8]) -> Self {
        let address = device.reserve(content.len() as u64).expect("there is room");
        let remote = Self { device: device.clone(), address, bytes: content.len() };
        remote.write(content);
        remote
    }

    pub(crate) fn write(&self, content: &[u8]) {
        let from = Known::new(&self.device, content);
        // SAFETY: both are there until it is over.
        let ticket =
            unsafe { self.device.submit(copy(Lane::Up, Ticket::NONE, from.address, self.address, content.len())) };
        self.device.wait(ticket.expect("it is there")).expect("it is there");
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        let to = Known::new(&self.device, &vec![0; self.bytes]);
        // SAFETY: as above.
        let ticket =
            unsafe { self.device.submit(copy(Lane::Down, Ticket::NONE, self.address, to.address, self.bytes)) };
        self.device.wait(ticket.expect("it is there")).expect("it is there");
        to.content().to_vec()
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        drop(self.device.release(self.address));
    }
}

pub(crate) fn copy(lane: Lane, after: Ticket, from: u64, to: u64, bytes: usize) -> Submission {
    let piece = Piece { from, to, bytes: bytes as u64 };
    Submission { lane, after: vec![after], work: vec![Work::Copy(vec![piece])] }
}
