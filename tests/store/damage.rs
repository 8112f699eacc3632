//! Files that were damaged while the store was closed: it opens, serves right bytes only, and takes new ones.

use crate::kv::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use stratakv::{ErrorKind, Store};

/// The files of a store that was closed.
type Files = BTreeMap<String, Vec<u8>>;

fn read_files(directory: &Path) -> Files {
    let entries = fs::read_dir(directory).expect("the directory is there").map(|entry| entry.expect("it is readable"));
    entries.map(|e| (e.file_name().into_string().expect("a name"), fs::read(e.path()).expect("bytes"))).collect()
}

fn damage(files: &mut Files, earlier: &Files, dice: &mut Dice) {
    let names: Vec<String> = files.keys().filter(|name| *name != "secret" && *name != "lock").cloned().collect();
    let name = names[dice.below(names.len())].clone();
    let bytes = files.get_mut(&name).expect("listed");
    let count = 1 + dice.below(8);
    let sectors = bytes.len() / 512;
    match dice.below(7) {
        0 => (0..count).for_each(|_| {
            let at = dice.below(bytes.len());
            bytes[at] ^= 1 << dice.below(8)
        }),
        1 => (0..count).for_each(|_| bytes[dice.below(sectors) * 512..][..512].fill(0)),
        2 => bytes.truncate(dice.below(bytes.len())),
        // Whole records in the place of others.
        3 => (0..count).for_each(|_| {
            let (run, pages) = (12 * 4096, sectors / 8);
            let from = dice.below(pages) * 4096;
            let to = if dice.below(2) == 0 { from + run } else { from.saturating_sub(run) };
            if from.max(to) + run <= bytes.len() {
                bytes.copy_within(from..from + run, to);
            }
        }),
        // Sectors of the past, and of another file.
        4 | 5 => {
            let other = &names[dice.below(names.len())];
            let source = earlier.get(if dice.below(2) == 0 { &name } else { other });
            // There were no epochs yet.
            let source = source.unwrap_or(&earlier["store"]).clone();
            for _ in 0..count * 4 {
                let at = dice.below(bytes.len().min(source.len()) / 512) * 512;
                let length = (512 << dice.below(8)).min(bytes.len() - at).min(source.len() - at);
                bytes[at..at + length].copy_from_slice(&source[at..at + length]);
            }
        }
        _ => {
            let models: Vec<&String> = names.iter().filter(|name| name.ends_with(".kv")).collect();
            let (one, two) = (files[models[0]].clone(), files[models[1]].clone());
            files.extend([(models[0].clone(), two), (models[1].clone(), one)]);
        }
    }
}

#[test]
fn no_damage_to_the_files_gives_a_wrong_byte_or_keeps_the_store_from_healing() {
    let write = |path: &Path, seeds: std::ops::Range<u32>| {
        let store = open(path, 2 * MIB, MIB);
        for (name, geometry) in [("a", FINE), ("b", LATENT)] {
            let model = register(&store, name, geometry);
            seeds.clone().for_each(|seed| assert_eq!(put(&store, &model, &sequence(seed, 3, &geometry)), 3));
            if seeds.start > 0 {
                let mut kv = Kv::of(&model, &sequence(1, 3, &geometry));
                let put = store.put(&model, &sequence(1, 3, &geometry), "", "gone", &kv.view());
                assert_eq!(put.expect("no bad input").new_blocks, 3);
                store.flush().expect("the disk is well");
                assert_eq!(store.drop_namespace(&model, "", "gone").expect("the disk is well"), 3);
            }
            store.flush().expect("the disk is well");
        }
        store.close().expect("the disk is well");
        read_files(path)
    };
    let first = tempfile::tempdir().expect("a directory");
    let (earlier, sound) = (write(first.path(), 0..8), write(first.path(), 4..14));
    let mut survived = 0;
    for round in 0..120 {
        let mut dice = Dice(round);
        let mut files = sound.clone();
        (0..=dice.below(2)).for_each(|_| damage(&mut files, &earlier, &mut dice));
        let directory = tempfile::tempdir().expect("a directory");
        files.iter().for_each(|(name, bytes)| write_sparse(&directory.path().join(name), bytes));
        let store = match Store::open(options(Some(directory.path()), 2 * MIB, MIB)) {
            Ok(store) => store,
            Err(refused) => {
                let whole = |name: &str, n: usize| {
                    files[name].get(n * 4096..(n + 1) * 4096) == sound[name].get(n * 4096..(n + 1) * 4096)
                };
                let damaged = ["store", "epochs"].iter().any(|name| !whole(name, 0) && !whole(name, 1));
                assert!(refused.kind() == ErrorKind::Format && damaged, "round {round}: {refused}");
                continue;
            }
        };
        let models = [("a", FINE), ("b", LATENT)].map(|(name, geometry)| (register(&store, name, geometry), geometry));
        for (model, geometry) in &models {
            let dropped = store.match_prefix(model, &sequence(1, 3, geometry), "", "gone").expect("the store is open");
            assert_eq!(dropped.tokens(), 0, "round {round}: what was dropped came back");
            survived += (0..14).map(|seed| fetch(&store, model, &sequence(seed, 3, geometry))).sum::<usize>();
        }
        for (model, geometry) in &models {
            (14..30).for_each(|seed| assert_eq!(put(&store, model, &sequence(seed, 3, geometry)), 3));
            store.flush().expect("the disk is well");
            assert!(
                disk_bytes(directory.path()) <= MIB,
                "round {round}: {} of {MIB} bytes",
                disk_bytes(directory.path())
            );
            assert_eq!(fetch(&store, model, &sequence(29, 3, geometry)), 3, "round {round}");
        }
    }
    assert!(survived > 120 * 10, "damage spreads: {survived} blocks survived");
}
