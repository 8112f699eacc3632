//! The store's contract through its public surface: right bytes or fewer, books that add up, caps that hold and calls
//! that come back, whatever the budgets, the disk and other threads do.

#[path = "store/counts.rs"]
mod counts;
#[path = "store/damage.rs"]
mod damage;
#[path = "store/disk.rs"]
mod disk;
#[path = "store/divide.rs"]
mod divide;
#[path = "store/drop.rs"]
mod drop;
#[path = "store/engines.rs"]
mod engines;
#[path = "store/gpu.rs"]
mod gpu;
#[path = "store/handed.rs"]
mod handed;
#[path = "store/kv.rs"]
mod kv;
#[path = "store/listing.rs"]
mod listing;
#[path = "gpu/on.rs"]
mod on;
#[path = "store/power.rs"]
mod power;
#[path = "store/quota.rs"]
mod quota;
#[path = "store/rig.rs"]
mod rig;
#[path = "store/share.rs"]
mod share;
#[path = "store/simulation.rs"]
mod simulation;
#[cfg(feature = "cuda")]
#[path = "gpu/standin.rs"]
mod standin;

use kv::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, RwLock};
use std::{fs, thread};
use stratakv::stats::{Counts, Miss, Tier};
use stratakv::{
    Dtype, Engine, ErrorKind, Lease, Model, Options, Quota, Share, SsdOptions, Store, TierQuota, WritePolicy,
};

#[derive(Debug, Clone, Copy)]
enum Step {
    Put,
    Load,
    Hold,
    Release,
    Drop,
    Unregister,
    Flush,
    Reopen { close: bool },
}

/// A match that is held: of which model, in which registration and how often dropped, for which tokens.
type Hold = (Lease, usize, Vec<u32>, Arc<Model>, u32);

fn steps() -> impl Strategy<Value = Vec<(Step, usize, Vec<u32>)>> {
    let step = prop_oneof![
        12 => Just(Step::Put),
        8 => Just(Step::Load),
        2 => Just(Step::Hold),
        2 => Just(Step::Release),
        1 => Just(Step::Drop),
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
    fn whatever_is_called_bytes_are_right_the_books_add_up_and_the_caps_hold(
        steps in steps(), policy in 0..3usize, ring: bool,
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        let (ram, cap, shapes) = (4 * MIB, 4 * MIB, [COARSE, LATENT]);
        let all = [WritePolicy::WriteBack, WritePolicy::WriteThrough, WritePolicy::WriteThroughSecondTouch];
        let policy = all[policy];
        let start = || {
            let mut options = Options { policy, ..options(Some(directory.path()), ram, cap) };
            options.ssd.as_mut().expect("there is one").engine = if ring { Engine::Auto } else { Engine::Pread };
            let store = Store::open(options);
            let store = store.expect("the directory is usable");
            let models = [register(&store, "a", shapes[0]), register(&store, "b", shapes[1])];
            (store, models)
        };
        let (mut store, mut models) = start();
        let mut ever_put = [BTreeSet::new(), BTreeSet::new()];
        let mut held: Vec<Hold> = Vec::new();
        let mut drops = [0; 2];
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
                        held.push((lease, which, tokens, model, drops[which]));
                    }
                }
                Step::Release => {
                    if !held.is_empty() {
                        let (lease, which, tokens, model, life) = held.remove(0);
                        let present = Arc::ptr_eq(&model, &models[which]) && life == drops[which];
                        let loaded = load(&lease, &model, &tokens) * shapes[which].block_tokens as usize;
                        prop_assert_eq!(loaded, if present { lease.tokens() } else { 0 });
                        add(&mut expected, [0, 0, 0, loaded as u64]);
                    }
                }
                Step::Drop => {
                    store.drop_namespace(&model, "", "").expect("the disk is well");
                    let snapshot = store.snapshot();
                    let (_, counts) = snapshot.models.iter().find(|(name, _)| *name == model.spec().name).expect("registered");
                    prop_assert_eq!(counts.tiers.map(|tier| (tier.blocks, tier.used_bytes)), [(0, 0); 2]);
                    drops[which] += 1;
                    ever_put[which].clear();
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
                    for (lease, which, tokens, model, _) in held.drain(..) {
                        prop_assert_eq!(load(&lease, &model, &tokens), 0, "blocks of model {} of a closed store", which);
                    }
                }
            }
            let snapshot = store.snapshot();
            assert_sums(&snapshot);
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
        drop(held);
        drop(store.flush());
        assert_nothing_leaked(&store, &models);
    }
}

