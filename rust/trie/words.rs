//! A long array of atomic words, zero at first, on huge pages; memory is used as it is touched.

#[cfg(not(any(loom, shuttle, miri)))]
use crate::arena::Arena;
use crate::error::Result;
use crate::sync::AtomicU64;

#[cfg(not(any(loom, shuttle, miri)))]
#[derive(Debug)]
pub(super) struct Words(Arena, usize);

#[cfg(not(any(loom, shuttle, miri)))]
impl Words {
    pub(super) fn new(count: usize) -> Result<Self> {
        Ok(Self(Arena::new(count * 8)?, count))
    }
}

#[cfg(not(any(loom, shuttle, miri)))]
impl std::ops::Deref for Words {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, zero-filled, at least `8 * count` bytes long and lives as long as
        // `self`; nobody uses it but through these atomics, which have the size and the valid values of a `u64`.
        unsafe { std::slice::from_raw_parts(self.0.as_slice().as_ptr().cast(), self.1) }
    }
}

/// The checkers' atomics are larger than words.
#[cfg(any(loom, shuttle, miri))]
#[derive(Debug)]
pub(super) struct Words(Box<[AtomicU64]>);

#[cfg(any(loom, shuttle, miri))]
impl Words {
    pub(super) fn new(count: usize) -> Result<Self> {
        Ok(Self(std::iter::repeat_with(|| AtomicU64::new(0)).take(count).collect()))
    }
}

#[cfg(any(loom, shuttle, miri))]
impl std::ops::Deref for Words {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}
