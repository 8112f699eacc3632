//! Records that leave the process, for a tier that nodes share, and records that come from there.
//!
//! ```text
//! block in RAM ─▶ record of no segment | keyed digest ─▶ shared tier ─▶ checked in full ─▶ slot, findable as after a put
//! ```
//! A shared record is as one on SSD, with the secret's check value for the store, epoch 0, and 32 bytes behind it: the
//! keyed BLAKE3 of all before, so that nobody without the secret can make one. Nothing that comes from there is trusted:
//! digest, checksums, geometry, names and token ids must agree, or it is a miss.

use super::lease::Held;
use super::namespace::Namespace;
use super::write::encode;
use super::{Model, Sequence, Shared, Store};
use crate::block::{BlockHash, Geometry, RECORD_HEADER_BYTES, Sealed};
use crate::codec::Layout;
use crate::error::{Result, input};
use crate::pool::Slot;
use crate::ssd::record::{Form, RecordIdentity, SegmentIdentity, read_record, record_head, tokens_of};
use crate::stats::{Lifter, Miss};
use crate::sync::{Arc, AtomicBool};

/// Bytes of the digest.
const DIGEST_BYTES: usize = 32;

/// A record that was checked: the number of its block, itself without its digest, and how it is encoded.
type Right<'a> = (usize, &'a [u8], Option<Arc<Layout>>);

/// What became of records that came from a shared tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Leading blocks of the sequence that are cached now.
    pub blocks: usize,
    /// Blocks whose bytes came to RAM from the records.
    pub came: usize,
    /// Why not all of what was given; `None`: all is.
    pub miss: Option<Miss>,
}

impl Store {
    /// What names a model's records in a shared tier: equal for equal models of stores with the same secret.
    pub fn fingerprint(&self, model: &Model) -> Sealed {
        let spec = &model.spec;
        self.shared.secret.fingerprint(&spec.name, &spec.weights_version, &spec.geometry)
    }

    /// Of each block the one that begins its run of so many blocks, counted from the start of its sequence, and what names
    /// its namespace; `None`: it is in no tier of this store.
    ///
    /// # Errors
    /// The store is closed.
    pub fn heads(&self, model: &Model, names: &[Sealed], run_blocks: u32) -> Result<Vec<Option<(Sealed, Sealed)>>> {
        let state = self.shared.open_state()?;
        let (nodes, secret) = (&state.nodes, &self.shared.secret);
        let mut before = None;
        let head = |&name: &Sealed| {
            let id = nodes.find(secret.unseal(name)).filter(|&id| nodes.model(id) == model.id)?;
            let steps = nodes.depth(id) % run_blocks.max(1);
            let (head, seed) = match before {
                // As blocks mostly come: one after the other.
                Some((last, head, seed)) if nodes.parent(id) == Some(last) => (if steps > 0 { head } else { id }, seed),
                _ => {
                    let seed = nodes.hash_before(nodes.path(id).last()?);
                    ((0..steps).try_fold(id, |id, _| nodes.parent(id))?, seed)
                }
            };
            before = Some((id, head, seed));
            Some((secret.seal(nodes.hash(head)), secret.seal(seed)))
        };
        Ok(names.iter().map(head).collect())
    }

    /// The record of a block for a shared tier, encoded as blocks are that go to SSD; `None`: it is not in RAM.
    ///
    /// # Errors
    /// The store is closed.
    pub fn export(&self, model: &Model, name: Sealed) -> Result<Option<Vec<u8>>> {
        let shared = &self.shared;
        let state = shared.open_state()?;
        let Some(id) = state.nodes.find(shared.secret.unseal(name)).filter(|&id| state.nodes.model(id) == model.id)
        else {
            return Ok(None);
        };
        // Asked for first: one that is on SSD alone is not to be held for good.
        let Some(slot) = state.nodes[id].ram else { return Ok(None) };
        if state.nodes.lease(&[id]).is_empty() {
            return Ok(None);
        }
        // Its bytes stay until this goes.
        let _held = Held { trie: &shared.trie, id: Some(id) };
        let (hash, before, depth) = (state.nodes.hash(id), state.nodes.hash_before(id), state.nodes.depth(id));
        let layout = state.nodes[id].layout.clone();
        let cold = state.models.get(&model.id).and_then(|m| m.cold.clone());
        drop(state);
        let (geometry, identity) = (&model.spec.geometry, shared.shared_identity(model));
        let block = RecordIdentity { hash: shared.secret.seal(hash), parent: shared.secret.seal(before), depth };
        let form = layout.as_ref().map_or_else(|| Form::plain(geometry), |layout| Form::encoded(layout, depth));
        let body_bytes = geometry.payload_offset() + form.payload_bytes - RECORD_HEADER_BYTES;
        // SAFETY: the slot is held and published: what follows its header stays as it is.
        let body = unsafe { std::slice::from_raw_parts(shared.arena.at(slot).add(RECORD_HEADER_BYTES), body_bytes) };
        let mut record = vec![0; geometry.record_bytes() + DIGEST_BYTES];
        let encoded = match (&layout, &cold) {
            (None, Some(cold)) => encode(body, geometry, cold, &identity, &block, &mut record).map(<[u8]>::len),
            _ => None,
        };
        let length = encoded.unwrap_or_else(|| {
            record[..RECORD_HEADER_BYTES].copy_from_slice(&record_head(body, geometry, &form, &identity, &block));
            record[RECORD_HEADER_BYTES..][..body.len()].copy_from_slice(body);
            let length = geometry.record_bytes_of(form.payload_bytes);
            record[RECORD_HEADER_BYTES + body.len()..length].fill(0);
            length
        });
        let digest = shared.secret.digest(&record[..length]);
        record.truncate(length);
        record.extend_from_slice(&digest);
        Ok(Some(record))
    }

