//! A module's update: where it goes, and what comes of it.

use burn::tensor::Device;

use crate::Error;
use crate::keys::{EMBEDDING, HEAD};
use crate::modules::experts::ExpertsLora;

/// An adapted module.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptedModule {
    /// Path of the module, a layer's experts counted once per projection.
    pub module: String,
    /// Width of the bottleneck.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Number of trained parameters.
    pub parameters: usize,
}

/// A module that may get an update.
pub(super) struct UpdateSite<'a> {
    /// Its path.
    pub(super) path: &'a str,
    /// Its number in the order of the forward pass, from 1.
    pub(super) number: u64,
    /// The device of the factors, which are trained if it tracks gradients.
    pub(super) device: &'a Device,
}

/// The updates of a layer's experts.
pub(super) struct ExpertUpdates {
    pub(super) lora: ExpertsLora,
    /// The experts that have updates; none means all.
    pub(super) subset: Option<Vec<usize>>,
    pub(super) adapted: Vec<AdaptedModule>,
}

/// Refuses DoRA on modules that have none: PEFT has none for experts either, and the loss never has the head's outputs.
pub(super) fn check_dora(path: &str) -> Result<(), Error> {
    let (what, pattern) = match path {
        EMBEDDING => ("the embedding", "embed_tokens"),
        HEAD => ("the output head", "lm_head"),
        _ if path.contains(".experts") => ("routed experts", "experts"),
        _ => return Ok(()),
    };
    Err(Error::Unsupported(format!(
        "`{path}`: DoRA is for linear layers, not for {what}; leave them out with \
         `lora.exclude = [\"{pattern}\"]`, or set `lora.use_dora` to false"
    )))
}
