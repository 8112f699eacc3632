//! Who owns what: every block belongs to one tenant of one model, and is counted there alone.
//!
//! ```text
//!            tenant ""   tenant x   tenant y
//! model a     owner       owner      owner      ─▶ sum of the row: the model
//! model b     owner                  owner
//!                           └─▶ sum of the column: the tenant            all, and those that left: the store
//! ```
//! What belongs to no block (a segment's header, a write that failed) is counted for the owner of no tenant. So the sums
//! agree exactly, at every instant. A tenant is known by the upper half of its namespaces' seeds: blocks that are found
//! after a restart have their owner at once.

use super::model::Matches;
use super::nodes::NodeId;
use super::quota::Account;
use crate::stats::{Counts, Tier, Usage};
use crate::sync::Arc;
use std::collections::HashMap;
use std::time::Duration;

/// Owners that are kept although they have nothing: the counts of those beyond that go to their model's first.
const IDLE: usize = 1 << 14;

pub(crate) type OwnerId = u32;
pub(crate) type TenantId = u32;

/// A tenant of a model.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) model: u32,
    pub(crate) tenant: TenantId,
    pub(crate) counts: Counts,
    /// What its matches count without the lock.
    pub(crate) matches: Arc<Matches>,
    /// Its blocks by tier; in the order of [`Tier::ALL`].
    pub(crate) blocks: [Vec<NodeId>; 2],
    /// Bytes of a block of its model that is not encoded.
    pub(crate) plain_bytes: u64,
    /// Bytes of its slots, those that are being filled among them.
    slot_bytes: u64,
    /// What of its counts is of owners that were forgotten.
    folded: Counts,
}

impl Owner {
    fn all(&self) -> Counts {
        let mut counts = self.counts;
        self.matches.add_to(&mut counts);
        counts
    }

    fn is_idle(&self) -> bool {
        self.slot_bytes == 0 && self.blocks.iter().all(Vec::is_empty) && Arc::strong_count(&self.matches) == 1
    }
}

/// A tenant, over all models; the first is that of no tenant.
#[derive(Debug, Default)]
pub(crate) struct Tenant {
    tag: u64,
    /// As it was called; not known of one that was only found again on SSD.
    name: Option<String>,
    pub(crate) account: Account,
    /// Of slots, and of records, those that are being filled or written among them.
    pub(crate) bytes: [u64; 2],
    owners: Vec<OwnerId>,
    /// What its owners counted that are gone.
    retired: Counts,
}

impl Tenant {
    fn called(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("tag:{:016x}", self.tag))
    }
}

/// Counts of each model, by its number; of each tenant, by its name, with what it uses; and of all.
#[derive(Debug)]
pub(crate) struct Sums {
    pub(crate) models: HashMap<u32, Counts>,
    pub(crate) tenants: Vec<(String, Counts, Usage)>,
    pub(crate) total: Counts,
}

/// A table whose entries keep their numbers.
#[derive(Debug)]
struct Slab<T> {
    entries: Vec<Option<Box<T>>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    fn insert(&mut self, value: T) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        self.entries[id as usize] = Some(Box::new(value));
        id
    }

    fn get(&self, id: u32) -> Option<&T> {
        self.entries.get(id as usize)?.as_deref()
    }

    fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.entries.get_mut(id as usize)?.as_deref_mut()
    }

    fn remove(&mut self, id: u32) -> Option<Box<T>> {
        let gone = self.entries.get_mut(id as usize)?.take();
        if gone.is_some() {
            self.free.push(id);
        }
        gone
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.entries.iter().enumerate().filter_map(|(id, entry)| Some((id as u32, entry.as_deref()?)))
    }
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

/// All owners and tenants.
#[derive(Debug)]
pub(crate) struct Owners {
    owners: Slab<Owner>,
    tenants: Slab<Tenant>,
    by_key: HashMap<(u32, u64), OwnerId>,
    by_tag: HashMap<u64, TenantId>,
    /// Counts of what belongs to no owner any more.
    pub(crate) retired: Counts,
    /// Tenants that have a quota; and whether one has a reserve, by tier.
    limited: Vec<TenantId>,
    reserving: [bool; 2],
    /// With so many owners those that have nothing are looked for.
    sweep_at: usize,
    chance: u64,
}

