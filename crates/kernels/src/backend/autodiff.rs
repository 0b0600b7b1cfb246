//! The operations under autodiff: what each saves, and its hand-written gradient.
//!
//! An operation none of whose inputs is tracked saves nothing and costs what it costs without autodiff.

use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients as Grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};

use crate::FakeQuantize;
use crate::backend::cached::KvBufferPrimitive;
use crate::backend::gradients::{ExpertsSaved, Gradients, LossSaved};
use crate::backend::kept::{Form, Kept, remember, shared};
use crate::backend::linear::{Absorbed, HeadRows, Update};
use crate::backend::ops::{FactorsPrimitive, Kernels, RoutingPrimitive, StacksPrimitive};
use crate::formats::Matrix;
use crate::ops::adamw::AdamWStep;
use crate::ops::attention::Segments;
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::ops::rope::RopeLayout;
use crate::ops::route::TopK;
use crate::settings::Compute;

/// The loss against a frozen head without a low-rank update, whose gradient is made with it; and the log-sum-exps.
fn cross_entropy_plain<B: Gradients, C: CheckpointStrategy>(
    h: FloatTensor<Autodiff<B, C>>,
    [u, b]: [FloatTensor<B>; 2],
    targets: IntTensor<B>,
    w: Arc<Matrix>,
    compute: Compute,
) -> (FloatTensor<Autodiff<B, C>>, FloatTensor<B>) {
    let (node, h) = (h.node(), h.into_primitive());
    match CrossEntropyPlain
        .prepare::<C>([node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(op) => {
            let [loss, lse, dh] = B::cross_entropy_with_gradients(h, targets, &w, compute);
            (op.finish(dh, loss), lse)
        }
        OpsKind::UnTracked(op) => {
            let (loss, lse) = B::cross_entropy_frozen(h, u, b, targets, w, compute);
            (op.finish(loss), lse)
        }
    }
}

/// Rows without what autodiff knows of them.
fn inner<B: Gradients, C: CheckpointStrategy>(
    rows: KvBufferPrimitive<Autodiff<B, C>>,
) -> KvBufferPrimitive<B> {
    match rows {
        KvBufferPrimitive::Numbers(numbers) => KvBufferPrimitive::Numbers(numbers.into_primitive()),
        KvBufferPrimitive::Blocks(bytes, width) => KvBufferPrimitive::Blocks(bytes, width),
    }
}

/// Registers the gradient of each tracked parent.
fn register<B: Gradients>(
    grads: &mut Grads,
    parents: impl IntoIterator<Item = Option<NodeId>>,
    values: impl IntoIterator<Item = FloatTensor<B>>,
) {
    for (parent, value) in parents.into_iter().zip(values) {
        if let Some(parent) = parent {
            grads.register::<B>(parent, value);
        }
    }
}

impl<B: Gradients, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn linear_frozen(x: FloatTensor<Self>, w: Arc<Matrix>, compute: Compute) -> FloatTensor<Self> {
        let y = B::linear_frozen(x.primitive().clone(), Arc::clone(&w), compute);
        match LinearFrozen
            .prepare::<C>([x.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(op) => op.finish((w, compute), y),
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn linear_trained(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
        kept: Compute,
    ) -> FloatTensor<Self> {
        let (id, wants_x) = (x.id(), w.is_tracked());
        let (nodes, x, w) = ([x.node(), w.node()], x.into_primitive(), w.into_primitive());
        let y = B::linear_trained(x.clone(), w.clone(), compute, kept);
        match LinearTrained.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let x = wants_x.then(|| shared(id, kept, || B::keep(x, kept)));
                op.finish((x, w, compute), y)
            }
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn linear_updated(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        update: Update,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (id, wants_x) = (x.id(), a.is_tracked() || b.is_tracked());
        let nodes = [x.node(), a.node(), b.node()];
        let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
        let (y, low) = B::linear_updated(x.clone(), a.clone(), b.clone(), Arc::clone(&w), update);
        let y = match LinearUpdated.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let kept = update.kept;
                let x = wants_x.then(|| shared(id, kept, || B::keep(x, kept)));
                op.finish(((x, low.clone()), [a, b], w, update), y)
            }
            OpsKind::UnTracked(op) => op.finish(y),
        };
        (y, Self::from_inner(low))
    }

    fn linear_fake_quantized(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        merge: FakeQuantize,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (id, wants_x) = (x.id(), a.is_tracked() || b.is_tracked());
        let nodes = [x.node(), a.node(), b.node()];
        let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
        let y = B::linear_fake_quantized(
            x.clone(),
            a.clone(),
            b.clone(),
            Arc::clone(&w),
            merge,
            compute,
        );
        match LinearMerged.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let x = wants_x.then(|| shared(id, compute, || B::keep(x, compute)));
                op.finish((x, [a, b], w, merge, compute), y)
            }
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn linear_add(
        y: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let nodes = [y.node(), u.node(), b.node()];
        let (y, u, b) = (y.into_primitive(), u.into_primitive(), b.into_primitive());
        let sum = B::linear_add(y, u.clone(), b.clone());
        match LinearAdd.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => op.finish((u, b), sum),
            OpsKind::UnTracked(op) => op.finish(sum),
        }
    }

    fn row_norms(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        w: Arc<Matrix>,
        scale: f32,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::row_norms(
            a.into_primitive(),
            b.into_primitive(),
            w,
            scale,
        ))
    }

    fn heads_linear(
        x: FloatTensor<Self>,
        w: Arc<Matrix>,
        heads: HeadRows,
        compute: Compute,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::heads_linear(x.into_primitive(), w, heads, compute))
    }

    fn embed_frozen(ids: IntTensor<Self>, w: Arc<Matrix>) -> FloatTensor<Self> {
        Self::from_inner(B::embed_frozen(ids, w))
    }

    fn embed_trained(w: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        let (node, w) = (w.node(), w.into_primitive());
        let vocab = w.shape().as_slice()[0];
        let y = B::embed_trained(w, ids.clone());
        match EmbedTrained.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(op) => op.finish((ids, vocab), y),
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let (nodes, x, weight) = (
            [x.node(), weight.node()],
            x.into_primitive(),
            weight.into_primitive(),
        );
        let y = B::rms_norm(x.clone(), weight.clone(), eps);
        match RmsNorm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let kept = Arc::new(Kept::new(Form::Norm(x, weight, eps), 0));
                let y = op.finish(Arc::clone(&kept), y);
                remember(y.id(), &kept);
                y
            }
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let (node, x) = (x.node(), x.into_primitive());
        let y = B::rope(x, cos.clone(), sin.clone(), layout);
        match Rope.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(op) => op.finish((cos, sin, layout), y),
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>, kept: Compute) -> FloatTensor<Self> {
        let (nodes, ids) = ([gate.node(), up.node()], [gate.id(), up.id()]);
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let y = B::swiglu(gate.clone(), up.clone(), kept);
        match Swiglu.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let gate = shared(ids[0], kept, || B::keep(gate, kept));
                let up = shared(ids[1], kept, || B::keep(up, kept));
                let kept = Arc::new(Kept::new(Form::Swiglu([gate, up]), 0));
                let y = op.finish(Arc::clone(&kept), y);
                remember(y.id(), &kept);
                y
            }
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn dropout(x: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        let (node, x) = (x.node(), x.into_primitive());
        let y = B::dropout(x, dropout);
        match Drop.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(op) => op.finish(dropout, y),
            OpsKind::UnTracked(op) => op.finish(y),
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node(), k.node(), v.node()];
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        let (out, lse) =
            B::causal_attention(q.clone(), k.clone(), v.clone(), scale, segments.clone());
        let out = match Attention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let saved = [q, k, v, out.clone(), lse.clone()];
                op.finish((saved, scale, segments), out)
            }
            OpsKind::UnTracked(op) => op.finish(out),
        };
        (out, Self::from_inner(lse))
    }

    fn expanded_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        v_dim: usize,
        scale: f32,
        segments: Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node(), kv.node(), latents.node()];
        let (q, kv) = (q.into_primitive(), kv.into_primitive());
        let latents = latents.into_primitive();
        let inputs = (q.clone(), kv.clone(), latents.clone());
        let (out, lse) =
            B::expanded_attention(inputs.0, inputs.1, inputs.2, v_dim, scale, segments.clone());
        let op = ExpandedAttention.prepare::<C>(nodes).compute_bound();
        let out = match op.stateful() {
            OpsKind::Tracked(op) => {
                let saved = [q, kv, latents, out.clone(), lse.clone()];
                op.finish((saved, v_dim, scale, segments), out)
            }
            OpsKind::UnTracked(op) => op.finish(out),
        };
        (out, Self::from_inner(lse))
    }

    fn absorbed_attention(
        q: FloatTensor<Self>,
        latents: KvBufferPrimitive<Self>,
        w: Arc<Matrix>,
        absorbed: Absorbed,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (q, latents) = (q.into_primitive(), inner(latents));
        Self::from_inner(B::absorbed_attention(q, latents, w, absorbed, compute))
    }

    fn encode_blocks(x: FloatTensor<Self>) -> IntTensor<Self> {
        B::encode_blocks(x.into_primitive())
    }

    fn decode_blocks(rows: KvBufferPrimitive<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::decode_blocks(inner(rows)))
    }

    fn cached_attention(
        q: FloatTensor<Self>,
        k: KvBufferPrimitive<Self>,
        v: KvBufferPrimitive<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let (q, k, v) = (q.into_primitive(), inner(k), inner(v));
        Self::from_inner(B::cached_attention(q, k, v, scale))
    }

    fn latent_attention(
        q: FloatTensor<Self>,
        latents: KvBufferPrimitive<Self>,
        v_dim: usize,
        scale: f32,
    ) -> FloatTensor<Self> {
        let (q, latents) = (q.into_primitive(), inner(latents));
        Self::from_inner(B::latent_attention(q, latents, v_dim, scale))
    }

    fn choose_experts(scores: FloatTensor<Self>, choice: TopK) -> IntTensor<Self> {
        B::choose_experts(scores.into_primitive(), choice)
    }

    fn dispatch_slots(ids: IntTensor<Self>, experts: usize) -> (IntTensor<Self>, IntTensor<Self>) {
        B::dispatch_slots(ids, experts)
    }

    fn prefetch_experts(ids: IntTensor<Self>, bank: Arc<ExpertBank>) -> IntTensor<Self> {
        B::prefetch_experts(ids, bank)
    }

    fn experts_frozen(
        x: FloatTensor<Self>,
        routing: RoutingPrimitive<Self>,
        factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (id, f) = (x.id(), &factors);
        let nodes = [
            &x,
            &routing.weights,
            &f.gate_a,
            &f.gate_b,
            &f.up_a,
            &f.up_b,
            &f.down_a,
            &f.down_b,
        ]
        .map(|t| t.node());
        let (x, routing, factors) = (
            x.into_primitive(),
            inner_routing::<B, C>(routing),
            inner_factors::<B, C>(factors),
        );
        let (y, gate, up) = B::experts_frozen(
            x.clone(),
            routing.clone(),
            factors.clone(),
            Arc::clone(&bank),
            lora,
            compute,
        );
        let y = match ExpertsFrozen.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(op) => {
                let products = [gate.clone(), up.clone()];
                let saved = ExpertsSaved::new((id, x), routing, products, compute);
                op.finish((saved, factors, bank, lora, compute), y)
            }
            OpsKind::UnTracked(op) => op.finish(y),
        };
        (y, Self::from_inner(gate), Self::from_inner(up))
    }

    fn experts_trained(
        x: FloatTensor<Self>,
        routing: RoutingPrimitive<Self>,
        stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let id = x.id();
        let nodes =
            [&x, &routing.weights, &stacks.gate, &stacks.up, &stacks.down].map(|t| t.node());
        let (x, routing) = (x.into_primitive(), inner_routing::<B, C>(routing));
        let stacks = StacksPrimitive {
            gate: stacks.gate.into_primitive(),
            up: stacks.up.into_primitive(),
            down: stacks.down.into_primitive(),
        };
        let (y, gate, up) = B::experts_trained(x.clone(), routing.clone(), stacks.clone(), compute);
        let y = match ExpertsTrained
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(op) => {
                let products = [gate.clone(), up.clone()];
                let saved = ExpertsSaved::new((id, x), routing, products, compute);
                op.finish((saved, stacks, compute), y)
            }
            OpsKind::UnTracked(op) => op.finish(y),
        };
        (y, Self::from_inner(gate), Self::from_inner(up))
    }

    fn cross_entropy_frozen(
        h: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        targets: IntTensor<Self>,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [h.node(), u.node(), b.node()];
        let (u, b) = (u.into_primitive(), b.into_primitive());
        if u.shape()[1] == 0 {
            let (loss, lse) = cross_entropy_plain::<B, C>(h, [u, b], targets, w, compute);
            return (loss, Self::from_inner(lse));
        }
        let h = h.into_primitive();
        let (loss, lse) = B::cross_entropy_frozen(
            h.clone(),
            u.clone(),
            b.clone(),
            targets.clone(),
            Arc::clone(&w),
            compute,
        );
        let loss = match CrossEntropyFrozen
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(op) => {
                let saved = LossSaved {
                    h,
                    targets,
                    lse: lse.clone(),
                };
                op.finish((saved, [u, b], w, compute), loss)
            }
            OpsKind::UnTracked(op) => op.finish(loss),
        };
        (loss, Self::from_inner(lse))
    }

    fn cross_entropy_trained(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (nodes, h, w) = ([h.node(), w.node()], h.into_primitive(), w.into_primitive());
        let (loss, lse) = B::cross_entropy_trained(h.clone(), w.clone(), targets.clone(), compute);
        let loss = match CrossEntropyTrained
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(op) => {
                let saved = LossSaved {
                    h,
                    targets,
                    lse: lse.clone(),
                };
                op.finish((saved, w, compute), loss)
            }
            OpsKind::UnTracked(op) => op.finish(loss),
        };
        (loss, Self::from_inner(lse))
    }

    fn adamw_step(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (p, m, v) = B::adamw_step(
            p.into_primitive(),
            g.into_primitive(),
            m.into_primitive(),
            v.into_primitive(),
            step,
        );
        (
            Self::from_inner(p),
            Self::from_inner(m),
            Self::from_inner(v),
        )
    }

    fn sum_of_squares_f32(x: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::sum_of_squares_f32(x.into_primitive()))
    }
}

