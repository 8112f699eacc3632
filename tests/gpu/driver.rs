//! What a GPU's driver has beside the trait: over the stand-in.

use crate::on::{Kind, Known, Remote};
use crate::standin::{Standin, When};
use crate::{Paged, Rig};
use std::sync::Arc;
use stratakv::Dtype;
use stratakv::codec::{Codec, Layout, Scheme};
use stratakv::gpu::{Absent, Coded, Cuda, Device, Fault, Lane, Paths, Piece, Stream, Submission, Ticket, Work};

fn opened() -> Option<(Standin, Arc<Cuda>)> {
    let standin = Standin::new(When::Random, 7)?;
    let device = Cuda::open(0, Some(standin.path())).expect("it stands in for one");
    Some((standin, Arc::new(device)))
}

#[test]
fn without_a_driver_or_a_device_it_says_why() {
    let Err(Absent::Driver(why)) = Cuda::open(0, Some("/nowhere/libcuda.so".as_ref())) else { panic!("no library") };
    assert!(why.contains("/nowhere/libcuda.so"), "{why}");
    let Some(standin) = Standin::new(When::AtOnce, 1) else { return };
    let open = |device| Cuda::open(device, Some(standin.path())).map(|_| ());
    let Err(Absent::Device(why)) = open(1) else { panic!("there is one device") };
    assert_eq!(why, "device is 1, expected a number from 0, below 1");
    standin.set("devices", 0);
    assert!(matches!(open(0), Err(Absent::Device(_))));
    standin.set("devices", 1);
    standin.fail("cuInit", 1, 999);
    assert!(matches!(open(0), Err(Absent::Driver(_))));
    standin.assert_given_back();
}

#[test]
fn each_architecture_has_its_image_and_later_ones_have_ptx() {
    for (capability, image) in [(80, (80, false)), (86, (80, false)), (90, (90, false)), (100, (100, false))]
        .into_iter()
        .chain([(103, (100, false)), (120, (120, false)), (130, (80, true))])
    {
        let Some(standin) = Standin::new(When::AtOnce, 1) else { return };
        standin.set("capability", capability);
        let device = Cuda::open(0, Some(standin.path())).expect("there is an image");
        assert_eq!((device.arch(), device.image()), (capability as u32, image));
        drop(device);
        let by_ptx = Cuda::open_by_ptx(0, Some(standin.path())).expect("PTX is for all");
        assert_eq!(by_ptx.image(), (80, true));
        drop(by_ptx);
        standin.assert_given_back();
    }
    let Some(standin) = Standin::new(When::AtOnce, 1) else { return };
    standin.set("capability", 75);
    let Err(Absent::Image(why)) = Cuda::open(0, Some(standin.path())).map(|_| ()) else { panic!("it is too old") };
    assert!(why.contains("architecture 75"), "{why}");
    standin.assert_given_back();
}

#[test]
fn a_call_that_fails_while_it_is_opened_leaves_nothing() {
    for call in [
        "cuDeviceGetName",
        "cuDevicePrimaryCtxRetain",
        "cuModuleGetFunction",
        "cuMemPoolCreate",
        "cuStreamCreateWithPriority",
        "cuMemHostAlloc",
    ] {
        for nth in 1..=3 {
            let Some(standin) = Standin::new(When::AtOnce, 1) else { return };
            standin.fail(call, nth, 2);
            drop(Cuda::open(0, Some(standin.path())));
            standin.assert_given_back();
        }
    }
}

