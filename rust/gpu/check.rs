//! What a device does, and how fast: its kernels against the codec, its memory when there is none left, and its copies by
//! every path beside one large copy of pinned memory, which is the limit.
//!
//! Bytes are compared wherever this runs; time is measured on a real device alone.

use super::Slab;
use super::cuda::{Cuda, Path, Paths};
use super::device::{Coded, Device, Fault, Lane, Piece, Rows, Status, Submission, Ticket, Work};
use crate::block::{Dtype, Geometry};
use crate::codec::{Codec, Granularity, Layout, Scheme};
use crate::pool::Holding;
use crate::sync::Arc;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Bytes of what is timed, and of copies when a tier is opened.
pub const COPIED: usize = 256 << 20;
const CALIBRATING: usize = 16 << 20;
const STANDING_IN: usize = 256 << 10;
const ALIGN: usize = 4096;

/// Pinned memory of the process.
#[derive(Debug)]
struct Pinned {
    device: Arc<Cuda>,
    memory: Vec<u8>,
    at: usize,
    address: u64,
}

impl Pinned {
    fn new(device: &Arc<Cuda>, bytes: usize) -> Result<Self, Fault> {
        let mut memory = vec![0u8; bytes + ALIGN];
        let at = memory.as_ptr().align_offset(ALIGN);
        // SAFETY: it is forgotten before it goes.
        let address = unsafe { device.register(memory[at..].as_mut_ptr(), bytes) }?;
        Ok(Self { device: device.clone(), memory, at, address })
    }

    fn bytes(&mut self) -> &mut [u8] {
        let end = self.memory.len() - ALIGN + self.at;
        &mut self.memory[self.at..end]
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        drop(self.device.forget(self.memory[self.at..].as_mut_ptr()));
    }
}

/// Memory of the device.
#[derive(Debug)]
struct Reserved {
    device: Arc<Cuda>,
    address: u64,
}

impl Reserved {
    fn new(device: &Arc<Cuda>, bytes: usize) -> Result<Self, Fault> {
        Ok(Self { device: device.clone(), address: device.reserve(bytes as u64)? })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        drop(self.device.release(self.address));
    }
}

fn run(device: &Cuda, lane: Lane, work: Work) -> Result<(), Fault> {
    // SAFETY: whoever asks keeps what the work names until it is over, which is waited for.
    let ticket = unsafe { device.submit(Submission { lane, after: vec![Ticket::NONE], work: vec![work] }) }?;
    device.wait(ticket)
}

/// Memory of both kinds to copy between.
#[derive(Debug)]
pub struct Copies {
    device: Arc<Cuda>,
    here: Pinned,
    there: Reserved,
    bytes: usize,
}

impl Copies {
    /// Of so many bytes; of what stands in for a device, less: it is not timed.
    ///
    /// # Errors
    /// There is no memory for it, or the device is lost.
    pub fn new(device: &Arc<Cuda>, bytes: usize) -> Result<Self, Fault> {
        let bytes = if device.is_real() { bytes } else { STANDING_IN };
        let (here, there) = (Pinned::new(device, bytes)?, Reserved::new(device, bytes)?);
        Ok(Self { device: device.clone(), here, there, bytes })
    }

    /// Times copies of all of it, in pieces of one size and in an order in which few are neighbours: bytes a second, of each
    /// repetition.
    ///
    /// # Errors
    /// The device refuses that path, or is lost.
    pub fn time(&self, up: bool, path: Path, piece_bytes: usize, repeats: usize) -> Result<Vec<f64>, Fault> {
        let piece_bytes = piece_bytes.min(self.bytes);
        let count = self.bytes / piece_bytes;
        let pieces: Vec<Piece> = (0..count)
            .map(|n| {
                let at = (n * 7919 % count * piece_bytes) as u64;
                let (here, there) = (self.here.address + at, self.there.address + at);
                let (from, to) = if up { (here, there) } else { (there, here) };
                Piece { from, to, bytes: piece_bytes as u64 }
            })
            .collect();
        let lane = if up { Lane::Up } else { Lane::Down };
        let mut bytes_per_s = Vec::with_capacity(repeats);
        // The first is a warm-up.
        for repeat in 0..=repeats {
            let seconds = self.device.timed(lane, path, &pieces)?;
            if repeat > 0 {
                bytes_per_s.push((count * piece_bytes) as f64 / seconds);
            }
        }
        Ok(bytes_per_s)
    }
}

