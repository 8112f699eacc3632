//! Counters, and the one snapshot in which they leave the store.
//!
//! Every counter moves under its owner's lock, so a snapshot is one instant: `asked = hit + miss` holds in it exactly,
//! per tier and in total, `miss` is the sum over its reasons, and the sum over models equals the total.

use crate::error::{Result, input};
use crate::evict::Kind;

/// The tiers of this process, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Slots of the arena.
    Ram,
    /// Segments on disk.
    Ssd,
    /// The slab of a GPU: copies of blocks that are in one of the others, too.
    Gpu,
}

impl Tier {
    /// Those that hold blocks by themselves, in the order in which they are asked.
    pub const ALL: [Self; 2] = [Self::Ram, Self::Ssd];

    /// The name used in configuration, statistics and explanations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Ssd => "ssd",
            Self::Gpu => "gpu",
        }
    }
}

/// Why a block was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Miss {
    /// The block was never put, or so long ago that its eviction is forgotten.
    NeverStored,
    /// It was cached and had to make room.
    Evicted,
    /// Its bytes on disk do not agree with their checksum, their name or their tokens.
    Corrupt,
    /// Its bytes could not be read.
    Io,
    /// Its namespace was dropped after the sequence or the match was made; or its model was unregistered, or retired, after
    /// it was stored.
    Dropped,
    /// The model was unregistered, or the store closed, while the match was held.
    Closed,
    /// Reading it takes longer than computing it.
    NotWorthIt,
    /// A quota did not let it in, or has as many loads under way as it allows.
    Quota,
    /// It was cached, and left before others since its time to live was over.
    Expired,
    /// The tier that nodes share did not answer in time.
    Timeout,
    /// The tier that nodes share, or the way to it, failed.
    Failed,
}

impl Miss {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::NeverStored,
        Self::Evicted,
        Self::Corrupt,
        Self::Io,
        Self::Dropped,
        Self::Closed,
        Self::NotWorthIt,
        Self::Quota,
        Self::Expired,
        Self::Timeout,
        Self::Failed,
    ];

    /// The name used in statistics and explanations.
    pub fn name(self) -> &'static str {
        match self {
            Self::NeverStored => "never_stored",
            Self::Evicted => "evicted",
            Self::Corrupt => "corrupt",
            Self::Io => "io_error",
            Self::Dropped => "dropped",
            Self::Closed => "closed",
            Self::NotWorthIt => "not_worth_it",
            Self::Quota => "quota",
            Self::Expired => "expired",
            Self::Timeout => "timeout",
            Self::Failed => "error",
        }
    }

    /// The reason of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn of(name: &str) -> Result<Self> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|miss| miss.name() == name);
        found.ok_or_else(|| input(format!("reason is {name:?}, expected one of {}", known())))
    }
}

/// How often something lasted how long, in whole seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Histogram {
    /// How often it was at most as much as each of [`Histogram::BOUNDS_S`] and more than the one before; at last, how
    /// often more than all of them.
    pub counts: [u64; Self::BOUNDS_S.len() + 1],
    /// Seconds of all together.
    pub sum_s: u64,
}

impl Histogram {
    /// A second, four, sixteen, and so on up to twelve days.
    pub const BOUNDS_S: [u32; 11] = [1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576];

    /// So often it lasted so long.
    pub(crate) fn note(&mut self, seconds: u32, times: u64) {
        self.counts[Self::BOUNDS_S.partition_point(|&bound| bound < seconds)] += times;
        self.sum_s += u64::from(seconds) * times;
    }

    fn add(&mut self, other: &Self) {
        add_each(&mut self.counts, &other.counts);
        self.sum_s += other.sum_s;
    }
}

