//! `Store` for Python.

use super::OrRaise;
use super::model::{CodecTerms, Model, QuotaTerms, quota_of, scheme};
use crate::block::{Dtype, Geometry};
use crate::error::input;
use crate::evict::Kind;
use crate::stats::{Counts, GpuStatus, Histogram, Lifter, Miss, Tier, Usage};
use crate::{Engine, GpuOptions, ModelSpec, Options, SlabOptions, SsdOptions, WritePolicy};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyList, PyTuple};
use std::sync::Arc;
use std::time::Duration;

/// A store of this process; `stratakv.CacheManager` wraps it.
#[pyclass(frozen, module = "stratakv._native")]
pub(super) struct Store {
    store: Arc<crate::Store>,
    no_gpu: Option<String>,
}

#[pymethods]
impl Store {
    /// Opens a store. `ssd` is `(path, capacity_bytes, segment_bytes, policy, engine)` or `None`; `gpu` is `(capacity_bytes,
    /// device, driver)` or `None`; `gpu_memory`, if it is given, a tensor there that becomes the tier's memory.
    #[new]
    #[pyo3(signature = (*, ram_capacity_bytes, eviction, ssd, secret, threads, index_bytes, gpu, gpu_memory))]
    #[expect(clippy::too_many_arguments, reason = "they are named")]
    fn new(
        py: Python<'_>,
        ram_capacity_bytes: u64,
        eviction: &str,
        ssd: Option<(std::path::PathBuf, u64, u64, String, String)>,
        secret: Option<String>,
        threads: usize,
        index_bytes: Option<u64>,
        gpu: Option<(u64, u32, Option<std::path::PathBuf>)>,
        gpu_memory: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let eviction = Kind::parse(eviction).or_raise(py)?;
        let mut policy = WritePolicy::default();
        let mut tier = None;
        if let Some((path, capacity_bytes, segment_bytes, name, engine)) = ssd {
            policy = WritePolicy::parse(&name).or_raise(py)?;
            tier =
                Some(SsdOptions { path, capacity_bytes, segment_bytes, engine: Engine::parse(&engine).or_raise(py)? });
        }
        let mut no_gpu = None;
        let mut tier_on_gpu = None;
        if let Some((capacity_bytes, number, driver)) = gpu {
            match py.detach(|| super::gpu::device(number, driver)) {
                Ok(device) => {
                    let slab = match gpu_memory {
                        Some(tensor) => SlabOptions::Adopted(super::gpu::adopted(tensor, &device)?),
                        None => SlabOptions::Reserved(capacity_bytes),
                    };
                    tier_on_gpu = Some(GpuOptions { device, slab });
                }
                Err(reason) => no_gpu = Some(reason),
            }
        }
        let options = Options {
            ram_capacity_bytes,
            eviction,
            ssd: tier,
            policy,
            secret,
            threads,
            index_bytes,
            gpu: tier_on_gpu,
            stepped: false,
        };
        let store = py.detach(|| crate::Store::open(options)).or_raise(py)?;
        let no_gpu = no_gpu.or_else(|| store.no_gpu().map(str::to_owned));
        if let Some(why) = no_gpu.as_ref().filter(|_| gpu_memory.is_some()) {
            py.detach(|| store.close()).or_raise(py)?;
            return Err(input(format!("gpu_memory: {why}"))).or_raise(py);
        }
        Ok(Self { store: Arc::new(store), no_gpu })
    }

    /// Why there is no GPU tier, though one was asked for.
    #[getter]
    fn no_gpu(&self) -> Option<&str> {
        self.no_gpu.as_deref()
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

    /// Has the system back all of RAM with memory.
    fn prefault(&self, py: Python<'_>) {
        py.detach(|| self.store.prefault());
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

    /// What was done behind requests since the last such call: kind, model, when it began and ended in ns since 1970,
    /// blocks, bytes, and names of the first of them.
    fn behind<'py>(&self, py: Python<'py>) -> PyResult<Vec<WorkRow<'py>>> {
        let done = py.detach(|| self.store.behind()).or_raise(py)?;
        let row = |work: crate::Work| {
            let names = work.names.iter().map(|name| PyBytes::new(py, name)).collect();
            (work.kind.name(), work.model, work.begun_ns, work.ended_ns, work.blocks, work.bytes, names)
        };
        Ok(done.into_iter().map(row).collect())
    }

