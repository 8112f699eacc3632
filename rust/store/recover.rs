//! Opening what an earlier process left: its records become blocks again.

use super::namespace::Epochs;
use super::state::{Disk, State};
use crate::block::Secret;
use crate::ssd::record::{Entry, PAGE};
use crate::ssd::{ModelFile, Phase, Place, Recovered, Segment};
use crate::stats::Tier;
use crate::sync::Arc;

impl State {
    /// Takes over what recovery found. A block whose parent is gone, or whose namespace was dropped, cannot be matched and
    /// is left out.
    pub(super) fn adopt(
        &mut self,
        model: u32,
        file: Arc<ModelFile>,
        recovered: Vec<Option<Recovered>>,
        first_epoch: u64,
        secret: &Secret,
        epochs: &Epochs,
    ) {
        let most = self.models.get(&model).map_or(0, |m| m.geometry.record_bytes() as u64);
        let mut segments: Vec<Segment> = Vec::new();
        let mut found = Vec::new();
        for (index, segment) in recovered.into_iter().enumerate() {
            let mut books = Segment::empty();
            if let Some(Recovered { epoch, opened_s, entries, .. }) = segment {
                books = Segment { phase: Phase::Sealed, epoch, ..books };
                let at = |e: &Entry| {
                    let pages = (e.bytes / PAGE as u64) as u32;
                    Place { segment: index as u32, offset: e.offset, pages }
                };
                let entries = entries.iter().filter(|e| e.bytes <= most);
                found.extend(
                    entries.map(|e| (e.block.depth, std::cmp::Reverse(epoch), at(e), e.block, opened_s as u32)),
                );
            }
            segments.push(books);
        }
        // A start of its own for every opening: a life that damage hid is not lived again.
        let last_epoch = segments.iter().map(|s| s.epoch).max().unwrap_or(0).saturating_add(first_epoch);
        let Some(state) = self.models.get_mut(&model) else { return };
        state.disk = Some(Disk { file, segments, last_epoch, spare_bytes: 0 });
        // Parents first, and of two records of one block the newer.
        found.sort_by_key(|(depth, epoch, ..)| (*depth, *epoch));
        for (depth, _, place, block, opened_s) in found {
            let (hash, before) = (secret.unseal(block.hash), secret.unseal(block.parent));
            let parent = match depth {
                0 => None,
                _ => self.nodes.find(before).filter(|&p| self.nodes.depth(p) + 1 == depth),
            };
            if parent.is_none() && (depth > 0 || epochs.is_past(before)) {
                continue;
            }
            let owner = match parent {
                Some(parent) => self.nodes[parent].owner,
                None => self.owners.of(model, before.tenant_tag(), most),
            };
            let Some(id) = self.nodes.insert(parent, hash, (model, owner), before) else { continue };
            self.alter(id, |node| (node.ssd, node.since_s, node.used_s) = (Some(place), opened_s, opened_s));
            self.nodes[id].came_s[Tier::Ssd as usize] = opened_s;
            if let Some(segment) = self.segment(model, place.segment) {
                segment.blocks.push(hash);
            }
        }
    }
}
