//! The routed experts: one of the two places where a weight meets an activation (the other is `linear.rs`).
//!
//! Frozen experts are a bank of views, one matrix per expert and projection, as the checkpoint stores them apart.
//! Trained ones are three stacks. Low-rank updates are stacks too: one pair of factors per expert.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use kernels::{Dropout, ExpertBank, ExpertFactors, ExpertLora, Quantizer};

use super::router::Routed;
use crate::pass::Pass;
use crate::precision::Class;

/// The experts of one layer.
#[derive(Module, Debug)]
pub struct Experts {
    /// Their weights.
    pub weights: ExpertWeights,
    /// Their low-rank updates.
    pub lora: Option<ExpertsLora>,
    /// If there is one, frozen weights are read as they would be written in this format, updates folded in.
    #[module(skip)]
    pub quantizer: Option<Quantizer>,
}

/// Where the experts' weights are.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there are as many as layers, and burn derives no boxed variants"
)]
#[derive(Module, Debug)]
pub enum ExpertWeights {
    /// Never change, have no gradient, stay in their published bytes.
    Frozen(FrozenBank),
    /// Trained, in f32.
    Trained(Stacks),
}

/// Views of frozen experts.
#[derive(Module, Debug)]
pub struct FrozenBank {
    /// One matrix per expert and projection.
    #[module(skip)]
    pub bank: Arc<ExpertBank>,
}

/// Stacked trained experts.
#[derive(Module, Debug)]
pub struct Stacks {
    /// `[experts, moe_intermediate_size, hidden_size]`.
    pub gate_proj: Param<Tensor<3>>,
    /// `[experts, moe_intermediate_size, hidden_size]`.
    pub up_proj: Param<Tensor<3>>,
    /// `[experts, hidden_size, moe_intermediate_size]`.
    pub down_proj: Param<Tensor<3>>,
}

/// The low-rank updates of a layer's experts. `gate_up_proj` is PEFT's form, in which gate and up share their first
/// factor; it excludes the two apart.
#[derive(Module, Debug)]
pub struct ExpertsLora {
    /// Update of the gate projections.
    pub gate_proj: Option<FactorStacks>,
    /// Update of the up projections.
    pub up_proj: Option<FactorStacks>,
    /// Update of gate and up together: the rows of `lora_b` are gate's, then up's.
    pub gate_up_proj: Option<FactorStacks>,
    /// Update of the down projections.
    pub down_proj: Option<FactorStacks>,
    /// Whether it is written in PEFT's stacked form.
    #[module(skip)]
    pub is_fused: bool,
    /// Chance of an input element of an update to be dropped.
    #[module(skip)]
    pub dropout: f32,
    /// This site's number, for the dropout's seed.
    #[module(skip)]
    pub site: u64,
}

/// Stacked factors of one projection.
#[derive(Module, Debug)]
pub struct FactorStacks {
    /// `[experts, rank, in]`.
    pub lora_a: Param<Tensor<3>>,
    /// `[experts, out, rank]`.
    pub lora_b: Param<Tensor<3>>,
    /// Multiplier of the update.
    #[module(skip)]
    pub scale: f32,
}

impl Experts {
    /// Number of experts, inner width and hidden width.
    pub fn dims(&self) -> [usize; 3] {
        match &self.weights {
            ExpertWeights::Frozen(frozen) => {
                let bank = &frozen.bank;
                [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols()]
            }
            ExpertWeights::Trained(stacks) => stacks.gate_proj.val().dims(),
        }
    }

    /// Bytes held in memory or mapped.
    pub fn size_bytes(&self) -> usize {
        match &self.weights {
            ExpertWeights::Frozen(frozen) => {
                let bank = &frozen.bank;
                bank.gate
                    .iter()
                    .chain(&bank.up)
                    .chain(&bank.down)
                    .map(kernels::Matrix::size_bytes)
                    .sum()
            }
            ExpertWeights::Trained(_) => self.dims().iter().product::<usize>() * 3 * 4,
        }
    }

    /// The weighted sum of every token's experts.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward(&self, x: Tensor<2>, routed: Routed, pass: &Pass<'_>) -> Tensor<2> {
        let (order, offsets) = kernels::dispatch(routed.ids, self.dims()[0]);
        let routing = kernels::Routing {
            weights: routed.weights,
            order,
            offsets,
        };
        let compute = pass.compute_of(Class::Experts);
        match &self.weights {
            ExpertWeights::Frozen(frozen) => {
                let (factors, lora) = self.factors(&x, pass);
                kernels::experts_frozen(x, routing, &frozen.bank, factors, lora, compute)
            }
            ExpertWeights::Trained(stacks) => {
                let stacks = [&stacks.gate_proj, &stacks.up_proj, &stacks.down_proj]
                    .map(|stack| stack.val());
                kernels::experts_trained(x, routing, stacks, compute)
            }
        }
    }

    /// The updates as the kernel takes them: rank 0 where there is none.
    fn factors(&self, x: &Tensor<2>, pass: &Pass<'_>) -> (ExpertFactors, ExpertLora) {
        let [experts, inner, hidden] = self.dims();
        let none = |[width_in, width_out]: [usize; 2]| {
            let zeros = |shape| Tensor::zeros(shape, &x.device());
            (
                [
                    zeros([experts, 0, width_in]),
                    zeros([experts, width_out, 0]),
                ],
                0.0,
            )
        };
        let some =
            |factors: &FactorStacks| ([factors.lora_a.val(), factors.lora_b.val()], factors.scale);
        let lora = self.lora.as_ref();
        let pick = |of: fn(&ExpertsLora) -> &Option<FactorStacks>, widths| {
            lora.and_then(|lora| of(lora).as_ref())
                .map_or_else(|| none(widths), some)
        };

        let (down, down_scale) = pick(|lora| &lora.down_proj, [inner, hidden]);
        let ((gate, gate_scale), (up, up_scale)) =
            match lora.and_then(|lora| lora.gate_up_proj.as_ref()) {
                Some(both) => {
                    let (a, b, rank) = (
                        both.lora_a.val(),
                        both.lora_b.val(),
                        both.lora_a.val().dims()[1],
                    );
                    let half = |rows: std::ops::Range<usize>| {
                        (
                            [a.clone(), b.clone().slice([0..experts, rows, 0..rank])],
                            both.scale,
                        )
                    };
                    (half(0..inner), half(inner..2 * inner))
                }
                None => (
                    pick(|lora| &lora.gate_proj, [hidden, inner]),
                    pick(|lora| &lora.up_proj, [hidden, inner]),
                ),
            };
        let dropout = match (lora, pass.dropout_seed) {
            (Some(lora), Some(seed)) => Dropout {
                probability: lora.dropout,
                seed,
            }
            .fork(lora.site),
            _ => Dropout::OFF,
        };
        (
            ExpertFactors { gate, up, down },
            ExpertLora {
                scale: [gate_scale, up_scale, down_scale],
                dropout,
                quantizer: self.quantizer,
            },
        )
    }
}
