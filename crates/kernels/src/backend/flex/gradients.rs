//! The gradients of the operations on the CPU backend.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType, Element};
use burn_flex::{FlexTensor, Layout};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::attention::{shape_apart, shape_together};
use super::experts::{FactorValues, RoutingValues, StackValues, frozen_experts};
use super::loss::{TrainedTokens, loss_with_gradients};
use super::products::{fake_quantized, nn, nn_sum, nt, scaled, trained};
use super::rotate;
use super::values::{ELEMENTS, Floats, floats, int_values, owned};
use crate::backend::gradients::{ExpertsSaved, Gradients, LossSaved};
use crate::backend::kept::{Form, Kept};
use crate::backend::linear::{FakeQuantize, Update};
use crate::backend::ops::{FactorsPrimitive, StacksPrimitive};
use crate::formats::Matrix;
use crate::formats::fp8::encode_tiles;
use crate::matmul::{self, WeightOperand};
use crate::memory::zeros;
use crate::ops::attention::{self, KvGrads, Segments};
use crate::ops::experts::{self, ExpertBank, ExpertLora, InputGrads, SavedProducts};
use crate::ops::loss::{self, TokenLoss};
use crate::ops::rope::{self, RopeLayout};
use crate::ops::{rms_norm, swiglu};
use crate::settings::Compute;
use crate::simd::narrow_to_bf16;

impl Gradients for Flex {
    fn linear_frozen_dx(dy: FlexTensor, w: &Matrix, compute: Compute) -> FlexTensor {
        nn(
            &Floats::rounded(&dy, compute.before_products()),
            WeightOperand::frozen(w, compute),
        )
    }

    fn linear_trained_dx(dy: FlexTensor, w: FlexTensor, compute: Compute) -> FlexTensor {
        let w = Floats::new(&w);
        nn(
            &Floats::rounded(&dy, compute.before_products()),
            trained(&w, compute),
        )
    }

    fn linear_dw(dy: FlexTensor, x: &Kept<FlexTensor>, compute: Compute) -> FlexTensor {
        let before = compute.before_products();
        let dy = Floats::new(&dy).rounded_columns(before);
        tn(&dy, &Floats::kept(x).rounded_columns(before), compute)
    }

    fn linear_updated_grads(
        dy: FlexTensor,
        (x, low): (Option<&Kept<FlexTensor>>, FlexTensor),
        factors: [FlexTensor; 2],
        (w, update): (&Matrix, Update),
        want_x: bool,
    ) -> (Option<FlexTensor>, Option<[FlexTensor; 2]>) {
        let [a, b] = factors.each_ref().map(Floats::new);
        let values = Floats::new(&dy);
        let dlow = scaled(&nn(&values, trained(&b, Compute::F32)), update.scale);
        // First the factors': the x that is remade for them is gone when there must be room for its gradient.
        let grads = x.map(|x| {
            [(&dlow, Floats::kept(x)), (&values, Floats::new(&low))]
                .map(|(dy, x)| tn(dy, &x, Compute::F32))
        });
        let dx = want_x.then(|| {
            let dy = Floats::rounded(&dy, update.compute.before_products());
            nn_sum(&[
                (dy.mat(), WeightOperand::frozen(w, update.compute)),
                (dlow.mat(), trained(&a, Compute::F32)),
            ])
        });
        (dx, grads)
    }

    fn linear_merged_grads(
        dy: FlexTensor,
        x: Option<&Kept<FlexTensor>>,
        factors: [FlexTensor; 2],
        (w, merge, compute): (&Matrix, FakeQuantize, Compute),
        want_x: bool,
    ) -> (Option<FlexTensor>, Option<[FlexTensor; 2]>) {
        let factors = factors.each_ref().map(Floats::new);
        let weights =
            WeightOperand::frozen(w, compute).fake_quantized(fake_quantized(&factors, merge));
        let dx = want_x.then(|| nn(&Floats::rounded(&dy, compute.before_products()), weights));
        let grads = x.map(|x| {
            let ([a, b], x) = (&factors, Floats::kept(x));
            let dy = Floats::new(&dy);
            let low = scaled(&nt(&x, trained(a, Compute::F32)), merge.scale);
            let dlow = scaled(&nn(&dy, trained(b, Compute::F32)), merge.scale);
            [tn(&dlow, &x, Compute::F32), tn(&dy, &low, Compute::F32)]
        });
        (dx, grads)
    }

