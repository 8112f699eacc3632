//! The arena, and the allocator that cuts it into slots.
//!
//! One anonymous mapping, 2 MiB-aligned and backed by huge pages where the machine grants them, is cut into chunks.
//! A model takes *spans* of neighbouring chunks and cuts them into slots of its record size; an empty span goes back,
//! so models of different geometry share one arena and no slot ever moves.
//!
//! ```text
//! arena  |chunk|chunk|chunk|chunk|chunk|chunk|...
//! span   |-- model A ------|  free |- model B -|
//! slots  |s|s|s|s|s|s|s|s|.|       |  s  |  s  |
//! ```
//! Invariant: a slot belongs to exactly one span, a span to exactly one model, and `used` counts the set bits.

use crate::error::{Error, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::collections::HashMap;

const HUGE_PAGE: usize = 2 << 20;
const MAX_SPAN_CHUNKS: usize = 16;

/// What backs the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// The kernel accepted transparent huge pages for the mapping.
    Huge,
    /// Ordinary pages.
    Ordinary,
}

impl PageKind {
    /// The name shown in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge",
            Self::Ordinary => "ordinary",
        }
    }
}

/// A page-aligned anonymous mapping, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Arena {
    base: *mut u8,
    bytes: usize,
    mapping: (*mut std::ffi::c_void, usize),
    pages: PageKind,
}

// SAFETY: the arena is plain memory; who may touch which slot is decided by the store, which hands each slot to one
// writer at a time and lets readers in only after the slot was published under its lock.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `bytes`, rounded up to 2 MiB.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let bytes = bytes.clamp(1, usize::MAX / 4).next_multiple_of(HUGE_PAGE);
        let length = bytes + HUGE_PAGE;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice aliases nothing.
        let mapping = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|e| Error::io(format!("cannot map {bytes} bytes of memory; lower capacity_bytes"), e))?;
        let start = mapping.cast::<u8>();
        // SAFETY: the mapping has one huge page more than `bytes`, so the aligned start and its end lie inside.
        let base = unsafe { start.add(start.align_offset(HUGE_PAGE)) };
        // SAFETY: the range was mapped above and holds no data yet.
        let advised = unsafe { madvise(base.cast(), bytes, Advice::LinuxHugepage) };
        let pages = if advised.is_ok() { PageKind::Huge } else { PageKind::Ordinary };
        Ok(Self { base, bytes, mapping: (mapping, length), pages })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn pages(&self) -> PageKind {
        self.pages
    }

    /// The whole arena, for an owner that does not cut it into slots.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is `bytes` long, zero-filled at first, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base, self.bytes) }
    }

    /// As [`as_slice`](Self::as_slice), to write.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` excludes other users.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.bytes) }
    }

    /// Address of a slot.
    pub(crate) fn at(&self, slot: Slot) -> *mut u8 {
        debug_assert!(slot.0 < self.bytes);
        // SAFETY: slots come from the allocator below, which stays within `bytes`.
        unsafe { self.base.add(slot.0) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.mapping.0, self.mapping.1) };
        debug_assert!(unmapped.is_ok());
    }
}

/// One place for a record in the arena: its byte offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Slot(usize);

#[derive(Debug)]
struct Span {
    model: u32,
    first_chunk: usize,
    chunks: usize,
    slot_bytes: usize,
    slots: usize,
    used: usize,
    bits: Vec<u64>,
}

/// The allocator over the arena's chunks. It knows sizes and owners, never bytes.
#[derive(Debug)]
pub(crate) struct Pool {
    chunk_bytes: usize,
    // Which span covers a chunk.
    chunks: Vec<Option<usize>>,
    spans: Vec<Option<Span>>,
    // Spans of a model that have a free slot.
    open: HashMap<u32, Vec<usize>>,
}

