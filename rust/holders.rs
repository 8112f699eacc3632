//! Who has which blocks: an index of prefixes over many replicas, for routing.
//!
//! ```text
//! block hash ─▶ one set of replicas for each place        a match walks the blocks of a request, and notes where the
//!                                                         cheapest place of a replica changes, or where it has no more
//! ```
//! A set is a few words of bits, as many as there are replicas; most blocks of a request have the same sets as the block
//! before, so that a walk does little but compare.

use crate::block::BlockHash;
use std::collections::HashMap;

/// Places where a replica may have a block, in the order of what loading from them costs.
pub(crate) const PLACES: usize = 5;

/// Replicas and the leading blocks that each has, by place: each block counts where it costs least.
pub(crate) type Hits = Vec<(usize, [u32; PLACES])>;

#[derive(Debug)]
pub(crate) struct Holders {
    /// Words of a set.
    words: usize,
    rows: HashMap<u128, u32>,
    /// Of each row, a set for each place.
    bits: Vec<u64>,
    free: Vec<u32>,
}

impl Default for Holders {
    fn default() -> Self {
        Self { words: 1, rows: HashMap::new(), bits: Vec::new(), free: Vec::new() }
    }
}

impl Holders {
    fn stride(&self) -> usize {
        PLACES * self.words
    }

    /// Notes that a replica has blocks in a place, or no longer.
    pub(crate) fn set(&mut self, blocks: impl IntoIterator<Item = BlockHash>, place: usize, replica: usize, has: bool) {
        while replica >= 64 * self.words {
            self.widen();
        }
        let (stride, at, bit) = (self.stride(), place * self.words + replica / 64, 1u64 << (replica % 64));
        for BlockHash(block) in blocks {
            let known = self.rows.get(&block).copied();
            if has {
                let row = known.unwrap_or_else(|| {
                    let row = self.free.pop().unwrap_or_else(|| {
                        self.bits.resize(self.bits.len() + stride, 0);
                        (self.bits.len() / stride) as u32 - 1
                    });
                    self.rows.insert(block, row);
                    row
                });
                self.bits[row as usize * stride + at] |= bit;
            } else if let Some(row) = known {
                let sets = &mut self.bits[row as usize * stride..][..stride];
                sets[at] &= !bit;
                if sets.iter().all(|&word| word == 0) {
                    self.rows.remove(&block);
                    self.free.push(row);
                }
            }
        }
    }

    // Sets get twice as many words.
    fn widen(&mut self) {
        let wider = |sets: &[u64]| -> Vec<u64> {
            sets.chunks(self.words)
                .flat_map(|set| set.iter().copied().chain(std::iter::repeat_n(0, self.words)))
                .collect()
        };
        self.bits = self.bits.chunks(self.stride()).flat_map(wider).collect();
        self.words *= 2;
    }

    /// The leading blocks of a sequence that each replica has.
    pub(crate) fn longest(&self, blocks: &[BlockHash]) -> Hits {
        let (words, stride) = (self.words, self.stride());
        let mut hits = vec![[0u32; PLACES]; 64 * words];
        let mut starts = vec![0u32; 64 * words];
        let mut alive = vec![u64::MAX; words];
        let (nobody, mut last) = (vec![0u64; stride], None);
        let (mut before, mut current) = (nobody.clone(), nobody.clone());
        let each = |word: usize, mut bits: u64, f: &mut dyn FnMut(usize)| {
            while bits != 0 {
                f(64 * word + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        };
        let mut close = |place: usize, word: usize, gone: u64, at: usize, starts: &[u32]| {
            each(word, gone, &mut |replica| hits[replica][place] += at as u32 - starts[replica]);
        };
        let mut end = blocks.len();
        for (at, BlockHash(block)) in blocks.iter().enumerate() {
            let row = self.rows.get(block).map_or(&nobody[..], |&row| &self.bits[row as usize * stride..][..stride]);
            if last == Some(row) {
                continue;
            }
            last = Some(row);
            std::mem::swap(&mut before, &mut current);
            for word in 0..words {
                let has = |place: usize| row[place * words + word];
                alive[word] &= (0..PLACES).fold(0, |all, place| all | has(place));
                let mut open = alive[word];
                for place in 0..PLACES {
                    current[place * words + word] = open & has(place);
                    open &= !has(place);
                }
            }
            for n in 0..stride {
                close(n / words, n % words, before[n] & !current[n], at, &starts);
            }
            for n in 0..stride {
                each(n % words, current[n] & !before[n], &mut |replica| starts[replica] = at as u32);
            }
            if alive.iter().all(|&word| word == 0) {
                end = at;
                break;
            }
        }
        for (n, &open) in current.iter().enumerate() {
            close(n / words, n % words, open, end, &starts);
        }
        let found = hits.into_iter().enumerate();
        found.filter(|(_, hits)| hits.iter().any(|&blocks| blocks > 0)).collect()
    }

    /// Blocks that somebody has.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    proptest! {
        #[test]
        fn an_index_knows_what_a_list_of_all_blocks_knows(
            steps in prop::collection::vec((0usize..200, 0u128..9, 1u128..9, 0..PLACES, any::<bool>()), 0..80),
        ) {
            let (mut index, mut list) = (Holders::default(), BTreeMap::<(u128, usize), BTreeSet<usize>>::new());
            for (replica, first, count, place, has) in steps {
                index.set((first..first + count).map(BlockHash), place, replica, has);
                for block in first..first + count {
                    let places = list.entry((block, replica)).or_default();
                    if has { places.insert(place); } else { places.remove(&place); }
                }
            }
            let there: BTreeSet<u128> = list.iter().filter(|(_, p)| !p.is_empty()).map(|((b, _), _)| *b).collect();
            prop_assert_eq!(index.len(), there.len());
            let sequence: Vec<BlockHash> = (0..17).map(BlockHash).collect();
            let mut expected = Hits::new();
            for replica in 0..200 {
                let mut hits = [0; PLACES];
                for block in 0..17 {
                    match list.get(&(block, replica)).and_then(|places| places.first()) {
                        Some(&place) => hits[place] += 1,
                        None => break,
                    }
                }
                if hits != [0; PLACES] {
                    expected.push((replica, hits));
                }
            }
            prop_assert_eq!(index.longest(&sequence), expected);
        }
    }
}
