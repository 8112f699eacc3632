//! Quotas: what a model or a tenant may not pass, and what it is not to lose.
//!
//! ```text
//! 0 ──── reserved ──────── soft ──────── hard
//!   not taken for others │ its own     │ lent: goes first when others need room  │ never
//! ```
//! A hard limit is checked where slots are taken, records are about to be written and segments are opened: what is being
//! filled or written counts already, so it is not passed for a moment. Who is at its limit makes room of its own. Of a
//! model RAM is counted in slots and SSD in its file; of a tenant in slots and records. Soft limits and reserves of models
//! are parts of the division of the tiers, see `store/divide.rs`.

use super::nodes::NodeId;
use super::owners::{OwnerId, TenantId};
use super::state::{Disk, FILE_HEAD_BYTES, ModelState, State};
use super::{Model, Shared, Store};
use crate::block::Geometry;
use crate::error::{Error, ErrorKind, Result, input};
use crate::pool::Class;
use crate::ssd::notes::Note;
use crate::stats::{Tier, Usage};
use std::collections::BTreeMap;
use std::time::Duration;

/// Blocks of which the coldest is taken, as Redis samples its keys.
const SAMPLE: usize = 16;
/// Blocks that are looked through where a sample has none that may leave.
const LOOKS: usize = 4096;
/// Tokens of so many seconds may be stored at once.
const BURST_S: f64 = 1.0;

/// What holds for one tier, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierQuota {
    /// Never more than this.
    pub hard: Option<u64>,
    /// What is above leaves before all else; of a tenant.
    pub soft: Option<u64>,
    /// As much is not taken for others; of a tenant.
    pub reserved: u64,
}

/// What a model or a tenant may have.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Quota {
    /// Per tier, in the order of [`Tier::ALL`].
    pub tiers: [TierQuota; 2],
    /// New tokens that are stored a second; those of one second may come at once.
    pub tokens_per_s: Option<f64>,
    /// Loads at a time.
    pub loads: Option<u32>,
}

/// A quota, and how far it is used.
#[derive(Debug, Clone, Default)]
pub(crate) struct Account {
    pub(crate) quota: Quota,
    /// Tokens that may be stored, as of some instant.
    bucket: Option<(f64, Duration)>,
    loading: u32,
}

/// For whom blocks leave a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taker {
    /// What is reserved for other tenants stays.
    Tenant(TenantId),
    /// Another model: what is reserved for tenants stays.
    Model,
    /// A hard limit: nothing stays for its own sake.
    Quota,
}

impl Quota {
    /// Whether a model can have it: room for one block, or one segment, or none.
    pub(super) fn check(&self, name: &str, geometry: &Geometry, segment_bytes: Option<u64>) -> Result<()> {
        let record = geometry.record_bytes() as u64;
        let file = segment_bytes.map_or(record, |segment| FILE_HEAD_BYTES + segment);
        for (tier, least, of) in [(Tier::Ram, record, "block"), (Tier::Ssd, file, "segment")] {
            if let Some(hard) = self.tiers[tier as usize].hard.filter(|&hard| hard > 0 && hard < least) {
                let tier = tier.name();
                return Err(input(format!(
                    "quota of model {name:?}: {hard} bytes of {tier}, expected 0 or at least {least}, one {of}"
                )));
            }
        }
        Ok(())
    }
}

impl Account {
    pub(super) fn new(quota: Quota) -> Self {
        Self { quota, ..Self::default() }
    }

    pub(super) fn is_set(&self) -> bool {
        self.quota != Quota::default()
    }

    fn set(&mut self, quota: Quota) {
        if quota.tokens_per_s != self.quota.tokens_per_s {
            self.bucket = None;
        }
        self.quota = quota;
    }

    /// How many tokens may be stored now. A block more than the rate gives in a second would never be; so one block may.
    fn tokens(&mut self, now: Duration, block_tokens: usize) -> usize {
        let Some(rate) = self.quota.tokens_per_s else { return usize::MAX };
        let most = (rate * BURST_S).max(block_tokens as f64);
        let (left, at) = self.bucket.unwrap_or((most, now));
        let left = (left + rate * now.saturating_sub(at).as_secs_f64()).min(most);
        self.bucket = Some((left, now));
        left as usize
    }

    /// How far it is used, by one that has so many bytes of each tier, in blocks of so many tokens.
    pub(super) fn usage(&self, now: Duration, bytes: [u64; 2], block_tokens: u32) -> Usage {
        let left = |rate: f64| {
            let burst = (rate * BURST_S).max(f64::from(block_tokens));
            self.bucket
                .map_or(burst, |(left, at)| (left + rate * now.saturating_sub(at).as_secs_f64()).min(burst.max(left)))
        };
        Usage { bytes, tokens_left: self.quota.tokens_per_s.map(|rate| left(rate) as u64), loads: self.loading }
    }

