//! The tier's memory: one slab of the device, reserved once, in which every block has a place.
//!
//! Places are cut by the same pool as those of RAM: neighbours for blocks of one sequence, so that they are copied as one
//! piece. A block that is used is the last of its model to leave; one that is held does not stand in that order at all.
//! What left waits in a queue, with the tickets of the last work that touches it, until that is over: nobody waits for it
//! but who finds no other place, and who does not wait at all has its block somewhere else. What others read in streams of
//! their own waits beside that queue, so that nothing waits for them.

use super::device::{Device, Fault, Lane, Ticket};
use crate::evict::{Kind, Order};
use crate::pool::{Class, Holding, Pool, SMALLEST_SLOT, Slot};
use crate::stats::SlabCounts;
use crate::sync::{Arc, Home};
use crate::trie::NodeId;
use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// The least that a slab may have.
const LEAST_BYTES: u64 = 4 << 20;

/// Names a block's place, as long as it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Placed(u32);

#[derive(Debug)]
struct Block {
    slot: Slot,
    model: u32,
    node: NodeId,
    /// What it was written by; `None` before that is submitted.
    wrote: Option<Ticket>,
    /// The last work of each lane that touches it.
    touched: [Ticket; Lane::ALL.len()],
    /// What others put into streams of their own that reads it.
    elsewhere: Vec<Ticket>,
    holds: u32,
    /// It was told to leave, and goes when nobody holds it any more.
    leaves: bool,
}

/// What left, and may be read still.
#[derive(Debug)]
struct Left {
    slot: Slot,
    touched: [Ticket; Lane::ALL.len()],
    elsewhere: Vec<Ticket>,
}

/// Memory of the device that belongs to somebody else.
#[derive(Clone)]
pub struct Adopted {
    /// Its first byte, as the device has it.
    pub address: u64,
    /// How many there are.
    pub bytes: u64,
    /// Whoever gives the memory back when this goes.
    pub owner: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Adopted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, bytes, .. } = self;
        f.debug_struct("Adopted").field("address", address).field("bytes", bytes).finish_non_exhaustive()
    }
}

/// A slab, and what is where in it.
#[derive(Debug)]
pub struct Slab {
    device: Arc<dyn Device>,
    base: u64,
    bytes: u64,
    /// Of memory that is not the slab's own.
    adopted: Option<Adopted>,
    pool: Pool,
    blocks: Vec<Option<Block>>,
    vacant: Vec<u32>,
    orders: BTreeMap<u32, Order>,
    /// In the order in which they left; each is asked for when all before it are done with.
    leaving: VecDeque<Left>,
    /// Those that others read, in no order.
    lent: Vec<Left>,
    /// The last work of each lane that is known to be over, and so all before it.
    over: [Ticket; Lane::ALL.len()],
    /// Which slots had a block once, by number.
    used: Vec<u64>,
    counts: SlabCounts,
    home: Home,
}

impl Slab {
    /// Reserves a slab of so many bytes, or of half as many, and so on, while the device has no room; but of `least`.
    ///
    /// # Errors
    /// There is no room for that either, or the device is lost.
    pub fn reserve(device: Arc<dyn Device>, bytes: u64, least: u64) -> Result<Self, Fault> {
        let (mut bytes, mut reservations) = (bytes.max(LEAST_BYTES), 0);
        loop {
            reservations += 1;
            match device.reserve(bytes) {
                Ok(base) => {
                    let mut slab = Self::of(device, base, bytes, None);
                    slab.counts.reservations = reservations;
                    return Ok(slab);
                }
                Err(Fault::NoRoom(_)) if bytes / 2 >= least.max(LEAST_BYTES) => bytes /= 2,
                Err(fault) => return Err(fault),
            }
        }
    }

    /// A slab in memory of the device that belongs to somebody else: all of it from the first multiple of 4 KiB on.
    ///
    /// # Errors
    /// It is too small.
    pub fn adopt(device: Arc<dyn Device>, memory: Adopted) -> Result<Self, Fault> {
        let base = memory.address.next_multiple_of(SMALLEST_SLOT as u64);
        let bytes = memory.bytes.saturating_sub(base - memory.address);
        if bytes < LEAST_BYTES {
            return Err(Fault::Refused(format!(
                "{} bytes at {:#x}, expected at least {LEAST_BYTES} from a multiple of {SMALLEST_SLOT} on",
                memory.bytes, memory.address
            )));
        }
        Ok(Self::of(device, base, bytes, Some(memory)))
    }

    fn of(device: Arc<dyn Device>, base: u64, bytes: u64, adopted: Option<Adopted>) -> Self {
        let slots = bytes as usize / SMALLEST_SLOT;
        Self {
            device,
            base,
            bytes,
            adopted,
            pool: Pool::new(bytes as usize),
            blocks: Vec::new(),
            vacant: Vec::new(),
            orders: BTreeMap::new(),
            leaving: VecDeque::new(),
            lent: Vec::new(),
            over: [Ticket::NONE; Lane::ALL.len()],
            used: vec![0; slots.div_ceil(64)],
            counts: SlabCounts::default(),
            home: Home::default(),
        }
    }

