//! Gather and scatter between an engine's strided tensors and a block's payload, over all cores.
//!
//! The payload's order is `[layer][plane][head][token][dim]`. A tensor may have any strides but the last: a row (one
//! token of one head) is contiguous. Tokens of a paged cache are found through its page table. Each byte is copied
//! once; gathers use non-temporal stores, since a stored block is not read again soon and its lines need not be
//! fetched to be overwritten.

use crate::block::Geometry;
use crate::error::{Result, input};
use crate::workers::Workers;
use std::ops::Range;

/// Where one plane of one layer lies in the caller's memory. Strides are in bytes.
#[derive(Debug, Clone, Copy)]
pub struct PlaneView {
    /// Address of head 0 of token 0 (of page 0).
    pub base: *mut u8,
    /// From one head to the next.
    pub head_stride: isize,
    /// From one token to the next, within a page.
    pub token_stride: isize,
    /// From one page to the next.
    pub page_stride: isize,
}

/// Which page holds which tokens of a sequence.
#[derive(Debug, Clone)]
pub struct PageTable {
    /// Page numbers, in the order of the sequence.
    pub pages: Vec<u32>,
    /// Tokens per page.
    pub page_tokens: usize,
}

/// A stream of whoever owns the tensors, as its library names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(pub u64);

/// A sequence's keys and values in the caller's memory.
#[derive(Debug, Clone)]
pub struct KvView {
    planes: Vec<PlaneView>,
    pages: Option<PageTable>,
    tokens: usize,
    /// Of memory on a device; with the stream in which its owner uses it, if that is known.
    device: Option<Option<Stream>>,
}

// SAFETY: the view only carries addresses. Whoever builds one promises (see `new`) that the memory stays valid while
// a call uses it; threads of one call touch disjoint rows.
unsafe impl Send for KvView {}
// SAFETY: as above.
unsafe impl Sync for KvView {}

impl KvView {
    /// A view of `tokens` tokens; `planes` holds one plane per layer and K/V, layer by layer.
    ///
    /// # Safety
    /// Every row that the planes, their strides and the page table name must be valid memory of the view's geometry,
    /// writable and apart from each other if it is loaded into, and not written by others during a call.
    ///
    /// # Errors
    /// [`ErrorKind::Input`](crate::ErrorKind::Input) when the page table covers fewer tokens.
    pub unsafe fn new(planes: Vec<PlaneView>, pages: Option<PageTable>, tokens: usize) -> Result<Self> {
        if let Some(table) = &pages {
            let covered = table.pages.len() * table.page_tokens;
            if covered < tokens {
                return Err(input(format!("pages: {covered} tokens covered, expected at least {tokens}")));
            }
        }
        Ok(Self { planes, pages, tokens, device: None })
    }

    /// The same of tensors that are on the store's device; `stream`: what was put into it up to a call is done before the
    /// call touches them.
    #[must_use]
    pub fn on_device(self, stream: Option<Stream>) -> Self {
        Self { device: Some(stream), ..self }
    }

    /// Whether its tensors are on a device.
    pub(crate) fn is_on_device(&self) -> bool {
        self.device.is_some()
    }

    /// The stream in which their owner uses them.
    pub(crate) fn stream(&self) -> Option<Stream> {
        self.device.flatten()
    }

    /// Its planes.
    pub(crate) fn planes(&self) -> &[PlaneView] {
        &self.planes
    }

    /// Tokens of a page, if there are pages.
    pub(crate) fn page_tokens(&self) -> Option<usize> {
        self.pages.as_ref().map(|table| table.page_tokens)
    }

    /// The page of a token, and its number there.
    pub(crate) fn page_of(&self, token: usize) -> (u32, usize) {
        match &self.pages {
            None => (0, token),
            Some(table) => (table.pages[token / table.page_tokens], token % table.page_tokens),
        }
    }

    /// Tokens that the view covers.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Planes of all layers.
    pub fn plane_count(&self) -> usize {
        self.planes.len()
    }

