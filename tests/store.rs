//! The store's contract through its public surface: right bytes or fewer, books that add up, caps that hold and calls
//! that come back, whatever the budgets, the disk and other threads do.

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::time::Duration;
use std::{fmt, fs, io, thread};
use stratakv::stats::{Counts, Miss, Tier};
use stratakv::{
    Dtype, ErrorKind, FileIo, Geometry, Io, IoFile, KvView, Lease, Model, ModelSpec, Options, PlaneView, SsdOptions,
    Store, WritePolicy,
};

const MIB: u64 = 1 << 20;
/// Records of 12 KiB. In an SSD of 1 MiB: eight in a segment, eight segments.
const FINE: Geometry = shape(2, 2, 2, 32, Dtype::Fp32, 8);
/// Records of 132 KiB: fifteen fill the smallest arena.
const COARSE: Geometry = shape(4, 2, 2, 256, Dtype::Fp32, 8);
/// One latent plane, records of 16 KiB.
const LATENT: Geometry = shape(3, 1, 1, 500, Dtype::Bf16, 5);

const fn shape(layers: u32, planes: u32, kv_heads: u32, head_dim: u32, dtype: Dtype, block_tokens: u32) -> Geometry {
    Geometry { layers, planes, kv_heads, head_dim, dtype, block_tokens }
}

fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ word >> 29
}

/// Reproducible chance.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(mix(self.0)) % bound as u64) as usize
    }
}

/// Keys and values of a sequence, `[layer][plane][head][token][dim]`.
struct Kv {
    geometry: Geometry,
    tokens: usize,
    bytes: Vec<u8>,
}

impl Kv {
    fn blank(geometry: Geometry, tokens: usize) -> Self {
        Self { geometry, tokens, bytes: vec![0xEE; tokens * geometry.token_bytes()] }
    }

    /// What a model computes: each row depends on the model, the whole prefix and its place, so that a byte in the
    /// wrong place shows.
    fn of(model: &Model, tokens: &[u32]) -> Self {
        let spec = model.spec();
        let mut kv = Self::blank(spec.geometry, tokens.len());
        let row = spec.geometry.row_bytes();
        let mut prefix = spec.name.bytes().fold(1, |hash, byte| mix(hash ^ u64::from(byte)));
        for (t, &token) in tokens.iter().enumerate() {
            prefix = mix(prefix ^ u64::from(token));
            for run in 0..spec.geometry.plane_count() * spec.geometry.kv_heads as usize {
                let mut word = prefix ^ (run as u64) << 32;
                for bytes in kv.bytes[(run * tokens.len() + t) * row..][..row].chunks_mut(8) {
                    word = mix(word.wrapping_add(0x9e37_79b9_7f4a_7c15));
                    bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
                }
            }
        }
        kv
    }

    fn view(&mut self) -> KvView {
        let row = self.geometry.row_bytes();
        let plane_bytes = self.geometry.kv_heads as usize * self.tokens * row;
        let base = self.bytes.as_mut_ptr();
        let plane = |p: usize| PlaneView {
            base: base.wrapping_add(p * plane_bytes),
            head_stride: (self.tokens * row) as isize,
            token_stride: row as isize,
            page_stride: 0,
        };
        let planes = (0..self.geometry.plane_count()).map(plane).collect();
        // SAFETY: `bytes` holds every row that the planes name, and outlives the one call that a view is made for.
        unsafe { KvView::new(planes, None, self.tokens) }.expect("there is no page table")
    }
}

fn options(directory: Option<&Path>, ram: u64, cap: u64) -> Options {
    Options {
        ram_capacity_bytes: ram,
        ssd: directory.map(|path| SsdOptions { path: path.into(), capacity_bytes: cap, segment_bytes: 64 << 10 }),
        policy: WritePolicy::WriteBack,
        secret: None,
        threads: 2,
    }
}

fn open(directory: &Path, ram: u64, cap: u64) -> Store {
    Store::open(options(Some(directory), ram, cap)).expect("the directory is usable")
}

