//! An adapter in memory: updates of named weights.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use super::lora_config::{Scaling, Share};
use crate::Error;
use crate::config::ModelConfig;
use crate::keys::{EMBEDDING, HEAD, PROJECTIONS, ParamKey};

/// PEFT's prefix of a module's path.
pub(super) const PREFIX: &str = "base_model.model.";
/// PEFT's suffix for DoRA's lengths of rows.
pub(super) const MAGNITUDE: &str = ".lora_magnitude_vector";

/// The update of one weight `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightUpdate {
    /// `[rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `[out, rank]`, row-major.
    pub b: Vec<f32>,
    /// Width of the bottleneck.
    pub rank: usize,
    /// Alpha, for the adapter's own config.
    pub alpha: f64,
    /// Multiplier of the update.
    pub scale: f32,
    /// DoRA's lengths of the updated rows, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

impl WeightUpdate {
    /// Input and output width.
    pub fn widths(&self) -> [usize; 2] {
        [self.a.len() / self.rank, self.b.len() / self.rank]
    }

    /// Updates one row of the weight.
    pub(crate) fn apply(&self, row: usize, values: &mut [f32]) {
        let scale = self.dora_scale(row, values);
        self.add(row, values);
        values.iter_mut().for_each(|w| *w *= scale);
    }

    /// DoRA's scale of an updated row, from the row before the update; 1 without DoRA.
    pub(crate) fn dora_scale(&self, row: usize, values: &[f32]) -> f32 {
        let Some(magnitude) = &self.magnitude else {
            return 1.0;
        };
        let mut updated = values.to_vec();
        self.add(row, &mut updated);
        let squares = updated.iter().map(|w| f64::from(*w).powi(2));
        magnitude[row] / squares.sum::<f64>().sqrt() as f32
    }

    /// Adds the product of the factors to one row.
    fn add(&self, row: usize, values: &mut [f32]) {
        let b = &self.b[row * self.rank..(row + 1) * self.rank];
        for (b, a) in b.iter().zip(self.a.chunks(values.len())) {
            let pairs = values.iter_mut().zip(a);
            pairs.for_each(|(w, a)| *w += self.scale * b * a);
        }
    }
}

/// New values for a whole tensor: one of PEFT's `modules_to_save`.
#[derive(Clone, Debug, PartialEq)]
pub struct Replacement {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

/// New rows for some tokens of the embedding: PEFT's `trainable_token_indices`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRows {
    /// The tokens, in the order of the rows.
    pub ids: Vec<usize>,
    /// `[tokens, hidden_size]`, row-major.
    pub values: Vec<f32>,
}

/// An adapter, as updates of named modules.
///
/// An update of the embedding is one of its weight `[vocab, hidden_size]`: `b` holds a row per token.
#[derive(Clone, Debug)]
pub struct AdapterWeights {
    /// By module path; experts under their own numbers.
    pub(super) linear: BTreeMap<String, WeightUpdate>,
    /// By path of `experts` and fused parameter: one update per expert.
    pub(super) fused: BTreeMap<(String, Fused), Vec<WeightUpdate>>,
    /// By key.
    pub(super) replaced: BTreeMap<String, Replacement>,
    pub(super) tokens: Option<TokenRows>,
    /// Number of tensors in the file.
    pub(super) n_tensors: usize,
    pub(super) scaling: Scaling,
    pub(super) dropout: f32,
    /// Which factors the experts of a layer share, as the adapter's notes say.
    pub(super) share: Option<Share>,
    /// The file, for messages.
    pub(super) source: PathBuf,
    /// Modules without an update that share a last name with one that has one: last names alone would choose them too.
    pub(super) others: Vec<String>,
    /// Whether the model that it was trained on has routed experts, which PEFT stacks.
    pub(super) has_experts: bool,
}

/// The fused parameters of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fused {
    GateUp,
    Down,
}

