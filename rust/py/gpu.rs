//! GPUs for Python: what there is to use, and why not.

use super::OrRaise;
use super::tensor::{Exchange, Tensor};
use crate::error::input;
#[cfg(feature = "cuda")]
use crate::gpu::Path;
#[cfg(feature = "cuda")]
use crate::gpu::check::{self, Copies};
use crate::gpu::{Adopted, Device, Stream};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

/// A device of the driver, or a sentence that says why there is none.
#[cfg(feature = "cuda")]
pub(super) fn device(number: u32, driver: Option<PathBuf>) -> Result<Arc<dyn Device>, String> {
    let device = crate::gpu::Cuda::open(number, driver.as_deref()).map_err(|absent| absent.to_string())?;
    let device = Arc::new(device);
    if device.is_real() {
        // Where there is no room for that, copies go by what is usual; and the tier will hardly have any either.
        drop(check::calibrate_once(&device));
    }
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
pub(super) fn device(_: u32, _: Option<PathBuf>) -> Result<Arc<dyn Device>, String> {
    Err("this build has no GPU tier".into())
}

/// A tensor of somebody else's on the device, to be a tier's memory. It is the tier's alone, and kept as long as that is there.
pub(super) fn adopted(tensor: &Bound<'_, PyAny>, device: &Arc<dyn Device>) -> PyResult<Adopted> {
    let py = tensor.py();
    let read = Tensor::read(tensor, &"gpu_memory", &mut Exchange::default())?;
    let refuse = |what: String| Err(input(format!("gpu_memory: {what}"))).or_raise(py);
    let Some(stream) = read.device else {
        return refuse("in the process's memory, expected a tensor on the device".into());
    };
    let bytes = read.shape.iter().product::<i64>().max(0) as u64 * read.kind.bytes() as u64;
    if read.read_only || !read.is_dense() {
        return refuse("read-only or not contiguous, expected memory to write from its first byte to its last".into());
    }
    let address = read.base as u64;
    let owned = py.detach(|| {
        // What its owner put into its stream is done with it then.
        device.mark(Stream(stream)).and_then(|ticket| device.wait(ticket))?;
        device.owns(address)
    });
    match owned {
        Ok(true) => Ok(Adopted { address, bytes, owner: Arc::new(tensor.clone().unbind()) }),
        Ok(false) => {
            refuse(format!("not on the tier's device, {}; set gpu.device to that of the tensor", device.name()))
        }
        Err(fault) => refuse(fault.to_string()),
    }
}

/// A device to be checked; `stratakv gpu check` does.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Gpu {
    #[cfg(feature = "cuda")]
    device: Arc<crate::gpu::Cuda>,
}

#[cfg(feature = "cuda")]
#[pymethods]
impl Gpu {
    /// Opens it.
    #[new]
    #[pyo3(signature = (device, driver))]
    fn new(py: Python<'_>, device: u32, driver: Option<PathBuf>) -> PyResult<Self> {
        let opened = py.detach(|| crate::gpu::Cuda::open(device, driver.as_deref()));
        let device = opened.map_err(|absent| crate::Error::new(crate::ErrorKind::Config, absent.to_string()));
        Ok(Self { device: Arc::new(device.or_raise(py)?) })
    }

    /// Whether it is a GPU, and not what stands in for one.
    #[getter]
    fn is_real(&self) -> bool {
        self.device.is_real()
    }

    /// Compares its kernels with the codec; how many payloads were, and what differs.
    fn kernels(&self, py: Python<'_>, rounds: u64) -> (usize, Option<String>) {
        match py.detach(|| check::kernels(&self.device, rounds)) {
            Ok(compared) => (compared, None),
            Err(what) => (0, Some(what)),
        }
    }

    /// Fills it but for so many bytes; what was not as it should be then.
    fn room(&self, py: Python<'_>, left: u64) -> Option<String> {
        py.detach(|| check::room(&self.device, left)).err()
    }

    /// Bytes a second of copies of pieces of one size, of each repetition.
    fn copies(&self, py: Python<'_>, up: bool, path: &str, piece_bytes: usize, repeats: usize) -> PyResult<Vec<f64>> {
        let known = Path::ALL.into_iter().find(|known| known.name() == path);
        let path = known.ok_or_else(|| input(format!("path is {path:?}, expected engine, batch or kernel")));
        let path = path.or_raise(py)?;
        let timed = py.detach(|| Copies::new(&self.device, check::COPIED)?.time(up, path, piece_bytes, repeats));
        timed.map_err(|fault| input(fault.to_string())).or_raise(py)
    }

    /// Bytes a second of plain tensors that are encoded, or decoded, of each repetition; and the share of them that crosses
    /// the link.
    fn coding(&self, py: Python<'_>, encode: bool, staged: bool, repeats: usize) -> PyResult<(Vec<f64>, f64)> {
        let timed = py.detach(|| check::coding(&self.device, encode, staged, repeats));
        timed.map_err(|fault| input(fault.to_string())).or_raise(py)
    }

    /// Nanoseconds of each place and of each eviction while the device works.
    fn latencies(&self, py: Python<'_>, count: usize) -> PyResult<[Vec<u64>; 2]> {
        py.detach(|| check::latencies(&self.device, count)).map_err(|fault| input(fault.to_string())).or_raise(py)
    }

    /// Bytes of a piece from which on engines are faster than a kernel, to the device and from it.
    fn calibrate(&self, py: Python<'_>) -> PyResult<[u64; 2]> {
        let paths = py.detach(|| check::calibrate(&self.device));
        Ok(paths.map_err(|fault| input(fault.to_string())).or_raise(py)?.engines_from)
    }
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