/// An idle store of 4 MiB without its models holds nothing: a new one gets all of RAM.
fn assert_nothing_leaked(store: &Store, models: &[Arc<Model>]) {
    models.iter().for_each(|model| store.unregister(model).expect("it is registered"));
    assert_eq!(store.snapshot().index_blocks, 0);
    assert_eq!(put(store, &register(store, "new", COARSE), &sequence(0, 30, &COARSE)), 30);
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

#[test]
fn a_directory_belongs_to_one_store_at_a_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let options = || options(Some(directory.path()), 2 * MIB, MIB);
    let first = Store::open(options()).expect("the directory is free");
    assert_eq!(Store::open(options()).expect_err("it is taken").kind(), ErrorKind::Locked);
    first.close().expect("the disk is well");
    let second = Store::open(options()).expect("it was given back");
    drop(second);
    drop(Store::open(options()).expect("it was given back"));
}

#[test]
fn files_of_another_version_or_secret_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let with = |secret: &str| Options { secret: Some(secret.into()), ..options(Some(directory.path()), 2 * MIB, MIB) };
    let store = Store::open(with("one")).expect("the directory is free");
    put(&store, &register(&store, "m", FINE), &sequence(0, 2, &FINE));
    store.close().expect("the disk is well");
    assert_eq!(Store::open(with("other")).expect_err("another secret").kind(), ErrorKind::Format);

    for file in fs::read_dir(directory.path()).expect("it is there").map(|file| file.expect("readable").path()) {
        let mut bytes = fs::read(&file).expect("readable");
        for page in bytes.chunks_mut(4096).take(2) {
            // The version stands behind the magic number; the checksum is at the end.
            page[4] += 1;
            let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &page[..4088]);
            page[4088..].copy_from_slice(&sum.to_le_bytes());
        }
        let of_model = file.extension().is_some_and(|e| e == "kv");
        if of_model || file.ends_with("store") {
            let sound = fs::read(&file).expect("readable");
            fs::write(&file, bytes).expect("writable");
            let refused = Store::open(with("one")).and_then(|store| store.register(spec("m", FINE)));
            assert_eq!(refused.expect_err("another version").kind(), ErrorKind::Format, "{}", file.display());
            fs::write(&file, sound).expect("writable");
        }
    }
    let store = Store::open(with("one")).expect("all is as it was");
    assert_eq!(fetch(&store, &register(&store, "m", FINE), &sequence(0, 2, &FINE)), 2);
}