fn spec(name: &str, geometry: Geometry) -> ModelSpec {
    ModelSpec { name: name.into(), weights_version: String::new(), geometry, weight: 1 }
}

fn register(store: &Store, name: &str, geometry: Geometry) -> Arc<Model> {
    store.register(spec(name, geometry)).expect("the model fits")
}

/// Whole blocks of a sequence that shares nothing with one of another `seed`.
fn sequence(seed: u32, blocks: usize, geometry: &Geometry) -> Vec<u32> {
    (0..blocks as u32 * geometry.block_tokens).map(|t| seed * 100_003 + t).collect()
}

/// Puts what the model computes for the tokens; returns the blocks that are cached then.
fn put(store: &Store, model: &Model, tokens: &[u32]) -> usize {
    let mut kv = Kv::of(model, tokens);
    let outcome = store.put(model, tokens, "", "", &kv.view()).expect("a put of right arguments never fails");
    outcome.tokens / model.spec().geometry.block_tokens as usize
}

fn hold(store: &Store, model: &Arc<Model>, tokens: &[u32]) -> Lease {
    store.match_prefix(model, tokens, "", "").expect("the store is open")
}

/// Loads a match and checks every byte; returns the blocks that were loaded.
fn load(lease: &Lease, model: &Model, tokens: &[u32]) -> usize {
    let (mut got, right) = (Kv::blank(model.spec().geometry, tokens.len()), Kv::of(model, tokens));
    let outcome = lease.load(&got.view()).expect("a load of right arguments never fails");
    let (row, block) = (got.geometry.row_bytes(), got.geometry.block_tokens as usize);
    for (got, right) in got.bytes.chunks(got.tokens * row).zip(right.bytes.chunks(right.tokens * row)) {
        assert!(got[..outcome.tokens * row] == right[..outcome.tokens * row], "wrong bytes: {outcome:?}");
    }
    assert_eq!(outcome.places.len() * block, outcome.tokens);
    assert_eq!(outcome.miss.is_none(), outcome.tokens == lease.tokens());
    outcome.tokens / block
}

fn fetch(store: &Store, model: &Arc<Model>, tokens: &[u32]) -> usize {
    load(&hold(store, model, tokens), model, tokens)
}

/// Disk blocks of all files of a directory, in bytes.
fn disk_bytes(directory: &Path) -> u64 {
    let files = fs::read_dir(directory).expect("the directory is there");
    files.filter_map(|file| Some(file.ok()?.metadata().ok()?.blocks() * 512)).sum()
}

/// A hang is a failure, not an endless test.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, end) = mpsc::channel::<()>();
    let worker = thread::spawn(move || (work(), drop(done)).0);
    let ended = end.recv_timeout(Duration::from_secs(60));
    assert!(ended != Err(mpsc::RecvTimeoutError::Timeout), "no answer within a minute");
    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A call of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Open,
    Remove,
    Read,
    Write,
    Allocate,
    Punch,
    Sync,
}

/// What goes wrong with it: an error number, or fewer bytes than asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Errno(i32),
    Short,
}

const EIO: Fault = Fault::Errno(5);
const ENOSPC: Fault = Fault::Errno(28);

type Rule = Arc<dyn Fn(Call) -> Option<Fault> + Send + Sync>;

/// The real file system, but for what a rule says.
#[derive(Clone, Default)]
struct Rig(Arc<RwLock<Option<Rule>>>);

impl fmt::Debug for Rig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rig")
    }
}

impl Rig {
    fn set(&self, rule: Option<Rule>) {
        *self.0.write().expect("no rule panics") = rule;
    }

    fn fault(&self, call: Call) -> Option<Fault> {
        let rule = self.0.read().expect("no rule panics").clone();
        rule.and_then(|rule| rule(call))
    }

    fn check(&self, call: Call) -> io::Result<()> {
        match self.fault(call) {
            Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
            _ => Ok(()),
        }
    }
}

