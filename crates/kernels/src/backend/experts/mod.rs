//! Routed experts: choosing and dispatching them, and the weighted sums of their outputs.

pub(crate) mod autodiff;
pub(crate) mod flex;

use std::sync::Arc;

use burn::backend::{Dispatch, DispatchTensor};
use burn::tensor::{Int, Tensor};

use crate::backend::factors;
use crate::backend::supplied::SuppliedGradients;
use crate::backend::traits::{FactorsPrimitive, Kernels, RoutingPrimitive, StacksPrimitive};
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts, SlotPart};
use crate::ops::route::TopK;
use crate::settings::Compute;

/// The top-k experts of every token, best first. Has no gradient.
///
/// # Shapes
/// - `scores`: `[tokens, experts]`
/// - returns: `[tokens, top_k]`
///
/// # Panics
/// If the groups do not divide the experts, or hold fewer than `top_k` open experts.
pub fn choose_experts(scores: Tensor<2>, choice: TopK) -> Tensor<2, Int> {
    let experts = scores.dims()[1];
    let open = if choice.n_group > 1 {
        experts / choice.n_group * choice.topk_group
    } else {
        experts
    };
    assert!(
        experts.is_multiple_of(choice.n_group) && choice.top_k <= open,
        "{choice:?} of {experts} experts"
    );
    Tensor::from_dispatch(Dispatch::choose_experts(scores.into_dispatch(), choice))
}

/// Sorts the (token, expert) slots by expert, stably.
///
/// # Shapes
/// - `ids`: `[tokens, top_k]`
/// - returns: slot order `[slots]` and offsets `[experts + 1]`
///
/// # Panics
/// If an id is not below `experts`.
pub fn dispatch(ids: Tensor<2, Int>, experts: usize) -> (Tensor<1, Int>, Tensor<1, Int>) {
    let (order, offsets) = Dispatch::dispatch_slots(ids.into_dispatch(), experts);
    (Tensor::from_dispatch(order), Tensor::from_dispatch(offsets))
}

/// Prefetches experts that the next pass through a bank will probably choose, if they are not in its cache. Affects
/// only when they are read from their file.
///
/// # Shapes
/// - `ids`: `[tokens, experts]`, the most probable of a token first
///
/// # Panics
/// If there is no such expert.
pub fn prefetch_experts(ids: Tensor<2, Int>, bank: &Arc<ExpertBank>) {
    Dispatch::prefetch_experts(ids.into_dispatch(), Arc::clone(bank));
}

/// Slots sorted by expert, and the weight of each.
#[derive(Clone, Debug)]
pub struct Routing {
    /// `[tokens, top_k]`.
    pub weights: Tensor<2>,
    /// `[slots]`, see [`dispatch`].
    pub order: Tensor<1, Int>,
    /// `[experts + 1]`; slots behind the last one are served elsewhere and count as zero.
    pub offsets: Tensor<1, Int>,
    /// What these slots are a part of, if they are not a whole micro-batch's; for the CPU.
    pub part: Option<SlotPart>,
}

/// Low-rank factors of a layer's experts, `a [experts, rank, in]` and `b [experts, out, rank]` of each projection with
/// an update.
#[derive(Clone, Debug, Default)]
pub struct ExpertFactors {
    /// Factors of the gate projection.
    pub gate: Option<[Tensor<3>; 2]>,
    /// Factors of the up projection.
    pub up: Option<[Tensor<3>; 2]>,
    /// Factors of the down projection.
    pub down: Option<[Tensor<3>; 2]>,
}

/// The weighted sum of every token's experts, with frozen weights and low-rank updates.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If the sizes do not fit.
pub fn experts_frozen(
    x: Tensor<2>,
    routing: Routing,
    bank: &Arc<ExpertBank>,
    factors: ExpertFactors,
    lora: ExpertLora,
    compute: Compute,
) -> Tensor<2> {
    let x = x.into_dispatch();
    let factors = factors.into_primitive(bank, &x);
    let (routing, bank) = (routing.into(), Arc::clone(bank));
    let (y, ..) = Dispatch::experts_frozen(x, routing, factors, bank, lora, compute);
    Tensor::from_dispatch(y)
}

/// [`experts_frozen`] without updates, plus the shared experts; fused for few tokens.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If the sizes do not fit.
pub fn moe_frozen(
    x: Tensor<2>,
    routing: Routing,
    bank: &Arc<ExpertBank>,
    shared: SharedExperts,
    compute: Compute,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::moe_frozen(
        x.into_dispatch(),
        routing.into(),
        Arc::clone(bank),
        shared,
        compute,
    ))
}

/// The weighted sum of every token's experts, with trained weights.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - `gate`, `up`: `[experts, inner, hidden_size]`, `down`: `[experts, hidden_size, inner]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If the sizes do not fit.
pub fn experts_trained(
    x: Tensor<2>,
    routing: Routing,
    [gate, up, down]: [Tensor<3>; 3],
    compute: Compute,
) -> Tensor<2> {
    let stacks = StacksPrimitive {
        gate: gate.into_dispatch(),
        up: up.into_dispatch(),
        down: down.into_dispatch(),
    };
    Tensor::from_dispatch(
        Dispatch::experts_trained(x.into_dispatch(), routing.into(), stacks, compute).0,
    )
}

/// The weighted sum of every token's experts, `y`, if it was computed elsewhere. Its gradients come from there too: they are
/// supplied before the graph is differentiated.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`, `weights`: `[tokens, top_k]`, `y`: `[tokens, hidden_size]`
/// - returns: `y`, which depends on the other two
///
/// # Panics
/// When the graph is differentiated, if no gradients were supplied.
pub fn computed_elsewhere(
    x: Tensor<2>,
    weights: Tensor<2>,
    y: Tensor<2>,
    gradients: SuppliedGradients,
) -> Tensor<2> {
    let [x, weights, y] = [x, weights, y].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::computed_elsewhere(x, weights, y, gradients))
}

impl From<Routing> for RoutingPrimitive<Dispatch> {
    fn from(routing: Routing) -> Self {
        Self {
            weights: routing.weights.into_dispatch(),
            order: routing.order.into_dispatch(),
            offsets: routing.offsets.into_dispatch(),
            part: routing.part,
        }
    }
}

impl ExpertFactors {
    /// The factors of a bank's experts on the device of `x`.
    fn into_primitive(self, bank: &ExpertBank, x: &DispatchTensor) -> FactorsPrimitive<Dispatch> {
        let pairs = [self.gate, self.up, self.down];
        let pairs = pairs.map(|pair| pair.map(|pair| pair.map(Tensor::into_dispatch)));
        factors::expert_factors::<Dispatch>(pairs, bank, x)
    }
}
