//! Puts an adapter's whole weights, and its rows of the embedding, on a model.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor};
use kernels::Matrix;

use super::update::AdaptedModule;
use super::weights::{AdapterWeights, Replacement, TokenRows};
use crate::Error;
use crate::decoder::visit::ModuleMut;
use crate::decoder::{Model, ReplacedWeights};
use crate::keys::EMBEDDING;
use crate::modules::linear::{Frozen, Weight};
use crate::modules::lora::{Lora, parameter};

impl AdapterWeights {
    /// Replaces weights of a model; they are trained from there on if the device tracks gradients.
    ///
    /// # Errors
    /// If one is not the model's, or rows of a tied embedding are to be trained.
    pub(super) fn replace(
        &self,
        model: &mut Model,
        device: &Device,
    ) -> Result<Vec<AdaptedModule>, Error> {
        let mut rest: BTreeSet<&str> = self.replaced_keys().collect();
        let mut take = |key: &str| {
            rest.remove(key);
            self.replaced.get(key)
        };
        for (path, module) in model.modules_mut() {
            if let (ModuleMut::Linear(linear), Some(new)) =
                (module, take(&format!("{path}.weight")))
            {
                linear.weight = weight(new, self.trains(&path, device).then_some(device));
            }
        }
        for (key, norm) in model.norms_mut() {
            if let Some(new) = take(&key) {
                norm.weight = vector(new, device);
            }
        }
        if let Some(new) = take(&format!("{EMBEDDING}.weight")) {
            let trained = self.trains(EMBEDDING, device).then_some(device);
            model.model.embed_tokens.weight = weight(new, trained);
        }
        if let Some(key) = rest.first() {
            return Err(self.unfit(
                key,
                "a weight of the model".into(),
                "an adapter for another model".into(),
            ));
        }
        model.replaced = ReplacedWeights {
            keys: self.replaced.keys().cloned().collect(),
            tokens: vec![],
        };
        let whole = |key: &String, parameters: usize| AdaptedModule {
            module: key.clone(),
            rank: 0,
            alpha: 0.0,
            parameters,
        };
        let replaced = self.replaced.iter();
        let mut adapted: Vec<AdaptedModule> = replaced
            .map(|(key, new)| whole(key, new.values.len()))
            .collect();
        if let Some(rows) = &self.tokens {
            self.replace_rows(model, rows, device)?;
            let key = format!("{EMBEDDING}: rows of {} tokens", rows.ids.len());
            adapted.push(whole(&key, rows.values.len()));
        }
        Ok(adapted)
    }

    /// Whether a whole weight is trained: not under an update, where it is that update's base.
    fn trains(&self, path: &str, device: &Device) -> bool {
        device.is_autodiff() && !self.linear.contains_key(path)
    }

    /// Replaces rows of the embedding, and of the head that is tied to it.
    fn replace_rows(
        &self,
        model: &mut Model,
        rows: &TokenRows,
        device: &Device,
    ) -> Result<(), Error> {
        let is_tied = model.lm_head.is_none();
        if is_tied && device.is_autodiff() {
            return Err(Error::Unsupported(format!(
                "{}: `trainable_token_indices` of an embedding that serves as the output head, too, are not trained here; \
                 merge the adapter first, or train `embed_tokens` and `lm_head` with LoRA",
                self.source.display()
            )));
        }
        let embedding = &mut model.model.embed_tokens;
        let Weight::Frozen(frozen) = &embedding.weight else {
            let message = "rows of tokens on an embedding that is trained as a whole".into();
            return Err(Error::Unsupported(message));
        };
        let ([vocab, width], n) = (embedding.weight.dims(), rows.ids.len());
        model.replaced.tokens.clone_from(&rows.ids);
        if is_tied {
            let mut values = frozen.matrix.to_f32();
            rows.put(&mut values, width);
            embedding.weight = frozen_weight([vocab, width], &values);
            return Ok(());
        }
        // An update whose second factor picks the tokens; the first has the differences.
        let (mut differences, mut picks) = (rows.values.clone(), vec![0.0; vocab * n]);
        for (place, (id, row)) in rows
            .ids
            .iter()
            .zip(differences.chunks_mut(width))
            .enumerate()
        {
            let mut old = vec![0.0; width];
            frozen.matrix.decode(*id..*id + 1, 0..width, &mut old);
            row.iter_mut().zip(old).for_each(|(new, old)| *new -= old);
            picks[id * n + place] = 1.0;
        }
        embedding.lora = Some(Lora {
            lora_a: parameter(differences, [n, width], device),
            lora_b: parameter(picks, [vocab, n], device).set_require_grad(false),
            scale: 1.0,
            dropout: 0.0,
            dropout_stream: 0,
            dora: None,
        });
        Ok(())
    }
}

impl TokenRows {
    /// Puts the rows into the values of an embedding of some width.
    pub(crate) fn put(&self, values: &mut [f32], width: usize) {
        for (id, row) in self.ids.iter().zip(self.values.chunks(width)) {
            values[id * width..(id + 1) * width].copy_from_slice(row);
        }
    }
}

/// A matrix of an adapter, trained on a device if one is given.
fn weight(new: &Replacement, trained: Option<&Device>) -> Weight {
    let shape = [new.shape[0], new.values.len() / new.shape[0].max(1)];
    match trained {
        Some(device) => Weight::Trained(parameter(new.values.clone(), shape, device)),
        None => frozen_weight(shape, &new.values),
    }
}

fn frozen_weight([rows, cols]: [usize; 2], values: &[f32]) -> Weight {
    let matrix = Arc::new(Matrix::from_f32(rows, cols, values));
    Weight::Frozen(Frozen { matrix })
}

/// A vector of an adapter.
fn vector(new: &Replacement, device: &Device) -> Param<Tensor<1>> {
    if device.is_autodiff() {
        return parameter(new.values.clone(), [new.values.len()], device);
    }
    let values = Tensor::from_floats(new.values.as_slice(), device);
    Param::initialized(ParamId::new(), values).set_require_grad(false)
}