#[test]
fn threads_get_right_bytes_and_the_books_equal_a_scan() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_owned();
    in_time(move || {
        let store = open(&path, 4 * MIB, 8 * MIB);
        let shapes = [COARSE, LATENT];
        let models = [register(&store, "a", shapes[0]), register(&store, "b", shapes[1])].map(RwLock::new);
        let prompts = |geometry| {
            (0..8).map(move |n| [sequence(n % 2, 2, &geometry), sequence(n, 3, &geometry)].concat()).collect::<Vec<_>>()
        };
        let now = |which: usize| models[which].read().expect("no panic").clone();
        thread::scope(|scope| {
            for seed in 0..4 {
                let (store, models) = (&store, &models);
                scope.spawn(move || {
                    let mut dice = Dice(seed);
                    for step in 0..200 {
                        let which = dice.below(2);
                        let (model, geometry) = (now(which), shapes[which]);
                        let tokens = &prompts(geometry)[dice.below(8)];
                        match dice.below(5) {
                            0 | 1 => assert!(put(store, &model, tokens) <= 5),
                            2 | 3 => assert!(fetch(store, &model, tokens) <= 5),
                            _ if seed == 0 && step % 10 == 0 => {
                                let mut slot = models[which].write().expect("no panic");
                                store.unregister(&slot).expect("the model is registered");
                                *slot = register(store, &slot.spec().name, geometry);
                            }
                            _ => drop(store.flush()),
                        }
                    }
                });
            }
        });
        // Leases may have held every segment for a moment; what matters is that nothing moves any more.
        drop(store.flush());
        let mut found = 0;
        for (which, geometry) in shapes.into_iter().enumerate() {
            let (model, size) = (now(which), geometry.block_tokens as usize);
            let mut places = BTreeMap::new();
            for tokens in prompts(geometry) {
                let lease = hold(&store, &model, &tokens);
                let prefixes = (1..=lease.tokens() / size).map(|n| tokens[..n * size].to_vec());
                places.extend(prefixes.zip(lease.places().iter().map(|&tier| tier == Tier::Ram)));
            }
            let snapshot = store.snapshot();
            let [ram, ssd] = snapshot.models[which].1.tiers;
            assert_eq!(ram.blocks, places.values().filter(|&&in_ram| in_ram).count() as u64);
            assert!(ssd.blocks >= places.values().filter(|&&in_ram| !in_ram).count() as u64);
            for tier in [ram, ssd] {
                assert_eq!(tier.used_bytes, tier.blocks * geometry.record_bytes() as u64);
            }
            found += places.len() as u64;
        }
        assert_eq!(store.snapshot().index_blocks, found);
        assert_nothing_leaked(&store, &[now(0), now(1)]);
    });
}

#[test]
fn models_of_different_shapes_share_a_small_arena_and_none_starves() {
    let store = Store::open(options(None, 4 * MIB, 0)).expect("memory is to be had");
    let models =
        [FINE, COARSE, LATENT].map(|geometry| (register(&store, &format!("{geometry:?}"), geometry), geometry));
    let mut dice = Dice(1);
    for seed in 0..600 {
        let (model, geometry) = &models[dice.below(3)];
        let tokens = sequence(seed, 1 + dice.below(4), geometry);
        put(&store, model, &tokens);
        let lease = hold(&store, model, &tokens);
        assert_eq!(load(&lease, model, &tokens) * geometry.block_tokens as usize, tokens.len());
    }
}

#[test]
fn a_large_block_finds_room_in_an_arena_that_a_model_of_small_ones_filled() {
    let wide = shape(16, 2, 4, 512, Dtype::Fp32, 12);
    let store = Store::open(options(None, 8 * MIB, 0)).expect("memory is to be had");
    let small = register(&store, "small", COARSE);
    (0..4).for_each(|seed| assert_eq!(put(&store, &small, &sequence(seed, 15, &COARSE)), 15));
    // The coldest places are no neighbours.
    [1, 3].into_iter().for_each(|seed| assert_eq!(fetch(&store, &small, &sequence(seed, 15, &COARSE)), 15));
    let large = register(&store, "large", wide);
    assert_eq!(put(&store, &large, &sequence(0, 1, &wide)), 1);
}

