//! Counting, and dropout by the same mask as on the CPU.

use burn::backend::{CubeDevice, TensorMetadata};
use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::{CubeDim, calculate_cube_count_elemwise};
use burn::tensor::DType;

use super::tensors::{contiguous, empty};
use crate::formats::placed::{CubeTensor, tensor_of};
use crate::ops::dropout::Dropout;

/// `out[i] = i`; a thread per number.
#[cube(launch)]
fn counting(out: &mut [i32], n: usize) {
    if ABSOLUTE_POS >= n {
        terminate!();
    }
    out[ABSOLUTE_POS] = ABSOLUTE_POS as i32;
}

/// `0..n`.
pub(super) fn count(n: usize, device: &CubeDevice) -> CubeTensor {
    let client = device.client();
    let handle = client.empty(n.max(1) * size_of::<i32>());
    let out = tensor_of((&client, device), handle, [n], DType::I32);
    if n > 0 {
        let dim = CubeDim::new(&client, n);
        let groups = calculate_cube_count_elemwise(&client, n, dim);
        counting::launch(&client, groups, dim, out.clone().into_buffer_arg(), n);
    }
    out
}

/// The upper half of a product of two words, from halves of 16 bits: WGSL has no integers of 64.
#[cube]
fn high_product(a: u32, b: u32) -> u32 {
    let (a0, a1) = (a & 0xffff, a >> 16);
    let (b0, b1) = (b & 0xffff, b >> 16);
    let middle = a1 * b0 + ((a0 * b0) >> 16);
    let other = a0 * b1 + (middle & 0xffff);
    a1 * b1 + (middle >> 16) + (other >> 16)
}

/// The lower 64 bits of a product, as low and high word.
#[cube]
fn times(low: u32, high: u32, #[comptime] factor: u64) -> (u32, u32) {
    let factor_low = comptime!((factor & 0xffff_ffff) as u32).runtime();
    let factor_high = comptime!((factor >> 32) as u32).runtime();
    let top = high_product(low, factor_low) + low * factor_high + high * factor_low;
    (low * factor_low, top)
}

/// `z ^ (z >> shift)`.
#[cube]
fn xor_shifted(low: u32, high: u32, #[comptime] shift: u32) -> (u32, u32) {
    let carried = (low >> shift) | (high << comptime!(32 - shift));
    (low ^ carried, high ^ (high >> shift))
}

/// What is dropped depends on the seed and an element's index alone; a thread per element. See [`Dropout`].
#[cube(launch)]
fn drop(
    x: &[f32],
    out: &mut [f32],
    n: usize,
    seed_low: u32,
    seed_high: u32,
    limit: u32,
    keep: f32,
) {
    if ABSOLUTE_POS >= n {
        terminate!();
    }
    let (step_low, step_high) = times(ABSOLUTE_POS as u32, 0u32, 0x9E37_79B9_7F4A_7C15u64);
    let low = seed_low + step_low;
    let carry = select(low < step_low, 1u32, 0u32);
    let (low, high) = xor_shifted(low, seed_high + step_high + carry, 30u32);
    let (low, high) = times(low, high, 0xBF58_476D_1CE4_E5B9u64);
    let (low, high) = xor_shifted(low, high, 27u32);
    let (low, high) = times(low, high, 0x94D0_49BB_1331_11EBu64);
    let (_, high) = xor_shifted(low, high, 31u32);
    out[ABSOLUTE_POS] = select(high < limit, 0f32, x[ABSOLUTE_POS] * keep);
}

/// See [`crate::dropout`].
pub(super) fn dropout(x: CubeTensor, dropout: Dropout) -> CubeTensor {
    let x = contiguous(x);
    let n = x.shape().num_elements();
    assert!(u32::try_from(n).is_ok(), "{n} elements to drop some of");
    let out = empty(&x, x.shape(), DType::F32);
    if n > 0 {
        let dim = CubeDim::new(&x.client, n);
        let limit = f64::from(dropout.probability) * 2f64.powi(32);
        drop::launch(
            &x.client,
            calculate_cube_count_elemwise(&x.client, n, dim),
            dim,
            x.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            n,
            dropout.seed as u32,
            (dropout.seed >> 32) as u32,
            limit as u32,
            1.0 / (1.0 - dropout.probability),
        );
    }
    out
}
