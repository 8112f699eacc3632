//! A disk that lies, fails or answers at the wrong moment: hits are lost, bytes are never wrong, and what was lost can
//! be stored again.

use crate::kv::*;
use crate::rig::*;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;
use stratakv::evict::Kind;
use stratakv::stats::Miss;
use stratakv::{ErrorKind, Model, Options, Quota, Store, WritePolicy};

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

#[test]
fn a_disk_that_fails_while_warm_blocks_are_written_again_costs_these_and_nothing_else() {
    for (call, fault) in [(Call::Read, EIO), (Call::Read, Fault::Short), (Call::Write, EIO), (Call::Write, ENOSPC)] {
        let directory = tempfile::tempdir().expect("a directory");
        let rig = Rig::default();
        let mut options = options(Some(directory.path()), MIB, 2 * MIB);
        options.ssd.as_mut().expect("there is one").segment_bytes = 256 << 10;
        let store = Store::open_on(options, Arc::new(rig.clone())).expect("the disk is sound so far");
        let model = register(&store, "m", FINE);
        let hot = sequence(9_000, 2, &FINE);
        let (mut seen, mut kept) = (0, 0);
        for seed in 0..600u32 {
            if seed % 60 == 0 {
                put(&store, &model, &hot);
                store.flush().expect("the disk is well");
                kept += fetch(&store, &model, &hot);
            }
            let every = Arc::new(AtomicU32::new(0));
            rig.set((seed % 60 >= 20).then(|| {
                let every = every.clone();
                let rule = move |now| (now == call && every.fetch_add(1, Ordering::Relaxed) % 3 == 1).then_some(fault);
                Arc::new(rule) as Rule
            }));
            put(&store, &model, &sequence(seed, 3, &FINE));
            if seed % 5 == 0 {
                // An error is reported, and that is all.
                drop(store.flush());
            }
            rig.set(None);
            seen += every.load(Ordering::Relaxed);
        }
        assert_eq!(kept, 20, "{call:?} {fault:?}: what was just put is there");
        assert!(seen > 20 || call == Call::Read, "{call:?} {fault:?}: {seen} calls");
        store.flush().expect("the disk is well");
        assert!(disk_bytes(directory.path()) <= 2 * MIB);
        store.close().expect("the disk is well");
        let store = open(directory.path(), 2 * MIB, 2 * MIB);
        let model = register(&store, "m", FINE);
        for seed in 0..600 {
            fetch(&store, &model, &sequence(seed, 3, &FINE));
        }
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
    rigged_with(directory, 2 * MIB, cap)
}

fn rigged_with(directory: &Path, ram: u64, cap: u64) -> (Rig, Arc<Store>) {
    let rig = Rig::default();
    let store = Store::open_on(options(Some(directory), ram, cap), Arc::new(rig.clone()));
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

#[test]
fn the_cap_holds_though_giving_room_back_fails_in_the_midst() {
    let calls = [Call::Punch, Call::Open, Call::Remove];
    for (call, absent, sound_calls) in
        calls.into_iter().flat_map(|c| [false, true].map(|a| [0, 1, 2].map(|n| (c, a, n)))).flatten()
    {
        let case = format!("{call:?} after {sound_calls}, absent: {absent}");
        let directory = tempfile::tempdir().expect("a directory");
        let cap = 4 * MIB;
        let store = open(directory.path(), 8 * MIB, cap);
        put(&store, &register(&store, "small", FINE), &sequence(0, 300, &FINE));
        store.close().expect("the disk is well");
        let (rig, store) = rigged_with(directory.path(), 8 * MIB, cap);
        let large = register(&store, "large", COARSE);
        if !absent {
            drop(register(&store, "small", FINE));
        }
        let seen = AtomicU32::new(0);
        rig.set(Some(Arc::new(move |now| {
            (now == call && seen.fetch_add(1, Ordering::Relaxed) == sound_calls).then_some(EIO)
        })));
        for seed in 0..4 {
            put(&store, &large, &sequence(seed, 8, &COARSE));
            drop(store.flush());
            let (books, disk) = (store.snapshot().ssd_file_bytes, disk_bytes(directory.path()));
            assert!(disk <= books && books <= cap, "{case}: {disk} bytes on disk, {books} in the books");
        }
        rig.set(None);
        put(&store, &large, &sequence(4, 8, &COARSE));
        store.flush().expect(&case);
        assert!(disk_bytes(directory.path()) <= cap, "{case}");
    }
}

#[test]
fn the_cap_holds_though_what_was_empty_could_not_be_given_back_when_the_store_was_opened() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, MIB);
    let model = register(&store, "m", FINE);
    put(&store, &model, &sequence(0, 100, &FINE));
    store.flush().expect("the disk is well");
    // Half of the segments of the one go to the other.
    put(&store, &register(&store, "n", FINE), &sequence(0, 60, &FINE));
    store.close().expect("the disk is well");
    let (rig, store) = rigged(directory.path(), MIB);
    rig.set(Some(Arc::new(|call| (call == Call::Punch).then_some(EIO))));
    let (model, other) = (register(&store, "m", FINE), register(&store, "n", FINE));
    assert!(store.snapshot().ssd_file_bytes > MIB, "what cannot be given back counts");
    for seed in 1..8 {
        put(&store, &model, &sequence(seed, 20, &FINE));
        put(&store, &other, &sequence(seed, 20, &FINE));
        drop(store.flush());
        assert!(disk_bytes(directory.path()) <= MIB, "{} bytes", disk_bytes(directory.path()));
        if seed == 3 {
            rig.set(None);
        }
    }
    assert!(store.snapshot().ssd_file_bytes <= MIB);
}

