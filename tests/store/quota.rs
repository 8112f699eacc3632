//! Quotas: what nobody passes, what nobody loses to others, and sums that agree with a scan.

use super::kv::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use stratakv::codec::{Codec, Scheme};
use stratakv::stats::{Miss, Tier};
use stratakv::{Model, Options, Quota, Store, TierQuota, WritePolicy};

/// Sets a flag when it goes.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn tier(hard: Option<u64>, soft: Option<u64>, reserved: u64) -> TierQuota {
    TierQuota { hard, soft, reserved }
}

fn ram(limit: TierQuota) -> Quota {
    Quota { tiers: [limit, TierQuota::default()], ..Quota::default() }
}

fn ssd(limit: TierQuota) -> Quota {
    Quota { tiers: [TierQuota::default(), limit], ..Quota::default() }
}

/// Puts one prompt of a tenant; returns the blocks that are cached then.
fn put_of(store: &Store, model: &Model, tenant: &str, seed: u32, blocks: usize) -> usize {
    let geometry = model.spec().geometry;
    let tokens = sequence(seed, blocks, &geometry);
    let outcome = store.put(model, &tokens, "", tenant, &Kv::of(model, &tokens).view());
    outcome.expect("a put of right arguments never fails").tokens / geometry.block_tokens as usize
}

/// Matches one prompt of a tenant and checks every byte of it.
fn fetch_of(store: &Store, model: &Arc<Model>, tenant: &str, seed: u32, blocks: usize) -> (usize, Option<Miss>) {
    let tokens = sequence(seed, blocks, &model.spec().geometry);
    let lease = store.match_prefix(model, &tokens, "", tenant).expect("it is open");
    (load(&lease, model, &tokens), lease.miss())
}

fn bytes_of(store: &Store, tenant: &str) -> [u64; 2] {
    let tenants = store.snapshot().tenants;
    tenants.into_iter().find(|(name, ..)| name == tenant).map(|(.., used)| used.bytes).unwrap_or_default()
}

fn stepped(path: Option<&std::path::Path>, ram: u64, cap: u64) -> Store {
    let secret = Some("quota".into());
    Store::open(Options { stepped: true, secret, ..options(path, ram, cap) }).expect("it opens")
}

fn settle(store: &Store) {
    while store.step().expect("it is open") {}
}

#[test]
fn no_tenant_and_no_model_passes_a_hard_limit_for_a_moment_whatever_threads_do() {
    let directory = tempfile::tempdir().expect("a directory");
    let options = options(Some(directory.path()), 16 * MIB, 32 * MIB);
    let options = Options { policy: WritePolicy::WriteThrough, ..options };
    let store = Arc::new(Store::open(options).expect("the directory is free"));
    let models = ["a", "b"].map(|name| register(&store, name, FINE));
    let record = FINE.record_bytes() as u64;
    let limits = [("x", 20 * record, 60 * record), ("y", 7 * record + 100, 9 * record), ("z", 0, 0)];
    for (tenant, in_ram, on_ssd) in limits {
        let tiers = [tier(Some(in_ram), None, 0), tier(Some(on_ssd), None, 0)];
        store.set_tenant_quota(tenant, Quota { tiers, ..Quota::default() }).expect("it is open");
    }
    store.set_model_quota(&models[1], ram(tier(Some(3 * MIB), None, 0))).expect("it is registered");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let puts = |thread: u32| {
            let mut dice = Dice(u64::from(thread));
            for n in 0..400 {
                let (model, tenant) = (&models[dice.below(2)], ["", "x", "y", "z"][dice.below(4)]);
                let cached = put_of(&store, model, tenant, thread * 10_000 + n, 1 + dice.below(12));
                assert!(tenant != "z" || cached == 0);
                fetch_of(&store, model, tenant, thread * 10_000 + dice.below(n as usize + 1) as u32, 6);
            }
        };
        // A panic here ends the watcher, too.
        let end = End(&done);
        let writers: Vec<_> = (0..3).map(|thread| scope.spawn(move || puts(thread))).collect();
        let watcher = scope.spawn(|| {
            let mut most = [0; 2];
            while !done.load(Ordering::Relaxed) {
                for (tenant, in_ram, on_ssd) in limits {
                    let [now_ram, now_ssd] = bytes_of(&store, tenant);
                    assert!(now_ram <= in_ram && now_ssd <= on_ssd, "{tenant}: {now_ram} {now_ssd}");
                    most = [now_ram.max(most[0]), now_ssd.max(most[1])];
                }
                let used = store.snapshot().usage;
                assert!(used.iter().all(|(name, used)| name == "a" || used.bytes[0] <= 3 * MIB), "{used:?}");
            }
            most
        });
        writers.into_iter().for_each(|writer| writer.join().expect("no panic"));
        // However slow the disk was.
        for seed in 40_000..40_030 {
            put_of(&store, &models[0], "x", seed, 4);
            store.flush().expect("the disk is well");
        }
        drop(end);
        let most = watcher.join().expect("no panic");
        assert!(most[0] >= 18 * record && most[1] >= 50 * record, "{most:?}");
    });
    assert!(store.snapshot().total.put_over_quota > 0);
}

