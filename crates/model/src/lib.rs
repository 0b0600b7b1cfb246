//! The decoder, once: DeepSeek V2, V3 and R1, and the Qwen and Llama distills, as values of one config.
//!
//! Training, evaluation and generation call the same [`Model::hidden`]; what differs between them is in the [`ForwardContext`]
//! (a cache or none, dropout or none) and in how the weights are held (frozen in their published bytes, or trained).
//!
//! ```no_run
//! use burn::tensor::{Device, Int, Tensor};
//! use moeforge_model::{Compute, ForwardContext, Training, weights};
//!
//! let folder = checkpoint::Folder::open("DeepSeek-V2-Lite".as_ref())?;
//! let device = Device::flex();
//! let model = weights::load(&folder, Training::Frozen, &device)?;
//! let mut ctx = ForwardContext::new(Compute::F32);
//! let hidden = model.hidden(Tensor::from_ints([[1, 2, 3]], &device), &mut ctx); // [1, 3, hidden_size]
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod adapter;
mod attention;
mod cache;
pub mod config;
mod context;
mod decoder;
mod error;
pub mod export;
pub mod linear;
pub mod lora;
pub mod merge;
mod mlp;
pub mod moe;
mod norm;
mod parameters;
mod patterns;
pub mod precision;
mod rope;
mod rounding;
mod sites;
pub mod weights;

pub use adapter::AdapterWeights;
pub use attention::{Attention, Gqa, Mla};
pub use cache::Cache;
pub use config::ModelConfig;
pub use context::{ForwardContext, InputRecord, Observe, RoutingRecord, routing_drift};
pub use decoder::{
    Checkpointing, Cost, Decoder, DecoderLayer, Embedding, FeedForward, Model, Mtp, SharedHead,
    Trace, Traffic,
};
pub use error::Error;
pub use kernels::{CacheType, Compute, ExpertTraffic, Quantizer};
pub use mlp::Mlp;
pub use norm::Norm;
pub use parameters::Parameter;
pub use rope::RotaryTable;
pub use sites::{Site, matches};
pub use weights::Training;
