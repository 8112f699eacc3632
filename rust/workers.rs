//! Threads of a store: whoever calls works, and those help who are free.
//!
//! ```text
//! caller   offer ─▶ work ─▶ close ─▶ wait for those inside ─▶ return
//! helper            enter ─▶ work ─▶ leave                      (too late: closed, nothing to do)
//! ```
//! A caller waits for a helper that has begun, never for one that has not: its core may be another's for milliseconds.

use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicUsize, Condvar, Mutex, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Offers that no helper has taken up yet; a caller makes no more than so many wait.
const OFFERS: usize = 256;
/// A caller looks so often whether its helpers have left, some 20 us in all, before it sleeps.
const LOOKS: usize = 64;

/// Threads for copies, codecs and reads; the calling thread is one of them.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
    offers: Arc<AtomicUsize>,
}

/// What a call shares with its helpers.
struct Call {
    /// The caller's, and alive as long as the door is open or a helper is inside.
    work: &'static (dyn Fn(usize) + Sync),
    next: AtomicUsize,
    count: usize,
    door: Mutex<Door>,
    left: Condvar,
}

#[derive(Default)]
struct Door {
    closed: bool,
    inside: usize,
    panicked: bool,
}

impl Call {
    fn drain(&self) {
        loop {
            // Relaxed: it only hands out numbers; the door orders the work itself.
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= self.count {
                break;
            }
            (self.work)(n);
        }
    }

    fn help(&self) {
        let mut door = self.door.lock();
        if door.closed {
            return;
        }
        door.inside += 1;
        drop(door);
        let outcome = catch_unwind(AssertUnwindSafe(|| self.drain()));
        let mut door = self.door.lock();
        door.inside -= 1;
        door.panicked |= outcome.is_err();
        let awaited = door.closed;
        drop(door);
        if awaited {
            self.left.notify_all();
        }
    }
}

/// Nobody is inside once it is gone, whatever became of the caller's own share.
struct Closing<'a>(&'a Call);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.door.lock().closed = true;
        // Who is inside has one piece left, which is sooner done than this thread is woken.
        for _ in 0..LOOKS {
            if self.0.door.lock().inside == 0 {
                return;
            }
            (0..32).for_each(|_| std::hint::spin_loop());
        }
        let mut door = self.0.door.lock();
        while door.inside > 0 {
            door = self.0.left.wait(door);
        }
    }
}

impl Workers {
    /// `threads` in all; 0 means one per core.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let build = || {
            rayon::ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("stratakv-{i}")).build()
        };
        let failed = |e| Error::io(format!("cannot start {threads} threads"), std::io::Error::other(e));
        let pool = (threads > 1).then(build).transpose().map_err(failed)?;
        Ok(Self { pool, threads, offers: Arc::default() })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work(0..count)` on the calling thread and on those that are free.
    ///
    /// # Panics
    /// Where `work` does, once no thread is at it any more.
    pub(crate) fn each(&self, count: usize, work: impl Fn(usize) + Sync) {
        let Some(pool) = self.pool.as_ref().filter(|_| count > 1) else { return (0..count).for_each(work) };
        let work: &(dyn Fn(usize) + Sync) = &work;
        // SAFETY: it is called by those inside alone, and `Closing` lets nobody in and waits for them before `work` goes.
        let work = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
        let next = AtomicUsize::new(0);
        let call = Arc::new(Call { work, next, count, door: Mutex::default(), left: Condvar::default() });
        let closing = Closing(&call);
        for _ in 1..self.threads.min(count) {
            // Relaxed, here and below: a bound on memory, which orders nothing.
            if self.offers.load(Ordering::Relaxed) >= OFFERS {
                break;
            }
            self.offers.fetch_add(1, Ordering::Relaxed);
            let (call, offers) = (call.clone(), self.offers.clone());
            pool.spawn(move || {
                offers.fetch_sub(1, Ordering::Relaxed);
                call.help();
            });
        }
        call.drain();
        drop(closing);
        assert!(!call.door.lock().panicked, "a thread that helped has panicked; its message is above");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn each_piece_is_done_once_by_many_threads() {
        let workers = Workers::new(4).expect("threads start");
        for count in [0, 1, 2, 3, 1000] {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            workers.each(count, |n| {
                done[n].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn threads_help() {
        let workers = Workers::new(2).expect("threads start");
        // Two pieces that wait for each other: one thread alone would never end.
        let meeting = Barrier::new(2);
        workers.each(2, |_| {
            meeting.wait();
        });
    }

    #[test]
    fn nobody_waits_for_a_helper_that_never_began_and_its_offers_are_bounded() {
        let workers = Workers::new(2).expect("threads start");
        let (held, holding) = std::sync::mpsc::channel::<()>();
        let pool = workers.pool.as_ref().expect("a helper");
        pool.spawn(move || {
            let _ended = holding.recv();
        });
        let done = AtomicUsize::new(0);
        for _ in 0..2 * OFFERS {
            let local = [1; 8];
            workers.each(2, |n| {
                done.fetch_add(local[n], Ordering::Relaxed);
            });
        }
        assert_eq!(done.load(Ordering::Relaxed), 4 * OFFERS);
        assert_eq!(workers.offers.load(Ordering::Relaxed), OFFERS);
        drop(held);
        pool.install(|| ());
        assert_eq!(done.load(Ordering::Relaxed), 4 * OFFERS, "a late helper finds nothing");
    }

    #[test]
    fn a_panic_reaches_the_caller_when_all_threads_are_done() {
        let workers = Workers::new(2).expect("threads start");
        for culprit in 0..2 {
            let meeting = Barrier::new(2);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                workers.each(2, |n| {
                    meeting.wait();
                    assert!(n != culprit);
                });
            }));
            assert!(outcome.is_err());
        }
        workers.each(2, |_| ());
    }
}
