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
use super::{Lease, Shared};
use crate::block::Geometry;
use crate::codec::Layout;
use crate::copy::KvView;
use crate::error::{Error, ErrorKind, Result, input};
use crate::gpu::{Adopted, Coded, Device, Fault, Lane, Piece, Placed, Rows, Slab, Status, Submission, Ticket, Work};
use crate::pool::{Class, Holding, Slot};
use crate::stats::{GpuStatus, SlabCounts, Tier, TierCounts};
use crate::sync::{Arc, Home};
use std::collections::{BTreeMap, HashMap};

/// Matches of a block after which it is copied to the device.
const HOT_USES: u32 = 2;
/// Blocks that leave for one that comes, where they are of another model, at most: until a piece of the slab is free.
const MOST_LEAVE: usize = 64;
/// What is shown to the device is of whole pages, so that no two share one.
const ALIGN: usize = 4096;

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
    address: u64,
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
    last: SlabCounts,
    failed: Option<String>,
}

/// A block on the device that is held there.
#[derive(Debug, Clone, Copy)]
pub(super) struct OnGpu {
    placed: Placed,
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

    fn slab(&mut self) -> Option<&mut Slab> {
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

    /// Gives that up. What reads it in a stream of somebody else's is over with that ticket.
    pub(super) fn let_go_on_gpu(&mut self, held: &OnGpu, after: Ticket) {
        if let Some(slab) = self.slab() {
            slab.let_go(held.placed, after);
        }
    }

    /// Holds it once more. `alone`: nobody else may hold it, and nobody finds it from now on.
    pub(super) fn hold_again(&mut self, id: NodeId, held: &OnGpu, alone: bool) -> std::result::Result<(), Fault> {
        let lost = || Fault::Lost("its blocks are gone".into());
        if alone {
            if self.slab().ok_or_else(lost)?.holds(held.placed) > 1 {
                return Err(Fault::Refused("others read the block".into()));
            }
            // It may have left, and another copy of the block have come.
            if self.nodes.is_linked(id) && self.nodes[id].gpu == Some(held.placed) {
                self.leave_gpu(id, false);
            }
        }
        self.slab().ok_or_else(lost)?.hold(held.placed);
        Ok(())
    }

    // Places on the device for blocks of a model that have none there: others of it leave, or of those who have more than
    // an equal part. They are held, and nothing is in them yet; with a fault, they are those from before it.
    fn place_on_gpu(&mut self, model: u32, blocks: &[(NodeId, Box<[u32]>)]) -> (Vec<OnGpu>, Option<Fault>) {
        let Some(geometry) = self.models.get(&model).map(|m| m.geometry) else { return (Vec::new(), None) };
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
    fn lose_gpu(&mut self, reason: &str) -> Option<Slab> {
        let slab = self.leave_all();
        if let Some(gpu) = &mut self.gpu {
            gpu.failed.get_or_insert_with(|| reason.to_owned());
        }
        slab
    }

    /// The store closes: takes everything off the device, and its memory, unless a load under way holds some. That goes with
    /// the store.
    pub(super) fn close_gpu(&mut self) -> Option<Slab> {
        let held = self.slab().is_some_and(|slab| slab.counts().held > 0);
        if held { None } else { self.leave_all() }
    }

    fn leave_all(&mut self) -> Option<Slab> {
        let gpu = self.gpu.as_mut()?;
        let slab = gpu.slab.take()?;
        gpu.last = slab.counts();
        gpu.tokens.clear();
        for id in slab.nodes().collect::<Vec<_>>() {
            if self.nodes.is_linked(id) && self.nodes[id].gpu.take().is_some() {
                self.book_on_gpu(id, false);
            }
        }
        Some(slab)
    }
}

/// Where a block's payload is that goes to tensors on the device.
pub(super) enum Payload {
    /// In the slab.
    Gpu(OnGpu),
    /// In a slot, encoded or not.
    Slot(Slot, Option<Arc<Layout>>),
    /// Plain, in memory of its own.
    Staged(Staged),
}

/// A plain payload that the device can be shown.
pub(super) struct Staged {
    memory: Vec<u8>,
    at: usize,
    bytes: usize,
}

impl Staged {
    pub(super) fn new(bytes: usize) -> Self {
        let memory = vec![0u8; bytes.next_multiple_of(ALIGN) + ALIGN];
        let at = memory.as_ptr().align_offset(ALIGN);
        Self { memory, at, bytes }
    }

    pub(super) fn payload(&mut self) -> &mut [u8] {
        &mut self.memory[self.at..self.at + self.bytes]
    }
}

// Which rows of the caller's tensors blocks are in, as kernels want it.
struct Tensors {
    planes: Arc<[Rows]>,
    run_tokens: u32,
    token_stride: u64,
    page_stride: u64,
}

impl Tensors {
    fn new(geometry: &Geometry, view: &KvView) -> Result<Self> {
        let planes: Vec<crate::copy::PlaneView> = view.planes().iter().map(|plane| meant(geometry, plane)).collect();
        let first = planes[0];
        let strides = |plane: &crate::copy::PlaneView| (plane.head_stride, plane.token_stride, plane.page_stride);
        if planes.iter().any(|plane| strides(plane) != strides(&first)) {
            return Err(input(
                "kv: tensors on a device are of equal strides, expected of all layers; pass such tensors",
            ));
        }
        let rows = planes.iter().map(|plane| Rows {
            base: plane.base as u64,
            head_stride: plane.head_stride as u64,
            token_stride: plane.token_stride as u64,
        });
        let tokens = geometry.block_tokens;
        let run_tokens = view.page_tokens().map_or(tokens, |page| greatest_common_divisor(tokens, page as u32));
        Ok(Self {
            planes: rows.collect(),
            run_tokens,
            token_stride: first.token_stride as u64,
            page_stride: first.page_stride as u64,
        })
    }

    // What is added to the rows' addresses in each run of a block.
    fn offsets<'a>(
        &'a self,
        geometry: &Geometry,
        view: &'a KvView,
        first_token: usize,
    ) -> impl Iterator<Item = u64> + 'a {
        let runs = geometry.block_tokens / self.run_tokens;
        (0..runs).map(move |run| {
            let token = first_token + (run * self.run_tokens) as usize;
            let (page, within) = view.page_of(token);
            (u64::from(page).wrapping_mul(self.page_stride))
                .wrapping_add((within as u64).wrapping_mul(self.token_stride))
        })
    }
}

