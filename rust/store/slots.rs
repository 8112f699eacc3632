//! Room in RAM: who makes it when the arena is full.
//!
//! What nobody uses is anybody's. When all is taken, a model has its own coldest block leave, whatever its share: that is
//! done in no time. If it is below its share, or before another that is above, it gets more of the arena behind that: the
//! demotion thread empties places of those above their shares, one at a time, once their blocks are on SSD. A request
//! takes such a place itself only where it has no other room.
//!
//! ```text
//! request   full ─▶ own coldest block leaves        (no block of its own may: a place of another)
//!             └─ wants more ─ ─(behind)─ ─▶ a place of who is above its share is emptied ─▶ free for a span
//! ```
//! Invariant: nobody comes below its share for another. So a share that is kept is a guarantee.

use super::nodes::NodeId;
use super::owners::{OwnerId, TenantId};
use super::quota::Taker;
use super::state::{FILE_HEAD_BYTES, ModelState, State};
use crate::pool::{Class, Place, Run, Slot};
use crate::ram::Leaving;
use crate::stats::Tier;
use crate::sync::Arc;
use std::collections::BTreeMap;

/// How many dear blocks are passed over for one victim.
const PASSES: usize = 16;
/// How many blocks that are reserved for tenants are passed over for one victim; they are hot then.
const SPARED: usize = 4096;
/// Blocks of a span that tell how cold it is.
const LOOKS: usize = 16;

impl State {
    /// Takes a slot of so many bytes for an owner, making room if need be. `may_lose` allows evicting blocks that are not
    /// on SSD.
    pub(crate) fn allocate(&mut self, owner: OwnerId, bytes: usize, may_lose: bool) -> Option<Slot> {
        self.allocate_some(owner, bytes, 1, may_lose).pop()
    }

    /// Takes so many slots, neighbours as far as there are, or as many as there can be.
    pub(crate) fn allocate_some(&mut self, owner: OwnerId, bytes: usize, wanted: usize, may_lose: bool) -> Vec<Slot> {
        let mut slots = Vec::with_capacity(wanted);
        let Some(model) = self.owners.get(owner).map(|owner| owner.model) else { return slots };
        let Some(class) = self.class(model, bytes) else { return slots };
        while slots.len() < wanted
            && let Some(most) = self.within_quota(owner, &class, wanted - slots.len(), may_lose)
            && let Some(run) = self.allocate_run((model, owner), &class, most, may_lose)
        {
            for slot in run {
                self.take(slot, owner);
                slots.push(slot);
            }
        }
        slots
    }

    /// A model's slots of a size.
    pub(crate) fn class(&mut self, model: u32, bytes: usize) -> Option<Arc<Class>> {
        let ModelState { classes, holding, .. } = self.models.get_mut(&model)?;
        Some(classes.entry(bytes).or_insert_with(|| self.ram.pool.class(holding, bytes)).clone())
    }

    fn allocate_run(
        &mut self,
        (model, owner): (u32, OwnerId),
        class: &Arc<Class>,
        most: usize,
        may_lose: bool,
    ) -> Option<Run> {
        loop {
            if let Some(run) = self.ram.pool.allocate_run(class, most) {
                return Some(run);
            }
            let books = self.models.get_mut(&model)?;
            if !books.refused {
                books.wants.get_or_insert_with(|| class.clone());
            }
            if !self.evict_lent(model, class, may_lose)
                && !self.evict_own(model, owner, class, may_lose)
                && !self.take_from_others(model, class, may_lose)
            {
                return None;
            }
        }
    }

    /// What a model gets back of a tier when it needs it, in whole chunks or segments.
    pub(super) fn share(&self, tier: Tier, model: u32) -> u64 {
        let Some(books) = self.models.get(&model) else { return 0 };
        let of =
            |capacity: u64| books.shares.map_or(capacity / self.models.len() as u64, |shares| shares[tier as usize]);
        match tier {
            Tier::Ram => of(self.ram_bytes) / self.ram.pool.chunk_bytes() as u64 * self.ram.pool.chunk_bytes() as u64,
            Tier::Ssd => {
                let segment = books.disk.as_ref().map_or(1, |disk| disk.file.layout.segment_bytes);
                let share = of(self.ssd_capacity_bytes.saturating_sub(self.ssd_control_bytes));
                FILE_HEAD_BYTES + share.saturating_sub(FILE_HEAD_BYTES) / segment * segment
            }
            Tier::Gpu => self.gpu_share(),
        }
    }

    /// When it is a model's turn to make room, of those above their shares: the least is first.
    pub(super) fn turn(&self, model: u32) -> usize {
        self.models.get(&model).map_or(0, |m| m.turn)
    }

    // Bytes that a model holds of RAM beyond its share.
    fn above_share(&self, model: u32) -> u64 {
        let held = self.models.get(&model).map_or(0, |m| self.ram.pool.held_bytes(&m.holding) as u64);
        held.saturating_sub(self.share(Tier::Ram, model))
    }

