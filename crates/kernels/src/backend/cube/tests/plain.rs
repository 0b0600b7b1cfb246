//! Operations that a GPU has from burn: the same functions on both devices.

use std::slice::from_ref;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::{GRADIENT, TOLERANCE, close, cpu, gpu, ids, matrices, on, tensor, values};
use crate::backend::attention::kv_buffer::KvBuffer;
use crate::backend::attention::{
    absorbed_attention, attention, cached_attention, expanded_attention, latent_attention,
};
use crate::backend::elementwise::{dropout, rms_norm, rms_norm_start, rope, swiglu};
use crate::backend::is_gpu;
use crate::backend::linear::{linear_add, linear_updated, row_norms};
use crate::backend::loss::{cross_entropy_frozen, cross_entropy_trained, token_scores_frozen};
use crate::backend::optimizer::{adamw, sums_of_squares, total};
use crate::backend::traits::{Absorbed, Update};
use crate::formats::{CacheType, Matrix};
use crate::ops::adamw::AdamWStep;
use crate::ops::attention::Segments;
use crate::ops::dropout::Dropout;
use crate::ops::rope::RopeLayout;
use crate::settings::Compute;
use crate::testing::noise;

/// Inputs of some shapes, tracked.
fn inputs<const N: usize, const D: usize>(
    shapes: [[usize; D]; N],
    device: &Device,
) -> [Tensor<D>; N] {
    let mut seed = 40;
    shapes.map(|shape| {
        seed += 1;
        tensor(&noise(shape.iter().product(), seed), shape, device).require_grad()
    })
}

/// The value of `y`, and the gradients of the inputs from a weighted sum of it.
fn with_gradients<const D: usize, const E: usize>(
    y: Tensor<E>,
    inputs: &[Tensor<D>],
) -> Vec<Vec<f32>> {
    let n = y.dims().iter().product();
    let weights = tensor(&noise(n, 77), [n], &y.device());
    let grads = (y.clone().reshape([n]) * weights).sum().backward();
    let mut all = vec![values(y)];
    all.extend(inputs.iter().map(|x| values(x.grad(&grads).unwrap())));
    all
}

