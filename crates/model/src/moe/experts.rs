//! The routed experts: one of the two places where a weight meets an activation (the other is `linear.rs`).
//!
//! Frozen experts are a bank of views, one matrix per expert and projection, as the checkpoint stores them apart.
//! Trained ones are three stacks. Low-rank updates are stacks too: one pair of factors per expert, or one factor of the
//! pair for all of them.
//!
//! Where only some experts are trained or updated, a layer runs in two parts: those, and the others. Each part gets the
//! slots of its own experts alone, so the others cost no gradient.

use std::ops::RangeFrom;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use kernels::{
    Compute, Dropout, ExpertBank, ExpertCache, ExpertFactors, ExpertLora, ExpertTraffic, Matrix,
    OffloadedLayer, Quantizer, SharedExperts,
};

use super::router::Routed;
use crate::context::{ForwardContext, Observe};
use crate::linear::Linear;
use crate::mlp::Mlp;
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
    /// If only some of them are trained or updated: which.
    #[module(skip)]
    pub chosen: Option<Chosen>,
}

/// Some of a layer's experts, and the others.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Numbers of those that are trained or updated, ascending.
    pub numbers: Vec<usize>,
    /// Numbers of the others.
    others: Vec<usize>,
    /// The published weights of the chosen, and of the others.
    banks: [Arc<ExpertBank>; 2],
}

impl Chosen {
    /// Parts a layer's experts.
    ///
    /// # Panics
    /// If a number is not below the bank's size.
    pub fn new(numbers: Vec<usize>, bank: &ExpertBank) -> Self {
        let others: Vec<usize> = (0..bank.gate.len())
            .filter(|expert| !numbers.contains(expert))
            .collect();
        let pick = |numbers: &[usize]| {
            let of = |list: &[Matrix]| numbers.iter().map(|n| list[*n].clone()).collect();
            Arc::new(ExpertBank::new(
                of(&bank.gate),
                of(&bank.up),
                of(&bank.down),
            ))
        };
        Self {
            banks: [pick(&numbers), pick(&others)],
            numbers,
            others,
        }
    }
}

/// Where the experts' weights are.
#[derive(Module, Debug)]
pub enum ExpertWeights {
    /// Never change, have no gradient, stay in their published bytes.
    Frozen(FrozenBank),
    /// Trained, in f32.
    Trained(Stacks),
    /// The chosen ones are trained, the others frozen.
    Partly(PartlyTrained),
}

