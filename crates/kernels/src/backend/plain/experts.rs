//! Routed experts: `y_t = Σ_j w_tj · down(silu(gate(x_t)) · up(x_t))` of the token's experts, over slots sorted by
//! expert; see [`crate::backend::experts`]. All products are those of [`Primitives`].

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;

use crate::backend::factors::expert_factors;
use crate::backend::gradients::{ExpertsSaved, Gradients};
use crate::backend::plain::check_compute;
use crate::backend::plain::elementwise::swiglu_backward;
use crate::backend::plain::ints::Ints;
use crate::backend::plain::linear::refuse_fake_quantization;
use crate::backend::plain::primitives::{SlotTable, Stack};
use crate::backend::plain::reals::Reals;
use crate::backend::plain::saved_reals::saved_values;
use crate::backend::traits::{FactorsPrimitive, Kernels, RoutingPrimitive, StacksPrimitive};
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts};
use crate::settings::Compute;

/// The three projections of an expert, as indices.
const GATE: usize = 0;
const UP: usize = 1;
const DOWN: usize = 2;

/// A weight of all experts, and its low-rank update.
struct UpdatedProjection<'a, B: Kernels> {
    w: Stack<'a, B>,
    update: Option<LowRank<B>>,
}

/// An update `scale · b · a` of the weight of every expert, applied to dropped inputs.
#[derive(Clone)]
struct LowRank<B: Kernels> {
    /// `[experts, rank, in]`.
    a: FloatTensor<B>,
    /// `[experts, out, rank]`.
    b: FloatTensor<B>,
    scale: f32,
    dropout: Dropout,
}

impl<B: Kernels> LowRank<B> {
    /// `scale · drop(x) · aᵀ`: `[slots, in]` → `[slots, rank]`.
    fn low(&self, dropped: Reals<B>, slots: &SlotTable<B>) -> Reals<B> {
        nt(dropped, Stack::Dense(self.a.clone()), slots) * self.scale
    }

    /// `scale · dy · b`: `[slots, out]` → `[slots, rank]`.
    fn dlow(&self, dy: Reals<B>, slots: &SlotTable<B>) -> Reals<B> {
        nn(dy, Stack::Dense(self.b.clone()), slots) * self.scale
    }

    /// Gradients of the factors, from the projection's inputs and output gradients.
    fn grads(&self, [x, dy]: [Reals<B>; 2], slots: &SlotTable<B>) -> [FloatTensor<B>; 2] {
        let x = dropped::<B>(x, self.dropout);
        let low = self.low(x.clone(), slots);
        let dlow = self.dlow(dy.clone(), slots);
        [
            B::slots_tn(dlow.into_tensor(), x.into_tensor(), slots),
            B::slots_tn(dy.into_tensor(), low.into_tensor(), slots),
        ]
    }
}

impl<B: Kernels> UpdatedProjection<'_, B> {
    /// `x · wᵀ + scale · drop(x) · aᵀ · bᵀ`: `[slots, in]` → `[slots, out]`.
    fn forward(&self, x: Reals<B>, slots: &SlotTable<B>) -> Reals<B> {
        let y = nt(x.clone(), self.w.clone(), slots);
        let Some(update) = &self.update else {
            return y;
        };
        let low = update.low(dropped::<B>(x, update.dropout), slots);
        y + nt(low, Stack::Dense(update.b.clone()), slots)
    }

    /// `dy · w + drop(scale · dy · b · a)`: `[slots, out]` → `[slots, in]`.
    fn back(&self, dy: Reals<B>, slots: &SlotTable<B>) -> Reals<B> {
        let dx = nn(dy.clone(), self.w.clone(), slots);
        let Some(update) = &self.update else {
            return dx;
        };
        let through = nn(
            update.dlow(dy, slots),
            Stack::Dense(update.a.clone()),
            slots,
        );
        dx + dropped::<B>(through, update.dropout)
    }
}

fn dropped<B: Kernels>(x: Reals<B>, dropout: Dropout) -> Reals<B> {
    if dropout.is_off() {
        return x;
    }
    Reals::new(B::dropout(x.into_tensor(), dropout))
}

fn nt<B: Kernels>(x: Reals<B>, w: Stack<'_, B>, slots: &SlotTable<B>) -> Reals<B> {
    Reals::new(B::slots_nt(x.into_tensor(), w, slots))
}

