//! What is cached, listed; and what is brought up to RAM ahead of requests.

use super::kv::*;
use std::collections::BTreeSet;
use stratakv::stats::{Lifter, Miss, Tier};
use stratakv::{Prefix, Store};

fn all(store: &Store, model: Option<&str>) -> Vec<Prefix> {
    let (mut found, mut from) = (Vec::new(), Some(0));
    while let Some(at) = from {
        let (some, next) = store.prefixes(model, at).expect("it is open");
        found.extend(some);
        from = next;
    }
    found
}

#[test]
fn every_sequence_is_listed_once_with_its_names_and_places() {
    let directory = tempfile::tempdir().expect("a directory");
    let open = || {
        let store = open(directory.path(), 4 * MIB, 16 * MIB);
        let (a, b) = (register(&store, "a", FINE), register(&store, "b", FINE));
        (store, a, b)
    };
    let (store, a, b) = open();
    let (one, two) = (sequence(1, 5, &FINE), sequence(2, 3, &FINE));
    put(&store, &a, &one);
    put(&store, &a, &one[..2 * FINE.block_tokens as usize]);
    put(&store, &b, &two);
    let mut kv = Kv::of(&a, &two);
    store.put(&a, &two, "lora", "t", &kv.view()).expect("right arguments");
    let found = all(&store, None);
    let lengths: BTreeSet<_> = found.iter().map(|p| (p.model.as_str(), p.blocks.len())).collect();
    assert_eq!((lengths, found.len()), (BTreeSet::from([("a", 3), ("a", 5), ("b", 3)]), 3));
    assert_eq!(all(&store, Some("b")).len(), 1);
    let long = found.iter().find(|p| p.blocks.len() == 5).expect("it is listed");
    assert_eq!(long.blocks, hold(&store, &a, &one).names());
    assert_eq!((&long.places[..], long.names.clone()), (&[1; 5][..], Some((String::new(), String::new()))));
    assert_eq!(long.space, store.space(&a, "", ""));
    let named = found.iter().find(|p| p.model == "a" && p.blocks.len() == 3).expect("it is listed");
    assert_eq!((named.names.clone(), named.space), (Some(("lora".into(), "t".into())), store.space(&a, "lora", "t")));
    assert!(long.since_s > 1_700_000_000 && long.since_s <= long.used_s && long.uses == 0);
    assert_eq!(fetch(&store, &a, &one), 5);
    let uses = |store: &Store| all(store, Some("a")).iter().find(|p| p.blocks.len() == 5).map(|p| p.uses);
    assert_eq!(uses(&store), Some(2), "two matches");
    store.flush().expect("the disk is well");
    assert!(all(&store, None).iter().flat_map(|p| p.places.clone()).all(|place| place == 3), "on both tiers");
    store.close().expect("the disk is well");
    drop((a, b, store));
    let (store, a, _b) = open();
    let found = all(&store, Some("a"));
    assert!(found.iter().flat_map(|p| p.places.clone()).all(|place| place == 2), "on SSD alone");
    assert!(found.iter().all(|p| p.since_s > 1_700_000_000));
    let names = |blocks| found.iter().find(|p| p.blocks.len() == blocks).map(|p| p.names.clone());
    assert_eq!(
        (names(5), names(3)),
        (Some(Some((String::new(), String::new()))), Some(None)),
        "nobody asked for it yet"
    );
    store.space(&a, "lora", "t");
    assert!(all(&store, Some("a")).iter().all(|p| p.names.is_some()));
}

#[test]
fn ends_of_puts_and_matches_are_told_once_with_the_matches_since() {
    let store = Store::open(options(None, 4 * MIB, 0)).expect("it opens");
    let model = register(&store, "m", FINE);
    let tokens = sequence(1, 6, &FINE);
    put(&store, &model, &tokens);
    assert_eq!(store.used(10).expect("it is open"), [], "nothing is noted before the first call");
    let (short, block) = (4 * FINE.block_tokens as usize, FINE.block_tokens as usize);
    for _ in 0..3 {
        hold(&store, &model, &tokens[..short]);
    }
    put(&store, &model, &[&tokens[..], &sequence(9, 1, &FINE)].concat());
    let mut found: Vec<_> = store.used(10).expect("it is open").iter().map(|p| (p.blocks.len(), p.uses)).collect();
    found.sort_unstable();
    assert_eq!(found, [(4, 3), (7, 0)]);
    assert_eq!(store.used(10).expect("it is open"), []);
    // In portions, and what left meanwhile is left out.
    (0..5).for_each(|n| drop(hold(&store, &model, &tokens[..(n + 1) * block])));
    let sizes = [2, 2, 2].map(|most| store.used(most).expect("it is open").len());
    assert_eq!(sizes, [2, 2, 1]);
    hold(&store, &model, &tokens);
    store.drop_namespace(&model, "", "").expect("it is registered");
    assert_eq!(store.used(10).expect("it is open"), []);
}

