//! `Model` and `TokenSequence` for Python.

use super::OrRaise;
use super::lease::Lease;
use super::store::lifter_of;
use super::tensor::{integers, keep_alive};
use super::view::{Placement, view};
use crate::block::Geometry;
use crate::codec::{Clip, Codec, Granularity, Percentile, Scheme};
use crate::error::input;
use crate::evict::Retention;
use crate::stats::Tier;
use crate::sync::Mutex;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::sync::Arc;
use std::time::Duration;

/// Names of the block that begins a run, and of its namespace.
type Run = ([u8; 16], [u8; 16]);

/// A registered model; `stratakv.ModelCache` wraps it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Model {
    pub(super) store: Arc<crate::Store>,
    pub(super) model: Arc<crate::Model>,
}

#[pymethods]
impl Model {
    /// Finds and leases the longest cached prefix.
    #[pyo3(signature = (tokens, adapter, tenant))]
    fn match_prefix(&self, tokens: &Bound<'_, PyAny>, adapter: &str, tenant: &str) -> PyResult<Lease> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let lease = py.detach(|| self.store.match_sequence(&self.model, asked.sequence(self, adapter, tenant)));
        Ok(Lease::new(lease.or_raise(py)?))
    }

    /// The same of a sequence, where another tier is asked for what is not here.
    #[pyo3(signature = (tokens))]
    fn match_here(&self, tokens: &Bound<'_, PyAny>) -> PyResult<Lease> {
        let py = tokens.py();
        let asked = Asked::read(tokens, "", "")?;
        let lease = py.detach(|| self.store.match_here(&self.model, asked.sequence(self, "", "")));
        Ok(Lease::new(lease.or_raise(py)?))
    }

    /// A sequence of no tokens yet.
    #[pyo3(signature = (adapter, tenant))]
    fn sequence(&self, adapter: &str, tenant: &str) -> TokenSequence {
        let sequence = self.store.empty_sequence(&self.model, adapter, tenant);
        TokenSequence { sequence: Mutex::new(sequence) }
    }