// A plane without the strides of what it has one of: they say nothing.
fn meant(geometry: &Geometry, plane: &crate::copy::PlaneView) -> crate::copy::PlaneView {
    let head_stride = if geometry.kv_heads == 1 { 0 } else { plane.head_stride };
    crate::copy::PlaneView { head_stride, ..*plane }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

impl Shared {
    fn link(&self) -> Result<&Link> {
        self.gpu.as_ref().ok_or_else(|| {
            let message =
                "kv is on a device, and the store has no GPU tier: set gpu.capacity_bytes, or pass CPU tensors";
            Error::new(ErrorKind::Input, message)
        })
    }

    /// Whether the store has tensors on a device to do with at all.
    pub(super) fn check_device(&self, geometry: &Geometry, view: &KvView) -> Result<()> {
        let link = self.link()?;
        Tensors::new(geometry, view)?;
        if let Some(stream) = view.stream()
            && let Err(Fault::Refused(why)) = link.device.mark(stream)
        {
            return Err(input(format!("stream is {}, expected one of {}: {why}", stream.0, link.device.name())));
        }
        // A lost device owns nothing, and says so when it is asked for more.
        let elsewhere = |plane: &crate::copy::PlaneView| link.device.owns(plane.base as u64) == Ok(false);
        match view.planes().iter().position(elsewhere) {
            None => Ok(()),
            Some(plane) => {
                let name = link.device.name();
                Err(input(format!("kv: plane {plane} is not on the store's device, {name}; copy it there first")))
            }
        }
    }

    fn address(&self, link: &Link, slot: Slot, geometry: &Geometry) -> u64 {
        link.address + slot.offset() as u64 + geometry.payload_offset() as u64
    }

    // Submits one piece of work and what it waits for.
    //
    // SAFETY, of all who call it: payloads are of blocks that are held, or of slots that are the caller's, and rows of the
    // caller's tensors or of places that are held; each until the ticket is over.
    fn submit(link: &Link, lane: Lane, after: Vec<Ticket>, work: Work) -> std::result::Result<Ticket, Fault> {
        // SAFETY: see above.
        unsafe { link.device.submit(Submission { lane, after, work: vec![work] }) }
    }

    // Waits until what was put into the caller's stream is done: here, so that no lane has to wait for it, and others behind
    // it.
    fn mark(link: &Link, view: &KvView) -> std::result::Result<(), Fault> {
        let Some(stream) = view.stream() else { return Ok(()) };
        link.device.wait(link.device.mark(stream)?)
    }

    /// Gathers blocks of tensors on the device into slots that are the caller's. Which of them could be encoded, and the
    /// layout that they have then; `None`: the device failed, and nothing is there.
    pub(super) fn gather_on_device(
        &self,
        geometry: &Geometry,
        view: &KvView,
        layout: Option<&Arc<Layout>>,
        blocks: &[(Slot, usize)],
    ) -> Option<Vec<bool>> {
        let gathered = self.link().map_err(|error| Fault::Refused(error.to_string())).and_then(|link| {
            let tensors = Tensors::new(geometry, view).map_err(|error| Fault::Refused(error.to_string()))?;
            let status = Status::new(blocks.len());
            let firsts = blocks.iter().map(|&(_, first_token)| first_token);
            let payloads = blocks.iter().map(|&(slot, _)| self.address(link, slot, geometry)).collect();
            let coded = coded(geometry, view, &tensors, layout.cloned(), firsts, payloads);
            Self::mark(link, view)?;
            let ticket = Self::submit(link, Lane::Down, Vec::new(), Work::Encode(coded, status.clone()))?;
            link.device.wait(ticket)?;
            Ok((0..blocks.len()).map(|block| status.is_encoded(block)).collect())
        });
        gathered.map_err(|fault| self.failed_on_device(&fault)).ok()
    }

    /// Whether the device encodes and decodes by that layout, of these tensors.
    pub(super) fn takes(&self, geometry: &Geometry, layout: &Layout, view: &KvView) -> bool {
        let strides = |plane: &crate::copy::PlaneView| {
            let plane = meant(geometry, plane);
            let strides = plane.head_stride | plane.token_stride | plane.page_stride;
            plane.base as u64 | strides as u64
        };
        // As its kernels want them.
        let aligned = view.planes().iter().fold(0, |all, plane| all | strides(plane)).is_multiple_of(16);
        aligned && self.gpu.as_ref().is_some_and(|link| link.device.takes(layout))
    }

    /// Notes what the device said.
    pub(super) fn failed_on_device(&self, fault: &Fault) {
        let mut state = self.state.lock();
        let slab = match fault {
            Fault::Lost(reason) => state.lose_gpu(reason),
            Fault::NoRoom(_) | Fault::Refused(_) => {
                state.gpu_refused += 1;
                None
            }
        };
        drop(state);
        // It may wait. Its memory is the driver's to give back.
        drop(slab);
    }
}

// Work on blocks of the caller's tensors.
fn coded(
    geometry: &Geometry,
    view: &KvView,
    tensors: &Tensors,
    layout: Option<Arc<Layout>>,
    first_tokens: impl Iterator<Item = usize>,
    payloads: Vec<u64>,
) -> Coded {
    Coded {
        layout,
        heads: geometry.kv_heads,
        block_tokens: geometry.block_tokens,
        row_bytes: geometry.row_bytes(),
        planes: tensors.planes.clone(),
        run_tokens: tensors.run_tokens,
        offsets: first_tokens.flat_map(|first| tensors.offsets(geometry, view, first).collect::<Vec<_>>()).collect(),
        payloads,
    }
}

// Brings payloads to the slab, where rows lie in the order of a plain payload.
fn to_slab(geometry: &Geometry, layout: Option<Arc<Layout>>, places: Vec<u64>, payloads: Vec<u64>) -> Work {
    let Some(layout) = layout else {
        let piece = |(from, to)| Piece { from, to, bytes: geometry.block_bytes() as u64 };
        return Work::Copy(payloads.into_iter().zip(places).map(piece).collect());
    };
    let row = geometry.row_bytes() as u64;
    let head = row * u64::from(geometry.block_tokens);
    let plane = head * u64::from(geometry.kv_heads);
    let rows =
        (0..geometry.plane_count() as u64).map(|n| Rows { base: n * plane, head_stride: head, token_stride: row });
    Work::Decode(Coded {
        layout: Some(layout),
        heads: geometry.kv_heads,
        block_tokens: geometry.block_tokens,
        row_bytes: geometry.row_bytes(),
        planes: rows.collect(),
        run_tokens: geometry.block_tokens,
        offsets: places,
        payloads,
    })
}

// Slots with payloads of one form, each with its number.
type Group = (Option<Arc<Layout>>, Vec<(usize, Slot)>);

fn by_layout(blocks: impl Iterator<Item = (usize, Slot, Option<Arc<Layout>>)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let same = |a: &Option<Arc<Layout>>, b: &Option<Arc<Layout>>| match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    };
    for (n, slot, layout) in blocks {
        match groups.iter_mut().find(|(known, _)| same(known, &layout)) {
            Some((_, group)) => group.push((n, slot)),
            None => groups.push((layout, vec![(n, slot)])),
        }
    }
    groups
}