    // Whether a model has more to get: its share, or what one holds beyond that whose turn is before its own.
    fn may_take(&self, taker: u32, class: &Class, giver: u32) -> bool {
        let held = self.models.get(&taker).map_or(0, |m| self.ram.pool.held_bytes(&m.holding));
        let below = (held + self.ram.pool.least_span(class)) as u64 <= self.share(Tier::Ram, taker);
        taker != giver && (below || self.turn(giver) < self.turn(taker))
    }

    // Has a model's coldest block leave, or where its slot is of another size, a whole place.
    fn evict_own(&mut self, model: u32, taker: OwnerId, class: &Class, may_lose: bool) -> bool {
        let taker = Taker::Tenant(self.owners.tenant_id(taker));
        let Some(victim) = self.coldest_of(model, taker, may_lose) else { return false };
        if self.nodes[victim].ram.is_some_and(|slot| self.ram.pool.is_of(slot, class)) {
            self.evict_from_ram(victim, self.ssd_in_use());
            return true;
        }
        // A whole place is emptied for slots of this size.
        let own = |place: &Place| place.iter().all(|span| span.model == model);
        let places = self.ram.pool.places_for(class).into_iter().filter(own);
        self.empty_coldest(places.collect(), taker, may_lose)
    }

    /// Has a model's coldest block leave RAM.
    pub(super) fn evict_one(&mut self, model: u32, taker: Taker, may_lose: bool) -> bool {
        let victim = self.coldest_of(model, taker, may_lose);
        victim.inspect(|&id| self.evict_from_ram(id, self.ssd_in_use())).is_some()
    }

    /// Empties the coldest place of a model that has more than its quota.
    pub(super) fn empty_own(&mut self, model: u32, may_lose: bool) -> bool {
        let places = self.models.get(&model).map_or_else(Vec::new, |m| self.ram.pool.spans_of(&m.holding));
        self.empty_coldest(places, Taker::Quota, may_lose)
    }

    // The block of a model that leaves next. What is reserved for a tenant stays, but for its own needs.
    fn coldest_of(&mut self, model: u32, taker: Taker, may_lose: bool) -> Option<NodeId> {
        // For a limit, what does not wait to be written leaves, too: it will not be.
        let selective = self.selective() || taker == Taker::Quota;
        let (now, ssd_in_use) = (self.ram.now(), self.ssd_in_use());
        let record = self.models.get(&model).map_or(0, |m| m.geometry.record_bytes() as u64);
        let others = self.owners.limited().iter().copied().filter(|&id| taker != Taker::Tenant(id));
        let reserved: Vec<TenantId> = match taker {
            Taker::Quota => Vec::new(),
            _ => others.filter(|&id| self.is_reserved(id, Tier::Ram, record)).collect(),
        };
        let (nodes, owners) = (&self.nodes, &self.owners);
        let stays = |id: NodeId| reserved.contains(&owners.tenant_id(nodes[id].owner));
        let Leaving { order, retained, walk } = self.ram.leaving(model);
        order.set_capacity(order.len());
        let clean = |id: NodeId| nodes[id].is_clean(selective);
        let may_leave = |id: &NodeId| (may_lose || clean(*id)) && !nodes.are_held([*id], &[]);
        let overdue = retained.overdue(now, |id| nodes[id].ram_children == 0 && may_leave(&id) && !stays(id));
        if overdue.is_some() {
            return overdue;
        }
        let (mut passed, mut spared) = (0, 0);
        loop {
            let leaf_of = |id: NodeId| nodes.last_in_ram(id, walk).filter(may_leave);
            // Without an SSD no block is better to lose than another.
            let victim = order.victim(leaf_of, |id| clean(id) || !ssd_in_use)?;
            let again = if stays(victim) {
                spared += 1;
                if spared > SPARED {
                    return None;
                }
                true
            } else {
                passed += 1;
                passed <= PASSES && retained.pass_over(victim)
            };
            if !again {
                return Some(victim);
            }
            nodes.path(victim).for_each(|id| order.touch(id));
        }
    }

    // Empties a place of models above their shares at once; those whose turn it is first.
    fn take_from_others(&mut self, taker: u32, class: &Class, may_lose: bool) -> bool {
        let givers: Vec<u32> = self.models.keys().copied().filter(|&id| id != taker).collect();
        let places = self.places_of(&givers, taker, class);
        self.empty_of(&givers, places, may_lose)
    }

    // Places for a model that these can give and stay at their shares, as far as they are not its own.
    fn places_of(&self, givers: &[u32], taker: u32, class: &Class) -> Vec<Place> {
        let spared = |place: &Place| {
            place.iter().all(|span| {
                let given: usize = place.iter().filter(|s| s.model == span.model).map(|s| s.bytes).sum();
                span.model == taker || givers.contains(&span.model) && given as u64 <= self.above_share(span.model)
            })
        };
        self.ram.pool.places_for(class).into_iter().filter(spared).collect()
    }

