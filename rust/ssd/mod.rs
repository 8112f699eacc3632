//! The SSD tier: append-only segments, one file per model, in one exclusively locked directory.
//!
//! ```text
//! directory   lock  secret  store  epochs  <fingerprint>.kv ...
//! model file  superblock x2 | segment 0 | segment 1 | ...
//! segment     header page | record | record | ... | footer           empty ─▶ open ─▶ sealed ─▶ (reused or empty)
//! ```
//! A segment is preallocated whole, so a record that was promised a place gets it. The footer is the journal: recovery
//! reads headers and footers, and walks the records of a segment that has no valid footer. A segment is reused under a
//! new epoch, which invalidates every byte of its earlier life. What leaves is the segment that was written longest ago,
//! but for the blocks in it that were asked for since: those are written again.

pub(crate) mod archive;
pub(crate) mod epochs;
pub(crate) mod io;
pub(crate) mod notes;
pub(crate) mod queue;
pub(crate) mod record;
mod recover;
mod uring;

use crate::arena::Arena;
use crate::block::{BlockHash, Geometry, Secret};
use crate::codec::Layout;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Mutex};
use io::{Access, DirectoryLock, Engine, Io, IoFile};
use notes::{CONTROL_BYTES, Found, Note};
use queue::{Inline, Queue};
use record::{
    CALIBRATION_OFFSET, Calibration, Entry, Form, Id, ModelIdentity, PAGE, SEGMENTS_OFFSET, SegmentIdentity,
    SegmentLayout, StoreIdentity, Superblock,
};
pub(crate) use recover::Recovered;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A file that claims more segments than this is damaged.
pub(crate) const MAX_SEGMENTS: u64 = 1 << 20;

/// Buffers that are kept to be used again.
const SCRATCH_BYTES: usize = 64 << 20;

/// Settings of the SSD tier.
#[derive(Debug, Clone)]
pub struct SsdOptions {
    /// Directory of the store; created if absent.
    pub path: PathBuf,
    /// Cap on the bytes of all its files.
    pub capacity_bytes: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// What reads and writes.
    pub engine: Engine,
}

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u32,
    /// Offset within the segment.
    pub(crate) offset: u64,
    /// Its length, in pages.
    pub(crate) pages: u32,
}

impl Place {
    /// Its length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE as u64
    }

    /// Whether another record begins where it ends.
    pub(crate) fn is_before(&self, other: &Self) -> bool {
        self.segment == other.segment && self.offset + self.bytes() == other.offset
    }
}

/// An open store directory.
#[derive(Debug)]
pub(crate) struct Ssd {
    io: Arc<dyn Io>,
    directory: PathBuf,
    uuid: Id,
    capacity_bytes: u64,
    segment_bytes: u64,
    scratch: Mutex<Vec<Buffer>>,
    /// Bytes of what the notes say, in the order of [`Note`].
    notes: Mutex<[usize; 2]>,
    /// What the note of quotas said when the directory was opened.
    quotas: Found,
    lock: Mutex<Option<DirectoryLock>>,
}

/// An opened directory: its secret, and the namespaces that were dropped in it, how often.
pub(crate) type Opened = (Ssd, Secret, Vec<(BlockHash, u64)>);

