//! The order of eviction inside one tier and model.
//!
//! A policy knows blocks by their node and by a 64-bit tag, and decides which leaves next; it never sees bytes. A path is
//! touched from its end to its start, so that what continues a block is never hotter than the block. For a block that is
//! chosen the tier names the one that leaves: itself or, where others continue it, one of their ends; none if that is held.
//!
//! | name | idea | source |
//! |---|---|---|
//! | `lru` | least recently used | |
//! | `lfu` | least frequently used, aged: what leaves raises the bar for what comes | as `gdsf`, with equal costs |
//! | `gdsf` | least worth recomputing: frequency × cost, aged | Cherkasova, "Improving WWW Proxies Performance", 1998 |
//! | `s3fifo` | a small queue on trial, a main queue, ghosts of the small | Yang et al., SOSP 2023 |
//! | `s3fifo_long` | the same with a smaller queue on trial and four times the ghosts: for what comes back late | |
//! | `arc` | recent against frequent, balanced by ghosts | Megiddo & Modha, FAST 2003 |
//! | `wtinylfu` | a small window, then admission by frequency | Einziger et al., ACM TOS 2017 |
//! | `adaptive` | whichever of these does best on a sample of the present load | |

mod adaptive;
mod arc;
mod curve;
mod distinct;
mod gdsf;
mod ghosts;
mod keyed;
mod list;
mod lru;
mod retention;
mod s3fifo;
mod wtinylfu;

#[cfg(test)]
mod contract;

use crate::error::{Result, input};
use adaptive::Adaptive;
pub use curve::Curve;
use ghosts::Ghosts;
pub use keyed::Keyed;
pub use retention::{Retained, Retention};

/// A node of the index.
pub type NodeId = u32;

/// How many blocks a choice looks at before it takes what it has.
const PATIENCE: usize = 128;
/// How many blocks it looks at when none may leave, before it gives up.
const MOST_LOOKS: usize = 16_384;

/// Names of policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Kind {
    /// Least recently used.
    Lru,
    /// Least frequently used, aged.
    Lfu,
    /// S3-FIFO.
    S3Fifo,
    /// S3-FIFO with a long memory.
    S3FifoLong,
    /// ARC.
    Arc,
    /// W-TinyLFU.
    WTinyLfu,
    /// Greedy-Dual-Size-Frequency.
    Gdsf,
    /// Whichever does best at present.
    #[default]
    Adaptive,
}

impl Kind {
    /// All policies.
    pub const ALL: [Self; 8] =
        [Self::Lru, Self::Lfu, Self::S3Fifo, Self::S3FifoLong, Self::Arc, Self::WTinyLfu, Self::Gdsf, Self::Adaptive];

    /// The name used in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3fifo",
            Self::S3FifoLong => "s3fifo_long",
            Self::Arc => "arc",
            Self::WTinyLfu => "wtinylfu",
            Self::Gdsf => "gdsf",
            Self::Adaptive => "adaptive",
        }
    }

    /// The policy of a name.
    ///
    /// # Errors
    /// There is none; the message lists those there are.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let valid = Self::ALL.map(Self::name).join(", ");
            input(format!("eviction policy {name:?}: expected one of {valid}"))
        })
    }
}

/// What every policy does. Nodes are dense numbers; a node is inserted once, and again only after it left.
trait Policy: std::fmt::Debug + Send {
    /// A block came into the tier.
    fn insert(&mut self, node: NodeId, tag: u64, cost: f32);
    /// A block was used.
    fn touch(&mut self, node: NodeId, tag: u64);
    /// A block left; `evicted`: because it was chosen.
    fn remove(&mut self, node: NodeId, tag: u64, evicted: bool);
    /// The block to leave next: what `leaf_of` names for the first candidate for which it names one. It stays until it
    /// is removed.
    fn victim(&mut self, leaf_of: &mut dyn FnMut(NodeId) -> Option<NodeId>) -> Option<NodeId>;
    /// How many blocks the tier holds when it is full.
    fn set_capacity(&mut self, blocks: usize);
    /// All blocks, those that would leave first first.
    fn coldest_first(&self) -> Vec<NodeId>;
}

fn policy(kind: Kind, capacity: usize) -> Box<dyn Policy> {
    match kind {
        Kind::Lru | Kind::Adaptive => Box::new(lru::Lru::default()),
        Kind::Lfu | Kind::Gdsf => Box::new(gdsf::Gdsf::new(kind == Kind::Gdsf)),
        Kind::S3Fifo => Box::new(s3fifo::S3Fifo::new(capacity, s3fifo::Shape::AS_PUBLISHED)),
        Kind::S3FifoLong => Box::new(s3fifo::S3Fifo::new(capacity, s3fifo::Shape::LONG)),
        Kind::Arc => Box::new(arc::Arc::new(capacity)),
        Kind::WTinyLfu => Box::new(wtinylfu::WTinyLfu::new(capacity)),
    }
}

/// The order of one tier and model.
#[derive(Debug)]
pub struct Order {
    kind: Kind,
    running: Kind,
    policy: Box<dyn Policy>,
    adaptive: Option<Box<Adaptive>>,
    /// Blocks of whose tags these bits are zero are in its sample; none while there is nothing to choose.
    sample: u64,
    capacity: usize,
    /// Tag and cost of each block, by node.
    blocks: Vec<Option<(u64, f32)>>,
    len: usize,
}