    // Empties the coldest of these places whose models' turn it is first.
    fn empty_of(&mut self, givers: &[u32], places: Vec<Place>, may_lose: bool) -> bool {
        let mut by_turn: BTreeMap<usize, Vec<Place>> = BTreeMap::new();
        for place in places {
            let turn = place.iter().filter(|span| givers.contains(&span.model)).map(|span| self.turn(span.model)).max();
            by_turn.entry(turn.unwrap_or_default()).or_default().push(place);
        }
        by_turn.into_values().any(|places| self.empty_coldest(places, Taker::Model, may_lose))
    }

    /// Models that found no room, and for what.
    pub(super) fn takers(&self) -> Vec<(u32, Arc<Class>)> {
        self.models.iter().filter_map(|(&id, model)| Some((id, model.wants.clone()?))).collect()
    }

    /// Whether a model has to give: it holds more than its quota, or what one of these is to get.
    pub(super) fn has_to_give(&self, id: u32, takers: &[(u32, Arc<Class>)]) -> bool {
        self.is_above_quota(id)
            || takers.iter().any(|(taker, class)| self.above_share(id) > 0 && self.may_take(*taker, class, id))
    }

    /// Empties one place of a model that has to give, as far as its blocks are on SSD where there is one that takes them.
    /// `false`: there is none, or none that can be emptied now.
    pub(super) fn shrink_one(&mut self) -> bool {
        let may_lose = !self.ssd_in_use() || self.ssd_read_only.is_some();
        let emptied = self.shrink_to_quota(may_lose) || self.grow_one(may_lose);
        self.ram.pool.settle();
        if emptied {
            // Who can give may be another now.
            self.models.values_mut().for_each(|model| model.refused = false);
        }
        emptied
    }

    // Empties a place for a model that found no room.
    fn grow_one(&mut self, may_lose: bool) -> bool {
        for (taker, class) in self.takers() {
            let givers: Vec<u32> =
                self.models.keys().copied().filter(|&giver| self.may_take(taker, &class, giver)).collect();
            let room = self.ram.pool.has_room(&class);
            let places = if room { Vec::new() } else { self.places_of(&givers, taker, &class) };
            if places.is_empty() {
                if let Some(model) = self.models.get_mut(&taker) {
                    (model.wants, model.refused) = (None, !room);
                }
            } else if self.empty_of(&givers, places, may_lose) {
                return true;
            }
        }
        false
    }

    // Empties the place that was used longest ago, by the mean of some of its blocks, of those where nothing is held, or
    // reserved for a tenant other than the taker.
    fn empty_coldest(&mut self, places: Vec<Place>, taker: Taker, may_lose: bool) -> bool {
        let last_use = |slot: Slot| self.ram.holder(slot).map(|id| self.nodes[id].last_use);
        let mean = |place: &Place| {
            let some = place.iter().flat_map(|span| self.ram.pool.taken(span, LOOKS));
            let uses: Vec<u64> = some.filter_map(last_use).collect();
            uses.iter().sum::<u64>() / (uses.len() as u64).max(1)
        };
        let mut known: Vec<(u64, Place)> = places.into_iter().map(|place| (mean(&place), place)).collect();
        known.sort_by_key(|(last_use, _)| *last_use);
        // What does not wait to be written will not be: its record had to leave the SSD.
        let may_leave = |id: &NodeId| may_lose || self.nodes[*id].is_clean(true);
        // `None`: a slot that is being filled, or what may not leave.
        let blocks = |place: Place| -> Option<Vec<NodeId>> {
            let slots = place.into_iter().flat_map(|span| self.ram.pool.taken(&span, usize::MAX));
            slots.map(|slot| self.ram.holder(slot).filter(may_leave)).collect()
        };
        let mut coldest_first = known.into_iter().filter_map(|(_, place)| blocks(place)).filter(|ids| !ids.is_empty());
        let written = self.writing.as_ref().map_or(&[][..], |writing| &writing.blocks);
        let may_go = |ids: &Vec<NodeId>| {
            !self.nodes.are_held(ids.iter().copied(), written) && self.reserved_of(ids, Tier::Ram, taker).is_empty()
        };
        let Some(leaving) = coldest_first.find(may_go) else { return false };
        let hashes: Vec<_> = leaving.into_iter().map(|id| self.nodes.hash(id)).collect();
        for hash in hashes {
            // Dropping one block may have taken others along.
            if let Some(id) = self.nodes.find(hash).filter(|&id| self.nodes[id].ram.is_some()) {
                self.evict_from_ram(id, self.ssd_in_use());
            }
        }
        true
    }
}
