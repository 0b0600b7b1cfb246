//! The module for multi-token prediction, from a checkpoint's tensors.

use burn::tensor::Device;
use checkpoint::{DType, Folder};

use super::{Builder, Source, Training, layer_keys, read_config};
use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::{Embedding, Mtp, SharedHead};

/// Opens the module for multi-token prediction of a checkpoint, the first one where it has several. Its copies of the
/// embedding and the output head are left alone where they are those of the model.
///
/// # Errors
/// If there is none, or a tensor is missing or of another shape or dtype than the config says.
pub fn load_mtp(folder: &Folder, device: &Device) -> Result<Mtp, Error> {
    let config = read_config(folder)?;
    let at = first(folder, &config)?;
    Builder {
        source: Source::Folder(folder),
        training: Training::Frozen,
        config: &config,
        device,
    }
    .mtp(&at)
}

/// Where the first module's tensors are.
fn first(folder: &Folder, config: &ModelConfig) -> Result<String, Error> {
    let none = |found: &str| Error::NoMtp {
        place: folder.path().to_path_buf(),
        found: found.into(),
    };
    if config.num_nextn_predict_layers == 0 {
        return Err(none("a config with 0 of them"));
    }
    let at = format!("model.layers.{}", config.num_hidden_layers);
    if !folder.contains(&format!("{at}.eh_proj.weight")) {
        let key = format!("a config with them and no tensor `{at}.eh_proj.weight`");
        return Err(none(&key));
    }
    Ok(at)
}

/// The keys and shapes of a checkpoint's modules for multi-token prediction, scales left out, and copies of the embedding and
/// of the output head where they are those of the model.
///
/// # Errors
/// If there is none, or a copy cannot be read.
pub(crate) fn mtp_keys(
    folder: &Folder,
    config: &ModelConfig,
) -> Result<Vec<(String, Vec<usize>)>, Error> {
    first(folder, config)?;
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let (first, n) = (config.num_hidden_layers, config.num_nextn_predict_layers);
    let mut keys = Vec::new();
    for layer_idx in first..first + n {
        let key = |name: &str| format!("model.layers.{layer_idx}.{name}.weight");
        keys.push((key("enorm"), vec![hidden]));
        keys.push((key("hnorm"), vec![hidden]));
        keys.push((key("eh_proj"), vec![hidden, 2 * hidden]));
        keys.extend(layer_keys(config, layer_idx));
        keys.push((key("shared_head.norm"), vec![hidden]));
        for (name, of_model) in [EMBEDDING, head(config)] {
            if is_own(folder, &key(name), of_model)? {
                keys.push((key(name), vec![vocab, hidden]));
            }
        }
    }
    Ok(keys)
}

/// A matrix of a module, and that of the model which it may be a copy of.
const EMBEDDING: (&str, &str) = ("embed_tokens", "model.embed_tokens.weight");

fn head(config: &ModelConfig) -> (&'static str, &'static str) {
    let of_model = if config.tie_word_embeddings {
        EMBEDDING.1
    } else {
        "lm_head.weight"
    };
    ("shared_head.head", of_model)
}

/// Whether there is a matrix of a module and it has other values than the model's.
fn is_own(folder: &Folder, key: &str, of_model: &str) -> Result<bool, Error> {
    if !folder.contains(key) {
        return Ok(false);
    }
    let [own, models] = [folder.tensor(key)?, folder.tensor(of_model)?];
    // The values of FP8 are more than its bytes.
    let is_same = own.dtype == models.dtype
        && own.dtype != DType::F8E4M3
        && own.shape == models.shape
        && own.bytes == models.bytes;
    Ok(!is_same)
}

/// A module with fresh weights, as [`super::fresh`] makes the model's; none where the config has none.
///
/// # Errors
/// As [`super::fresh`].
pub fn fresh_mtp(config: &ModelConfig, seed: u64, device: &Device) -> Result<Option<Mtp>, Error> {
    if config.num_nextn_predict_layers == 0 {
        return Ok(None);
    }
    let builder = Builder {
        source: Source::Fresh(seed),
        training: Training::Frozen,
        config,
        device,
    };
    let at = format!("model.layers.{}", config.num_hidden_layers);
    builder.mtp(&at).map(Some)
}

impl Builder<'_> {
    fn mtp(&self, at: &str) -> Result<Mtp, Error> {
        let config = self.config;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let norm = |name: &str| self.norm(&format!("{at}.{name}"), hidden, config.rms_norm_eps);
        let own_copy = |(name, of_model): (&str, &str)| {
            let at = format!("{at}.{name}");
            match self.source {
                Source::Folder(folder) if is_own(folder, &format!("{at}.weight"), of_model)? => {
                    self.linear(&at, [vocab, hidden]).map(Some)
                }
                _ => Ok(None),
            }
        };
        let embed_tokens = own_copy(EMBEDDING)?;
        Ok(Mtp {
            embed_tokens: embed_tokens.map(|linear| Embedding {
                weight: linear.weight,
            }),
            enorm: norm("enorm")?,
            hnorm: norm("hnorm")?,
            eh_proj: self.linear(&format!("{at}.eh_proj"), [hidden, 2 * hidden])?,
            layer: self.layer(config.num_hidden_layers)?,
            shared_head: SharedHead {
                norm: norm("shared_head.norm")?,
                head: own_copy(head(config))?,
            },
        })
    }
}
