//! Choosing experts and sorting slots by expert, without reading back.
//!
//! Sorting counts: the slots of each chunk and expert are counted, the counts before each are added, and every chunk's
//! slots are put in place in their order. So it is stable and the same in every run. One thread per chunk and expert.

#![expect(
    clippy::needless_range_loop,
    clippy::needless_pass_by_ref_mut,
    reason = "kernels index buffers, and share no arrays of registers"
)]

use burn::backend::TensorMetadata;
use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::{CubeDim, calculate_cube_count_elemwise};
use burn::tensor::DType;

use super::tensors::{contiguous, empty};
use crate::formats::placed::CubeTensor;
use crate::ops::route::{GroupScore, TopK};

/// Slots of a chunk: a thread passes over them once.
const SORTED_CHUNK: usize = 1 << 12;

/// Counts the slots of a chunk that are an expert's: `[chunks, experts]`.
#[cube(launch)]
fn count(ids: &[i32], counts: &mut [i32], experts: usize, n: usize, #[comptime] chunk: usize) {
    if ABSOLUTE_POS >= counts.len() {
        terminate!();
    }
    let expert = ABSOLUTE_POS % experts;
    let start = ABSOLUTE_POS / experts * chunk;
    let end = min(start + chunk, n);
    let mut found = 0i32;
    for slot in start..end {
        if ids[slot] as usize == expert {
            found += 1;
        }
    }
    counts[ABSOLUTE_POS] = found;
}

/// Adds an expert's counts of all chunks, `[experts]`; a thread per expert.
#[cube(launch)]
fn totals(counts: &[i32], sums: &mut [i32], experts: usize, chunks: usize) {
    if ABSOLUTE_POS >= experts {
        terminate!();
    }
    let mut sum = 0i32;
    for chunk in 0..chunks {
        sum += counts[chunk * experts + ABSOLUTE_POS];
    }
    sums[ABSOLUTE_POS] = sum;
}

/// Where an expert's places begin, `[experts + 1]`: the sum of all experts before it; a thread per offset.
#[cube(launch)]
fn sums_before(sums: &[i32], offsets: &mut [i32], experts: usize) {
    if ABSOLUTE_POS > experts {
        terminate!();
    }
    let mut sum = 0i32;
    for expert in 0..ABSOLUTE_POS {
        sum += sums[expert];
    }
    offsets[ABSOLUTE_POS] = sum;
}

/// Puts the slots of a chunk that are an expert's into their places.
#[cube(launch)]
fn put(
    ids: &[i32],
    counts: &[i32],
    offsets: &[i32],
    order: &mut [i32],
    experts: usize,
    n: usize,
    #[comptime] chunk: usize,
) {
    if ABSOLUTE_POS >= counts.len() {
        terminate!();
    }
    let expert = ABSOLUTE_POS % experts;
    let own = ABSOLUTE_POS / experts;
    let mut place = offsets[expert];
    for before in 0..own {
        place += counts[before * experts + expert];
    }
    let start = own * chunk;
    let end = min(start + chunk, n);
    for slot in start..end {
        if ids[slot] as usize == expert {
            order[place as usize] = slot as i32;
            place += 1;
        }
    }
}

/// The expert, the token and the slot's place of each place.
#[cube(launch)]
fn tables(
    order: &[i32],
    offsets: &[i32],
    expert_of: &mut [i32],
    token_of: &mut [i32],
    place_of: &mut [i32],
    experts: usize,
    top_k: usize,
) {
    if ABSOLUTE_POS >= order.len() {
        terminate!();
    }
    let slot = order[ABSOLUTE_POS];
    let mut expert = 0i32;
    for e in 0..experts {
        if ABSOLUTE_POS >= offsets[e + 1] as usize {
            expert = e as i32 + 1;
        }
    }
    expert_of[ABSOLUTE_POS] = expert;
    token_of[ABSOLUTE_POS] = slot / top_k as i32;
    place_of[slot as usize] = ABSOLUTE_POS as i32;
}

/// ids `[tokens, top_k]` → order `[slots]` and offsets `[experts + 1]`; see [`crate::ops::route::dispatch`].
pub(super) fn dispatch(ids: CubeTensor, experts: usize) -> [CubeTensor; 2] {
    let ids = contiguous(ids);
    let n = ids.shape().num_elements();
    let chunks = n.div_ceil(SORTED_CHUNK).max(1);
    let client = &ids.client;
    let [counts, sums, order, offsets] =
        [chunks * experts, experts, n, experts + 1].map(|len| empty(&ids, [len], DType::I32));
    let grid = |threads: usize| {
        let dim = CubeDim::new(client, threads);
        (calculate_cube_count_elemwise(client, threads, dim), dim)
    };
    let arg = |tensor: &CubeTensor| tensor.clone().into_buffer_arg();
    let (groups, dim) = grid(chunks * experts);
    count::launch(
        client,
        groups,
        dim,
        arg(&ids),
        arg(&counts),
        experts,
        n,
        SORTED_CHUNK,
    );
    let (groups, dim) = grid(experts);
    totals::launch(
        client,
        groups,
        dim,
        arg(&counts),
        arg(&sums),
        experts,
        chunks,
    );
    let (groups, dim) = grid(experts + 1);
    sums_before::launch(client, groups, dim, arg(&sums), arg(&offsets), experts);
    if n > 0 {
        let (groups, dim) = grid(chunks * experts);
        let tables = (arg(&counts), arg(&offsets));
        put::launch(
            client,
            groups,
            dim,
            arg(&ids),
            tables.0,
            tables.1,
            arg(&order),
            experts,
            n,
            SORTED_CHUNK,
        );
    }
    [order, offsets]
}

