//! Dividing the tiers between models: what policy decides, from what the store knows.

use super::model::Model;
use super::state::FILE_HEAD_BYTES;
use super::{Shared, Store};
use crate::error::{Error, ErrorKind, Result, input};
use crate::stats::Tier;

/// One model's part of the tiers.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    /// Whose it is.
    pub model: &'a Model,
    /// Bytes of RAM that it gets back when it needs them.
    pub ram_bytes: u64,
    /// Bytes of SSD, its file's head included.
    pub ssd_bytes: u64,
}

/// What there is to divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Divisible {
    /// Bytes of RAM, and in what steps models take them.
    pub ram_bytes: u64,
    /// See there.
    pub ram_step_bytes: u64,
    /// Bytes of SSD, the heads of files included; 0 where there is none.
    pub ssd_bytes: u64,
    /// What a file takes beside its segments.
    pub ssd_head_bytes: u64,
}

impl Store {
    /// Divides the tiers anew. A share is what a model gets back when it needs it: until then others use it; and no model
    /// comes below its share for another. In the order of `shares` models make room that hold more than theirs. A model
    /// without one gets as much as any other would.
    ///
    /// # Errors
    /// A model is not registered, or the shares of a tier are more than the tier; then nothing has changed.
    pub fn divide(&self, shares: &[Share<'_>]) -> Result<()> {
        let mut state = self.shared.open_state()?;
        let has = |tier: Tier| shares.iter().map(|share| share.bytes(tier)).fold(0u64, u64::saturating_add);
        let room = self.shared.divisible(&state);
        for (tier, bytes) in [(Tier::Ram, room.ram_bytes), (Tier::Ssd, room.ssd_bytes)] {
            if has(tier) > bytes {
                let (name, all) = (tier.name(), has(tier));
                return Err(input(format!("shares of {name} are {all} bytes in all, expected at most {bytes}")));
            }
        }
        if let Some(unknown) = shares.iter().find(|share| !state.models.contains_key(&share.model.id)) {
            let name = &unknown.model.spec.name;
            return Err(Error::new(ErrorKind::ModelNotFound, format!("model {name:?} is not registered")));
        }
        for model in state.models.values_mut() {
            (model.shares, model.turn, model.refused) = (None, 0, false);
        }
        for (turn, share) in shares.iter().enumerate() {
            if let Some(model) = state.models.get_mut(&share.model.id) {
                (model.shares, model.turn) = (Some([share.ram_bytes, share.ssd_bytes]), turn);
            }
        }
        drop(state);
        self.shared.work.notify_all();
        Ok(())
    }

    /// What there is to divide.
    pub fn divisible(&self) -> Divisible {
        self.shared.divisible(&self.shared.state.lock())
    }

    /// Blocks of a model that were asked for, and how many of them caches of so many blocks would have hit: what was asked
    /// for long ago counts less, see [`age_curves`](Self::age_curves). Sizes rise.
    ///
    /// # Errors
    /// The model is not registered.
    pub fn curve(&self, model: &Model, blocks: &[f64]) -> Result<(f64, Vec<f64>)> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        let Some(books) = state.models.get(&model.id) else {
            let name = &model.spec.name;
            return Err(Error::new(ErrorKind::ModelNotFound, format!("model {name:?} is not registered")));
        };
        Ok((books.curve.asked(), books.curve.hits(blocks)))
    }

    /// Lets all that was asked for up to now count by this factor in the curves.
    ///
    /// # Errors
    /// The store is closed.
    pub fn age_curves(&self, factor: f64) -> Result<()> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        state.models.values_mut().for_each(|model| model.curve.age(factor.clamp(0.0, 1.0)));
        Ok(())
    }
}

impl Share<'_> {
    fn bytes(&self, tier: Tier) -> u64 {
        match tier {
            Tier::Ram => self.ram_bytes,
            Tier::Ssd => self.ssd_bytes,
            // It is divided alike.
            Tier::Gpu => 0,
        }
    }
}

impl Shared {
    fn divisible(&self, state: &super::state::State) -> Divisible {
        Divisible {
            ram_bytes: state.ram_bytes,
            ram_step_bytes: state.ram.pool.chunk_bytes() as u64,
            ssd_bytes: state.ssd_capacity_bytes.saturating_sub(state.ssd_control_bytes),
            ssd_head_bytes: FILE_HEAD_BYTES,
        }
    }
}