#[test]
fn what_is_brought_up_ahead_is_counted_and_so_is_what_of_it_was_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path(), 4 * MIB, 16 * MIB);
    let model = register(&store, "m", FINE);
    let (one, two) = (sequence(1, 6, &FINE), sequence(2, 6, &FINE));
    let names = [&one, &two].map(|tokens| {
        put(&store, &model, tokens);
        hold(&store, &model, tokens).names()
    });
    store.close().expect("the disk is well");
    drop((model, store));
    let store = open(directory.path(), 4 * MIB, 16 * MIB);
    let model = register(&store, "m", FINE);
    let lift = |names: &[_], lifter, bytes| store.lift(&model, names, lifter, bytes).expect("it is open");
    assert_eq!(lift(&[[7; 16]], Lifter::Near, u64::MAX), (0, 0), "not here");
    let (blocks, bytes) = lift(&names[0], Lifter::Near, u64::MAX);
    assert!(blocks == 6 && bytes > 0);
    assert_eq!(lift(&names[0], Lifter::Near, u64::MAX), (6, 0), "again costs nothing");
    assert_eq!(lift(&names[1], Lifter::Warm, bytes / 2), (3, bytes / 2), "within its budget");
    assert_eq!(store.snapshot().lifted.map(|l| (l.bytes, l.hit_bytes)), [(bytes / 2, 0), (bytes, 0)]);
    assert_eq!(fetch(&store, &model, &one[..2 * FINE.block_tokens as usize]), 2);
    assert_eq!(fetch(&store, &model, &one), 6);
    assert_eq!(fetch(&store, &model, &one), 6);
    assert_eq!(store.snapshot().lifted.map(|l| (l.bytes, l.hit_bytes)), [(bytes / 2, 0), (bytes, bytes)]);
}

#[test]
fn records_of_a_shared_tier_come_ahead_by_their_names_alone() {
    let node = || {
        let secret = Some("shared".into());
        Store::open(stratakv::Options { secret, ..options(None, 4 * MIB, 0) }).expect("it opens")
    };
    let (one, two) = (node(), node());
    let (from, to) = (register(&one, "m", FINE), register(&two, "m", FINE));
    let tokens = sequence(1, 3, &FINE);
    put(&one, &from, &tokens);
    let names = hold(&one, &from, &tokens).names();
    let records: Vec<Vec<u8>> =
        names.iter().map(|&name| one.export(&from, name).expect("it is open").expect("it is in RAM")).collect();
    let records: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
    let admit = |tenant: &str, first, records: &[&[u8]]| {
        let admitted = two.admit_named(&to, "", tenant, &names, first, records, Lifter::Near).expect("it is open");
        (admitted.blocks, admitted.miss)
    };
    assert_eq!(admit("other", 0, &records), (0, Some(Miss::Corrupt)), "another tenant's");
    let mut wrong = records[0].to_vec();
    wrong[300] ^= 1;
    assert_eq!(admit("", 0, &[&wrong]), (0, Some(Miss::Corrupt)));
    assert_eq!(admit("", 0, &records[..1]), (1, None));
    assert_eq!(admit("", 1, &records[1..]), (3, None));
    assert_eq!(two.places(&to, &names).expect("it is open"), [1; 3]);
    let lifted = || two.snapshot().lifted[Lifter::Near as usize];
    assert!(lifted().bytes > 0 && lifted().hit_bytes == 0);
    assert_eq!(fetch(&two, &to, &tokens), 3);
    assert_eq!(lifted().bytes, lifted().hit_bytes);
}

#[test]
fn what_is_on_ssd_alone_may_come_to_ram_from_a_shared_tier() {
    let directory = tempfile::tempdir().expect("a directory");
    let open = || {
        let secret = Some("shared".into());
        let store = Store::open(stratakv::Options { secret, ..options(Some(directory.path()), 4 * MIB, 16 * MIB) });
        let store = store.expect("it opens");
        let model = register(&store, "m", FINE);
        (store, model)
    };
    let tokens = sequence(1, 5, &FINE);
    let (store, model) = open();
    put(&store, &model, &tokens);
    let names = hold(&store, &model, &tokens).names();
    let records: Vec<Vec<u8>> =
        names.iter().map(|&name| store.export(&model, name).expect("it is open").expect("it is in RAM")).collect();
    store.close().expect("the disk is well");
    drop((model, store));
    let (store, model) = open();
    let records: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
    let sequence = store.sequence(&model, "", "", tokens.clone());
    assert_eq!(store.places(&model, &names).expect("it is open"), [2; 5]);
    let admitted = store.admit(&model, &sequence, 1, &records[1..4]).expect("it is open");
    assert_eq!((admitted.blocks, admitted.miss), (5, None));
    assert_eq!(store.places(&model, &names).expect("it is open"), [2, 3, 3, 3, 2]);
    assert_eq!(fetch(&store, &model, &tokens), 5);
    let (counts, ram) = (store.snapshot().total, Tier::Ram as usize);
    assert_eq!((counts.promoted, counts.tiers[ram].hit), (3, 3));
}

#[test]
fn each_tenant_of_each_model_has_counts_of_its_own() {
    let store = Store::open(options(None, 4 * MIB, 0)).expect("it opens");
    let (a, b) = (register(&store, "a", FINE), register(&store, "b", FINE));
    let tokens = sequence(1, 3, &FINE);
    for (model, tenant) in [(&a, ""), (&a, "t"), (&b, "t")] {
        let mut kv = Kv::of(model, &tokens);
        store.put(model, &tokens, "", tenant, &kv.view()).expect("right arguments");
        drop(store.match_prefix(model, &tokens[..FINE.block_tokens as usize], "", tenant).expect("it is open"));
    }
    let usage = store.usage().expect("it is open");
    let rows: BTreeSet<_> =
        usage.iter().filter(|(.., c)| c.put_blocks > 0).map(|(_, m, t, c)| (&m[..], &t[..], c.asked)).collect();
    assert_eq!(rows, BTreeSet::from([("a", "", 1), ("a", "t", 1), ("b", "t", 1)]));
    assert_eq!(usage.iter().map(|(.., c)| c.put_blocks).sum::<u64>(), store.snapshot().total.put_blocks);
}
