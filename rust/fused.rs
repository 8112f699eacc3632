//! Encoding while gathering, decoding while scattering: rows of the caller's tensors are read or written where they are,
//! once, and no plain copy of a block exists.

use crate::block::Geometry;
use crate::codec::{Layout, Percentile};
use crate::copy::{BlockCopy, KvView, PIECE_BYTES, RUN_BLOCKS, SPLIT_BYTES};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};
use crate::workers::Workers;
use std::ops::Range;
use std::time::Instant;

/// Encodes whole blocks into their payloads. Returns which of them could be encoded, and the nanoseconds of all threads.
pub(crate) fn encode_blocks(
    workers: &Workers,
    geometry: &Geometry,
    view: &KvView,
    layout: &Layout,
    blocks: &[BlockCopy],
) -> (Vec<bool>, u64) {
    let (planes, row_bytes, spent) = (geometry.plane_count(), geometry.row_bytes(), AtomicU64::new(0));
    let fit: Vec<AtomicBool> = blocks.iter().map(|_| AtomicBool::new(true)).collect();
    let encode = |planes: Range<usize>, blocks: Range<usize>, copies: &[BlockCopy]| {
        let started = Instant::now();
        let mut rows = Vec::with_capacity(geometry.kv_heads as usize * geometry.block_tokens as usize);
        // The caller's memory is read in order, plane by plane over neighbouring blocks.
        for plane in planes {
            for (at, block) in blocks.clone().zip(copies) {
                rows.clear();
                view.each_row(geometry, plane, block.first_token, |row| {
                    // SAFETY: the view's maker promised that its rows are valid memory that nobody writes meanwhile.
                    rows.push(unsafe { std::slice::from_raw_parts(row.cast_const(), row_bytes) });
                });
                let first = block.first_token == 0;
                let (coded, exact) = (layout.plane(plane), layout.exact_part(plane, first));
                // SAFETY: the payload is as long as the layout says, this call's alone, and planes have places of their
                // own in it, apart from each other.
                let parts = unsafe {
                    let exact_at = block.payload.add(layout.bytes() + exact.start);
                    (
                        std::slice::from_raw_parts_mut(block.payload.add(coded.start), coded.len()),
                        std::slice::from_raw_parts_mut(exact_at, exact.len()),
                    )
                };
                if !layout.encode_plane(plane, &mut rows, parts) {
                    // Relaxed: read when all threads are done.
                    fit[at].store(false, Ordering::Relaxed);
                }
            }
        }
        spent.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
    };
    if blocks.len() * geometry.block_bytes() < SPLIT_BYTES {
        encode(0..planes, 0..blocks.len(), blocks);
    } else {
        let plane_bytes = geometry.block_bytes() / planes;
        let group = (PIECE_BYTES / (plane_bytes * blocks.len().min(RUN_BLOCKS))).clamp(1, planes);
        let (groups, runs) = (planes.div_ceil(group), blocks.len().div_ceil(RUN_BLOCKS));
        workers.each(groups * runs, |i| {
            let (first, from) = (i / runs * group, i % runs * RUN_BLOCKS);
            let run = from..(from + RUN_BLOCKS).min(blocks.len());
            encode(first..(first + group).min(planes), run.clone(), &blocks[run]);
        });
    }
    let fit = fit.iter().map(|fit| fit.load(Ordering::Relaxed)).collect();
    (fit, spent.load(Ordering::Relaxed))
}

/// A percentile of each plane's magnitudes, over the first tokens of a view.
pub(crate) fn percentiles(
    workers: &Workers,
    geometry: &Geometry,
    view: &KvView,
    layout: &Layout,
    tokens: u32,
    percentile: Percentile,
) -> Vec<f32> {
    // All of them are one block.
    let sample = Geometry { block_tokens: tokens, ..*geometry };
    let found: Vec<Mutex<f32>> = (0..geometry.plane_count()).map(|_| Mutex::new(0.0)).collect();
    workers.each(found.len(), |plane| {
        let mut rows = Vec::with_capacity(geometry.kv_heads as usize * tokens as usize);
        view.each_row(&sample, plane, 0, |row| {
            // SAFETY: as in `encode_blocks`.
            rows.push(unsafe { std::slice::from_raw_parts(row.cast_const(), geometry.row_bytes()) });
        });
        *found[plane].lock() = layout.percentile(percentile, &rows);
    });
    found.into_iter().map(Mutex::into_inner).collect()
}

/// Decodes whole blocks, each by its layout. Returns the nanoseconds of all threads.
pub(crate) fn decode_blocks(
    workers: &Workers,
    geometry: &Geometry,
    view: &KvView,
    blocks: &[(BlockCopy, &Arc<Layout>)],
) -> u64 {
    let (planes, spent) = (geometry.plane_count(), AtomicU64::new(0));
    let decode = |n: usize, planes: Range<usize>| {
        let (block, layout) = blocks[n];
        // SAFETY: the payload is as long as the layout says, and read only.
        let payload =
            unsafe { std::slice::from_raw_parts(block.payload.cast_const(), layout.bytes_of(block.first_token == 0)) };
        spent.fetch_add(decode_planes(geometry, view, layout, payload, block.first_token, planes), Ordering::Relaxed);
    };
    if blocks.len() * geometry.block_bytes() < SPLIT_BYTES {
        (0..blocks.len()).for_each(|n| decode(n, 0..planes));
    } else {
        let group = (PIECE_BYTES / (geometry.block_bytes() / planes)).clamp(1, planes);
        let groups = planes.div_ceil(group);
        workers.each(blocks.len() * groups, |i| {
            let first = i % groups * group;
            decode(i / groups, first..(first + group).min(planes));
        });
    }
    spent.load(Ordering::Relaxed)
}

/// Decodes some planes of one block. Returns the nanoseconds that took.
pub(crate) fn decode_planes(
    geometry: &Geometry,
    view: &KvView,
    layout: &Layout,
    payload: &[u8],
    first_token: usize,
    planes: Range<usize>,
) -> u64 {
    let (started, row_bytes) = (Instant::now(), geometry.row_bytes());
    let mut rows = Vec::with_capacity(geometry.kv_heads as usize * geometry.block_tokens as usize);
    for plane in planes {
        rows.clear();
        view.each_row(geometry, plane, first_token, |row| {
            // SAFETY: the view's maker promised that its rows are valid, writable memory that nobody else uses
            // meanwhile; no two rows are the same.
            rows.push(unsafe { std::slice::from_raw_parts_mut(row, row_bytes) });
        });
        layout.decode_plane(plane, payload, first_token == 0, &mut rows);
    }
    started.elapsed().as_nanos() as u64
}
