//! The lock-free allocator that cuts the arena into slots.
//!
//! The arena is cut into chunks. A model takes *spans* of neighbouring chunks and cuts each into slots of one size, plain
//! or encoded; an empty span goes back, so models of different geometry share one arena and no slot ever moves.
//!
//! ```text
//! arena  |chunk|chunk|chunk|chunk|chunk|chunk|...
//! span   |-- model A ------|  free |- model B -|
//! slots  |s|s|s|s|s|s|s|s|.|       |  s  |  s  |
//! bits    0 1 0 0 ...               1     0          set: the slot is free
//! ```
//! Taking a slot is one compare-exchange on a word of bits, giving it back one atomic `or`. Each thread remembers where
//! it last was in a class (one model's slots), so neighbours come out together and threads keep apart. A lock guards
//! the rare rest: looking for a word that has room, opening spans, and closing empty ones.
//!
//! ```text
//! stamp of a span:   0 ── open ──▶ unique ── close ──▶ 0       closed by who could take every slot of it
//! ```
//! Invariant: whoever cleared a bit, and still saw the stamp of the span that it meant, has that slot alone.

mod free;

use crate::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Mutex, Ordering};
use std::cell::Cell;
use std::collections::BTreeMap;

/// The smallest chunk.
const SMALLEST_CHUNK: usize = 2 << 20;
const MAX_SPAN_CHUNKS: usize = 16;
/// Records are whole pages.
pub(crate) const SMALLEST_SLOT: usize = 4096;

/// One place for a record in the arena: its byte offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(usize);

impl Slot {
    /// Its first byte in the arena.
    pub(crate) fn offset(self) -> usize {
        self.0
    }

    /// A number that no other slot of the arena has at the same time, below the arena's bytes / [`SMALLEST_SLOT`].
    pub(crate) fn number(self) -> usize {
        self.0 / SMALLEST_SLOT
    }
}

/// Neighbouring slots; they are the caller's, one by one.
#[derive(Debug)]
pub(crate) struct Run {
    first: Slot,
    slots: usize,
    slot_bytes: usize,
}

impl Iterator for Run {
    type Item = Slot;

    fn next(&mut self) -> Option<Slot> {
        self.slots = self.slots.checked_sub(1)?;
        let next = self.first;
        self.first.0 += self.slot_bytes;
        Some(next)
    }
}

// Where the longest run of set bits begins, and how long it is, `most` at most; there is one set.
fn longest_run(bits: u64, most: usize) -> (usize, usize) {
    let (mut begins, mut length) = (bits, 1);
    while length < most.min(64) {
        let longer = begins & bits >> length;
        if longer == 0 {
            break;
        }
        (begins, length) = (longer, length + 1);
    }
    (begins.trailing_zeros() as usize, length)
}

/// What one model holds of the arena, over slots of all sizes.
#[derive(Debug)]
pub struct Holding {
    model: u32,
    chunks: AtomicUsize,
    slots: AtomicUsize,
}

impl Holding {
    /// Of a model that has nothing yet.
    pub fn new(model: u32) -> Arc<Self> {
        Arc::new(Self { model, chunks: AtomicUsize::new(0), slots: AtomicUsize::new(0) })
    }
}

/// A model's slots of one size.
#[derive(Debug)]
pub struct Class {
    holding: Arc<Holding>,
    slot_bytes: usize,
    // Never zero, and never given twice in a process.
    key: u64,
}

impl Class {
    /// Bytes of each.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }
}

/// What a chunk belongs to. It changes only while no slot there is taken, so whoever holds a slot reads it safely.
#[derive(Debug, Default)]
struct Owner {
    stamp: AtomicU64,
    class: AtomicU64,
    first_chunk: AtomicUsize,
    slot_pages: AtomicU32,
    slots: AtomicUsize,
    /// Of [`Layout`].
    per_word: AtomicU32,
    stride: AtomicU32,
    /// Nothing was free there when it was last looked through, and nothing came back since. Of the span's first chunk.
    full: AtomicBool,
    /// Some word of it became wholly free since it was last tried to close it. Of the span's first chunk.
    emptied: AtomicBool,
}

