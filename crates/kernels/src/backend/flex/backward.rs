//! The gradients on the CPU backend, each handed to its family.

use std::sync::Arc;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use crate::backend::attention::flex as attention;
use crate::backend::elementwise::flex as elementwise;
use crate::backend::experts::flex as experts;
use crate::backend::flex::saved_values::save_for_backward;
use crate::backend::gradients::{ExpertsSaved, Gradients, LossSaved, UpdateGrads, UpdateSaved};
use crate::backend::linear::flex as linear;
use crate::backend::loss::flex as loss;
use crate::backend::saved::SavedActivation;
use crate::backend::traits::{FactorsPrimitive, FakeQuantize, StacksPrimitive, Update};
use crate::formats::Matrix;
use crate::ops::attention::Segments;
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::ops::rope::RopeLayout;
use crate::settings::Compute;

impl Gradients for Flex {
    fn save_for_backward(x: FlexTensor, compute: Compute) -> SavedActivation<FlexTensor> {
        save_for_backward(x, compute)
    }

    fn linear_frozen_dx(dy: FlexTensor, w: &Matrix, compute: Compute) -> FlexTensor {
        linear::linear_frozen_dx(dy, w, compute)
    }

    fn linear_trained_dx(dy: FlexTensor, w: FlexTensor, compute: Compute) -> FlexTensor {
        linear::linear_trained_dx(dy, w, compute)
    }

    fn linear_dw(dy: FlexTensor, x: &SavedActivation<FlexTensor>, compute: Compute) -> FlexTensor {
        linear::linear_dw(dy, x, compute)
    }

    fn linear_updated_grads(
        dy: FlexTensor,
        saved: UpdateSaved<FlexTensor>,
        low: FlexTensor,
        w: &Matrix,
        update: Update,
        want_x: bool,
    ) -> UpdateGrads<FlexTensor> {
        linear::linear_updated_grads(dy, saved, low, w, update, want_x)
    }

    fn linear_fake_quantized_grads(
        dy: FlexTensor,
        saved: UpdateSaved<FlexTensor>,
        w: &Matrix,
        merge: FakeQuantize,
        compute: Compute,
        want_x: bool,
    ) -> UpdateGrads<FlexTensor> {
        linear::linear_fake_quantized_grads(dy, saved, w, merge, compute, want_x)
    }

    fn embed_dw(ids: FlexTensor, dy: FlexTensor, vocab: usize) -> FlexTensor {
        elementwise::embed_dw(ids, dy, vocab)
    }

    fn rms_norm_grads(
        dy: FlexTensor,
        x: FlexTensor,
        weight: FlexTensor,
        eps: f32,
    ) -> [FlexTensor; 2] {
        elementwise::rms_norm_grads(dy, x, weight, eps)
    }

    fn rope_dx(dy: FlexTensor, angles: [FlexTensor; 2], layout: RopeLayout) -> FlexTensor {
        elementwise::rope_dx(dy, angles, layout)
    }

    fn swiglu_grads(
        dy: FlexTensor,
        products: [Arc<SavedActivation<FlexTensor>>; 2],
    ) -> [FlexTensor; 2] {
        elementwise::swiglu_grads(dy, products)
    }

    fn attention_grads(
        dout: FlexTensor,
        saved: [FlexTensor; 5],
        scale: f32,
        segments: &Segments,
    ) -> [FlexTensor; 3] {
        attention::attention_grads(dout, saved, scale, segments)
    }

    fn expanded_attention_grads(
        dout: FlexTensor,
        saved: [FlexTensor; 5],
        v_dim: usize,
        scale: f32,
        segments: &Segments,
    ) -> [FlexTensor; 3] {
        attention::expanded_attention_grads(dout, saved, v_dim, scale, segments)
    }

    fn experts_frozen_grads(
        dy: FlexTensor,
        saved: ExpertsSaved<Self>,
        factors: &FactorsPrimitive<Self>,
        bank: &ExpertBank,
        lora: ExpertLora,
        want_factors: bool,
    ) -> ([FlexTensor; 2], Option<[FlexTensor; 6]>) {
        experts::experts_frozen_grads(dy, saved, factors, bank, lora, want_factors)
    }

    fn experts_trained_grads(
        dy: FlexTensor,
        saved: ExpertsSaved<Self>,
        stacks: &StacksPrimitive<Self>,
    ) -> ([FlexTensor; 2], [FlexTensor; 3]) {
        experts::experts_trained_grads(dy, saved, stacks)
    }

    fn cross_entropy_with_gradients(
        h: FlexTensor,
        targets: FlexTensor,
        w: &Matrix,
        compute: Compute,
    ) -> [FlexTensor; 3] {
        loss::cross_entropy_with_gradients(h, targets, w, compute)
    }

    fn scaled_rows(x: FlexTensor, factors: FlexTensor) -> FlexTensor {
        loss::scaled_rows(x, factors)
    }

    fn cross_entropy_frozen_grads(
        dloss: FlexTensor,
        saved: LossSaved<FlexTensor, FlexTensor>,
        low_rank: [FlexTensor; 2],
        w: &Matrix,
        compute: Compute,
        want_b: bool,
    ) -> [FlexTensor; 3] {
        loss::cross_entropy_frozen_grads(dloss, saved, low_rank, w, compute, want_b)
    }

    fn cross_entropy_trained_grads(
        dloss: FlexTensor,
        saved: LossSaved<FlexTensor, FlexTensor>,
        w: FlexTensor,
        compute: Compute,
        want_w: bool,
    ) -> [FlexTensor; 2] {
        loss::cross_entropy_trained_grads(dloss, saved, w, compute, want_w)
    }
}