#[test]
fn unregistering_frees_everything_and_a_held_match_stays_safe() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, 4 * MIB);
    let model = register(&store, "m", COARSE);
    let tokens = sequence(0, 15, &COARSE);
    assert_eq!(put(&store, &model, &tokens), 15);
    store.flush().expect("the disk is well");
    let lease = hold(&store, &model, &tokens);
    store.unregister(&model).expect("it is registered");
    assert_eq!(store.unregister(&model).expect_err("it is gone").kind(), ErrorKind::ModelNotFound);
    let snapshot = store.snapshot();
    assert_eq!((snapshot.index_blocks, snapshot.models.len()), (0, 0));
    assert_eq!(snapshot.total.tiers.map(|tier| (tier.blocks, tier.used_bytes)), [(0, 0); 2]);
    let next = register(&store, "m", COARSE);
    assert_eq!(fetch(&store, &next, &tokens), 0, "the new registration finds nothing of the old");
    let outcome = lease.load(&Kv::blank(COARSE, tokens.len()).view()).expect("a load of right arguments never fails");
    assert_eq!((outcome.tokens, outcome.miss), (0, Some(Miss::Closed)));
    assert_eq!(put(&store, &next, &tokens), 0, "the match still holds all of RAM");
    lease.release();
    lease.release();
    assert_eq!(put(&store, &next, &tokens), 15);
    assert_eq!(fetch(&store, &next, &tokens), 15);
    assert_eq!(put(&store, &model, &sequence(1, 1, &COARSE)), 0, "nothing is stored for a model that is gone");
}

#[test]
fn closing_ends_when_ram_holds_more_than_the_ssd_can() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_owned();
    in_time(move || {
        let store = open(&path, 2 * MIB, MIB);
        let model = register(&store, "m", FINE);
        (0..30).for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 5, &FINE)), 5));
        store.close().expect("the disk is well");
        let store = open(&path, 2 * MIB, MIB);
        let model = register(&store, "m", FINE);
        assert!((0..30).any(|seed| fetch(&store, &model, &sequence(seed, 5, &FINE)) == 5));
    });
}

#[test]
fn flushing_ends_when_blocks_that_waited_for_it_were_evicted() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_owned();
    in_time(move || {
        let store = open(&path, 8 * MIB, 64 * MIB);
        let others = ["a", "b", "c"].map(|name| register(&store, name, COARSE));
        others.iter().for_each(|model| assert_eq!(put(&store, model, &sequence(0, 1, &COARSE)), 1));
        // One block takes the whole arena.
        let wide = shape(16, 2, 4, 512, Dtype::Fp32, 28);
        let model = register(&store, "wide", wide);
        let ram_bytes = store.divisible().ram_bytes;
        let all = Share { model: &model, ram_bytes, ssd_bytes: 0 };
        let none = others.iter().map(|model| Share { model, ram_bytes: 0, ssd_bytes: 0 });
        store.divide(&none.chain([all]).collect::<Vec<_>>()).expect("it is no more than there is");
        assert_eq!(put(&store, &model, &sequence(0, 1, &wide)), 1);
        store.flush().expect("the disk is well");
        assert_eq!(store.snapshot().total.demoted, 1);
    });
}

#[test]
fn a_segment_is_reused_while_blocks_in_ram_continue_what_it_held() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, MIB);
    let model = register(&store, "m", FINE);
    (0..8).for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 8, &FINE)), 8));
    store.close().expect("the disk is well");
    let store = open(directory.path(), 2 * MIB, MIB);
    let model = register(&store, "m", FINE);
    assert_eq!(put(&store, &model, &sequence(0, 9, &FINE)), 9);
    (1..8).for_each(|seed| drop(hold(&store, &model, &sequence(seed, 8, &FINE))));
    store.flush().expect("a segment gives way");
    assert_eq!(store.snapshot().ssd_read_only, None);
}

#[test]
fn a_sequence_that_fills_the_ssd_can_go_on_and_others_are_still_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, MIB);
    put(&store, &register(&store, "m", FINE), &sequence(0, 64, &FINE));
    store.close().expect("the disk is well");
    let store = open(directory.path(), 2 * MIB, MIB);
    let model = register(&store, "m", FINE);
    put(&store, &model, &sequence(0, 80, &FINE));
    put(&store, &model, &sequence(1, 2, &FINE));
    store.flush().expect("the disk is well");
    assert!(store.snapshot().total.demoted >= 2);
}

