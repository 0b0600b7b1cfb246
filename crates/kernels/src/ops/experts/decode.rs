//! The experts of a few tokens, for decoding.
//!
//! There are two parallel loops. The first multiplies the gate and up projections of every chosen expert with its
//! tokens, straight from the stored bytes; the second does the same with down. Shared experts take part in both. A task
//! takes some rows of one weight, so one token's experts occupy all threads. Experts that no token chose are not read.

use std::ops::Range;

use super::bank::{ExpertBank, SharedExperts};
use super::routed::{DOWN, GATE, RoutedExperts, UP};
use super::slots::Slots;
use crate::gemv::{GemvInput, GemvProduct, MAX_GEMV_ROWS, PackedWeight, multiply_all};
use crate::matmul::{LayerPass, WeightOperand, gemm, plan};
use crate::memory::{Mat, MatMut, with_scratch};
use crate::ops::swiglu;
use crate::settings::{Accumulate, Compute};

/// A projection of an expert, with the positions of its slots.
struct ExpertProjection<'a> {
    projection: usize,
    expert: usize,
    places: Range<usize>,
    weight: PackedWeight<'a>,
}

/// The shared experts.
struct PackedShared<'a> {
    /// Gate, up and down.
    weights: [PackedWeight<'a>; 3],
    inner: usize,
}

impl<'a> PackedShared<'a> {
    /// `None` if products do not read the stored bytes of a weight.
    fn new(shared: &'a SharedExperts) -> Option<Self> {
        let packed = |w| packed(WeightOperand::frozen(w, shared.compute));
        Some(Self {
            weights: [
                packed(&shared.gate)?,
                packed(&shared.up)?,
                packed(&shared.down)?,
            ],
            inner: shared.gate.rows(),
        })
    }
}

/// The weight, if products with few rows read its stored bytes.
fn packed(w: WeightOperand<'_>) -> Option<PackedWeight<'_>> {
    plan(&w, MAX_GEMV_ROWS, LayerPass::Forward).packed()
}

/// Whether products read the stored bytes of all weights, of a bank (judged by its first expert) and of shared experts.
pub(super) fn serves(bank: &ExpertBank, shared: &SharedExperts, compute: Compute) -> bool {
    let first = [&bank.gate, &bank.up, &bank.down].map(|list| list.first());
    let mut first = first.into_iter().flatten();
    first.all(|w| packed(WeightOperand::frozen(w, compute)).is_some())
        && PackedShared::new(shared).is_some()
}

/// [`super::forward`] for few tokens, if products read the stored bytes of all weights; otherwise `None`. The output of
/// shared experts, if any, is added to `y`.
pub(super) fn forward(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
    shared: Option<&SharedExperts>,
) -> Option<(Vec<f32>, Vec<f32>, Vec<f32>)> {
    let RoutedExperts { hidden, inner, .. } = experts;
    let (n_slots, tokens) = (slots.order.len(), x.len() / hidden.max(1));
    if slots.tokens(tokens) > MAX_GEMV_ROWS || !experts.lora.dropout.is_off() {
        return None;
    }
    let first = active_projections(experts, slots, &[GATE, UP])?;
    let second = active_projections(experts, slots, &[DOWN])?;
    let of_all = match shared {
        Some(shared) => Some(PackedShared::new(shared)?),
        None => None,
    };
    let of_all = of_all.as_ref();
    let shared_weights = of_all.map_or(&[][..], |shared| &shared.weights);
    let (gate_up, down) = shared_weights.split_at(shared_weights.len() / 3 * 2);

    let token_of: Vec<usize> = (0..n_slots).map(|at| slots.token(at)).collect();
    let order: Vec<usize> = (0..n_slots).collect();
    let mut routed = MlpBuffers::new([n_slots, inner, hidden]);
    let shared_inner = of_all.map_or(0, |shared| shared.inner);
    let mut common = MlpBuffers::new([tokens, shared_inner, hidden]);

    let input = GemvInput::new(
        Mat::dense(x, tokens, hidden),
        weights_of(&first).chain(gate_up),
    );
    let outputs = [routed.products(), common.products()];
    let own = RoutedProducts {
        projections: &first,
        rows: &token_of,
        input: &input,
    };
    multiply(experts, own, (gate_up, &input), outputs);
    let ((act, rows), (common_act, common_rows)) = (routed.activate(), common.activate());
    let (act, common_act) = (
        GemvInput::new(act, weights_of(&second)),
        GemvInput::new(common_act, down),
    );
    let own = RoutedProducts {
        projections: &second,
        rows: &order,
        input: &act,
    };
    multiply(experts, own, (down, &common_act), [[rows], [common_rows]]);

    let mut y = vec![0.0; x.len()];
    add_rows(slots, &routed.out, hidden, weights, &mut y);
    if of_all.is_some() {
        let rows = y.iter_mut().zip(&common.out);
        rows.for_each(|(y, row)| *y += *row);
    }
    Some((y, routed.gate, routed.up))
}

/// The activations of rows in experts of one width.
struct MlpBuffers {
    /// The number of rows, the inner width and the output width.
    size: [usize; 3],
    gate: Vec<f32>,
    up: Vec<f32>,
    act: Vec<f32>,
    out: Vec<f32>,
}

impl MlpBuffers {
    fn new([n, inner, hidden]: [usize; 3]) -> Self {
        let zeros = |width| vec![0.0; n * width];
        Self {
            size: [n, inner, hidden],
            gate: zeros(inner),
            up: zeros(inner),
            act: zeros(inner),
            out: zeros(hidden),
        }
    }

    /// The outputs of gate and up.
    fn products(&mut self) -> [MatMut<'_>; 2] {
        let [n, inner, _] = self.size;
        [&mut self.gate, &mut self.up].map(|all| MatMut::dense(all, n, inner))
    }

    /// The input and the output of down.
    fn activate(&mut self) -> (Mat<'_>, MatMut<'_>) {
        let [n, inner, hidden] = self.size;
        swiglu::forward(&self.gate, &self.up, &mut self.act);
        (
            Mat::dense(&self.act, n, inner),
            MatMut::dense(&mut self.out, n, hidden),
        )
    }
}

/// The projections of all experts that have slots.
fn active_projections<'a>(
    experts: RoutedExperts<'a>,
    slots: Slots<'_>,
    projections: &[usize],
) -> Option<Vec<ExpertProjection<'a>>> {
    let mut active = Vec::new();
    for expert in 0..slots.offsets.len() - 1 {
        let places = slots.of_expert(expert);
        if places.is_empty() {
            continue;
        }
        for &projection in projections {
            active.push(ExpertProjection {
                projection,
                expert,
                places: places.clone(),
                weight: packed(experts.weights(projection, expert))?,
            });
        }
    }
    Some(active)
}

