//! Bugs that the tests plant, each of which a proof must catch. Outside of tests there are none.

/// A bug of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// A lease is granted whatever phase the node is in.
    NoPhaseCheck = 1,
    /// A lease is taken for one on the key that was looked for.
    NoKeyCheck,
    /// A node is retired without looking who leased it meanwhile.
    RetireByStore,
    /// Freeing forgets passing leases.
    FreeByStore,
    /// An insertion that lost against its twin ends its node although others may have leased it.
    BlindRetreat,
    /// A node is retired although it has children.
    NoChildCheck,
    /// A node's fields may be seen before they were written.
    RelaxedLease,
}

#[cfg(not(test))]
pub(super) const fn planted(_: Bug) -> bool {
    false
}

#[cfg(test)]
pub(super) use tests::{planted, with};

#[cfg(test)]
mod tests {
    use super::Bug;
    // Not of `sync`: the choice of a bug is no part of what is checked.
    use std::sync::atomic::{AtomicU8, Ordering};
    use std::sync::{Mutex, PoisonError};

    static PLANTED: AtomicU8 = AtomicU8::new(0);
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    pub(in super::super) fn planted(bug: Bug) -> bool {
        PLANTED.load(Ordering::Relaxed) == bug as u8
    }

    /// Does `work` with a bug planted, or with none; tests that run beside each other take turns.
    pub(in super::super) fn with<T>(bug: Option<Bug>, work: impl FnOnce() -> T) -> std::thread::Result<T> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        PLANTED.store(bug.map_or(0, |bug| bug as u8), Ordering::Relaxed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        PLANTED.store(0, Ordering::Relaxed);
        outcome
    }
}