#[test]
fn small_pieces_and_large_ones_are_right_by_every_path() {
    let Some((standin, device)) = opened() else { return };
    let generic: Arc<dyn Device> = device.clone();
    let content: Vec<u8> = (0..256 << 10).map(|n: u32| (n * 31 % 251) as u8).collect();
    let everything = |engines_from, least_pieces| Paths { engines_from: [engines_from; 2], least_pieces };
    for paths in [everything(0, 1), everything(u64::MAX, 1), Paths::default()] {
        device.set_paths(paths);
        for piece in [16usize, 48, 4096, 20] {
            for lane in Lane::ALL {
                let (from, to) = (Remote::new(&generic, &content), Remote::new(&generic, &vec![0; content.len()]));
                let count = content.len() / piece;
                // In another order, so that few are neighbours.
                let pieces = (0..count).map(|n| {
                    let at = (n * 7 % count * piece) as u64;
                    Piece { from: from.address + at, to: to.address + at, bytes: piece as u64 }
                });
                let work = vec![Work::Copy(pieces.collect())];
                // SAFETY: both are there until it is over.
                let ticket = unsafe { generic.submit(Submission { lane, after: vec![], work }) };
                generic.wait(ticket.expect("it is there")).expect("it is there");
                let whole = count * piece;
                assert!(to.read()[..whole] == content[..whole], "{paths:?} {piece} {lane:?}");
            }
        }
    }
    assert!(standin.calls("cuLaunchKernel") > 0 && standin.calls("cuMemcpyBatchAsync") > 0);
    drop((generic, device));
    standin.assert_given_back();
}

#[test]
fn payloads_go_by_way_of_borrowed_memory_where_engines_are_faster_and_else_are_read_where_they_are() {
    let borrow = "cuMemAllocFromPoolAsync";
    for (when, has_room) in [When::AtOnce, When::Late, When::Random].into_iter().flat_map(|w| [(w, true), (w, false)]) {
        let Some(standin) = Standin::new(when, 7) else { return };
        let device = Arc::new(Cuda::open(0, Some(standin.path())).expect("it stands in for one"));
        let generic: Arc<dyn Device> = device.clone();
        let paged = Paged::new(Dtype::Fp16, 16);
        for layout in paged.layouts() {
            for engines_from in [0, u64::MAX] {
                device.set_paths(Paths { engines_from: [engines_from; 2], least_pieces: 16 });
                let before = standin.calls(borrow);
                if !has_room {
                    standin.fail(borrow, 1, 2);
                }
                let what = format!("{when:?}, room {has_room}, engines from {engines_from}");
                paged.there_and_back(&generic, layout.as_ref(), [Lane::Down, Lane::Up], &what);
                assert_eq!(standin.calls(borrow) - before, if engines_from == 0 { 2 } else { 0 }, "{what}");
                paged.there_and_back(&generic, layout.as_ref(), [Lane::Across; 2], &what);
            }
        }
        drop((generic, device));
        standin.assert_given_back();
    }
}

#[test]
fn what_is_borrowed_is_returned_also_where_work_fails() {
    for call in ["cuLaunchKernel", "cuMemcpyBatchAsync"] {
        let Some((standin, device)) = opened() else { return };
        device.set_paths(Paths { engines_from: [0; 2], least_pieces: 16 });
        let generic: Arc<dyn Device> = device.clone();
        let paged = Paged::new(Dtype::Fp16, 16);
        let layout = paged.layouts().pop().flatten();
        let tensor = Remote::new(&generic, &paged.tensor);
        let payload = Known::new(&generic, &vec![0; 2 * paged.geometry.block_bytes()]);
        let coded = paged.coded(layout, tensor.address, vec![payload.address, payload.address + 1536]);
        standin.fail(call, 1, 1);
        let work = vec![Work::Decode(coded)];
        // SAFETY: all of it is there until the end of this test.
        let refused = unsafe { generic.submit(Submission { lane: Lane::Up, after: vec![], work }) };
        assert!(matches!(refused, Err(Fault::Refused(_))), "{call}: {refused:?}");
        drop((tensor, payload, generic, device));
        standin.assert_given_back();
    }
}

