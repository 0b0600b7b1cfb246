//! Kernels against the CPU's, on the device that `MOEFORGE_TEST_DEVICE` names; without it, on the software adapter.

mod plain;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Int, Tensor, TensorData};
use half::f16;

use crate::backend::elementwise::{embed_frozen, embed_trained};
use crate::backend::experts::{
    ExpertFactors, Routing, choose_experts, dispatch, experts_frozen, experts_trained,
};
use crate::backend::linear::{heads_linear, linear_frozen, linear_trained};
use crate::backend::traits::{Direction, HeadRows};
use crate::device;
use crate::formats::{Format, Ggml, Matrix};
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::ops::route::{GroupScore, TopK};
use crate::settings::Compute;
use crate::testing::{every_block_format, every_format, noise};

/// f32 sums of some hundred products in another order: relative to the largest value.
const TOLERANCE: f32 = 1e-5;
/// The same of gradients, which are sums of sums.
const GRADIENT: f32 = 1e-4;

/// The device, which a test has to itself: shards are limited for all.
fn gpu() -> (Device, MutexGuard<'static, ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let name = std::env::var("MOEFORGE_TEST_DEVICE").unwrap_or_else(|_| "webgpu:cpu".into());
    device::limit_shard_bytes(usize::MAX);
    (device::open(&name).unwrap(), alone)
}

fn cpu() -> Device {
    Device::flex()
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

fn ints<const D: usize>(x: Tensor<D, Int>) -> Vec<i32> {
    x.into_data().convert::<i32>().try_to_vec().unwrap()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn ids<const D: usize>(values: &[i32], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-30f32, |most, v| most.max(v.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance * largest,
            "{what} at {i}: found {found}, expected {expected} of at most {largest}"
        );
    }
}

/// The matrix on a device.
fn on(w: &Matrix, device: &Device) -> Arc<Matrix> {
    let mut list = [w.clone()];
    Matrix::place(&mut list, device, &mut |_| ()).unwrap();
    let [placed] = list;
    assert!(placed.split_kv_b().is_some() || placed.placed().is_some());
    Arc::new(placed)
}

/// Every format, of ragged widths where it has no blocks.
fn matrices(rows: usize) -> Vec<Matrix> {
    let mut all = every_format(rows, 45, 3);
    all.extend(every_block_format(rows));
    all
}

/// All numbers of a matrix as the device decodes them: the rows of an embedding.
fn decoded(w: &Matrix, device: &Device) -> Vec<f32> {
    let rows: Vec<i32> = (0..w.rows() as i32).collect();
    values(embed_frozen(
        ids(&rows, [rows.len()], device),
        &on(w, device),
    ))
}

#[test]
fn every_code_is_decoded_to_the_bits_of_the_cpu() {
    let (gpu, _alone) = gpu();
    let halves: Vec<u8> = (0..=u16::MAX)
        .filter(|bits| f16::from_bits(*bits).is_finite())
        .flat_map(u16::to_le_bytes)
        .collect();
    let codes: Vec<u8> = (0..=255u8).filter(|code| code & 0x7f != 0x7f).collect();
    let n = codes.len();
    let mut all = vec![
        Matrix::dense(halves.len() / 64, 32, Format::F16, halves.clone().into()).unwrap(),
        Matrix::dense(halves.len() / 64, 32, Format::Bf16, halves.into()).unwrap(),
        Matrix::fp8([1, n], codes.into(), vec![1.0], &[1, 1], [128, 128 * 2]).unwrap(),
    ];
    all.extend(matrices(9));
    for w in all {
        let (found, expected) = (decoded(&w, &gpu), w.to_f32());
        let adds = matches!(
            w.format(),
            Format::Ggml(Ggml::Q4_1 | Ggml::Q5_1 | Ggml::Q2K | Ggml::Q4K | Ggml::Q5K)
        );
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // Where a minimum is added, a compiler may round once instead of twice.
            let steps = (found.to_bits() as i32).wrapping_sub(expected.to_bits() as i32);
            let is_near = (found - expected).abs() <= 2.0 * f32::EPSILON * expected.abs().max(4.0);
            assert!(
                steps == 0 || (adds && is_near),
                "{} at {i}: found {found:e}, expected {expected:e}",
                w.format().name()
            );
        }
    }
}

