//! The routed experts of an MoE layer, `y_t = Σ_j w_tj · down_e(silu(gate_e(x_t)) · up_e(x_t))` with `e` the token's
//! j-th expert, over slots sorted by expert.
//!
//! A task takes a piece of one expert's slots: it gathers their tokens, multiplies with the expert's three weights
//! (decoded tile by tile, if needed), and writes one row per slot. So a popular expert does not leave cores idle.
//! Experts take turns in groups, and after each group its rows are added to their tokens' rows: only the rows of one
//! group are in memory. A token's rows are added in the order of its experts, so no sum depends on timing or on the
//! groups.
//!
//! The backward pass needs the saved products of gate and up, but no down product: the gradient of a routing weight is
//! `⟨dy, down(a)⟩ = ⟨downᵀ(dy), a⟩`, and `downᵀ(dy)` is needed anyway.
//!
//! Every expert may carry a low-rank update of each weight, `w + scale · b · a`. It is applied to the activations, or
//! with fake quantization added to the weight tile by tile.

use std::ops::Range;

use super::routed::{DOWN, GATE, RoutedExperts, UP};
use super::slots::{ExpertSlots, Slots};
use crate::memory::{Mat, MatMut, with_scratch, zeros};
use crate::ops::swiglu;
use crate::settings::{Accumulate, OperandRounding};
use crate::simd::dot;
use crate::threads::parallel_for;

pub(super) fn forward_in_groups(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let RoutedExperts { hidden, inner, .. } = experts;
    let n_slots = slots.order.len();
    let (mut y, by_token) = (zeros(x.len()), slots.by_token());
    let [mut gate, mut up] = [zeros(n_slots * inner), zeros(n_slots * inner)];
    slots.with_group_scratch(hidden, |scratch| {
        for group in slots.groups() {
            let places = slots.places(group.clone());
            let rows = &mut scratch[..places.len() * hidden];
            let products =
                [&mut gate, &mut up].map(|all| &mut all[places.start * inner..places.end * inner]);
            forward_group(experts, slots, x, group, products, rows);
            slots.add_rows(rows, places, Some(weights), &by_token, &mut y);
        }
    });
    (y, gate, up)
}

/// Fills a group's products of gate and up `[slots, inner]` and its output rows `[slots, hidden]`.
fn forward_group(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    group: Range<usize>,
    [gate, up]: [&mut [f32]; 2],
    rows: &mut [f32],
) {
    let RoutedExperts { hidden, inner, .. } = experts;
    let all = slots.places(group.clone());
    let outputs = [(gate, inner), (up, inner), (rows, hidden)]
        .map(|(values, width)| MatMut::dense(values, all.len(), width));
    let pieces = slots.pieces(group);
    parallel_for(pieces.len(), |i| {
        let piece = &pieces[i];
        let places = piece.places.clone();
        let rows = places.start - all.start..places.end - all.start;
        // SAFETY: pieces are different places.
        #[expect(unsafe_code, reason = "disjoint rows of three outputs")]
        let [mut gate, mut up, mut out] = unsafe {
            outputs
                .each_ref()
                .map(|all| all.part(rows.clone(), 0..all.cols()))
        };
        let n = places.len();
        with_scratch(n * (hidden + inner), |scratch| {
            let (xs, act) = scratch.split_at_mut(n * hidden);
            slots.gather(x, hidden, places, xs);
            let xs = Mat::dense(xs, n, hidden);
            experts.project(GATE, piece, xs, gate.values());
            experts.project(UP, piece, xs, up.values());
            swiglu::forward(gate.values(), up.values(), act);
            experts
                .compute
                .rounding_before_product()
                .round_rows(act, inner);
            let act = Mat::dense(act, n, inner);
            experts.project(DOWN, piece, act, out.values());
        });
    });
}

/// The activations saved for the backward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedProducts<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weights: &'a [f32],
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
}

/// The inputs of a backward pass.
#[derive(Clone, Copy)]
struct ExpertsBackward<'a> {
    experts: RoutedExperts<'a>,
    slots: Slots<'a>,
    saved: SavedProducts<'a>,
    /// `[tokens, hidden]`.
    dy: &'a [f32],
}

/// The gradients of every backward pass.
#[derive(Debug)]
pub(crate) struct InputGrads {
    /// `[tokens, hidden]`.
    pub(crate) dx: Vec<f32>,
    /// `[slots]`, in slot order.
    pub(crate) dweights: Vec<f32>,
}

/// The intermediate gradients of a group, from which those of its weights are computed.
#[derive(Debug)]
struct GroupGrads<'a> {
    experts: Range<usize>,
    /// Gradients of the products of gate and up, and the activations, `[slots, inner]`.
    inner: [&'a [f32]; 3],
}

