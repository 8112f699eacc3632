//! A store directory as it is: what is in it, and whether every byte is what it was.
//!
//! Nothing is written, created or locked, and no secret is needed: a directory of another machine can be looked at, on a
//! read-only file system, and one that is in use. There, segments come and go meanwhile; what was reused between two looks
//! is not told of.

use super::io::{Access, Io};
use super::record::{self, Id, ModelIdentity, PAGE, SEGMENTS_OFFSET, StoreIdentity, Superblock};
use super::{Buffer, MAX_SEGMENTS, ModelFile, Recovered, model_files};
use crate::block::{Geometry, Sealed};
use crate::error::{Error, ErrorKind, Result};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// A superblock that claims longer segments is damaged.
const MOST_SEGMENT_BYTES: u64 = 1 << 40;

/// What lies in a directory.
#[derive(Debug)]
pub struct Archive {
    /// Names the store.
    pub uuid: Id,
    /// Models whose files can be read.
    pub models: Vec<ArchivedModel>,
    /// Files that are named as a model's, and are none.
    pub damaged: Vec<PathBuf>,
    /// Whether a process has it open.
    pub in_use: bool,
}

/// One model's file.
#[derive(Debug)]
pub struct ArchivedModel {
    /// As it was registered.
    pub name: String,
    /// As it was registered.
    pub weights_version: String,
    /// Shape of its blocks.
    pub geometry: Geometry,
    /// Bytes that the file system has allocated to it.
    pub file_bytes: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// Segments without a footer: they were being filled when the store ended.
    pub torn: usize,
    /// Blocks, each once.
    pub blocks: usize,
    /// Of them those that continue no other: as many prompts begin differently.
    pub prefixes: usize,
    /// Blocks of the longest prefix.
    pub longest: u32,
    /// Bytes of their records.
    pub record_bytes: u64,
    /// When its oldest segment was opened, and its newest, in seconds since 1970 by the clock of then.
    pub written: Option<(u64, u64)>,
    file: ModelFile,
    segments: Vec<(u32, Recovered)>,
}

/// What checking a segment found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Records whose every byte is right.
    pub records: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Where others lie in the file, and what is wrong.
    pub bad: Vec<(u64, &'static str)>,
}

impl Archive {
    /// Looks at a directory.
    ///
    /// # Errors
    /// It is no store of this version, or cannot be read.
    pub fn open(directory: &Path, io: &dyn Io) -> Result<Self> {
        let path = directory.join("store");
        let shown = directory.display();
        let file = io.open(&path, Access::Read).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::new(
                ErrorKind::Format,
                format!("{shown} is no directory of a store: there is no file `store` in it"),
            ),
            _ => Error::io(format!("cannot read {}", path.display()), e),
        })?;
        let failed = |path: &Path, e| Error::io(format!("cannot read {}", path.display()), e);
        let mut pages = Buffer::new(2 * PAGE)?;
        let length = file.read_at(&mut pages, 0).map_err(|e| failed(&path, e))?;
        let uuid = match StoreIdentity::read(&pages[..length]) {
            Superblock::Valid(identity) => identity.uuid,
            Superblock::OtherVersion(version) => {
                let expected = record::FORMAT_VERSION;
                let message =
                    format!("{shown} has format version {version}, expected {expected}: use the release that wrote it");
                return Err(Error::new(ErrorKind::Format, message));
            }
            Superblock::Damaged => {
                let message = format!("{} is no superblock, or both its copies are damaged", path.display());
                return Err(Error::new(ErrorKind::Format, message));
            }
        };
        let mut archive =
            Self { uuid, models: Vec::new(), damaged: Vec::new(), in_use: super::io::is_locked(directory) };
        let mut paths: Vec<PathBuf> = model_files(directory).map_err(|e| failed(directory, e))?.collect();
        paths.sort();
        for path in paths {
            match ArchivedModel::read(&path, uuid, io).map_err(|e| failed(&path, e))? {
                Some(model) => archive.models.push(model),
                None => archive.damaged.push(path),
            }
        }
        archive.models.sort_by(|a, b| (&a.name, &a.weights_version).cmp(&(&b.name, &b.weights_version)));
        Ok(archive)
    }
}

