//! Text generation: prefill, decoding with a KV cache, sampling, stop strings, conversations.
//!
//! The forward pass is [`model::Model`]'s. This crate decides which tokens enter it and which come out. All randomness
//! comes from the caller's seed.
//!
//! ```no_run
//! use burn::tensor::Device;
//! use moeforge_infer::{Engine, GenerateConfig, SampleConfig};
//! use std::ops::ControlFlow;
//!
//! let mut engine = Engine::open("DeepSeek-V2-Lite".as_ref(), model::Compute::F32, Device::flex())?;
//! let config = GenerateConfig {
//!     max_tokens: 16,
//!     sample: SampleConfig::greedy(),
//!     stop_ids: vec![1],
//!     logprobs: None,
//! };
//! let generation = engine.generate(&[0, 5, 6], &config, &mut |_| ControlFlow::Continue(()))?;
//! assert!(generation.token_ids.len() <= 16);
//! # Ok::<(), moeforge_infer::Error>(())
//! ```

mod error;
mod sample_config;

mod generation_config;
mod sampler;
mod text_stream;

mod draft;
mod logits;
mod prefix_tree;
mod repack;
mod sequence;

mod engine;
mod score;
mod speculation;

mod chat_history;
mod completion;
mod plan;

pub use chat_history::{ChatHistory, chat_prompt, message};
pub use completion::{Completed, Completion, CompletionQueue, StepOutput};
pub use engine::{CHUNK, Engine};
pub use error::{Error, Result};
pub use generation_config::{
    EndOfText, end_of_text, recommended_sampling, unknown_generation_keys,
};
pub use logits::read_logits;
pub use plan::{GenerationLoad, GenerationPlan};
pub use repack::REPACKED_AT_ONCE;
pub use sample_config::SampleConfig;
pub use sampler::Sampler;
pub use score::{ScoreConfig, ScorePlan, ScoreRequest, Scores, TokenScore, score};
pub use sequence::{FinishReason, GenerateConfig, Generation, KvPrefix, Logprobs, Sequence};
pub use text_stream::TextStream;
