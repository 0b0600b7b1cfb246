//! Every operation against a plain version of itself in burn's own tensor operations: values, and the gradients that
//! burn derives for the plain version, over ragged shapes.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use std::sync::Arc;

use burn::tensor::activation::{log_softmax, sigmoid, softmax};
use burn::tensor::{Bool, Device, Distribution, Int, Tensor, TensorData};
use moeforge_kernels::{
    CacheType, Compute, Direction, Dropout, ExpertBank, ExpertFactors, ExpertLora, Format,
    GroupScore, HeadRows, KvBuffer, Matrix, RopeLayout, Routing, Segments, TopK, Update, attention,
    cached_attention, choose_experts, cross_entropy_frozen, cross_entropy_trained, dispatch,
    dropout, embed_frozen, embed_trained, expanded_attention, experts_frozen, experts_trained,
    heads_linear, linear_add, linear_frozen, linear_trained, linear_updated, rms_norm, rope,
    swiglu,
};

/// f32 sums of a few hundred products of values around 1, in another order: relative to the largest value.
const TOLERANCE: f32 = 2e-5;

fn device() -> Device {
    moeforge_kernels::device::of_tests().autodiff()
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &device())
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    x.to_data().try_to_vec().unwrap()
}

fn close<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let largest = values(expected).iter().fold(1f32, |m, v| m.max(v.abs()));
    for (i, (f, e)) in values(found).into_iter().zip(values(expected)).enumerate() {
        assert!(
            (f - e).abs() <= TOLERANCE * largest,
            "{what} at {i}: found {f}, expected {e}"
        );
    }
}

/// Compares two functions of the same inputs: their values, and the gradients of all inputs.
macro_rules! agree {
    ($what:expr, [$($x:ident),+], $found:expr, $expected:expr) => {{
        $(let $x = $x.clone().detach().require_grad();)+
        let (found, expected) = ($found, $expected);
        close(&found, &expected, &format!("{}: value", $what));
        let direction = found.random_like(Distribution::Uniform(-1.0, 1.0)).detach();
        let found = (found * direction.clone()).sum().backward();
        let expected = (expected * direction).sum().backward();
        $(
            let name = format!("{}: gradient of {}", $what, stringify!($x));
            close(&$x.grad(&found).expect(&name), &$x.grad(&expected).expect(&name), &name);
        )+
    }};
}

mod cached;
mod fake_quantized;
mod fused;
mod packed;
mod parts;
mod scores;

/// The same values in bf16, f16, f32 and FP8 bytes, as matrices.
fn stored(w: &Tensor<2>) -> Vec<Matrix> {
    let ([rows, cols], values) = (w.dims(), values(w));
    let bf16 = values
        .iter()
        .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
        .collect::<Vec<_>>();
    let f16 = values
        .iter()
        .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
        .collect::<Vec<_>>();
    let codes = (0..rows * cols)
        .map(|i| (i * 59 % 127 + if i % 3 == 0 { 128 } else { 0 }) as u8)
        .collect::<Vec<_>>();
    let grid = [rows.div_ceil(16), cols.div_ceil(24)];
    let scales = (0..grid[0] * grid[1])
        .map(|i| (1.0 + i as f32 % 7.0) / 3000.0)
        .collect();
    vec![
        Matrix::from_f32(rows, cols, &values),
        Matrix::dense(rows, cols, Format::Bf16, bf16.into()).unwrap(),
        Matrix::dense(rows, cols, Format::F16, f16.into()).unwrap(),
        Matrix::fp8([rows, cols], codes.into(), scales, &grid, [16, 24]).unwrap(),
    ]
}

fn dense(w: &Matrix) -> Tensor<2> {
    Tensor::from_data(TensorData::new(w.to_f32(), [w.rows(), w.cols()]), &device())
}

fn ids<const D: usize>(values: Vec<i32>, shape: [usize; D]) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

