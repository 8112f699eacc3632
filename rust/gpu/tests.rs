//! What holds on any device: run over the host in each schedule.

use super::{
    Coded, Device, Fault, Host, Lane, Piece, Placed, Rows, Schedule, Slab, Status, Stream, Submission, Ticket, Work,
};
use crate::block::{Dtype, Geometry};
use crate::codec::{Codec, Layout, Scheme};
use crate::pool::{Class, Holding};
use crate::sync::Arc;
use proptest::prelude::*;
use std::collections::HashSet;

const MIB: u64 = 1 << 20;
/// A quarter of a MiB: sixteen fill the slab of these tests.
const BLOCK: usize = 256 << 10;

fn schedules() -> [Schedule; 4] {
    [Schedule::AtOnce, Schedule::Late, Schedule::Random(1), Schedule::Random(2)]
}

fn copy(lane: Lane, after: Ticket, from: u64, to: u64, bytes: usize) -> Submission {
    let piece = Piece { from, to, bytes: bytes as u64 };
    Submission { lane, after: vec![after], work: vec![Work::Copy(vec![piece])] }
}

/// What is known of a block.
#[derive(Debug, Clone, Copy)]
struct Known {
    placed: Placed,
    model: u32,
    /// Names it, and fills it.
    node: u32,
    holds: u32,
}

impl Known {
    fn value(&self) -> u8 {
        (self.node % 200) as u8 + 1
    }
}

/// A slab that two models share, and what is known of it.
struct Rig {
    device: Arc<Host>,
    slab: Slab,
    classes: Vec<Arc<Class>>,
    /// Those that are there, the one used longest ago first.
    blocks: Vec<Known>,
    /// Held when they left.
    parted: Vec<Known>,
    /// What was put, as long as the device may read it.
    sources: Vec<Box<[u8]>>,
    loads: Vec<(Ticket, Box<[u8]>, u8)>,
    nodes: u32,
}

impl Rig {
    fn new(schedule: Schedule) -> Self {
        let device = Arc::new(Host::new(schedule, 4 * MIB));
        let slab = Slab::reserve(device.clone(), 4 * MIB, 0).expect("there is room");
        let classes = (0..2).map(|model| slab.class(&Holding::new(model), BLOCK)).collect();
        let (blocks, parted, sources, loads) = Default::default();
        Self { device, slab, classes, blocks, parted, sources, loads, nodes: 0 }
    }

    fn put(&mut self, model: u32, count: u32) {
        let nodes: Vec<u32> = (self.nodes..self.nodes + count).collect();
        self.nodes += count;
        let placed = self.slab.place(&self.classes[model as usize], model, &nodes).expect("it is there");
        assert!(placed.len() <= nodes.len());
        for (placed, node) in placed.into_iter().zip(nodes) {
            assert_eq!((self.slab.ready(placed), self.slab.node(placed)), (None, node));
            let block = Known { placed, model, node, holds: 0 };
            let source = vec![block.value(); BLOCK].into_boxed_slice();
            let work = copy(Lane::Up, Ticket::NONE, source.as_ptr() as u64, self.slab.address(placed), BLOCK);
            // SAFETY: the source stays in `sources`, and the place is this block's alone.
            let ticket = unsafe { self.device.submit(work) }.expect("it is there");
            self.sources.push(source);
            self.slab.wrote(&[placed], Lane::Up, ticket);
            self.blocks.push(block);
        }
    }

    fn load(&mut self, nth: usize, after: impl Fn(Ticket) -> Ticket) {
        let Some(&block) = self.blocks.get(nth) else { return };
        let mut out = vec![0u8; BLOCK].into_boxed_slice();
        let ready = after(self.slab.ready(block.placed).expect("it was written"));
        let work = copy(Lane::Down, ready, self.slab.address(block.placed), out.as_mut_ptr() as u64, BLOCK);
        // SAFETY: what is written stays in `loads`; the place is the block's as long as the slab knows the ticket.
        let ticket = unsafe { self.device.submit(work) }.expect("it is there");
        self.loads.push((ticket, out, block.value()));
        self.slab.read(&[block.placed], Lane::Down, ticket);
        if block.holds == 0 {
            self.use_last(nth);
        }
    }

    fn use_last(&mut self, nth: usize) {
        let block = self.blocks.remove(nth);
        self.blocks.push(block);
    }