impl GroupGrads<'_> {
    fn for_each_projection(&self, task: impl Fn(usize, usize) + Sync) {
        parallel_for(3 * self.experts.len(), |i| {
            task(i % 3, self.experts.start + i / 3);
        });
    }

    /// Lends the input rows and output gradients of one expert's projection.
    fn with_operands(
        &self,
        pass: ExpertsBackward<'_>,
        projection: usize,
        expert: usize,
        use_them: impl FnOnce(Mat<'_>, Mat<'_>),
    ) {
        let ExpertsBackward {
            experts,
            slots,
            saved,
            dy,
        } = pass;
        let (places, start) = (
            slots.of_expert(expert),
            slots.places(self.experts.clone()).start,
        );
        let (n, inner, hidden) = (places.len(), experts.inner, experts.hidden);
        let rows = (places.start - start) * inner..(places.end - start) * inner;
        with_scratch(n * hidden, |scratch| {
            let source = if projection == DOWN { dy } else { saved.x };
            slots.gather(source, hidden, places.clone(), scratch);
            if projection == DOWN {
                for (at, row) in places.zip(scratch.chunks_mut(hidden)) {
                    let weight = saved.weights[slots.order[at] as usize];
                    row.iter_mut().for_each(|dy| *dy *= weight);
                }
            }
            let wide = Mat::dense(scratch, n, hidden);
            let [dgate, dup, act] = self
                .inner
                .map(|values| Mat::dense(&values[rows.clone()], n, inner));
            match projection {
                GATE => use_them(wide, dgate),
                UP => use_them(wide, dup),
                _ => use_them(act, wide),
            }
        });
    }
}

/// dy `[tokens, hidden]` → gradients of the inputs; `learn` is called with each group.
fn backward(pass: ExpertsBackward<'_>, mut learn: impl FnMut(GroupGrads<'_>)) -> InputGrads {
    let ExpertsBackward { slots, dy, .. } = pass;
    let RoutedExperts { hidden, inner, .. } = pass.experts;
    let (mut dx, mut dweights) = (zeros(dy.len()), vec![0.0; slots.order.len()]);
    let by_token = slots.by_token();
    let widths = [inner, inner, inner, hidden, 1];
    slots.with_group_scratch(widths.iter().sum(), |scratch| {
        for group in slots.groups() {
            let places = slots.places(group.clone());
            let mut rest = &mut *scratch;
            let mut outputs = widths.map(|width| {
                rest.split_off_mut(..places.len() * width)
                    .expect("a share of the scratch of every group")
            });
            backward_group(pass, group.clone(), &mut outputs);
            let [dgate, dup, act, rows, sorted_dweights] = outputs;
            learn(GroupGrads {
                experts: group,
                inner: [dgate, dup, act],
            });
            let of_slots = slots.order[places.clone()].iter().zip(sorted_dweights);
            of_slots.for_each(|(slot, dweight)| dweights[*slot as usize] = *dweight);
            slots.add_rows(rows, places, None, &by_token, &mut dx);
        }
    });
    InputGrads { dx, dweights }
}

/// Fills a group's gradients of the products of gate and up and its activations `[slots, inner]`, the input gradients
/// `[slots, hidden]` and the routing weights' `[slots]`.
fn backward_group(pass: ExpertsBackward<'_>, group: Range<usize>, outputs: &mut [&mut [f32]; 5]) {
    let ExpertsBackward {
        experts,
        slots,
        saved,
        ..
    } = pass;
    let inner = experts.inner;
    let all = slots.places(group.clone());
    let outputs = outputs.each_mut().map(|values| {
        let width = values.len() / all.len().max(1);
        MatMut::dense(values, all.len(), width)
    });
    let pieces = slots.pieces(group);
    parallel_for(pieces.len(), |i| {
        let piece = &pieces[i];
        let places = piece.places.clone();
        let rows = places.start - all.start..places.end - all.start;
        // SAFETY: pieces are different places.
        #[expect(unsafe_code, reason = "disjoint rows of five outputs")]
        let [mut dgate, mut dup, mut act, mut dx, mut dweight] = unsafe {
            outputs
                .each_ref()
                .map(|all| all.part(rows.clone(), 0..all.cols()))
        };
        let (n, range) = (places.len(), places.start * inner..places.end * inner);
        let (gate, up) = (&saved.gate[range.clone()], &saved.up[range]);
        swiglu::forward(gate, up, act.values());
        back_through_down(pass, piece, dgate.values());
        let weights = places.map(|at| saved.weights[slots.order[at] as usize]);
        with_rounded_rows(act.values(), inner, experts.compute.rounding(), |act| {
            weigh(dgate.values(), act, dweight.values(), weights);
        });
        dup.values().copy_from_slice(up);
        swiglu::backward(dgate.values(), dup.values(), gate);
        let gradients = [
            (GATE, dgate, Accumulate::Replace),
            (UP, dup, Accumulate::Add),
        ];
        for (projection, mut dy, accumulate) in gradients {
            let before = experts.compute.rounding_before_product();
            with_rounded_rows(dy.values(), inner, before, |dy| {
                let dy = Mat::dense(dy, n, inner);
                experts.project_back(projection, piece, dy, dx.values(), accumulate);
            });
        }
    });
}

