//! Loading a match: per block, from the cheapest tier that has it, straight into the caller's tensors.
//!
//! RAM blocks are scattered from their slots, and decoded on the way where they are encoded; SSD records are read in runs
//! of neighbours, checked and scattered, in parallel. A block read from SSD for the second time is read into a slot, in the
//! form that it has, and stays in RAM. The first block that fails ends the load: everything before it is valid, nothing
//! after it is.

use super::gpu::OnGpu;
use super::read::{Reads, runs};
use super::transfer::{Payload, Staged};
use super::{Lease, check_view};
use crate::block::{BlockHash, Geometry, RECORD_HEADER_BYTES, Sealed};
use crate::codec::Layout;
use crate::copy::{BlockCopy, Direction, KvView, copy_planes};
use crate::error::{Error, ErrorKind, Result, input};
use crate::fused::{decode_blocks, decode_planes};
use crate::gpu::Ticket;
use crate::pool::Slot;
use crate::ssd::record::{read_record, tokens_of};
use crate::ssd::{ModelFile, Place};
use crate::stats::{Miss, Tier};
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use crate::trie::NodeId;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What a load did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOutcome {
    /// Leading tokens of the match that are valid in the caller's tensors now, if those before what was asked for are.
    pub tokens: usize,
    /// Where each loaded block came from.
    pub places: Vec<Tier>,
    /// Why the load ended before the match did.
    pub miss: Option<Miss>,
    /// How long it copied from RAM, and, after that, how long it read from SSD.
    pub ram: Duration,
    /// See there.
    pub ssd: Duration,
}

// Where one block will be read from.
pub(super) enum Source {
    Gpu(OnGpu),
    Ram(Slot, Option<Arc<Layout>>),
    Ssd { file: Arc<ModelFile>, hash: Sealed, place: Place, epoch: u64, promote: Option<Slot> },
    Gone(Miss),
}

// What a load is about to do.
struct Plan {
    /// The first block of the match that is loaded; what follows here is of it and those after it.
    first: usize,
    /// One by one, until `settle`.
    held: Vec<NodeId>,
    sources: Vec<Source>,
    /// Whether it counts as under way.
    counted: bool,
    /// Whether it goes to tensors on the device; and what is held there for it beside its sources.
    to_device: bool,
    on_gpu: Vec<OnGpu>,
}

impl Plan {
    fn nothing(part: &Range<usize>, miss: Miss) -> Self {
        let sources = part.clone().map(|_| Source::Gone(miss)).collect();
        Self { first: part.start, held: Vec::new(), sources, counted: false, to_device: false, on_gpu: Vec::new() }
    }
}

// What came of a block: where it came from, and how its record there is encoded.
type Taken = std::result::Result<(Tier, Option<Arc<Layout>>), Miss>;

// What a load spent, over all threads.
#[derive(Debug, Default)]
pub(super) struct Spent {
    ram_decode_ns: AtomicU64,
    ssd_decode_ns: AtomicU64,
    /// From the first read that was asked for to the last that arrived.
    pub(super) read_ns: AtomicU64,
    pub(super) read_bytes: AtomicU64,
}

fn add(to: &AtomicU64, value: u64) {
    // Relaxed: read when all threads are done.
    to.fetch_add(value, Ordering::Relaxed);
}

impl Lease {
    /// Copies the matched blocks into `view`: token i of the match to token i of the view.
    ///
    /// # Errors
    /// The view does not fit the model or covers fewer tokens than the match, or the lease was released.
    pub fn load(&self, view: &KvView) -> Result<LoadOutcome> {
        self.load_part(view, 0..self.blocks())
    }