#[test]
fn linear_agrees() {
    for [tokens, out, inner] in [[1, 5, 7], [8, 33, 40], [9, 300, 130], [70, 17, 530]] {
        let (x, w, y, b, u) = (
            random([tokens, inner]),
            random([out, inner]),
            random([tokens, out]),
            random([out, 3]),
            random([tokens, 3]),
        );
        let a = random([3, inner]);
        agree!(
            "linear_trained",
            [x, w],
            linear_trained(x.clone(), w.clone(), Compute::F32, Compute::F32),
            x.clone().matmul(w.clone().transpose())
        );
        agree!(
            "linear_add",
            [y, u, b],
            linear_add(y.clone() * 1.0, u.clone(), b.clone()),
            y.clone() + u.clone().matmul(b.clone().transpose())
        );
        for w in stored(&w) {
            let (dense, w) = (dense(&w), Arc::new(w));
            let what = format!("linear_frozen {}", w.format().name());
            agree!(
                what,
                [x],
                linear_frozen(x.clone(), &w, Compute::F32),
                x.clone().matmul(dense.clone().transpose())
            );
            let what = format!("linear_updated {}", w.format().name());
            let update = Update {
                scale: 0.7,
                compute: Compute::F32,
                saved_as: Compute::F32,
            };
            agree!(
                what,
                [x, a, b],
                linear_updated(x.clone(), &w, [a.clone(), b.clone()], update),
                x.clone().matmul(dense.clone().transpose())
                    + x.clone()
                        .matmul(a.clone().transpose())
                        .matmul(b.clone().transpose())
                        * 0.7
            );
        }
    }
}

#[test]
fn linear_add_leaves_a_shared_tensor_alone() {
    let (y, u, b) = (random([4, 6]), random([4, 2]), random([6, 2]));
    let before = values(&y);
    let _sum = linear_add(y.clone(), u, b);
    assert_eq!(values(&y), before);
}

#[test]
fn bf16_products_are_products_of_rounded_operands() {
    let round = |x: &Tensor<2>| {
        let rounded: Vec<f32> = values(x)
            .iter()
            .map(|v| half::bf16::from_f32(*v).to_f32())
            .collect();
        Tensor::<2>::from_data(TensorData::new(rounded, x.dims()), &device())
    };
    let (x, w) = (
        random([20, 50]).require_grad(),
        random([30, 50]).require_grad(),
    );
    let y = linear_trained(x.clone(), w.clone(), Compute::Bf16, Compute::Bf16);
    close(&y, &round(&x).matmul(round(&w).transpose()), "value");
    let direction = random(y.dims());
    let grads = (y * direction.clone()).sum().backward();
    close(
        &x.grad(&grads).unwrap(),
        &round(&direction).matmul(round(&w)),
        "gradient of x",
    );
    close(
        &w.grad(&grads).unwrap(),
        &round(&direction).transpose().matmul(round(&x)),
        "gradient of w",
    );
}

#[test]
fn heads_multiply_with_their_own_rows() {
    let (heads, per_head, inner) = (3, 20, 33);
    for w in stored(&random([heads * per_head, inner])) {
        let all = dense(&w).reshape([heads, per_head, inner]);
        let w = Arc::new(w);
        for tokens in [1, 11] {
            for (start, len) in [(0, 13), (13, 7)] {
                let part = all.clone().slice([0..heads, start..start + len]); // [heads, len, inner]
                let rows = |direction| HeadRows {
                    heads,
                    start,
                    len,
                    direction,
                };
                let x = random([tokens, heads, inner]);
                let expected = x
                    .clone()
                    .swap_dims(0, 1)
                    .matmul(part.clone().swap_dims(1, 2))
                    .swap_dims(0, 1);
                close(
                    &heads_linear(x, &w, rows(Direction::Forward), Compute::F32),
                    &expected,
                    "forward",
                );
                let x = random([tokens, heads, len]);
                let expected = x.clone().swap_dims(0, 1).matmul(part).swap_dims(0, 1);
                close(
                    &heads_linear(x, &w, rows(Direction::Transposed), Compute::F32),
                    &expected,
                    "transposed",
                );
            }
        }
    }
}

