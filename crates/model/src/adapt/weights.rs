//! An adapter in memory: updates of named weights.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::lora_config::{Scaling, Share};
use crate::Error;
use crate::keys::PROJECTIONS;

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

/// An adapter, as updates of named modules.
#[derive(Clone, Debug)]
pub struct AdapterWeights {
    /// By module path; experts under their own numbers.
    pub(super) linear: BTreeMap<String, WeightUpdate>,
    /// By path of `experts` and fused parameter: one update per expert.
    pub(super) fused: BTreeMap<(String, Fused), Vec<WeightUpdate>>,
    pub(super) scaling: Scaling,
    pub(super) dropout: f32,
    /// Which factors the experts of a layer share, as the adapter's notes say.
    pub(super) share: Option<Share>,
    /// The file, for messages.
    pub(super) source: PathBuf,
    /// Modules without an update that share a last name with one that has one: last names alone would choose them too.
    pub(super) others: Vec<String>,
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
        let (rest, projection) = module.rsplit_once('.')?;
        let (owner, expert) = rest.rsplit_once('.')?;
        let fused = if projection == "down_proj" {
            Fused::Down
        } else {
            Fused::GateUp
        };
        let pair = self
            .fused
            .get(&(owner.into(), fused))?
            .get(expert.parse::<usize>().ok()?)?;
        let half = pair.b.len() / 2;
        let b = match projection {
            "gate_proj" => pair.b[..half].to_vec(),
            "up_proj" => pair.b[half..].to_vec(),
            "down_proj" => pair.b.clone(),
            _ => return None,
        };
        Some(WeightUpdate { b, ..pair.clone() })
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
