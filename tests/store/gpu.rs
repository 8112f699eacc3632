//! The GPU tier over a device that is the process: right bytes in tensors on it, whatever it does when, and nothing lost
//! with it. What is called a device's tensor here is plain memory: who reads it sees what the device wrote.

use crate::kv::{
    COARSE, Dice, FINE, Kv, LATENT, MIB, assert_sums, fetch, hold, options, put, register, sequence, shape,
};
use crate::on::{Kind, On, Remote, kinds, schedules};
use crate::rig::{Call, EIO, Rig};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use stratakv::codec::{Codec, Layout, Scheme};
use stratakv::gpu::{Device, Host, Schedule, Stream};
use stratakv::stats::{Miss, Tier};
use stratakv::{
    Dtype, Geometry, GpuOptions, KvView, Lease, LoadOutcome, Model, Options, PlaneView, SlabOptions, Store,
};

/// Of 16 bits, so that kernels take its codecs; records of 12 KiB.
pub(crate) const HALF: Geometry = shape(2, 2, 2, 64, Dtype::Fp16, 8);

pub(crate) fn over(device: Arc<dyn Device>, directory: Option<&Path>, ram: u64) -> Store {
    let gpu = GpuOptions { device, slab: SlabOptions::Reserved(4 * MIB) };
    Store::open(Options { gpu: Some(gpu), ..options(directory, ram, 8 * MIB) }).expect("it opens")
}

/// Keys and values of a sequence in memory of a device, as `Kv` has them.
pub(crate) struct Tensor {
    pub(crate) remote: Remote,
    geometry: Geometry,
    tokens: usize,
}

impl Tensor {
    pub(crate) fn new(device: &Arc<dyn Device>, kv: &Kv, geometry: Geometry, tokens: usize) -> Self {
        Self { remote: Remote::new(device, kv.bytes()), geometry, tokens }
    }

    pub(crate) fn view(&self) -> KvView {
        let row = self.geometry.row_bytes();
        let plane_bytes = self.geometry.kv_heads as usize * self.tokens * row;
        let plane = |p: usize| PlaneView {
            base: (self.remote.address as usize + p * plane_bytes) as *mut u8,
            head_stride: (self.tokens * row) as isize,
            token_stride: row as isize,
            page_stride: 0,
        };
        let planes = (0..self.geometry.plane_count()).map(plane).collect();
        // SAFETY: the memory holds every row that the planes name, and outlives the calls that a view is made for.
        unsafe { KvView::new(planes, None, self.tokens) }.expect("there is no page table").on_device(None)
    }

    fn kv(&self) -> Kv {
        Kv::from_bytes(self.geometry, self.tokens, self.remote.read())
    }
}

fn put_from_device(device: &Arc<dyn Device>, store: &Store, model: &Model, tokens: &[u32]) -> usize {
    let geometry = model.spec().geometry;
    let tensor = Tensor::new(device, &Kv::of(model, tokens), geometry, tokens.len());
    let outcome = store.put(model, tokens, "", "", &tensor.view()).expect("it is open");
    outcome.tokens / geometry.block_tokens as usize
}

/// Loads a match to the device and checks every byte.
fn load_to_device(device: &Arc<dyn Device>, lease: &Lease, model: &Model, tokens: &[u32]) -> LoadOutcome {
    let geometry = model.spec().geometry;
    let tensor = Tensor::new(device, &Kv::blank(geometry, tokens.len()), geometry, tokens.len());
    let outcome = lease.load(&tensor.view()).expect("a load of right arguments never fails");
    if outcome.tokens > 0 {
        let (got, right) = (tensor.kv(), Kv::of(model, tokens));
        assert!(got.begins_as(&right, outcome.tokens), "wrong bytes: {outcome:?}");
    }
    outcome
}

pub(crate) fn fetch_to_device(
    device: &Arc<dyn Device>,
    store: &Store,
    model: &Arc<Model>,
    tokens: &[u32],
) -> LoadOutcome {
    load_to_device(device, &hold(store, model, tokens), model, tokens)
}

