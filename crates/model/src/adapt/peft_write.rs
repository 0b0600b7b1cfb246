//! From a model's updates to PEFT's tensors.

use std::path::PathBuf;

use burn::module::Param;
use burn::tensor::Tensor;
use checkpoint::{AdapterConfig, DType};
use kernels::device::read;

use super::lora_config::Scaling;
use super::peft_whole::{EMBEDDING_A, EMBEDDING_B, TOKEN_ROWS, transposed};
use super::weights::{
    AdapterWeights, Fused, MAGNITUDE, PREFIX, Replacement, TokenRows, WeightUpdate,
};
use crate::Error;
use crate::decoder::Model;
use crate::decoder::parameters::flat;
use crate::decoder::visit::ModuleRef;
use crate::keys::{EMBEDDING, PROJECTIONS};
use crate::modules::experts::{ExpertsLora, FactorStacks};
use crate::modules::linear::Weight;
use crate::modules::lora::{Dora, Lora};

/// Reads a factor's values, or leaves them out.
type ReadFactor = dyn Fn(Tensor<1>) -> Vec<f32>;

impl AdapterWeights {
    /// The updates on a model, as an adapter.
    pub fn from_model(model: &Model, scaling: Scaling, dropout: f32) -> Self {
        let mut weights = Self::empty(scaling, dropout, PathBuf::new());
        weights.add_whole(model);
        weights.with_updates(model, &|values| read(values))
    }

    /// [`Self::from_model`] without any values, to see what it updates. Ranks may share out the model's experts.
    pub fn outline(model: &Model, scaling: Scaling) -> Self {
        Self::empty(scaling, 0.0, PathBuf::new()).with_updates(model, &|_| Vec::new())
    }

    /// With the updates of a model, as far as they are read.
    fn with_updates(self, model: &Model, read: &ReadFactor) -> Self {
        let mut weights = Self {
            has_experts: model.config.moe.is_some(),
            ..self
        };
        let mut plain = Vec::new();
        for (path, module) in model.modules() {
            match module {
                ModuleRef::Linear(linear) => match &linear.lora {
                    Some(lora) => weights.add_linear(path, lora, read),
                    None => plain.push(path),
                },
                ModuleRef::Experts(experts) => {
                    let Some(lora) = &experts.lora else {
                        plain.extend(PROJECTIONS.map(|name| format!("{path}.{name}")));
                        continue;
                    };
                    let expert_ids = experts.updated_ids();
                    weights.add_experts(&path, lora, &expert_ids, read);
                    let others = (0..experts.dims()[0]).filter(|id| !expert_ids.contains(id));
                    let names = |expert| PROJECTIONS.map(|name| format!("{path}.{expert}.{name}"));
                    plain.extend(others.flat_map(names));
                }
            }
        }
        let shares_last_name = |path: &String| {
            let mut adapted = weights.linear.keys();
            adapted.any(|adapted| last_name(adapted) == last_name(path))
        };
        weights.others = plain.into_iter().filter(shares_last_name).collect();
        weights
    }

    /// Adds whole weights, and the update or the rows of the embedding.
    fn add_whole(&mut self, model: &Model) {
        for key in &model.replaced.keys {
            if let Some(new) = weight_values(model, key) {
                self.replaced.insert(key.clone(), new);
            }
        }
        let (embedding, ids) = (&model.model.embed_tokens, &model.replaced.tokens);
        match &embedding.lora {
            Some(lora) if ids.is_empty() => {
                self.add_linear(EMBEDDING.into(), lora, &|values| read(values))
            }
            _ if ids.is_empty() => {}
            update => {
                let [_, width] = embedding.weight.dims();
                let mut values = vec![0.0; ids.len() * width];
                if let Weight::Frozen(frozen) = &embedding.weight {
                    for (id, row) in ids.iter().zip(values.chunks_mut(width)) {
                        frozen.matrix.decode(*id..*id + 1, 0..width, row);
                    }
                }
                if let Some(lora) = update {
                    let differences = read(lora.lora_a.val());
                    let pairs = values.iter_mut().zip(differences);
                    pairs.for_each(|(value, difference)| *value += difference);
                }
                let ids = ids.clone();
                self.tokens = Some(TokenRows { ids, values });
            }
        }
    }