    /// Prompts of which matches found too little: model, adapter, tenant, and token ids, 4 bytes each.
    fn missed<'py>(&self, py: Python<'py>) -> PyResult<Vec<MissedRow<'py>>> {
        let missed = py.detach(|| self.store.missed()).or_raise(py)?;
        let ids = |tokens: Vec<u32>| {
            let bytes: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
            PyBytes::new(py, &bytes)
        };
        Ok(missed.into_iter().map(|(model, adapter, tenant, tokens)| (model, adapter, tenant, ids(tokens))).collect())
    }

    /// Bytes brought to RAM ahead of requests by this, and bytes of those that were asked for since.
    fn lifted(&self, py: Python<'_>, lifter: &str) -> PyResult<(u64, u64)> {
        let lifter = lifter_of(lifter).or_raise(py)?;
        let lifted = py.detach(|| self.store.lifted(lifter)).or_raise(py)?;
        Ok((lifted.bytes, lifted.hit_bytes))
    }

    /// What each tenant counted of each model: number of the registration, names of both, and blocks asked for, found, tokens
    /// loaded, blocks and bytes put.
    fn usage(&self, py: Python<'_>) -> PyResult<Vec<UsageRow>> {
        let usage = py.detach(|| self.store.usage()).or_raise(py)?;
        let row = |c: Counts| [c.asked, c.hit, c.loaded_tokens, c.put_blocks, c.put_bytes];
        Ok(usage.into_iter().map(|(number, model, tenant, counts)| (number, model, tenant, row(counts))).collect())
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
    ///
    /// Args:
    ///     tenants: how many are told apart, those first that were seen first; the others are one. `None`: all.
    ///     tenant: one more that is.
    #[pyo3(signature = (tenants=None, tenant=None))]
    fn snapshot<'py>(
        &self,
        py: Python<'py>,
        tenants: Option<usize>,
        tenant: Option<&str>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (most, named) = (tenants.unwrap_or(usize::MAX), tenant);
        let snapshot = py.detach(|| self.store.snapshot());
        let models = PyDict::new(py);
        for (name, counts) in &snapshot.models {
            models.set_item(name, counts_dict(py, counts)?)?;
        }
        let (tenants, model_usage, tenant_usage) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
        let usage = |usage: &Usage| (usage.bytes[0], usage.bytes[1], usage.tokens_left, usage.loads);
        let mut others: Option<Counts> = None;
        for (n, (name, counts, used)) in snapshot.tenants.iter().enumerate() {
            if n < most || named == Some(name) {
                tenants.set_item(name, counts_dict(py, counts)?)?;
                tenant_usage.set_item(name, usage(used))?;
            } else {
                others.get_or_insert_default().add(counts);
            }
        }
        for (name, used) in &snapshot.usage {
            model_usage.set_item(name, usage(used))?;
        }
        let out = PyDict::new(py);
        out.set_item("gpu", snapshot.gpu.as_ref().map(|gpu| gpu_dict(py, gpu)).transpose()?)?;
        out.set_item("total", counts_dict(py, &snapshot.total)?)?;
        out.set_item("models", models)?;
        out.set_item("tenants", tenants)?;
        out.set_item("other_tenants", others.map(|counts| counts_dict(py, &counts)).transpose()?)?;
        out.set_item("tenant_count", snapshot.tenants.len())?;
        out.set_item("model_usage", model_usage)?;
        out.set_item("tenant_usage", tenant_usage)?;
        out.set_item("ram_capacity_bytes", snapshot.ram_capacity_bytes)?;
        out.set_item("ram_free_bytes", snapshot.ram_free_bytes)?;
        out.set_item("ram_largest_free_bytes", snapshot.ram_largest_free_bytes)?;
        out.set_item("demotion_queue_blocks", snapshot.demotion_queue.into_iter().into_py_dict(py)?)?;
        out.set_item("hit_ceiling", snapshot.hit_ceiling.into_iter().into_py_dict(py)?)?;
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

/// Number of the registration, model, tenant, and counts.
type UsageRow = (u32, String, String, [u64; 5]);

/// Kind, model, begin, end, blocks, bytes, and names.
type WorkRow<'py> = (&'static str, String, u64, u64, usize, u64, Vec<Bound<'py, PyBytes>>);

/// Model, adapter, tenant and token ids of a prompt.
type MissedRow<'py> = (String, String, String, Bound<'py, PyBytes>);

