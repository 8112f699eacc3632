//! Tensors of other libraries, read in place: NumPy's arrays, buffers, else DLPack (versioned or legacy).
//!
//! The producer is kept alive for the call; nothing is copied or taken over. A `layout` names the axes of the leaf
//! tensors, outermost first; what it does not name is a Python sequence:
//!
//! | letter | axis |
//! |---|---|
//! | `L` | layer (absent: a sequence of layers) |
//! | `K` | plane, key or value (absent: a sequence of planes per layer) |
//! | `B` | batch; one row is used |
//! | `P` | page |
//! | `H` | head |
//! | `N` | token (within its page) |
//! | `D` | dim, contiguous |

use super::OrRaise;
use crate::block::{Dtype, Geometry};
use crate::copy::{KvView, PageTable, PlaneView};
use crate::error::{Result, input};
use numpy::npyffi::flags::NPY_ARRAY_WRITEABLE;
use numpy::{PyArrayDescrMethods as _, PyUntypedArray, PyUntypedArrayMethods as _};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple, PyType};
use std::ffi::{CStr, c_void};

/// Bytes of memory with axes. Strides are in bytes.
pub(super) struct Tensor<'py> {
    base: *mut u8,
    shape: Vec<i64>,
    strides: Vec<isize>,
    kind: Kind,
    read_only: bool,
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
enum Kind {
    Int(u8),
    Uint(u8),
    Float(u8),
    Bfloat16,
    Float8,
}

impl Kind {
    fn bytes(self) -> usize {
        match self {
            Self::Int(bits) | Self::Uint(bits) | Self::Float(bits) => usize::from(bits) / 8,
            Self::Bfloat16 => 2,
            Self::Float8 => 1,
        }
    }

    fn holds(self, dtype: Dtype) -> bool {
        match dtype {
            Dtype::Fp32 => self == Self::Float(32),
            Dtype::Fp16 => self == Self::Float(16),
            Dtype::Bf16 => self == Self::Bfloat16,
            Dtype::Uint8 => matches!(self, Self::Uint(8) | Self::Float8),
        }
    }

    fn name(self) -> String {
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
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedVersioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    /// # Safety
    /// Called once, with the struct itself, while attached to the interpreter.
    deleter: Option<unsafe extern "C" fn(*mut DlManagedVersioned)>,
    flags: u64,
    tensor: DlTensor,
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
}

const EXCHANGE: &CStr = c"dlpack_exchange_api";

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const READ_ONLY: u64 = 1;
const CPU: i32 = 1;

/// The C functions of the last producer's type: the tensors of a call mostly have one type.
#[derive(Default)]
struct Exchange<'py> {
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
        let Ok(export) = object.getattr("__dlpack__") else { return Ok(None) };
        if let Ok(device) = object.call_method0("__dlpack_device__") {
            let (device_type, _): (i32, i32) = device.extract()?;
            if device_type != CPU {
                let message = format!("{what}: DLPack device type {device_type}, expected {CPU} (CPU); copy it first");
                return Err(input(message)).or_raise(py);
            }
        }
        let versioned = PyDict::new(py);
        versioned.set_item("max_version", (1, 0))?;
        let capsule = match export.call((), Some(&versioned)) {
            // Producers of before DLPack 1.0 know no keyword.
            Err(e) if e.is_instance_of::<PyTypeError>(py) => export.call0(),
            other => other,
        };
        let capsule = match capsule {
            Ok(capsule) => capsule.cast_into::<PyCapsule>()?,
            Err(e) => return Err(input(format!("{what}: DLPack export refused: {}", e.value(py)))).or_raise(py),
        };
        Self::from_capsule(object, &capsule, what).map(Some)
    }

    fn read(object: &Bound<'py, PyAny>, what: &dyn std::fmt::Display, exchange: &mut Exchange<'py>) -> PyResult<Self> {
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
        Some(Self { base, shape, strides, kind, read_only, _owner: Owner::Object { _object: object.clone() } })
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
        Some(Self { base, shape, strides, kind, read_only, _owner: Owner::Buffer { _buffer: buffer } })
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
        Self::from_tensor(py, tensor, flags & READ_ONLY != 0, owner, what).map(Some)
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
        if tensor.device_type != CPU {
            let device = tensor.device_type;
            return Err(input(format!("{what}: DLPack device type {device}, expected {CPU} (CPU)"))).or_raise(py);
        }
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
        Ok(Self { base, shape, strides, kind, read_only, _owner: owner })
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

/// How the caller's tensors lie: see the page above.
pub(super) struct Placement<'a, 'py> {
    pub(super) layout: &'a str,
    pub(super) batch: usize,
    pub(super) pages: Option<&'a Bound<'py, PyAny>>,
}

/// A view of the caller's tensors, and what keeps them alive.
pub(super) fn view<'py>(
    kv: &Bound<'py, PyAny>,
    geometry: &Geometry,
    placement: &Placement<'_, 'py>,
    writable: bool,
) -> PyResult<(KvView, Vec<Tensor<'py>>)> {
    let py = kv.py();
    let axes = Axes::parse(placement.layout).or_raise(py)?;
    let pages = match (axes.page, placement.pages) {
        (Some(_), Some(pages)) => Some(integers(pages, "pages")?),
        (None, None) => None,
        (Some(_), None) => return Err(input("pages: the layout has P, expected a page table")).or_raise(py),
        (None, Some(_)) => {
            let message = format!("pages: given, but layout {:?} has no P", placement.layout);
            return Err(input(message)).or_raise(py);
        }
    };
    let leaves = leaves(kv, geometry, &axes)?;
    let mut tensors = Vec::with_capacity(leaves.len());
    let mut planes = Vec::with_capacity(geometry.plane_count());
    let mut tokens = usize::MAX;
    let mut page_tokens = 1;
    let mut exchange = Exchange::default();
    for (n, leaf) in leaves.iter().enumerate() {
        let name = LeafName { number: n, alone: leaves.len() == 1 };
        let tensor = Tensor::read(leaf, &name, &mut exchange)?;
        let leaf = Leaf { tensor: &tensor, axes: &axes, geometry, name };
        leaf.check(placement.batch, writable).or_raise(py)?;
        let (covered, in_page) = leaf.tokens(pages.as_deref()).or_raise(py)?;
        if n > 0 && page_tokens != in_page {
            return Err(input(format!("{name}: pages of {in_page} tokens, expected {page_tokens}"))).or_raise(py);
        }
        (tokens, page_tokens) = (tokens.min(covered), in_page);
        leaf.planes(placement.batch, &mut planes);
        tensors.push(tensor);
    }
    let table = pages.map(|pages| PageTable { pages, page_tokens });
    // SAFETY: every axis was checked against the geometry, every page against its tensor; `tensors` keeps the memory.
    let view = unsafe { KvView::new(planes, table, tokens) }.or_raise(py)?;
    Ok((view, tensors))
}