fn nn<B: Kernels>(dy: Reals<B>, w: Stack<'_, B>, slots: &SlotTable<B>) -> Reals<B> {
    Reals::new(B::slots_nn(dy.into_tensor(), w, slots))
}

/// Frozen weights of gate, up and down, with their updates.
fn frozen<'a, B: Kernels>(
    bank: &'a ExpertBank,
    f: &FactorsPrimitive<B>,
    lora: ExpertLora,
) -> [UpdatedProjection<'a, B>; 3] {
    if lora.quantizer.is_some() {
        refuse_fake_quantization();
    }
    let weights = [&bank.gate, &bank.up, &bank.down];
    let factors = [
        [&f.gate_a, &f.gate_b],
        [&f.up_a, &f.up_b],
        [&f.down_a, &f.down_b],
    ];
    [GATE, UP, DOWN].map(|at| {
        let [a, b] = factors[at].map(FloatTensor::<B>::clone);
        let update = (a.shape()[1] > 0).then(|| LowRank {
            a,
            b,
            scale: lora.scale[at],
            dropout: lora.dropout.fork(at as u64),
        });
        let w = Stack::Stored(weights[at]);
        UpdatedProjection { w, update }
    })
}

/// Trained weights of gate, up and down.
fn trained<B: Kernels>(stacks: &StacksPrimitive<B>) -> [UpdatedProjection<'static, B>; 3] {
    [&stacks.gate, &stacks.up, &stacks.down].map(|stack| UpdatedProjection {
        w: Stack::Dense(stack.clone()),
        update: None,
    })
}

/// Slots sorted by expert, and the weight of each.
struct RoutedSlots<B: Kernels> {
    table: SlotTable<B>,
    /// `[tokens, top_k]`.
    weights: Reals<B>,
}

impl<B: Kernels> RoutedSlots<B> {
    fn new(routing: RoutingPrimitive<B>) -> Self {
        let weights = Reals::new(routing.weights);
        let [_, top_k] = weights.dims();
        let table = B::slot_table(routing.order, routing.offsets, top_k);
        Self { table, weights }
    }

    /// The rows of the slots' tokens: `[tokens, width]` → `[slots, width]`.
    fn gather(&self, x: Reals<B>) -> Reals<B> {
        x.rows(&Ints::new(self.table.tokens.clone()))
    }

    /// The weights, place by place: `[slots, 1]`.
    fn sorted_weights(&self) -> Reals<B> {
        let n = self.weights.len();
        let weights = self.weights.clone().reshape(&[n, 1]);
        weights.rows(&Ints::new(self.table.order.clone()))
    }

    /// The rows of every token's slots: `[slots, width]` → `[tokens, top_k, width]`.
    fn by_token(&self, rows: Reals<B>) -> Reals<B> {
        let ([tokens, top_k], [_, width]) = (self.weights.dims(), rows.dims());
        let rows = rows.rows(&Ints::new(self.table.places.clone()));
        rows.reshape(&[tokens, top_k, width])
    }

    /// The sum of every token's rows: `[tokens, top_k, width]` → `[tokens, width]`.
    fn sum(rows: Reals<B>) -> Reals<B> {
        let [tokens, _, width] = rows.dims();
        rows.sum(1).reshape(&[tokens, width])
    }
}

