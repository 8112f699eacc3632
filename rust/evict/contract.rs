//! One suite over every policy.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn tag(n: u32) -> u64 {
    u64::from(n).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

// A tier of chains: block n continues block n / 2, unless that is 0.
fn parent(n: u32) -> Option<u32> {
    Some(n / 2).filter(|&p| p > 0)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn only_leaves_that_may_go_are_chosen_and_every_block_leaves_once(
        which in 0..Kind::ALL.len(), capacity in 1usize..60, steps in prop::collection::vec((0u8..10, 1u32..200), 1..400),
    ) {
        let mut order = Order::new(Kind::ALL[which], capacity);
        // Blocks in the tier, and the node of each; node numbers are used again.
        let mut nodes: BTreeMap<u32, NodeId> = BTreeMap::new();
        let mut held = BTreeSet::new();
        let mut free: Vec<NodeId> = (0..64).collect();
        let mut sizes = capacity;
        for (action, block) in steps {
            let path: Vec<u32> = std::iter::successors(Some(block), |&n| parent(n)).collect();
            let of: BTreeMap<NodeId, u32> = nodes.iter().map(|(&block, &node)| (node, block)).collect();
            let child = |block: &u32| [2 * block, 2 * block + 1].into_iter().find(|n| nodes.contains_key(n));
            let free_leaf = |block: &u32| child(block).is_none() && !held.contains(block);
            let leaf_of = |node: NodeId| {
                let end = std::iter::successors(of.get(&node).copied(), child).last();
                end.filter(free_leaf).map(|block| nodes[&block])
            };
            match action {
                0..=5 => {
                    path.iter().for_each(|&n| order.asked(tag(n)));
                    order.choose();
                    path.iter().filter_map(|n| nodes.get(n)).for_each(|&node| order.touch(node));
                    let missing: Vec<u32> = path.into_iter().rev().filter(|n| !nodes.contains_key(n)).collect();
                    for block in missing {
                        if nodes.len() >= sizes {
                            break;
                        }
                        let Some(node) = free.pop() else { break };
                        order.insert(node, tag(block), 1.0);
                        nodes.insert(block, node);
                    }
                }
                6 | 7 => {
                    let any = nodes.keys().any(free_leaf);
                    let victim = order.victim(leaf_of, |node| node % 2 == 0);
                    prop_assert!(victim.is_none_or(|node| free_leaf(&of[&node])), "a block was chosen that may not leave");
                    prop_assert!(victim.is_some() == any, "{:?}: a block that may leave was not found", order.running());
                    if let Some(node) = victim {
                        order.remove(node, true);
                        nodes.remove(&of[&node]);
                        free.push(node);
                    }
                }
                8 => {
                    if !held.remove(&block) && nodes.contains_key(&block) {
                        held.insert(block);
                    }
                }
                _ => match block % 3 {
                    0 => order.set_kind(Kind::ALL[block as usize / 3 % Kind::ALL.len()]),
                    1 => {
                        sizes = 1 + block as usize % 60;
                        order.set_capacity(sizes);
                    }
                    _ => {
                        if let Some(node) = nodes.remove(&block) {
                            order.remove(node, false);
                            held.remove(&block);
                            free.push(node);
                        }
                    }
                },
            }
            prop_assert_eq!(order.len(), nodes.len());
        }
        while let Some(node) = order.victim(Some, |_| true) {
            order.remove(node, true);
        }
        prop_assert!(order.is_empty());
    }
}

#[test]
fn what_should_leave_is_taken_before_what_may() {
    for kind in Kind::ALL {
        let mut order = Order::new(kind, 100);
        (0..100).for_each(|n| order.insert(n, tag(n), 1.0));
        assert_eq!(order.victim(Some, |node| node == 70), Some(70), "{kind:?}");
        let but_70 = |node: NodeId| Some(node).filter(|&node| node != 70);
        assert!(order.victim(but_70, |node| node == 70).is_some_and(|node| node != 70), "{kind:?}");
        assert_eq!(order.victim(|_| None, |_| true), None, "{kind:?}");
    }
}