/// Compares values and gradients on both devices.
fn agree(what: &str, run: impl Fn(&Device) -> Vec<Vec<f32>>) {
    let (gpu, _alone) = gpu();
    let (found, expected) = (run(&gpu.autodiff()), run(&cpu().autodiff()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let tolerance = if i == 0 { TOLERANCE } else { GRADIENT };
        close(found, expected, tolerance, &format!("{what}, {i}"));
    }
}

#[test]
fn attention_is_that_of_the_cpu() {
    for ([seq, kv_seq], [heads, kv_heads], [dim, v_dim]) in [
        ([5, 5], [4, 4], [6, 3]),
        ([1, 9], [4, 2], [4, 4]),
        ([70, 130], [6, 1], [5, 7]),
        ([65, 65], [2, 2], [8, 8]),
    ] {
        agree(&format!("attention {seq} of {kv_seq}"), |device| {
            let [q] = inputs([[2, seq, heads, dim]], device);
            let [k, v] = inputs(
                [[2, kv_seq, kv_heads, dim], [2, kv_seq, kv_heads, v_dim]],
                device,
            );
            let y = attention(q.clone(), k.clone(), v.clone(), 0.7, &Segments::whole());
            with_gradients(y, &[q, k, v])
        });
    }
    for segments in [
        Segments::packed(vec![vec![0, 4, 5], vec![0]]),
        Segments::tree(vec![vec![0..6, 2..4, 4..6, 6..9], vec![0..9, 8..9]]),
    ] {
        agree("attention in segments", |device| {
            let [q, k, v] = inputs([[2, 9, 2, 4]; 3], device);
            let y = attention(q.clone(), k.clone(), v.clone(), 0.7, &segments);
            with_gradients(y, &[q, k, v])
        });
    }
    agree("expanded attention", |device| {
        let [q] = inputs([[2, 7, 3, 5]], device);
        let [kv] = inputs([[2, 9, 3, 7]], device);
        let [latents] = inputs([[2, 9, 1, 8]], device);
        let whole = Segments::whole();
        let y = expanded_attention(q.clone(), kv.clone(), latents.clone(), 4, 0.7, &whole);
        with_gradients(y, &[q, kv, latents])
    });
}

#[test]
fn attention_over_a_cache_is_that_of_the_cpu() {
    let [nope, v_dim, rank, rope] = [5, 4, 7, 3];
    for seq in [1, 8, 20] {
        agree(&format!("cached attention of {seq}"), |device| {
            let device = &device.clone().inner();
            let rows = |seed: u64, width: usize, heads: usize| {
                let mut buffer = KvBuffer::new(CacheType::F32);
                for (at, n) in [(0_u64, 20), (1, 11)] {
                    let values = noise(n * heads * width, seed + at);
                    buffer.append(tensor(&values, [1, n, heads, width], device));
                }
                buffer
            };
            let q = |heads, dim| tensor(&noise(seq * heads * dim, 5), [1, seq, heads, dim], device);
            let cached = cached_attention(q(4, 6), &rows(1, 6, 2), &rows(3, 5, 2), 0.5);
            let latents = rows(7, rank + rope, 1);
            let latent = latent_attention(q(3, rank + rope), &latents, rank, 0.5);
            let w = Matrix::from_f32(3 * (nope + v_dim), rank, &noise(27 * rank, 9));
            let absorbed = Absorbed {
                nope,
                v_dim,
                scale: 0.5,
            };
            let w = if is_gpu(device) {
                on(&w, device)
            } else {
                Arc::new(w)
            };
            let all = absorbed_attention(q(3, nope + rope), &latents, &w, absorbed, Compute::F32);
            vec![values(cached), values(latent), values(all)]
        });
    }
}

#[test]
fn elementwise_operations_are_those_of_the_cpu() {
    for [rows, width] in [[1, 4], [7, 36], [500, 6], [1025, 10]] {
        agree(&format!("norm of {rows}"), |device| {
            let [x] = inputs([[rows, width]], device);
            let [w] = inputs([[width]], device);
            let [start] = inputs([[width / 2]], device);
            let normed = || {
                rms_norm(x.clone(), w.clone(), 1e-3)
                    + rms_norm_start(x.clone(), start.clone(), 1e-3)
            };
            let mut all = with_gradients(normed(), from_ref(&x));
            all.extend(with_gradients(normed(), from_ref(&w)));
            all.extend(with_gradients(normed(), from_ref(&start)));
            all
        });
        agree(&format!("rotation and swiglu of {rows}"), |device| {
            let [x] = inputs([[1, rows, 2, width]], device);
            let [angles] = inputs([[rows, width / 2 - 1]], device);
            let (cos, sin) = (angles.clone().cos().detach(), angles.sin().detach());
            let y = rope(x.clone(), cos.clone(), sin.clone(), RopeLayout::Interleaved)
                + rope(x.clone(), cos, sin, RopeLayout::HalfSplit);
            let y = y.reshape([rows * 2, width]);
            with_gradients(swiglu(y.clone(), y, Compute::F32), &[x])
        });
        agree(&format!("dropout of {rows}"), |device| {
            let [x] = inputs([[rows, width]], device);
            let seed = 0xFEDC_BA98_7654_3210;
            with_gradients(
                dropout(
                    x.clone(),
                    Dropout {
                        probability: 0.3,
                        seed,
                    },
                ),
                &[x],
            )
        });
    }
}

#[test]
fn updates_are_those_of_the_cpu() {
    for w in matrices(37).into_iter().take(5) {
        for rows in [1, 9] {
            let what = format!("update of {}", w.format().name());
            agree(&what, |device| {
                let gpu = is_gpu(device);
                let w = if gpu {
                    on(&w, device)
                } else {
                    Arc::new(w.clone())
                };
                let [x, a, b] = inputs([[rows, w.cols()], [3, w.cols()], [w.rows(), 3]], device);
                let update = Update {
                    scale: 0.7,
                    compute: Compute::F32,
                    saved_as: Compute::F32,
                };
                let y = linear_updated(x.clone(), &w, [a.clone(), b.clone()], update);
                let low = x.clone().matmul(a.clone().transpose());
                let y = linear_add(y, low, b.clone());
                let norms = row_norms(&w, [a.clone().inner(), b.clone().inner()], 0.7);
                let mut all = with_gradients(y, &[x, a, b]);
                all.push(values(norms));
                all
            });
        }
    }
}

#[test]
fn losses_are_those_of_the_cpu() {
    // More words than a part of the vocabulary, and more tokens than many a tile.
    for [tokens, vocab, hidden] in [[3, 5, 4], [140, 1100, 9], [9, 40_000, 6]] {
        agree(&format!("loss of {tokens} of {vocab}"), |device| {
            let gpu = is_gpu(device);
            let targets: Vec<i32> = (0..tokens)
                .map(|i| {
                    if i % 3 == 1 {
                        -100
                    } else {
                        (i * 31 % vocab) as i32
                    }
                })
                .collect();
            let targets = ids(&targets, [tokens], device);
            let head = Matrix::from_f32(vocab, hidden, &noise(vocab * hidden, 3));
            let head = if gpu {
                on(&head, device)
            } else {
                Arc::new(head)
            };
            let [h, u, b, w] = inputs(
                [[tokens, hidden], [tokens, 3], [vocab, 3], [vocab, hidden]],
                device,
            );
            let low = Some([u.clone(), b.clone()]);
            let frozen =
                cross_entropy_frozen(h.clone(), low.clone(), &head, targets.clone(), Compute::F32);
            let alone = cross_entropy_frozen(h.clone(), None, &head, targets.clone(), Compute::F32);
            let trained =
                cross_entropy_trained(h.clone(), w.clone(), targets.clone(), Compute::F32);
            let scores = token_scores_frozen(h.clone(), low, &head, targets, Compute::F32);
            let mut all = with_gradients(frozen, &[h.clone(), u, b]);
            all.extend(with_gradients(alone, from_ref(&h)));
            all.extend(with_gradients(trained, &[h, w]));
            all.extend([values(scores.losses), values(scores.greedy.float())]);
            all
        });
    }
}

#[test]
fn optimizer_and_sums_are_those_of_the_cpu() {
    for n in [1, 1000, 200_003] {
        agree(&format!("optimizer of {n}"), |device| {
            let device = device.clone().inner();
            let plain = |seed| tensor(&noise(n, seed), [n], &device);
            let step = AdamWStep {
                rate: 1e-2,
                betas: [0.9, 0.99],
                eps: 1e-8,
                weight_decay: 0.1,
                number: 3,
                gradient_scale: 0.5,
                noise: None,
                first: 0,
            };
            let second = plain(4) * plain(4);
            let (p, [m, v]) = adamw(plain(1), plain(2), [plain(3), second], step);
            let squares = values(sums_of_squares(plain(5), 1));
            let positive = values(total(plain(6).abs()));
            vec![values(p), values(m), values(v), squares, positive]
        });
    }
}
