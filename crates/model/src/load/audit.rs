//! Which of a checkpoint's tensors a model uses.

use std::collections::BTreeSet;

use checkpoint::Folder;

use super::stored::{read_config, whole_name};
use crate::Error;
use crate::keys::{keys, layer_of, weight_of_scale};

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
}

/// Sorts a checkpoint's tensors by their use.
///
/// # Errors
/// If the config is not one we compute.
pub fn audit(folder: &Folder) -> Result<Audit, Error> {
    let config = read_config(folder)?;
    let used: BTreeSet<String> = keys(&config).into_iter().map(|(key, _)| key).collect();
    let layers = config.num_hidden_layers;
    let mtp = layers..layers + config.num_nextn_predict_layers;
    let mut audit = Audit::default();
    for name in folder.names() {
        let weight = whole_name(weight_of_scale(name));
        let list = if used.contains(&*weight) {
            &mut audit.used
        } else if layer_of(name).is_some_and(|layer| mtp.contains(&layer)) {
            &mut audit.mtp
        } else {
            &mut audit.unknown
        };
        list.push(name.into());
    }
    Ok(audit)
}
