//! The gated feed-forward layer, `down(silu(gate(x)) · up(x))`.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::context::ForwardContext;
use crate::linear::Linear;
use crate::precision::Class;

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
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let [gate, up] = Linear::forward_both([&self.gate_proj, &self.up_proj], x, ctx);
        let kept = ctx.compute_of(Class::Linear);
        self.down_proj.forward(kernels::swiglu(gate, up, kept), ctx)
    }
}
