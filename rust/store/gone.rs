//! Why blocks are not there, for who has no lock: a match that found too little is counted by the answer.
//!
//! A table of fixed size. The upper bits of a block's tag are its place there, where the lower ones stand with the reason;
//! who comes later takes the place. So blocks that left long ago are forgotten, and a block is taken for another once in
//! 2^28 times.
//!
//! ```text
//! tag    | place: 16 |       | told by: 28 | . |
//! word                       | told by: 28 | 4 |      the reason, and 0 where nothing was noted yet
//! ```

use super::state::tag;
use crate::block::BlockHash;
use crate::stats::Miss;
use crate::sync::{AtomicU32, Ordering};

/// How many blocks are remembered at most.
const PLACES: usize = 1 << 16;
/// The bits of a word that hold the reason.
const REASON: u32 = 15;

/// Blocks that left, or were not let in, and why.
#[derive(Debug)]
pub(super) struct Gone {
    words: Box<[AtomicU32]>,
}

impl Default for Gone {
    fn default() -> Self {
        Self { words: std::iter::repeat_with(AtomicU32::default).take(PLACES).collect() }
    }
}

impl Gone {
    fn word(&self, hash: BlockHash) -> &AtomicU32 {
        &self.words[(tag(hash) >> 48) as usize % PLACES]
    }

    /// Notes why a block is not there from now on.
    pub(super) fn note(&self, hash: BlockHash, why: Miss) {
        // Relaxed: a word says all there is to say; who does not see it yet counts the reason of before.
        self.word(hash).store(tag(hash) as u32 & !REASON | why as u32, Ordering::Relaxed);
    }

    /// Has the processor fetch what is known of a block, without waiting for it.
    #[inline]
    pub(super) fn warm(&self, hash: BlockHash) {
        std::hint::black_box(self.word(hash).load(Ordering::Relaxed));
    }

    /// Why a block is not there.
    #[inline]
    pub(super) fn why(&self, hash: BlockHash) -> Miss {
        let word = self.word(hash).load(Ordering::Relaxed);
        if (word ^ tag(hash) as u32) & !REASON == 0 { Miss::ALL[(word & REASON) as usize] } else { Miss::NeverStored }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Multiplied by an odd number: no two are alike, and their upper bits are spread.
    fn hash(block: u64) -> BlockHash {
        BlockHash(u128::from((block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    #[test]
    fn every_reason_is_told_as_it_was_noted_last() {
        let gone = Gone::default();
        assert_eq!(gone.why(hash(0)), Miss::NeverStored);
        for why in Miss::ALL {
            gone.note(hash(0), why);
            assert_eq!((gone.why(hash(0)), gone.why(hash(1))), (why, Miss::NeverStored));
        }
    }

    #[test]
    fn what_left_is_remembered_until_another_takes_its_place() {
        let gone = Gone::default();
        let known = |blocks: std::ops::Range<u64>| {
            let (all, left) = (blocks.end - blocks.start, blocks.filter(|&n| gone.why(hash(n)) == Miss::Evicted));
            left.count() as f64 / all as f64
        };
        (0..1000).for_each(|n| gone.note(hash(n), Miss::Evicted));
        assert!(known(0..1000) > 0.98);
        (1000..10 * PLACES as u64).for_each(|n| gone.note(hash(n), Miss::Evicted));
        let last = 10 * PLACES as u64 - 1000;
        assert!(known(0..1000) < 0.1 && known(last..last + 1000) > 0.98);
    }
}
