//! What the fuzz targets call: bytes that nobody trusts, with checksums that are right, go through all that reads them.
//!
//! Compiled under `cfg(fuzzing)` alone, by `make fuzz`. A checksum would keep every input out, so it is put right first: what
//! is tested is all that stands behind it. No input may panic, touch memory that is not its own, or ask for more than the
//! structure can hold.

use crate::block::{Dtype, Geometry, RECORD_HEADER_BYTES, Sealed};
use crate::codec::Layout;
use crate::copy::{KvView, PlaneView};
use crate::evict::Kind;
use crate::ssd::record::{
    Calibration, Entry, Form, ModelIdentity, PAGE, RecordIdentity, SEGMENTS_OFFSET, SegmentIdentity, SegmentLayout,
    StoreIdentity, Superblock, read_footer, read_record, record_head, write_footer,
};
use crate::{Archive, Engine, FileIo, ModelSpec, Options, SsdOptions, Store, WritePolicy};
use crc_fast::{CrcAlgorithm, checksum};
use std::path::Path;
use std::sync::OnceLock;

const SEGMENT: SegmentIdentity = SegmentIdentity { uuid: [1; 16], fingerprint: [2; 16], epoch: 7 };

fn geometry(dtype: Dtype) -> Geometry {
    Geometry { layers: 2, planes: 2, kv_heads: 2, head_dim: 16, dtype, block_tokens: 8 }
}

// Puts the checksum at the end of these bytes right.
fn seal(bytes: &mut [u8]) {
    let (body, sum) = bytes.split_at_mut(bytes.len() - 8);
    sum.copy_from_slice(&checksum(CrcAlgorithm::Crc64Nvme, body).to_le_bytes());
}

// Three bytes of data say where, one says what.
fn patch(bytes: &mut [u8], data: &[u8]) {
    for change in data.chunks_exact(4) {
        let at = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize;
        bytes[at % bytes.len()] = change[3];
    }
}

/// Superblocks, segment headers, calibrations and footers. What is read is written, and read again as the same.
pub fn structures(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let mut pages = vec![0u8; 2 * PAGE];
    let honest = ModelIdentity {
        uuid: [1; 16],
        fingerprint: [2; 16],
        geometry: geometry(Dtype::Fp16).words(),
        layout: SegmentLayout::new(&geometry(Dtype::Fp16), 64 << 10),
        model: "model".into(),
        weights_version: "version".into(),
    };
    let again = |write: &dyn Fn(&mut [u8])| {
        let mut page = vec![0u8; PAGE];
        write(&mut page);
        page
    };
    match kind % 5 {
        0 => {
            pages.chunks_mut(PAGE).for_each(|page| honest.write(page));
            patch(&mut pages, data);
            pages.chunks_mut(PAGE).for_each(seal);
            if let Superblock::Valid(found) = ModelIdentity::read(&pages) {
                let page = again(&|page| found.write(page));
                assert_eq!(ModelIdentity::read(&page), Superblock::Valid(found));
            }
        }
        1 => {
            let honest = StoreIdentity { uuid: [1; 16], secret_check: [2; 16] };
            pages.chunks_mut(PAGE).for_each(|page| honest.write(page));
            patch(&mut pages, data);
            pages.chunks_mut(PAGE).for_each(seal);
            if let Superblock::Valid(found) = StoreIdentity::read(&pages) {
                assert_eq!(StoreIdentity::read(&again(&|page| found.write(page))), Superblock::Valid(found));
            }
        }
        2 => {
            let honest = Calibration { uuid: [1; 16], fingerprint: [2; 16], bounds: vec![1.5; 4] };
            pages.chunks_mut(PAGE).for_each(|page| honest.write(page));
            patch(&mut pages, data);
            pages.chunks_mut(PAGE).for_each(seal);
            if let Superblock::Valid(found) = Calibration::read(&pages) {
                assert!(found.bounds.len() <= Calibration::MOST);
            }
        }
        3 => {
            SEGMENT.write(3, 9, &mut pages[..PAGE]);
            patch(&mut pages[..PAGE], data);
            seal(&mut pages[..PAGE]);
            if let Some((found, opened_s)) = SegmentIdentity::read(&pages[..PAGE], SEGMENT.uuid, SEGMENT.fingerprint, 3)
            {
                let page = again(&|page| found.write(3, opened_s, page));
                assert_eq!(SegmentIdentity::read(&page, SEGMENT.uuid, SEGMENT.fingerprint, 3), Some((found, opened_s)));
            }
        }
        _ => footer(data),
    }
}

