//! Blocks of the GPU tier in the hands of others, memory of others in its own, and what becomes of both when something fails.

use crate::gpu::{HALF, Tensor, fetch_to_device, over};
use crate::kv::{COARSE, Kv, MIB, assert_sums, fetch, hold, options, put, register, sequence};
use crate::on::{Remote, schedules};
#[cfg(feature = "cuda")]
use crate::standin::{Standin, When};
use std::sync::{Arc, Mutex};
use stratakv::codec::Layout;
#[cfg(feature = "cuda")]
use stratakv::gpu::Cuda;
use stratakv::gpu::{Adopted, Device, Fault, Host, Schedule, Stream, Submission, Ticket};
use stratakv::stats::Tier;
use stratakv::{GpuOptions, Lease, Model, Options, SlabOptions, Store};

/// A device that is the process, and that may refuse to tell what is in a stream, or say for long that it is not over.
#[derive(Debug)]
struct Odd {
    host: Arc<Host>,
    refuses: Mutex<bool>,
    stalls: Mutex<Vec<Ticket>>,
    stalled: Option<Stream>,
}

impl Odd {
    fn new(stalled: Option<Stream>) -> Arc<Self> {
        let host = Arc::new(Host::new(Schedule::AtOnce, 64 * MIB));
        Arc::new(Self { host, refuses: Mutex::default(), stalls: Mutex::default(), stalled })
    }

    fn set_refuses(&self, refuses: bool) {
        *self.refuses.lock().expect("nobody panics") = refuses;
    }
}

impl Device for Odd {
    fn name(&self) -> String {
        self.host.name()
    }

    fn number(&self) -> u32 {
        self.host.number()
    }

    fn reserve(&self, bytes: u64) -> Result<u64, Fault> {
        self.host.reserve(bytes)
    }

    fn release(&self, address: u64) -> Result<(), Fault> {
        self.host.release(address)
    }

    /// # Safety
    /// As [`Device`] says.
    unsafe fn register(&self, memory: *mut u8, bytes: usize) -> Result<u64, Fault> {
        // SAFETY: as whoever calls this promised.
        unsafe { self.host.register(memory, bytes) }
    }

    fn forget(&self, memory: *mut u8) -> Result<(), Fault> {
        self.host.forget(memory)
    }

    fn owns(&self, address: u64) -> Result<bool, Fault> {
        self.host.owns(address)
    }

    fn takes(&self, layout: &Layout) -> bool {
        self.host.takes(layout)
    }

    /// # Safety
    /// As [`Device`] says.
    unsafe fn submit(&self, submission: Submission) -> Result<Ticket, Fault> {
        // SAFETY: as whoever calls this promised.
        unsafe { self.host.submit(submission) }
    }

    fn is_over(&self, ticket: Ticket) -> Result<bool, Fault> {
        if self.stalls.lock().expect("nobody panics").contains(&ticket) { Ok(false) } else { self.host.is_over(ticket) }
    }

    fn wait(&self, ticket: Ticket) -> Result<(), Fault> {
        self.host.wait(ticket)
    }

    fn mark(&self, stream: Stream) -> Result<Ticket, Fault> {
        if *self.refuses.lock().expect("nobody panics") {
            return Err(Fault::Refused("the stream is being captured".into()));
        }
        let ticket = self.host.mark(stream)?;
        if self.stalled == Some(stream) {
            self.stalls.lock().expect("nobody panics").push(ticket);
        }
        Ok(ticket)
    }

    fn join(&self, stream: Stream, ticket: Ticket) -> Result<(), Fault> {
        self.host.join(stream, ticket)
    }
}

/// Loads a match to the device until it is there.
fn make_hot(tensor: &Tensor, store: &Store, model: &Arc<Model>, tokens: &[u32]) {
    for _ in 0..3 {
        let outcome = hold(store, model, tokens).load(&tensor.view()).expect("it is held");
        assert_eq!(outcome.tokens, tokens.len());
    }
}

/// A store with four blocks of a model on the device, and a tensor to load them to.
fn hot_store(device: &Arc<dyn Device>) -> (Store, Arc<Model>, Vec<u32>, Tensor) {
    let store = over(device.clone(), None, 4 * MIB);
    let model = register(&store, "m", HALF);
    let tokens = sequence(1, 4, &HALF);
    put(&store, &model, &tokens);
    let tensor = Tensor::new(device, &Kv::blank(HALF, tokens.len()), HALF, tokens.len());
    make_hot(&tensor, &store, &model, &tokens);
    (store, model, tokens, tensor)
}