impl Io for Rig {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn IoFile>> {
        self.check(Call::Open)?;
        Ok(Box::new(Rigged { file: FileIo.open(path, create)?, rig: self.clone() }))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.check(Call::Remove)?;
        FileIo.remove(path)
    }
}

#[derive(Debug)]
struct Rigged {
    file: Box<dyn IoFile>,
    rig: Rig,
}

impl IoFile for Rigged {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.rig.fault(Call::Read) {
            Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
            Some(Fault::Short) => {
                let half = buffer.len() / 2 / 4096 * 4096;
                self.file.read_at(&mut buffer[..half], offset)
            }
            None => self.file.read_at(buffer, offset),
        }
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.rig.check(Call::Write)?;
        self.file.write_at(parts, offset)
    }
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.rig.check(Call::Allocate)?;
        self.file.allocate(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.rig.check(Call::Punch)?;
        self.file.punch(offset, bytes)
    }
    fn sync(&self) -> io::Result<()> {
        self.rig.check(Call::Sync)?;
        self.file.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
    fn direct(&self) -> bool {
        self.file.direct()
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Put,
    Load,
    Hold,
    Release,
    Unregister,
    Flush,
    Reopen { close: bool },
}

fn steps() -> impl Strategy<Value = Vec<(Step, usize, Vec<u32>)>> {
    let step = prop_oneof![
        12 => Just(Step::Put),
        8 => Just(Step::Load),
        2 => Just(Step::Hold),
        2 => Just(Step::Release),
        1 => Just(Step::Unregister),
        2 => Just(Step::Flush),
        1 => any::<bool>().prop_map(|close| Step::Reopen { close }),
    ];
    prop::collection::vec((step, 0..2usize, prop::collection::vec(0..3u32, 1..7)), 1..40)
}

/// Sums that only ever grow, and must agree with what the calls returned.
fn grown(counts: &Counts) -> [u64; 4] {
    [counts.matches, counts.asked, counts.hit, counts.loaded_tokens]
}

fn add(sums: &mut [u64; 4], more: [u64; 4]) {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum += more;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_called_bytes_are_right_the_books_add_up_and_the_caps_hold(steps in steps(), through: bool) {
        let directory = tempfile::tempdir().expect("a directory");
        let (ram, cap, shapes) = (4 * MIB, 4 * MIB, [COARSE, LATENT]);
        let policy = if through { WritePolicy::WriteThrough } else { WritePolicy::WriteBack };
        let start = || {
            let store = Store::open(Options { policy, ..options(Some(directory.path()), ram, cap) });
            let store = store.expect("the directory is usable");
            let models = [register(&store, "a", shapes[0]), register(&store, "b", shapes[1])];
            (store, models)
        };
        let (mut store, mut models) = start();
        let mut ever_put = [BTreeSet::new(), BTreeSet::new()];
        let mut held: Vec<(Lease, usize, Vec<u32>, Arc<Model>)> = Vec::new();
        let (mut expected, mut gone) = ([0; 4], [0; 4]);
        for (step, which, letters) in steps {
            let (model, geometry) = (models[which].clone(), shapes[which]);
            let size = geometry.block_tokens as usize;
            let mut tokens: Vec<u32> = letters.iter().flat_map(|&letter| (0..size as u32).map(move |i| letter << 8 | i)).collect();
            // A partial block at the end is never cached.
            tokens.extend(0..letters[0]);
            let known = (1..=letters.len()).take_while(|&n| ever_put[which].contains(&letters[..n])).count();
            match step {
                Step::Put => {
                    let cached = put(&store, &model, &tokens);
                    prop_assert!(cached <= letters.len());
                    ever_put[which].extend((1..=letters.len()).map(|n| letters[..n].to_vec()));
                }
                Step::Load | Step::Hold => {
                    let lease = hold(&store, &model, &tokens);
                    let blocks = lease.tokens() / size;
                    prop_assert!(blocks <= known, "a match of what was never put");
                    prop_assert_eq!(lease.miss().is_none(), blocks == letters.len());
                    // What is held cannot leave, so each shorter prefix is found whole.
                    let shorter = &tokens[..blocks / 2 * size];
                    prop_assert_eq!(hold(&store, &model, shorter).tokens(), shorter.len());
                    add(&mut expected, [2, (letters.len() + blocks / 2) as u64, (blocks + blocks / 2) as u64, 0]);
                    prop_assert_eq!(load(&lease, &model, &tokens), blocks, "a match on a sound disk loads whole");
                    add(&mut expected, [0, 0, 0, (blocks * size) as u64]);
                    if matches!(step, Step::Hold) && held.len() < 2 {
                        held.push((lease, which, tokens, model));
                    }
                }
                Step::Release => {
                    if !held.is_empty() {
                        let (lease, which, tokens, model) = held.remove(0);
                        let present = Arc::ptr_eq(&model, &models[which]);
                        let loaded = load(&lease, &model, &tokens) * shapes[which].block_tokens as usize;
                        prop_assert_eq!(loaded, if present { lease.tokens() } else { 0 });
                        add(&mut expected, [0, 0, 0, loaded as u64]);
                    }
                }
                Step::Unregister => {
                    let snapshot = store.snapshot();
                    let (_, counts) = snapshot.models.iter().find(|(name, _)| *name == model.spec().name).expect("registered");
                    add(&mut gone, grown(counts));
                    store.unregister(&model).expect("the model is registered");
                    models[which] = register(&store, &model.spec().name, geometry);
                    ever_put[which].clear();
                }
                // Leased blocks may hold every segment; then it says so.
                Step::Flush => drop(store.flush()),
                Step::Reopen { close } => {
                    if close {
                        drop(store.close());
                    }
                    drop(store);
                    (store, models) = start();
                    (expected, gone) = ([0; 4], [0; 4]);
                    for (lease, which, tokens, model) in held.drain(..) {
                        prop_assert_eq!(load(&lease, &model, &tokens), 0, "blocks of model {} of a closed store", which);
                    }
                }
            }
            let snapshot = store.snapshot();
            let mut sum = gone;
            snapshot.models.iter().for_each(|(_, counts)| add(&mut sum, grown(counts)));
            prop_assert_eq!(sum, grown(&snapshot.total));
            prop_assert_eq!(expected, grown(&snapshot.total));
            for counts in snapshot.models.iter().map(|(_, counts)| counts).chain([&snapshot.total]) {
                prop_assert_eq!(counts.hit + counts.miss, counts.asked);
                let [ram, ssd] = counts.tiers;
                prop_assert!(ram.hit + ram.miss == ram.asked && ssd.hit + ssd.miss == ssd.asked && ram.miss == ssd.asked);
            }
            let [in_ram, on_ssd] = snapshot.total.tiers;
            prop_assert!(in_ram.used_bytes <= ram && on_ssd.used_bytes <= snapshot.ssd_file_bytes);
            prop_assert!(snapshot.ssd_file_bytes <= cap, "the books say {} of {cap}", snapshot.ssd_file_bytes);
            prop_assert!(disk_bytes(directory.path()) <= cap);
        }
    }
}

#[test]
fn what_is_leased_is_evicted_from_no_tier() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, 4 * MIB);
    let model = register(&store, "m", COARSE);
    let tokens = sequence(0, 5, &COARSE);
    put(&store, &model, &tokens);
    let in_ram = hold(&store, &model, &tokens);
    for seed in 1..20 {
        put(&store, &model, &sequence(seed, 4, &COARSE));
    }
    assert_eq!(load(&in_ram, &model, &tokens), 5);
    store.close().expect("the disk is well");
    drop((in_ram, store));

    let store = open(directory.path(), 2 * MIB, 4 * MIB);
    let model = register(&store, "m", COARSE);
    let on_ssd = hold(&store, &model, &tokens);
    assert!(on_ssd.places().contains(&Tier::Ssd));
    for seed in 20..60 {
        put(&store, &model, &sequence(seed, 4, &COARSE));
        store.flush().expect("other segments make room");
    }
    assert_eq!(load(&on_ssd, &model, &tokens) * 8, on_ssd.tokens());
}

