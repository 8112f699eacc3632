//! What is counted: every miss has one reason, in a match as in a load; nothing that was counted is forgotten.

use crate::kv::*;
use crate::rig::*;
use std::sync::Arc;
use stratakv::stats::{Counts, Histogram, Miss, Snapshot, Tier};
use stratakv::{Dtype, Lease, Model, Options, Quota, Store, TierQuota, WritePolicy};

/// Blocks missed by reason, of those for which there are any.
fn missed(counts: &Counts) -> Vec<(Miss, u64)> {
    Miss::ALL.into_iter().zip(counts.missed).filter(|&(_, blocks)| blocks > 0).collect()
}

/// The same of blocks that were asked for by loads.
fn unloaded(counts: &Counts) -> Vec<(Miss, u64)> {
    Miss::ALL.into_iter().zip(counts.unloaded).filter(|&(_, blocks)| blocks > 0).collect()
}

fn counts_of(snapshot: &Snapshot, model: &str) -> Counts {
    snapshot.models.iter().find(|(name, _)| name == model).map(|(_, counts)| *counts).expect("it is registered")
}

// So that the same blocks are in a sample every time.
fn known() -> Option<String> {
    Some("counts".into())
}

fn memory(ram: u64) -> Store {
    Store::open(Options { secret: known(), stepped: true, ..options(None, ram, 0) }).expect("memory is to be had")
}

fn why(lease: &Lease) -> (usize, Option<Miss>) {
    (lease.tokens() / lease.geometry().block_tokens as usize, lease.miss())
}

#[test]
fn a_match_counts_all_that_it_misses_by_why_it_misses_the_first() {
    let store = memory(2 * MIB);
    let (model, other) = (register(&store, "m", COARSE), register(&store, "n", FINE));
    let snapshot = |expected: &[(Miss, u64)]| {
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        assert_eq!(missed(&snapshot.total), expected);
        snapshot
    };
    let tokens = sequence(0, 5, &COARSE);
    assert_eq!(why(&hold(&store, &model, &tokens)), (0, Some(Miss::NeverStored)));
    snapshot(&[(Miss::NeverStored, 5)]);
    put(&store, &model, &tokens[..3 * 8]);
    assert_eq!(why(&hold(&store, &model, &tokens)), (3, Some(Miss::NeverStored)));
    snapshot(&[(Miss::NeverStored, 7)]);
    // Others take its room.
    for seed in 1..20 {
        put(&store, &model, &sequence(seed, 3, &COARSE));
    }
    assert_eq!(why(&hold(&store, &model, &tokens)), (0, Some(Miss::Evicted)));
    snapshot(&[(Miss::NeverStored, 7), (Miss::Evicted, 5)]);
    let quota = Quota {
        tiers: [TierQuota { hard: Some(0), ..TierQuota::default() }, TierQuota::default()],
        ..Quota::default()
    };
    store.set_tenant_quota("none", quota).expect("it is open");
    assert_eq!(store.put(&other, &tokens, "", "none", &Kv::of(&other, &tokens).view()).expect("no error").tokens, 0);
    let found = store.match_prefix(&other, &tokens, "", "none").expect("it is open");
    assert_eq!(why(&found), (0, Some(Miss::Quota)));
    let all = snapshot(&[(Miss::NeverStored, 7), (Miss::Evicted, 5), (Miss::Quota, 5)]);
    assert_eq!(missed(&counts_of(&all, "m")), [(Miss::NeverStored, 7), (Miss::Evicted, 5)]);
    assert_eq!(missed(&counts_of(&all, "n")), [(Miss::Quota, 5)]);
    let tenant = all.tenants.iter().find(|(name, ..)| name == "none").expect("it was seen");
    assert_eq!(missed(&tenant.1), [(Miss::Quota, 5)]);
}