#[test]
fn a_file_that_could_not_be_removed_is_counted_and_its_blocks_are_not_found_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let (rig, store) = rigged(directory.path(), MIB);
    let model = register(&store, "m", FINE);
    put(&store, &model, &sequence(0, 40, &FINE));
    store.flush().expect("the disk is well");
    rig.set(Some(Arc::new(|now| (now == Call::Remove).then_some(EIO))));
    assert_eq!(store.unregister(&model).expect_err("the file stays").kind(), ErrorKind::Io);
    assert!(disk_bytes(directory.path()) <= store.snapshot().ssd_file_bytes);
    assert_eq!(store.register(spec("m", FINE)).expect_err("its old file is in the way").kind(), ErrorKind::Io);
    rig.set(None);
    let model = register(&store, "m", FINE);
    assert_eq!(fetch(&store, &model, &sequence(0, 40, &FINE)), 0);
    put(&store, &model, &sequence(1, 40, &FINE));
    store.close().expect("the disk is well");
    let store = open(directory.path(), 2 * MIB, MIB);
    assert_eq!(fetch(&store, &register(&store, "m", FINE), &sequence(1, 40, &FINE)), 40);
    assert!(disk_bytes(directory.path()) <= MIB);
}

#[test]
fn a_write_whose_room_was_taken_back_finds_other_room_at_once() {
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
        amid(&rig, call, come_back, || store.flush().expect("there is other room"));
    }
}

#[test]
fn a_store_opens_beside_files_that_are_not_its_own_or_cannot_be_opened() {
    let directory = tempfile::tempdir().expect("a directory");
    let name = |digit: &str| directory.path().join(digit.repeat(32) + ".kv");
    std::fs::create_dir(name("0")).expect("writable");
    std::fs::write(directory.path().join("notes.kv"), "not a cache").expect("writable");
    std::os::unix::fs::symlink("nowhere", name("1")).expect("writable");
    let store = open(directory.path(), 2 * MIB, MIB);
    let model = register(&store, "m", FINE);
    put(&store, &model, &sequence(0, 100, &FINE));
    store.close().expect("the disk is well");
    assert_eq!(std::fs::read(directory.path().join("notes.kv")).expect("still there"), b"not a cache");
}

