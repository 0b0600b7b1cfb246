//! Linear layers: one of the two places where a weight meets an activation (the other is `moe/experts.rs`).
//!
//! A weight is frozen, in whatever bytes its file holds, or trained, as f32. A low-rank update may sit on either.
//! Training, evaluation and serving, in every number format, go through the few functions here, so a new format or
//! a new kind of update changes this file, its sister and the kernels, and no model.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use kernels::{
    Absorbed, Compute, Direction, Dropout, FakeQuantize, HeadRows, KvBuffer, Matrix, Quantizer,
    Update,
};

use crate::context::{ForwardContext, Observe};
use crate::lora::Lora;
use crate::precision::Class;

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

    /// Visits the matrix of a frozen weight.
    pub(crate) fn for_each_frozen(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        if let Self::Frozen(frozen) = self {
            visit(Arc::make_mut(&mut frozen.matrix));
        }
    }

    /// The rows of some tokens: an embedding.
    ///
    /// # Shapes
    /// - `ids`: `[tokens]`
    /// - returns: `[tokens, in]`
    pub fn embed(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        match self {
            Self::Frozen(frozen) => kernels::embed_frozen(ids, &frozen.matrix),
            Self::Trained(weight) => kernels::embed_trained(ids, weight.val()),
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
    /// If there is one, a frozen weight is read as it would be written in this format, its update folded in.
    #[module(skip)]
    pub quantizer: Option<Quantizer>,
}

impl Linear {
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    ///
    /// # Panics
    /// If the width does not fit.
    pub fn forward(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        self.forward_as(Class::Linear, x, ctx)
    }

    /// [`Self::forward`] in the precision of another class.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    ///
    /// # Panics
    /// If the width does not fit.
    pub fn forward_as(&self, class: Class, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        ctx.observe_input(&self.weight, &x);
        let compute = self.compute(class, ctx);
        self.biased(match (&self.weight, self.quantizer) {
            (Weight::Frozen(frozen), Some(quantizer)) => {
                self.forward_merged(x, &frozen.matrix, quantizer, compute)
            }
            _ => self.forward_updated(x, compute, ctx),
        })
    }

    /// What its products compute in. A head that is rounded to bf16 would move every probability, and read no byte less.
    fn compute(&self, class: Class, ctx: &ForwardContext<'_>) -> Compute {
        let compute = ctx.compute_of(class);
        match &self.weight {
            Weight::Frozen(frozen)
                if class == Class::Head && compute.over(&frozen.matrix) == Compute::Bf16 =>
            {
                Compute::F32
            }
            _ => compute,
        }
    }

    /// [`Self::forward`] of two layers with the same input, whose products are made together where both are frozen
    /// weights as they are.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]` each
    ///
    /// # Panics
    /// If a width does not fit.
    pub fn forward_both(
        both: [&Self; 2],
        x: Tensor<2>,
        ctx: &ForwardContext<'_>,
    ) -> [Tensor<2>; 2] {
        let [Some(first), Some(second)] = both.map(|linear| linear.bare(ctx)) else {
            return both.map(|linear| linear.forward(x.clone(), ctx));
        };
        let compute = ctx.compute_of(Class::Linear);
        let [y, z] = kernels::linear_frozen_pair(x, [first, second], compute);
        [both[0].biased(y), both[1].biased(z)]
    }

    /// The weight, where it is frozen and multiplied as it is, and nobody asks for its input.
    pub(crate) fn bare(&self, ctx: &ForwardContext<'_>) -> Option<&Arc<Matrix>> {
        let is_bare = self.lora.is_none() && self.quantizer.is_none();
        match &self.weight {
            Weight::Frozen(frozen) if is_bare && ctx.observe != Observe::Inputs => {
                Some(&frozen.matrix)
            }
            _ => None,
        }
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
        let gains = lora.gains(&self.weight).map(Tensor::unsqueeze::<2>);
        if !lora.drops(ctx) {
            let y = self.updated(lora, x, compute, ctx);
            return match gains {
                Some(gains) => y * gains,
                None => y,
            };
        }
        let (y, x) = (self.product(x.clone(), compute), lora.dropped(x, ctx));
        let Some(gains) = gains else {
            return lora.add_to(y, x, ctx);
        };
        // What DoRA changes is of dropped inputs only, its share of the base's product included.
        let dropped = self.product(x.clone(), compute);
        y - dropped.clone() + lora.add_to(dropped, x, ctx) * gains
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
            kept: ctx.compute,
        };
        let factors = [lora.lora_a.val(), lora.lora_b.val()];
        kernels::linear_updated(x, &frozen.matrix, factors, update)
    }

    /// The product with the weight that a merge into the quantizer's format would write.
    fn forward_merged(
        &self,
        x: Tensor<2>,
        w: &Arc<Matrix>,
        quantizer: Quantizer,
        compute: Compute,
    ) -> Tensor<2> {
        let none = |shape: [usize; 2]| Tensor::zeros(shape, &x.device());
        let (factors, scale) = match &self.lora {
            Some(lora) => ([lora.lora_a.val(), lora.lora_b.val()], lora.scale),
            None => ([none([0, w.cols()]), none([w.rows(), 0])], 0.0),
        };
        kernels::linear_fake_quantized(x, w, factors, FakeQuantize { scale, quantizer }, compute)
    }

    /// Multiplies each head with its own rows of the weight, or with their transpose, low-rank update included:
    /// what folds `kv_b_proj` into queries and outputs while decoding. Without gradient, and without the quantizer, whose
    /// blocks do not end where heads do.
    ///
    /// # Shapes
    /// - `x`: `[tokens, heads, in]` (forward) or `[tokens, heads, rows.len]` (transposed)
    /// - returns: `[tokens, heads, rows.len]` (forward) or `[tokens, heads, in]` (transposed)
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn per_head(&self, x: Tensor<3>, rows: HeadRows, ctx: &ForwardContext<'_>) -> Tensor<3> {
        ctx.observe_heads(&self.weight, &x, rows.direction);
        let gains = self.lora.as_ref().and_then(|lora| lora.gains(&self.weight));
        let gains = gains.map(|gains| {
            let of_heads = gains.reshape([1, rows.heads, self.weight.dims()[0] / rows.heads]);
            of_heads.slice([0..1, 0..rows.heads, rows.start..rows.start + rows.len])
        });
        let x = match (&gains, rows.direction) {
            (Some(gains), Direction::Transposed) => x * gains.clone(),
            _ => x,
        };
        let y = match &self.weight {
            Weight::Frozen(frozen) => {
                let compute = ctx.compute_of(Class::Linear);
                kernels::heads_linear(x.clone(), &frozen.matrix, rows, compute)
            }
            Weight::Trained(weight) => per_head_dense(x.clone(), weight.val(), rows),
        };
        let Some(lora) = &self.lora else { return y };
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
        match (gains, rows.direction) {
            (Some(gains), Direction::Forward) => y * gains,
            _ => y,
        }
    }

    /// Attention of one sequence over its latents with this layer, as `kv_b_proj`, folded into queries and outputs, all at
    /// once; none where this is more than a frozen weight, which [`Self::per_head`] is for. Without gradient.
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
        let (w, q) = (self.bare(ctx)?, q.clone());
        let compute = ctx.compute_of(Class::Linear);
        Some(kernels::absorbed_attention(
            q, latents, w, absorbed, compute,
        ))
    }

    /// The loss of every token with this layer as the output head; the logits are never held together.
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
        let compute = self.compute(Class::Head, ctx);
        match (&self.weight, &self.lora) {
            (Weight::Trained(weight), _) => {
                kernels::cross_entropy_trained(hidden, weight.val(), targets, compute)
            }
            (Weight::Frozen(frozen), Some(lora)) => {
                let low = lora.project(lora.dropped(hidden.clone(), ctx), ctx);
                let low_rank = [low, lora.lora_b.val()];
                kernels::cross_entropy_frozen(hidden, low_rank, &frozen.matrix, targets, compute)
            }
            (Weight::Frozen(frozen), None) => {
                let none = [hidden.dims()[0], frozen.matrix.rows()]
                    .map(|rows| Tensor::zeros([rows, 0], &hidden.device()));
                kernels::cross_entropy_frozen(hidden, none, &frozen.matrix, targets, compute)
            }
        }
    }
}