#[test]
fn what_tenants_have_is_what_a_scan_finds_and_is_known_again_after_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let tenants = ["", "x", "y"];
    let mut found = Vec::new();
    for round in 0..3 {
        let store = stepped(Some(directory.path()), 4 * MIB, 16 * MIB);
        let models = ["a", "b"].map(|name| register(&store, name, FINE));
        let found_of = |tenant: &str, model: &Arc<Model>, seed: u32| {
            let tokens = sequence(seed, 8, &FINE);
            let lease = store.match_prefix(model, &tokens, "", tenant).expect("it is open");
            (lease.tokens() / FINE.block_tokens as usize) as u64
        };
        let scan = || -> Vec<u64> {
            let all = |tenant: &&str| (0..80).map(|n| found_of(tenant, &models[n % 2], n as u32 / 2)).sum();
            tenants.iter().map(all).collect()
        };
        let after_restart: Vec<[u64; 2]> = tenants.iter().map(|tenant| bytes_of(&store, tenant)).collect();
        let scanned = scan();
        assert!(round == 0 || found == scanned, "{found:?} {scanned:?}");
        for (n, tenant) in tenants.iter().enumerate() {
            // A tenant is called by its name once it was used; what it has is booked before.
            assert!(round == 0 || tenant.is_empty() || after_restart[n] == [0, 0]);
            assert_eq!(bytes_of(&store, tenant), [0, scanned[n] * FINE.record_bytes() as u64], "{tenant:?}");
        }
        let mut dice = Dice(round);
        for _ in 0..60 {
            let (model, tenant) = (&models[dice.below(2)], tenants[dice.below(3)]);
            put_of(&store, model, tenant, dice.below(40) as u32, 1 + dice.below(8));
            fetch_of(&store, &models[dice.below(2)], tenants[dice.below(3)], dice.below(40) as u32, 8);
            settle(&store);
            let snapshot = store.snapshot();
            for (n, tier) in snapshot.total.tiers.iter().enumerate() {
                let booked: u64 = snapshot.tenants.iter().map(|(_, counts, _)| counts.tiers[n].used_bytes).sum();
                let held: u64 = snapshot.tenants.iter().map(|(.., used)| used.bytes[n]).sum();
                assert!(booked == tier.used_bytes && held == booked, "{booked} {held} {}", tier.used_bytes);
            }
            let [by_model, by_tenant] = [
                snapshot.models.iter().map(|(_, counts)| *counts).collect::<Vec<_>>(),
                snapshot.tenants.iter().map(|(_, counts, _)| *counts).collect::<Vec<_>>(),
            ];
            for counts in [by_model, by_tenant] {
                let mut sum = stratakv::stats::Counts::default();
                counts.iter().for_each(|counts| sum.add(counts));
                assert_eq!(sum, snapshot.total);
            }
        }
        store.flush().expect("the disk is well");
        found = scan();
        store.close().expect("the disk is well");
    }
}