/// From how many bytes of a piece on engines are faster than a kernel on this device, measured; and has copies go by that.
///
/// # Errors
/// There is no memory for it, or the device is lost.
pub fn calibrate(device: &Arc<Cuda>) -> Result<Paths, Fault> {
    let mut paths = Paths::default();
    let engine = if device.has_batch() { Path::Batch } else { Path::Engine };
    let copies = Copies::new(device, CALIBRATING)?;
    for (up, from) in [true, false].into_iter().zip(&mut paths.engines_from) {
        let fast = |path, size| copies.time(up, path, size, 3).map(median);
        *from = u64::MAX;
        for size in [4 << 10, 8 << 10, 16 << 10, 28 << 10, 64 << 10, 128 << 10, 256 << 10] {
            if fast(engine, size)? >= fast(Path::Kernel, size)? {
                *from = size as u64;
                break;
            }
        }
    }
    device.set_paths(paths);
    Ok(paths)
}

/// The same, once in a process for a device of a driver; later ones of it go by what was measured then.
///
/// # Errors
/// As there.
pub fn calibrate_once(device: &Arc<Cuda>) -> Result<Paths, Fault> {
    static KNOWN: Mutex<BTreeMap<(String, u32), Paths>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let of = (device.pci(), device.driver());
    if let Some(&paths) = known.get(&of) {
        device.set_paths(paths);
        return Ok(paths);
    }
    let paths = calibrate(device)?;
    known.insert(of, paths);
    Ok(paths)
}

/// Bytes a second of tensors, as they are plain, that are encoded into pinned memory or decoded from it, of each repetition;
/// and how many of them cross the link for each. `staged`: by way of memory of the device.
///
/// # Errors
/// There is no memory for it, or the device is lost.
pub fn coding(device: &Arc<Cuda>, encode: bool, staged: bool, repeats: usize) -> Result<(Vec<f64>, f64), Fault> {
    // As a model of 8 billion parameters has them: 2 MiB each.
    let geometry = Geometry { layers: 32, planes: 2, kv_heads: 8, head_dim: 128, dtype: Dtype::Fp16, block_tokens: 16 };
    let layout = Layout::new(Scheme::new(Codec::Int8Sym, &geometry), &geometry);
    let layout = Arc::new(layout.map_err(|error| Fault::Refused(error.to_string()))?);
    let blocks = if device.is_real() { COPIED / geometry.block_bytes() } else { 1 };
    let plain = geometry.block_bytes();
    let (mut memory, tensor) = (Pinned::new(device, blocks * plain)?, Reserved::new(device, blocks * plain)?);
    memory.bytes().copy_from_slice(&content(blocks * plain, 1));
    let whole = Piece { from: memory.address, to: tensor.address, bytes: (blocks * plain) as u64 };
    run(device, Lane::Up, Work::Copy(vec![whole]))?;
    let coded = coded(&geometry, &layout, tensor.address, memory.address, blocks);
    let before = device.set_paths(Paths { engines_from: [if staged { 0 } else { u64::MAX }; 2], ..Paths::default() });
    let run_once = || {
        let (lane, work) = match encode {
            true => (Lane::Down, Work::Encode(coded.clone(), Status::new(blocks))),
            false => (Lane::Up, Work::Decode(coded.clone())),
        };
        let begun = Instant::now();
        run(device, lane, work)?;
        Ok((blocks * plain) as f64 / begun.elapsed().as_secs_f64())
    };
    // The first is a warm-up.
    let timed: Result<Vec<f64>, Fault> = (0..=repeats).map(|_| run_once()).collect();
    device.set_paths(before);
    Ok((timed?.split_off(1), layout.bytes() as f64 / plain as f64))
}

