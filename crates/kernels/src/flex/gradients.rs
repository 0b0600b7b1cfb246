//! The gradients of the operations on the CPU backend.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType};
use burn_flex::{FlexTensor, Layout};
use half::bf16;
use rayon::prelude::*;

use super::{
    ELEMENTS, FactorValues, Floats, RoutingValues, StackValues, TrainedTokens, floats,
    frozen_experts, int_values, lowered_bank, lowered_trained, nn, shape_apart, shape_together,
    trained, turn,
};
use crate::attention::{self, ContextGrads};
use crate::autodiff::{ExpertsSaved, Gradients, Kept, LossSaved};
use crate::cross_entropy::{self, Row};
use crate::experts::{self, InputGrads};
use crate::fp8::encode_tiles;
use crate::gemm::{self, Compute, Weights};
use crate::ops::{FactorsPrimitive, StacksPrimitive};
use crate::strided::MatMut;
use crate::{ExpertBank, ExpertLora, Matrix, Pairs, rms_norm, rope, swiglu};

impl Gradients for Flex {
    fn linear_frozen_dx(dy: FlexTensor, w: &Matrix, compute: Compute) -> FlexTensor {
        let lowered = compute.lowered(w);
        let w = Weights::frozen(lowered.as_ref().unwrap_or(w), compute);
        nn(&Floats::rounded(&dy, compute), w)
    }

    fn linear_trained_dx(dy: FlexTensor, w: FlexTensor, compute: Compute) -> FlexTensor {
        let w = Floats::new(&w);
        let lowered = lowered_trained(&w, compute);
        nn(
            &Floats::rounded(&dy, compute),
            trained(&w, &lowered, compute),
        )
    }

    fn linear_dw(dy: FlexTensor, x: Kept<FlexTensor>, compute: Compute) -> FlexTensor {
        let (dy, x) = (
            Floats::new(&dy).rounded_columns(compute),
            Floats::kept(&x).rounded_columns(compute),
        );
        let ([_, out], [_, width]) = (dy.dims::<2>(), x.dims::<2>());
        let mut dw = vec![0.0; out * width];
        gemm::tn(dy.mat(), x.mat(), MatMut::dense(&mut dw, out, width));
        floats(dw, [out, width])
    }

    fn keep(x: FlexTensor, compute: Compute) -> Kept<FlexTensor> {
        match compute {
            Compute::F32 => Kept::Float(x),
            Compute::Bf16 => {
                let x = Floats::new(&x);
                let halves: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
                Kept::Float(FlexTensor::new(
                    Bytes::from_elems(halves),
                    Layout::contiguous(x.shape()),
                    DType::BF16,
                ))
            }
            Compute::Fp8(kind) => {
                let x = Floats::new(&x);
                Kept::Fp8(Arc::new(encode_tiles(&x, x.dims(), [1, 128], kind)))
            }
        }
    }

    fn embed_dw(ids: FlexTensor, dy: FlexTensor, vocab: usize) -> FlexTensor {
        let (ids, dy) = (int_values(&ids), Floats::new(&dy));
        let [_, width] = dy.dims();
        let mut dw = vec![0.0; vocab * width];
        for (id, dy) in ids.iter().zip(dy.chunks(width)) {
            dw[*id as usize * width..][..width]
                .iter_mut()
                .zip(dy)
                .for_each(|(dw, dy)| *dw += dy);
        }
        floats(dw, [vocab, width])
    }

    fn rms_norm_grads(
        dy: FlexTensor,
        x: FlexTensor,
        weight: FlexTensor,
        eps: f32,
    ) -> [FlexTensor; 2] {
        let (dy, x, weight) = (Floats::new(&dy), Floats::new(&x), Floats::new(&weight));
        let (dx, dw) = rms_norm::backward(&dy, &x, x.dims::<2>()[1], &weight, eps);
        [floats(dx, x.dims::<2>()), floats(dw, [weight.len()])]
    }

    fn rope_dx(dy: FlexTensor, angles: [FlexTensor; 2], pairs: Pairs) -> FlexTensor {
        turn(&dy, angles.each_ref(), pairs, rope::Turn::Back)
    }

