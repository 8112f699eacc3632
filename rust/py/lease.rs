//! `Lease` for Python.

use super::block::BlockBuffer;
use super::device_block::DeviceBlock;
use super::model::{Asked, Model};
use super::tensor::keep_alive;
use super::view::{Placement, view};
use super::{OrRaise, raise};
use crate::stats::Miss;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyMemoryView};

/// Valid tokens, places, why not more, and seconds of RAM and of SSD.
type Loaded = (usize, Vec<&'static str>, Option<&'static str>, (f64, f64));

/// A leased match; `stratakv.Match` wraps it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Lease {
    lease: crate::Lease,
}

impl Lease {
    pub(super) fn new(lease: crate::Lease) -> Self {
        Self { lease }
    }
}

#[pymethods]
impl Lease {
    /// Matched tokens.
    #[getter]
    fn tokens(&self) -> usize {
        self.lease.tokens()
    }

    /// Matched blocks.
    #[getter]
    fn blocks(&self) -> usize {
        self.lease.tokens() / self.lease.geometry().block_tokens as usize
    }

    /// Tokens of a block.
    #[getter]
    fn block_tokens(&self) -> usize {
        self.lease.geometry().block_tokens as usize
    }

    /// Tokens asked for.
    #[getter]
    fn asked_tokens(&self) -> usize {
        self.lease.asked_tokens()
    }

    /// The cheapest tier of each matched block.
    #[getter]
    fn places<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.lease.places().iter().map(|t| t.name()))
    }

    /// So many blocks that are not here are in another tier, and why others are not.
    #[pyo3(signature = (blocks, why))]
    fn found_elsewhere(&self, py: Python<'_>, blocks: usize, why: Option<&str>) -> PyResult<()> {
        self.lease.found_elsewhere(blocks, why.map(Miss::of).transpose().or_raise(py)?);
        Ok(())
    }

    /// The same match as it is now, of the same tokens, up to so many blocks; and why not more, if another tier said so.
    #[pyo3(signature = (model, tokens, most_blocks, why))]
    fn extended(
        &self,
        model: &Model,
        tokens: &Bound<'_, PyAny>,
        most_blocks: usize,
        why: Option<&str>,
    ) -> PyResult<Self> {
        let py = tokens.py();
        let asked = Asked::read(tokens, "", "")?;
        let why = why.map(Miss::of).transpose().or_raise(py)?;
        let lease = py.detach(|| self.lease.extended(&asked.sequence(model, "", ""), most_blocks, why));
        Ok(Self { lease: lease.or_raise(py)? })
    }

    /// Names the namespace.
    #[getter]
    fn space<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.lease.space())
    }

    /// Names of all whole blocks that were asked for, 16 bytes each.
    #[getter]
    fn names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.lease.names().iter().map(|name| PyBytes::new(py, name)))
    }

    /// Why the match is not longer.
    #[getter]
    fn miss(&self) -> Option<&'static str> {
        self.lease.miss().map(|m| m.name())
    }

    /// Copies some blocks of the match into `kv`; returns `(tokens, places, reason, (ram_s, ssd_s))`.
    #[pyo3(signature = (kv, layout, batch, pages, start, stop, stream))]
    #[expect(clippy::too_many_arguments, reason = "one crossing carries the whole request; Python names them")]
    fn load<'py>(
        &self,
        kv: &Bound<'py, PyAny>,
        layout: &str,
        batch: usize,
        pages: Option<&Bound<'py, PyAny>>,
        start: usize,
        stop: usize,
        stream: Option<u64>,
    ) -> PyResult<Loaded> {
        let py = kv.py();
        let placement = Placement { layout, batch, pages, stream };
        let (view, tensors) = view(kv, self.lease.geometry(), &placement, true)?;
        let outcome = py.detach(|| self.lease.load_part(&view, start..stop));
        keep_alive(tensors);
        let outcome = outcome.map_err(|e| raise(py, &e))?;
        let places = outcome.places.iter().map(|t| t.name()).collect();
        let took = (outcome.ram.as_secs_f64(), outcome.ssd.as_secs_f64());
        Ok((outcome.tokens, places, outcome.miss.map(|m| m.name()), took))
    }

    /// Reads into RAM what is on SSD alone; returns the leading blocks that are in RAM then.
    fn prefetch(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.lease.prefetch()).or_raise(py)
    }

    /// The bytes of one block, or `None`.
    fn view<'py>(&self, py: Python<'py>, block: usize) -> PyResult<Option<Bound<'py, PyMemoryView>>> {
        let Some(view) = self.lease.view(block) else { return Ok(None) };
        PyMemoryView::from(Bound::new(py, BlockBuffer::new(view))?.as_any()).map(Some)
    }

    /// One block where it lies on the device, or `None`.
    fn device_view(&self, block: usize) -> Option<DeviceBlock> {
        self.lease.device_view(block).map(DeviceBlock::new)
    }

    /// Gives the blocks free.
    fn release(&self, py: Python<'_>) {
        py.detach(|| self.lease.release());
    }
}
