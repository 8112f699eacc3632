//! What was dropped is gone, on every tier, after a crash too; what was not, stays.

use crate::kv::*;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::{fs, thread};
use stratakv::evict::Retention;
use stratakv::stats::Miss;
use stratakv::{ErrorKind, Model, Store};

fn put_as(store: &Store, model: &Model, tenant: &str, tokens: &[u32]) {
    let mut kv = Kv::of(model, tokens);
    store.put(model, tokens, "", tenant, &kv.view()).expect("a put of right arguments never fails");
}

fn found_as(store: &Store, model: &Arc<Model>, tenant: &str, tokens: &[u32]) -> usize {
    load(&store.match_prefix(model, tokens, "", tenant).expect("the store is open"), model, tokens)
}

#[test]
fn a_dropped_namespace_stays_gone_after_a_crash_and_takes_no_room() {
    let directory = tempfile::tempdir().expect("a directory");
    let (long, short) = (sequence(0, 30, &FINE), sequence(1, 3, &FINE));
    let open = || {
        let store = open(directory.path(), 2 * MIB, 4 * MIB);
        let model = register(&store, "m", FINE);
        (store, model)
    };
    let (store, model) = open();
    for tenant in ["stays", "goes"] {
        put_as(&store, &model, tenant, &long);
        put_as(&store, &model, tenant, &short);
    }
    store.flush().expect("the disk is well");
    for round in 1..=3 {
        assert_eq!(store.drop_namespace(&model, "", "goes").expect("the disk is well"), 33, "round {round}");
        assert_eq!(store.drop_namespace(&model, "", "goes").expect("the disk is well"), 0, "round {round}");
        assert_eq!((found_as(&store, &model, "goes", &long), found_as(&store, &model, "stays", &long)), (0, 30));
        assert_eq!(store.snapshot().index_blocks, 33);
        // Nothing is closed in a crash: the new store has what is on disk, the records of old epochs among it.
        store.flush().expect("the disk is well");
        let (again, same) = crashed(directory.path());
        assert_eq!((found_as(&again, &same, "goes", &long), found_as(&again, &same, "stays", &long)), (0, 30));
        assert_eq!(again.snapshot().index_blocks, 33, "records of an old epoch are not taken in");
        drop((again, same));
        for tokens in [&long, &short] {
            put_as(&store, &model, "goes", tokens);
        }
        store.flush().expect("the disk is well");
    }
    store.close().expect("the disk is well");
    let (store, model) = open();
    assert_eq!((found_as(&store, &model, "goes", &long), found_as(&store, &model, "goes", &short)), (30, 3));
    assert_eq!(store.drop_namespace(&model, "", "goes").expect("the disk is well"), 33, "found again, dropped again");
    store.unregister(&model).expect("it is registered");
    let gone = store.drop_namespace(&model, "", "").expect_err("it is gone");
    assert_eq!(gone.kind(), ErrorKind::ModelNotFound);
}

// A store on a copy of what lies on disk now.
fn crashed(directory: &Path) -> (Store, Arc<Model>) {
    let copy = tempfile::tempdir().expect("a directory");
    for file in fs::read_dir(directory).expect("it is readable") {
        let file = file.expect("it is readable");
        fs::copy(file.path(), copy.path().join(file.file_name())).expect("there is room");
    }
    let store = open(copy.path(), 2 * MIB, 4 * MIB);
    let model = register(&store, "m", FINE);
    // The files go; the store has them open.
    (store, model)
}

#[test]
fn what_was_made_before_a_drop_finds_and_stores_nothing_after_it() {
    let store = Store::open(options(None, 4 * MIB, 0)).expect("memory is to be had");
    let (model, tokens) = (register(&store, "m", FINE), sequence(0, 4, &FINE));
    for adapter in ["", "lora"] {
        let sequence = store.sequence(&model, adapter, "", tokens.clone());
        let mut kv = Kv::of(&model, &tokens);
        assert_eq!(
            store.put_sequence(&model, &sequence, &kv.view(), 0, Retention::default()).expect("room").new_blocks,
            4
        );
        let lease = store.match_sequence(&model, sequence.clone()).expect("the store is open");
        assert_eq!(store.drop_namespace(&model, adapter, "").expect("there is no disk"), 4);
        let mut blank = Kv::blank(FINE, tokens.len());
        let outcome = lease.load(&blank.view()).expect("a load of right arguments never fails");
        assert_eq!((outcome.tokens, outcome.miss), (0, Some(Miss::Dropped)));
        drop(lease);
        let late = store.match_sequence(&model, sequence.clone()).expect("the store is open");
        assert_eq!((late.tokens(), late.miss()), (0, Some(Miss::Dropped)));
        let refused = store.snapshot().total.put_refused;
        let outcome =
            store.put_sequence(&model, &sequence, &kv.view(), 0, Retention::default()).expect("it is no error");
        assert_eq!((outcome.tokens, store.snapshot().total.put_refused), (0, refused + 4));
        let new = store.match_prefix(&model, &tokens, adapter, "").expect("the store is open");
        assert_eq!((new.tokens(), new.miss()), (0, Some(Miss::NeverStored)));
        assert_eq!(store.snapshot().total.tiers.map(|tier| (tier.blocks, tier.used_bytes)), [(0, 0); 2]);
    }
}

