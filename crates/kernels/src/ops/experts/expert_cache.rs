//! Expert offload: a cache of experts, for models whose experts do not fit in memory.
//!
//! The weights of experts stay in their file. The experts that tokens choose are copied, repacked for products, and
//! stay until others need their room: the least recently used go first. If there is no room because all others are in
//! use by the same pass, an expert is read from the mapped file, which gives the same bits.
//!
//! Some of a layer's choices can be predicted: the system is advised to read those experts while something else is
//! computed. They wait in the system's page cache, and only chosen experts are copied, so a wrong prediction evicts
//! nothing here.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::formats::{Copies, FileAccess, Matrix};
use crate::settings::Compute;

/// The cached experts of all layers, shared by the layers' banks.
pub struct ExpertCache {
    /// The most bytes of all copies.
    budget: usize,
    /// The setting that copies are repacked for.
    compute: Compute,
    file: FileAccess,
    state: Mutex<CacheState>,
}

/// Counters of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertTraffic {
    /// Chosen experts that were cached, counted per layer and pass.
    pub hits: u64,
    /// Chosen experts that were not cached.
    pub misses: u64,
    /// Misses that were prefetched before they were chosen.
    pub prefetched: u64,
    /// Prefetched experts that were not chosen.
    pub wasted_prefetches: u64,
    /// Bytes read for misses.
    pub read_bytes: u64,
    /// Bytes of wasted prefetches.
    pub wasted_bytes: u64,
    /// Bytes of all copies.
    pub held_bytes: usize,
}

/// At most this fraction of the budget is prefetched at once.
const MOST_EXPECTED: usize = 4;

impl ExpertTraffic {
    /// The counts since an earlier reading.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            hits: self.hits - earlier.hits,
            misses: self.misses - earlier.misses,
            prefetched: self.prefetched - earlier.prefetched,
            wasted_prefetches: self.wasted_prefetches - earlier.wasted_prefetches,
            read_bytes: self.read_bytes - earlier.read_bytes,
            wasted_bytes: self.wasted_bytes - earlier.wasted_bytes,
            held_bytes: self.held_bytes,
        }
    }
}

/// A layer and an expert's index.
type ExpertKey = (usize, usize);

#[derive(Default)]
struct CacheState {
    experts: HashMap<ExpertKey, CacheEntry>,
    /// By layer: prefetched experts that no pass has chosen or passed over yet.
    expected: HashMap<usize, Vec<Prefetched>>,
    /// Counts calls.
    now: u64,
    traffic: ExpertTraffic,
}

struct Prefetched {
    expert: usize,
    bytes: usize,
}

struct CacheEntry {
    copies: CachedExpert,
    /// The memory of the copies.
    memory: Bytes,
    last_used: u64,
}

/// An expert's copied weights.
#[derive(Clone, Debug)]
pub(crate) struct CachedExpert {
    pub(crate) expert: usize,
    /// Gate, up and down.
    pub(crate) weights: [Matrix; 3],
}

/// A layer's part of the cache.
#[derive(Clone, Debug)]
pub struct OffloadedLayer {
    /// The cache of its experts.
    pub cache: Arc<ExpertCache>,
    /// Its index.
    pub layer: usize,
}

impl fmt::Debug for ExpertCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExpertCache({} bytes)", self.budget)
    }
}

impl ExpertCache {
    /// An empty cache of `budget` bytes, for experts that are multiplied in `compute`.
    pub fn new(budget: usize, compute: Compute, file: FileAccess) -> Self {
        Self {
            budget,
            compute,
            file,
            state: Mutex::default(),
        }
    }

    /// The counts so far.
    pub fn traffic(&self) -> ExpertTraffic {
        self.state().traffic
    }

