//! `Store`, `Model` and `Lease` for Python.

use super::block::BlockBuffer;
use super::tensor::{Placement, Tensor, integers, view};
use super::{OrRaise, raise};
use crate::block::{Dtype, Geometry};
use crate::codec::{Clip, Codec, Granularity, Percentile, Scheme};
use crate::error::input;
use crate::evict::{Kind, Retention};
use crate::stats::{Counts, Lifter, Tier, Usage};
use crate::sync::Mutex;
use crate::{Engine, ModelSpec, Options, SsdOptions, WritePolicy};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyList, PyMemoryView};
use std::sync::Arc;
use std::time::Duration;

/// A store of this process; `stratakv.CacheManager` wraps it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Store {
    store: Arc<crate::Store>,
}

#[pymethods]
impl Store {
    /// Opens a store. `ssd` is `(path, capacity_bytes, segment_bytes, policy, engine)` or `None`.
    #[new]
    #[pyo3(signature = (*, ram_capacity_bytes, eviction, ssd, secret, threads, index_bytes))]
    fn new(
        py: Python<'_>,
        ram_capacity_bytes: u64,
        eviction: &str,
        ssd: Option<(std::path::PathBuf, u64, u64, String, String)>,
        secret: Option<String>,
        threads: usize,
        index_bytes: Option<u64>,
    ) -> PyResult<Self> {
        let eviction = Kind::parse(eviction).or_raise(py)?;
        let mut policy = WritePolicy::default();
        let mut tier = None;
        if let Some((path, capacity_bytes, segment_bytes, name, engine)) = ssd {
            policy = WritePolicy::parse(&name).or_raise(py)?;
            tier =
                Some(SsdOptions { path, capacity_bytes, segment_bytes, engine: Engine::parse(&engine).or_raise(py)? });
        }
        let options =
            Options { ram_capacity_bytes, eviction, ssd: tier, policy, secret, threads, index_bytes, stepped: false };
        let store = py.detach(|| crate::Store::open(options)).or_raise(py)?;
        Ok(Self { store: Arc::new(store) })
    }

    /// Registers a model; geometry is `(layers, planes, kv_heads, head_dim, dtype, block_tokens)`.
    /// Both codecs must fit it; `Model.set_codec` sets them.
    #[pyo3(signature = (name, weights_version, geometry, codecs, quota))]
    fn register(
        &self,
        py: Python<'_>,
        name: String,
        weights_version: String,
        geometry: (u32, u32, u32, u32, String, u32),
        codecs: [CodecTerms; 2],
        quota: QuotaTerms,
    ) -> PyResult<Model> {
        let (layers, planes, kv_heads, head_dim, dtype, block_tokens) = geometry;
        let dtype = Dtype::parse(&dtype).or_raise(py)?;
        let geometry = Geometry { layers, planes, kv_heads, head_dim, dtype, block_tokens };
        for terms in codecs {
            scheme(terms, &geometry).and_then(|scheme| crate::Store::layout(&geometry, scheme)).or_raise(py)?;
        }
        let spec = ModelSpec { name, weights_version, geometry };
        let model = py.detach(|| self.store.register_with(spec, quota_of(quota))).or_raise(py)?;
        Ok(Model { store: self.store.clone(), model })
    }

