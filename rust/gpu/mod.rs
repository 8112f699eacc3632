//! The GPU tier: blocks in one slab of device memory, and what moves them.
//!
//! Everything but the device is the same with a GPU and without: where blocks lie, which leave, what may be reused when.
//! [`Device`] is what differs, and there are two: [`Host`], whose memory is the process's, and a GPU through its driver.
//!
//! ```text
//! a block   free ── place ──▶ filling ── its ticket is over ──▶ ready ◀── take, end ──▶ leased
//!             ▲                                                   │
//!             └── the last ticket that touches it is over ◀── leave ┘
//! ```
//! Work of a device is done behind the call, in order within a lane, and in any order between lanes. A ticket stands for
//! what was submitted at once; what reads waits for the ticket of what wrote.
//!
//! Invariant: a place is nobody else's before the last work that touches it is over. So a late copy never meets another
//! block's bytes.

#[cfg(feature = "cuda")]
pub mod check;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
#[cfg(feature = "cuda")]
mod ffi;
mod host;
#[cfg(feature = "cuda")]
mod images;
mod slab;

pub use crate::copy::Stream;
#[cfg(feature = "cuda")]
pub use cuda::{Absent, Cuda, Path, Paths};
pub use device::{Coded, Device, Fault, Lane, Piece, Rows, Status, Submission, Ticket, Work};
pub use host::{Host, Schedule};
pub use slab::{Adopted, Placed, Slab};
