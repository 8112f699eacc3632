//! Small files that say what holds for a directory: which namespaces were dropped (`epochs`), and who may have how much
//! (`quotas`). Each is two equal copies, written anew and renamed into place.

use super::io::{Access, Io};
use super::record::{EPOCHS_MAGIC, Id, PAGE, Preamble, QUOTAS_MAGIC, crc};
use super::{Buffer, Ssd};
use crate::error::{Error, Result};
use std::path::Path;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the lock, the secret, the store's superblock and the file system's books of them take.
pub(super) const CONTROL_BYTES: u64 = 64 << 10;
/// A file that is longer is damaged.
const MOST_BYTES: u64 = 1 << 30;

/// Which of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Note {
    Epochs,
    Quotas,
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Whole(Vec<u8>),
    Damaged,
}

impl Found {
    pub(super) fn length(&self) -> usize {
        match self {
            Self::Whole(content) => content.len(),
            Self::Nothing | Self::Damaged => 0,
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    preamble: Preamble,
    length: U64,
}

impl Note {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Epochs => "epochs",
            Self::Quotas => "quotas",
        }
    }

    // What that means.
    fn unwritten(self) -> &'static str {
        match self {
            Self::Epochs => "nothing was dropped",
            Self::Quotas => "the next process will not know these quotas",
        }
    }

    fn magic(self) -> [u8; 4] {
        match self {
            Self::Epochs => EPOCHS_MAGIC,
            Self::Quotas => QUOTAS_MAGIC,
        }
    }

    fn write(self, content: &[u8], uuid: Id, copy: &mut [u8]) {
        copy.fill(0);
        let head = Head { preamble: Preamble::new(self.magic(), uuid), length: U64::new(content.len() as u64) };
        copy[..size_of::<Head>()].copy_from_slice(head.as_bytes());
        copy[size_of::<Head>()..][..content.len()].copy_from_slice(content);
        let end = copy.len() - 8;
        let sum = crc(&copy[..end]);
        copy[end..].copy_from_slice(&sum.to_le_bytes());
    }

    // What the copy says that these bytes begin with, if it is whole.
    fn read(self, bytes: &[u8], uuid: Id) -> Option<Vec<u8>> {
        let (head, rest) = Head::read_from_prefix(bytes).ok()?;
        let length = usize::try_from(head.length.get()).ok().filter(|&length| length <= rest.len())?;
        let (copy, sum) = bytes.get(..copy_bytes(length))?.split_last_chunk()?;
        let ours = Preamble::new(self.magic(), uuid);
        let whole = *sum == crc(copy).to_le_bytes() && head.preamble.as_bytes() == ours.as_bytes();
        whole.then(|| rest[..length].to_vec())
    }
}

/// Bytes of one of a file's two copies.
fn copy_bytes(length: usize) -> usize {
    (size_of::<Head>() + length + 8).next_multiple_of(PAGE)
}

impl Ssd {
    /// Disk bytes that may be taken beside the model files, with so much in one of the files; twice what they take, since
    /// the next is written before the last one goes.
    pub(crate) fn control_bytes_with(&self, note: Note, length: usize) -> u64 {
        let mut lengths = *self.notes.lock();
        lengths[note as usize] = length;
        let file = |length: usize| if length == 0 { 0 } else { 2 * copy_bytes(length) as u64 };
        CONTROL_BYTES + lengths.map(|length| 2 * file(length)).iter().sum::<u64>()
    }

    /// As they are now.
    pub(crate) fn control_bytes(&self) -> u64 {
        let epochs = self.notes.lock()[Note::Epochs as usize];
        self.control_bytes_with(Note::Epochs, epochs)
    }

    pub(super) fn read_note(note: Note, directory: &Path, io: &dyn Io, uuid: Id) -> Result<Found> {
        let path = directory.join(note.name());
        let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
        let file = match io.open(&path, Access::Write) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(e) => return Err(failed(e)),
        };
        let length = file.len().map_err(failed)?.min(MOST_BYTES) as usize;
        let mut bytes = Buffer::new(length.next_multiple_of(PAGE).max(PAGE))?;
        let length = file.read_at(&mut bytes, 0).map_err(failed)?;
        let whole = note.read(&bytes[..length], uuid).or_else(|| note.read(&bytes[length / 2..length], uuid));
        Ok(whole.map_or(Found::Damaged, Found::Whole))
    }

    /// Writes one of the files; durable on return.
    pub(crate) fn write_note(&self, note: Note, content: &[u8]) -> Result<()> {
        let path = self.directory.join(note.name());
        let aside = path.with_extension("new");
        let length = copy_bytes(content.len());
        let mut bytes = Buffer::new(2 * length)?;
        bytes.chunks_mut(length).for_each(|copy| note.write(content, self.uuid, copy));
        // What a crash left may be longer.
        let gone = match self.io.remove(&aside) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        let written = gone.and_then(|()| self.io.open(&aside, Access::Create)).and_then(|file| {
            file.write_at(&[&bytes], 0)?;
            file.sync()?;
            self.io.replace(&aside, &path)
        });
        written.map_err(|e| Error::io(format!("cannot write {}; {}", path.display(), note.unwritten()), e))?;
        self.notes.lock()[note as usize] = content.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_note_reads_back_and_one_damaged_sector_is_no_loss(
            content in prop::collection::vec(any::<u8>(), 1..9000),
            at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
        ) {
            let length = copy_bytes(content.len());
            let mut bytes = vec![0; 2 * length];
            let note = Note::Epochs;
            bytes.chunks_mut(length).for_each(|copy| note.write(&content, [1; 16], copy));
            let both = |bytes: &[u8]| {
                note.read(bytes, [1; 16]).or_else(|| note.read(&bytes[bytes.len() / 2..], [1; 16]))
            };
            prop_assert_eq!(both(&bytes), Some(content.clone()));
            prop_assert_eq!(note.read(&bytes, [2; 16]), None);
            prop_assert_eq!(Note::Quotas.read(&bytes, [1; 16]), None);
            bytes[at.index(length)] ^= 1 << bit;
            prop_assert_eq!(note.read(&bytes, [1; 16]), None);
            prop_assert_eq!(both(&bytes), Some(content));
            bytes.truncate(length + cut.index(length));
            prop_assert_eq!(both(&bytes), None);
        }

        #[test]
        fn no_bytes_are_taken_for_a_note(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert_eq!(Note::Epochs.read(&bytes, [1; 16]), None);
        }
    }
}