impl Lease {
    /// Copies those blocks in RAM to the device that were asked for before, and makes them payloads there; they are held.
    pub(super) fn promote_to_device(&self, geometry: &Geometry, payloads: &mut [(usize, NodeId, Payload)]) {
        let Some(link) = &self.shared.gpu else { return };
        let size = geometry.block_tokens as usize;
        let mut state = self.shared.state.lock();
        let hot = |state: &State, id: NodeId| {
            state.nodes.is_linked(id) && state.nodes[id].gpu.is_none() && state.nodes[id].uses >= HOT_USES
        };
        let mut wanted = Vec::new();
        for (at, (n, id, payload)) in payloads.iter().enumerate() {
            if let Payload::Slot(slot, layout) = payload
                && hot(&state, *id)
                && layout.as_ref().is_none_or(|layout| link.device.takes(layout))
            {
                let tokens: Box<[u32]> = self.tokens[n * size..(n + 1) * size].into();
                wanted.push((at, *slot, layout.clone(), (*id, tokens)));
            }
        }
        let blocks: Vec<_> = wanted.iter().map(|(.., block)| block.clone()).collect();
        let (placed, fault) = state.place_on_gpu(self.model.id, &blocks);
        drop(state);
        if let Some(fault) = fault {
            self.shared.failed_on_device(&fault);
        }
        wanted.truncate(placed.len());
        let slots = wanted.iter().enumerate().map(|(n, (_, slot, layout, _))| (n, *slot, layout.clone()));
        for (layout, group) in by_layout(slots) {
            let places: Vec<u64> = group.iter().map(|&(n, _)| placed[n].address).collect();
            let addresses: Vec<u64> =
                group.iter().map(|&(_, slot)| self.shared.address(link, slot, geometry)).collect();
            let work = to_slab(geometry, layout, places, addresses);
            let submitted = Shared::submit(link, Lane::Up, Vec::new(), work);
            let mut state = self.shared.state.lock();
            for &(n, _) in &group {
                let (at, .., (id, _)) = &wanted[n];
                match &submitted {
                    Ok(ticket) => {
                        let held = OnGpu { ready: *ticket, ..placed[n] };
                        if let Some(slab) = state.slab() {
                            slab.wrote(&[held.placed], Lane::Up, *ticket);
                        }
                        payloads[*at].2 = Payload::Gpu(held);
                    }
                    Err(_) => {
                        state.let_go_on_gpu(&placed[n], Ticket::NONE);
                        // It may have been dropped meanwhile, and its copy with it.
                        if state.nodes.is_linked(*id) && state.nodes[*id].gpu == Some(placed[n].placed) {
                            state.leave_gpu(*id, false);
                        }
                    }
                }
            }
            drop(state);
            if let Err(fault) = submitted {
                self.shared.failed_on_device(&fault);
            }
        }
    }