    /// Whether two of the rows that a load of some tokens writes are the same.
    ///
    /// # Errors
    /// Which, by page or stride.
    pub(crate) fn check_apart(&self, geometry: &Geometry, tokens: Range<usize>) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let row = geometry.row_bytes();
        for PlaneView { token_stride, head_stride, .. } in &self.planes {
            for (axis, stride, count) in
                [("N", token_stride, tokens.len()), ("H", head_stride, geometry.kv_heads as usize)]
            {
                if count > 1 && stride.unsigned_abs() < row {
                    return Err(input(format!(
                        "kv: rows of {row} bytes lie {stride} bytes apart along {axis}, so a load would write one over \
                         the other; give a tensor that is not expanded"
                    )));
                }
            }
        }
        let Some(table) = &self.pages else { return Ok(()) };
        let mut written =
            table.pages[tokens.start / table.page_tokens..tokens.end.div_ceil(table.page_tokens)].to_vec();
        written.sort_unstable();
        match written.windows(2).find(|two| two[0] == two[1]) {
            Some(two) => Err(input(format!("pages: page {} is named twice, expected each once in a load", two[0]))),
            None => Ok(()),
        }
    }

    /// Calls back with each row of a block's plane, head by head.
    #[inline]
    pub(crate) fn each_row(&self, geometry: &Geometry, plane: usize, first_token: usize, mut row: impl FnMut(*mut u8)) {
        let PlaneView { token_stride, head_stride, .. } = self.planes[plane];
        let tokens = geometry.block_tokens as usize;
        for head in 0..geometry.kv_heads as isize {
            let mut done = 0;
            while done < tokens {
                let (start, run) = self.run(plane, first_token + done, tokens - done);
                let start = start.wrapping_offset(head * head_stride);
                (0..run as isize).for_each(|n| row(start.wrapping_offset(n * token_stride)));
                done += run;
            }
        }
    }

    // Address of the first row of `token`, and how many tokens from there lie at one stride.
    fn run(&self, plane: usize, token: usize, want: usize) -> (*mut u8, usize) {
        let view = &self.planes[plane];
        let (page, within, length) = match &self.pages {
            None => (0, token, want),
            Some(table) => {
                let within = token % table.page_tokens;
                (table.pages[token / table.page_tokens], within, want.min(table.page_tokens - within))
            }
        };
        let offset = page as isize * view.page_stride + within as isize * view.token_stride;
        // `new`'s caller promised that every named row is valid, so the address stays inside its tensor.
        (view.base.wrapping_offset(offset), length)
    }
}

/// One block's copy: its payload, and its first token in the view.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockCopy {
    pub(crate) payload: *mut u8,
    pub(crate) first_token: usize,
}

// SAFETY: a block's payload is handed to one copy at a time (gather) or is read only (scatter).
unsafe impl Send for BlockCopy {}
// SAFETY: as above.
unsafe impl Sync for BlockCopy {}

/// Direction of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the caller's tensors into payloads.
    Gather,
    /// From payloads into the caller's tensors.
    Scatter,
}

/// Below this many bytes one thread is faster than waking another.
pub(crate) const SPLIT_BYTES: usize = 512 << 10;
/// Work is handed out in pieces of about this many bytes.
pub(crate) const PIECE_BYTES: usize = 128 << 10;

impl Workers {
    /// Copies whole blocks in one direction.
    pub(crate) fn copy(&self, geometry: &Geometry, view: &KvView, blocks: &[BlockCopy], direction: Direction) {
        let planes = geometry.plane_count();
        let plane_bytes = geometry.block_bytes() / planes;
        if blocks.len() * geometry.block_bytes() < SPLIT_BYTES {
            for block in blocks {
                copy_planes(geometry, view, *block, 0..planes, direction);
            }
            return;
        }
        match direction {
            // Engine memory is read in order, plane by plane over all blocks: short jumps would stall the prefetcher.
            Direction::Gather => {
                let group = (PIECE_BYTES / (plane_bytes * blocks.len().min(RUN_BLOCKS))).clamp(1, planes);
                let (groups, runs) = (planes.div_ceil(group), blocks.len().div_ceil(RUN_BLOCKS));
                self.each(groups * runs, |i| {
                    let (first, from) = (i / runs * group, i % runs * RUN_BLOCKS);
                    let run = &blocks[from..(from + RUN_BLOCKS).min(blocks.len())];
                    gather_planes(geometry, view, run, first..(first + group).min(planes));
                });
            }
            // Payloads are read in order, block by block.
            Direction::Scatter => {
                let group = (PIECE_BYTES / plane_bytes).clamp(1, planes);
                let groups = planes.div_ceil(group);
                self.each(blocks.len() * groups, |i| {
                    let first = i % groups * group;
                    copy_planes(geometry, view, blocks[i / groups], first..(first + group).min(planes), direction);
                });
            }
        }
    }
}

/// Blocks that one piece of a gather spans, so that long sequences are split, too.
pub(crate) const RUN_BLOCKS: usize = 64;

