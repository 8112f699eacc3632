//! The bytes on disk: superblock, segment header, record, footer. `docs/formats.md` describes every field.
//!
//! Nothing read from disk is trusted. Each structure carries a magic number, a version, the store's uuid and its own
//! CRC-64/NVME; a record also carries the epoch of its segment, so bytes of an earlier life of the same place, or of
//! another file, are never taken for present ones. Parsers return `None` for anything that does not agree.

use crate::block::{Geometry, RECORD_ALIGN, RECORD_HEADER_BYTES, Sealed};
use crate::codec::{Codec, Granularity, Layout, Scheme};
use crc_fast::{CrcAlgorithm, checksum};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of every structure here. Other versions are refused, never guessed at.
pub(crate) const FORMAT_VERSION: u16 = 2;
/// One page: superblocks and segment headers fill it.
pub(crate) const PAGE: usize = RECORD_ALIGN;
/// Where the calibration of a model file is.
pub(crate) const CALIBRATION_OFFSET: u64 = 2 * PAGE as u64;
/// Where the first segment of a model file begins.
pub(crate) const SEGMENTS_OFFSET: u64 = 64 << 10;

const STORE_MAGIC: [u8; 4] = *b"SKVU";
const MODEL_MAGIC: [u8; 4] = *b"SKVM";
const SEGMENT_MAGIC: [u8; 4] = *b"SKVS";
const RECORD_MAGIC: [u8; 4] = *b"SKVR";
const FOOTER_MAGIC: [u8; 4] = *b"SKVF";
const CALIBRATION_MAGIC: [u8; 4] = *b"SKVC";
pub(super) const EPOCHS_MAGIC: [u8; 4] = *b"SKVE";
pub(super) const QUOTAS_MAGIC: [u8; 4] = *b"SKVQ";

/// Sixteen bytes that name a store, a model or a secret.
pub(crate) type Id = [u8; 16];

pub(super) fn crc(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// Fixed part of every structure but the record.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Preamble {
    magic: [u8; 4],
    version: U16,
    reserved: [u8; 2],
    uuid: Id,
}

impl Preamble {
    pub(super) fn new(magic: [u8; 4], uuid: Id) -> Self {
        Self { magic, version: U16::new(FORMAT_VERSION), reserved: [0; 2], uuid }
    }
}

/// What reading a superblock gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Superblock<T> {
    Valid(T),
    /// A superblock of ours, of another version.
    OtherVersion(u16),
    Damaged,
}

// A page whose last eight bytes are the checksum of those before.
fn seal_page(body: &[u8], page: &mut [u8]) {
    page.fill(0);
    page[..body.len()].copy_from_slice(body);
    let sum = crc(&page[..PAGE - 8]);
    page[PAGE - 8..PAGE].copy_from_slice(&sum.to_le_bytes());
}

fn page_is_whole(page: &[u8]) -> bool {
    page.len() >= PAGE && crc(&page[..PAGE - 8]).to_le_bytes() == page[PAGE - 8..PAGE]
}

// The first copy that is valid wins; a version mismatch is only believed where the checksum holds.
fn first_valid<T>(copies: &[u8], magic: [u8; 4], parse: impl Fn(&[u8]) -> Option<T>) -> Superblock<T> {
    let mut other = None;
    for page in copies.chunks_exact(PAGE) {
        let Ok((preamble, _)) = Preamble::read_from_prefix(page) else { continue };
        if preamble.magic != magic || !page_is_whole(page) {
            continue;
        }
        match preamble.version.get() {
            FORMAT_VERSION => {
                if let Some(value) = parse(page) {
                    return Superblock::Valid(value);
                }
            }
            version => other = Some(version),
        }
    }
    other.map_or(Superblock::Damaged, Superblock::OtherVersion)
}

/// Identity of a store directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoreIdentity {
    pub(crate) uuid: Id,
    pub(crate) secret_check: Id,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StorePage {
    preamble: Preamble,
    secret_check: Id,
}

impl StoreIdentity {
    /// One copy of the store's superblock.
    pub(crate) fn write(&self, page: &mut [u8]) {
        let body = StorePage { preamble: Preamble::new(STORE_MAGIC, self.uuid), secret_check: self.secret_check };
        seal_page(body.as_bytes(), page);
    }

