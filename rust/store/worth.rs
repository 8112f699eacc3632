//! Whether reading is worth it: a load that takes longer than computing the same tokens is not made.
//!
//! How fast the SSD delivers is learned from each load; how fast the engine computes is told by it, or learned from the time
//! between a match and the put of the same prompt. Then the load ends
//! where going on would cost more than it saves, with [`Miss::NotWorthIt`](crate::stats::Miss::NotWorthIt). Of many such
//! loads one is made all the same, so that a disk that has recovered is seen.

use super::nodes::{NodeId, Nodes};
use super::state::State;
use super::{Model, Shared, Store};
use crate::block::{BlockHash, Sealed};
use crate::error::{Result, input};
use crate::sync::{AtomicBool, Mutex, Ordering};
use std::collections::VecDeque;
use std::time::Instant;

/// Of so many loads that are not worth it, one is made.
const TRIED: u32 = 16;
/// What is counted of earlier loads at each new one.
const KEPT: f64 = 0.875;
/// Matches whose prompts may be put yet, and rates that are remembered.
const PREFILLS: usize = 64;
/// Shorter ones tell more of the engine's queue than of its speed.
const LEAST_TOKENS: usize = 64;

/// How fast a model's reads from SSD are, of late: bytes and seconds, those of earlier loads less with each new one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ReadRate {
    bytes: f64,
    seconds: f64,
    passed_over: u32,
}

impl ReadRate {
    /// Notes a load.
    pub(super) fn note(&mut self, bytes: u64, ns: u64) {
        if bytes > 0 && ns > 0 {
            self.bytes = self.bytes * KEPT + bytes as f64;
            self.seconds = self.seconds * KEPT + ns as f64 / 1e9;
        }
    }

    /// How many of these blocks a load should go through; of each is given what has to be read for it. `computed_s` is what
    /// computing one takes.
    pub(super) fn worthwhile(&mut self, reads: &[u64], computed_s: f64) -> usize {
        let best = self.best(reads, computed_s);
        if best < reads.len() {
            self.passed_over += 1;
            if self.passed_over.is_multiple_of(TRIED) {
                return reads.len();
            }
        }
        best
    }

    // The same, but for the load of many that is made all the same.
    fn best(&self, reads: &[u64], computed_s: f64) -> usize {
        if self.bytes == 0.0 {
            return reads.len();
        }
        let byte_s = self.seconds / self.bytes;
        let (mut saved_s, mut best) = (0.0, (0.0, 0));
        for (n, &bytes) in reads.iter().enumerate() {
            saved_s += computed_s - bytes as f64 * byte_s;
            if saved_s >= best.0 {
                best = (saved_s, n + 1);
            }
        }
        best.1
    }
}

/// What was asked for, and how fast what was missing was computed.
#[derive(Debug, Default)]
pub(super) struct Prefills {
    learning: AtomicBool,
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    /// The last whole block of what was asked for, its number, the tokens that were missing, and when.
    asked: VecDeque<(BlockHash, usize, usize, Instant)>,
    /// Tokens a second.
    rates: VecDeque<f64>,
}

impl Prefills {
    /// A match asked for these blocks, and so many tokens were missing.
    pub(super) fn asked(&self, hashes: &[BlockHash], missing: usize) {
        if missing >= LEAST_TOKENS
            && self.learning.load(Ordering::Relaxed)
            && let Some(&last) = hashes.last()
        {
            let asked = &mut self.notes.lock().asked;
            asked.truncate(PREFILLS - 1);
            asked.push_front((last, hashes.len() - 1, missing, Instant::now()));
        }
    }

    /// What a match missed came from elsewhere: it was not computed.
    pub(super) fn forget(&self, hashes: &[BlockHash]) {
        if self.learning.load(Ordering::Relaxed) {
            self.notes.lock().asked.retain(|(last, ..)| Some(last) != hashes.last());
        }
    }

