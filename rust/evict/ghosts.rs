//! Tags of blocks that left: the last so many, oldest forgotten first.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

// Tags are uniform already; hashing them again would only cost time.
#[derive(Default, Clone)]
pub(super) struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, &byte| hash.rotate_left(8) ^ u64::from(byte));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 ^= value;
    }
}

pub(super) type TagMap<V> = HashMap<u64, V, BuildHasherDefault<Uniform>>;

/// A bounded memory of tags.
#[derive(Default)]
pub(super) struct Ghosts {
    ring: VecDeque<(u64, u64)>,
    /// When each was last inserted: only that entry of the ring counts.
    last: TagMap<u64>,
    clock: u64,
}

impl std::fmt::Debug for Ghosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ghosts").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Ghosts {
    pub(super) fn len(&self) -> usize {
        self.last.len()
    }

    /// Remembers a tag, and forgets the oldest beyond `most`.
    pub(super) fn insert(&mut self, tag: u64, most: usize) {
        self.clock += 1;
        self.last.insert(tag, self.clock);
        self.ring.push_back((tag, self.clock));
        self.trim(most);
    }

    /// Forgets a tag; whether it was known.
    pub(super) fn remove(&mut self, tag: u64) -> bool {
        self.last.remove(&tag).is_some()
    }

    /// Forgets the oldest beyond `most`. Outdated entries of the ring are bounded with it.
    pub(super) fn trim(&mut self, most: usize) {
        while (self.last.len() > most || self.ring.len() > 2 * most + 64)
            && let Some((tag, when)) = self.ring.pop_front()
        {
            if self.last.get(&tag) == Some(&when) {
                self.last.remove(&tag);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_remembered_until_enough_others_followed() {
        let mut ghosts = Ghosts::default();
        ghosts.insert(7, 100);
        (100..200).for_each(|tag| {
            assert!(ghosts.last.contains_key(&7) || tag == 199);
            ghosts.insert(tag, 100);
        });
        assert!(!ghosts.last.contains_key(&7) && ghosts.len() == 100);
        assert!(ghosts.remove(150) && !ghosts.remove(150));
        (0..10_000).for_each(|_| ghosts.insert(8, 100));
        assert!(ghosts.ring.len() <= 264);
    }
}
