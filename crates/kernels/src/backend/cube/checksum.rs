//! Whether weights on the device are still what was copied there: tensors that were made while work was queued have been
//! damaged later (cubecl#1120).

#![expect(clippy::needless_range_loop, reason = "kernels index buffers")]

use burn::backend::TensorMetadata;
use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::{CubeDim, calculate_cube_count_elemwise};
use burn::tensor::DType;

use super::tensors::empty;
use crate::formats::placed::{CubeTensor, PlacedStack};

/// Words that a thread adds at most: software adapters end longer loops in silence.
const WORDS: usize = 1 << 14;
/// Threads of a plane that is large enough for them.
const THREADS: usize = 1 << 10;

/// Parts of the sum of each word times twice its number plus one; a thread adds every n-th word. Grid: one thread per part.
#[cube(launch)]
fn parts(words: &[u32], sums: &mut [u32], n: usize, steps: usize) {
    let threads = sums.len();
    if ABSOLUTE_POS >= threads {
        terminate!();
    }
    let mut sum = 0u32;
    for step in 0..steps {
        let i = step * threads + ABSOLUTE_POS;
        if i < n {
            sum += words[i] * (2 * i as u32 + 1);
        }
    }
    sums[ABSOLUTE_POS] = sum;
}

/// Adds the parts, in one thread.
#[cube(launch)]
fn whole(parts: &[u32], sums: &mut [u32], at: usize) {
    if ABSOLUTE_POS == 0 {
        let mut sum = 0u32;
        for i in 0..parts.len() {
            sum += parts[i];
        }
        sums[at] = sum;
    }
}

/// How many planes of some stacks, all on one device, have another sum than when they were copied.
pub(crate) fn changed(stacks: &[&PlacedStack]) -> usize {
    let planes = stacks.iter().flat_map(|stack| &stack.shards);
    let planes = planes.flat_map(|shard| shard.planes.iter().zip(shard.checksums));
    let planes: Vec<(&CubeTensor, u32)> = planes
        .filter_map(|(plane, checksum)| Some((plane, checksum?)))
        .collect();
    let Some((first, _)) = planes.first() else {
        return 0;
    };
    let sums = empty(first, [planes.len()], DType::U32);
    for (at, (plane, _)) in planes.iter().enumerate() {
        add(plane, &sums, at);
    }
    let found = sums.client.read_one_unchecked(sums.handle.clone());
    let found = found.as_chunks::<4>().0.iter().zip(&planes);
    let differs = |(found, (_, copied)): &(&[u8; 4], &(&CubeTensor, u32))| {
        u32::from_le_bytes(**found) != *copied
    };
    found.filter(differs).count()
}

/// Writes a plane's sum.
fn add(plane: &CubeTensor, sums: &CubeTensor, at: usize) {
    let n = plane.shape().num_elements();
    let threads = n.div_ceil(WORDS).max(n.min(THREADS));
    let partial = empty(plane, [threads], DType::U32);
    let (client, dim) = (&plane.client, CubeDim::new(&plane.client, threads));
    parts::launch(
        client,
        calculate_cube_count_elemwise(client, threads, dim),
        dim,
        plane.clone().into_buffer_arg(),
        partial.clone().into_buffer_arg(),
        n,
        n.div_ceil(threads),
    );
    whole::launch(
        client,
        CubeCount::new_single(),
        CubeDim::new_single(),
        partial.into_buffer_arg(),
        sums.clone().into_buffer_arg(),
        at,
    );
}