    /// These blocks are about to be put: the rate, if it became another by that.
    pub(super) fn put(&self, hashes: &[BlockHash]) -> Option<f64> {
        if !self.learning.load(Ordering::Relaxed) {
            return None;
        }
        let Notes { asked, rates } = &mut *self.notes.lock();
        let mut learned = false;
        asked.retain(|&(last, nth, missing, since)| {
            let here = hashes.get(nth) == Some(&last);
            if here {
                rates.truncate(PREFILLS - 1);
                rates.push_front(missing as f64 / since.elapsed().as_secs_f64().max(1e-9));
                learned = true;
            }
            !here
        });
        // Prompts wait their turn, and some are put after an answer was made: most rates are too low.
        let mut rising: Vec<f64> = rates.iter().copied().collect();
        rising.sort_by(f64::total_cmp);
        rising.get(rising.len() * 3 / 4).copied().filter(|_| learned)
    }

    fn learn(&self, learning: bool) {
        *self.notes.lock() = Notes::default();
        self.learning.store(learning, Ordering::Relaxed);
    }
}

impl State {
    /// How many of these blocks of a model a load should go through.
    pub(super) fn worthwhile(&mut self, model: u32, blocks: &[NodeId]) -> usize {
        let Some(books) = self.models.get_mut(&model) else { return blocks.len() };
        let Some(computed_s) = books.computed_s else { return blocks.len() };
        let nodes = &self.nodes;
        books.read_rate.worthwhile(&blocks.iter().map(|&id| to_read(nodes, id)).collect::<Vec<_>>(), computed_s)
    }
}

// Bytes that have to be read for a block.
fn to_read(nodes: &Nodes, id: NodeId) -> u64 {
    match &nodes[id] {
        node if node.ram.is_some() => 0,
        node => node.ssd.map_or(0, |place| place.bytes()),
    }
}

impl Store {
    /// Of the leading blocks of some tokens, by their names, the bytes that a load has to read for each, up to one that is
    /// nowhere; and through how many of them, and of so many more that would be in RAM, it would go at present. Nothing is
    /// counted.
    ///
    /// # Errors
    /// The store is closed.
    pub fn weigh(&self, model: &Model, names: &[Sealed], more: usize) -> Result<(Vec<u64>, usize)> {
        let state = self.shared.open_state()?;
        let found = names.iter().map_while(|&name| state.nodes.find(self.shared.secret.unseal(name)));
        let mut reads: Vec<u64> = found.map(|id| to_read(&state.nodes, id)).collect();
        let here = reads.len();
        reads.resize(here + more, 0);
        let books = state.models.get(&model.id);
        let best = books.and_then(|books| Some(books.read_rate.best(&reads, books.computed_s?))).unwrap_or(reads.len());
        reads.truncate(here);
        Ok((reads, best))
    }

    /// Tells how many tokens a second the engine computes of this model's prompts; `None`: not known, and all that is found
    /// is loaded.
    ///
    /// # Errors
    /// The model is not registered, or the rate is not above zero.
    pub fn set_prefill_rate(&self, model: &Model, tokens_per_s: Option<f64>) -> Result<()> {
        if let Some(rate) = tokens_per_s.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return Err(input(format!("prefill rate: {rate} tokens/s, expected a number above zero, or none")));
        }
        model.prefills.learn(false);
        self.shared.set_computed(model, tokens_per_s)
    }

    /// Has that rate learned: from a match to the put of the same prompt as long passes as the engine computes, at least.
    /// Not known before the first.
    ///
    /// # Errors
    /// The model is not registered.
    pub fn learn_prefill_rate(&self, model: &Model) -> Result<()> {
        self.shared.set_computed(model, None)?;
        model.prefills.learn(true);
        Ok(())
    }

    /// The rate that was told, or learned, if one was.
    ///
    /// # Errors
    /// The store is closed.
    pub fn prefill_rate(&self, model: &Model) -> Result<Option<f64>> {
        let state = self.shared.open_state()?;
        let computed_s = state.models.get(&model.id).and_then(|books| books.computed_s);
        Ok(computed_s.map(|seconds| f64::from(model.spec().geometry.block_tokens) / seconds))
    }

    /// Seconds that reading a byte of this model from SSD takes, as far as that is known.
    ///
    /// # Errors
    /// The store is closed.
    pub fn read_s(&self, model: &Model) -> Result<Option<f64>> {
        let state = self.shared.open_state()?;
        let rate = state.models.get(&model.id).map(|books| books.read_rate).filter(|rate| rate.bytes > 0.0);
        Ok(rate.map(|rate| rate.seconds / rate.bytes))
    }
}

