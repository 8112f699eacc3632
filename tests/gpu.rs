//! What holds on any device: run over the host in each schedule.

#[cfg(feature = "cuda")]
#[path = "gpu/driver.rs"]
mod driver;
#[path = "gpu/on.rs"]
mod on;
#[cfg(feature = "cuda")]
#[path = "gpu/standin.rs"]
mod standin;

use on::{Kind, Known, On, Remote, copy, kinds, schedules};
use proptest::prelude::*;
#[cfg(feature = "cuda")]
use standin::When;
use std::sync::Arc;
use stratakv::codec::{Codec, Layout, Scheme};
use stratakv::gpu::{
    Adopted, Coded, Device, Fault, Host, Lane, Placed, Rows, Schedule, Slab, Status, Stream, Submission, Ticket, Work,
};
use stratakv::pool::{Class, Holding};
use stratakv::{Dtype, Geometry};

const MIB: u64 = 1 << 20;
/// A quarter of a MiB: sixteen fill the slab of these tests.
const BLOCK: usize = 256 << 10;

/// What is known of a block.
#[derive(Debug, Clone, Copy)]
struct Entry {
    placed: Placed,
    model: u32,
    /// Names it, and fills it.
    node: u32,
    holds: u32,
}

impl Entry {
    fn value(&self) -> u8 {
        (self.node % 200) as u8 + 1
    }
}

/// A slab that two models share, and what is known of it.
struct Rig {
    device: Arc<dyn Device>,
    slab: Slab,
    classes: Vec<Arc<Class>>,
    /// Those that are there, the one used longest ago first.
    blocks: Vec<Entry>,
    /// Held when they left.
    parted: Vec<Entry>,
    /// What was put, as long as the device may read it.
    sources: Vec<Known>,
    loads: Vec<(Ticket, Known, u8)>,
    nodes: u32,
    /// How often the driver was asked for memory before it served.
    allocations: u64,
    /// Last: others wait for it to go.
    on: On,
}

impl Rig {
    fn new(kind: Kind) -> Option<Self> {
        let on = On::open(kind, 8 * MIB)?;
        let device = on.device();
        let slab = Slab::reserve(device.clone(), 4 * MIB, 0).expect("there is room");
        let classes = (0..2).map(|model| slab.class(&Holding::new(model), BLOCK)).collect();
        let (blocks, parted, sources, loads) = Default::default();
        let allocations = on.allocations();
        Some(Self { device, slab, classes, blocks, parted, sources, loads, nodes: 0, allocations, on })
    }

    fn put(&mut self, model: u32, count: u32) {
        let nodes: Vec<u32> = (self.nodes..self.nodes + count).collect();
        self.nodes += count;
        let placed = self.slab.place(&self.classes[model as usize], model, &nodes).expect("it is there");
        assert!(placed.len() <= nodes.len());
        for (placed, node) in placed.into_iter().zip(nodes) {
            assert_eq!((self.slab.ready(placed), self.slab.node(placed)), (None, node));
            let block = Entry { placed, model, node, holds: 0 };
            let source = Known::new(&self.device, &[block.value(); BLOCK]);
            let work = copy(Lane::Up, Ticket::NONE, source.address, self.slab.address(placed), BLOCK);
            // SAFETY: the source stays in `sources`, and the place is this block's alone.
            let ticket = unsafe { self.device.submit(work) }.expect("it is there");
            self.sources.push(source);
            self.slab.wrote(&[placed], Lane::Up, ticket);
            self.blocks.push(block);
        }
    }

