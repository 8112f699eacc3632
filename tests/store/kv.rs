//! What the tests of the store share: shapes, contents that tell where they belong, and calls that check them.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{fs, thread};
use stratakv::evict::Kind;
use stratakv::stats::{Counts, Snapshot};
use stratakv::{
    Dtype, Engine, Geometry, KvView, Lease, Model, ModelSpec, Options, PlaneView, SsdOptions, Store, WritePolicy,
};

pub(crate) const MIB: u64 = 1 << 20;
/// Records of 12 KiB. In an SSD of 1 MiB: eight in a segment, eight segments.
pub(crate) const FINE: Geometry = shape(2, 2, 2, 32, Dtype::Fp32, 8);
/// Records of 132 KiB: fifteen fill the smallest arena.
pub(crate) const COARSE: Geometry = shape(4, 2, 2, 256, Dtype::Fp32, 8);
/// One latent plane, records of 16 KiB.
pub(crate) const LATENT: Geometry = shape(3, 1, 1, 500, Dtype::Bf16, 5);

pub(crate) const fn shape(
    layers: u32,
    planes: u32,
    kv_heads: u32,
    head_dim: u32,
    dtype: Dtype,
    block_tokens: u32,
) -> Geometry {
    Geometry { layers, planes, kv_heads, head_dim, dtype, block_tokens }
}

pub(crate) fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ word >> 29
}

/// Reproducible chance.
#[derive(Debug)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(mix(self.0)) % bound as u64) as usize
    }
}

/// Keys and values of a sequence, `[layer][plane][head][token][dim]`.
pub(crate) struct Kv {
    geometry: Geometry,
    tokens: usize,
    bytes: Vec<u8>,
}

impl Kv {
    pub(crate) fn blank(geometry: Geometry, tokens: usize) -> Self {
        Self { geometry, tokens, bytes: vec![0xEE; tokens * geometry.token_bytes()] }
    }

    /// What a model computes: each row depends on the model, the whole prefix and its place, so that a byte in the
    /// wrong place shows.
    pub(crate) fn of(model: &Model, tokens: &[u32]) -> Self {
        Self::of_adapter(model, tokens, 1)
    }

    /// The same with an adapter whose weights are of this version.
    pub(crate) fn of_adapter(model: &Model, tokens: &[u32], version: u64) -> Self {
        let spec = model.spec();
        let mut kv = Self::blank(spec.geometry, tokens.len());
        let row = spec.geometry.row_bytes();
        let mut prefix = spec.name.bytes().fold(version, |hash, byte| mix(hash ^ u64::from(byte)));
        for (t, &token) in tokens.iter().enumerate() {
            prefix = mix(prefix ^ u64::from(token));
            for run in 0..spec.geometry.plane_count() * spec.geometry.kv_heads as usize {
                let mut word = prefix ^ (run as u64) << 32;
                for bytes in kv.bytes[(run * tokens.len() + t) * row..][..row].chunks_mut(8) {
                    word = mix(word.wrapping_add(0x9e37_79b9_7f4a_7c15));
                    bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
                }
            }
        }
        kv
    }

    /// Values of 16 bits between -2 and 2, which any scale fits; of the same kind for each block.
    pub(crate) fn values(model: &Model, tokens: &[u32]) -> Self {
        let mut kv = Self::of(model, tokens);
        // The exponent is 1/8 to 1, of halves and of bfloat16.
        let exponent = if kv.geometry.dtype == Dtype::Bf16 { 0x3e00 } else { 0x3000 };
        kv.bytes.chunks_mut(2).for_each(|bytes| {
            let word = u16::from_le_bytes([bytes[0], bytes[1]]);
            bytes.copy_from_slice(&(word & 0x80ff | exponent).to_le_bytes());
        });
        kv
    }

