//! Slots sorted by expert: the expert of each, and the groups in which experts take turns.

use std::ops::Range;

use rayon::prelude::*;

use crate::memory::with_scratch;
use crate::threads::tiles;

/// Slots per task: enough rows to pay for decoding a weight tile.
pub(in crate::ops) const TASK_SLOTS: usize = 256;
/// Tasks per thread in a group of experts: enough for the threads to end together.
pub(in crate::ops) const GROUP_TASKS: usize = 16;

/// Where slots lie in those of a whole micro-batch, of whose experts only some are here. They are computed as they are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotPart {
    /// The micro-batch's slots before them, sorted by expert: dropout depends on a slot's place.
    pub first: usize,
    /// The micro-batch's tokens: few are multiplied by another kernel.
    pub tokens: usize,
    /// Whether the micro-batch's backward pass recomputes the input, in f32, from the norm that it comes from. Else it is saved
    /// in the precision of the products.
    pub is_recomputed: bool,
}

/// The slots of all tokens, sorted by expert.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots<'a> {
    /// Slot ids sorted by expert; slot `token × top_k + j`.
    pub(crate) order: &'a [i32],
    /// `[experts + 1]`. Slots behind the last offset count as zero: other experts serve them.
    pub(crate) offsets: &'a [i32],
    pub(crate) top_k: usize,
    /// What they are a part of, if they are not a whole micro-batch's.
    pub(crate) part: Option<SlotPart>,
}

/// An expert, and positions of its slots in [`Slots::order`].
#[derive(Clone, Debug)]
pub(super) struct ExpertSlots {
    pub(super) expert: usize,
    pub(super) places: Range<usize>,
    /// The same positions in the whole micro-batch.
    pub(super) keys: Range<usize>,
}

impl Slots<'_> {
    /// The micro-batch's tokens, of which `here` are in this call.
    pub(super) fn tokens(&self, here: usize) -> usize {
        self.part.map_or(here, |part| part.tokens)
    }

    /// Slots of one expert.
    pub(super) fn some_of(&self, expert: usize, places: Range<usize>) -> ExpertSlots {
        let first = self.part.map_or(0, |part| part.first);
        ExpertSlots {
            expert,
            keys: places.start + first..places.end + first,
            places,
        }
    }

    pub(super) fn token(&self, at: usize) -> usize {
        self.order[at] as usize / self.top_k
    }

    /// The positions of consecutive experts' slots.
    pub(super) fn places(&self, experts: Range<usize>) -> Range<usize> {
        self.offsets[experts.start] as usize..self.offsets[experts.end] as usize
    }

    /// The positions of an expert's slots.
    pub(super) fn of_expert(&self, expert: usize) -> Range<usize> {
        self.places(expert..expert + 1)
    }

    /// Groups of consecutive experts: one expert, or as many as have few slots. The grouping changes no result, so it
    /// may depend on the number of threads.
    pub(super) fn groups(&self) -> Vec<Range<usize>> {
        let most = GROUP_TASKS * TASK_SLOTS * rayon::current_num_threads();
        let mut groups: Vec<Range<usize>> = vec![];
        for expert in 0..self.offsets.len() - 1 {
            match groups.last_mut() {
                Some(group) if self.places(group.start..expert + 1).len() <= most => {
                    group.end = expert + 1;
                }
                _ => groups.push(expert..expert + 1),
            }
        }
        groups
    }

    /// Lends `width` values per slot of the largest group.
    pub(super) fn with_group_scratch<R>(
        &self,
        width: usize,
        use_it: impl FnOnce(&mut [f32]) -> R,
    ) -> R {
        let sizes = self
            .groups()
            .into_iter()
            .map(|group| self.places(group).len());
        with_scratch(sizes.max().unwrap_or(0) * width, use_it)
    }

    /// The tasks of some experts.
    pub(super) fn pieces(&self, experts: Range<usize>) -> Vec<ExpertSlots> {
        experts
            .flat_map(|expert| {
                tiles(self.of_expert(expert), TASK_SLOTS)
                    .map(move |places| self.some_of(expert, places))
            })
            .collect()
    }

    pub(super) fn gather(&self, x: &[f32], width: usize, places: Range<usize>, out: &mut [f32]) {
        for (at, row) in places.zip(out.chunks_mut(width)) {
            row.copy_from_slice(&x[self.token(at) * width..][..width]);
        }
    }

    /// The positions of every token's slots, in the order of their experts.
    pub(super) fn by_token(&self) -> Vec<usize> {
        let mut places = vec![0; self.order.len()];
        let slots = self.order.iter().enumerate();
        slots.for_each(|(at, slot)| places[*slot as usize] = at);
        let tokens = places.chunks_mut(self.top_k);
        tokens.for_each(<[usize]>::sort_unstable);
        places
    }

    /// Adds the rows of some slots to their tokens' rows, `[tokens, width]`, each multiplied by its weight, if there
    /// are weights.
    pub(super) fn add_rows(
        &self,
        rows: &[f32],
        places: Range<usize>,
        weights: Option<&[f32]>,
        by_token: &[usize],
        sums: &mut [f32],
    ) {
        let width = rows.len() / places.len().max(1);
        let tokens = by_token.par_chunks(self.top_k);
        let sums = sums.par_chunks_mut(width.max(1));
        sums.zip(tokens).for_each(|(sum, token)| {
            for at in token.iter().filter(|at| places.contains(at)) {
                let weight = weights.map_or(1.0, |weights| weights[self.order[*at] as usize]);
                let row = &rows[(at - places.start) * width..][..width];
                sum.iter_mut()
                    .zip(row)
                    .for_each(|(sum, row)| *sum += weight * row);
            }
        });
    }
}