fn held(store: &Store) -> u64 {
    store.snapshot().gpu.expect("there is one").counts.held
}

/// What another thread, in a stream of its own, reads of a block: when it is its turn.
fn read_in(host: &Host, stream: Stream, address: u64, bytes: usize) -> (Ticket, Arc<Mutex<Vec<u8>>>) {
    let got: Arc<Mutex<Vec<u8>>> = Arc::default();
    let to = got.clone();
    let read = host.call(stream, move || {
        // SAFETY: the block is there until the stream is done with it: that is what is tested.
        let block = unsafe { std::slice::from_raw_parts(address as *const u8, bytes) };
        *to.lock().expect("nobody panics") = block.to_vec();
    });
    (read.expect("it is there"), got)
}

#[test]
fn what_is_handed_out_keeps_its_place_until_its_stream_is_done_with_it() {
    // By a tensor of its own in a stream of its own, or by the view in the default stream.
    for (schedule, by_tensor) in schedules().into_iter().flat_map(|schedule| [(schedule, true), (schedule, false)]) {
        let host = Arc::new(Host::new(schedule, 64 * MIB));
        let device: Arc<dyn Device> = host.clone();
        let store = over(device.clone(), None, 24 * MIB);
        let model = register(&store, "m", COARSE);
        let prompts: Vec<_> = (0..12).map(|seed| sequence(seed, 6, &COARSE)).collect();
        prompts.iter().for_each(|tokens| assert_eq!(put(&store, &model, tokens), 6));
        // One for all loads: where memory of a device is given back, all that is under way ends.
        let tensor = Tensor::new(&device, &Kv::blank(COARSE, prompts[0].len()), COARSE, prompts[0].len());
        make_hot(&tensor, &store, &model, &prompts[0]);
        let lease = hold(&store, &model, &prompts[0]);
        assert!(lease.device_view(6).is_none() && hold(&store, &model, &prompts[1]).device_view(0).is_none());
        let view = lease.device_view(2).expect("it is there");
        let right = lease.view(2).expect("it is in RAM, too").payload().to_vec();
        let stream = Stream(if by_tensor { 7 } else { 1 });
        let out = by_tensor.then(|| view.hand_out(Some(stream), false).expect("it is there"));
        if !by_tensor {
            view.read().expect("it is there");
        }
        let (address, bytes) = (view.address(), COARSE.block_bytes());
        let (read, got) = read_in(&host, stream, address, bytes);
        drop((view, out, lease));
        prompts[1..].iter().for_each(|tokens| make_hot(&tensor, &store, &model, tokens));
        assert!(hold(&store, &model, &prompts[0]).device_view(2).is_none(), "others have come");
        host.wait(read).expect("it is there");
        assert!(*got.lock().expect("nobody panics") == right, "{schedule:?}, by a tensor: {by_tensor}");
        assert_sums(&store.snapshot());
        assert_eq!(store.snapshot().gpu.expect("there is one").counts.held, 0);
    }
}

#[test]
fn who_may_write_a_block_has_it_alone_and_the_tier_forgets_it() {
    let host = Arc::new(Host::new(Schedule::AtOnce, 64 * MIB));
    let device: Arc<dyn Device> = host.clone();
    let store = over(device.clone(), None, 4 * MIB);
    let model = register(&store, "m", HALF);
    let tokens = sequence(1, 4, &HALF);
    put(&store, &model, &tokens);
    (0..3).for_each(|_| drop(fetch_to_device(&device, &store, &model, &tokens)));
    let lease = hold(&store, &model, &tokens);
    let view = |n| lease.device_view(n).expect("it is there");
    let refused = |outcome: Result<_, Fault>| assert!(matches!(outcome, Err(Fault::Refused(_))), "{outcome:?}");
    // Others hold it, or have it to read.
    let (one, other) = (view(0), view(0));
    refused(one.hand_out(None, true));
    drop(other);
    let reader = one.hand_out(None, false).expect("it is there");
    refused(one.hand_out(None, true));
    drop(reader);
    one.read().expect("it is there");
    refused(one.hand_out(None, true));
    // Nobody does.
    let alone = view(1);
    let out = alone.hand_out(Some(Stream(3)), true).expect("it is there");
    assert!(lease.device_view(1).is_none());
    refused(alone.hand_out(None, false));
    refused(alone.read().map(|()| unreachable!("it is refused")));
    // SAFETY: it is this test's alone.
    unsafe { (alone.address() as *mut u8).write_bytes(0xee, HALF.block_bytes()) };
    let outcome = fetch_to_device(&device, &store, &model, &tokens);
    assert_eq!((outcome.tokens, outcome.places[1]), (tokens.len(), Tier::Ram));
    // A copy that came meanwhile stays, whatever becomes of the first.
    drop((alone, out));
    assert_eq!(fetch_to_device(&device, &store, &model, &tokens).places, [Tier::Gpu; 4]);
    drop((one, lease));
    assert_eq!(store.snapshot().gpu.expect("there is one").counts.held, 0);
    // After the device is lost nothing is handed out.
    let lease = hold(&store, &model, &tokens);
    let view = lease.device_view(2).expect("it is there");
    let out = view.hand_out(None, false).expect("it is there");
    host.lose("an illegal address");
    assert!(matches!(view.hand_out(None, false), Err(Fault::Lost(_))));
    drop((view, out));
    assert!(lease.device_view(2).is_none() && store.snapshot().gpu.expect("there was one").failed.is_some());
    assert_eq!(fetch(&store, &model, &tokens), 4);
}

