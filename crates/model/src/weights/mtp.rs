//! The module for multi-token prediction, from a checkpoint's tensors.

use burn::tensor::Device;
use checkpoint::{DType, Folder};

use super::{Builder, Source, Training, read_config};
use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::{Embedding, Mtp, SharedHead};
use crate::linear::Linear;

/// Opens the module for multi-token prediction of a checkpoint, the first one where it has several. Its copies of the
/// embedding and the output head are left alone where they are those of the model.
///
/// # Errors
/// If there is none, or a tensor is missing or of another shape or dtype than the config says.
pub fn load_mtp(folder: &Folder, device: &Device) -> Result<Mtp, Error> {
    let config = read_config(folder)?;
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
    Builder {
        source: Source::Folder(folder),
        training: Training::Frozen,
        config: &config,
        device,
    }
    .mtp(&at)
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
        let of_model = if config.tie_word_embeddings {
            "model.embed_tokens"
        } else {
            "lm_head"
        };
        let embed_tokens = self.own_copy(
            &format!("{at}.embed_tokens"),
            "model.embed_tokens",
            [vocab, hidden],
        )?;
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
                head: self.own_copy(
                    &format!("{at}.shared_head.head"),
                    of_model,
                    [vocab, hidden],
                )?,
            },
        })
    }

    /// The module's copy of a matrix of the model, if it has one with other values.
    fn own_copy(
        &self,
        at: &str,
        of_model: &str,
        shape: [usize; 2],
    ) -> Result<Option<Linear>, Error> {
        let Source::Folder(folder) = self.source else {
            return Ok(None);
        };
        let key = format!("{at}.weight");
        if !folder.contains(&key) {
            return Ok(None);
        }
        let [own, models] = [
            folder.tensor(&key)?,
            folder.tensor(&format!("{of_model}.weight"))?,
        ];
        // The values of FP8 are more than its bytes.
        let is_same = own.dtype == models.dtype
            && own.dtype != DType::F8E4M3
            && own.shape == models.shape
            && own.bytes == models.bytes;
        if is_same {
            return Ok(None);
        }
        self.linear(at, shape).map(Some)
    }
}
