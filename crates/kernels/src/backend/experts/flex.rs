//! Experts and their routing on the CPU backend.

use std::sync::Arc;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use crate::backend::flex::saved_values::saved_values;
use crate::backend::flex::values::{Floats, floats, int_values, ints};
use crate::backend::gradients::ExpertsSaved;
use crate::backend::plain::experts as plain;
use crate::backend::saved::SavedForm;
use crate::backend::traits::{FactorsPrimitive, RoutingPrimitive, StacksPrimitive};
use crate::gemv::MAX_GEMV_ROWS;
use crate::ops::experts::{
    self, CachedExpert, ExpertBank, ExpertLora, ExpertOperands, InputGrads, RoutedExperts,
    SavedProducts, SharedExperts, SlotPart, Slots, StackedFactors, serves_fused,
};
use crate::ops::route::{self, TopK};
use crate::settings::Compute;

pub(crate) fn choose_experts(scores: FlexTensor, choice: TopK) -> FlexTensor {
    let scores = Floats::new(&scores);
    let [tokens, experts] = scores.dims();
    ints(
        route::choose(&scores, experts, choice),
        [tokens, choice.top_k],
    )
}

pub(crate) fn dispatch_slots(ids: FlexTensor, experts: usize) -> (FlexTensor, FlexTensor) {
    let (order, offsets) = route::dispatch(&int_values(&ids), experts);
    let slots = order.len();
    (ints(order, [slots]), ints(offsets, [experts + 1]))
}

pub(crate) fn prefetch_experts(ids: FlexTensor, bank: Arc<ExpertBank>) -> FlexTensor {
    let experts = int_values(&ids).into_iter().map(|id| id as usize);
    bank.prefetch(experts);
    ids
}

pub(crate) fn experts_frozen(
    x: FlexTensor,
    routing: RoutingPrimitive<Flex>,
    factors: FactorsPrimitive<Flex>,
    bank: Arc<ExpertBank>,
    lora: ExpertLora,
    compute: Compute,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let factors = FactorValues::new(&factors);
    let x = Floats::rounded(&x, compute.rounding_before_product());
    let routing = RoutingValues::new(&routing);
    let copies = bank.resident(routing.slots());
    let experts = frozen_experts(&bank, &copies, &factors, lora, compute);
    experts_forward(experts, &routing, &x)
}

pub(crate) fn experts_frozen_grads(
    dy: FlexTensor,
    saved: ExpertsSaved<Flex>,
    factors: &FactorsPrimitive<Flex>,
    bank: &ExpertBank,
    lora: ExpertLora,
    want_factors: bool,
) -> ([FlexTensor; 2], Option<[FlexTensor; 6]>) {
    let (values, dy) = (FactorValues::new(factors), Floats::new(&dy));
    let experts = frozen_experts(bank, &[], &values, lora, saved.compute);
    let mut restored = SavedValues::new(&saved);
    // The factors' inputs are those that the forward pass multiplied; a recomputed x is not rounded yet, nor is one of
    // another rank.
    let is_recomputed = matches!(saved.x.form(), SavedForm::Norm(..) | SavedForm::Swiglu(_));
    let is_elsewhere = saved.routing.part.is_some_and(|part| part.is_recomputed);
    if want_factors && (is_recomputed || is_elsewhere) {
        let compute = saved.compute.rounding_before_product();
        restored.x = Floats::rounded(restored.x.tensor(), compute);
    }
    let (slots, saved) = (restored.routing.slots(), restored.saved());
    if !want_factors {
        let grads = experts::backward_inputs(experts, slots, saved, &dy);
        return (restored.input_grads(grads), None);
    }
    let (grads, factors) = experts::backward_updated(experts, slots, saved, &dy);
    let [[ga, gb], [ua, ub], [da, db]] = factors;
    let mut shapes = values.0.iter().flatten().map(|factor| factor.dims::<3>());
    let factors =
        [ga, gb, ua, ub, da, db].map(|grad| floats(grad, shapes.next().unwrap_or_default()));
    (restored.input_grads(grads), Some(factors))
}

pub(crate) fn moe_frozen(
    x: FlexTensor,
    routing: RoutingPrimitive<Flex>,
    bank: Arc<ExpertBank>,
    shared: SharedExperts,
    compute: Compute,
) -> FlexTensor {
    let values = Floats::new(&x);
    let fused = || {
        let routing = RoutingValues::new(&routing);
        let copies = bank.resident(routing.slots());
        moe_forward(&bank, &copies, &routing, &values, &shared, compute)
    };
    let is_few = values.dims::<2>()[0] <= MAX_GEMV_ROWS;
    let is_few = is_few && serves_fused(&bank, &shared, compute);
    is_few.then(fused).flatten().unwrap_or_else(|| {
        plain::moe_frozen::<Flex>(
            x,
            routing.clone(),
            Arc::clone(&bank),
            shared.clone(),
            compute,
        )
    })
}