fn inner_routing<B: Gradients, C: CheckpointStrategy>(
    routing: RoutingPrimitive<Autodiff<B, C>>,
) -> RoutingPrimitive<B> {
    RoutingPrimitive {
        weights: routing.weights.into_primitive(),
        order: routing.order,
        offsets: routing.offsets,
    }
}

fn inner_factors<B: Gradients, C: CheckpointStrategy>(
    f: FactorsPrimitive<Autodiff<B, C>>,
) -> FactorsPrimitive<B> {
    FactorsPrimitive {
        gate_a: f.gate_a.into_primitive(),
        gate_b: f.gate_b.into_primitive(),
        up_a: f.up_a.into_primitive(),
        up_b: f.up_b.into_primitive(),
        down_a: f.down_a.into_primitive(),
        down_b: f.down_b.into_primitive(),
    }
}

/// Declares a gradient: its name, number of inputs and saved state, and what it does with
/// `(output gradient, input nodes, state, gradients)`.
macro_rules! gradient {
    ($name:ident, $n:literal, $state:ty, |$dy:ident, $parents:ident, $saved:pat_param, $grads:ident| $body:block) => {
        #[derive(Debug)]
        struct $name;

        impl<B: Gradients> Backward<B, $n> for $name {
            type State = $state;

            fn backward(self, ops: Ops<Self::State, $n>, $grads: &mut Grads, _: &mut Checkpointer) {
                let $dy = $grads.consume::<B>(&ops.node);
                let ($parents, $saved) = (
                    ops.parents.map(|parent| parent.map(|node| node.id)),
                    ops.state,
                );
                $body
            }
        }
    };
}