#[test]
fn a_lane_of_which_nothing_is_known_any_more_is_lost() {
    let Some((standin, device)) = opened() else { return };
    let generic: Arc<dyn Device> = device.clone();
    let memory = Remote::new(&generic, &[1; 128]);
    let submit = |lane| {
        let piece = Piece { from: memory.address, to: memory.address + 64, bytes: 64 };
        // SAFETY: it is there until the end of this test.
        unsafe { generic.submit(Submission { lane, after: vec![], work: vec![Work::Copy(vec![piece])] }) }
    };
    // A wait that is refused is tried again.
    device.set_patience(2);
    standin.fail("cuMemcpyBatchAsync", 1, 1);
    standin.fail("cuStreamSynchronize", 1, 1);
    assert!(matches!(submit(Lane::Up), Err(Fault::Refused(_))));
    generic.wait(submit(Lane::Up).expect("it is well")).expect("it is there");
    standin.fail("cuMemcpyBatchAsync", 1, 1);
    (1..=2).for_each(|nth| standin.fail("cuStreamSynchronize", nth, 1));
    assert!(matches!(submit(Lane::Up), Err(Fault::Unknown(_))));
    assert!(matches!(submit(Lane::Up), Err(Fault::Unknown(_))));
    generic.wait(submit(Lane::Across).expect("it is another lane")).expect("it is there");
    drop((memory, generic, device));
    standin.assert_given_back();
}

#[test]
fn more_work_than_its_tables_have_room_for_waits_and_is_right() {
    let Some((standin, device)) = opened() else { return };
    device.set_paths(Paths { engines_from: [u64::MAX; 2], least_pieces: 1 });
    let generic: Arc<dyn Device> = device.clone();
    let content: Vec<u8> = (0..4 << 20).map(|n: u32| (n / 16 % 253) as u8).collect();
    let (from, to) = (Remote::new(&generic, &content), Remote::new(&generic, &vec![0; content.len()]));
    let count = content.len() / 16;
    let pieces: Vec<Piece> = (0..count)
        .map(|n| {
            let at = (n * 5 % count * 16) as u64;
            Piece { from: from.address + at, to: to.address + at, bytes: 16 }
        })
        .collect();
    let mut last = Ticket::NONE;
    for _ in 0..4 {
        let work = vec![Work::Copy(pieces.clone())];
        // SAFETY: both are there until the last is over.
        last = unsafe { generic.submit(Submission { lane: Lane::Across, after: vec![], work }) }.expect("it is there");
    }
    generic.wait(last).expect("it is there");
    assert!(to.read() == content);
    drop((from, to, generic, device));
    standin.assert_given_back();
}

#[test]
fn work_that_fails_half_way_is_over_before_that_is_said() {
    let Some((standin, device)) = opened() else { return };
    device.set_paths(Paths { engines_from: [u64::MAX; 2], least_pieces: 1 });
    let generic: Arc<dyn Device> = device.clone();
    let memory = Remote::new(&generic, &vec![1; 1 << 20]);
    // Pieces of two sizes: two launches, of which the second fails.
    let piece = |n: u64| Piece { from: memory.address + 64 * n, to: memory.address + (1 << 19) + 64 * n, bytes: 16 };
    let some = || Work::Copy((0..100).map(piece).collect());
    standin.fail("cuLaunchKernel", 2, 1);
    let work = vec![some(), some()];
    // SAFETY: it is there until the end of this test.
    let refused = unsafe { generic.submit(Submission { lane: Lane::Across, after: vec![], work }) };
    assert!(matches!(refused, Err(Fault::Refused(_))), "{refused:?}");
    let queued: u64 = {
        // SAFETY: as declared in cuda/tests/standin.h.
        unsafe { standin.function::<unsafe extern "C" fn() -> u64>("standin_queued")() }
    };
    assert_eq!(queued, 0);
    drop((memory, generic, device));
    standin.assert_given_back();
}

