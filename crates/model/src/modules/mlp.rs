//! The gated feed-forward layer, `down(silu(gate(x)) · up(x))`.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::forward::context::ForwardContext;
use crate::keys::{self, Projection};
use crate::modules::linear::Linear;
use crate::precision::PrecisionClass;

/// A dense feed-forward layer, or the shared experts of a mixture.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[intermediate_size, hidden_size]`.
    pub gate_proj: Linear,
    /// `[intermediate_size, hidden_size]`.
    pub up_proj: Linear,
    /// `[hidden_size, intermediate_size]`.
    pub down_proj: Linear,
}

impl Mlp {
    /// Its linear layers; `module` says which of a model's feed-forward parts this is.
    pub(crate) fn linears(
        &self,
        module: fn(Projection) -> keys::Module,
    ) -> [(keys::Module, &Linear); 3] {
        [
            (module(Projection::Gate), &self.gate_proj),
            (module(Projection::Up), &self.up_proj),
            (module(Projection::Down), &self.down_proj),
        ]
    }

    /// [`Self::linears`], to change them.
    pub(crate) fn linears_mut(
        &mut self,
        module: fn(Projection) -> keys::Module,
    ) -> [(keys::Module, &mut Linear); 3] {
        [
            (module(Projection::Gate), &mut self.gate_proj),
            (module(Projection::Up), &mut self.up_proj),
            (module(Projection::Down), &mut self.down_proj),
        ]
    }

    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let [gate, up] = Linear::forward_pair([&self.gate_proj, &self.up_proj], x, ctx);
        let kept = ctx.compute_of(PrecisionClass::Linear);
        self.down_proj.forward(kernels::swiglu(gate, up, kept), ctx)
    }
}