#[test]
fn no_thread_gets_bytes_of_weights_that_were_replaced() {
    in_time(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let store = open(directory.path(), 2 * MIB, 4 * MIB);
        let model = register(&store, "m", FINE);
        let prompts: Vec<_> = (0..4).map(|seed| sequence(seed, 6, &FINE)).collect();
        // Odd while a version is being replaced.
        let (version, served, done) = (AtomicU64::new(2), AtomicUsize::new(0), AtomicBool::new(false));
        let serve = |seed| {
            let mut dice = Dice(seed);
            while !done.load(Ordering::SeqCst) {
                let tokens = &prompts[dice.below(4)];
                let before = version.load(Ordering::SeqCst);
                let sequence = store.sequence(&model, "lora", "", tokens.clone());
                if before % 2 == 1 || version.load(Ordering::SeqCst) != before {
                    continue;
                }
                let mut right = Kv::of_adapter(&model, tokens, before);
                if dice.below(2) == 0 {
                    store
                        .put_sequence(&model, &sequence, &right.view(), 0, Retention::default())
                        .expect("no bad input");
                } else {
                    let lease = store.match_sequence(&model, sequence).expect("the store is open");
                    let mut got = Kv::blank(FINE, tokens.len());
                    let loaded = lease.load(&got.view()).expect("no bad input").tokens;
                    assert!(got.begins_as(&right, loaded), "bytes of another version");
                    served.fetch_add(loaded, Ordering::SeqCst);
                }
            }
        };
        thread::scope(|scope| {
            let threads = [0, 1].map(|seed| {
                scope.spawn({
                    let serve = &serve;
                    move || serve(seed)
                })
            });
            let mut drops = 0;
            // Should one fail, the others end.
            while (drops < 60 || served.load(Ordering::SeqCst) < 1000) && !threads.iter().any(|t| t.is_finished()) {
                thread::sleep(std::time::Duration::from_millis(5));
                version.fetch_add(1, Ordering::SeqCst);
                store.drop_namespace(&model, "lora", "").expect("the disk is well");
                version.fetch_add(1, Ordering::SeqCst);
                drops += 1;
            }
            done.store(true, Ordering::SeqCst);
        });
        store.drop_namespace(&model, "lora", "").expect("the disk is well");
        assert_eq!(store.snapshot().index_blocks, 0);
    });
}

#[test]
fn many_dropped_namespaces_are_all_remembered_below_the_cap() {
    let directory = tempfile::tempdir().expect("a directory");
    let cap = MIB;
    let names: Vec<String> = (0..600).map(|n| format!("tenant {n}")).collect();
    let tokens = sequence(0, 1, &FINE);
    let store = open(directory.path(), 2 * MIB, cap);
    let model = register(&store, "m", FINE);
    names.iter().for_each(|tenant| {
        put_as(&store, &model, tenant, &tokens);
    });
    store.flush().expect("the disk is well");
    let held = store.snapshot().index_blocks;
    let dropped: u64 = names.iter().map(|tenant| store.drop_namespace(&model, "", tenant).expect("room")).sum();
    assert!(dropped <= held && store.snapshot().index_blocks == 0);
    assert!(disk_bytes(directory.path()) <= cap && store.snapshot().ssd_file_bytes <= cap);
    store.close().expect("the disk is well");
    let store = open(directory.path(), 2 * MIB, cap);
    let model = register(&store, "m", FINE);
    assert_eq!(store.snapshot().index_blocks, 0);
    assert!(names.iter().all(|tenant| found_as(&store, &model, tenant, &tokens) == 0));
}

#[test]
fn a_retired_version_matches_and_takes_nothing_until_it_is_restored() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 8 * MIB, 32 * MIB);
    let (model, other) = (register(&store, "m", FINE), register(&store, "n", FINE));
    let tokens = sequence(1, 6, &FINE);
    for tenant in ["", "t"] {
        put_as(&store, &model, tenant, &tokens);
    }
    put(&store, &other, &tokens);
    store.flush().expect("the disk is well");
    let before = hold(&store, &model, &tokens);
    assert_eq!(store.retire(&model, true).expect("it is open"), 12);
    assert_eq!(load(&before, &model, &tokens), 0, "a match made before is safe, and loads nothing");
    put_as(&store, &model, "", &tokens);
    let hit = hold(&store, &model, &tokens);
    assert_eq!((hit.tokens(), hit.miss()), (0, Some(Miss::Dropped)));
    assert_eq!((found_as(&store, &model, "t", &tokens), fetch(&store, &other, &tokens)), (0, 6));
    assert_eq!(store.snapshot().index_blocks, 6);
    assert_eq!(store.retire(&model, true).expect("it is open"), 0);
    store.retire(&model, false).expect("it is open");
    assert_eq!((put(&store, &model, &tokens), fetch(&store, &model, &tokens)), (6, 6));
}
