//! The power goes at any instant: of what was written and not made durable, sectors are lost, in any order. The store that
//! is opened then serves right bytes only, and has what a flush had acknowledged.

use crate::kv::*;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::{fmt, io};
use stratakv::stats::Tier;
use stratakv::{Access, FileIo, Io, IoFile, Options, Store, WritePolicy};

const SECTOR: usize = 512;

/// A write that is not durable yet: where, what was there before, and what it wrote.
struct Write {
    offset: u64,
    before: Vec<u8>,
    after: Vec<u8>,
}

/// What the disk's cache holds, and when the power goes.
struct Cache {
    /// Of each file, in the order of writing.
    pending: BTreeMap<PathBuf, Vec<Write>>,
    calls_left: u32,
    dice: Dice,
    directory: PathBuf,
    /// Where the directory is found as the cut left it.
    left: PathBuf,
    cut: bool,
}

impl Cache {
    // One more call; the last one finds no power.
    fn call(&mut self) {
        if self.calls_left > 0 {
            self.calls_left -= 1;
            if self.calls_left == 0 {
                self.cut_power();
            }
        }
    }

    // Copies the directory as a disk keeps it that had not written its cache: each sector as it was, or as it became.
    fn cut_power(&mut self) {
        self.cut = true;
        for entry in fs::read_dir(&self.directory).expect("it is there") {
            let path = entry.expect("it is readable").path();
            let mut bytes = fs::read(&path).expect("it is readable");
            let writes = self.pending.get(&path).map_or(&[][..], |writes| writes);
            for write in writes.iter().rev() {
                let at = write.offset as usize;
                bytes.resize(bytes.len().max(at + write.before.len()), 0);
                bytes[at..at + write.before.len()].copy_from_slice(&write.before);
            }
            for write in writes {
                // A whole write is kept, lost, or torn.
                let fate = self.dice.below(4);
                for (n, sector) in write.after.chunks(SECTOR).enumerate() {
                    if fate == 0 || fate > 1 && self.dice.below(2) == 0 {
                        let at = write.offset as usize + n * SECTOR;
                        bytes[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            fs::write(self.left.join(path.file_name().expect("a file")), bytes).expect("there is room");
        }
    }
}

#[derive(Clone)]
struct Power(Arc<Mutex<Cache>>);

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Power")
    }
}

impl Power {
    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.0.lock().expect("no panic")
    }
}

impl Io for Power {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn IoFile>> {
        let file = FileIo::default().open(path, access)?;
        Ok(Box::new(Powered { file, path: path.to_owned(), power: self.clone() }))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut cache = self.cache();
        cache.call();
        cache.pending.remove(path);
        FileIo::default().remove(path)
    }
    // Durable, says its contract: so is what was synced of the file before.
    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut cache = self.cache();
        cache.call();
        let pending = cache.pending.remove(from);
        assert!(pending.is_none_or(|writes| writes.is_empty()), "it was not synced before it was renamed");
        cache.pending.remove(to);
        FileIo::default().replace(from, to)
    }
}

#[derive(Debug)]
struct Powered {
    file: Box<dyn IoFile>,
    path: PathBuf,
    power: Power,
}

impl Powered {
    fn before(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut before = vec![0; bytes];
        let file = fs::File::open(&self.path).expect("it is there");
        let mut done = 0;
        while let Ok(n @ 1..) = file.read_at(&mut before[done..], offset + done as u64) {
            done += n;
        }
        before
    }

    fn note(cache: &mut Cache, path: &Path, write: Write) {
        cache.pending.entry(path.to_owned()).or_default().push(write);
    }
}

impl IoFile for Powered {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let mut cache = self.power.cache();
        let after = parts.concat();
        let write = Write { offset, before: self.before(offset, after.len()), after };
        Self::note(&mut cache, &self.path, write);
        // The cut may come with the write under way.
        cache.call();
        self.file.write_at(parts, offset)
    }
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.power.cache().call();
        self.file.allocate(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut cache = self.power.cache();
        let before = self.before(offset, bytes as usize);
        Self::note(&mut cache, &self.path, Write { offset, before, after: vec![0; bytes as usize] });
        cache.call();
        self.file.punch(offset, bytes)
    }
    fn sync(&self) -> io::Result<()> {
        let mut cache = self.power.cache();
        cache.call();
        self.file.sync()?;
        cache.pending.remove(&self.path);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
    fn direct(&self) -> bool {
        self.file.direct()
    }
}

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
        let power = Power(Arc::new(Mutex::new(Cache {
            pending: BTreeMap::new(),
            calls_left,
            dice: Dice(round * 104_729 + 5),
            directory: directory.path().into(),
            left: left.path().into(),
            cut: false,
        })));
        let policy = if dice.below(2) == 0 { WritePolicy::WriteBack } else { WritePolicy::WriteThrough };
        let options = Options { policy, ..options(Some(directory.path()), 2 * MIB, cap) };
        let Ok(store) = Store::open_on(options, Arc::new(power.clone())) else { continue };
        let model = register(&store, "m", FINE);
        let mut durable = 0;
        for seed in 0..120 {
            put(&store, &model, &sequence(seed, 3, &FINE));
            if dice.below(6) == 0 {
                store.flush().expect("the disk is well");
                if power.cache().cut {
                    break;
                }
                durable = seed + 1;
            }
        }
        let had_cut = power.cache().cut;
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
