//! Records that nodes share: what one exports the other admits, and nothing else.

use super::kv::*;
use std::sync::Arc;
use stratakv::codec::{Codec, Scheme};
use stratakv::stats::{Miss, Tier};
use stratakv::{Geometry, Model, Options, Store};

fn node(secret: &str) -> Store {
    Store::open(Options { secret: Some(secret.into()), ..options(None, 4 * MIB, 0) }).expect("it opens")
}

fn exported(store: &Store, model: &Arc<Model>, tokens: &[u32]) -> Vec<Vec<u8>> {
    let names = hold(store, model, tokens).names();
    names.into_iter().map_while(|name| store.export(model, name).expect("it is open")).collect()
}

fn admit(store: &Store, model: &Model, tokens: &[u32], first: usize, records: &[Vec<u8>]) -> (usize, Option<Miss>) {
    let sequence = store.sequence(model, "", "", tokens.to_vec());
    let records: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
    let admitted = store.admit(model, &sequence, first, &records).expect("it is open");
    (admitted.blocks, admitted.miss)
}

#[test]
fn what_one_node_exports_another_admits_and_loads() {
    for geometry in [FINE, LATENT] {
        let (one, two) = (node("shared"), node("shared"));
        let (from, to) = (register(&one, "m", geometry), register(&two, "m", geometry));
        let tokens = sequence(1, 6, &geometry);
        put(&one, &from, &tokens);
        let records = exported(&one, &from, &tokens);
        assert_eq!(records.len(), 6);
        assert_eq!(admit(&two, &to, &tokens, 0, &records[..2]), (2, None));
        assert_eq!(
            admit(&two, &to, &tokens, 4, &records[4..]),
            (2, Some(Miss::Evicted)),
            "what is between is not there"
        );
        assert_eq!(admit(&two, &to, &tokens, 0, &records), (6, None), "some are there already");
        assert_eq!(fetch(&two, &to, &tokens), 6);
        assert_eq!((two.snapshot().total.promoted, two.snapshot().total.corrupt), (6, 0));
        assert_eq!(one.fingerprint(&from), two.fingerprint(&to));
        assert_eq!(one.export(&from, [7; 16]).expect("it is open"), None);
    }
}

#[test]
fn what_is_on_ssd_alone_is_not_exported_and_not_held_either() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let store = open(directory.path(), MIB, 4 * MIB);
    let model = register(&store, "m", FINE);
    let mut names = Vec::new();
    for seed in 0..100 {
        let tokens = sequence(seed, 8, &FINE);
        assert_eq!(put(&store, &model, &tokens), 8);
        store.flush().expect("the disk is well");
        names.extend(hold(&store, &model, &tokens).names());
        // Of 170 that RAM has room for, and twice as many on the SSD.
        for &name in names.iter().rev().skip(200).take(8) {
            assert_eq!(store.export(&model, name).expect("it is open"), None);
        }
    }
    // Segments made room for others all the time.
    assert_eq!(store.snapshot().total.demoted, 800);
}

#[test]
fn blocks_of_one_run_have_the_same_head_however_they_are_asked_for() {
    let one = node("shared");
    let (model, other) = (register(&one, "m", FINE), register(&one, "n", FINE));
    let tokens = sequence(1, 10, &FINE);
    put(&one, &model, &tokens);
    let names = hold(&one, &model, &tokens).names();
    let space = one.space(&model, "", "");
    let expected: Vec<_> = (0..10).map(|n| Some((names[n - n % 4], space))).collect();
    assert_eq!(hold(&one, &model, &tokens).space(), space);
    assert_eq!(one.heads(&model, &names, 4).expect("it is open"), expected);
    let backwards: Vec<_> = names.iter().rev().copied().collect();
    let found = one.heads(&model, &backwards, 4).expect("it is open");
    assert_eq!(found, expected.into_iter().rev().collect::<Vec<_>>());
    assert_eq!(one.heads(&model, &[names[9], [7; 16]], 4).expect("it is open"), [Some((names[8], space)), None]);
    assert_eq!(one.heads(&other, &names[..1], 4).expect("it is open"), [None]);
}

#[test]
fn what_is_encoded_on_the_way_is_so_at_the_other_end() {
    let (one, two) = (node("shared"), node("shared"));
    let geometry = Geometry { dtype: stratakv::Dtype::Fp32, ..FINE };
    let (from, to) = (register(&one, "m", geometry), register(&two, "m", geometry));
    one.set_codec(&from, Tier::Ssd, Scheme::new(Codec::Fp16, &geometry)).expect("it fits");
    let tokens = sequence(1, 4, &geometry);
    // Values that halves hold exactly.
    let mut kv = Kv::blank(geometry, tokens.len());
    kv.fill(1.5f32);
    assert_eq!(one.put(&from, &tokens, "", "", &kv.view()).expect("right arguments").new_blocks, 4);
    let records = exported(&one, &from, &tokens);
    assert!(records.iter().all(|record| record.len() < geometry.record_bytes()));
    assert_eq!(admit(&two, &to, &tokens, 0, &records), (4, None));
    let mut got = Kv::blank(geometry, tokens.len());
    let outcome = hold(&two, &to, &tokens).load(&got.view()).expect("right arguments");
    assert!(outcome.tokens == tokens.len() && got.begins_as(&kv, tokens.len()));
}

