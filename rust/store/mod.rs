//! The store: what a request calls.
//!
//! ```text
//!            match ─▶ Lease ─▶ load ─▶ tokens valid in the caller's tensors, and why not more
//!  tokens ──▶│
//!            put ─▶ slots in RAM, findable ─ ─ ─(behind)─ ─ ─▶ records on SSD
//! ```
//! A match takes no lock: it asks the index, counts, and leaves a note of what it touched. The lock is held for
//! bookkeeping only: hashing, copying, reading and writing happen outside of it. A block is published after its bytes
//! are complete, and its bytes never change afterwards. Lock order: registration, a model's namespaces, the epochs, the
//! store's state, a scratch list.

mod behind;
mod coding;
mod demote;
mod divide;
mod events;
mod gone;
mod gpu;
mod lease;
mod lift;
mod listing;
mod load;
mod model;
mod namespace;
mod nodes;
mod owners;
mod promote;
mod put;
mod quota;
mod read;
mod recover;
mod room;
mod sequence;
mod share;
mod slots;
mod state;
mod transfer;
mod view;
mod worth;
mod write;

pub use behind::{Kind as WorkKind, Work};
pub use divide::{Divisible, Share};
pub use events::{Event, Events};
pub use gpu::{GpuOptions, SlabOptions};
pub use lease::Lease;
pub use listing::Prefix;
pub use load::LoadOutcome;
pub use model::{Model, ModelSpec};
pub use put::PutOutcome;
pub use quota::{Quota, TierQuota};
pub use sequence::Sequence;
pub use share::Admitted;
pub use view::{BlockView, DeviceView, HandedOut};

use crate::arena::{Arena, HUGE_PAGE, Pages};
use crate::block::{Geometry, Secret};
use crate::codec::Isa;
use crate::copy::KvView;
use crate::error::{Error, ErrorKind, Result, input};
use crate::evict::{Curve, Kind};
use crate::pool::Holding;
use crate::ssd::io::{Engine, FileIo, Io};
use crate::ssd::record::MAX_NAME_BYTES;
use crate::ssd::{Ssd, SsdOptions, Stale};
use crate::stats::{Counts, Snapshot, Tier};
use crate::sync::{Arc, AtomicBool, Condvar, Home, Mutex, Ordering};
use crate::trie::Trie;
use crate::workers::Workers;
use demote::Pace;
use gone::Gone;
use lease::{Missed, Touched};
use namespace::Epochs;
use owners::Sums;
use quota::Account;
use state::{Disk, FILE_HEAD_BYTES, ModelState, State};
use std::collections::{BTreeMap, VecDeque};
use std::thread::JoinHandle;
use worth::ReadRate;

/// When blocks are written to SSD.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WritePolicy {
    /// When RAM runs out of blocks that may leave it.
    #[default]
    WriteBack,
    /// As soon as they are put, behind the request.
    WriteThrough,
    /// As soon as they are asked for again; what nobody asks for again is never written.
    WriteThroughSecondTouch,
}

impl WritePolicy {
    /// By its name: `write_back`, `write_through` or `write_through_second_touch`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "write_back" => Ok(Self::WriteBack),
            "write_through" => Ok(Self::WriteThrough),
            "write_through_second_touch" => Ok(Self::WriteThroughSecondTouch),
            _ => {
                let valid = "write_back, write_through, write_through_second_touch";
                Err(Error::new(ErrorKind::Config, format!("ssd.policy is {name:?}, expected one of {valid}")))
            }
        }
    }
}

/// Settings of a store.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of the RAM tier.
    pub ram_capacity_bytes: u64,
    /// The SSD tier, if there is one.
    pub ssd: Option<SsdOptions>,
    /// The order in which blocks leave RAM.
    pub eviction: Kind,
    /// When blocks go to SSD.
    pub policy: WritePolicy,
    /// What block hashes are keyed with. Without one the SSD directory's own is used, or a random one.
    pub secret: Option<String>,
    /// Threads for copies and reads, the caller's included; 0 means one per core.
    pub threads: usize,
    /// Memory that the index may take; it is used as blocks come. `None`: enough for blocks of 16 KiB in all tiers.
    pub index_bytes: Option<u64>,
    /// The GPU tier, if there is one.
    pub gpu: Option<GpuOptions>,
    /// Demotion has no thread: it happens in [`Store::step`], [`Store::flush`] and [`Store::close`] alone, where they are
    /// called. For simulations, which so take the same course every time.
    pub stepped: bool,
}

