//! What is cached, listed: for people who ask, and for a catalog that nodes share. Under the lock only in portions.

use super::nodes::NodeId;
use super::state::State;
use super::{Model, Sequence, Store};
use crate::block::{BlockHash, Sealed};
use crate::error::Result;
use crate::stats::{Counts, Miss, Tier};
use crate::sync::Guard;

/// Blocks that are looked at under the lock at a time.
const LOOKED_AT: usize = 4096;
/// Blocks of the prefixes that are listed at a time, about.
const LISTED: usize = 1 << 16;

/// A cached sequence, from its first block to one where a put or a match ended, or that no other continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    /// Name of its model.
    pub model: String,
    /// Names its namespace, in its present epoch, to everyone who has the store's secret.
    pub space: Sealed,
    /// Adapter and tenant; `None`: nobody asked for the namespace since the store was opened.
    pub names: Option<(String, String)>,
    /// Names its blocks.
    pub blocks: Vec<Sealed>,
    /// Where each of them is: a bit for each tier.
    pub places: Vec<u8>,
    /// When its last block came, in seconds since 1970.
    pub since_s: u32,
    /// When it was used last.
    pub used_s: u32,
    /// By how many matches.
    pub uses: u32,
}

/// Model, adapter, tenant and token ids of a prompt.
pub(crate) type MissedTokens = (String, String, String, Vec<u32>);

struct Listed {
    model: u32,
    seed: BlockHash,
    blocks: Vec<(BlockHash, u8)>,
    since_s: u32,
    used_s: u32,
    uses: u32,
}

impl State {
    // A bit for each tier that has a block.
    fn place(&self, id: NodeId) -> u8 {
        let held = self.held(id);
        let alone: u8 = Tier::ALL.iter().map(|&tier| u8::from(held[tier as usize].is_some()) << tier as u8).sum();
        alone | u8::from(self.nodes[id].gpu.is_some()) << Tier::Gpu as u8
    }

    fn listed(&self, id: NodeId) -> Listed {
        let mut path: Vec<NodeId> = self.nodes.path(id).collect();
        path.reverse();
        let node = &self.nodes[id];
        Listed {
            model: self.nodes.model(id),
            seed: self.nodes.hash_before(path[0]),
            blocks: path.iter().map(|&id| (self.nodes.hash(id), self.place(id))).collect(),
            since_s: node.since_s,
            used_s: node.used_s,
            uses: node.uses,
        }
    }

    fn name_of(&self, model: u32) -> Option<String> {
        self.models.get(&model).map(|books| books.name.clone())
    }
}

impl Store {
    /// Sequences that no other continues, of one model or of all; a portion of them, from that number on. And where to go
    /// on, if there may be more.
    ///
    /// # Errors
    /// The store is closed.
    pub fn prefixes(&self, model: Option<&str>, from: u32) -> Result<(Vec<Prefix>, Option<u32>)> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        let (ends, next) = state.nodes.ends(from, LOOKED_AT);
        let ids: Vec<u32> =
            state.models.iter().filter(|(_, m)| model.is_none_or(|of| m.name == of)).map(|(&id, _)| id).collect();
        let (mut listed, mut left, mut next) = (Vec::new(), LISTED, next);
        for id in ends.into_iter().filter(|&id| ids.contains(&state.nodes.model(id))) {
            if left == 0 {
                next = Some(id);
                break;
            }
            let prefix = state.listed(id);
            left = left.saturating_sub(prefix.blocks.len());
            listed.push(prefix);
        }
        Ok((self.named(state, listed), next))
    }

    /// Sequences where a put or a match ended since the last such call, and the matches since then alone; so many of them at
    /// most, and fewer where they are long. Nothing is noted before the first call.
    ///
    /// # Errors
    /// The store is closed.
    pub fn used(&self, most: usize) -> Result<Vec<Prefix>> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        state.log.begin_uses();
        let (mut listed, mut left) = (Vec::new(), LISTED);
        while left > 0
            && listed.len() < most
            && let Some((hash, uses)) = state.log.take_use()
        {
            if let Some(id) = state.nodes.find(hash) {
                let prefix = state.listed(id);
                left = left.saturating_sub(prefix.blocks.len());
                listed.push(Listed { uses, ..prefix });
            }
        }
        Ok(self.named(state, listed))
    }

    /// Prompts of which matches found too little, with their model, adapter and tenant; from the first such call on.
    ///
    /// # Errors
    /// The store is closed.
    pub fn missed(&self) -> Result<Vec<MissedTokens>> {
        let state = self.shared.open_state()?;
        let named = self.shared.missed.take().into_iter().filter_map(|prompt| {
            let (adapter, tenant) = state.nodes.name_of(prompt.namespace.hasher.seed())?.clone();
            Some((state.name_of(prompt.model)?, adapter, tenant, prompt.tokens))
        });
        Ok(named.collect())
    }

    /// What each tenant counted of each model: number of the model's registration, names of both. What tenants counted that
    /// were forgotten since, as they had nothing any more, is not among it.
    ///
    /// # Errors
    /// The store is closed.
    pub fn usage(&self) -> Result<Vec<(u32, String, String, Counts)>> {
        let mut state = self.shared.open_state()?;
        state.catch_up(&self.shared.touched);
        let each = state.owners.each();
        Ok(each.filter_map(|(model, tenant, counts)| Some((model, state.name_of(model)?, tenant, counts))).collect())
    }

    /// Where each of some blocks of a model is, by their names: a bit for each tier; 0: nowhere. Nothing is counted.
    ///
    /// # Errors
    /// The store is closed.
    pub fn places(&self, model: &Model, names: &[Sealed]) -> Result<Vec<u8>> {
        let state = self.shared.open_state()?;
        let hashes = names.iter().map(|&name| self.shared.secret.unseal(name));
        let ids = hashes.map(|hash| state.nodes.find(hash).filter(|&id| state.nodes.model(id) == model.id));
        Ok(ids.map(|id| id.map_or(0, |id| state.place(id))).collect())
    }

    /// Why each block of a sequence is not there, as far as that is remembered; of one that is there it says nothing.
    pub fn missing(&self, sequence: &Sequence) -> Vec<Miss> {
        sequence.hashes.iter().map(|&hash| self.shared.gone.why(hash)).collect()
    }

    /// Names of the blocks of a sequence, to everyone who has the store's secret.
    pub fn names(&self, sequence: &Sequence) -> Vec<Sealed> {
        sequence.hashes.iter().map(|&hash| self.shared.secret.seal(hash)).collect()
    }

    /// What names a namespace of a model in its present epoch.
    pub fn space(&self, model: &Model, adapter: &str, tenant: &str) -> Sealed {
        self.shared.secret.seal(model.namespace(&self.shared, adapter, tenant).hasher.seed())
    }

    // The lock goes before blocks are named: that takes longer than finding them.
    fn named(&self, state: Guard<'_, State>, listed: Vec<Listed>) -> Vec<Prefix> {
        let names: Vec<_> =
            listed.iter().map(|of| (state.name_of(of.model), state.nodes.name_of(of.seed).cloned())).collect();
        drop(state);
        let secret = &self.shared.secret;
        let named = listed.into_iter().zip(names).filter_map(|(of, (model, names))| {
            Some(Prefix {
                model: model?,
                space: secret.seal(of.seed),
                names,
                blocks: of.blocks.iter().map(|&(hash, _)| secret.seal(hash)).collect(),
                places: of.blocks.iter().map(|&(_, place)| place).collect(),
                since_s: of.since_s,
                used_s: of.used_s,
                uses: of.uses,
            })
        });
        named.collect()
    }
}