#[test]
fn planes_take_at_most_a_few_words_more_than_a_row_of_the_file() {
    let (gpu, _alone) = gpu();
    for w in matrices(9) {
        let placed = on(&w, &gpu);
        let stack = &placed.placed().unwrap().stack;
        let words: usize = stack.strides.iter().sum();
        let planes = stack.strides.iter().filter(|stride| **stride > 0).count();
        let row = w.bytes().len() / w.rows();
        assert!(
            (row..row + 16 * planes).contains(&(words * 4)),
            "{}: {words}",
            w.format().name()
        );
    }
}

#[test]
fn products_are_those_of_the_cpu() {
    let (gpu, _alone) = gpu();
    for limit in [usize::MAX, 2048] {
        device::limit_shard_bytes(limit);
        for w in matrices(37) {
            let (there, here) = (on(&w, &gpu), Arc::new(w.clone()));
            for tokens in [0, 1, 7, 9] {
                let what = format!("{} of {tokens} in shards of {limit}", w.format().name());
                let x = noise(tokens * w.cols(), 7);
                let y = |device: &Device, w: &Arc<Matrix>| {
                    let x = tensor(&x, [tokens, w.cols()], device);
                    values(linear_frozen(x, w, Compute::F32))
                };
                close(&y(&gpu, &there), &y(&cpu(), &here), TOLERANCE, &what);
                let dx = |device: &Device, w: &Arc<Matrix>| {
                    let device = device.clone().autodiff();
                    let x = tensor(&x, [tokens, w.cols()], &device).require_grad();
                    let y = linear_frozen(x.clone(), w, Compute::F32);
                    let weights = tensor(&noise(tokens * w.rows(), 9), [tokens, w.rows()], &device);
                    values(x.grad(&(y * weights).sum().backward()).unwrap())
                };
                if tokens > 0 {
                    close(&dx(&gpu, &there), &dx(&cpu(), &here), GRADIENT, &what);
                }
            }
        }
    }
    device::limit_shard_bytes(usize::MAX);
}

/// A `kv_b_proj` of three heads in one piece and in two.
fn kv_b_projs() -> [Matrix; 2] {
    let [nope, v, rank, heads] = [5, 4, 7, 3];
    let whole = noise(heads * (nope + v) * rank, 1);
    let (mut keys, mut rest) = (vec![], vec![]);
    for head in whole.chunks_exact((nope + v) * rank) {
        for col in 0..rank {
            keys.extend((0..nope).map(|row| head[row * rank + col]));
        }
        rest.extend_from_slice(&head[nope * rank..]);
    }
    let keys = Matrix::from_f32(heads * rank, nope, &keys);
    let rest = Matrix::from_f32(heads * v, rank, &rest);
    [
        Matrix::from_f32(heads * (nope + v), rank, &whole),
        Matrix::from_split_kv_b(keys, rest, heads).unwrap(),
    ]
}

#[test]
fn heads_multiply_with_their_own_rows_however_they_are_stored() {
    let (gpu, _alone) = gpu();
    let ([whole, split], [heads, nope, v, rank]) = (kv_b_projs(), [3, 5, 4, 7]);
    let whole = Arc::new(whole);
    for w in [&*whole, &split] {
        let there = on(w, &gpu);
        for tokens in [1, 9] {
            for (start, len) in [(0, nope), (nope, v)] {
                for direction in [Direction::Forward, Direction::Transposed] {
                    let rows = HeadRows {
                        heads,
                        start,
                        len,
                        direction,
                    };
                    let width = if direction == Direction::Forward {
                        rank
                    } else {
                        len
                    };
                    let x = noise(tokens * heads * width, 5);
                    let run = |device: &Device, w: &Arc<Matrix>| {
                        let x = tensor(&x, [tokens, heads, width], device);
                        values(heads_linear(x, w, rows, Compute::F32))
                    };
                    let what = format!("{direction:?} of {start}..{len}, {}", w.format().name());
                    close(&run(&gpu, &there), &run(&cpu(), &whole), TOLERANCE, &what);
                }
            }
            let x = noise(tokens * rank, 5);
            let grads = |device: &Device, w: &Arc<Matrix>| {
                let device = device.clone().autodiff();
                let x = tensor(&x, [tokens, rank], &device).require_grad();
                let y = linear_frozen(x.clone(), w, Compute::F32);
                let grads = y.clone().powi_scalar(2).sum().backward();
                [values(y), values(x.grad(&grads).unwrap())]
            };
            let ([y, dx], [y0, dx0]) = (grads(&gpu, &there), grads(&cpu(), &whole));
            close(&y, &y0, TOLERANCE, "the whole");
            close(&dx, &dx0, GRADIENT, "its gradient");
        }
    }
}

