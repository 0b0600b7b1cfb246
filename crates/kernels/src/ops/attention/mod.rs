//! Causal attention: `prefill` for many queries, `decode` for a few over a KV cache.

pub(crate) mod decode;
mod kv;
mod prefill;
mod segments;

pub(crate) use self::kv::KvRows;
pub(crate) use self::prefill::{
    AttentionShape, HeadLayout, KvGrads, KvInputs, SavedAttention, backward, forward,
};
pub use self::segments::Segments;
