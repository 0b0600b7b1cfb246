//! What this machine multiplies and reads at most, as far as our own code knows how: what a measured speed is a fraction
//! of.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use kernels::{Format, Ggml, Matrix};
use model::linear::{Frozen, Linear, Weight};
use model::{Compute, ForwardContext};
use rayon::prelude::*;

/// Rows, outputs and sum of the product: large enough that nothing but multiplying counts.
const SIZE: usize = 2048;

/// Numbers of each buffer that is read, 128 MiB: both together are several times what the caches of a machine hold.
const NUMBERS: usize = 16 << 20;

/// Numbers that a thread reads at a time, 1 MiB.
const CHUNK: usize = 128 << 10;

/// Measures a linear layer of 2048 × 2048 weights on 2048 tokens, on all threads, so many times; once more before, which
/// does not count. Weights and products are in bf16, in blocks of q8_0 and int8, or else in f32.
///
/// Returns operations per second, a multiplication and its addition being two.
pub(super) fn product_speeds(compute: Compute, runs: usize) -> Vec<f64> {
    let device = Device::flex();
    let values: Vec<f32> = (0..SIZE * SIZE)
        .map(|i| (i % 97) as f32 / 97.0 - 0.5)
        .collect();
    let (matrix, compute) = match compute {
        Compute::Bf16 | Compute::Int8 => (narrow(&values, compute), Compute::Int8),
        _ => (Matrix::from_f32(SIZE, SIZE, &values), Compute::F32),
    };
    let x = Tensor::<1>::from_floats(values.as_slice(), &device).reshape([SIZE, SIZE]);
    let linear = Linear {
        weight: Weight::Frozen(Frozen {
            matrix: Arc::new(matrix),
        }),
        bias: None,
        lora: None,
        quantizer: None,
    };
    let speed = || {
        let started = Instant::now();
        let y = linear.forward(x.clone(), &ForwardContext::new(compute));
        // Reading a number waits for all of them, where a device computes by itself.
        let _ = y.slice([0..1, 0..1]).into_scalar::<f32>();
        2.0 * (SIZE as f64).powi(3) / started.elapsed().as_secs_f64()
    };
    speed();
    (0..runs).map(|_| speed()).collect()
}

/// Weights in bf16, or in blocks as products in int8 read them fastest.
fn narrow(values: &[f32], compute: Compute) -> Matrix {
    let (format, bytes) = match compute {
        Compute::Bf16 => {
            let upper_halves = values.iter().map(|v| (v.to_bits() >> 16) as u16);
            (
                Format::Bf16,
                upper_halves.flat_map(u16::to_le_bytes).collect(),
            )
        }
        _ => {
            let format = Ggml::Q8_0;
            let mut blocks = vec![0; values.len() / format.block() * format.block_bytes()];
            format.encode(values, &mut blocks);
            (Format::Ggml(format), blocks)
        }
    };
    let matrix = Matrix::dense(SIZE, SIZE, format, bytes.into());
    let mut matrix = [matrix.expect("bytes of so many numbers")];
    Matrix::repack(&mut matrix, Compute::Int8, &mut |_| ());
    let [matrix] = matrix;
    matrix
}

/// Measures how fast all threads together read what no cache holds, so many times; once more before, which does not count.
///
/// Two equal buffers are compared: the C library does so with the widest registers there are, however this program was
/// built, and has to read both to their ends.
///
/// Returns bytes per second.
pub(super) fn read_speeds(runs: usize) -> Vec<f64> {
    let numbers: Vec<u64> = (0..NUMBERS as u64).collect();
    let buffers = [numbers.clone(), numbers];
    let [left, right] = [&buffers[0], &buffers[1]].map(|numbers| numbers.par_chunks(CHUNK));
    let speed = || {
        let started = Instant::now();
        let are_equal = left.clone().zip(right.clone()).all(|(l, r)| l == r);
        assert!(are_equal, "copies are compared");
        2.0 * (NUMBERS * size_of::<u64>()) as f64 / started.elapsed().as_secs_f64()
    };
    speed();
    (0..runs).map(|_| speed()).collect()
}