impl Fused {
    pub(super) fn parameter(self) -> &'static str {
        match self {
            Self::GateUp => "mlp.experts.gate_up_proj",
            Self::Down => "mlp.experts.down_proj",
        }
    }
}

impl AdapterWeights {
    /// An adapter without updates.
    pub(super) fn empty(scaling: Scaling, dropout: f32, source: PathBuf) -> Self {
        Self {
            linear: BTreeMap::new(),
            fused: BTreeMap::new(),
            replaced: BTreeMap::new(),
            tokens: None,
            n_tensors: 0,
            scaling,
            dropout,
            share: None,
            source,
            others: vec![],
            has_experts: false,
        }
    }

    /// Number of tensors in its file; 0 if it comes from no file.
    pub fn n_tensors(&self) -> usize {
        self.n_tensors
    }

    /// Whether it changes nothing: the product of factors is zero in every update, and there is nothing else.
    pub fn is_zero(&self) -> bool {
        let is_zero = |update: &WeightUpdate| {
            let all_zero = |values: &[f32]| values.iter().all(|value| *value == 0.0);
            update.magnitude.is_none()
                && (update.scale == 0.0 || all_zero(&update.b) || all_zero(&update.a))
        };
        let mut updates = self.linear.values().chain(self.fused.values().flatten());
        self.replaced.is_empty() && self.tokens.is_none() && updates.all(is_zero)
    }

    /// The new values of a tensor that the adapter replaces as a whole, by its key.
    pub fn replacement(&self, key: &str) -> Option<&Replacement> {
        self.replaced.get(key)
    }

    /// The keys of those tensors.
    pub fn replaced_keys(&self) -> impl Iterator<Item = &str> {
        self.replaced.keys().map(String::as_str)
    }

    /// The rows of the embedding that the adapter replaces.
    pub fn token_rows(&self) -> Option<&TokenRows> {
        self.tokens.as_ref()
    }

    /// The keys of the weights that it changes, experts by their number.
    pub fn changed_keys(&self) -> BTreeSet<String> {
        let weight = |module: String| format!("{module}.weight");
        let updated = self.modules().into_iter().map(weight);
        let embedding = self.tokens.iter().map(|_| weight(EMBEDDING.into()));
        let replaced = self.replaced.keys().cloned();
        updated.chain(embedding).chain(replaced).collect()
    }

    /// Whether the output head of a model with a tied embedding has other weights than the embedding, once the adapter is
    /// merged. New rows of tokens are new in both.
    pub fn unties(&self) -> bool {
        let changes = |module: &str| {
            let is_replaced = self.replaced.contains_key(&format!("{module}.weight"));
            self.linear.contains_key(module) || is_replaced
        };
        changes(EMBEDDING) || changes(HEAD)
    }

    /// Checks that every weight that it changes is the model's, and of the shape that the update is for.
    ///
    /// # Errors
    /// For the first that is not.
    pub fn expect_fit(&self, config: &ModelConfig) -> Result<(), Error> {
        let expected = |key: &str| match key {
            "lm_head.weight" => Some(vec![config.vocab_size, config.hidden_size]),
            _ => ParamKey::parse(key)?.shape(config),
        };
        let another = |name: &str| {
            let found = "an adapter for another model".into();
            Err(self.unfit(name, "a module of the model".into(), found))
        };
        for module in self.modules() {
            let shape = expected(&format!("{module}.weight"));
            let (Some(&[out, width]), Some(found)) = (shape.as_deref(), self.widths_of(&module))
            else {
                return another(&module);
            };
            self.expect_widths(&module, found, [out, width])?;
        }
        for (key, new) in &self.replaced {
            let Some(shape) = expected(key) else {
                return another(key);
            };
            if shape != new.shape {
                let (expected, found) = (format!("{shape:?}"), format!("{:?}", new.shape));
                return Err(self.unfit(key, expected, found));
            }
        }
        Ok(())
    }

