//! Matching, without a lock: ask the index, count, and leave a note of what was touched. A match holds its deepest
//! block, and so every block before it.

use super::model::Model;
use super::namespace::Namespace;
use super::{Sequence, Shared, Store};
use crate::block::{BlockHash, Geometry};
use crate::error::{Result, input};
use crate::stats::{Miss, Tier};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};
use crate::trie::{NodeId, TooManyLeases, Trie};
use crossbeam_queue::ArrayQueue;

/// Paths that were found since somebody last had the lock. A full queue forgets its oldest.
#[derive(Debug)]
pub(super) struct Touched {
    notes: ArrayQueue<Note>,
    /// Whether the demotion thread was asked to take them in.
    asked: AtomicBool,
}

/// A path that was found: its deepest block, which life of it, and whether a match asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Note {
    pub(super) deepest: NodeId,
    pub(super) life: u16,
    pub(super) asked: bool,
}

impl Default for Touched {
    fn default() -> Self {
        Self { notes: ArrayQueue::new(TOUCHED), asked: AtomicBool::new(false) }
    }
}

impl Touched {
    /// Leaves a note; whether somebody ought to be called to take the notes in.
    fn push(&self, note: Note) -> bool {
        self.notes.force_push(note);
        // Relaxed: a call too many, or one at the next match, does no harm.
        self.notes.len() >= TOUCHED / 2
            && !self.asked.load(Ordering::Relaxed)
            && !self.asked.swap(true, Ordering::Relaxed)
    }

    /// What was found, in order. However many come meanwhile, this ends.
    pub(super) fn take(&self) -> Vec<Note> {
        let notes = (0..TOUCHED).map_while(|_| self.notes.pop()).collect();
        self.asked.store(false, Ordering::Relaxed);
        notes
    }
}

/// Prompts of which a match found too little, for who brings up what is near to them. A full queue takes no more.
#[derive(Debug)]
pub(super) struct Missed {
    /// Whether somebody takes them.
    on: AtomicBool,
    prompts: ArrayQueue<MissedPrompt>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct MissedPrompt {
    pub(super) model: u32,
    pub(super) namespace: Arc<Namespace>,
    pub(super) tokens: Vec<u32>,
}

impl Default for Missed {
    fn default() -> Self {
        Self { on: AtomicBool::new(false), prompts: ArrayQueue::new(MISSED) }
    }
}

impl Missed {
    fn note(&self, model: &Model, namespace: &Arc<Namespace>, tokens: &[u32]) {
        // Relaxed: a prompt more or less does no harm.
        if self.on.load(Ordering::Relaxed) && !self.prompts.is_full() {
            let tokens = tokens[..tokens.len().min(MISSED_TOKENS)].to_vec();
            let _full = self.prompts.push(MissedPrompt { model: model.id, namespace: namespace.clone(), tokens });
        }
    }

    /// Takes those that are there; from the first such call on they are noted.
    pub(super) fn take(&self) -> Vec<MissedPrompt> {
        self.on.store(true, Ordering::Relaxed);
        (0..MISSED).map_while(|_| self.prompts.pop()).collect()
    }
}

/// Prompts that wait, and tokens of each that are kept.
const MISSED: usize = 64;
const MISSED_TOKENS: usize = 4096;

/// Matches between two uses of the lock that are remembered.
const TOUCHED: usize = 256;

/// A match: the longest cached prefix of some tokens, held until this is released or dropped.
#[derive(Debug)]
pub struct Lease {
    pub(super) shared: Arc<Shared>,
    pub(super) model: Arc<Model>,
    pub(super) namespace: Arc<Namespace>,
    pub(super) deepest: Option<NodeId>,
    /// Of every whole block that was asked for.
    pub(super) hashes: Vec<BlockHash>,
    /// Of the blocks that were found.
    pub(super) tokens: Vec<u32>,
    pub(super) asked_tokens: usize,
    /// Why the first block that was not found was not.
    pub(super) miss: Option<Miss>,
    pub(super) released: AtomicBool,
    /// What is not counted yet: another tier may have it.
    pub(super) owed: Option<Mutex<Owed>>,
}

/// Blocks of a match that are not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Owed {
    pub(super) blocks: usize,
    /// Whether another tier has them.
    pub(super) found: bool,
}

impl Store {
    /// Finds the longest cached prefix of `tokens` and holds it. Counts every whole block as asked.
    ///
    /// # Errors
    /// The store is closed, or one block has 2^20 leases.
    pub fn match_prefix(&self, model: &Arc<Model>, tokens: &[u32], adapter: &str, tenant: &str) -> Result<Lease> {
        self.match_sequence(model, self.sequence(model, adapter, tenant, tokens.to_vec()))
    }

    /// As [`match_prefix`](Self::match_prefix), of a sequence.
    ///
    /// # Errors
    /// As there; or the sequence is of another model.
    pub fn match_sequence(&self, model: &Arc<Model>, sequence: Sequence) -> Result<Lease> {
        self.match_and_count(model, sequence, false)
    }

    /// As [`match_sequence`](Self::match_sequence), where another tier is asked for the blocks that are not here: they count
    /// as [`Lease::found_elsewhere`] says.
    ///
    /// # Errors
    /// As there.
    pub fn match_here(&self, model: &Arc<Model>, sequence: Sequence) -> Result<Lease> {
        self.match_and_count(model, sequence, true)
    }

