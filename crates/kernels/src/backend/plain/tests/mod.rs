//! Every plain operation and gradient against the CPU's own, over ragged shapes.

mod attention;
mod elementwise;
mod experts;
mod linear;
mod loss;
mod routing;

use burn::backend::Flex;
use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::tensor::DType;
use burn_flex::FlexTensor;

use crate::backend::plain::ints::Ints;
use crate::backend::plain::reals::Reals;
use crate::testing;

/// Rows of activations: none, one, and around the sizes of tiles.
const ROWS: [usize; 6] = [0, 1, 7, 8, 9, 70];
/// Relative to the largest value.
const VALUE: f32 = 2e-5;
const GRADIENT: f32 = 1e-4;

fn device() -> Device<Flex> {
    Device::<Flex>::default()
}

/// Noise of a shape.
fn noise(shape: &[usize], seed: u64) -> FloatTensor<Flex> {
    tensor(testing::noise(shape.iter().product(), seed), shape)
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> FloatTensor<Flex> {
    Reals::<Flex>::upload(values, shape, &device()).into_tensor()
}

fn ids(values: Vec<i32>, shape: &[usize]) -> IntTensor<Flex> {
    Ints::<Flex>::upload(values, shape, &device()).into_tensor()
}

fn floats(tensor: &FlexTensor) -> Vec<f32> {
    let tensor = tensor.to_contiguous();
    let start = tensor.layout().start_offset();
    tensor.storage::<f32>()[start..start + tensor.layout().num_elements()].to_vec()
}

fn ints(tensor: &FlexTensor) -> Vec<i32> {
    assert_eq!(tensor.dtype(), DType::I32);
    let tensor = tensor.to_contiguous();
    let start = tensor.layout().start_offset();
    tensor.storage::<i32>()[start..start + tensor.layout().num_elements()].to_vec()
}

fn shape(tensor: &FlexTensor) -> Vec<usize> {
    tensor.layout().shape().to_vec()
}

/// Panics unless shapes are the same and values within `tolerance` of the largest expected, some of which is not 0.
fn close(found: &FlexTensor, expected: &FlexTensor, tolerance: f32, what: &str) {
    assert_eq!(shape(found), shape(expected), "{what}");
    let (found, expected) = (floats(found), floats(expected));
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(expected.is_empty() || largest > 0.0, "{what}: all 0");
    for (i, (f, e)) in found.into_iter().zip(expected).enumerate() {
        let difference = (f - e).abs();
        assert!(
            difference <= tolerance * largest,
            "{what} at {i}: found {f}, expected {e}"
        );
    }
}

fn all_close<const N: usize>(
    found: &[FlexTensor; N],
    expected: &[FlexTensor; N],
    tolerance: f32,
    what: &str,
) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        close(found, expected, tolerance, &format!("{what}, result {i}"));
    }
}

#[test]
fn long_sums_are_cut_and_right() {
    for n in [16_384, 16_385, 70_001, 1_100_000] {
        let values = testing::noise(2 * n, 3);
        let expected = |row: &[f32]| row.iter().map(|v| f64::from(*v)).sum::<f64>() as f32;
        let expected: Vec<f32> = values.chunks(n).map(expected).collect();
        let largest = values
            .chunks(n)
            .map(|row| row.iter().copied().fold(f32::MIN, f32::max));
        let largest = tensor(largest.collect(), &[2, 1]);
        let x = Reals::<Flex>::upload(values, &[2, n], &device());
        assert_eq!(floats(&x.clone().max(1).into_tensor()), floats(&largest));
        let columns = x.clone().t().sum(0).into_tensor();
        assert_eq!(shape(&columns), [1, 2]);
        for sums in [floats(&x.sum(1).into_tensor()), floats(&columns)] {
            for (found, expected) in sums.iter().zip(&expected) {
                assert!((found - expected).abs() < 0.05, "{n}: {found} {expected}");
            }
        }
    }
}

#[test]
fn long_products_are_cut_and_right() {
    let n = 70_001;
    let (a, b) = (testing::noise(2 * n, 4), testing::noise(3 * n, 5));
    let found = Reals::<Flex>::upload(a.clone(), &[2, n], &device())
        .matmul_t(Reals::upload(b.clone(), &[3, n], &device()))
        .into_tensor();
    let pairs = a.chunks(n).flat_map(|a| b.chunks(n).map(move |b| (a, b)));
    let expected = pairs.map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>());
    let expected = tensor(expected.map(|sum| sum as f32).collect(), &[2, 3]);
    close(&found, &expected, 1e-4, "a long product");
}
