//! The routed experts: one of the two places in which a weight meets an activation (the other is `linear.rs`).
//!
//! Frozen experts are a bank of views, one matrix per expert and projection, as the checkpoint stores them apart.
//! Trained ones are three stacks. Low-rank updates are stacks too: one pair of factors per expert, or one factor of the
//! pair for all of them.
//!
//! If only some experts are trained or updated, a layer runs in two parts: those, and the others. Each part gets the slots
//! of its own experts alone, so the others cost no gradient.

pub(crate) mod shard;

use std::ops::RangeFrom;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use kernels::{
    Compute, Dropout, ExpertBank, ExpertCache, ExpertFactors, ExpertLora, ExpertTraffic, Matrix,
    OffloadedLayer, Quantizer, SharedExperts,
};

use self::shard::ExpertShard;
use super::linear::Linear;
use super::mlp::Mlp;
use crate::Error;
use crate::forward::context::ForwardContext;
use crate::forward::exchange::first_experts;
use crate::forward::routing::Routed;
use crate::precision::PrecisionClass;

/// The experts of one layer.
#[derive(Module, Debug)]
pub struct Experts {
    /// Their weights.
    pub weights: ExpertWeights,
    /// Their low-rank updates.
    pub lora: Option<ExpertsLora>,
    /// Reads frozen weights, updates merged, as they would be written in this format; none reads them as they are.
    #[module(skip)]
    pub quantizer: Option<Quantizer>,
    /// The ones that are trained or updated; none if they are all alike.
    #[module(skip)]
    pub subset: Option<ExpertSubset>,
    /// Experts to prefetch for each token before the layer chooses them, if they stay on disk.
    #[module(skip)]
    pub n_prefetch: usize,
    /// This rank's share of them, if other ranks hold others. Stacks and factors are those of the share then.
    #[module(skip)]
    pub(crate) shard: Option<ExpertShard>,
}

/// Some of a layer's experts, which one kernel serves.
pub(super) struct ExpertPart<'a> {
    /// Their numbers, ascending; none if they are all.
    pub(super) ids: Option<&'a Vec<usize>>,
    pub(super) weights: PartWeights<'a>,
}

