//! A mixture of experts: route → dispatch → experts → combine, plus the experts that every token shares.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::experts::Experts;
use super::linear::Linear;
use super::mlp::Mlp;
use super::router::Router;
use crate::forward::context::ForwardContext;
use crate::forward::exchange::RunningExperts;
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

/// A mixture that runs in turns, because other ranks have some of its experts.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there is one for each micro-batch"
)]
#[derive(Debug)]
pub(crate) enum MoeRun {
    /// The output, where no other rank has experts.
    Done(Tensor<2>),
    /// The input, the rows that travel, and the output of the shared experts.
    Running(Tensor<2>, Vec<RunningExperts>, Option<Tensor<2>>),
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
        let mut run = self.send(x, ctx, layer_idx);
        self.serve(&mut run, ctx);
        self.finish(run, ctx)
    }

    /// Chooses experts. Those of other ranks get their rows; if there are none, all is computed.
    pub(crate) fn send(
        &self,
        x: Tensor<2>,
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> MoeRun {
        let logits = self.gate.forward_as(PrecisionClass::Router, x.clone(), ctx);
        let routed = self.router.route(logits.clone(), ctx.replay.take());
        ctx.record_routing(|| RoutingRecord {
            layer_idx,
            logits,
            routed: routed.clone(),
        });
        if let Some(running) = self.experts.send(&x, &routed, ctx) {
            return MoeRun::Running(x, running, None);
        }
        MoeRun::Done(match &self.shared_experts {
            Some(shared) => self.experts.forward_with(shared, x, routed, ctx),
            None => self.experts.forward(x, routed, ctx),
        })
    }

    /// Computes the shared experts while rows travel, and serves the rows that came.
    pub(crate) fn serve(&self, run: &mut MoeRun, ctx: &ForwardContext<'_>) {
        if let MoeRun::Running(x, running, shared_sum) = run {
            let shared = self.shared_experts.as_ref();
            *shared_sum = shared.map(|shared| shared.forward(x.clone(), ctx));
            self.experts.serve(running, ctx);
        }
    }

    /// The output, from what came back.
    pub(crate) fn finish(&self, run: MoeRun, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let (running, shared_sum) = match run {
            MoeRun::Done(y) => return y,
            MoeRun::Running(_, running, shared_sum) => (running, shared_sum),
        };
        let sum = self.experts.finish(running, ctx);
        match shared_sum {
            Some(shared) => sum + shared,
            None => sum,
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
