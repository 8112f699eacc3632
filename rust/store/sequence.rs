//! Sequences: token ids whose blocks have their names, computed as the tokens come or given by an engine.
//!
//! A sequence that grows hashes only what is new. An engine that has named its blocks already, and mixed into the names
//! what tokens alone do not tell (an image, a prompt in embeddings), gives those names instead.

use super::Store;
use super::model::Model;
use super::namespace::Namespace;
use crate::block::BlockHash;
use crate::error::{Result, input};
use crate::sync::Arc;

/// Bytes of an engine's name of a block: at least what makes chance collisions a matter of theory.
const NAME_BYTES: std::ops::RangeInclusive<usize> = 16..=64;

/// Token ids and the hashes of their whole blocks, in one namespace of one model.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub(super) model: u32,
    pub(super) namespace: Arc<Namespace>,
    block_tokens: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) hashes: Vec<BlockHash>,
    /// Whether the blocks have names of an engine; settled by the first block.
    named: Option<bool>,
}

impl Store {
    /// A sequence of these tokens in the namespace of an adapter and a tenant.
    pub fn sequence(&self, model: &Model, adapter: &str, tenant: &str, tokens: Vec<u32>) -> Sequence {
        let mut sequence = self.empty_sequence(model, adapter, tenant);
        sequence.tokens = tokens;
        sequence.hash_new();
        sequence
    }

    /// A sequence of no tokens yet.
    pub fn empty_sequence(&self, model: &Model, adapter: &str, tenant: &str) -> Sequence {
        Sequence {
            model: model.id,
            namespace: model.namespace(&self.shared, adapter, tenant),
            block_tokens: model.spec.geometry.block_tokens as usize,
            tokens: Vec::new(),
            hashes: Vec::new(),
            named: None,
        }
    }
}

impl Sequence {
    /// All token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Appends tokens; `names`: an engine's name of each block that they complete, in order.
    ///
    /// # Errors
    /// Another number of names than of completed blocks, a name of fewer than 16 or more than 64 bytes, or names for
    /// some blocks of a sequence and none for others. The sequence is then as it was.
    pub fn extend(&mut self, tokens: &[u32], names: Option<&[&[u8]]>) -> Result<()> {
        let new_blocks = (self.tokens.len() + tokens.len()) / self.block_tokens - self.hashes.len();
        let named = match names {
            None if new_blocks == 0 => self.named,
            None => Some(false),
            Some(names) if names.len() != new_blocks => {
                return Err(input(format!(
                    "block_hashes: {} given, expected {new_blocks}, one for each block of {} tokens that is complete now",
                    names.len(),
                    self.block_tokens
                )));
            }
            Some([]) => self.named,
            Some(_) => Some(true),
        };
        if self.named.is_some() && named != self.named {
            let had = if self.named == Some(true) { "with" } else { "without" };
            return Err(input(format!("block_hashes: the sequence was begun {had} them; go on so, or begin another")));
        }
        if let Some(wrong) = names.unwrap_or_default().iter().find(|name| !NAME_BYTES.contains(&name.len())) {
            return Err(input(format!("block_hashes: one of {} bytes, expected 16 to 64", wrong.len())));
        }
        self.named = named;
        self.tokens.extend_from_slice(tokens);
        match names {
            Some(names) => self.hashes.extend(names.iter().map(|name| self.namespace.hasher.of_name(name))),
            None => self.hash_new(),
        }
        Ok(())
    }

    fn hash_new(&mut self) {
        let new = &self.tokens[self.hashes.len() * self.block_tokens..];
        let hashes = self.namespace.hasher.hashes_after(self.hashes.last().copied(), new);
        self.named = self.named.or((!hashes.is_empty()).then_some(false));
        match self.hashes.is_empty() {
            true => self.hashes = hashes,
            false => self.hashes.extend(hashes),
        }
    }

    pub(super) fn check_model(&self, model: &Model) -> Result<()> {
        if self.model == model.id {
            return Ok(());
        }
        let name = &model.spec.name;
        Err(input(format!("the sequence is of another model than {name:?}, or of an earlier registration of it")))
    }
}
