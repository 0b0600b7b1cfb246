//! Speed of the products of a linear layer, in GFLOP/s: `cargo bench -p moeforge-kernels`.
//!
//! The first line is the machine's limit as we can reach it: one large product of f32 values. The others are shapes of
//! real layers, per stored format. Figures are the median of several runs.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use moeforge_kernels::{Compute, Format, Matrix, linear_frozen};

const RUNS: usize = 9;

fn main() {
    println!(
        "{:>6} × {:>5} × {:>5}  format  forward GFLOP/s  backward GFLOP/s",
        "tokens", "out", "in"
    );
    for [tokens, out, inner] in [
        [2048, 2048, 2048],
        [1024, 512, 512],
        [1024, 2048, 512],
        [4096, 192, 192],
        [4096, 4096, 192],
        [256, 96, 192],
        [1, 2048, 2048],
    ] {
        for (name, matrix) in formats(out, inner) {
            let [forward, backward] = measure(tokens, &matrix);
            println!(
                "{tokens:>6} × {out:>5} × {inner:>5}  {name:>6}  {forward:>15.1}  {backward:>16.1}"
            );
        }
    }
}

fn formats(rows: usize, cols: usize) -> Vec<(&'static str, Arc<Matrix>)> {
    let values: Vec<f32> = (0..rows * cols)
        .map(|i| ((i * 37 % 255) as f32 - 127.0) / 128.0)
        .collect();
    let bf16: Vec<u8> = values
        .iter()
        .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
        .collect();
    let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 59 % 120) as u8).collect();
    let grid = [rows.div_ceil(128), cols.div_ceil(128)];
    let fits = "bytes made to fit";
    vec![
        ("f32", Arc::new(Matrix::from_f32(rows, cols, &values))),
        (
            "bf16",
            Arc::new(Matrix::dense(rows, cols, Format::Bf16, bf16.into()).expect(fits)),
        ),
        (
            "fp8",
            Arc::new(
                Matrix::fp8(
                    [rows, cols],
                    codes.into(),
                    vec![0.01; grid[0] * grid[1]],
                    &grid,
                    [128, 128],
                )
                .expect(fits),
            ),
        ),
    ]
}

/// Forward and input-gradient speed.
fn measure(tokens: usize, w: &Arc<Matrix>) -> [f64; 2] {
    let flops = 2.0 * tokens as f64 * w.rows() as f64 * w.cols() as f64;
    let device = Device::flex().autodiff();
    let x = Tensor::<2>::random([tokens, w.cols()], Distribution::Default, &device).require_grad();
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..=RUNS {
        let started = Instant::now();
        let y = linear_frozen(x.clone(), w, Compute::F32);
        forward.push(started.elapsed().as_secs_f64());
        let loss = y.sum();
        let started = Instant::now();
        let _ = loss.backward();
        backward.push(started.elapsed().as_secs_f64());
    }
    [forward, backward].map(|mut seconds| {
        seconds.remove(0); // The first run touches cold memory.
        seconds.sort_by(f64::total_cmp);
        flops / seconds[RUNS / 2] / 1e9
    })
}