/// Gathers some planes of neighbouring blocks: outermost by head, since a head's tokens are neighbours in most tensors.
fn gather_planes(geometry: &Geometry, view: &KvView, blocks: &[BlockCopy], planes: std::ops::Range<usize>) {
    let row = geometry.row_bytes();
    let tokens = geometry.block_tokens as usize;
    let heads = geometry.kv_heads as usize;
    for plane in planes {
        let strides = view.planes[plane];
        if strides.token_stride != row as isize {
            for block in blocks {
                copy_planes(geometry, view, *block, plane..plane + 1, Direction::Gather);
            }
            continue;
        }
        for head in 0..heads {
            for block in blocks {
                let mut done = 0;
                while done < tokens {
                    let (start, run) = view.run(plane, block.first_token + done, tokens - done);
                    let inner = ((plane * heads + head) * tokens + done) * row;
                    // SAFETY: as in `copy_planes`.
                    unsafe {
                        let stored = block.payload.add(inner);
                        let theirs = start.wrapping_offset(head as isize * strides.head_stride);
                        copy_streaming(stored, theirs, run * row);
                    }
                    done += run;
                }
            }
        }
    }
    fence();
}

/// Copies some planes of one block.
pub(crate) fn copy_planes(
    geometry: &Geometry,
    view: &KvView,
    block: BlockCopy,
    planes: std::ops::Range<usize>,
    direction: Direction,
) {
    let row = geometry.row_bytes();
    let tokens = geometry.block_tokens as usize;
    let heads = geometry.kv_heads as usize;
    for plane in planes {
        let strides = view.planes[plane];
        let mut done = 0;
        while done < tokens {
            let (start, run) = view.run(plane, block.first_token + done, tokens - done);
            // Of one head, from one token on, so many that are neighbours on both sides.
            let copy = |head: usize, token: usize, count: usize| {
                let inner = ((plane * heads + head) * tokens + done + token) * row;
                let offset = head as isize * strides.head_stride + token as isize * strides.token_stride;
                // SAFETY: the payload has `block_bytes` bytes, of which `inner` names the row of this plane, head, token;
                // theirs are valid by the contract of `KvView::new`.
                unsafe { copy_bytes(block.payload.add(inner), start.wrapping_offset(offset), count * row, direction) };
            };
            if strides.token_stride == row as isize {
                (0..heads).for_each(|head| copy(head, 0, run));
            } else {
                // In the order of the caller's memory where a token's heads are neighbours there.
                (0..run).for_each(|token| (0..heads).for_each(|head| copy(head, token, 1)));
            }
            done += run;
        }
    }
    fence();
}

/// # Safety
/// `bytes` bytes must be valid at both addresses and not overlap.
#[inline]
unsafe fn copy_bytes(stored: *mut u8, theirs: *mut u8, bytes: usize, direction: Direction) {
    match direction {
        // SAFETY: the caller's contract.
        Direction::Scatter => unsafe { copy_streaming(theirs, stored, bytes) },
        // SAFETY: the caller's contract.
        Direction::Gather => unsafe { copy_streaming(stored, theirs, bytes) },
    }
}

/// # Safety
/// As for [`copy_bytes`].
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_streaming(to: *mut u8, from: *const u8, bytes: usize) {
    if (to as usize).is_multiple_of(32) && bytes.is_multiple_of(128) && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; the caller's contract.
        return unsafe { copy_streaming_avx2(to, from, bytes) };
    }
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    if !(to as usize).is_multiple_of(16) || !bytes.is_multiple_of(64) {
        // SAFETY: the caller's contract.
        return unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    }
    for at in (0..bytes).step_by(64) {
        // SAFETY: `at + 64 <= bytes`, and `to` is 16-byte aligned; SSE2 is part of x86-64. Four stores fill one
        // write-combining line.
        unsafe {
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            let lines = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            for (i, line) in lines.into_iter().enumerate() {
                _mm_stream_si128(to.add(i), line);
            }
        }
    }
}

/// # Safety
/// As for [`copy_bytes`]; `to` is 32-byte aligned, `bytes` a multiple of 128, and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_streaming_avx2(to: *mut u8, from: *const u8, bytes: usize) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_stream_si256};
    for at in (0..bytes).step_by(128) {
        // SAFETY: `at + 128 <= bytes`, and `to` is 32-byte aligned.
        unsafe {
            let (from, to) = (from.add(at).cast::<__m256i>(), to.add(at).cast::<__m256i>());
            let lines = [0, 1, 2, 3].map(|i| _mm256_loadu_si256(from.add(i)));
            for (i, line) in lines.into_iter().enumerate() {
                _mm256_stream_si256(to.add(i), line);
            }
        }
    }
}

