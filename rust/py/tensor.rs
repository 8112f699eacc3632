//! Tensors of other libraries, read in place: NumPy's arrays, buffers, else DLPack (versioned or legacy) or the interface of
//! CUDA arrays.
//!
//! The producer is kept alive for the call; nothing is copied or taken over.

use super::OrRaise;
use crate::block::Dtype;
use crate::error::{Result, input};
use numpy::npyffi::flags::NPY_ARRAY_WRITEABLE;
use numpy::{PyArrayDescrMethods as _, PyUntypedArray, PyUntypedArrayMethods as _};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple, PyType};
use std::ffi::{CStr, c_void};

/// Bytes of memory with axes. Strides are in bytes.
pub(super) struct Tensor<'py> {
    pub(super) base: *mut u8,
    pub(super) shape: Vec<i64>,
    pub(super) strides: Vec<isize>,
    pub(super) kind: Kind,
    pub(super) read_only: bool,
    /// Where it is on a CUDA device: the stream in which its owner uses it.
    pub(super) device: Option<u64>,
    // Keeps the memory alive; it is only dropped.
    _owner: Owner<'py>,
}

enum Owner<'py> {
    Object { _object: Bound<'py, PyAny> },
    Managed(std::ptr::NonNull<DlManagedVersioned>),
    Buffer { _buffer: pyo3::buffer::PyUntypedBuffer },
}

impl Drop for Owner<'_> {
    fn drop(&mut self) {
        if let Self::Managed(managed) = self {
            // SAFETY: the producer handed the tensor over; its deleter is called once, attached to the interpreter.
            unsafe {
                if let Some(deleter) = managed.as_ref().deleter {
                    deleter(managed.as_ptr());
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Int(u8),
    Uint(u8),
    Float(u8),
    Bfloat16,
    Float8,
}

impl Kind {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Int(bits) | Self::Uint(bits) | Self::Float(bits) => usize::from(bits) / 8,
            Self::Bfloat16 => 2,
            Self::Float8 => 1,
        }
    }

    pub(super) fn holds(self, dtype: Dtype) -> bool {
        match dtype {
            Dtype::Fp32 => self == Self::Float(32),
            Dtype::Fp16 => self == Self::Float(16),
            Dtype::Bf16 => self == Self::Bfloat16,
            Dtype::Uint8 => matches!(self, Self::Uint(8) | Self::Float8),
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Int(bits) => format!("int{bits}"),
            Self::Uint(bits) => format!("uint{bits}"),
            Self::Float(bits) => format!("float{bits}"),
            Self::Bfloat16 => "bfloat16".into(),
            Self::Float8 => "float8".into(),
        }
    }
}

#[repr(C)]
pub(super) struct DlTensor {
    pub(super) data: *mut c_void,
    pub(super) device_type: i32,
    pub(super) device_id: i32,
    pub(super) ndim: i32,
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
    pub(super) shape: *const i64,
    pub(super) strides: *const i64,
    pub(super) byte_offset: u64,
}

#[repr(C)]
pub(super) struct DlManagedVersioned {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) context: *mut c_void,
    /// # Safety
    /// Called once, with the struct itself, while attached to the interpreter.
    pub(super) deleter: Option<unsafe extern "C" fn(*mut DlManagedVersioned)>,
    pub(super) flags: u64,
    pub(super) tensor: DlTensor,
}

/// As it was before version 1.
#[repr(C)]
pub(super) struct DlManaged {
    pub(super) tensor: DlTensor,
    pub(super) context: *mut c_void,
    /// # Safety
    /// As of [`DlManagedVersioned`].
    pub(super) deleter: Option<unsafe extern "C" fn(*mut DlManaged)>,
}

