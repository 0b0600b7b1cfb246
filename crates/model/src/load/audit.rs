//! Which of a checkpoint's tensors a model uses.

use std::collections::BTreeSet;

use checkpoint::{DType, Folder, TensorSpec};

use super::stored::{read_config, split_kv_b, whole_name};
use crate::Error;
use crate::config::ModelConfig;
use crate::keys::{EMBEDDING, HEAD, keys, layer_of, scale_key, weight_of_scale};

/// Which of a checkpoint's tensors a model uses, and which it does not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Audit {
    /// Tensors the model reads.
    pub used: Vec<String>,
    /// Tensors of multi-token-prediction layers: no part of the model, but carried into every folder that is written; see
    /// [`super::load_mtp`].
    pub mtp: Vec<String>,
    /// Tensors that nothing here knows.
    pub unknown: Vec<String>,
    /// Tensors that a model of this config has and the checkpoint lacks.
    pub missing: Vec<String>,
}

/// Sorts a checkpoint's tensors by their use.
///
/// # Errors
/// If the config is not one we compute.
pub fn audit(folder: &Folder) -> Result<Audit, Error> {
    let config = read_config(folder)?;
    let used: BTreeSet<String> = keys(&config).into_iter().map(|(key, _)| key).collect();
    let mut missing = used.clone();
    let layers = config.num_hidden_layers;
    let mtp = layers..layers + config.num_nextn_predict_layers;
    let mut audit = Audit::default();
    for name in folder.names() {
        let weight = whole_name(weight_of_scale(name));
        let list = if used.contains(&*weight) {
            missing.remove(&*weight);
            &mut audit.used
        } else if layer_of(name).is_some_and(|layer| mtp.contains(&layer)) {
            &mut audit.mtp
        } else {
            &mut audit.unknown
        };
        list.push(name.into());
    }
    audit.missing = missing.into_iter().collect();
    Ok(audit)
}

/// Checks by the headers alone that a checkpoint has every tensor of a model of its config, in its shape and under its own
/// name: whatever rewrites a model takes its work from there.
///
/// # Errors
/// For the first tensor that is missing, has another name or shape, or would be part of the model and is not used.
pub fn expect_complete(folder: &Folder, config: &ModelConfig) -> Result<(), Error> {
    expect_own_names(folder, config)?;
    for (key, shape) in keys(config) {
        if let Some(parts) = split_kv_b(folder, &key) {
            // Their shapes are checked when they are joined.
            parts
                .iter()
                .try_for_each(|part| folder.stored(part).map(|_| ()))?;
            continue;
        }
        let tensor = folder.stored(&key)?;
        tensor.expect_shape(&shape)?;
        if tensor.dtype == DType::F8E4M3 {
            folder.stored(&scale_key(&key))?;
        }
    }
    Ok(())
}

/// Refuses tensors that would change the result and that no key of a model names: an adapter that was never merged, a bias
/// of a router that has none, and a head in spite of an embedding that serves as one.
pub(super) fn expect_own_names(folder: &Folder, config: &ModelConfig) -> Result<(), Error> {
    const UPDATES: [&str; 3] = [".lora_A.", ".lora_B.", ".lora_magnitude_vector"];
    let is_update = |name: &&str| UPDATES.iter().any(|part| name.contains(part));
    let place = folder.path().display();
    if let Some(name) = folder.names().find(is_update) {
        return Err(Error::Unsupported(format!(
            "{place}: tensor `{name}`: expected a model, found one with an adapter that was never merged; take the base, and the \
             adapter with `--adapter`"
        )));
    }
    let has_bias = config
        .moe
        .as_ref()
        .is_none_or(|moe| moe.has_correction_bias);
    let is_bias = |name: &&str| name.ends_with(".gate.e_score_correction_bias");
    if let Some(name) = folder.names().find(|name| !has_bias && is_bias(name)) {
        return Err(Error::Unsupported(format!(
            "{place}: tensor `{name}`: expected no such bias, because the router's scores are those of softmax; models with it \
             have sigmoid: set `scoring_func` in config.json"
        )));
    }
    let [head, embedding] = [HEAD, EMBEDDING].map(|module| format!("{module}.weight"));
    if !config.tie_word_embeddings || !folder.contains(&head) || !folder.contains(&embedding) {
        return Ok(());
    }
    let (head, embedding) = (folder.stored(&head)?, folder.stored(&embedding)?);
    if head.spec()
        == (TensorSpec {
            name: head.name.clone(),
            ..embedding.spec()
        })
        && head.bytes == embedding.bytes
    {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{place}: tensor `{}`: expected the embedding's values, as `tie_word_embeddings` true says, found others; if the model \
         has a head of its own, set `tie_word_embeddings` to false in config.json",
        head.name
    )))
}
