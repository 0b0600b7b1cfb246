//! A prompt to tokens: prefill, decoding over a cache, sampling, stopping.
//!
//! The forward pass is [`model::Model`]'s; what is here decides which tokens go into it and which come out. All
//! randomness comes from the caller's seed.
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

mod end_of_text;
mod engine;
mod error;
mod repack;
mod sampler;
mod sequence;
mod speculation;
mod text_stream;

pub use end_of_text::end_of_text_ids;
pub use engine::{CHUNK, Engine};
pub use error::{Error, Result};
pub use sampler::{SampleConfig, Sampler};
pub use sequence::{Context, GenerateConfig, Generation, Logprobs, Sequence, Stop};
pub use text_stream::TextStream;
