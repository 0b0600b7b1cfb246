//! Matrices on a GPU: planes of words, cut into shards.
//!
//! A GPU has no bytes and no unaligned words. So a row becomes up to three rows of 32-bit words: its codes, the high bits
//! of codes that are stored apart, and its scales. Each begins at a multiple of 16 bytes. Nothing is decoded: the planes
//! hold the bytes of the file in another order. The block scales of FP8, which belong to rows of blocks, are a plane of
//! their own order.
//!
//! A stack (the experts of a layer) lies in one piece. It is cut into shards of whole rows, because the bytes that a GPU
//! binds at a time are limited.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::backend::tensor::FloatTensor;
use burn::backend::{Cube, CubeDevice, DispatchDevice};
use burn::cubecl::client::Client;
use burn::cubecl::future::block_on;
use burn::cubecl::server::Handle;
use burn::tensor::{Bytes, DType, Device, Shape};

use super::{Format, Fp8Blocks, Matrix};
use crate::error::Error;
use crate::formats::ggml::Ggml;

/// A tensor of a GPU.
pub(crate) type CubeTensor = FloatTensor<Cube>;

/// How numbers are coded. Kernels are compiled for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Coding {
    F32,
    F16,
    Bf16,
    /// E4M3 with a scale per block of `[rows, columns]`.
    Fp8 {
        block: [usize; 2],
    },
    Ggml(Ggml),
}

/// Rows of a stack on a GPU: what a [`Matrix`] is there.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) stack: Arc<PlacedStack>,
    /// The row of the stack at which the matrix begins.
    pub(crate) first_row: usize,
}

/// Matrices of one shape and coding on a GPU, one after the other.
#[derive(Debug)]
pub(crate) struct PlacedStack {
    pub(crate) coding: Coding,
    pub(crate) cols: usize,
    /// Rows of each matrix.
    pub(crate) rows_each: usize,
    /// Words from a row to the next in the planes of codes, high bits and scales.
    pub(crate) strides: [usize; 3],
    /// Of FP8: rows and columns of a matrix's grid of scales, and the row of the first block at which a matrix begins.
    pub(crate) grid: [usize; 3],
    pub(crate) shards: Vec<PlacedShard>,
}

/// Some rows of a stack.
#[derive(Debug)]
pub(crate) struct PlacedShard {
    /// Its first row.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// Codes, high bits, scales. A plane that the coding lacks is four words long.
    pub(crate) planes: [CubeTensor; 3],
    /// See [`Checksum`]; none of a plane that the coding lacks.
    pub(crate) checksums: [Option<u32>; 3],
}

/// The sum of each word times twice its number plus one, modulo 2³². Odd factors show every change of one word.
#[derive(Clone, Copy, Debug, Default)]
struct Checksum {
    words: u32,
    sum: u32,
}

impl Checksum {
    fn add(&mut self, words: impl Iterator<Item = u32>) {
        for word in words {
            let factor = self.words.wrapping_mul(2).wrapping_add(1);
            self.sum = self.sum.wrapping_add(word.wrapping_mul(factor));
            self.words = self.words.wrapping_add(1);
        }
    }
}

/// Bytes of a piece that is rearranged and copied at a time.
const COPIED_BYTES: usize = 16 << 20;
/// Bytes after which copying waits for the device. More pending copies have damaged tensors (cubecl#1120).
const SYNC_BYTES: usize = 256 << 20;
/// Rows of a shard, at most: a thread adds over the rows of one, and software adapters end longer loops in silence.
const MAX_SHARD_ROWS: usize = 1 << 15;

static SHARD_LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Limits the bytes of each plane of a shard, for all matrices that are placed from now on. The device has a limit of its
/// own.
pub(crate) fn limit_shard_bytes(bytes: usize) {
    SHARD_LIMIT.store(bytes, Ordering::Relaxed);
}

/// The CubeCL device under one of burn's, with or without autodiff; none if it is another backend's.
pub(crate) fn cube_device(device: &Device) -> Option<CubeDevice> {
    match device.as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.clone()),
        DispatchDevice::Autodiff(device) => match &**device {
            DispatchDevice::Cube(device) => Some(device.clone()),
            _ => None,
        },
        _ => None,
    }
}