#[test]
fn what_kernels_cannot_do_is_refused_before_anything_is_done() {
    let Some((standin, device)) = opened() else { return };
    let generic: Arc<dyn Device> = device.clone();
    let paged = Paged::new(Dtype::Fp16, 16);
    let tensor = Remote::new(&generic, &paged.tensor);
    let payload = Known::new(&generic, &vec![0; 2 * paged.geometry.block_bytes()]);
    let right = paged.coded(None, tensor.address, vec![payload.address, payload.address + 1536]);
    let launches = standin.calls("cuLaunchKernel");
    let refuse = |coded: Coded, what: &str| {
        // SAFETY: it is refused.
        let refused = unsafe {
            let work = vec![Work::Decode(coded)];
            generic.submit(Submission { lane: Lane::Up, after: vec![], work })
        };
        let Err(Fault::Refused(why)) = refused else { panic!("{what}: {refused:?}") };
        assert!(why.contains(what), "{why}");
    };
    let int8 = Layout::new(Scheme::new(Codec::Int8Sym, &paged.geometry), &paged.geometry).expect("it fits");
    let encoded = Coded { layout: Some(Arc::new(int8)), ..right.clone() };
    refuse(Coded { planes: paged.planes(tensor.address + 8), ..encoded.clone() }, "multiples of 16");
    refuse(Coded { payloads: vec![payload.address + 16; 2], ..encoded }, "none of 64");
    refuse(Coded { offsets: vec![0], ..right.clone() }, "all runs of all blocks");
    refuse(Coded { run_tokens: 0, ..right }, "all runs of all blocks");
    assert_eq!(standin.calls("cuLaunchKernel"), launches);
    drop((tensor, payload, generic, device));
    standin.assert_given_back();
}

#[test]
fn a_stream_of_another_context_is_refused_and_memory_elsewhere_is_not_its_own() {
    let Some((standin, device)) = opened() else { return };
    // SAFETY: as declared in cuda/tests/standin.h.
    let foreign = unsafe { standin.function::<unsafe extern "C" fn(i32) -> u64>("standin_foreign_stream")(0) };
    assert!(matches!(device.mark(Stream(foreign)), Err(Fault::Refused(_))));
    assert!(matches!(device.join(Stream(foreign), Ticket::NONE), Err(Fault::Refused(_))));
    // The default streams are everybody's.
    for stream in [1, 2] {
        let ticket = device.mark(Stream(stream)).expect("it is there");
        device.join(Stream(stream), ticket).expect("it is there");
    }
    let own = device.reserve(4096).expect("there is room");
    assert_eq!(device.owns(own), Ok(true));
    let of_process = [0u8; 16];
    assert_eq!(device.owns(of_process.as_ptr() as u64), Ok(false));
    device.release(own).expect("nothing is under way");
}

#[test]
fn once_it_serves_the_driver_is_asked_for_no_memory() {
    let Some(mut rig) = Rig::new(Kind::Standin(When::Random, 3)) else { return };
    rig.put(0, 16);
    for _ in 0..40 {
        rig.evict(0, 17);
        while rig.blocks.len() < 16 {
            rig.slab.wait_for_room().expect("it is there");
            rig.put(0, 1);
        }
        (0..4).for_each(|nth| rig.load(nth, |ready| ready));
    }
    let counts = rig.slab.counts();
    assert!(counts.fresh as f64 <= 0.3 * counts.taken as f64, "{counts:?}");
    rig.end();
}

#[test]
fn tickets_that_nobody_asks_for_again_are_forgotten() {
    let Some((standin, device)) = opened() else { return };
    for _ in 0..1000 {
        device.mark(Stream(1)).expect("it is there");
    }
    let last = device.mark(Stream(1)).expect("it is there");
    device.wait(last).expect("it is there");
    (0..100).for_each(|_| drop(device.mark(Stream(1)).and_then(|ticket| device.wait(ticket))));
    assert!(device.tickets() <= 1000, "{}", device.tickets());
    (0..1000).for_each(|_| drop(device.mark(Stream(1)).and_then(|ticket| device.wait(ticket))));
    assert!(device.tickets() <= 65, "{}", device.tickets());
    drop(device);
    standin.assert_given_back();
}