gradient!(
    LinearFrozen,
    1,
    (Arc<Matrix>, Compute),
    |dy, parents, (w, compute), grads| {
        register::<B>(grads, parents, [B::linear_frozen_dx(dy, &w, compute)]);
    }
);

gradient!(
    LinearTrained,
    2,
    (Option<Arc<Kept<FloatTensor<B>>>>, FloatTensor<B>, Compute),
    |dy, parents, (x, w, compute), grads| {
        let [x_node, w_node] = parents;
        if let Some(node) = x_node {
            grads.register::<B>(node, B::linear_trained_dx(dy.clone(), w, compute));
        }
        if let (Some(node), Some(x)) = (w_node, x) {
            grads.register::<B>(node, B::linear_dw(dy, &x, compute));
        }
    }
);

gradient!(
    LinearUpdated,
    3,
    (
        (Option<Arc<Kept<FloatTensor<B>>>>, FloatTensor<B>),
        [FloatTensor<B>; 2],
        Arc<Matrix>,
        Update
    ),
    |dy, parents, ((x, low), factors, w, update), grads| {
        let [x_node, factor_nodes @ ..] = parents;
        let want_x = x_node.is_some();
        let kept = (x.as_deref(), low);
        let (dx, factors) = B::linear_updated_grads(dy, kept, factors, (&w, update), want_x);
        register::<B>(grads, [x_node], dx);
        register::<B>(grads, factor_nodes, factors.into_iter().flatten());
    }
);