#[test]
fn what_was_dropped_retired_or_unregistered_is_counted_and_so_is_who_asks_for_it() {
    let store = memory(4 * MIB);
    let model = register(&store, "m", FINE);
    let tokens = sequence(0, 4, &FINE);
    let fill = |model: &Arc<Model>| assert_eq!(put(&store, model, &tokens), 4);
    fill(&model);
    let old = store.sequence(&model, "", "", tokens.clone());
    assert_eq!(store.drop_namespace(&model, "", "").expect("there is no disk"), 4);
    assert_eq!(why(&store.match_sequence(&model, old).expect("it is open")), (0, Some(Miss::Dropped)));
    assert_eq!(why(&hold(&store, &model, &tokens)), (0, Some(Miss::NeverStored)));
    fill(&model);
    store.retire(&model, true).expect("it is open");
    assert_eq!(why(&hold(&store, &model, &tokens)), (0, Some(Miss::Dropped)));
    store.retire(&model, false).expect("it is open");
    assert_eq!(why(&hold(&store, &model, &tokens)), (0, Some(Miss::Dropped)), "of the same name, and forgotten then");
    fill(&model);
    let held = hold(&store, &model, &tokens);
    store.unregister(&model).expect("it is registered");
    assert_eq!(why(&hold(&store, &model, &tokens)), (0, Some(Miss::Closed)));
    let outcome = held.load(&Kv::blank(FINE, tokens.len()).view()).expect("right arguments");
    assert_eq!((outcome.tokens, outcome.miss), (0, Some(Miss::Closed)));
    let snapshot = store.snapshot();
    assert_sums(&snapshot);
    assert_eq!(snapshot.total.dropped, 12);
    assert_eq!(missed(&snapshot.total), [(Miss::NeverStored, 4), (Miss::Dropped, 12), (Miss::Closed, 4)]);
    assert_eq!(unloaded(&snapshot.total), [(Miss::Closed, 4)]);
    let again = register(&store, "m", FINE);
    assert_eq!(why(&hold(&store, &again, &tokens)), (0, Some(Miss::Dropped)));
    assert_eq!(missed(&counts_of(&store.snapshot(), "m")), [(Miss::Dropped, 4)]);
}

#[test]
fn what_another_tier_may_have_counts_once_that_is_known() {
    let store = memory(4 * MIB);
    let model = register(&store, "m", FINE);
    let tokens = sequence(0, 10, &FINE);
    put(&store, &model, &tokens[..6 * 8]);
    store.unregister(&model).expect("it is registered");
    // So the first six are known to be dropped, and the others are not known.
    let model = register(&store, "m", FINE);
    let whole = store.sequence(&model, "", "", tokens);
    let hold = || store.match_here(&model, whole.clone()).expect("it is open");
    let counted = |hit: u64, expected: &[(Miss, u64)]| {
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        assert_eq!((snapshot.total.hit, &missed(&snapshot.total)[..]), (hit, expected));
    };
    let none = hold();
    counted(0, &[]);
    none.release();
    counted(0, &[(Miss::Dropped, 10)]);
    // Eight of ten are there, of which two cannot be had.
    let none = hold();
    none.found_elsewhere(8, None);
    counted(0, &[(Miss::Dropped, 12)]);
    put(&store, &model, &whole.tokens()[..6 * 8]);
    let some = none.extended(&whole, 8, Some(Miss::Timeout)).expect("it is open");
    assert_eq!((why(&none), why(&some)), ((0, Some(Miss::Dropped)), (6, Some(Miss::NeverStored))));
    let timeout = &[(Miss::Dropped, 12), (Miss::Timeout, 2)];
    counted(6, timeout);
    drop((none, some));
    counted(6, timeout);
    // They are there, and are not loaded.
    let some = hold();
    some.found_elsewhere(4, None);
    counted(12, timeout);
    drop(some);
    counted(16, timeout);
    // They were there, and are not any more.
    let some = hold();
    some.found_elsewhere(4, None);
    some.found_elsewhere(1, Some(Miss::Failed));
    let failed = &[(Miss::Dropped, 12), (Miss::Timeout, 2), (Miss::Failed, 3)];
    counted(22, failed);
    some.release();
    some.release();
    counted(23, failed);
    let total = store.snapshot().total;
    assert_eq!((total.asked, total.matches), (40, 4));
    // All of it is here: nothing is owed.
    put(&store, &model, whole.tokens());
    let all = hold();
    all.found_elsewhere(3, Some(Miss::Timeout));
    counted(33, failed);
    drop(all);
    counted(33, failed);
}

#[test]
fn a_load_that_ends_early_counts_all_that_it_was_asked_for_and_did_not_deliver() {
    for (fault, expected) in [(EIO, Miss::Io), (Fault::Flip, Miss::Corrupt)] {
        let directory = tempfile::tempdir().expect("a directory");
        let rig = Rig::default();
        let options = Options { stepped: true, threads: 1, ..options(Some(directory.path()), 2 * MIB, 4 * MIB) };
        let open = || Store::open_on(options.clone(), Arc::new(rig.clone())).expect("the disk is sound");
        let store = open();
        let tokens = sequence(0, 6, &COARSE);
        put(&store, &register(&store, "m", COARSE), &tokens);
        store.close().expect("the disk is sound");
        let store = open();
        let model = register(&store, "m", COARSE);
        let (lease, other) = (hold(&store, &model, &tokens), hold(&store, &model, &tokens));
        assert_eq!(why(&lease), (6, None));
        let load_part = |lease: &Lease, part| {
            let outcome = lease.load_part(&Kv::blank(COARSE, tokens.len()).view(), part).expect("right arguments");
            (outcome.tokens / 8, outcome.miss)
        };
        assert_eq!(load_part(&lease, 0..2), (2, None));
        rig.set(Some(Arc::new(move |call| (call == Call::Read).then_some(fault))));
        assert_eq!(load_part(&lease, 3..5), (3, Some(expected)));
        rig.set(None);
        // The fourth was forgotten, and so what continues it: another load is told the same.
        assert_eq!(load_part(&other, 0..6), (3, Some(expected)));
        assert_eq!(why(&hold(&store, &model, &tokens)), (3, Some(expected)));
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        let total = snapshot.total;
        assert_eq!((unloaded(&total), missed(&total)), (vec![(expected, 5)], vec![(expected, 3)]));
        assert_eq!((total.loads, total.loaded_tokens, total.corrupt + total.io_errors), (3, 5 * 8, 1));
    }
}

