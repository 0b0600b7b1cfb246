//! The module for multi-token prediction, from a checkpoint's tensors.

use burn::tensor::Device;
use checkpoint::{DType, Folder};

use super::builder::{Builder, Training, WeightSource};
use super::stored::read_config;
use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::Embedding;
use crate::decoder::mtp::{Mtp, SharedHead};
use crate::keys::{Module, ParamKey, layer_keys, with_shape};

/// Opens the module for multi-token prediction of a checkpoint, the first one if it has several. Copies of the model's
/// embedding and output head are not loaded.
///
/// # Errors
/// If there is none, or a tensor is missing or of another shape or dtype than the config says.
pub fn load_mtp(folder: &Folder, device: &Device) -> Result<Mtp, Error> {
    let config = read_config(folder)?;
    let layer_idx = first(folder, &config)?;
    let source = WeightSource::Folder(folder);
    Builder::new(source, Training::Frozen, &config, device).mtp(layer_idx)
}

/// The layer of the first module.
fn first(folder: &Folder, config: &ModelConfig) -> Result<usize, Error> {
    let none = |found: &str| Error::NoMtp {
        place: folder.path().to_path_buf(),
        found: found.into(),
    };
    if config.num_nextn_predict_layers == 0 {
        return Err(none("a config with 0 of them"));
    }
    let layer_idx = config.num_hidden_layers;
    let input = ParamKey::weight(layer_idx, Module::MtpInput).to_string();
    if !folder.contains(&input) {
        let key = format!("a config with them and no tensor `{input}`");
        return Err(none(&key));
    }
    Ok(layer_idx)
}

/// The keys and shapes of a checkpoint's modules for multi-token prediction, without block scales and without copies of the
/// model's embedding and output head.
///
/// # Errors
/// If there is none, or a copy cannot be read.
pub(crate) fn mtp_keys(
    folder: &Folder,
    config: &ModelConfig,
) -> Result<Vec<(String, Vec<usize>)>, Error> {
    let (first, n) = (first(folder, config)?, config.num_nextn_predict_layers);
    let mut keys = Vec::new();
    for layer_idx in first..first + n {
        let key = |module| with_shape(ParamKey::weight(layer_idx, module), config);
        let before = [
            Module::MtpTokenNorm,
            Module::MtpHiddenNorm,
            Module::MtpInput,
        ];
        keys.extend(before.into_iter().filter_map(key));
        keys.extend(layer_keys(config, layer_idx));
        keys.extend(key(Module::MtpNorm));
        for module in [Module::MtpEmbedding, Module::MtpHead] {
            if is_own(folder, config, ParamKey::weight(layer_idx, module))? {
                keys.extend(key(module));
            }
        }
    }
    Ok(keys)
}

/// Whether a module for multi-token prediction has an embedding or a head of its own: one with other values than the model's.
fn is_own(folder: &Folder, config: &ModelConfig, key: ParamKey) -> Result<bool, Error> {
    let own = key.to_string();
    if !folder.contains(&own) {
        return Ok(false);
    }
    let models = match key.module {
        Module::MtpHead if !config.tie_word_embeddings => Module::Head,
        _ => Module::Embedding,
    };
    let models = ParamKey::weight(None, models).to_string();
    let [own, models] = [folder.tensor(&own)?, folder.tensor(&models)?];
    // The values of FP8 depend on more than its bytes.
    let is_same = own.dtype == models.dtype
        && own.dtype != DType::F8E4M3
        && own.shape == models.shape
        && own.bytes == models.bytes;
    Ok(!is_same)
}

/// A module with fresh weights, as [`super::fresh`] makes the model's; none if the config has none.
///
/// # Errors
/// As [`super::fresh`].
pub fn fresh_mtp(config: &ModelConfig, seed: u64, device: &Device) -> Result<Option<Mtp>, Error> {
    if config.num_nextn_predict_layers == 0 {
        return Ok(None);
    }
    let source = WeightSource::Fresh(seed);
    let builder = Builder::new(source, Training::Frozen, config, device);
    builder.mtp(config.num_hidden_layers).map(Some)
}

impl Builder<'_> {
    fn mtp(&self, layer_idx: usize) -> Result<Mtp, Error> {
        let own_copy = |module| match self.source {
            WeightSource::Folder(folder)
                if is_own(folder, self.config, ParamKey::weight(layer_idx, module))? =>
            {
                self.linear(layer_idx, module).map(Some)
            }
            _ => Ok(None),
        };
        let embed_tokens = own_copy(Module::MtpEmbedding)?;
        let module = Mtp {
            embed_tokens: embed_tokens.map(|linear| Embedding {
                weight: linear.weight,
                lora: None,
            }),
            enorm: self.norm(layer_idx, Module::MtpTokenNorm)?,
            hnorm: self.norm(layer_idx, Module::MtpHiddenNorm)?,
            eh_proj: self.linear(layer_idx, Module::MtpInput)?,
            layer: self.layer(layer_idx)?,
            shared_head: SharedHead {
                norm: self.norm(layer_idx, Module::MtpNorm)?,
                head: own_copy(Module::MtpHead)?,
            },
        };
        self.expect_unchanged()?;
        Ok(module)
    }
}
