//! Linear layers: one of the two places in which a weight meets an activation (the other is `experts.rs`).
//!
//! A weight is frozen, in the bytes of its file, or trained, in f32. A low-rank update may sit on either. Training,
//! evaluation and serving in every number format go through the functions here, so a new format or a new kind of update
//! changes this file, `experts.rs` and the kernels, and no model.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use kernels::{
    Absorbed, Compute, Direction, Dropout, FakeQuantize, HeadRows, KvBuffer, Matrix, Quantizer,
    TokenScores, Update,
};

use crate::forward::context::ForwardContext;
use crate::modules::lora::Lora;
use crate::precision::PrecisionClass;

/// A weight `[out, in]`, as a checkpoint stores it.
#[derive(Module, Debug)]
pub enum Weight {
    /// Never changes, has no gradient, stays in its published bytes.
    Frozen(Frozen),
    /// Trained, in f32.
    Trained(Param<Tensor<2>>),
}

/// A view of a frozen matrix.
#[derive(Module, Debug)]
pub struct Frozen {
    /// The bytes.
    #[module(skip)]
    pub matrix: Arc<Matrix>,
}

impl Weight {
    /// Rows and columns: output and input width.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Frozen(frozen) => [frozen.matrix.rows(), frozen.matrix.cols()],
            Self::Trained(weight) => weight.val().dims(),
        }
    }

    /// Bytes it holds in memory or maps.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Frozen(frozen) => frozen.matrix.size_bytes(),
            Self::Trained(weight) => weight.val().shape().num_elements() * 4,
        }
    }

    /// The matrix of a frozen weight.
    pub(crate) fn frozen(&self) -> Option<&Arc<Matrix>> {
        match self {
            Self::Frozen(frozen) => Some(&frozen.matrix),
            Self::Trained(_) => None,
        }
    }

    /// Visits the matrix of a frozen weight.
    pub(crate) fn for_each_frozen(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        if let Self::Frozen(frozen) = self {
            visit(Arc::make_mut(&mut frozen.matrix));
        }
    }

    /// The rows of some tokens, updated: an embedding.
    ///
    /// # Shapes
    /// - `ids`: `[tokens]`
    /// - returns: `[tokens, in]`
    pub fn embed(&self, ids: Tensor<1, Int>, lora: Option<&Lora>) -> Tensor<2> {
        let rows = match self {
            Self::Frozen(frozen) => kernels::embed_frozen(ids.clone(), &frozen.matrix),
            Self::Trained(weight) => kernels::embed_trained(ids.clone(), weight.val()),
        };
        match lora {
            Some(lora) => rows + lora.embed(ids),
            None => rows,
        }
    }
}

/// `y = x · wᵀ + bias`, with an optional low-rank update.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// The update.
    pub lora: Option<Lora>,
    /// Reads a frozen weight, its update merged, as it would be written in this format; none reads it as it is.
    #[module(skip)]
    pub quantizer: Option<Quantizer>,
}

impl Linear {
    /// A layer without bias and updates.
    pub fn new(weight: Weight) -> Self {
        Self {
            weight,
            bias: None,
            lora: None,
            quantizer: None,
        }
    }

    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    ///
    /// # Panics
    /// If the width does not fit.
    pub fn forward(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        self.forward_as(PrecisionClass::Linear, x, ctx)
    }

    /// [`Self::forward`] in the precision of another class.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    ///
    /// # Panics
    /// If the width does not fit.
    pub fn forward_as(
        &self,
        class: PrecisionClass,
        x: Tensor<2>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        ctx.record_input(self.weight.frozen(), &x);
        let compute = self.compute(class, ctx);
        self.biased(match (&self.weight, self.quantizer) {
            (Weight::Frozen(frozen), Some(quantizer)) => {
                self.forward_fake_quantized(x, &frozen.matrix, quantizer, compute)
            }
            _ => self.forward_updated(x, compute, ctx),
        })
    }