pub(crate) fn experts_trained(
    x: FlexTensor,
    routing: RoutingPrimitive<Flex>,
    stacks: StacksPrimitive<Flex>,
    compute: Compute,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let stacks = StackValues::new(&stacks);
    let x = Floats::rounded(&x, compute.rounding_before_product());
    let routing = RoutingValues::new(&routing);
    experts_forward(stacks.experts(compute), &routing, &x)
}

pub(crate) fn experts_trained_grads(
    dy: FlexTensor,
    saved: ExpertsSaved<Flex>,
    stacks: &StacksPrimitive<Flex>,
) -> ([FlexTensor; 2], [FlexTensor; 3]) {
    let (values, dy) = (StackValues::new(stacks), Floats::new(&dy));
    let experts = values.experts(saved.compute);
    let restored = SavedValues::new(&saved);
    let (slots, saved) = (restored.routing.slots(), restored.saved());
    let (grads, stacks) = experts::backward_trained(experts, slots, saved, &dy);
    let mut shapes = values.0.iter().map(|stack| stack.dims::<3>());
    (
        restored.input_grads(grads),
        stacks.map(|grad| floats(grad, shapes.next().unwrap_or_default())),
    )
}

struct RoutingValues {
    weights: Floats,
    order: Vec<i32>,
    offsets: Vec<i32>,
    part: Option<SlotPart>,
}

impl RoutingValues {
    fn new(routing: &RoutingPrimitive<Flex>) -> Self {
        Self {
            weights: Floats::new(&routing.weights),
            order: int_values(&routing.order),
            offsets: int_values(&routing.offsets),
            part: routing.part,
        }
    }

    fn slots(&self) -> Slots<'_> {
        Slots {
            order: &self.order,
            offsets: &self.offsets,
            top_k: self.weights.dims::<2>()[1],
            part: self.part,
        }
    }
}

struct FactorValues([[Floats; 2]; 3]);

impl FactorValues {
    fn new(f: &FactorsPrimitive<Flex>) -> Self {
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

/// Frozen experts with their updates.
fn frozen_experts<'a>(
    bank: &'a ExpertBank,
    copies: &'a [CachedExpert],
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
        ..experts_without_update(bank, copies, compute)
    }
}

/// Frozen experts without updates.
fn experts_without_update<'a>(
    bank: &'a ExpertBank,
    copies: &'a [CachedExpert],
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

struct StackValues([Floats; 3]);

impl StackValues {
    fn new(stacks: &StacksPrimitive<Flex>) -> Self {
        Self([&stacks.gate, &stacks.up, &stacks.down].map(Floats::new))
    }

    fn experts(&self, compute: Compute) -> RoutedExperts<'_> {
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

fn experts_forward(
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

/// The routed and shared experts of a few tokens, fused; see [`experts::forward_fused`].
fn moe_forward(
    bank: &ExpertBank,
    copies: &[CachedExpert],
    routing: &RoutingValues,
    x: &Floats,
    shared: &SharedExperts,
    compute: Compute,
) -> Option<FlexTensor> {
    let experts = experts_without_update(bank, copies, compute);
    let y = experts::forward_fused(experts, routing.slots(), x, &routing.weights, shared)?;
    Some(floats(y, x.dims::<2>()))
}

/// The values of [`ExpertsSaved`].
struct SavedValues {
    x: Floats,
    routing: RoutingValues,
    gate: Floats,
    up: Floats,
}

impl SavedValues {
    fn new(saved: &ExpertsSaved<Flex>) -> Self {
        let [x, gate, up] = [&saved.x, &saved.gate, &saved.up].map(|saved| saved_values(saved));
        Self {
            x,
            routing: RoutingValues::new(&saved.routing),
            gate,
            up,
        }
    }

    fn saved(&self) -> SavedProducts<'_> {
        SavedProducts {
            x: &self.x,
            weights: &self.routing.weights,
            gate: &self.gate,
            up: &self.up,
        }
    }

    fn input_grads(&self, grads: InputGrads) -> [FlexTensor; 2] {
        [
            floats(grads.dx, self.x.dims::<2>()),
            floats(grads.dweights, self.routing.weights.dims::<2>()),
        ]
    }
}