/// The producer's table of C functions, as far as it is used: no Python call and no capsule per tensor.
#[repr(C)]
struct DlExchange {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    /// # Safety
    /// The object must have the type that the table was found on; the interpreter must be attached.
    export: Option<unsafe extern "C" fn(*mut c_void, *mut *mut DlManagedVersioned) -> i32>,
    import: *const c_void,
    borrow: *const c_void,
    /// # Safety
    /// The device must be one of the producer's; the interpreter must be attached.
    stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> i32>,
}

const EXCHANGE: &CStr = c"dlpack_exchange_api";

pub(super) const LEGACY: &CStr = c"dltensor";
pub(super) const VERSIONED: &CStr = c"dltensor_versioned";
pub(super) const READ_ONLY: u64 = 1;
const CPU: i32 = 1;
pub(super) const CUDA: i32 = 2;
/// Memory of the process that a device reaches, too.
const CUDA_HOST: i32 = 3;
/// The stream that waits for all others and they for it: where nobody says which one is used.
pub(super) const DEFAULT_STREAM: u64 = 1;

/// The C functions of the last producer's type: the tensors of a call mostly have one type.
#[derive(Default)]
pub(super) struct Exchange<'py> {
    of: Option<Bound<'py, PyType>>,
    table: Option<std::ptr::NonNull<DlExchange>>,
}

impl<'py> Exchange<'py> {
    fn table(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Option<std::ptr::NonNull<DlExchange>>> {
        let kind = object.get_type();
        if self.of.as_ref().is_none_or(|known| !known.is(&kind)) {
            let name = pyo3::intern!(object.py(), "__dlpack_c_exchange_api__");
            let capsule = kind.getattr_opt(name)?.and_then(|found| found.cast_into::<PyCapsule>().ok());
            self.table = capsule.map(|c| c.pointer_checked(Some(EXCHANGE))).transpose()?.map(std::ptr::NonNull::cast);
            self.of = Some(kind);
        }
        Ok(self.table)
    }
}

impl<'py> Tensor<'py> {
    // Reads any tensor in CPU memory; `None` if it is no tensor. `what` names the argument in errors.
    fn try_read(
        object: &Bound<'py, PyAny>,
        what: &dyn std::fmt::Display,
        exchange: &mut Exchange<'py>,
    ) -> PyResult<Option<Self>> {
        let py = object.py();
        if let Some(table) = exchange.table(object)?
            && let Some(tensor) = Self::from_exchange(object, table, what)?
        {
            return Ok(Some(tensor));
        }
        if let Some(tensor) = Self::from_numpy(object).or_else(|| Self::from_buffer(object)) {
            return Ok(Some(tensor));
        }
        if let Ok(interface) = object.getattr(pyo3::intern!(py, "__array_interface__")) {
            return Self::from_array_interface(object, interface.cast_into::<PyDict>()?, what).map(Some);
        }
        let Ok(export) = object.getattr("__dlpack__") else {
            return match object.getattr(pyo3::intern!(py, "__cuda_array_interface__")) {
                Ok(interface) => {
                    let interface = interface.cast_into::<PyDict>()?;
                    let tensor = Self::from_array_interface(object, interface.clone(), what)?;
                    // 0 is no stream by that protocol; without one its owner has nothing under way.
                    let stream = interface.get_item("stream")?.map_or(Ok(None), |stream| stream.extract())?;
                    Ok(Some(Self { device: Some(stream.unwrap_or(DEFAULT_STREAM)), ..tensor }))
                }
                Err(_) => Ok(None),
            };
        };
        let versioned = PyDict::new(py);
        if let Ok(device) = object.call_method0("__dlpack_device__") {
            let (device_type, _): (i32, i32) = device.extract()?;
            check_kind(device_type, what).or_raise(py)?;
            if device_type == CUDA {
                // Its stream is in order with that one then, which is waited for.
                versioned.set_item("stream", DEFAULT_STREAM)?;
            }
        }
        versioned.set_item("max_version", (1, 0))?;
        let capsule = match export.call((), Some(&versioned)) {
            // Producers of before DLPack 1.0 know no versions; the stream matters, where there is one.
            Err(e) if e.is_instance_of::<PyTypeError>(py) => {
                versioned.del_item("max_version")?;
                export.call((), Some(&versioned))
            }
            other => other,
        };
        let capsule = match capsule {
            Ok(capsule) => capsule.cast_into::<PyCapsule>()?,
            Err(e) => return Err(input(format!("{what}: DLPack export refused: {}", e.value(py)))).or_raise(py),
        };
        Self::from_capsule(object, &capsule, what).map(Some)
    }

