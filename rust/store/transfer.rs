//! What moves between tensors on the device, slots of RAM and the slab: gathered, scattered, encoded and decoded by the
//! device, behind the call but for its end, which is waited for.

use super::gpu::{Link, OnGpu};
use super::nodes::NodeId;
use super::state::State;
use super::{Lease, Shared};
use crate::block::Geometry;
use crate::codec::Layout;
use crate::copy::KvView;
use crate::error::{Error, ErrorKind, Result, input};
use crate::gpu::{Coded, Fault, Lane, Piece, Placed, Rows, Status, Submission, Ticket, Work};
use crate::pool::Slot;
use crate::sync::Arc;

/// Matches of a block after which it is copied to the device.
const HOT_USES: u32 = 2;
/// What is shown to the device is of whole pages, so that no two share one.
const ALIGN: usize = 4096;

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
    /// layout that they have then. Else the device failed, and nothing is there: whether it touches the slots no more.
    pub(super) fn gather_on_device(
        &self,
        geometry: &Geometry,
        view: &KvView,
        layout: Option<&Arc<Layout>>,
        blocks: &[(Slot, usize)],
    ) -> std::result::Result<Vec<bool>, bool> {
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
        gathered.map_err(|fault| {
            self.failed_on_device(&fault);
            !matches!(fault, Fault::Unknown(_))
        })
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
            Fault::Lost(reason) | Fault::Unknown(reason) => state.lose_gpu(reason),
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
        // Dropped behind the lock.
        let mut gone = None;
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
                        gone = state.let_go_on_gpu(&placed[n], Ticket::NONE).or(gone);
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
