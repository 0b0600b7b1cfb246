//! The precision of every class of a model, as a table: for people, for programs, and for the folder of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};

use checkpoint::Folder;
use kernels::Compute;
use kernels::fp8::Scales;

use crate::keys::is_scale;
use crate::precision::PrecisionClass;

/// The operands of a precision's products, their sums, and the saved activations.
fn described(compute: Compute) -> [&'static str; 3] {
    match compute {
        Compute::F32 => ["f32", "f32", "f32"],
        Compute::Bf16 => ["bf16", "f32", "bf16"],
        Compute::F16 => ["f16", "f32", "f16"],
        Compute::MatchWeight => [
            "int8 with blocks, bf16 with bf16, f32 otherwise",
            "f32",
            "f32",
        ],
        Compute::Fp8(Scales::F32) => ["E4M3, f32 scales", "f32", "E4M3"],
        Compute::Fp8(Scales::PowerOfTwo) => ["E4M3, UE8M0 scales", "f32", "E4M3"],
        Compute::Fp8(Scales::One) => ["E4M3, no scales", "f32", "E4M3"],
    }
}

/// The precision of every class of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// What the products that may be lowered compute in.
    pub compute: Compute,
    /// What merged weights of those products are rounded to first; empty if they are not.
    pub merged: String,
    /// Names of number formats, by class; absent classes have none.
    stored: BTreeMap<PrecisionClass, BTreeSet<String>>,
}

impl Policy {
    /// The policy of a checkpoint's weights, in their stored bytes.
    ///
    /// # Errors
    /// If a header of the checkpoint cannot be read.
    pub fn of_checkpoint(
        folder: &Folder,
        compute: impl Into<Compute>,
    ) -> Result<Self, checkpoint::Error> {
        let mut stored: BTreeMap<PrecisionClass, BTreeSet<String>> = BTreeMap::new();
        for name in folder.names().filter(|name| !is_scale(name)) {
            let dtype = folder.stored(name)?.dtype.to_string();
            stored
                .entry(PrecisionClass::of(name))
                .or_default()
                .insert(dtype);
        }
        Ok(Self {
            compute: compute.into(),
            merged: String::new(),
            stored,
        })
    }

    /// The policy of a model that is fully trained.
    pub fn trained(compute: impl Into<Compute>) -> Self {
        let trained = PrecisionClass::ALL
            .into_iter()
            .filter(|class| *class != PrecisionClass::Lora);
        let stored = trained.map(|class| (class, BTreeSet::from(["F32, trained".into()])));
        Self {
            compute: compute.into(),
            merged: String::new(),
            stored: stored.collect(),
        }
    }

    /// The same with low-rank updates. `formats` counts the matrices that are fake-quantized, by format; see
    /// [`crate::Model::fake_quantize`].
    #[must_use]
    pub fn with_lora(mut self, formats: &BTreeMap<String, usize>) -> Self {
        let factors = BTreeSet::from(["F32, trained".into()]);
        self.stored.insert(PrecisionClass::Lora, factors);
        let formats = formats.iter().map(|(format, n)| match formats.len() {
            1 => format.clone(),
            _ => format!("{format} ({n} matrices)"),
        });
        self.merged = formats.collect::<Vec<_>>().join(" and ");
        self
    }

    /// For programs: a list of rows.
    pub fn to_json(&self) -> serde_json::Value {
        let rows = PrecisionClass::ALL
            .iter()
            .filter_map(|class| self.row(*class));
        let rows = rows.map(|[class, stored, operands, sums, saved]| {
            serde_json::json!({
                "class": class, "stored": stored, "operands": operands, "sums": sums, "saved": saved,
            })
        });
        rows.collect()
    }

    fn row(&self, class: PrecisionClass) -> Option<[String; 5]> {
        let stored = self.stored.get(&class)?;
        let stored: Vec<&str> = stored.iter().map(String::as_str).collect();
        let [operands, sums, saved] = described(class.compute(self.compute));
        let operands = if class.is_lowered() && !self.merged.is_empty() {
            format!("{operands}; merged weights {}", self.merged)
        } else {
            operands.into()
        };
        // The updates' own products are f32, but their inputs are saved once for the layers that they sit on.
        let saved = match class {
            PrecisionClass::Lora => described(self.compute)[2],
            _ => saved,
        };
        let cells = [class.name(), &stored.join(" and "), &operands, sums, saved];
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
        rows.extend(
            PrecisionClass::ALL
                .iter()
                .filter_map(|class| self.row(*class)),
        );
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
}