/// The weights of a part.
#[derive(Clone, Copy)]
pub(super) enum PartWeights<'a> {
    /// Trained.
    Trained(&'a Stacks),
    /// Frozen, with the layer's updates if it has any.
    Updated(&'a Arc<ExpertBank>),
    /// Frozen, without updates.
    Plain(&'a Arc<ExpertBank>),
}

/// The experts of a layer that are trained or updated, and the others.
#[derive(Clone, Debug)]
pub struct ExpertSubset {
    /// Those that are trained or updated, ascending.
    pub expert_ids: Vec<usize>,
    /// The others.
    other_ids: Vec<usize>,
    /// The published weights of the subset, and of the others.
    banks: [Arc<ExpertBank>; 2],
}

impl ExpertSubset {
    /// Parts a layer's experts. On a GPU, each part is copied as a stack of its own.
    ///
    /// # Errors
    /// If a part cannot be copied.
    ///
    /// # Panics
    /// If an id is not below the bank's size.
    pub fn new(expert_ids: Vec<usize>, bank: &ExpertBank) -> Result<Self, Error> {
        let other_ids: Vec<usize> = (0..bank.gate.len())
            .filter(|expert| !expert_ids.contains(expert))
            .collect();
        let pick = |ids: &[usize]| {
            let of = |list: &[Matrix]| {
                let mut picked: Vec<Matrix> = ids.iter().map(|id| list[*id].clone()).collect();
                Matrix::place_apart(&mut picked)?;
                Ok::<_, Error>(picked)
            };
            let bank = ExpertBank::new(of(&bank.gate)?, of(&bank.up)?, of(&bank.down)?);
            Ok::<_, Error>(Arc::new(bank))
        };
        Ok(Self {
            banks: [pick(&expert_ids)?, pick(&other_ids)?],
            expert_ids,
            other_ids,
        })
    }
}

/// The forms of the experts' weights.
#[derive(Module, Debug)]
pub enum ExpertWeights {
    /// Never change, have no gradient, stay in their published bytes.
    Frozen(FrozenBank),
    /// Trained, in f32.
    Trained(Stacks),
    /// A subset is trained, the others are frozen.
    Partial(PartiallyTrained),
}

/// Frozen experts, a subset of them trained.
#[derive(Module, Debug)]
pub struct PartiallyTrained {
    /// All of them, as published.
    #[module(skip)]
    pub bank: Arc<ExpertBank>,
    /// The subset, as trained.
    pub trained: Stacks,
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
    /// Probability of dropping an input element of an update.
    #[module(skip)]
    pub dropout: f32,
    /// This module's number, which gives it random values of its own.
    #[module(skip)]
    pub dropout_stream: u64,
}

/// Stacked factors of one projection.
#[derive(Module, Debug)]
pub struct FactorStacks {
    /// `[experts, rank, in]`, or `[1, rank, in]` if the experts share it.
    pub lora_a: Param<Tensor<3>>,
    /// `[experts, out, rank]`, or `[1, out, rank]` if the experts share it.
    pub lora_b: Param<Tensor<3>>,
    /// Multiplier of the update.
    #[module(skip)]
    pub scale: f32,
}

impl FactorStacks {
    /// Both factors with one entry per expert; the gradient of a shared one is the sum over them.
    fn per_expert(&self, experts: usize) -> [Tensor<3>; 2] {
        [&self.lora_a, &self.lora_b].map(|factor| {
            let factor = factor.val();
            let [n, rows, cols] = factor.dims();
            if n == experts {
                factor
            } else {
                factor.expand([experts, rows, cols])
            }
        })
    }
}

impl Experts {
    /// The published weights; none if all experts are trained.
    fn bank(&self) -> Option<&Arc<ExpertBank>> {
        match &self.weights {
            ExpertWeights::Frozen(frozen) => Some(&frozen.bank),
            ExpertWeights::Partial(partial) => Some(&partial.bank),
            ExpertWeights::Trained(_) => None,
        }
    }

    /// Visits the matrices of frozen experts.
    pub(crate) fn for_each_frozen(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        for bank in self.frozen_banks() {
            let ExpertBank { gate, up, down, .. } = Arc::make_mut(bank);
            [gate, up, down].into_iter().flatten().for_each(&mut *visit);
        }
    }

    /// The banks that are multiplied with.
    fn frozen_banks(&mut self) -> &mut [Arc<ExpertBank>] {
        match (&mut self.subset, &mut self.weights) {
            (Some(subset), _) => &mut subset.banks,
            (None, ExpertWeights::Frozen(frozen)) => std::slice::from_mut(&mut frozen.bank),
            (None, ExpertWeights::Trained(_) | ExpertWeights::Partial(_)) => &mut [],
        }
    }

    /// Keeps frozen experts on disk, caching the most recently used; each bank takes a number from `layers`.
    pub(crate) fn cache(
        &mut self,
        cache: &Arc<ExpertCache>,
        layers: &mut RangeFrom<usize>,
        n_prefetch: usize,
    ) {
        for (bank, layer) in self.frozen_banks().iter_mut().zip(layers) {
            let cache = Arc::clone(cache);
            Arc::make_mut(bank).cached = Some(OffloadedLayer { cache, layer });
        }
        self.n_prefetch = n_prefetch;
    }

    /// Prefetches the experts that tokens will probably choose, if experts stay on disk and the pass generates text.
    /// `likely` gives the best `n` experts of every token, `[tokens, n]`. Nothing but time depends on it.
    pub(crate) fn prefetch(
        &self,
        ctx: &ForwardContext<'_>,
        likely: impl FnOnce(usize) -> Tensor<2, Int>,
    ) {
        let is_generating = !ctx.caches.is_empty();
        if self.n_prefetch > 0
            && is_generating
            && let Some(bank) = self.bank().filter(|bank| bank.cached.is_some())
        {
            kernels::prefetch_experts(likely(self.n_prefetch), bank);
        }
    }

    /// How often its experts, and those of all layers with the same cache, were in memory; none if all always are.
    pub(crate) fn traffic(&self) -> Option<ExpertTraffic> {
        let parts = self.subset.iter().flat_map(|subset| &subset.banks);
        let mut cached = self.bank().into_iter().chain(parts).flat_map(|b| &b.cached);
        cached.next().map(|layer| layer.cache.traffic())
    }

    /// Number of experts that are trained or updated, if any are.
    pub fn n_updated(&self) -> usize {
        let subset = self.subset.as_ref();
        subset.map_or_else(|| self.dims()[0], |subset| subset.expert_ids.len())
    }

    /// The experts that are trained or updated, if any are.
    pub fn updated_ids(&self) -> Vec<usize> {
        let subset = self.subset.as_ref();
        subset.map_or_else(
            || (0..self.dims()[0]).collect(),
            |subset| subset.expert_ids.clone(),
        )
    }

    /// Restricts the updates of frozen experts to a subset.
    ///
    /// # Errors
    /// If the subset cannot be copied to the device that the experts are on.
    pub fn restrict_updates(&mut self, expert_ids: Vec<usize>) -> Result<(), Error> {
        self.subset = match self.bank() {
            Some(bank) if expert_ids.len() < bank.gate.len() => {
                Some(ExpertSubset::new(expert_ids, bank)?)
            }
            _ => None,
        };
        self.shard_again();
        Ok(())
    }

    /// Number of experts, inner width and hidden width.
    pub fn dims(&self) -> [usize; 3] {
        match (&self.weights, self.bank()) {
            (ExpertWeights::Trained(stacks), _) => {
                let [own, inner, hidden] = stacks.gate_proj.val().dims();
                let all = self.shard.as_ref().map(|share| share.n_experts);
                [all.unwrap_or(own), inner, hidden]
            }
            (_, Some(bank)) => [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols()],
            _ => unreachable!("experts that are not fully trained have a bank"),
        }
    }

    /// Bytes held in memory or mapped.
    pub fn size_bytes(&self) -> usize {
        let matrices = self
            .bank()
            .into_iter()
            .flat_map(|bank| bank.gate.iter().chain(&bank.up).chain(&bank.down));
        let mapped: usize = matrices.map(Matrix::size_bytes).sum();
        let held = match &self.weights {
            ExpertWeights::Frozen(_) => 0,
            ExpertWeights::Trained(_) | ExpertWeights::Partial(_) => {
                let [_, inner, hidden] = self.dims();
                self.n_updated() * inner * hidden * 3 * 4
            }
        };
        mapped + held
    }

    /// The weighted sum of every token's experts.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward(&self, x: Tensor<2>, routed: Routed, ctx: &ForwardContext<'_>) -> Tensor<2> {
        if let (ExpertWeights::Frozen(frozen), None) = (&self.weights, &self.subset) {
            ctx.record_experts(&frozen.bank, &x, &routed.ids);
        }
        let n_experts = self.dims()[0];
        let sums = self.parts().into_iter().map(|part| {
            let routing = routing(&routed, part.ids, n_experts);
            self.sum_of(part.weights, x.clone(), routing, ctx.dropout_seed, ctx)
        });
        let sum = sums.reduce(|sum, y| sum + y);
        sum.expect("a layer has experts")
    }

    /// The experts that kernels serve one after another: all, or a subset that is trained or updated, then the others.
    pub(super) fn parts(&self) -> Vec<ExpertPart<'_>> {
        let part = |ids, weights| ExpertPart { ids, weights };
        match (&self.weights, &self.subset) {
            (ExpertWeights::Frozen(frozen), None) => {
                vec![part(None, PartWeights::Updated(&frozen.bank))]
            }
            (ExpertWeights::Trained(stacks), _) => vec![part(None, PartWeights::Trained(stacks))],
            (weights, Some(subset)) => {
                let [updated, others] = &subset.banks;
                let first = match weights {
                    ExpertWeights::Partial(partial) => PartWeights::Trained(&partial.trained),
                    _ => PartWeights::Updated(updated),
                };
                let mut parts = vec![part(Some(&subset.expert_ids), first)];
                if !subset.other_ids.is_empty() {
                    parts.push(part(Some(&subset.other_ids), PartWeights::Plain(others)));
                }
                parts
            }
            (ExpertWeights::Partial(_), None) => {
                unreachable!("the loader notes which experts it trains")
            }
        }
    }

    /// The weighted sum of every token's experts of one part.
    pub(super) fn sum_of(
        &self,
        weights: PartWeights<'_>,
        x: Tensor<2>,
        routing: kernels::Routing,
        dropout_seed: Option<u64>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let compute = ctx.compute_of(PrecisionClass::Experts);
        let (bank, lora) = match weights {
            PartWeights::Trained(stacks) => return stacks.forward(x, routing, compute),
            PartWeights::Updated(bank) => (bank, self.lora.as_ref()),
            PartWeights::Plain(bank) => (bank, None),
        };
        let (factors, lora) = self.factors(bank, lora, dropout_seed);
        kernels::experts_frozen(x, routing, bank, factors, lora, compute)
    }

    /// [`Self::forward`], with the shared experts added; one kernel does it all if all weights are frozen and multiplied as they
    /// are.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward_with(
        &self,
        shared: &Mlp,
        x: Tensor<2>,
        routed: Routed,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let (Some(bank), Some(shared)) = (self.as_frozen(ctx), shared_as_frozen(shared, ctx))
        else {
            return self.forward(x.clone(), routed, ctx) + shared.forward(x, ctx);
        };
        let routing = routing(&routed, None, bank.gate.len());
        let compute = ctx.compute_of(PrecisionClass::Experts);
        kernels::moe_frozen(x, routing, bank, shared, compute)
    }

    /// The weights, if all are frozen and multiplied as they are; see [`Linear::as_frozen`].
    fn as_frozen(&self, ctx: &ForwardContext<'_>) -> Option<&Arc<ExpertBank>> {
        let is_updated = self.subset.is_some() || self.lora.is_some();
        match &self.weights {
            ExpertWeights::Frozen(frozen)
                if !is_updated && self.quantizer.is_none() && self.shard.is_none() =>
            {
                Some(&frozen.bank).filter(|_| !ctx.records_inputs())
            }
            _ => None,
        }
    }

    /// The updates of a bank's experts as the kernel takes them.
    fn factors(
        &self,
        bank: &ExpertBank,
        lora: Option<&ExpertsLora>,
        dropout_seed: Option<u64>,
    ) -> (ExpertFactors, ExpertLora) {
        let [experts, inner] = [bank.gate.len(), bank.gate[0].rows()];
        let pick = |of: fn(&ExpertsLora) -> &Option<FactorStacks>| {
            let stacks = lora.and_then(|lora| of(lora).as_ref());
            let factors = stacks.map(|stacks| stacks.per_expert(experts));
            (factors, stacks.map_or(0.0, |stacks| stacks.scale))
        };

        let (down, down_scale) = pick(|lora| &lora.down_proj);
        let ((gate, gate_scale), (up, up_scale)) =
            match lora.and_then(|lora| lora.gate_up_proj.as_ref()) {
                Some(gate_up) => {
                    let [a, b] = gate_up.per_expert(experts);
                    let rank = a.dims()[1];
                    let half = |rows: std::ops::Range<usize>| {
                        (
                            Some([a.clone(), b.clone().slice([0..experts, rows, 0..rank])]),
                            gate_up.scale,
                        )
                    };
                    (half(0..inner), half(inner..2 * inner))
                }
                None => (pick(|lora| &lora.gate_proj), pick(|lora| &lora.up_proj)),
            };
        let dropout = match (lora, dropout_seed) {
            (Some(lora), Some(seed)) => Dropout {
                probability: lora.dropout,
                seed,
            }
            .fork(lora.dropout_stream),
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

impl Stacks {
    /// Whether the gate, up and down projections are trained.
    pub(crate) fn trained(&self) -> [bool; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj].map(|stack| stack.val().is_require_grad())
    }

    fn forward(&self, x: Tensor<2>, routing: kernels::Routing, compute: Compute) -> Tensor<2> {
        let stacks = [&self.gate_proj, &self.up_proj, &self.down_proj].map(|stack| stack.val());
        kernels::experts_trained(x, routing, stacks, compute)
    }
}

/// The weights of shared experts, if all are frozen and multiplied as they are.
fn shared_as_frozen(mlp: &Mlp, ctx: &ForwardContext<'_>) -> Option<SharedExperts> {
    let weight = |linear: &Linear| {
        linear
            .as_frozen(ctx)
            .filter(|_| linear.bias.is_none())
            .map(Arc::clone)
    };
    Some(SharedExperts {
        gate: weight(&mlp.gate_proj)?,
        up: weight(&mlp.up_proj)?,
        down: weight(&mlp.down_proj)?,
        compute: ctx.compute_of(PrecisionClass::Linear),
    })
}

/// The input of a frozen expert's down projection.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, moe_intermediate_size]`
pub(crate) fn down_input(bank: &ExpertBank, expert: usize, x: Tensor<2>) -> Tensor<2> {
    let [gate, up] = [&bank.gate, &bank.up].map(|list| {
        kernels::linear_frozen(x.clone(), &Arc::new(list[expert].clone()), Compute::F32)
    });
    kernels::swiglu(gate, up, Compute::F32)
}

/// The slots of all experts, or of a subset, whose experts count from zero then.
fn routing(routed: &Routed, subset: Option<&Vec<usize>>, experts: usize) -> kernels::Routing {
    let weights = routed.weights.clone();
    let Some(expert_ids) = subset else {
        let (order, offsets) = kernels::dispatch(routed.ids.clone(), experts);
        return kernels::Routing {
            weights,
            order,
            offsets,
            part: None,
        };
    };
    let n = expert_ids.len();
    let mut places = vec![n as i32; experts];
    (0..)
        .zip(expert_ids)
        .for_each(|(place, expert)| places[*expert] = place);
    let (device, [tokens, top_k]) = (weights.device(), routed.ids.dims());
    let places = Tensor::<1, Int>::from_ints(places.as_slice(), &device);
    let ids = places.select(0, routed.ids.clone().reshape([tokens * top_k]));
    first_experts(ids.reshape([tokens, top_k]), weights, n)
}