#[test]
fn more_models_than_segments_share_a_small_ssd() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 32 * MIB, MIB);
    for n in 0..12 {
        let model = register(&store, &format!("m{n}"), FINE);
        assert!(store.snapshot().ssd_file_bytes <= MIB, "model {n}");
        put(&store, &model, &sequence(n, 1, &FINE));
        store.flush().expect("there is room for the newest");
        assert_eq!(store.snapshot().total.demoted, u64::from(n) + 1);
        assert!(store.snapshot().ssd_file_bytes <= MIB && disk_bytes(directory.path()) <= MIB, "model {n}");
    }
}

#[test]
fn segments_follow_a_cap_that_was_lowered() {
    let directory = tempfile::tempdir().expect("a directory");
    for (cap, segment_bytes) in [(64 * MIB, 8 * MIB), (4 * MIB, 8 * MIB), (MIB, 64 << 10)] {
        let engine = Engine::Auto;
        let ssd = SsdOptions { path: directory.path().into(), capacity_bytes: cap, segment_bytes, engine };
        let store =
            Store::open(Options { ssd: Some(ssd), ..options(None, 2 * MIB, 0) }).expect("the directory is free");
        let model = register(&store, "m", FINE);
        put(&store, &model, &sequence(cap as u32 >> 20, 9, &FINE));
        store.flush().expect("there is room below the cap");
        assert!(store.snapshot().ssd_file_bytes <= cap && disk_bytes(directory.path()) <= cap);
    }
}

#[test]
fn a_new_model_takes_room_from_the_files_of_absent_ones_however_small_its_share() {
    let directory = tempfile::tempdir().expect("a directory");
    for (round, idle) in [0, 1, 0, 10].into_iter().enumerate() {
        let store = open(directory.path(), 4 * MIB, MIB);
        (0..idle).for_each(|n| drop(register(&store, &format!("idle {n}"), FINE)));
        let model = register(&store, &format!("m{round}"), FINE);
        (0..6).for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 8, &FINE)), 8));
        store.flush().expect("absent models make room");
        assert!(store.snapshot().total.demoted > 0);
        assert!(store.snapshot().ssd_file_bytes <= MIB && disk_bytes(directory.path()) <= MIB);
        store.close().expect("the disk is well");
    }
}

#[test]
fn blocks_reach_the_ssd_before_ram_runs_out_whatever_share_a_model_has() {
    let huge = shape(16, 2, 4, 512, Dtype::Fp32, 5);
    for (ram, resident, geometry) in [(2, 0, huge), (8, 60, COARSE)] {
        let directory = tempfile::tempdir().expect("a directory");
        let store = open(directory.path(), ram * MIB, 64 * MIB);
        let idle = register(&store, "idle", COARSE);
        put(&store, &idle, &sequence(0, resident, &COARSE));
        store.flush().expect("the disk is well");
        let model = register(&store, "m", geometry);
        let demoted = |seed| {
            put(&store, &model, &sequence(seed, 1, &geometry));
            store.snapshot().total.demoted > resident as u64
        };
        assert!((1..2000).any(demoted), "no block of {geometry:?} was written");
    }
}

#[test]
fn what_nobody_asks_for_again_is_never_written_with_second_touch_and_the_rest_is() {
    let directory = tempfile::tempdir().expect("a directory");
    let policy = WritePolicy::WriteThroughSecondTouch;
    let open = || Store::open(Options { policy, ..options(Some(directory.path()), 2 * MIB, 8 * MIB) }).expect("usable");
    let store = open();
    let model = register(&store, "m", FINE);
    // Ten times what RAM holds; every tenth is asked for at once, and of the longer ones only the first half.
    for seed in 0..200 {
        put(&store, &model, &sequence(seed, 8, &FINE));
        if seed % 10 == 0 {
            let half = sequence(seed, 4, &FINE);
            assert_eq!(fetch(&store, &model, &half), 4);
        }
    }
    store.flush().expect("the disk is well");
    let counts = store.snapshot().total;
    assert_eq!((counts.demoted, counts.demotions_dropped), (20 * 4, 0), "{counts:?}");
    store.close().expect("the disk is well");
    let store = open();
    let model = register(&store, "m", FINE);
    for seed in 0..200 {
        let found = fetch(&store, &model, &sequence(seed, 8, &FINE));
        assert_eq!(found, if seed % 10 == 0 { 4 } else { 0 }, "{seed}");
    }
}

