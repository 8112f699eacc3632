//! The core of stratakv: a multi-tier cache for the attention keys and values of prompt prefixes.
//!
//! Floors, imports point down only:
//! ```text
//! py  →  store  →  trie gpu ram ssd  →  arena block evict pool codec copy workers stats  →  error sync
//! ```
//! Only `py/` knows Python. [`Store`] ties the parts: it names blocks ([`block`]), finds them (`trie`), keeps them
//! in memory (`pool`, `ram`) and on disk (`ssd`), and counts what it did ([`stats`]).

mod arena;
pub mod block;
pub mod codec;
mod copy;
mod error;
pub mod evict;
mod fused;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod gpu;
#[cfg(any(feature = "python", test))]
mod holders;
pub mod pool;
mod ram;
mod ssd;
pub mod stats;
mod store;
mod sync;
pub mod trie;
mod workers;

#[cfg(feature = "python")]
mod py;

pub use arena::Pages;
pub use block::{Dtype, Geometry, Secret};
pub use copy::{KvView, PageTable, PlaneView};
pub use error::{Error, ErrorKind, Result};
pub use ssd::SsdOptions;
pub use ssd::archive::{Archive, ArchivedModel, Verified};
pub use ssd::io::{Access, Engine, FileIo, Io, IoFile};
pub use ssd::queue::{Done, Part, Queue, Transfer};
pub use store::{
    Admitted, BlockView, DeviceView, Divisible, Event, Events, GpuOptions, HandedOut, Lease, LoadOutcome, Model,
    ModelSpec, Options, Prefix, PutOutcome, Quota, Sequence, Share, SlabOptions, Store, TierQuota, Work, WorkKind,
    WritePolicy,
};
