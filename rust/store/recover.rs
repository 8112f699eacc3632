//! Opening what an earlier process left: its records become blocks again, within the present cap.

use super::Shared;
use super::state::{Clearing, Disk, State};
use crate::block::Secret;
use crate::error::{Error, Result};
use crate::ssd::{ModelFile, Phase, Place, Recovered, Segment, Ssd};
use crate::sync::Arc;

impl State {
    /// Takes over what recovery found. A block whose parent is gone cannot be matched and is left out.
    pub(super) fn adopt(
        &mut self,
        model: u32,
        file: Arc<ModelFile>,
        recovered: Vec<Option<Recovered>>,
        secret: &Secret,
    ) {
        let mut segments: Vec<Segment> = Vec::new();
        let mut found = Vec::new();
        for (index, segment) in recovered.into_iter().enumerate() {
            let mut books = Segment::empty();
            if let Some(Recovered { epoch, entries }) = segment {
                books = Segment { phase: Phase::Sealed, epoch, ..books };
                let at = |offset| Place { segment: index as u32, offset };
                found.extend(entries.iter().map(|e| (e.block.depth, std::cmp::Reverse(epoch), at(e.offset), e.block)));
            }
            segments.push(books);
        }
        let last_epoch = segments.iter().map(|s| s.epoch).max().unwrap_or(0);
        let Some(state) = self.models.get_mut(&model) else { return };
        state.disk = Some(Disk { file, segments, last_epoch });
        // Parents first, and of two records of one block the newer.
        found.sort_by_key(|(depth, epoch, ..)| (*depth, *epoch));
        for (depth, _, place, block) in found {
            let hash = secret.unseal(block.hash);
            let parent = match depth {
                0 => None,
                _ => self.trie.find(secret.unseal(block.parent)).filter(|&p| self.trie[p].depth + 1 == depth),
            };
            if self.trie.find(hash).is_some() || (depth > 0 && parent.is_none()) {
                continue;
            }
            let id = self.trie.insert(parent, hash, model);
            self.alter(id, |node| {
                node.ssd = Some(place);
                node.last_use = 0;
            });
            if let Some(segment) = self.segment(model, place.segment) {
                segment.blocks.push(hash);
            }
        }
    }
}

impl Shared {
    /// Makes room for `need` bytes more of files, in the thread of a registration, which holds that lock. Segments of
    /// any model go, then files of unregistered ones. What cannot be freed is counted, and shows in the status.
    pub(super) fn make_room(&self, need: u64) {
        let Some(ssd) = &self.ssd else { return };
        let mut state = self.state.lock();
        while state.ssd_file_bytes() + need > state.ssd_capacity_bytes {
            if let Some((model, file, index)) = state.give_up_segment() {
                drop(state);
                let punched = file.punch(index);
                state = self.state.lock();
                if let Some(segment) = state.segment(model, index) {
                    *segment = Segment {
                        phase: if punched.is_ok() { Phase::Empty } else { Phase::Retired },
                        ..Segment::empty()
                    };
                }
                if punched.is_err() {
                    state.counts(model).io_errors += 1;
                    break;
                }
                continue;
            }
            let mut clearing = Clearing::default();
            let over = (state.ssd_file_bytes() + need).saturating_sub(state.ssd_capacity_bytes);
            if !state.shrink_stale(over, &mut clearing) {
                break;
            }
            drop(state);
            let shrunk: Vec<_> =
                clearing.shrink.into_iter().map(|(path, keep)| (ssd.shrink(&path, keep), path)).collect();
            state = self.state.lock();
            for (left, path) in shrunk {
                let Ok(left) = left else {
                    state.retired.io_errors += 1;
                    return;
                };
                if let Some(stale) = state.stale.iter_mut().find(|s| s.path == path) {
                    stale.bytes = left;
                }
            }
        }
    }
}

/// A cap that was lowered while the store was closed holds from the start.
pub(super) fn fit_stale_files(state: &mut State, ssd: &Ssd) -> Result<()> {
    for at in 0..state.stale.len() {
        let over = state.ssd_file_bytes().saturating_sub(state.ssd_capacity_bytes);
        if over == 0 {
            break;
        }
        let stale = &mut state.stale[at];
        let keep = stale.bytes.saturating_sub(over);
        let shrunk = ssd.shrink(&stale.path, keep);
        stale.bytes = shrunk.map_err(|e| Error::io(format!("cannot shrink {}", stale.path.display()), e))?;
    }
    Ok(())
}
