//! Elementwise operations, norms, embeddings, saved activations and the optimizer.

use std::sync::Arc;

use burn::backend::Flex;

use super::{GRADIENT, ROWS, VALUE, all_close, close, floats, ids, noise, tensor};
use crate::backend::gradients::Gradients;
use crate::backend::plain::{elementwise, optimizer, saved_reals};
use crate::backend::saved::{SavedActivation, SavedForm};
use crate::backend::traits::Kernels;
use crate::ops::adamw::AdamWStep;
use crate::ops::dropout::Dropout;
use crate::ops::rope::{RopeLayout, Rotation};
use crate::settings::Compute;
use crate::testing;

#[test]
fn embeddings_agree() {
    let [vocab, width] = [11, 13];
    for rows in ROWS {
        let tokens = ids((0..rows).map(|i| (i * i % 7) as i32).collect(), &[rows]);
        for w in testing::every_format(vocab, width, 1) {
            let found = elementwise::embed_frozen::<Flex>(tokens.clone(), &w);
            let expected = Flex::embed_frozen(tokens.clone(), Arc::new(w));
            close(&found, &expected, 0.0, "embed_frozen");
        }
        let w = noise(&[vocab, width], 2);
        let found = elementwise::embed_trained::<Flex>(w.clone(), tokens.clone());
        close(
            &found,
            &Flex::embed_trained(w, tokens.clone()),
            0.0,
            "embed_trained",
        );
        if rows > 0 {
            let dy = noise(&[rows, width], 3);
            let found = elementwise::embed_dw::<Flex>(tokens.clone(), dy.clone(), vocab);
            close(
                &found,
                &Flex::embed_dw(tokens, dy, vocab),
                GRADIENT,
                "embed_dw",
            );
        }
    }
}

#[test]
fn norms_agree() {
    for (rows, [width, normed]) in ROWS
        .into_iter()
        .flat_map(|rows| [[7, 7], [45, 45], [45, 32]].map(|size| (rows, size)))
    {
        let what = format!("a norm of {normed} of {width} features of {rows} rows");
        let (x, dy) = (noise(&[rows, width], 1), noise(&[rows, width], 2));
        let weight = noise(&[normed], 3);
        let found = elementwise::rms_norm::<Flex>(x.clone(), weight.clone(), 1e-5);
        let expected = Flex::rms_norm(x.clone(), weight.clone(), 1e-5);
        close(&found, &expected, VALUE, &what);
        if rows > 0 {
            let found =
                elementwise::rms_norm_grads::<Flex>(dy.clone(), x.clone(), weight.clone(), 1e-5);
            let expected = Flex::rms_norm_grads(dy, x, weight, 1e-5);
            all_close(&found, &expected, GRADIENT, &what);
        }
    }
}

#[test]
fn rotations_agree() {
    for (seq, half) in [(0, 3), (1, 3), (9, 4), (70, 2), (5, 0)] {
        let shape = [2, seq, 3, 8];
        let (x, angles) = (
            noise(&shape, 1),
            [2, 3].map(|seed| noise(&[seq, half], seed)),
        );
        for layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
            let [cos, sin] = angles.clone();
            let forward =
                elementwise::rope::<Flex>(x.clone(), angles.clone(), layout, Rotation::Forward);
            close(
                &forward,
                &Flex::rope(x.clone(), cos, sin, layout),
                VALUE,
                "rope",
            );
            let back =
                elementwise::rope::<Flex>(x.clone(), angles.clone(), layout, Rotation::Backward);
            close(
                &back,
                &Flex::rope_dx(x.clone(), angles.clone(), layout),
                VALUE,
                "rope_dx",
            );
        }
    }
}