    pub(super) fn read(
        object: &Bound<'py, PyAny>,
        what: &dyn std::fmt::Display,
        exchange: &mut Exchange<'py>,
    ) -> PyResult<Self> {
        if let Some(tensor) = Self::try_read(object, what, exchange)? {
            return Ok(tensor);
        }
        let kind = object.get_type().name()?;
        let message = format!("{what}: {kind} is no tensor; expected a NumPy array, a torch CPU tensor or DLPack");
        Err(input(message)).or_raise(object.py())
    }

    // A NumPy array of a built-in type in native byte order, read where it lies: an eighth of what a buffer costs.
    fn from_numpy(object: &Bound<'py, PyAny>) -> Option<Self> {
        let array = object.cast::<PyUntypedArray>().ok()?;
        let dtype = array.dtype();
        let bits = u8::try_from(dtype.itemsize() * 8).ok()?;
        let kind = match (dtype.kind(), dtype.byteorder()) {
            (b'f', b'=' | b'|') => Kind::Float(bits),
            (b'i', b'=' | b'|') => Kind::Int(bits),
            (b'u', b'=' | b'|') => Kind::Uint(bits),
            _ => return None,
        };
        let shape: Vec<i64> = array.shape().iter().map(|&n| n as i64).collect();
        // Of an axis of one item, or of none at all, NumPy's strides say nothing.
        let strides = match array.is_c_contiguous() {
            true => dense_strides(&shape, dtype.itemsize()),
            false => array.strides().to_vec(),
        };
        // SAFETY: it is an array, alive and attached; these fields are fixed while somebody else refers to it.
        let (base, flags) =
            unsafe { ((*array.as_array_ptr()).fields.data.cast(), (*array.as_array_ptr()).fields.flags) };
        let read_only = flags & NPY_ARRAY_WRITEABLE == 0;
        let owner = Owner::Object { _object: object.clone() };
        Some(Self { base, shape, strides, kind, read_only, device: None, _owner: owner })
    }

    // The buffer protocol, of types that it has a letter for.
    fn from_buffer(object: &Bound<'py, PyAny>) -> Option<Self> {
        let buffer = pyo3::buffer::PyUntypedBuffer::get(object).ok()?;
        let letter = match buffer.format().to_bytes() {
            [letter] | [b'@' | b'=' | b'<', letter] => *letter,
            _ => return None,
        };
        let bits = u8::try_from(buffer.item_size() * 8).ok()?;
        let kind = match letter {
            b'e' | b'f' | b'd' => Kind::Float(bits),
            b'b' | b'h' | b'i' | b'l' | b'q' => Kind::Int(bits),
            b'B' | b'H' | b'I' | b'L' | b'Q' => Kind::Uint(bits),
            _ => return None,
        };
        let shape = buffer.shape().iter().map(|&n| n as i64).collect();
        let strides = buffer.strides().to_vec();
        let (base, read_only) = (buffer.buf_ptr().cast(), buffer.readonly());
        let owner = Owner::Buffer { _buffer: buffer };
        Some(Self { base, shape, strides, kind, read_only, device: None, _owner: owner })
    }

