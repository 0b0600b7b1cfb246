//! The decoder, once: DeepSeek V2, V3 and R1, and the Qwen and Llama distills, as values of one config.
//!
//! Training, evaluation and generation call the same [`Model::hidden`]. They differ in the [`ForwardContext`] (KV caches,
//! dropout) and in the form of the weights (frozen in their published bytes, or trained).
//!
//! ```no_run
//! use burn::tensor::{Device, Int, Tensor};
//! use moeforge_model::{Compute, ForwardContext, Training, load};
//!
//! let folder = checkpoint::Folder::open("DeepSeek-V2-Lite".as_ref())?;
//! let device = Device::flex();
//! let model = load::load(&folder, Training::Frozen, &device)?;
//! let mut ctx = ForwardContext::new(Compute::F32);
//! let hidden = model.hidden(Tensor::from_ints([[1, 2, 3]], &device), &mut ctx); // [1, 3, hidden_size]
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The modules below are in the order in which one may name another: from the bottom up.

mod error;
#[cfg(test)]
#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

pub mod config;
pub mod keys;
mod patterns;
mod precision;
mod precision_table;
mod rope;

mod forward;
pub mod modules;

mod decoder;

pub mod load;

pub mod adapt;

pub mod export;

pub mod footprint;

pub use adapt::AdapterWeights;
pub use config::ModelConfig;
pub use decoder::checkpointing::{Checkpointing, Objective, Trace};
pub use decoder::cost::{Cost, Traffic};
pub use decoder::mtp::{Mtp, SharedHead};
pub use decoder::parameters::Parameter;
pub use decoder::stack_shards::StackShard;
pub use decoder::visit::{ModuleMut, ModuleRef};
pub use decoder::{Decoder, DecoderLayer, Embedding, FeedForward, Model, ReplacedWeights};
pub use error::Error;
pub use forward::cache::Cache;
pub use forward::context::ForwardContext;
pub use forward::exchange::{ExchangeKind, ExpertRanks, RowWire};
pub use forward::recorder::Recorder;
pub use forward::routing::{Routed, RoutingRecord, routing_drift};
pub use kernels::device;
pub use kernels::{
    ActivationQuant, CacheType, Compute, ExpertTraffic, OperandRounding, Quantizer, TokenScores,
};
pub use load::Training;
pub use patterns::matches;
pub use precision::PrecisionClass;
pub use precision_table::Policy;
pub use rope::RotaryTable;
