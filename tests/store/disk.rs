//! A disk that lies, fails or answers at the wrong moment: hits are lost, bytes are never wrong, and what was lost can
//! be stored again.

use crate::kv::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::{fmt, fs, io};
use stratakv::{ErrorKind, FileIo, Io, IoFile, Model, Store};

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
            seeds.clone().for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 3, &geometry)), 3));
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
            seeds.for_each(|seed| assert_eq!(put(store, model, &sequence(seed, 3, &FINE)), 3));
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

/// A call in the midst of another: runs once, the first time that a call of this kind is made.
fn in_the_midst_of(call: Call, act: impl FnOnce() + Send + 'static) -> Rule {
    let act = Mutex::new(Some(act));
    Arc::new(move |now| {
        let act = if now == call { act.lock().expect("no act panics twice").take() } else { None };
        act.into_iter().for_each(|act| act());
        None
    })
}

#[test]
fn a_match_released_in_the_midst_of_its_load_stays_safe() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokens = sequence(0, 6, &FINE);
    let store = open(directory.path(), 2 * MIB, MIB);
    put(&store, &register(&store, "m", FINE), &tokens);
    store.close().expect("the disk is well");
    let rig = Rig::default();
    let store = Store::open_on(options(Some(directory.path()), 2 * MIB, MIB), Arc::new(rig.clone())).expect("sound");
    let store = Arc::new(store);
    let model = register(&store, "m", FINE);
    for _ in 0..2 {
        let lease = Arc::new(hold(&store, &model, &tokens));
        let (held, of_store, of_model) = (lease.clone(), store.clone(), model.clone());
        rig.set(Some(in_the_midst_of(Call::Read, move || {
            held.release();
            (1..40).for_each(|seed| assert!(put(&of_store, &of_model, &sequence(seed, 8, &FINE)) > 0));
            drop(of_store.flush());
        })));
        load(&lease, &model, &tokens);
        rig.set(None);
    }
    let lease = Arc::new(hold(&store, &model, &sequence(39, 8, &FINE)));
    let (held, of_store, of_model) = (lease.clone(), store.clone(), model.clone());
    rig.set(Some(in_the_midst_of(Call::Read, move || {
        held.release();
        of_store.unregister(&of_model).expect("it is registered");
    })));
    load(&lease, &model, &sequence(39, 8, &FINE));
    assert_eq!(store.snapshot().index_blocks, 0);
}

#[test]
fn a_model_that_comes_back_while_its_namesake_leaves_keeps_what_it_stores() {
    let directory = tempfile::tempdir().expect("a directory");
    let rig = Rig::default();
    let store = Store::open_on(options(Some(directory.path()), 2 * MIB, MIB), Arc::new(rig.clone())).expect("sound");
    let store = Arc::new(store);
    let model = register(&store, "m", FINE);
    put(&store, &model, &sequence(0, 4, &FINE));
    store.flush().expect("the disk is well");
    let next: Arc<OnceLock<Arc<Model>>> = Arc::default();
    let (found, of_store) = (next.clone(), store.clone());
    rig.set(Some(in_the_midst_of(Call::Remove, move || {
        // Either the name is still taken, or the file is the newcomer's.
        drop(of_store.register(spec("m", FINE)).map(|model| found.set(model)));
    })));
    store.unregister(&model).expect("it is registered");
    rig.set(None);
    let next = next.get().cloned().unwrap_or_else(|| register(&store, "m", FINE));
    assert_eq!(fetch(&store, &next, &sequence(0, 4, &FINE)), 0);
    put(&store, &next, &sequence(1, 4, &FINE));
    store.close().expect("the disk is well");
    let store = open(directory.path(), 2 * MIB, MIB);
    assert_eq!(fetch(&store, &register(&store, "m", FINE), &sequence(1, 4, &FINE)), 4);
}

#[test]
fn a_model_that_comes_back_while_its_file_makes_room_keeps_what_it_stores() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, MIB);
    put(&store, &register(&store, "absent", FINE), &sequence(0, 64, &FINE));
    store.close().expect("the disk is well");
    for call in [Call::Remove, Call::Open, Call::Punch] {
        let rig = Rig::default();
        let store =
            Store::open_on(options(Some(directory.path()), 2 * MIB, MIB), Arc::new(rig.clone())).expect("sound");
        let store = Arc::new(store);
        let model = register(&store, "m", FINE);
        put(&store, &model, &sequence(1, 64, &FINE));
        let next: Arc<OnceLock<Arc<Model>>> = Arc::default();
        let (found, of_store) = (next.clone(), store.clone());
        rig.set(Some(in_the_midst_of(call, move || {
            drop(of_store.register(spec("absent", FINE)).map(|model| found.set(model)));
        })));
        drop(store.flush());
        rig.set(None);
        let next = next.get().cloned().unwrap_or_else(|| register(&store, "absent", FINE));
        for seed in 2..4 {
            put(&store, &next, &sequence(seed, 8, &FINE));
            store.flush().expect("the disk is well");
            assert_eq!(fetch(&store, &next, &sequence(seed, 8, &FINE)), 8);
        }
        store.close().expect("the disk is well");
        let store = open(directory.path(), 2 * MIB, MIB);
        let next = register(&store, "absent", FINE);
        assert_eq!(fetch(&store, &next, &sequence(3, 8, &FINE)), 8, "{call:?}");
        put(&store, &next, &sequence(4, 64, &FINE));
        store.close().expect("the disk is well");
    }
}

#[test]
fn a_model_whose_registration_failed_can_be_registered_again() {
    for call in [Call::Open, Call::Read, Call::Write, Call::Punch, Call::Sync] {
        let directory = tempfile::tempdir().expect("a directory");
        let store = open(directory.path(), 2 * MIB, 2 * MIB);
        put(&store, &register(&store, "m", FINE), &sequence(0, 120, &FINE));
        store.close().expect("the disk is well");
        let rig = Rig::default();
        let store = Store::open_on(options(Some(directory.path()), 2 * MIB, 2 * MIB), Arc::new(rig.clone()));
        let store = store.expect("sound");
        rig.set(Some(Arc::new(move |now| (now == call).then_some(EIO))));
        let failed = store.register(spec("m", FINE)).is_err();
        rig.set(None);
        if failed {
            let model = register(&store, "m", FINE);
            assert_eq!(put(&store, &model, &sequence(1, 4, &FINE)), 4, "{call:?}");
        }
    }
}