/// What one tier was asked while loading, and what it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierCounts {
    /// Blocks asked of the tier.
    pub asked: u64,
    /// Blocks it delivered.
    pub hit: u64,
    /// Blocks it did not have, or could not deliver.
    pub miss: u64,
    /// Blocks it holds.
    pub blocks: u64,
    /// Bytes those occupy, headers and padding included: what came less what left, exactly.
    pub used_bytes: u64,
    /// Bytes of blocks that came to the tier, from wherever.
    pub in_bytes: u64,
    /// Bytes of blocks that left it, for whatever reason.
    pub out_bytes: u64,
    /// Bytes they would take if none were encoded.
    pub plain_bytes: u64,
    /// Blocks that had to leave.
    pub evicted: u64,
    /// Of one block in sixteen: how long it was in the tier, when it left for whatever reason.
    pub residence: Histogram,
    /// Of one block in sixteen: how long before a match found it there the last one had found it, in whatever tier.
    pub reuse_gap: Histogram,
    /// Payload bytes that were encoded for the tier, and nanoseconds that took, over all threads.
    pub encoded_bytes: u64,
    /// See there.
    pub encode_ns: u64,
    /// Payload bytes that were decoded from it, and nanoseconds that took, over all threads.
    pub decoded_bytes: u64,
    /// See there.
    pub decode_ns: u64,
    /// Bytes that were written to a device.
    pub written_bytes: u64,
    /// Those of them that were no block's first record: records once more, headers and footers.
    pub rewritten_bytes: u64,
    /// Bytes of records that were read from a device, and nanoseconds from the first read of each load to its last.
    pub read_bytes: u64,
    /// Bytes that were not, because records were encoded.
    pub saved_bytes: u64,
    /// See there.
    pub read_ns: u64,
}

/// Counters of one model, or of all together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Matches made.
    pub matches: u64,
    /// Whole blocks asked for by matches.
    pub asked: u64,
    /// Blocks of them that were cached.
    pub hit: u64,
    /// Blocks of them that were not.
    pub miss: u64,
    /// Those by why the first of their match was not, in the order of [`Miss::ALL`].
    pub missed: [u64; Miss::ALL.len()],
    /// Loads, and nanoseconds from the call to the return of each.
    pub loads: u64,
    /// See there.
    pub load_ns: u64,
    /// Blocks that a load asked for and did not deliver, by why the first of them was not; as `missed`.
    pub unloaded: [u64; Miss::ALL.len()],
    /// Tokens loaded: prefill that was saved.
    pub loaded_tokens: u64,
    /// Payload bytes loaded.
    pub loaded_bytes: u64,
    /// Nanoseconds that computing the loaded tokens would have taken, where that is known.
    pub saved_ns: u64,
    /// Puts, and nanoseconds of each but for the hashing of its tokens.
    pub puts: u64,
    /// See there.
    pub put_ns: u64,
    /// Blocks put that were new.
    pub put_blocks: u64,
    /// Payload bytes of those.
    pub put_bytes: u64,
    /// Blocks of a put that found no room, and were not stored.
    pub put_refused: u64,
    /// Those of them that a quota did not let in.
    pub put_over_quota: u64,
    /// Blocks written to SSD.
    pub demoted: u64,
    /// Blocks written there once more, since they were asked for and their segment had to leave.
    pub reinserted: u64,
    /// Blocks that were encoded, when they were put or on their way to SSD.
    pub encoded: u64,
    /// Blocks that were to be encoded, and stayed as they are: values that fit no scale.
    pub not_encodable: u64,
    /// Blocks that left RAM before they could be written to SSD.
    pub demotions_dropped: u64,
    /// Blocks copied up from SSD to RAM.
    pub promoted: u64,
    /// Blocks that were forgotten, since they were dropped, or their model was retired or unregistered.
    pub dropped: u64,
    /// Records on SSD that failed their checks.
    pub corrupt: u64,
    /// Reads and writes of the SSD that failed.
    pub io_errors: u64,
    /// Loads that ended where reading on takes longer than computing.
    pub not_worth_it: u64,
    /// Per tier, in the order of [`Tier::ALL`].
    pub tiers: [TierCounts; 2],
    /// Of the GPU, which loads to its own tensors ask before the others.
    pub gpu: TierCounts,
}

impl Counts {
    /// The counters of one tier.
    pub fn tier(&mut self, tier: Tier) -> &mut TierCounts {
        match tier {
            Tier::Gpu => &mut self.gpu,
            Tier::Ram | Tier::Ssd => &mut self.tiers[tier as usize],
        }
    }

