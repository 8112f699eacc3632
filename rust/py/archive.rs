//! `Archive` for Python.

use super::OrRaise;
use crate::FileIo;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::path::PathBuf;

/// Records that are right, their bytes, and where others lie with what is wrong.
type Verified = (u64, u64, Vec<(u64, &'static str)>);

/// A store directory as it is; `stratakv ssd` shows it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Archive {
    archive: crate::Archive,
}

#[pymethods]
impl Archive {
    /// Looks at a directory; nothing is written, and nothing locked.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let archive = py.detach(|| crate::Archive::open(&path, &FileIo::default())).or_raise(py)?;
        Ok(Self { archive })
    }

    /// Names the store.
    #[getter]
    fn uuid(&self) -> String {
        self.archive.uuid.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether a process has it open.
    #[getter]
    fn in_use(&self) -> bool {
        self.archive.in_use
    }

    /// Files that are named as a model's, and are none.
    #[getter]
    fn damaged(&self) -> Vec<PathBuf> {
        self.archive.damaged.clone()
    }

    /// What is known of each model.
    fn models<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for model in &self.archive.models {
            let row = PyDict::new(py);
            let shape = &model.geometry;
            row.set_item("name", &model.name)?;
            row.set_item("weights_version", &model.weights_version)?;
            let sizes = (shape.layers, shape.planes, shape.kv_heads, shape.head_dim);
            row.set_item("geometry", (sizes.0, sizes.1, sizes.2, sizes.3, shape.dtype.name(), shape.block_tokens))?;
            row.set_item("path", model.path())?;
            row.set_item("file_bytes", model.file_bytes)?;
            row.set_item("segment_bytes", model.segment_bytes)?;
            row.set_item("segments", model.places())?;
            row.set_item("torn_segments", model.torn)?;
            row.set_item("blocks", model.blocks)?;
            row.set_item("prefixes", model.prefixes)?;
            row.set_item("longest_blocks", model.longest)?;
            row.set_item("record_bytes", model.record_bytes)?;
            row.set_item("written_s", model.written)?;
            list.append(row)?;
        }
        Ok(list)
    }

    /// Checks every byte of a model's records in one segment, both by their place in `models()`.
    fn verify(&self, py: Python<'_>, model: usize, segment: usize) -> PyResult<Verified> {
        let known = self.archive.models.get(model).ok_or_else(|| {
            let message = format!("model {model}, expected less than {}", self.archive.models.len());
            super::raise(py, &crate::error::input(message))
        })?;
        let found = py.detach(|| known.verify(segment)).or_raise(py)?;
        Ok((found.records, found.bytes, found.bad))
    }
}
