//! A disk that lies, fails or answers at the wrong moment: hits are lost, bytes are never wrong, and what was lost can
//! be stored again.

use crate::kv::*;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::time::Duration;
use std::{fmt, io, thread};
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
        let (rig, store) = rigged(directory.path(), MIB);
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

/// Does `work`. Its first call of this kind waits until `act` has happened elsewhere, or is itself kept waiting.
fn amid<T: Send + 'static>(
    rig: &Rig,
    call: Call,
    act: impl FnOnce() -> T + Send + 'static,
    work: impl FnOnce(),
) -> Option<T> {
    let (act, actor) = (Mutex::new(Some(act)), Arc::new(Mutex::new(None)));
    let started = actor.clone();
    rig.set(Some(Arc::new(move |now| {
        let act = if now == call { act.lock().expect("no panic").take() } else { None };
        if let Some(act) = act {
            let (done, end) = mpsc::channel::<()>();
            let thread = thread::spawn(move || (act(), drop(done)).0);
            let _ = end.recv_timeout(Duration::from_millis(100));
            *started.lock().expect("no panic") = Some(thread);
        }
        None
    })));
    work();
    rig.set(None);
    let thread = actor.lock().expect("no panic").take();
    thread.map(|thread| thread.join().expect("no panic"))
}

/// A store on a rigged disk.
fn rigged(directory: &Path, cap: u64) -> (Rig, Arc<Store>) {
    let rig = Rig::default();
    let store = Store::open_on(options(Some(directory), 2 * MIB, cap), Arc::new(rig.clone()));
    (rig, Arc::new(store.expect("the disk is sound so far")))
}

#[test]
fn a_match_released_in_the_midst_of_its_load_stays_safe() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokens = sequence(0, 6, &FINE);
    let store = open(directory.path(), 2 * MIB, MIB);
    put(&store, &register(&store, "m", FINE), &tokens);
    store.close().expect("the disk is well");
    let (rig, store) = rigged(directory.path(), MIB);
    let model = register(&store, "m", FINE);
    for unregister in [false, false, true] {
        let lease = Arc::new(hold(&store, &model, &tokens));
        assert_eq!(lease.tokens(), tokens.len());
        let (held, of_store, of_model) = (lease.clone(), store.clone(), model.clone());
        let act = move || {
            held.release();
            if unregister {
                of_store.unregister(&of_model).expect("it is registered");
            }
        };
        amid(&rig, Call::Read, act, || assert!(load(&lease, &model, &tokens) <= 6));
    }
    drop(store.unregister(&model));
    assert_eq!(store.snapshot().index_blocks, 0);
}

#[test]
fn a_model_that_comes_back_while_its_namesake_leaves_keeps_what_it_stores() {
    let directory = tempfile::tempdir().expect("a directory");
    let (rig, store) = rigged(directory.path(), MIB);
    let model = register(&store, "m", FINE);
    put(&store, &model, &sequence(0, 4, &FINE));
    store.flush().expect("the disk is well");
    let newcomer = store.clone();
    let come_back = move || newcomer.register(spec("m", FINE)).ok();
    let next = amid(&rig, Call::Remove, come_back, || store.unregister(&model).expect("it is registered"));
    let next = next.flatten().unwrap_or_else(|| register(&store, "m", FINE));
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
        let (rig, store) = rigged(directory.path(), MIB);
        let model = register(&store, "m", FINE);
        (0..8).for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 8, &FINE)), 8));
        let newcomer = store.clone();
        let come_back = move || newcomer.register(spec("absent", FINE)).ok();
        let next = amid(&rig, call, come_back, || drop(store.flush()));
        let next = next.flatten().unwrap_or_else(|| register(&store, "absent", FINE));
        // A write that waited for the room may not be done; what was written stays.
        put(&store, &next, &sequence(2, 8, &FINE));
        let flushed = store.flush().and_then(|()| store.close());
        drop((store, next, model));
        let store = open(directory.path(), 2 * MIB, MIB);
        let next = register(&store, "absent", FINE);
        assert!(flushed.is_err() || fetch(&store, &next, &sequence(2, 8, &FINE)) == 8, "amid {call:?}");
        assert!(disk_bytes(directory.path()) <= MIB, "amid {call:?}");
        put(&store, &next, &sequence(3, 56, &FINE));
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
        let (rig, store) = rigged(directory.path(), 2 * MIB);
        rig.set(Some(Arc::new(move |now| (now == call).then_some(EIO))));
        let failed = store.register(spec("m", FINE)).is_err();
        rig.set(None);
        if failed {
            let model = register(&store, "m", FINE);
            assert_eq!(put(&store, &model, &sequence(1, 4, &FINE)), 4, "{call:?}");
        }
    }
}
