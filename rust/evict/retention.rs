//! Hints of those who put: how dear a block is, and for how long. A bias, never a lock: when nothing else may leave, what
//! is dear leaves too.
//!
//! A block of priority n is passed over n times when its turn to leave comes, and anew after each use. A block that was
//! not used for its time to live leaves before all others, whatever the policy says.

use super::NodeId;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

/// What a put asks for its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// How often they are passed over, 0 to [`MAX_PRIORITY`](Self::MAX_PRIORITY).
    pub priority: u8,
    /// How long after their last use they are worth keeping.
    pub ttl: Option<Duration>,
}

impl Retention {
    /// The highest priority.
    pub const MAX_PRIORITY: u8 = 10;
}

#[derive(Debug)]
struct Hint {
    asked: Retention,
    passes: u8,
    last_use: Duration,
    /// Where it stands in the order of those that expire.
    due: Option<Duration>,
}

impl Hint {
    fn ends(&self) -> Duration {
        self.last_use.saturating_add(self.asked.ttl.unwrap_or(Duration::MAX))
    }
}

/// How many that are due are looked at for one that may leave.
const LOOKS: usize = 64;
/// What is due and may not leave is looked at again after this long.
const AGAIN: Duration = Duration::from_secs(1);

/// The hints of one tier and model. Times are since any fixed moment.
#[derive(Debug, Default)]
pub struct Retained {
    hints: HashMap<NodeId, Hint>,
    // The first to expire on top, of a path its end; an entry may be outdated.
    due: BinaryHeap<Reverse<(Duration, Reverse<u32>, NodeId)>>,
}

impl Retained {
    /// Whether there is no hint.
    pub fn is_empty(&self) -> bool {
        self.hints.is_empty()
    }

    /// Notes what is asked for a block of the tier; `depth`: blocks before it.
    pub fn set(&mut self, node: NodeId, depth: u32, asked: Retention, now: Duration) {
        let due = asked.ttl.map(|ttl| now.saturating_add(ttl));
        let before = self.hints.insert(node, Hint { asked, passes: asked.priority, last_use: now, due });
        if let Some(due) = due.filter(|_| before.is_none_or(|before| before.due != due)) {
            self.due.push(Reverse((due, Reverse(depth), node)));
        }
        if self.due.len() > 64 + 2 * self.hints.len() {
            let hints = &self.hints;
            self.due.retain(|Reverse((due, _, node))| hints.get(node).is_some_and(|hint| hint.due == Some(*due)));
        }
    }

    /// A block was used.
    pub fn touch(&mut self, node: NodeId, now: Duration) {
        if let Some(hint) = self.hints.get_mut(&node) {
            (hint.passes, hint.last_use) = (hint.asked.priority, now);
        }
    }

    /// A block left the tier.
    pub fn remove(&mut self, node: NodeId) {
        self.hints.remove(&node);
    }

    /// A block's turn to leave has come: whether it is passed over.
    pub fn pass_over(&mut self, node: NodeId) -> bool {
        let hint = self.hints.get_mut(&node).filter(|hint| hint.passes > 0);
        hint.map(|hint| hint.passes -= 1).is_some()
    }

    /// Whether a block's time is over.
    pub fn is_overdue(&self, node: NodeId, now: Duration) -> bool {
        self.hints.get(&node).is_some_and(|hint| hint.ends() <= now)
    }

    /// A block whose time is over, of those that may leave.
    pub fn overdue(&mut self, now: Duration, may_leave: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        for _ in 0..LOOKS {
            let &Reverse((due, depth, node)) = self.due.peek().filter(|top| top.0.0 <= now)?;
            self.due.pop();
            let Some(hint) = self.hints.get_mut(&node).filter(|hint| hint.due == Some(due)) else { continue };
            let ends = hint.ends();
            let next = if ends > now { ends } else { now + AGAIN };
            hint.due = Some(next);
            self.due.push(Reverse((next, depth, node)));
            if ends <= now && may_leave(node) {
                return Some(node);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn of(priority: u8, ttl: Option<Duration>) -> Retention {
        Retention { priority, ttl }
    }

    #[test]
    fn a_block_is_passed_over_as_often_as_its_priority_and_anew_after_a_use() {
        let mut retained = Retained::default();
        retained.set(1, 0, of(2, None), S);
        assert_eq!([1; 3].map(|node| retained.pass_over(node)), [true, true, false]);
        retained.touch(1, S);
        assert!(retained.pass_over(1) && !retained.pass_over(2));
        retained.remove(1);
        assert!(!retained.pass_over(1) && retained.is_empty());
    }

    #[test]
    fn what_was_not_used_for_its_time_leaves_first_from_the_end_of_its_path() {
        let mut retained = Retained::default();
        (0..5).for_each(|n| retained.set(n, n, of(0, Some(10 * S)), S));
        retained.set(9, 9, of(3, None), S);
        assert_eq!(retained.overdue(10 * S, |_| true), None);
        // What is used lives on.
        retained.touch(0, 5 * S);
        for n in (1..5).rev() {
            assert_eq!(retained.overdue(11 * S, |_| true), Some(n));
            retained.remove(n);
        }
        assert_eq!(retained.overdue(14 * S, |_| true), None);
        // One that may not leave is asked for again a little later, and nobody waits for it.
        assert_eq!(retained.overdue(15 * S, |_| false), None);
        assert_eq!(retained.overdue(15 * S, |_| true), None);
        assert_eq!(retained.overdue(16 * S, |_| true), Some(0));
    }

    #[test]
    fn what_is_asked_last_counts_and_old_entries_take_no_memory() {
        let mut retained = Retained::default();
        (0..10_000).for_each(|n| retained.set(7, 0, of(0, Some(S)), n / 2 * S));
        assert!(retained.due.len() <= 66);
        retained.set(7, 0, of(1, None), S);
        assert_eq!(retained.overdue(10_000 * S, |_| true), None);
        assert!(retained.pass_over(7));
    }
}
