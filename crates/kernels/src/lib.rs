//! The numerics burn lacks: weights in the formats they are published in, and the operations that multiply with
//! them, forward and backward.
//!
//! The functions here take and return burn tensors and run on whichever backend the tensors live on. Frozen weights
//! are [`Matrix`] views of bytes, usually of a mapped file, and are decoded tile by tile inside the products.
//!
//! ```
//! use std::sync::Arc;
//! use burn::tensor::{Device, Tensor};
//! use moeforge_kernels::{Compute, Matrix, linear_frozen};
//!
//! let w = Arc::new(Matrix::from_f32(2, 3, &[1.0, 0.0, 0.0, 0.0, 1.0, 1.0]));
//! let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0]], &Device::flex());
//! let y = linear_frozen(x, &w, Compute::F32);
//! assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [1.0, 5.0]);
//! ```
//!
//! The modules are rooms, and each names only those before it: `memory`, `threads`, `simd`, `settings`, `formats` (how
//! weights and caches are stored), `gemv` (products that read stored bytes), `matmul` (all other products, and the plan
//! that decides between both), `ops` (attention, experts, loss and the small operations), `backend` (burn's tensors in
//! and out, gradients, and GPUs), `device` (which devices there are, and whether one computes what it should).
//!
//! What this crate does not do: it knows no files, no model and no names.

mod backend;
pub mod device;
mod error;
mod formats;
mod gemv;
mod matmul;
mod memory;
mod ops;
mod settings;
mod simd;
#[cfg(test)]
mod testing;
mod threads;

pub use backend::attention::kv_buffer::KvBuffer;
pub use backend::attention::{
    absorbed_attention, attention, cached_attention, expanded_attention, latent_attention,
};
pub use backend::elementwise::{
    dropout, embed_frozen, embed_trained, rms_norm, rms_norm_start, rope, swiglu,
};
pub use backend::experts::{
    ExpertFactors, Routing, choose_experts, computed_elsewhere, dispatch, experts_frozen,
    experts_trained, moe_frozen, prefetch_experts,
};
pub use backend::linear::{
    heads_linear, linear_add, linear_fake_quantized, linear_frozen, linear_frozen_pair,
    linear_trained, linear_updated, row_norms,
};
pub use backend::loss::{
    TokenScores, cross_entropy_frozen, cross_entropy_trained, token_scores_frozen,
    token_scores_trained,
};
pub use backend::optimizer::{adamw, sums_of_squares, total};
pub use backend::plain::primitives::{Primitives, SlotTable, Stack};
pub use backend::saved::saved_activation_bytes;
pub use backend::supplied::SuppliedGradients;
pub use backend::traits::{Absorbed, Direction, FakeQuantize, HeadRows, Kernels, Update};
pub use error::Error;
pub use formats::{
    CacheType, FileAccess, Format, Fp8Blocks, Ggml, Matrix, Quantizer, SplitKvB, fp8,
};
pub use gemv::MAX_GEMV_ROWS;
pub use memory::{
    AllocatedBytes, RecyclingAllocator, allocated_bytes, keep_large_blocks, map_large_blocks,
};
pub use ops::adamw::AdamWStep;
pub use ops::attention::Segments;
pub use ops::dropout::Dropout;
pub use ops::experts::{
    ExpertBank, ExpertCache, ExpertLora, ExpertTraffic, OffloadedLayer, SharedExperts, SlotPart,
};
pub use ops::footprint::{ExpertsShape, HeadShape, THREAD_SCRATCH, saved_element_bytes};
pub use ops::rope::RopeLayout;
pub use ops::route::{GroupScore, TopK};
pub use settings::{ActivationQuant, Compute, OperandRounding};
pub use threads::n_threads;
