//! How a model's blocks are encoded, and what they are clipped to.

use super::{Model, Shared, Store, check_view};
use crate::block::Geometry;
use crate::codec::{Clip, Codec, Layout, Percentile, Scheme};
use crate::copy::KvView;
use crate::error::{Error, ErrorKind, Result, input};
use crate::fused::percentiles;
use crate::ssd::record::Calibration;
use crate::stats::Tier;
use crate::sync::Arc;

impl Store {
    /// Encodes a model's blocks from now on: those that are put, in RAM; or those that go to SSD as they were put. What
    /// was encoded before stays readable, is never encoded again, and takes its form along to the other tier.
    /// `Codec::None` ends that. A block with values that fit no scale stays as it is.
    ///
    /// # Errors
    /// The model is not registered, or not calibrated where that is asked for; the scheme does not fit its geometry, or
    /// makes nothing smaller.
    pub fn set_codec(&self, model: &Model, tier: Tier, scheme: Scheme) -> Result<()> {
        let layout = Self::layout(&model.spec.geometry, scheme)?;
        let mut state = self.shared.open_state()?;
        let books = state.models.get_mut(&model.id).ok_or_else(|| Shared::not_registered(model))?;
        let bounds = books.bounds.clone().filter(|_| scheme.clip == Some(Clip::Calibrated));
        if scheme.clip == Some(Clip::Calibrated) && bounds.is_none() {
            let name = &model.spec.name;
            return Err(input(format!(
                "codec: model {name:?} was not calibrated; calibrate it, or clip by a percentile"
            )));
        }
        let layout = layout.map(|layout| match bounds {
            Some(bounds) => layout.calibrated(bounds),
            None => layout,
        });
        match tier {
            Tier::Ram => books.hot = layout.map(Arc::new),
            Tier::Ssd => books.cold = layout.map(Arc::new),
            Tier::Gpu => return Err(input("codec: blocks on a GPU are as they are put; give RAM or SSD one")),
        }
        Ok(())
    }

    /// How a scheme encodes blocks of a geometry; `None`: not at all.
    ///
    /// # Errors
    /// The scheme does not fit the geometry, or makes nothing smaller.
    pub fn layout(geometry: &Geometry, scheme: Scheme) -> Result<Option<Layout>> {
        geometry.validate()?;
        let layout = Layout::new(scheme, geometry)?;
        if scheme.codec == Codec::None {
            return Ok(None);
        }
        if layout.record_bytes(geometry, true) >= geometry.record_bytes() {
            let (encoded, plain) = (layout.bytes_of(true), geometry.block_bytes());
            return Err(input(format!(
                "codec {:?}: a block of this model has {plain} bytes, and {encoded} encoded, so nothing is saved; use \
                 none, or larger blocks",
                scheme.codec.name()
            )));
        }
        Ok(Some(layout))
    }

    /// Measures a percentile of the magnitudes of each layer's keys and values on a sample, and keeps it with the model's
    /// file: for codecs that clip by it, the same for every block, and after a restart. Returns it by plane.
    ///
    /// # Errors
    /// The view does not fit the model, or has no tokens; a value is not finite; the model is not registered; or the
    /// result cannot be written: then nothing has changed.
    pub fn calibrate(&self, model: &Model, view: &KvView, percentile: Percentile) -> Result<Vec<f32>> {
        let geometry = &model.spec.geometry;
        let tokens = u32::try_from(view.tokens()).ok().filter(|tokens| (1..1 << 24).contains(tokens));
        let tokens = tokens.ok_or_else(|| input(format!("kv has {} tokens, expected 1 to 2**24", view.tokens())))?;
        check_view(geometry, view, tokens as usize)?;
        if view.is_on_device() {
            return Err(input("kv is on a device, expected in the process's memory to calibrate; copy it first"));
        }
        if geometry.plane_count() > Calibration::MOST {
            let (has, most) = (geometry.plane_count(), Calibration::MOST);
            return Err(input(format!("the model has {has} planes, expected {most} at most to calibrate")));
        }
        let layout = Layout::new(Scheme::new(Codec::Int8Sym, geometry), geometry)?;
        let bounds = percentiles(&self.shared.workers, geometry, view, &layout, tokens, percentile);
        if let Some((plane, bad)) = bounds.iter().enumerate().find(|(_, bound)| !bound.is_finite()) {
            let (layer, plane) = (plane as u32 / geometry.planes, plane as u32 % geometry.planes);
            return Err(input(format!("kv: layer {layer}, plane {plane} has the value {bad}, expected finite ones")));
        }
        let _registration = self.shared.registration.lock();
        let state = self.shared.open_state()?;
        let books = state.models.get(&model.id).ok_or_else(|| Shared::not_registered(model))?;
        let file = books.disk.as_ref().map(|disk| disk.file.clone());
        drop(state);
        if let Some(file) = file {
            file.write_calibration(&bounds).map_err(|e| Error::io("cannot keep the calibration", e))?;
        }
        if let Some(books) = self.shared.state.lock().models.get_mut(&model.id) {
            books.bounds = Some(bounds.as_slice().into());
        }
        Ok(bounds)
    }
}

impl Shared {
    pub(super) fn not_registered(model: &Model) -> Error {
        Error::new(ErrorKind::ModelNotFound, format!("model {:?} is not registered", model.spec.name))
    }
}
