//! What comes and goes: a bounded log of the blocks that tiers got and lost, for those who route requests.
//!
//! Nothing is logged before somebody asked for the first time. Who reads too late gets all that is there instead, as of
//! one instant, and goes on from that.

use super::Store;
use super::nodes::NodeId;
use super::state::State;
use crate::block::{BlockHash, Sealed};
use crate::error::Result;
use crate::stats::Tier;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Events that are kept for those who read late.
const KEPT: usize = 1 << 16;

/// A tier got a block, or lost it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Name of the block's model.
    pub model: String,
    /// Names the block to everyone who has the store's secret.
    pub hash: Sealed,
    /// The same of the block before it; `None`: it begins a sequence.
    pub parent: Option<Sealed>,
    /// Which tier.
    pub tier: Tier,
    /// Whether it got the block.
    pub stored: bool,
}

/// What happened since an earlier look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Events {
    /// In order.
    pub events: Vec<Event>,
    /// Whether nothing of before is known: then the events are all that is there.
    pub anew: bool,
    /// Where to go on.
    pub next: u64,
}

#[derive(Debug, Clone, Copy)]
struct Logged {
    model: u32,
    hash: BlockHash,
    parent: Option<BlockHash>,
    tier: Tier,
    stored: bool,
}

/// The log.
#[derive(Debug, Default)]
pub(crate) struct Log {
    on: bool,
    events: VecDeque<Logged>,
    /// The number of the first of them.
    first: u64,
    /// Models that were registered, those that are gone as well.
    names: BTreeMap<u32, String>,
    /// Ends of what was put and matched, and how often each was matched; `None`: nobody asked for that yet.
    uses: Option<HashMap<BlockHash, u32>>,
}

impl Log {
    fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    /// Notes that a put or so many matches ended at a block. Where nobody takes them, new ones are not noted.
    pub(super) fn note_use(&mut self, hash: BlockHash, matches: u32) {
        if let Some(uses) = &mut self.uses
            && (uses.len() < KEPT || uses.contains_key(&hash))
        {
            *uses.entry(hash).or_default() += matches;
        }
    }

    /// From now on uses are noted.
    pub(super) fn begin_uses(&mut self) {
        self.uses.get_or_insert_default();
    }

    /// Takes one of the notes.
    pub(super) fn take_use(&mut self) -> Option<(BlockHash, u32)> {
        let uses = self.uses.as_mut()?;
        let hash = *uses.keys().next()?;
        uses.remove_entry(&hash)
    }
}

impl State {
    /// Notes that a tier got a block, or is about to lose it.
    #[inline]
    pub(super) fn log(&mut self, id: NodeId, tier: Tier, stored: bool) {
        if self.log.on {
            if self.log.events.len() >= KEPT {
                self.log.events.pop_front();
                self.log.first += 1;
            }
            let event = self.logged(id, tier, stored);
            self.log.events.push_back(event);
        }
    }

    fn logged(&self, id: NodeId, tier: Tier, stored: bool) -> Logged {
        let parent = self.nodes.parent(id).map(|parent| self.nodes.hash(parent));
        Logged { model: self.nodes.model(id), hash: self.nodes.hash(id), parent, tier, stored }
    }
}

impl Store {
    /// What happened since event `since`; `None`, or a number that is too old: all that is there.
    ///
    /// # Errors
    /// The store is closed.
    pub fn events(&self, since: Option<u64>) -> Result<Events> {
        let mut state = self.shared.open_state()?;
        let known = since.filter(|&since| state.log.on && (state.log.first..=state.log.next()).contains(&since));
        state.log.on = true;
        let names = state.models.iter().map(|(&id, model)| (id, model.name.clone())).collect::<Vec<_>>();
        state.log.names.extend(names);
        let (next, first) = (state.log.next(), state.log.first);
        let logged: Vec<Logged> = match known {
            Some(since) => state.log.events.iter().skip((since - first) as usize).copied().collect(),
            None => {
                let there = |tier| state.owners.blocks(tier).map(move |id| (id, tier));
                let on_gpu = state.on_gpu().into_iter().map(|id| (id, Tier::Gpu));
                let all = Tier::ALL.into_iter().flat_map(there).chain(on_gpu);
                all.map(|(id, tier)| state.logged(id, tier, true)).collect()
            }
        };
        let names = state.log.names.clone();
        drop(state);
        let seal = |hash| self.shared.secret.seal(hash);
        let named = |logged: Logged| Event {
            model: names.get(&logged.model).cloned().unwrap_or_default(),
            hash: seal(logged.hash),
            parent: logged.parent.map(seal),
            tier: logged.tier,
            stored: logged.stored,
        };
        Ok(Events { events: logged.into_iter().map(named).collect(), anew: known.is_none(), next })
    }
}
