//! The GPU tier in the store: copies of blocks that are asked for again, on the device that the engine computes on.
//!
//! Every block on the device is in RAM or on SSD, too: it leaves at once where another is to come, and a device that is lost
//! takes nothing with it but time. Tensors on the device are filled from there, else from RAM through the device's kernels,
//! encoded as the blocks are, and never by way of the caller's thread.
//!
//! ```text
//! put    tensors on the device ── gathered, encoded ──▶ slots of RAM ─ ─ ▶ SSD
//! load   slab ─▶ tensors          RAM ── decoded ──▶ tensors
//!         ▲                        │  asked for before
//!         └────────────────────────┘
//! ```

use super::nodes::NodeId;
use super::state::State;
use crate::gpu::{Adopted, Device, Fault, Placed, Slab, Stream, Ticket};
use crate::pool::{Class, Holding};
use crate::stats::{GpuStatus, SlabCounts, Tier, TierCounts};
use crate::sync::{Arc, Home};
use std::collections::{BTreeMap, HashMap};

/// Blocks that leave for one that comes, where they are of another model, at most: until a piece of the slab is free.
const MOST_LEAVE: usize = 64;

/// A GPU tier to be opened.
#[derive(Debug, Clone)]
pub struct GpuOptions {
    /// What it is on.
    pub device: Arc<dyn Device>,
    /// What its slab is.
    pub slab: SlabOptions,
}

/// Memory of a device for blocks.
#[derive(Debug, Clone)]
pub enum SlabOptions {
    /// So many bytes; half as many, and so on, where the device has no room.
    Reserved(u64),
    /// Memory of somebody else's.
    Adopted(Adopted),
}

/// How the store reaches its device: what is the same for good.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) device: Arc<dyn Device>,
    /// RAM's arena, as the process has it and as the device does.
    memory: *mut u8,
    pub(super) address: u64,
    home: Home,
}

// SAFETY: it only carries the address; what is done there is decided by the store.
unsafe impl Send for Link {}
// SAFETY: as above.
unsafe impl Sync for Link {}

impl Drop for Link {
    fn drop(&mut self) {
        if self.home.is_here() {
            // It may be lost.
            drop(self.device.forget(self.memory));
        }
    }
}

/// What is on the device, under the store's lock.
#[derive(Debug)]
pub(crate) struct Gpu {
    /// `None` once it is lost.
    slab: Option<Slab>,
    capacity_bytes: u64,
    name: String,
    classes: BTreeMap<u32, (Arc<Holding>, Arc<Class>)>,
    /// Of each block there, its token ids.
    tokens: HashMap<Placed, Box<[u32]>>,
    /// Blocks that were handed out and came back in a stream that could not be asked what is in it: they are held until it
    /// can.
    unmarked: Vec<(OnGpu, Stream)>,
    last: SlabCounts,
    failed: Option<String>,
}

/// A block on the device that is held there.
#[derive(Debug, Clone, Copy)]
pub(super) struct OnGpu {
    pub(super) placed: Placed,
    pub(super) address: u64,
    /// What writes it is over then.
    pub(super) ready: Ticket,
}

/// Opens the tier over RAM's arena.
///
/// # Errors
/// Neither the slab nor the arena can be had there.
pub(super) fn open(options: &GpuOptions, memory: *mut u8, bytes: usize) -> std::result::Result<(Link, Gpu), Fault> {
    let GpuOptions { device, slab } = options;
    // SAFETY: the arena outlives the link, which forgets it.
    let address = unsafe { device.register(memory, bytes) }?;
    let link = Link { device: device.clone(), memory, address, home: Home::default() };
    let slab = match slab {
        SlabOptions::Reserved(bytes) => Slab::reserve(device.clone(), *bytes, 0),
        SlabOptions::Adopted(memory) => Slab::adopt(device.clone(), memory.clone()),
    }?;
    let gpu = Gpu {
        capacity_bytes: slab.bytes(),
        slab: Some(slab),
        name: device.name(),
        classes: BTreeMap::new(),
        tokens: HashMap::new(),
        unmarked: Vec::new(),
        last: SlabCounts::default(),
        failed: None,
    };
    Ok((link, gpu))
}

impl State {
    /// How the tier is, if there is one.
    pub(super) fn gpu_status(&self) -> Option<GpuStatus> {
        let gpu = self.gpu.as_ref()?;
        Some(GpuStatus {
            name: gpu.name.clone(),
            capacity_bytes: gpu.capacity_bytes,
            counts: gpu.slab.as_ref().map_or(gpu.last, Slab::counts),
            refused: self.gpu_refused,
            failed: gpu.failed.clone(),
        })
    }