#[test]
fn gated_activations_agree() {
    for rows in ROWS {
        let shape = [rows, 37];
        let mut gate = testing::noise(rows * 37, 1);
        gate.iter_mut().for_each(|gate| *gate *= 6.0);
        gate.iter_mut()
            .zip([100.0, -100.0, 0.0, -20.0])
            .for_each(|(gate, edge)| *gate = edge);
        let (gate, up, dy) = (tensor(gate, &shape), noise(&shape, 2), noise(&shape, 3));
        let found = elementwise::swiglu::<Flex>(gate.clone(), up.clone());
        let expected = Flex::swiglu(gate.clone(), up.clone(), Compute::F32);
        close(&found, &expected, VALUE, "swiglu");
        let saved =
            || [&gate, &up].map(|x| Arc::new(Flex::save_for_backward(x.clone(), Compute::F32)));
        let found = elementwise::swiglu_grads::<Flex>(dy.clone(), saved());
        all_close(
            &found,
            &Flex::swiglu_grads(dy, saved()),
            GRADIENT,
            "swiglu_grads",
        );
    }
}

#[test]
fn masks_of_dropout_are_the_same_bits() {
    for (rows, width) in [(0, 5), (1, 1), (3, 5), (70, 333), (1, 4096)] {
        let x = noise(&[rows, width], 1);
        for (seed, probability) in [(0, 0.1), (7, 0.5), (u64::MAX - 3, 0.25), (1 << 40, 0.99)] {
            let dropout = Dropout { probability, seed };
            for dropout in [dropout, dropout.fork(2), Dropout::OFF] {
                let found = floats(&elementwise::dropout::<Flex>(x.clone(), dropout));
                let expected = floats(&Flex::dropout(x.clone(), dropout));
                assert!(found == expected, "{dropout:?} of {rows} × {width}");
            }
        }
    }
}

#[test]
fn saved_activations_are_recomputed() {
    let (x, weight) = (noise(&[9, 20], 1), noise(&[12], 2));
    let gate_and_up = [3, 4].map(|seed| noise(&[9, 20], seed));
    let float = |x: &_| {
        Arc::new(saved_reals::save_for_backward::<Flex>(
            Clone::clone(x),
            Compute::F32,
        ))
    };
    let norm = SavedActivation::new(SavedForm::Norm(x.clone(), weight.clone(), 1e-5), 0);
    let swiglu = SavedForm::Swiglu(gate_and_up.each_ref().map(float));
    let swiglu = SavedActivation::new(swiglu, 0);
    let [gate, up] = gate_and_up;
    for (saved, expected) in [
        (&*float(&x), x.clone()),
        (&norm, Flex::rms_norm(x, weight, 1e-5)),
        (&swiglu, Flex::swiglu(gate, up, Compute::F32)),
    ] {
        close(
            &saved_reals::saved_values::<Flex>(saved),
            &expected,
            0.0,
            "saved values",
        );
    }
}

#[test]
fn updates_of_parameters_agree() {
    for (n, betas) in [
        (0, [0.9, 0.999]),
        (1, [0.9, 0.999]),
        (1001, [0.9, 0.95]),
        (77, [0.3, 0.9]),
    ] {
        let positive: Vec<f32> = testing::noise(n, 4).iter().map(|v| v.abs()).collect();
        let inputs = [
            noise(&[n], 1),
            noise(&[n], 2),
            noise(&[n], 3),
            tensor(positive, &[n]),
        ];
        let step = AdamWStep {
            rate: 1e-2,
            betas,
            eps: 1e-8,
            weight_decay: 0.1,
            number: 3,
            gradient_scale: 0.5,
            noise: None,
            first: 0,
        };
        let (p, m, v) = optimizer::adamw_step::<Flex>(inputs.clone(), step);
        let [p_in, g, m_in, v_in] = inputs;
        let (ep, em, ev) = Flex::adamw_step(p_in, g, m_in, v_in, step);
        all_close(&[p, m, v], &[ep, em, ev], 1e-6, "adamw");
    }
    for [parts, n] in [[1, 1], [1, 100], [1, 100_003], [7, 33]] {
        let x = noise(&[parts * n], 1);
        let found = optimizer::sums_of_squares::<Flex>(x.clone(), parts);
        let expected = Flex::sums_of_squares_f32(x, parts);
        close(&found, &expected, 1e-5, "sums_of_squares");
    }
}