#[test]
fn embeddings_are_rows() {
    let w = random([11, 6]);
    let chosen = ids(vec![3, 10, 3, 0], [4]);
    agree!(
        "embed_trained",
        [w],
        embed_trained(chosen.clone(), w.clone()),
        w.clone().select(0, chosen.clone())
    );
    for w in stored(&w) {
        let dense = dense(&w);
        close(
            &embed_frozen(chosen.clone(), &Arc::new(w)),
            &dense.select(0, chosen.clone()),
            "embed_frozen",
        );
    }
}

#[test]
fn norms_and_swiglu_agree() {
    for [tokens, width] in [[1, 4], [130, 36]] {
        let (x, weight, up) = (
            random([tokens, width]),
            random([width]),
            random([tokens, width]),
        );
        let plain = |x: &Tensor<2>, w: &Tensor<1>| {
            x.clone() / (x.clone().powi_scalar(2).mean_dim(1) + 1e-3).sqrt() * w.clone().unsqueeze()
        };
        agree!(
            "rms_norm",
            [x, weight],
            rms_norm(x.clone(), weight.clone(), 1e-3),
            plain(&x, &weight)
        );
        let start = width / 2;
        let (normed, rest) = (random([start]), start..width);
        agree!(
            "rms_norm_start",
            [x, normed],
            moeforge_kernels::rms_norm_start(x.clone(), normed.clone(), 1e-3),
            Tensor::cat(
                vec![
                    plain(&x.clone().slice([0..tokens, 0..start]), &normed),
                    x.clone().slice([0..tokens, rest.clone()])
                ],
                1
            )
        );
        agree!(
            "swiglu",
            [x, up],
            swiglu(x.clone(), up.clone(), Compute::F32),
            x.clone() * sigmoid(x.clone()) * up.clone()
        );
    }
}

#[test]
fn rope_agrees() {
    let (batch, seq, heads, dim) = (2, 5, 3, 8);
    let (x, angles) = (random([batch, seq, heads, dim]), random([seq, dim / 2]));
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let plain = |x: Tensor<4>, layout: RopeLayout| {
        let pair = |i: usize| match layout {
            RopeLayout::Interleaved => x
                .clone()
                .reshape([batch, seq, heads, dim / 2, 2])
                .slice([0..batch, 0..seq, 0..heads, 0..dim / 2, i..i + 1])
                .reshape([batch, seq, heads, dim / 2]),
            RopeLayout::HalfSplit => {
                x.clone()
                    .slice([0..batch, 0..seq, 0..heads, i * dim / 2..(i + 1) * dim / 2])
            }
        };
        let table = |t: &Tensor<2>| t.clone().reshape([1, seq, 1, dim / 2]);
        let a = pair(0) * table(&cos) - pair(1) * table(&sin);
        let b = pair(0) * table(&sin) + pair(1) * table(&cos);
        match layout {
            RopeLayout::Interleaved => {
                Tensor::stack::<5>(vec![a, b], 4).reshape([batch, seq, heads, dim])
            }
            RopeLayout::HalfSplit => Tensor::cat(vec![a, b], 3),
        }
    };
    for layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
        agree!(
            format!("rope {layout:?}"),
            [x],
            rope(x.clone(), cos.clone(), sin.clone(), layout),
            plain(x.clone(), layout)
        );
        let all = random([batch, seq, heads, dim + 3]);
        let cut = |all: &Tensor<4>, range| all.clone().slice([0..batch, 0..seq, 0..heads, range]);
        agree!(
            format!("rope of the last features {layout:?}"),
            [all],
            rope(all.clone(), cos.clone(), sin.clone(), layout),
            Tensor::cat(
                vec![cut(&all, 0..3), plain(cut(&all, 3..dim + 3), layout)],
                3
            )
        );
    }
}

