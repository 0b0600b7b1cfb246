//! The routed experts of an MoE layer, `y_t = Σ_j w_tj · down_e(silu(gate_e(x_t)) · up_e(x_t))` with `e` the token's
//! j-th expert, over slots that are sorted by expert.
//!
//! A task takes a piece of one expert's slots: it gathers their tokens, multiplies with the expert's three weights
//! (decoded tile by tile if packed), and writes one row per slot. So one popular expert does not idle the other cores.
//! Experts take turns in groups, and after each group its rows are added to their tokens': rows wait for one group, not
//! for all slots. A token's rows are added in the order of their experts, so no sum depends on timing or on the groups.
//!
//! Backward needs the products of gate and up, which are saved, and no down product: the gradient of a routing
//! weight is `⟨dy, down(a)⟩ = ⟨downᵀ(dy), a⟩`, and `downᵀ(dy)` is needed anyway.
//!
//! Every expert may carry a low-rank update of each weight, `w + scale · b · a`, applied to the activations, or added to
//! the weight tile by tile where a quantizer rounds the sum.

mod bank;
mod few;
mod resident;

use std::ops::Range;

use rayon::prelude::*;

pub use self::bank::{ExpertBank, SharedExperts};
pub(crate) use self::resident::Copied;
pub use self::resident::{ExpertCache, ExpertTraffic, OffloadedLayer};
use crate::dropout::Dropout;
use crate::product::gemm::{dot, nn_serial, nt_serial, share, tiles, with_scratch, zeros};
use crate::product::strided::{Mat, MatMut, Write, gemm};
use crate::product::weights::{Folded, Weights};
use crate::{Compute, Quantizer, swiglu};

/// Slots per task: enough rows to pay for decoding a weight tile.
const TASK_SLOTS: usize = 256;
/// Tasks per thread in a group of experts: enough for the threads to end together.
const GROUP_TASKS: usize = 16;

/// The settings of the low-rank updates: the factors themselves are tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertLora {
    /// Multiplier of the update of gate, up and down.
    pub scale: [f32; 3],
    /// Dropout on the input of the updates; off where there is a quantizer.
    pub dropout: Dropout,
    /// Folds the updates into the weights and rounds the sums, as [`crate::linear_fake_quantized`] does.
    pub quantizer: Option<Quantizer>,
}

impl ExpertLora {
    /// No update.
    pub(crate) fn none() -> Self {
        Self {
            scale: [0.0; 3],
            dropout: Dropout::OFF,
            quantizer: None,
        }
    }
}

/// The three projections of an expert, as indices.
const GATE: usize = 0;
const UP: usize = 1;
const DOWN: usize = 2;

/// A layer's experts as the kernel reads them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Experts<'a> {
    pub(crate) weights: Source<'a>,
    /// Factors `[experts, rank, in]` and `[experts, out, rank]` of gate, up and down. Rank 0 means none.
    pub(crate) factors: [Factors<'a>; 3],
    pub(crate) lora: ExpertLora,
    pub(crate) compute: Compute,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) n_experts: usize,
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// A bank, and copies of some of its experts, by number.
    Frozen(&'a ExpertBank, &'a [Copied]),
    /// Stacked f32 values of gate, up and down.
    Trained([&'a [f32]; 3]),
}

/// Stacked low-rank factors of one projection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Factors<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) rank: usize,
}

/// Which token sits in which slot, and whose slots are whose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots<'a> {
    /// Slot ids sorted by expert; slot `token × top_k + j`.
    pub(crate) order: &'a [i32],
    /// `[experts + 1]`. The slots behind the last one count as zero: others serve them.
    pub(crate) offsets: &'a [i32],
    pub(crate) top_k: usize,
}

