//! One contract for every engine: what is pushed is moved, whole, to its place, and ends once; a read ends where the file
//! does; an error is one of the transfer that met it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use stratakv::{Access, Done, Engine, ErrorKind, FileIo, Io, IoFile, Part, Queue, Transfer};

const PAGE: usize = 4096;

// Memory at an address that direct I/O takes.
struct Pages(Vec<u8>, usize);

impl Pages {
    fn new(bytes: usize) -> Self {
        let memory = vec![0u8; bytes + PAGE];
        let at = memory.as_ptr().align_offset(PAGE);
        Self(memory, at)
    }
    fn part(&mut self, from: usize, bytes: usize) -> Part {
        assert!(self.1 + from + bytes <= self.0.len());
        Part { at: self.0.as_mut_ptr().wrapping_add(self.1 + from), bytes }
    }
    fn bytes(&self, from: usize, bytes: usize) -> &[u8] {
        &self.0[self.1 + from..][..bytes]
    }
}

fn engines() -> Vec<FileIo> {
    let ring = FileIo::new(Engine::IoUring);
    if let Err(refused) = &ring {
        eprintln!("io_uring is not tested: {refused}");
    }
    [FileIo::new(Engine::Pread), ring].into_iter().flatten().collect()
}

fn open(io: &FileIo, path: &Path) -> Box<dyn IoFile> {
    io.open(path, Access::Create).expect("the directory is writable")
}

// Pages of a number: what each byte should be.
fn content(offset: usize, bytes: usize) -> Vec<u8> {
    (offset..offset + bytes).map(|at| (at / 512 * 7 + at % 251) as u8).collect()
}

fn drain(queue: &mut dyn Queue) -> BTreeMap<usize, std::io::Result<usize>> {
    let mut ends = BTreeMap::new();
    while let Some(Done { tag, result }) = queue.pop() {
        assert!(ends.insert(tag, result).is_none(), "{tag} ended twice");
    }
    ends
}

#[test]
fn every_transfer_is_moved_whole_and_ends_once_however_many_there_are() {
    for io in engines() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let file = open(&io, &path);
        // More than a ring takes at once, of one page to a hundred, in up to seven parts.
        let sizes: Vec<usize> = (0..150).map(|n| PAGE * (1 + n * 37 % 100)).collect();
        let offsets: Vec<usize> = sizes.iter().scan(0, |at, size| Some(std::mem::replace(at, *at + size))).collect();
        let all: usize = sizes.iter().sum();
        let mut memory = Pages::new(all);
        let whole = memory.part(0, all);
        // SAFETY: the part is of `memory`, and nothing else refers to it now.
        unsafe { std::slice::from_raw_parts_mut(whole.at, all) }.copy_from_slice(&content(0, all));
        let cut = |memory: &mut Pages, n: usize| -> Vec<Part> {
            let piece = (sizes[n] / PAGE).div_ceil(1 + n % 7) * PAGE;
            let starts = (0..sizes[n]).step_by(piece);
            starts.map(|from| memory.part(offsets[n] + from, piece.min(sizes[n] - from))).collect()
        };
        for write in [true, false] {
            let mut target = Pages::new(all);
            let mut queue = file.queue().expect("the engine has one");
            for n in (0..sizes.len()).rev() {
                let parts = cut(if write { &mut memory } else { &mut target }, n);
                let transfer = Transfer { tag: n, write, parts, offset: offsets[n] as u64 };
                assert_eq!(transfer.bytes(), sizes[n]);
                // SAFETY: both outlive the queue, and are looked at only when it is empty.
                unsafe { queue.push(transfer) };
                if n % 50 == 0 {
                    queue.start();
                }
            }
            let ends = drain(queue.as_mut());
            assert_eq!(ends.len(), sizes.len());
            assert!(ends.into_iter().all(|(n, end)| end.is_ok_and(|bytes| bytes == sizes[n])), "{io:?}");
            assert!(queue.pop().is_none());
            drop(queue);
            if write {
                assert!(std::fs::read(&path).expect("it was written") == content(0, all), "{io:?}");
            } else {
                assert!(target.bytes(0, all) == content(0, all), "{io:?}");
            }
        }
    }
}

