//! Which parts of a model compute in what.
//!
//! Only the products of attention and of the feed-forward layers are lowered. What is small and decides much is not:
//! a router that is rounded swaps neighboring experts, a head that is rounded moves every probability.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.1.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};

use checkpoint::Folder;
use kernels::Compute;
use kernels::fp8::Scales;

use crate::export::block_fp8::is_lowered;
use crate::weights::is_scale;

/// A part of a model, as precision sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// The linear layers of attention and of dense and shared feed-forward layers.
    Linear,
    /// The routed experts.
    Experts,
    /// The router's scores and bias.
    Router,
    /// The output head and the loss.
    Head,
    /// Low-rank updates: factors, and the products with them.
    Lora,
    /// Embedding, norms, rotary embedding, softmax.
    Rest,
}

impl Class {
    /// All classes, in the order of a table.
    pub const ALL: [Self; 6] = [
        Self::Linear,
        Self::Experts,
        Self::Router,
        Self::Head,
        Self::Lora,
        Self::Rest,
    ];

    /// That of a checkpoint's tensor.
    pub fn of(key: &str) -> Self {
        match key {
            _ if is_lowered(key) && key.contains(".mlp.experts.") => Self::Experts,
            _ if is_lowered(key) => Self::Linear,
            _ if key.contains(".mlp.gate.") => Self::Router,
            _ if key.starts_with("lm_head.") => Self::Head,
            _ => Self::Rest,
        }
    }

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear layers",
            Self::Experts => "routed experts",
            Self::Router => "router",
            Self::Head => "head and loss",
            Self::Lora => "LoRA factors",
            Self::Rest => "embedding, norms, rope, softmax",
        }
    }

    /// What it computes in where the model computes in `compute`.
    pub fn compute(self, compute: Compute) -> Compute {
        match self {
            Self::Linear | Self::Experts => compute,
            // Of a head in blocks every token reads all of it.
            Self::Head if compute == Compute::Int8 => compute,
            Self::Router | Self::Head | Self::Lora | Self::Rest => Compute::F32,
        }
    }
}

/// What products of a precision read, how they add, and what waits for the backward pass.
fn described(compute: Compute) -> [&'static str; 3] {
    match compute {
        Compute::F32 => ["f32", "f32", "f32"],
        Compute::Bf16 => ["bf16", "f32", "bf16"],
        Compute::F16 => ["f16", "f32", "f16"],
        Compute::Int8 => [
            "int8 with blocks, bf16 with bf16, f32 otherwise",
            "f32",
            "f32",
        ],
        Compute::Fp8(Scales::F32) => ["E4M3, f32 scales", "f32", "E4M3"],
        Compute::Fp8(Scales::PowerOfTwo) => ["E4M3, UE8M0 scales", "f32", "E4M3"],
        Compute::Fp8(Scales::One) => ["E4M3, no scales", "f32", "E4M3"],
    }
}

/// What every class of a model is stored in, computes in, adds in and keeps for the backward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// What the products that may be lowered compute in.
    pub compute: Compute,
    /// What merged weights of those products are rounded to before that; empty if they are not.
    pub merged: String,
    /// Names of number formats; a class without any is not there.
    stored: BTreeMap<Class, BTreeSet<String>>,
}

impl Policy {
    /// Of the weights of a checkpoint, in their stored bytes.
    ///
    /// # Errors
    /// If a header of the checkpoint cannot be read.
    pub fn of_checkpoint(folder: &Folder, compute: Compute) -> Result<Self, checkpoint::Error> {
        let mut stored: BTreeMap<Class, BTreeSet<String>> = BTreeMap::new();
        for name in folder.names().filter(|name| !is_scale(name)) {
            let dtype = folder.stored(name)?.dtype.to_string();
            stored.entry(Class::of(name)).or_default().insert(dtype);
        }
        Ok(Self {
            compute,
            merged: String::new(),
            stored,
        })
    }

    /// Of weights that are all trained.
    pub fn trained(compute: Compute) -> Self {
        let trained = Class::ALL.into_iter().filter(|class| *class != Class::Lora);
        let stored = trained.map(|class| (class, BTreeSet::from(["F32, trained".into()])));
        Self {
            compute,
            merged: String::new(),
            stored: stored.collect(),
        }
    }

