//! From PEFT's tensors to updates of the embedding, whole weights, and rows of tokens.

use checkpoint::{Tensor, TrainableTokens};

use super::peft_patterns::PeftTargets;
use super::peft_read::PeftSource;
use super::weights::{AdapterWeights, PREFIX, Replacement, TokenRows, WeightUpdate, fused_name};
use crate::Error;
use crate::keys::{EMBEDDING, HEAD, Module, ParamKey, ParamPart, keys};

/// PEFT's suffix for the first factor of an embedding's update, `[rank, vocab]`.
pub(super) const EMBEDDING_A: &str = ".lora_embedding_A";
/// PEFT's suffix for the second, `[hidden_size, rank]`.
pub(super) const EMBEDDING_B: &str = ".lora_embedding_B";
/// PEFT's suffix for rows of tokens. Despite its name, the tensor holds the rows themselves.
pub(super) const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";
/// What PEFT puts into the name of a weight under an update.
const BASE_LAYER: &str = ".base_layer.weight";

impl AdapterWeights {
    /// Reads a tensor that is no factor of a linear layer's update.
    pub(super) fn read_whole(
        &mut self,
        source: &PeftSource<'_>,
        tensor: &Tensor,
        key: &str,
    ) -> Result<(), Error> {
        let partner = |path: &str, end: &str| {
            let name = format!("{PREFIX}{path}{end}");
            source.adapter.tensor(&name)
        };
        if let Some(path) = key.strip_suffix(EMBEDDING_B) {
            // Without a first factor it is no update.
            partner(path, EMBEDDING_A)?;
            return Ok(());
        }
        if let Some(path) = key.strip_suffix(EMBEDDING_A) {
            let b = partner(path, EMBEDDING_B)?;
            return self.read_embedding(source, [tensor, &b], path);
        }
        if let Some(path) = key.strip_suffix(TOKEN_ROWS) {
            return self.read_rows(source, tensor, path);
        }
        self.read_replacement(tensor, key)
    }

    /// Reads the update of the embedding, whose factors are those of the transposed weight.
    fn read_embedding(
        &mut self,
        source: &PeftSource<'_>,
        [a, b]: [&Tensor; 2],
        path: &str,
    ) -> Result<(), Error> {
        let settings = &source.sizes;
        if path != EMBEDDING {
            return Err(self.wrong(a, format!("an update of `{EMBEDDING}`"), path.into()));
        }
        if source.adapter.config.use_dora {
            let found = "`use_dora` true".into();
            return Err(self.wrong(a, "an update of the embedding without DoRA".into(), found));
        }
        let (&[rank, vocab], &[hidden, b_rank]) = (&a.shape[..], &b.shape[..]) else {
            return Err(self.wrong(a, "two axes".into(), format!("{:?}", a.shape)));
        };
        if rank != b_rank || rank == 0 {
            let expected = format!("[hidden, rank] to fit {:?} = [rank, vocab]", a.shape);
            return Err(self.wrong(b, expected, format!("{:?}", b.shape)));
        }
        let alpha = settings.alpha_of(path);
        let update = WeightUpdate {
            a: transposed(&self.values(b)?, hidden),
            b: transposed(&self.values(a)?, rank),
            rank,
            alpha,
            scale: self.scaling.scale(alpha, rank),
            magnitude: None,
        };
        self.check_rank(a, &update, settings.rank_of(path))?;
        debug_assert_eq!(update.widths(), [hidden, vocab]);
        self.linear.insert(path.into(), update);
        Ok(())
    }

    /// Reads rows of the embedding.
    fn read_rows(
        &mut self,
        source: &PeftSource<'_>,
        tensor: &Tensor,
        path: &str,
    ) -> Result<(), Error> {
        let config = source.config;
        if path != EMBEDDING {
            let found = format!("rows of `{path}`");
            return Err(self.wrong(tensor, format!("rows of `{EMBEDDING}`"), found));
        }
        let ids = match &source.adapter.config.trainable_token_indices {
            Some(TrainableTokens::OfEmbedding(ids)) => ids.clone(),
            Some(TrainableTokens::ByModule(modules)) => match &modules.0[..] {
                [(module, ids)] if names(module, EMBEDDING) => ids.clone(),
                _ => {
                    let found = modules.iter().map(|(module, _)| format!("`{module}`"));
                    let found = found.collect::<Vec<_>>().join(", ");
                    let expected = "`trainable_token_indices` of `embed_tokens` alone".into();
                    return Err(self.wrong(tensor, expected, found));
                }
            },
            None => vec![],
        };
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let is_good = sorted.len() == ids.len() && sorted.last() < Some(&config.vocab_size);
        if !is_good || ids.is_empty() {
            let vocab_size = config.vocab_size;
            return Err(self.wrong(
                tensor,
                format!("`trainable_token_indices` that differ, below {vocab_size}"),
                format!("{ids:?}"),
            ));
        }
        let shape = [ids.len(), config.hidden_size];
        if tensor.shape != shape {
            let expected = format!("{shape:?}, a row for each of `trainable_token_indices`");
            return Err(self.wrong(tensor, expected, format!("{:?}", tensor.shape)));
        }
        let values = self.values(tensor)?;
        self.tokens = Some(TokenRows { ids, values });
        Ok(())
    }

