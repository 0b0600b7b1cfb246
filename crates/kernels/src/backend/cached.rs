//! Rows of numbers that are held for later tokens, and attention over them, as burn sees them.

use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType};
use burn::tensor::kind::Basic;
use burn::tensor::{DType, Int, Tensor};

use crate::backend::ops::{Kernels, attention};
use crate::formats::CacheType;
use crate::gemv::MAX_GEMV_ROWS;
use crate::ops::attention::Segments;

/// Rows as a backend holds them.
#[derive(Clone, Debug, ExtensionType)]
pub enum KvBufferPrimitive<B: Backend> {
    /// Numbers in f32, f16 or bf16, `[len, heads, width]`.
    Numbers(FloatTensor<B>),
    /// Bytes of blocks, `[len, heads, row_bytes]`, and the width of a row.
    Blocks(IntTensor<B>, usize),
}

/// Rows `[len, heads, width]` that grow, in one of several forms.
///
/// Positions are the first axis, so that those held are one piece of memory, which attention reads where it lies.
#[derive(Clone, Debug)]
pub struct KvBuffer {
    cache_type: CacheType,
    stored: Option<Stored>,
    len: usize,
}

/// Memory for more rows than there are.
#[derive(Clone, Debug)]
enum Stored {
    /// `[capacity, heads, width]`.
    Numbers(Tensor<3>),
    /// `[capacity, heads, row_bytes]`, and the width.
    Blocks(Tensor<3, Int>, usize),
}

/// Rows grow by this many positions at least.
const GROWTH: usize = 256;

impl KvBuffer {
    /// None yet.
    pub fn new(cache_type: CacheType) -> Self {
        Self {
            cache_type,
            stored: None,
            len: 0,
        }
    }