/// The files of a store that was closed.
type Files = BTreeMap<String, Vec<u8>>;

fn read_files(directory: &Path) -> Files {
    let entries = fs::read_dir(directory).expect("the directory is there").map(|entry| entry.expect("it is readable"));
    entries.map(|e| (e.file_name().into_string().expect("a name"), fs::read(e.path()).expect("bytes"))).collect()
}

fn damage(files: &mut Files, earlier: &Files, dice: &mut Dice) {
    let names: Vec<String> = files.keys().filter(|name| *name != "secret" && *name != "lock").cloned().collect();
    let name = names[dice.below(names.len())].clone();
    let bytes = files.get_mut(&name).expect("listed");
    let count = 1 + dice.below(8);
    let sectors = bytes.len() / 512;
    match dice.below(7) {
        0 => (0..64).for_each(|_| {
            let at = dice.below(bytes.len());
            bytes[at] ^= 1 << dice.below(8)
        }),
        1 => (0..count).for_each(|_| bytes[dice.below(sectors) * 512..][..512].fill(0)),
        2 => bytes.truncate(dice.below(bytes.len())),
        3 => (0..count).for_each(|_| {
            let (from, to) = (dice.below(sectors / 8) * 4096, dice.below(sectors / 8) * 4096);
            bytes.copy_within(from..from + 4096, to);
        }),
        // Sectors of the past, and of another file.
        4 | 5 => {
            let other = &names[dice.below(names.len())];
            let source = if dice.below(2) == 0 { earlier.get(&name) } else { earlier.get(other) };
            let source = source.expect("files stay").clone();
            for _ in 0..count * 4 {
                let at = dice.below(bytes.len().min(source.len()) / 512) * 512;
                let length = (512 << dice.below(8)).min(bytes.len() - at).min(source.len() - at);
                bytes[at..at + length].copy_from_slice(&source[at..at + length]);
            }
        }
        _ => {
            let models: Vec<&String> = names.iter().filter(|name| name.ends_with(".kv")).collect();
            let (one, two) = (files[models[0]].clone(), files[models[1]].clone());
            files.extend([(models[0].clone(), two), (models[1].clone(), one)]);
        }
    }
}