    pub(crate) fn from_bytes(geometry: Geometry, tokens: usize, bytes: Vec<u8>) -> Self {
        Self { geometry, tokens, bytes }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Makes all values the same.
    pub(crate) fn fill(&mut self, value: f32) {
        self.bytes.chunks_mut(4).for_each(|bytes| bytes.copy_from_slice(&value.to_le_bytes()));
    }

    /// Whether the leading tokens are the same.
    pub(crate) fn begins_as(&self, other: &Self, tokens: usize) -> bool {
        let row = self.geometry.row_bytes();
        let rows = self.bytes.chunks(self.tokens * row).zip(other.bytes.chunks(other.tokens * row));
        rows.into_iter().all(|(one, two)| one[..tokens * row] == two[..tokens * row])
    }

    pub(crate) fn view(&mut self) -> KvView {
        let row = self.geometry.row_bytes();
        let plane_bytes = self.geometry.kv_heads as usize * self.tokens * row;
        let base = self.bytes.as_mut_ptr();
        let plane = |p: usize| PlaneView {
            base: base.wrapping_add(p * plane_bytes),
            head_stride: (self.tokens * row) as isize,
            token_stride: row as isize,
            page_stride: 0,
        };
        let planes = (0..self.geometry.plane_count()).map(plane).collect();
        // SAFETY: `bytes` holds every row that the planes name, and outlives the one call that a view is made for.
        unsafe { KvView::new(planes, None, self.tokens) }.expect("there is no page table")
    }
}

pub(crate) fn options(directory: Option<&Path>, ram: u64, cap: u64) -> Options {
    Options {
        ram_capacity_bytes: ram,
        ssd: directory.map(|path| SsdOptions {
            path: path.into(),
            capacity_bytes: cap,
            segment_bytes: 64 << 10,
            engine: Engine::Auto,
        }),
        eviction: Kind::Adaptive,
        policy: WritePolicy::WriteBack,
        secret: None,
        threads: 2,
        index_bytes: None,
        stepped: false,
        gpu: None,
    }
}

pub(crate) fn open(directory: &Path, ram: u64, cap: u64) -> Store {
    Store::open(options(Some(directory), ram, cap)).expect("the directory is usable")
}

pub(crate) fn spec(name: &str, geometry: Geometry) -> ModelSpec {
    ModelSpec { name: name.into(), weights_version: String::new(), geometry }
}

pub(crate) fn register(store: &Store, name: &str, geometry: Geometry) -> Arc<Model> {
    store.register(spec(name, geometry)).expect("the model fits")
}

/// Whole blocks of a sequence that shares nothing with one of another `seed`.
pub(crate) fn sequence(seed: u32, blocks: usize, geometry: &Geometry) -> Vec<u32> {
    (0..blocks as u32 * geometry.block_tokens).map(|t| seed * 100_003 + t).collect()
}

/// Puts what the model computes for the tokens; returns the blocks that are cached then.
pub(crate) fn put(store: &Store, model: &Model, tokens: &[u32]) -> usize {
    let mut kv = Kv::of(model, tokens);
    let outcome = store.put(model, tokens, "", "", &kv.view()).expect("a put of right arguments never fails");
    outcome.tokens / model.spec().geometry.block_tokens as usize
}

pub(crate) fn hold(store: &Store, model: &Arc<Model>, tokens: &[u32]) -> Lease {
    store.match_prefix(model, tokens, "", "").expect("the store is open")
}

/// Loads a match and checks every byte; returns the blocks that were loaded.
pub(crate) fn load(lease: &Lease, model: &Model, tokens: &[u32]) -> usize {
    let (mut got, right) = (Kv::blank(model.spec().geometry, tokens.len()), Kv::of(model, tokens));
    let outcome = lease.load(&got.view()).expect("a load of right arguments never fails");
    assert!(got.begins_as(&right, outcome.tokens), "wrong bytes: {outcome:?}");
    let block = got.geometry.block_tokens as usize;
    assert_eq!(outcome.places.len() * block, outcome.tokens);
    assert_eq!(outcome.miss.is_none(), outcome.tokens == lease.tokens());
    outcome.tokens / block
}

pub(crate) fn fetch(store: &Store, model: &Arc<Model>, tokens: &[u32]) -> usize {
    load(&hold(store, model, tokens), model, tokens)
}

/// What holds in every snapshot.
pub(crate) fn assert_sums(snapshot: &Snapshot) {
    let total = &snapshot.total;
    let models = snapshot.models.iter().map(|(_, counts)| counts);
    let tenants = snapshot.tenants.iter().map(|(_, counts, _)| counts);
    for counts in models.chain(tenants.clone()).chain([total]) {
        assert_eq!(counts.hit + counts.miss, counts.asked);
        assert_eq!(counts.missed.iter().sum::<u64>(), counts.miss);
        let mut tiers = counts.tiers.iter().chain([&counts.gpu]);
        assert!(
            tiers.all(|tier| tier.in_bytes == tier.out_bytes + tier.used_bytes && tier.hit + tier.miss == tier.asked)
        );
    }
    let of = |counts: &Counts| {
        let requests = [counts.matches, counts.puts, counts.loads, counts.dropped, counts.put_ns, counts.load_ns];
        [&requests[..], &counts.missed, &counts.unloaded, &counts.tiers[0].residence.counts].concat()
    };
    let sum = tenants.map(of).reduce(|sum, more| sum.into_iter().zip(more).map(|(a, b)| a + b).collect());
    assert_eq!(sum.unwrap_or_default(), of(total));
    let (free, longest) = (snapshot.ram_free_bytes, snapshot.ram_largest_free_bytes);
    assert!(longest <= free && free <= snapshot.ram_capacity_bytes, "{longest} of {free} bytes");
}

/// Disk blocks of all files of a directory, in bytes.
pub(crate) fn disk_bytes(directory: &Path) -> u64 {
    let files = fs::read_dir(directory).expect("the directory is there");
    files.filter_map(|file| Some(file.ok()?.metadata().ok()?.blocks() * 512)).sum()
}

/// A hang is a failure, not an endless test.
pub(crate) fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, end) = mpsc::channel::<()>();
    let worker = thread::spawn(move || (work(), drop(done)).0);
    let ended = end.recv_timeout(Duration::from_secs(60));
    assert!(ended != Err(mpsc::RecvTimeoutError::Timeout), "no answer within a minute");
    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Writes a file in which zero pages are holes, as a store leaves them.
pub(crate) fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = fs::File::create(path).expect("it is writable");
    file.set_len(bytes.len() as u64).expect("it is writable");
    for (n, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|&byte| byte != 0)) {
        file.write_all_at(page, n as u64 * 4096).expect("it is writable");
    }
}
