//! Loading a match: per block, from the cheapest tier that has it, straight into the caller's tensors.
//!
//! RAM blocks are scattered from their slots; SSD records are read in runs of neighbours, checked and scattered, in
//! parallel. A block read from SSD for the second time is copied to a slot as well, and stays in RAM. The first block
//! that fails ends the load: everything before it is valid, nothing after it is.

use super::{Lease, check_view};
use crate::block::{Geometry, RECORD_HEADER_BYTES, Sealed};
use crate::copy::{BlockCopy, Direction, KvView, copy_planes};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Slot;
use crate::ssd::record::{read_record, tokens_of};
use crate::ssd::{ModelFile, Place};
use crate::stats::{Miss, Tier};
use crate::sync::{Arc, Mutex, Ordering};
use crate::trie::NodeId;
use std::ops::Range;

/// What a load did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOutcome {
    /// Tokens now valid in the caller's tensors.
    pub tokens: usize,
    /// Where each loaded block came from.
    pub places: Vec<Tier>,
    /// Why the load ended before the match did.
    pub miss: Option<Miss>,
}

// Where one block will be read from.
enum Source {
    Ram(Slot),
    Ssd { file: Arc<ModelFile>, hash: Sealed, place: Place, epoch: u64, promote: Option<Slot> },
    Gone(Miss),
}

impl Lease {
    /// Copies the matched blocks into `view`: token i of the match to token i of the view.
    ///
    /// # Errors
    /// The view does not fit the model or covers fewer tokens than the match, or the lease was released.
    pub fn load(&self, view: &KvView) -> Result<LoadOutcome> {
        let geometry = self.model.spec().geometry;
        check_view(&geometry, view, self.tokens.len())?;
        let (held, sources) = self.plan()?;
        let results: Vec<Mutex<std::result::Result<Tier, Miss>>> =
            sources.iter().map(|_| Mutex::new(Err(Miss::Closed))).collect();
        self.copy_from_ram(&geometry, view, &sources, &results);
        let runs = runs(&sources, geometry.record_bytes(), self.shared.workers.threads());
        self.shared.workers.each(runs.len(), |i| {
            let done = self.read_run(&geometry, view, &sources[runs[i].clone()], runs[i].start);
            for (n, result) in runs[i].clone().zip(done) {
                *results[n].lock() = result;
            }
        });
        let results: Vec<_> = results.iter().map(|r| *r.lock()).collect();
        Ok(self.settle(&geometry, &held, &sources, &results))
    }

    // The token ids that block `n` must carry.
    fn expected(&self, n: usize) -> &[u32] {
        let size = self.model.spec().geometry.block_tokens as usize;
        &self.tokens[n * size..(n + 1) * size]
    }