impl Default for Owners {
    fn default() -> Self {
        let mut tenants = Slab::default();
        let nobody = tenants.insert(Tenant { name: Some(String::new()), ..Tenant::default() });
        Self {
            owners: Slab::default(),
            tenants,
            by_key: HashMap::new(),
            by_tag: HashMap::from([(0, nobody)]),
            retired: Counts::default(),
            limited: Vec::new(),
            reserving: [false; 2],
            sweep_at: IDLE,
            chance: 0x9e37_79b9_7f4a_7c15,
        }
    }
}

impl Owners {
    /// The owner of a model's blocks whose tenant has this tag; it is entered if it is new.
    pub(crate) fn of(&mut self, model: u32, tag: u64, plain_bytes: u64) -> OwnerId {
        if let Some(&known) = self.by_key.get(&(model, tag)) {
            return known;
        }
        if self.by_key.len() >= self.sweep_at {
            self.forget_idle();
            // Where all are in use, looking at them once more is not worth it soon.
            self.sweep_at = IDLE.max(2 * self.by_key.len());
        }
        let tenant = self.tenant_of(tag);
        let id = self.owners.insert(Owner {
            model,
            tenant,
            counts: Counts::default(),
            matches: Arc::default(),
            blocks: [Vec::new(), Vec::new()],
            plain_bytes,
            slot_bytes: 0,
            folded: Counts::default(),
        });
        self.by_key.insert((model, tag), id);
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.owners.push(id);
        }
        id
    }

    /// The tenant of this tag; it is entered if it is new.
    pub(crate) fn tenant_of(&mut self, tag: u64) -> TenantId {
        let tenants = &mut self.tenants;
        *self.by_tag.entry(tag).or_insert_with(|| tenants.insert(Tenant { tag, ..Tenant::default() }))
    }

    /// What a tenant is called.
    pub(crate) fn name(&mut self, tenant: TenantId, name: &str) {
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.name.get_or_insert_with(|| name.to_owned());
        }
    }

    pub(crate) fn get(&self, id: OwnerId) -> Option<&Owner> {
        self.owners.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: OwnerId) -> Option<&mut Owner> {
        self.owners.get_mut(id)
    }

    pub(crate) fn tenant(&self, id: TenantId) -> Option<&Tenant> {
        self.tenants.get(id)
    }

    pub(crate) fn tenant_mut(&mut self, id: TenantId) -> Option<&mut Tenant> {
        self.tenants.get_mut(id)
    }

    /// The tenant of an owner.
    pub(crate) fn tenant_id(&self, owner: OwnerId) -> TenantId {
        self.owners.get(owner).map_or(0, |owner| owner.tenant)
    }

    /// Tenants that have a quota.
    pub(super) fn limited(&self) -> &[TenantId] {
        &self.limited
    }

    /// Whether some bytes of a tier are reserved for a tenant.
    pub(super) fn is_reserving(&self, tier: Tier) -> bool {
        self.reserving[tier as usize]
    }

    /// Looks which tenants have a quota.
    pub(super) fn set_limited(&mut self) {
        let set = self.tenants.iter().filter(|(_, tenant)| tenant.account.is_set());
        let limited: Vec<_> =
            set.map(|(id, tenant)| (id, tenant.account.quota.tiers.map(|t| t.reserved > 0))).collect();
        self.reserving = [0, 1].map(|tier| limited.iter().any(|(_, reserving)| reserving[tier]));
        self.limited = limited.into_iter().map(|(id, _)| id).collect();
    }

    /// All blocks of a tier.
    pub(super) fn blocks(&self, tier: Tier) -> impl Iterator<Item = NodeId> + '_ {
        self.owners.iter().flat_map(move |(_, owner)| owner.blocks[tier as usize].iter().copied())
    }

    /// Owners of a tenant.
    pub(crate) fn owners_of(&self, tenant: TenantId) -> &[OwnerId] {
        self.tenants.get(tenant).map_or(&[], |tenant| &tenant.owners)
    }

    /// Where an owner's events are counted.
    pub(crate) fn counts(&mut self, id: OwnerId) -> &mut Counts {
        // A lease may outlive its model; what it still does is counted with the models that are gone.
        self.owners.get_mut(id).map_or(&mut self.retired, |owner| &mut owner.counts)
    }

    /// Books a slot that an owner took, or gave back.
    pub(crate) fn hold_slots(&mut self, id: OwnerId, bytes: u64, taken: bool) {
        let Some(owner) = self.owners.get_mut(id) else { return };
        let tenant = owner.tenant;
        let shift = |value: &mut u64, by: u64| *value = if taken { *value + by } else { *value - by };
        shift(&mut owner.slot_bytes, bytes);
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            shift(&mut tenant.bytes[Tier::Ram as usize], bytes);
        }
    }

    /// Books bytes of records that an owner has on SSD or is about to have, or no longer.
    pub(crate) fn hold_records(&mut self, id: OwnerId, bytes: u64, taken: bool) {
        let tenant = self.tenant_id(id);
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            let held = &mut tenant.bytes[Tier::Ssd as usize];
            *held = if taken { *held + bytes } else { *held - bytes };
        }
    }

    /// A number below that, by chance.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        // xorshift64, Marsaglia 2003.
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        (self.chance % bound.max(1) as u64) as usize
    }

    /// A model is gone, and all of its blocks: what its owners counted stays with their tenants.
    pub(crate) fn leave(&mut self, model: u32) {
        self.by_key.retain(|&(of, _), _| of != model);
        self.forget_idle();
    }

    // Forgets owners that have nothing and are nobody's: those of models that are gone, and of the others as many as there
    // are too many.
    fn forget_idle(&mut self) {
        let full = self.by_key.len() >= IDLE;
        let known = |owner: &Owner| self.key(owner).is_some_and(|key| self.by_key.contains_key(&key));
        let idle =
            self.owners.iter().filter(|(_, owner)| owner.is_idle() && (!known(owner) || full && owner.tenant > 0));
        for id in idle.map(|(id, _)| id).collect::<Vec<_>>() {
            let key = self.owners.get(id).and_then(|owner| self.key(owner));
            let here = key.filter(|key| self.by_key.get(key) == Some(&id));
            let Some(owner) = self.owners.remove(id) else { continue };
            let counts = owner.all();
            match here.and_then(|(model, _)| self.by_key.get(&(model, 0)).copied()) {
                // The sums over models stay, and that over tenants.
                Some(first) => {
                    self.counts(first).add(&counts);
                    if let Some(first) = self.owners.get_mut(first) {
                        first.folded.add(&counts);
                    }
                }
                None => self.retire(owner.tenant, &counts),
            }
            if let Some(key) = here {
                self.by_key.remove(&key);
            }
            let Some(tenant) = self.tenants.get_mut(owner.tenant) else { continue };
            tenant.owners.retain(|&of| of != id);
            let known = self.by_tag.len() < IDLE && tenant.retired != Counts::default();
            if tenant.owners.is_empty() && !tenant.account.is_set() && !known && owner.tenant > 0 {
                self.retired.add(&tenant.retired);
                self.by_tag.remove(&tenant.tag);
                self.tenants.remove(owner.tenant);
            }
        }
    }

    fn retire(&mut self, tenant: TenantId, counts: &Counts) {
        match self.tenants.get_mut(tenant) {
            Some(tenant) => tenant.retired.add(counts),
            None => self.retired.add(counts),
        }
    }

    fn key(&self, owner: &Owner) -> Option<(u32, u64)> {
        Some((owner.model, self.tenants.get(owner.tenant)?.tag))
    }

    /// Number of the model, name of the tenant and counts of each owner.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u32, String, Counts)> + '_ {
        let registered = |owner: &&Owner| self.key(owner).is_some_and(|key| self.by_key.contains_key(&key));
        let owners = self.owners.iter().map(|(_, owner)| owner).filter(registered);
        owners.filter_map(|owner| {
            let counts = owner.all().without_requests(&owner.folded);
            Some((owner.model, self.tenants.get(owner.tenant)?.called(), counts))
        })
    }

    /// All counts, at one instant; of models whose longest blocks have so many tokens.
    pub(crate) fn sums(&self, now: Duration, block_tokens: u32) -> Sums {
        let (mut models, mut total): (HashMap<u32, Counts>, _) = (HashMap::new(), self.retired);
        let mut tenants = Vec::new();
        for (id, tenant) in self.tenants.iter() {
            let mut sum = tenant.retired;
            if id == 0 {
                sum.add(&self.retired);
            }
            total.add(&tenant.retired);
            for (&of, owner) in tenant.owners.iter().filter_map(|id| Some((id, self.owners.get(*id)?))) {
                let counts = owner.all();
                sum.add(&counts);
                total.add(&counts);
                if self.key(owner).is_some_and(|key| self.by_key.get(&key) == Some(&of)) {
                    models.entry(owner.model).or_default().add(&counts);
                }
            }
            tenants.push((tenant.called(), sum, tenant.account.usage(now, tenant.bytes, block_tokens)));
        }
        Sums { models, tenants, total }
    }
}
