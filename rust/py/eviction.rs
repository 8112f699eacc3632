//! `EvictionPolicy` for Python: which of an engine's own blocks leave next.

use super::OrRaise;
use crate::error::input;
use crate::evict::{Keyed, Kind};
use crate::sync::Mutex;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList};

/// The order of eviction of blocks that an engine keeps, by its keys; for `stratakv.integrations`.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct EvictionPolicy {
    blocks: Mutex<Keyed>,
}

#[pymethods]
impl EvictionPolicy {
    /// Of a cache that holds `capacity` blocks; names are those of `ram.eviction`.
    #[new]
    fn new(py: Python<'_>, name: &str, capacity: usize) -> PyResult<Self> {
        let kind = Kind::parse(name).or_raise(py)?;
        Ok(Self { blocks: Mutex::new(Keyed::new(kind, capacity)) })
    }

    /// The policy that runs at present; another than the one that was asked for only for `adaptive`.
    #[getter]
    fn running(&self) -> &'static str {
        self.blocks.lock().running().name()
    }

    /// A block came, which continues that of the key `after`, if that is there; what is held is not evicted.
    #[pyo3(signature = (key, after = None, held = false))]
    fn insert(&self, py: Python<'_>, key: &[u8], after: Option<&[u8]>, held: bool) -> PyResult<()> {
        self.blocks.lock().insert(key, after, held).or_raise(py)
    }

    /// A block left without being evicted.
    fn remove(&self, py: Python<'_>, key: &[u8]) -> PyResult<()> {
        known(self.blocks.lock().remove(key)).or_raise(py)
    }

    /// From now on a block may not be evicted, or may.
    fn hold(&self, py: Python<'_>, key: &[u8], held: bool) -> PyResult<()> {
        known(self.blocks.lock().hold(key, held)).or_raise(py)
    }

    /// A request asked for these blocks, which follow one another, there or not. Of those that are there, all but the
    /// fresh ones, which came for this request, were used.
    #[expect(clippy::needless_pass_by_value, reason = "that is how a list of bytes crosses")]
    fn access(&self, path: Vec<PyBackedBytes>, fresh: Vec<PyBackedBytes>) {
        self.blocks.lock().access(&path, &fresh);
    }

    /// These blocks follow one another, as far as they are there; that is no use of them.
    #[expect(clippy::needless_pass_by_value, reason = "that is how a list of bytes crosses")]
    fn follow(&self, path: Vec<PyBackedBytes>) {
        self.blocks.lock().follow(&path);
    }

    /// Takes out so many blocks, none of the protected ones; what is spared leaves late. `None`: not so many may leave,
    /// and nothing has changed.
    #[expect(clippy::needless_pass_by_value, reason = "that is how a list of bytes crosses")]
    fn evict<'py>(
        &self,
        py: Python<'py>,
        count: usize,
        protected: Vec<PyBackedBytes>,
        spared: Vec<PyBackedBytes>,
    ) -> PyResult<Option<Bound<'py, PyList>>> {
        let gone = self.blocks.lock().evict(count, &protected, &spared);
        gone.map(|keys| PyList::new(py, keys.iter().map(|key| PyBytes::new(py, key)))).transpose()
    }

    /// Forgets all blocks, and what was learnt from them.
    fn clear(&self) {
        self.blocks.lock().clear();
    }

    /// Blocks in the cache.
    fn __len__(&self) -> usize {
        self.blocks.lock().len()
    }
}

fn known(there: bool) -> crate::Result<()> {
    if there { Ok(()) } else { Err(input("no block of that key is there")) }
}