#[test]
fn what_is_asked_for_again_comes_from_the_device() {
    for geometry in [HALF, FINE, COARSE, LATENT] {
        for kind in kinds() {
            let Some(on) = On::open(kind, 16 * MIB) else { return };
            let device = on.device();
            let store = over(device.clone(), None, 4 * MIB);
            let model = register(&store, "m", geometry);
            let tokens = sequence(1, 5, &geometry);
            assert_eq!(put_from_device(&device, &store, &model, &tokens), 5);
            let places = |store: &Store| fetch_to_device(&device, store, &model, &tokens).places;
            assert_eq!(places(&store), [Tier::Ram; 5]);
            places(&store);
            // It is hot now, and was copied by the last load at the latest.
            assert_eq!(places(&store), [Tier::Gpu; 5], "{geometry:?}");
            // Memory of the process is filled from RAM.
            assert_eq!(fetch(&store, &model, &tokens), 5);
            let snapshot = store.snapshot();
            assert_sums(&snapshot);
            assert_eq!((snapshot.total.gpu.blocks, snapshot.total.gpu.asked), (5, 15));
            let counts = snapshot.gpu.expect("there is one").counts;
            assert_eq!((counts.in_use, counts.held, counts.reservations), (5, 0, 1));
            // The books of RAM are as if there were no GPU.
            assert_eq!(snapshot.total.tiers[0].blocks, 5);
            store.unregister(&model).expect("it is registered");
            let snapshot = store.snapshot();
            assert_sums(&snapshot);
            assert_eq!(snapshot.total.gpu.used_bytes, 0);
        }
    }
}

#[test]
fn what_is_encoded_in_ram_is_decoded_by_the_device_as_it_would_be_here() {
    for codec in [Codec::Int8Sym, Codec::Int8Asym, Codec::K8V4, Codec::Int4] {
        for kind in kinds() {
            let Some(on) = On::open(kind, 16 * MIB) else { return };
            let device = on.device();
            let store = over(device.clone(), None, 4 * MIB);
            // Large enough that something is saved.
            let geometry = shape(2, 2, 2, 128, Dtype::Bf16, 32);
            let model = register(&store, "m", geometry);
            store.set_codec(&model, Tier::Ram, Scheme::new(codec, &geometry)).expect("it fits");
            let tokens = sequence(2, 3, &geometry);
            // Bytes of any kind are values of any size: here those of a model.
            let kv = Kv::values(&model, &tokens);
            let tensor = Tensor::new(&device, &kv, geometry, tokens.len());
            let puts = store.put(&model, &tokens, "", "", &tensor.view()).expect("it is open");
            assert_eq!(puts.new_blocks, 3);
            let mut by_cpu = Kv::blank(geometry, tokens.len());
            let lease = hold(&store, &model, &tokens);
            assert_eq!(lease.load(&by_cpu.view()).expect("it is held").tokens, tokens.len());
            for _ in 0..4 {
                let tensor = Tensor::new(&device, &Kv::blank(geometry, tokens.len()), geometry, tokens.len());
                let outcome = hold(&store, &model, &tokens).load(&tensor.view()).expect("it is held");
                assert_eq!(outcome.tokens, tokens.len());
                let by_device = tensor.kv();
                assert!(by_device.begins_as(&by_cpu, tokens.len()), "{codec:?} {:?}", outcome.places);
            }
            // Put from here it is encoded alike.
            let snapshot = store.snapshot();
            let layout = Layout::new(Scheme::new(codec, &geometry), &geometry).expect("it fits");
            let encoded = if device.takes(&layout) { 3 } else { 0 };
            assert_eq!(snapshot.total.encoded, encoded, "{codec:?}");
            assert_eq!(snapshot.total.gpu.blocks, 3);
        }
    }
}