    fn state(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prefetches experts of a layer that are not cached, up to a fraction of the budget.
    pub(super) fn prefetch(
        &self,
        layer: usize,
        likely: impl Iterator<Item = usize>,
        weights_of: impl Fn(usize) -> [Matrix; 3],
    ) {
        let mut state = self.state();
        state.pass_over(layer);
        let (mut expected, mut bytes): (Vec<Prefetched>, usize) = (vec![], 0);
        for expert in likely {
            let is_known = expected.iter().any(|other| other.expert == expert);
            if is_known || state.experts.contains_key(&(layer, expert)) {
                continue;
            }
            let stored = weights_of(expert);
            let size = size(&stored);
            bytes += size;
            // The room in the system's page cache is not known, so the budget bounds what is prefetched.
            if bytes > self.budget / MOST_EXPECTED {
                break;
            }
            self.ask_for(&stored);
            expected.push(Prefetched {
                expert,
                bytes: size,
            });
        }
        state.expected.insert(layer, expected);
    }

    fn ask_for(&self, stored: &[Matrix; 3]) {
        for matrix in stored {
            (self.file.advise_willneed)(matrix.bytes());
        }
    }

    /// The cached copies of chosen experts of a layer, in order. Missing ones are copied as far as there is room.
    pub(super) fn fill(
        &self,
        layer: usize,
        chosen: impl Iterator<Item = usize>,
        weights_of: impl Fn(usize) -> [Matrix; 3],
    ) -> Vec<CachedExpert> {
        let mut state = self.state();
        state.now += 1;
        let (mut found, mut missing) = (vec![], vec![]);
        for expert in chosen {
            match state.touch((layer, expert)) {
                Some(copies) => found.push(copies),
                None => missing.push((expert, weights_of(expert))),
            }
        }
        // All misses are requested before the first is read, so that the disk has them in one queue.
        for (expert, stored) in &missing {
            if !state.was_expected((layer, *expert)) {
                self.ask_for(stored);
            }
        }
        state.pass_over(layer);
        let (mut experts, mut copies) = (vec![], vec![]);
        for (expert, stored) in missing {
            state.traffic.misses += 1;
            state.traffic.read_bytes += size(&stored) as u64;
            let len = Copies::len(&stored, self.compute);
            if let Some(room) = state.make_room(len, self.budget) {
                experts.push(expert);
                copies.push(Copies::new(stored, self.compute, room.used));
            }
        }
        Copies::fill(&mut copies, self.compute, self.file);
        for (expert, copies) in experts.into_iter().zip(copies) {
            let (weights, memory) = copies.finish(self.compute);
            let copies = CachedExpert { expert, weights };
            found.push(copies.clone());
            state.add(layer, copies, memory);
        }
        found.sort_unstable_by_key(|copies| copies.expert);
        found
    }
}

/// Bytes of an expert's weights.
fn size(weights: &[Matrix; 3]) -> usize {
    weights.iter().map(Matrix::size_bytes).sum()
}

/// Room for an expert, with the memory of an evicted one, if there is any.
struct Room {
    used: Option<Vec<u8>>,
}

impl CacheState {
    /// An expert's copies, if it is cached; counts as a use.
    fn touch(&mut self, key: ExpertKey) -> Option<CachedExpert> {
        let resident = self.experts.get_mut(&key)?;
        resident.last_used = self.now;
        self.traffic.hits += 1;
        Some(resident.copies.clone())
    }

    /// Whether a chosen expert was prefetched.
    fn was_expected(&mut self, (layer, expert): ExpertKey) -> bool {
        let Some(expected) = self.expected.get_mut(&layer) else {
            return false;
        };
        let at = expected.iter().position(|other| other.expert == expert);
        self.traffic.prefetched += u64::from(at.is_some());
        at.map(|at| expected.swap_remove(at)).is_some()
    }

    /// Counts the remaining prefetches of a layer as wasted.
    fn pass_over(&mut self, layer: usize) {
        for expected in self.expected.remove(&layer).into_iter().flatten() {
            self.traffic.wasted_prefetches += 1;
            self.traffic.wasted_bytes += expected.bytes as u64;
        }
    }