#[test]
fn memory_of_somebody_elses_is_the_slab_until_the_store_is_closed() {
    let host = Arc::new(Host::new(Schedule::AtOnce, 64 * MIB));
    let device: Arc<dyn Device> = host.clone();
    let memory = Remote::new(&device, &vec![0x77; 6 << 20]);
    let owner = Arc::new(());
    let slab = |bytes| SlabOptions::Adopted(Adopted { address: memory.address, bytes, owner: owner.clone() });
    let open = |bytes| {
        let gpu = GpuOptions { device: device.clone(), slab: slab(bytes) };
        Store::open(Options { gpu: Some(gpu), ..options(None, 4 * MIB, 8 * MIB) }).expect("it opens")
    };
    assert!(open(MIB).no_gpu().expect("it is too small").contains("1048576 bytes"));
    let store = open(6 * MIB);
    let model = register(&store, "m", HALF);
    let tokens = sequence(1, 4, &HALF);
    put(&store, &model, &tokens);
    (0..3).for_each(|_| drop(fetch_to_device(&device, &store, &model, &tokens)));
    let view = hold(&store, &model, &tokens).device_view(3).expect("it is there");
    assert!((memory.address..memory.address + 6 * MIB).contains(&view.address()));
    let snapshot = store.snapshot().gpu.expect("there is one");
    assert_eq!((snapshot.capacity_bytes, snapshot.counts.reservations), (6 * MIB, 0));
    store.close().expect("nothing is under way");
    assert_eq!(Arc::strong_count(&owner), 2, "a view is there still");
    drop(view);
    assert_eq!(Arc::strong_count(&owner), 1, "its owner has it back, though the store is there");
}

#[test]
fn who_may_write_waits_for_those_who_read_before() {
    let host = Arc::new(Host::new(Schedule::Late, 64 * MIB));
    let (store, model, tokens, _tensor) = hot_store(&(host.clone() as Arc<dyn Device>));
    let lease = hold(&store, &model, &tokens);
    for (n, writer) in [(1, Some(Stream(8))), (2, None)] {
        let right = lease.view(n).expect("it is in RAM, too").payload().to_vec();
        let view = lease.device_view(n).expect("it is there");
        let out = view.hand_out(Some(Stream(7)), false).expect("it is there");
        let (address, bytes) = (view.address(), HALF.block_bytes());
        let (read, got) = read_in(&host, Stream(7), address, bytes);
        drop((out, view));
        let view = lease.device_view(n).expect("it is there still");
        let out = view.hand_out(writer, true).expect("nobody holds it");
        // SAFETY: it is the writer's alone.
        let write =
            host.call(writer.unwrap_or(Stream(9)), move || unsafe { (address as *mut u8).write_bytes(0xee, bytes) });
        host.wait(write.expect("it is there")).expect("it is there");
        host.wait(read).expect("it is there");
        assert!(*got.lock().expect("nobody panics") == right, "{writer:?}");
        drop((out, view));
    }
}