    /// Scatters payloads to the caller's tensors on the device, and waits for it, whatever comes of it; `n`, of each, is the
    /// block's number in the match. Those in RAM that were asked for before are copied to the device on the way.
    pub(super) fn scatter_on_device(
        &self,
        geometry: &Geometry,
        view: &KvView,
        payloads: &mut [(usize, NodeId, Payload)],
    ) -> std::result::Result<(), Fault> {
        let Some(link) = &self.shared.gpu else { return Err(Fault::Refused("there is no GPU tier".into())) };
        let tensors = Tensors::new(geometry, view).map_err(|error| Fault::Refused(error.to_string()))?;
        Shared::mark(link, view)?;
        self.promote_to_device(geometry, payloads);
        let mut tickets = Vec::new();
        let mut shown = Vec::new();
        let sent = self.send(link, (geometry, view, &tensors), payloads, &mut tickets, &mut shown);
        // What is copied to the device reads slots, too.
        let copied = payloads.iter().filter_map(|(.., payload)| match payload {
            Payload::Gpu(held) => Some(held.ready),
            _ => None,
        });
        // All of them, also where one fails.
        let waited: Vec<_> = tickets.into_iter().chain(copied).map(|ticket| link.device.wait(ticket)).collect();
        let forgotten: Vec<_> = shown.into_iter().map(|memory| link.device.forget(memory)).collect();
        let waited: std::result::Result<(), Fault> = waited.into_iter().collect();
        let forgotten: std::result::Result<(), Fault> = forgotten.into_iter().collect();
        waited.and(sent).and(forgotten)
    }

