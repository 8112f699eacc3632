//! What was done behind requests: a bounded log for those who trace it. Nothing is logged before somebody asked.

use super::Store;
use crate::block::Sealed;
use crate::error::Result;
use crate::sync::{AtomicBool, Ordering};
use crossbeam_queue::ArrayQueue;
use std::time::{SystemTime, UNIX_EPOCH};

/// Pieces of work that wait to be asked for; the oldest go first.
const KEPT: usize = 1024;
/// Blocks of each that are named.
const NAMED: usize = 64;

/// What is done behind requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Blocks written to SSD.
    Demote,
    /// Blocks read into RAM.
    Promote,
}

impl Kind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Demote => "demote",
            Self::Promote => "promote",
        }
    }
}

/// One piece of it.
#[derive(Debug, Clone)]
pub struct Work {
    /// What it is.
    pub kind: Kind,
    /// Name of the model.
    pub model: String,
    /// When it began and ended, in nanoseconds since 1970.
    pub begun_ns: u64,
    /// See there.
    pub ended_ns: u64,
    /// Blocks that were moved, and their bytes.
    pub blocks: usize,
    /// See there.
    pub bytes: u64,
    /// The first of them.
    pub names: Vec<Sealed>,
}

/// The log.
#[derive(Debug)]
pub(super) struct Behind {
    on: AtomicBool,
    done: ArrayQueue<(u32, Work)>,
}

impl Default for Behind {
    fn default() -> Self {
        Self { on: AtomicBool::new(false), done: ArrayQueue::new(KEPT) }
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

impl Behind {
    /// A piece of work begins; `None`: nobody asks for it.
    pub(super) fn begin(&self) -> Option<u64> {
        // Relaxed: a piece more or less does no harm.
        self.on.load(Ordering::Relaxed).then(now_ns)
    }

    /// It has ended.
    pub(super) fn end(
        &self,
        begun_ns: Option<u64>,
        kind: Kind,
        model: u32,
        names: impl ExactSizeIterator<Item = Sealed>,
        bytes: u64,
    ) {
        let Some(begun_ns) = begun_ns else { return };
        let blocks = names.len();
        let names = names.take(NAMED).collect();
        let work = Work { kind, model: String::new(), begun_ns, ended_ns: now_ns(), blocks, bytes, names };
        self.done.force_push((model, work));
    }
}

impl Store {
    /// What was done since the last such call; from the first one on it is logged.
    ///
    /// # Errors
    /// The store is closed.
    pub fn behind(&self) -> Result<Vec<Work>> {
        let behind = &self.shared.behind;
        behind.on.store(true, Ordering::Relaxed);
        let done: Vec<_> = (0..KEPT).map_while(|_| behind.done.pop()).collect();
        let state = self.shared.open_state()?;
        let named = |(model, work): (u32, Work)| {
            let model = state.models.get(&model).map_or_else(String::new, |m| m.name.clone());
            Work { model, ..work }
        };
        Ok(done.into_iter().map(named).collect())
    }
}