    pub(crate) fn read(copies: &[u8]) -> Superblock<Self> {
        first_valid(copies, STORE_MAGIC, |page| {
            let (body, _) = StorePage::read_from_prefix(page).ok()?;
            Some(Self { uuid: body.preamble.uuid, secret_check: body.secret_check })
        })
    }
}

/// Identity and layout of one model's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelIdentity {
    pub(crate) uuid: Id,
    pub(crate) fingerprint: Id,
    pub(crate) geometry: [u32; 6],
    pub(crate) layout: SegmentLayout,
    pub(crate) model: String,
    pub(crate) weights_version: String,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ModelPage {
    preamble: Preamble,
    fingerprint: Id,
    geometry: [U32; 6],
    segment_bytes: U64,
    max_records: U32,
    model_bytes: U16,
    version_bytes: U16,
}

/// The most bytes of a model's name and of its weights version, in UTF-8.
pub(crate) const MAX_NAME_BYTES: usize = 512;

impl ModelIdentity {
    /// One copy of the model file's superblock.
    pub(crate) fn write(&self, page: &mut [u8]) {
        let body = ModelPage {
            preamble: Preamble::new(MODEL_MAGIC, self.uuid),
            fingerprint: self.fingerprint,
            geometry: self.geometry.map(U32::new),
            segment_bytes: U64::new(self.layout.segment_bytes),
            max_records: U32::new(self.layout.max_records),
            model_bytes: U16::new(self.model.len() as u16),
            version_bytes: U16::new(self.weights_version.len() as u16),
        };
        let bytes = [body.as_bytes(), self.model.as_bytes(), self.weights_version.as_bytes()].concat();
        seal_page(&bytes, page);
    }

    pub(crate) fn read(copies: &[u8]) -> Superblock<Self> {
        first_valid(copies, MODEL_MAGIC, |page| {
            let (body, rest) = ModelPage::read_from_prefix(page).ok()?;
            let (model_end, version_bytes) = (body.model_bytes.get() as usize, body.version_bytes.get() as usize);
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
            Some(Self {
                uuid: body.preamble.uuid,
                fingerprint: body.fingerprint,
                geometry: body.geometry.map(|w| w.get()),
                layout: SegmentLayout { segment_bytes: body.segment_bytes.get(), max_records: body.max_records.get() },
                model: text(rest.get(..model_end)?)?,
                weights_version: text(rest.get(model_end..model_end + version_bytes)?)?,
            })
        })
    }
}

/// What a calibration found, of one model's file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Calibration {
    pub(crate) uuid: Id,
    pub(crate) fingerprint: Id,
    /// By plane.
    pub(crate) bounds: Vec<f32>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CalibrationPage {
    preamble: Preamble,
    fingerprint: Id,
    planes: U32,
}

impl Calibration {
    /// The most planes that a page has room for.
    pub(crate) const MOST: usize = (PAGE - 8 - size_of::<CalibrationPage>()) / 4;

    /// One copy of it.
    pub(crate) fn write(&self, page: &mut [u8]) {
        let body = CalibrationPage {
            preamble: Preamble::new(CALIBRATION_MAGIC, self.uuid),
            fingerprint: self.fingerprint,
            planes: U32::new(self.bounds.len() as u32),
        };
        let bounds = self.bounds.iter().flat_map(|bound| bound.to_le_bytes());
        seal_page(&body.as_bytes().iter().copied().chain(bounds).collect::<Vec<u8>>(), page);
    }

    pub(crate) fn read(copies: &[u8]) -> Superblock<Self> {
        first_valid(copies, CALIBRATION_MAGIC, |page| {
            let (body, rest) = CalibrationPage::read_from_prefix(page).ok()?;
            let (bounds, _) = rest.get(..4 * body.planes.get() as usize)?.as_chunks::<4>();
            let bounds = bounds.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            Some(Self { uuid: body.preamble.uuid, fingerprint: body.fingerprint, bounds })
        })
    }
}

/// How a segment is divided: a header page, records, and room for the footer at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentLayout {
    pub(crate) segment_bytes: u64,
    pub(crate) max_records: u32,
}

impl SegmentLayout {
    /// The layout for records of a geometry; encoded records may be down to an eighth of the plain ones.
    pub(crate) fn new(geometry: &Geometry, segment_bytes: u64) -> Self {
        let smallest = (geometry.record_bytes() as u64 / 8).max(PAGE as u64);
        Self { segment_bytes, max_records: (segment_bytes / smallest) as u32 }
    }

