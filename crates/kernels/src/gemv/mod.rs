//! Products that read a weight's stored bytes: every product of decoding, and every product in int8.
//!
//! A weight in ggml's blocks is multiplied with activations in int8 (`quantized`). A weight in f32, f16 or bf16 is
//! multiplied with a few rows of activations, in f32 or rounded to bf16 (`dense`). The weight's bytes are read once, in
//! memory order, and only the results are written: so the limit is memory bandwidth.
//!
//! A result depends on its row of activations and its row of the weight alone, and is the same on every instruction
//! set.

mod activations;
mod dense;
mod kv_tile;
mod packed_weight;
mod quantized;
mod shared;

#[cfg(test)]
pub(crate) use self::activations::round_rows_to_int8;
pub(crate) use self::kv_tile::KvTile;
pub use self::packed_weight::MAX_GEMV_ROWS;
pub(crate) use self::packed_weight::{GemvInput, PackedWeight};
pub(crate) use self::shared::{GemvProduct, multiply, multiply_all};