    fn spend(&mut self, tokens: usize) {
        if let Some((left, _)) = &mut self.bucket {
            *left -= tokens as f64;
        }
    }

    fn may_load(&self) -> bool {
        self.quota.loads.is_none_or(|most| self.loading < most)
    }
}

impl Store {
    /// Sets what a model may have. What it has beyond leaves behind this call, once it is on SSD where there is one.
    ///
    /// # Errors
    /// The model is not registered; a hard limit that is not 0 and below what one block takes, or one of SSD that
    /// is not 0 and below one segment.
    pub fn set_model_quota(&self, model: &Model, quota: Quota) -> Result<()> {
        let mut state = self.shared.open_state()?;
        let name = &model.spec.name;
        let Some(books) = state.models.get_mut(&model.id) else {
            return Err(Error::new(ErrorKind::ModelNotFound, format!("model {name:?} is not registered")));
        };
        quota.check(name, &books.geometry, books.disk.as_ref().map(|disk| disk.file.layout.segment_bytes))?;
        books.account.set(quota);
        drop(state);
        self.shared.work.notify_all();
        Ok(())
    }

    /// Sets what a tenant may have, over all models. As [`set_model_quota`](Self::set_model_quota).
    ///
    /// # Errors
    /// The store is closed.
    pub fn set_tenant_quota(&self, tenant: &str, quota: Quota) -> Result<()> {
        let tag = self.shared.secret.tenant_tag(tenant);
        let mut state = self.shared.open_state()?;
        let id = state.owners.tenant_of(tag);
        state.owners.name(id, tenant);
        if let Some(tenant) = state.owners.tenant_mut(id) {
            tenant.account.set(quota);
        }
        state.owners.set_limited();
        drop(state);
        self.shared.work.notify_all();
        Ok(())
    }
}

impl Store {
    /// What [`keep_quotas`](Self::keep_quotas) kept last in the SSD directory, in another process or in this one before it
    /// was opened; `None`: nothing.
    ///
    /// # Errors
    /// What was kept is damaged.
    pub fn kept_quotas(&self) -> Result<Option<Vec<u8>>> {
        self.shared.ssd.as_ref().map_or(Ok(None), |ssd| Ok(ssd.quotas()?.map(<[u8]>::to_vec)))
    }

    /// Keeps, in the SSD directory, what says which quotas are set; durable on return. Without an SSD tier nothing is kept.
    ///
    /// # Errors
    /// The store is closed, or it cannot be written; then what was kept before still is.
    pub fn keep_quotas(&self, content: &[u8]) -> Result<()> {
        let shared = &self.shared;
        let _registration = shared.registration.lock();
        shared.check_open()?;
        let Some(ssd) = &shared.ssd else { return Ok(()) };
        let next = ssd.control_bytes_with(Note::Quotas, content.len());
        shared.make_room(next.saturating_sub(ssd.control_bytes()));
        ssd.write_note(Note::Quotas, content)?;
        shared.state.lock().ssd_control_bytes = ssd.control_bytes();
        Ok(())
    }
}

impl State {
    // The quotas of an owner's tenant and of its model, and what each holds of a tier.
    fn limits(&self, owner: OwnerId, tier: Tier) -> [(Option<u64>, u64); 2] {
        let Some(books) = self.owners.get(owner) else { return [(None, 0); 2] };
        let tenant = self.owners.tenant(books.tenant);
        let model = self.models.get(&books.model);
        [
            tenant.map_or((None, 0), |t| (t.account.quota.tiers[tier as usize].hard, t.bytes[tier as usize])),
            // Its file is counted where segments are opened.
            model
                .filter(|_| tier == Tier::Ram)
                .map_or((None, 0), |m| (m.account.quota.tiers[0].hard, m.slot_bytes_held)),
        ]
    }

    /// Whether so many bytes more would pass a hard limit of the owner.
    pub(super) fn is_over(&self, owner: OwnerId, tier: Tier, bytes: u64) -> bool {
        self.limits(owner, tier).iter().any(|&(hard, held)| hard.is_some_and(|hard| held + bytes > hard))
    }

    /// Whether a hard limit of the owner is below so many bytes: making room is of no use.
    pub(super) fn never_fits(&self, owner: OwnerId, tier: Tier, bytes: u64) -> bool {
        self.limits(owner, tier).iter().any(|&(hard, _)| hard.is_some_and(|hard| hard < bytes))
    }