/// The index has room for blocks of this size in every tier, unless it is told otherwise.
const INDEXED_BYTES: u64 = 16 << 10;
/// Sequences that are forgotten in one use of the lock.
const SOME: usize = 256;

/// What the threads of a store share.
#[derive(Debug)]
struct Shared {
    trie: Arc<Trie>,
    touched: Touched,
    missed: Missed,
    behind: behind::Behind,
    gone: Arc<Gone>,
    closed: AtomicBool,
    state: Mutex<State>,
    /// Held while a model's file comes, goes or shrinks: the one lock that is held across I/O, and never by a request.
    registration: Mutex<()>,
    /// Which namespaces were dropped.
    epochs: Mutex<Epochs>,
    /// Wakes the demotion thread.
    work: Condvar,
    /// Wakes those who wait for it.
    idle: Condvar,
    /// Before the arena: it knows its memory.
    gpu: Option<gpu::Link>,
    arena: Arena,
    ssd: Option<Ssd>,
    secret: Secret,
    workers: Workers,
    home: Home,
}

/// A multi-tier KV cache of one process.
#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    demoter: Mutex<Option<JoinHandle<()>>>,
    /// It has no such thread.
    stepped: bool,
    no_gpu: Option<String>,
}

impl Store {
    /// Opens a store on the real file system.
    ///
    /// # Errors
    /// The directory is locked, not writable, of another version or secret; io_uring was asked for, and is refused; memory
    /// cannot be had; or
    /// `STRATAKV_CODEC_ISA` names what the processor does not have.
    pub fn open(options: Options) -> Result<Self> {
        let engine = options.ssd.as_ref().map_or(Engine::Pread, |ssd| ssd.engine);
        Self::open_on(options, Arc::new(FileIo::new(engine)?))
    }