    /// Stores what is not cached yet; returns how many leading tokens are cached now.
    #[pyo3(signature = (tokens, kv, layout, batch, pages, start, adapter, tenant, priority, ttl_s, stream))]
    #[expect(clippy::too_many_arguments, reason = "one crossing carries the whole request; Python names them")]
    fn put<'py>(
        &self,
        tokens: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        layout: &str,
        batch: usize,
        pages: Option<&Bound<'py, PyAny>>,
        start: usize,
        adapter: &str,
        tenant: &str,
        priority: u8,
        ttl_s: Option<f64>,
        stream: Option<u64>,
    ) -> PyResult<usize> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let placement = Placement { layout, batch, pages, stream };
        let (view, tensors) = view(kv, &self.model.spec().geometry, &placement, false)?;
        // What no clock can reach is never over.
        let ttl = ttl_s.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let retention = Retention { priority, ttl };
        let put = || {
            let sequence = asked.sequence(self, adapter, tenant);
            self.store.put_sequence(&self.model, &sequence, &view, start, retention)
        };
        let outcome = py.detach(put);
        keep_alive(tensors);
        Ok(outcome.or_raise(py)?.tokens)
    }

    /// Names the model's records in a tier that nodes share.
    #[getter]
    fn fingerprint<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.store.fingerprint(&self.model))
    }

    /// Of each block the name of the one that begins its run of so many blocks, and of its namespace; `None`: it is gone.
    fn heads(&self, py: Python<'_>, names: Vec<[u8; 16]>, run_blocks: u32) -> PyResult<Vec<Option<Run>>> {
        py.detach(|| self.store.heads(&self.model, &names, run_blocks)).or_raise(py)
    }

    /// The record of a block for such a tier, by its name; `None`: it is not in RAM.
    fn export<'py>(&self, py: Python<'py>, name: [u8; 16]) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let record = py.detach(|| self.store.export(&self.model, name)).or_raise(py)?;
        Ok(record.map(|record| PyBytes::new(py, &record)))
    }

    /// Names a namespace of the model in its present epoch.
    fn space<'py>(&self, py: Python<'py>, adapter: &str, tenant: &str) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.store.space(&self.model, adapter, tenant))
    }

    /// Reads blocks of one sequence that are on SSD alone into RAM; returns how many leading ones are there then, and the
    /// bytes that came.
    fn lift(&self, py: Python<'_>, names: Vec<[u8; 16]>, lifter: &str, most_bytes: u64) -> PyResult<(usize, u64)> {
        let lifter = lifter_of(lifter).or_raise(py)?;
        py.detach(|| self.store.lift(&self.model, &names, lifter, most_bytes)).or_raise(py)
    }

    /// Takes in records from there, from block `first` on; returns how many leading blocks are cached now, how many came
    /// to RAM, and why not all.
    #[pyo3(signature = (tokens, adapter, tenant, first, records))]
    fn admit(
        &self,
        tokens: &Bound<'_, PyAny>,
        adapter: &str,
        tenant: &str,
        first: usize,
        records: Vec<PyBackedBytes>,
    ) -> PyResult<(usize, usize, Option<&'static str>)> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let records: Vec<&[u8]> = records.iter().map(|record| &**record).collect();
        let sequence = || asked.sequence(self, adapter, tenant);
        let admitted = py.detach(|| self.store.admit(&self.model, &sequence(), first, &records));
        let admitted = admitted.or_raise(py)?;
        Ok((admitted.blocks, admitted.came, admitted.miss.map(|miss| miss.name())))
    }

    /// The same of a sequence of which the names of its blocks are known, ahead of a request.
    #[pyo3(signature = (adapter, tenant, names, first, records, lifter))]
    #[expect(clippy::too_many_arguments, reason = "one crossing carries the whole request; Python names them")]
    fn admit_named(
        &self,
        py: Python<'_>,
        adapter: &str,
        tenant: &str,
        names: Vec<[u8; 16]>,
        first: usize,
        records: Vec<PyBackedBytes>,
        lifter: &str,
    ) -> PyResult<(usize, usize, Option<&'static str>)> {
        let lifter = lifter_of(lifter).or_raise(py)?;
        let records: Vec<&[u8]> = records.iter().map(|record| &**record).collect();
        let admit = || self.store.admit_named(&self.model, adapter, tenant, &names, first, &records, lifter);
        let admitted = py.detach(admit).or_raise(py)?;
        Ok((admitted.blocks, admitted.came, admitted.miss.map(|miss| miss.name())))
    }

    /// Where the leading blocks of a sequence are, by their names: a bit for each tier, 1 for RAM and 2 for SSD.
    fn places<'py>(&self, py: Python<'py>, names: Vec<[u8; 16]>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &py.detach(|| self.store.places(&self.model, &names)).or_raise(py)?))
    }

    /// Bytes that a load would read for each leading block of some tokens; and through how many of them, and of so many
    /// more in RAM, it would go.
    fn weigh(&self, py: Python<'_>, names: Vec<[u8; 16]>, more: usize) -> PyResult<(Vec<u64>, usize)> {
        py.detach(|| self.store.weigh(&self.model, &names, more)).or_raise(py)
    }

    /// Why each block of a sequence is not there; of one that is there it says nothing.
    fn missing(&self, sequence: &TokenSequence) -> Vec<&'static str> {
        self.store.missing(&sequence.sequence.lock()).into_iter().map(|why| why.name()).collect()
    }

    /// Names of the blocks of a sequence, 16 bytes each, one behind the other.
    fn names<'py>(&self, py: Python<'py>, sequence: &TokenSequence) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.store.names(&sequence.sequence.lock()).concat())
    }

    /// Bytes of a block that is not encoded, header and padding included.
    #[getter]
    fn record_bytes(&self) -> usize {
        self.model.spec().geometry.record_bytes()
    }

    /// Blocks asked for, aged, and how many of them caches of so many blocks would have hit; sizes rise.
    fn curve(&self, py: Python<'_>, blocks: Vec<f64>) -> PyResult<(f64, Vec<f64>)> {
        py.detach(|| self.store.curve(&self.model, &blocks)).or_raise(py)
    }

    /// Sets what the model may have.
    fn set_quota(&self, py: Python<'_>, quota: QuotaTerms) -> PyResult<()> {
        py.detach(|| self.store.set_model_quota(&self.model, quota_of(quota))).or_raise(py)
    }

    /// Tells how fast the engine computes, in tokens a second.
    fn set_prefill_rate(&self, py: Python<'_>, tokens_per_s: Option<f64>) -> PyResult<()> {
        py.detach(|| self.store.set_prefill_rate(&self.model, tokens_per_s)).or_raise(py)
    }

    /// Has that rate learned.
    fn learn_prefill_rate(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.store.learn_prefill_rate(&self.model)).or_raise(py)
    }

    /// Tokens a second, told or learned; `None`: not known.
    fn prefill_rate(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        py.detach(|| self.store.prefill_rate(&self.model)).or_raise(py)
    }

    /// Seconds that reading a byte from SSD takes; `None`: not known.
    fn read_s(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        py.detach(|| self.store.read_s(&self.model)).or_raise(py)
    }

    /// Encodes what is put, or what goes to SSD, from now on.
    fn set_codec(&self, py: Python<'_>, tier: &str, codec: CodecTerms) -> PyResult<()> {
        let scheme = scheme(codec, &self.model.spec().geometry).or_raise(py)?;
        let tier = if tier == Tier::Ram.name() { Tier::Ram } else { Tier::Ssd };
        py.detach(|| self.store.set_codec(&self.model, tier, scheme)).or_raise(py)
    }

    /// Measures what codecs may clip to, and keeps it; returns it by plane.
    #[pyo3(signature = (kv, percentile, layout, batch, pages))]
    fn calibrate(
        &self,
        kv: &Bound<'_, PyAny>,
        percentile: f64,
        layout: &str,
        batch: usize,
        pages: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<f32>> {
        let py = kv.py();
        let percentile = Percentile::new(percentile).or_raise(py)?;
        let placement = Placement { layout, batch, pages, stream: None };
        let (view, tensors) = view(kv, &self.model.spec().geometry, &placement, false)?;
        let bounds = py.detach(|| self.store.calibrate(&self.model, &view, percentile));
        keep_alive(tensors);
        bounds.or_raise(py)
    }

    /// Forgets one namespace; returns how many blocks.
    fn drop_namespace(&self, py: Python<'_>, adapter: &str, tenant: &str) -> PyResult<u64> {
        py.detach(|| self.store.drop_namespace(&self.model, adapter, tenant)).or_raise(py)
    }

    /// Retires the model's version, or takes that back; returns how many blocks were forgotten.
    fn retire(&self, py: Python<'_>, retired: bool) -> PyResult<u64> {
        py.detach(|| self.store.retire(&self.model, retired)).or_raise(py)
    }

    /// Frees everything of the model.
    fn unregister(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.store.unregister(&self.model)).or_raise(py)
    }
}

