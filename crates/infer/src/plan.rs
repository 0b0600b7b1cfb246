//! The memory of generation, predicted before anything is loaded.

use model::CacheType;
use model::footprint::{CachedPass, ModelShape};

use crate::engine::CHUNK;

/// What a program generates at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GenerationLoad {
    /// Sequences at a time.
    pub sequences: u64,
    /// Tokens of each, prompt and text together.
    pub context: u64,
    /// The form of their caches.
    pub cache: CacheType,
}

/// Bytes of generation by component, besides weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationPlan {
    /// Keys and values, or latents, of all sequences.
    pub cache: f64,
    /// The most that a pass takes: a chunk of a prompt, or a token of each sequence.
    pub pass: f64,
    /// What threads keep from pass to pass for operations.
    pub scratch: f64,
}

impl GenerationPlan {
    /// The plan of a model of a shape.
    pub fn new(shape: &ModelShape, load: GenerationLoad) -> Self {
        let (sequences, context) = (load.sequences as f64, load.context as f64);
        let pass = |tokens: f64, sequences: f64| {
            shape.cached_pass(&CachedPass {
                tokens,
                sequences,
                context,
                cache: load.cache,
                threads: kernels::n_threads() as f64,
            })
        };
        let chunk = (CHUNK as f64).min(context);
        let prompt = pass(chunk, 1.0);
        Self {
            cache: shape.cache_bytes(load.cache, sequences, context),
            pass: prompt.max(pass(1.0, sequences)),
            scratch: shape.scratch(chunk.max(sequences), kernels::n_threads() as f64),
        }
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.cache + self.pass + self.scratch
    }
}
