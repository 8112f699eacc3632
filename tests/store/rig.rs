//! A disk for tests: the real file system, but for what a rule says, and for what a power cut takes.
//!
//! A rule looks at every call and says what goes wrong with it. With a cache, what is written is not durable before it is
//! synced: when the power goes, each such sector is as it was or as it became, in any order. Transfers may also go through a
//! queue that ends them in any order.

use crate::kv::{Dice, write_sparse};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::{fmt, io};
use stratakv::{Access, Done, FileIo, Io, IoFile, Queue, Transfer};

const SECTOR: usize = 512;

/// A call of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Open,
    Remove,
    Replace,
    Read,
    Write,
    Allocate,
    Punch,
    Sync,
}

/// What goes wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// An error number; of what is written, half arrives.
    Errno(i32),
    /// Fewer bytes are read than asked for.
    Short,
    /// One bit of what is read is wrong, this time.
    Flip,
}

pub(crate) const EIO: Fault = Fault::Errno(5);
pub(crate) const ENOSPC: Fault = Fault::Errno(28);
pub(crate) const EROFS: Fault = Fault::Errno(30);
pub(crate) const EDQUOT: Fault = Fault::Errno(122);

pub(crate) type Rule = Arc<dyn Fn(Call) -> Option<Fault> + Send + Sync>;

/// The real file system, but for what a rule says.
#[derive(Clone, Default)]
pub(crate) struct Rig {
    rule: Arc<RwLock<Option<Rule>>>,
    cache: Option<Arc<Mutex<Cache>>>,
    /// Draws in which order transfers end.
    order: Option<Arc<Mutex<Dice>>>,
}

impl fmt::Debug for Rig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rig")
    }
}

/// What the disk's cache holds, and when the power goes.
pub(crate) struct Cache {
    /// Of each file, in the order of writing.
    pending: BTreeMap<PathBuf, Vec<Write>>,
    /// The power goes in the last of so many calls; 0: never.
    pub(crate) calls_left: u32,
    dice: Dice,
    directory: PathBuf,
    /// Where the directory is found as the cut left it.
    left: PathBuf,
    pub(crate) cut: bool,
}

/// A write that is not durable yet: where, what was there before, and what it wrote.
struct Write {
    offset: u64,
    before: Vec<u8>,
    after: Vec<u8>,
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

    /// Copies the directory as a disk keeps it that had not written its cache: each sector as it was, or as it became.
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
            write_sparse(&self.left.join(path.file_name().expect("a file")), &bytes);
        }
    }
}

impl Rig {
    /// One whose power goes in the last of so many calls, 0: never; the directory is then found in `left`, as it was kept.
    pub(crate) fn with_cache(directory: &Path, left: &Path, calls_left: u32, seed: u64) -> Self {
        let (directory, left) = (directory.into(), left.into());
        let cache = Cache { pending: BTreeMap::new(), calls_left, dice: Dice(seed), directory, left, cut: false };
        Self { cache: Some(Arc::new(Mutex::new(cache))), ..Self::default() }
    }

    /// Has transfers end in any order.
    pub(crate) fn in_any_order(self, seed: u64) -> Self {
        Self { order: Some(Arc::new(Mutex::new(Dice(seed)))), ..self }
    }

    pub(crate) fn set(&self, rule: Option<Rule>) {
        *self.rule.write().expect("no rule panics") = rule;
    }

    /// Whether the power has gone.
    pub(crate) fn cut(&self) -> bool {
        self.cache().is_some_and(|cache| cache.cut)
    }

    fn fault(&self, call: Call) -> Option<Fault> {
        let rule = self.rule.read().expect("no rule panics").clone();
        rule.and_then(|rule| rule(call))
    }

    fn check(&self, call: Call) -> io::Result<()> {
        match self.fault(call) {
            Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
            _ => Ok(()),
        }
    }

    fn cache(&self) -> Option<MutexGuard<'_, Cache>> {
        self.cache.as_ref().map(|cache| cache.lock().expect("no panic"))
    }
}

impl Io for Rig {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn IoFile>> {
        self.check(Call::Open)?;
        let file = FileIo::default().open(path, access)?;
        Ok(Box::new(Rigged { file, path: path.to_owned(), rig: self.clone() }))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.check(Call::Remove)?;
        if let Some(mut cache) = self.cache() {
            cache.call();
            cache.pending.remove(path);
        }
        FileIo::default().remove(path)
    }
    // Durable, says its contract: so is what was synced of the file before.
    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check(Call::Replace)?;
        if let Some(mut cache) = self.cache() {
            cache.call();
            let pending = cache.pending.remove(from);
            assert!(pending.is_none_or(|writes| writes.is_empty()), "it was not synced before it was renamed");
            cache.pending.remove(to);
        }
        FileIo::default().replace(from, to)
    }
}