    /// How many slots of a class the owner may take, up to `most`; it makes room of its own for one. `None`: for none.
    pub(super) fn within_quota(&mut self, owner: OwnerId, class: &Class, most: usize, may_lose: bool) -> Option<usize> {
        let bytes = class.slot_bytes() as u64;
        loop {
            let limits = self.limits(owner, Tier::Ram);
            let free =
                |&(hard, held): &(Option<u64>, u64)| hard.map_or(u64::MAX, |hard| hard.saturating_sub(held)) / bytes;
            let [of_tenant, of_model] = [free(&limits[0]), free(&limits[1])];
            if of_tenant > 0 && of_model > 0 {
                return Some(most.min(of_tenant.min(of_model) as usize));
            }
            let books = self.owners.get(owner)?;
            let (tenant, model) = (books.tenant, books.model);
            if self.never_fits(owner, Tier::Ram, bytes) {
                return None;
            }
            let made = match of_tenant {
                0 => self.evict_of_tenant(tenant, None, Taker::Tenant(tenant), may_lose),
                _ => self.evict_one(model, Taker::Tenant(tenant), may_lose),
            };
            if !made {
                return None;
            }
        }
    }

    /// How many of some blocks may be stored now.
    pub(super) fn granted(&mut self, owner: OwnerId, blocks: usize, block_tokens: usize) -> usize {
        let now = self.ram.now();
        let tokens = self.accounts(owner).into_iter().flatten().map(|account| account.tokens(now, block_tokens)).min();
        blocks.min(tokens.unwrap_or(usize::MAX) / block_tokens)
    }

    /// Notes that so many tokens are stored.
    pub(super) fn spend(&mut self, owner: OwnerId, tokens: usize) {
        self.accounts(owner).into_iter().flatten().for_each(|account| account.spend(tokens));
    }

    /// Begins a load, if there may be one more.
    pub(super) fn begin_load(&mut self, owner: OwnerId) -> bool {
        let mut accounts = self.accounts(owner);
        let may = accounts.iter().flatten().all(|account| account.may_load());
        if may {
            accounts.iter_mut().flatten().for_each(|account| account.loading += 1);
        }
        may
    }

    /// Ends one.
    pub(super) fn end_load(&mut self, owner: OwnerId) {
        let accounts = self.accounts(owner);
        accounts.into_iter().flatten().for_each(|account| account.loading = account.loading.saturating_sub(1));
    }

    fn accounts(&mut self, owner: OwnerId) -> [Option<&mut Account>; 2] {
        let Some((model, tenant)) = self.owners.get(owner).map(|books| (books.model, books.tenant)) else {
            return [None, None];
        };
        let model = self.models.get_mut(&model).map(|model| &mut model.account);
        [self.owners.tenant_mut(tenant).map(|tenant| &mut tenant.account), model]
    }

    /// Whether a tenant has blocks of a tier that others may not take, and would have less than that without these bytes.
    pub(super) fn is_reserved(&self, tenant: TenantId, tier: Tier, bytes: u64) -> bool {
        self.owners.tenant(tenant).is_some_and(|tenant| {
            let reserved = tenant.account.quota.tiers[tier as usize].reserved;
            reserved > 0 && tenant.bytes[tier as usize] < reserved + bytes
        })
    }

    /// Those of some blocks that may not all leave a tier: of tenants that would have less than what is reserved for them, from
    /// the taker's view.
    pub(super) fn reserved_of(&self, ids: &[NodeId], tier: Tier, taker: Taker) -> Vec<NodeId> {
        if taker == Taker::Quota || !self.owners.is_reserving(tier) {
            return Vec::new();
        }
        let tenant = |id: NodeId| self.owners.tenant_id(self.nodes[id].owner);
        let mut lost = BTreeMap::<TenantId, u64>::new();
        for &id in ids {
            *lost.entry(tenant(id)).or_default() += self.held(id)[tier as usize].unwrap_or(0);
        }
        lost.retain(|&of, &mut bytes| taker != Taker::Tenant(of) && self.is_reserved(of, tier, bytes));
        ids.iter().copied().filter(|&id| lost.contains_key(&tenant(id))).collect()
    }

    /// Whether a tenant has more of a tier than its soft quota.
    pub(super) fn has_lent(&self, tenant: TenantId, tier: Tier) -> bool {
        self.owners.tenant(tenant).is_some_and(|tenant| {
            let soft = tenant.account.quota.tiers[tier as usize].soft;
            soft.is_some_and(|soft| tenant.bytes[tier as usize] > soft)
        })
    }