/// Nanoseconds of each place and of each eviction in a full slab, while its blocks are written by the device.
///
/// # Errors
/// There is no memory for it, or the device is lost.
pub fn latencies(device: &Arc<Cuda>, count: usize) -> Result<[Vec<u64>; 2], Fault> {
    const BLOCK: usize = 64 << 10;
    let source = Pinned::new(device, BLOCK)?;
    let device_of: Arc<dyn Device> = device.clone();
    let mut slab = Slab::reserve(device_of, if device.is_real() { COPIED as u64 } else { 0 }, 0)?;
    let class = slab.class(&Holding::new(0), BLOCK);
    let ([mut places, mut evictions], mut node) = ([Vec::with_capacity(count), Vec::with_capacity(count)], 0);
    while places.len() < count {
        let begun = Instant::now();
        let placed = slab.place(&class, 0, &[node])?;
        let took = begun.elapsed().as_nanos() as u64;
        node += 1;
        let Some(&placed) = placed.first() else {
            let begun = Instant::now();
            if let Some(coldest) = slab.coldest(0, |_| true) {
                slab.leave(coldest, true);
                evictions.push(begun.elapsed().as_nanos() as u64);
            }
            slab.wait_for_room()?;
            continue;
        };
        places.push(took);
        let piece = Piece { from: source.address, to: slab.address(placed), bytes: BLOCK as u64 };
        let submission = Submission { lane: Lane::Up, after: Vec::new(), work: vec![Work::Copy(vec![piece])] };
        // SAFETY: the source stays until the slab is closed, which waits; the place is this block's alone.
        let ticket = unsafe { device.submit(submission) }?;
        slab.wrote(&[placed], Lane::Up, ticket);
    }
    slab.close()?;
    Ok([places, evictions])
}

/// The one in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

// Values of any kind: first those of all bits, then such as models have.
fn content(bytes: usize, round: u64) -> Vec<u8> {
    let mut word = round.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (word >> 40) as u16
    };
    let values: Vec<u16> = match round {
        0 => (0..bytes / 2).map(|n| n as u16).collect(),
        // Of small exponents, which any scale fits, of halves and of bfloat16.
        n => std::iter::repeat_with(next)
            .take(bytes / 2)
            .map(|v| v & 0x83ff | [0x3000, 0x3e00][n as usize % 2])
            .collect(),
    };
    values.into_iter().flat_map(u16::to_le_bytes).collect()
}

/// Encodes blocks on the device, and decodes them, and compares every byte with the codec's; how many payloads were.
///
/// # Errors
/// What differs, or what the device refused.
pub fn kernels(device: &Arc<Cuda>, rounds: u64) -> Result<usize, String> {
    let mut compared = 0;
    for (dtype, round) in [Dtype::Fp16, Dtype::Bf16].into_iter().flat_map(|d| (0..rounds).map(move |r| (d, r))) {
        for (head_dim, block_tokens) in [(64, 16), (128, 16), (80, 7), (576, 3)] {
            let geometry = Geometry { layers: 2, planes: 2, kv_heads: 2, head_dim, dtype, block_tokens };
            let plain = Scheme::new(Codec::Int8Sym, &geometry);
            let by = [
                (plain.keys, plain.values),
                (Granularity::Tensor, Granularity::Head),
                (Granularity::Token(16), Granularity::Channel(block_tokens)),
            ];
            for codec in [Codec::Int8Sym, Codec::Int8Asym] {
                for (keys, values) in by {
                    let scheme = Scheme { codec, keys, values, ..plain };
                    let layout = Layout::new(scheme, &geometry).map_err(|error| error.to_string())?;
                    let layout = Arc::new(layout);
                    // In place, and by way of memory of the device.
                    for engines_from in [u64::MAX, 0] {
                        let before = device.set_paths(Paths { engines_from: [engines_from; 2], ..Paths::default() });
                        let found = one(device, &geometry, &layout, round);
                        device.set_paths(before);
                        compared += found.map_err(|what| {
                            format!("{dtype:?} {codec:?} {keys:?} {values:?}, dim {head_dim}, {engines_from}: {what}")
                        })?;
                    }
                }
            }
        }
    }
    Ok(compared)
}

// Blocks that lie as plain payloads do, one behind the other, and their payloads.
fn coded(geometry: &Geometry, layout: &Arc<Layout>, tensor: u64, payloads: u64, blocks: usize) -> Coded {
    let row = geometry.row_bytes() as u64;
    let head = row * u64::from(geometry.block_tokens);
    let plane = head * u64::from(geometry.kv_heads);
    let rows = (0..geometry.plane_count() as u64).map(|n| Rows {
        base: tensor + n * plane,
        head_stride: head,
        token_stride: row,
    });
    let (plain, encoded) = (geometry.block_bytes() as u64, layout.bytes().next_multiple_of(64) as u64);
    Coded {
        layout: Some(layout.clone()),
        heads: geometry.kv_heads,
        block_tokens: geometry.block_tokens,
        row_bytes: geometry.row_bytes(),
        planes: rows.collect(),
        run_tokens: geometry.block_tokens,
        offsets: (0..blocks as u64).map(|n| n * plain).collect(),
        payloads: (0..blocks as u64).map(|n| payloads + n * encoded).collect(),
    }
}

