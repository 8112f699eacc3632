//! A block by reference: its bytes where they lie in RAM, without a copy.

use super::{Lease, Shared};
use crate::block::{Geometry, RECORD_HEADER_BYTES};
use crate::pool::Slot;
use crate::ssd::record::tokens_of;
use crate::stats::Tier;
use crate::sync::{Arc, Ordering};
use crate::trie::NodeId;

/// Keys and values of one block, `[layer][plane][head][token][dim]`. The block stays where it is until this is dropped,
/// whatever becomes of the match, the model and the store.
#[derive(Debug)]
pub struct BlockView {
    shared: Arc<Shared>,
    node: NodeId,
    slot: Slot,
    geometry: Geometry,
}

impl Lease {
    /// The bytes of block `n` of the match. `None`: there is no such block, it is not in RAM, it is encoded there, or the
    /// match was released.
    pub fn view(&self, n: usize) -> Option<BlockView> {
        let hash = *self.hashes[..self.blocks()].get(n)?;
        let geometry = self.model.spec().geometry;
        let mut state = self.shared.state.lock();
        if self.released.load(Ordering::Acquire) || state.closed {
            return None;
        }
        let node = state.nodes.find(hash)?;
        let slot = state.nodes[node].ram.filter(|_| state.nodes[node].layout.is_none())?;
        if state.nodes.lease(&[node]).is_empty() {
            return None;
        }
        let view = BlockView { shared: self.shared.clone(), node, slot, geometry };
        // Tokens are compared on every way out.
        let size = geometry.block_tokens as usize;
        let right = tokens_of(view.body(), &geometry).eq(self.tokens[n * size..(n + 1) * size].iter().copied());
        let counts = state.owners.counts(self.namespace.owner);
        counts.asked_tier(Tier::Ram, right);
        if !right {
            counts.asked_tier(Tier::Ssd, false);
            return None;
        }
        counts.loaded_tokens += size as u64;
        counts.loaded_bytes += geometry.block_bytes() as u64;
        Some(view)
    }
}

impl BlockView {
    /// Shape of the block.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Its bytes.
    pub fn payload(&self) -> &[u8] {
        &self.body()[self.geometry.payload_offset() - RECORD_HEADER_BYTES..]
    }

    // All that follows the header: that alone may be written while others read.
    fn body(&self) -> &[u8] {
        let length = self.geometry.payload_offset() + self.geometry.block_bytes() - RECORD_HEADER_BYTES;
        // SAFETY: the slot is published, and held by this view's lease; what follows its header does not change. The
        // arena lives as long as `shared`.
        unsafe { std::slice::from_raw_parts(self.shared.arena.at(self.slot).add(RECORD_HEADER_BYTES), length) }
    }
}

impl Drop for BlockView {
    fn drop(&mut self) {
        self.shared.trie.release(self.node);
    }
}