#[test]
fn no_damage_to_the_files_gives_a_wrong_byte_or_keeps_the_store_from_healing() {
    let write = |path: &Path, seeds: std::ops::Range<u32>| {
        let store = open(path, 2 * MIB, MIB);
        for (name, geometry) in [("a", FINE), ("b", LATENT)] {
            let model = register(&store, name, geometry);
            seeds.clone().for_each(|seed| drop(put(&store, &model, &sequence(seed, 3, &geometry))));
            store.flush().expect("the disk is well");
        }
        store.close().expect("the disk is well");
        read_files(path)
    };
    let first = tempfile::tempdir().expect("a directory");
    let (earlier, sound) = (write(first.path(), 0..8), write(first.path(), 4..14));
    let mut survived = 0;
    for round in 0..120 {
        let mut dice = Dice(round);
        let mut files = sound.clone();
        (0..=dice.below(3)).for_each(|_| damage(&mut files, &earlier, &mut dice));
        let directory = tempfile::tempdir().expect("a directory");
        files.iter().for_each(|(name, bytes)| fs::write(directory.path().join(name), bytes).expect("it is writable"));
        let store = match Store::open(options(Some(directory.path()), 2 * MIB, MIB)) {
            Ok(store) => store,
            Err(refused) => {
                let whole = |n: usize| {
                    files["store"].get(n * 4096..(n + 1) * 4096) == sound["store"].get(n * 4096..(n + 1) * 4096)
                };
                assert!(refused.kind() == ErrorKind::Format && !whole(0) && !whole(1), "round {round}: {refused}");
                continue;
            }
        };
        for (name, geometry) in [("a", FINE), ("b", LATENT)] {
            let model = register(&store, name, geometry);
            survived += (0..14).map(|seed| fetch(&store, &model, &sequence(seed, 3, &geometry))).sum::<usize>();
            for seed in 14..30 {
                put(&store, &model, &sequence(seed, 3, &geometry));
            }
            store.flush().expect("the disk is well");
            assert!(disk_bytes(directory.path()) <= MIB, "round {round}: more than the cap");
            assert_eq!(fetch(&store, &model, &sequence(29, 3, &geometry)), 3, "round {round}");
        }
    }
    assert!(survived > 120 * 10, "damage spreads: {survived} blocks survived");
}

