//! The machine's peak FLOP/s and memory bandwidth: what measured speeds are compared with. On the CPU, as our own code
//! reaches them; on a GPU, as burn's measurement finds them.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use kernels::device::{Measured, is_gpu, measure, read};
use kernels::{Format, Ggml, Matrix};
use model::modules::linear::{Frozen, Linear, Weight};
use model::{Compute, ForwardContext};
use rayon::prelude::*;

/// Rows, columns and inner dimension of the product: large enough that only the arithmetic counts.
const SIZE: usize = 2048;

/// Numbers of each of the two buffers, 128 MiB: together they are several times larger than the caches of a CPU.
const NUMBERS: usize = 16 << 20;

/// Numbers that a thread reads at a time: 1 MiB.
const READ_CHUNK: usize = 128 << 10;

/// Times a linear layer of 2048 × 2048 weights on 2048 tokens with all threads, `runs` times after a warm-up. Weights
/// and products are in bf16, in q8_0 blocks and int8, or else in f32.
///
/// Returns FLOP/s, counting a multiplication and an addition as two. A GPU is measured once, in f32.
pub(super) fn peak_flops(compute: Compute, device: &Device, runs: usize) -> Vec<f64> {
    if is_gpu(device) {
        return vec![of_gpu(device, |measured| measured.f32_flops)];
    }
    let values: Vec<f32> = (0..SIZE * SIZE)
        .map(|i| (i % 97) as f32 / 97.0 - 0.5)
        .collect();
    let (matrix, compute) = match compute {
        Compute::Bf16 | Compute::MatchWeight => (narrow(&values, compute), Compute::MatchWeight),
        _ => (Matrix::from_f32(SIZE, SIZE, &values), Compute::F32),
    };
    let x = Tensor::<1>::from_floats(values.as_slice(), device).reshape([SIZE, SIZE]);
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
        read(y.slice([0..1, 0..1]));
        2.0 * (SIZE as f64).powi(3) / started.elapsed().as_secs_f64()
    };
    speed();
    (0..runs).map(|_| speed()).collect()
}

/// A speed of a GPU; not a number where it cannot be measured.
fn of_gpu(device: &Device, speed: impl FnOnce(Measured) -> Option<f64>) -> f64 {
    measure(device).and_then(speed).unwrap_or(f64::NAN)
}

/// Weights in bf16, or in blocks as int8 products read them fastest.
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
    let mut matrix = [matrix.expect("as many bytes as the format needs")];
    Matrix::repack(&mut matrix, Compute::MatchWeight, &mut |_| ());
    let [matrix] = matrix;
    matrix
}

/// Times reading memory outside of the caches with all threads, `runs` times after a warm-up.
///
/// Compares two equal buffers: the C library uses the widest registers of the CPU for this, however this program was
/// built, and has to read both buffers to their ends.
///
/// Returns bytes per second. A GPU's own memory is measured once.
pub(super) fn peak_bandwidth(device: &Device, runs: usize) -> Vec<f64> {
    if is_gpu(device) {
        return vec![of_gpu(device, |measured| measured.read_bytes_per_second)];
    }
    let numbers: Vec<u64> = (0..NUMBERS as u64).collect();
    let buffers = [numbers.clone(), numbers];
    let [left, right] = [&buffers[0], &buffers[1]].map(|numbers| numbers.par_chunks(READ_CHUNK));
    let speed = || {
        let started = Instant::now();
        let are_equal = left.clone().zip(right.clone()).all(|(l, r)| l == r);
        assert!(are_equal, "copies are compared");
        2.0 * (NUMBERS * size_of::<u64>()) as f64 / started.elapsed().as_secs_f64()
    };
    speed();
    (0..runs).map(|_| speed()).collect()
}
