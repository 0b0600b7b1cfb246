//! From a model's updates to PEFT's tensors.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::Param;
use burn::tensor::Tensor;
use checkpoint::{AdapterConfig, DType};

use super::lora_config::Scaling;
use super::peft_patterns::most_common;
use super::weights::{AdapterWeights, Fused, MAGNITUDE, PREFIX, WeightUpdate, fused_name};
use crate::Error;
use crate::decoder::Model;
use crate::decoder::visit::ModuleRef;
use crate::keys::PROJECTIONS;
use crate::modules::experts::{ExpertsLora, FactorStacks};
use crate::modules::lora::{Dora, Lora};

impl AdapterWeights {
    /// The updates on a model, as an adapter.
    pub fn from_model(model: &Model, scaling: Scaling, dropout: f32) -> Self {
        let mut weights = Self {
            linear: BTreeMap::new(),
            fused: BTreeMap::new(),
            scaling,
            dropout,
            share: None,
            source: PathBuf::new(),
            others: vec![],
        };
        let mut plain = Vec::new();
        for (path, module) in model.modules() {
            match module {
                ModuleRef::Linear(linear) => match &linear.lora {
                    Some(lora) => weights.add_linear(path, lora),
                    None => plain.push(path),
                },
                ModuleRef::Experts(experts) => {
                    let Some(lora) = &experts.lora else {
                        plain.extend(PROJECTIONS.map(|name| format!("{path}.{name}")));
                        continue;
                    };
                    let expert_ids = experts.updated_ids();
                    weights.add_experts(&path, lora, &expert_ids);
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

    /// Adds the update of a linear layer.
    fn add_linear(&mut self, path: String, lora: &Lora) {
        let [a, b] = [flat(lora.lora_a.val()), flat(lora.lora_b.val())];
        let mut update = self.described(a, b, lora.rank(), lora.scale);
        let magnitude = |dora: &Dora| flat(dora.lora_magnitude_vector.val());
        update.magnitude = lora.dora.as_ref().map(magnitude);
        self.linear.insert(path, update);
    }

    /// Adds the updates of a layer's experts.
    fn add_experts(&mut self, path: &str, lora: &ExpertsLora, expert_ids: &[usize]) {
        let [gate, up, down] = PROJECTIONS;
        for (name, stacks) in [
            (gate, &lora.gate_proj),
            (up, &lora.up_proj),
            ("gate_up_proj", &lora.gate_up_proj),
            (down, &lora.down_proj),
        ] {
            let Some(stacks) = stacks else { continue };
            let pairs = self.unstacked(stacks, expert_ids.len());
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
    fn unstacked(&self, stacks: &FactorStacks, n_experts: usize) -> Vec<WeightUpdate> {
        let rank = stacks.lora_a.val().dims()[1];
        let parts = |stack: &Param<Tensor<3>>| -> Vec<Vec<f32>> {
            let (stack, n) = (stack.val(), stack.val().dims()[0]);
            let values = flat(stack);
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
            let [width, out] = pair.widths();
            tensors.push(tensor(
                &format!("{PREFIX}{path}.lora_A.weight"),
                [pair.rank, width],
                &pair.a,
            )?);
            tensors.push(tensor(
                &format!("{PREFIX}{path}.lora_B.weight"),
                [out, pair.rank],
                &pair.b,
            )?);
            if let Some(magnitude) = &pair.magnitude {
                let name = format!("{PREFIX}{path}{MAGNITUDE}");
                tensors.push(tensor(&name, [out], magnitude)?);
            }
        }
        for ((owner, fused), pairs) in &self.fused {
            let inner =
                *fused == Fused::GateUp && self.fused.contains_key(&(owner.clone(), Fused::Down));
            let path = if inner {
                format!("{PREFIX}{owner}.base_layer")
            } else {
                format!("{PREFIX}{owner}")
            };
            let (experts, rank, [width, out]) = (pairs.len(), pairs[0].rank, pairs[0].widths());
            let a: Vec<f32> = pairs.iter().flat_map(|pair| &pair.a).copied().collect();
            let b: Vec<f32> = (0..out * rank * experts)
                .map(|i| {
                    let (row, col) = (i / (rank * experts), i % (rank * experts));
                    pairs[col % experts].b[row * rank + col / experts]
                })
                .collect();
            tensors.push(tensor(
                &format!("{path}.lora_A.weight"),
                [experts * rank, width],
                &a,
            )?);
            tensors.push(tensor(
                &format!("{path}.lora_B.weight"),
                [out, rank * experts],
                &b,
            )?);
        }
        Ok((self.config(base), tensors))
    }

    fn config(&self, base: &str) -> AdapterConfig {
        let named = self.linear.iter().map(|(path, pair)| (path.clone(), pair));
        let fused = self
            .fused
            .iter()
            .map(|((owner, fused), pairs)| (fused_name(owner, *fused), &pairs[0]));
        let all: Vec<(String, &WeightUpdate)> = named.chain(fused).collect();
        let rank = most_common(all.iter().map(|(_, pair)| pair.rank)).unwrap_or(1);
        let alpha = most_common(all.iter().map(|(_, pair)| pair.alpha.to_bits()))
            .map_or(1.0, f64::from_bits);
        let mut config = AdapterConfig::new(rank, alpha);
        config.base_model_name_or_path = Some(base.into());
        config.lora_dropout = f64::from(self.dropout);
        config.use_rslora = self.scaling == Scaling::RsLora;
        config.use_dora = all.iter().any(|(_, pair)| pair.magnitude.is_some());
        config.rank_pattern = all
            .iter()
            .filter(|(_, pair)| pair.rank != rank)
            .map(|(name, pair)| (regex::escape(name), pair.rank))
            .collect();
        config.alpha_pattern = all
            .iter()
            .filter(|(_, pair)| pair.alpha != alpha)
            .map(|(name, pair)| (regex::escape(name), pair.alpha))
            .collect();
        let mut names: Vec<String> = self
            .linear
            .keys()
            .map(|path| last_name(path).into())
            .collect();
        names.sort_unstable();
        names.dedup();
        if !self.others.is_empty() {
            names = self.linear.keys().cloned().collect();
        }
        config.target_modules = Some(checkpoint::TargetModules::List(names));
        let mut parameters: Vec<String> = self
            .fused
            .keys()
            .map(|(_, fused)| fused.parameter().into())
            .collect();
        parameters.sort_unstable();
        parameters.dedup();
        config.target_parameters = (!parameters.is_empty()).then_some(parameters);
        config
    }
}

fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("factors are f32")
}

fn tensor<const D: usize>(
    name: &str,
    shape: [usize; D],
    values: &[f32],
) -> Result<checkpoint::Tensor, Error> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    Ok(checkpoint::Tensor::new(
        name,
        DType::F32,
        &shape,
        bytes.into(),
    )?)
}