    /// Takes in records of a sequence from a shared tier, from block `first` on. Those that follow the blocks that are cached
    /// are findable as after a put; of those that are cached and not in RAM the bytes come there. A record that is not what
    /// it should be ends it.
    ///
    /// # Errors
    /// The store is closed, or the sequence is of another model.
    pub fn admit(&self, model: &Model, sequence: &Sequence, first: usize, records: &[&[u8]]) -> Result<Admitted> {
        sequence.check_model(model)?;
        let Sequence { namespace, tokens, hashes, .. } = sequence;
        self.admit_into(model, namespace, hashes, Some(tokens), first, records, None)
    }

    /// The same of a sequence of which only the names of its blocks are known, ahead of a request: they take no room from
    /// blocks that only RAM has. That a record has the tokens that its name tells is certain by its digest.
    ///
    /// # Errors
    /// The store is closed.
    #[expect(clippy::too_many_arguments, reason = "a namespace is named by adapter and tenant")]
    pub fn admit_named(
        &self,
        model: &Model,
        adapter: &str,
        tenant: &str,
        names: &[Sealed],
        first: usize,
        records: &[&[u8]],
        lifter: Lifter,
    ) -> Result<Admitted> {
        let hashes: Vec<BlockHash> = names.iter().map(|&name| self.shared.secret.unseal(name)).collect();
        let namespace = model.namespace(&self.shared, adapter, tenant);
        self.admit_into(model, &namespace, &hashes, None, first, records, Some(lifter))
    }

    #[expect(clippy::too_many_arguments, reason = "what the two above have in common")]
    fn admit_into(
        &self,
        model: &Model,
        namespace: &Namespace,
        hashes: &[BlockHash],
        tokens: Option<&[u32]>,
        first: usize,
        records: &[&[u8]],
        lifter: Option<Lifter>,
    ) -> Result<Admitted> {
        let shared = &self.shared;
        shared.check_open()?;
        let size = model.spec.geometry.block_tokens as usize;
        let found = shared.find(model, namespace, hashes, false)?;
        let known = found.map_or(0, |(_, blocks)| blocks);
        // As long as this is held, none of them is unlinked.
        let parent = Held { trie: &shared.trie, id: found.map(|(id, _)| id) };
        if known < first {
            return Ok(Admitted { blocks: known, came: 0, miss: Some(Miss::Evicted) });
        }
        let wanted = first..(first + records.len()).min(hashes.len());
        let in_ram: Vec<bool> = {
            let state = shared.open_state()?;
            let is_in_ram = |&hash: &BlockHash| state.nodes.find(hash).is_some_and(|id| state.nodes[id].ram.is_some());
            hashes[wanted.clone()].iter().map(is_in_ram).collect()
        };
        let mut miss = None;
        let mut right: Vec<Right> = Vec::new();
        for (at, in_ram) in wanted.zip(in_ram) {
            if in_ram {
                continue;
            }
            let before = at.checked_sub(1).map_or(namespace.hasher.seed(), |before| hashes[before]);
            let expected = tokens.map(|tokens| &tokens[at * size..(at + 1) * size]);
            match shared.checked(model, records[at - first], hashes[at], before, at, expected) {
                Some((record, layout)) => right.push((at, record, layout)),
                None => {
                    miss = Some(Miss::Corrupt);
                    break;
                }
            }
        }
        let mut state = shared.open_state()?;
        state.catch_up(&shared.touched);
        let mut slots: Vec<Slot> = Vec::new();
        for (_, record, _) in &right {
            let Some(slot) = state.allocate(namespace.owner, record.len(), lifter.is_none()) else {
                miss = miss.or(Some(Miss::Evicted));
                break;
            };
            slots.push(slot);
        }
        drop(state);
        for (&slot, (_, record, _)) in slots.iter().zip(&right) {
            // SAFETY: the slot was taken for this record's length, and is not published: this thread alone has it.
            unsafe { std::ptr::copy_nonoverlapping(record.as_ptr(), shared.arena.at(slot), record.len()) };
        }
        let mut state = shared.state.lock();
        // Others may have added blocks since: what follows those that are cached now is what is to be added.
        let (mut cached, mut last) = (known, parent.id);
        while let Some(id) = hashes.get(cached).and_then(|&hash| state.nodes.find(hash)) {
            (cached, last) = (cached + 1, Some(id));
        }
        let (mut came, mut follow) = (Vec::new(), Vec::new());
        for (slot, (at, _, layout)) in slots.into_iter().zip(right) {
            let here = state.nodes.find(hashes[at]).filter(|_| at < cached);
            match here {
                Some(id) if state.nodes[id].ram.is_none() => {
                    state.place_in_ram(id, slot, layout);
                    came.push(id);
                }
                None if at == cached + follow.len() => follow.push((slot, layout)),
                // It is there; or what is before it is not.
                _ => state.free(slot),
            }
        }
        let (next, expected) = (&hashes[cached..cached + follow.len()], follow.len());
        let (published, _) = state.publish(model, namespace, last, next, follow);
        came.extend(next[..published].iter().filter_map(|&hash| state.nodes.find(hash)));
        came.iter().for_each(|&id| state.lifted(id, lifter));
        if published < expected {
            miss = miss.or(Some(Miss::Evicted));
        }
        let counts = state.owners.counts(namespace.owner);
        counts.promoted += came.len() as u64;
        counts.corrupt += u64::from(miss == Some(Miss::Corrupt));
        let (blocks, came) = (cached + published, came.len());
        let work = state.has_work();
        drop(state);
        if work {
            shared.work.notify_all();
        }
        Ok(Admitted { blocks, came, miss })
    }
}