#[test]
fn embeddings_and_their_gradients_are_those_of_the_cpu() {
    let (gpu, _alone) = gpu();
    let (vocab, width) = (11, 6);
    let chosen = [3, 10, 3, 0, 3, 10];
    let w = noise(vocab * width, 2);
    let run = |device: &Device| {
        let device = device.clone().autodiff();
        let w = tensor(&w, [vocab, width], &device).require_grad();
        let y = embed_trained(ids(&chosen, [chosen.len()], &device), w.clone());
        let weights = tensor(
            &noise(chosen.len() * width, 3),
            [chosen.len(), width],
            &device,
        );
        let grads = (y.clone() * weights).sum().backward();
        [values(y), values(w.grad(&grads).unwrap())]
    };
    assert_eq!(run(&gpu), run(&cpu()));
}

#[test]
fn experts_are_chosen_and_sorted_as_on_the_cpu() {
    let (gpu, _alone) = gpu();
    for (tokens, experts, n_group, topk_group, top_k) in [
        (1, 8, 1, 1, 2),
        (70, 64, 8, 3, 6),
        (700, 256, 8, 4, 8),
        (9, 6, 3, 1, 2),
        (0, 4, 1, 1, 1),
    ] {
        let mut scores = noise(tokens * experts, 4);
        // Ties, within and between groups, and what is no number.
        for (i, score) in scores.iter_mut().enumerate() {
            match i % 11 {
                0 => *score = 0.25,
                7 if i % 3 == 0 => *score = f32::NAN,
                _ => {}
            }
        }
        for group_score in [GroupScore::Max, GroupScore::TopTwoSum] {
            let choice = TopK {
                top_k,
                n_group,
                topk_group,
                group_score,
            };
            let run = |device: &Device| {
                let scores = tensor(&scores, [tokens, experts], device);
                let chosen = choose_experts(scores, choice);
                let (order, offsets) = dispatch(chosen.clone(), experts);
                [ints(chosen), ints(order), ints(offsets)]
            };
            assert_eq!(run(&gpu), run(&cpu()), "{choice:?} of {tokens}");
        }
    }
    // More slots than a chunk of the sort.
    let many: Vec<i32> = (0..10_000).map(|i| i * i % 7).collect();
    let run = |device: &Device| {
        let (order, offsets) = dispatch(ids(&many, [2500, 4], device), 9);
        [ints(order), ints(offsets)]
    };
    assert_eq!(run(&gpu), run(&cpu()));
}

/// Slots of 5 experts, the last of which has none, and some slots of which are served elsewhere.
fn some_routing(tokens: usize, device: &Device) -> Routing {
    let chosen: Vec<i32> = (0..2 * tokens as i32).map(|i| i * 7 % 4).collect();
    let (order, offsets) = dispatch(ids(&chosen, [tokens, 2], &cpu()), 5);
    let mut offsets = ints(offsets);
    let elsewhere = offsets[3];
    offsets[4..].fill(elsewhere);
    Routing {
        weights: tensor(&noise(2 * tokens, 6), [tokens, 2], device),
        order: ids(&ints(order), [2 * tokens], device),
        offsets: ids(&offsets, [6], device),
        part: None,
    }
}

