//! From PEFT's tensors to updates.

use std::path::Path;

use checkpoint::{Adapter, AdapterFormat};

use super::lora_config::{Scaling, Share};
use super::peft_patterns::{PatternedSizes, PeftPatterns, PeftTargets};
use super::update::check_dora;
use super::weights::{AdapterWeights, Fused, MAGNITUDE, PREFIX, WeightUpdate, fused_name};
use crate::Error;
use crate::config::ModelConfig;

impl AdapterWeights {
    /// Reads an adapter for a model of some config.
    ///
    /// # Errors
    /// If a tensor is none of an adapter's, lacks its partner, or has a shape no update can have.
    pub fn read(adapter: &Adapter, config: &ModelConfig) -> Result<Self, Error> {
        let settings = &adapter.config;
        let scaling = if settings.use_rslora {
            Scaling::RsLora
        } else {
            Scaling::Plain
        };
        let source = adapter.path().to_path_buf();
        let mut weights = Self {
            n_tensors: adapter.tensors().len(),
            share: share_of(adapter, &source)?,
            ..Self::empty(scaling, settings.lora_dropout as f32, source)
        };
        let sizes = PatternedSizes {
            alphas: PeftPatterns::new(
                settings
                    .alpha_pattern
                    .iter()
                    .map(|(pattern, alpha)| (pattern, *alpha)),
            )?,
            ranks: PeftPatterns::new(
                settings
                    .rank_pattern
                    .iter()
                    .map(|(pattern, rank)| (pattern, *rank)),
            )?,
            alpha: settings.lora_alpha,
            rank: settings.r,
        };
        match adapter.format {
            AdapterFormat::Mlx => weights.read_mlx(adapter, config)?,
            AdapterFormat::Peft => {
                let source = PeftSource {
                    adapter,
                    sizes,
                    config,
                };
                for tensor in adapter.tensors() {
                    weights.read_update(&source, tensor)?;
                }
                weights.expect_named(&PeftTargets::of(settings))?;
                weights.expect_saved(&source)?;
            }
        }
        if weights.changed_keys().is_empty() {
            return Err(weights.unfit("lora_A", "at least one update".into(), "none".into()));
        }
        Ok(weights)
    }

    /// Reads the update that starts with a `lora_A`.
    fn read_update(
        &mut self,
        source: &PeftSource<'_>,
        a: &checkpoint::Tensor,
    ) -> Result<(), Error> {
        let PeftSource {
            adapter,
            sizes: settings,
            config,
        } = source;
        let key = a.name.strip_prefix(PREFIX);
        let Some(path) = key.and_then(|key| key.strip_suffix(".lora_A.weight")) else {
            return match key {
                Some(key) if !is_partner(key) => self.read_whole(source, a, key),
                _ => self.check_partner(adapter, a),
            };
        };
        let b = adapter.tensor(&format!("{PREFIX}{path}.lora_B.weight"))?;
        let owner = path.strip_suffix(".base_layer").unwrap_or(path);
        if !owner.ends_with(".experts") {
            let mut pair = self.pair([a, &b], settings.alpha_of(path))?;
            if adapter.config.use_dora {
                pair.magnitude = Some(self.magnitude(adapter, path, &pair)?);
            }
            self.check_rank(a, &pair, settings.rank_of(path))?;
            self.linear.insert(path.into(), pair);
            return Ok(());
        }
        if adapter.config.use_dora {
            check_dora(owner)?;
        }
        let fused = self.fused_parameter(adapter, path, [a, &b], config)?;
        let name = fused_name(owner, fused);
        let pairs = self.split_fused([a, &b], settings.alpha_of(&name), fused, config)?;
        // PEFT doubles the rank of gate_up_proj if it made it from gate_proj and up_proj.
        let doubled = fused == Fused::GateUp && pairs[0].rank == 2 * settings.rank_of(&name);
        if !doubled {
            self.check_rank(a, &pairs[0], settings.rank_of(&name))?;
        }
        self.fused.insert((owner.into(), fused), pairs);
        Ok(())
    }

    /// DoRA's lengths of the rows of one module.
    fn magnitude(
        &self,
        adapter: &Adapter,
        path: &str,
        pair: &WeightUpdate,
    ) -> Result<Vec<f32>, Error> {
        let tensor = adapter.tensor(&format!("{PREFIX}{path}{MAGNITUDE}"))?;
        let [_, out] = pair.widths();
        tensor.expect_shape(&[out])?;
        self.values(&tensor)
    }

