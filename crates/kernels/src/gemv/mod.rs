//! Products straight on the stored bytes of a weight: what decoding is made of, and of weights in blocks every product in
//! int8.
//!
//! A weight in blocks is multiplied with activations in int8 ([`Activations`]) in [`strips`], one of f32, f16 or bf16 with
//! the activations as they are, or rounded to bf16, a few rows of them at a time ([`numbers`]). Of few rows the weight's
//! bytes are read once, in the order in which they lie, and nothing is written but the results: so the limit is how fast
//! memory can be read.
//!
//! A result depends on its row of activations and its row of the weight alone, not on the rows beside them, and is the
//! same on every instruction set ([`isa`]).

mod activations;
mod dense;
mod kv_tile;
mod packed;
mod quantized;
mod shared;

pub(crate) use self::activations::round_rows_to_int8;
pub(crate) use self::kv_tile::KvTile;
pub(crate) use self::packed::{GemvInput, MAX_GEMV_ROWS, PackedWeight};
pub(crate) use self::shared::{GemvProduct, multiply, multiply_all};
