//! What a device does, and how fast: its kernels against the codec, its memory when there is none left, and its copies by
//! every path beside one large copy of pinned memory, which is the limit.
//!
//! Bytes are compared wherever this runs; time is measured on a real device alone.

use super::Slab;
use super::cuda::{Cuda, Path, Paths};
use super::device::{Coded, Device, Fault, Lane, Piece, Rows, Status, Submission, Ticket, Work};
use crate::block::{Dtype, Geometry};
use crate::codec::{Codec, Granularity, Layout, Scheme};
use crate::sync::Arc;

/// Bytes of a copy that is timed, and of the one that is the limit.
const COPIED: usize = 64 << 20;
const LARGE: usize = 256 << 20;
const STANDING_IN: usize = 256 << 10;
const ALIGN: usize = 4096;

/// Copies of one kind, timed.
#[derive(Debug, Clone)]
pub struct Timed {
    /// To the device, or from it.
    pub up: bool,
    /// How.
    pub path: Path,
    /// Bytes of a piece.
    pub piece_bytes: usize,
    /// Bytes a second, of each repetition.
    pub bytes_per_s: Vec<f64>,
}

/// Pinned memory of the process.
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

/// Times copies of pieces of one size, in an order in which few are neighbours.
///
/// # Errors
/// There is no memory for it, or the device is lost.
pub fn copies(device: &Arc<Cuda>, up: bool, path: Path, piece_bytes: usize, repeats: usize) -> Result<Timed, Fault> {
    // What stands in for a device is not timed: there less will do to see that it is copied.
    let bytes = match (device.is_real(), piece_bytes) {
        (false, _) => STANDING_IN.max(piece_bytes),
        (true, LARGE..) => LARGE,
        (true, _) => COPIED,
    };
    let (here, there) = (Pinned::new(device, bytes)?, Reserved::new(device, bytes)?);
    let count = bytes / piece_bytes;
    let pieces: Vec<Piece> = (0..count)
        .map(|n| {
            let at = (n * 7919 % count * piece_bytes) as u64;
            let (from, to) = if up { (here.address, there.address) } else { (there.address, here.address) };
            Piece { from: from + at, to: to + at, bytes: piece_bytes as u64 }
        })
        .collect();
    let mut bytes_per_s = Vec::with_capacity(repeats);
    // The first is a warm-up.
    for repeat in 0..=repeats {
        let seconds = device.timed(if up { Lane::Up } else { Lane::Down }, path, &pieces)?;
        if repeat > 0 {
            bytes_per_s.push(bytes as f64 / seconds);
        }
    }
    Ok(Timed { up, path, piece_bytes, bytes_per_s })
}

/// From how many bytes of a piece on engines are faster than a kernel on this device, measured; and has copies go by that.
///
/// # Errors
/// There is no memory for it, or the device is lost.
pub fn calibrate(device: &Arc<Cuda>) -> Result<Paths, Fault> {
    let mut paths = Paths::default();
    let engine = if device.has_batch() { Path::Batch } else { Path::Engine };
    for (up, from) in [true, false].into_iter().zip(&mut paths.engines_from) {
        let fast = |path, size| copies(device, up, path, size, 3).map(|timed| median(timed.bytes_per_s));
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
                    compared += one(device, &geometry, &Arc::new(layout), round)
                        .map_err(|what| format!("{dtype:?} {codec:?} {keys:?} {values:?}, dim {head_dim}: {what}"))?;
                }
            }
        }
    }
    Ok(compared)
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
    let row = geometry.row_bytes() as u64;
    let head = row * u64::from(geometry.block_tokens);
    let plane = head * u64::from(geometry.kv_heads);
    let rows = (0..geometry.plane_count() as u64).map(|n| Rows {
        base: tensor.address + n * plane,
        head_stride: head,
        token_stride: row,
    });
    let coded = Coded {
        layout: Some(layout.clone()),
        heads: geometry.kv_heads,
        block_tokens: geometry.block_tokens,
        row_bytes: geometry.row_bytes(),
        planes: rows.collect(),
        run_tokens: geometry.block_tokens,
        offsets: (0..BLOCKS as u64).map(|n| n * plain as u64).collect(),
        payloads: (0..BLOCKS as u64).map(|n| memory.address + n * encoded as u64).collect(),
    };
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