    fn swiglu_grads(dy: FlexTensor, gate: FlexTensor, up: FlexTensor) -> [FlexTensor; 2] {
        let (dy, gate, up) = (Floats::new(&dy), Floats::new(&gate), Floats::new(&up));
        let (mut dgate, mut dup) = (dy.to_vec(), vec![0.0; dy.len()]);
        let saved = gate.par_chunks(ELEMENTS).zip(up.par_chunks(ELEMENTS));
        dgate
            .par_chunks_mut(ELEMENTS)
            .zip(dup.par_chunks_mut(ELEMENTS))
            .zip(saved)
            .for_each(|((dgate, dup), (gate, up))| swiglu::backward(dgate, dup, gate, up));
        [
            floats(dgate, gate.dims::<2>()),
            floats(dup, gate.dims::<2>()),
        ]
    }

    fn attention_grads(dout: FlexTensor, saved: [FlexTensor; 5], scale: f32) -> [FlexTensor; 3] {
        let dout = Floats::new(&dout);
        let [q, k, v, out, lse] = saved.each_ref().map(Floats::new);
        let context = attention::Context {
            k: &k,
            v: &v,
            shared: &[],
        };
        let saved = attention::Saved {
            q: &q,
            context,
            out: &out,
            lse: &lse,
        };
        let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; v.len()]);
        let grads = ContextGrads::Apart {
            dk: &mut dk,
            dv: &mut dv,
        };
        let dq = attention::backward(&dout, saved, scale, shape_apart(&q, &k, &v), grads);
        [(dq, &q), (dk, &k), (dv, &v)].map(|(grad, of)| floats(grad, of.dims::<4>()))
    }

    fn expanded_attention_grads(
        dout: FlexTensor,
        saved: [FlexTensor; 5],
        v_dim: usize,
        scale: f32,
    ) -> [FlexTensor; 3] {
        let dout = Floats::new(&dout);
        let [q, kv, latents, out, lse] = saved.each_ref().map(Floats::new);
        let context = attention::Context {
            k: &kv,
            v: &kv,
            shared: &latents,
        };
        let saved = attention::Saved {
            q: &q,
            context,
            out: &out,
            lse: &lse,
        };
        let shape = shape_together(&q, &kv, &latents, v_dim);
        let (mut dkv, mut dlatents) = (vec![0.0; kv.len()], vec![0.0; latents.len()]);
        let grads = ContextGrads::Together {
            dkv: &mut dkv,
            dshared: &mut dlatents,
        };
        let dq = attention::backward(&dout, saved, scale, shape, grads);
        [(dq, &q), (dkv, &kv), (dlatents, &latents)].map(|(grad, of)| floats(grad, of.dims::<4>()))
    }

    fn experts_frozen_grads(
        dy: FlexTensor,
        saved: ExpertsSaved<Self>,
        factors: &FactorsPrimitive<Self>,
        (bank, lora, compute): (&ExpertBank, ExpertLora, Compute),
        wanted: bool,
    ) -> ([FlexTensor; 2], Option<[FlexTensor; 6]>) {
        let (values, dy) = (FactorValues::new(factors), Floats::new(&dy));
        let lowered = lowered_bank(bank, compute);
        let experts = frozen_experts(lowered.as_ref().unwrap_or(bank), &values, lora, compute);
        let kept = SavedValues::new(&saved);
        let grads = experts::backward_inputs(experts, kept.routing.slots(), kept.saved(), &dy);
        let factors = wanted.then(|| {
            let grads =
                experts::backward_factors(experts, kept.routing.slots(), kept.saved(), &dy, &grads);
            let [[ga, gb], [ua, ub], [da, db]] = grads;
            let mut shapes = values.0.iter().flatten().map(|factor| factor.dims::<3>());
            [ga, gb, ua, ub, da, db].map(|grad| floats(grad, shapes.next().unwrap_or_default()))
        });
        (kept.input_grads(grads), factors)
    }

    fn experts_trained_grads(
        dy: FlexTensor,
        saved: ExpertsSaved<Self>,
        stacks: &StacksPrimitive<Self>,
        compute: Compute,
    ) -> ([FlexTensor; 2], [FlexTensor; 3]) {
        let (values, dy) = (StackValues::new(stacks), Floats::new(&dy));
        let lowered = values.lowered(compute);
        let experts = values.experts(lowered.as_ref(), compute);
        let kept = SavedValues::new(&saved);
        let grads = experts::backward_inputs(experts, kept.routing.slots(), kept.saved(), &dy);
        let stacks =
            experts::backward_weights(experts, kept.routing.slots(), kept.saved(), &dy, &grads);
        let mut shapes = values.0.iter().map(|stack| stack.dims::<3>());
        (
            kept.input_grads(grads),
            stacks.map(|grad| floats(grad, shapes.next().unwrap_or_default())),
        )
    }

    fn cross_entropy_frozen_grads(
        dloss: FlexTensor,
        saved: LossSaved<FlexTensor, FlexTensor>,
        [u, b]: [FlexTensor; 2],
        (w, compute): (&Matrix, Compute),
        want_b: bool,
    ) -> [FlexTensor; 3] {
        let tokens = TrainedTokens::new(&saved.h, Some(&u), &saved.targets, compute);
        let b = Floats::new(&b);
        let (head, rows) = (
            tokens.head(Weights::frozen(w, compute), Some(&b)),
            loss_rows(&tokens, &dloss, &saved.lse),
        );
        let n = saved.h.layout().shape().as_slice()[0];
        let grads = cross_entropy::backward(head, &rows, [false, want_b]);
        [
            tokens.scatter(&grads.dh, tokens.hidden, n),
            tokens.scatter(&grads.du, tokens.rank, n),
            floats(grads.db, if want_b { b.dims::<2>() } else { [0, 0] }),
        ]
    }

    fn cross_entropy_trained_grads(
        dloss: FlexTensor,
        saved: LossSaved<FlexTensor, FlexTensor>,
        w: FlexTensor,
        compute: Compute,
        want_w: bool,
    ) -> [FlexTensor; 2] {
        let tokens = TrainedTokens::new(&saved.h, None, &saved.targets, compute);
        let w = Floats::new(&w);
        let (head, rows) = (
            tokens.head(trained(&w, &None, compute), None),
            loss_rows(&tokens, &dloss, &saved.lse),
        );
        let grads = cross_entropy::backward(head, &rows, [want_w, false]);
        let n = saved.h.layout().shape().as_slice()[0];
        [
            tokens.scatter(&grads.dh, tokens.hidden, n),
            floats(grads.dw, if want_w { w.dims::<2>() } else { [0, 0] }),
        ]
    }
}

