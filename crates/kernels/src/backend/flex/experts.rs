//! The tensors of a layer's experts as the kernels read them.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::values::{Floats, floats, int_values};
use crate::backend::ops::{FactorsPrimitive, RoutingPrimitive, StacksPrimitive};
use crate::ops::experts::{
    self, CachedExpert, ExpertBank, ExpertLora, ExpertOperands, RoutedExperts, SharedExperts,
    Slots, StackedFactors,
};
use crate::settings::Compute;

pub(super) struct RoutingValues {
    pub(super) weights: Floats,
    order: Vec<i32>,
    offsets: Vec<i32>,
}

impl RoutingValues {
    pub(super) fn new(routing: &RoutingPrimitive<Flex>) -> Self {
        Self {
            weights: Floats::new(&routing.weights),
            order: int_values(&routing.order),
            offsets: int_values(&routing.offsets),
        }
    }

    pub(super) fn slots(&self) -> Slots<'_> {
        Slots {
            order: &self.order,
            offsets: &self.offsets,
            top_k: self.weights.dims::<2>()[1],
        }
    }
}

pub(super) struct FactorValues(pub(super) [[Floats; 2]; 3]);

impl FactorValues {
    pub(super) fn new(f: &FactorsPrimitive<Flex>) -> Self {
        Self(
            [
                [&f.gate_a, &f.gate_b],
                [&f.up_a, &f.up_b],
                [&f.down_a, &f.down_b],
            ]
            .map(|pair| pair.map(Floats::new)),
        )
    }
}

pub(super) fn frozen_experts<'a>(
    (bank, copies): (&'a ExpertBank, &'a [CachedExpert]),
    factors: &'a FactorValues,
    lora: ExpertLora,
    compute: Compute,
) -> RoutedExperts<'a> {
    RoutedExperts {
        factors: factors.0.each_ref().map(|[a, b]| StackedFactors {
            a,
            b,
            rank: a.dims::<3>()[1],
        }),
        lora,
        ..bare_experts((bank, copies), compute)
    }
}

/// Experts without updates.
fn bare_experts<'a>(
    (bank, copies): (&'a ExpertBank, &'a [CachedExpert]),
    compute: Compute,
) -> RoutedExperts<'a> {
    RoutedExperts {
        weights: ExpertOperands::Frozen(bank, copies),
        factors: [StackedFactors::default(); 3],
        lora: ExpertLora::none(),
        compute,
        hidden: bank.gate[0].cols(),
        inner: bank.gate[0].rows(),
        n_experts: bank.gate.len(),
    }
}

pub(super) struct StackValues(pub(super) [Floats; 3]);

impl StackValues {
    pub(super) fn new(stacks: &StacksPrimitive<Flex>) -> Self {
        Self([&stacks.gate, &stacks.up, &stacks.down].map(Floats::new))
    }

    pub(super) fn experts(&self, compute: Compute) -> RoutedExperts<'_> {
        let [n_experts, inner, hidden] = self.0[0].dims();
        RoutedExperts {
            weights: ExpertOperands::Trained(self.0.each_ref().map(|stack| &**stack)),
            factors: [StackedFactors::default(); 3],
            lora: ExpertLora::none(),
            compute,
            hidden,
            inner,
            n_experts,
        }
    }
}

pub(super) fn experts_forward(
    experts: RoutedExperts<'_>,
    routing: &RoutingValues,
    x: &Floats,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (y, gate, up) = experts::forward(experts, routing.slots(), x, &routing.weights);
    let products = [routing.order.len(), experts.inner];
    (
        floats(y, x.dims::<2>()),
        floats(gate, products),
        floats(up, products),
    )
}

/// The experts of a few tokens and those that every token has, at once; see [`experts::forward_fused`].
pub(super) fn mixture_forward(
    bank: (&ExpertBank, &[CachedExpert]),
    (routing, x): (&RoutingValues, &Floats),
    shared: &SharedExperts,
    compute: Compute,
) -> Option<FlexTensor> {
    let experts = bare_experts(bank, compute);
    let y = experts::forward_fused(experts, routing.slots(), x, &routing.weights, shared)?;
    Some(floats(y, x.dims::<2>()))
}
