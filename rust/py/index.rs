//! `PrefixIndex` for Python: which replica has which prefix, by tokens.

use super::OrRaise;
use super::tensor::integers;
use crate::block::{BlockHash, Dtype, Geometry, Hasher, Sealed, Secret};
use crate::error::input;
use crate::holders::{Hits, Holders, PLACES};
use crate::sync::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use std::collections::HashMap;

/// Namespaces that are kept ready.
const READY: usize = 4096;

/// Which replicas have which prefixes of one model, named as a store with the same secret names them; for
/// `stratakv.router`.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct PrefixIndex {
    secret: Secret,
    model: (String, String, Geometry),
    hashers: Mutex<HashMap<(String, String), Hasher>>,
    holders: Mutex<Holders>,
}

#[pymethods]
impl PrefixIndex {
    /// Of a model as it is registered; geometry is `(layers, planes, kv_heads, head_dim, dtype, block_tokens)`.
    #[new]
    fn new(
        py: Python<'_>,
        secret: &[u8],
        name: String,
        weights_version: String,
        geometry: (u32, u32, u32, u32, String, u32),
    ) -> PyResult<Self> {
        let (layers, planes, kv_heads, head_dim, dtype, block_tokens) = geometry;
        let dtype = Dtype::parse(&dtype).or_raise(py)?;
        let geometry = Geometry { layers, planes, kv_heads, head_dim, dtype, block_tokens };
        geometry.validate().or_raise(py)?;
        let model = (name, weights_version, geometry);
        Ok(Self { secret: Secret::new(secret), model, hashers: Mutex::default(), holders: Mutex::default() })
    }

    /// The names of all whole blocks of `tokens`, which follow the block of the name `after`: 16 bytes each.
    #[pyo3(signature = (tokens, adapter, tenant, after = None))]
    fn hashes<'py>(
        &self,
        tokens: &Bound<'py, PyAny>,
        adapter: &str,
        tenant: &str,
        after: Option<&[u8]>,
    ) -> PyResult<Bound<'py, PyList>> {
        let py = tokens.py();
        let last = after.map(|name| self.unseal(name)).transpose().or_raise(py)?;
        let ids = integers(tokens, "tokens")?;
        let hashes = self.hashes_of(&ids, adapter, tenant, last);
        PyList::new(py, hashes.into_iter().map(|hash| PyBytes::new(py, &self.secret.seal(hash))))
    }

    /// Notes that a replica has blocks of these names in a place, or no longer.
    #[expect(clippy::needless_pass_by_value, reason = "that is how a list of bytes crosses")]
    fn set(&self, py: Python<'_>, names: Vec<Vec<u8>>, place: usize, replica: usize, has: bool) -> PyResult<()> {
        let blocks: crate::Result<Vec<BlockHash>> = names.iter().map(|name| self.unseal(name)).collect();
        self.holders.lock().set(blocks.or_raise(py)?, checked(place).or_raise(py)?, replica, has);
        Ok(())
    }

    /// What replicas have of a prompt.
    fn find(&self, tokens: &Bound<'_, PyAny>, adapter: &str, tenant: &str) -> PyResult<Found> {
        let ids = integers(tokens, "tokens")?;
        let blocks = self.hashes_of(&ids, adapter, tenant, None);
        let hits = self.holders.lock().longest(&blocks);
        Ok(Found { tokens: ids.len(), blocks, hits })
    }

    /// Notes that a replica has all blocks of a prompt in a place, but for so many of the first; or no longer.
    fn expect(
        &self,
        py: Python<'_>,
        found: &Found,
        skip: usize,
        place: usize,
        replica: usize,
        has: bool,
    ) -> PyResult<()> {
        let blocks = found.blocks.iter().copied().skip(skip);
        self.holders.lock().set(blocks, checked(place).or_raise(py)?, replica, has);
        Ok(())
    }

    /// Blocks that somebody has.
    fn __len__(&self) -> usize {
        self.holders.lock().len()
    }
}

impl PrefixIndex {
    fn hashes_of(&self, tokens: &[u32], adapter: &str, tenant: &str, after: Option<BlockHash>) -> Vec<BlockHash> {
        let mut hashers = self.hashers.lock();
        if hashers.len() >= READY {
            hashers.clear();
        }
        let (name, version, geometry) = &self.model;
        let hasher = hashers
            .entry((adapter.to_owned(), tenant.to_owned()))
            .or_insert_with(|| Hasher::new(&self.secret, name, version, geometry, adapter, tenant));
        hasher.hashes_after(after, tokens)
    }

    fn unseal(&self, name: &[u8]) -> crate::Result<BlockHash> {
        let sealed = Sealed::try_from(name);
        sealed.map(|sealed| self.secret.unseal(sealed)).map_err(|_| input("expected the 16 bytes that name a block"))
    }
}

fn checked(place: usize) -> crate::Result<usize> {
    if place < PLACES { Ok(place) } else { Err(input(format!("place is {place}, expected less than {PLACES}"))) }
}

/// What replicas have of a prompt.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Found {
    #[pyo3(get)]
    tokens: usize,
    blocks: Vec<BlockHash>,
    hits: Hits,
}

#[pymethods]
impl Found {
    /// By replica: leading blocks that it has, each place times its weight.
    fn weighted(&self, weights: [f64; PLACES]) -> HashMap<usize, f64> {
        let sum = |hits: &[u32; PLACES]| hits.iter().zip(weights).map(|(&hits, weight)| f64::from(hits) * weight).sum();
        self.hits.iter().map(|(replica, hits)| (*replica, sum(hits))).collect()
    }

    /// Leading blocks that a replica has, by place.
    fn blocks(&self, replica: usize) -> [u32; PLACES] {
        self.hits.iter().find(|(of, _)| *of == replica).map_or([0; PLACES], |(_, hits)| *hits)
    }
}