    fn hold(&mut self, nth: usize) {
        if let Some(block) = self.blocks.get_mut(nth) {
            block.holds += 1;
            self.slab.hold(block.placed);
        }
    }

    fn let_go(&mut self, nth: usize) {
        if let Some(block) = self.blocks.get_mut(nth).filter(|block| block.holds > 0) {
            block.holds -= 1;
            let last = block.holds == 0;
            self.slab.let_go(block.placed);
            if last {
                self.use_last(nth);
            }
        }
    }

    fn leave(&mut self, nth: usize) {
        if nth < self.blocks.len() {
            let block = self.blocks.remove(nth);
            self.slab.leave(block.placed, false);
            self.parted.extend((block.holds > 0).then_some(block));
        }
    }

    // `spared` may not leave, besides those that are held.
    fn evict(&mut self, model: u32, spared: usize) {
        let spared = self.blocks.get(spared).map(|block| block.node);
        let may = |block: &&Known| block.model == model && block.holds == 0 && Some(block.node) != spared;
        let expected = self.blocks.iter().find(may).map(|block| block.placed);
        let chosen = self.slab.coldest(model, |node| Some(node) != spared);
        assert_eq!(chosen, expected);
        if let Some(chosen) = chosen {
            self.blocks.retain(|block| block.placed != chosen);
            self.slab.leave(chosen, true);
        }
    }

    fn check(&mut self, nth: usize) {
        if nth < self.loads.len() {
            let (ticket, out, value) = self.loads.swap_remove(nth);
            self.device.wait(ticket).expect("it is there");
            assert!(out.iter().all(|&byte| byte == value), "{} for {value}", out[0]);
        }
    }