    pub(super) fn expect_widths(
        &self,
        module: &str,
        [found_in, found_out]: [usize; 2],
        [out, width]: [usize; 2],
    ) -> Result<(), Error> {
        if [found_in, found_out] == [width, out] {
            return Ok(());
        }
        Err(self.unfit(
            module,
            format!("an update of [{out}, {width}]"),
            format!("one of [{found_out}, {found_in}]"),
        ))
    }

    /// How alphas become scales.
    pub fn scaling(&self) -> Scaling {
        self.scaling
    }

    /// Which factors the experts of a layer share.
    pub fn share(&self) -> Option<Share> {
        self.share
    }

    /// The same updates with another dropout.
    ///
    /// # Errors
    /// If it is not 0 and experts are fused: PEFT allows no dropout there.
    pub fn with_dropout(self, dropout: f32) -> Result<Self, Error> {
        if dropout > 0.0 && !self.fused.is_empty() {
            let message = format!(
                "{}: fused experts allow no dropout; set lora.dropout to 0, found {dropout}",
                self.source.display()
            );
            return Err(Error::Unsupported(message));
        }
        Ok(Self { dropout, ..self })
    }

    /// The update of one weight, by its module's path; experts by their number in both dialects.
    pub fn update(&self, module: &str) -> Option<WeightUpdate> {
        if let Some(update) = self.linear.get(module) {
            return Some(update.clone());
        }
        let (pair, rows) = self.fused_update(module)?;
        let b = pair.b[rows.start * pair.rank..rows.end * pair.rank].to_vec();
        Some(WeightUpdate { b, ..pair.clone() })
    }

    /// Input and output width of the update of a weight.
    fn widths_of(&self, module: &str) -> Option<[usize; 2]> {
        if let Some(update) = self.linear.get(module) {
            return Some(update.widths());
        }
        let (pair, rows) = self.fused_update(module)?;
        Some([pair.widths()[0], rows.len()])
    }

    /// The fused update that an expert's projection has a part of, and its rows of it.
    fn fused_update(&self, module: &str) -> Option<(&WeightUpdate, Range<usize>)> {
        let (rest, projection) = module.rsplit_once('.')?;
        let (owner, expert) = rest.rsplit_once('.')?;
        let fused = match projection {
            "down_proj" => Fused::Down,
            "gate_proj" | "up_proj" => Fused::GateUp,
            _ => return None,
        };
        let pairs = self.fused.get(&(owner.into(), fused))?;
        let pair = pairs.get(expert.parse::<usize>().ok()?)?;
        let [_, out] = pair.widths();
        let rows = match projection {
            "gate_proj" => 0..out / 2,
            "up_proj" => out / 2..out,
            _ => 0..out,
        };
        Some((pair, rows))
    }

    /// The modules it updates, experts by their number.
    pub fn modules(&self) -> Vec<String> {
        let fused = self.fused.iter().flat_map(|((owner, fused), pairs)| {
            let projections: &[&str] = if *fused == Fused::Down {
                &PROJECTIONS[2..]
            } else {
                &PROJECTIONS[..2]
            };
            (0..pairs.len()).flat_map(move |expert| {
                projections
                    .iter()
                    .map(move |projection| format!("{owner}.{expert}.{projection}"))
            })
        });
        self.linear.keys().cloned().chain(fused).collect()
    }

    pub(crate) fn unfit(&self, module: &str, expected: String, found: String) -> Error {
        Error::Adapter {
            file: self.source.clone(),
            name: module.into(),
            expected,
            found,
        }
    }
}

/// The path of a fused parameter: `….mlp.experts.gate_up_proj`.
pub(super) fn fused_name(owner: &str, fused: Fused) -> String {
    format!(
        "{}.{}",
        owner.strip_suffix(".mlp.experts").unwrap_or(owner),
        fused.parameter()
    )
}