    /// The same with low-rank updates. `formats` says how many matrices are read merged and rounded to what, see
    /// [`crate::Model::round_weights`].
    #[must_use]
    pub fn with_lora(mut self, formats: &BTreeMap<String, usize>) -> Self {
        let factors = BTreeSet::from(["F32, trained".into()]);
        self.stored.insert(Class::Lora, factors);
        let formats = formats.iter().map(|(format, n)| match formats.len() {
            1 => format.clone(),
            _ => format!("{format} ({n} matrices)"),
        });
        self.merged = formats.collect::<Vec<_>>().join(" and ");
        self
    }

    /// For programs: a list of rows.
    pub fn to_json(&self) -> serde_json::Value {
        let rows = Class::ALL.iter().filter_map(|class| self.row(*class));
        let rows = rows.map(|[class, stored, operands, sums, kept]| {
            serde_json::json!({
                "class": class, "stored": stored, "operands": operands, "sums": sums, "kept": kept,
            })
        });
        rows.collect()
    }

    fn row(&self, class: Class) -> Option<[String; 5]> {
        let stored = self.stored.get(&class)?;
        let stored: Vec<&str> = stored.iter().map(String::as_str).collect();
        let [operands, sums, kept] = described(class.compute(self.compute));
        let lowered = matches!(class, Class::Linear | Class::Experts);
        let operands = if lowered && !self.merged.is_empty() {
            format!("{operands}; merged weights {}", self.merged)
        } else {
            operands.into()
        };
        // The updates' own products are f32; their inputs are those of the layers they sit on.
        let kept = match class {
            Class::Lora => described(self.compute)[2],
            _ => kept,
        };
        let cells = [class.name(), &stored.join(" and "), &operands, sums, kept];
        Some(cells.map(Into::into))
    }
}

impl Display for Policy {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let titles = [
            "precision",
            "stored",
            "operands",
            "sums",
            "saved for backward",
        ];
        let mut rows = vec![titles.map(Into::into)];
        rows.extend(Class::ALL.iter().filter_map(|class| self.row(*class)));
        let width = |column: usize| rows.iter().map(|row: &[String; 5]| row[column].len()).max();
        let widths = [0, 1, 2, 3, 4].map(|column| width(column).unwrap_or(0));
        for (number, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(widths);
            let cells = cells.map(|(cell, width)| format!("{cell:width$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            let end = if number + 1 < rows.len() { "\n" } else { "" };
            write!(f, "{}{end}", line.trim_end())?;
        }
        if matches!(self.compute, Compute::Fp8(_)) {
            write!(f, "\nsimulated FP8: values exact, arithmetic f32")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_large_products_are_lowered() {
        let fp8 = Compute::Fp8(Scales::F32);
        let lowered = Class::ALL.map(|class| class.compute(fp8) == fp8);
        assert_eq!(lowered, [true, true, false, false, false, false]);
    }

    #[test]
    fn the_table_has_a_line_per_class_that_is_there() {
        let trained = Policy::trained(Compute::Fp8(Scales::F32)).to_string();
        assert_eq!(trained.lines().count(), 7, "{trained}");
        assert!(trained.ends_with("arithmetic f32"), "{trained}");
        let formats = BTreeMap::from([("gguf:q4_0".to_owned(), 7)]);
        let lora = Policy::trained(Compute::Bf16)
            .with_lora(&formats)
            .to_string();
        assert_eq!(lora.lines().count(), 7, "{lora}");
        let line = lora.lines().find(|line| line.starts_with("routed experts"));
        assert!(
            line.unwrap().contains("bf16; merged weights gguf:q4_0"),
            "{lora}"
        );
        let line = lora.lines().find(|line| line.starts_with("LoRA"));
        assert!(line.unwrap().ends_with("f32   bf16"), "{lora}");
    }

    #[test]
    fn a_tensor_belongs_to_a_class() {
        let of = |key: &str, class| assert_eq!(Class::of(key), class, "{key}");
        of(
            "model.layers.1.mlp.experts.3.up_proj.weight",
            Class::Experts,
        );
        of(
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            Class::Linear,
        );
        of(
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            Class::Linear,
        );
        of("model.layers.1.mlp.gate.weight", Class::Router);
        of(
            "model.layers.1.mlp.gate.e_score_correction_bias",
            Class::Router,
        );
        of("lm_head.weight", Class::Head);
        of("model.embed_tokens.weight", Class::Rest);
        of(
            "model.layers.1.self_attn.kv_a_layernorm.weight",
            Class::Rest,
        );
    }
}
