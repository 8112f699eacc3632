//! The state word of a node: everything that decides who may use it, in one atomic.
//!
//! ```text
//! 63          48 47  46 45            22 21           0
//! | generation  | phase | children      | leases       |
//!
//!          go_live                retire                  last lease back
//!   FREE ───────────▶ LIVE ───────────────────▶ DEAD ───────────────────▶ FREE, next generation
//! ```
//! Leases are counted by blind additions, in any phase: who finds that the node was not live takes its own back. So a
//! phase changes by addition or compare-exchange, never by a store, which would lose such a passing count.
//! A live node with leases may be retired by force: it is dead to matches, and freed by who gives the last lease back.

use super::planted::{Bug, planted};
use crate::sync::{AtomicU64, Ordering};

const CHILD: u64 = 1 << 22;
const PHASE: u64 = 1 << 46;
const GENERATION: u64 = 1 << 48;

/// Leases that one block may have. The field is four times as wide: passing counts find room.
pub(super) const MOST_LEASES: u64 = 1 << 20;
const MOST_CHILDREN: u64 = 1 << 23;

const FREE: u64 = 0;
const LIVE: u64 = 1;
const DEAD: u64 = 2;

fn leases(state: u64) -> u64 {
    state & (CHILD - 1)
}

fn children(state: u64) -> u64 {
    (state & (PHASE - 1)) / CHILD
}

fn phase(state: u64) -> u64 {
    (state / PHASE) & 3
}

/// What came of asking for a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Leased,
    /// Not live; `true`: the passing count was the last, and the caller has to free the node.
    NotLive(bool),
    TooMany,
}

/// A view of one node's state word.
#[derive(Clone, Copy)]
pub(super) struct Word<'a>(pub(super) &'a AtomicU64);

impl Word<'_> {
    /// Asks for a lease. The caller checks the key before it relies on it.
    pub(super) fn lease(self) -> Asked {
        // Acquire pairs with the Release of `go_live`: the fields of a live node are seen as they were written. They
        // stay, since a leased node is not freed.
        let order = if planted(Bug::RelaxedLease) { Ordering::Relaxed } else { Ordering::Acquire };
        let before = self.0.fetch_add(1, order);
        if phase(before) != LIVE && !planted(Bug::NoPhaseCheck) {
            return Asked::NotLive(self.release());
        }
        if leases(before) >= MOST_LEASES {
            self.release();
            return Asked::TooMany;
        }
        Asked::Leased
    }

    /// Gives a lease back. `true`: the node was dead and this the last; the caller has it alone, and frees it.
    pub(super) fn release(self) -> bool {
        // Release: what was read under the lease is read before the node can be freed. Acquire, for who frees it.
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(leases(before) > 0, "a lease is given back once");
        leases(before) == 1 && phase(before) == DEAD && self.free_from(before - 1)
    }

    // Of all who see a dead node without leases, one frees it.
    fn free_from(self, dead: u64) -> bool {
        let next = (dead & !(GENERATION - 1)).wrapping_add(GENERATION);
        if planted(Bug::FreeByStore) {
            self.0.store(next, Ordering::Release);
            return true;
        }
        self.0.compare_exchange(dead, next | FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Makes a free node live, with one lease: the caller's, who has the node alone and has written its fields.
    pub(super) fn go_live(self) {
        // Release: pairs with the Acquire of `lease`.
        let before = self.0.fetch_add(LIVE * PHASE + 1, Ordering::Release);
        debug_assert_eq!((phase(before), children(before)), (FREE, 0));
    }

    /// Retires a live node without children, and without leases unless by `force`. The caller gets a lease on the dead
    /// node, for as long as it has to do with it.
    pub(super) fn retire(self, force: bool) -> bool {
        // Acquire, as for a lease.
        let mut state = self.0.load(Ordering::Acquire);
        while phase(state) == LIVE
            && (children(state) == 0 || planted(Bug::NoChildCheck))
            && (force || leases(state) == 0)
        {
            let dead = state - LIVE * PHASE + DEAD * PHASE + 1;
            if planted(Bug::RetireByStore) {
                self.0.store(dead, Ordering::Release);
                return true;
            }
            match self.0.compare_exchange_weak(state, dead, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    /// Counts one child more, under a lease. `false`: the node is dead, or has too many.
    pub(super) fn add_child(self) -> bool {
        // AcqRel: it is ordered against the retiring of the same node, which counts on there being no child.
        let before = self.0.fetch_add(CHILD, Ordering::AcqRel);
        let taken = phase(before) == LIVE && children(before) < MOST_CHILDREN;
        if !taken {
            self.remove_child();
        }
        taken
    }

    /// Counts one child less.
    pub(super) fn remove_child(self) {
        // Release: the child's entry is gone from the table before its parent may be retired.
        let before = self.0.fetch_sub(CHILD, Ordering::Release);
        debug_assert!(children(before) > 0, "a child leaves once");
    }

    /// Leases at this moment, passing ones included.
    pub(super) fn leases(self) -> u64 {
        // Acquire: what a former holder read was read.
        leases(self.0.load(Ordering::Acquire))
    }

    #[cfg(test)]
    pub(super) fn children(self) -> u64 {
        children(self.0.load(Ordering::Acquire))
    }

    pub(super) fn is_live(self) -> bool {
        phase(self.0.load(Ordering::Acquire)) == LIVE
    }

    /// Changes with every life of the node.
    pub(super) fn generation(self) -> u16 {
        (self.0.load(Ordering::Acquire) / GENERATION) as u16
    }
}