    fn load(&mut self, nth: usize, after: impl Fn(Ticket) -> Ticket) {
        let Some(&block) = self.blocks.get(nth) else { return };
        let out = Known::new(&self.device, &[0; BLOCK]);
        let ready = after(self.slab.ready(block.placed).expect("it was written"));
        let work = copy(Lane::Down, ready, self.slab.address(block.placed), out.address, BLOCK);
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
            self.slab.let_go(block.placed, Ticket::NONE);
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
        let may = |block: &&Entry| block.model == model && block.holds == 0 && Some(block.node) != spared;
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
            let out = out.content();
            assert!(out.iter().all(|&byte| byte == value), "{} for {value}", out[0]);
        }
    }

    fn end(mut self) {
        while !self.loads.is_empty() {
            self.check(0);
        }
        for Entry { placed, holds, .. } in std::mem::take(&mut self.parted) {
            (0..holds).for_each(|_| self.slab.let_go(placed, Ticket::NONE));
        }
        while let Some(&Entry { holds, .. }) = self.blocks.last() {
            (0..holds).for_each(|_| self.let_go(self.blocks.len() - 1));
            self.leave(self.blocks.len() - 1);
        }
        while self.slab.counts().in_use > 0 {
            assert!(self.slab.wait_for_room().expect("it is there"));
        }
        assert_eq!((self.slab.counts().held, self.slab.counts().reservations), (0, 1));
        assert_eq!(self.on.allocations(), self.allocations, "once it serves the driver is asked for no memory");
        self.slab.close().expect("all is over");
        let Self { on, device, slab, sources, .. } = self;
        drop((slab, sources, device));
        on.end();
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
        steps in prop::collection::vec(step(), 1..80), kind in prop::sample::select(kinds()),
    ) {
        let Some(mut rig) = Rig::new(kind) else { return Ok(()) };
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

fn late() -> Vec<Kind> {
    let kinds = [Kind::Host(Schedule::Late)].into_iter();
    #[cfg(feature = "cuda")]
    let kinds = kinds.chain([Kind::Standin(When::Late, 1)]);
    kinds.collect()
}

#[test]
fn a_wait_that_is_missing_shows() {
    for kind in late() {
        let Some(mut rig) = Rig::new(kind) else { return };
        rig.put(0, 1);
        rig.load(0, |_| Ticket::NONE);
        let (ticket, out, _) = rig.loads.pop().expect("one");
        rig.device.wait(ticket).expect("it is there");
        assert!(out.content().iter().all(|&byte| byte == 0xdb), "what nobody wrote yet");
        drop(out);
        rig.end();
    }
}

#[test]
fn a_place_is_nobody_elses_before_the_last_work_that_touches_it_is_over() {
    for kind in late() {
        let Some(mut rig) = Rig::new(kind) else { return };
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
}

#[test]
fn blocks_of_one_sequence_are_neighbours() {
    for kind in kinds() {
        let Some(mut rig) = Rig::new(kind) else { return };
        rig.put(0, 8);
        let addresses: Vec<u64> = rig.blocks.iter().map(|block| rig.slab.address(block.placed)).collect();
        assert!(addresses.windows(2).all(|two| two[1] == two[0] + BLOCK as u64), "{addresses:x?}");
        rig.end();
    }
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
    let owner = Arc::new(());
    let memory = |address, bytes| Adopted { address, bytes, owner: owner.clone() };
    // From the next multiple of 4 KiB on.
    let mut adopted = Slab::adopt(device.clone(), memory(base - 8, 8 * MIB)).expect("it is large enough");
    assert_eq!(adopted.bytes(), 8 * MIB - 8);
    let placed = adopted.place(&adopted.class(&Holding::new(0), BLOCK), 0, &[1]).expect("it is there");
    assert!((base..base + 8 * MIB).contains(&adopted.address(placed[0])));
    assert_eq!(Arc::strong_count(&owner), 2);
    adopted.close().expect("nothing is under way");
    assert_eq!(Arc::strong_count(&owner), 1, "its owner has it back");
    assert!(matches!(Slab::adopt(device.clone(), memory(base + 1, 4 * MIB)), Err(Fault::Refused(_))));
    assert!(matches!(Slab::adopt(device, memory(base, MIB)), Err(Fault::Refused(_))));
}

#[test]
fn what_is_held_keeps_its_memory_though_the_slab_goes() {
    let device = Arc::new(Host::new(Schedule::AtOnce, 8 * MIB));
    let mut slab = Slab::reserve(device.clone(), 4 * MIB, 0).expect("there is room");
    let class = slab.class(&Holding::new(0), BLOCK);
    let placed = slab.place(&class, 0, &[1]).expect("it is there");
    slab.hold(placed[0]);
    assert!(matches!(slab.close(), Err(Fault::Refused(_))));
    drop(slab);
    assert_eq!(device.reserved_bytes(), 4 * MIB);
}

#[test]
fn a_device_that_is_lost_says_so_whatever_it_is_asked() {
    for kind in late() {
        let Some(mut rig) = Rig::new(kind) else { return };
        rig.put(0, 16);
        rig.leave(0);
        rig.on.lose();
        let is_lost = |fault: Fault| assert!(matches!(fault, Fault::Lost(_)), "{fault:?}");
        is_lost(rig.slab.place(&rig.classes[0], 0, &[99]).expect_err("it is full, and asks"));
        let ticket = rig.slab.ready(rig.blocks[0].placed).expect("it was written");
        is_lost(rig.device.is_over(ticket).expect_err("it is lost"));
        is_lost(rig.device.wait(ticket).expect_err("it is lost"));
        is_lost(rig.device.mark(Stream(1)).expect_err("it is lost"));
        is_lost(rig.device.reserve(4096).expect_err("it is lost"));
        // SAFETY: nothing is done.
        is_lost(unsafe { rig.device.submit(copy(Lane::Up, Ticket::NONE, 0, 0, 0)) }.expect_err("it is lost"));
        is_lost(rig.slab.close().expect_err("it is lost"));
    }
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
    let other = Host::new(Schedule::AtOnce, MIB);
    let given = (0..9).map(|_| other.mark(Stream(1)).expect("it is there")).last().expect("nine");
    assert!(matches!(submit(copy(Lane::Down, given, base, to, 1)), Err(Fault::Refused(_))), "another device's");
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

/// Two blocks of a model, in the pages of an engine's cache.
struct Paged {
    geometry: Geometry,
    /// Pages of four tokens, [page][plane][token][head].
    pages: [u64; 4],
    tensor: Vec<u8>,
}

const PAGES: u64 = 6;

impl Paged {
    fn new(dtype: Dtype, head_dim: u32) -> Self {
        let geometry = Geometry { layers: 3, planes: 2, kv_heads: 2, head_dim, dtype, block_tokens: 8 };
        let mut paged = Self { geometry, pages: [5, 0, 3, 2], tensor: Vec::new() };
        // Bytes of small halves, and of small numbers of any other kind.
        paged.tensor = (0..PAGES * paged.page_bytes()).map(|n| (n * 37 % 60) as u8).collect();
        paged
    }

    fn row(&self) -> usize {
        self.geometry.row_bytes()
    }

    fn page_bytes(&self) -> u64 {
        (self.geometry.plane_count() * 4 * 2 * self.row()) as u64
    }

    fn planes(&self, base: u64) -> Arc<[Rows]> {
        let (row, planes) = (self.row() as u64, self.geometry.plane_count() as u64);
        let rows = |plane| Rows { base: base + plane * 8 * row, head_stride: row, token_stride: 2 * row };
        (0..planes).map(rows).collect()
    }

    /// A block's bytes in the order of a plain payload.
    fn plain(&self, tensor: &[u8], block: usize) -> Vec<u8> {
        let (row, planes) = (self.row(), self.geometry.plane_count() as u64);
        let row_at = |plane: u64, head: u64, token: u64| {
            let page = self.pages[2 * block + token as usize / 4];
            let at = (page * self.page_bytes()) as usize + (plane * 8 + token % 4 * 2 + head) as usize * row;
            &tensor[at..at + row]
        };
        let order = (0..planes).flat_map(|p| (0..2).flat_map(move |h| (0..8).map(move |t| (p, h, t))));
        order.flat_map(|(plane, head, token)| row_at(plane, head, token).to_vec()).collect()
    }

    fn coded(&self, layout: Option<Arc<Layout>>, base: u64, payloads: Vec<u64>) -> Coded {
        Coded {
            layout,
            heads: 2,
            block_tokens: 8,
            row_bytes: self.row(),
            planes: self.planes(base),
            run_tokens: 4,
            offsets: self.pages.iter().map(|page| page * self.page_bytes()).collect(),
            payloads,
        }
    }
}

impl Paged {
    /// How blocks may be encoded: plain, and by each codec that there is for them.
    fn layouts(&self) -> Vec<Option<Arc<Layout>>> {
        let codecs = [Codec::Int8Sym, Codec::Int8Asym].map(|codec| Scheme::new(codec, &self.geometry));
        let layouts = codecs.map(|scheme| Layout::new(scheme, &self.geometry).ok().map(Arc::new));
        [None].into_iter().chain(layouts).collect()
    }

    /// Encodes both blocks in one lane, decodes them in another, and compares every byte with the codec's.
    fn there_and_back(&self, device: &Arc<dyn Device>, layout: Option<&Arc<Layout>>, lanes: [Lane; 2], what: &str) {
        let plain_bytes = self.geometry.block_bytes();
        let bytes = layout.map_or(plain_bytes, |layout| layout.bytes());
        let tensor = Remote::new(device, &self.tensor);
        let payloads = [0, 1].map(|_| Known::new(device, &vec![0xa5; bytes]));
        let status = Status::new(2);
        let addresses = payloads.iter().map(|payload| payload.address).collect();
        let coded = self.coded(layout.cloned(), tensor.address, addresses);
        let run = |lane, work| {
            // SAFETY: tensor and payloads are there until the end.
            let ticket = unsafe { device.submit(Submission { lane, after: vec![], work: vec![work] }) };
            device.wait(ticket.expect("it is there")).expect("it is there");
        };
        run(lanes[0], Work::Encode(coded.clone(), status.clone()));
        for (block, payload) in payloads.iter().enumerate() {
            assert!(status.is_encoded(block));
            let expected = self.plain(&self.tensor, block);
            let mut by_codec = vec![0u8; bytes];
            match &layout {
                None => by_codec.clone_from(&expected),
                Some(layout) => assert!(layout.encode_payload(&expected, false, &mut by_codec)),
            }
            assert_eq!(payload.content(), &by_codec, "{what}");
        }
        tensor.write(&vec![0xff; self.tensor.len()]);
        run(lanes[1], Work::Decode(coded));
        let back = tensor.read();
        for page in 0..PAGES {
            let part = &back[(page * self.page_bytes()) as usize..((page + 1) * self.page_bytes()) as usize];
            let touched = self.pages.contains(&page);
            assert_eq!(touched, part.iter().any(|&byte| byte != 0xff), "{what}: page {page}");
        }
        for (block, payload) in payloads.iter().enumerate() {
            let mut decoded = vec![0u8; plain_bytes];
            match &layout {
                None => decoded.copy_from_slice(payload.content()),
                Some(layout) => layout.decode_payload(payload.content(), false, &mut decoded),
            }
            assert_eq!(self.plain(&back, block), decoded, "{what}");
        }
    }
}

#[test]
fn rows_come_back_as_they_were_and_encoded_as_the_codec_has_it() {
    for kind in kinds() {
        let dtypes = [Dtype::Fp16, Dtype::Bf16, Dtype::Fp32, Dtype::Uint8];
        // Rows of 10 values are no multiple of 16 bytes.
        for (dtype, head_dim) in dtypes.into_iter().flat_map(|dtype| [(dtype, 16), (dtype, 10)]) {
            let paged = Paged::new(dtype, head_dim);
            for layout in paged.layouts() {
                let Some(on) = On::open(kind, 8 * MIB) else { return };
                let device = on.device();
                if layout.as_ref().is_some_and(|layout| !device.takes(layout)) {
                    // Kernels work on values of 16 bits, 8 at a time.
                    assert!(dtype == Dtype::Fp32 || head_dim == 10, "{kind:?}");
                    continue;
                }
                let what = format!("{kind:?} {dtype:?}");
                paged.there_and_back(&device, layout.as_ref(), [Lane::Across; 2], &what);
                drop(device);
                on.end();
            }
        }
    }
}

#[test]
fn planes_that_are_no_multiple_of_64_bytes_lie_side_by_side() {
    for kind in kinds() {
        let Some(on) = On::open(kind, MIB) else { return };
        let device = on.device();
        // Of 80 bytes: six of them in each of seven blocks.
        let (row, tokens, planes, blocks) = (16usize, 5usize, 6usize, 7usize);
        let plane = row * tokens;
        let content: Vec<u8> = (0..blocks * planes * plane).map(|n| (n % 251) as u8 + 1).collect();
        let tensor = Remote::new(&device, &content);
        let size = (planes * plane).next_multiple_of(64);
        let payloads = Known::new(&device, &vec![0xa5; blocks * size]);
        let rows = |n: usize| Rows {
            base: tensor.address + (n * plane) as u64,
            head_stride: plane as u64,
            token_stride: row as u64,
        };
        let coded = Coded {
            layout: None,
            heads: 1,
            block_tokens: tokens as u32,
            row_bytes: row,
            planes: (0..planes).map(rows).collect(),
            run_tokens: tokens as u32,
            offsets: (0..blocks).map(|n| (n * planes * plane) as u64).collect(),
            payloads: (0..blocks).map(|n| payloads.address + (n * size) as u64).collect(),
        };
        let run = |work| {
            // SAFETY: tensor and payloads are there until it is over.
            let ticket = unsafe { device.submit(Submission { lane: Lane::Across, after: vec![], work: vec![work] }) };
            device.wait(ticket.expect("it is there")).expect("it is there");
        };
        run(Work::Encode(coded.clone(), Status::new(blocks)));
        for (n, block) in content.chunks(planes * plane).enumerate() {
            let (payload, behind) = payloads.content()[n * size..(n + 1) * size].split_at(planes * plane);
            assert!(payload == block && behind.iter().all(|&byte| byte == 0xa5), "{kind:?}: block {n}");
        }
        tensor.write(&vec![0; content.len()]);
        run(Work::Decode(coded));
        assert!(tensor.read() == content, "{kind:?}");
        drop((tensor, payloads, device));
        on.end();
    }
}

#[test]
fn a_block_that_no_scale_fits_is_told() {
    for kind in kinds() {
        let Some(on) = On::open(kind, MIB) else { return };
        let device = on.device();
        let geometry = Geometry { layers: 1, planes: 1, kv_heads: 1, head_dim: 8, dtype: Dtype::Fp16, block_tokens: 2 };
        let layout = Arc::new(Layout::new(Scheme::new(Codec::Int8Sym, &geometry), &geometry).expect("it fits"));
        // The second has an infinity.
        let mut values = [0x3c00u16; 32];
        values[20] = 0x7c00;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = Remote::new(&device, &bytes);
        let payloads = [0, 1].map(|_| Known::new(&device, &vec![0; layout.bytes()]));
        let status = Status::new(2);
        let coded = Coded {
            layout: Some(layout),
            heads: 1,
            block_tokens: 2,
            row_bytes: 16,
            planes: Arc::new([Rows { base: tensor.address, head_stride: 0, token_stride: 16 }]),
            run_tokens: 2,
            offsets: vec![0, 32],
            payloads: payloads.iter().map(|payload| payload.address).collect(),
        };
        let work = vec![Work::Encode(coded, status.clone())];
        // SAFETY: all of it is there until it is over.
        let ticket = unsafe { device.submit(Submission { lane: Lane::Down, after: vec![], work }) };
        device.wait(ticket.expect("it is there")).expect("it is there");
        assert_eq!([0, 1].map(|block| status.is_encoded(block)), [true, false]);
        drop((tensor, payloads, device));
        on.end();
    }
}