#[test]
fn a_damaged_or_torn_superblock_is_mended_while_nothing_hangs_on_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let of_model = || {
        let files = std::fs::read_dir(directory.path()).expect("readable").map(|f| f.expect("readable").path());
        files.into_iter().find(|f| f.extension().is_some_and(|e| e == "kv")).expect("there is one")
    };
    let spoil = |path: &Path, at: usize| {
        let mut bytes = std::fs::read(path).expect("readable");
        bytes[at..at + 64].fill(0xEE);
        std::fs::write(path, bytes).expect("writable");
    };
    // A first write that was torn: nothing was stored yet.
    std::fs::write(directory.path().join("store"), [0xEE; 4096]).expect("writable");
    let store = open(directory.path(), 2 * MIB, MIB);
    put(&store, &register(&store, "m", FINE), &sequence(0, 8, &FINE));
    store.close().expect("the disk is well");
    // One copy after the other is damaged, with an opening between.
    for at in [0, 4096, 0] {
        spoil(&directory.path().join("store"), at);
        spoil(&of_model(), at);
        let store = open(directory.path(), 2 * MIB, MIB);
        assert_eq!(fetch(&store, &register(&store, "m", FINE), &sequence(0, 8, &FINE)), 8);
    }
    [0, 4096].into_iter().for_each(|at| spoil(&directory.path().join("store"), at));
    assert_eq!(
        Store::open(options(Some(directory.path()), 2 * MIB, MIB)).expect_err("blocks hang on it").kind(),
        ErrorKind::Format
    );
}

#[test]
fn a_sparse_file_that_claims_endless_segments_is_started_anew() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_owned();
    in_time(move || {
        let store = open(&path, 2 * MIB, MIB);
        put(&store, &register(&store, "m", FINE), &sequence(0, 8, &FINE));
        store.close().expect("the disk is well");
        let mut files = std::fs::read_dir(&path).expect("readable").map(|f| f.expect("readable").path());
        let file = files.find(|f| f.extension().is_some_and(|e| e == "kv")).expect("there is one");
        std::fs::File::options().write(true).open(file).expect("writable").set_len(8 << 40).expect("sparse");
        let store = open(&path, 2 * MIB, MIB);
        let model = register(&store, "m", FINE);
        put(&store, &model, &sequence(0, 8, &FINE));
        assert_eq!(fetch(&store, &model, &sequence(0, 8, &FINE)), 8);
        store.close().expect("the disk is well");
    });
}

#[test]
fn a_flush_waits_for_what_was_put_before_it_and_not_for_what_follows() {
    let directory = tempfile::tempdir().expect("a directory");
    let (rig, store) = rigged(directory.path(), 64 * MIB);
    let model = register(&store, "m", FINE);
    // While a flush goes on, every write brings another put: its queue never empties.
    let (putter, of_model, seed) = (Arc::downgrade(&store), Arc::downgrade(&model), AtomicU32::new(1));
    rig.set(Some(Arc::new(move |now| {
        if now == Call::Write
            && let (Some(store), Some(model)) = (putter.upgrade(), of_model.upgrade())
        {
            put(&store, &model, &sequence(seed.fetch_add(1, Ordering::Relaxed), 1, &FINE));
        }
        None
    })));
    let flusher = store.clone();
    in_time(move || {
        put(&flusher, &model, &sequence(0, 1, &FINE));
        flusher.flush().expect("the disk is well");
        assert!(flusher.snapshot().total.demoted >= 1);
    });
    rig.set(None);
}

#[test]
fn a_panic_of_the_demotion_thread_holds_nothing_and_is_reported() {
    let directory = tempfile::tempdir().expect("a directory");
    let (rig, store) = rigged(directory.path(), 8 * MIB);
    let model = register(&store, "m", FINE);
    rig.set(Some(Arc::new(|now| if now == Call::Write { panic!("a planted bug") } else { None })));
    put(&store, &model, &sequence(0, 100, &FINE));
    assert_eq!(store.flush().expect_err("nothing was written").kind(), ErrorKind::Io);
    assert!(store.snapshot().ssd_read_only.is_some_and(|reason| reason.contains("panicked")));
    // All of RAM can be had again.
    assert_eq!(put(&store, &model, &sequence(1, 170, &FINE)), 170);
    rig.set(None);
}