#[test]
fn segments_leave_in_the_order_of_writing_but_for_what_was_asked_for_since() {
    let directory = tempfile::tempdir().expect("a directory");
    let open = || {
        let policy = WritePolicy::WriteThrough;
        let mut options = Options { policy, ..options(Some(directory.path()), MIB, 4 * MIB) };
        options.ssd.as_mut().expect("there is one").segment_bytes = 512 << 10;
        Store::open(options).expect("usable")
    };
    let store = open();
    let model = register(&store, "m", FINE);
    let (hot, cold) = (sequence(9_000, 3, &FINE), sequence(9_001, 3, &FINE));
    for tokens in [&hot, &cold] {
        put(&store, &model, tokens);
    }
    store.flush().expect("the disk is well");
    // Ten times what the SSD holds. RAM holds less than is put between two requests.
    for seed in 0..1200 {
        put(&store, &model, &sequence(seed, 3, &FINE));
        if seed % 8 == 0 {
            store.flush().expect("the disk is well");
        }
        if seed % 80 == 0 {
            assert_eq!(fetch(&store, &model, &hot), 3, "{seed}");
        }
    }
    store.flush().expect("the disk is well");
    assert_eq!((fetch(&store, &model, &hot), fetch(&store, &model, &cold)), (3, 0));
    let counts = store.snapshot().total;
    assert!(counts.reinserted >= 10, "{counts:?}");
    assert_eq!(counts.demoted, 1202 * 3, "each block was written for the first time once: {counts:?}");
    let ssd = counts.tiers[Tier::Ssd as usize];
    let amplification = ssd.written_bytes as f64 / (ssd.written_bytes - ssd.rewritten_bytes) as f64;
    assert!((1.0..1.15).contains(&amplification), "{amplification}");
    // The order holds across a restart: what was written last is found, what was before that is not.
    let found = |store: &Store, model: &Arc<Model>| {
        let tokens = 3 * FINE.block_tokens as usize;
        (0..1200).map(|seed| hold(store, model, &sequence(seed, 3, &FINE)).tokens() == tokens).collect::<Vec<bool>>()
    };
    let before = found(&store, &model);
    let first = before.iter().position(|&there| there).expect("the last ones are there");
    assert!(first > 1000 && before[first..].iter().all(|&there| there), "{before:?}");
    let mut store = store;
    for _ in 0..2 {
        store.close().expect("the disk is well");
        store = open();
        assert_eq!(found(&store, &register(&store, "m", FINE)), before);
    }
    // What was matched is warm; whoever opens it anew knows nothing of that.
    store.close().expect("the disk is well");
    let store = open();
    let model = register(&store, "m", FINE);
    for seed in 1200..1220 {
        put(&store, &model, &sequence(seed, 3, &FINE));
    }
    store.flush().expect("the disk is well");
    let after = found(&store, &model);
    let next = after.iter().position(|&there| there).expect("the last ones are there");
    assert!(next > first && after[next..].iter().all(|&there| there), "the oldest left: {first}, {next}");
}

#[test]
fn a_block_is_written_once_however_often_it_was_put() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 2 * MIB, 8 * MIB);
    let (one, two) = (register(&store, "one", COARSE), register(&store, "two", COARSE));
    for model in [&one, &two, &one] {
        put(&store, model, &sequence(0, 2, &COARSE));
    }
    store.flush().expect("the disk is well");
    assert_eq!(store.snapshot().total.demoted, 2);
}