impl Pool {
    pub(crate) fn new(capacity: usize) -> Self {
        let chunk_bytes = (capacity / 64).next_multiple_of(HUGE_PAGE).clamp(HUGE_PAGE, 64 << 20);
        let chunks = vec![None; (capacity / chunk_bytes).max(1)];
        Self { chunk_bytes, chunks, spans: Vec::new(), open: HashMap::new() }
    }

    // Bytes in slots that are taken.
    #[cfg(test)]
    fn used_bytes(&self) -> usize {
        self.spans.iter().flatten().map(|s| s.used * s.slot_bytes).sum()
    }

    /// Whether a slot of that size can exist at all.
    pub(crate) fn fits(&self, slot_bytes: usize) -> bool {
        slot_bytes <= self.chunk_bytes * self.chunks.len()
    }

    /// Bytes of the spans that a model holds.
    pub(crate) fn held_bytes(&self, model: u32) -> usize {
        let chunks: usize = self.spans.iter().flatten().filter(|s| s.model == model).map(|s| s.chunks).sum();
        chunks * self.chunk_bytes
    }

    /// Takes a slot, opening a new span if there is room for one.
    pub(crate) fn allocate(&mut self, model: u32, slot_bytes: usize) -> Option<Slot> {
        if self.open.get(&model).is_none_or(Vec::is_empty) {
            self.open_span(model, slot_bytes)?;
        }
        let open = self.open.get_mut(&model)?;
        let index = *open.last()?;
        let span = self.spans[index].as_mut()?;
        debug_assert_eq!(span.slot_bytes, slot_bytes);
        let word = span.bits.iter().position(|&w| w != u64::MAX)?;
        let bit = span.bits[word].trailing_ones() as usize;
        span.bits[word] |= 1 << bit;
        span.used += 1;
        if span.used == span.slots {
            open.pop();
        }
        Some(Slot(span.first_chunk * self.chunk_bytes + (word * 64 + bit) * slot_bytes))
    }

    /// Gives a slot back.
    pub(crate) fn free(&mut self, slot: Slot) {
        let Some(index) = self.chunks[slot.0 / self.chunk_bytes] else {
            debug_assert!(false, "free of a slot that is in no span");
            return;
        };
        let Some(span) = self.spans[index].as_mut() else { return };
        let number = (slot.0 - span.first_chunk * self.chunk_bytes) / span.slot_bytes;
        let (word, bit) = (number / 64, 1u64 << (number % 64));
        debug_assert!(span.bits[word] & bit != 0, "double free");
        span.bits[word] &= !bit;
        span.used -= 1;
        let open = self.open.entry(span.model).or_default();
        if span.used == 0 {
            open.retain(|&i| i != index);
            let (first, chunks) = (span.first_chunk, span.chunks);
            self.chunks[first..first + chunks].fill(None);
            self.spans[index] = None;
        } else if span.used + 1 == span.slots {
            open.push(index);
        }
    }

    /// Slots that a model has or could open without anybody leaving.
    pub(crate) fn slots_in_reach(&self, model: u32, slot_bytes: usize) -> usize {
        let held: usize = self.spans.iter().flatten().filter(|s| s.model == model).map(|s| s.slots).sum();
        let free = self.chunks.iter().filter(|c| c.is_none()).count();
        held + free * self.chunk_bytes / slot_bytes
    }

