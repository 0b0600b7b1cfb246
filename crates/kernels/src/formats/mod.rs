//! The formats in which weights and KV caches are stored.

mod dtype_rows;
mod fake_quantize;
pub mod fp8;
mod ggml;
mod interleaved;
mod kv_type;
mod matrix;

pub(crate) use self::dtype_rows::{DtypeRows, Q8_BLOCK, Q8_BLOCK_BYTES, RowDtype};
pub use self::fake_quantize::Quantizer;
pub use self::ggml::Ggml;
pub(crate) use self::ggml::{IQ4_NL_CODEBOOK, MXFP4_DOUBLED, half_of_power};
pub(crate) use self::interleaved::{ROWS, fill};
pub use self::kv_type::CacheType;
pub(crate) use self::kv_type::{decode_q8_rows, encode_q8_rows};
pub(crate) use self::matrix::Copies;
#[cfg(feature = "gpu")]
pub(crate) use self::matrix::placed;
#[cfg(feature = "gpu")]
pub(crate) use self::matrix::placed::limit_shard_bytes;
pub use self::matrix::{FileAccess, Format, Fp8Blocks, Matrix, SplitKvB};