/// A tensor around a buffer of its size.
pub(crate) fn tensor_of(
    (client, device): (&Client, &CubeDevice),
    handle: Handle,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor {
    CubeTensor::new_contiguous(client.clone(), device.clone(), shape.into(), handle, dtype)
}

impl Placed {
    /// A view that starts `row` rows later.
    pub(super) fn starting_at(self, row: usize) -> Self {
        Self {
            first_row: self.first_row + row,
            ..self
        }
    }
}

/// The byte ranges of a block that each plane holds.
type PlaneBytes = [&'static [(usize, usize)]; 3];

impl Coding {
    fn of(format: &Format) -> Option<Self> {
        Some(match format {
            Format::F32 => Self::F32,
            Format::F16 | Format::Ggml(Ggml::F16) => Self::F16,
            Format::Bf16 => Self::Bf16,
            Format::Fp8(blocks) => Self::Fp8 {
                block: blocks.block,
            },
            Format::Ggml(format) => Self::Ggml(*format),
            Format::Interleaved(_) | Format::SplitKvB(_) => return None,
        })
    }

    /// What of a block goes into which plane.
    fn plane_bytes(self) -> PlaneBytes {
        match self {
            Self::F32 => [&[(0, 4)], &[], &[]],
            Self::F16 | Self::Bf16 | Self::Ggml(Ggml::F16) => [&[(0, 2)], &[], &[]],
            Self::Fp8 { .. } => [&[(0, 1)], &[], &[]],
            Self::Ggml(format) => match format {
                Ggml::F16 => [&[(0, 2)], &[], &[]],
                Ggml::MxFp4 => [&[(1, 17)], &[], &[(0, 1)]],
                Ggml::Q4_0 | Ggml::Iq4Nl => [&[(2, 18)], &[], &[(0, 2)]],
                Ggml::Q4_1 => [&[(4, 20)], &[], &[(0, 4)]],
                Ggml::Q5_0 => [&[(6, 22)], &[(2, 6)], &[(0, 2)]],
                Ggml::Q5_1 => [&[(8, 24)], &[(4, 8)], &[(0, 4)]],
                Ggml::Q8_0 => [&[(2, 34)], &[], &[(0, 2)]],
                Ggml::Q2K => [&[(16, 80)], &[], &[(0, 16), (80, 84)]],
                Ggml::Q3K => [&[(32, 96)], &[(0, 32)], &[(96, 110)]],
                Ggml::Q4K => [&[(16, 144)], &[], &[(0, 16)]],
                Ggml::Q5K => [&[(48, 176)], &[(16, 48)], &[(0, 16)]],
                Ggml::Q6K => [&[(0, 128)], &[(128, 192)], &[(192, 210)]],
            },
        }
    }
}

/// Bytes of a row that a plane holds, before it is padded.
fn plane_row_bytes(ranges: &[(usize, usize)], blocks: usize) -> usize {
    let bytes = ranges.iter().map(|(start, end)| end - start);
    bytes.sum::<usize>() * blocks
}

/// See [`Matrix::place`].
pub(super) fn place_on(
    matrices: &mut [Matrix],
    device: &Device,
    on_copied: &mut dyn FnMut(&Matrix),
) -> Result<(), Error> {
    match cube_device(device) {
        Some(device) => place_parts(matrices, &device, on_copied),
        None => Ok(()),
    }
}

/// See [`Matrix::place_apart`].
pub(super) fn place_apart(matrices: &mut [Matrix]) -> Result<(), Error> {
    let placed = matrices.first().and_then(|w| w.placed());
    let Some(device) = placed.map(|placed| placed.stack.shards[0].planes[0].device.clone()) else {
        return Ok(());
    };
    place_parts(matrices, &device, &mut |_| ())
}

/// Places matrices, or both parts of each.
fn place_parts(
    matrices: &mut [Matrix],
    device: &CubeDevice,
    on_copied: &mut dyn FnMut(&Matrix),
) -> Result<(), Error> {
    for matrix in &mut *matrices {
        if let Format::SplitKvB(split) = &mut matrix.format {
            split
                .for_each_part(&mut |part| place(std::slice::from_mut(part), device, on_copied))?;
        }
    }
    match matrices.first().map(Matrix::split_kv_b) {
        Some(None) => place(matrices, device, on_copied),
        _ => Ok(()),
    }
}

impl Matrix {
    /// Where it lies on a GPU.
    pub(crate) fn placed(&self) -> Option<&Placed> {
        self.placement.0.as_ref()
    }
}

/// A sentence about matrices that cannot lie in one stack.
fn mixed(matrices: &[Matrix]) -> Error {
    let mut formats: Vec<&str> = matrices.iter().map(|w| w.format().name()).collect();
    formats.dedup();
    Error::Placement(format!(
        "matrices of one stack have different shapes or formats: {}",
        formats.join(", ")
    ))
}

fn place(
    matrices: &mut [Matrix],
    device: &CubeDevice,
    on_copied: &mut dyn FnMut(&Matrix),
) -> Result<(), Error> {
    let Some(first) = matrices.first() else {
        return Ok(());
    };
    let coding = Coding::of(&first.format).ok_or_else(|| mixed(matrices))?;
    let alike = |w: &Matrix| {
        Coding::of(&w.format) == Some(coding) && [w.rows, w.cols] == [first.rows, first.cols]
    };
    if !matrices.iter().all(alike) {
        return Err(mixed(matrices));
    }
    let stack = Arc::new(Placing::new(matrices, coding, device).stack()?);
    for (i, matrix) in matrices.iter_mut().enumerate() {
        on_copied(matrix);
        matrix.placement.0 = Some(Placed {
            stack: Arc::clone(&stack),
            first_row: i * stack.rows_each,
        });
    }
    Ok(())
}

/// A stack that is being copied.
struct Placing<'a> {
    matrices: &'a [Matrix],
    coding: Coding,
    device: &'a CubeDevice,
    client: Client,
    /// Blocks of a row, and bytes of one.
    blocks: usize,
    block_bytes: usize,
    strides: [usize; 3],
}

impl<'a> Placing<'a> {
    fn new(matrices: &'a [Matrix], coding: Coding, device: &'a CubeDevice) -> Self {
        let (block, block_bytes) = matrices[0].format.block();
        let blocks = matrices[0].cols / block;
        let words = |ranges: &[(usize, usize)]| plane_row_bytes(ranges, blocks).div_ceil(16) * 4;
        Self {
            matrices,
            coding,
            device,
            client: device.client(),
            blocks,
            block_bytes,
            strides: coding.plane_bytes().map(words),
        }
    }

    fn stack(&self) -> Result<PlacedStack, Error> {
        let (first, limit) = (&self.matrices[0], self.limit());
        let (rows, widest) = (
            self.matrices.len() * first.rows,
            self.strides.iter().max().copied().unwrap_or(0) * 4,
        );
        if widest > limit {
            return Err(Error::Placement(format!(
                "a row of {} numbers takes {widest} bytes, and the device binds at most {limit}",
                first.cols
            )));
        }
        let per_shard = (limit / widest.max(1)).clamp(1, MAX_SHARD_ROWS);
        let (grid, scales) = self.grid();
        let starts = (0..rows).step_by(per_shard);
        let shards = starts.map(|start| {
            let rows = start..rows.min(start + per_shard);
            let (mut planes, mut checksums) = self.planes(rows.clone());
            if let Some((scales, checksum)) = &scales {
                planes[2] = scales.clone();
                checksums[2] = Some(*checksum);
            }
            PlacedShard {
                first: rows.start,
                rows: rows.len(),
                planes,
                checksums,
            }
        });
        let shards = shards.collect();
        self.wait()?;
        Ok(PlacedStack {
            coding: self.coding,
            cols: first.cols,
            rows_each: first.rows,
            strides: self.strides,
            grid,
            shards,
        })
    }

    /// Bytes of a plane that may be bound.
    fn limit(&self) -> usize {
        let own = self.client.properties().memory.max_page_size as usize;
        own.min(SHARD_LIMIT.load(Ordering::Relaxed))
    }

    /// Waits until the device has all copies.
    fn wait(&self) -> Result<(), Error> {
        let done = block_on(self.client.sync());
        done.map_err(|e| Error::Placement(format!("copying weights failed: {e:?}")))
    }

    /// The grid of FP8's scales, and the scales of all matrices with their checksum.
    fn grid(&self) -> ([usize; 3], Option<(CubeTensor, u32)>) {
        let grids: Vec<&Fp8Blocks> = (self.matrices.iter())
            .filter_map(|w| match &w.format {
                Format::Fp8(blocks) => Some(blocks),
                _ => None,
            })
            .collect();
        let Some(first) = grids.first() else {
            return ([0; 3], None);
        };
        let words = grids.iter().flat_map(|grid| grid.scales.iter());
        let words: Vec<u32> = words.map(|scale| scale.to_bits()).collect();
        let rows = first.scales.len() / first.stride.max(1);
        let (shape, mut checksum) = ([words.len()], Checksum::default());
        checksum.add(words.iter().copied());
        let handle = self.client.create(Bytes::from_elems(words));
        let scales = tensor_of((&self.client, self.device), handle, shape, DType::U32);
        let grid = [rows, first.stride, first.first_row];
        (grid, Some((scales, checksum.sum)))
    }

    /// The planes of some rows, with their checksums.
    fn planes(&self, rows: Range<usize>) -> ([CubeTensor; 3], [Option<u32>; 3]) {
        let mut checksums = [Checksum::default(); 3];
        let memory = self.strides.map(|stride| {
            let words = (rows.len() * stride).max(4);
            let allocate = |words: usize| self.client.empty(words * 4);
            (
                words,
                self.client.memory_persistent_allocation(words, allocate),
            )
        });
        let row_bytes: usize = self.strides.iter().sum::<usize>() * 4;
        let per_piece = (COPIED_BYTES / row_bytes.max(1)).max(1);
        let mut pending = 0;
        for start in rows.clone().step_by(per_piece) {
            let piece = start..rows.end.min(start + per_piece);
            let offsets = self.strides.map(|stride| (start - rows.start) * stride * 4);
            pending += piece.len() * row_bytes;
            for (plane, bytes) in self.rearranged(piece).into_iter().enumerate() {
                if !bytes.is_empty() {
                    let words = bytes.as_chunks::<4>().0.iter();
                    checksums[plane].add(words.map(|word| u32::from_le_bytes(*word)));
                    let to = memory[plane].1.clone().offset_start(offsets[plane] as u64);
                    let end = memory[plane].0 * 4 - offsets[plane] - bytes.len();
                    let to = to.offset_end(end as u64);
                    self.client.write(&to, Bytes::from_bytes_vec(bytes));
                }
            }
            if pending >= SYNC_BYTES {
                pending = 0;
                // An error stays with the tensor, and the last wait reports it.
                let _ = self.wait();
            }
        }
        let planes = memory.map(|(words, handle)| {
            tensor_of((&self.client, self.device), handle, [words], DType::U32)
        });
        (planes, checksums.map(|of| (of.words > 0).then_some(of.sum)))
    }

    /// The bytes of rows, plane by plane.
    fn rearranged(&self, rows: Range<usize>) -> [Vec<u8>; 3] {
        let each = self.matrices[0].rows;
        let mut planes = self
            .strides
            .map(|stride| Vec::with_capacity(rows.len() * stride * 4));
        for (i, row) in rows.enumerate() {
            let line = self.matrices[row / each].row(row % each);
            for (plane, ranges) in planes.iter_mut().zip(self.coding.plane_bytes()) {
                match ranges {
                    [] => {}
                    // Without scales in between, a row is all codes.
                    [(start, end)] if end - start == self.block_bytes => {
                        plane.extend_from_slice(line)
                    }
                    ranges => {
                        let blocks = line.chunks_exact(self.block_bytes).take(self.blocks);
                        blocks.for_each(|block| {
                            let parts = ranges.iter().map(|(start, end)| &block[*start..*end]);
                            parts.for_each(|part| plane.extend_from_slice(part));
                        });
                    }
                }
            }
            for (plane, stride) in planes.iter_mut().zip(self.strides) {
                plane.resize((i + 1) * stride * 4, 0);
            }
        }
        planes
    }
}