#[test]
fn a_failing_disk_costs_hits_and_is_reported_and_nothing_else() {
    let calls = [Call::Open, Call::Remove, Call::Read, Call::Write, Call::Allocate, Call::Punch, Call::Sync];
    let cases = calls.into_iter().flat_map(|call| {
        let faults: &[Fault] = if call == Call::Read { &[EIO, Fault::Short] } else { &[EIO, ENOSPC] };
        faults
            .iter()
            .flat_map(move |&fault| [0, 1, 3, 9].map(|sound| [(call, fault, sound, 1), (call, fault, sound, u32::MAX)]))
    });
    for (call, fault, sound_calls, faults) in cases.flatten() {
        let case = format!("{call:?} {fault:?} after {sound_calls}, {faults} times");
        let directory = tempfile::tempdir().expect("a directory");
        let fill = |store: &Store, model: &Model, seeds: std::ops::Range<u32>| {
            seeds.for_each(|seed| drop(put(store, model, &sequence(seed, 3, &FINE))));
        };
        let read_all = |store: &Store, model: &Arc<Model>| {
            (0..40).map(|seed| fetch(store, model, &sequence(seed, 3, &FINE))).sum::<usize>()
        };
        let store = open(directory.path(), 2 * MIB, MIB);
        fill(&store, &register(&store, "m", FINE), 0..8);
        fill(&store, &register(&store, "n", FINE), 0..8);
        store.close().expect("the disk is well");
        let rig = Rig::default();
        let store =
            Store::open_on(options(Some(directory.path()), 2 * MIB, MIB), Arc::new(rig.clone())).expect("sound");
        let (model, other) = (register(&store, "m", FINE), register(&store, "n", FINE));
        let seen = Arc::new(AtomicU32::new(0));
        let count = seen.clone();
        rig.set(Some(Arc::new(move |now| {
            let number = if now == call { count.fetch_add(1, Ordering::Relaxed) } else { 0 };
            (now == call && number >= sound_calls && number - sound_calls < faults).then_some(fault)
        })));
        read_all(&store, &model);
        fill(&store, &model, 8..24);
        let flushed = store.flush();
        let hit = seen.load(Ordering::Relaxed) > sound_calls;
        if hit && call != Call::Read {
            assert_eq!(flushed.expect_err(&case).kind(), ErrorKind::Io, "{case}");
        }
        fill(&store, &other, 8..12);
        read_all(&store, &model);
        read_all(&store, &other);
        drop(store.close());
        rig.set(None);
        assert!(disk_bytes(directory.path()) <= MIB, "{case}: more than the cap");
        let store = open(directory.path(), 2 * MIB, MIB);
        let model = register(&store, "m", FINE);
        read_all(&store, &model);
        fill(&store, &model, 24..40);
        store.close().expect("the disk is well again");
        let store = open(directory.path(), 2 * MIB, MIB);
        assert_eq!(fetch(&store, &register(&store, "m", FINE), &sequence(39, 3, &FINE)), 3, "{case}");
    }
}
