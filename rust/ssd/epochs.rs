//! Which namespaces were dropped, how often: a small file, written anew and renamed into place.

use super::io::{Access, Io};
use super::record::{EPOCHS_MAGIC, Id, PAGE, Preamble, crc};
use super::{Buffer, Ssd};
use crate::block::Sealed;
use crate::error::{Error, ErrorKind, Result};
use std::path::Path;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the lock, the secret, the store's superblock and the file system's books of them take.
pub(super) const CONTROL_BYTES: u64 = 64 << 10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    preamble: Preamble,
    count: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Row {
    first: Sealed,
    epoch: U64,
}

/// A file that is longer is damaged.
const MOST_BYTES: u64 = 1 << 30;

/// Bytes of one of the file's two copies.
fn copy_bytes(count: usize) -> usize {
    (size_of::<Head>() + count * size_of::<Row>() + 8).next_multiple_of(PAGE)
}

fn write(entries: &[(Sealed, u64)], uuid: Id, copy: &mut [u8]) {
    copy.fill(0);
    let head = Head { preamble: Preamble::new(EPOCHS_MAGIC, uuid), count: U64::new(entries.len() as u64) };
    let rows = entries.iter().map(|&(first, epoch)| Row { first, epoch: U64::new(epoch) });
    let mut at = 0;
    let mut append = |bytes: &[u8]| {
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    append(head.as_bytes());
    rows.for_each(|row| append(row.as_bytes()));
    let end = copy.len() - 8;
    let sum = crc(&copy[..end]);
    copy[end..].copy_from_slice(&sum.to_le_bytes());
}

/// The copy that these bytes begin with, if it is whole.
fn read(bytes: &[u8], uuid: Id) -> Option<Vec<(Sealed, u64)>> {
    let (head, rest) = Head::read_from_prefix(bytes).ok()?;
    let count = usize::try_from(head.count.get()).ok().filter(|&count| count <= rest.len() / size_of::<Row>())?;
    let (copy, sum) = bytes.get(..copy_bytes(count))?.split_last_chunk()?;
    let whole =
        *sum == crc(copy).to_le_bytes() && head.preamble.as_bytes() == Preamble::new(EPOCHS_MAGIC, uuid).as_bytes();
    let (rows, _) = <[Row]>::ref_from_prefix_with_elems(rest, count).ok()?;
    whole.then(|| rows.iter().map(|row| (row.first, row.epoch.get())).collect())
}

impl Ssd {
    /// Disk bytes that may be taken beside the model files, with so many namespaces in the file of epochs; twice, since
    /// the next file is written before the last one goes.
    pub(crate) fn control_bytes_with(&self, dropped: usize) -> u64 {
        let file = if dropped == 0 { 0 } else { 2 * copy_bytes(dropped) as u64 };
        CONTROL_BYTES + 2 * file
    }

    /// As many as they are now.
    pub(crate) fn control_bytes(&self) -> u64 {
        self.control_bytes_with(*self.dropped.lock())
    }

    /// Which namespaces were dropped in this directory, how often.
    pub(super) fn read_epochs(directory: &Path, io: &dyn Io, uuid: Id) -> Result<Vec<(Sealed, u64)>> {
        let path = directory.join("epochs");
        let shown = path.display();
        let failed = |e| Error::io(format!("cannot read {shown}"), e);
        let file = match io.open(&path, Access::Write) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let length = file.len().map_err(failed)?.min(MOST_BYTES) as usize;
        let mut bytes = Buffer::new(length.next_multiple_of(PAGE).max(PAGE))?;
        let length = file.read_at(&mut bytes, 0).map_err(failed)?;
        read(&bytes[..length], uuid).or_else(|| read(&bytes[length / 2..length], uuid)).ok_or_else(|| {
            Error::new(
                ErrorKind::Format,
                format!("{shown} is damaged: what was dropped is not known; move the directory away"),
            )
        })
    }

    /// Notes which namespaces were dropped, how often; durable on return.
    pub(crate) fn write_epochs(&self, entries: &[(Sealed, u64)]) -> Result<()> {
        let (path, aside) = (self.directory.join("epochs"), self.directory.join("epochs.new"));
        let length = copy_bytes(entries.len());
        let mut bytes = Buffer::new(2 * length)?;
        bytes.chunks_mut(length).for_each(|copy| write(entries, self.uuid, copy));
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
        written.map_err(|e| Error::io(format!("cannot write {}; nothing was dropped", path.display()), e))?;
        *self.dropped.lock() = entries.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_file_of_epochs_reads_back_and_one_damaged_sector_is_no_loss(
            entries in prop::collection::vec((any::<Sealed>(), 1u64..), 1..400),
            at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
        ) {
            let length = copy_bytes(entries.len());
            let mut bytes = vec![0; 2 * length];
            bytes.chunks_mut(length).for_each(|copy| write(&entries, [1; 16], copy));
            let both = |bytes: &[u8]| read(bytes, [1; 16]).or_else(|| read(&bytes[bytes.len() / 2..], [1; 16]));
            prop_assert_eq!(both(&bytes), Some(entries.clone()));
            prop_assert_eq!(read(&bytes, [2; 16]), None);
            bytes[at.index(length)] ^= 1 << bit;
            prop_assert_eq!(read(&bytes, [1; 16]), None);
            prop_assert_eq!(both(&bytes), Some(entries));
            bytes.truncate(length + cut.index(length));
            prop_assert_eq!(both(&bytes), None);
        }

        #[test]
        fn no_bytes_are_taken_for_a_file_of_epochs(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert_eq!(read(&bytes, [1; 16]), None);
        }
    }
}