impl Ssd {
    /// Takes the directory, creating it and its secret if they are new.
    pub(crate) fn open(options: &SsdOptions, io: Arc<dyn Io>, secret: Option<&str>) -> Result<Opened> {
        let directory = options.path.clone();
        let shown = directory.display();
        let unusable = |e| Error::io(format!("cannot use directory {shown}; make it writable or set ssd.path"), e);
        std::fs::create_dir_all(&directory).map_err(unusable)?;
        let lock = DirectoryLock::take(&directory).map_err(|e| match e.kind() {
            std::io::ErrorKind::WouldBlock => Error::new(
                ErrorKind::Locked,
                format!("directory {shown} is in use by another process; close it there or set another ssd.path"),
            ),
            _ => unusable(e),
        })?;
        let secret = match secret {
            Some(given) => Secret::new(given.as_bytes()),
            None => Secret::new(&own_secret(&directory).map_err(unusable)?),
        };
        let uuid = Self::identify(&directory, io.as_ref(), &secret)?;
        let epochs = Self::read_epochs(&directory, io.as_ref(), uuid)?;
        let quotas = Self::read_note(Note::Quotas, &directory, io.as_ref(), uuid)?;
        let ssd = Self {
            io,
            directory,
            uuid,
            capacity_bytes: options.capacity_bytes,
            segment_bytes: options.segment_bytes,
            scratch: Mutex::default(),
            notes: Mutex::new([epochs::length_of(epochs.len()), quotas.length()]),
            quotas,
            lock: Mutex::new(Some(lock)),
        };
        let epochs = epochs.into_iter().map(|(first, epoch)| (secret.unseal(first), epoch)).collect();
        Ok((ssd, secret, epochs))
    }

    // Reads the store's superblock, or writes it into a new directory.
    fn identify(directory: &Path, io: &dyn Io, secret: &Secret) -> Result<Id> {
        let path = directory.join("store");
        let shown = path.display();
        let failed = |e| Error::io(format!("cannot read or write {shown}"), e);
        let new = !path.exists();
        let file = io.open(&path, Access::Create).map_err(failed)?;
        let mut pages = Buffer::new(2 * PAGE)?;
        let length = file.read_at(&mut pages, 0).map_err(failed)?;
        let found = StoreIdentity::read(&pages);
        // A first write that was torn is made again: nothing hangs on it yet.
        let torn = || Ok(found == Superblock::Damaged && model_files(directory)?.next().is_none());
        if new || length == 0 || torn().map_err(failed)? {
            let mut uuid = [0; 16];
            getrandom::fill(&mut uuid).map_err(|e| failed(e.into()))?;
            let identity = StoreIdentity { uuid, secret_check: secret.check_value() };
            mend(file.as_ref(), 0, &mut pages, |page| identity.write(page)).map_err(failed)?;
            return Ok(uuid);
        }
        match found {
            Superblock::Valid(identity) if identity.secret_check == secret.check_value() => {
                mend(file.as_ref(), 0, &mut pages, |page| identity.write(page)).map_err(failed)?;
                Ok(identity.uuid)
            }
            Superblock::Valid(_) => Err(Error::new(
                ErrorKind::Format,
                format!("{shown} was written with another secret; set the old store.secret or another ssd.path"),
            )),
            Superblock::OtherVersion(version) => Err(Error::new(
                ErrorKind::Format,
                format!(
                    "{shown} has format version {version}, expected {}; use the release that wrote it or another ssd.path",
                    record::FORMAT_VERSION
                ),
            )),
            Superblock::Damaged => Err(Error::new(
                ErrorKind::Format,
                format!("{shown} is not a superblock, or both its copies are damaged; move the directory away"),
            )),
        }
    }

    /// What it reads and writes with, and why not with something faster.
    pub(crate) fn engine(&self) -> (&'static str, Option<String>) {
        self.io.engine()
    }

    /// The quotas that were written here last; `None`: there were none.
    ///
    /// # Errors
    /// What was written is damaged.
    pub(crate) fn quotas(&self) -> Result<Option<&[u8]>> {
        match &self.quotas {
            Found::Nothing => Ok(None),
            Found::Whole(content) => Ok(Some(content)),
            Found::Damaged => {
                let path = self.directory.join(Note::Quotas.name());
                Err(Error::new(ErrorKind::Format, format!("{} is damaged: set the quotas anew", path.display())))
            }
        }
    }

    /// Bytes of a segment in a file that is new.
    pub(crate) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Lets another process have the directory.
    pub(crate) fn unlock(&self) {
        if let Some(lock) = self.lock.lock().take() {
            lock.release();
        }
    }