    /// Waits until every block is durable on SSD.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.store.flush()).or_raise(py)
    }

    /// Drains, seals and closes.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.store.close()).or_raise(py)
    }

    /// Divides the tiers anew: `(model, ram_bytes, ssd_bytes)`, those first that make room first.
    fn divide(&self, py: Python<'_>, shares: Vec<(PyRef<'_, Model>, u64, u64)>) -> PyResult<()> {
        let shares: Vec<_> = shares.iter().map(|share| (share.0.model.clone(), share.1, share.2)).collect();
        py.detach(|| {
            let shares = shares.iter().map(|(model, ram_bytes, ssd_bytes)| crate::Share {
                model,
                ram_bytes: *ram_bytes,
                ssd_bytes: *ssd_bytes,
            });
            self.store.divide(&shares.collect::<Vec<_>>())
        })
        .or_raise(py)
    }

    /// What there is to divide: bytes of RAM, the steps in which they are taken, bytes of SSD, and those of a file's head.
    fn divisible(&self, py: Python<'_>) -> (u64, u64, u64, u64) {
        let all = py.detach(|| self.store.divisible());
        (all.ram_bytes, all.ram_step_bytes, all.ssd_bytes, all.ssd_head_bytes)
    }

    /// Lets what was asked for up to now count by this factor in the curves of all models.
    fn age_curves(&self, py: Python<'_>, factor: f64) -> PyResult<()> {
        py.detach(|| self.store.age_curves(factor)).or_raise(py)
    }

    /// What happened since event `since`: whether all that is there follows, `(model, hash, parent, tier, stored)`, and
    /// where to go on.
    #[pyo3(signature = (since))]
    fn events<'py>(&self, py: Python<'py>, since: Option<u64>) -> PyResult<(bool, Bound<'py, PyList>, u64)> {
        let found = py.detach(|| self.store.events(since)).or_raise(py)?;
        let rows = found.events.iter().map(|event| {
            let parent = event.parent.map(|parent| PyBytes::new(py, &parent));
            (&event.model, PyBytes::new(py, &event.hash), parent, event.tier.name(), event.stored)
        });
        Ok((found.anew, PyList::new(py, rows.collect::<Vec<_>>())?, found.next))
    }

    /// Cached sequences, of one model or of all; a portion, from that number on. And where to go on.
    #[pyo3(signature = (model, start))]
    fn prefixes<'py>(
        &self,
        py: Python<'py>,
        model: Option<&str>,
        start: u32,
    ) -> PyResult<(Vec<PrefixRow<'py>>, Option<u32>)> {
        let (found, next) = py.detach(|| self.store.prefixes(model, start)).or_raise(py)?;
        Ok((found.iter().map(|prefix| prefix_row(py, prefix)).collect(), next))
    }

    /// Bytes brought to RAM ahead of requests by this, and bytes of those that were asked for since.
    fn lifted(&self, py: Python<'_>, lifter: &str) -> PyResult<(u64, u64)> {
        let lifter = lifter_of(lifter).or_raise(py)?;
        let lifted = py.detach(|| self.store.lifted(lifter)).or_raise(py)?;
        Ok((lifted.bytes, lifted.hit_bytes))
    }

    /// What each tenant counted of each model: names of both, and blocks asked for, found, tokens loaded, blocks and bytes put.
    fn usage(&self, py: Python<'_>) -> PyResult<Vec<(String, String, [u64; 5])>> {
        let usage = py.detach(|| self.store.usage()).or_raise(py)?;
        let row = |c: Counts| [c.asked, c.hit, c.loaded_tokens, c.put_blocks, c.put_bytes];
        Ok(usage.into_iter().map(|(model, tenant, counts)| (model, tenant, row(counts))).collect())
    }

    /// Where puts and matches ended since the last such call, at most so many.
    fn used<'py>(&self, py: Python<'py>, most: usize) -> PyResult<Vec<PrefixRow<'py>>> {
        let found = py.detach(|| self.store.used(most)).or_raise(py)?;
        Ok(found.iter().map(|prefix| prefix_row(py, prefix)).collect())
    }

    /// Sets what a tenant may have, over all models.
    fn set_tenant_quota(&self, py: Python<'_>, tenant: &str, quota: QuotaTerms) -> PyResult<()> {
        py.detach(|| self.store.set_tenant_quota(tenant, quota_of(quota))).or_raise(py)
    }

    /// What says which quotas are set, as it was kept last in the SSD directory.
    fn kept_quotas<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        Ok(self.store.kept_quotas().or_raise(py)?.map(|content| PyBytes::new(py, &content)))
    }

    /// Keeps it.
    fn keep_quotas(&self, py: Python<'_>, content: &[u8]) -> PyResult<()> {
        py.detach(|| self.store.keep_quotas(content)).or_raise(py)
    }

    /// What backs the RAM tier: a name, and bytes on huge pages.
    fn ram_pages(&self, py: Python<'_>) -> (&'static str, u64) {
        py.detach(|| self.store.ram_pages()).map_or(("unknown", 0), |pages| (pages.name(), pages.huge))
    }

    /// All counters at one instant.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let snapshot = py.detach(|| self.store.snapshot());
        let models = PyDict::new(py);
        for (name, counts) in &snapshot.models {
            models.set_item(name, counts_dict(py, counts)?)?;
        }
        let (tenants, model_usage, tenant_usage) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
        let usage = |usage: &Usage| (usage.bytes[0], usage.bytes[1], usage.tokens_left, usage.loads);
        for (name, counts, used) in &snapshot.tenants {
            tenants.set_item(name, counts_dict(py, counts)?)?;
            tenant_usage.set_item(name, usage(used))?;
        }
        for (name, used) in &snapshot.usage {
            model_usage.set_item(name, usage(used))?;
        }
        let out = PyDict::new(py);
        out.set_item("total", counts_dict(py, &snapshot.total)?)?;
        out.set_item("models", models)?;
        out.set_item("tenants", tenants)?;
        out.set_item("model_usage", model_usage)?;
        out.set_item("tenant_usage", tenant_usage)?;
        out.set_item("ram_capacity_bytes", snapshot.ram_capacity_bytes)?;
        out.set_item("ssd_capacity_bytes", snapshot.ssd_capacity_bytes)?;
        out.set_item("ssd_file_bytes", snapshot.ssd_file_bytes)?;
        out.set_item("ssd_io", snapshot.ssd_io)?;
        out.set_item("ssd_engine", snapshot.ssd_engine.0)?;
        out.set_item("ssd_engine_refused", snapshot.ssd_engine.1)?;
        out.set_item("ssd_read_only", snapshot.ssd_read_only)?;
        let running = PyDict::new(py);
        for (name, kind) in &snapshot.ram_eviction {
            running.set_item(name, kind.name())?;
        }
        out.set_item("ram_eviction", running)?;
        out.set_item("ram_held", snapshot.ram_held.into_iter().into_py_dict(py)?)?;
        let lifted = PyDict::new(py);
        for (lifter, lifted_by) in Lifter::ALL.iter().zip(&snapshot.lifted) {
            lifted.set_item(lifter.name(), (lifted_by.bytes, lifted_by.hit_bytes))?;
        }
        out.set_item("lifted", lifted)?;
        out.set_item("index_blocks", snapshot.index_blocks)?;
        out.set_item("index_bytes", snapshot.index_bytes)?;
        out.set_item("index_refused_blocks", snapshot.index_refused)?;
        out.set_item("threads", self.store.threads())?;
        Ok(out)
    }
}

