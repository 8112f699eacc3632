//! Whether reading is worth it: a load that takes longer than computing the same tokens is not made.
//!
//! How fast the SSD delivers is learned from each load, how fast the engine computes is told by it. Then the load ends
//! where going on would cost more than it saves, with [`Miss::NotWorthIt`](crate::stats::Miss::NotWorthIt). Of many such
//! loads one is made all the same, so that a disk that has recovered is seen.

use super::nodes::NodeId;
use super::state::State;
use super::{Model, Shared, Store};
use crate::error::{Result, input};

/// Of so many loads that are not worth it, one is made.
const TRIED: u32 = 16;
/// What is counted of earlier loads at each new one.
const KEPT: f64 = 0.875;

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
        if best.1 < reads.len() {
            self.passed_over += 1;
            if self.passed_over.is_multiple_of(TRIED) {
                return reads.len();
            }
        }
        best.1
    }
}

impl State {
    /// How many of these blocks of a model a load should go through.
    pub(super) fn worthwhile(&mut self, model: u32, blocks: &[NodeId]) -> usize {
        let Some(books) = self.models.get_mut(&model) else { return blocks.len() };
        let Some(computed_s) = books.computed_s else { return blocks.len() };
        let read = |id: &NodeId| match &self.nodes[*id] {
            node if node.ram.is_some() => 0,
            node => node.ssd.map_or(0, |place| place.bytes()),
        };
        books.read_rate.worthwhile(&blocks.iter().map(read).collect::<Vec<_>>(), computed_s)
    }
}

impl Store {
    /// Tells how many tokens a second the engine computes of this model's prompts; `None`: not known, and all that is found
    /// is loaded.
    ///
    /// # Errors
    /// The model is not registered, or the rate is not above zero.
    pub fn set_prefill_rate(&self, model: &Model, tokens_per_s: Option<f64>) -> Result<()> {
        if let Some(rate) = tokens_per_s.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return Err(input(format!("prefill rate: {rate} tokens/s, expected a number above zero, or none")));
        }
        let mut state = self.shared.open_state()?;
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
            let found = learned.worthwhile(&reads, computed as f64);
            let saved = |blocks: usize| {
                blocks as f64 * computed as f64 - reads[..blocks].iter().sum::<u64>() as f64 / rate as f64
            };
            prop_assert!((0..=reads.len()).all(|other| saved(other) <= saved(found) + 1e-6));
        }
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