    /// Notes that a tier was asked for a block.
    pub(crate) fn asked_tier(&mut self, tier: Tier, delivered: bool) {
        let counts = self.tier(tier);
        counts.asked += 1;
        counts.hit += u64::from(delivered);
        counts.miss += u64::from(!delivered);
    }

    /// Adds another model's counters.
    pub fn add(&mut self, other: &Self) {
        self.matches += other.matches;
        self.asked += other.asked;
        self.hit += other.hit;
        self.miss += other.miss;
        add_each(&mut self.missed, &other.missed);
        self.loads += other.loads;
        self.load_ns += other.load_ns;
        add_each(&mut self.unloaded, &other.unloaded);
        self.loaded_tokens += other.loaded_tokens;
        self.loaded_bytes += other.loaded_bytes;
        self.saved_ns += other.saved_ns;
        self.puts += other.puts;
        self.put_ns += other.put_ns;
        self.put_blocks += other.put_blocks;
        self.put_bytes += other.put_bytes;
        self.put_refused += other.put_refused;
        self.put_over_quota += other.put_over_quota;
        self.demoted += other.demoted;
        self.reinserted += other.reinserted;
        self.encoded += other.encoded;
        self.not_encodable += other.not_encodable;
        self.demotions_dropped += other.demotions_dropped;
        self.promoted += other.promoted;
        self.dropped += other.dropped;
        self.corrupt += other.corrupt;
        self.io_errors += other.io_errors;
        self.not_worth_it += other.not_worth_it;
        let mine = self.tiers.iter_mut().chain([&mut self.gpu]);
        for (mine, theirs) in mine.zip(other.tiers.iter().chain([&other.gpu])) {
            mine.asked += theirs.asked;
            mine.hit += theirs.hit;
            mine.miss += theirs.miss;
            mine.blocks += theirs.blocks;
            mine.used_bytes += theirs.used_bytes;
            mine.in_bytes += theirs.in_bytes;
            mine.out_bytes += theirs.out_bytes;
            mine.plain_bytes += theirs.plain_bytes;
            mine.evicted += theirs.evicted;
            mine.residence.add(&theirs.residence);
            mine.reuse_gap.add(&theirs.reuse_gap);
            mine.encoded_bytes += theirs.encoded_bytes;
            mine.encode_ns += theirs.encode_ns;
            mine.decoded_bytes += theirs.decoded_bytes;
            mine.decode_ns += theirs.decode_ns;
            mine.written_bytes += theirs.written_bytes;
            mine.rewritten_bytes += theirs.rewritten_bytes;
            mine.read_bytes += theirs.read_bytes;
            mine.saved_bytes += theirs.saved_bytes;
            mine.read_ns += theirs.read_ns;
        }
    }
}

impl Counts {
    /// The same without what requests of others asked for, loaded and put.
    pub(crate) fn without_requests(mut self, others: &Self) -> Self {
        self.asked -= others.asked;
        self.hit -= others.hit;
        self.miss -= others.miss;
        self.missed.iter_mut().zip(others.missed).for_each(|(mine, theirs)| *mine -= theirs);
        self.loaded_tokens -= others.loaded_tokens;
        self.put_blocks -= others.put_blocks;
        self.put_bytes -= others.put_bytes;
        self
    }
}

fn add_each(mine: &mut [u64], theirs: &[u64]) {
    mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
}

/// How far a quota is used, or would be if there were one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of each tier, in the order of [`Tier::ALL`]: those that are being filled or written among them.
    pub bytes: [u64; 2],
    /// Tokens that may be stored at once; `None`: there is no such limit.
    pub tokens_left: Option<u64>,
    /// Loads under way.
    pub loads: u32,
}

/// Who has blocks brought up to RAM ahead of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifter {
    /// A warm start: they were asked for most before a restart.
    Warm,
    /// A prompt that is near to theirs.
    Near,
}

impl Lifter {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Warm, Self::Near];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Near => "near",
        }
    }
}

/// What became of blocks that were brought up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lifted {
    /// Bytes that they took in RAM.
    pub bytes: u64,
    /// Bytes of those that a match asked for since.
    pub hit_bytes: u64,
}