    fn from_array_interface(
        object: &Bound<'py, PyAny>,
        interface: Bound<'py, PyDict>,
        what: &dyn std::fmt::Display,
    ) -> PyResult<Self> {
        let py = object.py();
        let item = |name: &str| -> PyResult<Bound<'py, PyAny>> {
            interface
                .get_item(pyo3::types::PyString::intern(py, name))?
                .ok_or_else(|| PyTypeError::new_err(format!("{what}: array interface lacks {name}")))
        };
        let code: String = item("typestr")?.extract()?;
        let (data, read_only): (usize, bool) = item("data")?.extract()?;
        let shape: Vec<i64> = item("shape")?.extract()?;
        let bits = code.get(2..).and_then(|n| n.parse::<u8>().ok()).map(|bytes| bytes.wrapping_mul(8));
        let swapped = code.starts_with('>') && bits != Some(8);
        let kind = match (code.as_bytes().get(1), bits) {
            (Some(b'i'), Some(bits)) => Some(Kind::Int(bits)),
            (Some(b'u'), Some(bits)) => Some(Kind::Uint(bits)),
            (Some(b'f'), Some(bits)) => Some(Kind::Float(bits)),
            // Extension types, such as those of ml_dtypes, show as raw bytes.
            (Some(b'V'), Some(_)) => match object.getattr("dtype")?.str()?.to_string().as_str() {
                "bfloat16" => Some(Kind::Bfloat16),
                name if name.starts_with("float8") => Some(Kind::Float8),
                _ => None,
            },
            _ => None,
        };
        let Some(kind) = kind.filter(|_| !swapped) else {
            return Err(input(format!("{what}: dtype {code:?} is not supported"))).or_raise(py);
        };
        let strides: Option<Vec<isize>> = interface.get_item("strides")?.map_or(Ok(None), |s| s.extract())?;
        let strides = strides.unwrap_or_else(|| dense_strides(&shape, kind.bytes()));
        Ok(Self {
            base: data as *mut u8,
            shape,
            strides,
            kind,
            read_only,
            device: None,
            _owner: Owner::Object { _object: object.clone() },
        })
    }

    // Through the producer's C functions, where its type has them (torch 2.10): a tensor costs 0.2 us, not 8.
    fn from_exchange(
        object: &Bound<'py, PyAny>,
        table: std::ptr::NonNull<DlExchange>,
        what: &dyn std::fmt::Display,
    ) -> PyResult<Option<Self>> {
        let py = object.py();
        // SAFETY: a capsule of that name held the table, which lives as long as the process.
        let api = unsafe { table.as_ref() };
        let Some(export) = api.export.filter(|_| api.major == 1) else { return Ok(None) };
        let mut managed = std::ptr::null_mut();
        // SAFETY: the object has the type that the table was found on; the interpreter is attached.
        let status = unsafe { export(object.as_ptr().cast(), &raw mut managed) };
        let Some(managed) = std::ptr::NonNull::new(managed).filter(|_| status == 0) else {
            let error = PyErr::take(py).map(|e| e.value(py).to_string()).unwrap_or_default();
            return Err(input(format!("{what}: DLPack export refused: {error}"))).or_raise(py);
        };
        let owner = Owner::Managed(managed);
        // SAFETY: the producer filled it, and `owner` keeps it.
        let (flags, tensor) = unsafe { (managed.as_ref().flags, &managed.as_ref().tensor) };
        let mut read = Self::from_tensor(py, tensor, flags & READ_ONLY != 0, owner, what)?;
        let mut stream = std::ptr::null_mut();
        if let Some(known) = &mut read.device
            && let Some(ask) = api.stream
        {
            // SAFETY: the producer has just exported from that device; the interpreter is attached.
            if unsafe { ask(CUDA, tensor.device_id, &raw mut stream) } == 0 {
                *known = if stream.is_null() { DEFAULT_STREAM } else { stream as u64 };
            }
        }
        Ok(Some(read))
    }

