//! Speed of the FP8 codecs in GB of f32 values per second, compared with copying: `cargo bench -p moeforge-kernels
//! --bench codecs`. Figures are the median of several runs on all cores.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::hint::black_box;
use std::time::Instant;

use moeforge_kernels::fp8::{Scales, encode_tiles};
use rayon::prelude::*;

const RUNS: usize = 9;
/// 64 MiB of f32: beyond every cache.
const SHAPE: [usize; 2] = [4096, 4096];

fn main() {
    let [rows, cols] = SHAPE;
    let values: Vec<f32> = (0..rows * cols)
        .map(|i| ((i * 37 % 8191) as f32 - 4095.0) / 512.0)
        .collect();
    let mut copy = vec![0f32; values.len()];
    report("copy, f32 to f32", || {
        copy.par_chunks_mut(1 << 16)
            .zip(values.par_chunks(1 << 16))
            .for_each(|(copy, values)| copy.copy_from_slice(values));
        black_box(&mut copy);
    });
    for tile in [[1, 128], [128, 128], [128, 1]] {
        for kind in [Scales::F32, Scales::PowerOfTwo] {
            let name = format!("encode {} × {}, {kind:?}", tile[0], tile[1]);
            report(&name, || {
                black_box(encode_tiles(&values, SHAPE, tile, kind));
            });
        }
    }
    let tiles = encode_tiles(&values, SHAPE, [128, 128], Scales::F32);
    report("decode 128 × 128", || {
        copy.par_chunks_mut(64 * cols)
            .enumerate()
            .for_each(|(i, out)| tiles.decode(i * 64..(i + 1) * 64, out));
        black_box(&mut copy);
    });
}

fn report(name: &str, mut work: impl FnMut()) {
    let mut seconds: Vec<f64> = (0..=RUNS)
        .map(|_| {
            let started = Instant::now();
            work();
            started.elapsed().as_secs_f64()
        })
        .collect();
    seconds.remove(0); // The first run touches cold memory.
    seconds.sort_by(f64::total_cmp);
    let bytes = (SHAPE[0] * SHAPE[1] * size_of::<f32>()) as f64;
    println!("{name:>28}  {:>6.1} GB/s", bytes / seconds[RUNS / 2] / 1e9);
}