impl Lora {
    /// Whether the update sees another input than the weight.
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
        kernels::dropout(x, dropout.fork(self.site))
    }

    /// The first half of the update, `scale · x · aᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, rank]`
    fn project(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let products = Class::Lora.compute(ctx.compute);
        kernels::linear_trained(x, self.lora_a.val(), products, ctx.compute) * self.scale
    }

    /// DoRA's factor of every output, `[out]`: its magnitude over the norm of its row, which counts as a constant. None
    /// for a plain update.
    fn gains(&self, weight: &Weight) -> Option<Tensor<1>> {
        let dora = self.dora.as_ref()?;
        let norms = match &dora.norms {
            Some(norms) => norms.clone(),
            None => self.row_norms(weight),
        };
        Some(dora.lora_magnitude_vector.val() / norms)
    }

    /// The norms of the updated weight's rows, `[out]`, without gradient.
    pub(crate) fn row_norms(&self, weight: &Weight) -> Tensor<1> {
        // In burn, what is detached from a parameter still asks for a gradient.
        let factors =
            [&self.lora_a, &self.lora_b].map(|factor| factor.val().set_require_grad(false));
        match weight {
            Weight::Frozen(frozen) => kernels::row_norms(&frozen.matrix, factors, self.scale),
            Weight::Trained(weight) => {
                let [a, b] = factors;
                let whole = weight.val().set_require_grad(false) + b.matmul(a) * self.scale;
                whole.powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1).sqrt()
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
