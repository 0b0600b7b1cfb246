//! The experts of a few tokens: what decoding is made of.
//!
//! Two parts run on all threads. The first multiplies every chosen expert's gate and up with its tokens, straight on the
//! stored bytes; the second does the same with down. A task takes some rows of one weight, so that one token's experts
//! occupy all threads; nothing of an expert that no token chose is read.

use std::ops::Range;

use super::{DOWN, Experts, GATE, Slots, UP};
use crate::product::gemm::{row_tasks, with_scratch};
use crate::product::strided::{Mat, MatMut, Write, gemm};
use crate::product::team::{Pieces, share_quickly};
use crate::rows::{Input, MOST_ROWS, Packed};
use crate::swiglu;

/// A projection of an expert, with the places of its slots.
struct Part<'a> {
    projection: usize,
    expert: usize,
    places: Range<usize>,
    weight: Packed<'a>,
    outs: Pieces,
}

/// [`super::forward`] where tokens are few and all weights have products of rows; none otherwise.
pub(super) fn forward(
    experts: Experts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
) -> Option<(Vec<f32>, Vec<f32>, Vec<f32>)> {
    let Experts { hidden, inner, .. } = experts;
    let (n_slots, tokens) = (slots.order.len(), x.len() / hidden.max(1));
    if tokens > MOST_ROWS || !experts.lora.dropout.is_off() {
        return None;
    }
    let (first, second) = (
        parts(experts, slots, &[GATE, UP])?,
        parts(experts, slots, &[DOWN])?,
    );
    let mut y = vec![0.0; x.len()];
    let (mut gate, mut up) = (vec![0.0; n_slots * inner], vec![0.0; n_slots * inner]);
    let token_of: Vec<usize> = (0..n_slots).map(|at| slots.token(at)).collect();
    let x = Mat::dense(x, tokens, hidden);
    let outputs = [&mut gate, &mut up].map(|all| MatMut::dense(all, n_slots, inner));
    multiply(experts, &first, x, &token_of, outputs);

    let order: Vec<usize> = (0..n_slots).collect();
    with_scratch(n_slots * (inner + hidden), |scratch| {
        let (act, rows) = scratch.split_at_mut(n_slots * inner);
        swiglu::forward(&gate, &up, act);
        let output = [MatMut::dense(rows, n_slots, hidden)];
        multiply(
            experts,
            &second,
            Mat::dense(act, n_slots, inner),
            &order,
            output,
        );
        add_rows(slots, (rows, hidden), weights, &mut y);
    });
    Some((y, gate, up))
}

/// The projections of all experts that have slots.
fn parts<'a>(
    experts: Experts<'a>,
    slots: Slots<'_>,
    projections: &[usize],
) -> Option<Vec<Part<'a>>> {
    let mut parts = Vec::new();
    for expert in 0..slots.offsets.len() - 1 {
        let places = slots.of_expert(expert);
        for &projection in projections {
            if places.is_empty() {
                continue;
            }
            let weight = experts.weights(projection, expert).packed()?;
            let [_, out_width] = experts.widths(projection);
            parts.push(Part {
                projection,
                expert,
                places: places.clone(),
                weight,
                outs: row_tasks(out_width, weight.row_bytes()),
            });
        }
    }
    Some(parts)
}

/// Multiplies each part with the rows of `x` of its places, into the output of its projection.
fn multiply<const N: usize>(
    experts: Experts<'_>,
    parts: &[Part<'_>],
    x: Mat<'_>,
    rows: &[usize],
    outputs: [MatMut<'_>; N],
) {
    let Some(first) = parts.first() else { return };
    // All of a layer's experts are mostly in one format; where not, each form is made once.
    let own = first.weight.input(x);
    let other = parts.iter().find(|part| !part.weight.reads(&own));
    let other = other.map(|part| part.weight.input(x));
    let input = |part: &Part<'_>| -> &Input<'_> {
        match &other {
            Some(other) if !part.weight.reads(&own) => other,
            _ => &own,
        }
    };
    let tasks: Vec<(usize, usize)> = (0..parts.len())
        .flat_map(|part| (0..parts[part].outs.len()).map(move |piece| (part, piece)))
        .collect();
    share_quickly(tasks.len(), |task| {
        let (part, piece) = tasks[task];
        let part = &parts[part];
        let (outs, output) = (part.outs.get(piece), &outputs[part.projection % N]);
        // SAFETY: tasks are different rows of a weight, or different places.
        #[expect(unsafe_code, reason = "disjoint parts of the outputs")]
        let mut y = unsafe { output.part(part.places.clone(), outs.clone()) };
        let rows = &rows[part.places.clone()];
        let whole = y.block(0..rows.len(), 0..outs.len());
        part.weight
            .multiply((input(part), rows), outs.clone(), whole, Write::Replace);
        add_update(experts, part, (x, rows), outs, y);
    });
}

/// Adds the low-rank update of some outputs of a part, if it has one.
fn add_update(
    experts: Experts<'_>,
    part: &Part<'_>,
    (x, rows): (Mat<'_>, &[usize]),
    outs: Range<usize>,
    mut y: MatMut<'_>,
) {
    let Some((a, b)) = experts.factors_beside(part.projection, part.expert) else {
        return;
    };
    let (rank, scale) = (a.rows(), experts.lora.scale[part.projection]);
    let b = b.block(outs.clone(), 0..rank);
    with_scratch(rank, |low| {
        for (i, row) in rows.iter().enumerate() {
            let x = x.block(*row..*row + 1, 0..x.cols());
            gemm(MatMut::dense(low, 1, rank), x, a.t(), 1.0, Write::Replace);
            let y = y.block(i..i + 1, 0..outs.len());
            gemm(y, Mat::dense(low, 1, rank), b.t(), scale, Write::Add);
        }
    });
}

/// Adds every slot's row, times its weight, to its token's, in the order of the experts. [`Slots::add_rows`] does it with
/// a task for each token, which a few are not worth.
fn add_rows(slots: Slots<'_>, (rows, width): (&[f32], usize), weights: &[f32], sums: &mut [f32]) {
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
    use crate::experts::{ExpertBank, ExpertLora, Factors, Source, forward_in_groups};
    use crate::matrix::tests::{every_block_format, every_format, noise};
    use crate::{Compute, Dropout, Format, Ggml, Matrix, route};

    /// Two experts for each token, of five; the last expert's slots belong to nobody here.
    fn check(bank: &ExpertBank, rank: usize, tolerance: f32) {
        let [inner, hidden] = [bank.gate[0].rows(), bank.gate[0].cols()];
        let (n, top_k) = (bank.gate.len(), 2);
        let factors = [noise(n * rank * hidden, 1), noise(n * rank * hidden, 2)];
        let [a, b] = factors.each_ref();
        let experts = Experts {
            weights: Source::Frozen(bank),
            factors: [Factors { a, b, rank }; 3],
            lora: ExpertLora {
                scale: [0.01; 3],
                dropout: Dropout::OFF,
                quantizer: None,
            },
            compute: Compute::Int8,
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
            };
            let (x, weights) = (noise(tokens * hidden, 6), noise(tokens * top_k, 8));
            let found = forward(experts, slots, &x, &weights).unwrap();
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
        ExpertBank {
            gate: list(inner, hidden),
            up: list(inner, hidden),
            down: list(hidden, inner),
        }
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
