//! Operations that are others one after the other: what they mean, how they are differentiated, and what they are where
//! nothing is gained by making them at once.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;

use crate::backend::ops::{FactorsPrimitive, Kernels, RoutingPrimitive};
use crate::formats::Matrix;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts};
use crate::settings::Compute;

/// See [`Kernels::linear_frozen_pair`].
pub(super) fn linear_frozen_pair<B: Kernels>(
    x: FloatTensor<B>,
    [first, second]: [Arc<Matrix>; 2],
    compute: Compute,
) -> (FloatTensor<B>, FloatTensor<B>) {
    (
        B::linear_frozen(x.clone(), first, compute),
        B::linear_frozen(x, second, compute),
    )
}

/// See [`Kernels::moe_frozen`].
pub(super) fn moe_frozen<B: Kernels>(
    x: FloatTensor<B>,
    routing: RoutingPrimitive<B>,
    bank: Arc<ExpertBank>,
    shared: SharedExperts,
    compute: Compute,
) -> FloatTensor<B> {
    let (factors, lora) = (no_factors::<B>(&x, &bank), ExpertLora::none());
    let (y, ..) = B::experts_frozen(x.clone(), routing, factors, bank, lora, compute);
    let (gate, up) = B::linear_frozen_pair(x, shared.gate, shared.up, shared.compute);
    let act = B::swiglu(gate, up, shared.compute);
    B::float_add(y, B::linear_frozen(act, shared.down, shared.compute))
}

/// Factors of rank 0.
fn no_factors<B: Kernels>(x: &FloatTensor<B>, bank: &ExpertBank) -> FactorsPrimitive<B> {
    let (device, dtype) = (x.device(), x.dtype().into());
    let [experts, inner, hidden] = [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols()];
    let none = |shape: [usize; 3]| B::float_zeros(shape.into(), &device, dtype);
    FactorsPrimitive {
        gate_a: none([experts, 0, hidden]),
        gate_b: none([experts, inner, 0]),
        up_a: none([experts, 0, hidden]),
        up_b: none([experts, inner, 0]),
        down_a: none([experts, 0, inner]),
        down_b: none([experts, hidden, 0]),
    }
}
