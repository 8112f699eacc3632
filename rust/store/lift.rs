//! Bringing blocks up to RAM ahead of the requests that may ask for them; and whether that paid.

use super::nodes::NodeId;
use super::state::State;
use super::{Model, Store};
use crate::block::Sealed;
use crate::error::Result;
use crate::stats::{Lifted, Lifter, Tier};

impl State {
    /// Notes that a block came to RAM, if it came ahead of a request.
    pub(super) fn lifted(&mut self, id: NodeId, lifter: Option<Lifter>) {
        if let Some(lifter) = lifter {
            self.lifts[lifter as usize].bytes += self.held(id)[Tier::Ram as usize].unwrap_or(0);
            self.nodes[id].lifted = Some(lifter);
        }
    }
}

impl Store {
    /// What became of blocks that were brought up by this.
    ///
    /// # Errors
    /// The store is closed.
    pub fn lifted(&self, lifter: Lifter) -> Result<Lifted> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        Ok(state.lifts[lifter as usize])
    }

    /// Reads into RAM those of some blocks of one sequence, named from its first on, that are on SSD alone: as far as they
    /// are here, as there is room that costs nothing RAM alone has, and so many bytes go. Returns how many leading ones are
    /// in RAM then, and the bytes of those that came.
    ///
    /// # Errors
    /// The store is closed.
    pub fn lift(&self, model: &Model, names: &[Sealed], lifter: Lifter, most_bytes: u64) -> Result<(usize, u64)> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        let mut left = most_bytes;
        let hashes = names.iter().map(|&name| self.shared.secret.unseal(name));
        let ids = hashes.map_while(|hash| state.nodes.find(hash).filter(|&id| state.nodes.model(id) == model.id));
        let fits = |id: &NodeId| {
            let node = &state.nodes[*id];
            let bytes = if node.ram.is_some() { 0 } else { node.ssd.map_or(0, |place| place.bytes()) };
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            fits
        };
        let ids: Vec<NodeId> = ids.take_while(fits).collect();
        let known = state.models.contains_key(&model.id);
        let promotion = if known { state.promotion(model.id, &ids, Some(lifter)) } else { None };
        drop(state);
        let came = promotion.map_or(0, |promotion| self.shared.promote(promotion));
        let state = self.shared.state.lock();
        let here = |name: &&Sealed| {
            let id = state.nodes.find(self.shared.secret.unseal(**name));
            id.is_some_and(|id| state.nodes[id].ram.is_some())
        };
        let leading = names.iter().take_while(here).count();
        Ok((leading, came))
    }
}