    fn match_and_count(&self, model: &Arc<Model>, sequence: Sequence, later: bool) -> Result<Lease> {
        self.shared.check_open()?;
        sequence.check_model(model)?;
        let Sequence { namespace, mut tokens, hashes, .. } = sequence;
        // Who finds nothing misses the first.
        hashes.first().into_iter().for_each(|&first| self.shared.gone.warm(first));
        let found = self.shared.find(model, &namespace, &hashes, true)?;
        let blocks = found.map_or(0, |(_, blocks)| blocks);
        let miss = hashes.get(blocks).map(|&next| self.shared.why_missing(model, &namespace, next));
        let missing = hashes.len() - blocks;
        namespace.matches.count(blocks, miss.map(|why| (why, if later { 0 } else { missing })));
        let asked_tokens = tokens.len();
        if miss.is_some() {
            self.shared.missed.note(model, &namespace, &tokens);
        }
        model.prefills.asked(&hashes, asked_tokens - blocks * model.spec.geometry.block_tokens as usize);
        tokens.truncate(blocks * model.spec.geometry.block_tokens as usize);
        Ok(Lease {
            shared: self.shared.clone(),
            model: model.clone(),
            namespace,
            deepest: found.map(|(id, _)| id),
            hashes,
            tokens,
            asked_tokens,
            miss,
            released: AtomicBool::new(false),
            owed: (later && missing > 0).then(|| Mutex::new(Owed { blocks: missing, found: false })),
        })
    }
}

impl Shared {
    /// The longest cached prefix: its deepest block, leased and noted as touched, and its length. `asked`: by a match.
    pub(super) fn find(
        &self,
        model: &Model,
        namespace: &Namespace,
        hashes: &[BlockHash],
        asked: bool,
    ) -> Result<Option<(NodeId, usize)>> {
        let found = match !model.serves() || namespace.is_dropped() {
            true => None,
            false => self.trie.longest_prefix(hashes).map_err(|TooManyLeases| {
                input("a block of these tokens has 2^20 leases, the most there are; release matches that are done with")
            })?,
        };
        if let Some((id, _)) = found {
            // Nobody had the lock for long: the thread behind takes it, not this request.
            if self.touched.push(Note { deepest: id, life: self.trie.generation(id), asked }) {
                self.work.notify_all();
            }
        }
        Ok(found)
    }

    /// Why a match does not find a block.
    pub(super) fn why_missing(&self, model: &Model, namespace: &Namespace, hash: BlockHash) -> Miss {
        forgotten(model, namespace).unwrap_or_else(|| self.gone.why(hash))
    }
}

// Why nothing of a namespace is there, if that is so.
fn forgotten(model: &Model, namespace: &Namespace) -> Option<Miss> {
    let dropped = || (namespace.is_dropped() || model.is_retired()).then_some(Miss::Dropped);
    if model.ended() { Some(Miss::Closed) } else { dropped() }
}

/// A lease on one block while a call lasts.
pub(super) struct Held<'a> {
    pub(super) trie: &'a Trie,
    pub(super) id: Option<NodeId>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.trie.release(id);
        }
    }
}

impl Lease {
    /// Tokens of the match: whole blocks.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Shape of the model's blocks.
    pub fn geometry(&self) -> &Geometry {
        &self.model.spec.geometry
    }

    /// Tokens that were asked for.
    pub fn asked_tokens(&self) -> usize {
        self.asked_tokens
    }

    /// The cheapest tier that has each block of the match now; it ends where a block was lost.
    pub fn places(&self) -> Vec<Tier> {
        let state = self.shared.state.lock();
        let matched = self.hashes[..self.blocks()].iter();
        let tier = |id: NodeId| if state.nodes[id].ram.is_some() { Tier::Ram } else { Tier::Ssd };
        matched.map_while(|&hash| state.nodes.find(hash).map(tier)).collect()
    }

    /// Why the match is not longer; `None` if every whole block was cached.
    pub fn miss(&self) -> Option<Miss> {
        self.miss.map(|then| self.forgotten().unwrap_or(then))
    }

    /// Of the blocks that are not here and are not counted, the first so many are in another tier: they count as found when
    /// the match ends. The others count as missed now, for that reason, or for the one why they are not here. Said again, it
    /// holds for those that were found before.
    pub fn found_elsewhere(&self, blocks: usize, why: Option<Miss>) {
        let Some(owed) = &self.owed else { return };
        let mut owed = owed.lock();
        let missing = owed.blocks.saturating_sub(blocks);
        *owed = Owed { blocks: owed.blocks - missing, found: true };
        if let Some(why) = why.or(self.miss) {
            self.namespace.matches.count_more(0, Some((why, missing)));
        }
    }

    // Counts what is not counted yet.
    pub(super) fn count_owed(&self) {
        let Some(owed) = &self.owed else { return };
        let Owed { blocks, found } = std::mem::replace(&mut *owed.lock(), Owed { blocks: 0, found: true });
        let missing = self.miss.filter(|_| !found).map(|why| (why, blocks));
        self.namespace.matches.count_more(if found { blocks } else { 0 }, missing);
    }

    /// Why nothing of the match is there any more, if that is so.
    pub(super) fn forgotten(&self) -> Option<Miss> {
        forgotten(&self.model, &self.namespace)
    }

    pub(super) fn blocks(&self) -> usize {
        self.tokens.len() / self.model.spec.geometry.block_tokens as usize
    }

    /// Gives the blocks free. Releasing twice does nothing.
    pub fn release(&self) {
        // AcqRel: exactly one caller sees `false`.
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        self.count_owed();
        if let Some(id) = self.deepest {
            self.shared.trie.release(id);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}
