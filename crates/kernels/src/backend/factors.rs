//! Low-rank factors as the traits take them, present or absent.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};

use crate::backend::traits::FactorsPrimitive;
use crate::ops::experts::ExpertBank;

/// The factors of an update, or tensors of rank 0 in their place, on the device of `like`.
///
/// Burn maps no `Option` between a backend and its wrappers, so an absent update crosses the traits as factors of rank
/// 0. This is the only place that makes them.
pub(crate) fn or_rank_zero<B: Backend, const D: usize>(
    factors: Option<[FloatTensor<B>; 2]>,
    shapes: [[usize; D]; 2],
    like: &FloatTensor<B>,
) -> [FloatTensor<B>; 2] {
    let (device, dtype) = (like.device(), like.dtype().into());
    factors.unwrap_or_else(|| shapes.map(|shape| B::float_zeros(shape.into(), &device, dtype)))
}

/// The factors of gate, up and down of a bank's experts, each present or not, on the device of `like`.
pub(crate) fn expert_factors<B: Backend>(
    [gate, up, down]: [Option<[FloatTensor<B>; 2]>; 3],
    bank: &ExpertBank,
    like: &FloatTensor<B>,
) -> FactorsPrimitive<B> {
    let [experts, inner, hidden] = [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols()];
    let pair = |factors, width_in, width_out| {
        let shapes = [[experts, 0, width_in], [experts, width_out, 0]];
        or_rank_zero::<B, 3>(factors, shapes, like)
    };
    let [gate_a, gate_b] = pair(gate, hidden, inner);
    let [up_a, up_b] = pair(up, hidden, inner);
    let [down_a, down_b] = pair(down, inner, hidden);
    FactorsPrimitive {
        gate_a,
        gate_b,
        up_a,
        up_b,
        down_a,
        down_b,
    }
}