    pub(crate) fn footer_bytes(&self) -> u64 {
        let entries = self.max_records as usize * size_of::<FooterEntry>();
        (size_of::<FooterHead>() + entries).next_multiple_of(PAGE) as u64
    }

    /// Where records end and the footer begins.
    pub(crate) fn footer_offset(&self) -> u64 {
        self.segment_bytes.saturating_sub(self.footer_bytes())
    }

    /// Where the first record of a segment begins.
    pub(crate) const RECORDS_OFFSET: u64 = PAGE as u64;

    /// Records of so many bytes that a segment has room for.
    pub(crate) fn room_for(&self, record_bytes: usize) -> u64 {
        let bytes = self.footer_offset().saturating_sub(Self::RECORDS_OFFSET);
        (bytes / record_bytes as u64).min(u64::from(self.max_records))
    }
}

/// Which life of which segment of which model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentIdentity {
    pub(crate) uuid: Id,
    pub(crate) fingerprint: Id,
    pub(crate) epoch: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SegmentPage {
    preamble: Preamble,
    fingerprint: Id,
    epoch: U64,
    index: U64,
    opened_s: U64,
}

impl SegmentIdentity {
    /// The header page of segment `index`, opened so many seconds after 1970: for people, nothing depends on it.
    pub(crate) fn write(&self, index: u64, opened_s: u64, page: &mut [u8]) {
        let body = SegmentPage {
            preamble: Preamble::new(SEGMENT_MAGIC, self.uuid),
            fingerprint: self.fingerprint,
            epoch: U64::new(self.epoch),
            index: U64::new(index),
            opened_s: U64::new(opened_s),
        };
        seal_page(body.as_bytes(), page);
    }

    /// Reads the header of segment `index` of a model, and when it was opened; `None` if it is not one.
    pub(crate) fn read(page: &[u8], uuid: Id, fingerprint: Id, index: u64) -> Option<(Self, u64)> {
        if !page_is_whole(page) {
            return None;
        }
        let (body, _) = SegmentPage::read_from_prefix(page).ok()?;
        let ours = body.preamble.as_bytes() == Preamble::new(SEGMENT_MAGIC, uuid).as_bytes()
            && body.fingerprint == fingerprint
            && body.index.get() == index;
        ours.then(|| (Self { uuid, fingerprint, epoch: body.epoch.get() }, body.opened_s.get()))
    }
}

/// What a record says of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordIdentity {
    pub(crate) hash: Sealed,
    /// For the first block of a sequence, its namespace: the seed in its epoch.
    pub(crate) parent: Sealed,
    pub(crate) depth: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RecordHead {
    magic: [u8; 4],
    version: U16,
    codec: U16,
    uuid: Id,
    fingerprint: Id,
    epoch: U64,
    hash: Sealed,
    parent: Sealed,
    depth: U32,
    block_tokens: U32,
    payload_offset: U32,
    dtype: U32,
    payload_bytes: U64,
    record_bytes: U64,
    body_checksum: U64,
    keys: U32,
    values: U32,
    raw_layers: [U32; 2],
    reserved: [u8; 112],
    head_checksum: U64,
}

const _: () = assert!(size_of::<RecordHead>() == RECORD_HEADER_BYTES);

/// How a record's payload is encoded, and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    /// `None`: as it is.
    pub(crate) scheme: Option<Scheme>,
    pub(crate) payload_bytes: usize,
}

impl Form {
    /// As it is.
    pub(crate) fn plain(geometry: &Geometry) -> Self {
        Self { scheme: None, payload_bytes: geometry.block_bytes() }
    }

    /// The form that a layout gives a block of this depth.
    pub(crate) fn encoded(layout: &Layout, depth: u32) -> Self {
        Self { scheme: Some(*layout.scheme()), payload_bytes: layout.bytes_of(depth == 0) }
    }
}