/// Model, namespace, adapter and tenant, names of its blocks, their places, since when, used when, and how often.
type PrefixRow<'py> =
    (String, Bound<'py, PyBytes>, Option<(String, String)>, Bound<'py, PyBytes>, Bound<'py, PyBytes>, u32, u32, u32);

fn prefix_row<'py>(py: Python<'py>, prefix: &crate::Prefix) -> PrefixRow<'py> {
    let (blocks, places) = (PyBytes::new(py, &prefix.blocks.concat()), PyBytes::new(py, &prefix.places));
    let (space, names) = (PyBytes::new(py, &prefix.space), prefix.names.clone());
    (prefix.model.clone(), space, names, blocks, places, prefix.since_s, prefix.used_s, prefix.uses)
}

pub(super) fn lifter_of(name: &str) -> crate::Result<Lifter> {
    let known = Lifter::ALL.into_iter().find(|lifter| lifter.name() == name);
    known.ok_or_else(|| input(format!("lifter is {name:?}, expected warm or near")))
}

fn gpu_dict<'py>(py: Python<'py>, gpu: &GpuStatus) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("device", &gpu.name)?;
    out.set_item("capacity_bytes", gpu.capacity_bytes)?;
    let fields = [
        ("taken_blocks", gpu.counts.taken),
        ("fresh_blocks", gpu.counts.fresh),
        ("reservations", gpu.counts.reservations),
        ("held_blocks", gpu.counts.held),
        ("refused", gpu.refused),
    ];
    for (name, value) in fields {
        out.set_item(name, value)?;
    }
    out.set_item("failed", gpu.failed.as_deref())?;
    Ok(out)
}

/// The same for all histograms.
static BOUNDS_S: PyOnceLock<Py<PyTuple>> = PyOnceLock::new();

fn counts_dict<'py>(py: Python<'py>, counts: &Counts) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    let fields = [
        ("matches", counts.matches),
        ("asked_blocks", counts.asked),
        ("hit_blocks", counts.hit),
        ("miss_blocks", counts.miss),
        ("loaded_tokens", counts.loaded_tokens),
        ("loaded_bytes", counts.loaded_bytes),
        ("loads", counts.loads),
        ("puts", counts.puts),
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
        ("dropped_blocks", counts.dropped),
        ("corrupt_blocks", counts.corrupt),
        ("io_errors", counts.io_errors),
        ("not_worth_it_loads", counts.not_worth_it),
    ];
    for (name, value) in fields {
        out.set_item(name, value)?;
    }
    for (name, ns) in [("put_s", counts.put_ns), ("load_s", counts.load_ns), ("prefill_saved_s", counts.saved_ns)] {
        out.set_item(name, Duration::from_nanos(ns).as_secs_f64())?;
    }
    for (name, blocks) in [("missed", counts.missed), ("unloaded", counts.unloaded)] {
        out.set_item(name, Miss::ALL.map(Miss::name).into_iter().zip(blocks).into_py_dict(py)?)?;
    }
    let bounds =
        BOUNDS_S.get_or_try_init(py, || PyTuple::new(py, Histogram::BOUNDS_S.map(f64::from)).map(Bound::unbind))?;
    let tiers = PyDict::new(py);
    for (tier, counts) in [(Tier::Gpu, counts.gpu), (Tier::Ram, counts.tiers[0]), (Tier::Ssd, counts.tiers[1])] {
        let row = PyDict::new(py);
        let fields = [
            ("asked_blocks", counts.asked),
            ("hit_blocks", counts.hit),
            ("miss_blocks", counts.miss),
            ("blocks", counts.blocks),
            ("used_bytes", counts.used_bytes),
            ("in_bytes", counts.in_bytes),
            ("out_bytes", counts.out_bytes),
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
        for (name, histogram) in [("residence", counts.residence), ("reuse_gap", counts.reuse_gap)] {
            let Histogram { counts, sum_s } = histogram;
            row.set_item(name, (bounds, counts, sum_s as f64))?;
        }
        tiers.set_item(tier.name(), row)?;
    }
    out.set_item("tiers", tiers)?;
    Ok(out)
}