#[test]
fn a_block_that_no_scale_fits_is_put_as_it_is() {
    for kind in kinds() {
        let Some(on) = On::open(kind, 16 * MIB) else { return };
        let device = on.device();
        let store = over(device.clone(), None, 4 * MIB);
        let geometry = shape(2, 2, 2, 128, Dtype::Fp16, 32);
        let model = register(&store, "m", geometry);
        store.set_codec(&model, Tier::Ram, Scheme::new(Codec::Int8Sym, &geometry)).expect("it fits");
        // Bits of all kinds, infinities among them.
        let tokens = sequence(3, 3, &geometry);
        assert_eq!(put_from_device(&device, &store, &model, &tokens), 3);
        assert_eq!(store.snapshot().total.not_encodable, 3);
        assert_eq!(fetch_to_device(&device, &store, &model, &tokens).tokens, tokens.len());
        assert_eq!(fetch(&store, &model, &tokens), 3);
    }
}

#[test]
fn more_than_the_slab_holds_comes_and_goes_and_models_have_equal_parts() {
    for kind in kinds() {
        let Some(on) = On::open(kind, 16 * MIB) else { return };
        let device = on.device();
        let store = over(device.clone(), None, 24 * MIB);
        let models = ["a", "b"].map(|name| register(&store, name, COARSE));
        let prompts: Vec<_> = (0..8).map(|seed| sequence(seed, 6, &COARSE)).collect();
        for model in &models {
            prompts.iter().for_each(|tokens| assert_eq!(put(&store, model, tokens), 6));
        }
        let tensors = |n: u64| 4 * 2 * 8 * n;
        let before = on.allocations();
        for _ in 0..4 {
            for model in &models {
                for tokens in &prompts {
                    assert_eq!(fetch_to_device(&device, &store, model, tokens).tokens, tokens.len());
                }
            }
        }
        // One for the tensor of each load, by this test.
        assert!(on.allocations() == before || on.allocations() - before == tensors(1));
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        let gpu = snapshot.total.gpu;
        assert!(gpu.evicted > 0 && gpu.used_bytes <= 4 * MIB && gpu.blocks > 10, "{gpu:?}");
        // Half of the slab each, as far as its pieces allow.
        for (name, counts) in &snapshot.models {
            assert!(counts.gpu.blocks >= 8, "{name}: {:?}", counts.gpu);
        }
        let counts = snapshot.gpu.expect("there is one").counts;
        assert_eq!((counts.held, counts.reservations), (0, 1));
        assert!(counts.taken - counts.fresh > 10 && counts.fresh <= 32, "{counts:?}");
    }
}

#[test]
fn what_is_on_ssd_alone_comes_to_the_device_by_way_of_ram_or_without_it() {
    for kind in kinds() {
        let directory = tempfile::tempdir().expect("a directory");
        let Some(on) = On::open(kind, 16 * MIB) else { return };
        let device = on.device();
        let prompts: Vec<_> = (0..6).map(|seed| sequence(seed, 4, &COARSE)).collect();
        {
            let store = over(device.clone(), Some(directory.path()), 2 * MIB);
            let model = register(&store, "m", COARSE);
            for tokens in &prompts {
                assert_eq!(put_from_device(&device, &store, &model, tokens), 4);
                store.flush().expect("the disk is well");
            }
            store.close().expect("the disk is well");
        }
        let store = over(device.clone(), Some(directory.path()), 2 * MIB);
        let model = register(&store, "m", COARSE);
        // All of RAM is held, so that nothing can be read into it.
        let held: Vec<_> = prompts[..3].iter().map(|tokens| hold(&store, &model, tokens)).collect();
        held.iter().for_each(|lease| drop(lease.prefetch()));
        for tokens in &prompts {
            let outcome = fetch_to_device(&device, &store, &model, tokens);
            assert_eq!((outcome.tokens, outcome.miss), (tokens.len(), None));
        }
        drop(held);
        for _ in 0..3 {
            for tokens in &prompts {
                assert_eq!(fetch_to_device(&device, &store, &model, tokens).tokens, tokens.len());
            }
        }
        assert_sums(&store.snapshot());
        assert!(store.snapshot().total.gpu.hit > 0);
    }
}