    /// Opens a store on any file system.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(options: Options, io: Arc<dyn Io>) -> Result<Self> {
        Isa::asked()?;
        let given = options.secret.as_deref();
        let (ssd, secret, epochs) = match &options.ssd {
            Some(ssd) => {
                let (ssd, secret, epochs) = Ssd::open(ssd, io, given)?;
                (Some(ssd), secret, epochs)
            }
            None => {
                let secret = Secret::new(&given.map_or_else(random_bytes, |s| Ok(s.as_bytes().to_vec()))?);
                (None, secret, Vec::new())
            }
        };
        let stale = ssd.as_ref().map_or_else(|| Ok(Vec::new()), Ssd::stale_files)?;
        let arena = match usize::try_from(options.ram_capacity_bytes) {
            Ok(bytes @ 1..) => Arena::new(bytes)?,
            _ => {
                let message = format!("ram.capacity_bytes is {}, expected a positive size", options.ram_capacity_bytes);
                return Err(Error::new(ErrorKind::Config, message));
            }
        };
        let all_bytes = arena.bytes() as u64 + ssd.as_ref().map_or(0, Ssd::capacity_bytes);
        let blocks = options.index_bytes.map_or((all_bytes / INDEXED_BYTES).max(1 << 16), Trie::blocks_in);
        let trie = Arc::new(Trie::new(blocks as usize)?);
        let gone = Arc::new(Gone::default());
        let mut state = State::new((trie.clone(), gone.clone()), &options, arena.bytes(), ssd.as_ref(), stale);
        let workers = Workers::new(options.threads)?;
        let opened = options.gpu.as_ref().map(|options| gpu::open(options, arena.start(), arena.bytes()));
        let no_gpu = opened.as_ref().and_then(|opened| Some(opened.as_ref().err()?.to_string()));
        let link = opened.and_then(std::result::Result::ok).map(|(link, gpu)| {
            state.gpu = Some(gpu);
            link
        });
        if let Some(ssd) = &ssd {
            room::fit_stale_files(&mut state, ssd)?;
        }
        let shared = Arc::new(Shared {
            trie,
            touched: Touched::default(),
            missed: Missed::default(),
            behind: behind::Behind::default(),
            gone,
            closed: AtomicBool::new(false),
            state: Mutex::new(state),
            registration: Mutex::default(),
            epochs: Mutex::new(Epochs::new(epochs)),
            work: Condvar::default(),
            idle: Condvar::default(),
            gpu: link,
            arena,
            ssd,
            secret,
            workers,
            home: Home::default(),
        });
        let thread = std::thread::Builder::new().name("stratakv-demote".into());
        let begin = || {
            let shared = shared.clone();
            thread.spawn(move || shared.demote()).map_err(|e| Error::io("cannot start the demotion thread", e))
        };
        let demoter = (!options.stepped).then(begin).transpose()?;
        Ok(Self { shared, demoter: Mutex::new(demoter), stepped: options.stepped, no_gpu })
    }

    /// Why there is no GPU tier, though one was asked for: the device has no room, or does not know RAM's memory.
    pub fn no_gpu(&self) -> Option<&str> {
        self.no_gpu.as_deref()
    }

    /// Demotes as much as is done between two looks at what was asked for; whether there was anything to do. For a store
    /// whose demotion has no thread.
    ///
    /// # Errors
    /// The store is closed.
    pub fn step(&self) -> Result<bool> {
        let (_state, pace) = self.shared.step(self.shared.open_state()?);
        Ok(pace == Pace::Busy)
    }

    /// Registers a model and recovers what its file holds.
    ///
    /// # Errors
    /// A geometry or name that makes no sense, a tier smaller than one block, a name that is taken, or a file of
    /// another format version.
    pub fn register(&self, spec: ModelSpec) -> Result<Arc<Model>> {
        self.register_with(spec, Quota::default())
    }

    /// As [`register`](Self::register), with a quota from the start.
    ///
    /// # Errors
    /// As there, or as [`set_model_quota`](Self::set_model_quota); then its file is as it was.
    pub fn register_with(&self, spec: ModelSpec, quota: Quota) -> Result<Arc<Model>> {
        let ModelSpec { name, weights_version, geometry } = &spec;
        geometry.validate()?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES || weights_version.len() > MAX_NAME_BYTES {
            return Err(input(format!(
                "model name {name:?}: expected 1 to {MAX_NAME_BYTES} bytes, as for its version"
            )));
        }
        quota.check(name, geometry, self.shared.ssd.as_ref().map(Ssd::segment_bytes))?;
        let fingerprint = self.shared.secret.fingerprint(name, weights_version, geometry);
        let _registration = self.shared.registration.lock();
        let mut state = self.shared.open_state()?;
        if state.models.values().any(|m| &m.name == name) {
            return Err(Error::new(ErrorKind::ModelExists, format!("model {name:?} is registered already")));
        }
        if !state.ram.pool.fits(geometry.record_bytes()) {
            return Err(Error::new(
                ErrorKind::Config,
                format!(
                    "ram.capacity_bytes is {}, below one block of model {name:?}: expected at least {}",
                    self.shared.arena.bytes(),
                    geometry.record_bytes()
                ),
            ));
        }
        let record = geometry.record_bytes() as u64;
        let all_bytes = state.ram_bytes + state.ssd_capacity_bytes;
        let id = state.next_model;
        state.next_model += 1;
        let owner = state.owner(id, record, 0, None);
        // The name is taken from here on; the file is read without the lock.
        state.models.insert(
            id,
            ModelState {
                name: name.clone(),
                geometry: *geometry,
                shares: None,
                turn: 0,
                curve: Curve::new(all_bytes / record, geometry.block_tokens),
                wants: None,
                refused: false,
                holding: Holding::new(id),
                classes: BTreeMap::new(),
                slot_bytes_held: 0,
                account: Account::new(quota),
                owner: owner.0,
                disk: None,
                hot: None,
                cold: None,
                bounds: None,
                dirty: VecDeque::new(),
                read_rate: ReadRate::default(),
                computed_s: None,
                dirty_blocks: 0,
                queued_blocks: 0,
            },
        );
        drop(state);
        let recovered = self.shared.ssd.as_ref().map(|ssd| {
            let path = ssd.path_of(fingerprint);
            if self.shared.state.lock().stale.iter().any(|s| s.unwanted && s.path == path) {
                let failed = |e| Error::io(format!("cannot remove {}, which was unregistered", path.display()), e);
                ssd.shrink(&path, 0).map_err(failed)?;
            }
            if !path.exists() {
                self.shared.make_room(FILE_HEAD_BYTES);
            }
            let file = ssd.open_model(fingerprint, *geometry, name, weights_version)?;
            let bounds = file.calibration().map_err(|e| Error::io(format!("cannot read {}", path.display()), e))?;
            let segments = file.recover()?;
            let chance = getrandom::u32().map_err(|e| Error::io("no random numbers from the system", e))?;
            Ok((Arc::new(file), bounds, segments, u64::from(chance)))
        });
        let epochs = self.shared.epochs.lock().clone();
        let mut state = self.shared.state.lock();
        if state.closed {
            state.forget_model(id);
            return Err(Error::new(ErrorKind::Closed, "the store was closed meanwhile; open it again"));
        }
        match recovered {
            Some(Ok((file, bounds, segments, chance))) => {
                if let Some(books) = state.models.get_mut(&id) {
                    books.bounds = bounds;
                }
                state.stale.retain(|s| s.path != file.path());
                state.adopt(id, file, segments, chance, &self.shared.secret, &epochs);
                drop(state);
                self.shared.make_room(0);
            }
            Some(Err(e)) => {
                state.forget_model(id);
                // What lies there counts.
                if let Some(ssd) = &self.shared.ssd {
                    let path = ssd.path_of(fingerprint);
                    let known = state.stale.iter().any(|s| s.path == path);
                    state.stale.extend(Stale::at(path).filter(|_| !known));
                }
                return Err(e);
            }
            None => drop(state),
        }
        let model = Model::new(id, spec, &self.shared.secret, &epochs, owner);
        self.shared.state.lock().nodes.name(model.namespace(&self.shared, "", "").hasher.seed(), "", "");
        Ok(Arc::new(model))
    }

    /// Forgets a model: its blocks, its share and its file. Its leases stay safe, and load nothing more.
    ///
    /// # Errors
    /// The model is not registered; or its file cannot be removed: it is forgotten all the same, and its file is in the
    /// way of a model that is registered as this one was.
    pub fn unregister(&self, model: &Model) -> Result<()> {
        let _registration = self.shared.registration.lock();
        let state = self.shared.open_state()?;
        if !state.models.contains_key(&model.id) {
            let name = &model.spec.name;
            return Err(Error::new(ErrorKind::ModelNotFound, format!("model {name:?} is not registered")));
        }
        model.end();
        // Nothing is added to it any more.
        let seeds = state.nodes.seeds_of(model.id);
        drop(state);
        self.shared.forget(&seeds);
        let state = self.shared.state.lock();
        let file = state.models.get(&model.id).and_then(|m| Some(m.disk.as_ref()?.file.clone()));
        drop(state);
        let (mut left, mut removed) = (None, Ok(0));
        if let (Some(ssd), Some(file)) = (&self.shared.ssd, file) {
            let path = file.path();
            removed = ssd.shrink(path, 0).map_err(|e| Error::io(format!("cannot remove {}", path.display()), e));
            left = Stale::at(path.to_owned()).map(|stale| Stale { unwanted: true, ..stale });
        }
        let mut state = self.shared.state.lock();
        state.stale.extend(left);
        state.forget_model(model.id);
        state.ram.pool.settle();
        removed.map(drop)
    }

    /// Waits until every block put so far was written to SSD, and is durable. Under a cap below the size of RAM the
    /// coldest of them have made room again. Without an SSD tier there is nothing to wait for.
    ///
    /// # Errors
    /// The SSD takes no writes, or not all of them.
    pub fn flush(&self) -> Result<()> {
        let mut state = self.shared.open_state()?;
        if self.shared.ssd.is_none() {
            return Ok(());
        }
        state.catch_up(&self.shared.touched);
        state.flushing += 1;
        // Asked for: a disk that failed a moment ago may take writes again.
        state.ssd_read_only = None;
        self.shared.work.notify_all();
        let last_ticket = state.last_ticket;
        while !state.closed && state.ssd_read_only.is_none() && state.demoting(last_ticket) {
            if !self.stepped {
                state = self.shared.idle.wait(state);
                continue;
            }
            let (then, pace) = self.shared.step(state);
            state = then;
            let done = pace == Pace::Busy || state.ssd_read_only.is_some() || !state.demoting(last_ticket);
            assert!(done, "blocks wait to be written, and nothing is done for them");
        }
        state.flushing -= 1;
        let (failed, left) = (
            state.ssd_read_only.as_ref().map(|(reason, _)| reason.clone()),
            state.models.values().map(|m| m.dirty_blocks).sum::<u64>(),
        );
        let files: Vec<_> =
            state.models.values().filter_map(|m| m.disk.as_ref()).map(|disk| disk.file.clone()).collect();
        drop(state);
        if let Some(reason) = failed {
            return Err(Error::new(ErrorKind::Io, format!("{left} blocks are not on SSD: {reason}")));
        }
        for file in files {
            file.sync().map_err(|e| Error::io("cannot make the SSD tier durable", e))?;
        }
        Ok(())
    }

    /// Has the system back all of RAM with memory, so that no put waits for that. Ends early where the store is closed or
    /// the system has no more.
    pub fn prefault(&self) {
        for offset in (0..self.shared.arena.bytes()).step_by(HUGE_PAGE) {
            if self.shared.check_open().is_err() || !self.shared.arena.populate(offset) {
                return;
            }
        }
    }

    /// Writes what is not on SSD yet, seals the segments and gives the directory back. Closing twice does nothing.
    ///
    /// # Errors
    /// Not everything could be written; the store is closed all the same.
    pub fn close(&self) -> Result<()> {
        if !self.shared.home.is_here() || self.shared.state.lock().closed {
            return Ok(());
        }
        let flushed = self.flush();
        self.stop();
        let _registration = self.shared.registration.lock();
        let mut state = self.shared.state.lock();
        let ids: Vec<u32> = state.models.keys().copied().collect();
        let footers: Vec<_> =
            ids.into_iter().filter_map(|id| demote::seal_open_segment(&mut state, id, None)).collect();
        for model in state.models.values_mut() {
            model.disk = None;
        }
        let slab = state.close_gpu();
        drop(state);
        drop(slab);
        // A footer only saves recovery time: without it the records are walked.
        let sealed = footers.iter().try_for_each(|f| f.write().and_then(|()| f.file.sync()));
        if let Some(ssd) = &self.shared.ssd {
            ssd.unlock();
        }
        flushed.and(sealed.map_err(|e| Error::io("cannot seal the open segments", e)))
    }

    fn stop(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.state.lock().closed = true;
        self.shared.work.notify_all();
        self.shared.idle.notify_all();
        if let Some(demoter) = self.demoter.lock().take() {
            // Its result says nothing: a panic has been caught, and printed.
            drop(demoter.join());
        }
    }

    /// All counters at one instant.
    pub fn snapshot(&self) -> Snapshot {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        state.catch_up(&shared.touched);
        let Sums { models: mut sums, tenants, total } = state.owners.sums(state.ram.now(), state.block_tokens());
        let models = state.models.iter();
        let mut models: Vec<_> = models.map(|(id, m)| (m.name.clone(), sums.remove(id).unwrap_or_default())).collect();
        models.sort_by(|a, b| a.0.cmp(&b.0));
        let usage = |m: &ModelState| {
            let bytes = [m.slot_bytes_held, m.disk.as_ref().map_or(0, Disk::file_bytes)];
            m.account.usage(state.ram.now(), bytes, m.geometry.block_tokens)
        };
        let mut files = state.models.values().filter_map(|m| m.disk.as_ref());
        // Every slot counts for a tenant from the moment it is taken.
        let taken: u64 = tenants.iter().map(|(.., usage)| usage.bytes[Tier::Ram as usize]).sum();
        Snapshot {
            total,
            ram_capacity_bytes: state.ram_bytes,
            ram_free_bytes: state.ram_bytes.saturating_sub(taken),
            ram_largest_free_bytes: state.ram.pool.longest_free() as u64,
            ssd_capacity_bytes: state.ssd_capacity_bytes,
            ssd_file_bytes: state.ssd_file_bytes(),
            ssd_io: match (&shared.ssd, files.next()) {
                (None, _) => "off",
                (Some(_), Some(disk)) if !disk.file.direct() => "buffered",
                (Some(_), _) => "direct",
            },
            ssd_engine: shared.ssd.as_ref().map_or(("off", None), Ssd::engine),
            ssd_read_only: state.ssd_read_only.as_ref().map(|(reason, _)| reason.clone()),
            ram_eviction: state.models.iter().map(|(&id, m)| (m.name.clone(), state.ram.running(id))).collect(),
            ram_held: state
                .models
                .values()
                .map(|m| (m.name.clone(), state.ram.pool.held_bytes(&m.holding) as u64))
                .collect(),
            demotion_queue: state.models.values().map(|m| (m.name.clone(), m.queued_blocks)).collect(),
            hit_ceiling: state.models.values().filter_map(|m| ceiling(m, &models)).collect(),
            lifted: state.lifts,
            gpu: state.gpu_status(),
            index_blocks: shared.trie.len() as u64,
            index_bytes: shared.trie.bytes() as u64,
            index_refused: shared.trie.refused(),
            usage: state.models.values().map(|m| (m.name.clone(), usage(m))).collect(),
            models,
            tenants,
        }
    }

    /// What backs the RAM tier's memory at present; `None` where the kernel does not tell.
    pub fn ram_pages(&self) -> Option<Pages> {
        self.shared.arena.pages()
    }

    /// Threads used for copies, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.workers.threads()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.shared.home.is_here() {
            self.stop();
            // Leases may keep the rest alive; the directory is free.
            if let Some(ssd) = &self.shared.ssd {
                ssd.unlock();
            }
        }
    }
}