    /// What its products compute in. Rounding activations to bf16 for the head would move every probability and save no
    /// memory traffic.
    fn compute(&self, class: PrecisionClass, ctx: &ForwardContext<'_>) -> Compute {
        let compute = ctx.compute_of(class);
        match &self.weight {
            Weight::Frozen(frozen)
                if class == PrecisionClass::Head
                    && compute.for_weight(&frozen.matrix) == Compute::Bf16 =>
            {
                Compute::F32
            }
            _ => compute,
        }
    }

    /// [`Self::forward`] of two layers with the same input. One kernel makes both products if both weights are frozen and
    /// multiplied as they are.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]` each
    ///
    /// # Panics
    /// If a width does not fit.
    pub fn forward_pair(
        pair: [&Self; 2],
        x: Tensor<2>,
        ctx: &ForwardContext<'_>,
    ) -> [Tensor<2>; 2] {
        let [Some(first), Some(second)] = pair.map(|linear| linear.as_frozen(ctx)) else {
            return pair.map(|linear| linear.forward(x.clone(), ctx));
        };
        let compute = ctx.compute_of(PrecisionClass::Linear);
        let [y, z] = kernels::linear_frozen_pair(x, [first, second], compute);
        [pair[0].biased(y), pair[1].biased(z)]
    }

    /// The weight, if it is frozen and multiplied as it is, so that fused kernels may take it. They have the bits of the
    /// products that they fuse, but show no input to a recorder.
    pub(crate) fn as_frozen(&self, ctx: &ForwardContext<'_>) -> Option<&Arc<Matrix>> {
        let is_frozen = self.lora.is_none() && self.quantizer.is_none();
        self.weight
            .frozen()
            .filter(|_| is_frozen && !ctx.records_inputs())
    }

