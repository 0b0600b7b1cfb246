//! Linear layers: one of the two places where a weight meets an activation (the other is `moe/experts.rs`).
//!
//! A weight is frozen, in whatever bytes its file holds, or trained, as f32. A low-rank update may sit on either.
//! Training, evaluation and serving, in every number format, go through the few functions here, so a new format or
//! a new kind of update changes this file, its sister and the kernels, and no model.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use kernels::{Compute, Direction, Dropout, HeadRows, Matrix, Merge, Quantizer};

use crate::lora::Lora;
use crate::pass::Pass;
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
    pub fn forward(&self, x: Tensor<2>, pass: &Pass<'_>) -> Tensor<2> {
        self.forward_as(Class::Linear, x, pass)
    }

    /// [`Self::forward`] in the precision of another class.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    ///
    /// # Panics
    /// If the width does not fit.
    pub fn forward_as(&self, class: Class, x: Tensor<2>, pass: &Pass<'_>) -> Tensor<2> {
        let compute = pass.compute_of(class);
        let y = match (&self.weight, self.quantizer) {
            (Weight::Frozen(frozen), Some(quantizer)) => {
                self.forward_merged(x, &frozen.matrix, quantizer, compute)
            }
            (Weight::Frozen(frozen), None) => {
                let y = kernels::linear_frozen(x.clone(), &frozen.matrix, compute);
                self.add_update(y, x, pass)
            }
            (Weight::Trained(weight), _) => {
                let y = kernels::linear_trained(x.clone(), weight.val(), compute, compute);
                self.add_update(y, x, pass)
            }
        };
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    fn add_update(&self, y: Tensor<2>, x: Tensor<2>, pass: &Pass<'_>) -> Tensor<2> {
        match &self.lora {
            Some(lora) => kernels::linear_add(y, lora.project(x, pass), lora.lora_b.val()),
            None => y,
        }
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
        kernels::linear_merged(x, w, factors, Merge { scale, quantizer }, compute)
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
    pub fn per_head(&self, x: Tensor<3>, rows: HeadRows) -> Tensor<3> {
        let y = match &self.weight {
            Weight::Frozen(frozen) => kernels::heads_linear(x.clone(), &frozen.matrix, rows),
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
        y + update * lora.scale
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
        pass: &Pass<'_>,
    ) -> Tensor<1> {
        let compute = pass.compute_of(Class::Head);
        match (&self.weight, &self.lora) {
            (Weight::Trained(weight), _) => {
                kernels::cross_entropy_trained(hidden, weight.val(), targets, compute)
            }
            (Weight::Frozen(frozen), Some(lora)) => {
                let low_rank = [lora.project(hidden.clone(), pass), lora.lora_b.val()];
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
    /// The first half of the update, `scale · drop(x) · aᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, rank]`
    pub(crate) fn project(&self, x: Tensor<2>, pass: &Pass<'_>) -> Tensor<2> {
        let x = match pass.dropout_seed {
            Some(seed) => kernels::dropout(
                x,
                Dropout {
                    probability: self.dropout,
                    seed,
                }
                .fork(self.site),
            ),
            None => x,
        };
        let products = Class::Lora.compute(pass.compute);
        kernels::linear_trained(x, self.lora_a.val(), products, pass.compute) * self.scale
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