impl Shared {
    pub(super) fn set_computed(&self, model: &Model, tokens_per_s: Option<f64>) -> Result<()> {
        let mut state = self.open_state()?;
        let books = state.models.get_mut(&model.id).ok_or_else(|| Shared::not_registered(model))?;
        let block_tokens = f64::from(model.spec().geometry.block_tokens);
        books.computed_s = tokens_per_s.map(|rate| block_tokens / rate);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_load_goes_as_far_as_saves_most_time(
            reads in prop::collection::vec(0u64..1000, 0..12), rate in 1u64..1000, computed in 1u64..1000,
        ) {
            let mut learned = ReadRate::default();
            prop_assert_eq!(learned.worthwhile(&reads, 0.001), reads.len(), "nothing is known yet");
            learned.note(rate, 1_000_000_000);
            let told = learned.best(&reads, computed as f64);
            let found = learned.worthwhile(&reads, computed as f64);
            prop_assert_eq!(told, found);
            let saved = |blocks: usize| {
                blocks as f64 * computed as f64 - reads[..blocks].iter().sum::<u64>() as f64 / rate as f64
            };
            prop_assert!((0..=reads.len()).all(|other| saved(other) <= saved(found) + 1e-6));
        }
    }

    #[test]
    fn a_prefill_rate_is_learned_from_matches_whose_prompts_are_put() {
        let prefills = Prefills::default();
        let hashes: Vec<BlockHash> = (0..8).map(BlockHash).collect();
        prefills.asked(&hashes, 128);
        assert_eq!(prefills.put(&hashes), None, "it is not to be learned");
        prefills.learn(true);
        prefills.asked(&hashes[..4], LEAST_TOKENS - 1);
        assert_eq!(prefills.put(&hashes), None, "too few tokens");
        prefills.asked(&hashes[..4], 128);
        assert_eq!(prefills.put(&hashes[..3]), None, "another prompt");
        std::thread::sleep(std::time::Duration::from_millis(2));
        let rate = prefills.put(&hashes).expect("what was asked for, and more");
        assert!(rate > 0.0 && rate <= 128.0 / 0.002, "{rate}");
        assert_eq!(prefills.put(&hashes), None, "it was put");
        prefills.asked(&hashes, 128);
        prefills.forget(&hashes);
        assert_eq!(prefills.put(&hashes), None, "it came from elsewhere");
        (0..3 * PREFILLS).for_each(|n| prefills.asked(&hashes[..1 + n % 8], 128));
        prefills.put(&hashes);
        assert!(prefills.notes.lock().asked.len() <= PREFILLS && prefills.notes.lock().rates.len() <= PREFILLS);
    }

    #[test]
    fn one_load_of_many_is_made_all_the_same_and_a_disk_that_recovers_is_used_again() {
        let mut learned = ReadRate::default();
        learned.note(1000, 1_000_000_000);
        let loads: Vec<usize> = (0..TRIED).map(|_| learned.worthwhile(&[1000], 0.1)).collect();
        assert_eq!((loads.iter().filter(|&&blocks| blocks == 1).count(), loads[0]), (1, 0));
        for _ in 0..40 {
            learned.note(1000, 1000);
        }
        assert_eq!(learned.worthwhile(&[1000], 0.1), 1);
    }
}
