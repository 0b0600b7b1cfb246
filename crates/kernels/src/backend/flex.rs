//! The operations on the CPU backend: burn's tensors in, slices to the kernels, tensors out.

mod absorbed;
mod attention;
mod cached;
mod experts;
mod gradients;
mod heads;
mod loss;
mod products;
mod values;

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::DType;
use burn_flex::FlexTensor;
use half::bf16;
use rayon::prelude::*;

use self::attention::{attend, shape_apart, shape_together};
use self::cached::RowValues;
use self::experts::{
    FactorValues, RoutingValues, StackValues, experts_forward, frozen_experts, mixture_forward,
};
use self::loss::loss_forward;
use self::products::{fake_quantized, nt, nt_pair, nt_sum, scaled, trained};
use self::values::{ELEMENTS, Floats, floats, int_values, ints, owned, swiglu_of};
use crate::backend::cached::KvBufferPrimitive;
use crate::backend::linear::{Absorbed, FakeQuantize, HeadRows, Update};
use crate::backend::ops::{FactorsPrimitive, Kernels, RoutingPrimitive, StacksPrimitive};
use crate::backend::plain;
use crate::formats::Matrix;
use crate::gemv::MAX_GEMV_ROWS;
use crate::matmul::{self, WeightOperand};
use crate::memory::MatMut;
use crate::ops::adamw::{self, AdamWStep};
use crate::ops::attention::{KvInputs, Segments};
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts, serves_fused};
use crate::ops::rope::{self, RopeLayout};
use crate::ops::route::{self, TopK};
use crate::ops::{rms_norm, row_norms};
use crate::settings::{Accumulate, Compute};

impl Kernels for Flex {
    fn linear_frozen(x: FlexTensor, w: Arc<Matrix>, compute: Compute) -> FlexTensor {
        let x = Floats::rounded(&x, compute.before_products());
        nt(&x, WeightOperand::frozen(&w, compute))
    }

    fn linear_frozen_pair(
        x: FlexTensor,
        first: Arc<Matrix>,
        second: Arc<Matrix>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let values = Floats::new(&x);
        let weights = [&first, &second].map(|w| WeightOperand::frozen(w, compute));
        nt_pair(&values, weights).unwrap_or_else(|| {
            plain::linear_frozen_pair::<Self>(x, [first.clone(), second.clone()], compute)
        })
    }

    fn linear_trained(x: FlexTensor, w: FlexTensor, compute: Compute, _: Compute) -> FlexTensor {
        let w = Floats::new(&w);
        nt(
            &Floats::rounded(&x, compute.before_products()),
            trained(&w, compute),
        )
    }

    fn linear_updated(
        x: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        w: Arc<Matrix>,
        update: Update,
    ) -> (FlexTensor, FlexTensor) {
        let [values, a, b] = [&x, &a, &b].map(Floats::new);
        let low = scaled(&nt(&values, trained(&a, Compute::F32)), update.scale);
        let x = Floats::rounded(&x, update.compute.before_products());
        let y = nt_sum(&[
            (x.mat(), WeightOperand::frozen(&w, update.compute)),
            (low.mat(), trained(&b, Compute::F32)),
        ]);
        (y, low.tensor().clone())
    }

    fn linear_fake_quantized(
        x: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        w: Arc<Matrix>,
        merge: FakeQuantize,
        compute: Compute,
    ) -> FlexTensor {
        let factors = [&a, &b].map(Floats::new);
        let w = WeightOperand::frozen(&w, compute).fake_quantized(fake_quantized(&factors, merge));
        nt(&Floats::rounded(&x, w.compute().before_products()), w)
    }

    fn linear_add(mut y: FlexTensor, u: FlexTensor, b: FlexTensor) -> FlexTensor {
        let (u, b) = (Floats::new(&u), Floats::new(&b));
        y = owned(y);
        let [rows, cols] = y.layout().shape().dims();
        matmul::nt(
            u.mat(),
            trained(&b, Compute::F32),
            MatMut::dense(y.storage_mut(), rows, cols),
            Accumulate::Add,
        );
        y
    }