/// The activations' gradients, before the routing weights: `downᵀ(dy)`.
fn back_through_down(pass: ExpertsBackward<'_>, piece: &ExpertSlots, dact: &mut [f32]) {
    let ExpertsBackward { experts, slots, .. } = pass;
    let (n, hidden) = (piece.places.len(), experts.hidden);
    with_scratch(n * hidden, |dys| {
        slots.gather(pass.dy, hidden, piece.places.clone(), dys);
        experts
            .compute
            .rounding_before_product()
            .round_rows(dys, hidden);
        let dys = Mat::dense(dys, n, hidden);
        experts.project_back(DOWN, piece, dys, dact, Accumulate::Replace);
    });
}

/// Lends a rounded copy of values for a product that sums along rows.
fn with_rounded_rows(
    values: &[f32],
    width: usize,
    rounding: OperandRounding,
    use_them: impl FnOnce(&[f32]),
) {
    if rounding == OperandRounding::F32 {
        return use_them(values);
    }
    with_scratch(values.len(), |copy| {
        copy.copy_from_slice(values);
        rounding.round_rows(copy, width);
        use_them(copy);
    });
}

/// Lends rounded copies of both operands of a product that sums along their columns.
fn with_rounded_columns(
    [a, b]: [Mat<'_>; 2],
    rounding: OperandRounding,
    use_them: impl FnOnce(Mat<'_>, Mat<'_>),
) {
    if rounding == OperandRounding::F32 {
        return use_them(a, b);
    }
    let n = a.rows();
    with_scratch(n * (a.cols() + b.cols()), |scratch| {
        let parts = scratch.split_at_mut(n * a.cols());
        for (copy, source) in [(&mut *parts.0, a), (&mut *parts.1, b)] {
            let rows = copy.chunks_mut(source.cols().max(1)).enumerate();
            rows.for_each(|(row, copy)| copy.copy_from_slice(source.row(row)));
            rounding.round_columns(copy, source.cols());
        }
        let views = (
            Mat::dense(parts.0, n, a.cols()),
            Mat::dense(parts.1, n, b.cols()),
        );
        use_them(views.0, views.1);
    });
}

/// Computes the routing weights' gradients, `⟨d(act), act⟩`, and multiplies the activations' gradients with the
/// weights.
fn weigh(dact: &mut [f32], act: &[f32], dweights: &mut [f32], weights: impl Iterator<Item = f32>) {
    let width = act.len() / dweights.len().max(1);
    let rows = dact.chunks_mut(width.max(1)).zip(act.chunks(width.max(1)));
    for ((dact, act), (dweight, weight)) in rows.zip(dweights.iter_mut().zip(weights)) {
        *dweight = dot(dact, act);
        dact.iter_mut().for_each(|dact| *dact *= weight);
    }
}

/// Gradients of the inputs, and of gate, up and down `[experts, out, in]`.
pub(crate) fn backward_trained(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    saved: SavedProducts<'_>,
    dy: &[f32],
) -> (InputGrads, [Vec<f32>; 3]) {
    let size = experts.hidden * experts.inner;
    let mut stacks = [GATE, UP, DOWN].map(|_| vec![0.0; experts.n_experts * size]);
    let outputs = stacks.each_mut().map(|stack| experts.by_expert(stack));
    let pass = ExpertsBackward {
        experts,
        slots,
        saved,
        dy,
    };
    let grads = backward(pass, |group| {
        group.for_each_projection(|projection, expert| {
            // SAFETY: each projection of each expert comes once.
            #[expect(unsafe_code, reason = "disjoint rows of three outputs")]
            let mut dw = unsafe { outputs[projection].part(expert..expert + 1, 0..size) };
            group.with_operands(pass, projection, expert, |x, dy| {
                let compute = experts.compute;
                with_rounded_columns([x, dy], compute.rounding_before_product(), |x, dy| {
                    let dw = MatMut::dense(dw.values(), dy.cols(), x.cols());
                    compute.multiply(dw, dy.t(), x, Accumulate::Replace);
                });
            });
        });
    });
    (grads, stacks)
}

/// Gradients of the inputs, and of the factors `a [experts, rank, in]` and `b [experts, out, rank]` of gate, up and
/// down.
pub(crate) fn backward_updated(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    saved: SavedProducts<'_>,
    dy: &[f32],
) -> (InputGrads, [[Vec<f32>; 2]; 3]) {
    let mut stacks = [GATE, UP, DOWN].map(|projection| {
        let (widths, rank) = (experts.widths(projection), experts.factors[projection].rank);
        widths.map(|width| vec![0.0; experts.n_experts * rank * width])
    });
    let outputs = stacks
        .each_mut()
        .map(|pair| pair.each_mut().map(|stack| experts.by_expert(stack)));
    let pass = ExpertsBackward {
        experts,
        slots,
        saved,
        dy,
    };
    let grads = backward(pass, |group| {
        group.for_each_projection(|projection, expert| {
            // SAFETY: each projection of each expert comes once.
            #[expect(unsafe_code, reason = "disjoint rows of six outputs")]
            let grads = unsafe {
                outputs[projection]
                    .each_ref()
                    .map(|all| all.part(expert..expert + 1, 0..all.cols()))
            };
            group.with_operands(pass, projection, expert, |x, dy| {
                let places = slots.of_expert(expert);
                let slots = slots.some_of(expert, places);
                experts.factor_grads(projection, &slots, [x, dy], grads);
            });
        });
    });
    (grads, stacks)
}

/// Gradients of the inputs alone.
pub(crate) fn backward_inputs(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    saved: SavedProducts<'_>,
    dy: &[f32],
) -> InputGrads {
    let pass = ExpertsBackward {
        experts,
        slots,
        saved,
        dy,
    };
    backward(pass, |_| {})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dropout::Dropout;
    use crate::ops::experts::forward;
    use crate::ops::experts::routed::{ExpertLora, ExpertOperands, StackedFactors};
    use crate::ops::route;
    use crate::settings::Compute;
    use crate::testing::noise;

    /// The groups of experts depend on the number of threads; the result does not.
    #[test]
    fn the_number_of_threads_changes_groups_and_no_bit() {
        let [tokens, n_experts, top_k, hidden, inner, rank] = [4000, 5, 2, 6, 3, 2];
        let size = hidden * inner;
        let stacks = [1, 2, 3].map(|seed| noise(n_experts * size, seed));
        let factors = [4, 5].map(|seed| noise(n_experts * rank * hidden.max(inner), seed));
        let [a, b] = factors.each_ref();
        let factors = StackedFactors { a, b, rank };
        let experts = RoutedExperts {
            weights: ExpertOperands::Trained(stacks.each_ref().map(Vec::as_slice)),
            factors: [factors; 3],
            lora: ExpertLora {
                scale: [0.5; 3],
                dropout: Dropout::OFF,
                quantizer: None,
            },
            compute: Compute::F32,
            hidden,
            inner,
            n_experts,
        };
        // Every token's first expert is a popular one, and its second another.
        let ids: Vec<i32> = (0..tokens as i32)
            .flat_map(|token| [token % 2, 2 + token % 3])
            .collect();
        let (order, offsets) = route::dispatch(&ids, n_experts);
        let slots = Slots {
            order: &order,
            offsets: &offsets,
            top_k,
            part: None,
        };
        let (x, dy) = (noise(tokens * hidden, 6), noise(tokens * hidden, 7));
        let weights = noise(tokens * top_k, 8);
        let run = || {
            let (y, gate, up) = forward(experts, slots, &x, &weights);
            let saved = SavedProducts {
                x: &x,
                weights: &weights,
                gate: &gate,
                up: &up,
            };
            let (inputs, factors) = backward_updated(experts, slots, saved, &dy);
            let (_, stacks) = backward_trained(experts, slots, saved, &dy);
            let factors = factors.into_iter().flatten().chain(stacks);
            let all = [y, inputs.dx, inputs.dweights].into_iter().chain(factors);
            (slots.groups().len(), all.collect::<Vec<_>>())
        };
        let [(many, one_thread), (few, four_threads)] = [1, 4].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(run)
        });
        assert!(many > few, "{many} groups, {few} groups");
        for (i, (one, four)) in one_thread.iter().zip(&four_threads).enumerate() {
            assert!(one == four, "result {i} differs");
            assert!(one.iter().any(|v| *v != 0.0), "result {i} is nothing");
        }
    }
}