impl Slots<'_> {
    fn token(&self, at: usize) -> usize {
        self.order[at] as usize / self.top_k
    }

    /// The places of consecutive experts.
    fn places(&self, experts: Range<usize>) -> Range<usize> {
        self.offsets[experts.start] as usize..self.offsets[experts.end] as usize
    }

    fn of_expert(&self, expert: usize) -> Range<usize> {
        self.places(expert..expert + 1)
    }

    /// Consecutive experts that take their turn together: one, or as many as have few slots. It changes no result how
    /// they are grouped, so it may depend on the number of threads.
    fn groups(&self) -> Vec<Range<usize>> {
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
    fn with_group_scratch<R>(&self, width: usize, use_it: impl FnOnce(&mut [f32]) -> R) -> R {
        let sizes = self
            .groups()
            .into_iter()
            .map(|group| self.places(group).len());
        with_scratch(sizes.max().unwrap_or(0) * width, use_it)
    }

    /// Pieces of work: an expert and some of its places in `order`.
    fn pieces(&self, experts: Range<usize>) -> Vec<(usize, Range<usize>)> {
        experts
            .flat_map(|expert| {
                tiles(self.of_expert(expert), TASK_SLOTS).map(move |places| (expert, places))
            })
            .collect()
    }

    fn gather(&self, x: &[f32], width: usize, places: Range<usize>, out: &mut [f32]) {
        for (at, row) in places.zip(out.chunks_mut(width)) {
            row.copy_from_slice(&x[self.token(at) * width..][..width]);
        }
    }

    /// The places of every token's slots, in the order of their experts.
    fn by_token(&self) -> Vec<usize> {
        let mut places = vec![0; self.order.len()];
        let slots = self.order.iter().enumerate();
        slots.for_each(|(at, slot)| places[*slot as usize] = at);
        let tokens = places.chunks_mut(self.top_k);
        tokens.for_each(<[usize]>::sort_unstable);
        places
    }

    /// Adds the rows of some places to those of their tokens, `[tokens, width]`, each multiplied by its weight if there
    /// are any.
    fn add_rows(
        &self,
        (rows, places): (&[f32], Range<usize>),
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

impl<'a> Experts<'a> {
    /// Input and output width of a projection.
    fn widths(&self, projection: usize) -> [usize; 2] {
        if projection == DOWN {
            [self.inner, self.hidden]
        } else {
            [self.hidden, self.inner]
        }
    }

    fn weights(&self, projection: usize, expert: usize) -> Weights<'a> {
        let [in_width, out_width] = self.widths(projection);
        let weights = match self.weights {
            Source::Frozen(bank, copies) => {
                let copy = copies.binary_search_by_key(&expert, |copy| copy.expert);
                let weight = match copy {
                    Ok(at) => &copies[at].weights[projection],
                    Err(_) => &[&bank.gate, &bank.up, &bank.down][projection][expert],
                };
                Weights::frozen(weight, self.compute)
            }
            Source::Trained(stacks) => {
                let size = in_width * out_width;
                Weights::trained(
                    &stacks[projection][expert * size..][..size],
                    in_width,
                    self.compute,
                )
            }
        };
        let Some(quantizer) = self.lora.quantizer else {
            return weights;
        };
        let factors = self.factors(projection, expert);
        weights.folded(Folded {
            quantizer,
            update: factors.map(|(a, b)| (a, b, self.lora.scale[projection])),
        })
    }

    /// One expert's factors, where they are applied to the activations.
    fn factors_beside(&self, projection: usize, expert: usize) -> Option<(Mat<'a>, Mat<'a>)> {
        match self.lora.quantizer {
            Some(_) => None,
            None => self.factors(projection, expert),
        }
    }

    /// One expert's factors `a [rank, in]` and `b [out, rank]`.
    fn factors(&self, projection: usize, expert: usize) -> Option<(Mat<'a>, Mat<'a>)> {
        let [in_width, out_width] = self.widths(projection);
        let Factors { a, b, rank } = self.factors[projection];
        (rank > 0).then(|| {
            let a = Mat::dense(&a[expert * rank * in_width..], rank, in_width);
            (
                a,
                Mat::dense(&b[expert * rank * out_width..], out_width, rank),
            )
        })
    }

    /// `y = x · wᵀ + scale · (drop(x) · aᵀ) · bᵀ` for rows at `places`.
    fn project(
        &self,
        projection: usize,
        expert: usize,
        places: Range<usize>,
        x: Mat<'_>,
        y: &mut [f32],
    ) {
        let (rows, [_, out_width]) = (x.rows(), self.widths(projection));
        nt_serial(
            x,
            self.weights(projection, expert),
            0..out_width,
            MatMut::dense(y, rows, out_width),
            Write::Replace,
        );
        let Some((a, b)) = self.factors_beside(projection, expert) else {
            return;
        };
        self.with_dropped(projection, places, x, |x| {
            with_scratch(rows * a.rows(), |low| {
                gemm(
                    MatMut::dense(low, rows, a.rows()),
                    x,
                    a.t(),
                    1.0,
                    Write::Replace,
                );
                let low = Mat::dense(low, rows, a.rows());
                gemm(
                    MatMut::dense(y, rows, out_width),
                    low,
                    b.t(),
                    self.lora.scale[projection],
                    Write::Add,
                );
            });
        });
    }

    /// The input gradient of [`Self::project`], added to `dx` or replacing it.
    fn project_back(
        &self,
        projection: usize,
        expert: usize,
        places: Range<usize>,
        dy: Mat<'_>,
        (dx, write): (&mut [f32], Write),
    ) {
        let (rows, [in_width, out_width]) = (dy.rows(), self.widths(projection));
        nn_serial(
            dy,
            self.weights(projection, expert),
            0..out_width,
            0..in_width,
            MatMut::dense(dx, rows, in_width),
            write,
        );
        let Some((a, b)) = self.factors_beside(projection, expert) else {
            return;
        };
        with_scratch(rows * (a.rows() + in_width), |scratch| {
            let (low, dropped) = scratch.split_at_mut(rows * a.rows());
            gemm(
                MatMut::dense(low, rows, a.rows()),
                dy,
                b,
                self.lora.scale[projection],
                Write::Replace,
            );
            let low = Mat::dense(low, rows, a.rows());
            if self.lora.dropout.is_off() {
                return gemm(MatMut::dense(dx, rows, in_width), low, a, 1.0, Write::Add);
            }
            gemm(
                MatMut::dense(dropped, rows, in_width),
                low,
                a,
                1.0,
                Write::Replace,
            );
            self.drop_rows(projection, places, dropped, in_width);
            dx.iter_mut()
                .zip(dropped)
                .for_each(|(dx, dropped)| *dx += *dropped);
        });
    }

    /// Hands over `x` as the low-rank update sees it.
    fn with_dropped(
        &self,
        projection: usize,
        places: Range<usize>,
        x: Mat<'_>,
        use_it: impl FnOnce(Mat<'_>),
    ) {
        if self.lora.dropout.is_off() {
            return use_it(x);
        }
        let width = x.cols();
        with_scratch(x.rows() * width, |copy| {
            (0..x.rows()).for_each(|row| copy[row * width..][..width].copy_from_slice(x.row(row)));
            self.drop_rows(projection, places, copy, width);
            use_it(Mat::dense(copy, x.rows(), width));
        });
    }

    /// The gradients `a [rank, in]` and `b [out, rank]` of one expert's factors, from its inputs and output gradients.
    fn factor_grads(
        &self,
        projection: usize,
        (expert, places): (usize, Range<usize>),
        [x, dy]: [Mat<'_>; 2],
        [mut da, mut db]: [MatMut<'_>; 2],
    ) {
        let Some((a, b)) = self.factors(projection, expert) else {
            return;
        };
        let (n, rank, scale) = (x.rows(), a.rows(), self.lora.scale[projection]);
        self.with_dropped(projection, places, x, |x| {
            with_scratch(2 * n * rank, |scratch| {
                let (low, dlow) = scratch.split_at_mut(n * rank);
                gemm(MatMut::dense(low, n, rank), x, a.t(), scale, Write::Replace);
                gemm(MatMut::dense(dlow, n, rank), dy, b, scale, Write::Replace);
                let [low, dlow] = [low, dlow].map(|values| Mat::dense(values, n, rank));
                let db = MatMut::dense(db.values(), dy.cols(), rank);
                gemm(db, dy.t(), low, 1.0, Write::Replace);
                let da = MatMut::dense(da.values(), rank, x.cols());
                gemm(da, dlow.t(), x, 1.0, Write::Replace);
            });
        });
    }

    /// Something of every expert, one after the other, as a row for each.
    fn by_expert<'v>(&self, values: &'v mut [f32]) -> MatMut<'v> {
        let width = values.len() / self.n_experts.max(1);
        MatMut::dense(values, self.n_experts, width)
    }

    fn drop_rows(&self, projection: usize, places: Range<usize>, rows: &mut [f32], width: usize) {
        let dropout = self.lora.dropout.fork(projection as u64);
        for (place, row) in places.zip(rows.chunks_mut(width)) {
            dropout.apply(row, (place * width) as u64);
        }
    }
}

/// x `[tokens, hidden]`, weights `[slots]` → y `[tokens, hidden]` and the products of gate and up
/// `[slots, inner]`, sorted by expert, for the backward pass.
pub(crate) fn forward(
    experts: Experts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    few::forward(experts, slots, x, weights, None)
        .unwrap_or_else(|| forward_in_groups(experts, slots, x, weights))
}

/// Whether [`forward_few`] serves few tokens with these weights.
pub(crate) fn serves_few(bank: &ExpertBank, shared: &SharedExperts, compute: Compute) -> bool {
    few::serves(bank, shared, compute)
}

/// The routed experts of a few tokens and those that every token has, together: `[tokens, hidden]`. None where tokens are
/// not few, or weights cannot be read by rows.
pub(crate) fn forward_few(
    experts: Experts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
    shared: &SharedExperts,
) -> Option<Vec<f32>> {
    few::forward(experts, slots, x, weights, Some(shared)).map(|(y, ..)| y)
}

fn forward_in_groups(
    experts: Experts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Experts { hidden, inner, .. } = experts;
    let n_slots = slots.order.len();
    let (mut y, by_token) = (zeros(x.len()), slots.by_token());
    let [mut gate, mut up] = [zeros(n_slots * inner), zeros(n_slots * inner)];
    slots.with_group_scratch(hidden, |scratch| {
        for group in slots.groups() {
            let places = slots.places(group.clone());
            let rows = &mut scratch[..places.len() * hidden];
            let products =
                [&mut gate, &mut up].map(|all| &mut all[places.start * inner..places.end * inner]);
            forward_group(experts, slots, x, (group, products), rows);
            slots.add_rows((rows, places), Some(weights), &by_token, &mut y);
        }
    });
    (y, gate, up)
}

/// Fills a group's products of gate and up `[slots, inner]` and its output rows `[slots, hidden]`.
fn forward_group(
    experts: Experts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    (group, [gate, up]): (Range<usize>, [&mut [f32]; 2]),
    rows: &mut [f32],
) {
    let Experts { hidden, inner, .. } = experts;
    let all = slots.places(group.clone());
    let outputs = [(gate, inner), (up, inner), (rows, hidden)]
        .map(|(values, width)| MatMut::dense(values, all.len(), width));
    let pieces = slots.pieces(group);
    share(pieces.len(), |i| {
        let (expert, places) = pieces[i].clone();
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
            slots.gather(x, hidden, places.clone(), xs);
            let xs = Mat::dense(xs, n, hidden);
            experts.project(GATE, expert, places.clone(), xs, gate.values());
            experts.project(UP, expert, places.clone(), xs, up.values());
            swiglu::forward(gate.values(), up.values(), act);
            experts.compute.before_products().round_rows(act, inner);
            let act = Mat::dense(act, n, inner);
            experts.project(DOWN, expert, places, act, out.values());
        });
    });
}