    /// Adds the update of a linear layer.
    fn add_linear(&mut self, path: String, lora: &Lora, read: &ReadFactor) {
        let [a, b] = [&lora.lora_a, &lora.lora_b].map(|factor| read(flat(factor.val())));
        let mut update = self.described(a, b, lora.rank(), lora.scale);
        let magnitude = |dora: &Dora| read(flat(dora.lora_magnitude_vector.val()));
        update.magnitude = lora.dora.as_ref().map(magnitude);
        self.linear.insert(path, update);
    }

    /// Adds the updates of a layer's experts.
    fn add_experts(
        &mut self,
        path: &str,
        lora: &ExpertsLora,
        expert_ids: &[usize],
        read: &ReadFactor,
    ) {
        let [gate, up, down] = PROJECTIONS;
        for (name, stacks) in [
            (gate, &lora.gate_proj),
            (up, &lora.up_proj),
            ("gate_up_proj", &lora.gate_up_proj),
            (down, &lora.down_proj),
        ] {
            let Some(stacks) = stacks else { continue };
            let pairs = self.unstacked(stacks, expert_ids.len(), read);
            if lora.is_fused {
                let fused = if name == down {
                    Fused::Down
                } else {
                    Fused::GateUp
                };
                self.fused.insert((path.into(), fused), pairs);
            } else {
                let named = expert_ids
                    .iter()
                    .zip(pairs)
                    .map(|(expert, pair)| (format!("{path}.{expert}.{name}"), pair));
                self.linear.extend(named);
            }
        }
    }

    fn described(&self, a: Vec<f32>, b: Vec<f32>, rank: usize, scale: f32) -> WeightUpdate {
        let alpha = match self.scaling {
            Scaling::Plain => f64::from(scale) * rank as f64,
            Scaling::RsLora => f64::from(scale) * (rank as f64).sqrt(),
        };
        // Alphas people write have few digits; the f32 scale has seven.
        let digits = 10f64.powi(5 - alpha.abs().max(f64::MIN_POSITIVE).log10().floor() as i32);
        WeightUpdate {
            a,
            b,
            rank,
            alpha: (alpha * digits).round() / digits,
            scale,
            magnitude: None,
        }
    }

    /// One pair per expert; a shared factor is in all of them.
    fn unstacked(
        &self,
        stacks: &FactorStacks,
        n_experts: usize,
        read: &ReadFactor,
    ) -> Vec<WeightUpdate> {
        let rank = stacks.lora_a.val().dims()[1];
        let parts = |stack: &Param<Tensor<3>>| -> Vec<Vec<f32>> {
            let (stack, n) = (stack.val(), stack.val().dims()[0]);
            let values = read(flat(stack));
            if values.is_empty() {
                return vec![values; n_experts];
            }
            let parts = values.chunks(values.len() / n).map(<[f32]>::to_vec);
            parts.cycle().take(n_experts).collect()
        };
        let pairs = parts(&stacks.lora_a).into_iter().zip(parts(&stacks.lora_b));
        pairs
            .map(|(a, b)| self.described(a, b, rank, stacks.scale))
            .collect()
    }

    /// The adapter's files: settings and tensors, f32.
    ///
    /// # Errors
    /// If a tensor cannot be described, which a well-formed update always can.
    pub fn files(&self, base: &str) -> Result<(AdapterConfig, Vec<checkpoint::Tensor>), Error> {
        let mut tensors = Vec::new();
        for (path, pair) in &self.linear {
            tensors.extend(pair_tensors(path, pair)?);
        }
        for ((owner, fused), pairs) in &self.fused {
            let inner =
                *fused == Fused::GateUp && self.fused.contains_key(&(owner.clone(), Fused::Down));
            let path = if inner {
                format!("{PREFIX}{owner}.base_layer")
            } else {
                format!("{PREFIX}{owner}")
            };
            tensors.extend(fused_tensors(&path, pairs)?);
        }
        for (key, new) in &self.replaced {
            tensors.push(values(
                &format!("{PREFIX}{}", self.saved_name(key)),
                &new.shape,
                &new.values,
            )?);
        }
        if let Some(rows) = &self.tokens {
            let shape = [rows.ids.len(), rows.values.len() / rows.ids.len().max(1)];
            tensors.push(tensor(
                &format!("{PREFIX}{EMBEDDING}{TOKEN_ROWS}"),
                shape,
                &rows.values,
            )?);
        }
        Ok((self.config(base), tensors))
    }