#[test]
fn an_arena_of_no_or_of_endless_bytes_is_refused() {
    for ram in [0, u64::MAX / 2, u64::MAX] {
        let opened = Store::open(options(None, ram, 0));
        assert!([ErrorKind::Config, ErrorKind::Io].contains(&opened.expect_err("no such memory").kind()));
    }
}

#[test]
fn a_lowered_quota_of_ram_is_met_behind_and_blocks_stay_on_the_ssd() {
    for on_ssd in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let path = on_ssd.then(|| directory.path());
        let store = Store::open(options(path, 16 * MIB, 64 * MIB)).expect("the directory is free");
        let (model, other) = (register(&store, "m", COARSE), register(&store, "other", FINE));
        (0..8).for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 15, &COARSE)), 15));
        let held = hold(&store, &model, &sequence(3, 15, &COARSE));
        let used = |store: &Store| store.snapshot().models[0].1.tiers[0].used_bytes;
        assert!(used(&store) > 15 * MIB);
        let quota = |hard| Quota {
            tiers: [TierQuota { hard, ..Default::default() }, Default::default()],
            ..Default::default()
        };
        store.set_model_quota(&model, quota(Some(4 * MIB))).expect("it is more than one block");
        let started = std::time::Instant::now();
        while used(&store) > 4 * MIB {
            assert!(started.elapsed().as_secs() < 30, "{} bytes are left", used(&store));
            thread::yield_now();
        }
        assert_eq!(load(&held, &model, &sequence(3, 15, &COARSE)), 15, "what is held stays");
        let found: usize = (0..8).map(|seed| fetch(&store, &model, &sequence(seed, 15, &COARSE))).sum();
        assert!(if on_ssd { found == 120 } else { (15..=31).contains(&found) }, "{found} blocks");
        assert!(put(&store, &model, &sequence(9, 15, &COARSE)) > 0 && used(&store) <= 4 * MIB);
        assert!(put(&store, &other, &sequence(0, 170, &FINE)) == 170, "the room is free for others");
        assert_eq!(
            store.set_model_quota(&model, quota(Some(MIB / 8))).expect_err("below a block").kind(),
            ErrorKind::Input
        );
        store.set_model_quota(&model, quota(None)).expect("it is registered");
        assert_eq!(put(&store, &model, &sequence(10, 60, &COARSE)), 60);
    }
}

#[test]
fn a_full_index_stores_no_more_and_counts_it() {
    let index_bytes = Some(77 * 10);
    let store = Store::open(Options { index_bytes, ..options(None, 4 * MIB, 0) }).expect("memory is to be had");
    let model = register(&store, "m", FINE);
    assert_eq!(put(&store, &model, &sequence(0, 12, &FINE)), 10);
    assert_eq!(fetch(&store, &model, &sequence(0, 12, &FINE)), 10);
    let snapshot = store.snapshot();
    assert!(snapshot.index_refused >= 1 && snapshot.total.put_refused == 2 && snapshot.index_blocks == 10);
    assert!(snapshot.index_bytes <= 96 * 10);
}

#[test]
fn readers_that_never_rest_keep_nobody_waiting() {
    in_time(|| {
        let geometry = shape(1, 1, 1, 8, Dtype::Fp16, 16);
        let store = Store::open(options(None, 8 * MIB, 0)).expect("memory is to be had");
        let model = register(&store, "m", geometry);
        let hot = sequence(0, 64, &geometry);
        put(&store, &model, &hot);
        let held = hold(&store, &model, &hot);
        let done = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        assert_eq!(hold(&store, &model, &hot).tokens(), hot.len());
                    }
                });
            }
            // Each evicts others, and takes in what the readers touched.
            (1..400).for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 64, &geometry)), 64));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        held.release();
    });
}