/// How the bits of a span's slots lie: so many in a word, and words so far apart, both as powers of two. As far as there
/// is room each word has a cache line of its own, so that threads in different words do not slow each other.
#[derive(Debug, Clone, Copy)]
struct Layout {
    slots: usize,
    per_word: u32,
    stride: u32,
}

impl Layout {
    fn new(slots: usize, words: usize) -> Self {
        let room = words / slots.div_ceil(64);
        let stride = if room >= 8 { 3 } else { 0 };
        let per_word = slots.div_ceil(words >> stride).next_power_of_two().ilog2();
        Self { slots, per_word, stride }
    }

    fn words(self) -> usize {
        self.slots.div_ceil(1 << self.per_word)
    }

    /// Word `n` while all of its slots are free.
    fn all_free(self, n: usize) -> u64 {
        u64::MAX >> (64 - (1 << self.per_word).min(self.slots - (n << self.per_word)))
    }
}

#[derive(Debug)]
struct Span {
    class: Arc<Class>,
    chunks: usize,
    layout: Layout,
}

/// A span that a model has, and its bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TakenSpan {
    pub(crate) model: u32,
    pub(crate) bytes: usize,
    first: usize,
}

/// The spans that have to go for another.
pub(crate) type Place = Vec<TakenSpan>;

#[derive(Debug)]
struct Books {
    /// By first chunk.
    spans: BTreeMap<usize, Span>,
    /// The first chunk of the span that covers each chunk.
    covered: Vec<Option<usize>>,
}

/// The allocator over the arena's chunks. It knows sizes and owners, never bytes.
#[derive(Debug)]
pub struct Pool {
    /// Sizes as powers of two.
    chunk: u32,
    chunk_words: u32,
    bits: Box<[AtomicU64]>,
    owners: Box<[Owner]>,
    free_chunks: AtomicUsize,
    // Some word became wholly free since the spans were last looked through for empty ones.
    emptied: AtomicBool,
    books: Mutex<Books>,
}

/// Where a thread last took or gave back a slot of a class.
#[derive(Clone, Copy)]
struct Hint {
    class: u64,
    stamp: u64,
    word: usize,
}

thread_local! {
    // A thread that serves more than four models in turn looks for room a little more often.
    static HINTS: [Cell<Hint>; 4] = const { [const { Cell::new(Hint { class: 0, stamp: 0, word: 0 }) }; 4] };
}

thread_local! {
    static THREAD: u64 = unique();
}

fn hint(class: u64) -> Option<Hint> {
    let hint = HINTS.with(|hints| hints[class as usize % hints.len()].get());
    (hint.class == class).then_some(hint)
}

fn remember(hint: Hint) {
    HINTS.with(|hints| hints[hint.class as usize % hints.len()].set(hint));
}

// Names classes and stamps, over all pools of the process, since threads remember them.
fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    // Relaxed: all that matters is that no two are equal.
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

impl Pool {
    /// An allocator over so many bytes.
    pub fn new(capacity: usize) -> Self {
        let chunk = (capacity / 64).clamp(SMALLEST_CHUNK, 64 << 20).ilog2();
        let chunks = (capacity >> chunk).max(1);
        let chunk_words = chunk - (SMALLEST_SLOT * 64).ilog2();
        Self {
            chunk,
            chunk_words,
            bits: std::iter::repeat_with(AtomicU64::default).take(chunks << chunk_words).collect(),
            owners: std::iter::repeat_with(Owner::default).take(chunks).collect(),
            free_chunks: AtomicUsize::new(chunks),
            emptied: AtomicBool::new(false),
            books: Mutex::new(Books { spans: BTreeMap::new(), covered: vec![None; chunks] }),
        }
    }

    /// A model's slots of a size; there are none yet.
    pub fn class(&self, holding: &Arc<Holding>, slot_bytes: usize) -> Arc<Class> {
        let slot_bytes = slot_bytes.next_multiple_of(SMALLEST_SLOT);
        Arc::new(Class { holding: holding.clone(), slot_bytes, key: unique() })
    }