#[test]
fn dropout_keeps_its_mask_for_the_gradient() {
    let x = random([9, 40]).require_grad();
    let y = dropout(
        x.clone(),
        Dropout {
            probability: 0.4,
            seed: 11,
        },
    );
    let factor = y.clone().detach() / x.clone().detach();
    let grad = x.grad(&y.sum().backward()).unwrap();
    close(&grad, &factor, "gradient");
    assert!(values(&grad).contains(&0.0));
}

#[test]
fn attention_agrees() {
    for ([seq, kv_seq], [heads, kv_heads], [dim, v_dim]) in [
        ([5, 5], [4, 4], [6, 3]),
        ([1, 9], [4, 2], [4, 4]),
        ([70, 130], [6, 1], [5, 7]),
        ([65, 65], [2, 2], [8, 8]),
    ] {
        let (q, k, v) = (
            random([2, seq, heads, dim]),
            random([2, kv_seq, kv_heads, dim]),
            random([2, kv_seq, kv_heads, v_dim]),
        );
        let plain = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| {
            let group = heads / kv_heads;
            let spread = |x: Tensor<4>, dim| {
                x.swap_dims(1, 2)
                    .unsqueeze_dim::<5>(2)
                    .repeat_dim(2, group)
                    .reshape([2, heads, kv_seq, dim])
            };
            let scores = q.swap_dims(1, 2).matmul(spread(k, dim).swap_dims(2, 3)) * 0.7;
            let mask =
                Tensor::<2, Bool>::tril_mask([seq, kv_seq], (kv_seq - seq) as i64, &device());
            let p = softmax(scores.mask_fill(mask.unsqueeze(), f32::NEG_INFINITY), 3);
            p.matmul(spread(v, v_dim)).swap_dims(1, 2)
        };
        let what = format!("attention {seq} of {kv_seq}, {heads} over {kv_heads}");
        agree!(
            what,
            [q, k, v],
            attention(q.clone(), k.clone(), v.clone(), 0.7, &Segments::whole()),
            plain(q.clone(), k.clone(), v.clone())
        );
    }
}

#[test]
fn expanded_attention_is_attention_over_assembled_keys() {
    let (batch, heads, v_dim, latent) = (2, 3, 4, 9);
    for ([seq, kv_seq], [nope, rope]) in [
        ([5, 5], [3, 2]),
        ([70, 131], [5, 4]),
        ([1, 6], [2, 9]),
        ([66, 66], [0, 3]),
        ([7, 9], [6, 0]),
    ] {
        let (q, kv, latents) = (
            random([batch, seq, heads, nope + rope]),
            random([batch, kv_seq, heads, nope + v_dim]),
            random([batch, kv_seq, 1, latent]),
        );
        let plain = |q: Tensor<4>, kv: Tensor<4>, latents: Tensor<4>| {
            let v = kv
                .clone()
                .slice([0..batch, 0..kv_seq, 0..heads, nope..nope + v_dim]);
            let mut parts = vec![];
            if nope > 0 {
                parts.push(kv.slice([0..batch, 0..kv_seq, 0..heads, 0..nope]));
            }
            if rope > 0 {
                let shared = latents.slice([0..batch, 0..kv_seq, 0..1, latent - rope..latent]);
                parts.push(shared.repeat_dim(2, heads));
            }
            attention(q, Tensor::cat(parts, 3), v, 0.7, &Segments::whole())
        };
        let run = |q: Tensor<4>, kv: Tensor<4>, latents: Tensor<4>| {
            expanded_attention(q, kv, latents, v_dim, 0.7, &Segments::whole())
        };
        let what = format!("expanded {seq} of {kv_seq}, {nope} + {rope}");
        if rope > 0 {
            agree!(
                what,
                [q, kv, latents],
                run(q.clone(), kv.clone(), latents.clone()),
                plain(q.clone(), kv.clone(), latents.clone())
            );
        } else {
            agree!(
                what,
                [q, kv],
                run(q.clone(), kv.clone(), latents.clone()),
                plain(q.clone(), kv.clone(), latents.clone())
            );
        }
    }
}