    /// Bytes of it that a model's places take, free ones among them.
    pub(crate) fn held_bytes(&self, holding: &Holding) -> u64 {
        self.pool.held_bytes(holding) as u64
    }

    /// Whose blocks are in it.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.blocks.iter().flatten().map(|block| block.node)
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is counted.
    pub fn counts(&self) -> SlabCounts {
        self.counts
    }

    /// A model's places of a size.
    pub fn class(&self, holding: &Arc<Holding>, block_bytes: usize) -> Arc<Class> {
        self.pool.class(holding, block_bytes)
    }

    /// Gives places to some blocks of a model: neighbours as far as there are, and to fewer where there is no room. They
    /// are to be [written](Self::wrote), or [leave](Self::leave).
    ///
    /// # Errors
    /// The device is lost.
    pub fn place(&mut self, class: &Arc<Class>, model: u32, nodes: &[NodeId]) -> Result<Vec<Placed>, Fault> {
        self.reclaim()?;
        let mut given = Vec::with_capacity(nodes.len());
        while given.len() < nodes.len() {
            let Some(run) = self.pool.allocate_run(class, nodes.len() - given.len()) else { break };
            for slot in run {
                let node = nodes[given.len()];
                given.push(self.seat(slot, model, node));
            }
        }
        Ok(given)
    }

    fn seat(&mut self, slot: Slot, model: u32, node: NodeId) -> Placed {
        let (word, bit) = (slot.number() / 64, 1 << (slot.number() % 64));
        self.counts.taken += 1;
        self.counts.in_use += 1;
        self.counts.fresh += u64::from(self.used[word] & bit == 0);
        self.used[word] |= bit;
        let touched = [Ticket::NONE; Lane::ALL.len()];
        let block = Block { slot, model, node, wrote: None, touched, elsewhere: Vec::new(), holds: 0, leaves: false };
        let place = self.vacant.pop().unwrap_or_else(|| {
            self.blocks.push(None);
            self.blocks.len() as u32 - 1
        });
        self.blocks[place as usize] = Some(block);
        Placed(place)
    }

    fn block(&self, placed: Placed) -> &Block {
        self.blocks[placed.0 as usize].as_ref().expect("a place that was given, and not given back")
    }

    fn block_mut(&mut self, placed: Placed) -> &mut Block {
        self.blocks[placed.0 as usize].as_mut().expect("a place that was given, and not given back")
    }

    fn order(&mut self, model: u32) -> &mut Order {
        self.orders.entry(model).or_insert_with(|| Order::new(Kind::Lru, 0))
    }

    /// The block's first byte, by its address on the device.
    pub fn address(&self, placed: Placed) -> u64 {
        self.base + self.block(placed).slot.offset() as u64
    }

    /// Whose place it is.
    pub fn node(&self, placed: Placed) -> NodeId {
        self.block(placed).node
    }

    /// What is to be waited for before its bytes are read; `None`: nothing writes them yet.
    pub fn ready(&self, placed: Placed) -> Option<Ticket> {
        self.block(placed).wrote
    }

    /// Work was submitted that writes these blocks: they can be found from now on.
    pub fn wrote(&mut self, placed: &[Placed], lane: Lane, ticket: Ticket) {
        for &placed in placed {
            let block = self.block_mut(placed);
            debug_assert!(block.wrote.is_none(), "a block is written once");
            block.wrote = Some(ticket);
            block.touched[lane as usize] = ticket;
            self.stand(placed);
        }
    }

    /// Work was submitted that reads these blocks: they were used. Of a sequence from its start on.
    pub fn read(&mut self, placed: &[Placed], lane: Lane, ticket: Ticket) {
        for &placed in placed.iter().rev() {
            self.block_mut(placed).touched[lane as usize] = ticket;
            self.touch(placed);
        }
    }

    /// A block was used.
    pub fn touch(&mut self, placed: Placed) {
        let model = self.block(placed).model;
        self.order(model).touch(placed.0);
    }

    /// Keeps a block where it is until [`let_go`](Self::let_go), whatever becomes of it.
    pub fn hold(&mut self, placed: Placed) {
        let block = self.block_mut(placed);
        block.holds += 1;
        let (first, model) = (block.holds == 1, block.model);
        if first {
            self.counts.held += 1;
            self.order(model).remove(placed.0, false);
        }
    }

    /// What others put into streams of their own that reads it, if it is held once alone.
    pub fn alone(&self, placed: Placed) -> Option<Vec<Ticket>> {
        let block = self.block(placed);
        (block.holds == 1).then(|| block.elsewhere.clone())
    }

    /// Places that blocks have left, and that are not free yet.
    pub fn waiting(&self) -> usize {
        self.leaving.len() + self.lent.len()
    }

    /// The device that it is on.
    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Gives up a hold; the last is a use. What reads it, in a stream of somebody else's, is over with that ticket: the place
    /// is nobody else's before.
    pub fn let_go(&mut self, placed: Placed, after: Ticket) {
        let device = self.device.clone();
        let block = self.block_mut(placed);
        if after != Ticket::NONE {
            // Those of a device that is lost never end.
            block.elsewhere.retain(|&ticket| device.is_over(ticket) != Ok(true));
            block.elsewhere.push(after);
        }
        block.holds = block.holds.checked_sub(1).expect("it is held");
        let (last, leaves) = (block.holds == 0, block.leaves);
        if last {
            self.counts.held -= 1;
            if leaves { self.part(placed) } else { self.stand(placed) }
        }
    }

