//! The SSD tier's engines on a file: `ssd ENGINE read|write|randread BYTES DEPTH SECONDS PATH SIZE [plain]`.
//!
//! Prints GB/s, and seconds of processor time a GiB. Memory is on huge pages, unless it is to be `plain`; benches/ssd.py
//! runs it in turns with fio.

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::path::Path;
use std::time::{Duration, Instant};
use stratakv::{Access, Engine, FileIo, Io as _, Part, Transfer};

const HUGE: usize = 2 << 20;

fn memory(bytes: usize, huge: bool) -> *mut u8 {
    let length = bytes + HUGE;
    // SAFETY: a new mapping aliases nothing; it lives as long as the process.
    let mapping =
        unsafe { mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }
            .expect("memory is to be had");
    let base = mapping.cast::<u8>();
    let base = base.wrapping_add(base.align_offset(HUGE));
    let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: the range lies in the mapping, and holds nothing yet.
    unsafe { madvise(base.cast(), bytes, advice) }.unwrap_or_default();
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(base, bytes) }.fill(0x5a);
    base
}

// Processor time of all threads.
fn processor() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let all: u64 = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|stat| stat.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(all)
}

#[expect(clippy::print_stdout, reason = "its output is its result")]
fn main() {
    // Cargo may add an argument of its own.
    let all: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [engine, verb, bytes, depth, seconds, path, size, rest @ ..] = all.as_slice() else {
        panic!("expected ENGINE read|write|randread BYTES DEPTH SECONDS PATH SIZE [plain]");
    };
    let number = |word: &String| word.parse::<usize>().expect("a number");
    let (bytes, depth, seconds, size) = (number(bytes), number(depth), number(seconds), number(size));
    let io = FileIo::new(Engine::parse(engine).expect("an engine")).expect("it is allowed");
    let file = io.open(Path::new(path), Access::Create).expect("a file");
    let base = memory(bytes * depth, rest.is_empty());
    let (places, write) = (size / bytes, verb == "write");
    let mut queue = file.queue().expect("a queue");
    let mut state = 1u64;
    let mut step = 0;
    let mut next = || {
        step += 1;
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let place = if verb == "randread" { (state >> 33) as usize } else { step - 1 };
        (place % places * bytes) as u64
    };
    let (started, spent) = (Instant::now(), processor());
    let mut push = |queue: &mut dyn stratakv::Queue, tag: usize| {
        let parts = vec![Part { at: base.wrapping_add(tag * bytes), bytes }];
        // SAFETY: each tag has memory of its own, and one transfer at a time.
        unsafe { queue.push(Transfer { tag, write, parts, offset: next() }) };
    };
    (0..depth).for_each(|tag| push(queue.as_mut(), tag));
    let mut moved = 0;
    while let Some(done) = queue.pop() {
        moved += done.result.expect("the disk is well");
        if started.elapsed().as_secs_f64() < seconds as f64 {
            push(queue.as_mut(), done.tag);
        }
    }
    let (elapsed, spent) = (started.elapsed().as_secs_f64(), processor() - spent);
    println!("{} {}", moved as f64 / elapsed / 1e9, spent.as_secs_f64() / (moved as f64 / f64::from(1 << 30)));
}
