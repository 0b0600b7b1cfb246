//! Experts in memory, of a model that has more of them than memory has room for.
//!
//! The weights of experts stay in their file. Those that tokens choose are copied as products read them fastest, and stay
//! until others need their room: those that were unused for longest go first. An expert for which there is no room, since
//! the others are of the same tokens, is read where it lies; it gives the same bits.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::{ExpertBank, Slots};
use crate::Matrix;

/// The experts of all layers that are in memory. Its layers' banks share it.
pub struct ExpertCache {
    /// Most bytes that they take.
    budget: usize,
    file: FileHints,
    state: Mutex<State>,
}

/// What the system is told of a file's bytes.
#[derive(Clone, Copy, Debug)]
pub struct FileHints {
    /// They will be read soon.
    pub expect: fn(&[u8]),
    /// They were copied.
    pub forget: fn(&[u8]),
}

/// How often experts were in memory when tokens chose them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertTraffic {
    /// Experts of a layer that were there, by pass.
    pub hits: u64,
    /// Those that were not.
    pub misses: u64,
    /// Bytes that were read from the file for the latter.
    pub read_bytes: u64,
    /// Bytes that those in memory take.
    pub held_bytes: usize,
}

#[derive(Default)]
struct State {
    /// By layer and number.
    experts: HashMap<(usize, usize), Resident>,
    /// Counts calls.
    now: u64,
    traffic: ExpertTraffic,
}

struct Resident {
    /// Gate, up and down.
    weights: [Matrix; 3],
    last_used: u64,
}

/// A layer's part of the cache.
#[derive(Clone, Debug)]
pub struct CachedLayer {
    /// Where its experts are.
    pub cache: Arc<ExpertCache>,
    /// Which layer it is.
    pub layer: usize,
}

impl fmt::Debug for ExpertCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExpertCache({} bytes)", self.budget)
    }
}

impl ExpertCache {
    /// An empty one for so many bytes.
    pub fn new(budget: usize, file: FileHints) -> Self {
        Self {
            budget,
            file,
            state: Mutex::default(),
        }
    }

    /// What was counted so far.
    pub fn traffic(&self) -> ExpertTraffic {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .traffic
    }

    /// Puts what is in memory of some experts of a layer in place of their file's bytes, and copies what is not.
    fn fill(&self, layer: usize, chosen: impl Iterator<Item = usize>, bank: &mut ExpertBank) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.now += 1;
        let mut missing = vec![];
        for expert in chosen {
            match state.touch((layer, expert)) {
                Some(weights) => bank.put(expert, weights),
                None => missing.push(expert),
            }
        }
        // All of them first: so the disk has them in one queue.
        for expert in &missing {
            for stored in bank.weights_of(*expert) {
                (self.file.expect)(stored.bytes());
            }
        }
        for expert in missing {
            let mut weights = bank.weights_of(expert);
            state.traffic.misses += 1;
            state.traffic.read_bytes += size(&weights) as u64;
            if state.make_room(size(&weights), self.budget) {
                Matrix::lay_out(&mut weights, &mut |copied| {
                    (self.file.forget)(copied.bytes())
                });
                bank.put(expert, weights.clone());
                state.add((layer, expert), weights);
            }
        }
    }
}

/// Bytes of an expert's weights.
fn size(weights: &[Matrix; 3]) -> usize {
    weights.iter().map(Matrix::size_bytes).sum()
}

impl State {
    /// An expert's weights if they are there, which counts as a use.
    fn touch(&mut self, key: (usize, usize)) -> Option<[Matrix; 3]> {
        let resident = self.experts.get_mut(&key)?;
        resident.last_used = self.now;
        self.traffic.hits += 1;
        Some(resident.weights.clone())
    }

    /// Lets go of the longest unused until there is room, but of none that this call uses. Whether there is.
    fn make_room(&mut self, bytes: usize, budget: usize) -> bool {
        while self.traffic.held_bytes + bytes > budget {
            let unused = self.experts.iter().filter(|(_, r)| r.last_used < self.now);
            let Some((key, _)) = unused.min_by_key(|(key, r)| (r.last_used, **key)) else {
                return false;
            };
            let key = *key;
            let gone = self
                .experts
                .remove(&key)
                .map(|resident| size(&resident.weights));
            self.traffic.held_bytes -= gone.unwrap_or(0);
        }
        true
    }