#[test]
fn a_drop_that_the_disk_cannot_note_drops_nothing_and_can_be_tried_again() {
    for call in [Call::Open, Call::Write, Call::Sync, Call::Replace] {
        let directory = tempfile::tempdir().expect("a directory");
        let (rig, store) = rigged(directory.path(), MIB);
        let (model, tokens) = (register(&store, "m", FINE), sequence(0, 4, &FINE));
        put(&store, &model, &tokens);
        store.flush().expect("the disk is well");
        rig.set(Some(Arc::new(move |now| (now == call).then_some(EIO))));
        let failed = store.drop_namespace(&model, "", "").expect_err("the disk fails");
        assert!(failed.kind() == ErrorKind::Io && failed.to_string().contains("nothing was dropped"), "{failed}");
        rig.set(None);
        assert_eq!(fetch(&store, &model, &tokens), 4, "{call:?}");
        assert_eq!(store.drop_namespace(&model, "", "").expect("the disk is well again"), 4, "{call:?}");
        store.close().expect("the disk is well");
        let store = open(directory.path(), 2 * MIB, MIB);
        assert_eq!(fetch(&store, &register(&store, "m", FINE), &tokens), 0, "{call:?}");
    }
}

#[test]
fn a_model_that_has_nothing_finds_room_while_what_others_have_to_give_is_being_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let rig = Rig::default();
    let mut options = options(Some(directory.path()), 4 * MIB, 64 * MIB);
    options.ssd.as_mut().expect("there is one").segment_bytes = MIB;
    let options = Options { policy: WritePolicy::WriteThrough, eviction: Kind::Lru, stepped: true, ..options };
    let store = Arc::new(Store::open_on(options, Arc::new(rig.clone())).expect("the disk is sound"));
    let full = register(&store, "full", FINE);
    let mut dice = Dice(3);
    let mut puts_amid_a_write = 0;
    for round in 0..12 {
        let mut old: Vec<u32> = (0..340).map(|n| round * 1000 + n).collect();
        old.iter().for_each(|&seed| assert_eq!(put(&store, &full, &sequence(seed, 1, &FINE)), 1));
        // What is new takes places all over RAM.
        while !old.is_empty() {
            let seed = old.swap_remove(dice.below(old.len()));
            drop(hold(&store, &full, &sequence(seed, 1, &FINE)));
        }
        store.flush().expect("the disk is well");
        (500..700).for_each(|n| assert_eq!(put(&store, &full, &sequence(round * 1000 + n, 1, &FINE)), 1));
        for _ in 0..4 {
            let other = store.clone();
            let act = move || {
                let model = register(&other, "other", FINE);
                let cached = put(&other, &model, &sequence(0, 1, &FINE));
                other.unregister(&model).expect("it is registered");
                cached
            };
            let cached = amid(&rig, Call::Write, act, || _ = store.step().expect("it is open"));
            puts_amid_a_write += usize::from(cached.is_some());
            assert_ne!(cached, Some(0), "round {round}: {:?}", store.snapshot().ram_held);
        }
    }
    assert!(puts_amid_a_write > 12, "{puts_amid_a_write}");
}

#[test]
fn a_load_beyond_those_that_are_allowed_at_a_time_loads_nothing_and_says_so() {
    for of_tenant in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let tokens = sequence(0, 6, &FINE);
        let store = open(directory.path(), 2 * MIB, MIB);
        put(&store, &register(&store, "m", FINE), &tokens);
        store.close().expect("the disk is well");
        let (rig, store) = rigged(directory.path(), MIB);
        let model = register(&store, "m", FINE);
        let quota = Quota { loads: Some(1), ..Quota::default() };
        match of_tenant {
            true => store.set_tenant_quota("", quota).expect("it is open"),
            false => store.set_model_quota(&model, quota).expect("it is registered"),
        }
        let (one, other) = (hold(&store, &model, &tokens), Arc::new(hold(&store, &model, &tokens)));
        let second = other.clone();
        let act = move || {
            let outcome = second.load(&Kv::blank(FINE, second.tokens()).view()).expect("right arguments");
            (outcome.tokens, outcome.miss)
        };
        let meanwhile = amid(&rig, Call::Read, act, || assert_eq!(load(&one, &model, &tokens), 6));
        assert_eq!(meanwhile, Some((0, Some(Miss::Quota))));
        assert_eq!(load(&other, &model, &tokens), 6, "when the first is done");
    }
}