#[test]
fn what_is_reserved_for_a_tenant_is_not_taken_for_others_on_any_tier() {
    let directory = tempfile::tempdir().expect("a directory");
    for path in [None, Some(directory.path())] {
        let store = stepped(path, 4 * MIB, 6 * MIB);
        let models = ["a", "b"].map(|name| register(&store, name, FINE));
        let record = FINE.record_bytes() as u64;
        let kept = tier(None, None, 40 * record);
        store.set_tenant_quota("kept", Quota { tiers: [kept, kept], ..Quota::default() }).expect("it is open");
        for seed in 0..10 {
            assert_eq!(put_of(&store, &models[0], "kept", seed, 4), 4);
        }
        settle(&store);
        if path.is_some() {
            store.flush().expect("the disk is well");
        }
        for seed in 100..1100 {
            let cached = put_of(&store, &models[(seed % 2) as usize], ["", "other"][(seed / 2 % 2) as usize], seed, 4);
            assert!(cached > 0, "there is room beside what is reserved");
            settle(&store);
            let [in_ram, on_ssd] = bytes_of(&store, "kept");
            assert!(in_ram >= 40 * record, "{seed}: {in_ram}");
            assert!(path.is_none() || on_ssd >= 32 * record, "{seed}: {on_ssd}: at most a segment is written again");
        }
        for seed in 0..10 {
            assert_eq!(fetch_of(&store, &models[0], "kept", seed, 4), (4, None), "{path:?}");
        }
        // What is its own makes room for its own.
        for seed in 2000..2400 {
            assert!(put_of(&store, &models[0], "kept", seed, 4) > 0);
            settle(&store);
        }
    }
}

#[test]
fn what_is_lent_leaves_before_all_else() {
    let store = stepped(None, 4 * MIB, 0);
    let model = register(&store, "a", FINE);
    let record = FINE.record_bytes() as u64;
    store.set_tenant_quota("lent", ram(tier(None, Some(20 * record), 0))).expect("it is open");
    for seed in 0..20 {
        assert_eq!(put_of(&store, &model, "", seed, 4), 4);
    }
    for seed in 0..60 {
        put_of(&store, &model, "lent", seed, 4);
    }
    assert!(bytes_of(&store, "lent")[0] > 200 * record, "what nobody uses is its own");
    for seed in 100..150 {
        assert_eq!(put_of(&store, &model, "", seed, 4), 4);
    }
    for seed in 0..20 {
        assert_eq!(fetch_of(&store, &model, "", seed, 4).0, 4, "older, and not lent");
    }
    assert!((20 * record..150 * record).contains(&bytes_of(&store, "lent")[0]));
}

#[test]
fn a_lowered_limit_of_the_ssd_is_met_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = stepped(Some(directory.path()), 4 * MIB, 32 * MIB);
    let model = register(&store, "a", FINE);
    let record = FINE.record_bytes() as u64;
    (0..40).for_each(|seed| assert_eq!(put_of(&store, &model, "x", seed, 4), 4));
    (0..40).for_each(|seed| assert_eq!(put_of(&store, &model, "", seed, 4), 4));
    store.flush().expect("the disk is well");
    assert_eq!(bytes_of(&store, "x")[1], 160 * record);
    store.set_tenant_quota("x", ssd(tier(Some(50 * record), None, 0))).expect("it is open");
    settle(&store);
    assert_eq!(bytes_of(&store, "x")[1], 50 * record);
    let file = |store: &Store| store.snapshot().usage[0].1.bytes[1];
    assert!(file(&store) > 3 * MIB);
    store.set_model_quota(&model, ssd(tier(Some(2 * MIB), None, 0))).expect("it is registered");
    settle(&store);
    assert!(file(&store) <= 2 * MIB && disk_bytes(directory.path()) <= 2 * MIB + 128 * 1024, "{}", file(&store));
    // It goes on, within its limit.
    for seed in 100..300 {
        put_of(&store, &model, "", seed, 4);
        settle(&store);
        assert!(file(&store) <= 2 * MIB);
    }
    store.flush().expect("the disk is well");
    assert!((290..300).map(|seed| fetch_of(&store, &model, "", seed, 4).0).sum::<usize>() > 0);
}