impl ArchivedModel {
    // `None`: it is not one.
    fn read(path: &Path, uuid: Id, io: &dyn Io) -> std::io::Result<Option<Self>> {
        let file = io.open(path, Access::Read)?;
        let mut pages = Buffer::new(2 * PAGE).map_err(std::io::Error::other)?;
        let length = file.read_at(&mut pages, 0)?;
        let Superblock::Valid(identity) = ModelIdentity::read(&pages[..length]) else { return Ok(None) };
        let ModelIdentity { fingerprint, layout, model, weights_version, .. } = identity;
        let Some(geometry) = Geometry::of_words(identity.geometry) else { return Ok(None) };
        let (file_bytes, all) = (file.allocated()?, file.len()?);
        let plausible = layout.segment_bytes.is_multiple_of(PAGE as u64)
            && layout.segment_bytes <= MOST_SEGMENT_BYTES
            && layout.room_for(geometry.record_bytes()) > 0
            && all <= SEGMENTS_OFFSET + MAX_SEGMENTS * layout.segment_bytes;
        if identity.uuid != uuid || !plausible {
            return Ok(None);
        }
        let file = ModelFile::new(file, path.to_owned(), uuid, fingerprint, geometry, layout);
        let found = file.scan()?.into_iter().enumerate();
        let segments: Vec<(u32, Recovered)> = found.filter_map(|(n, found)| Some((n as u32, found?))).collect();
        let mut known: HashSet<Sealed> = HashSet::new();
        let mut model = Self {
            name: model,
            weights_version,
            geometry,
            file_bytes,
            segment_bytes: layout.segment_bytes,
            torn: segments.iter().filter(|(_, segment)| !segment.sealed).count(),
            blocks: 0,
            prefixes: 0,
            longest: 0,
            record_bytes: 0,
            written: None,
            file,
            segments: Vec::new(),
        };
        for entry in segments.iter().flat_map(|(_, segment)| &segment.entries) {
            if known.insert(entry.block.hash) {
                model.blocks += 1;
                model.prefixes += usize::from(entry.block.depth == 0);
                model.longest = model.longest.max(entry.block.depth.saturating_add(1));
                model.record_bytes += entry.bytes;
            }
        }
        let times = || segments.iter().map(|(_, segment)| segment.opened_s).filter(|&time| time > 0);
        model.written = times().min().zip(times().max());
        model.segments = segments;
        Ok(Some(model))
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Segments that hold records: where in the file each begins.
    pub fn places(&self) -> Vec<u64> {
        self.segments.iter().map(|(index, _)| self.file.offset(*index)).collect()
    }

    /// Reads every record of a segment, and checks all its bytes.
    ///
    /// # Errors
    /// There is no such segment.
    pub fn verify(&self, segment: usize) -> Result<Verified> {
        let Some((index, known)) = self.segments.get(segment) else {
            let message = format!("segment {segment} of {}, expected less than {}", self.name, self.segments.len());
            return Err(crate::error::input(message));
        };
        let identity = self.file.identity(known.epoch);
        let mut verified = Verified::default();
        let mut buffer = Buffer::new(self.geometry.record_bytes())?;
        for entry in &known.entries {
            if entry.bytes > buffer.len() as u64 {
                verified.bad.push((
                    self.file.offset_of(super::Place { segment: *index, offset: entry.offset, pages: 0 }),
                    "it is longer than a block",
                ));
                continue;
            }
            let place =
                super::Place { segment: *index, offset: entry.offset, pages: (entry.bytes / PAGE as u64) as u32 };
            let wrong = match self.file.read_records(place, &mut buffer[..entry.bytes as usize]) {
                Err(_) => Some("it cannot be read"),
                Ok(length) => match record::read_record(&buffer[..length], &self.geometry, &identity) {
                    None => Some("its checksum or its header is wrong"),
                    Some((block, _)) if block != entry.block => Some("it is another block than the footer says"),
                    Some(_) => None,
                },
            };
            match wrong {
                None => {
                    verified.records += 1;
                    verified.bytes += entry.bytes;
                }
                Some(wrong) => verified.bad.push((self.file.offset_of(place), wrong)),
            }
        }
        // Reused meanwhile: what was read is of another life.
        let now = self.file.epoch_of(*index).ok().flatten();
        if !verified.bad.is_empty() && now != Some(known.epoch) && now.is_some() {
            verified.bad.clear();
        }
        Ok(verified)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Dtype;
    use crate::ssd::io::FileIo;
    use crate::ssd::record::{SegmentIdentity, SegmentLayout};

    #[test]
    fn segments_longer_than_their_file_end_with_it_and_such_as_hold_nothing_are_damage() {
        let directory = tempfile::tempdir().expect("a directory");
        let geometry =
            Geometry { layers: 1, planes: 2, kv_heads: 1, head_dim: 16, dtype: Dtype::Fp16, block_tokens: 8 };
        let (uuid, fingerprint) = ([1; 16], [2; 16]);
        let mut page = vec![0; PAGE];
        StoreIdentity { uuid, secret_check: [3; 16] }.write(&mut page);
        std::fs::write(directory.path().join("store"), &page).expect("writable");
        let most = u64::MAX - 4095;
        for (segment_bytes, max_records, damaged) in [
            (1 << 40, 100, false),
            (1 << 40, 0, true),
            (1 << 62, 100, true),
            (most, 100, true),
            (7, 100, true),
            (0, 100, true),
        ] {
            let mut bytes = vec![0; SEGMENTS_OFFSET as usize + 16 * PAGE];
            let layout = SegmentLayout { segment_bytes, max_records };
            let (model, weights_version) = ("m".into(), String::new());
            ModelIdentity { uuid, fingerprint, geometry: geometry.words(), layout, model, weights_version }
                .write(&mut bytes[..PAGE]);
            let header = SegmentIdentity { uuid, fingerprint, epoch: 1 };
            header.write(0, 0, &mut bytes[SEGMENTS_OFFSET as usize..][..PAGE]);
            std::fs::write(directory.path().join("02".repeat(16) + ".kv"), &bytes).expect("writable");
            let archive = Archive::open(directory.path(), &FileIo::default()).expect("it is a store");
            assert_eq!((archive.models.len(), archive.damaged.len()), (usize::from(!damaged), usize::from(damaged)));
            assert!(archive.models.iter().all(|model| model.blocks == 0));
        }
    }
}