#[test]
fn who_reads_for_long_keeps_one_place_and_nobody_elses() {
    let odd = Odd::new(Some(Stream(9)));
    let device: Arc<dyn Device> = odd.clone();
    let store = over(device.clone(), None, 64 * MIB);
    let model = register(&store, "m", HALF);
    let prompts: Vec<_> = (0..120).map(|seed| sequence(seed, 6, &HALF)).collect();
    prompts.iter().for_each(|tokens| assert_eq!(put(&store, &model, tokens), 6));
    let tensor = Tensor::new(&device, &Kv::blank(HALF, prompts[0].len()), HALF, prompts[0].len());
    prompts.iter().for_each(|tokens| make_hot(&tensor, &store, &model, tokens));
    let full = store.snapshot().total.gpu;
    let lease = hold(&store, &model, &prompts[119]);
    let view = lease.device_view(0).expect("it is there");
    let out = view.hand_out(Some(Stream(9)), true).expect("nobody holds it");
    drop((out, view, lease));
    prompts[..10].iter().for_each(|tokens| make_hot(&tensor, &store, &model, tokens));
    let after = store.snapshot().total.gpu;
    assert!(after.blocks + 1 >= full.blocks && after.evicted - full.evicted <= 60, "{full:?} {after:?}");
}

#[test]
fn a_stream_that_cannot_be_asked_is_asked_again() {
    let odd = Odd::new(None);
    let (store, model, tokens, tensor) = hot_store(&(odd.clone() as Arc<dyn Device>));
    let others = sequence(2, 4, &HALF);
    put(&store, &model, &others);
    let hand_out = |lease: &Lease| {
        let view = lease.device_view(1).expect("it is there");
        let out = view.hand_out(Some(Stream(9)), false).expect("it is there");
        odd.set_refuses(true);
        drop(out);
        odd.set_refuses(false);
    };
    hand_out(&hold(&store, &model, &tokens));
    assert_eq!(held(&store), 1, "nobody knows what is in its stream");
    make_hot(&tensor, &store, &model, &others);
    assert_eq!(held(&store), 0, "it was asked when others came");
    hand_out(&hold(&store, &model, &tokens));
    drop(tensor);
    store.close().expect("nothing is under way");
    assert_eq!(odd.host.reserved_bytes(), 0, "it was asked when the store was closed");
}

#[test]
fn what_is_held_when_the_store_is_closed_gives_the_memory_back_when_it_goes() {
    let host = Arc::new(Host::new(Schedule::AtOnce, 64 * MIB));
    let (store, model, tokens, tensor) = hot_store(&(host.clone() as Arc<dyn Device>));
    drop(tensor);
    let view = hold(&store, &model, &tokens).device_view(1).expect("it is there");
    let out = view.hand_out(Some(Stream(7)), false).expect("it is there");
    store.close().expect("nothing is under way");
    drop(view);
    assert!(host.reserved_bytes() > 0);
    drop(out);
    assert_eq!(host.reserved_bytes(), 0);
}

#[cfg(feature = "cuda")]
fn over_standin(slab: Option<(u64, Arc<()>)>) -> Option<(Standin, Arc<Cuda>, Remote, Store)> {
    let standin = Standin::new(When::Late, 1)?;
    standin.set("bytes", 64 * MIB);
    let cuda = Arc::new(Cuda::open(0, Some(standin.path())).expect("it stands in for one"));
    cuda.set_patience(2);
    let device: Arc<dyn Device> = cuda.clone();
    let memory = Remote::new(&device, &vec![0x77; 6 << 20]);
    let slab = match slab {
        Some((bytes, owner)) => SlabOptions::Adopted(Adopted { address: memory.address, bytes, owner }),
        None => SlabOptions::Reserved(4 * MIB),
    };
    let gpu = GpuOptions { device, slab };
    let store = Store::open(Options { gpu: Some(gpu), ..options(None, 24 * MIB, 8 * MIB) }).expect("it opens");
    Some((standin, cuda, memory, store))
}

