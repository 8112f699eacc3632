//! Which namespaces were dropped, how often.

use super::io::Io;
use super::notes::{Found, Note};
use super::record::Id;
use super::{Error, ErrorKind, Result, Ssd};
use crate::block::Sealed;
use std::path::Path;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Row {
    first: Sealed,
    epoch: U64,
}

/// Bytes that so many namespaces take in the file.
pub(crate) fn length_of(namespaces: usize) -> usize {
    namespaces * size_of::<Row>()
}

impl Ssd {
    /// Which namespaces were dropped in this directory, how often; and what is to be known before the next is.
    pub(super) fn read_epochs(directory: &Path, io: &dyn Io, uuid: Id) -> Result<Vec<(Sealed, u64)>> {
        let rows = match Self::read_note(Note::Epochs, directory, io, uuid)? {
            Found::Nothing => return Ok(Vec::new()),
            Found::Whole(content) => <[Row]>::ref_from_bytes(&content)
                .ok()
                .map(|rows| rows.iter().map(|row| (row.first, row.epoch.get())).collect()),
            Found::Damaged => None,
        };
        rows.ok_or_else(|| {
            let path = directory.join(Note::Epochs.name());
            let message = "is damaged: what was dropped is not known; move the directory away";
            Error::new(ErrorKind::Format, format!("{} {message}", path.display()))
        })
    }

    /// Notes which namespaces were dropped, how often; durable on return.
    pub(crate) fn write_epochs(&self, entries: &[(Sealed, u64)]) -> Result<()> {
        let rows: Vec<Row> = entries.iter().map(|&(first, epoch)| Row { first, epoch: U64::new(epoch) }).collect();
        self.write_note(Note::Epochs, rows.as_bytes())
    }
}
