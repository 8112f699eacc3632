//! Dividing the tiers: what one model gives another, and what it never does.

use super::kv::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use stratakv::{Dtype, ErrorKind, Model, Share, Store};

fn held(store: &Store) -> BTreeMap<String, u64> {
    store.snapshot().ram_held.into_iter().collect()
}

fn files(path: &std::path::Path) -> Vec<u64> {
    let mut found: Vec<u64> = std::fs::read_dir(path)
        .expect("a directory")
        .filter_map(|entry| {
            let path = entry.expect("an entry").path();
            path.extension().is_some_and(|e| e == "kv").then(|| blocks_of(&path))
        })
        .collect();
    found.sort_unstable();
    found
}

fn blocks_of(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

// Demotion happens where it is called.
fn stepped(path: Option<&std::path::Path>, ram: u64, cap: u64) -> Store {
    let secret = Some("divide".into());
    Store::open(stratakv::Options { stepped: true, secret, ..options(path, ram, cap) }).expect("it opens")
}

fn fill(store: &Store, model: &Model, seeds: std::ops::Range<u32>) {
    for seed in seeds {
        put(store, model, &sequence(seed, 16, &FINE));
        while store.step().expect("it is open") {}
    }
}

fn divide(store: &Store, models: &[Arc<Model>], ram: &[u64], ssd: &[u64]) {
    let shares = models.iter().zip(ram).zip(ssd);
    let shares: Vec<Share<'_>> =
        shares.map(|((model, &ram_bytes), &ssd_bytes)| Share { model, ram_bytes, ssd_bytes }).collect();
    store.divide(&shares).expect("no more than there is");
}

#[test]
fn nobody_comes_below_its_share_for_another_and_each_gets_its_own() {
    let directory = tempfile::tempdir().expect("a directory");
    for path in [None, Some(directory.path())] {
        let store = stepped(path, 32 * MIB, 64 * MIB);
        let models = ["a", "b", "c"].map(|name| register(&store, name, FINE));
        let step = store.divisible().ram_step_bytes;
        let chunks = store.divisible().ram_bytes / step;
        let mut dice = Dice(7);
        let mut shares = [chunks / 3; 3];
        let mut seed = 0;
        for round in 0..60 {
            if round % 4 == 0 {
                shares = [0; 3];
                (0..chunks).for_each(|_| shares[dice.below(3)] += 1);
                divide(&store, &models, &shares.map(|n| n * step), &[0; 3]);
            }
            let greedy = dice.below(3);
            for _ in 0..40 {
                seed += 1;
                let before = held(&store);
                fill(&store, &models[greedy], seed..seed + 1);
                let after = held(&store);
                for (n, model) in models.iter().enumerate().filter(|&(n, _)| n != greedy) {
                    let name = &model.spec().name;
                    let share = shares[n] * step;
                    assert!(after[name] >= before[name].min(share), "{name}: {before:?} {after:?} {share}");
                }
                assert!(after.values().sum::<u64>() <= chunks * step);
            }
        }
        // Whoever asks for it has its share in the end, whatever others hold.
        divide(&store, &models, &[chunks / 2 * step, chunks / 4 * step, chunks / 4 * step], &[0; 3]);
        for (n, share) in [chunks / 2, chunks / 4, chunks / 4].into_iter().enumerate() {
            let more = (share * step / (16 * FINE.record_bytes() as u64) + 200) as u32;
            fill(&store, &models[n], seed..seed + more);
            seed += more;
            assert!(
                held(&store)[&models[n].spec().name] >= share * step,
                "{n} {share} of {chunks}: {:?} {:?}",
                held(&store),
                path
            );
        }
    }
}

#[test]
fn a_model_that_is_idle_lends_what_it_has_and_gets_it_back() {
    let store = stepped(None, 32 * MIB, 0);
    let models = ["a", "b"].map(|name| register(&store, name, FINE));
    let step = store.divisible().ram_step_bytes;
    let chunks = store.divisible().ram_bytes / step;
    fill(&store, &models[0], 0..600);
    assert_eq!(held(&store)["a"], chunks * step, "nobody else needs it");
    fill(&store, &models[1], 0..600);
    assert_eq!(held(&store), [("a", chunks.div_ceil(2)), ("b", chunks / 2)].map(|(n, c)| (n.into(), c * step)).into());
}

#[test]
fn what_is_leased_stays_when_its_model_has_to_give() {
    let store = stepped(None, 16 * MIB, 0);
    let models = ["a", "b"].map(|name| register(&store, name, FINE));
    let step = store.divisible().ram_step_bytes;
    let chunks = store.divisible().ram_bytes / step;
    fill(&store, &models[0], 0..300);
    let leases: Vec<_> = (290..300).map(|seed| hold(&store, &models[0], &sequence(seed, 16, &FINE))).collect();
    divide(&store, &models, &[0, chunks * step], &[0, 0]);
    fill(&store, &models[1], 0..600);
    for (lease, seed) in leases.into_iter().zip(290..) {
        assert_eq!(lease.tokens(), 16 * FINE.block_tokens as usize);
        drop(lease);
        assert_eq!(fetch(&store, &models[0], &sequence(seed, 16, &FINE)), 16);
    }
}

#[test]
fn segments_go_from_whoever_is_above_its_share_of_the_ssd() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = stepped(Some(directory.path()), 4 * MIB, 16 * MIB);
    let models = ["a", "b"].map(|name| register(&store, name, FINE));
    let all = store.divisible().ssd_bytes;
    fill(&store, &models[0], 0..400);
    store.flush().expect("the disk is well");
    let alone = files(directory.path());
    divide(&store, &models, &[0, 0], &[all / 4, all - all / 4]);
    fill(&store, &models[1], 0..400);
    store.flush().expect("the disk is well");
    let both = files(directory.path());
    assert!(alone[1] > all / 2 && both[0] <= all / 4 + 64 * 1024 && both[1] > all / 2, "{alone:?} {both:?} of {all}");
    // And what is left to the first is there.
    assert!((300..400).map(|seed| fetch(&store, &models[0], &sequence(seed, 16, &FINE))).sum::<usize>() > 0);
}