/// A routing of `tokens` over `experts`, its weights tracked, and the one-hot table `[tokens, top_k, experts]`.
fn routing(
    tokens: usize,
    experts: usize,
    top_k: usize,
    weights: Tensor<2>,
) -> (Routing, Tensor<3>) {
    let choice = TopK {
        top_k,
        n_group: 1,
        topk_group: 1,
        group_score: GroupScore::Max,
    };
    let ids = choose_experts(random([tokens, experts]), choice);
    let (order, offsets) = dispatch(ids.clone(), experts);
    let one_hot = ids.one_hot::<3>(experts).float();
    (
        Routing {
            weights,
            order,
            offsets,
            part: None,
        },
        one_hot,
    )
}

/// Every expert on every token, then picked by the one-hot table.
fn plain_experts(
    x: Tensor<2>,
    weights: Tensor<2>,
    one_hot: Tensor<3>,
    stacks: [Tensor<3>; 3],
) -> Tensor<2> {
    let [gate, up, down] = stacks;
    let experts = gate.dims()[0];
    let x = x.unsqueeze_dim::<3>(0).repeat_dim(0, experts);
    let (g, u) = (
        x.clone().matmul(gate.swap_dims(1, 2)),
        x.matmul(up.swap_dims(1, 2)),
    );
    let y = (g.clone() * sigmoid(g) * u).matmul(down.swap_dims(1, 2)); // [experts, tokens, hidden]
    let share = (one_hot * weights.unsqueeze_dim::<3>(2))
        .sum_dim(1)
        .squeeze_dim::<2>(1); // [tokens, experts]
    (y * share.transpose().unsqueeze_dim::<3>(2))
        .sum_dim(0)
        .squeeze_dim::<2>(0)
}

#[test]
fn trained_experts_agree() {
    for [tokens, experts, top_k, hidden, inner] in
        [[1, 4, 2, 6, 5], [300, 5, 2, 9, 20], [40, 17, 3, 33, 8]]
    {
        let (x, weights) = (random([tokens, hidden]), random([tokens, top_k]));
        let (gate, up, down) = (
            random([experts, inner, hidden]),
            random([experts, inner, hidden]),
            random([experts, hidden, inner]),
        );
        let (routing, one_hot) = routing(tokens, experts, top_k, weights.clone());
        agree!(
            format!("experts_trained of {tokens} tokens"),
            [x, weights, gate, up, down],
            experts_trained(
                x.clone(),
                Routing {
                    weights: weights.clone(),
                    ..routing.clone()
                },
                [gate.clone(), up.clone(), down.clone()],
                Compute::F32
            ),
            plain_experts(
                x.clone(),
                weights.clone(),
                one_hot.clone(),
                [gate.clone(), up.clone(), down.clone()]
            )
        );
    }
}