// The leaf tensors, layer by layer.
fn leaves<'py>(kv: &Bound<'py, PyAny>, geometry: &Geometry, axes: &Axes) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let py = kv.py();
    let items = |object: &Bound<'py, PyAny>, what: &str, count: u32| -> PyResult<Vec<Bound<'py, PyAny>>> {
        let list: Vec<_> = object.try_iter()?.collect::<PyResult<_>>()?;
        if list.len() == count as usize {
            return Ok(list);
        }
        let message = format!("kv has {} {what}, expected {count} by the model's geometry", list.len());
        Err(input(message)).or_raise(py)
    };
    let layers = match axes.layer {
        Some(_) => vec![kv.clone()],
        None => items(kv, "layers", geometry.layers)?,
    };
    if axes.plane.is_some()
        || axes.layer.is_some()
        || geometry.planes == 1 && axes.layer.is_none() && is_leaf(&layers[0])
    {
        return Ok(layers);
    }
    let mut leaves = Vec::with_capacity(geometry.plane_count());
    for layer in &layers {
        leaves.extend(items(layer, "planes in a layer", geometry.planes)?);
    }
    Ok(leaves)
}

fn is_leaf(object: &Bound<'_, PyAny>) -> bool {
    [c"__array_interface__", c"__dlpack__"].iter().any(|n| n.to_str().is_ok_and(|n| object.hasattr(n).unwrap_or(false)))
}

/// Where each axis stands in a leaf tensor.
struct Axes {
    count: usize,
    layer: Option<usize>,
    plane: Option<usize>,
    batch: Option<usize>,
    page: Option<usize>,
    head: usize,
    token: usize,
    dim: usize,
}

