//! A block's memory for Python, through the buffer protocol: read-only, `[layer, plane, head, token, dim]`.

use crate::BlockView;
use crate::block::{Dtype, Geometry};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{CStr, c_int};

/// What a memoryview of a block holds on to.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct BlockBuffer {
    view: BlockView,
    shape: [isize; 5],
    strides: [isize; 5],
    format: &'static CStr,
}

/// The axes of a block.
pub(super) fn shape_of(g: &Geometry) -> [usize; 5] {
    [g.layers, g.planes, g.kv_heads, g.block_tokens, g.head_dim].map(|n| n as usize)
}

impl BlockBuffer {
    pub(super) fn new(view: BlockView) -> Self {
        let g = view.geometry();
        // The protocol has no letter for bfloat16: its bits show as unsigned integers.
        let (format, item) = match g.dtype {
            Dtype::Fp32 => (c"f", 4),
            Dtype::Fp16 => (c"e", 2),
            Dtype::Bf16 => (c"H", 2),
            Dtype::Uint8 => (c"B", 1),
        };
        let shape = shape_of(g).map(|n| n as isize);
        let mut strides = [item; 5];
        for axis in (0..4).rev() {
            strides[axis] = strides[axis + 1] * shape[axis + 1];
        }
        Self { view, shape, strides, format }
    }
}

#[pymethods]
impl BlockBuffer {
    /// # Safety
    /// Called by the interpreter, with a buffer to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, buffer: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
            return Err(PyBufferError::new_err("a cached block is read-only"));
        }
        let this = slf.get();
        let bytes = this.view.payload();
        let filled = ffi::Py_buffer {
            buf: bytes.as_ptr().cast_mut().cast(),
            obj: slf.clone().into_ptr(),
            len: bytes.len() as isize,
            itemsize: this.strides[4],
            readonly: 1,
            ndim: 5,
            format: if flags & ffi::PyBUF_FORMAT == 0 { std::ptr::null_mut() } else { this.format.as_ptr().cast_mut() },
            shape: if flags & ffi::PyBUF_ND == 0 { std::ptr::null_mut() } else { this.shape.as_ptr().cast_mut() },
            strides: if flags & ffi::PyBUF_STRIDES == ffi::PyBUF_STRIDES {
                this.strides.as_ptr().cast_mut()
            } else {
                std::ptr::null_mut()
            },
            suboffsets: std::ptr::null_mut(),
            internal: std::ptr::null_mut(),
        };
        // SAFETY: the interpreter gives a buffer to write. What it points to lives in `slf`, which `obj` keeps, and is
        // marked read-only; it is contiguous, so that a caller who asks for less than strides reads it rightly.
        unsafe { buffer.write(filled) };
        Ok(())
    }
}