    /// A product with the bias added.
    fn biased(&self, y: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    /// The product with the weight alone.
    fn product(&self, x: Tensor<2>, compute: Compute) -> Tensor<2> {
        match &self.weight {
            Weight::Frozen(frozen) => kernels::linear_frozen(x, &frozen.matrix, compute),
            Weight::Trained(weight) => kernels::linear_trained(x, weight.val(), compute, compute),
        }
    }

    /// The product with the weight and its update.
    fn forward_updated(
        &self,
        x: Tensor<2>,
        compute: Compute,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let Some(lora) = &self.lora else {
            return self.product(x, compute);
        };
        let dora_scales = lora.dora_scales(&self.weight);
        let dora_scales = dora_scales.map(Tensor::unsqueeze::<2>);
        if !lora.drops(ctx) {
            let y = self.updated(lora, x, compute, ctx);
            return match dora_scales {
                Some(scales) => y * scales,
                None => y,
            };
        }
        let (y, x) = (self.product(x.clone(), compute), lora.dropped(x, ctx));
        let Some(dora_scales) = dora_scales else {
            return lora.add_to(y, x, ctx);
        };
        // DoRA changes the products of dropped inputs only, the base's product included.
        let dropped = self.product(x.clone(), compute);
        y - dropped.clone() + lora.add_to(dropped, x, ctx) * dora_scales
    }

    /// The product with the weight and its update, of one input.
    fn updated(
        &self,
        lora: &Lora,
        x: Tensor<2>,
        compute: Compute,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let Weight::Frozen(frozen) = &self.weight else {
            return lora.add_to(self.product(x.clone(), compute), x, ctx);
        };
        let update = Update {
            scale: lora.scale,
            compute,
            saved_as: ctx.compute,
        };
        let factors = [lora.lora_a.val(), lora.lora_b.val()];
        kernels::linear_updated(x, &frozen.matrix, factors, update)
    }

    /// The product with the weight that a merge into the quantizer's format would write.
    fn forward_fake_quantized(
        &self,
        x: Tensor<2>,
        w: &Arc<Matrix>,
        quantizer: Quantizer,
        compute: Compute,
    ) -> Tensor<2> {
        let lora = self.lora.as_ref();
        let factors = lora.map(|lora| [lora.lora_a.val(), lora.lora_b.val()]);
        let scale = lora.map_or(0.0, |lora| lora.scale);
        kernels::linear_fake_quantized(x, w, factors, FakeQuantize { scale, quantizer }, compute)
    }

    /// Multiplies each head with its own rows of the weight, or with their transpose, low-rank update included. Absorbed
    /// attention folds `kv_b_proj` into queries and outputs this way. Has no gradient, and ignores the quantizer: its blocks
    /// do not end at the ends of heads.
    ///
    /// # Shapes
    /// - `x`: `[tokens, heads, in]` (forward) or `[tokens, heads, rows.len]` (transposed)
    /// - returns: `[tokens, heads, rows.len]` (forward) or `[tokens, heads, in]` (transposed)
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn per_head(&self, x: Tensor<3>, rows: HeadRows, ctx: &ForwardContext<'_>) -> Tensor<3> {
        ctx.record_heads(self.weight.frozen(), &x, rows.direction);
        let lora = self.lora.as_ref();
        let dora_scales = lora.and_then(|lora| lora.dora_scales(&self.weight));
        let dora_scales = dora_scales.map(|scales| {
            let of_heads = scales.reshape([1, rows.heads, self.weight.dims()[0] / rows.heads]);
            of_heads.slice([0..1, 0..rows.heads, rows.start..rows.start + rows.len])
        });
        let x = match (&dora_scales, rows.direction) {
            (Some(scales), Direction::Transposed) => x * scales.clone(),
            _ => x,
        };
        let y = match &self.weight {
            Weight::Frozen(frozen) => {
                let compute = ctx.compute_of(PrecisionClass::Linear);
                kernels::heads_linear(x.clone(), &frozen.matrix, rows, compute)
            }
            Weight::Trained(weight) => per_head_dense(x.clone(), weight.val(), rows),
        };
        let Some(lora) = lora else { return y };
        let ([tokens, heads, _], rank) = (x.dims(), lora.rank());
        let a = lora.lora_a.val(); // [rank, in]
        let flat = |x: Tensor<3>| {
            let width = x.dims()[2];
            x.reshape([tokens * heads, width])
        };
        let update = match rows.direction {
            Direction::Forward => {
                let u = flat(x).matmul(a.transpose()).reshape([tokens, heads, rank]);
                per_head_dense(u, lora.lora_b.val(), rows)
            }
            Direction::Transposed => {
                let u = per_head_dense(x, lora.lora_b.val(), rows);
                let width = a.dims()[1];
                flat(u).matmul(a).reshape([tokens, heads, width])
            }
        };
        let y = y + update * lora.scale;
        match (dora_scales, rows.direction) {
            (Some(scales), Direction::Forward) => y * scales,
            _ => y,
        }
    }

    /// Absorbed attention of one sequence over its latents in one kernel, with this layer as `kv_b_proj`; none unless this is a
    /// frozen weight as it is, see [`Self::per_head`] for the rest. Has no gradient.
    ///
    /// # Shapes
    /// - `q`: `[1, seq, heads, dim]`, `latents`: `[kv_seq, 1, rank + rope]`
    /// - returns: `[1, seq, heads, v_dim]`
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn attend_latents(
        &self,
        q: &Tensor<4>,
        latents: &KvBuffer,
        absorbed: Absorbed,
        ctx: &ForwardContext<'_>,
    ) -> Option<Tensor<4>> {
        let (w, q) = (self.as_frozen(ctx)?, q.clone());
        let compute = ctx.compute_of(PrecisionClass::Linear);
        Some(kernels::absorbed_attention(
            q, latents, w, absorbed, compute,
        ))
    }

    /// The loss of every token with this layer as the output head. The logits never exist all at the same time.
    ///
    /// # Shapes
    /// - `hidden`: `[tokens, in]`, `targets`: `[tokens]`, −100 for none
    /// - returns: `[tokens]`, in nats
    pub fn cross_entropy(
        &self,
        hidden: Tensor<2>,
        targets: Tensor<1, Int>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<1> {
        let compute = self.compute(PrecisionClass::Head, ctx);
        match &self.weight {
            Weight::Trained(weight) => {
                kernels::cross_entropy_trained(hidden, weight.val(), targets, compute)
            }
            Weight::Frozen(frozen) => {
                let low_rank = self.low_rank(&hidden, ctx);
                kernels::cross_entropy_frozen(hidden, low_rank, &frozen.matrix, targets, compute)
            }
        }
    }

    /// [`Self::cross_entropy`], and the most likely tokens; without gradients and dropout.
    ///
    /// # Shapes
    /// See [`Self::cross_entropy`].
    pub fn token_scores(
        &self,
        hidden: Tensor<2>,
        targets: Tensor<1, Int>,
        ctx: &ForwardContext<'_>,
    ) -> TokenScores {
        let compute = self.compute(PrecisionClass::Head, ctx);
        match &self.weight {
            Weight::Trained(weight) => {
                kernels::token_scores_trained(hidden, weight.val(), targets, compute)
            }
            Weight::Frozen(frozen) => {
                let low_rank = self.low_rank(&hidden, ctx);
                kernels::token_scores_frozen(hidden, low_rank, &frozen.matrix, targets, compute)
            }
        }
    }

    /// The two factors of an update of this layer as the output head, the first one multiplied with hidden states.
    fn low_rank(&self, hidden: &Tensor<2>, ctx: &ForwardContext<'_>) -> Option<[Tensor<2>; 2]> {
        let lora = self.lora.as_ref()?;
        let low = lora.project(lora.dropped(hidden.clone(), ctx), ctx);
        Some([low, lora.lora_b.val()])
    }
}

impl Lora {
    /// The update of some tokens' rows, without dropout: no activation enters it.
    ///
    /// # Shapes
    /// - `ids`: `[tokens]`
    /// - returns: `[tokens, in]`
    fn embed(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        let low = kernels::embed_trained(ids, self.lora_b.val());
        low.matmul(self.lora_a.val()) * self.scale
    }

    /// Whether the update sees dropped inputs.
    fn drops(&self, ctx: &ForwardContext<'_>) -> bool {
        self.dropout != 0.0 && ctx.dropout_seed.is_some()
    }

    /// The update of `x`, added to `y`.
    fn add_to(&self, y: Tensor<2>, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        kernels::linear_add(y, self.project(x, ctx), self.lora_b.val())
    }

    /// The input as the update sees it.
    fn dropped(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let Some(seed) = ctx.dropout_seed else {
            return x;
        };
        let dropout = Dropout {
            probability: self.dropout,
            seed,
        };
        kernels::dropout(x, dropout.fork(self.dropout_stream))
    }

    /// The first half of the update, `scale · x · aᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, rank]`
    fn project(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let products = PrecisionClass::Lora.compute(ctx.compute);
        kernels::linear_trained(x, self.lora_a.val(), products, ctx.compute) * self.scale
    }

    /// DoRA's scale of every output, `[out]`: its magnitude over the norm of its row, a constant of the gradient. None for a
    /// plain update.
    fn dora_scales(&self, weight: &Weight) -> Option<Tensor<1>> {
        let dora = self.dora.as_ref()?;
        let norms = match &dora.norms {
            Some(norms) => norms.clone(),
            None => self.row_norms(weight),
        };
        Some(dora.lora_magnitude_vector.val() / norms)
    }

    /// The norms of the updated weight's rows, `[out]`, without gradient.
    pub(crate) fn row_norms(&self, weight: &Weight) -> Tensor<1> {
        // In burn, a tensor detached from a parameter still requires a gradient.
        let factors =
            [&self.lora_a, &self.lora_b].map(|factor| factor.val().set_require_grad(false));
        match weight {
            Weight::Frozen(frozen) => kernels::row_norms(&frozen.matrix, factors, self.scale),
            Weight::Trained(weight) => {
                let [a, b] = factors;
                let updated = weight.val().set_require_grad(false) + b.matmul(a) * self.scale;
                updated.powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1).sqrt()
            }
        }
    }
}

/// [`Linear::per_head`] with a dense weight, in burn's own operations.
fn per_head_dense(x: Tensor<3>, w: Tensor<2>, rows: HeadRows) -> Tensor<3> {
    let [out, width] = w.dims();
    let w = w
        .reshape([rows.heads, out / rows.heads, width])
        .slice([0..rows.heads, rows.start..rows.start + rows.len]);
    let w = match rows.direction {
        Direction::Forward => w.swap_dims(1, 2), // [heads, in, len]
        Direction::Transposed => w,              // [heads, len, in]
    };
    x.swap_dims(0, 1).matmul(w).swap_dims(0, 1)
}
