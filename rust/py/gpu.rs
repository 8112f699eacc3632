//! GPUs for Python: what there is to use, and why not.

use crate::gpu::Device;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

/// A device of the driver, or a sentence that says why there is none.
#[cfg(feature = "cuda")]
pub(super) fn device(number: u32, driver: Option<PathBuf>) -> Result<Arc<dyn Device>, String> {
    let device = crate::gpu::Cuda::open(number, driver.as_deref()).map_err(|absent| absent.to_string())?;
    Ok(Arc::new(device))
}

#[cfg(not(feature = "cuda"))]
pub(super) fn device(_: u32, _: Option<PathBuf>) -> Result<Arc<dyn Device>, String> {
    Err("this build has no GPU tier".into())
}

/// What is known of a device: `backend`, and of a GPU more; `reason`: why it is none.
#[pyfunction]
#[pyo3(signature = (device, driver))]
pub(super) fn gpu_status(py: Python<'_>, device: u32, driver: Option<PathBuf>) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    #[cfg(feature = "cuda")]
    let reason = match py.detach(|| crate::gpu::Cuda::open(device, driver.as_deref())) {
        Ok(gpu) => {
            let (total, free) = gpu.memory().unwrap_or_default();
            let (image, is_ptx) = gpu.image();
            out.set_item("device", gpu.name())?;
            out.set_item("pci", gpu.pci())?;
            out.set_item("arch", gpu.arch())?;
            out.set_item("image", format!("{} {image}", if is_ptx { "PTX for" } else { "sm" }))?;
            out.set_item("driver", gpu.driver())?;
            out.set_item("total_bytes", total)?;
            out.set_item("free_bytes", free)?;
            None
        }
        Err(absent) => Some(absent.to_string()),
    };
    #[cfg(not(feature = "cuda"))]
    let reason = self::device(device, driver).err();
    out.set_item("backend", if reason.is_none() { "cuda" } else { "host" })?;
    out.set_item("reason", reason)?;
    Ok(out)
}