/// What a slab on a device counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlabCounts {
    /// Places that were given.
    pub taken: u64,
    /// Those of them where no block had been before.
    pub fresh: u64,
    /// Blocks that had to leave for others.
    pub evicted: u64,
    /// How often the device was asked for memory; once it serves, never again.
    pub reservations: u64,
    /// Places that are given, those that wait for the device among them.
    pub in_use: u64,
    /// Blocks that are held.
    pub held: u64,
}

/// How the GPU tier is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuStatus {
    /// Of the device, for people.
    pub name: String,
    /// Bytes of the slab.
    pub capacity_bytes: u64,
    /// What the slab counted.
    pub counts: SlabCounts,
    /// How often the device refused something, or had no room.
    pub refused: u64,
    /// Why the tier serves no more, if so.
    pub failed: Option<String>,
}

/// The store at one instant.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// All models together, the unregistered ones included.
    pub total: Counts,
    /// Registered models by name.
    pub models: Vec<(String, Counts)>,
    /// Tenants in the order in which they were seen, over all models, those of before as well; the first is that of no tenant. Of SSD their records count.
    pub tenants: Vec<(String, Counts, Usage)>,
    /// Registered models by name. Of SSD their file counts.
    pub usage: Vec<(String, Usage)>,
    /// Bytes of the RAM tier's arena.
    pub ram_capacity_bytes: u64,
    /// Bytes of it that are in no slot that is taken; and of the longest piece of them that one put could have.
    pub ram_free_bytes: u64,
    /// See there.
    pub ram_largest_free_bytes: u64,
    /// The SSD tier's cap; 0 when there is none.
    pub ssd_capacity_bytes: u64,
    /// Bytes its files take, counted as allocated.
    pub ssd_file_bytes: u64,
    /// `direct`, `buffered`, or `off`.
    pub ssd_io: &'static str,
    /// `io_uring`, `pread` or `off`; and why it is not the one that `auto` tries first.
    pub ssd_engine: (&'static str, Option<String>),
    /// Why the SSD tier takes no writes at present, if so.
    pub ssd_read_only: Option<String>,
    /// Bytes of the RAM tier's arena that each model holds, free slots among its own included.
    pub ram_held: Vec<(String, u64)>,
    /// Blocks that wait to be written to SSD, by model.
    pub demotion_queue: Vec<(String, u64)>,
    /// Which share of what matches asked for a cache would have hit that never forgets, by model; of those of which enough is
    /// known.
    pub hit_ceiling: Vec<(String, f64)>,
    /// The eviction policy that runs in RAM at present, by model.
    pub ram_eviction: Vec<(String, Kind)>,
    /// What became of blocks that were brought up ahead of requests, by who had it done, in the order of [`Lifter::ALL`].
    pub lifted: [Lifted; 2],
    /// How the GPU tier is, if there is one.
    pub gpu: Option<GpuStatus>,
    /// Blocks in the index.
    pub index_blocks: u64,
    /// Bytes of memory that it takes when full.
    pub index_bytes: u64,
    /// Blocks that it had no room for.
    pub index_refused: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_what_is_below_it_and_the_last_count_to_all_beyond() {
        let mut found = Histogram::default();
        for seconds in [0, 1, 2, 4, 5, 1_048_576, 1_048_577, u32::MAX] {
            found.note(seconds, 1);
        }
        found.note(3, 10);
        found.note(9, 0);
        assert_eq!(found.counts, [2, 12, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(found.sum_s, 12 + 30 + 2 * (1 << 20) + 1 + u64::from(u32::MAX));
        assert!(Histogram::BOUNDS_S.iter().enumerate().all(|(n, &bound)| bound == 1 << (2 * n)));
        let mut twice = found;
        twice.add(&found);
        assert_eq!((twice.counts[1], twice.sum_s), (24, 2 * found.sum_s));
    }

    #[test]
    fn reasons_stand_in_the_order_of_their_numbers() {
        assert!(Miss::ALL.iter().enumerate().all(|(n, &why)| why as usize == n));
    }
}