#[test]
fn a_leaf_is_found_behind_any_number_of_blocks_that_others_continue() {
    for kind in Kind::ALL {
        // One path, used again but for its end, which is new.
        let end = 20_000;
        let mut order = Order::new(kind, 20_001);
        (0..end).rev().for_each(|n| order.insert(n, tag(n), 1.0));
        (0..end).rev().for_each(|n| order.touch(n));
        order.insert(end, tag(end), 1.0);
        for leaf in (0..=end).rev() {
            let mut asked = 0;
            let leaf_of = |_| {
                asked += 1;
                Some(leaf)
            };
            assert_eq!(order.victim(leaf_of, |_| true), Some(leaf), "{kind:?}");
            assert!(asked < 3, "{kind:?} asked {asked} times");
            order.remove(leaf, true);
        }
    }
}

#[test]
fn names_are_read_back_and_others_are_refused_with_a_list() {
    for kind in Kind::ALL {
        assert_eq!(Kind::parse(kind.name()).expect("it is a name"), kind);
    }
    let message = Kind::parse("fifo").expect_err("there is none of that name").to_string();
    assert!(Kind::ALL.iter().all(|kind| message.contains(kind.name())) && message.contains("\"fifo\""));
}

#[test]
fn frequency_ages_so_that_old_favourites_leave() {
    for kind in [Kind::Lfu, Kind::Gdsf] {
        let mut order = Order::new(kind, 50);
        (0..50).for_each(|n| order.insert(n, tag(n), 1.0));
        (0..50).for_each(|n| (0..10).for_each(|_| order.touch(n)));
        // Others are used from now on, twice each.
        let mut next = 50;
        for block in 50..5000 {
            let node = order.victim(Some, |_| true).expect("all may leave");
            order.remove(node, true);
            order.insert(node, tag(block % 100 + 1000), 1.0);
            order.touch(node);
            next = block;
        }
        let old = (0..50).filter(|&node| order.blocks[node as usize].is_some_and(|(t, _)| t == tag(node))).count();
        assert!(old < 10, "{kind:?} keeps {old} of 50 after {next} others");
    }
}

#[test]
fn a_costly_block_outlives_a_cheap_one() {
    let mut order = Order::new(Kind::Gdsf, 10);
    order.insert(0, tag(0), 5.0);
    (1..10).for_each(|n| order.insert(n, tag(n), 1.0));
    for _ in 0..9 {
        let node = order.victim(Some, |_| true).expect("all may leave");
        assert_ne!(node, 0);
        order.remove(node, true);
    }
}

#[test]
fn adaptive_follows_the_load() {
    let mut order = Order::new(Kind::Adaptive, 1000);
    let mut nodes: BTreeMap<u64, NodeId> = BTreeMap::new();
    let mut free: Vec<NodeId> = (0..1000).collect();
    let mut ask = |order: &mut Order, tag: u64| {
        order.asked(tag);
        order.choose();
        if let Some(&node) = nodes.get(&tag) {
            order.touch(node);
            return true;
        }
        let node = free.pop().unwrap_or_else(|| {
            let node = order.victim(Some, |_| true).expect("all may leave");
            order.remove(node, true);
            nodes.retain(|_, &mut n| n != node);
            node
        });
        order.insert(node, tag, 1.0);
        nodes.insert(tag, node);
        false
    };
    // A scan that comes back again and again, somewhat longer than the cache: the worst for recency.
    let mut hits = 0;
    for round in 0..60 {
        hits = (0..1500).filter(|&n| ask(&mut order, tag(n))).count();
        assert!(round < 59 || order.running() != Kind::Lru);
    }
    assert!(hits > 300, "{hits} of 1500");
}

#[test]
fn small_changes_of_capacity_lose_nothing_that_was_learnt() {
    let mut order = Order::new(Kind::WTinyLfu, 1000);
    for capacity in [1050, 990, 1100, 900] {
        order.set_capacity(capacity);
        assert_eq!(order.capacity, 1000);
    }
    order.set_capacity(2000);
    assert_eq!(order.capacity, 2000);
}