#[test]
fn shares_above_the_whole_or_of_no_model_change_nothing() {
    let store = stepped(None, 16 * MIB, 0);
    let model = register(&store, "a", FINE);
    let all = store.divisible().ram_bytes;
    let share = |ram_bytes, ssd_bytes| Share { model: &model, ram_bytes, ssd_bytes };
    for (wrong, says) in
        [([share(all, 0), share(1, 0)], "shares of ram"), ([share(0, 1), share(0, 0)], "shares of ssd")]
    {
        let error = store.divide(&wrong).expect_err("it is too much");
        assert!(error.kind() == ErrorKind::Input && error.to_string().contains(says), "{error}");
    }
    store.unregister(&model).expect("it is registered");
    assert_eq!(store.divide(&[share(0, 0)]).expect_err("it is gone").kind(), ErrorKind::ModelNotFound);
    assert_eq!(store.curve(&model, &[1.0]).expect_err("it is gone").kind(), ErrorKind::ModelNotFound);
}

#[test]
fn a_curve_counts_what_requests_ask_for_once() {
    let store = stepped(None, 16 * MIB, 0);
    // One block in sixteen is sampled.
    let fine = shape(1, 2, 2, 8, Dtype::Uint8, 256);
    let model = register(&store, "a", fine);
    for _ in 0..3 {
        for seed in 0..40 {
            let tokens = sequence(seed, 8, &fine);
            drop(store.match_prefix(&model, &tokens, "", "").expect("it is open"));
            put(&store, &model, &tokens);
        }
    }
    let (asked, hits) = store.curve(&model, &[0.0, 16.0, 4096.0]).expect("it is registered");
    assert_eq!((asked, hits[0]), (960.0, 0.0));
    // A loop of 320 blocks hits nothing in a cache of 16 of them, and all but the first round in one that has room.
    assert!(hits[1] < 32.0 && (400.0..900.0).contains(&hits[2]), "{hits:?}");
    store.age_curves(0.5).expect("it is open");
    assert_eq!(store.curve(&model, &[4096.0]).expect("it is registered"), (480.0, vec![hits[2] / 2.0]));
}