    /// The places where a span for such a slot could be, each with the spans that would have to go: their models and
    /// taken slots.
    pub(crate) fn places_for(&self, slot_bytes: usize) -> impl Iterator<Item = Vec<(u32, Vec<Slot>)>> + '_ {
        self.chunks.windows(slot_bytes.div_ceil(self.chunk_bytes)).map(|window| {
            let mut covered: Vec<usize> = window.iter().copied().flatten().collect();
            covered.dedup();
            covered.into_iter().filter_map(|index| Some(self.taken(self.spans[index].as_ref()?))).collect()
        })
    }

    fn taken(&self, span: &Span) -> (u32, Vec<Slot>) {
        let taken = (0..span.slots).filter(|n| span.bits[n / 64] >> (n % 64) & 1 == 1);
        let first = span.first_chunk * self.chunk_bytes;
        (span.model, taken.map(|n| Slot(first + n * span.slot_bytes)).collect())
    }

    // The fewest chunks that waste at most 1/16, else the least wasteful number.
    fn span_chunks(&self, slot_bytes: usize) -> Option<usize> {
        let waste = |chunks: usize| (chunks * self.chunk_bytes) % slot_bytes;
        let enough = slot_bytes.div_ceil(self.chunk_bytes);
        let candidates = enough..=self.chunks.len().min(MAX_SPAN_CHUNKS.max(enough));
        let good = candidates.clone().find(|&c| waste(c) * 16 <= c * self.chunk_bytes);
        good.or_else(|| candidates.min_by(|&a, &b| (waste(a) * b).cmp(&(waste(b) * a))))
    }

    fn open_span(&mut self, model: u32, slot_bytes: usize) -> Option<()> {
        let best = self.span_chunks(slot_bytes)?;
        let enough = slot_bytes.div_ceil(self.chunk_bytes);
        // A shorter span is better than none when the arena is nearly full.
        let (first, chunks) = (enough..=best).rev().find_map(|n| Some((self.free_run(n)?, n)))?;
        let slots = chunks * self.chunk_bytes / slot_bytes;
        let mut bits = vec![0u64; slots.div_ceil(64)];
        if !slots.is_multiple_of(64) {
            bits[slots / 64] = u64::MAX << (slots % 64);
        }
        let span = Span { model, first_chunk: first, chunks, slot_bytes, slots, used: 0, bits };
        let index = self.spans.iter().position(Option::is_none).unwrap_or(self.spans.len());
        if index == self.spans.len() {
            self.spans.push(None);
        }
        self.spans[index] = Some(span);
        self.chunks[first..first + chunks].fill(Some(index));
        self.open.entry(model).or_default().push(index);
        Some(())
    }

    fn free_run(&self, length: usize) -> Option<usize> {
        self.chunks.windows(length).position(|run| run.iter().all(Option::is_none))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn slots_never_overlap_and_every_byte_comes_back(
            sizes in prop::collection::vec(1usize..1200, 1..4),
            steps in prop::collection::vec((0usize..4, any::<bool>(), any::<prop::sample::Index>()), 1..300),
        ) {
            let capacity = 24 << 20;
            let mut pool = Pool::new(capacity);
            let mut live: HashMap<Slot, usize> = HashMap::new();
            for (model, give, pick) in steps {
                let model = model % sizes.len();
                let bytes = sizes[model] * 4096;
                if give && !live.is_empty() {
                    let slot = *live.keys().nth(pick.index(live.len())).expect("index is in range");
                    live.remove(&slot);
                    pool.free(slot);
                } else if let Some(slot) = pool.allocate(model as u32, bytes) {
                    for (other, len) in &live {
                        prop_assert!(slot.0 + bytes <= other.0 || other.0 + len <= slot.0);
                    }
                    prop_assert!(slot.0 + bytes <= capacity);
                    live.insert(slot, bytes);
                }
                prop_assert_eq!(pool.used_bytes(), live.values().sum::<usize>());
            }
            for slot in live.into_keys() {
                pool.free(slot);
            }
            prop_assert_eq!(pool.used_bytes(), 0);
            prop_assert!(pool.chunks.iter().all(Option::is_none));
        }
    }

    #[test]
    fn one_model_can_use_nearly_the_whole_arena() {
        let mut pool = Pool::new(64 << 20);
        let slot = 737 * 1024 / 4096 * 4096;
        let taken = std::iter::from_fn(|| pool.allocate(0, slot)).count();
        assert!(taken * slot > (64 << 20) * 15 / 16, "{taken} slots of {slot}");
    }
}