    fn end(mut self) {
        while !self.loads.is_empty() {
            self.check(0);
        }
        for Known { placed, holds, .. } in std::mem::take(&mut self.parted) {
            (0..holds).for_each(|_| self.slab.let_go(placed));
        }
        while let Some(&Known { holds, .. }) = self.blocks.last() {
            (0..holds).for_each(|_| self.let_go(self.blocks.len() - 1));
            self.leave(self.blocks.len() - 1);
        }
        while self.slab.counts().in_use > 0 {
            assert!(self.slab.wait_for_room().expect("it is there"));
        }
        assert_eq!((self.slab.counts().held, self.slab.counts().reservations), (0, 1));
        self.slab.close().expect("all is over");
        assert_eq!(self.device.reserved_bytes(), 0);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Put(u32, u32),
    Load(usize),
    Check(usize),
    Hold(usize),
    LetGo(usize),
    Leave(usize),
    Evict(u32, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (model, nth) = (0u32..2, 0usize..18);
    prop_oneof![
        4 => (model.clone(), 1u32..5).prop_map(|(model, count)| Step::Put(model, count)),
        4 => nth.clone().prop_map(Step::Load),
        1 => nth.clone().prop_map(Step::Check),
        1 => nth.clone().prop_map(Step::Hold),
        1 => nth.clone().prop_map(Step::LetGo),
        1 => nth.clone().prop_map(Step::Leave),
        4 => (model, nth).prop_map(|(model, spared)| Step::Evict(model, spared)),
    ]
}

proptest! {
    #[test]
    fn what_is_loaded_is_what_was_put_and_who_leaves_was_used_longest_ago(
        steps in prop::collection::vec(step(), 1..80), schedule in prop::sample::select(schedules().to_vec()),
    ) {
        let mut rig = Rig::new(schedule);
        for step in steps {
            match step {
                Step::Put(model, count) => rig.put(model, count),
                Step::Load(nth) => rig.load(nth, |ready| ready),
                Step::Check(nth) => rig.check(nth),
                Step::Hold(nth) => rig.hold(nth),
                Step::LetGo(nth) => rig.let_go(nth),
                Step::Leave(nth) => rig.leave(nth),
                Step::Evict(model, spared) => rig.evict(model, spared),
            }
            let counts = rig.slab.counts();
            prop_assert_eq!(counts.held, rig.blocks.iter().chain(&rig.parted).filter(|b| b.holds > 0).count() as u64);
            prop_assert!(counts.in_use >= (rig.blocks.len() + rig.parted.len()) as u64 && counts.in_use <= 16);
        }
        rig.end();
    }
}

#[test]
fn a_wait_that_is_missing_shows() {
    let mut rig = Rig::new(Schedule::Late);
    rig.put(0, 1);
    rig.load(0, |_| Ticket::NONE);
    let (ticket, out, _) = rig.loads.pop().expect("one");
    rig.device.wait(ticket).expect("it is there");
    assert!(out.iter().all(|&byte| byte == 0xdb), "what nobody wrote yet");
    rig.end();
}

#[test]
fn a_place_is_nobody_elses_before_the_last_work_that_touches_it_is_over() {
    let mut rig = Rig::new(Schedule::Late);
    rig.put(0, 16);
    assert_eq!(rig.blocks.len(), 16);
    let written = rig.slab.ready(rig.blocks[15].placed).expect("it was written");
    rig.device.wait(written).expect("it is there");
    rig.load(3, |ready| ready);
    rig.leave(15);
    rig.put(0, 1);
    assert_eq!(rig.blocks.len(), 15, "its copy was not done yet");
    assert!(rig.slab.wait_for_room().expect("it is there"));
    rig.put(1, 1);
    assert_eq!(rig.blocks.len(), 15, "the place is in the other model's part");
    rig.put(0, 1);
    assert_eq!(rig.blocks.len(), 16);
    rig.end();
}

#[test]
fn blocks_of_one_sequence_are_neighbours() {
    let mut rig = Rig::new(Schedule::AtOnce);
    rig.put(0, 8);
    let addresses: Vec<u64> = rig.blocks.iter().map(|block| rig.slab.address(block.placed)).collect();
    assert!(addresses.windows(2).all(|two| two[1] == two[0] + BLOCK as u64), "{addresses:x?}");
    rig.end();
}

#[test]
fn a_slab_is_halved_until_there_is_room_and_no_further_than_is_asked() {
    let device = Arc::new(Host::new(Schedule::AtOnce, 20 * MIB));
    let slab = Slab::reserve(device.clone(), 64 * MIB, 8 * MIB).expect("there is room for a quarter");
    assert_eq!((slab.bytes(), slab.counts().reservations), (16 * MIB, 3));
    assert_eq!(Slab::reserve(device.clone(), 64 * MIB, 8 * MIB).expect_err("4 MiB are left"), Fault::NoRoom(8 * MIB));
    drop(slab);
    assert_eq!(device.reserved_bytes(), 0);
    let foreign = vec![0u8; 9 << 20];
    let base = (foreign.as_ptr() as u64).next_multiple_of(4096);
    let mut adopted = Slab::adopt(device.clone(), base, 8 * MIB).expect("it is large enough");
    let placed = adopted.place(&adopted.class(&Holding::new(0), BLOCK), 0, &[1]).expect("it is there");
    assert!((base..base + 8 * MIB).contains(&adopted.address(placed[0])));
    adopted.close().expect("nothing is under way");
    assert!(matches!(Slab::adopt(device.clone(), base + 1, 8 * MIB), Err(Fault::Refused(_))));
    assert!(matches!(Slab::adopt(device, base, MIB), Err(Fault::Refused(_))));
}

#[test]
fn what_is_held_keeps_its_memory_though_the_slab_goes() {
    let mut rig = Rig::new(Schedule::AtOnce);
    rig.put(0, 1);
    rig.hold(0);
    assert!(matches!(rig.slab.close(), Err(Fault::Refused(_))));
    drop(rig.slab);
    assert_eq!(rig.device.reserved_bytes(), 4 * MIB);
}

#[test]
fn a_device_that_is_lost_says_so_whatever_it_is_asked() {
    let mut rig = Rig::new(Schedule::Late);
    rig.put(0, 16);
    rig.leave(0);
    rig.device.lose("an illegal address");
    let lost = Fault::Lost("an illegal address".into());
    assert_eq!(rig.slab.place(&rig.classes[0], 0, &[99]).expect_err("it is full, and asks"), lost);
    assert_eq!(rig.slab.reclaim(), Ok(0), "nothing waits any more");
    let ticket = rig.slab.ready(rig.blocks[0].placed).expect("it was written");
    assert_eq!(rig.device.is_over(ticket).expect_err("it is lost"), lost);
    assert_eq!(rig.device.wait(ticket).expect_err("it is lost"), lost);
    assert_eq!(rig.device.mark(Stream(1)).expect_err("it is lost"), lost);
    assert_eq!(rig.device.join(Stream(1), ticket).expect_err("it is lost"), lost);
    // SAFETY: nothing is done.
    let refused = unsafe { rig.device.submit(copy(Lane::Up, Ticket::NONE, 0, 0, 0)) };
    assert_eq!(refused.expect_err("it is lost"), lost);
    assert_eq!(rig.slab.close().expect_err("it is lost"), lost);
}

#[test]
fn work_beyond_the_end_of_memory_or_after_what_was_not_submitted_is_refused() {
    let device = Host::new(Schedule::AtOnce, MIB);
    let base = device.reserve(4096).expect("there is room");
    let mut out = vec![0u8; 4096];
    let submit = |work| {
        // SAFETY: what is not refused lies in the memory above.
        unsafe { device.submit(work) }
    };
    let to = out.as_mut_ptr() as u64;
    assert!(submit(copy(Lane::Down, Ticket::NONE, base, to, 4096)).is_ok());
    assert!(matches!(submit(copy(Lane::Down, Ticket::NONE, base + 1, to, 4096)), Err(Fault::Refused(_))));
    assert!(matches!(submit(copy(Lane::Down, Ticket(99), base, to, 1)), Err(Fault::Refused(_))));
    assert!(matches!(device.release(base + 1), Err(Fault::Refused(_))));
    device.release(base).expect("nothing is under way");
    assert!(matches!(device.release(base), Err(Fault::Refused(_))), "twice");
    assert_eq!(device.reserve(2 * MIB).expect_err("there is no room"), Fault::NoRoom(2 * MIB));
}

#[test]
fn the_callers_stream_and_the_devices_lanes_wait_for_each_other() {
    for schedule in schedules() {
        let device = Arc::new(Host::new(schedule, MIB));
        let base = device.reserve(4096).expect("there is room");
        let mut out = vec![0u8; 4096].into_boxed_slice();
        // An engine's kernel writes; then it is copied out; then another of its kernels writes over it.
        let write = move |value: u8| {
            // SAFETY: the memory is there until the end of this test.
            move || unsafe { (base as *mut u8).write_bytes(value, 4096) }
        };
        device.call(Stream(7), write(1)).expect("it is there");
        let marked = device.mark(Stream(7)).expect("it is there");
        let work = copy(Lane::Down, marked, base, out.as_mut_ptr() as u64, 4096);
        // SAFETY: both are there until the end of this test.
        let copied = unsafe { device.submit(work) }.expect("it is there");
        device.join(Stream(7), copied).expect("it is there");
        let last = device.call(Stream(7), write(2)).expect("it is there");
        device.wait(last).expect("it is there");
        assert!(device.is_over(copied).expect("it is there") && out.iter().all(|&byte| byte == 1), "{schedule:?}");
        device.release(base).expect("all is over");
    }
}

#[test]
fn rows_come_back_as_they_were_and_encoded_as_the_codec_has_it() {
    let geometry = Geometry { layers: 3, planes: 2, kv_heads: 2, head_dim: 16, dtype: Dtype::Fp16, block_tokens: 8 };
    let (row, rows) = (geometry.row_bytes(), 2 * 8);
    let plane_count = geometry.plane_count();
    // Two blocks over pages of four tokens, [page][plane][token][head].
    let pages: [u64; 4] = [5, 0, 3, 2];
    let plane_bytes = (4 * 2 * row) as u64;
    let page_bytes = plane_count as u64 * plane_bytes;
    let mut tensor: Vec<u8> = (0..6 * page_bytes).map(|n| (n * 37 % 60) as u8).collect();
    let planes: Arc<[Rows]> = (0..plane_count as u64)
        .map(|plane| Rows {
            base: tensor.as_mut_ptr() as u64 + plane * plane_bytes,
            head_stride: row as u64,
            token_stride: 2 * row as u64,
        })
        .collect();
    let plain = |block: usize| -> Vec<u8> {
        let row_at = |plane: u64, head: u64, token: u64| {
            let page = pages[2 * block + token as usize / 4];
            let at = page * page_bytes + plane * plane_bytes + (token % 4 * 2 + head) * row as u64;
            tensor[at as usize..at as usize + row].to_vec()
        };
        let order = (0..plane_count as u64).flat_map(|p| (0..2).flat_map(move |h| (0..8).map(move |t| (p, h, t))));
        order.flat_map(|(plane, head, token)| row_at(plane, head, token)).collect()
    };
    let expected = [plain(0), plain(1)];
    let int8 = Layout::new(Scheme::new(Codec::Int8Sym, &geometry), &geometry).expect("it fits");
    for layout in [None, Some(Arc::new(int8))] {
        let device = Host::new(Schedule::Late, MIB);
        assert!(layout.as_ref().is_none_or(|layout| device.takes(layout)));
        let bytes = layout.as_ref().map_or(plane_count * rows * row, |layout| layout.bytes());
        let mut payloads = vec![vec![0xa5u8; bytes]; 2];
        let status = Status::new(2);
        let coded = Coded {
            layout: layout.clone(),
            heads: 2,
            block_tokens: 8,
            row_bytes: row,
            planes: planes.clone(),
            run_tokens: 4,
            offsets: pages.iter().map(|page| page * page_bytes).collect(),
            payloads: payloads.iter_mut().map(|payload| payload.as_mut_ptr() as u64).collect(),
        };
        let submit = |work| {
            // SAFETY: tensor and payloads are there until the end of this turn.
            unsafe { device.submit(Submission { lane: Lane::Across, after: vec![], work: vec![work] }) }
        };
        let encoded = submit(Work::Encode(coded.clone(), status.clone())).expect("it is there");
        device.wait(encoded).expect("it is there");
        for (block, payload) in payloads.iter().enumerate() {
            assert!(status.is_encoded(block));
            let mut by_codec = vec![0u8; bytes];
            match &layout {
                None => by_codec.clone_from(&expected[block]),
                Some(layout) => assert!(layout.encode_payload(&expected[block], false, &mut by_codec)),
            }
            assert_eq!(payload, &by_codec);
        }
        tensor.fill(0xff);
        device.wait(submit(Work::Decode(coded)).expect("it is there")).expect("it is there");
        let touched: HashSet<u64> = pages.into_iter().collect();
        for page in 0..6 {
            let part = &tensor[(page * page_bytes) as usize..((page + 1) * page_bytes) as usize];
            assert_eq!(touched.contains(&page), part.iter().any(|&byte| byte != 0xff), "page {page}");
        }
        let plain: Vec<u8> = if let Some(layout) = &layout {
            let mut decoded = vec![0u8; expected[1].len()];
            layout.decode_payload(&payloads[1], false, &mut decoded);
            decoded
        } else {
            expected[1].clone()
        };
        let first = pages[2] * page_bytes;
        assert_eq!(&tensor[first as usize..first as usize + row], &plain[..row]);
        tensor.iter_mut().enumerate().for_each(|(n, byte)| *byte = (n as u64 * 37 % 60) as u8);
    }
}

#[test]
fn a_block_that_no_scale_fits_is_told() {
    let geometry = Geometry { layers: 1, planes: 1, kv_heads: 1, head_dim: 8, dtype: Dtype::Fp16, block_tokens: 2 };
    let layout = Arc::new(Layout::new(Scheme::new(Codec::Int8Sym, &geometry), &geometry).expect("it fits"));
    // The second has an infinity.
    let mut rows = [0x3c00u16; 32];
    rows[20] = 0x7c00;
    let mut payloads = vec![vec![0u8; layout.bytes()]; 2];
    let status = Status::new(2);
    let coded = Coded {
        layout: Some(layout),
        heads: 1,
        block_tokens: 2,
        row_bytes: 16,
        planes: Arc::new([Rows { base: rows.as_ptr() as u64, head_stride: 0, token_stride: 16 }]),
        run_tokens: 2,
        offsets: vec![0, 32],
        payloads: payloads.iter_mut().map(|payload| payload.as_mut_ptr() as u64).collect(),
    };
    let device = Host::new(Schedule::AtOnce, MIB);
    let work = vec![Work::Encode(coded, status.clone())];
    // SAFETY: all of it is there until the end of this test.
    unsafe { device.submit(Submission { lane: Lane::Across, after: vec![], work }) }.expect("it is there");
    assert_eq!([0, 1].map(|block| status.is_encoded(block)), [true, false]);
}