    /// Where a model's file is, or would be.
    pub(crate) fn path_of(&self, fingerprint: Id) -> PathBuf {
        let name: String = fingerprint.iter().map(|b| format!("{b:02x}")).collect();
        self.directory.join(name + ".kv")
    }

    /// Files of models that are not registered now, oldest first.
    pub(crate) fn stale_files(&self) -> Result<Vec<Stale>> {
        let failed = |e| Error::io(format!("cannot list {}", self.directory.display()), e);
        let mut found: Vec<Stale> = model_files(&self.directory).map_err(failed)?.filter_map(Stale::at).collect();
        found.sort_by(|a, b| (a.modified, &a.path).cmp(&(b.modified, &b.path)));
        Ok(found)
    }

    /// Makes an unregistered model's file smaller by dropping its oldest segments; returns the bytes it still takes.
    /// What cannot be made that small goes as a whole.
    pub(crate) fn shrink(&self, path: &Path, goal_bytes: u64) -> std::io::Result<u64> {
        match self.shrink_existing(path, goal_bytes) {
            // Removed meanwhile, by hand or because it was damaged.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
            other => other,
        }
    }

    fn shrink_existing(&self, path: &Path, goal_bytes: u64) -> std::io::Result<u64> {
        let left = if goal_bytes == 0 { None } else { self.drop_oldest(path, goal_bytes)? };
        match left {
            Some(left) if left <= goal_bytes => Ok(left),
            _ => self.io.remove(path).map(|()| 0),
        }
    }

    // `None` for a file that is not one of ours.
    fn drop_oldest(&self, path: &Path, goal_bytes: u64) -> std::io::Result<Option<u64>> {
        let file = self.io.open(path, Access::Write)?;
        let mut pages = Buffer::new(2 * PAGE).map_err(std::io::Error::other)?;
        file.read_at(&mut pages, 0)?;
        let Superblock::Valid(identity) = ModelIdentity::read(&pages) else { return Ok(None) };
        let segment_bytes = identity.layout.segment_bytes.max(PAGE as u64);
        let count = file.len()?.saturating_sub(SEGMENTS_OFFSET).div_ceil(segment_bytes);
        if count > MAX_SEGMENTS {
            return Ok(None);
        }
        let mut segments = Vec::new();
        for index in 0..count {
            file.read_at(&mut pages[..PAGE], SEGMENTS_OFFSET + index * segment_bytes)?;
            let header = SegmentIdentity::read(&pages[..PAGE], self.uuid, identity.fingerprint, index);
            segments.push((header.map_or(0, |(header, _)| header.epoch), index));
        }
        segments.sort_unstable();
        for (_, index) in segments {
            if file.allocated()? <= goal_bytes {
                break;
            }
            file.punch(SEGMENTS_OFFSET + index * segment_bytes, segment_bytes)?;
        }
        file.allocated().map(Some)
    }