/// Frozen experts with factors, dropout and a routing: the output and all gradients.
fn frozen_experts(device: &Device, bank: &Arc<ExpertBank>, tokens: usize) -> Vec<Vec<f32>> {
    let [experts, inner, hidden, rank] =
        [bank.gate.len(), bank.gate[0].rows(), bank.gate[0].cols(), 3];
    let device = device.clone().autodiff();
    let x = tensor(&noise(tokens * hidden, 1), [tokens, hidden], &device).require_grad();
    let mut routing = some_routing(tokens, &device);
    routing.weights = routing.weights.require_grad();
    let factors = [(rank, hidden), (inner, rank), (rank, inner), (hidden, rank)];
    let factors = factors
        .map(|(r, c)| tensor(&noise(experts * r * c, 8), [experts, r, c], &device).require_grad());
    let [ga, gb, da, db] = factors.clone();
    let lora = ExpertLora {
        scale: [0.5, 0.0, 2.0],
        dropout: Dropout {
            probability: 0.25,
            seed: 3,
        },
        quantizer: None,
    };
    let all = ExpertFactors {
        gate: Some([ga, gb]),
        up: None,
        down: Some([da, db]),
    };
    let y = experts_frozen(x.clone(), routing.clone(), bank, all, lora, Compute::F32);
    let weights = tensor(&noise(tokens * hidden, 2), [tokens, hidden], &device);
    let grads = (y.clone() * weights).sum().backward();
    let mut found = vec![
        values(y),
        values(x.grad(&grads).unwrap()),
        values(routing.weights.grad(&grads).unwrap()),
    ];
    found.extend(factors.map(|factor| values(factor.grad(&grads).unwrap())));
    found
}

#[test]
fn frozen_experts_and_their_gradients_are_those_of_the_cpu() {
    let (gpu, _alone) = gpu();
    for limit in [usize::MAX, 2048] {
        device::limit_shard_bytes(limit);
        for kind in 0..4 {
            let list = |seed: u64| {
                let one = |e| every_format(45, 45, seed + e).swap_remove(kind);
                (0..5).map(one).collect::<Vec<_>>()
            };
            let lists = [list(10), list(20), list(30)];
            let bank = |device: &Device| {
                let [gate, up, down] = lists.clone().map(|mut list| {
                    Matrix::place(&mut list, device, &mut |_| ()).unwrap();
                    list
                });
                Arc::new(ExpertBank::new(gate, up, down))
            };
            let banks = [bank(&gpu), bank(&cpu())];
            for tokens in [1, 9, 70] {
                let found = frozen_experts(&gpu, &banks[0], tokens);
                let expected = frozen_experts(&cpu(), &banks[1], tokens);
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let tolerance = if i == 0 { 2.0 * TOLERANCE } else { GRADIENT };
                    close(
                        found,
                        expected,
                        tolerance,
                        &format!("format {kind}, {tokens}: {i}"),
                    );
                }
            }
        }
    }
    device::limit_shard_bytes(usize::MAX);
}

#[test]
fn trained_experts_and_their_gradients_are_those_of_the_cpu() {
    let (gpu, _alone) = gpu();
    let [experts, hidden, inner] = [5, 18, 21];
    let run = |device: &Device, tokens: usize| {
        let device = device.clone().autodiff();
        let x = tensor(&noise(tokens * hidden, 1), [tokens, hidden], &device).require_grad();
        let stacks = [[inner, hidden], [inner, hidden], [hidden, inner]].map(|[r, c]| {
            tensor(&noise(experts * r * c, 8), [experts, r, c], &device).require_grad()
        });
        let routing = some_routing(tokens, &device);
        let y = experts_trained(x.clone(), routing, stacks.clone(), Compute::F32);
        let weights = tensor(&noise(tokens * hidden, 2), [tokens, hidden], &device);
        let grads = (y.clone() * weights).sum().backward();
        let mut found = vec![values(y), values(x.grad(&grads).unwrap())];
        found.extend(stacks.map(|stack| values(stack.grad(&grads).unwrap())));
        found
    };
    for tokens in [1, 9, 70] {
        let found = run(&gpu, tokens);
        for (i, (found, expected)) in found.iter().zip(&run(&cpu(), tokens)).enumerate() {
            close(found, expected, GRADIENT, &format!("{tokens} tokens: {i}"));
        }
    }
}

#[test]
fn trained_weights_have_the_gradients_of_the_cpu() {
    let (gpu, _alone) = gpu();
    for [tokens, out, inner] in [[1, 5, 7], [500, 33, 40], [1025, 9, 130]] {
        let run = |device: &Device| {
            let device = device.clone().autodiff();
            let x = tensor(&noise(tokens * inner, 1), [tokens, inner], &device).require_grad();
            let w = tensor(&noise(out * inner, 2), [out, inner], &device).require_grad();
            let y = linear_trained(x.clone(), w.clone(), Compute::F32, Compute::F32);
            let weights = tensor(&noise(tokens * out, 3), [tokens, out], &device);
            let grads = (y.clone() * weights).sum().backward();
            [
                values(y),
                values(x.grad(&grads).unwrap()),
                values(w.grad(&grads).unwrap()),
            ]
        };
        for (found, expected) in run(&gpu).iter().zip(&run(&cpu())) {
            close(found, expected, GRADIENT, &format!("{tokens} tokens"));
        }
    }
}