    fn keep(x: FlexTensor, compute: Compute) -> Kept<FlexTensor> {
        let values = Floats::new(&x);
        let (form, bytes) = match compute {
            Compute::F32 | Compute::Int8 => (Form::Float(x), 4 * values.len()),
            Compute::Bf16 => (
                Form::Float(narrowed(&values, narrow_to_bf16, DType::BF16)),
                2 * values.len(),
            ),
            Compute::F16 => (
                // What is kept may be larger than what a product read, as gate and up are: it must not become infinite.
                Form::Float(narrowed(&values, saturated, DType::F16)),
                2 * values.len(),
            ),
            Compute::Fp8(kind) => {
                let tiles = encode_tiles(&values, values.dims(), [1, 128], kind);
                let bytes = tiles.size_bytes();
                (Form::Fp8(tiles), bytes)
            }
        };
        Kept::new(form, bytes)
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

    fn rope_dx(dy: FlexTensor, angles: [FlexTensor; 2], layout: RopeLayout) -> FlexTensor {
        rotate(&dy, angles.each_ref(), layout, rope::Rotation::Backward)
    }

    fn swiglu_grads(dy: FlexTensor, products: [Arc<Kept<FlexTensor>>; 2]) -> [FlexTensor; 2] {
        let dy = Floats::new(&dy).tensor().clone();
        let [gate, up] = products.each_ref().map(|kept| Floats::kept(kept));
        drop(products);
        // Nobody reads dy and up again, as a rule: their gradients are then written where they lie.
        let [mut dgate, mut dup] = [dy, up.tensor().clone()].map(owned);
        drop(up);
        dgate
            .storage_mut::<f32>()
            .par_chunks_mut(ELEMENTS)
            .zip(dup.storage_mut::<f32>().par_chunks_mut(ELEMENTS))
            .zip(gate.par_chunks(ELEMENTS))
            .for_each(|((dgate, dup), gate)| swiglu::backward(dgate, dup, gate));
        [dgate, dup]
    }

    fn attention_grads(
        dout: FlexTensor,
        saved: [FlexTensor; 5],
        scale: f32,
        segments: &Segments,
    ) -> [FlexTensor; 3] {
        let dout = Floats::new(&dout);
        let [q, k, v, out, lse] = saved.each_ref().map(Floats::new);
        let context = attention::KvInputs {
            k: &k,
            v: &v,
            shared: &[],
        };
        let saved = attention::SavedAttention {
            q: &q,
            context,
            out: &out,
            lse: &lse,
        };
        let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; v.len()]);
        let grads = KvGrads::Apart {
            dk: &mut dk,
            dv: &mut dv,
        };
        let shape = shape_apart(&q, &k, &v);
        let dq = attention::backward(&dout, saved, scale, (shape, segments), grads);
        [(dq, &q), (dk, &k), (dv, &v)].map(|(grad, of)| floats(grad, of.dims::<4>()))
    }

    fn expanded_attention_grads(
        dout: FlexTensor,
        saved: [FlexTensor; 5],
        v_dim: usize,
        scale: f32,
        segments: &Segments,
    ) -> [FlexTensor; 3] {
        let dout = Floats::new(&dout);
        let [q, kv, latents, out, lse] = saved.each_ref().map(Floats::new);
        let context = attention::KvInputs {
            k: &kv,
            v: &kv,
            shared: &latents,
        };
        let saved = attention::SavedAttention {
            q: &q,
            context,
            out: &out,
            lse: &lse,
        };
        let shape = shape_together(&q, &kv, &latents, v_dim);
        let (mut dkv, mut dlatents) = (zeros(kv.len()), zeros(latents.len()));
        let grads = KvGrads::Together {
            dkv: &mut dkv,
            dshared: &mut dlatents,
        };
        let dq = attention::backward(&dout, saved, scale, (shape, segments), grads);
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
        let experts = frozen_experts((bank, &[]), &values, lora, compute);
        let mut kept = SavedValues::new(&saved);
        // The factors' inputs are those that the forward pass multiplied; what is remade was not rounded yet.
        if wanted && matches!(saved.x.form(), Form::Norm(..) | Form::Swiglu(_)) {
            kept.x = Floats::rounded(kept.x.tensor(), compute.before_products());
        }
        let (slots, saved) = (kept.routing.slots(), kept.saved());
        if !wanted {
            let grads = experts::backward_inputs(experts, slots, saved, &dy);
            return (kept.input_grads(grads), None);
        }
        let (grads, factors) = experts::backward_updated(experts, slots, saved, &dy);
        let [[ga, gb], [ua, ub], [da, db]] = factors;
        let mut shapes = values.0.iter().flatten().map(|factor| factor.dims::<3>());
        let factors =
            [ga, gb, ua, ub, da, db].map(|grad| floats(grad, shapes.next().unwrap_or_default()));
        (kept.input_grads(grads), Some(factors))
    }

    fn experts_trained_grads(
        dy: FlexTensor,
        saved: ExpertsSaved<Self>,
        stacks: &StacksPrimitive<Self>,
        compute: Compute,
    ) -> ([FlexTensor; 2], [FlexTensor; 3]) {
        let (values, dy) = (StackValues::new(stacks), Floats::new(&dy));
        let experts = values.experts(compute);
        let kept = SavedValues::new(&saved);
        let (slots, saved) = (kept.routing.slots(), kept.saved());
        let (grads, stacks) = experts::backward_trained(experts, slots, saved, &dy);
        let mut shapes = values.0.iter().map(|stack| stack.dims::<3>());
        (
            kept.input_grads(grads),
            stacks.map(|grad| floats(grad, shapes.next().unwrap_or_default())),
        )
    }

    fn cross_entropy_with_gradients(
        h: FlexTensor,
        targets: FlexTensor,
        w: &Matrix,
        compute: Compute,
    ) -> [FlexTensor; 3] {
        loss_with_gradients(&h, WeightOperand::frozen(w, compute), &targets, compute)
    }

    fn scaled_rows(x: FlexTensor, factors: FlexTensor) -> FlexTensor {
        let mut x = owned(x);
        let factors = Floats::new(&factors);
        let width = x.layout().num_elements() / factors.len().max(1);
        x.storage_mut::<f32>()
            .par_chunks_mut(width.max(1))
            .zip(factors.par_iter())
            .for_each(|(row, factor)| row.iter_mut().for_each(|x| *x *= factor));
        x
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
            tokens.head(WeightOperand::frozen(w, compute), Some(&b)),
            loss_rows(&tokens, &dloss, &saved.lse),
        );
        let n = saved.h.layout().shape().as_slice()[0];
        let grads = loss::backward(head, &rows, [false, want_b]);
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
            tokens.head(trained(&w, compute), None),
            loss_rows(&tokens, &dloss, &saved.lse),
        );
        let grads = loss::backward(head, &rows, [want_w, false]);
        let n = saved.h.layout().shape().as_slice()[0];
        [
            tokens.scatter(&grads.dh, tokens.hidden, n),
            floats(grads.dw, if want_w { w.dims::<2>() } else { [0, 0] }),
        ]
    }
}

