//! PEFT adapters and our low-rank updates, one made from the other.
//!
//! Routed experts come in two dialects. *Classic*: one pair of factors per expert and projection, named like any other
//! linear layer. *Fused* (PEFT on transformers 5): two wrappers nested on `mlp.experts`, each with stacked factors: `A`
//! holds rows `expert · rank + j`, `B` holds columns `j · experts + expert`. The inner wrapper, `experts.base_layer.*`,
//! is `gate_up_proj` (gate's rows first, one `A` for both), the outer, `experts.*`, is `down_proj`; where only one of
//! the two is adapted it owns `experts.*`.
//!
//! The dialect is kept: what was read fused is trained and written fused, since gate and up share a factor there.
//!
//! Source: huggingface/peft: src/peft/tuners/lora/layer.py, `ParamWrapper`; checked against adapters it wrote.

mod attach;
mod mlx;
mod read;
mod write;

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::Error;
use crate::adapt::attach::{Scaling, Share};
use crate::decoder::visit::PROJECTIONS;

/// What PEFT puts before a module's path.
const PREFIX: &str = "base_model.model.";
/// What it puts behind it for DoRA's lengths of rows.
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// The update of one weight `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
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

impl Pair {
    /// Input and output width.
    pub fn widths(&self) -> [usize; 2] {
        [self.a.len() / self.rank, self.b.len() / self.rank]
    }

    /// Updates one row of the weight.
    pub(crate) fn apply(&self, row: usize, values: &mut [f32]) {
        let gain = self.gain(row, values);
        self.add(row, values);
        values.iter_mut().for_each(|w| *w *= gain);
    }

    /// What DoRA multiplies an updated row by, from the row as it was; 1 without DoRA.
    pub(crate) fn gain(&self, row: usize, values: &[f32]) -> f32 {
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
    linear: BTreeMap<String, Pair>,
    /// By path of `experts` and fused parameter: one pair per expert.
    fused: BTreeMap<(String, Fused), Vec<Pair>>,
    scaling: Scaling,
    dropout: f32,
    /// Whether the experts of a layer share a factor, as the adapter's notes say.
    share: Option<Share>,
    /// Where it was read from, for messages.
    source: PathBuf,
    /// Modules of the same last names that have no update: last names alone would choose them too.
    others: Vec<String>,
}

/// The fused parameters of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fused {
    GateUp,
    Down,
}

impl Fused {
    fn parameter(self) -> &'static str {
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

    /// The update of one weight, by its module's path; experts by their number, whatever the dialect.
    pub fn update(&self, module: &str) -> Option<Pair> {
        if let Some(pair) = self.linear.get(module) {
            return Some(pair.clone());
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
        Some(Pair { b, ..pair.clone() })
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
fn fused_name(owner: &str, fused: Fused) -> String {
    format!(
        "{}.{}",
        owner.strip_suffix(".mlp.experts").unwrap_or(owner),
        fused.parameter()
    )
}