fn loss_rows(tokens: &TrainedTokens, dloss: &FlexTensor, lse: &FlexTensor) -> Vec<Row> {
    let (dloss, lse) = (Floats::new(dloss), Floats::new(lse));
    let rows = tokens.at.iter().zip(&tokens.targets);
    rows.map(|(at, target)| Row {
        target: *target,
        lse: lse[*at],
        dloss: dloss[*at],
    })
    .collect()
}

/// The values of [`ExpertsSaved`].
struct SavedValues {
    x: Floats,
    routing: RoutingValues,
    gate: Floats,
    up: Floats,
}

impl SavedValues {
    fn new(saved: &ExpertsSaved<Flex>) -> Self {
        let [x, gate, up] = [&saved.x, &saved.gate, &saved.up].map(Floats::kept);
        Self {
            x,
            routing: RoutingValues::new(&saved.routing),
            gate,
            up,
        }
    }

    fn saved(&self) -> experts::Saved<'_> {
        experts::Saved {
            x: &self.x,
            weights: &self.routing.weights,
            gate: &self.gate,
            up: &self.up,
        }
    }

    fn input_grads(&self, grads: InputGrads) -> [FlexTensor; 2] {
        [
            floats(grads.dx, self.x.dims::<2>()),
            floats(grads.dweights, self.routing.weights.dims::<2>()),
        ]
    }
}
