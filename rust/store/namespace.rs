//! Namespaces: what is never shared, and can be dropped as one.
//!
//! A namespace is dropped by its epoch: the next one names its blocks anew, so nothing of the old can be found, from that
//! instant on and after a restart. What was stored under the old names is forgotten behind that, in portions. Epochs are drawn
//! by chance: those of two nodes, which may have other weights since, are never one.
//!
//! ```text
//! drop    epochs file written ─▶ the next epoch, old names marked ─▶ old blocks forgotten
//! ```

use super::model::{Matches, Model};
use super::nodes::NodeId;
use super::owners::OwnerId;
use super::{SOME, Shared, Store};
use crate::block::{BlockHash, Hasher};
use crate::error::{Error, ErrorKind, Result};
use crate::ssd::epochs::length_of;
use crate::ssd::notes::Note;
use crate::stats::Miss;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};
use arc_swap::ArcSwap;
use std::collections::{BTreeMap, HashMap};

/// Namespaces of one model that are kept ready, beside those that are in use.
const READY: usize = 1024;

/// A namespace in one epoch.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) hasher: Hasher,
    /// Of its blocks; and what their matches count.
    pub(super) owner: OwnerId,
    pub(super) matches: Arc<Matches>,
    dropped: AtomicBool,
}

impl Namespace {
    fn new(hasher: Hasher, (owner, matches): (OwnerId, Arc<Matches>)) -> Arc<Self> {
        Arc::new(Self { hasher, owner, matches, dropped: AtomicBool::new(false) })
    }

    /// Whether the epoch is over.
    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }
}

/// The epoch of each namespace that was dropped, by its seed in epoch 0; one that never was has no entry.
#[derive(Debug, Clone, Default)]
pub(crate) struct Epochs(BTreeMap<u128, u64>);

impl Epochs {
    pub(crate) fn new(entries: impl IntoIterator<Item = (BlockHash, u64)>) -> Self {
        Self(entries.into_iter().map(|(first, epoch)| (first.0, epoch)).collect())
    }

    pub(crate) fn entries(&self) -> impl ExactSizeIterator<Item = (BlockHash, u64)> {
        self.0.iter().map(|(&first, &epoch)| (BlockHash(first), epoch))
    }

    fn of(&self, first: BlockHash) -> u64 {
        self.0.get(&first.0).copied().unwrap_or(0)
    }

    fn set(&mut self, first: BlockHash, epoch: u64) {
        self.0.insert(first.0, epoch);
    }

    /// Whether this is the seed of an epoch that is over.
    pub(super) fn is_past(&self, seed: BlockHash) -> bool {
        // Seeds of one namespace differ in their lowest bits alone. Where two namespaces are alike but for these, one that
        // was never dropped is taken for the other's past: it is a loss, and no more.
        let like = seed.0 & !u128::from(u32::MAX);
        let mut epochs = self.0.range(like..=like | u128::from(u32::MAX)).peekable();
        epochs.peek().is_some() && epochs.all(|(&first, &epoch)| seed.0 ^ first != u128::from(epoch))
    }
}

/// The namespaces of a model that are ready for use.
#[derive(Debug)]
pub(super) struct Namespaces {
    /// Of no adapter and no tenant, which most requests have.
    plain: ArcSwap<Namespace>,
    others: Mutex<HashMap<(String, String), Arc<Namespace>>>,
}

impl Namespaces {
    pub(super) fn new(plain: Hasher, epochs: &Epochs, owner: (OwnerId, Arc<Matches>)) -> Self {
        let epoch = epochs.of(plain.seed());
        Self { plain: ArcSwap::new(Namespace::new(plain.in_epoch(epoch), owner)), others: Mutex::default() }
    }
}

impl Model {
    /// The namespace of an adapter and a tenant, as it is now.
    pub(super) fn namespace(&self, shared: &Shared, adapter: &str, tenant: &str) -> Arc<Namespace> {
        if adapter.is_empty() && tenant.is_empty() {
            return self.namespaces.plain.load_full();
        }
        let key = (adapter.to_owned(), tenant.to_owned());
        // Held until the namespace is entered: a drop in between would miss it.
        let mut others = self.namespaces.others.lock();
        if let Some(known) = others.get(&key) {
            return known.clone();
        }
        let first = self.spec.hasher(&shared.secret, adapter, tenant);
        let epoch = shared.epochs.lock().of(first.seed());
        let new = Namespace::new(first.in_epoch(epoch), shared.owner(self, tenant));
        shared.state.lock().nodes.name(new.hasher.seed(), adapter, tenant);
        if others.len() >= READY {
            // One that is in use has to learn when it is dropped.
            others.retain(|_, namespace| Arc::strong_count(namespace) > 1);
        }
        others.insert(key, new.clone());
        new
    }