#[test]
#[cfg(feature = "cuda")]
fn what_a_device_may_touch_still_is_nobodys_where_it_does_not_say_what_is_over() {
    let owner = Arc::new(());
    let Some((standin, cuda, memory, store)) = over_standin(Some((6 * MIB, owner.clone()))) else { return };
    let device: Arc<dyn Device> = cuda.clone();
    let model = register(&store, "m", HALF);
    let tokens = sequence(1, 8, &HALF);
    put(&store, &model, &tokens);
    let tensor = Tensor::new(&device, &Kv::blank(HALF, tokens.len()), HALF, tokens.len());
    make_hot(&tensor, &store, &model, &tokens);
    let view = hold(&store, &model, &tokens).device_view(1).expect("it is there");
    let out = view.hand_out(Some(Stream(1)), false).expect("it is there");
    // The second event is that behind a kernel, which is launched; and no wait is allowed then.
    standin.fail("cuEventRecord", 2, 2);
    (1..=2).for_each(|nth| standin.fail("cuStreamSynchronize", nth, 2));
    let refused = sequence(9, 8, &HALF);
    assert_eq!(store.put(&model, &refused, "", "", &tensor.view()).expect("it is open").tokens, 0);
    assert!(store.snapshot().gpu.expect("there was one").failed.is_some());
    assert_eq!(Arc::strong_count(&owner), 2, "somebody reads in it still");
    // Others come, and then the device writes what it was given.
    let others: Vec<_> = (10..14).map(|seed| sequence(seed, 8, &HALF)).collect();
    others.iter().for_each(|tokens| assert_eq!(put(&store, &model, tokens), 8));
    let lane_is_empty = || {
        // SAFETY: as declared in cuda/tests/standin.h.
        unsafe { standin.function::<unsafe extern "C" fn() -> u64>("standin_queued")() == 0 }
    };
    assert!(!lane_is_empty());
    drop(Remote::new(&device, &[1; 64]));
    others.iter().for_each(|tokens| assert_eq!(fetch(&store, &model, tokens), 8));
    drop((out, view, model, store, tensor, memory, device, cuda));
    assert_eq!(Arc::strong_count(&owner), 2, "nobody knows whether it is read");
}

#[test]
#[cfg(feature = "cuda")]
fn a_threads_own_stream_is_waited_for_wherever_the_tensor_goes() {
    for stream in [Stream(1), Stream(2)] {
        let Some((standin, cuda, memory, store)) = over_standin(None) else { return };
        let device: Arc<dyn Device> = cuda.clone();
        let model = register(&store, "m", COARSE);
        let prompts: Vec<_> = (0..12).map(|seed| sequence(seed, 6, &COARSE)).collect();
        prompts.iter().for_each(|tokens| assert_eq!(put(&store, &model, tokens), 6));
        let tensor = Tensor::new(&device, &Kv::blank(COARSE, prompts[0].len()), COARSE, prompts[0].len());
        make_hot(&tensor, &store, &model, &prompts[0]);
        let lease = hold(&store, &model, &prompts[0]);
        let right = lease.view(1).expect("it is in RAM, too").payload().to_vec();
        let view = lease.device_view(1).expect("it is there");
        let (from, to, bytes) = (view.address(), memory.address, COARSE.block_bytes());
        // Another thread reads it in its stream, and this one drops it.
        let (give, take) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let retain = standin.function::<unsafe extern "C" fn(*mut usize, i32) -> i32>("cuDevicePrimaryCtxRetain");
        let end = standin.function::<unsafe extern "C" fn(i32) -> i32>("cuDevicePrimaryCtxRelease_v2");
        let push = standin.function::<unsafe extern "C" fn(usize) -> i32>("cuCtxPushCurrent_v2");
        let copy = standin.function::<unsafe extern "C" fn(u64, u64, usize, usize) -> i32>("cuMemcpyAsync");
        let drain = standin.function::<unsafe extern "C" fn(usize) -> i32>("cuStreamSynchronize");
        let reader = std::thread::spawn(move || {
            let out = view.hand_out(Some(stream), false).expect("it is there");
            let mut context = 0;
            // SAFETY: as the driver declares them; the memory is there until the end of this test.
            let codes = unsafe { [retain(&mut context, 0), push(context), copy(to, from, bytes, stream.0 as usize)] };
            assert_eq!(codes, [0; 3]);
            give.send((out, view)).expect("it is taken");
            wait.recv().expect("it is told");
            // SAFETY: as above.
            assert_eq!(unsafe { [drain(stream.0 as usize), end(0)] }, [0; 2]);
        });
        drop(take.recv().expect("it is given"));
        drop(lease);
        prompts[1..].iter().for_each(|tokens| make_hot(&tensor, &store, &model, tokens));
        go.send(()).expect("it waits");
        reader.join().expect("it does not panic");
        assert!(memory.read()[..bytes] == right, "{stream:?}");
        drop((model, store, tensor, memory, device, cuda));
        standin.assert_given_back();
    }
}
