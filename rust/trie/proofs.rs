//! What shows that the index keeps its promises: a model, an oracle under threads, and, in builds of their own, every
//! execution of the state word (loom) and random schedules of the whole protocol (shuttle). `make prove` runs all.
//! The checkers are themselves proven by bugs that they must catch.

use super::*;

/// The hash of a sequence of letters: the letters, in base 4 behind a one.
fn hash(letters: &[u8]) -> BlockHash {
    let name = letters.iter().fold(1u128, |acc, &c| acc << 2 | u128::from(c));
    // All bits take part in choosing buckets and tags.
    BlockHash(name.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

fn hashes(letters: &[u8]) -> Vec<BlockHash> {
    (1..=letters.len()).map(|n| hash(&letters[..n])).collect()
}

/// Caches a sequence; returns its deepest node, leased, and how many blocks are cached.
fn put(trie: &Trie, hashes: &[BlockHash]) -> (Option<NodeId>, usize) {
    let (mut deepest, mut length) = match trie.longest_prefix(hashes) {
        Ok(Some((id, length))) => (Some(id), length),
        _ => (None, 0),
    };
    while length < hashes.len() {
        let (Inserted::New(id) | Inserted::Known(id)) = trie.insert(deepest, hashes[length], 7) else { break };
        deepest.replace(id).into_iter().for_each(|parent| trie.release(parent));
        length += 1;
    }
    (deepest, length)
}

/// What a lease promises: the node is the one that was asked for, and all before it are there.
fn check_path(trie: &Trie, mut id: NodeId, hashes: &[BlockHash]) {
    for n in (0..hashes.len()).rev() {
        assert_eq!(trie.hash(id), hashes[n], "another block");
        assert_eq!(trie.depth(id) as usize, n);
        assert!(trie.is_live(id), "an ancestor is gone");
        match trie.parent(id) {
            Some(parent) => id = parent,
            None => assert_eq!(n, 0, "a path ends early"),
        }
    }
}

/// When all is quiet: counts agree with a scan, nothing is leased, and no node is lost.
fn audit(trie: &Trie) {
    let fresh = trie.fresh.load(Ordering::Acquire);
    let mut free = std::collections::BTreeSet::new();
    let mut next = trie.free.load(Ordering::Acquire) as u32;
    while let Some(id) = next.checked_sub(1) {
        assert!(free.insert(id), "a node is free twice");
        next = (trie.field(id, PLACE).load(Ordering::Acquire) >> 32) as u32;
    }
    let live: Vec<NodeId> = (0..fresh as NodeId).filter(|id| !free.contains(id)).collect();
    for &id in &live {
        assert!(trie.is_live(id), "a node is neither free nor live");
        assert_eq!(trie.leases(id), 0, "a lease is left");
        let children = live.iter().filter(|&&child| trie.parent(child) == Some(id)).count();
        assert_eq!(trie.children(id), children as u64);
        assert!(trie.table.candidates(trie.hash(id)).any(|(found, _)| found == id), "a live node cannot be found");
    }
    assert_eq!(trie.table.len(), live.len());
    assert_eq!(trie.len(), live.len());
}

#[cfg(not(any(loom, shuttle)))]
mod here {
    use super::*;
    use crate::trie::planted::with;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::time::{Duration, Instant};

    proptest! {
        #[test]
        fn the_index_equals_a_set_of_prefixes(
            steps in prop::collection::vec((0u8..4, prop::collection::vec(0u8..3, 1..9)), 1..200),
        ) {
            with(None, || {
                let trie = Trie::new(4000)?;
                let mut model: BTreeSet<Vec<u8>> = BTreeSet::new();
                for (action, letters) in steps {
                    let asked = hashes(&letters);
                    let known = (1..=letters.len()).take_while(|&n| model.contains(&letters[..n])).count();
                    let found = trie.longest_prefix(&asked).expect("few leases");
                    assert_eq!(found.map_or(0, |(_, length)| length), known);
                    if let Some((id, length)) = found {
                        check_path(&trie, id, &asked[..length]);
                        trie.release(id);
                    }
                    match action {
                        0 | 1 => {
                            let (id, length) = put(&trie, &asked);
                            assert_eq!(length, letters.len());
                            trie.release(id.expect("the sequence is not empty"));
                            model.extend((1..=letters.len()).map(|n| letters[..n].to_vec()));
                        }
                        _ => {
                            let Some(id) = known.checked_sub(1).and_then(|n| trie.find(asked[n])) else { continue };
                            let parent = model.iter().any(|p| p.len() > known && p.starts_with(&letters[..known]));
                            let held = action == 3 && trie.lease(id);
                            assert_eq!(trie.unlink(id, held), !parent);
                            if !parent {
                                model.remove(&letters[..known]);
                            }
                            if held {
                                trie.release(id);
                            }
                        }
                    }
                    assert_eq!(trie.len(), model.len());
                }
                audit(&trie);
                Ok::<_, crate::Error>(())
            }).expect("no panic").expect("memory is to be had");
        }
    }

    #[test]
    fn an_unlinked_block_is_found_no_more_and_its_lease_stays_safe() {
        let trie = Trie::new(10).expect("memory is to be had");
        let (asked, other) = (hashes(&[1, 2]), hashes(&[3]));
        let (id, _) = put(&trie, &asked);
        let id = id.expect("there is room");
        assert!(!trie.unlink(id, false), "it is leased");
        assert!(trie.unlink(id, true));
        assert!(!trie.unlink(id, true), "once is enough");
        assert!(!trie.lease(id));
        assert_eq!(trie.find(asked[1]), None);
        for _ in 0..20 {
            // No new block takes the place of one that is leased.
            let (new, _) = put(&trie, &other);
            let new = new.expect("there is room");
            assert!(new != id && trie.hash(id) == asked[1]);
            trie.release(new);
            assert!(trie.unlink(new, false));
        }
        assert_eq!(trie.insert(Some(id), hash(&[1, 2, 3]), 7), Inserted::Orphan);
        trie.release(id);
        audit(&trie);
    }

    #[test]
    fn a_full_index_refuses_and_counts() {
        let trie = Trie::new(5).expect("memory is to be had");
        let (deepest, length) = put(&trie, &hashes(&[1; 9]));
        assert_eq!((length, trie.refused()), (5, 1));
        trie.release(deepest.expect("there is room for five"));
        audit(&trie);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a million steps take minutes there")]
    fn a_block_has_at_most_a_million_leases() {
        let trie = Trie::new(5).expect("memory is to be had");
        let asked = hashes(&[1]);
        let (id, _) = put(&trie, &asked);
        let id = id.expect("there is room");
        assert!((1..word::MOST_LEASES).all(|_| trie.lease(id)));
        assert!(!trie.lease(id));
        assert_eq!(trie.longest_prefix(&asked), Err(TooManyLeases));
        assert_eq!(trie.leases(id), word::MOST_LEASES);
        (0..word::MOST_LEASES).for_each(|_| trie.release(id));
        audit(&trie);
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks for the memory of a million blocks")]
    fn memory_per_block_stays_below_96_bytes() {
        let trie = Trie::new(1_000_000).expect("memory is to be had");
        assert!(trie.bytes() <= 96_000_000, "{} bytes", trie.bytes());
    }

    /// Threads match, insert and evict over few places; every answer is checked while it is leased. Returns the matches.
    fn stress(threads: u64, capacity: usize, time: Duration) -> u64 {
        let trie = Trie::new(capacity).expect("memory is to be had");
        let matches = std::sync::atomic::AtomicU64::new(0);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (trie, matches) = (&trie, &matches);
                scope.spawn(move || {
                    let mut chance = thread + 1;
                    let mut next = |bound: u64| {
                        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        (chance >> 33) % bound
                    };
                    let all: Vec<Vec<BlockHash>> = (0..256u16)
                        .map(|n| hashes(&[n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6].map(|c| c as u8)))
                        .collect();
                    let mut count = 0;
                    loop {
                        for _ in 0..100 {
                            let asked = &all[next(256) as usize];
                            match next(4) {
                                0 | 1 => {
                                    count += 1;
                                    let Some((id, length)) = trie.longest_prefix(asked).expect("few leases") else {
                                        continue;
                                    };
                                    check_path(trie, id, &asked[..length]);
                                    trie.release(id);
                                }
                                2 => {
                                    let (deepest, length) = put(trie, asked);
                                    let Some(id) = deepest else { continue };
                                    check_path(trie, id, &asked[..length]);
                                    trie.release(id);
                                }
                                _ => drop(trie.unlink(next(capacity as u64) as NodeId, false)),
                            }
                        }
                        if started.elapsed() > time {
                            break;
                        }
                    }
                    matches.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
                });
            }
        });
        audit(&trie);
        matches.into_inner()
    }

    // Threads and capacities.
    const SETTINGS: [(u64, usize); 6] = [(2, 20), (2, 60), (2, 300), (4, 20), (4, 60), (4, 300)];

    // STRATAKV_STRESS_S: seconds for each setting.
    #[test]
    fn threads_get_right_answers_and_nothing_is_lost() {
        let seconds = std::env::var("STRATAKV_STRESS_S").ok().and_then(|s| s.parse().ok());
        let seconds: f64 = seconds.unwrap_or(if cfg!(miri) { 0.01 } else { 0.3 });
        let outcome = with(None, || {
            let settings: &[_] = if cfg!(miri) { &[(2, 20)] } else { &SETTINGS };
            let run = |&(threads, capacity)| stress(threads, capacity, Duration::from_secs_f64(seconds));
            settings.iter().map(run).collect::<Vec<u64>>()
        });
        let matches: u64 = outcome.expect("no wrong answer").iter().sum();
        println_matches(matches);
        assert!(matches > 0);
    }

    #[expect(clippy::print_stdout, reason = "shown by `cargo test -- --nocapture`: how much the run proves")]
    fn println_matches(matches: u64) {
        println!("{matches} matches, all right");
    }
}

#[cfg(shuttle)]
mod schedules {
    use super::*;
    use crate::sync::Arc;
    use crate::trie::planted::with;

    // Two threads cache the same sequences, one matches, one evicts whatever it finds, over three places.
    fn everything() {
        let trie = Arc::new(Trie::new(3).expect("memory is to be had"));
        let (long, other) = (hashes(&[1, 2]), hashes(&[3]));
        let inserter = |sequences: [Vec<BlockHash>; 2]| {
            let trie = trie.clone();
            shuttle::thread::spawn(move || {
                for asked in sequences {
                    let (deepest, length) = put(&trie, &asked);
                    let Some(id) = deepest else { continue };
                    check_path(&trie, id, &asked[..length]);
                    trie.release(id);
                }
            })
        };
        let threads = [
            inserter([long.clone(), other.clone()]),
            inserter([long.clone(), long.clone()]),
            {
                let (trie, asked) = (trie.clone(), long.clone());
                shuttle::thread::spawn(move || {
                    for _ in 0..3 {
                        if let Ok(Some((id, length))) = trie.longest_prefix(&asked) {
                            check_path(&trie, id, &asked[..length]);
                            shuttle::thread::yield_now();
                            check_path(&trie, id, &asked[..length]);
                            trie.release(id);
                        }
                    }
                })
            },
            {
                let trie = trie.clone();
                shuttle::thread::spawn(move || {
                    for id in [1, 0, 2, 1, 0] {
                        trie.unlink(id, false);
                    }
                })
            },
        ];
        threads.into_iter().for_each(|thread| thread.join().expect("no wrong answer"));
        audit(&trie);
    }

    // One place whose block comes and goes, and two that want it.
    fn coming_and_going() {
        let trie = Arc::new(Trie::new(1).expect("memory is to be had"));
        let asked = hashes(&[1]);
        let reader = || {
            let (trie, asked) = (trie.clone(), asked.clone());
            shuttle::thread::spawn(move || {
                for _ in 0..3 {
                    if let Ok(Some((id, length))) = trie.longest_prefix(&asked) {
                        check_path(&trie, id, &asked[..length]);
                        trie.release(id);
                    }
                }
            })
        };
        let readers = [reader(), reader()];
        for _ in 0..3 {
            if let (Some(id), _) = put(&trie, &asked) {
                trie.release(id);
                trie.unlink(id, false);
            }
        }
        readers.into_iter().for_each(|thread| thread.join().expect("no wrong answer"));
        audit(&trie);
    }

    fn rounds() -> usize {
        std::env::var("ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000)
    }

    fn scenarios(rounds: usize) {
        for scenario in [coming_and_going, everything] {
            shuttle::check_random(scenario, rounds);
            shuttle::check_pct(scenario, rounds, 3);
        }
    }

    #[test]
    fn every_schedule_that_is_tried_gives_right_answers() {
        with(None, || scenarios(rounds())).expect("no wrong answer");
    }

    #[test]
    fn schedules_catch_bugs() {
        let bugs = [
            Bug::NoPhaseCheck,
            Bug::NoKeyCheck,
            Bug::RetireByStore,
            Bug::FreeByStore,
            Bug::BlindRetreat,
            Bug::NoChildCheck,
        ];
        for bug in bugs {
            assert!(with(Some(bug), || scenarios(rounds())).is_err(), "{bug:?} was not noticed");
        }
    }
}

#[cfg(loom)]
mod executions {
    use super::*;
    use crate::trie::planted::with;
    use std::sync::Arc;

    fn model(check: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(check);
    }

    // A node's life, one field, and who comes by.
    fn a_leased_node_is_seen_as_it_was_written() {
        model(|| {
            let node = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
            let writer = {
                let node = node.clone();
                loom::thread::spawn(move || {
                    for value in [1, 2] {
                        node.1.store(value, Ordering::Relaxed);
                        Word(&node.0).go_live();
                        Word(&node.0).release();
                        if !Word(&node.0).retire(false) {
                            return;
                        }
                        // Only who is the last may write again.
                        if !Word(&node.0).release() {
                            return;
                        }
                    }
                })
            };
            if Word(&node.0).lease() == Asked::Leased {
                let seen = node.1.load(Ordering::Relaxed);
                assert!(seen > 0, "a field was seen before it was written");
                assert_eq!(node.1.load(Ordering::Relaxed), seen, "a leased node was freed");
                Word(&node.0).release();
            }
            writer.join().expect("no panic");
        });
    }

    fn a_dead_node_is_freed_once_by_its_last_holder() {
        model(|| {
            let state = Arc::new(AtomicU64::new(0));
            Word(&state).go_live();
            assert_eq!(Word(&state).lease(), Asked::Leased);
            let freed = Arc::new(std::sync::atomic::AtomicU32::new(0));
            let free = |freed: &std::sync::atomic::AtomicU32, last: bool| {
                freed.fetch_add(u32::from(last), std::sync::atomic::Ordering::Relaxed);
            };
            let holder = {
                let (state, freed) = (state.clone(), freed.clone());
                loom::thread::spawn(move || free(&freed, Word(&state).release()))
            };
            let passer = {
                let (state, freed) = (state.clone(), freed.clone());
                loom::thread::spawn(move || match Word(&state).lease() {
                    Asked::Leased => free(&freed, Word(&state).release()),
                    Asked::NotLive(last) => free(&freed, last),
                    Asked::TooMany => {}
                })
            };
            assert!(Word(&state).retire(true));
            free(&freed, Word(&state).release());
            free(&freed, Word(&state).release());
            holder.join().expect("no panic");
            passer.join().expect("no panic");
            assert_eq!(freed.load(std::sync::atomic::Ordering::Relaxed), 1);
            assert_eq!((Word(&state).leases(), Word(&state).generation()), (0, 1));
        });
    }

    fn a_parent_outlives_the_child_that_was_counted() {
        model(|| {
            let parent = Arc::new(AtomicU64::new(0));
            Word(&parent).go_live();
            let inserter = {
                let parent = parent.clone();
                loom::thread::spawn(move || {
                    let counted = Word(&parent).add_child();
                    Word(&parent).release();
                    counted
                })
            };
            let retired = Word(&parent).retire(true);
            if retired {
                Word(&parent).release();
            }
            assert!(inserter.join().expect("no panic") != retired, "retired with a child, or neither");
        });
    }

    // Two slots: two insert the same block, one of them evicts.
    fn twins_answer_rightly_and_nothing_is_lost() {
        model(|| {
            let trie = Arc::new(Trie::new(2).expect("memory is to be had"));
            let other = {
                let trie = trie.clone();
                loom::thread::spawn(move || {
                    let (id, _) = put(&trie, &hashes(&[1]));
                    id.into_iter().for_each(|id| {
                        check_path(&trie, id, &hashes(&[1]));
                        trie.release(id);
                        trie.unlink(id, false);
                    });
                })
            };
            let (id, _) = put(&trie, &hashes(&[1]));
            id.into_iter().for_each(|id| {
                check_path(&trie, id, &hashes(&[1]));
                trie.release(id);
            });
            other.join().expect("no panic");
            audit(&trie);
        });
    }

    #[test]
    fn every_execution_is_right() {
        with(None, || {
            a_leased_node_is_seen_as_it_was_written();
            a_dead_node_is_freed_once_by_its_last_holder();
            a_parent_outlives_the_child_that_was_counted();
            twins_answer_rightly_and_nothing_is_lost();
        })
        .expect("no wrong answer");
    }

    #[test]
    fn executions_catch_bugs() {
        for bug in [Bug::RelaxedLease, Bug::NoPhaseCheck, Bug::RetireByStore] {
            assert!(with(Some(bug), a_leased_node_is_seen_as_it_was_written).is_err(), "{bug:?} was not noticed");
        }
        assert!(with(Some(Bug::FreeByStore), a_dead_node_is_freed_once_by_its_last_holder).is_err());
        assert!(with(Some(Bug::NoChildCheck), a_parent_outlives_the_child_that_was_counted).is_err());
    }
}