/// What the backward pass reads: the inputs of [`forward`] and the products it saved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weights: &'a [f32],
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
}

/// Gradients that every backward pass makes.
#[derive(Debug)]
pub(crate) struct InputGrads {
    /// `[tokens, hidden]`.
    pub(crate) dx: Vec<f32>,
    /// `[slots]`, in slot order.
    pub(crate) dweights: Vec<f32>,
}

/// What the gradients of a group's weights are made from, besides the inputs.
#[derive(Debug)]
struct Group<'a> {
    experts: Range<usize>,
    /// Gradients of the products of gate and up, and the activations, `[slots, inner]`.
    inner: [&'a [f32]; 3],
}

impl Group<'_> {
    fn for_each_projection(&self, task: impl Fn(usize, usize) + Sync) {
        share(3 * self.experts.len(), |i| {
            task(i % 3, self.experts.start + i / 3);
        });
    }

    /// Hands over the input rows and output gradients of one expert's projection.
    fn with_operands(
        &self,
        (experts, slots, saved): (Experts<'_>, Slots<'_>, Saved<'_>),
        dy: &[f32],
        (projection, expert): (usize, usize),
        use_them: impl FnOnce(Mat<'_>, Mat<'_>),
    ) {
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

/// dy `[tokens, hidden]` → gradients of the inputs; `learn` sees each group on the way.
fn backward(
    experts: Experts<'_>,
    slots: Slots<'_>,
    saved: Saved<'_>,
    dy: &[f32],
    mut learn: impl FnMut(Group<'_>),
) -> InputGrads {
    let Experts { hidden, inner, .. } = experts;
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
            backward_group(experts, slots, saved, dy, (group.clone(), &mut outputs));
            let [dgate, dup, act, rows, sorted_dweights] = outputs;
            learn(Group {
                experts: group,
                inner: [dgate, dup, act],
            });
            let of_slots = slots.order[places.clone()].iter().zip(sorted_dweights);
            of_slots.for_each(|(slot, dweight)| dweights[*slot as usize] = *dweight);
            slots.add_rows((rows, places), None, &by_token, &mut dx);
        }
    });
    InputGrads { dx, dweights }
}

