//! Reading back what a model's file holds: headers and footers, many at a time.
//!
//! A segment without a valid footer was being written when its process ended, or is damaged: its records are walked, in long
//! reads, and kept where their bodies verify.

use super::queue::{DEPTH, Part, Transfer};
use super::record::{self, Entry, PAGE, SEGMENTS_OFFSET, SegmentIdentity, SegmentLayout};
use super::{Buffer, ModelFile};
use crate::error::{Error, Result};
use std::io;
use std::ops::Range;

/// Headers and footers of so many bytes are read at once, or one segment's.
const ENDS_BYTES: usize = 4 << 20;
/// A walk reads so much at a time, or two records.
const WALK_BYTES: usize = 4 << 20;
/// A walk ends where so many pages cannot be read.
const BAD_PAGES: u32 = 16;

/// A segment as recovery found it.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) epoch: u64,
    /// By the clock of then, in seconds since 1970; 0: not known.
    pub(crate) opened_s: u64,
    /// Whether it has a footer.
    pub(crate) sealed: bool,
    pub(crate) entries: Vec<Entry>,
}

impl ModelFile {
    /// Reads what the file holds: one item per segment. `None` where none is valid: its disk blocks were given back.
    pub(crate) fn recover(&self) -> Result<Vec<Option<Recovered>>> {
        let failed = |e| Error::io(format!("cannot read {}", self.path.display()), e);
        let segments = self.scan().map_err(failed)?.into_iter().zip(0..);
        // Should that fail, it is a segment without blocks, which counts, and is reused in its turn.
        let nothing = || Recovered { epoch: 0, opened_s: 0, sealed: true, entries: Vec::new() };
        let or_given_back = |(found, index): (Option<_>, _)| found.or_else(|| self.punch(index).is_err().then(nothing));
        Ok(segments.map(or_given_back).collect())
    }

    /// The same, and nothing is given back.
    pub(super) fn scan(&self) -> io::Result<Vec<Option<Recovered>>> {
        let count = self.file.len()?.saturating_sub(SEGMENTS_OFFSET).div_ceil(self.layout.segment_bytes);
        let ends_bytes = PAGE + self.layout.footer_bytes() as usize;
        let at_once = (ENDS_BYTES / ends_bytes).clamp(1, DEPTH / 2);
        let mut ends = Buffer::new(at_once * ends_bytes).map_err(io::Error::other)?;
        let mut walk = None;
        let mut found = Vec::new();
        for first in (0..count).step_by(at_once) {
            let segments = first..(first + at_once as u64).min(count);
            let read = self.read_ends(segments.clone(), &mut ends);
            for ((index, ends), read) in segments.zip(ends.chunks_exact(ends_bytes)).zip(read) {
                // An unreadable segment is one that is lost, not a reason to refuse the others.
                found.push(self.recover_segment(index as u32, ends, read, &mut walk).ok().flatten());
            }
        }
        Ok(found)
    }

    // Reads header and footer of these segments, one segment's after the other's; returns how much was read of each.
    fn read_ends(&self, segments: Range<u64>, ends: &mut [u8]) -> Vec<[io::Result<usize>; 2]> {
        let footer_bytes = self.layout.footer_bytes() as usize;
        let mut read: Vec<_> = segments.clone().map(|_| [Ok(0), Ok(0)]).collect();
        let mut queue = self.queue();
        for ((n, index), ends) in segments.enumerate().zip(ends.chunks_exact_mut(PAGE + footer_bytes)) {
            let (header, footer) = ends.split_at_mut(PAGE);
            let at = self.offset(index as u32);
            for (side, (room, offset)) in
                [(header, at), (footer, at + self.layout.footer_offset())].into_iter().enumerate()
            {
                let parts = vec![Part { at: room.as_mut_ptr(), bytes: room.len() }];
                // SAFETY: each transfer has a part of `ends` of its own, which is borrowed until the queue is gone.
                unsafe { queue.push(Transfer { tag: 2 * n + side, write: false, parts, offset }) };
            }
        }
        while let Some(done) = queue.pop() {
            read[done.tag / 2][done.tag % 2] = done.result;
        }
        read
    }

    fn recover_segment(
        &self,
        index: u32,
        ends: &[u8],
        [header_read, footer_read]: [io::Result<usize>; 2],
        walk: &mut Option<Buffer>,
    ) -> io::Result<Option<Recovered>> {
        let (header, footer) = ends.split_at(PAGE);
        let page = &header[..header_read?.min(PAGE)];
        let Some((header, opened_s)) = SegmentIdentity::read(page, self.uuid, self.fingerprint, u64::from(index))
        else {
            return Ok(None);
        };
        let footer = &footer[..footer_read.unwrap_or(0).min(footer.len())];
        if let Some(entries) = record::read_footer(footer, &header, &self.layout) {
            return Ok(Some(Recovered { epoch: header.epoch, opened_s, sealed: true, entries }));
        }
        let entries = self.walk(index, &header, walk)?;
        Ok(Some(Recovered { epoch: header.epoch, opened_s, sealed: false, entries }))
    }

    // Every whole record of a segment, page by page.
    fn walk(&self, index: u32, header: &SegmentIdentity, buffer: &mut Option<Buffer>) -> io::Result<Vec<Entry>> {
        let record_bytes = self.geometry.record_bytes();
        let buffer = match buffer {
            Some(buffer) => buffer,
            None => buffer.insert(Buffer::new(WALK_BYTES.max(2 * record_bytes)).map_err(io::Error::other)?),
        };
        let (mut entries, mut window, mut offset) = (Vec::new(), 0..0, SegmentLayout::RECORDS_OFFSET);
        let (mut end, mut bad_pages) = (self.layout.footer_offset(), 0);
        while offset < end && bad_pages < BAD_PAGES {
            // A record begins in the window only where all of it would fit.
            if offset + record_bytes as u64 > window.end && window.end < end || !window.contains(&offset) {
                let most = (buffer.len() as u64).min(end - offset) as usize;
                let (read, bad) = self.read_whole(self.offset(index) + offset, &mut buffer[..most]);
                bad_pages += bad;
                window = offset..offset + read as u64;
                if read < most {
                    end = window.end;
                    continue;
                }
            }
            let bytes = &buffer[(offset - window.start) as usize..(window.end - window.start) as usize];
            let whole = record::read_record(bytes, &self.geometry, header);
            let length = whole.map_or(PAGE, |(_, form)| self.geometry.record_bytes_of(form.payload_bytes)) as u64;
            entries.extend(whole.map(|(block, _)| Entry { block, offset, bytes: length }));
            offset += length;
        }
        Ok(entries)
    }

    // Zeros stand for pages that cannot be read. Returns how much there is, to the end of the file, and how many cannot.
    fn read_whole(&self, offset: u64, buffer: &mut [u8]) -> (usize, u32) {
        if let Ok(read) = self.file.read_at(buffer, offset) {
            return (read, 0);
        }
        let mut bad_pages = 0;
        for (n, page) in buffer.chunks_mut(PAGE).enumerate() {
            let read = if bad_pages < BAD_PAGES { self.file.read_at(page, offset + (n * PAGE) as u64) } else { Ok(0) };
            bad_pages += u32::from(read.is_err());
            page[read.unwrap_or(0)..].fill(0);
        }
        (buffer.len(), bad_pages)
    }
}