#[test]
fn frozen_experts_with_low_rank_updates_agree() {
    let [tokens, experts, top_k, hidden, inner, rank] = [270, 5, 2, 18, 21, 3];
    let bank = |rows, cols, kind: usize| {
        (0..experts)
            .map(|_| stored(&random([rows, cols])).swap_remove(kind))
            .collect::<Vec<_>>()
    };
    for kind in 0..4 {
        let bank = Arc::new(ExpertBank::new(
            bank(inner, hidden, kind),
            bank(inner, hidden, kind),
            bank(hidden, inner, kind),
        ));
        let stack = |list: &[Matrix]| Tensor::stack::<3>(list.iter().map(dense).collect(), 0);
        let (x, weights) = (random([tokens, hidden]), random([tokens, top_k]));
        let (ga, gb, da, db) = (
            random([experts, rank, hidden]),
            random([experts, inner, rank]),
            random([experts, rank, inner]),
            random([experts, hidden, rank]),
        );
        let (routing, one_hot) = routing(tokens, experts, top_k, weights.clone());
        let lora = ExpertLora {
            scale: [0.5, 0.0, 2.0],
            dropout: Dropout::OFF,
            quantizer: None,
        };
        agree!(
            format!("experts_frozen, format {kind}"),
            [x, weights, ga, gb, da, db],
            experts_frozen(
                x.clone(),
                Routing {
                    weights: weights.clone(),
                    ..routing.clone()
                },
                &bank,
                ExpertFactors {
                    gate: Some([ga.clone(), gb.clone()]),
                    up: None,
                    down: Some([da.clone(), db.clone()])
                },
                lora,
                Compute::F32
            ),
            plain_experts(
                x.clone(),
                weights.clone(),
                one_hot.clone(),
                [
                    stack(&bank.gate) + gb.clone().matmul(ga.clone()) * 0.5,
                    stack(&bank.up),
                    stack(&bank.down) + db.clone().matmul(da.clone()) * 2.0
                ]
            )
        );
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "one setup for seven gradients")]
fn dropped_experts_have_the_gradient_of_their_mask() {
    // With the mask a constant of the seed, the loss is a function that finite differences can follow.
    let [tokens, experts, top_k, hidden, inner, rank] = [12, 3, 2, 6, 5, 2];
    let bank = |rows, cols| {
        (0..experts)
            .map(|_| Matrix::from_f32(rows, cols, &values(&random([rows, cols]))))
            .collect::<Vec<_>>()
    };
    let bank = Arc::new(ExpertBank::new(
        bank(inner, hidden),
        bank(inner, hidden),
        bank(hidden, inner),
    ));
    let factors = [
        (rank, hidden),
        (inner, rank),
        (rank, hidden),
        (inner, rank),
        (rank, inner),
        (hidden, rank),
    ]
    .map(|(r, c)| random([experts, r, c]));
    let (routing, _) = routing(tokens, experts, top_k, random([tokens, top_k]));
    let lora = ExpertLora {
        scale: [1.0; 3],
        dropout: Dropout {
            probability: 0.5,
            seed: 3,
        },
        quantizer: None,
    };
    let x = random([tokens, hidden]);
    let loss = |x: &Tensor<2>, f: &[Tensor<3>; 6]| {
        let [ga, gb, ua, ub, da, db] = f.clone();
        let factors = ExpertFactors {
            gate: Some([ga, gb]),
            up: Some([ua, ub]),
            down: Some([da, db]),
        };
        experts_frozen(
            x.clone(),
            routing.clone(),
            &bank,
            factors,
            lora,
            Compute::F32,
        )
        .powi_scalar(2)
        .sum()
    };
    let (tracked_x, tracked) = (
        x.clone().require_grad(),
        factors.clone().map(|f| f.require_grad()),
    );
    let grads = loss(&tracked_x, &tracked).backward();
    let step = 1e-2;
    let slope = |plus: Tensor<1>, minus: Tensor<1>| {
        (plus.into_scalar::<f32>() - minus.into_scalar::<f32>()) / (2.0 * step)
    };
    // Truncation error of a central difference at step 1e-2 of a smooth function, relative to the slope's size.
    const FINITE: f32 = 2e-2;
    let direction = random(x.dims());
    let found = (tracked_x.grad(&grads).unwrap() * direction.clone())
        .sum()
        .into_scalar::<f32>();
    let expected = slope(
        loss(&(x.clone() + direction.clone() * step), &factors),
        loss(&(x.clone() - direction * step), &factors),
    );
    assert!(
        (found - expected).abs() < FINITE * expected.abs().max(1.0),
        "x: {found} {expected}"
    );
    for i in 0..6 {
        let direction = random(factors[i].dims());
        let found = (tracked[i].grad(&grads).unwrap() * direction.clone())
            .sum()
            .into_scalar::<f32>();
        let moved = |sign: f32| {
            let mut moved = factors.clone();
            moved[i] = moved[i].clone() + direction.clone() * (sign * step);
            loss(&x, &moved)
        };
        let expected = slope(moved(1.0), moved(-1.0));
        assert!(
            (found - expected).abs() < FINITE * expected.abs().max(1.0),
            "factor {i}: {found} {expected}"
        );
    }
}