/// Model, namespace, adapter and tenant, names of its blocks, their places, since when, used when, and how often.
type PrefixRow<'py> =
    (String, Bound<'py, PyBytes>, Option<(String, String)>, Bound<'py, PyBytes>, Bound<'py, PyBytes>, u32, u32, u32);

fn prefix_row<'py>(py: Python<'py>, prefix: &crate::Prefix) -> PrefixRow<'py> {
    let (blocks, places) = (PyBytes::new(py, &prefix.blocks.concat()), PyBytes::new(py, &prefix.places));
    let (space, names) = (PyBytes::new(py, &prefix.space), prefix.names.clone());
    (prefix.model.clone(), space, names, blocks, places, prefix.since_s, prefix.used_s, prefix.uses)
}

fn lifter_of(name: &str) -> crate::Result<Lifter> {
    let known = Lifter::ALL.into_iter().find(|lifter| lifter.name() == name);
    known.ok_or_else(|| input(format!("lifter is {name:?}, expected warm or near")))
}

fn counts_dict<'py>(py: Python<'py>, counts: &Counts) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    let fields = [
        ("matches", counts.matches),
        ("asked_blocks", counts.asked),
        ("hit_blocks", counts.hit),
        ("miss_blocks", counts.miss),
        ("loaded_tokens", counts.loaded_tokens),
        ("loaded_bytes", counts.loaded_bytes),
        ("put_blocks", counts.put_blocks),
        ("put_bytes", counts.put_bytes),
        ("put_refused_blocks", counts.put_refused),
        ("put_over_quota_blocks", counts.put_over_quota),
        ("demoted_blocks", counts.demoted),
        ("reinserted_blocks", counts.reinserted),
        ("encoded_blocks", counts.encoded),
        ("not_encodable_blocks", counts.not_encodable),
        ("demotions_dropped_blocks", counts.demotions_dropped),
        ("promoted_blocks", counts.promoted),
        ("corrupt_blocks", counts.corrupt),
        ("io_errors", counts.io_errors),
        ("not_worth_it_loads", counts.not_worth_it),
    ];
    for (name, value) in fields {
        out.set_item(name, value)?;
    }
    let tiers = PyDict::new(py);
    for tier in Tier::ALL {
        let counts = counts.tiers[tier as usize];
        let row = PyDict::new(py);
        let fields = [
            ("asked_blocks", counts.asked),
            ("hit_blocks", counts.hit),
            ("miss_blocks", counts.miss),
            ("blocks", counts.blocks),
            ("used_bytes", counts.used_bytes),
            ("plain_bytes", counts.plain_bytes),
            ("evicted_blocks", counts.evicted),
            ("encoded_bytes", counts.encoded_bytes),
            ("decoded_bytes", counts.decoded_bytes),
            ("written_bytes", counts.written_bytes),
            ("rewritten_bytes", counts.rewritten_bytes),
            ("read_bytes", counts.read_bytes),
            ("saved_bytes", counts.saved_bytes),
        ];
        for (name, value) in fields {
            row.set_item(name, value)?;
        }
        let seconds = [("encode_s", counts.encode_ns), ("decode_s", counts.decode_ns), ("read_s", counts.read_ns)];
        for (name, ns) in seconds {
            row.set_item(name, Duration::from_nanos(ns).as_secs_f64())?;
        }
        tiers.set_item(tier.name(), row)?;
    }
    out.set_item("tiers", tiers)?;
    Ok(out)
}

