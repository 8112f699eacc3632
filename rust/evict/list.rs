//! Doubly linked lists over dense node numbers: every step is a few words in one vector.

use super::NodeId;

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    colder: u32,
    hotter: u32,
    /// Which list it is in, plus one.
    list: u8,
}

/// So many lists; a node is in one of them at most.
#[derive(Debug)]
pub(super) struct Lists<const N: usize> {
    links: Vec<Link>,
    coldest: [u32; N],
    hottest: [u32; N],
    lens: [usize; N],
}

impl<const N: usize> Default for Lists<N> {
    fn default() -> Self {
        Self { links: Vec::new(), coldest: [NONE; N], hottest: [NONE; N], lens: [0; N] }
    }
}

impl<const N: usize> Lists<N> {
    pub(super) fn len(&self, list: usize) -> usize {
        self.lens[list]
    }

    /// The list that a node is in.
    pub(super) fn of(&self, node: NodeId) -> Option<usize> {
        self.links.get(node as usize)?.list.checked_sub(1).map(usize::from)
    }

    /// Puts a node at the hot end of a list, out of the one that it was in.
    pub(super) fn push(&mut self, list: usize, node: NodeId) {
        self.remove(node);
        if self.links.len() <= node as usize {
            self.links.resize(node as usize + 1, Link { colder: NONE, hotter: NONE, list: 0 });
        }
        let colder = self.hottest[list];
        self.links[node as usize] = Link { colder, hotter: NONE, list: list as u8 + 1 };
        match colder {
            NONE => self.coldest[list] = node,
            colder => self.links[colder as usize].hotter = node,
        }
        self.hottest[list] = node;
        self.lens[list] += 1;
    }

    pub(super) fn remove(&mut self, node: NodeId) {
        let Some(list) = self.of(node) else { return };
        let Link { colder, hotter, .. } = self.links[node as usize];
        match colder {
            NONE => self.coldest[list] = hotter,
            colder => self.links[colder as usize].hotter = hotter,
        }
        match hotter {
            NONE => self.hottest[list] = colder,
            hotter => self.links[hotter as usize].colder = colder,
        }
        self.links[node as usize].list = 0;
        self.lens[list] -= 1;
    }

    pub(super) fn coldest(&self, list: usize) -> Option<NodeId> {
        Some(self.coldest[list]).filter(|&node| node != NONE)
    }

    /// From cold to hot.
    pub(super) fn iter(&self, list: usize) -> impl Iterator<Item = NodeId> + '_ {
        let next = |node: &u32| Some(self.links[*node as usize].hotter).filter(|&node| node != NONE);
        std::iter::successors(self.coldest(list), next)
    }
}
