//! The Python extension `stratakv._native`: thin wrappers, one crossing per request.
//!
//! Arguments are read with the interpreter attached; then one detached call does the work. Errors become the exceptions
//! of `stratakv.errors`, by kind.

mod archive;
mod block;
mod device_block;
mod eviction;
mod gpu;
mod index;
mod lease;
mod model;
mod store;
mod tensor;
mod view;

use crate::error::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// The exception of `stratakv.errors` for an error.
fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let name = match error.kind() {
        ErrorKind::Input => "InputError",
        ErrorKind::Config => "ConfigError",
        ErrorKind::Io => "StoreError",
        ErrorKind::Locked => "StoreLockedError",
        ErrorKind::Format => "StoreFormatError",
        ErrorKind::ModelExists => "ModelExistsError",
        ErrorKind::ModelNotFound => "ModelNotFoundError",
        ErrorKind::Closed => "ClosedError",
    };
    let class = py
        .import("stratakv.errors")
        .and_then(|errors| errors.getattr(name))
        .and_then(|class| Ok(class.cast_into::<PyType>()?));
    match class {
        Ok(class) => PyErr::from_type(class, error.to_string()),
        Err(e) => e,
    }
}

/// Turns the crate's results into Python's.
trait OrRaise<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for crate::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|e| raise(py, &e))
    }
}

/// The native half of stratakv; use the package `stratakv` instead.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(gpu::gpu_status, module)?)?;
    module.add_class::<gpu::Gpu>()?;
    module.add_class::<archive::Archive>()?;
    module.add_class::<eviction::EvictionPolicy>()?;
    module.add_class::<index::PrefixIndex>()?;
    module.add_class::<index::Found>()?;
    module.add_class::<store::Store>()?;
    module.add_class::<model::Model>()?;
    module.add_class::<lease::Lease>()?;
    module.add_class::<device_block::DeviceBlock>()?;
    module.add_class::<model::TokenSequence>()
}