    // Submits what fills the caller's tensors. What memory the device was shown for it, and the tickets, are noted also
    // where it fails.
    fn send(
        &self,
        link: &Link,
        (geometry, view, tensors): (&Geometry, &KvView, &Tensors),
        payloads: &[(usize, NodeId, Payload)],
        tickets: &mut Vec<Ticket>,
        shown: &mut Vec<*mut u8>,
    ) -> std::result::Result<(), Fault> {
        let first_token = |n: usize| n * geometry.block_tokens as usize;
        let on_gpu: Vec<(usize, OnGpu)> = payloads
            .iter()
            .filter_map(|(n, _, payload)| if let Payload::Gpu(held) = payload { Some((*n, *held)) } else { None })
            .collect();
        if !on_gpu.is_empty() {
            let mut after: Vec<Ticket> = on_gpu.iter().map(|(_, held)| held.ready).collect();
            after.sort_unstable();
            after.dedup();
            let firsts = on_gpu.iter().map(|&(n, _)| first_token(n));
            let addresses = on_gpu.iter().map(|(_, held)| held.address).collect();
            let work = Work::Decode(coded(geometry, view, tensors, None, firsts, addresses));
            let ticket = Shared::submit(link, Lane::Across, after, work)?;
            tickets.push(ticket);
            let placed: Vec<Placed> = on_gpu.iter().map(|(_, held)| held.placed).collect();
            if let Some(slab) = self.shared.state.lock().slab() {
                slab.read(&placed, Lane::Across, ticket);
            }
        }
        let slots = payloads.iter().filter_map(|(n, _, payload)| match payload {
            Payload::Slot(slot, layout) => Some((*n, *slot, layout.clone())),
            _ => None,
        });
        for (layout, group) in by_layout(slots) {
            let firsts = group.iter().map(|&(n, _)| first_token(n));
            let addresses = group.iter().map(|&(_, slot)| self.shared.address(link, slot, geometry)).collect();
            let work = Work::Decode(coded(geometry, view, tensors, layout, firsts, addresses));
            tickets.push(Shared::submit(link, Lane::Up, Vec::new(), work)?);
        }
        let staged = payloads.iter().filter_map(|(n, _, payload)| match payload {
            Payload::Staged(staged) => Some((*n, staged)),
            _ => None,
        });
        for (n, staged) in staged {
            let memory = staged.memory[staged.at..].as_ptr().cast_mut();
            // SAFETY: it is forgotten before `payloads` goes.
            let address = unsafe { link.device.register(memory, staged.bytes.next_multiple_of(ALIGN)) }?;
            shown.push(memory);
            let one = std::iter::once(first_token(n));
            let work = Work::Decode(coded(geometry, view, tensors, None, one, vec![address]));
            tickets.push(Shared::submit(link, Lane::Up, Vec::new(), work)?);
        }
        Ok(())
    }
}