    /// An equal part of it for each model.
    pub(super) fn gpu_share(&self) -> u64 {
        self.gpu.as_ref().map_or(0, |gpu| gpu.capacity_bytes) / self.models.len().max(1) as u64
    }

    pub(super) fn slab(&mut self) -> Option<&mut Slab> {
        self.gpu.as_mut()?.slab.as_mut()
    }

    /// Blocks that have a copy on the device.
    pub(super) fn on_gpu(&self) -> Vec<NodeId> {
        let there = self.gpu.as_ref().and_then(|gpu| gpu.slab.as_ref()).map(|slab| slab.nodes().collect::<Vec<_>>());
        there.unwrap_or_default().into_iter().filter(|&id| self.nodes.is_linked(id)).collect()
    }

    // Takes a block's copy out of the sums, or puts it in; and notes that it goes, or comes.
    fn book_on_gpu(&mut self, id: NodeId, comes: bool) {
        self.log(id, Tier::Gpu, comes);
        let model = self.nodes.model(id);
        let bytes = self.models.get(&model).map_or(0, |m| m.geometry.block_bytes() as u64);
        let TierCounts { blocks, used_bytes, plain_bytes, in_bytes, out_bytes, .. } = &mut self.counts_of(id).gpu;
        if comes {
            (*blocks, *used_bytes, *plain_bytes) = (*blocks + 1, *used_bytes + bytes, *plain_bytes + bytes);
            *in_bytes += bytes;
        } else {
            (*blocks, *used_bytes, *plain_bytes) = (*blocks - 1, *used_bytes - bytes, *plain_bytes - bytes);
            *out_bytes += bytes;
        }
    }

    /// Takes a block's copy off the device, if it has one.
    pub(super) fn leave_gpu(&mut self, id: NodeId, evicted: bool) {
        let Some(placed) = self.nodes[id].gpu.take() else { return };
        self.book_on_gpu(id, false);
        self.counts_of(id).gpu.evicted += u64::from(evicted);
        if let Some(gpu) = &mut self.gpu {
            gpu.tokens.remove(&placed);
            if let Some(slab) = &mut gpu.slab {
                slab.leave(placed, evicted);
            }
        }
    }

    /// A model is gone, and all of its blocks.
    pub(super) fn forget_on_gpu(&mut self, model: u32) {
        if let Some(gpu) = &mut self.gpu {
            gpu.classes.remove(&model);
            if let Some(slab) = &mut gpu.slab {
                slab.forget(model);
            }
        }
    }

    /// Holds a block's copy on the device, if it is of these tokens.
    pub(super) fn hold_on_gpu(&mut self, id: NodeId, tokens: &[u32]) -> Option<OnGpu> {
        let placed = self.nodes[id].gpu?;
        let gpu = self.gpu.as_mut()?;
        let right = gpu.tokens.get(&placed).is_some_and(|known| **known == *tokens);
        let slab = gpu.slab.as_mut().filter(|_| right)?;
        let ready = slab.ready(placed)?;
        slab.hold(placed);
        Some(OnGpu { placed, address: slab.address(placed), ready })
    }

    /// Gives that up. What reads it in a stream of somebody else's is over with that ticket. Of a store that is closed what
    /// there is to be dropped, without the lock, when the last is given up.
    #[must_use]
    pub(super) fn let_go_on_gpu(&mut self, held: &OnGpu, after: Ticket) -> Option<Slab> {
        if let Some(slab) = self.slab() {
            slab.let_go(held.placed, after);
        }
        if self.closed { self.close_gpu() } else { None }
    }

    /// The same of a block that was handed out, by what is in the stream now; or later, where that cannot be told now.
    #[must_use]
    pub(super) fn came_back(&mut self, held: &OnGpu, stream: Stream) -> Option<Slab> {
        // Of what was on a device that is lost nobody asks.
        self.slab()?;
        self.gpu.as_mut()?.unmarked.push((*held, stream));
        self.mark_again();
        if self.closed { self.close_gpu() } else { None }
    }

    // Gives up what came back, as far as the streams can be asked.
    fn mark_again(&mut self) {
        let Some(gpu) = &mut self.gpu else { return };
        let Some(slab) = &mut gpu.slab else { return };
        let device = slab.device().clone();
        gpu.unmarked.retain(|(held, stream)| match device.mark(*stream) {
            Ok(after) => {
                slab.let_go(held.placed, after);
                false
            }
            Err(_) => true,
        });
    }