    fn from_capsule(
        object: &Bound<'py, PyAny>,
        capsule: &Bound<'py, PyCapsule>,
        what: &dyn std::fmt::Display,
    ) -> PyResult<Self> {
        let py = object.py();
        let (pointer, read_only) = if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
            let managed = pointer.cast::<DlManagedVersioned>();
            // SAFETY: a capsule of that name holds that struct, by the DLPack specification, while the capsule lives.
            let (major, flags) = unsafe { ((*managed.as_ptr()).major, (*managed.as_ptr()).flags) };
            if major != 1 {
                return Err(input(format!("{what}: DLPack version {major}, expected 1"))).or_raise(py);
            }
            // SAFETY: as above.
            (unsafe { &raw const (*managed.as_ptr()).tensor }, flags & READ_ONLY != 0)
        } else {
            (capsule.pointer_checked(Some(LEGACY))?.as_ptr().cast::<DlTensor>().cast_const(), false)
        };
        // SAFETY: both structs hold a `DLTensor`, at their start or behind the flags, while the capsule lives.
        let tensor = unsafe { &*pointer };
        Self::from_tensor(py, tensor, read_only, Owner::Object { _object: capsule.clone().into_any() }, what)
    }

    fn from_tensor(
        py: Python<'py>,
        tensor: &DlTensor,
        read_only: bool,
        owner: Owner<'py>,
        what: &dyn std::fmt::Display,
    ) -> PyResult<Self> {
        check_kind(tensor.device_type, what).or_raise(py)?;
        let kind = match (tensor.code, tensor.bits, tensor.lanes) {
            (0, bits, 1) => Kind::Int(bits),
            (1, bits, 1) => Kind::Uint(bits),
            (2, bits, 1) => Kind::Float(bits),
            (4, 16, 1) => Kind::Bfloat16,
            (7..=14, 8, 1) => Kind::Float8,
            (code, bits, lanes) => {
                let message = format!("{what}: DLPack dtype ({code}, {bits}, {lanes}) is not supported");
                return Err(input(message)).or_raise(py);
            }
        };
        let axes = usize::try_from(tensor.ndim).unwrap_or(0);
        let list = |pointer: *const i64| -> Vec<i64> {
            // SAFETY: shape and strides have `ndim` items each; a tensor without axes may have null pointers.
            if axes == 0 { Vec::new() } else { unsafe { std::slice::from_raw_parts(pointer, axes) }.to_vec() }
        };
        let shape = list(tensor.shape);
        let strides = if tensor.strides.is_null() {
            dense_strides(&shape, kind.bytes())
        } else {
            list(tensor.strides).iter().map(|s| *s as isize * kind.bytes() as isize).collect()
        };
        let base = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        let device = (tensor.device_type == CUDA).then_some(DEFAULT_STREAM);
        Ok(Self { base, shape, strides, kind, read_only, device, _owner: owner })
    }
}

fn check_kind(device_type: i32, what: &dyn std::fmt::Display) -> Result<()> {
    match device_type {
        CPU | CUDA | CUDA_HOST => Ok(()),
        _ => Err(input(format!(
            "{what}: DLPack device type {device_type}, expected {CPU} (CPU) or {CUDA} (CUDA); copy it first"
        ))),
    }
}

fn dense_strides(shape: &[i64], item: usize) -> Vec<isize> {
    let mut strides = vec![item as isize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis] as isize;
    }
    strides
}