#[test]
fn every_put_and_load_is_counted_with_its_time() {
    let store = memory(2 * MIB);
    let model = register(&store, "m", COARSE);
    let tokens = sequence(0, 5, &COARSE);
    // One that finds all there takes no lock, and counts.
    (0..3).for_each(|_| assert_eq!(put(&store, &model, &tokens), 5));
    (0..2).for_each(|_| assert_eq!(fetch(&store, &model, &tokens), 5));
    let counts = store.snapshot().total;
    assert_eq!((counts.puts, counts.loads), (3, 2));
    assert!(counts.put_ns > 0 && counts.load_ns > 0);
    let mut short = Kv::blank(COARSE, 8);
    let refused = store.put(&model, &tokens, "", "", &short.view());
    assert!(refused.is_err() && hold(&store, &model, &tokens).load(&short.view()).is_err());
    store.unregister(&model).expect("it is registered");
    let after = store.snapshot().total;
    assert_eq!((after.puts, after.loads), (3, 2), "what was no call counts not, and what was does for ever");
    assert!(after.put_ns == counts.put_ns && after.load_ns == counts.load_ns);
}

#[test]
fn one_block_in_sixteen_is_timed_where_it_is_and_where_it_is_found() {
    let directory = tempfile::tempdir().expect("a directory");
    let options = Options {
        policy: WritePolicy::WriteThrough,
        secret: known(),
        stepped: true,
        ..options(Some(directory.path()), 2 * MIB, 64 * MIB)
    };
    let store = Store::open(options).expect("the directory is usable");
    let model = register(&store, "m", FINE);
    let long = sequence(0, 100, &FINE);
    put(&store, &model, &long);
    store.flush().expect("the disk is well");
    // The first match of a block ends no gap; a snapshot takes in what was matched.
    for _ in 0..9 {
        assert_eq!(why(&hold(&store, &model, &long)), (100, None));
        store.snapshot();
    }
    let all = |histogram: &Histogram| histogram.counts.iter().sum::<u64>();
    let [ram, ssd] = store.snapshot().total.tiers;
    let gaps = all(&ram.reuse_gap);
    assert!((8..8 * 20).contains(&gaps) && gaps.is_multiple_of(8), "{gaps} of 800");
    assert_eq!((all(&ram.residence), all(&ssd.reuse_gap), all(&ssd.residence)), (0, 0, 0));
    for seed in 1..20 {
        put(&store, &model, &sequence(seed, 100, &FINE));
        store.flush().expect("the disk is well");
    }
    // Together, as long as nobody has the lock.
    (0..3).for_each(|_| assert_eq!(why(&hold(&store, &model, &long)), (100, None)));
    let [ram, ssd] = store.snapshot().total.tiers;
    assert!(ram.evicted > 1500, "{} left", ram.evicted);
    let (left, of_all) = (all(&ram.residence), ram.evicted);
    assert!((of_all / 20..of_all / 12).contains(&left), "{left} of {of_all}");
    assert_eq!((all(&ram.reuse_gap), all(&ssd.reuse_gap)), (gaps, gaps / 8 * 3), "they were found on SSD");
    let before = store.snapshot().total.tiers[Tier::Ram as usize];
    let there = store.snapshot().total.tiers.map(|tier| tier.blocks);
    store.unregister(&model).expect("it is registered");
    let after = store.snapshot().total;
    let [ram, ssd] = after.tiers;
    assert_eq!(after.dropped, there[1], "all were on SSD, and some in RAM as well");
    assert!(all(&ssd.residence) > there[1] / 32 && all(&ram.residence) >= all(&before.residence));
    assert_eq!(ram.reuse_gap, before.reuse_gap);
}