    /// PEFT's name for a whole weight: another one under an update.
    fn saved_name(&self, key: &str) -> String {
        match key.strip_suffix(".weight") {
            Some(path) if self.linear.contains_key(path) => format!("{path}.base_layer.weight"),
            _ => key.to_owned(),
        }
    }
}

/// The tensors of a module's update.
fn pair_tensors(path: &str, pair: &WeightUpdate) -> Result<Vec<checkpoint::Tensor>, Error> {
    let ([width, out], rank) = (pair.widths(), pair.rank);
    let named = |end: &str, shape: [usize; 2], values: &[f32]| {
        tensor(&format!("{PREFIX}{path}{end}"), shape, values)
    };
    if path == EMBEDDING {
        // PEFT's factors are those of the transposed weight.
        let [a, b] = [transposed(&pair.b, out), transposed(&pair.a, rank)];
        return Ok(vec![
            named(EMBEDDING_A, [rank, out], &a)?,
            named(EMBEDDING_B, [width, rank], &b)?,
        ]);
    }
    let mut tensors = vec![
        named(".lora_A.weight", [rank, width], &pair.a)?,
        named(".lora_B.weight", [out, rank], &pair.b)?,
    ];
    if let Some(magnitude) = &pair.magnitude {
        tensors.push(tensor(
            &format!("{PREFIX}{path}{MAGNITUDE}"),
            [out],
            magnitude,
        )?);
    }
    Ok(tensors)
}

/// The tensors of a layer's experts, stacked as PEFT has them: `lora_A` by expert, `lora_B` by rank.
fn fused_tensors(path: &str, pairs: &[WeightUpdate]) -> Result<[checkpoint::Tensor; 2], Error> {
    let (experts, rank, [width, out]) = (pairs.len(), pairs[0].rank, pairs[0].widths());
    let a: Vec<f32> = pairs.iter().flat_map(|pair| &pair.a).copied().collect();
    let b: Vec<f32> = (0..out * rank * experts)
        .map(|i| {
            let (row, col) = (i / (rank * experts), i % (rank * experts));
            pairs[col % experts].b[row * rank + col / experts]
        })
        .collect();
    Ok([
        tensor(
            &format!("{path}.lora_A.weight"),
            [experts * rank, width],
            &a,
        )?,
        tensor(&format!("{path}.lora_B.weight"), [out, rank * experts], &b)?,
    ])
}

/// The shape and the values of a weight that an adapter replaced.
fn weight_values(model: &Model, key: &str) -> Option<Replacement> {
    let mut trained = model.parameters().into_iter();
    if let Some(found) = trained.find(|found| found.name == key) {
        return Some(Replacement {
            shape: found.shape,
            values: read(found.values),
        });
    }
    let path = key.strip_suffix(".weight")?;
    let of_matrix = |weight: &Weight| {
        Some(Replacement {
            shape: weight.dims().to_vec(),
            values: weight.frozen()?.to_f32(),
        })
    };
    if path == EMBEDDING {
        return of_matrix(&model.model.embed_tokens.weight);
    }
    let linear = |(found, module): (String, ModuleRef<'_>)| match module {
        ModuleRef::Linear(linear) if found == path => of_matrix(&linear.weight),
        ModuleRef::Linear(_) | ModuleRef::Experts(_) => None,
    };
    if let Some(found) = model.modules().into_iter().find_map(linear) {
        return Some(found);
    }
    let mut model = model.clone();
    let mut norms = model.norms_mut().into_iter();
    let norm = norms.find(|(found, _)| found == key)?.1.weight.val();
    Some(Replacement {
        shape: norm.dims().to_vec(),
        values: read(norm),
    })
}

pub(super) fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn tensor<const D: usize>(
    name: &str,
    shape: [usize; D],
    numbers: &[f32],
) -> Result<checkpoint::Tensor, Error> {
    values(name, &shape, numbers)
}

/// A tensor of any number of axes.
fn values(name: &str, shape: &[usize], values: &[f32]) -> Result<checkpoint::Tensor, Error> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    Ok(checkpoint::Tensor::new(
        name,
        DType::F32,
        shape,
        bytes.into(),
    )?)
}
