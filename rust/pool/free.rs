//! The longest piece of the arena that is free: what spans and slots here and there leave for one put.

use super::{Layout, Pool, Span, longest_run};
use crate::sync::Ordering;

impl Pool {
    /// Its bytes: of neighbouring slots of a span, or of neighbouring chunks of which no slot is taken. While slots are
    /// taken and given back, about.
    pub(crate) fn longest_free(&self) -> usize {
        let books = self.books.lock();
        let (mut next, mut run, mut chunks) = (0, 0, 0);
        while next < books.covered.len() {
            let (length, empty) = match books.spans.get(&next) {
                Some(span) => (span.chunks, self.is_empty(next, span.layout)),
                None => (1, true),
            };
            run = if empty { run + length } else { 0 };
            (next, chunks) = (next + length, chunks.max(run));
        }
        let mut longest = chunks << self.chunk;
        for (&first, Span { class, layout, .. }) in &books.spans {
            // Most have nothing free, or would be no longer if they had nothing else.
            if layout.slots * class.slot_bytes > longest && !self.owners[first].full.load(Ordering::Relaxed) {
                longest = longest.max(self.free_slots(first, *layout) * class.slot_bytes);
            }
        }
        longest
    }

    // Which slots of a span are free, by word. Relaxed: nothing is done with them.
    fn free_of(&self, first: usize, layout: Layout, n: usize) -> u64 {
        self.bits[(first << self.chunk_words) + (n << layout.stride)].load(Ordering::Relaxed)
    }

    fn is_empty(&self, first: usize, layout: Layout) -> bool {
        (0..layout.words()).all(|n| self.free_of(first, layout, n) == layout.all_free(n))
    }

    // How many free slots of a span are neighbours, at most.
    fn free_slots(&self, first: usize, layout: Layout) -> usize {
        let (mut run, mut longest) = (0, 0);
        for n in 0..layout.words() {
            let slots = layout.all_free(n).count_ones();
            let free = self.free_of(first, layout, n);
            let lowest = free.trailing_ones().min(slots);
            longest = longest.max(run + lowest as usize);
            if lowest == slots {
                run += slots as usize;
                continue;
            }
            if free != 0 {
                longest = longest.max(longest_run(free, 64).1);
            }
            run = (free << (64 - slots)).leading_ones() as usize;
        }
        longest.max(run)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Holding, Slot};
    use super::*;
    use proptest::prelude::*;

    // The same, slot by slot.
    fn looked_for(pool: &Pool) -> usize {
        let books = pool.books.lock();
        let free_in = |first: usize| {
            let span = &books.spans[&first];
            let taken = pool.taken_of(first, span, usize::MAX);
            let at = |n: usize| Slot((first << pool.chunk) + n * span.class.slot_bytes);
            let free: Vec<bool> = (0..span.layout.slots).map(|n| !taken.contains(&at(n))).collect();
            let slots = free.split(|&free| !free).map(<[bool]>::len).max().unwrap_or(0);
            (slots * span.class.slot_bytes, taken.is_empty())
        };
        let in_spans = books.spans.keys().map(|&first| free_in(first).0).max().unwrap_or(0);
        let chunks: Vec<bool> =
            books.covered.iter().map(|covered| covered.is_none_or(|first| free_in(first).1)).collect();
        let whole = chunks.split(|&empty| !empty).map(<[bool]>::len).max().unwrap_or(0);
        in_spans.max(whole << pool.chunk)
    }

    proptest! {
        #[test]
        fn it_is_the_longest_that_a_look_at_every_slot_finds(
            pages in prop::collection::vec(1usize..700, 1..4),
            steps in prop::collection::vec((0usize..4, any::<bool>(), any::<prop::sample::Index>(), 1usize..80), 1..60),
        ) {
            let pool = Pool::new(16 << 20);
            let model = Holding::new(0);
            let classes: Vec<_> = pages.iter().map(|pages| pool.class(&model, pages * 4096)).collect();
            let mut live: Vec<Slot> = Vec::new();
            for (which, give, pick, most) in steps {
                if give && !live.is_empty() {
                    pool.free(live.swap_remove(pick.index(live.len())));
                } else {
                    live.extend(pool.allocate_run(&classes[which % classes.len()], most).into_iter().flatten());
                }
                let used: usize = live.iter().map(|&slot| pool.slot_bytes(slot)).sum();
                prop_assert_eq!(pool.longest_free(), looked_for(&pool));
                prop_assert!(pool.longest_free() <= (16 << 20) - used);
            }
            live.drain(..).for_each(|slot| pool.free(slot));
            prop_assert_eq!(pool.longest_free(), 16 << 20, "empty spans are given back");
        }
    }
}