    /// As [`Lease::load`], of some blocks of the match alone: rows of the view that belong to others are not touched.
    /// What it returns counts from the first token of the match.
    ///
    /// # Errors
    /// As there, or the match has no such blocks.
    pub fn load_part(&self, view: &KvView, part: Range<usize>) -> Result<LoadOutcome> {
        let began = Instant::now();
        let geometry = self.model.spec().geometry;
        if part.start > part.end || part.end > self.blocks() {
            let (start, end, blocks) = (part.start, part.end, self.blocks());
            return Err(input(format!("blocks {start} to {end} asked for, the match has {blocks}")));
        }
        let size = geometry.block_tokens as usize;
        check_view(&geometry, view, part.end * size)?;
        view.check_apart(&geometry, part.start * size..part.end * size)?;
        if view.is_on_device() {
            self.shared.check_device(&geometry, view)?;
        }
        let mut plan = self.plan(&part, view.is_on_device())?;
        let Plan { first, ref sources, .. } = plan;
        let unread = |source: &Source| match source {
            Source::Gone(miss) => *miss,
            _ => Miss::Closed,
        };
        let results: Vec<Mutex<Taken>> = sources.iter().map(|source| Mutex::new(Err(unread(source)))).collect();
        let spent = Spent::default();
        let begun = Instant::now();
        self.copy_from_ram(&geometry, view, &plan, &results, &spent);
        let staged: Mutex<Vec<(usize, Staged)>> = Mutex::default();
        let ram = begun.elapsed();
        let runs = runs(sources, geometry.record_bytes(), self.shared.workers.threads());
        if let Some(reads) = Reads::new(self, sources, &runs, &spent) {
            self.shared.workers.each(runs.len().min(self.shared.workers.threads()), |_| {
                loop {
                    let Some(arrived) = reads.lock().next() else { break };
                    let run = arrived.run.clone();
                    let done = self.records(sources, arrived, |n, record| match record {
                        Ok(record) => {
                            self.take_record(&geometry, (view, &staged), &sources[n], first + n, record, &spent)
                        }
                        Err(_) => Err(Miss::Io),
                    });
                    for (n, result) in run.zip(done) {
                        *results[n].lock() = result;
                    }
                }
            });
        }
        let mut results: Vec<Taken> = results.into_iter().map(Mutex::into_inner).collect();
        if view.is_on_device() {
            self.to_device(&geometry, view, &mut plan, &mut results, staged.into_inner());
        }
        let ssd = begun.elapsed() - ram;
        let outcome = self.settle(&geometry, &plan, &results, &spent, began);
        Ok(LoadOutcome { ram, ssd, ..outcome })
    }

    // The token ids that block `n` must carry.
    fn expected(&self, n: usize) -> &[u32] {
        let size = self.model.spec().geometry.block_tokens as usize;
        &self.tokens[n * size..(n + 1) * size]
    }