fn footer(data: &[u8]) {
    let layout = SegmentLayout::new(&geometry(Dtype::Fp16), 256 << 10);
    let entry = |n: u64| {
        let block =
            RecordIdentity { hash: Sealed::from([n as u8; 16]), parent: Sealed::from([9; 16]), depth: n as u32 };
        Entry { block, offset: PAGE as u64 * (1 + n), bytes: PAGE as u64 }
    };
    let entries: Vec<Entry> = (0..5).map(entry).collect();
    let mut bytes = write_footer(&entries, &SEGMENT, &layout);
    patch(&mut bytes, data);
    bytes[56..64].fill(0);
    let sum = checksum(CrcAlgorithm::Crc64Nvme, &bytes).to_le_bytes();
    bytes[56..64].copy_from_slice(&sum);
    if let Some(found) = read_footer(&bytes, &SEGMENT, &layout) {
        assert!(found.len() <= layout.max_records as usize);
        assert!(found.iter().all(|e| e.offset + e.bytes <= layout.footer_offset()));
        assert_eq!(read_footer(&write_footer(&found, &SEGMENT, &layout), &SEGMENT, &layout), Some(found));
    }
}

/// A record whose header and payload are anything: it is decoded as far as it is one.
pub fn record(data: &[u8]) {
    let Some((&[dtype, first], data)) = data.split_first_chunk() else { return };
    let dtypes = [Dtype::Fp32, Dtype::Fp16, Dtype::Bf16, Dtype::Uint8];
    let geometry = geometry(dtypes[usize::from(dtype) % dtypes.len()]);
    let block =
        RecordIdentity { hash: Sealed::from([3; 16]), parent: Sealed::from([4; 16]), depth: u32::from(first % 2 == 0) };
    let mut bytes = vec![0u8; geometry.record_bytes()];
    let head = record_head(&bytes[RECORD_HEADER_BYTES..], &geometry, &Form::plain(&geometry), &SEGMENT, &block);
    bytes[..RECORD_HEADER_BYTES].copy_from_slice(&head);
    let (of_head, of_body) = data.split_at(data.len().min(64));
    patch(&mut bytes[..RECORD_HEADER_BYTES], of_head);
    let room = geometry.payload_offset()..geometry.payload_offset() + geometry.block_bytes();
    bytes[room.clone()].iter_mut().zip(of_body.iter().cycle()).for_each(|(byte, &data)| *byte = data);
    // Both checksums, of as much as the header claims.
    let claimed = u64::from_le_bytes(bytes[96..104].try_into().unwrap_or_default()).min(room.len() as u64) as usize;
    let sum = checksum(CrcAlgorithm::Crc64Nvme, &bytes[RECORD_HEADER_BYTES..room.start + claimed]).to_le_bytes();
    bytes[112..120].copy_from_slice(&sum);
    seal(&mut bytes[..RECORD_HEADER_BYTES]);
    let Some((block, form)) = read_record(&bytes, &geometry, &SEGMENT) else { return };
    assert!(form.payload_bytes <= geometry.block_bytes());
    let Some(scheme) = form.scheme else { return };
    let Ok(layout) = Layout::new(scheme, &geometry) else { return };
    if Form::encoded(&layout, block.depth) == form {
        let mut payload = vec![0u8; geometry.block_bytes()];
        let encoded = &bytes[room.start..room.start + form.payload_bytes];
        layout.decode_payload(encoded, block.depth == 0, &mut payload);
    }
}

const CAPACITY: u64 = 1 << 20;