gradient!(
    LinearMerged,
    3,
    (
        Option<Arc<Kept<FloatTensor<B>>>>,
        [FloatTensor<B>; 2],
        Arc<Matrix>,
        FakeQuantize,
        Compute
    ),
    |dy, parents, (x, factors, w, merge, compute), grads| {
        let [x_node, factor_nodes @ ..] = parents;
        let settings = (&*w, merge, compute);
        let want_x = x_node.is_some();
        let (dx, factors) = B::linear_merged_grads(dy, x.as_deref(), factors, settings, want_x);
        register::<B>(grads, [x_node], dx);
        register::<B>(grads, factor_nodes, factors.into_iter().flatten());
    }
);

gradient!(
    LinearAdd,
    3,
    (FloatTensor<B>, FloatTensor<B>),
    |dy, parents, (u, b), grads| {
        let [y_node, u_node, b_node] = parents;
        if let Some(node) = u_node {
            grads.register::<B>(node, B::linear_trained_dx(dy.clone(), b, Compute::F32));
        }
        if let Some(node) = b_node {
            let u = Kept::new(Form::Float(u), 0);
            grads.register::<B>(node, B::linear_dw(dy.clone(), &u, Compute::F32));
        }
        register::<B>(grads, [y_node], [dy]);
    }
);