fn one(device: &Arc<Cuda>, geometry: &Geometry, layout: &Arc<Layout>, round: u64) -> Result<usize, String> {
    const BLOCKS: usize = 3;
    let said = |fault: Fault| fault.to_string();
    let (plain, encoded) = (geometry.block_bytes(), layout.bytes().next_multiple_of(64));
    let blocks: Vec<Vec<u8>> = (0..BLOCKS as u64).map(|n| content(plain, round * 5 + n)).collect();
    let mut memory = Pinned::new(device, BLOCKS * plain.max(encoded)).map_err(said)?;
    let tensor = Reserved::new(device, BLOCKS * plain).map_err(said)?;
    memory.bytes()[..BLOCKS * plain].copy_from_slice(&blocks.concat());
    let whole = |from, to| Work::Copy(vec![Piece { from, to, bytes: (BLOCKS * plain) as u64 }]);
    run(device, Lane::Up, whole(memory.address, tensor.address)).map_err(said)?;
    memory.bytes().fill(0xa5);
    let coded = coded(geometry, layout, tensor.address, memory.address, BLOCKS);
    let status = Status::new(BLOCKS);
    run(device, Lane::Down, Work::Encode(coded.clone(), status.clone())).map_err(said)?;
    let mut right = Vec::new();
    for (n, block) in blocks.iter().enumerate() {
        let mut expected = vec![0u8; layout.bytes()];
        let fits = layout.encode_payload(block, false, &mut expected);
        if status.is_encoded(n) != fits {
            return Err(format!("block {n} of round {round}: whether it can be encoded"));
        }
        let found = &memory.bytes()[n * encoded..][..layout.bytes()];
        if fits && found != expected {
            let at = found.iter().zip(&expected).position(|(one, other)| one != other);
            return Err(format!("block {n} of round {round}: encoded byte {at:?}"));
        }
        let mut decoded = vec![0u8; plain];
        // What could not be encoded is decoded from whatever is there: bytes that a codec has not made are none of its own.
        memory.bytes()[n * encoded..][..layout.bytes()].copy_from_slice(&if fits {
            expected
        } else {
            vec![0; layout.bytes()]
        });
        layout.decode_payload(&memory.bytes()[n * encoded..][..layout.bytes()], false, &mut decoded);
        right.extend(decoded);
    }
    run(device, Lane::Up, Work::Decode(coded)).map_err(said)?;
    run(device, Lane::Down, whole(tensor.address, memory.address)).map_err(said)?;
    match memory.bytes()[..BLOCKS * plain].iter().zip(&right).position(|(one, other)| one != other) {
        Some(at) => Err(format!("round {round}: decoded byte {at}")),
        None => Ok(BLOCKS),
    }
}

/// Fills the device but for so many bytes: a slab that is larger is halved, and there is room again afterwards.
///
/// # Errors
/// What was otherwise.
pub fn room(device: &Arc<Cuda>, left: u64) -> Result<(), String> {
    let said = |fault: Fault| fault.to_string();
    let (_, free) = device.memory().map_err(said)?;
    let wanted = free.saturating_sub(left);
    let all = Reserved::new(device, wanted as usize).map_err(said)?;
    let (_, free) = device.memory().map_err(said)?;
    let device_of: Arc<dyn Device> = device.clone();
    match Slab::reserve(device_of.clone(), 16 * left, 0) {
        Ok(slab) if slab.bytes() > free => return Err(format!("a slab of {} where {free} are free", slab.bytes())),
        Ok(_) | Err(Fault::NoRoom(_)) => {}
        Err(fault) => return Err(said(fault)),
    }
    match Reserved::new(device, (free + left) as usize) {
        Err(Fault::NoRoom(_)) => {}
        Err(fault) => return Err(said(fault)),
        Ok(_) => return Err("there was more room than the driver said".into()),
    }
    drop(all);
    Slab::reserve(device_of, left, left).map(|_| ()).map_err(said)
}
