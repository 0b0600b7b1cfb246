//! Fused operations as compositions of others: the definition that autodiff differentiates, and the fallback of a
//! backend without a fused kernel.

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;

use crate::backend::factors::expert_factors;
use crate::backend::traits::{Kernels, RoutingPrimitive};
use crate::formats::Matrix;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts};
use crate::settings::Compute;

/// See [`Kernels::linear_frozen_pair`].
pub(crate) fn linear_frozen_pair<B: Kernels>(
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
pub(crate) fn moe_frozen<B: Kernels>(
    x: FloatTensor<B>,
    routing: RoutingPrimitive<B>,
    bank: Arc<ExpertBank>,
    shared: SharedExperts,
    compute: Compute,
) -> FloatTensor<B> {
    let factors = expert_factors::<B>([None, None, None], &bank, &x);
    let lora = ExpertLora::none();
    let (y, ..) = B::experts_frozen(x.clone(), routing, factors, bank, lora, compute);
    let (gate, up) = B::linear_frozen_pair(x, shared.gate, shared.up, shared.compute);
    let act = B::swiglu(gate, up, shared.compute);
    B::float_add(y, B::linear_frozen(act, shared.down, shared.compute))
}
