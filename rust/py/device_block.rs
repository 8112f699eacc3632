//! A block on the device for other libraries: by DLPack, versioned or legacy, and by the interface of CUDA arrays.
//!
//! What is handed out by DLPack holds the block until its deleter is called, and its place is nobody else's before the stream
//! that it was handed to is done with it. Whoever knows DLPack before 1.0 alone cannot be told that a block is read-only: it
//! has the block for itself.

use super::block::shape_of;
use super::tensor::{CUDA, DEFAULT_STREAM, DlManaged, DlManagedVersioned, DlTensor, LEGACY, READ_ONLY, VERSIONED};
use crate::block::Dtype;
use crate::gpu::{Fault, Stream};
use crate::{DeviceView, HandedOut};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::ffi::{CStr, c_void};

/// A cached block in memory of the device, `[layer, plane, head, token, dim]`.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct DeviceBlock {
    view: DeviceView,
}

/// What a managed tensor keeps: its axes, and the block.
struct Export {
    shape: [i64; 5],
    strides: [i64; 5],
    _block: HandedOut,
}

fn refused(fault: &Fault) -> PyErr {
    PyBufferError::new_err(fault.to_string())
}

// As DLPack names types: a kind, and bits.
fn code_of(dtype: Dtype) -> (u8, u8) {
    match dtype {
        Dtype::Fp32 => (2, 32),
        Dtype::Fp16 => (2, 16),
        Dtype::Bf16 => (4, 16),
        Dtype::Uint8 => (1, 8),
    }
}

impl DeviceBlock {
    pub(super) fn new(view: DeviceView) -> Self {
        Self { view }
    }

    // The tensor, over what `export` has, which does not move.
    fn tensor(&self, export: &Export) -> DlTensor {
        let (code, bits) = code_of(self.view.geometry().dtype);
        DlTensor {
            data: self.view.address() as *mut c_void,
            device_type: CUDA,
            device_id: self.view.device() as i32,
            ndim: export.shape.len() as i32,
            code,
            bits,
            lanes: 1,
            shape: export.shape.as_ptr(),
            strides: export.strides.as_ptr(),
            byte_offset: 0,
        }
    }

    fn export(&self, block: HandedOut) -> Box<Export> {
        let shape = shape_of(self.view.geometry()).map(|n| n as i64);
        let mut strides = [1; 5];
        for axis in (0..4).rev() {
            strides[axis] = strides[axis + 1] * shape[axis + 1];
        }
        Box::new(Export { shape, strides, _block: block })
    }
}

/// # Safety
/// By a consumer, once, with what `__dlpack__` made.
unsafe extern "C" fn delete(managed: *mut DlManaged) {
    // SAFETY: both were made by `Box::into_raw`, and nobody else gives them back.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Export>()));
    }
}

/// # Safety
/// As [`delete`].
unsafe extern "C" fn delete_versioned(managed: *mut DlManagedVersioned) {
    // SAFETY: as there.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Export>()));
    }
}

/// # Safety
/// By the interpreter, of a capsule of `capsule`. A consumer renames what it takes.
unsafe extern "C" fn end<const IS_VERSIONED: bool>(capsule: *mut ffi::PyObject) {
    let name = if IS_VERSIONED { VERSIONED } else { LEGACY };
    // SAFETY: a capsule that has that name still holds what it was made with, and nobody took it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, name.as_ptr()) != 0 {
            let managed = ffi::PyCapsule_GetPointer(capsule, name.as_ptr());
            if IS_VERSIONED { delete_versioned(managed.cast()) } else { delete(managed.cast()) }
        }
    }
}

/// # Safety
/// By the interpreter, of a capsule to which nobody refers any more.
type End = unsafe extern "C" fn(*mut ffi::PyObject);

// A capsule of that name, which owns what is there.
fn capsule<'py>(py: Python<'py>, managed: *mut c_void, name: &'static CStr, end: End) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: attached; the name is static, and `end` frees what is there, which was allocated for it.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(managed, name.as_ptr(), Some(end))) }
}

#[pymethods]
impl DeviceBlock {
    /// Layers, planes, heads, tokens, dim.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, shape_of(self.view.geometry()))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (CUDA, self.view.device() as i32)
    }

    /// A capsule for `from_dlpack`; in `stream`, which must be there as long as the tensor is, its bytes are there from now on.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if copy == Some(true) || dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            return Err(PyBufferError::new_err("a cached block is handed out where it is; copy it from there"));
        }
        let stream = match stream {
            None => Some(Stream(DEFAULT_STREAM)),
            Some(-1) => None,
            Some(stream @ 1..) => Some(Stream(stream as u64)),
            Some(stream) => {
                let message =
                    format!("stream is {stream}, expected 1, 2 or the handle of one, or -1: as DLPack has them");
                return Err(PyBufferError::new_err(message));
            }
        };
        let is_versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let block = py.detach(|| self.view.hand_out(stream, !is_versioned)).map_err(|fault| refused(&fault))?;
        let export = self.export(block);
        let tensor = self.tensor(&export);
        let context = Box::into_raw(export).cast();
        if is_versioned {
            let (deleter, flags) = (Some(delete_versioned as _), READ_ONLY);
            let managed = Box::new(DlManagedVersioned { major: 1, minor: 0, context, deleter, flags, tensor });
            return capsule(py, Box::into_raw(managed).cast(), VERSIONED, end::<true>);
        }
        let managed = Box::new(DlManaged { tensor, context, deleter: Some(delete as _) });
        capsule(py, Box::into_raw(managed).cast(), LEGACY, end::<false>)
    }

    /// Its bytes are there: no stream is to be waited for. Of bfloat16 they are 16-bit integers.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        py.detach(|| self.view.read()).map_err(|fault| refused(&fault))?;
        let kind = match self.view.geometry().dtype {
            Dtype::Fp32 => "<f4",
            Dtype::Fp16 => "<f2",
            Dtype::Bf16 => "<u2",
            Dtype::Uint8 => "|u1",
        };
        let out = PyDict::new(py);
        out.set_item("version", 3)?;
        out.set_item("shape", self.shape(py)?)?;
        out.set_item("typestr", kind)?;
        out.set_item("data", (self.view.address(), true))?;
        out.set_item("strides", py.None())?;
        out.set_item("stream", py.None())?;
        Ok(out)
    }
}