    /// Evicts the least recently used experts until there is room, but none that this pass uses. `None` if there is no
    /// room.
    fn make_room(&mut self, bytes: usize, budget: usize) -> Option<Room> {
        let mut used = None;
        while self.traffic.held_bytes + bytes > budget {
            let unused = self.experts.iter().filter(|(_, r)| r.last_used < self.now);
            let (key, _) = unused.min_by_key(|(key, r)| (r.last_used, **key))?;
            let gone = self.experts.remove(&key.clone())?;
            self.traffic.held_bytes -= gone.memory.len();
            drop(gone.copies);
            used = gone.memory.try_into_mut().ok().map(Vec::from);
        }
        self.traffic.held_bytes += bytes;
        Some(Room { used })
    }

    /// Adds copies for which room was made.
    fn add(&mut self, layer: usize, copies: CachedExpert, memory: Bytes) {
        let resident = CacheEntry {
            last_used: self.now,
            memory,
            copies,
        };
        let key = (layer, resident.copies.expert);
        self.experts.insert(key, resident);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::formats::Format;
    use crate::ops::experts::bank::ExpertBank;
    use crate::ops::experts::slots::Slots;
    use crate::ops::route;
    use crate::testing::{every_block_format, every_format};

    thread_local! {
        /// Bytes that were prefetched on this thread.
        static ASKED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    const FILE: FileAccess = FileAccess {
        advise_willneed: |bytes| ASKED.with_borrow_mut(|asked| asked.extend_from_slice(bytes)),
        read: |bytes, out| out.copy_from_slice(bytes),
    };

    /// Bytes of an expert of [`bank`] in its file, and of its copies.
    const SIZE: usize = 3 * 8 * 8 * 4;
    const HELD: usize = SIZE + 64;

    /// Experts over lists of four matrices each.
    fn of(list: impl Fn(u64) -> Vec<Matrix>, cache: &Arc<ExpertCache>, layer: usize) -> ExpertBank {
        let cache = Arc::clone(cache);
        let cached = Some(OffloadedLayer { cache, layer });
        ExpertBank {
            cached,
            ..ExpertBank::new(list(1), list(11), list(21))
        }
    }

    /// Four experts of `[8, 8]` in f32.
    fn bank(cache: &Arc<ExpertCache>, layer: usize) -> ExpertBank {
        let list = |seed: u64| {
            (0..4u64)
                .map(|i| every_format(8, 8, seed + i).swap_remove(0))
                .collect()
        };
        of(list, cache, layer)
    }

    fn cache(experts: usize) -> Arc<ExpertCache> {
        Arc::new(ExpertCache::new(experts * HELD, Compute::MatchWeight, FILE))
    }

    /// The cached copies of a pass with these experts.
    fn copies(bank: &ExpertBank, experts: &[i32]) -> Vec<CachedExpert> {
        let (order, offsets) = route::dispatch(experts, 4);
        let copies = bank.resident(Slots {
            order: &order,
            offsets: &offsets,
            top_k: 1,
            part: None,
        });
        for copy in &copies {
            let stored = bank.weights_of(copy.expert);
            for (copy, stored) in copy.weights.iter().zip(&stored) {
                assert_eq!(copy.to_f32(), stored.to_f32(), "{}", copy.format().name());
                assert_ne!(copy.bytes().as_ptr(), stored.bytes().as_ptr());
            }
        }
        copies
    }

    fn copied(bank: &ExpertBank, experts: &[i32]) -> Vec<usize> {
        copies(bank, experts)
            .iter()
            .map(|copy| copy.expert)
            .collect()
    }

    #[test]
    fn the_longest_unused_expert_makes_room() {
        let cache = cache(3);
        let banks = [bank(&cache, 0), bank(&cache, 1)];
        assert_eq!(copied(&banks[0], &[0, 1, 0]), [0, 1]);
        assert_eq!(copied(&banks[1], &[0]), [0]);
        assert_eq!(copied(&banks[0], &[1]), [1]);
        // Expert 0 of the first layer is the oldest, though it came with expert 1.
        assert_eq!(copied(&banks[1], &[3]), [3]);
        let counts = cache.traffic();
        assert_eq!((counts.hits, counts.misses), (1, 4));
        assert_eq!(counts.held_bytes, 3 * HELD);
        assert_eq!(copied(&banks[0], &[0]), [0]);
        assert_eq!(cache.traffic().misses, 5);
        // Of four at once one finds no room, and those of the pass stay.
        assert_eq!(copied(&banks[0], &[0, 1, 2, 3]), [0, 1, 2]);
        assert_eq!(cache.traffic().held_bytes, 3 * HELD);
        assert_eq!(cache.traffic().read_bytes, 7 * SIZE as u64);
    }

    #[test]
    fn a_budget_below_one_expert_holds_none() {
        let cache = Arc::new(ExpertCache::new(10, Compute::MatchWeight, FILE));
        let bank = bank(&cache, 0);
        bank.prefetch([1].into_iter());
        assert!(copied(&bank, &[2, 3]).is_empty());
        let counts = cache.traffic();
        assert_eq!(
            (
                counts.held_bytes,
                counts.prefetched,
                counts.wasted_prefetches
            ),
            (0, 0, 0)
        );
    }

    #[test]
    fn experts_are_asked_for_once_and_counted_when_chosen() {
        let cache = cache(8);
        let bank = bank(&cache, 0);
        let asked = || ASKED.take().len() / SIZE;
        assert_eq!(copied(&bank, &[0]), [0]);
        assert_eq!(asked(), 1);
        // One is there, and two are as many as a quarter of the budget holds.
        bank.prefetch([0, 1, 1, 2, 3].into_iter());
        assert_eq!(asked(), 2);
        assert_eq!(cache.traffic().held_bytes, HELD);
        assert_eq!(copied(&bank, &[0, 1, 3]), [0, 1, 3]);
        // The first was asked for before.
        assert_eq!(asked(), 1);
        let counts = cache.traffic();
        let found = [
            counts.hits,
            counts.misses,
            counts.prefetched,
            counts.wasted_prefetches,
        ];
        assert_eq!(found, [1, 3, 1, 1]);
        assert_eq!(counts.wasted_bytes, SIZE as u64);
        // A prefetch that no pass followed is wasted too.
        bank.prefetch([2].into_iter());
        bank.prefetch([2].into_iter());
        assert_eq!(copied(&bank, &[2]), [2]);
        let later = cache.traffic().since(counts);
        assert_eq!(
            [later.misses, later.prefetched, later.wasted_prefetches],
            [1, 1, 1]
        );
        assert_eq!(later.read_bytes, SIZE as u64);
    }

    #[test]
    fn every_format_is_copied_as_products_read_it() {
        for compute in [Compute::MatchWeight, Compute::F32] {
            for number in 0..every_block_format(40).len() + 4 {
                // Copied by several tasks, and with a strip that is not full.
                let forms = |rows: usize, seed: u64| {
                    let mut all = every_block_format(rows);
                    all.extend(every_format(rows, 512, seed));
                    all
                };
                let list = |seed: u64| {
                    (0..4)
                        .map(|_| forms(328, seed).swap_remove(number))
                        .collect()
                };
                let cache = Arc::new(ExpertCache::new(usize::MAX, compute, FILE));
                let bank = of(list, &cache, 0);
                for copy in copies(&bank, &[1, 3]) {
                    let [gate, ..] = copy.weights;
                    let is_strips = matches!(gate.format(), Format::Interleaved(_));
                    let has_blocks =
                        matches!(bank.gate[0].format(), Format::Ggml(f) if f.block() > 1);
                    assert_eq!(is_strips, has_blocks && compute == Compute::MatchWeight);
                }
            }
        }
    }

    #[test]
    fn memory_of_experts_that_left_serves_others() {
        let cache = cache(1);
        let bank = bank(&cache, 0);
        let place = |expert: i32| copies(&bank, &[expert])[0].weights[0].bytes().as_ptr();
        let first = place(0);
        assert_eq!(place(1), first);
        // Not while somebody reads it.
        let held = copies(&bank, &[1]);
        assert_ne!(place(2), held[0].weights[0].bytes().as_ptr());
        assert_eq!(held[0].weights[1].to_f32(), bank.up[1].to_f32());
    }
}