    /// A tensor's values.
    ///
    /// # Errors
    /// If one is not finite, or they are no floats.
    pub(super) fn values(&self, tensor: &checkpoint::Tensor) -> Result<Vec<f32>, Error> {
        let values = tensor.to_f32()?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(place) => {
                let found = format!("{} at place {place}", values[place]);
                Err(self.wrong(tensor, "finite numbers".into(), found))
            }
        }
    }

    /// Everything that is no `lora_A` must be the `lora_B` of one, or DoRA's part of it.
    fn check_partner(&self, adapter: &Adapter, tensor: &checkpoint::Tensor) -> Result<(), Error> {
        let magnitude = tensor.name.strip_suffix(MAGNITUDE);
        let partner = tensor
            .name
            .strip_suffix(".lora_B.weight")
            .or(magnitude.filter(|_| adapter.config.use_dora))
            .map(|path| format!("{path}.lora_A.weight"));
        match partner {
            Some(partner) if tensor.name.starts_with(PREFIX) => {
                adapter.tensor(&partner).map(|_| ()).map_err(Error::from)
            }
            _ => Err(self.wrong(
                tensor,
                "a name `base_model.model.<module>.lora_A.weight` or `….lora_B.weight`".into(),
                tensor.name.to_string(),
            )),
        }
    }

    pub(super) fn wrong(
        &self,
        tensor: &checkpoint::Tensor,
        expected: String,
        found: String,
    ) -> Error {
        Error::Adapter {
            file: self.source.clone(),
            name: tensor.name.to_string(),
            expected,
            found,
        }
    }

    fn pair(&self, [a, b]: [&checkpoint::Tensor; 2], alpha: f64) -> Result<WeightUpdate, Error> {
        match (a.shape.as_slice(), b.shape.as_slice()) {
            (&[rank, _], &[_, b_rank]) if rank == b_rank && rank > 0 => Ok(WeightUpdate {
                a: self.values(a)?,
                b: self.values(b)?,
                rank,
                alpha,
                scale: self.scaling.scale(alpha, rank),
                magnitude: None,
            }),
            (a_shape, b_shape) => Err(self.wrong(
                b,
                format!("[out, rank] to fit lora_A's {a_shape:?} = [rank, in]"),
                format!("{b_shape:?}"),
            )),
        }
    }

    /// Refuses a tensor with another rank than its config says: another number of experts, or other patterns, could otherwise
    /// pass for another scale.
    pub(super) fn check_rank(
        &self,
        tensor: &checkpoint::Tensor,
        pair: &WeightUpdate,
        expected: usize,
    ) -> Result<(), Error> {
        if pair.rank == expected {
            return Ok(());
        }
        Err(self.wrong(
            tensor,
            format!("rank {expected}, as adapter_config.json says"),
            format!("rank {}", pair.rank),
        ))
    }

    /// Which fused parameter a wrapper on `experts` stands for.
    fn fused_parameter(
        &self,
        adapter: &Adapter,
        path: &str,
        [a, _]: [&checkpoint::Tensor; 2],
        config: &ModelConfig,
    ) -> Result<Fused, Error> {
        if path.ends_with(".base_layer") {
            return Ok(Fused::GateUp);
        }
        if adapter.contains(&format!("{PREFIX}{path}.base_layer.lora_A.weight")) {
            return Ok(Fused::Down);
        }
        let targets = adapter
            .config
            .target_parameters
            .as_deref()
            .unwrap_or_default();
        let targeted = |fused: Fused| {
            targets.iter().any(|target| {
                target.ends_with(fused.parameter()) || fused.parameter().ends_with(target.as_str())
            })
        };
        let width = |width: usize| a.shape.get(1) == Some(&width);
        match (targeted(Fused::GateUp), targeted(Fused::Down)) {
            (true, false) => Ok(Fused::GateUp),
            (false, true) => Ok(Fused::Down),
            _ if width(config.hidden_size) => Ok(Fused::GateUp),
            _ if config
                .moe
                .as_ref()
                .is_some_and(|moe| width(moe.moe_intermediate_size)) =>
            {
                Ok(Fused::Down)
            }
            _ => Err(self.wrong(
                a,
                "target_parameters to say which experts' parameter this is".into(),
                format!("{targets:?}"),
            )),
        }
    }

    /// One pair per expert from stacked factors.
    fn split_fused(
        &self,
        [a, b]: [&checkpoint::Tensor; 2],
        alpha: f64,
        fused: Fused,
        config: &ModelConfig,
    ) -> Result<Vec<WeightUpdate>, Error> {
        let (experts, inner) = config.moe.as_ref().map_or((0, 0), |moe| {
            (moe.n_routed_experts, moe.moe_intermediate_size)
        });
        let (&[rows, _], &[out, cols]) = (&a.shape[..], &b.shape[..]) else {
            return Err(self.wrong(a, "two axes".into(), format!("{:?}", a.shape)));
        };
        if experts == 0 || rows != cols || rows == 0 || !rows.is_multiple_of(experts) {
            return Err(self.wrong(
                a,
                format!(
                    "a multiple of the model's {experts} experts as rows, and as lora_B's columns"
                ),
                format!("{rows} and {cols}"),
            ));
        }
        let expected = if fused == Fused::GateUp {
            2 * inner
        } else {
            config.hidden_size
        };
        if out != expected {
            return Err(self.wrong(b, format!("{expected} rows"), out.to_string()));
        }
        let (rank, a_values, b_values) = (rows / experts, self.values(a)?, self.values(b)?);
        let per_expert = a_values.len() / experts;
        let pair = |expert: usize| WeightUpdate {
            a: a_values[expert * per_expert..(expert + 1) * per_expert].to_vec(),
            b: (0..out * rank)
                .map(|i| b_values[i / rank * cols + i % rank * experts + expert])
                .collect(),
            rank,
            alpha,
            scale: self.scaling.scale(alpha, rank),
            magnitude: None,
        };
        Ok((0..experts).map(pair).collect())
    }
}

/// An adapter's file, its settings, and the model that it is read for.
pub(super) struct PeftSource<'a> {
    pub(super) adapter: &'a Adapter,
    pub(super) sizes: PatternedSizes,
    pub(super) config: &'a ModelConfig,
}

/// Whether a key is one of an update that starts with a `lora_A`.
fn is_partner(key: &str) -> bool {
    key.ends_with(".lora_B.weight") || key.ends_with(MAGNITUDE)
}

/// Which factors the experts share, as an adapter's notes have it.
fn share_of(adapter: &Adapter, source: &Path) -> Result<Option<Share>, Error> {
    let Some(name) = &adapter.notes.experts_share else {
        return Ok(None);
    };
    match Share::named(name) {
        Some(share) => Ok(Some(share)),
        None => Err(Error::Adapter {
            file: source.with_file_name("moeforge.json"),
            name: "experts_share".into(),
            expected: "A, B or outer".into(),
            found: name.clone(),
        }),
    }
}