    /// Opens or creates a model's file. A file that cannot be told to be this model's,
    /// or whose segments are too long for the cap, is started anew.
    pub(crate) fn open_model(
        &self,
        fingerprint: Id,
        geometry: Geometry,
        model: &str,
        weights_version: &str,
    ) -> Result<ModelFile> {
        let path = self.path_of(fingerprint);
        let failed = |e| Error::io(format!("cannot open {}", path.display()), e);
        let mut file = self.io.open(&path, Access::Create).map_err(failed)?;
        let mut pages = Buffer::new(2 * PAGE)?;
        let length = file.read_at(&mut pages, 0).map_err(failed)?;
        let mut identity = ModelIdentity {
            uuid: self.uuid,
            fingerprint,
            geometry: geometry.words(),
            layout: self.layout(&geometry)?,
            model: model.to_owned(),
            weights_version: weights_version.to_owned(),
        };
        match ModelIdentity::read(&pages) {
            Superblock::Valid(found)
                if found.layout.segment_bytes.is_multiple_of(PAGE as u64)
                    && found.layout.segment_bytes <= self.usable_bytes()
                    && found.layout.room_for(geometry.record_bytes()) > 0
                    && file.len().map_err(failed)? <= SEGMENTS_OFFSET + MAX_SEGMENTS * found.layout.segment_bytes
                    && found == (ModelIdentity { layout: found.layout, ..identity.clone() }) =>
            {
                identity = found;
            }
            Superblock::OtherVersion(version) => {
                return Err(Error::new(
                    ErrorKind::Format,
                    format!("{} has format version {version}, expected {}", path.display(), record::FORMAT_VERSION),
                ));
            }
            Superblock::Valid(_) | Superblock::Damaged => {
                if length > 0 {
                    self.io.remove(&path).map_err(failed)?;
                    file = self.io.open(&path, Access::Create).map_err(failed)?;
                    pages.fill(0);
                }
            }
        }
        mend(file.as_ref(), 0, &mut pages, |page| identity.write(page)).map_err(failed)?;
        // A copy may have filled what is a hole between calibration and segments. Where it stays filled, nothing else is
        // wrong than a few pages in the books.
        let hole = CALIBRATION_OFFSET + 2 * PAGE as u64;
        let _ = (length > 0).then(|| file.punch(hole, SEGMENTS_OFFSET - hole));
        Ok(ModelFile::new(file, path, self.uuid, fingerprint, geometry, identity.layout))
    }

    fn usable_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(CONTROL_BYTES + SEGMENTS_OFFSET)
    }

    // Segments shrink with the cap, so that even a small one has several.
    fn layout(&self, geometry: &Geometry) -> Result<SegmentLayout> {
        let record = geometry.record_bytes() as u64;
        let usable = self.usable_bytes();
        let page = PAGE as u64;
        let wanted = self.segment_bytes.max(4 * record + (64 << 10)).next_multiple_of(page);
        let layout = SegmentLayout::new(geometry, wanted.min(usable / 4 / page * page));
        if layout.room_for(geometry.record_bytes()) == 0 {
            return Err(Error::new(
                ErrorKind::Config,
                format!(
                    "ssd.capacity_bytes is {}, too small for blocks of {record} bytes: expected at least {}",
                    self.capacity_bytes,
                    CONTROL_BYTES + SEGMENTS_OFFSET + 4 * (2 * record + 2 * page)
                ),
            ));
        }
        Ok(layout)
    }

    /// A buffer of at least `bytes`, returned by [`give_back`](Self::give_back).
    pub(crate) fn scratch(&self, bytes: usize) -> Result<Buffer> {
        let mut free = self.scratch.lock();
        match free.iter().position(|b| b.len() >= bytes) {
            Some(i) => Ok(free.swap_remove(i)),
            None => {
                drop(free);
                Buffer::new(bytes)
            }
        }
    }

    pub(crate) fn give_back(&self, buffer: Buffer) {
        let mut free = self.scratch.lock();
        if free.iter().map(|b| b.len()).sum::<usize>() + buffer.len() <= SCRATCH_BYTES {
            free.push(buffer);
        }
    }
}

fn own_secret(directory: &Path) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = directory.join("secret");
    match std::fs::read(&path) {
        Ok(bytes) if bytes.len() == 32 => return Ok(bytes),
        Ok(_) => {
            let message = format!("{} does not hold 32 bytes; restore it or set store.secret", path.display());
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut bytes = vec![0; 32];
    getrandom::fill(&mut bytes)?;
    // Written aside and renamed, so that a crash leaves no half secret.
    let aside = directory.join("secret.new");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(aside, path)?;
    Ok(bytes)
}

// Writes both copies of a superblock, unless they are as they should be.
fn mend(file: &dyn IoFile, offset: u64, pages: &mut Buffer, write: impl Fn(&mut [u8])) -> std::io::Result<()> {
    let mut right = Buffer::new(2 * PAGE).map_err(std::io::Error::other)?;
    right.chunks_mut(PAGE).for_each(write);
    if right[..] == pages[..] {
        return Ok(());
    }
    file.write_at(&[&right], offset).and_then(|()| file.sync())
}

// Files that are named as a model's.
fn model_files(directory: &Path) -> std::io::Result<impl Iterator<Item = PathBuf>> {
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".kv"));
        name.is_some_and(|stem| stem.len() == 32 && stem.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    Ok(std::fs::read_dir(directory)?.filter_map(move |entry| Some(entry.ok()?.path()).filter(named)))
}