impl Axes {
    fn parse(layout: &str) -> Result<Self> {
        let wrong = || {
            input(format!(
                "layout {layout:?}: expected each of H, N and D once and L, K, B, P at most once, D last; as \"BHND\""
            ))
        };
        let at = |letter: char| layout.find(letter);
        let known = layout.chars().all(|c| "LKBPHND".contains(c));
        let unique = layout.chars().all(|c| layout.matches(c).count() == 1);
        let (Some(head), Some(token), Some(dim)) = (at('H'), at('N'), at('D')) else { return Err(wrong()) };
        // Without its layers in the tensor, a plane axis belongs to one layer's tensor; the reverse has no meaning.
        let nested = at('L').is_none() || at('K').is_some();
        if !known || !unique || !nested || dim + 1 != layout.len() {
            return Err(wrong());
        }
        let (layer, plane, batch, page) = (at('L'), at('K'), at('B'), at('P'));
        Ok(Self { count: layout.len(), layer, plane, batch, page, head, token, dim })
    }
}

/// How errors name a leaf tensor.
#[derive(Clone, Copy)]
struct LeafName {
    number: usize,
    alone: bool,
}

impl std::fmt::Display for LeafName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.alone { f.write_str("kv") } else { write!(f, "kv tensor {}", self.number) }
    }
}

struct Leaf<'a, 'py> {
    tensor: &'a Tensor<'py>,
    axes: &'a Axes,
    geometry: &'a Geometry,
    name: LeafName,
}

impl Leaf<'_, '_> {
    fn check(&self, batch: usize, writable: bool) -> Result<()> {
        let Self { tensor, axes, geometry, name } = self;
        if tensor.shape.len() != axes.count {
            let shape = &tensor.shape;
            return Err(input(format!("{name}: shape {shape:?}, expected {} axes by the layout", axes.count)));
        }
        if !tensor.kind.holds(geometry.dtype) {
            let (found, expected) = (tensor.kind.name(), geometry.dtype.name());
            return Err(input(format!("{name}: dtype {found}, expected {expected} by the model's geometry")));
        }
        let expected = [
            ("heads", Some(axes.head), geometry.kv_heads),
            ("dim", Some(axes.dim), geometry.head_dim),
            ("layers", axes.layer, geometry.layers),
            ("planes", axes.plane, geometry.planes),
        ];
        for (what, axis, size) in expected {
            if let Some(found) = axis.map(|a| tensor.shape[a]).filter(|&found| found != i64::from(size)) {
                return Err(input(format!("{name}: {found} {what}, expected {size} by the model's geometry")));
            }
        }
        if let Some(rows) = axes.batch.map(|a| tensor.shape[a]).filter(|&rows| batch as i64 >= rows) {
            return Err(input(format!("batch is {batch}, expected below {rows}, the rows of {name}")));
        }
        if tensor.strides[axes.dim] != tensor.kind.bytes() as isize && geometry.head_dim > 1 {
            return Err(input(format!("{name}: the last axis is not contiguous; pass a tensor whose dim is")));
        }
        if writable && tensor.read_only {
            return Err(input(format!("{name}: is read-only, expected memory to load into")));
        }
        Ok(())
    }

    // Tokens covered, and tokens per page.
    fn tokens(&self, pages: Option<&[u32]>) -> Result<(usize, usize)> {
        let size = self.tensor.shape[self.axes.token].max(0) as usize;
        match (self.axes.page, pages) {
            (Some(axis), Some(pages)) => {
                let count = self.tensor.shape[axis];
                if let Some(page) = pages.iter().find(|&&p| i64::from(p) >= count) {
                    return Err(input(format!(
                        "pages: page {page}, expected below {count}, the pages of {}",
                        self.name
                    )));
                }
                if size == 0 {
                    return Err(input(format!("{}: pages of 0 tokens", self.name)));
                }
                Ok((pages.len() * size, size))
            }
            _ => Ok((size, size)),
        }
    }

    fn planes(&self, batch: usize, out: &mut Vec<PlaneView>) {
        let Self { tensor, axes, geometry, .. } = self;
        let stride = |axis: Option<usize>| axis.map_or(0, |a| tensor.strides[a]);
        let count = |axis: Option<usize>, n: u32| if axis.is_some() { n } else { 1 };
        for layer in 0..count(axes.layer, geometry.layers) {
            for plane in 0..count(axes.plane, geometry.planes) {
                let offset = layer as isize * stride(axes.layer)
                    + plane as isize * stride(axes.plane)
                    + batch as isize * stride(axes.batch);
                out.push(PlaneView {
                    base: tensor.base.wrapping_offset(offset),
                    head_stride: tensor.strides[axes.head],
                    token_stride: tensor.strides[axes.token],
                    page_stride: stride(axes.page),
                });
            }
        }
    }
}

/// The tensors' memory is used by a detached call; this marks where that ends.
pub(super) fn keep_alive(tensors: Vec<Tensor<'_>>) {
    drop(tensors);
}
