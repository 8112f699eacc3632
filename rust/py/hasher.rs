//! `BlockHasher` for Python: names of blocks without a store.

use super::OrRaise;
use super::tensor::integers;
use crate::block::{BlockHash, Dtype, Geometry, Hasher, Sealed, Secret};
use crate::error::input;
use crate::sync::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use std::collections::HashMap;

/// Namespaces that are kept ready.
const READY: usize = 4096;

/// Names the blocks of a model as a store with the same secret does; `stratakv.router` asks it where they are.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct BlockHasher {
    secret: Secret,
    model: (String, String, Geometry),
    hashers: Mutex<HashMap<(String, String), Hasher>>,
}

#[pymethods]
impl BlockHasher {
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
        let (secret, hashers) = (Secret::new(secret), Mutex::default());
        Ok(Self { secret, model: (name, weights_version, geometry), hashers })
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
        let ids = integers(tokens, "tokens")?;
        let last: Option<BlockHash> = match after.map(Sealed::try_from) {
            None => None,
            Some(Ok(sealed)) => Some(self.secret.unseal(sealed)),
            Some(Err(_)) => return Err(input("after: expected the 16 bytes that name a block")).or_raise(py),
        };
        let mut hashers = self.hashers.lock();
        if hashers.len() >= READY {
            hashers.clear();
        }
        let (name, version, geometry) = &self.model;
        let hasher = hashers
            .entry((adapter.to_owned(), tenant.to_owned()))
            .or_insert_with(|| Hasher::new(&self.secret, name, version, geometry, adapter, tenant));
        let hashes = hasher.hashes_after(last, &ids);
        PyList::new(py, hashes.into_iter().map(|hash| PyBytes::new(py, &self.secret.seal(hash))))
    }
}