/// A file of a model that is not registered.
#[derive(Debug)]
pub(crate) struct Stale {
    pub(crate) path: PathBuf,
    /// What the file system has allocated to it.
    pub(crate) bytes: u64,
    pub(crate) modified: (i64, i64),
    /// Its model was unregistered, and it could not be removed.
    pub(crate) unwanted: bool,
}

impl Stale {
    /// What lies there; `None` if it is no file.
    pub(crate) fn at(path: PathBuf) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
        let modified = (meta.mtime(), meta.mtime_nsec());
        Some(Self { path, bytes: meta.blocks() * 512, modified, unwanted: false })
    }
}

/// A page-aligned, huge-page-backed buffer.
#[derive(Debug)]
pub(crate) struct Buffer {
    arena: Arena,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        Ok(Self { arena: Arena::new(bytes)?, bytes })
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.arena.as_slice()[..self.bytes]
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.arena.as_mut_slice()[..self.bytes]
    }
}

/// One model's file.
#[derive(Debug)]
pub(crate) struct ModelFile {
    file: Box<dyn IoFile>,
    path: PathBuf,
    uuid: Id,
    fingerprint: Id,
    geometry: Geometry,
    pub(crate) layout: SegmentLayout,
    /// How payloads are encoded that were met so far.
    forms: Mutex<Vec<Arc<Layout>>>,
}

impl ModelFile {
    fn new(
        file: Box<dyn IoFile>,
        path: PathBuf,
        uuid: Id,
        fingerprint: Id,
        geometry: Geometry,
        layout: SegmentLayout,
    ) -> Self {
        Self { file, path, uuid, fingerprint, geometry, layout, forms: Mutex::default() }
    }