    fn row_norms(a: FlexTensor, b: FlexTensor, w: Arc<Matrix>, scale: f32) -> FlexTensor {
        let factors = [&a, &b].map(Floats::new);
        let [a, b] = factors.each_ref().map(Floats::mat);
        let update = (a.rows() > 0).then_some((a, b, scale));
        floats(
            row_norms::row_norms(WeightOperand::frozen(&w, Compute::F32), update),
            [w.rows()],
        )
    }

    fn heads_linear(x: FlexTensor, w: Arc<Matrix>, rows: HeadRows, compute: Compute) -> FlexTensor {
        heads::heads_linear(&Floats::new(&x), &w, rows, compute)
    }

    fn embed_frozen(ids: FlexTensor, w: Arc<Matrix>) -> FlexTensor {
        let (ids, width) = (int_values(&ids), w.cols());
        let mut out = vec![0.0; ids.len() * width];
        out.chunks_mut(width)
            .zip(&ids)
            .for_each(|(row, id)| w.decode(*id as usize..*id as usize + 1, 0..width, row));
        floats(out, [ids.len(), width])
    }

    fn embed_trained(w: FlexTensor, ids: FlexTensor) -> FlexTensor {
        let (w, ids) = (Floats::new(&w), int_values(&ids));
        let [_, width] = w.dims();
        let rows = ids
            .iter()
            .flat_map(|id| &w[*id as usize * width..][..width])
            .copied()
            .collect();
        floats(rows, [ids.len(), width])
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
        let (x, weight) = (Floats::new(&x), Floats::new(&weight));
        let [rows, width] = x.dims();
        floats(rms_norm::forward(&x, width, &weight, eps), [rows, width])
    }

    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, layout: RopeLayout) -> FlexTensor {
        rotate(&x, [&cos, &sin], layout, rope::Rotation::Forward)
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor, _: Compute) -> FlexTensor {
        swiglu_of(&Floats::new(&gate), &Floats::new(&up))
    }

    fn dropout(x: FlexTensor, dropout: Dropout) -> FlexTensor {
        let x = Floats::new(&x);
        let mut out = x.to_vec();
        out.par_chunks_mut(ELEMENTS)
            .enumerate()
            .for_each(|(i, part)| dropout.apply(part, (i * ELEMENTS) as u64));
        floats(out, x.dims::<2>())
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        scale: f32,
        segments: Segments,
    ) -> (FlexTensor, FlexTensor) {
        let (q, k, v) = (Floats::new(&q), Floats::new(&k), Floats::new(&v));
        let context = KvInputs {
            k: &k,
            v: &v,
            shared: &[],
        };
        attend(&q, context, scale, shape_apart(&q, &k, &v), &segments)
    }

    fn expanded_attention(
        q: FlexTensor,
        kv: FlexTensor,
        latents: FlexTensor,
        v_dim: usize,
        scale: f32,
        segments: Segments,
    ) -> (FlexTensor, FlexTensor) {
        let (q, kv, latents) = (Floats::new(&q), Floats::new(&kv), Floats::new(&latents));
        let context = KvInputs {
            k: &kv,
            v: &kv,
            shared: &latents,
        };
        let shape = shape_together(&q, &kv, &latents, v_dim);
        attend(&q, context, scale, shape, &segments)
    }

    fn encode_blocks(x: FlexTensor) -> FlexTensor {
        cached::encode(&Floats::new(&x))
    }

    fn decode_blocks(rows: KvBufferPrimitive<Self>) -> FlexTensor {
        cached::decode(&RowValues::new(&rows))
    }

    fn cached_attention(
        q: FlexTensor,
        k: KvBufferPrimitive<Self>,
        v: KvBufferPrimitive<Self>,
        scale: f32,
    ) -> FlexTensor {
        let [k, v] = [&k, &v].map(RowValues::new);
        let v_dim = v.rows().width;
        cached::attend(&Floats::new(&q), &k, Some(&v), v_dim, scale)
    }

    fn latent_attention(
        q: FlexTensor,
        latents: KvBufferPrimitive<Self>,
        v_dim: usize,
        scale: f32,
    ) -> FlexTensor {
        let latents = RowValues::new(&latents);
        cached::attend(&Floats::new(&q), &latents, None, v_dim, scale)
    }

    fn absorbed_attention(
        q: FlexTensor,
        latents: KvBufferPrimitive<Self>,
        w: Arc<Matrix>,
        absorbed: Absorbed,
        compute: Compute,
    ) -> FlexTensor {
        let (q, latents) = (Floats::new(&q), RowValues::new(&latents));
        absorbed::absorbed_attention(&q, &latents, &w, absorbed, compute)
    }

    fn choose_experts(scores: FlexTensor, choice: TopK) -> FlexTensor {
        let scores = Floats::new(&scores);
        let [tokens, experts] = scores.dims();
        ints(
            route::choose(&scores, experts, choice),
            [tokens, choice.top_k],
        )
    }

    fn dispatch_slots(ids: FlexTensor, experts: usize) -> (FlexTensor, FlexTensor) {
        let (order, offsets) = route::dispatch(&int_values(&ids), experts);
        let slots = order.len();
        (ints(order, [slots]), ints(offsets, [experts + 1]))
    }

    fn prefetch_experts(ids: FlexTensor, bank: Arc<ExpertBank>) -> FlexTensor {
        let experts = int_values(&ids).into_iter().map(|id| id as usize);
        bank.prefetch(experts);
        ids
    }

    fn experts_frozen(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let factors = FactorValues::new(&factors);
        let x = Floats::rounded(&x, compute.before_products());
        let routing = RoutingValues::new(&routing);
        let copies = bank.resident(routing.slots());
        let experts = frozen_experts((&bank, &copies), &factors, lora, compute);
        experts_forward(experts, &routing, &x)
    }

    fn moe_frozen(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        bank: Arc<ExpertBank>,
        shared: SharedExperts,
        compute: Compute,
    ) -> FlexTensor {
        let values = Floats::new(&x);
        let at_once = || {
            let routing = RoutingValues::new(&routing);
            let copies = bank.resident(routing.slots());
            mixture_forward((&bank, &copies), (&routing, &values), &shared, compute)
        };
        let is_few = values.dims::<2>()[0] <= MAX_GEMV_ROWS;
        let is_few = is_few && serves_fused(&bank, &shared, compute);
        is_few.then(at_once).flatten().unwrap_or_else(|| {
            plain::moe_frozen::<Self>(
                x,
                routing.clone(),
                Arc::clone(&bank),
                shared.clone(),
                compute,
            )
        })
    }

    fn experts_trained(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let stacks = StackValues::new(&stacks);
        let x = Floats::rounded(&x, compute.before_products());
        let routing = RoutingValues::new(&routing);
        experts_forward(stacks.experts(compute), &routing, &x)
    }

    fn cross_entropy_frozen(
        h: FlexTensor,
        u: FlexTensor,
        b: FlexTensor,
        targets: FlexTensor,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let w = WeightOperand::frozen(&w, compute);
        loss_forward(&h, Some((&u, &b)), w, &targets, compute.before_products())
    }

    fn cross_entropy_trained(
        h: FlexTensor,
        w: FlexTensor,
        targets: FlexTensor,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let w = Floats::new(&w);
        loss_forward(
            &h,
            None,
            trained(&w, compute),
            &targets,
            compute.before_products(),
        )
    }

    fn adamw_step(
        p: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        step: AdamWStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let (mut p, mut m, mut v) = (owned(p), owned(m), owned(v));
        let (values, g) = (p.storage_mut(), Floats::new(&g));
        match m.dtype() {
            DType::BF16 => {
                let (m, v) = (m.storage_mut::<bf16>(), v.storage_mut());
                adamw::update(values, &g, m, v, step);
            }
            _ => adamw::update::<f32>(values, &g, m.storage_mut(), v.storage_mut(), step),
        }
        (p, m, v)
    }

    fn sum_of_squares_f32(x: FlexTensor) -> FlexTensor {
        floats(vec![adamw::sum_of_squares(&Floats::new(&x)) as f32], [1])
    }
}

fn rotate(
    x: &FlexTensor,
    [cos, sin]: [&FlexTensor; 2],
    layout: RopeLayout,
    rotation: rope::Rotation,
) -> FlexTensor {
    let (x, cos, sin) = (Floats::new(x), Floats::new(cos), Floats::new(sin));
    floats(
        rope::rotate(&x, &cos, &sin, x.dims(), layout, rotation),
        x.dims::<4>(),
    )
}