fn open(path: &Path) -> crate::Result<Store> {
    let path = path.to_owned();
    Store::open(Options {
        ram_capacity_bytes: 2 << 20,
        ssd: Some(SsdOptions { path, capacity_bytes: CAPACITY, segment_bytes: 64 << 10, engine: Engine::Pread }),
        eviction: Kind::Lru,
        policy: WritePolicy::WriteThrough,
        secret: Some("fuzz".into()),
        threads: 1,
        index_bytes: Some(1 << 20),
        stepped: true,
        gpu: None,
    })
}

/// Opens the directory, and puts and loads through it, once for each prompt; `None`: it is refused.
fn through(path: &Path) -> Option<()> {
    let geometry = geometry(Dtype::Fp16);
    let store = open(path).ok()?;
    let spec = ModelSpec { name: "model".into(), weights_version: String::new(), geometry };
    let model = store.register(spec).ok()?;
    let tokens: Vec<u32> = (0..32).collect();
    let mut kv = vec![0u8; tokens.len() * geometry.token_bytes()];
    let plane_bytes = kv.len() / geometry.plane_count();
    for prompt in 0..6u32 {
        let tokens: Vec<u32> = tokens.iter().map(|token| token + prompt * 1000).collect();
        let base = kv.as_mut_ptr();
        let plane = |p: usize| PlaneView {
            base: base.wrapping_add(p * plane_bytes),
            head_stride: (tokens.len() * geometry.row_bytes()) as isize,
            token_stride: geometry.row_bytes() as isize,
            page_stride: 0,
        };
        let planes = (0..geometry.plane_count()).map(plane).collect();
        // SAFETY: `kv` holds every row that the planes name, and outlives the view.
        let view = unsafe { KvView::new(planes, None, tokens.len()) }.ok()?;
        let lease = store.match_prefix(&model, &tokens, "", "").ok()?;
        lease.load(&view).ok()?;
        drop(lease);
        store.put(&model, &tokens, "", "", &view).ok()?;
    }
    store.close().ok()
}

/// A directory whose files were changed anywhere, checksums of its pages put right: it is looked at, verified and opened.
pub fn directory(data: &[u8]) {
    static WHOLE: OnceLock<(Vec<u8>, Vec<u8>, String)> = OnceLock::new();
    let folder = std::env::temp_dir().join(format!("stratakv-fuzz-{}", std::process::id()));
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap_or_default();
    let (store, model, name) = WHOLE.get_or_init(|| {
        through(&folder).unwrap_or_default();
        let names = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let name = names.filter_map(|name| name.into_string().ok()).find(|name| name.ends_with(".kv"));
        let name = name.unwrap_or_default();
        (read("store"), read(&name), name)
    });
    assert!(!store.is_empty() && !model.is_empty(), "the template was made");
    let (mut store, mut model) = (store.clone(), model.clone());
    for change in data.chunks_exact(5) {
        let (bytes, honest) =
            if change[0] & 7 == 0 { (&mut store, change[0] & 8 == 0) } else { (&mut model, change[0] & 8 == 0) };
        let at = u32::from_le_bytes([change[1], change[2], change[3], 0]) as usize;
        // Anywhere, in the superblocks and the calibration, or in the header of a segment.
        let at = match change[0] >> 4 & 3 {
            0 => at % (4 * PAGE),
            1 => SEGMENTS_OFFSET as usize + (at / PAGE << 16) + at % PAGE,
            _ => at,
        } % bytes.len();
        bytes[at] = change[4];
        let page = at / PAGE * PAGE;
        if honest && page + PAGE <= bytes.len() {
            seal(&mut bytes[page..page + PAGE]);
        }
    }
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).is_ok();
    assert!(write("store", &store) && write(name, &model), "there is room for the files");
    if let Ok(archive) = Archive::open(&folder, &FileIo::default()) {
        for model in &archive.models {
            for segment in 0..model.places().len() {
                drop(model.verify(segment));
            }
        }
    }
    through(&folder).unwrap_or_default();
}