    // Where each block lies. Those that are still there are held one by one until `settle`: neither a release in the
    // midst of the load nor room made for a promotion takes them away.
    fn plan(&self, part: &Range<usize>, to_device: bool) -> Result<Plan> {
        let mut state = self.shared.state.lock();
        // Acquire pairs with the swap in `release`.
        if self.released.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Closed, "the match was released before this load; match again"));
        }
        state.catch_up(&self.shared.touched);
        let alive = !state.closed && state.models.contains_key(&self.model.id);
        let matched = &self.hashes[part.clone()];
        if !alive {
            return Ok(Plan::nothing(part, Miss::Closed));
        }
        if !state.begin_load(self.namespace.owner) {
            return Ok(Plan::nothing(part, Miss::Quota));
        }
        let held: Vec<NodeId> = matched.iter().map_while(|&hash| state.nodes.find(hash)).collect();
        let held = state.nodes.lease(&held).to_vec();
        let lost = self.why_lost(matched.get(held.len()));
        let mut sources = Vec::with_capacity(matched.len());
        let worthwhile = state.worthwhile(self.model.id, &held);
        for (n, &id) in held.iter().enumerate() {
            if n >= worthwhile {
                sources.push(Source::Gone(Miss::NotWorthIt));
                continue;
            }
            if to_device && let Some(held) = state.hold_on_gpu(id, self.expected(part.start + n)) {
                sources.push(Source::Gpu(held));
                continue;
            }
            let node = &state.nodes[id];
            let source = match (node.ram, node.ssd) {
                (Some(slot), _) => Source::Ram(slot, node.layout.clone()),
                (None, Some(place)) => {
                    let disk = state.models.get(&self.model.id).and_then(|m| m.disk.as_ref());
                    match disk.map(|d| (d.file.clone(), d.segments[place.segment as usize].epoch)) {
                        Some((file, epoch)) => {
                            let hash = self.shared.secret.seal(state.nodes.hash(id));
                            let again = state.alter(id, |node| {
                                node.ssd_reads += 1;
                                node.ssd_reads > 1
                            });
                            // What goes to a device goes by way of a slot.
                            let promote = match again || to_device {
                                true => state.allocate(self.namespace.owner, place.bytes() as usize, false),
                                false => None,
                            };
                            Source::Ssd { file, hash, place, epoch, promote }
                        }
                        None => Source::Gone(lost),
                    }
                }
                (None, None) => Source::Gone(lost),
            };
            sources.push(source);
        }
        sources.resize_with(matched.len(), || Source::Gone(lost));
        Ok(Plan { first: part.start, held, sources, counted: true, to_device, on_gpu: Vec::new() })
    }

    // Why a block of the match is not there any more. It was leased: so others found it bad, or had it dropped.
    fn why_lost(&self, hash: Option<&BlockHash>) -> Miss {
        let noted = || hash.map(|&hash| self.shared.gone.why(hash)).filter(|&why| why != Miss::NeverStored);
        self.forgotten().or_else(noted).unwrap_or(Miss::Evicted)
    }

    // Where a device is to have them they are only checked.
    fn copy_from_ram(&self, geometry: &Geometry, view: &KvView, plan: &Plan, results: &[Mutex<Taken>], spent: &Spent) {
        let (mut blocks, mut coded) = (Vec::new(), Vec::new());
        for (n, source) in plan.sources.iter().enumerate() {
            if let Source::Gpu(_) = source {
                *results[n].lock() = Ok((Tier::Gpu, None));
            }
            let Source::Ram(slot, layout) = source else { continue };
            let at = self.shared.arena.at(*slot);
            let length = geometry.payload_offset() - RECORD_HEADER_BYTES;
            // SAFETY: the slot is published and held by this lease; what follows its header does not change.
            let tokens = unsafe { std::slice::from_raw_parts(at.add(RECORD_HEADER_BYTES), length) };
            if !tokens_of(tokens, geometry).eq(self.expected(plan.first + n).iter().copied()) {
                *results[n].lock() = Err(Miss::Corrupt);
                continue;
            }
            *results[n].lock() = Ok((Tier::Ram, layout.clone()));
            if view.is_on_device() {
                continue;
            }
            // SAFETY: the payload lies within the slot.
            let payload = unsafe { at.add(geometry.payload_offset()) };
            let block = BlockCopy { payload, first_token: (plan.first + n) * geometry.block_tokens as usize };
            match layout {
                Some(layout) => coded.push((block, layout)),
                None => blocks.push(block),
            }
        }
        self.shared.workers.copy(geometry, view, &blocks, Direction::Scatter);
        if !coded.is_empty() {
            add(&spent.ram_decode_ns, decode_blocks(&self.shared.workers, geometry, view, &coded));
        }
    }

    // Has the device fill the caller's tensors from what was found and is right. What it cannot have ends the load.
    fn to_device(
        &self,
        geometry: &Geometry,
        view: &KvView,
        plan: &mut Plan,
        results: &mut [Taken],
        staged: Vec<(usize, Staged)>,
    ) {
        let good = results.iter().take_while(|result| result.is_ok()).count();
        let mut staged: BTreeMap<usize, Staged> = staged.into_iter().collect();
        let mut payloads = Vec::with_capacity(good);
        for (n, (source, result)) in plan.sources.iter().zip(results.iter()).take(good).enumerate() {
            let Ok((_, layout)) = result else { break };
            let payload = match source {
                Source::Gpu(held) => Payload::Gpu(*held),
                Source::Ram(slot, layout) => self.reachable((geometry, view), *slot, layout, plan.first + n),
                Source::Ssd { promote: Some(slot), .. } => {
                    self.reachable((geometry, view), *slot, layout, plan.first + n)
                }
                Source::Ssd { promote: None, .. } | Source::Gone(_) => match staged.remove(&(plan.first + n)) {
                    Some(staged) => Payload::Staged(staged),
                    None => break,
                },
            };
            payloads.push((plan.first + n, plan.held[n], payload));
        }
        let sent = self.scatter_on_device(geometry, view, &mut payloads);
        // What was on the device before is among the sources.
        for (n, _, payload) in payloads {
            if let Payload::Gpu(held) = payload
                && !matches!(plan.sources[n - plan.first], Source::Gpu(_))
            {
                plan.on_gpu.push(held);
            }
        }
        if let Err(fault) = sent {
            self.shared.failed_on_device(&fault);
            results.iter_mut().for_each(|result| *result = result.clone().and(Err(Miss::Failed)));
        }
    }

    // A block in a slot, as the device can take it: what its kernels do not decode is decoded here.
    fn reachable(
        &self,
        (geometry, view): (&Geometry, &KvView),
        slot: Slot,
        layout: &Option<Arc<Layout>>,
        n: usize,
    ) -> Payload {
        match layout {
            Some(layout) if !self.shared.takes(geometry, layout, view) => {
                let at = self.shared.arena.at(slot);
                let mut staged = Staged::new(geometry.block_bytes());
                // SAFETY: the slot is held by this load, and what follows its header does not change; the payload is as long
                // as its layout says.
                let payload =
                    unsafe { std::slice::from_raw_parts(at.add(geometry.payload_offset()), layout.bytes_of(n == 0)) };
                layout.decode_payload(payload, n == 0, staged.payload());
                Payload::Staged(staged)
            }
            _ => Payload::Slot(slot, layout.clone()),
        }
    }

    // Books what happened, promotes what was read again, and forgets what proved bad.
    fn settle(
        &self,
        geometry: &Geometry,
        plan: &Plan,
        results: &[Taken],
        spent: &Spent,
        began: Instant,
    ) -> LoadOutcome {
        let Plan { first, held, sources, counted, to_device, on_gpu } = plan;
        let good = results.iter().take_while(|r| r.is_ok()).count();
        let (model, owner) = (self.model.id, self.namespace.owner);
        // Dropped behind the lock.
        let mut gone = None;
        let mut state = self.shared.state.lock();
        if *counted {
            state.end_load(owner);
        }
        let before = sources.iter().filter_map(|source| if let Source::Gpu(held) = source { Some(held) } else { None });
        before.chain(on_gpu).for_each(|held| gone = state.let_go_on_gpu(held, Ticket::NONE).or(gone.take()));
        for (n, (source, result)) in sources.iter().zip(results).enumerate() {
            // It may have been unlinked meanwhile.
            let linked = held.get(n).copied().filter(|&id| state.nodes.is_linked(id));
            if let Source::Ssd { promote: Some(slot), .. } = source {
                match (linked.filter(|&id| state.nodes[id].ram.is_none()), result) {
                    (Some(id), Ok((_, layout))) => {
                        state.place_in_ram(id, *slot, layout.clone());
                        state.owners.counts(owner).promoted += 1;
                    }
                    _ => state.free(*slot),
                }
            }
            if n > good {
                continue;
            }
            let counts = state.owners.counts(owner);
            if *to_device {
                counts.asked_tier(Tier::Gpu, matches!(source, Source::Gpu(_)) && result.is_ok());
            }
            match (source, result) {
                (Source::Gpu(_), _) => {}
                (Source::Ram(..), _) => counts.asked_tier(Tier::Ram, result.is_ok()),
                (Source::Ssd { .. }, _) => {
                    counts.asked_tier(Tier::Ram, false);
                    counts.asked_tier(Tier::Ssd, result.is_ok());
                }
                (Source::Gone(_), _) => {
                    counts.asked_tier(Tier::Ram, false);
                    counts.asked_tier(Tier::Ssd, false);
                }
            }
            if let Ok((tier, Some(_))) = result {
                counts.tier(*tier).decoded_bytes += geometry.block_bytes() as u64;
                if let Source::Ssd { place, .. } = source {
                    counts.tier(*tier).saved_bytes += (geometry.record_bytes() as u64).saturating_sub(place.bytes());
                }
            }
            // What was gone before was counted by who found it so.
            if let (Source::Ram(..) | Source::Ssd { .. }, Err(miss @ (Miss::Corrupt | Miss::Io))) = (source, result) {
                counts.corrupt += u64::from(*miss == Miss::Corrupt);
                counts.io_errors += u64::from(*miss == Miss::Io);
                if let Some(id) = linked {
                    state.drop_subtree(id, *miss);
                }
            }
        }
        state.nodes.release(held);
        if state.has_work() {
            self.shared.work.notify_all();
        }
        let tokens = (first + good) * geometry.block_tokens as usize;
        let counts = state.owners.counts(owner);
        counts.loaded_tokens += (good * geometry.block_tokens as usize) as u64;
        counts.loaded_bytes += (good * geometry.block_bytes()) as u64;
        // Relaxed: all threads are done.
        let load = |spent: &AtomicU64| spent.load(Ordering::Relaxed);
        counts.tier(Tier::Ram).decode_ns += load(&spent.ram_decode_ns);
        let ssd = counts.tier(Tier::Ssd);
        ssd.decode_ns += load(&spent.ssd_decode_ns);
        ssd.read_ns += load(&spent.read_ns);
        ssd.read_bytes += load(&spent.read_bytes);
        if let Some(books) = state.models.get_mut(&model) {
            books.read_rate.note(load(&spent.read_bytes), load(&spent.read_ns));
        }
        let places = results[..good].iter().flatten().map(|(tier, _)| *tier).collect();
        let miss = results.get(good).and_then(|r| r.as_ref().err().copied());
        let computed_s = state.models.get(&model).and_then(|books| books.computed_s);
        let counts = state.owners.counts(owner);
        counts.saved_ns += computed_s.map_or(0, |seconds| (1e9 * seconds * good as f64) as u64);
        if let Some(why) = miss {
            counts.unloaded[why as usize] += (results.len() - good) as u64;
            counts.not_worth_it += u64::from(why == Miss::NotWorthIt);
        }
        counts.loads += 1;
        counts.load_ns += began.elapsed().as_nanos() as u64;
        LoadOutcome { tokens, places, miss, ram: Duration::ZERO, ssd: Duration::ZERO }
    }
}