    /// Reads a whole weight: of an embedding, a head, a norm or a linear layer.
    fn read_replacement(&mut self, tensor: &Tensor, key: &str) -> Result<(), Error> {
        let key = match key.strip_suffix(BASE_LAYER) {
            Some(module) => format!("{module}.weight"),
            None => key.to_owned(),
        };
        let is_whole = ParamKey::parse(&key).is_some_and(|key| {
            key.part == ParamPart::Weight
                && !matches!(key.module, Module::Expert(..) | Module::Experts)
        });
        if !is_whole {
            let expected = "a name `base_model.model.<module>.lora_A.weight` or `….lora_B.weight`, or the weight of \
                            an embedding, a head, a norm or a linear layer";
            return Err(self.wrong(tensor, expected.into(), tensor.name.to_string()));
        }
        let new = Replacement {
            shape: tensor.shape.clone(),
            values: self.values(tensor)?,
        };
        if self.replaced.insert(key.clone(), new).is_some() {
            let expected = "one tensor with new weights of a module".into();
            return Err(self.wrong(tensor, expected, format!("two for `{key}`")));
        }
        Ok(())
    }

    /// Refuses whole modules that the settings name and the file lacks.
    pub(super) fn expect_saved(&self, source: &PeftSource<'_>) -> Result<(), Error> {
        let settings = &source.adapter.config;
        let of_model: Vec<String> = keys(source.config)
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        for module in settings.modules_to_save.iter().flatten() {
            let is_chosen = |key: &&String| {
                let path = key.strip_suffix(".weight");
                // PEFT takes the ends of names: `norm` is every `…layernorm`, too.
                path.is_some_and(|path| path.ends_with(module.as_str()))
            };
            let absent = of_model
                .iter()
                .filter(is_chosen)
                .find(|key| !self.replaced.contains_key(*key));
            let is_there = self.replaced.keys().any(|key| is_chosen(&key));
            if absent.is_some() || !is_there {
                let expected = format!("new weights of `{module}`, as `modules_to_save` says");
                return Err(self.unfit(absent.unwrap_or(module), expected, "none".into()));
            }
        }
        let names_tokens = match &settings.trainable_token_indices {
            None => false,
            Some(TrainableTokens::OfEmbedding(ids)) => !ids.is_empty(),
            Some(TrainableTokens::ByModule(modules)) => !modules.is_empty(),
        };
        if names_tokens && self.tokens.is_none() {
            let expected = "rows as `trainable_token_indices` says".into();
            return Err(self.unfit(&format!("{EMBEDDING}{TOKEN_ROWS}"), expected, "none".into()));
        }
        self.expect_one_kind()
    }

    /// Refuses two kinds of change to one weight, except for an update on a stored base.
    fn expect_one_kind(&self) -> Result<(), Error> {
        let updated = |module: &str| self.linear.contains_key(module);
        let replaced = |module: &str| self.replaced.contains_key(&format!("{module}.weight"));
        let is_both =
            |module: &&String| replaced(module) && !matches!(module.as_str(), EMBEDDING | HEAD);
        let mut twice = self.linear.keys().find(is_both).map(String::as_str);
        if self.tokens.is_some() {
            let mut with_rows = [EMBEDDING, HEAD].into_iter();
            let found = with_rows.find(|module| updated(module) || replaced(module));
            twice = twice.or(found);
        }
        match twice {
            None => Ok(()),
            Some(module) => Err(self.unfit(
                module,
                "one kind of change to a weight".into(),
                "an update, and whole weights or rows of tokens".into(),
            )),
        }
    }

    /// Refuses updates of modules that the settings do not choose: PEFT would leave them out.
    pub(super) fn expect_named(&self, targets: &PeftTargets<'_>) -> Result<(), Error> {
        let fused = self.fused.keys();
        let fused = fused.map(|(owner, fused)| fused_name(owner, *fused));
        let mut paths = self.linear.keys().cloned().chain(fused);
        match paths.find(|path| !targets.choose(path)) {
            None => Ok(()),
            Some(module) => Err(self.unfit(
                &module,
                "a module that `target_modules`, `target_parameters`, `exclude_modules` and `layers_to_transform` of \
                 adapter_config.json choose"
                    .into(),
                "an update that PEFT would leave out".into(),
            )),
        }
    }
}

/// Whether a setting names a module, by the last parts of its path.
fn names(setting: &str, path: &str) -> bool {
    let rest = path.strip_suffix(setting);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The transpose of a matrix of some rows.
pub(super) fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let cols = values.len() / rows.max(1);
    (0..values.len())
        .map(|i| values[i % rows * cols + i / rows])
        .collect()
}