#[test]
fn the_ceiling_is_known_after_a_hundred_asks_and_does_not_care_what_is_cached() {
    // Blocks of so many tokens are all in the sample.
    let geometry = shape(1, 1, 1, 2, Dtype::Bf16, 4096);
    let store = memory(2 * MIB);
    let model = register(&store, "m", geometry);
    register(&store, "n", FINE);
    let prompts: Vec<_> = (0..60).map(|seed| sequence(seed, 1, &geometry)).collect();
    let ask = |tokens: &[u32]| {
        if hold(&store, &model, tokens).tokens() == 0 {
            put(&store, &model, tokens);
        }
    };
    prompts.iter().for_each(|tokens| ask(tokens));
    assert_eq!(store.snapshot().hit_ceiling, []);
    (0..4).for_each(|_| prompts.iter().for_each(|tokens| ask(tokens)));
    let snapshot = store.snapshot();
    let [(name, ceiling)] = &snapshot.hit_ceiling[..] else { panic!("{:?}", snapshot.hit_ceiling) };
    assert!(name == "m" && (ceiling - 0.8).abs() < 0.01, "{ceiling}");
    let hit = snapshot.total.hit as f64 / snapshot.total.asked as f64;
    assert!(snapshot.total.tiers[0].evicted > 0 && hit < 0.79, "{hit}");
    store.age_curves(0.0).expect("it is open");
    assert_eq!(store.snapshot().hit_ceiling, snapshot.hit_ceiling, "never aged");
    // A prompt may be asked for more often than it is put: that no cache can help.
    let store = memory(8 * MIB);
    let model = register(&store, "m", geometry);
    for _ in 0..5 {
        for tokens in &prompts {
            let asks = if hold(&store, &model, tokens).tokens() == 0 { 2 } else { 0 };
            (0..asks).for_each(|_| drop(hold(&store, &model, tokens)));
            put(&store, &model, tokens);
        }
    }
    let Snapshot { hit_ceiling, total, .. } = store.snapshot();
    assert_eq!((total.asked, total.hit, total.tiers[0].evicted), (60 * 7, 60 * 4, 0));
    assert!((hit_ceiling[0].1 - 4.0 / 7.0).abs() < 0.01, "{hit_ceiling:?}");
}

#[test]
fn free_bytes_are_what_no_slot_has_and_the_longest_piece_of_them_may_be_short() {
    let store = memory(4 * MIB);
    let look = || {
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        (snapshot.ram_free_bytes, snapshot.ram_largest_free_bytes)
    };
    assert_eq!(look(), (4 * MIB, 4 * MIB));
    let models = ["m", "n"].map(|name| register(&store, name, FINE));
    let record = FINE.record_bytes() as u64;
    put(&store, &models[0], &sequence(0, 10, &FINE));
    assert_eq!(look(), (4 * MIB - 10 * record, 2 * MIB), "the other chunk");
    put(&store, &models[1], &sequence(0, 10, &FINE));
    let (free, longest) = look();
    assert_eq!(free, 4 * MIB - 20 * record);
    assert!((MIB..2 * MIB).contains(&longest), "{longest}");
    models.iter().for_each(|model| store.unregister(model).expect("it is registered"));
    assert_eq!(look(), (4 * MIB, 4 * MIB));
}

#[test]
fn what_waits_to_be_written_is_told_by_model() {
    for policy in [WritePolicy::WriteThrough, WritePolicy::WriteThroughSecondTouch] {
        let directory = tempfile::tempdir().expect("a directory");
        let options = Options { policy, stepped: true, ..options(Some(directory.path()), 4 * MIB, 8 * MIB) };
        let store = Store::open(options).expect("the directory is usable");
        let (model, other) = (register(&store, "m", FINE), register(&store, "n", FINE));
        let waiting = || store.snapshot().demotion_queue.into_iter().map(|(_, blocks)| blocks).collect::<Vec<_>>();
        let tokens = sequence(0, 5, &FINE);
        put(&store, &model, &tokens);
        if policy == WritePolicy::WriteThroughSecondTouch {
            assert_eq!(waiting(), [0, 0], "nobody asked again");
            drop(hold(&store, &model, &tokens));
        }
        assert_eq!(waiting(), [5, 0]);
        put(&store, &model, &tokens);
        assert_eq!(waiting(), [5, 0], "once");
        store.drop_namespace(&model, "", "").expect("the disk is well");
        assert_eq!(waiting(), [0, 0]);
        let tokens = sequence(1, 3, &FINE);
        put(&store, &other, &tokens);
        drop(hold(&store, &other, &tokens));
        assert_eq!(waiting(), [0, 3]);
        store.flush().expect("the disk is well");
        assert_eq!(waiting(), [0, 0]);
    }
}