/// A target for two tokens of three.
fn some_targets(tokens: usize, vocab: usize) -> Vec<i32> {
    let target = |i: usize| match i % 3 {
        1 => -100,
        _ => (i * 31 % vocab) as i32,
    };
    (0..tokens).map(target).collect()
}

#[test]
fn int8_is_for_weights_in_blocks_and_bf16_for_those_in_bf16() {
    let (tokens, vocab, hidden) = (12, 40, 33);
    let (h, w) = (random([tokens, hidden]), random([vocab, hidden]));
    let targets = ids(some_targets(tokens, vocab), [tokens]);
    for w in stored(&w).into_iter().map(Arc::new) {
        let results = |compute| {
            let loss = cross_entropy_frozen(h.clone(), None, &w, targets.clone(), compute);
            let y = linear_frozen(h.clone(), &w, compute);
            (loss.into_data(), y.into_data())
        };
        let [in_f32, in_bf16, in_int8] =
            [Compute::F32, Compute::Bf16, Compute::MatchWeight].map(results);
        let expected = match w.format() {
            Format::Bf16 => {
                assert_ne!(in_f32, in_bf16);
                in_bf16
            }
            _ => in_f32,
        };
        assert_eq!(expected, in_int8, "{}", w.format().name());
    }
}

#[test]
fn cross_entropy_agrees() {
    for [tokens, vocab, hidden] in [[3, 5, 4], [140, 1100, 9], [530, 1030, 33]] {
        let (h, w, u, b) = (
            random([tokens, hidden]) * 2.0,
            random([vocab, hidden]) * 2.0,
            random([tokens, 3]),
            random([vocab, 3]),
        );
        let targets = some_targets(tokens, vocab);
        let trained = Tensor::<1>::from_floats(
            targets
                .iter()
                .map(|t| if *t < 0 { 0.0 } else { 1.0 })
                .collect::<Vec<f32>>()
                .as_slice(),
            &device(),
        );
        let safe = ids(targets.iter().map(|t| (*t).max(0)).collect(), [tokens, 1]);
        let plain = |logits: Tensor<2>| {
            log_softmax(logits, 1)
                .gather(1, safe.clone())
                .squeeze_dim::<1>(1)
                .neg()
                * trained.clone()
        };
        let targets = ids(targets, [tokens]);
        agree!(
            "cross_entropy_trained",
            [h, w],
            cross_entropy_trained(h.clone(), w.clone(), targets.clone(), Compute::F32),
            plain(h.clone().matmul(w.clone().transpose()))
        );
        for w in stored(&w) {
            let (dense, w) = (dense(&w), Arc::new(w));
            agree!(
                format!("cross_entropy_frozen {}", w.format().name()),
                [h, u, b],
                cross_entropy_frozen(
                    h.clone(),
                    Some([u.clone(), b.clone()]),
                    &w,
                    targets.clone(),
                    Compute::F32
                ),
                plain(
                    h.clone().matmul(dense.clone().transpose())
                        + u.clone().matmul(b.clone().transpose())
                )
            );
            agree!(
                format!("cross_entropy_frozen without update, {}", w.format().name()),
                [h],
                cross_entropy_frozen(h.clone(), None, &w, targets.clone(), Compute::F32),
                plain(h.clone().matmul(dense.clone().transpose()))
            );
        }
    }
}

#[test]
fn untracked_inputs_get_no_gradient_and_cost_no_graph() {
    let (x, w) = (random([10, 6]), random([4, 6]).require_grad());
    let grads = linear_trained(x.clone(), w.clone(), Compute::F32, Compute::F32)
        .sum()
        .backward();
    assert!(x.grad(&grads).is_none() && w.grad(&grads).is_some());
    let y = linear_frozen(
        x,
        &Arc::new(Matrix::from_f32(4, 6, &[1.0; 24])),
        Compute::F32,
    );
    assert!(!y.is_tracked());
}