/// Fills a group's gradients of the products of gate and up and its activations `[slots, inner]`, the input gradients
/// `[slots, hidden]` and the routing weights' `[slots]`.
fn backward_group(
    experts: Experts<'_>,
    slots: Slots<'_>,
    saved: Saved<'_>,
    dy: &[f32],
    (group, outputs): (Range<usize>, &mut [&mut [f32]; 5]),
) {
    let inner = experts.inner;
    let all = slots.places(group.clone());
    let outputs = outputs.each_mut().map(|values| {
        let width = values.len() / all.len().max(1);
        MatMut::dense(values, all.len(), width)
    });
    let pieces = slots.pieces(group);
    share(pieces.len(), |i| {
        let (expert, places) = pieces[i].clone();
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
        back_through_down(experts, slots, dy, (expert, places.clone()), dgate.values());
        let weights = places
            .clone()
            .map(|at| saved.weights[slots.order[at] as usize]);
        with_rounded_rows(act.values(), inner, experts.compute, |act| {
            weigh(dgate.values(), act, dweight.values(), weights);
        });
        dup.values().copy_from_slice(up);
        swiglu::backward(dgate.values(), dup.values(), gate);
        let gradients = [(GATE, dgate, Write::Replace), (UP, dup, Write::Add)];
        for (projection, mut dy, write) in gradients {
            let before = experts.compute.before_products();
            with_rounded_rows(dy.values(), inner, before, |dy| {
                let (dy, dx) = (Mat::dense(dy, n, inner), (dx.values(), write));
                experts.project_back(projection, expert, places.clone(), dy, dx);
            });
        }
    });
}