    // A block that was written and is not held may be chosen to leave, after all others of its model.
    fn stand(&mut self, placed: Placed) {
        let block = self.block(placed);
        let (model, stands) = (block.model, block.wrote.is_some() && block.holds == 0);
        if stands {
            self.order(model).insert(placed.0, 0, 1.0);
        }
    }

    /// Of a model's blocks that `may` leave, the one that was used longest ago.
    pub fn coldest(&mut self, model: u32, mut may: impl FnMut(NodeId) -> bool) -> Option<Placed> {
        let (blocks, order) = (&self.blocks, self.orders.get_mut(&model)?);
        let leaf = |place: u32| blocks[place as usize].as_ref().filter(|block| may(block.node)).map(|_| place);
        order.victim(leaf, |_| true).map(Placed)
    }

    /// Takes a block out, so that others have its place; `evicted`: for them. One that is held goes when it is let go.
    pub fn leave(&mut self, placed: Placed, evicted: bool) {
        let block = self.block_mut(placed);
        debug_assert!(!block.leaves, "a block leaves once");
        block.leaves = true;
        let (held, model) = (block.holds > 0, block.model);
        self.counts.evicted += u64::from(evicted);
        self.order(model).remove(placed.0, evicted);
        if !held {
            self.part(placed);
        }
    }

    fn part(&mut self, placed: Placed) {
        if let Some(block) = self.blocks[placed.0 as usize].take() {
            self.vacant.push(placed.0);
            let Block { slot, touched, elsewhere, .. } = block;
            let left = Left { slot, touched, elsewhere };
            if left.elsewhere.is_empty() { self.leaving.push_back(left) } else { self.lent.push(left) }
        }
    }

    /// Takes back the places of what left, as far as the device is done with them; how many.
    ///
    /// # Errors
    /// The device is lost.
    pub fn reclaim(&mut self) -> Result<usize, Fault> {
        let before = self.counts.in_use;
        let mut nth = 0;
        while nth < self.lent.len() {
            let Left { slot, touched, elsewhere } = &self.lent[nth];
            let mut over = true;
            for &ticket in touched.iter().chain(elsewhere) {
                over = over && self.device.is_over(ticket)?;
            }
            if over {
                self.pool.free(*slot);
                self.counts.in_use -= 1;
                self.lent.swap_remove(nth);
            } else {
                nth += 1;
            }
        }
        while let Some(Left { slot, touched, .. }) = self.leaving.front() {
            for (over, &ticket) in self.over.iter_mut().zip(touched) {
                if ticket > *over {
                    if !self.device.is_over(ticket)? {
                        return Ok((before - self.counts.in_use) as usize);
                    }
                    *over = ticket;
                }
            }
            self.pool.free(*slot);
            self.counts.in_use -= 1;
            self.leaving.pop_front();
        }
        Ok((before - self.counts.in_use) as usize)
    }

    /// Waits until the place of something that left is free; whether there is one.
    ///
    /// # Errors
    /// The device is lost.
    pub fn wait_for_room(&mut self) -> Result<bool, Fault> {
        let Some(Left { touched, elsewhere, .. }) = self.leaving.front().or(self.lent.first()) else {
            return Ok(false);
        };
        touched.iter().chain(elsewhere).try_for_each(|&ticket| self.device.wait(ticket))?;
        Ok(self.reclaim()? > 0)
    }

    /// A model is gone, and all of its blocks left.
    pub fn forget(&mut self, model: u32) {
        self.orders.remove(&model);
    }

    /// Gives the memory back, when all work is over.
    ///
    /// # Errors
    /// Blocks are held, or the device is lost.
    pub fn close(&mut self) -> Result<(), Fault> {
        if self.counts.held > 0 {
            return Err(Fault::Refused(format!("{} blocks are held", self.counts.held)));
        }
        let tickets = |touched: &[Ticket], elsewhere: &[Ticket]| [touched, elsewhere].concat();
        let blocks = self.blocks.iter().flatten().flat_map(|block| tickets(&block.touched, &block.elsewhere));
        let left = self.leaving.iter().chain(&self.lent).flat_map(|left| tickets(&left.touched, &left.elsewhere));
        let last: Vec<Ticket> = blocks.chain(left).collect();
        last.into_iter().try_for_each(|ticket| self.device.wait(ticket))?;
        if self.bytes > 0 && self.adopted.take().is_none() {
            self.device.release(self.base)?;
        }
        self.bytes = 0;
        Ok(())
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // Where blocks are held, or the device does not say what is over, whoever holds them needs the memory more than
        // anybody else does: it is nobody's for good. After a fork it is the parent's.
        if !self.home.is_here() || self.close().is_err() {
            let _kept = std::mem::ManuallyDrop::new(self.adopted.take());
        }
    }
}