/// Frozen experts, some of which are trained.
#[derive(Module, Debug)]
pub struct PartlyTrained {
    /// All of them, as published.
    #[module(skip)]
    pub bank: Arc<ExpertBank>,
    /// The chosen ones, as trained.
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
    fn of_each(&self, experts: usize) -> [Tensor<3>; 2] {
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
    /// The published weights; none if all are trained.
    fn bank(&self) -> Option<&Arc<ExpertBank>> {
        match &self.weights {
            ExpertWeights::Frozen(frozen) => Some(&frozen.bank),
            ExpertWeights::Partly(partly) => Some(&partly.bank),
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
        match (&mut self.chosen, &mut self.weights) {
            (Some(chosen), _) => &mut chosen.banks,
            (None, ExpertWeights::Frozen(frozen)) => std::slice::from_mut(&mut frozen.bank),
            (None, ExpertWeights::Trained(_) | ExpertWeights::Partly(_)) => &mut [],
        }
    }

    /// Leaves frozen experts in their file but for those that were used last; each bank of them takes a number.
    pub(crate) fn cache(&mut self, cache: &Arc<ExpertCache>, numbers: &mut RangeFrom<usize>) {
        for (bank, layer) in self.frozen_banks().iter_mut().zip(numbers) {
            let cache = Arc::clone(cache);
            Arc::make_mut(bank).cached = Some(OffloadedLayer { cache, layer });
        }
    }

    /// Whether frozen experts stay in their file but for those that were used last.
    pub(crate) fn is_cached(&self) -> bool {
        self.bank().is_some_and(|bank| bank.cached.is_some())
    }

    /// Has experts read from their file that are probably chosen next, `[tokens, experts]`, a token's likeliest first.
    pub(crate) fn expect(&self, likely: Tensor<2, Int>) {
        if let Some(bank) = self.bank() {
            kernels::prefetch_experts(likely, bank);
        }
    }

    /// How often its experts, and those of all layers with the same cache, were in memory; none where all are.
    pub(crate) fn traffic(&self) -> Option<ExpertTraffic> {
        let parts = self.chosen.iter().flat_map(|chosen| &chosen.banks);
        let mut cached = self.bank().into_iter().chain(parts).flat_map(|b| &b.cached);
        cached.next().map(|layer| layer.cache.traffic())
    }

    /// How many experts are trained or updated, if any are.
    pub fn n_chosen(&self) -> usize {
        let chosen = self.chosen.as_ref();
        chosen.map_or_else(|| self.dims()[0], |chosen| chosen.numbers.len())
    }

    /// The numbers of the experts that are trained or updated, if any are.
    pub fn numbers(&self) -> Vec<usize> {
        let chosen = self.chosen.as_ref();
        chosen.map_or_else(
            || (0..self.dims()[0]).collect(),
            |chosen| chosen.numbers.clone(),
        )
    }

    /// Leaves all but some of the frozen experts alone: updates that are put on then are those of the chosen ones.
    pub fn choose(&mut self, numbers: Vec<usize>) {
        self.chosen = match self.bank() {
            Some(bank) if numbers.len() < bank.gate.len() => Some(Chosen::new(numbers, bank)),
            _ => None,
        };
    }

    /// Number of experts, inner width and hidden width.
    pub fn dims(&self) -> [usize; 3] {
        match (&self.weights, self.bank()) {
            (ExpertWeights::Trained(stacks), _) => stacks.gate_proj.val().dims(),
            (_, Some(bank)) => [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols()],
            _ => unreachable!("what is not trained as a whole has a bank"),
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
            ExpertWeights::Trained(_) | ExpertWeights::Partly(_) => {
                let [_, inner, hidden] = self.dims();
                self.n_chosen() * inner * hidden * 3 * 4
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
        let compute = ctx.compute_of(Class::Experts);
        let experts = self.dims()[0];
        match (&self.weights, &self.chosen) {
            (ExpertWeights::Frozen(frozen), None) => {
                ctx.observe_experts(&frozen.bank, &x, &routed.ids);
                let routing = routing(&routed, None, experts);
                self.frozen(x, routing, &frozen.bank, ctx)
            }
            (ExpertWeights::Trained(stacks), _) => {
                stacks.forward(x, routing(&routed, None, experts), compute)
            }
            (weights, Some(chosen)) => {
                let part = |numbers: &Vec<usize>| routing(&routed, Some(numbers), experts);
                let own = part(&chosen.numbers);
                let y = match weights {
                    ExpertWeights::Partly(partly) => {
                        partly.trained.forward(x.clone(), own, compute)
                    }
                    _ => self.frozen(x.clone(), own, &chosen.banks[0], ctx),
                };
                if chosen.others.is_empty() {
                    return y;
                }
                let others = Self {
                    lora: None,
                    chosen: None,
                    ..self.clone()
                };
                y + others.frozen(x, part(&chosen.others), &chosen.banks[1], ctx)
            }
            (ExpertWeights::Partly(_), None) => {
                unreachable!("the loader notes which experts it trains")
            }
        }
    }

    /// [`Self::forward`], and the experts that every token has added to it; together where all are frozen weights as they
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
        let (Some(bank), Some(shared)) = (self.bare(ctx), bare(shared, ctx)) else {
            return self.forward(x.clone(), routed, ctx) + shared.forward(x, ctx);
        };
        let routing = routing(&routed, None, bank.gate.len());
        let compute = ctx.compute_of(Class::Experts);
        kernels::moe_frozen(x, routing, bank, shared, compute)
    }

    /// The weights, where all are frozen and multiplied as they are, and nobody asks for the inputs.
    fn bare(&self, ctx: &ForwardContext<'_>) -> Option<&Arc<ExpertBank>> {
        let is_bare = self.chosen.is_none() && self.lora.is_none() && self.quantizer.is_none();
        let is_bare = is_bare && ctx.observe != Observe::Inputs;
        match &self.weights {
            ExpertWeights::Frozen(frozen) if is_bare => Some(&frozen.bank),
            _ => None,
        }
    }

    /// The experts of a bank with their updates.
    fn frozen(
        &self,
        x: Tensor<2>,
        routing: kernels::Routing,
        bank: &Arc<ExpertBank>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let compute = ctx.compute_of(Class::Experts);
        let (factors, lora) = self.factors(bank, &x.device(), ctx);
        kernels::experts_frozen(x, routing, bank, factors, lora, compute)
    }

    /// The updates of a bank's experts as the kernel takes them: rank 0 where there is none.
    fn factors(
        &self,
        bank: &ExpertBank,
        device: &Device,
        ctx: &ForwardContext<'_>,
    ) -> (ExpertFactors, ExpertLora) {
        let [experts, inner, hidden] = [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols()];
        let none = |[width_in, width_out]: [usize; 2]| {
            let zeros = |shape| Tensor::zeros(shape, device);
            (
                [
                    zeros([experts, 0, width_in]),
                    zeros([experts, width_out, 0]),
                ],
                0.0,
            )
        };
        let some = |factors: &FactorStacks| (factors.of_each(experts), factors.scale);
        let lora = self.lora.as_ref();
        let pick = |of: fn(&ExpertsLora) -> &Option<FactorStacks>, widths| {
            lora.and_then(|lora| of(lora).as_ref())
                .map_or_else(|| none(widths), some)
        };

        let (down, down_scale) = pick(|lora| &lora.down_proj, [inner, hidden]);
        let ((gate, gate_scale), (up, up_scale)) =
            match lora.and_then(|lora| lora.gate_up_proj.as_ref()) {
                Some(both) => {
                    let [a, b] = both.of_each(experts);
                    let rank = a.dims()[1];
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
        let dropout = match (lora, ctx.dropout_seed) {
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

/// The weights of an MLP that is frozen, without updates and biases.
fn bare(mlp: &Mlp, ctx: &ForwardContext<'_>) -> Option<SharedExperts> {
    let weight = |linear: &Linear| {
        linear
            .bare(ctx)
            .filter(|_| linear.bias.is_none())
            .map(Arc::clone)
    };
    Some(SharedExperts {
        gate: weight(&mlp.gate_proj)?,
        up: weight(&mlp.up_proj)?,
        down: weight(&mlp.down_proj)?,
        compute: ctx.compute_of(Class::Linear),
    })
}

/// What the down projection of a frozen expert multiplies, for those tokens that are given.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, moe_intermediate_size]`
pub(crate) fn inner(bank: &ExpertBank, expert: usize, x: Tensor<2>) -> Tensor<2> {
    let [gate, up] = [&bank.gate, &bank.up].map(|list| {
        kernels::linear_frozen(x.clone(), &Arc::new(list[expert].clone()), Compute::F32)
    });
    kernels::swiglu(gate, up, Compute::F32)
}

/// The slots of all experts, or of those with some numbers, which then count from zero.
fn routing(routed: &Routed, numbers: Option<&Vec<usize>>, experts: usize) -> kernels::Routing {
    let weights = routed.weights.clone();
    let Some(numbers) = numbers else {
        let (order, offsets) = kernels::dispatch(routed.ids.clone(), experts);
        return kernels::Routing {
            weights,
            order,
            offsets,
        };
    };
    // All others are one more expert, whose slots come last and are left out.
    let n = numbers.len();
    let mut places = vec![n as i32; experts];
    (0..)
        .zip(numbers)
        .for_each(|(place, number)| places[*number] = place);
    let (device, [tokens, top_k]) = (weights.device(), routed.ids.dims());
    let places = Tensor::<1, Int>::from_ints(places.as_slice(), &device);
    let ids = places.select(0, routed.ids.clone().reshape([tokens * top_k]));
    let (order, offsets) = kernels::dispatch(ids.reshape([tokens, top_k]), n + 1);
    kernels::Routing {
        weights,
        order,
        offsets: offsets.select(0, Tensor::arange(0..n as i64 + 1, &device)),
    }
}