/// The header of a record, given all that follows it but the padding.
pub(crate) fn record_head(
    body: &[u8],
    geometry: &Geometry,
    form: &Form,
    segment: &SegmentIdentity,
    block: &RecordIdentity,
) -> [u8; RECORD_HEADER_BYTES] {
    let word = |of: fn(&Scheme) -> Granularity| U32::new(form.scheme.as_ref().map_or(0, |scheme| of(scheme).word()));
    let mut head = RecordHead {
        magic: RECORD_MAGIC,
        version: U16::new(FORMAT_VERSION),
        codec: U16::new(form.scheme.map_or(Codec::None, |scheme| scheme.codec) as u16),
        uuid: segment.uuid,
        fingerprint: segment.fingerprint,
        epoch: U64::new(segment.epoch),
        hash: block.hash,
        parent: block.parent,
        depth: U32::new(block.depth),
        block_tokens: U32::new(geometry.block_tokens),
        payload_offset: U32::new(geometry.payload_offset() as u32),
        dtype: U32::new(geometry.dtype as u32),
        payload_bytes: U64::new(form.payload_bytes as u64),
        record_bytes: U64::new(geometry.record_bytes_of(form.payload_bytes) as u64),
        body_checksum: U64::new(crc(body)),
        keys: word(|scheme| scheme.keys),
        values: word(|scheme| scheme.values),
        raw_layers: form.scheme.map_or([0; 2], |scheme| scheme.raw_layers).map(U32::new),
        reserved: [0; 112],
        head_checksum: U64::new(0),
    };
    head.head_checksum = U64::new(crc(&head.as_bytes()[..RECORD_HEADER_BYTES - 8]));
    zerocopy::transmute!(head)
}

/// Checks a record's header alone and returns what it names, and how.
pub(crate) fn read_record_head(
    bytes: &[u8],
    geometry: &Geometry,
    segment: &SegmentIdentity,
) -> Option<(RecordIdentity, Form)> {
    let (head, _) = RecordHead::read_from_prefix(bytes).ok()?;
    if head.magic != RECORD_MAGIC {
        return None;
    }
    let whole = head.head_checksum.get() == crc(&head.as_bytes()[..RECORD_HEADER_BYTES - 8]);
    let payload_bytes = usize::try_from(head.payload_bytes.get()).ok()?;
    let scheme = match Codec::of_id(head.codec.get())? {
        Codec::None => None,
        codec => Some(Scheme {
            codec,
            keys: Granularity::of_word(head.keys.get())?,
            values: Granularity::of_word(head.values.get())?,
            clip: None,
            raw_layers: head.raw_layers.map(|layers| layers.get()),
        }),
    };
    // An encoded payload is shorter: otherwise it is not encoded.
    let plain = geometry.block_bytes();
    let ours = head.version.get() == FORMAT_VERSION
        && (if scheme.is_some() { payload_bytes < plain } else { payload_bytes == plain })
        && head.uuid == segment.uuid
        && head.fingerprint == segment.fingerprint
        && head.epoch.get() == segment.epoch
        && head.block_tokens.get() == geometry.block_tokens
        && head.dtype.get() == geometry.dtype as u32
        && head.payload_offset.get() as usize == geometry.payload_offset()
        && head.record_bytes.get() == geometry.record_bytes_of(payload_bytes.min(plain)) as u64;
    let block = RecordIdentity { hash: head.hash, parent: head.parent, depth: head.depth.get() };
    (whole && ours).then_some((block, Form { scheme, payload_bytes }))
}

/// Checks a whole record, body included.
pub(crate) fn read_record(
    record: &[u8],
    geometry: &Geometry,
    segment: &SegmentIdentity,
) -> Option<(RecordIdentity, Form)> {
    let (block, form) = read_record_head(record, geometry, segment)?;
    let (head, _) = RecordHead::read_from_prefix(record).ok()?;
    let body = record.get(RECORD_HEADER_BYTES..geometry.payload_offset() + form.payload_bytes)?;
    (head.body_checksum.get() == crc(body)).then_some((block, form))
}

/// The token ids of a record or slot, given what follows its header.
pub(crate) fn tokens_of<'a>(body: &'a [u8], geometry: &Geometry) -> impl Iterator<Item = u32> + 'a {
    body[..4 * geometry.block_tokens as usize].chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Writes the token ids of a record or slot, given what lies between its header and its payload.
pub(crate) fn write_tokens(room: &mut [u8], tokens: &[u32]) {
    let (ids, rest) = room.split_at_mut(4 * tokens.len());
    for (bytes, token) in ids.chunks_exact_mut(4).zip(tokens) {
        bytes.copy_from_slice(&token.to_le_bytes());
    }
    rest.fill(0);
}

