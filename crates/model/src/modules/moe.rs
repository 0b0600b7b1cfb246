//! A mixture of experts: route → dispatch → experts → combine, plus the experts that every token shares.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::experts::Experts;
use super::linear::Linear;
use super::mlp::Mlp;
use super::router::Router;
use crate::forward::context::ForwardContext;
use crate::forward::routing::RoutingRecord;
use crate::precision::PrecisionClass;

/// The feed-forward part of a mixture layer.
#[derive(Module, Debug)]
pub struct Moe {
    /// The router's weight `[n_routed_experts, hidden_size]`; no `gate_proj`.
    pub gate: Linear,
    /// The router's decisions.
    #[module(skip)]
    pub router: Router,
    /// The routed experts.
    pub experts: Experts,
    /// The shared experts, fused into one MLP.
    pub shared_experts: Option<Mlp>,
}

impl Moe {
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    /// - returns: `[tokens, hidden_size]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> Tensor<2> {
        let logits = self.gate.forward_as(PrecisionClass::Router, x.clone(), ctx);
        let routed = self.router.route(logits.clone(), ctx.replay.take());
        ctx.record_routing(|| RoutingRecord {
            layer_idx,
            logits,
            routed: routed.clone(),
        });
        match &self.shared_experts {
            Some(shared) => self.experts.forward_with(shared, x, routed, ctx),
            None => self.experts.forward(x, routed, ctx),
        }
    }

    /// The `n` experts of each token that the router would choose for `x`, `[tokens, hidden_size]` → `[tokens, n]`.
    pub(crate) fn likely_experts(
        &self,
        x: Tensor<2>,
        n: usize,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2, Int> {
        let logits = self.gate.forward_as(PrecisionClass::Router, x, ctx);
        self.router.top_k(logits, n)
    }
}