#[test]
fn a_read_ends_where_the_file_ends() {
    for io in engines() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let file = open(&io, &path);
        for end in [0, 1, 511, 512, PAGE, 3 * PAGE - 1, 3 * PAGE + 512, 5 * PAGE] {
            std::fs::write(&path, content(0, end)).expect("written");
            let mut target = Pages::new(8 * PAGE);
            let parts = [(0, 1), (1, 4), (5, 3)].map(|(from, pages)| target.part(from * PAGE, pages * PAGE)).to_vec();
            let mut queue = file.queue().expect("the engine has one");
            // SAFETY: `target` is looked at only when the queue is empty.
            unsafe { queue.push(Transfer { tag: 3, write: false, parts, offset: 0 }) };
            let ends = drain(queue.as_mut());
            drop(queue);
            assert!(ends[&3].as_ref().is_ok_and(|&bytes| bytes == end), "{io:?}: {ends:?} of {end}");
            assert!(target.bytes(0, end) == content(0, end));
        }
    }
}

#[test]
fn an_error_is_one_of_the_transfer_that_met_it() {
    for io in engines() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = open(&io, &directory.path().join("file"));
        let mut memory = Pages::new(4 * PAGE);
        let mut queue = file.queue().expect("the engine has one");
        // Offsets beyond any file are refused.
        for (tag, offset) in [(0, 0), (1, 1 << 63), (2, PAGE as u64)] {
            let parts = vec![memory.part(tag * PAGE, PAGE)];
            // SAFETY: `memory` outlives the queue.
            unsafe { queue.push(Transfer { tag, write: true, parts, offset }) };
        }
        let ends = drain(queue.as_mut());
        assert!(ends[&0].is_ok() && ends[&1].is_err() && ends[&2].is_ok(), "{io:?}: {ends:?}");
    }
}

#[test]
fn a_queue_that_is_dropped_has_waited_for_what_was_under_way() {
    for io in engines() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let file = open(&io, &path);
        std::fs::write(&path, content(0, 256 * PAGE)).expect("written");
        for _ in 0..20 {
            let mut target = Pages::new(256 * PAGE);
            let mut queue = file.queue().expect("the engine has one");
            for tag in 0..8 {
                let parts = vec![target.part(tag * 32 * PAGE, 32 * PAGE)];
                // SAFETY: `target` outlives the queue.
                unsafe { queue.push(Transfer { tag, write: false, parts, offset: (tag * 32 * PAGE) as u64 }) };
            }
            queue.start();
            assert!(queue.pop().is_some_and(|done| done.result.is_ok()));
            drop(queue);
            // Nobody writes to it any more: what is written now stays.
            let whole = target.part(0, 256 * PAGE);
            // SAFETY: the queue is gone.
            unsafe { std::slice::from_raw_parts_mut(whole.at, whole.bytes) }.fill(9);
            std::thread::yield_now();
            assert!(target.bytes(0, 256 * PAGE).iter().all(|&byte| byte == 9));
        }
    }
}

#[test]
fn writes_and_reads_of_many_threads_at_once_do_not_mix() {
    for io in engines() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let file = open(&io, &path);
        std::thread::scope(|scope| {
            for thread in 0..6usize {
                let file = &file;
                scope.spawn(move || {
                    let mut memory = Pages::new(16 * PAGE);
                    for round in 0..30u8 {
                        for write in [true, false] {
                            let whole = memory.part(0, 16 * PAGE);
                            // SAFETY: no queue of this thread lives.
                            let bytes = unsafe { std::slice::from_raw_parts_mut(whole.at, whole.bytes) };
                            bytes.fill(if write { round ^ (thread as u8) << 5 } else { 255 });
                            let mut queue = file.queue().expect("the engine has one");
                            for tag in 0..16 {
                                let parts = vec![memory.part(tag * PAGE, PAGE)];
                                let offset = ((thread * 16 + tag) * PAGE) as u64;
                                // SAFETY: `memory` outlives the queue.
                                unsafe { queue.push(Transfer { tag, write, parts, offset }) };
                            }
                            assert!(drain(queue.as_mut()).values().all(|end| matches!(end, Ok(PAGE))));
                        }
                        let right = round ^ (thread as u8) << 5;
                        assert!(memory.bytes(0, 16 * PAGE).iter().all(|&byte| byte == right));
                    }
                });
            }
        });
        let mut last = [0; 1];
        std::fs::File::open(&path).and_then(|file| file.read_exact_at(&mut last, 0)).expect("it is there");
        assert_eq!(last, [29]);
    }
}

#[test]
fn an_engine_that_is_not_known_is_refused_with_those_that_are() {
    let refused = Engine::parse("libaio").expect_err("there is none");
    assert_eq!(refused.kind(), ErrorKind::Config);
    assert!(refused.to_string().contains("auto, io_uring, pread"), "{refused}");
    assert_eq!(FileIo::default().engine(), ("pread", None));
}
