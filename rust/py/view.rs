//! The caller's tensors as the planes of a sequence: which axis is which, and where each plane begins.
//!
//! A `layout` names the axes of the leaf tensors, outermost first; what it does not name is a Python sequence:
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
use super::tensor::{Exchange, Tensor, integers};
use crate::block::Geometry;
use crate::copy::{KvView, PageTable, PlaneView, Stream};
use crate::error::{Result, input};
use pyo3::prelude::*;

/// How the caller's tensors lie: see the page above.
pub(super) struct Placement<'a, 'py> {
    pub(super) layout: &'a str,
    pub(super) batch: usize,
    pub(super) pages: Option<&'a Bound<'py, PyAny>>,
    /// In which their owner uses them, where they are on a device; `None`: as they say themselves.
    pub(super) stream: Option<u64>,
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
    let on_device = tensors.iter().filter(|tensor| tensor.device.is_some()).count();
    if on_device == 0 {
        return Ok((view, tensors));
    }
    if on_device < tensors.len() {
        return Err(input("kv: some tensors are on a device and others are not, expected all in one place"))
            .or_raise(py);
    }
    let stream = placement.stream.or(tensors[0].device);
    if placement.stream.is_none() && tensors.iter().any(|tensor| tensor.device != tensors[0].device) {
        return Err(input("kv: tensors are used in different streams; say which one to wait for: stream="))
            .or_raise(py);
    }
    Ok((view.on_device(stream.map(Stream)), tensors))
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
    [c"__array_interface__", c"__dlpack__", c"__cuda_array_interface__"]
        .iter()
        .any(|n| n.to_str().is_ok_and(|n| object.hasattr(n).unwrap_or(false)))
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