#[test]
fn tokens_a_second_and_loads_at_a_time_are_limited_and_a_miss_says_so() {
    let store = stepped(None, 4 * MIB, 0);
    let model = register(&store, "a", FINE);
    // So little that nothing comes back while this runs.
    let slow = Quota { tokens_per_s: Some(1e-9), ..Quota::default() };
    store.set_tenant_quota("slow", slow).expect("it is open");
    assert_eq!(put_of(&store, &model, "slow", 0, 4), 1, "one block may always be stored");
    assert_eq!(put_of(&store, &model, "slow", 1, 4), 0);
    assert_eq!(fetch_of(&store, &model, "slow", 0, 4), (1, Some(Miss::Quota)));
    assert_eq!(fetch_of(&store, &model, "slow", 2, 4), (0, Some(Miss::NeverStored)));
    assert_eq!(store.snapshot().total.put_over_quota, 7);
    store.set_tenant_quota("slow", Quota::default()).expect("it is open");
    assert_eq!(put_of(&store, &model, "slow", 1, 4), 4);
    store.set_model_quota(&model, Quota { loads: Some(0), ..Quota::default() }).expect("it is registered");
    let tokens = sequence(1, 4, &FINE);
    let lease = store.match_prefix(&model, &tokens, "", "slow").expect("it is open");
    let outcome = lease.load(&Kv::blank(FINE, tokens.len()).view()).expect("right arguments");
    assert_eq!((outcome.tokens, outcome.miss), (0, Some(Miss::Quota)));
    store.set_model_quota(&model, Quota { loads: Some(1), ..Quota::default() }).expect("it is registered");
    for _ in 0..3 {
        assert_eq!(load(&lease, &model, &tokens), 4, "one after the other");
    }
}

#[test]
fn quotas_are_kept_in_the_directory_and_damage_is_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let reopened = || stepped(Some(directory.path()), 4 * MIB, 16 * MIB);
    let store = reopened();
    assert_eq!(store.kept_quotas().expect("nothing is wrong"), None);
    store.keep_quotas(b"some").expect("the disk is well");
    store.keep_quotas(&vec![7; 10_000]).expect("the disk is well");
    let snapshot = store.snapshot();
    assert!(disk_bytes(directory.path()) <= snapshot.ssd_file_bytes);
    store.close().expect("the disk is well");
    assert_eq!(reopened().kept_quotas().expect("nothing is wrong"), Some(vec![7; 10_000]));
    std::fs::write(directory.path().join("quotas"), b"nothing of the kind").expect("it is writable");
    let store = reopened();
    assert!(store.kept_quotas().expect_err("it is damaged").to_string().contains("set the quotas anew"));
    store.keep_quotas(b"anew").expect("the disk is well");
    drop(store);
    assert_eq!(reopened().kept_quotas().expect("nothing is wrong"), Some(b"anew".to_vec()));
    assert_eq!(stepped(None, 4 * MIB, 0).kept_quotas().expect("there is none"), None);
}

#[test]
fn tenants_without_end_take_no_memory_without_end_and_the_sums_stay_exact() {
    let store = stepped(None, 2 * MIB, 0);
    let model = register(&store, "a", FINE);
    for tenant in 0..40_000u32 {
        assert_eq!(put_of(&store, &model, &format!("tenant {tenant}"), 0, 1), 1);
    }
    let snapshot = store.snapshot();
    assert!((1000..=16_386).contains(&snapshot.tenants.len()), "{}", snapshot.tenants.len());
    let puts: u64 = snapshot.tenants.iter().map(|(_, counts, _)| counts.put_blocks).sum();
    assert_eq!((puts, snapshot.models[0].1.put_blocks, snapshot.total.put_blocks), (40_000, 40_000, 40_000));
    let used: u64 = snapshot.tenants.iter().map(|(.., used)| used.bytes[0]).sum();
    assert_eq!(used, snapshot.total.tiers[0].used_bytes);
}