    /// Whether a slot of that size can exist at all.
    pub(crate) fn fits(&self, slot_bytes: usize) -> bool {
        slot_bytes <= self.owners.len() << self.chunk
    }

    /// Takes a slot, opening a new span if there is room for one.
    pub fn allocate(&self, class: &Arc<Class>) -> Option<Slot> {
        self.allocate_run(class, 1)?.next()
    }

    /// Takes at least one slot and at most so many, which are neighbours: the most that lie side by side in one word.
    pub(crate) fn allocate_run(&self, class: &Arc<Class>, most: usize) -> Option<Run> {
        hint(class.key).and_then(|hint| self.take(hint, most)).or_else(|| self.search(class, most))
    }

    // Takes slots of a word, if the span is still the one that is meant.
    fn take(&self, hint: Hint, most: usize) -> Option<Run> {
        let (chunk, word) = (hint.word >> self.chunk_words, &self.bits[hint.word]);
        let owner = &self.owners[chunk];
        let mut free = word.load(Ordering::Relaxed);
        while free != 0 {
            let (lowest, slots) = longest_run(free, most);
            let bits = u64::MAX >> (64 - slots) << lowest;
            // Acquire pairs with the Release of who gave the slot back, or opened the span: what was done with the
            // slot is done, and the stamp of a later span is seen below.
            match word.compare_exchange_weak(free, free & !bits, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) if owner.stamp.load(Ordering::Relaxed) == hint.stamp => {
                    // Relaxed: of an owner that cannot change, since a slot there is taken.
                    let first = owner.first_chunk.load(Ordering::Relaxed);
                    let (per_word, stride) =
                        (owner.per_word.load(Ordering::Relaxed), owner.stride.load(Ordering::Relaxed));
                    let number = ((hint.word - (first << self.chunk_words)) >> stride << per_word) + lowest;
                    remember(hint);
                    let slot_bytes = owner.slot_pages.load(Ordering::Relaxed) as usize * SMALLEST_SLOT;
                    let first = Slot((first << self.chunk) + number * slot_bytes);
                    return Some(Run { first, slots, slot_bytes });
                }
                // The span was closed, and another opened there.
                Ok(_) => {
                    word.fetch_or(bits, Ordering::Release);
                    return None;
                }
                Err(now) => free = now,
            }
        }
        None
    }

    /// Gives a slot back.
    pub fn free(&self, slot: Slot) {
        let owner = &self.owners[slot.0 >> self.chunk];
        // Relaxed: of an owner that cannot change, since the slot is taken.
        let first = owner.first_chunk.load(Ordering::Relaxed);
        let layout = Layout {
            slots: owner.slots.load(Ordering::Relaxed),
            per_word: owner.per_word.load(Ordering::Relaxed),
            stride: owner.stride.load(Ordering::Relaxed),
        };
        let page = ((slot.0 - (first << self.chunk)) / SMALLEST_SLOT) as u32;
        let number = (page / owner.slot_pages.load(Ordering::Relaxed).max(1)) as usize;
        let nth = number >> layout.per_word;
        let bit = 1u64 << (number - (nth << layout.per_word));
        let word = (first << self.chunk_words) + (nth << layout.stride);
        let (class, stamp) = (owner.class.load(Ordering::Relaxed), owner.stamp.load(Ordering::Relaxed));
        remember(Hint { class, stamp, word });
        // Release: pairs with the Acquire of who takes the slot next. SeqCst: either the search that calls the span full
        // sees this bit, or this sees that it is called full.
        let before = self.bits[word].fetch_or(bit, Ordering::SeqCst);
        debug_assert!(before & bit == 0, "double free");
        let first = &self.owners[first];
        if first.full.load(Ordering::SeqCst) {
            first.full.store(false, Ordering::Relaxed);
        }
        // SeqCst, as the look's: either the look that takes the flag back sees this bit, or this sees that it did. The span's
        // flag is up before the pool's, which is asked first.
        if before | bit == layout.all_free(nth) {
            for emptied in [&first.emptied, &self.emptied] {
                if !emptied.load(Ordering::SeqCst) {
                    emptied.store(true, Ordering::SeqCst);
                }
            }
        }
    }

    // Any word of the class that has room; else a new span.
    fn search(&self, class: &Arc<Class>, most: usize) -> Option<Run> {
        let mut books = self.books.lock();
        // Threads begin at different places, so that they do not share a word.
        let begin = THREAD.with(|number| *number) as usize;
        let turn = begin % books.spans.len().max(1);
        let spans = books.spans.iter().skip(turn).chain(books.spans.iter().take(turn));
        for (&first, span) in spans.filter(|(_, span)| span.class.key == class.key) {
            // SeqCst: see `free`.
            let full = &self.owners[first].full;
            if full.load(Ordering::SeqCst) || full.swap(true, Ordering::SeqCst) {
                continue;
            }
            let stamp = self.owners[first].stamp.load(Ordering::Relaxed);
            let words = span.layout.words();
            for n in (0..words).map(|n| (n + begin) % words) {
                let word = (first << self.chunk_words) + (n << span.layout.stride);
                if let Some(run) = self.take(Hint { class: class.key, stamp, word }, most) {
                    full.store(false, Ordering::Relaxed);
                    return Some(run);
                }
            }
        }
        let first = self.open_span(&mut books, class).or_else(|| {
            let worth = self.emptied.swap(false, Ordering::SeqCst);
            if worth { self.close_empty(&mut books).then(|| self.open_span(&mut books, class))? } else { None }
        })?;
        let stamp = self.owners[first].stamp.load(Ordering::Relaxed);
        self.take(Hint { class: class.key, stamp, word: first << self.chunk_words }, most)
    }

    fn open_span(&self, books: &mut Books, class: &Arc<Class>) -> Option<usize> {
        let enough = class.slot_bytes.div_ceil(1 << self.chunk);
        if self.free_chunks.load(Ordering::Relaxed) < enough {
            return None;
        }
        let Holding { chunks: held, slots: held_slots, .. } = &*class.holding;
        let best = self.span_chunks(class.slot_bytes)?;
        // A shorter span is better than none when the arena is nearly full.
        let free_run = |length: usize| books.covered.windows(length).position(|run| run.iter().all(Option::is_none));
        let (first, chunks) = (enough..=best).rev().find_map(|n| Some((free_run(n)?, n)))?;
        let layout = Layout::new((chunks << self.chunk) / class.slot_bytes, chunks << self.chunk_words);
        let stamp = unique();
        for owner in &self.owners[first..first + chunks] {
            // Relaxed: published by the bits below.
            owner.class.store(class.key, Ordering::Relaxed);
            owner.first_chunk.store(first, Ordering::Relaxed);
            owner.slot_pages.store((class.slot_bytes / SMALLEST_SLOT) as u32, Ordering::Relaxed);
            owner.slots.store(layout.slots, Ordering::Relaxed);
            owner.per_word.store(layout.per_word, Ordering::Relaxed);
            owner.stride.store(layout.stride, Ordering::Relaxed);
            owner.full.store(false, Ordering::Relaxed);
            owner.stamp.store(stamp, Ordering::Relaxed);
        }
        books.covered[first..first + chunks].fill(Some(first));
        books.spans.insert(first, Span { class: class.clone(), chunks, layout });
        self.free_chunks.fetch_sub(chunks, Ordering::Relaxed);
        held.fetch_add(chunks, Ordering::Relaxed);
        held_slots.fetch_add(layout.slots, Ordering::Relaxed);
        for n in 0..layout.words() {
            // Release: who takes a bit sees the owner above. Added, not stored: a thread that took the place for that
            // of an earlier span may be about to give a bit back.
            let word = (first << self.chunk_words) + (n << layout.stride);
            self.bits[word].fetch_or(layout.all_free(n), Ordering::Release);
        }
        Some(first)
    }

    // Closes every span of which each slot could be taken; whether there was one.
    fn close_empty(&self, books: &mut Books) -> bool {
        let touched = |first: usize| self.owners[first].emptied.swap(false, Ordering::SeqCst);
        let empty = |first: usize, span: &Span| {
            let layout = span.layout;
            let word = |n: usize| &self.bits[(first << self.chunk_words) + (n << layout.stride)];
            // Acquire: what was done with these slots is done.
            let take_all = |n: &usize| {
                word(*n).compare_exchange(layout.all_free(*n), 0, Ordering::Acquire, Ordering::Relaxed).is_ok()
            };
            let taken = (0..layout.words()).take_while(take_all).count();
            let all = taken == layout.words();
            if !all {
                for n in 0..taken {
                    word(n).fetch_or(layout.all_free(n), Ordering::Release);
                }
            }
            all
        };
        let gone: Vec<usize> = books
            .spans
            .iter()
            .filter(|&(&first, span)| touched(first) && empty(first, span))
            .map(|(&f, _)| f)
            .collect();
        for &first in &gone {
            let Some(span) = books.spans.remove(&first) else { continue };
            for owner in &self.owners[first..first + span.chunks] {
                // Relaxed: no bit of it can be taken before a new span is opened, which orders this.
                owner.stamp.store(0, Ordering::Relaxed);
            }
            books.covered[first..first + span.chunks].fill(None);
            self.free_chunks.fetch_add(span.chunks, Ordering::Relaxed);
            span.class.holding.chunks.fetch_sub(span.chunks, Ordering::Relaxed);
            span.class.holding.slots.fetch_sub(span.layout.slots, Ordering::Relaxed);
        }
        !gone.is_empty()
    }

    /// Closes the spans that are empty.
    pub(crate) fn settle(&self) {
        if self.emptied.swap(false, Ordering::SeqCst) {
            self.close_empty(&mut self.books.lock());
        }
    }

    /// Bytes of the spans that a model holds.
    pub(crate) fn held_bytes(&self, holding: &Holding) -> usize {
        // Relaxed, as below: a count to steer by.
        holding.chunks.load(Ordering::Relaxed) << self.chunk
    }

    /// Slots that a model has, or could open of a size without anybody leaving.
    pub(crate) fn slots_in_reach(&self, holding: &Holding, slot_bytes: usize) -> usize {
        let free = self.free_chunks.load(Ordering::Relaxed);
        holding.slots.load(Ordering::Relaxed) + (free << self.chunk) / slot_bytes
    }

    /// Bytes of a taken slot.
    pub(crate) fn slot_bytes(&self, slot: Slot) -> usize {
        // Relaxed: of an owner that cannot change, since the slot is taken.
        self.owners[slot.0 >> self.chunk].slot_pages.load(Ordering::Relaxed) as usize * SMALLEST_SLOT
    }

    /// Which span a taken slot is of, by its first chunk.
    pub(crate) fn span_of(&self, slot: Slot) -> usize {
        // Relaxed: of an owner that cannot change, since the slot is taken.
        self.owners[slot.0 >> self.chunk].first_chunk.load(Ordering::Relaxed)
    }

    /// Whether a taken slot is of a class.
    pub(crate) fn is_of(&self, slot: Slot, class: &Class) -> bool {
        // Relaxed: of an owner that cannot change, since the slot is taken.
        self.owners[slot.0 >> self.chunk].class.load(Ordering::Relaxed) == class.key
    }

    /// Bytes of the shortest span that a class can have.
    pub(crate) fn least_span(&self, class: &Class) -> usize {
        class.slot_bytes.next_multiple_of(1 << self.chunk)
    }

    /// Bytes in which models take from the arena and give back.
    pub(crate) fn chunk_bytes(&self) -> usize {
        1 << self.chunk
    }

    /// Whether a span of a class could be opened without anybody leaving.
    pub(crate) fn has_room(&self, class: &Class) -> bool {
        let enough = self.least_span(class) >> self.chunk;
        self.books.lock().covered.windows(enough).any(|window| window.iter().all(Option::is_none))
    }

    /// The places where a span of a class could be and none of it is, but for those that are free.
    pub(crate) fn places_for(&self, class: &Class) -> Vec<Place> {
        let books = self.books.lock();
        let places = books.covered.windows(self.least_span(class) >> self.chunk).filter_map(|window| {
            let mut covered: Vec<usize> = window.iter().copied().flatten().collect();
            covered.dedup();
            let spans = covered.into_iter().map(|first| {
                let span = &books.spans[&first];
                (span.class.key != class.key).then(|| self.taken_span(first, span))
            });
            spans.collect::<Option<Place>>().filter(|place| !place.is_empty())
        });
        places.collect()
    }

    /// The spans of a model, each a place.
    pub(crate) fn spans_of(&self, holding: &Holding) -> Vec<Place> {
        let books = self.books.lock();
        let own = books.spans.iter().filter(|(_, span)| std::ptr::eq(&*span.class.holding, holding));
        own.map(|(&first, span)| vec![self.taken_span(first, span)]).collect()
    }

    fn taken_span(&self, first: usize, span: &Span) -> TakenSpan {
        TakenSpan { model: span.class.holding.model, bytes: span.chunks << self.chunk, first }
    }

    /// Taken slots of a span: all, or at most so many, from all over it.
    pub(crate) fn taken(&self, span: &TakenSpan, most: usize) -> Vec<Slot> {
        let books = self.books.lock();
        books.spans.get(&span.first).map_or_else(Vec::new, |found| self.taken_of(span.first, found, most))
    }

    fn taken_of(&self, first: usize, span: &Span, most: usize) -> Vec<Slot> {
        let Layout { slots, per_word, stride } = span.layout;
        let word = |n: usize| (first << self.chunk_words) + (n >> per_word << stride);
        let bit = |n: usize| self.bits[word(n)].load(Ordering::Relaxed) >> (n & ((1 << per_word) - 1)) & 1;
        let taken = (0..slots).step_by(slots.div_ceil(most).max(1)).filter(|&n| bit(n) == 0);
        taken.map(|n| Slot((first << self.chunk) + n * span.class.slot_bytes)).collect()
    }

    // The fewest chunks that waste at most 1/16, else the least wasteful number.
    fn span_chunks(&self, slot_bytes: usize) -> Option<usize> {
        let waste = |chunks: usize| (chunks << self.chunk) % slot_bytes;
        let enough = slot_bytes.div_ceil(1 << self.chunk);
        let candidates = enough..=self.owners.len().min(MAX_SPAN_CHUNKS.max(enough));
        let good = candidates.clone().find(|&c| waste(c) * 16 <= c << self.chunk);
        good.or_else(|| candidates.min_by(|&a, &b| (waste(a) * b).cmp(&(waste(b) * a))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn used_slots(pool: &Pool) -> usize {
        let books = pool.books.lock();
        books.spans.iter().map(|(&first, span)| pool.taken_of(first, span, usize::MAX).len()).sum()
    }

    proptest! {
        #[test]
        fn slots_never_overlap_and_every_byte_comes_back(
            sizes in prop::collection::vec(1usize..1200, 1..4),
            steps in prop::collection::vec((0usize..4, any::<bool>(), any::<prop::sample::Index>(), 1usize..80), 1..300),
        ) {
            let capacity = 24 << 20;
            let pool = Pool::new(capacity);
            // Two models, and each has slots of several sizes.
            let models = [0, 1].map(Holding::new);
            let classes: Vec<_> =
                sizes.iter().enumerate().map(|(n, pages)| pool.class(&models[n % 2], pages * 4096)).collect();
            let mut live: HashMap<Slot, usize> = HashMap::new();
            for (model, give, pick, most) in steps {
                let class = &classes[model % sizes.len()];
                if give && !live.is_empty() {
                    let slot = *live.keys().nth(pick.index(live.len())).expect("index is in range");
                    live.remove(&slot);
                    pool.free(slot);
                } else if let Some(run) = pool.allocate_run(class, most) {
                    let slots: Vec<Slot> = run.collect();
                    prop_assert!((1..=most.min(64)).contains(&slots.len()));
                    prop_assert!(slots.windows(2).all(|two| two[0].0 + class.slot_bytes == two[1].0));
                    for slot in slots {
                        for (other, len) in &live {
                            prop_assert!(slot.0 + class.slot_bytes <= other.0 || other.0 + len <= slot.0);
                        }
                        prop_assert!(slot.0 + class.slot_bytes <= capacity);
                        live.insert(slot, class.slot_bytes);
                    }
                }
                prop_assert_eq!(used_slots(&pool), live.len());
            }
            for slot in live.into_keys() {
                pool.free(slot);
            }
            pool.settle();
            prop_assert!(pool.books.lock().covered.iter().all(Option::is_none));
            prop_assert!(pool.bits.iter().all(|word| word.load(Ordering::Relaxed) == 0));
            prop_assert!(models.iter().all(|model| pool.held_bytes(model) == 0));
        }
    }

    #[test]
    fn a_run_is_the_longest_that_there_is() {
        assert_eq!(longest_run(0b1011_0111_0100, 64), (4, 3));
        assert_eq!(longest_run(0b1011_0111_0100, 2), (4, 2));
        assert_eq!(longest_run(0b100, 9), (2, 1));
        assert_eq!(longest_run(u64::MAX, 80), (0, 64));
        assert_eq!(longest_run(1 << 63 | 1 << 62, 80), (62, 2));
    }

    #[test]
    fn a_slot_that_comes_back_to_a_full_pool_is_found_by_any_thread() {
        let pool = Pool::new(8 << 20);
        let class = pool.class(&Holding::new(0), 4096);
        let taken: Vec<Slot> = std::iter::from_fn(|| pool.allocate(&class)).collect();
        for slot in taken.into_iter().step_by(97) {
            assert_eq!(pool.allocate(&class), None);
            pool.free(slot);
            let found = std::thread::scope(|scope| scope.spawn(|| pool.allocate(&class)).join());
            assert_eq!(found.expect("no panic"), Some(slot));
        }
    }

    #[test]
    fn one_model_can_use_nearly_the_whole_arena() {
        let pool = Pool::new(64 << 20);
        let class = pool.class(&Holding::new(0), 737 * 1024 / 4096 * 4096);
        let taken = std::iter::from_fn(|| pool.allocate(&class)).count();
        assert!(taken * class.slot_bytes > (64 << 20) * 15 / 16, "{taken} slots of {}", class.slot_bytes);
    }

    // Each slot has one owner at a time: who has it writes its mark there, and finds it when giving it back.
    #[test]
    fn threads_never_share_a_slot_while_spans_come_and_go() {
        let pool = Pool::new(8 << 20);
        let classes = [1, 2, 3].map(|pages| pool.class(&Holding::new(pages as u32), pages * 4096));
        let marks: Vec<AtomicU64> = std::iter::repeat_with(AtomicU64::default).take((8 << 20) / 4096).collect();
        std::thread::scope(|scope| {
            for thread in 1..=4u64 {
                let (pool, marks, classes) = (&pool, &marks, &classes);
                scope.spawn(move || {
                    let mut held: Vec<(Slot, usize)> = Vec::new();
                    let give_back = |(slot, pages): (Slot, usize)| {
                        for mark in &marks[slot.0 / 4096..slot.0 / 4096 + pages] {
                            assert_eq!(mark.swap(0, Ordering::Relaxed), thread);
                        }
                        pool.free(slot);
                    };
                    let mut chance = thread;
                    let steps = if cfg!(miri) { 300 } else { 1_000_000 };
                    for step in 0..steps {
                        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(thread);
                        let pages = 1 + (step / 1000 + thread) as usize % 3;
                        // Now and then everything goes, so that spans are closed and opened by others.
                        if step % 1000 == 0 {
                            held.drain(..).for_each(give_back);
                        } else if chance >> 60 < 7 {
                            held.pop().into_iter().for_each(give_back);
                        } else {
                            let run = pool.allocate_run(&classes[pages - 1], 1 + (chance >> 50) as usize % 3);
                            for slot in run.into_iter().flatten() {
                                for mark in &marks[slot.0 / 4096..slot.0 / 4096 + pages] {
                                    assert_eq!(mark.swap(thread, Ordering::Relaxed), 0);
                                }
                                held.push((slot, pages));
                            }
                        }
                    }
                    held.into_iter().for_each(give_back);
                });
            }
        });
        assert_eq!(used_slots(&pool), 0);
        pool.settle();
        assert!(pool.books.lock().covered.iter().all(Option::is_none));
    }
}
