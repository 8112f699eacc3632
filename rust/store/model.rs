//! A registered model: how its blocks are named, and what its matches count.

use super::namespace::{Epochs, Namespaces};
use super::owners::OwnerId;
use super::worth::Prefills;
use crate::block::{Geometry, Hasher, Secret};
use crate::stats::Counts;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering};

/// What a model is registered with.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Name of the model.
    pub name: String,
    /// Version of its weights; another version shares nothing with this one.
    pub weights_version: String,
    /// Shape of its blocks.
    pub geometry: Geometry,
}

/// A registered model.
#[derive(Debug)]
pub struct Model {
    pub(super) id: u32,
    pub(super) spec: ModelSpec,
    pub(super) namespaces: Namespaces,
    /// How long the engine takes, from a match to the put of the same prompt, if that is to be learned.
    pub(super) prefills: Prefills,
    /// Set when it is unregistered: from then on it matches nothing.
    gone: AtomicBool,
    /// Set while its version is retired: it matches nothing, and takes nothing.
    pub(super) retired: AtomicBool,
}

/// What the matches of an owner count, without a lock. Asked is hit and miss together, by definition.
#[derive(Debug, Default)]
pub(crate) struct Matches {
    matches: AtomicU64,
    hit: AtomicU64,
    miss: AtomicU64,
}

impl Matches {
    /// Counts one match.
    pub(super) fn count(&self, hit: usize, miss: usize) {
        // Relaxed, as all counts here: each is right by itself.
        self.matches.fetch_add(1, Ordering::Relaxed);
        self.hit.fetch_add(hit as u64, Ordering::Relaxed);
        self.miss.fetch_add(miss as u64, Ordering::Relaxed);
    }

    /// So many blocks of a match that was counted were found after all.
    pub(super) fn found(&self, blocks: usize) {
        self.hit.fetch_add(blocks as u64, Ordering::Relaxed);
        self.miss.fetch_sub(blocks as u64, Ordering::Relaxed);
    }

    pub(super) fn add_to(&self, counts: &mut Counts) {
        let (hit, miss) = (self.hit.load(Ordering::Relaxed), self.miss.load(Ordering::Relaxed));
        counts.matches += self.matches.load(Ordering::Relaxed);
        counts.hit += hit;
        counts.miss += miss;
        counts.asked += hit + miss;
    }
}

impl ModelSpec {
    /// What names the blocks of an adapter and a tenant, in epoch 0.
    pub(super) fn hasher(&self, secret: &Secret, adapter: &str, tenant: &str) -> Hasher {
        Hasher::new(secret, &self.name, &self.weights_version, &self.geometry, adapter, tenant)
    }
}

impl Model {
    /// `owner`: of its blocks of no tenant.
    pub(super) fn new(
        id: u32,
        spec: ModelSpec,
        secret: &Secret,
        epochs: &Epochs,
        owner: (OwnerId, Arc<Matches>),
    ) -> Self {
        let namespaces = Namespaces::new(spec.hasher(secret, "", ""), epochs, owner);
        Self {
            id,
            spec,
            namespaces,
            prefills: Prefills::default(),
            gone: AtomicBool::new(false),
            retired: AtomicBool::new(false),
        }
    }

    /// What the model was registered with.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// From now on the model matches nothing.
    pub(super) fn end(&self) {
        // Release: the blocks are forgotten after this.
        self.gone.store(true, Ordering::Release);
    }

    /// Whether it matches and takes anything.
    pub(super) fn serves(&self) -> bool {
        !self.ended() && !self.is_retired()
    }

    /// Whether its version is retired.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Whether the model was unregistered.
    pub(super) fn ended(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}