/// Name, granularity of keys and of values, clip percentile, whether clipped as calibrated, and raw layers at either end.
pub(super) type CodecTerms = (String, Option<String>, Option<String>, Option<f64>, bool, [u32; 2]);

/// Hard and soft limit and reserve of RAM, of SSD; tokens a second; loads at a time.
pub(super) type QuotaTerms = ([(Option<u64>, Option<u64>, u64); 2], Option<f64>, Option<u32>);

pub(super) fn quota_of((tiers, tokens_per_s, loads): QuotaTerms) -> crate::Quota {
    let tiers = tiers.map(|(hard, soft, reserved)| crate::TierQuota { hard, soft, reserved });
    crate::Quota { tiers, tokens_per_s, loads }
}

pub(super) fn scheme(terms: CodecTerms, geometry: &Geometry) -> crate::Result<Scheme> {
    let (name, keys, values, percentile, calibrated, raw_layers) = terms;
    let mut scheme = Scheme { raw_layers, ..Scheme::new(Codec::parse(&name)?, geometry) };
    for (text, granularity) in [(keys, &mut scheme.keys), (values, &mut scheme.values)] {
        if let Some(text) = text {
            *granularity = Granularity::parse(&text)?;
        }
    }
    scheme.clip = match percentile {
        Some(percent) => Some(Clip::Percentile(Percentile::new(percent)?)),
        None => calibrated.then_some(Clip::Calibrated),
    };
    Ok(scheme)
}

