//! Experts under autodiff.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::TensorMetadata;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{Device, FloatTensor};

use crate::backend::gradients::{ExpertsSaved, Gradients, Tracked, backward_step, register};
use crate::backend::supplied::SuppliedGradients;
use crate::backend::traits::{FactorsPrimitive, RoutingPrimitive, StacksPrimitive};
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::settings::Compute;

pub(crate) fn experts_frozen<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    routing: RoutingPrimitive<Autodiff<B, C>>,
    factors: FactorsPrimitive<Autodiff<B, C>>,
    bank: Arc<ExpertBank>,
    lora: ExpertLora,
    compute: Compute,
) -> (Tracked<B>, FloatTensor<B>, FloatTensor<B>) {
    let (id, f) = (x.id(), &factors);
    let nodes = [
        &x,
        &routing.weights,
        &f.gate_a,
        &f.gate_b,
        &f.up_a,
        &f.up_b,
        &f.down_a,
        &f.down_b,
    ]
    .map(|t| t.node());
    let (x, routing, factors) = (
        x.into_primitive(),
        inner_routing(routing),
        inner_factors(factors),
    );
    let (y, gate, up) = B::experts_frozen(
        x.clone(),
        routing.clone(),
        factors.clone(),
        Arc::clone(&bank),
        lora,
        compute,
    );
    let op = ExpertsFrozenBackward.prepare::<C>(nodes).compute_bound();
    let y = match op.stateful() {
        OpsKind::Tracked(op) => {
            let products = [gate.clone(), up.clone()];
            let saved = ExpertsSaved::new(id, x, routing, products, compute);
            op.finish((saved, factors, bank, lora), y)
        }
        OpsKind::UnTracked(op) => op.finish(y),
    };
    (y, gate, up)
}

backward_step!(
    ExpertsFrozenBackward,
    8,
    (
        ExpertsSaved<B>,
        FactorsPrimitive<B>,
        Arc<ExpertBank>,
        ExpertLora
    ),
    |dy, parents, (saved, factors, bank, lora), grads| {
        let [x, weights, factor_nodes @ ..] = parents;
        let want_factors = factor_nodes.iter().any(Option::is_some);
        let (inputs, factors) =
            B::experts_frozen_grads(dy, saved, &factors, &bank, lora, want_factors);
        register::<B>(grads, [x, weights], inputs);
        register::<B>(grads, factor_nodes, factors.into_iter().flatten());
    }
);

pub(crate) fn experts_trained<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    routing: RoutingPrimitive<Autodiff<B, C>>,
    stacks: StacksPrimitive<Autodiff<B, C>>,
    compute: Compute,
) -> (Tracked<B>, FloatTensor<B>, FloatTensor<B>) {
    let id = x.id();
    let nodes = [&x, &routing.weights, &stacks.gate, &stacks.up, &stacks.down].map(|t| t.node());
    let (x, routing) = (x.into_primitive(), inner_routing(routing));
    let stacks = StacksPrimitive {
        gate: stacks.gate.into_primitive(),
        up: stacks.up.into_primitive(),
        down: stacks.down.into_primitive(),
    };
    let (y, gate, up) = B::experts_trained(x.clone(), routing.clone(), stacks.clone(), compute);
    let op = ExpertsTrainedBackward.prepare::<C>(nodes).compute_bound();
    let y = match op.stateful() {
        OpsKind::Tracked(op) => {
            let products = [gate.clone(), up.clone()];
            let saved = ExpertsSaved::new(id, x, routing, products, compute);
            op.finish((saved, stacks), y)
        }
        OpsKind::UnTracked(op) => op.finish(y),
    };
    (y, gate, up)
}

backward_step!(
    ExpertsTrainedBackward,
    5,
    (ExpertsSaved<B>, StacksPrimitive<B>),
    |dy, parents, (saved, stacks), grads| {
        let [x, weights, stack_nodes @ ..] = parents;
        let (inputs, stacks) = B::experts_trained_grads(dy, saved, &stacks);
        register::<B>(grads, [x, weights], inputs);
        register::<B>(grads, stack_nodes, stacks);
    }
);

/// A sum that was computed elsewhere takes the place of the experts in the graph, so gradients meet in the same order.
pub(crate) fn computed_elsewhere<B: Gradients, C: CheckpointStrategy>(
    x: Tracked<B>,
    weights: Tracked<B>,
    y: Tracked<B>,
    gradients: SuppliedGradients,
) -> Tracked<B> {
    let nodes = [x.node(), weights.node()];
    let op = ElsewhereBackward.prepare::<C>(nodes).compute_bound();
    let y = y.into_primitive();
    match op.stateful() {
        OpsKind::Tracked(op) => op.finish((gradients, y.device()), y),
        OpsKind::UnTracked(op) => op.finish(y),
    }
}

backward_step!(
    ElsewhereBackward,
    2,
    (SuppliedGradients, Device<B>),
    |_dy, parents, (gradients, device), grads| {
        let values = gradients.take();
        let values = values.map(|values| B::float_from_data(values, &device));
        register::<B>(grads, parents, values);
    }
);

fn inner_routing<B: Gradients, C: CheckpointStrategy>(
    routing: RoutingPrimitive<Autodiff<B, C>>,
) -> RoutingPrimitive<B> {
    RoutingPrimitive {
        weights: routing.weights.into_primitive(),
        order: routing.order,
        offsets: routing.offsets,
        part: routing.part,
    }
}

fn inner_factors<B: Gradients, C: CheckpointStrategy>(
    f: FactorsPrimitive<Autodiff<B, C>>,
) -> FactorsPrimitive<B> {
    FactorsPrimitive {
        gate_a: f.gate_a.into_primitive(),
        gate_b: f.gate_b.into_primitive(),
        up_a: f.up_a.into_primitive(),
        up_b: f.up_b.into_primitive(),
        down_a: f.down_a.into_primitive(),
        down_b: f.down_b.into_primitive(),
    }
}