#[test]
fn a_rate_that_is_used_up_stores_nothing_whatever_the_codec() {
    let store = stepped(None, 4 * MIB, 0);
    let geometry = shape(2, 2, 2, 64, stratakv::Dtype::Fp32, 16);
    let model = register(&store, "a", geometry);
    // Its first block is longer than the others.
    store.set_codec(&model, Tier::Ram, Scheme::new(Codec::Int4, &geometry)).expect("it fits");
    store.set_tenant_quota("x", Quota { tokens_per_s: Some(1e-9), ..Quota::default() }).expect("it is open");
    assert_eq!(put_of(&store, &model, "x", 0, 3), 1);
    let held = bytes_of(&store, "x");
    (1..20).for_each(|seed| assert_eq!(put_of(&store, &model, "x", seed, 3), 0));
    assert_eq!(bytes_of(&store, "x"), held);
}

#[test]
fn a_model_that_may_have_no_file_keeps_nobody_waiting_and_takes_nothing_from_others() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = stepped(Some(directory.path()), 4 * MIB, 16 * MIB);
    let absent = register(&store, "absent", FINE);
    (0..60).for_each(|seed| assert_eq!(put_of(&store, &absent, "", seed, 4), 4));
    store.close().expect("the disk is well");
    let store = Arc::new(stepped(Some(directory.path()), 4 * MIB, 16 * MIB));
    let none = Quota { tiers: [TierQuota::default(), tier(Some(0), None, 0)], ..Quota::default() };
    let model = store.register_with(spec("none", FINE), none).expect("it fits");
    let other = register(&store, "other", FINE);
    (0..60).for_each(|seed| assert_eq!(put_of(&store, &other, "", seed, 4), 4));
    store.flush().expect("the disk is well");
    let before = store.snapshot().usage[1].1.bytes[1];
    (0..20).for_each(|seed| assert_eq!(put_of(&store, &model, "", seed, 4), 4));
    let flushing = store.clone();
    in_time(move || flushing.flush()).expect("there is nothing that may be written");
    let usage = store.snapshot().usage;
    assert_eq!((usage[0].0.as_str(), usage[1].1.bytes[1]), ("none", before));
    assert_eq!(fetch_of(&store, &model, "", 3, 4).0, 4, "it is in RAM");
}

#[test]
fn a_lowered_limit_is_met_though_the_ssd_takes_nothing_of_the_tenant() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = stepped(Some(directory.path()), 4 * MIB, 16 * MIB);
    let model = register(&store, "a", FINE);
    let record = FINE.record_bytes() as u64;
    let quota = |in_ram| Quota { tiers: [tier(in_ram, None, 0), tier(Some(0), None, 0)], ..Quota::default() };
    store.set_tenant_quota("x", quota(None)).expect("it is open");
    (0..20).for_each(|seed| assert_eq!(put_of(&store, &model, "x", seed, 4), 4));
    store.flush().expect("the disk is well");
    assert_eq!(bytes_of(&store, "x"), [80 * record, 0]);
    store.set_tenant_quota("x", quota(Some(10 * record))).expect("it is open");
    settle(&store);
    assert_eq!(bytes_of(&store, "x"), [10 * record, 0]);
}

#[test]
fn a_record_that_could_never_fit_costs_a_tenant_no_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = stepped(Some(directory.path()), 8 * MIB, 16 * MIB);
    let (fine, coarse) = (register(&store, "fine", FINE), register(&store, "coarse", COARSE));
    let limit = 6 * FINE.record_bytes() as u64;
    assert!(limit < COARSE.record_bytes() as u64);
    store.set_tenant_quota("x", ssd(tier(Some(limit), None, 0))).expect("it is open");
    assert_eq!(put_of(&store, &fine, "x", 0, 6), 6);
    store.flush().expect("the disk is well");
    assert_eq!(bytes_of(&store, "x")[1], limit);
    assert_eq!(put_of(&store, &coarse, "x", 1, 3), 3);
    store.flush().expect("the disk is well");
    assert_eq!(bytes_of(&store, "x")[1], limit, "nothing was forgotten for nothing");
}