    /// Has the coldest block in RAM leave that a tenant with more than its soft quota has in a model; of a class.
    pub(super) fn evict_lent(&mut self, model: u32, class: &Class, may_lose: bool) -> bool {
        let lent: Vec<TenantId> =
            self.owners.limited().iter().copied().filter(|&id| self.has_lent(id, Tier::Ram)).collect();
        lent.into_iter().any(|tenant| self.evict_of_tenant(tenant, Some((model, class)), Taker::Model, may_lose))
    }

    /// Has a cold block of a tenant leave RAM: the coldest of a sample. `within`: of a model and a class.
    pub(super) fn evict_of_tenant(
        &mut self,
        tenant: TenantId,
        within: Option<(u32, &Class)>,
        taker: Taker,
        may_lose: bool,
    ) -> bool {
        // For a limit, what does not wait to be written leaves, too: it will not be.
        let (ssd_in_use, selective) = (self.ssd_in_use(), self.selective() || taker == Taker::Quota);
        let leaf = |state: &Self, id: NodeId| {
            let leaf = state.nodes.last_in_ram(id, &mut None)?;
            let fits = within
                .is_none_or(|(_, class)| state.nodes[leaf].ram.is_some_and(|slot| state.ram.pool.is_of(slot, class)));
            let may_leave =
                fits && (may_lose || state.nodes[leaf].is_clean(selective)) && !state.nodes.are_held([leaf], &[]);
            may_leave.then_some(leaf)
        };
        let victim = self.coldest(tenant, Tier::Ram, within.map(|(model, _)| model), leaf);
        victim.inspect(|&id| self.evict_from_ram(id, ssd_in_use)).is_some()
    }

    /// Has a cold record of a tenant be forgotten: the coldest of a sample, and what continues it on SSD alone.
    pub(super) fn forget_record_of(&mut self, tenant: TenantId) -> bool {
        let last = |state: &Self, id: NodeId| {
            let last = state.nodes.last(id);
            let id = if state.nodes[last].ssd.is_some() { last } else { id };
            (!state.nodes.are_held([id], &[])).then_some(id)
        };
        let Some(id) = self.coldest(tenant, Tier::Ssd, None, last) else { return false };
        self.leave_ssd(id);
        true
    }

    // The coldest of a sample of a tenant's blocks in a tier; of each is taken what `leaving` names, if it may leave.
    fn coldest(
        &mut self,
        tenant: TenantId,
        tier: Tier,
        model: Option<u32>,
        leaving: impl Fn(&Self, NodeId) -> Option<NodeId>,
    ) -> Option<NodeId> {
        let mut pools: Vec<OwnerId> = self.owners.owners_of(tenant).to_vec();
        pools.retain(|&id| {
            let owner = self.owners.get(id);
            owner.is_some_and(|o| !o.blocks[tier as usize].is_empty() && model.is_none_or(|model| o.model == model))
        });
        let blocks = |state: &Self, pool: OwnerId| state.owners.get(pool).map_or(0, |o| o.blocks[tier as usize].len());
        let all: usize = pools.iter().map(|&pool| blocks(self, pool)).sum();
        let at = |state: &Self, mut n: usize| {
            for &pool in &pools {
                let here = blocks(state, pool);
                if n < here {
                    return state.owners.get(pool).map(|o| o.blocks[tier as usize][n]);
                }
                n -= here;
            }
            None
        };
        let first = self.owners.below(all);
        let mut best: Option<NodeId> = None;
        for n in 0..SAMPLE.min(all) {
            let n = if all <= SAMPLE { n } else { self.owners.below(all) };
            if let Some(id) = at(self, n).and_then(|id| leaving(self, id)) {
                let colder = best.is_none_or(|best| self.nodes[id].last_use < self.nodes[best].last_use);
                best = if colder { Some(id) } else { best };
            }
        }
        // Most of them may be held, or not on SSD yet.
        best.or_else(|| (0..all.min(LOOKS)).find_map(|n| leaving(self, at(self, (first + n) % all)?)))
    }