#[derive(Debug)]
struct Rigged {
    file: Box<dyn IoFile>,
    path: PathBuf,
    rig: Rig,
}

impl Rigged {
    // What is about to be written; the cut may come with it under way.
    fn note(&self, offset: u64, after: impl FnOnce() -> Vec<u8>) {
        let Some(mut cache) = self.rig.cache() else { return };
        let after = after();
        let mut before = vec![0; after.len()];
        let file = fs::File::open(&self.path).expect("it is there");
        let mut done = 0;
        while let Ok(n @ 1..) = file.read_at(&mut before[done..], offset + done as u64) {
            done += n;
        }
        cache.pending.entry(self.path.clone()).or_default().push(Write { offset, before, after });
        cache.call();
    }
}

impl IoFile for Rigged {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.rig.fault(Call::Read) {
            Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
            Some(Fault::Short) => {
                let half = buffer.len() / 2 / 4096 * 4096;
                self.file.read_at(&mut buffer[..half], offset)
            }
            Some(Fault::Flip) => {
                let read = self.file.read_at(buffer, offset)?;
                if let Some(byte) = buffer[..read].get_mut(offset as usize / 4096 * 37 % read.max(1)) {
                    *byte ^= 4;
                }
                Ok(read)
            }
            None => self.file.read_at(buffer, offset),
        }
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let failed = self.rig.check(Call::Write);
        if failed.is_err() {
            let half = parts.first().map_or(&[][..], |part| &part[..part.len() / 2 / 4096 * 4096]);
            if !half.is_empty() {
                self.note(offset, || half.to_vec());
                self.file.write_at(&[half], offset)?;
            }
            return failed;
        }
        self.note(offset, || parts.concat());
        self.file.write_at(parts, offset)
    }
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.rig.check(Call::Allocate)?;
        if let Some(mut cache) = self.rig.cache() {
            cache.call();
        }
        self.file.allocate(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.rig.check(Call::Punch)?;
        self.note(offset, || vec![0; bytes as usize]);
        self.file.punch(offset, bytes)
    }
    fn sync(&self) -> io::Result<()> {
        self.rig.check(Call::Sync)?;
        if let Some(mut cache) = self.rig.cache() {
            cache.call();
            cache.pending.remove(&self.path);
        }
        self.file.sync()
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
    fn queue(&self) -> Option<Box<dyn Queue + '_>> {
        let order = self.rig.order.as_ref()?;
        Some(Box::new(AnyOrder { file: self, order, under_way: Vec::new() }))
    }
}

/// Ends one of the transfers that are under way, when it is asked for one.
#[derive(Debug)]
struct AnyOrder<'a> {
    file: &'a Rigged,
    order: &'a Mutex<Dice>,
    under_way: Vec<Transfer>,
}

impl Queue for AnyOrder<'_> {
    /// # Safety
    /// As of every queue.
    unsafe fn push(&mut self, transfer: Transfer) {
        self.under_way.push(transfer);
    }

    fn pop(&mut self) -> Option<Done> {
        if self.under_way.is_empty() {
            return None;
        }
        let which = self.order.lock().expect("no panic").below(self.under_way.len());
        let Transfer { tag, write, parts, mut offset } = self.under_way.swap_remove(which);
        let mut moved = 0;
        let (mut end, mut result) = (0, Ok(()));
        for part in &parts {
            end += part.bytes;
            // SAFETY: the memory lives, and nobody else touches it, until this transfer was popped.
            let memory = unsafe { std::slice::from_raw_parts_mut(part.at, part.bytes) };
            let (file, bytes) = (self.file, memory.len());
            let now =
                if write { file.write_at(&[memory], offset).map(|()| bytes) } else { file.read_at(memory, offset) };
            match now {
                Ok(now) => (moved, offset) = (moved + now, offset + now as u64),
                Err(e) => result = Err(e),
            }
            if result.is_err() || moved < end {
                break;
            }
        }
        Some(Done { tag, result: result.map(|()| moved) })
    }
}

impl Drop for AnyOrder<'_> {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