    // Begins the next epoch of a namespace; what was made in the one before learns of it.
    fn begin_epoch(&self, shared: &Shared, adapter: &str, tenant: &str, first: Hasher, next: u64) {
        let mut others = self.namespaces.others.lock();
        let mut epochs = shared.epochs.lock();
        epochs.set(first.seed(), next);
        let old = if adapter.is_empty() && tenant.is_empty() {
            let plain = self.namespaces.plain.load();
            let owner = (plain.owner, plain.matches.clone());
            let new = Namespace::new(first.in_epoch(next), owner);
            shared.state.lock().nodes.name(new.hasher.seed(), "", "");
            Some(self.namespaces.plain.swap(new))
        } else {
            others.remove(&(adapter.to_owned(), tenant.to_owned()))
        };
        if let Some(old) = old {
            // Release: what is matched from here on was asked for in the new epoch, or finds this set.
            old.dropped.store(true, Ordering::Release);
        }
    }
}

impl Store {
    /// Forgets all that is cached of a namespace, on every tier; returns how many blocks. From its return on nothing of
    /// it is found, after a restart either. Sequences made before match nothing more, and nothing is stored for them:
    /// their keys and values may be of what was dropped. Its leases stay safe, and load nothing more.
    ///
    /// # Errors
    /// The model is not registered; or the SSD tier cannot note the drop: then nothing was dropped.
    pub fn drop_namespace(&self, model: &Model, adapter: &str, tenant: &str) -> Result<u64> {
        let shared = &self.shared;
        let _registration = shared.registration.lock();
        if !shared.open_state()?.models.contains_key(&model.id) {
            let name = &model.spec.name;
            return Err(Error::new(ErrorKind::ModelNotFound, format!("model {name:?} is not registered")));
        }
        let first = model.spec.hasher(&shared.secret, adapter, tenant);
        let mut epochs = shared.epochs.lock().clone();
        let before = epochs.of(first.seed());
        let seed = BlockHash(first.seed().0 ^ u128::from(before));
        let next = loop {
            let drawn = getrandom::u32().map_err(|e| Error::io("no random numbers from the system", e))?;
            if drawn != 0 && u64::from(drawn) != before {
                break u64::from(drawn);
            }
        };
        epochs.set(first.seed(), next);
        if let Some(ssd) = &shared.ssd {
            let sealed: Vec<_> = epochs.entries().map(|(first, epoch)| (shared.secret.seal(first), epoch)).collect();
            let bytes = ssd.control_bytes_with(Note::Epochs, length_of(sealed.len()));
            shared.make_room(bytes - ssd.control_bytes());
            ssd.write_epochs(&sealed)?;
            shared.state.lock().ssd_control_bytes = ssd.control_bytes();
        }
        model.begin_epoch(shared, adapter, tenant, first, next);
        Ok(shared.forget(&[seed]))
    }
}

impl Store {
    /// Retires a model's version, or takes that back. From this on it matches nothing and takes nothing, and what is cached of
    /// it, on any tier, is forgotten; returns how many blocks. A directory that is opened anew has to be told again.
    ///
    /// # Errors
    /// The store is closed.
    pub fn retire(&self, model: &Model, retired: bool) -> Result<u64> {
        let _registration = self.shared.registration.lock();
        self.shared.check_open()?;
        // Release: what is added from here on finds this set.
        model.retired.store(retired, Ordering::Release);
        let seeds = self.shared.open_state()?.nodes.seeds_of(model.id);
        Ok(if retired { self.shared.forget(&seeds) } else { 0 })
    }
}

impl Shared {
    /// Forgets all blocks of namespaces to which nothing is added any more; returns how many they were.
    pub(super) fn forget(&self, seeds: &[BlockHash]) -> u64 {
        let mut forgotten = 0;
        for &seed in seeds {
            loop {
                let mut state = self.state.lock();
                let first: Vec<NodeId> = state.nodes.first_of(seed).take(SOME).collect();
                if first.is_empty() {
                    break;
                }
                forgotten += first.into_iter().map(|id| state.drop_subtree(id, Miss::Dropped)).sum::<u64>();
                // Others need not wait until all is gone.
            }
        }
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_past_when_its_namespace_was_dropped_since() {
        let (one, other) = (BlockHash(7 << 64 | 5), BlockHash(7 << 64 | 1 << 40));
        let mut epochs = Epochs::new([(other, 1)]);
        assert!(!epochs.is_past(one) && epochs.is_past(other));
        [9, 3].into_iter().for_each(|epoch| epochs.set(one, epoch));
        let seed = |epoch: u128| BlockHash(one.0 ^ epoch);
        assert_eq!([0, 9, 2, 3, 4].map(|epoch| epochs.is_past(seed(epoch))), [true, true, true, false, true]);
        assert!(!epochs.is_past(BlockHash(other.0 ^ 1)) && !epochs.is_past(BlockHash(8 << 64 | 5)));
        assert_eq!(epochs.entries().collect::<Vec<_>>(), [(one, 3), (other, 1)]);
    }
}