    /// A model or a tenant that has more RAM than it may, since its quota was lowered; what a model has beyond its last
    /// places is emptied place by place, so that others get them.
    pub(super) fn shrink_to_quota(&mut self, may_lose: bool) -> bool {
        let over = |hard: Option<u64>, held: u64| hard.map_or(0, |hard| held.saturating_sub(hard));
        let models: Vec<(u32, u64)> = self
            .models
            .iter()
            .map(|(&id, m)| (id, over(m.account.quota.tiers[0].hard, m.slot_bytes_held)))
            .filter(|&(_, over)| over > 0)
            .collect();
        for (model, over) in models {
            if over >= self.ram.pool.chunk_bytes() as u64 && self.empty_own(model, may_lose) {
                return true;
            }
            if self.evict_one(model, Taker::Quota, may_lose) {
                return true;
            }
        }
        let tenants = self.owners.limited().to_vec();
        tenants.into_iter().any(|id| {
            let Some(tenant) = self.owners.tenant(id) else { return false };
            let [ram, ssd] = [Tier::Ram as usize, Tier::Ssd as usize];
            let (quota, bytes) = (tenant.account.quota.tiers, tenant.bytes);
            over(quota[ram].hard, bytes[ram]) > 0 && self.evict_of_tenant(id, None, Taker::Quota, may_lose)
                || over(quota[ssd].hard, bytes[ssd]) > 0 && self.forget_record_of(id)
        })
    }

    /// Whether a model, or a tenant that has blocks of it in RAM, has more RAM than it may.
    pub(super) fn is_above_quota(&self, model: u32) -> bool {
        let over = |hard: Option<u64>, held: u64| hard.is_some_and(|hard| held > hard);
        let books = self.models.get(&model);
        books.is_some_and(|m| over(m.account.quota.tiers[0].hard, m.slot_bytes_held))
            || self.owners.limited().iter().any(|&id| {
                self.owners.tenant(id).is_some_and(|t| over(t.account.quota.tiers[0].hard, t.bytes[0]))
                    && self.owners.owners_of(id).iter().any(|&owner| {
                        self.owners.get(owner).is_some_and(|o| o.model == model && !o.blocks[0].is_empty())
                    })
            })
    }

    /// Models whose files are longer than they may be.
    pub(super) fn above_file_quota(&self) -> Vec<u32> {
        let above = |m: &ModelState| {
            let hard = m.account.quota.tiers[Tier::Ssd as usize].hard;
            // The head stays.
            let file = m.disk.as_ref().map_or(0, Disk::file_bytes);
            hard.is_some_and(|hard| file > hard.max(FILE_HEAD_BYTES))
        };
        self.models.iter().filter(|(_, m)| above(m)).map(|(&id, _)| id).collect()
    }

    /// Whether something has more of the SSD than it may, since its quota was lowered.
    pub(super) fn is_ssd_above_quota(&self) -> bool {
        let above = |id: &TenantId| {
            let tenant = self.owners.tenant(*id);
            tenant.is_some_and(|t| t.account.quota.tiers[1].hard.is_some_and(|hard| t.bytes[1] > hard))
        };
        !self.above_file_quota().is_empty() || self.owners.limited().iter().any(above)
    }

    /// Whether one segment more would make a model's file longer than it may be.
    pub(super) fn is_file_full(&self, model: u32) -> bool {
        self.models.get(&model).is_some_and(|m| {
            let hard = m.account.quota.tiers[Tier::Ssd as usize].hard;
            let disk = m.disk.as_ref();
            hard.zip(disk).is_some_and(|(hard, disk)| disk.file_bytes() + disk.file.layout.segment_bytes > hard)
        })
    }
}

impl Shared {
    /// The owner of a model's blocks of a tenant.
    pub(super) fn owner(&self, model: &Model, tenant: &str) -> (OwnerId, crate::sync::Arc<super::model::Matches>) {
        let tag = self.secret.tenant_tag(tenant);
        if !self.home.is_here() {
            // A thread that a fork left behind may have the lock for ever. Who asks on is told so.
            return (OwnerId::MAX, crate::sync::Arc::default());
        }
        let mut state = self.state.lock();
        state.owner(model.id, model.spec.geometry.record_bytes() as u64, tag, Some(tenant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_more_tokens_than_the_rate_gives_and_a_second_of_it(
            rate in 1u32..100_000, block in 1usize..256, asks in prop::collection::vec((0u64..3000, 1usize..2000), 1..60),
        ) {
            let mut account = Account::default();
            account.set(Quota { tokens_per_s: Some(f64::from(rate)), ..Quota::default() });
            let (mut now, mut stored) = (Duration::ZERO, 0usize);
            for (ms, wanted) in asks {
                now += Duration::from_millis(ms);
                let blocks = wanted.min(account.tokens(now, block) / block);
                account.spend(blocks * block);
                stored += blocks * block;
                let most = f64::from(rate) * now.as_secs_f64() + f64::from(rate).max(block as f64);
                prop_assert!(stored as f64 <= most + 1e-6 * most, "{stored} {most}");
            }
            // Who waited long enough gets at least a block.
            now += Duration::from_secs(block as u64 + 1);
            prop_assert!(account.tokens(now, block) >= block);
        }
    }
}