/// One record as the footer lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) block: RecordIdentity,
    /// Offset within the segment.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FooterHead {
    preamble: Preamble,
    fingerprint: Id,
    epoch: U64,
    count: U64,
    checksum: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct FooterEntry {
    hash: Sealed,
    parent: Sealed,
    depth: U32,
    pages: U32,
    offset: U64,
}

/// The footer of a full segment, padded to whole pages.
pub(crate) fn write_footer(entries: &[Entry], segment: &SegmentIdentity, layout: &SegmentLayout) -> Vec<u8> {
    let mut bytes = vec![0u8; layout.footer_bytes() as usize];
    let (head_bytes, mut rest) = bytes.split_at_mut(size_of::<FooterHead>());
    for entry in entries {
        let on_disk = FooterEntry {
            hash: entry.block.hash,
            parent: entry.block.parent,
            depth: U32::new(entry.block.depth),
            pages: U32::new((entry.bytes / PAGE as u64) as u32),
            offset: U64::new(entry.offset),
        };
        let (place, next) = rest.split_at_mut(size_of::<FooterEntry>());
        place.copy_from_slice(on_disk.as_bytes());
        rest = next;
    }
    let mut head = FooterHead {
        preamble: Preamble::new(FOOTER_MAGIC, segment.uuid),
        fingerprint: segment.fingerprint,
        epoch: U64::new(segment.epoch),
        count: U64::new(entries.len() as u64),
        checksum: U64::new(0),
    };
    head_bytes.copy_from_slice(head.as_bytes());
    head.checksum = U64::new(crc(&bytes));
    bytes[..size_of::<FooterHead>()].copy_from_slice(head.as_bytes());
    bytes
}