impl Shared {
    fn check_open(&self) -> Result<()> {
        // Threads do not survive a fork, and a lock may be held by one of them for ever.
        if !self.home.is_here() {
            return Err(Error::new(ErrorKind::Closed, "the store was opened before a fork; open one in this process"));
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Closed, "the store is closed; open it again"));
        }
        Ok(())
    }

    fn open_state(&self) -> Result<crate::sync::Guard<'_, State>> {
        self.check_open()?;
        let state = self.state.lock();
        // It may have been closed while this waited.
        self.check_open()?;
        Ok(state)
    }
}

// The share of what matches asked of a model that one that never forgets would have found. Of what was found or put, this
// many were there before: that much it would have found, of what matches asked for. `counts`: of all models, by name.
fn ceiling(model: &ModelState, counts: &[(String, Counts)]) -> Option<(String, f64)> {
    let again = model.curve.ceiling()?;
    let nth = counts.binary_search_by(|(name, _)| name.cmp(&model.name)).ok()?;
    let &(_, Counts { asked, hit, put_blocks, .. }) = &counts[nth];
    let ratio = |blocks: f64| blocks / asked as f64;
    (asked > 0).then(|| {
        let found = again * (hit + put_blocks) as f64;
        (model.name.clone(), ratio(found).clamp(ratio(hit as f64), 1.0))
    })
}

fn check_view(geometry: &Geometry, view: &KvView, tokens: usize) -> Result<()> {
    let planes = geometry.plane_count();
    if view.plane_count() != planes {
        return Err(input(format!("kv has {} planes, expected {planes} (layers x planes)", view.plane_count())));
    }
    if view.tokens() < tokens {
        return Err(input(format!("kv covers {} tokens, expected at least {tokens}", view.tokens())));
    }
    Ok(())
}

fn random_bytes() -> Result<Vec<u8>> {
    let mut bytes = vec![0; 32];
    getrandom::fill(&mut bytes).map_err(|e| Error::io("no random numbers from the system", e))?;
    Ok(bytes)
}
