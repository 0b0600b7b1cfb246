//! Low-rank updates, the modules.
//!
//! An update is `scale · b · a` on a weight `[out, in]`, with `a [rank, in]` and `b [out, rank]`. It is applied to the
//! activations, `y += (scale · drop(x) · aᵀ) · bᵀ`, or added to the weight tile by tile if the sum is fake-quantized;
//! training never forms the updated weight as a whole (except DoRA on a trained weight, for its norms).
//!
//! DoRA (arXiv:2402.09353) gives every row of the updated weight a trained length: `m_i · (w + scale · b · a)_i / ‖·‖`, with
//! the norm a constant of the gradient.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

/// The low-rank update of one linear layer.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[rank, in]`.
    pub lora_a: Param<Tensor<2>>,
    /// `[out, rank]`.
    pub lora_b: Param<Tensor<2>>,
    /// Multiplier of the update.
    #[module(skip)]
    pub scale: f32,
    /// Probability of dropping an input element.
    #[module(skip)]
    pub dropout: f32,
    /// This module's number, which gives it random values of its own.
    #[module(skip)]
    pub dropout_stream: u64,
    /// DoRA's part.
    pub dora: Option<Dora>,
}

/// DoRA's part of an update.
#[derive(Module, Debug)]
pub struct Dora {
    /// The length of every row of the updated weight, `[out]`.
    pub lora_magnitude_vector: Param<Tensor<1>>,
    /// The norms of those rows, `[out]`, if no training changes them.
    #[module(skip)]
    pub norms: Option<Tensor<1>>,
}

impl Lora {
    /// Width of the bottleneck.
    pub fn rank(&self) -> usize {
        self.lora_a.val().dims()[0]
    }

    /// Whether one of its tensors is trained.
    pub(crate) fn is_trained(&self) -> bool {
        let factors = [&self.lora_a, &self.lora_b];
        factors.iter().any(|factor| factor.val().is_require_grad())
    }
}

/// A tensor that is trained.
pub(crate) fn parameter<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Param<Tensor<D>> {
    let tensor = Tensor::from_data(TensorData::new(values, shape), device);
    Param::initialized(
        ParamId::new(),
        tensor.set_require_grad(device.is_autodiff()),
    )
}