/// # Safety
/// As for [`copy_bytes`].
#[cfg(not(target_arch = "x86_64"))]
#[inline]
unsafe fn copy_streaming(to: *mut u8, from: *const u8, bytes: usize) {
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}

// Streaming stores are weakly ordered: they must be visible before the block is published.
fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Dtype;
    use proptest::prelude::*;

    // Every byte tells where it belongs, so a byte in the wrong place cannot go unseen.
    fn byte(plane: usize, head: usize, token: usize, i: usize) -> u8 {
        (plane * 131 + head * 31 + token * 7 + i * 3) as u8
    }

    proptest! {
        #[test]
        fn gather_then_scatter_moves_every_byte_to_its_place_in_any_layout(
            layers in 1u32..4, heads in 1u32..4, dim in 1u32..40, block in 1u32..9, blocks in 1usize..4,
            token_major: bool, paged: bool, page in 1usize..7, pad in 0usize..3,
        ) {
            let g = Geometry { layers, planes: 2, kv_heads: heads, head_dim: dim, dtype: Dtype::Fp16, block_tokens: block };
            let tokens = blocks * block as usize + pad;
            let row = g.row_bytes();
            let page = if paged { page } else { tokens };
            let page_count = tokens.div_ceil(page);
            let table: Vec<u32> = (0..page_count as u32).rev().collect();
            let plane_bytes = page_count * page * heads as usize * row;
            let (head_stride, token_stride) =
                if token_major { (row, row * heads as usize) } else { (row * page, row) };
            let page_stride = page * heads as usize * row;
            let at = |head: usize, token: usize| {
                table[token / page] as usize * page_stride + head * head_stride + token % page * token_stride
            };
            let mut source = vec![vec![0u8; plane_bytes]; g.plane_count()];
            let mut target = vec![vec![0u8; plane_bytes]; g.plane_count()];
            for (p, plane) in source.iter_mut().enumerate() {
                for h in 0..heads as usize { for t in 0..tokens { for i in 0..row {
                    plane[at(h, t) + i] = byte(p, h, t, i);
                } } }
            }
            let view = |planes: &mut Vec<Vec<u8>>| {
                let planes = planes.iter_mut().map(|p| PlaneView {
                    base: p.as_mut_ptr(), head_stride: head_stride as isize, token_stride: token_stride as isize,
                    page_stride: page_stride as isize,
                }).collect();
                let pages = Some(PageTable { pages: table.clone(), page_tokens: page });
                // SAFETY: the vectors hold every row of the geometry and outlive the copies below.
                unsafe { KvView::new(planes, pages, tokens) }.expect("the table covers the tokens")
            };
            let workers = Workers::new(2).expect("threads start");
            let mut payloads = vec![vec![0u8; g.block_bytes()]; blocks];
            let copies: Vec<_> = payloads.iter_mut().enumerate()
                .map(|(i, p)| BlockCopy { payload: p.as_mut_ptr(), first_token: i * block as usize }).collect();
            workers.copy(&g, &view(&mut source), &copies, Direction::Gather);
            workers.copy(&g, &view(&mut target), &copies, Direction::Scatter);
            for (b, payload) in payloads.iter().enumerate() {
                for p in 0..g.plane_count() { for h in 0..heads as usize { for t in 0..block as usize { for i in 0..row {
                    let inner = ((p * heads as usize + h) * block as usize + t) * row + i;
                    prop_assert_eq!(payload[inner], byte(p, h, b * block as usize + t, i));
                } } } }
            }
            for (p, plane) in target.iter().enumerate() {
                for h in 0..heads as usize { for t in 0..tokens { for i in 0..row {
                    let expected = if t < blocks * block as usize { byte(p, h, t, i) } else { 0 };
                    prop_assert_eq!(plane[at(h, t) + i], expected);
                } } }
            }
        }
    }

    #[test]
    fn a_page_table_that_is_too_short_is_refused() {
        let table = PageTable { pages: vec![0, 1], page_tokens: 4 };
        // SAFETY: the view is refused, and never read.
        let refused = unsafe { KvView::new(Vec::new(), Some(table), 9) };
        assert!(refused.expect_err("9 tokens need three pages").to_string().contains("8 tokens covered"));
    }
}
