//! Memory in one piece: an anonymous mapping, 2 MiB-aligned, on huge pages where the machine grants them.
//!
//! The kernel takes the advice and may follow it or not, page by page, now or later. So what was granted is read from its
//! own books. The mapping is longer than what is used at both ends: no neighbour is counted with it.

use crate::error::{Error, Result};
use crate::pool::Slot;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// What backs the part of a mapping that was touched, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pages {
    /// On pages of any kind.
    pub resident: u64,
    /// Of that, on huge pages.
    pub huge: u64,
}

impl Pages {
    /// The name shown in `status`: nine tenths decide.
    pub fn name(self) -> &'static str {
        match self {
            Self { resident: 0, .. } => "untouched",
            Self { resident, huge } if huge * 10 >= resident * 9 => "huge",
            Self { resident, huge } if huge * 10 <= resident => "ordinary",
            _ => "mixed",
        }
    }

    // Sums the mappings that lie in the range, from text in the form of `/proc/self/smaps`.
    fn sum(smaps: &str, range: std::ops::Range<usize>) -> Self {
        let mut pages = Self::default();
        let mut inside = false;
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(first), second) = (words.next(), words.next()) else { continue };
            let bounds = first.split_once('-').map(|(a, b)| [a, b].map(|hex| usize::from_str_radix(hex, 16)));
            if let Some([Ok(start), Ok(end)]) = bounds {
                inside = start >= range.start && end <= range.end;
            } else if let Some(kib) = second.filter(|_| inside).and_then(|word| word.parse::<u64>().ok()) {
                match first {
                    "Rss:" => pages.resident += kib << 10,
                    "AnonHugePages:" => pages.huge += kib << 10,
                    _ => {}
                }
            }
        }
        pages
    }
}

/// A page-aligned anonymous mapping, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Arena {
    base: *mut u8,
    bytes: usize,
    mapping: (*mut std::ffi::c_void, usize),
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
        let length = bytes + 2 * HUGE_PAGE;
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
        let start = mapping.cast::<u8>().wrapping_add(1);
        // SAFETY: the mapping has two huge pages more than `bytes`, so the aligned start, which is not its first byte, and
        // its end lie inside.
        let base = unsafe { start.add(start.align_offset(HUGE_PAGE)) };
        // SAFETY: the range was mapped above and holds no data yet.
        let advised = unsafe { madvise(base.cast(), bytes, Advice::LinuxHugepage) };
        // It is refused where the kernel has no huge pages: `pages` tells.
        advised.unwrap_or_default();
        Ok(Self { base, bytes, mapping: (mapping, length) })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has the system back a huge page at an offset with memory, whatever it holds; false where it will not.
    pub(crate) fn populate(&self, offset: usize) -> bool {
        debug_assert!(offset.is_multiple_of(HUGE_PAGE) && offset < self.bytes);
        // SAFETY: the page is within the mapping; the advice neither changes nor moves what is there.
        unsafe { madvise(self.base.add(offset).cast(), HUGE_PAGE, Advice::LinuxPopulateWrite) }.is_ok()
    }

    /// What backs it at present; `None` where the kernel does not tell. Reads a file of a few kilobytes per mapping of
    /// the process: for people, not for requests.
    pub(crate) fn pages(&self) -> Option<Pages> {
        let base = self.base.addr();
        let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        Some(Pages::sum(&smaps, base..base + self.bytes))
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

    /// Its first byte.
    pub(crate) fn start(&self) -> *mut u8 {
        self.base
    }

    /// Address of a slot.
    pub(crate) fn at(&self, slot: Slot) -> *mut u8 {
        debug_assert!(slot.offset() < self.bytes);
        // SAFETY: slots come from the allocator over this arena, which stays within `bytes`.
        unsafe { self.base.add(slot.offset()) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.mapping.0, self.mapping.1) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_backs_a_mapping_is_what_was_touched_of_it_and_of_no_other() {
        let [mut one, mut other] = [8, 16].map(|mib: usize| Arena::new(mib << 20).expect("memory is to be had"));
        let Some(before) = one.pages() else { return };
        assert_eq!((before, before.name()), (Pages::default(), "untouched"));
        one.as_mut_slice()[..4 << 20].fill(1);
        other.as_mut_slice().fill(1);
        let pages = one.pages().expect("it told before");
        assert!((4 << 20..=8 << 20).contains(&pages.resident) && pages.huge <= pages.resident, "{pages:?}");
        assert_ne!(pages.name(), "untouched");
    }

    #[test]
    fn the_kernels_books_are_summed_within_the_range() {
        let entry = |range: &str, rss, huge| {
            format!("{range} rw-p 0 00:00 0\nSize: 9 kB\nRss: {rss} kB\nAnonHugePages: {huge} kB\nVmFlags: rd\n")
        };
        let smaps =
            [entry("1000-2000", 7, 7), entry("2000-3000", 8, 2), entry("3000-5000", 2, 0), entry("5000-6000", 9, 9)];
        let pages = Pages::sum(&smaps.concat(), 0x2000..0x5000);
        assert_eq!((pages, pages.name()), (Pages { resident: 10 << 10, huge: 2 << 10 }, "mixed"));
        assert_eq!(Pages { resident: 100, huge: 90 }.name(), "huge");
        assert_eq!(Pages { resident: 100, huge: 10 }.name(), "ordinary");
    }
}
