//! Reading values from a device. Each read waits for all work before it, so reads are counted: a pass has a fixed number.

use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{Int, Tensor, TensorData};

static READS: AtomicUsize = AtomicUsize::new(0);

/// Reads of this process so far.
pub fn reads() -> usize {
    READS.load(Ordering::Relaxed)
}

/// The values of a tensor, in f32 whatever they are in.
///
/// # Panics
/// If the device has failed.
#[track_caller]
pub fn read<const D: usize>(values: Tensor<D>) -> Vec<f32> {
    let data = counted(values.into_data());
    let values = data.convert::<f32>().try_to_vec();
    values.unwrap_or_else(|why| panic!("a device cannot be read: {why:?}"))
}

/// The values of a tensor of integers.
///
/// # Panics
/// If the device has failed.
#[track_caller]
pub fn read_ints<const D: usize>(values: Tensor<D, Int>) -> Vec<i64> {
    let data = counted(values.into_data());
    let values = data.convert::<i64>().try_to_vec();
    values.unwrap_or_else(|why| panic!("a device cannot be read: {why:?}"))
}

fn counted(data: TensorData) -> TensorData {
    READS.fetch_add(1, Ordering::Relaxed);
    data
}
