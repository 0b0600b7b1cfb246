//! The keys, values or latents of earlier tokens, in a buffer that grows.

use std::ops::Range;

use burn::backend::Dispatch;
use burn::tensor::kind::Basic;
use burn::tensor::{DType, Int, Tensor};

use crate::backend::traits::{Kernels, KvBufferPrimitive};
use crate::formats::CacheType;

/// Rows `[len, heads, width]` of keys, values or latents, stored in a [`CacheType`]; grows by appending.
///
/// Positions are the first axis, so that all rows are contiguous and attention reads them in place.
#[derive(Clone, Debug)]
pub struct KvBuffer {
    cache_type: CacheType,
    storage: Option<KvStorage>,
    len: usize,
}

/// Memory for the rows and for some more.
#[derive(Clone, Debug)]
enum KvStorage {
    /// `[capacity, heads, width]`.
    Numbers(Tensor<3>),
    /// `[capacity, heads, row_bytes]`, and the width.
    Blocks(Tensor<3, Int>, usize),
}

/// The least number of positions that growing adds.
const GROWTH: usize = 256;

impl KvBuffer {
    /// An empty buffer.
    pub fn new(cache_type: CacheType) -> Self {
        Self {
            cache_type,
            storage: None,
            len: 0,
        }
    }

    /// Appends rows, each rounded on its own.
    ///
    /// # Shapes
    /// - `rows`: `[1, seq, heads, width]`
    ///
    /// # Panics
    /// If they are of several sequences, or their heads or width differ from those of the buffer.
    pub fn append(&mut self, rows: Tensor<4>) {
        let [batch, seq, heads, width] = rows.dims();
        assert_eq!(batch, 1, "rows of one sequence");
        let rows = rows.reshape([seq, heads, width]);
        let at = self.len..self.len + seq;
        self.len = at.end;
        self.storage = Some(match (self.cache_type, self.storage.take()) {
            (CacheType::Q8_0, stored) => {
                let memory = match stored {
                    Some(KvStorage::Blocks(memory, _)) => Some(memory),
                    _ => None,
                };
                let blocks = Dispatch::encode_blocks(rows.into_dispatch());
                KvStorage::Blocks(put(memory, Tensor::from_dispatch(blocks), at), width)
            }
            (cache_type, stored) => {
                let memory = match stored {
                    Some(KvStorage::Numbers(memory)) => Some(memory),
                    _ => None,
                };
                let rows = match cache_type {
                    CacheType::F16 => rows.cast(DType::F16),
                    CacheType::Bf16 => rows.cast(DType::BF16),
                    _ => rows,
                };
                KvStorage::Numbers(put(memory, rows, at))
            }
        });
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no positions.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps only the first `len` positions; does nothing if there are no more.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// `[len, heads, width]`.
    pub(crate) fn dims(&self) -> [usize; 3] {
        match &self.storage {
            None => [0; 3],
            Some(KvStorage::Numbers(memory)) => [self.len, memory.dims()[1], memory.dims()[2]],
            Some(KvStorage::Blocks(memory, width)) => [self.len, memory.dims()[1], *width],
        }
    }

    /// All rows in f32, `[1, len, heads, width]`: a copy, unless they are stored in f32.
    ///
    /// # Panics
    /// If the buffer is empty.
    pub fn floats(&self) -> Tensor<4> {
        let [len, heads, width] = self.dims();
        let numbers = match self.primitive() {
            KvBufferPrimitive::Numbers(memory) => {
                Tensor::<3>::from_dispatch(memory).cast(DType::F32)
            }
            blocks @ KvBufferPrimitive::Blocks(..) => {
                Tensor::from_dispatch(Dispatch::decode_blocks(blocks))
            }
        };
        numbers.reshape([1, len, heads, width])
    }

    /// The rows, without the memory for more.
    pub(crate) fn primitive(&self) -> KvBufferPrimitive<Dispatch> {
        match self.storage.clone().expect("rows that were appended") {
            KvStorage::Numbers(memory) => {
                KvBufferPrimitive::Numbers(memory.slice(0..self.len).into_dispatch())
            }
            KvStorage::Blocks(memory, width) => {
                KvBufferPrimitive::Blocks(memory.slice(0..self.len).into_dispatch(), width)
            }
        }
    }

    /// Panics unless the rows have `heads` and `width` and the last of them belong to `seq` queries.
    pub(crate) fn check(&self, seq: usize, heads: usize, width: usize) {
        assert!(
            (1..=self.len).contains(&seq) && self.dims()[1..] == [heads, width],
            "{seq} queries of rows {:?}, expected heads {heads} of width {width}",
            self.dims()
        );
    }
}

/// Writes new rows into the memory for them, which grows if it is too small.
fn put<K: Basic>(
    memory: Option<Tensor<3, K>>,
    rows: Tensor<3, K>,
    at: Range<usize>,
) -> Tensor<3, K> {
    let memory = match memory {
        Some(memory) if memory.dims()[0] >= at.end => memory,
        old => {
            let [_, heads, width] = rows.dims();
            let capacity = (at.end + GROWTH).max(2 * at.start);
            let new = Tensor::zeros([capacity, heads, width], (&rows.device(), rows.dtype()));
            match old {
                Some(old) => new.slice_assign(0..at.start, old.slice(0..at.start)),
                None => new,
            }
        }
    };
    memory.slice_assign(at, rows)
}