impl Shared {
    fn shared_identity(&self, model: &Model) -> SegmentIdentity {
        let spec = &model.spec;
        let fingerprint = self.secret.fingerprint(&spec.name, &spec.weights_version, &spec.geometry);
        SegmentIdentity { uuid: self.secret.check_value(), fingerprint, epoch: 0 }
    }

    // A record without its digest, if it is that of this block; and how it is encoded.
    fn checked<'a>(
        &self,
        model: &Model,
        bytes: &'a [u8],
        hash: BlockHash,
        before: BlockHash,
        depth: usize,
        expected: Option<&[u32]>,
    ) -> Option<(&'a [u8], Option<Arc<Layout>>)> {
        let geometry: &Geometry = &model.spec.geometry;
        let (record, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST_BYTES)?)?;
        let (block, form) = read_record(record, geometry, &self.shared_identity(model))?;
        let right = self.secret.is_digest(record, digest)
            && record.len() == geometry.record_bytes_of(form.payload_bytes)
            && block.hash == self.secret.seal(hash)
            && block.parent == self.secret.seal(before)
            && block.depth as usize == depth
            && expected
                .is_none_or(|tokens| tokens_of(&record[RECORD_HEADER_BYTES..], geometry).eq(tokens.iter().copied()));
        let layout = match &form.scheme {
            None => None,
            Some(scheme) => {
                let layout = Layout::new(*scheme, geometry).ok()?;
                Some(Arc::new(Some(layout).filter(|layout| Form::encoded(layout, block.depth) == form)?))
            }
        };
        right.then_some((record, layout))
    }
}

impl super::Lease {
    /// The same match as it is now, of the same tokens: longer, where blocks were admitted since, up to so many blocks. Of
    /// what was not counted yet, what it found more counts as found, and the others as missed: for that reason, or for the
    /// one why they are not here.
    ///
    /// # Errors
    /// The store is closed, or the sequence is another.
    pub fn extended(&self, sequence: &Sequence, most_blocks: usize, why: Option<Miss>) -> Result<Self> {
        let shared = &self.shared;
        shared.check_open()?;
        sequence.check_model(&self.model)?;
        if sequence.hashes.get(..self.hashes.len()) != Some(&self.hashes[..]) {
            return Err(input("the sequence is another than that of the match"));
        }
        let most = most_blocks.max(self.blocks()).min(self.hashes.len());
        let found = shared.find(&self.model, &self.namespace, &self.hashes[..most], false)?;
        let blocks = found.map_or(0, |(_, blocks)| blocks);
        self.model.prefills.forget(&self.hashes);
        let miss = self.hashes.get(blocks).map(|&next| shared.why_missing(&self.model, &self.namespace, next));
        let tokens = sequence.tokens[..blocks * self.model.spec.geometry.block_tokens as usize].to_vec();
        let now = Self {
            shared: shared.clone(),
            model: self.model.clone(),
            namespace: self.namespace.clone(),
            deepest: found.map(|(id, _)| id),
            hashes: self.hashes.clone(),
            tokens,
            asked_tokens: self.asked_tokens,
            miss,
            released: AtomicBool::new(false),
            owed: None,
        };
        self.found_elsewhere(now.blocks().saturating_sub(self.blocks()), why.or(now.miss));
        self.count_owed();
        Ok(now)
    }

    /// What names the namespace, in its epoch of then.
    pub fn space(&self) -> Sealed {
        self.shared.secret.seal(self.namespace.hasher.seed())
    }

    /// Names of all whole blocks that were asked for, to everyone who has the store's secret.
    pub fn names(&self) -> Vec<Sealed> {
        self.hashes.iter().map(|&hash| self.shared.secret.seal(hash)).collect()
    }
}