    /// Appends rows, each rounded by itself.
    ///
    /// # Shapes
    /// - `rows`: `[1, seq, heads, width]`
    ///
    /// # Panics
    /// If they are not of one sequence, or of other heads or widths than those held.
    pub fn append(&mut self, rows: Tensor<4>) {
        let [batch, seq, heads, width] = rows.dims();
        assert_eq!(batch, 1, "rows of one sequence");
        let rows = rows.reshape([seq, heads, width]);
        let at = self.len..self.len + seq;
        self.len = at.end;
        self.stored = Some(match (self.cache_type, self.stored.take()) {
            (CacheType::Q8_0, stored) => {
                let held = match stored {
                    Some(Stored::Blocks(held, _)) => Some(held),
                    _ => None,
                };
                let blocks = Dispatch::encode_blocks(rows.into_dispatch());
                Stored::Blocks(put(held, Tensor::from_dispatch(blocks), at), width)
            }
            (cache_type, stored) => {
                let held = match stored {
                    Some(Stored::Numbers(held)) => Some(held),
                    _ => None,
                };
                let rows = match cache_type {
                    CacheType::F16 => rows.cast(DType::F16),
                    CacheType::Bf16 => rows.cast(DType::BF16),
                    _ => rows,
                };
                Stored::Numbers(put(held, rows, at))
            }
        });
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` positions; does nothing where no more are held.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// What is held, `[len, heads, width]`.
    fn dims(&self) -> [usize; 3] {
        match &self.stored {
            None => [0; 3],
            Some(Stored::Numbers(held)) => [self.len, held.dims()[1], held.dims()[2]],
            Some(Stored::Blocks(held, width)) => [self.len, held.dims()[1], *width],
        }
    }

    /// All rows as f32 numbers, `[1, len, heads, width]`: a copy, unless they are held so.
    ///
    /// # Panics
    /// If nothing is held.
    pub fn floats(&self) -> Tensor<4> {
        let [len, heads, width] = self.dims();
        let numbers = match self.primitive() {
            KvBufferPrimitive::Numbers(held) => Tensor::<3>::from_dispatch(held).cast(DType::F32),
            blocks @ KvBufferPrimitive::Blocks(..) => {
                Tensor::from_dispatch(Dispatch::decode_blocks(blocks))
            }
        };
        numbers.reshape([1, len, heads, width])
    }

    /// The rows held, without the memory for more.
    pub(crate) fn primitive(&self) -> KvBufferPrimitive<Dispatch> {
        match self.stored.clone().expect("rows that were appended") {
            Stored::Numbers(held) => {
                KvBufferPrimitive::Numbers(held.slice(0..self.len).into_dispatch())
            }
            Stored::Blocks(held, width) => {
                KvBufferPrimitive::Blocks(held.slice(0..self.len).into_dispatch(), width)
            }
        }
    }

    /// Stops where these are not the rows of `heads` and `width` that `seq` queries are the last of.
    pub(crate) fn check(&self, seq: usize, heads: usize, width: usize) {
        assert!(
            (1..=self.len).contains(&seq) && self.dims()[1..] == [heads, width],
            "{seq} queries of rows {:?}, expected heads {heads} of width {width}",
            self.dims()
        );
    }
}

/// Writes new rows into memory for them, which is made, or made larger, where there is not enough.
fn put<K: Basic>(held: Option<Tensor<3, K>>, rows: Tensor<3, K>, at: Range<usize>) -> Tensor<3, K> {
    let held = match held {
        Some(held) if held.dims()[0] >= at.end => held,
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
    held.slice_assign(at, rows)
}

/// Causal attention of the last positions of one sequence over keys and values that are held. Has no gradient. Up to 8
/// queries get the bits each gets alone, and read the rows piece by piece in the form they are held in; of more, all rows
/// are decoded for the call.
///
/// # Shapes
/// - `q`: `[1, seq, heads, dim]`, `k`: `[kv_seq, kv_heads, dim]`, `v`: `[kv_seq, kv_heads, v_dim]`
/// - returns: `[1, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit, or `kv_heads` does not divide `heads`.
pub fn cached_attention(q: Tensor<4>, k: &KvBuffer, v: &KvBuffer, scale: f32) -> Tensor<4> {
    let ([batch, seq, heads, dim], [kv_seq, kv_heads, _]) = (q.dims(), k.dims());
    k.check(seq, kv_heads, dim);
    v.check(seq, kv_heads, v.dims()[2]);
    assert!(
        batch == 1 && v.len() == kv_seq && heads.is_multiple_of(kv_heads),
        "{batch} sequences, {kv_seq} keys and {} values, {heads} heads over {kv_heads}",
        v.len()
    );
    if seq > MAX_GEMV_ROWS {
        return attention(q, k.floats(), v.floats(), scale, &Segments::whole());
    }
    let (k, v) = (k.primitive(), v.primitive());
    Tensor::from_dispatch(Dispatch::cached_attention(q.into_dispatch(), k, v, scale))
}

/// [`cached_attention`] of all heads over one shared row per position, whose first `v_dim` features are its value: the
/// absorbed form of latent attention.
///
/// # Shapes
/// - `q`: `[1, seq, heads, dim]`, `latents`: `[kv_seq, 1, dim]`
/// - returns: `[1, seq, heads, v_dim]`
///
/// # Panics
/// If the sizes do not fit.
pub fn latent_attention(q: Tensor<4>, latents: &KvBuffer, v_dim: usize, scale: f32) -> Tensor<4> {
    let [batch, seq, _, dim] = q.dims();
    latents.check(seq, 1, dim);
    assert!(
        batch == 1 && v_dim <= dim,
        "{batch} sequences, values of {v_dim} of {dim}"
    );
    if seq > MAX_GEMV_ROWS {
        let keys = latents.floats();
        let values = keys.clone().slice([0..1, 0..latents.len(), 0..1, 0..v_dim]);
        return attention(q, keys, values, scale, &Segments::whole());
    }
    let latents = latents.primitive();
    Tensor::from_dispatch(Dispatch::latent_attention(
        q.into_dispatch(),
        latents,
        v_dim,
        scale,
    ))
}
