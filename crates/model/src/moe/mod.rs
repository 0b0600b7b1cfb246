//! A mixture of experts: route → dispatch → experts → combine, plus the experts that every token shares.

pub mod experts;
pub mod router;

use burn::module::Module;
use burn::tensor::Tensor;

use self::experts::Experts;
use self::router::Router;
use crate::context::{ForwardContext, Observe, RoutingRecord};
use crate::linear::Linear;
use crate::mlp::Mlp;
use crate::precision::Class;

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
        let logits = self.gate.forward_as(Class::Router, x.clone(), ctx);
        let routed = self.router.route(logits.clone(), ctx.replay.take());
        if ctx.observe == Observe::Routing {
            ctx.routing.push(RoutingRecord {
                layer_idx,
                logits,
                routed: routed.clone(),
            });
        }
        match &self.shared_experts {
            Some(shared) => self.experts.forward_with(shared, x, routed, ctx),
            None => self.experts.forward(x, routed, ctx),
        }
    }

    /// Whether experts are to be asked for before they are chosen: only then, and where text is generated, are they read
    /// from a file.
    pub(crate) fn wants_prefetch(&self, ctx: &ForwardContext<'_>) -> bool {
        self.router.n_prefetch > 0 && self.experts.is_cached() && !ctx.caches.is_empty()
    }

    /// Has the experts read from their file that tokens will probably choose, to judge by `x` `[tokens, hidden_size]`, which
    /// is near to what the router will see.
    pub(crate) fn expect(&self, x: Tensor<2>, ctx: &ForwardContext<'_>) {
        let logits = self.gate.forward_as(Class::Router, x, ctx);
        self.experts.expect(self.router.top_k(logits));
    }
}