    // Where each block lies. Those that are still there are held one by one until `settle`: neither a release in the
    // midst of the load nor room made for a promotion takes them away.
    fn plan(&self) -> Result<(Vec<NodeId>, Vec<Source>)> {
        let mut state = self.shared.state.lock();
        // Acquire pairs with the swap in `release`.
        if self.released.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Closed, "the match was released before this load; match again"));
        }
        state.catch_up(&self.shared.touched);
        let alive = !state.closed && state.models.contains_key(&self.model.id);
        let matched = &self.hashes[..self.blocks()];
        if !alive {
            return Ok((Vec::new(), matched.iter().map(|_| Source::Gone(Miss::Closed)).collect()));
        }
        let held: Vec<NodeId> = matched.iter().map_while(|&hash| state.nodes.find(hash)).collect();
        let held = state.nodes.lease(&held).to_vec();
        let lost = self.forgotten().unwrap_or(Miss::Evicted);
        let mut sources = Vec::with_capacity(matched.len());
        for &id in &held {
            let node = &state.nodes[id];
            let source = match (node.ram, node.ssd) {
                (Some(slot), _) => Source::Ram(slot),
                (None, Some(place)) => {
                    let disk = state.models.get(&self.model.id).and_then(|m| m.disk.as_ref());
                    match disk.map(|d| (d.file.clone(), d.segments[place.segment as usize].epoch)) {
                        Some((file, epoch)) => {
                            let hash = self.shared.secret.seal(state.nodes.hash(id));
                            let again = state.alter(id, |node| {
                                node.ssd_reads += 1;
                                node.ssd_reads > 1
                            });
                            let promote = if again { state.allocate(self.model.id, false) } else { None };
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
        Ok((held, sources))
    }

    fn copy_from_ram(
        &self,
        geometry: &Geometry,
        view: &KvView,
        sources: &[Source],
        results: &[Mutex<std::result::Result<Tier, Miss>>],
    ) {
        let mut blocks = Vec::new();
        for (n, source) in sources.iter().enumerate() {
            let Source::Ram(slot) = source else { continue };
            let at = self.shared.arena.at(*slot);
            let length = geometry.payload_offset() - RECORD_HEADER_BYTES;
            // SAFETY: the slot is published and held by this lease; what follows its header does not change.
            let tokens = unsafe { std::slice::from_raw_parts(at.add(RECORD_HEADER_BYTES), length) };
            if !tokens_of(tokens, geometry).eq(self.expected(n).iter().copied()) {
                *results[n].lock() = Err(Miss::Corrupt);
                continue;
            }
            *results[n].lock() = Ok(Tier::Ram);
            // SAFETY: the payload lies within the slot.
            let payload = unsafe { at.add(geometry.payload_offset()) };
            blocks.push(BlockCopy { payload, first_token: n * geometry.block_tokens as usize });
        }
        self.shared.workers.copy(geometry, view, &blocks, Direction::Scatter);
    }

    // Books what happened, promotes what was read again, and forgets what proved bad.
    fn settle(
        &self,
        geometry: &Geometry,
        held: &[NodeId],
        sources: &[Source],
        results: &[std::result::Result<Tier, Miss>],
    ) -> LoadOutcome {
        let good = results.iter().take_while(|r| r.is_ok()).count();
        let model = self.model.id;
        let mut state = self.shared.state.lock();
        for (n, (source, result)) in sources.iter().zip(results).enumerate() {
            // It may have been unlinked meanwhile.
            let linked = held.get(n).copied().filter(|&id| state.nodes.is_linked(id));
            if let Source::Ssd { promote: Some(slot), .. } = source {
                match linked.filter(|&id| result.is_ok() && state.nodes[id].ram.is_none()) {
                    Some(id) => {
                        state.place_in_ram(id, *slot);
                        state.counts(model).promoted += 1;
                    }
                    None => state.ram.pool.free(*slot),
                }
            }
            if n > good {
                continue;
            }
            let counts = state.counts(model);
            match (source, result) {
                (Source::Ram(_), _) => counts.asked_tier(Tier::Ram, result.is_ok()),
                (Source::Ssd { .. }, _) => {
                    counts.asked_tier(Tier::Ram, false);
                    counts.asked_tier(Tier::Ssd, result.is_ok());
                }
                (Source::Gone(_), _) => {
                    counts.asked_tier(Tier::Ram, false);
                    counts.asked_tier(Tier::Ssd, false);
                }
            }
            if let Err(miss) = result {
                counts.corrupt += u64::from(*miss == Miss::Corrupt);
                counts.io_errors += u64::from(*miss == Miss::Io);
                if let Some(id) = linked.filter(|_| !matches!(source, Source::Gone(_))) {
                    state.drop_subtree(id);
                }
            }
        }
        state.nodes.release(held);
        let tokens = good * geometry.block_tokens as usize;
        let counts = state.counts(model);
        counts.loaded_tokens += tokens as u64;
        counts.loaded_bytes += (good * geometry.block_bytes()) as u64;
        let places = results[..good].iter().filter_map(|r| r.ok()).collect();
        LoadOutcome { tokens, places, miss: results.get(good).and_then(|r| r.err()) }
    }
}

/// One read is at most this long, unless one record is longer.
const RUN_BYTES: usize = 4 << 20;

// Blocks that lie below RAM, in runs of neighbouring records: long enough for the disk, and enough for all threads.
fn runs(sources: &[Source], record_bytes: usize, threads: usize) -> Vec<Range<usize>> {
    let below = sources.iter().filter(|s| !matches!(s, Source::Ram(_))).count();
    let most = (below * record_bytes / (2 * threads)).clamp(record_bytes, RUN_BYTES.max(record_bytes)) / record_bytes;
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (n, source) in sources.iter().enumerate() {
        match (source, runs.last_mut()) {
            (Source::Ram(_), _) => {}
            (Source::Ssd { place, .. }, Some(run))
                if run.end == n
                    && run.len() < most
                    && matches!(&sources[n - 1], Source::Ssd { place: before, .. } if before.is_before(place)) =>
            {
                run.end += 1;
            }
            _ => runs.push(n..n + 1),
        }
    }
    runs
}

impl Lease {
    // Reads neighbouring records at once; then checks and copies each. `first` is the first one's place in the match.
    fn read_run(
        &self,
        geometry: &Geometry,
        view: &KvView,
        sources: &[Source],
        first: usize,
    ) -> Vec<std::result::Result<Tier, Miss>> {
        let all = |miss| vec![Err(miss); sources.len()];
        let (file, place) = match &sources[0] {
            Source::Ssd { file, place, .. } => (file, *place),
            Source::Gone(miss) => return all(*miss),
            Source::Ram(_) => return all(Miss::Closed),
        };
        let lengths = sources.iter().map(|source| match source {
            Source::Ssd { place, .. } => place.bytes() as usize,
            _ => 0,
        });
        let (bytes, all_bytes) = (geometry.record_bytes(), lengths.clone().sum());
        let Some(ssd) = &self.shared.ssd else { return all(Miss::Closed) };
        let Ok(mut buffer) = ssd.scratch(RUN_BYTES.max(bytes).max(all_bytes)) else { return all(Miss::Io) };
        let results = match file.read_records(place, &mut buffer[..all_bytes]) {
            Ok(length) => {
                let mut rest = &buffer[..length];
                let numbered = sources.iter().zip(lengths).enumerate();
                numbered
                    .map(|(i, (source, bytes))| {
                        let record = rest.split_off(..bytes.min(rest.len())).unwrap_or_default();
                        self.take_record(geometry, view, source, first + i, record)
                    })
                    .collect()
            }
            // One bad sector must not cost its neighbours.
            Err(_) if sources.len() > 1 => {
                (0..sources.len()).flat_map(|i| self.read_run(geometry, view, &sources[i..=i], first + i)).collect()
            }
            Err(_) => all(Miss::Io),
        };
        ssd.give_back(buffer);
        results
    }

    // Checks one record, copies it to the caller and, for a promotion, to its slot.
    fn take_record(
        &self,
        geometry: &Geometry,
        view: &KvView,
        source: &Source,
        n: usize,
        record: &[u8],
    ) -> std::result::Result<Tier, Miss> {
        let Source::Ssd { file, hash, epoch, promote, .. } = source else { return Err(Miss::Closed) };
        let (block, form) = read_record(record, geometry, &file.identity(*epoch))
            .filter(|(block, form)| {
                block.hash == *hash
                    && record.len() == geometry.record_bytes_of(form.payload_bytes)
                    && tokens_of(&record[RECORD_HEADER_BYTES..], geometry).eq(self.expected(n).iter().copied())
            })
            .ok_or(Miss::Corrupt)?;
        let slot = promote.map(|slot| {
            // SAFETY: the slot was allocated for this load and is not published: this thread alone has it. It is as
            // long as a record.
            unsafe { std::slice::from_raw_parts_mut(self.shared.arena.at(slot), geometry.record_bytes()) }
        });
        let scatter = |payload: &[u8]| {
            let payload = payload.as_ptr().cast_mut();
            let block = BlockCopy { payload, first_token: n * geometry.block_tokens as usize };
            copy_planes(geometry, view, block, 0..geometry.plane_count(), Direction::Scatter);
        };
        let (payload_at, plain_end) = (geometry.payload_offset(), geometry.payload_offset() + geometry.block_bytes());
        if form.scheme.is_none() {
            if let Some(slot) = slot {
                slot.copy_from_slice(record);
            }
            scatter(&record[payload_at..plain_end]);
            return Ok(Tier::Ssd);
        }
        let layout = file.layout_of(&form, block.depth).ok_or(Miss::Corrupt)?;
        let first = block.depth == 0;
        let encoded = &record[payload_at..payload_at + form.payload_bytes];
        match (slot, &self.shared.ssd) {
            // In RAM it stands decoded; its record on SSD stays, and so it is not encoded again.
            (Some(slot), _) => {
                slot[..payload_at].copy_from_slice(&record[..payload_at]);
                slot[plain_end..].fill(0);
                layout.decode_payload(encoded, first, &mut slot[payload_at..plain_end]);
                scatter(&slot[payload_at..plain_end]);
            }
            (None, Some(ssd)) => {
                let mut plain = ssd.scratch(geometry.block_bytes()).map_err(|_| Miss::Io)?;
                layout.decode_payload(encoded, first, &mut plain[..geometry.block_bytes()]);
                scatter(&plain[..geometry.block_bytes()]);
                ssd.give_back(plain);
            }
            (None, None) => return Err(Miss::Closed),
        }
        Ok(Tier::Ssd)
    }
}