/// The activations' gradients, before the routing weights: `downᵀ(dy)`.
fn back_through_down(
    experts: Experts<'_>,
    slots: Slots<'_>,
    dy: &[f32],
    (expert, places): (usize, Range<usize>),
    dact: &mut [f32],
) {
    let (n, hidden) = (places.len(), experts.hidden);
    with_scratch(n * hidden, |dys| {
        slots.gather(dy, hidden, places.clone(), dys);
        experts.compute.before_products().round_rows(dys, hidden);
        let dys = Mat::dense(dys, n, hidden);
        experts.project_back(DOWN, expert, places, dys, (dact, Write::Replace));
    });
}

/// Lends values as a product that sums over rows sees them; they themselves stay as they are.
fn with_rounded_rows(
    values: &[f32],
    width: usize,
    compute: Compute,
    use_them: impl FnOnce(&[f32]),
) {
    if compute == Compute::F32 {
        return use_them(values);
    }
    with_scratch(values.len(), |copy| {
        copy.copy_from_slice(values);
        compute.round_rows(copy, width);
        use_them(copy);
    });
}

/// The same for both operands of a product that sums over their columns.
fn with_rounded_columns(
    [a, b]: [Mat<'_>; 2],
    compute: Compute,
    use_them: impl FnOnce(Mat<'_>, Mat<'_>),
) {
    if compute == Compute::F32 {
        return use_them(a, b);
    }
    let n = a.rows();
    with_scratch(n * (a.cols() + b.cols()), |scratch| {
        let parts = scratch.split_at_mut(n * a.cols());
        for (copy, source) in [(&mut *parts.0, a), (&mut *parts.1, b)] {
            let rows = copy.chunks_mut(source.cols().max(1)).enumerate();
            rows.for_each(|(row, copy)| copy.copy_from_slice(source.row(row)));
            compute.round_columns(copy, source.cols());
        }
        let views = (
            Mat::dense(parts.0, n, a.cols()),
            Mat::dense(parts.1, n, b.cols()),
        );
        use_them(views.0, views.1);
    });
}

/// Makes the weights' gradients, `⟨d(act), act⟩`, and multiplies the activations' gradients with the weights.
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
    experts: Experts<'_>,
    slots: Slots<'_>,
    saved: Saved<'_>,
    dy: &[f32],
) -> (InputGrads, [Vec<f32>; 3]) {
    let size = experts.hidden * experts.inner;
    let mut stacks = [GATE, UP, DOWN].map(|_| vec![0.0; experts.n_experts * size]);
    let outputs = stacks.each_mut().map(|stack| experts.by_expert(stack));
    let grads = backward(experts, slots, saved, dy, |group| {
        group.for_each_projection(|projection, expert| {
            // SAFETY: each projection of each expert comes once.
            #[expect(unsafe_code, reason = "disjoint rows of three outputs")]
            let mut dw = unsafe { outputs[projection].part(expert..expert + 1, 0..size) };
            let of = (experts, slots, saved);
            group.with_operands(of, dy, (projection, expert), |x, dy| {
                let compute = experts.compute;
                with_rounded_columns([x, dy], compute.before_products(), |x, dy| {
                    let dw = MatMut::dense(dw.values(), dy.cols(), x.cols());
                    compute.multiply(dw, dy.t(), x, Write::Replace);
                });
            });
        });
    });
    (grads, stacks)
}