#[test]
fn what_is_held_behind_a_block_that_cannot_be_read_is_given_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let device: Arc<dyn Device> = Arc::new(Host::new(Schedule::Late, 16 * MIB));
    let rig = Rig::default();
    let gpu = GpuOptions { device: device.clone(), slab: SlabOptions::Reserved(4 * MIB) };
    let options = Options { gpu: Some(gpu), ..options(Some(directory.path()), 2 * MIB, 8 * MIB) };
    let store = Store::open_on(options, Arc::new(rig.clone())).expect("the disk is sound");
    let model = register(&store, "m", COARSE);
    let tokens = sequence(1, 5, &COARSE);
    put(&store, &model, &tokens);
    let tensor = Tensor::new(&device, &Kv::blank(COARSE, tokens.len()), COARSE, tokens.len());
    // The end of it is on the device, and the start is not.
    for _ in 0..3 {
        let lease = hold(&store, &model, &tokens);
        assert_eq!(lease.load_part(&tensor.view(), 3..5).expect("it is held").tokens, tokens.len());
    }
    assert_eq!(store.snapshot().total.gpu.blocks, 2);
    // Others take its room.
    for seed in 2..8 {
        put(&store, &model, &sequence(seed, 5, &COARSE));
        store.flush().expect("the disk is sound");
    }
    rig.set(Some(Arc::new(|call| (call == Call::Read).then_some(EIO))));
    let outcome = hold(&store, &model, &tokens).load(&tensor.view()).expect("a disk that fails is a miss");
    assert_eq!((outcome.tokens, outcome.miss), (0, Some(Miss::Io)));
    rig.set(None);
    let snapshot = store.snapshot();
    assert_sums(&snapshot);
    let counts = snapshot.gpu.expect("there is one").counts;
    assert_eq!((counts.held, snapshot.total.gpu.blocks), (0, 0));
}