gradient!(
    EmbedTrained,
    1,
    (IntTensor<B>, usize),
    |dy, parents, (ids, vocab), grads| {
        register::<B>(grads, parents, [B::embed_dw(ids, dy, vocab)]);
    }
);

gradient!(
    RmsNorm,
    2,
    Arc<Kept<FloatTensor<B>>>,
    |dy, parents, kept, grads| {
        if let Form::Norm(x, weight, eps) = kept.form() {
            let values = B::rms_norm_grads(dy, x.clone(), weight.clone(), *eps);
            register::<B>(grads, parents, values);
        }
    }
);

gradient!(
    Rope,
    1,
    (FloatTensor<B>, FloatTensor<B>, RopeLayout),
    |dy, parents, (cos, sin, layout), grads| {
        register::<B>(grads, parents, [B::rope_dx(dy, [cos, sin], layout)]);
    }
);

gradient!(
    Swiglu,
    2,
    Arc<Kept<FloatTensor<B>>>,
    |dy, parents, kept, grads| {
        if let Form::Swiglu(products) = kept.form() {
            let products = products.clone();
            drop(kept);
            register::<B>(grads, parents, B::swiglu_grads(dy, products));
        }
    }
);

gradient!(Drop, 1, Dropout, |dy, parents, dropout, grads| {
    register::<B>(grads, parents, [B::dropout(dy, dropout)]);
});