/// The expert, token and place tables of slots, `[slots]` each; see [`crate::backend::plain::primitives::SlotTable`].
pub(super) fn slot_tables(
    order: &CubeTensor,
    offsets: &CubeTensor,
    top_k: usize,
) -> [CubeTensor; 3] {
    let (n, experts) = (order.shape()[0], offsets.shape()[0] - 1);
    let made = [0, 1, 2].map(|_| empty(order, [n], DType::I32));
    if n > 0 {
        let client = &order.client;
        let dim = CubeDim::new(client, n);
        let groups = calculate_cube_count_elemwise(client, n, dim);
        let [a, b, c] = made.clone().map(CubeTensor::into_buffer_arg);
        let (order, offsets) = (
            order.clone().into_buffer_arg(),
            offsets.clone().into_buffer_arg(),
        );
        tables::launch(client, groups, dim, order, offsets, a, b, c, experts, top_k);
    }
    made
}

/// The sizes of a choice, as kernels are compiled for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ChoiceShape {
    experts: usize,
    top_k: usize,
    n_group: usize,
    topk_group: usize,
    sums_two: bool,
}

/// Less than every score: NaN counts as this, and what was taken. Infinities are not assumed.
const LEAST_SCORE: f32 = -1.0e38;
/// What was taken, below the least.
const TAKEN: f32 = -3.0e38;

/// The top-k experts of a token, best first; a thread per token. See [`crate::ops::route::choose`].
#[cube(launch)]
fn choose(scores: &[f32], ids: &mut [i32], tokens: usize, #[comptime] choice: ChoiceShape) {
    if ABSOLUTE_POS >= tokens {
        terminate!();
    }
    let experts = comptime!(choice.experts);
    let from = ABSOLUTE_POS * experts;
    let mut open = Array::<f32>::new(comptime!(choice.experts));
    for e in 0..experts {
        let score = scores[from + e];
        // Written so that NaN, which is not larger than anything, becomes the least.
        open[e] = select(score > LEAST_SCORE, score, f32::new(LEAST_SCORE));
    }
    if comptime!(choice.n_group > 1) {
        close_groups(&mut open, choice);
    }
    for j in 0..comptime!(choice.top_k) {
        let best = best_of(&mut open, 0, comptime!(choice.experts));
        ids[ABSOLUTE_POS * comptime!(choice.top_k) + j] = best as i32;
        open[best] = TAKEN;
    }
}

/// The first of the largest of `len` numbers from `first` on.
#[cube]
fn best_of(of: &mut Array<f32>, first: usize, #[comptime] len: usize) -> usize {
    let mut best = first;
    let mut largest = of[first];
    for e in 1..len {
        let score = of[first + e];
        if score > largest {
            largest = score;
            best = first + e;
        }
    }
    best
}

/// Marks all experts as taken but those of the best groups.
#[cube]
fn close_groups(open: &mut Array<f32>, #[comptime] choice: ChoiceShape) {
    let size = comptime!(choice.experts / choice.n_group);
    let mut worth = Array::<f32>::new(comptime!(choice.n_group));
    for group in 0..comptime!(choice.n_group) {
        let first = best_of(open, group * size, size);
        let mut sum = open[first];
        if comptime!(choice.sums_two && size > 1) {
            let largest = open[first];
            open[first] = TAKEN;
            let second = best_of(open, group * size, size);
            sum += open[second];
            open[first] = largest;
        }
        worth[group] = sum;
    }
    // What a chosen group was worth is marked as taken.
    for _ in 0..comptime!(choice.topk_group) {
        let best = best_of(&mut worth, 0, comptime!(choice.n_group));
        worth[best] = TAKEN;
    }
    for group in 0..comptime!(choice.n_group) {
        if worth[group] > TAKEN {
            for e in 0..size {
                open[group * size + e] = TAKEN;
            }
        }
    }
}

/// scores `[tokens, experts]` → ids `[tokens, top_k]`.
pub(super) fn choose_experts(scores: CubeTensor, top_k: TopK) -> CubeTensor {
    let scores = contiguous(scores);
    let [tokens, experts] = scores.shape().dims();
    let ids = empty(&scores, [tokens, top_k.top_k], DType::I32);
    if tokens == 0 {
        return ids;
    }
    let choice = ChoiceShape {
        experts,
        top_k: top_k.top_k,
        n_group: top_k.n_group,
        topk_group: top_k.topk_group,
        sums_two: top_k.group_score == GroupScore::TopTwoSum,
    };
    let dim = CubeDim::new(&scores.client, tokens);
    choose::launch(
        &scores.client,
        calculate_cube_count_elemwise(&scores.client, tokens, dim),
        dim,
        scores.clone().into_buffer_arg(),
        ids.clone().into_buffer_arg(),
        tokens,
        choice,
    );
    ids
}