/// A registered model; `stratakv.ModelCache` wraps it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Model {
    store: Arc<crate::Store>,
    model: Arc<crate::Model>,
}

#[pymethods]
impl Model {
    /// Finds and leases the longest cached prefix.
    #[pyo3(signature = (tokens, adapter, tenant))]
    fn match_prefix(&self, tokens: &Bound<'_, PyAny>, adapter: &str, tenant: &str) -> PyResult<Lease> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let lease = py.detach(|| self.store.match_sequence(&self.model, asked.sequence(self, adapter, tenant)));
        Ok(Lease { lease: lease.or_raise(py)? })
    }

    /// A sequence of no tokens yet.
    #[pyo3(signature = (adapter, tenant))]
    fn sequence(&self, adapter: &str, tenant: &str) -> TokenSequence {
        let sequence = self.store.empty_sequence(&self.model, adapter, tenant);
        TokenSequence { sequence: Mutex::new(sequence) }
    }

    /// Stores what is not cached yet; returns how many leading tokens are cached now.
    #[pyo3(signature = (tokens, kv, layout, batch, pages, adapter, tenant, priority, ttl_s))]
    #[expect(clippy::too_many_arguments, reason = "one crossing carries the whole request; Python names them")]
    fn put<'py>(
        &self,
        tokens: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        layout: &str,
        batch: usize,
        pages: Option<&Bound<'py, PyAny>>,
        adapter: &str,
        tenant: &str,
        priority: u8,
        ttl_s: Option<f64>,
    ) -> PyResult<usize> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let placement = Placement { layout, batch, pages };
        let (view, tensors) = view(kv, &self.model.spec().geometry, &placement, false)?;
        // What no clock can reach is never over.
        let ttl = ttl_s.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let retention = Retention { priority, ttl };
        let put = || self.store.put_sequence(&self.model, &asked.sequence(self, adapter, tenant), &view, retention);
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
    fn heads(
        &self,
        py: Python<'_>,
        names: Vec<[u8; 16]>,
        run_blocks: u32,
    ) -> PyResult<Vec<Option<([u8; 16], [u8; 16])>>> {
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

    /// Takes in records from there, from block `first` on; returns how many leading blocks are cached now, and why not all.
    #[pyo3(signature = (tokens, adapter, tenant, first, records))]
    fn admit(
        &self,
        tokens: &Bound<'_, PyAny>,
        adapter: &str,
        tenant: &str,
        first: usize,
        records: Vec<PyBackedBytes>,
    ) -> PyResult<(usize, Option<&'static str>)> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let records: Vec<&[u8]> = records.iter().map(|record| &**record).collect();
        let sequence = || asked.sequence(self, adapter, tenant);
        let admitted = py.detach(|| self.store.admit(&self.model, &sequence(), first, &records));
        let admitted = admitted.or_raise(py)?;
        Ok((admitted.blocks, admitted.miss.map(|miss| miss.name())))
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
    ) -> PyResult<(usize, Option<&'static str>)> {
        let lifter = lifter_of(lifter).or_raise(py)?;
        let records: Vec<&[u8]> = records.iter().map(|record| &**record).collect();
        let admit = || self.store.admit_named(&self.model, adapter, tenant, &names, first, &records, lifter);
        let admitted = py.detach(admit).or_raise(py)?;
        Ok((admitted.blocks, admitted.miss.map(|miss| miss.name())))
    }

    /// Where the leading blocks of a sequence are, by their names: a bit for each tier, 1 for RAM and 2 for SSD.
    fn places<'py>(&self, py: Python<'py>, names: Vec<[u8; 16]>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &py.detach(|| self.store.places(&self.model, &names)).or_raise(py)?))
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
        let placement = Placement { layout, batch, pages };
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
type CodecTerms = (String, Option<String>, Option<String>, Option<f64>, bool, [u32; 2]);

/// Hard and soft limit and reserve of RAM, of SSD; tokens a second; loads at a time.
type QuotaTerms = ([(Option<u64>, Option<u64>, u64); 2], Option<f64>, Option<u32>);