/// `dyᵀ · x`, as `[out, in]`.
fn tn(dy: &Floats, x: &Floats, compute: Compute) -> FlexTensor {
    let ([_, out], [_, width]) = (dy.dims::<2>(), x.dims::<2>());
    let dw = matmul::new_tn(dy.mat(), x.mat(), compute);
    floats(dw, [out, width])
}

fn saturated(values: &[f32], out: &mut [f16]) {
    let largest = f16::MAX.to_f32();
    let clamped: Vec<f32> = values.iter().map(|v| v.clamp(-largest, largest)).collect();
    out.convert_from_f32_slice(&clamped);
}

/// The same values as narrower numbers.
fn narrowed<T: Element + Default + Send>(
    values: &Floats,
    narrow: fn(&[f32], &mut [T]),
    dtype: DType,
) -> FlexTensor {
    let mut all = vec![T::default(); values.len()];
    all.par_chunks_mut(ELEMENTS)
        .zip(values.par_chunks(ELEMENTS))
        .for_each(|(out, values)| narrow(values, out));
    FlexTensor::new(
        Bytes::from_elems(all),
        Layout::contiguous(values.shape()),
        dtype,
    )
}

fn loss_rows(tokens: &TrainedTokens, dloss: &FlexTensor, lse: &FlexTensor) -> Vec<TokenLoss> {
    let (dloss, lse) = (Floats::new(dloss), Floats::new(lse));
    let rows = tokens.at.iter().zip(&tokens.targets);
    rows.map(|(at, target)| TokenLoss {
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
        let [x, gate, up] = [&saved.x, &saved.gate, &saved.up].map(|kept| Floats::kept(kept));
        Self {
            x,
            routing: RoutingValues::new(&saved.routing),
            gate,
            up,
        }
    }

    fn saved(&self) -> SavedProducts<'_> {
        SavedProducts {
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
