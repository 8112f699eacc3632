//! A block by reference: its bytes where they lie in RAM, or on the device, without a copy.

use super::gpu::OnGpu;
use super::{Lease, Shared};
use crate::block::{Geometry, RECORD_HEADER_BYTES};
use crate::gpu::{Fault, Stream, Ticket};
use crate::pool::Slot;
use crate::ssd::record::tokens_of;
use crate::stats::Tier;
use crate::sync::{Arc, Mutex, Ordering};
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

/// A block where it lies on the device, `[layer][plane][head][token][dim]`: its place is nobody else's until this and what
/// was handed out of it are dropped, whatever becomes of the match, the model and the store.
#[derive(Debug)]
pub struct DeviceView {
    shared: Arc<Shared>,
    node: NodeId,
    held: OnGpu,
    geometry: Geometry,
    given: Mutex<Given>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given {
    Nothing,
    /// To somebody who reads it for as long as the view is there.
    ToRead,
    ToWrite,
}

/// A block of the device in somebody else's hands, who uses it in a stream up to when this is dropped. That stream is there
/// until then.
#[derive(Debug)]
pub struct HandedOut {
    shared: Arc<Shared>,
    held: OnGpu,
    stream: Stream,
}

/// The stream that waits for all others but those that said that it should not.
const DEFAULT_STREAM: Stream = Stream(1);

impl Lease {
    /// Block `n` of the match on the device. `None`: there is no such block, it is not there, or the match was released.
    pub fn device_view(&self, n: usize) -> Option<DeviceView> {
        let hash = *self.hashes[..self.blocks()].get(n)?;
        let geometry = self.model.spec().geometry;
        let size = geometry.block_tokens as usize;
        self.shared.check_open().ok()?;
        let mut state = self.shared.state.lock();
        if self.released.load(Ordering::Acquire) || state.closed {
            return None;
        }
        let node = state.nodes.find(hash)?;
        let held = state.hold_on_gpu(node, &self.tokens[n * size..(n + 1) * size])?;
        let counts = state.owners.counts(self.namespace.owner);
        counts.asked_tier(Tier::Gpu, true);
        counts.loaded_tokens += size as u64;
        counts.loaded_bytes += geometry.block_bytes() as u64;
        Some(DeviceView { shared: self.shared.clone(), node, held, geometry, given: Mutex::new(Given::Nothing) })
    }

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

impl DeviceView {
    /// Shape of the block.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Its first byte, as the device has it.
    pub fn address(&self) -> u64 {
        self.held.address
    }

    /// The device's number.
    pub fn device(&self) -> u32 {
        self.shared.gpu.as_ref().map_or(0, |link| link.device.number())
    }

    /// Waits until its bytes are there, for who reads them for as long as this view is there.
    ///
    /// # Errors
    /// The device is lost, or the block was given away.
    pub fn read(&self) -> Result<(), Fault> {
        self.check_home()?;
        let mut given = self.given.lock();
        if *given == Given::ToWrite {
            return Err(given_away());
        }
        *given = Given::ToRead;
        drop(given);
        self.on_device(|device| device.wait(self.held.ready))
    }

    /// Hands the block to who uses it in a stream, in which its bytes are there from now on; of who does not say which one,
    /// they are there when this returns, and what it does is in order with the default stream. `to_write`: it cannot be
    /// told not to write; then the tier has the block no more.
    ///
    /// # Errors
    /// The device is lost, or refuses the stream; it was given away to be written, or others read what now would be.
    pub fn hand_out(&self, stream: Option<Stream>, to_write: bool) -> Result<HandedOut, Fault> {
        self.check_home()?;
        let mut given = self.given.lock();
        if *given == Given::ToWrite {
            return Err(given_away());
        }
        if *given == Given::ToRead && to_write {
            return Err(Fault::Refused("others read the block".into()));
        }
        self.on_device(|device| match stream {
            Some(stream) => device.join(stream, self.held.ready),
            None => device.wait(self.held.ready),
        })?;
        let read = self.shared.state.lock().hold_again(self.node, &self.held, to_write)?;
        if to_write {
            *given = Given::ToWrite;
        }
        // A thread's own default stream is another in each thread, and no later than that of all.
        let used = stream.filter(|stream| stream.0 > 2).unwrap_or(DEFAULT_STREAM);
        let out = HandedOut { shared: self.shared.clone(), held: self.held, stream: used };
        // It is written when nobody reads it any more.
        self.on_device(|device| {
            read.into_iter().try_for_each(|ticket| match stream {
                Some(stream) => device.join(stream, ticket),
                None => device.wait(ticket),
            })
        })?;
        Ok(out)
    }

    fn check_home(&self) -> Result<(), Fault> {
        let elsewhere = || Fault::Refused("the store was opened before a fork".into());
        self.shared.home.is_here().then_some(()).ok_or_else(elsewhere)
    }

    fn on_device<T>(&self, call: impl FnOnce(&dyn crate::gpu::Device) -> Result<T, Fault>) -> Result<T, Fault> {
        let link = self.shared.gpu.as_ref().ok_or_else(|| Fault::Refused("there is no GPU tier".into()))?;
        call(&*link.device).inspect_err(|fault| self.shared.failed_on_device(fault))
    }
}

fn given_away() -> Fault {
    Fault::Refused("the block was given away to be written; ask for it anew".into())
}

impl Drop for DeviceView {
    fn drop(&mut self) {
        if !self.shared.home.is_here() {
            return;
        }
        let read = *self.given.lock() == Given::ToRead;
        let mut state = self.shared.state.lock();
        let gone = match read {
            true => state.came_back(&self.held, DEFAULT_STREAM),
            false => state.let_go_on_gpu(&self.held, Ticket::NONE),
        };
        drop(state);
        drop(gone);
    }
}

impl Drop for HandedOut {
    fn drop(&mut self) {
        if self.shared.home.is_here() {
            let gone = self.shared.state.lock().came_back(&self.held, self.stream);
            drop(gone);
        }
    }
}