/// More bytes than the software adapter binds at once: a vocabulary, and a stack of experts.
#[test]
fn weights_larger_than_a_binding_are_cut() {
    let (gpu, _alone) = gpu();
    let (vocab, width) = (70_000, 512);
    let w = Matrix::from_f32(vocab, width, &noise(vocab * width, 3));
    let there = on(&w, &gpu);
    assert!(there.placed().unwrap().stack.shards.len() > 1);
    let here = Arc::new(w);
    let chosen = [0, 69_999, 40_000, 32_768];
    let rows =
        |device: &Device, w: &Arc<Matrix>| values(embed_frozen(ids(&chosen, [4], device), w));
    assert_eq!(rows(&gpu, &there), rows(&cpu(), &here));
    let run = |device: &Device, w: &Arc<Matrix>| {
        let device = device.clone().autodiff();
        let x = tensor(&noise(2 * width, 5), [2, width], &device).require_grad();
        let y = linear_frozen(x.clone(), w, Compute::F32);
        let weights = tensor(&noise(2 * vocab, 6), [2, vocab], &device);
        let grads = (y.clone() * weights).sum().backward();
        [values(y), values(x.grad(&grads).unwrap())]
    };
    let ([y, dx], [y0, dx0]) = (run(&gpu, &there), run(&cpu(), &here));
    close(&y, &y0, TOLERANCE, "logits");
    close(&dx, &dx0, GRADIENT, "their gradient");

    let [experts, inner, hidden] = [4, 9000, 1024];
    let list: Vec<Matrix> = (0..experts)
        .map(|e| Matrix::from_f32(inner, hidden, &noise(inner * hidden, 20 + e as u64)))
        .collect();
    let mut placed = list.clone();
    Matrix::place(&mut placed, &gpu, &mut |_| ()).unwrap();
    assert!(placed[0].placed().unwrap().stack.shards.len() > 1);
    let x = noise(hidden, 7);
    for (placed, list) in placed.into_iter().zip(list) {
        let y = |device: &Device, w: Matrix| {
            values(linear_frozen(
                tensor(&x, [1, hidden], device),
                &Arc::new(w),
                Compute::F32,
            ))
        };
        close(&y(&gpu, placed), &y(&cpu(), list), TOLERANCE, "an expert");
    }
}

/// Every plane of every format, whole and in shards, with one bit of a word turned.
#[test]
fn weights_that_the_device_has_changed_are_refused() {
    let (device, _alone) = gpu();
    for limit in [usize::MAX, 4096] {
        for mut w in every_format(70, 512, 5) {
            device::limit_shard_bytes(limit);
            let placed = Matrix::place(std::slice::from_mut(&mut w), &device, &mut |_| ());
            device::limit_shard_bytes(usize::MAX);
            placed.unwrap();
            let weights = [w];
            assert_eq!(device::expect_unchanged(&weights), Ok(()));
            let stack = &weights[0].placed().unwrap().stack;
            let shard = stack.shards.last().unwrap();
            for (plane, checksum) in shard.planes.iter().zip(shard.checksums) {
                if checksum.is_none() {
                    continue;
                }
                let bytes = plane.client.read_one_unchecked(plane.handle.clone());
                let at = bytes.len() / 8 * 4;
                let mut word: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
                word[3] ^= 0x80;
                let to = plane.handle.clone().offset_start(at as u64);
                let to = to.offset_end((bytes.len() - at - 4) as u64);
                let write = |word: &[u8]| {
                    let word = burn::tensor::Bytes::from_bytes_vec(word.to_vec());
                    plane.client.write(&to, word);
                };
                write(&word);
                let error = device::expect_unchanged(&weights).unwrap_err().to_string();
                assert!(error.contains("pieces of the weights"), "{error}");
                write(&bytes[at..at + 4]);
                assert_eq!(device::expect_unchanged(&weights), Ok(()));
            }
        }
    }
}