#[test]
fn what_is_not_the_record_that_was_asked_for_is_a_miss() {
    let (one, two) = (node("shared"), node("shared"));
    let (from, to) = (register(&one, "m", FINE), register(&two, "m", FINE));
    let (tokens, others) = (sequence(1, 3, &FINE), sequence(2, 3, &FINE));
    put(&one, &from, &tokens);
    put(&one, &from, &others);
    let (records, foreign) = (exported(&one, &from, &tokens), exported(&one, &from, &others));
    let refused = |records: &[Vec<u8>]| {
        assert_eq!(admit(&two, &to, &tokens, 0, records), (0, Some(Miss::Corrupt)));
        assert_eq!(two.snapshot().index_blocks, 0);
    };
    let mut dice = Dice(1);
    for _ in 0..400 {
        let mut flipped = records[0].clone();
        let at = dice.below(flipped.len());
        flipped[at] ^= 1 << dice.below(8);
        refused(&[flipped]);
    }
    for length in [0, 31, 32, 255, 4096, records[0].len() - 1] {
        refused(&[records[0][..length].to_vec()]);
    }
    refused(&[[&records[0][..], &[0]].concat()]);
    refused(&[records[1].clone()]);
    refused(&foreign);
    let (stranger, other) = (node("another secret"), node("shared"));
    let theirs = register(&stranger, "m", FINE);
    put(&stranger, &theirs, &tokens);
    refused(&exported(&stranger, &theirs, &tokens));
    let namesake = register(&other, "n", FINE);
    put(&other, &namesake, &tokens);
    refused(&exported(&other, &namesake, &tokens));
    // What is right before the first that is not stays.
    assert_eq!(admit(&two, &to, &tokens, 0, &[records[0].clone(), foreign[1].clone()]), (1, Some(Miss::Corrupt)));
    assert_eq!(fetch(&two, &to, &tokens), 1);
}

#[test]
fn a_put_beside_an_admission_never_moves_a_record_to_another_block() {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    let (one, two) = (node("shared"), node("shared"));
    let (from, to) = (register(&one, "m", FINE), register(&two, "m", FINE));
    // Blocks of equal tokens: only their place tells them apart.
    let (blocks, size) = (24, FINE.block_tokens as usize);
    let tokens = vec![7; blocks * size];
    /// However this ends, the others end.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        // Others hold the lock now and then.
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    two.prefixes(None, 0).expect("it is open");
                }
            });
        }
        let mut dice = Dice(3);
        for round in 0..400 {
            let tenant = format!("t{round}");
            let mut kv = Kv::of(&from, &tokens);
            one.put(&from, &tokens, "", &tenant, &kv.view()).expect("right arguments");
            let names = one.match_prefix(&from, &tokens, "", &tenant).expect("it is open").names();
            let records: Vec<Vec<u8>> =
                names.iter().map_while(|&name| one.export(&from, name).expect("it is open")).collect();
            let records: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
            let sequence = two.sequence(&to, "", &tenant, tokens.clone());
            let short = &tokens[..(1 + dice.below(blocks / 2)) * size];
            let both = Barrier::new(2);
            std::thread::scope(|race| {
                race.spawn(|| {
                    both.wait();
                    let mut kv = Kv::of(&to, short);
                    two.put(&to, short, "", &tenant, &kv.view()).expect("right arguments");
                });
                race.spawn(|| {
                    both.wait();
                    let admitted = two.admit(&to, &sequence, 0, &records).expect("it is open");
                    assert!(admitted.came <= records.len());
                });
            });
            let lease = two.match_prefix(&to, &tokens, "", &tenant).expect("it is open");
            load(&lease, &to, &tokens);
            drop(lease);
            two.drop_namespace(&to, "", &tenant).expect("it is registered");
            one.drop_namespace(&from, "", &tenant).expect("it is registered");
        }
    });
}

#[test]
fn a_match_that_goes_on_is_no_longer_than_what_was_promised() {
    let one = node("shared");
    let model = register(&one, "m", FINE);
    let tokens = sequence(1, 20, &FINE);
    let size = FINE.block_tokens as usize;
    put(&one, &model, &tokens[..5 * size]);
    let whole = one.sequence(&model, "", "", tokens.clone());
    let lease = one.match_here(&model, whole.clone()).expect("it is open");
    assert_eq!(lease.tokens(), 5 * size);
    put(&one, &model, &tokens);
    let longer = lease.extended(&whole, 8, None).expect("it is open");
    assert_eq!(longer.tokens(), 8 * size);
    let counts = one.snapshot().total;
    assert_eq!((counts.asked, counts.hit, counts.miss), (20, 8, 12));
    assert_eq!(lease.extended(&whole, 3, None).expect("it is open").tokens(), 5 * size, "never shorter than it was");
}