impl Order {
    /// An order of no blocks yet, of a tier that holds so many.
    pub fn new(kind: Kind, capacity: usize) -> Self {
        let adaptive = (kind == Kind::Adaptive).then(|| Box::new(Adaptive::new(capacity)));
        let running = if kind == Kind::Adaptive { Kind::Lru } else { kind };
        let policy = policy(running, capacity);
        let mut order = Self { kind, running, policy, adaptive, sample: 0, capacity, blocks: Vec::new(), len: 0 };
        order.set_sample();
        order
    }

    /// The policy that was asked for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The policy that runs at present; another than [`kind`](Self::kind) only for `adaptive`.
    pub fn running(&self) -> Kind {
        self.running
    }

    /// Blocks in the tier.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Another policy from now on; every block stays.
    pub fn set_kind(&mut self, kind: Kind) {
        self.kind = kind;
        self.adaptive = (kind == Kind::Adaptive).then(|| Box::new(Adaptive::new(self.capacity)));
        self.set_sample();
        if kind != Kind::Adaptive {
            self.run(kind);
        }
    }

    fn run(&mut self, kind: Kind) {
        if kind == self.running {
            return;
        }
        let mut next = policy(kind, self.capacity);
        for node in self.policy.coldest_first() {
            if let Some((tag, cost)) = self.blocks[node as usize] {
                next.insert(node, tag, cost);
            }
        }
        (self.policy, self.running) = (next, kind);
    }

    /// How many blocks the tier holds when it is full, from now on. Changes of less than an eighth make no difference
    /// to a policy, and it keeps what it has learnt.
    pub fn set_capacity(&mut self, blocks: usize) {
        if blocks.abs_diff(self.capacity) > self.capacity / 8 {
            self.capacity = blocks;
            self.policy.set_capacity(blocks);
            if let Some(adaptive) = &mut self.adaptive {
                adaptive.set_capacity(blocks);
            }
            self.set_sample();
        }
    }

    // Until the tier is full for the first time there is nothing to choose.
    fn set_sample(&mut self) {
        let adaptive = self.adaptive.as_ref().filter(|_| self.capacity > 0);
        self.sample = adaptive.map_or(u64::MAX, |adaptive| adaptive.sample());
    }

    /// The bits that are zero in the tags of which [`asked`](Self::asked) takes note.
    pub(crate) fn sample(&self) -> u64 {
        self.sample
    }

    /// Tells `adaptive` that a block was asked for, found or not; those of a request from its end to its start, and then
    /// [`choose`](Self::choose).
    #[inline]
    pub fn asked(&mut self, tag: u64) {
        if tag & self.sample == 0
            && let Some(adaptive) = &mut self.adaptive
        {
            adaptive.ask(tag);
        }
    }

    /// Lets `adaptive` change the policy, if it is time.
    #[inline]
    pub fn choose(&mut self) {
        if let Some(adaptive) = &mut self.adaptive
            && let Some(best) = adaptive.choose(self.running)
        {
            self.run(best);
        }
    }

    /// A block came into the tier; `cost` is what computing its bytes again would take, per byte.
    pub fn insert(&mut self, node: NodeId, tag: u64, cost: f32) {
        if self.blocks.len() <= node as usize {
            self.blocks.resize(node as usize + 1, None);
        }
        debug_assert!(self.blocks[node as usize].is_none(), "a block comes once");
        self.blocks[node as usize] = Some((tag, cost));
        self.len += 1;
        self.policy.insert(node, tag, cost);
    }

    /// A block was used; one that is not in the tier is left alone. A path is touched from its end to its start.
    pub fn touch(&mut self, node: NodeId) {
        if let Some(&Some((tag, _))) = self.blocks.get(node as usize) {
            self.policy.touch(node, tag);
        }
    }

    /// A block left the tier; `evicted`: because it was the victim.
    pub fn remove(&mut self, node: NodeId, evicted: bool) {
        if let Some((tag, _)) = self.blocks.get_mut(node as usize).and_then(Option::take) {
            self.len -= 1;
            self.policy.remove(node, tag, evicted);
        }
    }

    /// The block that leaves next. `leaf_of` names, for a block, the one that leaves in its turn: itself or, where others
    /// in the tier continue it, one that ends such a path; `None` if that may not leave. Of what it looks at, 128 blocks at
    /// most, one that `should` leave is taken before others. It gives up after 16,384 that may not.
    pub fn victim(
        &mut self,
        mut leaf_of: impl FnMut(NodeId) -> Option<NodeId>,
        should_leave: impl Fn(NodeId) -> bool,
    ) -> Option<NodeId> {
        let mut second = None;
        let mut looked = 0;
        let chosen = self.policy.victim(&mut |node| {
            looked += 1;
            let leaf = if looked > MOST_LOOKS { None } else { leaf_of(node) };
            let taken = leaf.filter(|&leaf| should_leave(leaf) || looked >= PATIENCE);
            second = second.or(leaf);
            taken
        });
        chosen.filter(|&node| should_leave(node)).or(second).or(chosen)
    }
}