fn weights_of<'p, 'w>(
    projections: &'p [ExpertProjection<'w>],
) -> impl Iterator<Item = &'p PackedWeight<'w>> {
    projections.iter().map(|part| &part.weight)
}

/// Projections of routed experts, and the rows of the input at all slots.
#[derive(Clone, Copy)]
struct RoutedProducts<'a> {
    projections: &'a [ExpertProjection<'a>],
    rows: &'a [usize],
    input: &'a GemvInput<'a>,
}

/// Multiplies each projection with its rows of the input, and the shared experts' weights with every row of theirs.
fn multiply<const N: usize>(
    experts: RoutedExperts<'_>,
    routed: RoutedProducts<'_>,
    (shared, shared_input): (&[PackedWeight<'_>], &GemvInput<'_>),
    [outputs, shared_outputs]: [[MatMut<'_>; N]; 2],
) {
    let tokens: Vec<usize> = (0..shared_input.floats().rows()).collect();
    let RoutedProducts {
        projections,
        rows,
        input,
    } = routed;
    let own = projections.iter().map(|part| {
        let all = &outputs[part.projection % N];
        GemvProduct {
            weight: part.weight,
            input,
            rows: &rows[part.places.clone()],
            // SAFETY: parts are different places, or of different projections.
            #[expect(unsafe_code, reason = "disjoint rows of the outputs")]
            y: unsafe { all.part(part.places.clone(), 0..all.cols()) },
            accumulate: Accumulate::Replace,
        }
    });
    let of_all = shared
        .iter()
        .zip(shared_outputs)
        .map(|(weight, y)| GemvProduct {
            weight: *weight,
            input: shared_input,
            rows: &tokens,
            y,
            accumulate: Accumulate::Replace,
        });
    let products: Vec<GemvProduct<'_>> = own.chain(of_all).collect();
    multiply_all(&products, |product, outs, y| {
        if let Some(part) = projections.get(product) {
            let rows = &rows[part.places.clone()];
            add_update(experts, part, input.floats(), rows, outs, y);
        }
    });
}

/// Adds the low-rank update to some outputs of a projection, if it has one.
fn add_update(
    experts: RoutedExperts<'_>,
    part: &ExpertProjection<'_>,
    x: Mat<'_>,
    rows: &[usize],
    outs: Range<usize>,
    mut y: MatMut<'_>,
) {
    let Some((a, b)) = experts.activation_factors(part.projection, part.expert) else {
        return;
    };
    let (rank, scale) = (a.rows(), experts.lora.scale[part.projection]);
    let b = b.block(outs.clone(), 0..rank);
    with_scratch(rank, |low| {
        for (i, row) in rows.iter().enumerate() {
            let x = x.block(*row..*row + 1, 0..x.cols());
            gemm(
                MatMut::dense(low, 1, rank),
                x,
                a.t(),
                1.0,
                Accumulate::Replace,
            );
            let y = y.block(i..i + 1, 0..outs.len());
            gemm(y, Mat::dense(low, 1, rank), b.t(), scale, Accumulate::Add);
        }
    });
}

/// Adds every slot's row, times its weight, to its token's row, in the order of the experts. [`Slots::add_rows`] has a
/// task per token, which is too much for a few.
fn add_rows(slots: Slots<'_>, rows: &[f32], width: usize, weights: &[f32], sums: &mut [f32]) {
    let places = slots.places(0..slots.offsets.len() - 1);
    for at in places {
        let (slot, token) = (slots.order[at] as usize, slots.token(at));
        let (sum, row) = (
            &mut sums[token * width..][..width],
            &rows[at * width..][..width],
        );
        let weight = weights[slot];
        sum.iter_mut()
            .zip(row)
            .for_each(|(sum, row)| *sum += weight * row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Format, Ggml, Matrix};
    use crate::ops::dropout::Dropout;
    use crate::ops::experts::grouped::forward_in_groups;
    use crate::ops::experts::routed::{ExpertLora, ExpertOperands, StackedFactors};
    use crate::ops::route;
    use crate::testing::{every_block_format, every_format, noise};

    /// Two experts for each token, of five; the last expert's slots belong to nobody here.
    fn check(bank: &ExpertBank, rank: usize, tolerance: f32) {
        let [inner, hidden] = [bank.gate[0].rows(), bank.gate[0].cols()];
        let (n, top_k) = (bank.gate.len(), 2);
        let factors = [noise(n * rank * hidden, 1), noise(n * rank * hidden, 2)];
        let [a, b] = factors.each_ref();
        let experts = RoutedExperts {
            weights: ExpertOperands::Frozen(bank, &[]),
            factors: [StackedFactors { a, b, rank }; 3],
            lora: ExpertLora {
                scale: [0.01; 3],
                dropout: Dropout::OFF,
                quantizer: None,
            },
            compute: Compute::MatchWeight,
            hidden,
            inner,
            n_experts: n,
        };
        for tokens in [1, 3, 8] {
            let ids: Vec<i32> = (0..tokens as i32)
                .flat_map(|token| [token * token % 3, 3 + token % 3])
                .collect();
            let (order, offsets) = route::dispatch(&ids, n + 1);
            let slots = Slots {
                order: &order,
                offsets: &offsets[..n + 1],
                top_k,
                part: None,
            };
            let (x, weights) = (noise(tokens * hidden, 6), noise(tokens * top_k, 8));
            let found = forward(experts, slots, &x, &weights, None).unwrap();
            let expected = forward_in_groups(experts, slots, &x, &weights);
            for (found, expected) in [(found.0, expected.0), (found.1, expected.1)] {
                let size = expected.iter().fold(1f32, |size, v| size.max(v.abs()));
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(
                        (found - expected).abs() <= tolerance * size,
                        "{found} {expected}"
                    );
                }
                assert!(expected.iter().any(|v| *v != 0.0));
            }
        }
    }

    /// Experts of `[inner, hidden]`, cut out of matrices with more rows.
    fn bank(of: impl Fn(usize, usize) -> Matrix, inner: usize, hidden: usize) -> ExpertBank {
        let list = |rows: usize, cols: usize| (0..5).map(|_| of(rows, cols)).collect();
        ExpertBank::new(
            list(inner, hidden),
            list(inner, hidden),
            list(hidden, inner),
        )
    }

    #[test]
    fn few_tokens_get_what_many_do() {
        // Codes of blocks mean large numbers, so only the order of the sums is another.
        for format in 0..every_block_format(1).len() {
            let of = |rows, _| every_block_format(rows).remove(format);
            // Its scales reach 2^47, and the products of such weights are no numbers.
            if matches!(of(1, 512).format(), Format::Ggml(Ggml::MxFp4)) {
                continue;
            }
            check(&bank(of, 512, 512), 0, 1e-5);
        }
        for format in 0..3 {
            let of = |rows, cols| every_format(rows, cols, 3).remove(format);
            check(&bank(of, 24, 37), 0, 1e-4);
            check(&bank(of, 24, 37), 2, 1e-4);
        }
    }
}