/// x `[tokens, hidden]` → y `[tokens, hidden]` and the products of gate and up, `[slots, inner]`.
fn forward<B: Kernels>(
    x: FloatTensor<B>,
    routing: RoutingPrimitive<B>,
    [gate, up, down]: [UpdatedProjection<'_, B>; 3],
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let slots = RoutedSlots::new(routing);
    let x = slots.gather(Reals::new(x));
    let [gate, up] = [gate, up].map(|w| w.forward(x.clone(), &slots.table).into_tensor());
    let act = Reals::new(B::swiglu(gate.clone(), up.clone(), Compute::F32));
    let rows = slots.by_token(down.forward(act, &slots.table));
    let [tokens, top_k] = slots.weights.dims();
    let weights = slots.weights.reshape(&[tokens, top_k, 1]);
    (RoutedSlots::sum(rows * weights).into_tensor(), gate, up)
}

/// The gradients of a backward pass, and what those of the weights are computed from.
struct Backward<B: Kernels> {
    slots: RoutedSlots<B>,
    /// Of x `[tokens, hidden]` and of the routing weights `[tokens, top_k]`.
    inputs: [FloatTensor<B>; 2],
    /// The inputs and output gradients of gate, up and down, `[slots, in]` and `[slots, out]`.
    operands: [[Reals<B>; 2]; 3],
}

/// dy `[tokens, hidden]` → the gradients of the inputs.
fn backward<B: Gradients>(
    dy: FloatTensor<B>,
    saved: ExpertsSaved<B>,
    [gate, up, down]: &[UpdatedProjection<'_, B>; 3],
) -> Backward<B> {
    check_compute(saved.compute);
    let [x, gated, upped] =
        [&saved.x, &saved.gate, &saved.up].map(|saved| saved_values::<B>(saved));
    let slots = RoutedSlots::new(saved.routing);
    let [x, dy] = [x, dy].map(|rows| slots.gather(Reals::new(rows)));
    let weights = slots.sorted_weights();
    let act = Reals::new(B::swiglu(gated.clone(), upped.clone(), Compute::F32));
    // Before the routing weights.
    let dact = down.back(dy.clone(), &slots.table);
    let dweights = slots.by_token((dact.clone() * act.clone()).sum(1));
    let products = [gated, upped].map(Reals::new);
    let [dgate, dup] = swiglu_backward(dact * weights.clone(), products);
    let dx = gate.back(dgate.clone(), &slots.table) + up.back(dup.clone(), &slots.table);
    let dx = RoutedSlots::sum(slots.by_token(dx));
    let shape: [usize; 2] = slots.weights.dims();
    Backward {
        inputs: [dx, dweights.reshape(&shape)].map(Reals::into_tensor),
        operands: [[x.clone(), dgate], [x, dup], [act, dy * weights]],
        slots,
    }
}

/// See [`Kernels::experts_frozen`].
pub(crate) fn experts_frozen<B: Kernels>(
    x: FloatTensor<B>,
    routing: RoutingPrimitive<B>,
    factors: &FactorsPrimitive<B>,
    bank: &ExpertBank,
    (lora, compute): (ExpertLora, Compute),
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    check_compute(compute);
    forward(x, routing, frozen(bank, factors, lora))
}

/// See [`Kernels::experts_trained`].
pub(crate) fn experts_trained<B: Kernels>(
    x: FloatTensor<B>,
    routing: RoutingPrimitive<B>,
    stacks: &StacksPrimitive<B>,
    compute: Compute,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    check_compute(compute);
    forward(x, routing, trained(stacks))
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

/// See [`Gradients::experts_frozen_grads`].
pub(crate) fn experts_frozen_grads<B: Gradients>(
    dy: FloatTensor<B>,
    saved: ExpertsSaved<B>,
    factors: &FactorsPrimitive<B>,
    (bank, lora): (&ExpertBank, ExpertLora),
    want_factors: bool,
) -> ([FloatTensor<B>; 2], Option<[FloatTensor<B>; 6]>) {
    let experts = frozen(bank, factors, lora);
    let Backward {
        slots,
        inputs,
        operands,
    } = backward(dy, saved, &experts);
    if !want_factors {
        return (inputs, None);
    }
    let f = factors;
    let zeros = [
        [&f.gate_a, &f.gate_b],
        [&f.up_a, &f.up_b],
        [&f.down_a, &f.down_b],
    ];
    let mut all = experts.into_iter().zip(operands).zip(zeros);
    let [[ga, gb], [ua, ub], [da, db]] = [GATE, UP, DOWN].map(|_| {
        let ((projection, operands), factors) = all.next().expect("three projections");
        match projection.update {
            Some(update) => update.grads(operands, &slots.table),
            // Factors of rank 0 are their own gradients.
            None => factors.map(FloatTensor::<B>::clone),
        }
    });
    (inputs, Some([ga, gb, ua, ub, da, db]))
}

/// See [`Gradients::experts_trained_grads`].
pub(crate) fn experts_trained_grads<B: Gradients>(
    dy: FloatTensor<B>,
    saved: ExpertsSaved<B>,
    stacks: &StacksPrimitive<B>,
) -> ([FloatTensor<B>; 2], [FloatTensor<B>; 3]) {
    let Backward {
        slots,
        inputs,
        operands,
    } = backward(dy, saved, &trained(stacks));
    let stacks = operands.map(|[x, dy]| {
        let (dy, x) = (dy.into_tensor(), x.into_tensor());
        B::slots_tn(dy, x, &slots.table)
    });
    (inputs, stacks)
}