gradient!(
    Attention,
    3,
    ([FloatTensor<B>; 5], f32, Segments),
    |dy, parents, (saved, scale, segments), grads| {
        let values = B::attention_grads(dy, saved, scale, &segments);
        register::<B>(grads, parents, values);
    }
);

gradient!(
    ExpandedAttention,
    3,
    ([FloatTensor<B>; 5], usize, f32, Segments),
    |dy, parents, (saved, v_dim, scale, segments), grads| {
        let values = B::expanded_attention_grads(dy, saved, v_dim, scale, &segments);
        register::<B>(grads, parents, values);
    }
);

gradient!(
    ExpertsFrozen,
    8,
    (
        ExpertsSaved<B>,
        FactorsPrimitive<B>,
        Arc<ExpertBank>,
        ExpertLora,
        Compute
    ),
    |dy, parents, (saved, factors, bank, lora, compute), grads| {
        let [x, weights, factor_nodes @ ..] = parents;
        let wanted = factor_nodes.iter().any(Option::is_some);
        let (inputs, factors) =
            B::experts_frozen_grads(dy, saved, &factors, (&bank, lora, compute), wanted);
        register::<B>(grads, [x, weights], inputs);
        register::<B>(grads, factor_nodes, factors.into_iter().flatten());
    }
);

gradient!(
    ExpertsTrained,
    5,
    (ExpertsSaved<B>, StacksPrimitive<B>, Compute),
    |dy, parents, (saved, stacks, compute), grads| {
        let [x, weights, stack_nodes @ ..] = parents;
        let (inputs, stacks) = B::experts_trained_grads(dy, saved, &stacks, compute);
        register::<B>(grads, [x, weights], inputs);
        register::<B>(grads, stack_nodes, stacks);
    }
);

gradient!(
    CrossEntropyPlain,
    1,
    FloatTensor<B>,
    |dloss, parents, dh, grads| {
        register::<B>(grads, parents, [B::scaled_rows(dh, dloss)]);
    }
);

gradient!(
    CrossEntropyFrozen,
    3,
    (
        LossSaved<FloatTensor<B>, IntTensor<B>>,
        [FloatTensor<B>; 2],
        Arc<Matrix>,
        Compute
    ),
    |dloss, parents, (saved, low_rank, w, compute), grads| {
        let want_b = parents[2].is_some();
        register::<B>(
            grads,
            parents,
            B::cross_entropy_frozen_grads(dloss, saved, low_rank, (&w, compute), want_b),
        );
    }
);

gradient!(
    CrossEntropyTrained,
    2,
    (
        LossSaved<FloatTensor<B>, IntTensor<B>>,
        FloatTensor<B>,
        Compute
    ),
    |dloss, parents, (saved, w, compute), grads| {
        let want_w = parents[1].is_some();
        register::<B>(
            grads,
            parents,
            B::cross_entropy_trained_grads(dloss, saved, w, compute, want_w),
        );
    }
);