/// The entries of a footer; `None` if it is not that of this life of the segment.
pub(crate) fn read_footer(bytes: &[u8], segment: &SegmentIdentity, layout: &SegmentLayout) -> Option<Vec<Entry>> {
    let (mut head, rest) = FooterHead::read_from_prefix(bytes).ok()?;
    let ours = head.preamble.as_bytes() == Preamble::new(FOOTER_MAGIC, segment.uuid).as_bytes()
        && head.fingerprint == segment.fingerprint
        && head.epoch.get() == segment.epoch
        && head.count.get() <= u64::from(layout.max_records);
    if !ours {
        return None;
    }
    let stored = head.checksum.get();
    head.checksum = U64::new(0);
    let mut digest = crc_fast::Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(head.as_bytes());
    digest.update(rest);
    if digest.finalize() != stored {
        return None;
    }
    let (list, _) = <[FooterEntry]>::ref_from_prefix_with_elems(rest, head.count.get() as usize).ok()?;
    let entries = list.iter().map(|e| Entry {
        block: RecordIdentity { hash: e.hash, parent: e.parent, depth: e.depth.get() },
        offset: e.offset.get(),
        bytes: u64::from(e.pages.get()) * PAGE as u64,
    });
    let inside = |e: &Entry| {
        e.offset >= SegmentLayout::RECORDS_OFFSET
            && e.offset.is_multiple_of(PAGE as u64)
            && e.offset.saturating_add(e.bytes) <= layout.footer_offset()
    };
    let entries: Vec<Entry> = entries.collect();
    entries.iter().all(inside).then_some(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Dtype;
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry { layers: 2, planes: 2, kv_heads: 1, head_dim: 16, dtype: Dtype::Fp16, block_tokens: 4 }
    }

    fn segment() -> SegmentIdentity {
        SegmentIdentity { uuid: [1; 16], fingerprint: [2; 16], epoch: 7 }
    }

    fn record() -> Vec<u8> {
        let g = geometry();
        let mut bytes: Vec<u8> = (0..g.record_bytes()).map(|i| (i * 7) as u8).collect();
        write_tokens(&mut bytes[RECORD_HEADER_BYTES..g.payload_offset()], &[1, 2, 3, u32::MAX]);
        let block = RecordIdentity { hash: [3; 16], parent: [4; 16], depth: 5 };
        let body = RECORD_HEADER_BYTES..g.payload_offset() + g.block_bytes();
        let head = record_head(&bytes[body], &g, &Form::plain(&g), &segment(), &block);
        bytes[..RECORD_HEADER_BYTES].copy_from_slice(&head);
        bytes
    }

    proptest! {
        #[test]
        fn a_record_with_any_changed_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let g = geometry();
            let mut bytes = record();
            let end = g.payload_offset() + g.block_bytes();
            bytes[at.index(end)] ^= 1 << bit;
            prop_assert_eq!(read_record(&bytes, &g, &segment()), None);
        }

        #[test]
        fn parsers_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            let layout = SegmentLayout { segment_bytes: 1 << 20, max_records: 16 };
            prop_assert_eq!(read_record(&bytes, &geometry(), &segment()), None);
            prop_assert_eq!(read_footer(&bytes, &segment(), &layout), None);
            prop_assert_eq!(SegmentIdentity::read(&bytes, [1; 16], [2; 16], 0), None);
            prop_assert_eq!(StoreIdentity::read(&bytes), Superblock::Damaged);
            prop_assert_eq!(ModelIdentity::read(&bytes), Superblock::Damaged);
        }

        #[test]
        fn a_footer_with_any_changed_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let layout = SegmentLayout { segment_bytes: 1 << 20, max_records: 16 };
            let block = RecordIdentity { hash: [3; 16], parent: [4; 16], depth: 5 };
            let entries = [Entry { block, offset: 4096, bytes: 8192 }, Entry { block, offset: 12288, bytes: 8192 }];
            let mut bytes = write_footer(&entries, &segment(), &layout);
            prop_assert_eq!(read_footer(&bytes, &segment(), &layout), Some(entries.to_vec()));
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(read_footer(&bytes, &segment(), &layout), None);
        }
    }

    #[test]
    fn a_record_tells_how_it_is_encoded_and_one_of_an_unknown_codec_is_refused() {
        let g = Geometry { layers: 2, planes: 2, kv_heads: 2, head_dim: 64, dtype: Dtype::Fp16, block_tokens: 16 };
        let scheme = Scheme { raw_layers: [1, 0], ..Scheme::new(Codec::K8V4, &g) };
        let layout = Layout::new(scheme, &g).expect("it fits");
        let block = RecordIdentity { hash: [3; 16], parent: [4; 16], depth: 5 };
        let form = Form::encoded(&layout, block.depth);
        let mut bytes = vec![7; g.record_bytes_of(layout.bytes())];
        let body = RECORD_HEADER_BYTES..g.payload_offset() + layout.bytes();
        let head = record_head(&bytes[body], &g, &form, &segment(), &block);
        bytes[..RECORD_HEADER_BYTES].copy_from_slice(&head);
        assert_eq!(read_record(&bytes, &g, &segment()), Some((block, form)));
        for (at, value) in [(6, 6u8), (6, 0), (120, 4), (124, 9), (97, 0x60)] {
            let mut other = bytes.clone();
            other[at] = value;
            let sum = crc(&other[..RECORD_HEADER_BYTES - 8]);
            other[RECORD_HEADER_BYTES - 8..RECORD_HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
            assert_eq!(read_record_head(&other, &g, &segment()), None, "byte {at} is {value}");
        }
    }

    #[test]
    fn a_record_of_another_life_or_place_is_refused() {
        let (g, bytes) = (geometry(), record());
        let block = RecordIdentity { hash: [3; 16], parent: [4; 16], depth: 5 };
        assert_eq!(read_record(&bytes, &g, &segment()), Some((block, Form::plain(&g))));
        for other in [
            SegmentIdentity { epoch: 8, ..segment() },
            SegmentIdentity { uuid: [9; 16], ..segment() },
            SegmentIdentity { fingerprint: [9; 16], ..segment() },
        ] {
            assert_eq!(read_record(&bytes, &g, &other), None);
        }
        assert_eq!(read_record(&bytes, &Geometry { head_dim: 32, ..g }, &segment()), None);
        assert_eq!(read_record(&bytes[..g.record_bytes() - PAGE], &g, &segment()), None);
    }

    #[test]
    fn the_second_superblock_stands_in_for_a_damaged_first() {
        let identity = StoreIdentity { uuid: [5; 16], secret_check: [6; 16] };
        let mut copies = vec![0u8; 2 * PAGE];
        identity.write(&mut copies[PAGE..]);
        assert_eq!(StoreIdentity::read(&copies), Superblock::Valid(identity));
        copies[PAGE + 4] = 9;
        assert_eq!(StoreIdentity::read(&copies), Superblock::Damaged);
        let sum = crc(&copies[PAGE..2 * PAGE - 8]);
        copies[2 * PAGE - 8..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(StoreIdentity::read(&copies), Superblock::OtherVersion(9));
    }
}