/// Gradients of the inputs, and of the factors `a [experts, rank, in]` and `b [experts, out, rank]` of gate, up and
/// down.
pub(crate) fn backward_updated(
    experts: Experts<'_>,
    slots: Slots<'_>,
    saved: Saved<'_>,
    dy: &[f32],
) -> (InputGrads, [[Vec<f32>; 2]; 3]) {
    let mut stacks = [GATE, UP, DOWN].map(|projection| {
        let (widths, rank) = (experts.widths(projection), experts.factors[projection].rank);
        widths.map(|width| vec![0.0; experts.n_experts * rank * width])
    });
    let outputs = stacks
        .each_mut()
        .map(|pair| pair.each_mut().map(|stack| experts.by_expert(stack)));
    let grads = backward(experts, slots, saved, dy, |group| {
        group.for_each_projection(|projection, expert| {
            // SAFETY: each projection of each expert comes once.
            #[expect(unsafe_code, reason = "disjoint rows of six outputs")]
            let grads = unsafe {
                outputs[projection]
                    .each_ref()
                    .map(|all| all.part(expert..expert + 1, 0..all.cols()))
            };
            let of = (experts, slots, saved);
            group.with_operands(of, dy, (projection, expert), |x, dy| {
                experts.factor_grads(
                    projection,
                    (expert, slots.of_expert(expert)),
                    [x, dy],
                    grads,
                );
            });
        });
    });
    (grads, stacks)
}

/// Gradients of the inputs alone.
pub(crate) fn backward_inputs(
    experts: Experts<'_>,
    slots: Slots<'_>,
    saved: Saved<'_>,
    dy: &[f32],
) -> InputGrads {
    backward(experts, slots, saved, dy, |_| {})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::noise;
    use crate::route;

    /// Groups of experts depend on the number of threads; what they give does not.
    #[test]
    fn the_number_of_threads_changes_groups_and_no_bit() {
        let [tokens, n_experts, top_k, hidden, inner, rank] = [4000, 5, 2, 6, 3, 2];
        let size = hidden * inner;
        let stacks = [1, 2, 3].map(|seed| noise(n_experts * size, seed));
        let factors = [4, 5].map(|seed| noise(n_experts * rank * hidden.max(inner), seed));
        let [a, b] = factors.each_ref();
        let factors = Factors { a, b, rank };
        let experts = Experts {
            weights: Source::Trained(stacks.each_ref().map(Vec::as_slice)),
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
        };
        let (x, dy) = (noise(tokens * hidden, 6), noise(tokens * hidden, 7));
        let weights = noise(tokens * top_k, 8);
        let run = || {
            let (y, gate, up) = forward(experts, slots, &x, &weights);
            let saved = Saved {
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