    fn add(&mut self, key: (usize, usize), weights: [Matrix; 3]) {
        self.traffic.held_bytes += size(&weights);
        let last_used = self.now;
        self.experts.insert(key, Resident { weights, last_used });
    }
}

impl ExpertBank {
    /// The bank with the experts that have slots in memory, if it has a cache.
    pub(crate) fn resident(&self, slots: Slots<'_>) -> Cow<'_, Self> {
        let Some(CachedLayer { cache, layer }) = &self.cached else {
            return Cow::Borrowed(self);
        };
        let mut bank = self.clone();
        let experts = 0..slots.offsets.len() - 1;
        let chosen = experts.filter(|expert| !slots.of_expert(*expert).is_empty());
        cache.fill(*layer, chosen, &mut bank);
        Cow::Owned(bank)
    }

    fn weights_of(&self, expert: usize) -> [Matrix; 3] {
        [&self.gate, &self.up, &self.down].map(|list| list[expert].clone())
    }

    fn put(&mut self, expert: usize, [gate, up, down]: [Matrix; 3]) {
        (self.gate[expert], self.up[expert], self.down[expert]) = (gate, up, down);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::every_format;
    use crate::route;

    const HINTS: FileHints = FileHints {
        expect: |_| (),
        forget: |_| (),
    };

    /// Four experts of `[8, 8]` in f32: 768 bytes each.
    fn bank(cache: &Arc<ExpertCache>, layer: usize) -> ExpertBank {
        let list = |seed: u64| {
            (0..4u64)
                .map(|i| every_format(8, 8, seed + i).swap_remove(0))
                .collect()
        };
        ExpertBank {
            gate: list(1),
            up: list(11),
            down: list(21),
            cached: Some(CachedLayer {
                cache: Arc::clone(cache),
                layer,
            }),
        }
    }

    /// Which of the four are copies after a pass of tokens with these experts.
    fn copied(bank: &ExpertBank, experts: &[i32]) -> Vec<usize> {
        let (order, offsets) = route::dispatch(experts, 4);
        let resident = bank.resident(Slots {
            order: &order,
            offsets: &offsets,
            top_k: 1,
        });
        let values = |bank: &ExpertBank, expert: usize| {
            let weights = bank.weights_of(expert);
            weights.map(|w| w.to_f32())
        };
        assert!((0..4).all(|expert| values(bank, expert) == values(&resident, expert)));
        let is_copy = |expert: &usize| {
            bank.down[*expert].bytes().as_ptr() != resident.down[*expert].bytes().as_ptr()
        };
        (0..4).filter(is_copy).collect()
    }

    #[test]
    fn the_longest_unused_expert_makes_room() {
        let size = 3 * 8 * 8 * 4;
        let cache = Arc::new(ExpertCache::new(3 * size, HINTS));
        let banks = [bank(&cache, 0), bank(&cache, 1)];
        assert_eq!(copied(&banks[0], &[0, 1, 0]), [0, 1]);
        assert_eq!(copied(&banks[1], &[0]), [0]);
        assert_eq!(copied(&banks[0], &[1]), [1]);
        // Expert 0 of the first layer is the oldest, though it came with expert 1.
        assert_eq!(copied(&banks[1], &[3]), [3]);
        let counts = cache.traffic();
        assert_eq!((counts.hits, counts.misses), (1, 4));
        assert_eq!(counts.held_bytes, 3 * size);
        assert_eq!(copied(&banks[0], &[0]), [0]);
        assert_eq!(cache.traffic().misses, 5);
        // Of four at once one finds no room, and those of the pass stay.
        assert_eq!(copied(&banks[0], &[0, 1, 2, 3]), [0, 1, 2]);
        assert_eq!(cache.traffic().held_bytes, 3 * size);
        assert_eq!(cache.traffic().read_bytes, 7 * size as u64);
    }

    #[test]
    fn a_budget_below_one_expert_holds_none() {
        let cache = Arc::new(ExpertCache::new(10, HINTS));
        assert!(copied(&bank(&cache, 0), &[2, 3]).is_empty());
        assert_eq!(cache.traffic().held_bytes, 0);
    }
}