#[test]
fn a_device_that_is_lost_takes_nothing_with_it() {
    let mut lost = vec![Kind::Host(Schedule::Late)];
    #[cfg(feature = "cuda")]
    lost.push(Kind::Standin(crate::standin::When::Late, 1));
    for kind in lost.drain(..) {
        let Some(on) = On::open(kind, 16 * MIB) else { return };
        let device = on.device();
        let store = over(device.clone(), None, 4 * MIB);
        let model = register(&store, "m", FINE);
        let tokens = sequence(1, 5, &FINE);
        put(&store, &model, &tokens);
        (0..3).for_each(|_| assert_eq!(fetch_to_device(&device, &store, &model, &tokens).tokens, tokens.len()));
        let tensor = Tensor::new(&device, &Kv::of(&model, &sequence(2, 5, &FINE)), FINE, tokens.len());
        on.lose();
        let outcome = hold(&store, &model, &tokens).load(&tensor.view()).expect("a device that fails is a miss");
        assert_eq!((outcome.tokens, outcome.miss), (0, Some(Miss::Failed)));
        let put_then = store.put(&model, &sequence(2, 5, &FINE), "", "", &tensor.view()).expect("it is open");
        assert_eq!(put_then.tokens, 0);
        // Nobody reads from there any more, and all of it is in RAM.
        assert_eq!(fetch(&store, &model, &tokens), 5);
        assert_eq!(put(&store, &model, &sequence(3, 5, &FINE)), 5);
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        assert_eq!((snapshot.total.gpu.blocks, snapshot.total.gpu.used_bytes), (0, 0));
        let failed = snapshot.gpu.expect("there was one").failed.expect("it is said");
        assert!(failed.contains("illegal address") || failed.contains("ILLEGAL_ADDRESS"), "{failed}");
        assert_eq!(snapshot.total.unloaded[Miss::Failed as usize], 5);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_wait_that_is_refused_for_a_while_is_made_again_and_an_error_of_any_call_is_a_miss() {
    use crate::standin::When;
    for (call, code) in [("cuEventSynchronize", 900), ("cuPointerGetAttribute", 700), ("cuLaunchKernel", 700)] {
        let Some(on) = On::open(Kind::Standin(When::Late, 1), 32 * MIB) else { return };
        let On::Standin(_, standin) = &on else { return };
        let device = on.device();
        let store = over(device.clone(), None, 4 * MIB);
        let model = register(&store, "m", FINE);
        let (tokens, other) = (sequence(1, 5, &FINE), sequence(2, 5, &FINE));
        let tensor = Tensor::new(&device, &Kv::of(&model, &tokens), FINE, tokens.len());
        standin.fail(call, 1, code);
        let outcome = store.put(&model, &tokens, "", "", &tensor.view()).expect("a device that fails is a miss");
        assert_eq!(outcome.tokens, if code == 900 { tokens.len() } else { 0 }, "{call}");
        // Nobody writes to the slots that others have now.
        assert_eq!(put(&store, &model, &other), 5);
        let queued = standin.function::<unsafe extern "C" fn() -> u64>("standin_queued");
        // SAFETY: as declared in cuda/tests/standin.h.
        assert_eq!(unsafe { queued() }, 0, "{call}");
        assert_eq!(fetch(&store, &model, &other), 5);
        assert_sums(&store.snapshot());
    }
}

#[test]
fn a_sequence_of_one_head_is_taken_whatever_its_stride_says() {
    for kind in kinds() {
        let Some(on) = On::open(kind, 16 * MIB) else { return };
        let device = on.device();
        let store = over(device.clone(), None, 4 * MIB);
        let geometry = shape(2, 1, 1, 64, Dtype::Fp16, 64);
        let model = register(&store, "m", geometry);
        store.set_codec(&model, Tier::Ram, Scheme::new(Codec::Int8Sym, &geometry)).expect("it fits");
        let tokens = sequence(1, 2, &geometry);
        let tensor = Tensor::new(&device, &Kv::values(&model, &tokens), geometry, tokens.len());
        // Of an axis of one item DLPack may say one value.
        let planes = |p: usize| PlaneView {
            base: (tensor.remote.address as usize + p * tokens.len() * geometry.row_bytes()) as *mut u8,
            head_stride: 2,
            token_stride: geometry.row_bytes() as isize,
            page_stride: 0,
        };
        // SAFETY: as of `Tensor::view`.
        let view = unsafe { KvView::new((0..2).map(planes).collect(), None, tokens.len()) }.expect("no table");
        assert_eq!(store.put(&model, &tokens, "", "", &view.on_device(None)).expect("it is open").new_blocks, 2);
        assert_eq!(store.snapshot().total.encoded, 2, "{kind:?}");
        drop(store);
    }
}

#[test]
fn without_a_gpu_tier_a_tensor_on_a_device_is_refused() {
    let store = Store::open(options(None, 4 * MIB, 0)).expect("it opens");
    let model = register(&store, "m", FINE);
    let tokens = sequence(1, 1, &FINE);
    put(&store, &model, &tokens);
    let refused = |error: stratakv::Error| assert!(error.to_string().contains("no GPU tier"), "{error}");
    let mut kv = Kv::of(&model, &tokens);
    refused(store.put(&model, &tokens, "", "", &kv.view().on_device(None)).expect_err("there is none"));
    refused(hold(&store, &model, &tokens).load(&kv.view().on_device(None)).expect_err("there is none"));
}

#[test]
fn a_store_serves_without_a_device_that_has_no_room_and_says_why() {
    let device = Arc::new(Host::new(Schedule::AtOnce, MIB));
    let store = over(device.clone(), None, 4 * MIB);
    assert_eq!(store.no_gpu(), Some("the device has no room for 4194304 bytes"));
    let model = register(&store, "m", FINE);
    let tokens = sequence(1, 5, &FINE);
    assert_eq!((put(&store, &model, &tokens), fetch(&store, &model, &tokens)), (5, 5));
    assert_eq!(store.snapshot().gpu, None);
}

#[test]
fn the_callers_stream_is_waited_for() {
    for schedule in schedules() {
        let device = Arc::new(Host::new(schedule, 8 * MIB));
        let store = over(device.clone(), None, 4 * MIB);
        let model = register(&store, "m", FINE);
        let tokens = sequence(1, 4, &FINE);
        // An engine's kernels write the tensors when it is their turn.
        let (right, mut kv) = (Kv::of(&model, &tokens), Kv::blank(FINE, tokens.len()));
        let (from, to, bytes) = (right.bytes().as_ptr().addr(), kv.bytes().as_ptr().addr(), right.bytes().len());
        let write = move || {
            // SAFETY: both are there until the end of this turn.
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        };
        device.call(Stream(3), write).expect("it is there");
        let outcome = store.put(&model, &tokens, "", "", &kv.view().on_device(Some(Stream(3)))).expect("it is open");
        assert_eq!(outcome.tokens, tokens.len());
        assert_eq!(fetch(&store, &model, &tokens), 4);
        // Kernels that still read what a load will write over.
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        kv.fill(3.0);
        let (noted, first) = (seen.clone(), kv.bytes().as_ptr().addr());
        let read = move || {
            // SAFETY: it is there until the end of this turn.
            noted.lock().expect("no panic").push(unsafe { *(first as *const f32) });
        };
        device.call(Stream(3), read).expect("it is there");
        let lease = hold(&store, &model, &tokens);
        assert_eq!(lease.load(&kv.view().on_device(Some(Stream(3)))).expect("it is held").tokens, tokens.len());
        assert!(kv.begins_as(&right, tokens.len()));
        assert_eq!(*seen.lock().expect("no panic"), [3.0]);
    }
}

#[test]
fn threads_get_right_bytes_whatever_the_device_does_when() {
    for kind in kinds().into_iter().skip(1) {
        let directory = tempfile::tempdir().expect("a directory");
        let Some(on) = On::open(kind, 64 * MIB) else { return };
        let device = on.device();
        let store = over(device.clone(), Some(directory.path()), 6 * MIB);
        let models = ["a", "b"].map(|name| register(&store, name, COARSE));
        let work = |seed: u64| {
            let mut dice = Dice(seed);
            for _ in 0..100 {
                let model = &models[dice.below(2)];
                let tokens = sequence(dice.below(6) as u32, 1 + dice.below(5), &COARSE);
                match dice.below(10) {
                    0 | 1 => drop(put_from_device(&device, &store, model, &tokens)),
                    2 => drop(put(&store, model, &tokens)),
                    3 => drop(fetch(&store, model, &tokens)),
                    4 if dice.below(8) == 0 => drop(store.drop_namespace(model, "", "")),
                    _ => drop(fetch_to_device(&device, &store, model, &tokens)),
                }
            }
        };
        thread::scope(|scope| {
            let work = &work;
            (0..4).for_each(|seed| drop(scope.spawn(move || work(seed))));
        });
        let snapshot = store.snapshot();
        assert_sums(&snapshot);
        let counts = snapshot.gpu.expect("there is one").counts;
        assert_eq!((counts.held, counts.reservations), (0, 1));
        assert!(snapshot.total.gpu.hit > 0, "{:?}", snapshot.total.gpu);
        for model in &models {
            store.unregister(model).expect("it is registered");
        }
        assert_eq!(store.snapshot().total.gpu.used_bytes, 0);
        store.close().expect("the disk is well");
        // Leases and models may outlive it; the device's memory is free.
        assert_eq!(on.reserved_bytes(), 0);
        drop((models, store, device));
        on.end();
    }
}