    pub(crate) fn direct(&self) -> bool {
        self.file.direct()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What a calibration found once, for each plane; `None`: there was none, or it is damaged.
    pub(crate) fn calibration(&self) -> std::io::Result<Option<Arc<[f32]>>> {
        let mut pages = Buffer::new(2 * PAGE).map_err(std::io::Error::other)?;
        let read = self.file.read_at(&mut pages, CALIBRATION_OFFSET)?;
        let Superblock::Valid(found) = Calibration::read(&pages[..read]) else { return Ok(None) };
        let ours = found.uuid == self.uuid
            && found.fingerprint == self.fingerprint
            && found.bounds.len() == self.geometry.plane_count();
        Ok(ours.then(|| found.bounds.into()))
    }

    /// Notes what a calibration found.
    pub(crate) fn write_calibration(&self, bounds: &[f32]) -> std::io::Result<()> {
        let found = Calibration { uuid: self.uuid, fingerprint: self.fingerprint, bounds: bounds.to_vec() };
        let mut pages = Buffer::new(2 * PAGE).map_err(std::io::Error::other)?;
        mend(self.file.as_ref(), CALIBRATION_OFFSET, &mut pages, |page| found.write(page))
    }

    /// How a payload of this form is encoded; `None`: no payload of this model is.
    pub(crate) fn layout_of(&self, form: &Form, depth: u32) -> Option<Arc<Layout>> {
        let scheme = form.scheme.as_ref()?;
        let mut forms = self.forms.lock();
        let known = forms.iter().find(|layout| layout.scheme() == scheme).cloned();
        let layout = match known {
            Some(layout) => layout,
            None => {
                let new = Arc::new(Layout::new(*scheme, &self.geometry).ok()?);
                forms.push(new.clone());
                new
            }
        };
        Some(layout).filter(|layout| Form::encoded(layout, depth) == *form)
    }

    pub(crate) fn identity(&self, epoch: u64) -> SegmentIdentity {
        SegmentIdentity { uuid: self.uuid, fingerprint: self.fingerprint, epoch }
    }

    fn offset(&self, segment: u32) -> u64 {
        SEGMENTS_OFFSET + u64::from(segment) * self.layout.segment_bytes
    }

    // Which life a segment is in; `None`: in none.
    fn epoch_of(&self, index: u32) -> std::io::Result<Option<u64>> {
        let mut page = Buffer::new(PAGE).map_err(std::io::Error::other)?;
        let length = self.file.read_at(&mut page, self.offset(index))?;
        let header = SegmentIdentity::read(&page[..length], self.uuid, self.fingerprint, u64::from(index));
        Ok(header.map(|(header, _)| header.epoch))
    }

    /// Reserves a segment on disk, if it is not yet, and writes its header.
    pub(crate) fn start_segment(&self, index: u32, epoch: u64) -> std::io::Result<()> {
        self.file.allocate(self.offset(index), self.layout.segment_bytes)?;
        let mut page = Buffer::new(PAGE).map_err(std::io::Error::other)?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        self.identity(epoch).write(u64::from(index), now.map_or(0, |now| now.as_secs()), &mut page[..PAGE]);
        self.file.write_at(&[&page[..PAGE]], self.offset(index))
    }

    /// Where in the file a record lies.
    pub(crate) fn offset_of(&self, place: Place) -> u64 {
        self.offset(place.segment) + place.offset
    }

    /// A queue for many reads or writes at once.
    pub(crate) fn queue(&self) -> Box<dyn Queue + '_> {
        self.file.queue().unwrap_or_else(|| Box::new(Inline::new(self.file.as_ref())))
    }

    pub(crate) fn write_footer(&self, index: u32, epoch: u64, entries: &[Entry]) -> std::io::Result<()> {
        let bytes = record::write_footer(entries, &self.identity(epoch), &self.layout);
        let mut aligned = Buffer::new(bytes.len()).map_err(std::io::Error::other)?;
        aligned[..bytes.len()].copy_from_slice(&bytes);
        self.file.write_at(&[&aligned[..bytes.len()]], self.offset(index) + self.layout.footer_offset())
    }

    /// Gives a segment's disk blocks back.
    pub(crate) fn punch(&self, index: u32) -> std::io::Result<()> {
        self.file.punch(self.offset(index), self.layout.segment_bytes)
    }

    /// Reads one or more neighbouring records; fewer bytes than asked means that the file ends there.
    pub(crate) fn read_records(&self, place: Place, records: &mut [u8]) -> std::io::Result<usize> {
        self.file.read_at(records, self.offset_of(place))
    }

    pub(crate) fn sync(&self) -> std::io::Result<()> {
        self.file.sync()
    }
}

/// Life of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No disk blocks, no records.
    Empty,
    /// Takes records.
    Open,
    /// Full; may be reused.
    Sealed,
    /// A write failed: readable, and not appended to.
    Retired,
    /// Its blocks are forgotten, its disk blocks not yet given back.
    Leaving,
}

/// One segment's books.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) phase: Phase,
    pub(crate) epoch: u64,
    pub(crate) tail: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) blocks: Vec<crate::block::BlockHash>,
    /// What is to stay of it has been promoted, as far as there was room.
    pub(crate) rescued: bool,
}

impl Segment {
    pub(crate) fn empty() -> Self {
        Self { phase: Phase::Empty, epoch: 0, tail: 0, entries: Vec::new(), blocks: Vec::new(), rescued: false }
    }

    pub(crate) fn start(&mut self, epoch: u64) {
        *self = Self { phase: Phase::Open, epoch, tail: SegmentLayout::RECORDS_OFFSET, ..Self::empty() };
    }
}