impl Lease {
    // Checks one record, and copies it to the caller.
    fn take_record(
        &self,
        geometry: &Geometry,
        (view, staged): (&KvView, &Mutex<Vec<(usize, Staged)>>),
        source: &Source,
        n: usize,
        record: &[u8],
        spent: &Spent,
    ) -> Taken {
        let Source::Ssd { file, hash, epoch, promote, .. } = source else { return Err(Miss::Closed) };
        let (block, form) = read_record(record, geometry, &file.identity(*epoch))
            .filter(|(block, form)| {
                block.hash == *hash
                    && block.depth as usize == n
                    && record.len() == geometry.record_bytes_of(form.payload_bytes)
                    && tokens_of(&record[RECORD_HEADER_BYTES..], geometry).eq(self.expected(n).iter().copied())
            })
            .ok_or(Miss::Corrupt)?;
        // An encoded block is of the form that its layout gives it, or none at all.
        let layout = match &form.scheme {
            Some(_) => Some(file.layout_of(&form, block.depth).ok_or(Miss::Corrupt)?),
            None => None,
        };
        let payload = &record[geometry.payload_offset()..][..form.payload_bytes];
        let (first_token, planes) = (n * geometry.block_tokens as usize, 0..geometry.plane_count());
        if view.is_on_device() {
            if promote.is_none() {
                let mut plain = Staged::new(geometry.block_bytes());
                match &layout {
                    Some(layout) => layout.decode_payload(payload, n == 0, plain.payload()),
                    None => plain.payload().copy_from_slice(payload),
                }
                staged.lock().push((n, plain));
            }
            return Ok((Tier::Ssd, layout));
        }
        match &layout {
            Some(layout) => {
                add(&spent.ssd_decode_ns, decode_planes(geometry, view, layout, payload, first_token, planes));
            }
            None => {
                let block = BlockCopy { payload: payload.as_ptr().cast_mut(), first_token };
                copy_planes(geometry, view, block, planes, Direction::Scatter);
            }
        }
        Ok((Tier::Ssd, layout))
    }
}