/// What a request asks for: plain tokens, to be hashed, or a sequence.
pub(super) enum Asked {
    Tokens(Vec<u32>),
    Sequence(crate::Sequence),
}

impl Asked {
    pub(super) fn read(tokens: &Bound<'_, PyAny>, adapter: &str, tenant: &str) -> PyResult<Self> {
        let Ok(sequence) = tokens.cast::<TokenSequence>() else { return integers(tokens, "tokens").map(Self::Tokens) };
        if !adapter.is_empty() || !tenant.is_empty() {
            let message = "adapter and tenant are those of the sequence: give them where it is made, or give tokens";
            return Err(input(message)).or_raise(tokens.py());
        }
        Ok(Self::Sequence(sequence.get().sequence.lock().clone()))
    }

    pub(super) fn sequence(self, model: &Model, adapter: &str, tenant: &str) -> crate::Sequence {
        match self {
            Self::Tokens(tokens) => model.store.sequence(&model.model, adapter, tenant, tokens),
            Self::Sequence(sequence) => sequence,
        }
    }
}

/// Token ids that grow, and the hashes of their blocks: those of old tokens are not computed again.
///
/// `ModelCache.sequence` makes one; `ModelCache.match` and `ModelCache.put` take it in place of tokens. Any thread may use
/// it; a match or a put sees it as it is when called.
#[pyclass(frozen, module = "stratakv")]
pub(super) struct TokenSequence {
    sequence: Mutex<crate::Sequence>,
}

#[pymethods]
impl TokenSequence {
    /// Appends token ids.
    ///
    /// Args:
    ///     tokens: 1-d, as for `ModelCache.match`.
    ///     block_hashes: the engine's own hash of each block that is complete now and was not before: a sequence of
    ///         `bytes`, 16 to 64 each, each naming the whole prefix up to the block's end. For all blocks of a sequence,
    ///         or for none. Give them where equal tokens do not mean equal keys and values, as with images.
    ///
    /// Raises:
    ///     InputError: tokens or hashes of another form or number; the sequence is then as it was.
    #[pyo3(signature = (tokens, *, block_hashes = None))]
    fn extend(&self, tokens: &Bound<'_, PyAny>, block_hashes: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let py = tokens.py();
        let ids = integers(tokens, "tokens")?;
        let expected = |found: &str| input(format!("block_hashes: {found}, expected a sequence of bytes"));
        let hashes = match block_hashes.map(|hashes| hashes.extract::<Vec<PyBackedBytes>>()).transpose() {
            Ok(hashes) => hashes,
            Err(_) => {
                let kind = block_hashes.map_or_else(|| Ok("None".into()), |h| h.get_type().name()?.extract::<String>());
                return Err(expected(&kind?)).or_raise(py);
            }
        };
        let names: Option<Vec<&[u8]>> = hashes.as_ref().map(|hashes| hashes.iter().map(|hash| &**hash).collect());
        self.sequence.lock().extend(&ids, names.as_deref()).or_raise(py)
    }

    /// All token ids, 4 bytes each, little end first.
    fn _ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let ids: Vec<u8> = self.sequence.lock().tokens().iter().flat_map(|id| id.to_le_bytes()).collect();
        PyBytes::new(py, &ids)
    }

    /// Number of tokens.
    fn __len__(&self) -> usize {
        self.sequence.lock().tokens().len()
    }

    /// Says how long it is, and no token.
    fn __repr__(&self) -> String {
        format!("TokenSequence({} tokens)", self.__len__())
    }
}