fn quota_of((tiers, tokens_per_s, loads): QuotaTerms) -> crate::Quota {
    let tiers = tiers.map(|(hard, soft, reserved)| crate::TierQuota { hard, soft, reserved });
    crate::Quota { tiers, tokens_per_s, loads }
}

fn scheme(terms: CodecTerms, geometry: &Geometry) -> crate::Result<Scheme> {
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
enum Asked {
    Tokens(Vec<u32>),
    Sequence(crate::Sequence),
}

impl Asked {
    fn read(tokens: &Bound<'_, PyAny>, adapter: &str, tenant: &str) -> PyResult<Self> {
        let Ok(sequence) = tokens.cast::<TokenSequence>() else { return integers(tokens, "tokens").map(Self::Tokens) };
        if !adapter.is_empty() || !tenant.is_empty() {
            let message = "adapter and tenant are those of the sequence: give them where it is made, or give tokens";
            return Err(input(message)).or_raise(tokens.py());
        }
        Ok(Self::Sequence(sequence.get().sequence.lock().clone()))
    }

    fn sequence(self, model: &Model, adapter: &str, tenant: &str) -> crate::Sequence {
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

// The tensors' memory is used by a detached call; this marks where that ends.
fn keep_alive(tensors: Vec<Tensor<'_>>) {
    drop(tensors);
}

/// A leased match; `stratakv.Match` wraps it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Lease {
    lease: crate::Lease,
}

#[pymethods]
impl Lease {
    /// Matched tokens.
    #[getter]
    fn tokens(&self) -> usize {
        self.lease.tokens()
    }

    /// Matched blocks.
    #[getter]
    fn blocks(&self) -> usize {
        self.lease.tokens() / self.lease.geometry().block_tokens as usize
    }

    /// Tokens of a block.
    #[getter]
    fn block_tokens(&self) -> usize {
        self.lease.geometry().block_tokens as usize
    }

    /// Tokens asked for.
    #[getter]
    fn asked_tokens(&self) -> usize {
        self.lease.asked_tokens()
    }

    /// The cheapest tier of each matched block.
    #[getter]
    fn places<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.lease.places().iter().map(|t| t.name()))
    }

    /// The same match as it is now, of the same tokens.
    #[pyo3(signature = (model, tokens, adapter, tenant))]
    fn extended(&self, model: &Model, tokens: &Bound<'_, PyAny>, adapter: &str, tenant: &str) -> PyResult<Self> {
        let py = tokens.py();
        let asked = Asked::read(tokens, adapter, tenant)?;
        let lease = py.detach(|| self.lease.extended(&asked.sequence(model, adapter, tenant)));
        Ok(Self { lease: lease.or_raise(py)? })
    }

    /// Names the namespace.
    #[getter]
    fn space<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.lease.space())
    }

    /// Names of all whole blocks that were asked for, 16 bytes each.
    #[getter]
    fn names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.lease.names().iter().map(|name| PyBytes::new(py, name)))
    }

    /// Why the match is not longer.
    #[getter]
    fn miss(&self) -> Option<&'static str> {
        self.lease.miss().map(|m| m.name())
    }

    /// Copies the match into `kv`; returns `(tokens, places, reason)`.
    #[pyo3(signature = (kv, layout, batch, pages))]
    fn load<'py>(
        &self,
        kv: &Bound<'py, PyAny>,
        layout: &str,
        batch: usize,
        pages: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(usize, Vec<&'static str>, Option<&'static str>)> {
        let py = kv.py();
        let placement = Placement { layout, batch, pages };
        let (view, tensors) = view(kv, self.lease.geometry(), &placement, true)?;
        let outcome = py.detach(|| self.lease.load(&view));
        keep_alive(tensors);
        let outcome = outcome.map_err(|e| raise(py, &e))?;
        let places = outcome.places.iter().map(|t| t.name()).collect();
        Ok((outcome.tokens, places, outcome.miss.map(|m| m.name())))
    }

    /// Reads into RAM what is on SSD alone; returns the leading blocks that are in RAM then.
    fn prefetch(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.lease.prefetch()).or_raise(py)
    }

    /// The bytes of one block, or `None`.
    fn view<'py>(&self, py: Python<'py>, block: usize) -> PyResult<Option<Bound<'py, PyMemoryView>>> {
        let Some(view) = self.lease.view(block) else { return Ok(None) };
        PyMemoryView::from(Bound::new(py, BlockBuffer::new(view))?.as_any()).map(Some)
    }

    /// Gives the blocks free.
    fn release(&self, py: Python<'_>) {
        py.detach(|| self.lease.release());
    }
}
