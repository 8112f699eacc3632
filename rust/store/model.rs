//! A registered model: how its blocks are named, and what its matches count.

use super::namespace::{Epochs, Namespaces};
use super::owners::OwnerId;
use super::worth::Prefills;
use crate::block::{Geometry, Hasher, Secret};
use crate::stats::{Counts, Miss};
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

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

/// What the matches and puts of an owner count, without a lock. Asked is hit and miss together, by definition.
#[derive(Debug, Default)]
pub(crate) struct Matches {
    matches: AtomicU64,
    hit: AtomicU64,
    /// By reason: so their sum is all that was missed, by definition as well.
    missed: [AtomicU64; Miss::ALL.len()],
    puts: AtomicU64,
    put_ns: AtomicU64,
}

/// Blocks of a match that were not found, and why the first of them was not.
pub(super) type Missing = Option<(Miss, usize)>;

impl Matches {
    /// Counts one match.
    pub(super) fn count(&self, hit: usize, missing: Missing) {
        // Relaxed, as all counts here: each is right by itself.
        self.matches.fetch_add(1, Ordering::Relaxed);
        self.count_more(hit, missing);
    }

    /// Counts blocks of a match that was counted already.
    pub(super) fn count_more(&self, hit: usize, missing: Missing) {
        self.hit.fetch_add(hit as u64, Ordering::Relaxed);
        if let Some((why, blocks)) = missing {
            self.missed[why as usize].fetch_add(blocks as u64, Ordering::Relaxed);
        }
    }

    /// Counts one put.
    pub(super) fn put(&self, took: Duration) {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.put_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(super) fn add_to(&self, counts: &mut Counts) {
        counts.puts += self.puts.load(Ordering::Relaxed);
        counts.put_ns += self.put_ns.load(Ordering::Relaxed);
        let hit = self.hit.load(Ordering::Relaxed);
        counts.matches += self.matches.load(Ordering::Relaxed);
        counts.hit += hit;
        counts.asked += hit;
        for (sum, missed) in counts.missed.iter_mut().zip(&self.missed) {
            let missed = missed.load(Ordering::Relaxed);
            *sum += missed;
            counts.miss += missed;
            counts.asked += missed;
        }
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
