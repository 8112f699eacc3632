//! The power goes at any instant: of what was written and not made durable, sectors are lost, in any order. The store that
//! is opened then serves right bytes only, and has what a flush had acknowledged.

use crate::kv::*;
use crate::rig::*;
use std::sync::Arc;
use stratakv::stats::Tier;
use stratakv::{Options, Store, WritePolicy};

#[test]
fn after_any_power_cut_bytes_are_right_and_what_a_flush_acknowledged_is_there() {
    let rounds = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(100);
    let mut cuts = 0;
    for round in 0..rounds {
        let (directory, left) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let mut dice = Dice(round * 7919 + 1);
        // Every other cap is so small that segments are reused.
        let (roomy, calls_left) = (round % 2 == 0, 1 + dice.below(200) as u32);
        let cap = if roomy { 16 * MIB } else { MIB };
        let power = Rig::with_cache(directory.path(), left.path(), calls_left, round * 104_729 + 5);
        let policy = if dice.below(2) == 0 { WritePolicy::WriteBack } else { WritePolicy::WriteThrough };
        let options = Options { policy, ..options(Some(directory.path()), 2 * MIB, cap) };
        let Ok(store) = Store::open_on(options, Arc::new(power.clone())) else { continue };
        let model = register(&store, "m", FINE);
        let mut durable = 0;
        for seed in 0..120 {
            put(&store, &model, &sequence(seed, 3, &FINE));
            if dice.below(6) == 0 {
                store.flush().expect("the disk is well");
                if power.cut() {
                    break;
                }
                durable = seed + 1;
            }
        }
        let had_cut = power.cut();
        drop(store);
        if !had_cut {
            continue;
        }
        cuts += 1;
        let store = open(left.path(), 2 * MIB, cap);
        let model = register(&store, "m", FINE);
        let found: Vec<usize> = (0..120).map(|seed| fetch(&store, &model, &sequence(seed, 3, &FINE))).collect();
        if roomy {
            assert!(found[..durable as usize].iter().all(|&blocks| blocks == 3), "round {round}: {durable}, {found:?}");
        }
        // The books are what can be found, and what the disk has.
        let snapshot = store.snapshot();
        let held = snapshot.total.tiers[Tier::Ssd as usize].blocks;
        assert_eq!(held, found.iter().sum::<usize>() as u64, "round {round}");
        assert!(disk_bytes(left.path()) <= cap.max(snapshot.ssd_file_bytes), "round {round}");
        // It takes blocks again.
        put(&store, &model, &sequence(500, 3, &FINE));
        store.close().expect("the disk is well");
        let store = open(left.path(), 2 * MIB, cap);
        assert_eq!(fetch(&store, &register(&store, "m", FINE), &sequence(500, 3, &FINE)), 3, "round {round}");
    }
    assert!(cuts * 2 > rounds, "{cuts} cuts in {rounds} rounds");
}