/// Token ids (or page numbers) from a list or any 1-d integer tensor.
pub(super) fn integers(object: &Bound<'_, PyAny>, what: &str) -> PyResult<Vec<u32>> {
    let py = object.py();
    let expected = |found: String| input(format!("{what}: {found}; expected a 1-d sequence of non-negative integers"));
    if let Ok(items) = object.cast::<pyo3::types::PyList>() {
        return items.iter().map(|item| one_integer(&item, what)).collect();
    }
    if let Ok(items) = object.cast::<PyTuple>() {
        return items.iter().map(|item| one_integer(&item, what)).collect();
    }
    let mut exchange = Exchange::default();
    let found = Tensor::try_read(object, &what, &mut exchange)?;
    let is_tensor = found.is_some();
    let tensor = match found {
        Some(tensor) => tensor,
        None => Tensor::read(&py.import("numpy")?.call_method1("asarray", (object,))?, &what, &mut exchange)?,
    };
    if tensor.device.is_some() {
        return Err(input(format!("{what}: on a device, expected in the process's memory; copy it first")))
            .or_raise(py);
    }
    if tensor.shape.len() != 1 {
        return Err(expected(format!("{} dimensions", tensor.shape.len()))).or_raise(py);
    }
    let ids = match tensor.kind {
        Kind::Int(64) => tensor.narrow(|v: i64| v as u64),
        Kind::Int(32) => tensor.narrow(|v: i32| i64::from(v) as u64),
        Kind::Int(16) => tensor.narrow(|v: i16| i64::from(v) as u64),
        Kind::Int(8) => tensor.narrow(|v: i8| i64::from(v) as u64),
        Kind::Uint(64) => tensor.narrow(|v: u64| v),
        Kind::Uint(32) => tensor.narrow(|v: u32| v.into()),
        Kind::Uint(16) => tensor.narrow(|v: u16| v.into()),
        Kind::Uint(8) => tensor.narrow(|v: u8| v.into()),
        // An empty list comes as an array of floats; an array of them shows a mistake.
        _ if tensor.shape[0] == 0 && !is_tensor => Ok(Vec::new()),
        _ => return Err(expected(format!("dtype {}", tensor.kind.name()))).or_raise(py),
    };
    ids.map_err(|(at, wide)| {
        let signed = matches!(tensor.kind, Kind::Int(_));
        let shown = if signed { (wide as i64).to_string() } else { wide.to_string() };
        expected(format!("{shown} at position {at}"))
    })
    .or_raise(py)
}

impl Tensor<'_> {
    /// Whether its items lie side by side, in order.
    pub(super) fn is_dense(&self) -> bool {
        let dense = dense_strides(&self.shape, self.kind.bytes());
        self.shape.iter().zip(self.strides.iter().zip(dense)).all(|(&n, (&stride, dense))| n <= 1 || stride == dense)
    }

    // The items of a 1-d tensor of `T`, each widened; or the place and the value of one that is no `u32`.
    fn narrow<T: Copy>(&self, widen: impl Fn(T) -> u64) -> std::result::Result<Vec<u32>, (usize, u64)> {
        let (length, stride) = (self.shape[0].max(0) as usize, self.strides[0]);
        // SAFETY: the producer promises `length` items of this kind at that stride, alive with `self`.
        let item = |i: usize, stride: isize| unsafe {
            widen(self.base.wrapping_offset(i as isize * stride).cast::<T>().read_unaligned())
        };
        let mut high = 0;
        let mut take = |wide: u64| {
            high |= wide >> 32;
            wide as u32
        };
        // A known stride lets the compiler take several at a time.
        let dense = size_of::<T>() as isize;
        let ids = match stride == dense {
            true => (0..length).map(|i| take(item(i, dense))).collect(),
            false => (0..length).map(|i| take(item(i, stride))).collect(),
        };
        match high {
            0 => Ok(ids),
            _ => Err((0..length).map(|i| (i, item(i, stride))).find(|(_, v)| v >> 32 != 0).unwrap_or_default()),
        }
    }
}

fn one_integer(item: &Bound<'_, PyAny>, what: &str) -> PyResult<u32> {
    item.extract::<u32>().or_else(|_| {
        let message = format!("{what}: {}; expected non-negative integers below 2^32", item.repr()?);
        Err(input(message)).or_raise(item.py())
    })
}

/// The tensors' memory is used by a detached call; this marks where that ends.
pub(super) fn keep_alive(tensors: Vec<Tensor<'_>>) {
    drop(tensors);
}