    /// Holds it once more. `alone`: nobody else may hold it, and nobody finds it from now on; what others still read of it
    /// in their streams.
    pub(super) fn hold_again(
        &mut self,
        id: NodeId,
        held: &OnGpu,
        alone: bool,
    ) -> std::result::Result<Vec<Ticket>, Fault> {
        let lost = || Fault::Lost("its blocks are gone".into());
        let mut read = Vec::new();
        if alone {
            let found = self.slab().ok_or_else(lost)?.alone(held.placed);
            read = found.ok_or_else(|| Fault::Refused("others read the block".into()))?;
            // It may have left, and another copy of the block have come.
            if self.nodes.is_linked(id) && self.nodes[id].gpu == Some(held.placed) {
                self.leave_gpu(id, false);
            }
        }
        self.slab().ok_or_else(lost)?.hold(held.placed);
        Ok(read)
    }

    /// Places on the device for blocks of a model that have none there: others of it leave, or of those who have more than
    /// an equal part. They are held, and nothing is in them yet; with a fault, they are those from before it.
    pub(super) fn place_on_gpu(&mut self, model: u32, blocks: &[(NodeId, Box<[u32]>)]) -> (Vec<OnGpu>, Option<Fault>) {
        let Some(geometry) = self.models.get(&model).map(|m| m.geometry) else { return (Vec::new(), None) };
        self.mark_again();
        let share = self.gpu_share();
        let (mut given, mut left, mut failed) = (Vec::new(), blocks.len() + MOST_LEAVE, None);
        while given.len() < blocks.len() {
            let Some(gpu) = &mut self.gpu else { break };
            let Some(slab) = &mut gpu.slab else { break };
            let (_, class) = gpu.classes.entry(model).or_insert_with(|| {
                let holding = Holding::new(model);
                let class = slab.class(&holding, geometry.block_bytes());
                (holding, class)
            });
            let nodes: Vec<NodeId> = blocks[given.len()..].iter().map(|(id, _)| *id).collect();
            let placed = match slab.place(class, model, &nodes) {
                Ok(placed) => placed,
                Err(fault) => {
                    failed = Some(fault);
                    break;
                }
            };
            for placed in &placed {
                let (id, tokens) = &blocks[given.len()];
                slab.hold(*placed);
                gpu.tokens.insert(*placed, tokens.clone());
                given.push(OnGpu { placed: *placed, address: slab.address(*placed), ready: Ticket::NONE });
                self.nodes[*id].gpu = Some(*placed);
            }
            if !placed.is_empty() {
                continue;
            }
            // Enough have left: their places come when the device is done with them.
            if slab.waiting() >= blocks.len() - given.len() {
                break;
            }
            // What one has beyond its part goes first; one that has none of its own takes of who has most.
            let held = |model: u32| gpu.classes.get(&model).map_or(0, |(holding, _)| slab.held_bytes(holding));
            let mut payers: Vec<u32> = gpu.classes.keys().copied().filter(|&other| held(other) > 0).collect();
            payers.sort_by_key(|&other| (other != model || held(other) < share, std::cmp::Reverse(held(other))));
            let victim =
                payers.into_iter().find_map(|payer| slab.coldest(payer, |_| true).map(|placed| slab.node(placed)));
            match victim.filter(|_| left > 0) {
                Some(victim) => self.leave_gpu(victim, true),
                None => break,
            }
            left -= 1;
        }
        let came: Vec<NodeId> = blocks[..given.len()].iter().map(|(id, _)| *id).collect();
        came.into_iter().for_each(|id| self.book_on_gpu(id, true));
        (given, failed)
    }

    /// The device is of no use any more: nothing is there.
    pub(super) fn lose_gpu(&mut self, reason: &str) -> Option<Slab> {
        let slab = self.leave_all();
        if let Some(gpu) = &mut self.gpu {
            gpu.failed.get_or_insert_with(|| reason.to_owned());
        }
        slab
    }

    /// The store closes: takes everything off the device, and its memory; unless somebody holds some, who calls this again.
    pub(super) fn close_gpu(&mut self) -> Option<Slab> {
        self.mark_again();
        let held = self.slab().is_some_and(|slab| slab.counts().held > 0);
        if held { None } else { self.leave_all() }
    }

    fn leave_all(&mut self) -> Option<Slab> {
        let gpu = self.gpu.as_mut()?;
        let slab = gpu.slab.take()?;
        gpu.last = slab.counts();
        gpu.tokens.clear();
        gpu.unmarked.clear();
        for id in slab.nodes().collect::<Vec<_>>() {
            if self.nodes.is_linked(id) && self.nodes[id].gpu.take().is_some() {
                self.book_on_gpu(id, false);
            }
        }
        Some(slab)
    }
}
