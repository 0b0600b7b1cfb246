//! Walks the architecture and makes each part, from a folder or from a seed.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor};
use checkpoint::Folder;
use kernels::{ExpertBank, Matrix};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::audit::expect_own_names;
use super::stored::{read_config, read_matrix};
use crate::Error;
use crate::config::{AttentionConfig, GqaConfig, MlaConfig, ModelConfig, MoeConfig};
use crate::decoder::{Decoder, DecoderLayer, Embedding, FeedForward, Model, ReplacedWeights};
use crate::forward::exchange::ExpertRanks;
use crate::keys::{Module, ParamKey, ParamPart, Projection, keys, seed_for};
use crate::modules::attention::{Attention, Gqa, Mla};
use crate::modules::experts::{
    ExpertSubset, ExpertWeights, Experts, FrozenBank, PartiallyTrained, Stacks,
};
use crate::modules::linear::{Frozen, Linear, Weight};
use crate::modules::lora::parameter;
use crate::modules::mlp::Mlp;
use crate::modules::moe::Moe;
use crate::modules::norm::Norm;
use crate::modules::router::Router;
use crate::patterns::matches;

/// Epsilon of the norms inside latent attention, whatever the config says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Which of a model's own weights are trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Training {
    /// They stay in their published bytes; adapters may be trained on them.
    Frozen,
    /// All are trained, in f32.
    Full,
    /// Those whose keys match a pattern of the first list and none of the second; see [`matches()`].
    Subset(Vec<String>, Vec<String>),
}

impl Training {
    /// Whether the weight of a key is trained.
    pub fn trains(&self, key: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, key));
        match self {
            Self::Frozen => false,
            Self::Full => true,
            Self::Subset(patterns, excluded) => any(patterns) && !any(excluded),
        }
    }

    /// Whether any expert of a model is trained.
    pub fn trains_experts(&self, config: &ModelConfig) -> bool {
        let is_expert = |key: &str| {
            let module = ParamKey::parse(key).map(|key| key.module);
            matches!(module, Some(Module::Expert(..)))
        };
        let keys = keys(config).into_iter().map(|(key, _)| key);
        keys.filter(|key| is_expert(key))
            .any(|key| self.trains(&key))
    }

    /// Refuses a pattern that chooses no tensor.
    fn check(&self, config: &ModelConfig) -> Result<(), Error> {
        let Self::Subset(patterns, _) = self else {
            return Ok(());
        };
        let keys = keys(config);
        let matches_none =
            |pattern: &&String| !keys.iter().any(|(key, _)| matches(pattern.as_str(), key));
        match patterns.iter().find(matches_none) {
            Some(pattern) => Err(Error::NoTensor {
                pattern: pattern.clone(),
                example: keys
                    .get(keys.len() / 2)
                    .map(|(key, _)| key.clone())
                    .unwrap_or_default(),
            }),
            None => Ok(()),
        }
    }
}

/// Opens a model over a checkpoint.
///
/// # Errors
/// If the config is not one we compute, a tensor is missing or of another shape or dtype than the config says, or a
/// pattern chooses nothing.
pub fn load(folder: &Folder, training: Training, device: &Device) -> Result<Model, Error> {
    load_shard(folder, training, None, device)
}

/// As [`load`], with this rank's share of the experts, if ranks share them out: those of others are never read.
///
/// # Errors
/// As [`load`].
pub fn load_shard(
    folder: &Folder,
    training: Training,
    ranks: Option<&Arc<ExpertRanks>>,
    device: &Device,
) -> Result<Model, Error> {
    let config = read_config(folder)?;
    expect_own_names(folder, &config)?;
    training.check(&config)?;
    let builder = Builder::new(WeightSource::Folder(folder), training, &config, device);
    builder.with_ranks(ranks).model()
}

/// A model with fresh weights: normal with the config's `initializer_range`, norms one, biases zero. Those that are not
/// trained are held in f32.
///
/// # Errors
/// If a pattern chooses nothing to train.
pub fn fresh(
    config: &ModelConfig,
    training: Training,
    seed: u64,
    device: &Device,
) -> Result<Model, Error> {
    fresh_shard(config, training, (seed, None), device)
}

/// As [`fresh`], with this rank's share of the experts, if ranks share them out.
///
/// # Errors
/// As [`fresh`].
pub fn fresh_shard(
    config: &ModelConfig,
    training: Training,
    (seed, ranks): (u64, Option<&Arc<ExpertRanks>>),
    device: &Device,
) -> Result<Model, Error> {
    training.check(config)?;
    let builder = Builder::new(WeightSource::Fresh(seed), training, config, device);
    builder.with_ranks(ranks).model()
}

/// Where weights come from.
pub(super) enum WeightSource<'a> {
    Folder(&'a Folder),
    Fresh(u64),
}

/// Walks the architecture and makes each part. Keys and shapes are those of `keys.rs`.
pub(super) struct Builder<'a> {
    pub(super) source: WeightSource<'a>,
    pub(super) training: Training,
    pub(super) config: &'a ModelConfig,
    pub(super) device: &'a Device,
    /// Those that share out the experts, if any do.
    ranks: Option<Arc<ExpertRanks>>,
    /// A matrix of each stack that was copied to the device.
    copied: Mutex<Vec<Matrix>>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        source: WeightSource<'a>,
        training: Training,
        config: &'a ModelConfig,
        device: &'a Device,
    ) -> Self {
        Self {
            source,
            training,
            config,
            device,
            ranks: None,
            copied: Mutex::default(),
        }
    }

    fn with_ranks(self, ranks: Option<&Arc<ExpertRanks>>) -> Self {
        let ranks = ranks.map(Arc::clone);
        Self { ranks, ..self }
    }

    fn model(&self) -> Result<Model, Error> {
        let layers = 0..self.config.num_hidden_layers;
        let layers = layers.map(|layer_idx| self.layer(layer_idx));
        let model = Model {
            model: Decoder {
                embed_tokens: Embedding {
                    weight: self.weight(ParamKey::weight(None, Module::Embedding))?,
                    lora: None,
                },
                layers: layers.collect::<Result<_, _>>()?,
                norm: self.norm(None, Module::FinalNorm)?,
            },
            lm_head: self.optional_linear(None, Module::Head)?,
            config: self.config.clone(),
            replaced: ReplacedWeights::default(),
        };
        self.expect_unchanged()?;
        Ok(model)
    }

    /// Refuses a device that has damaged what was copied to it.
    pub(super) fn expect_unchanged(&self) -> Result<(), Error> {
        let copied = self.copied.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(kernels::device::expect_unchanged(&copied)?)
    }

    pub(super) fn layer(&self, layer_idx: usize) -> Result<DecoderLayer, Error> {
        let config = self.config;
        let moe = config.moe.as_ref();
        Ok(DecoderLayer {
            input_layernorm: self.norm(layer_idx, Module::InputNorm)?,
            self_attn: match &config.attention {
                AttentionConfig::Mla(mla) => Attention::Mla(self.mla(layer_idx, mla)?),
                AttentionConfig::Gqa(gqa) => Attention::Gqa(self.gqa(layer_idx, gqa)?),
            },
            post_attention_layernorm: self.norm(layer_idx, Module::PostAttentionNorm)?,
            mlp: match moe.filter(|moe| moe.is_moe_layer(layer_idx)) {
                Some(moe) => FeedForward::Moe(self.moe(layer_idx, moe)?),
                None => FeedForward::Dense(self.mlp(layer_idx, Module::Mlp)?),
            },
        })
    }

    fn mla(&self, layer_idx: usize, mla: &MlaConfig) -> Result<Mla, Error> {
        let linear = |module| self.linear(layer_idx, module);
        let optional = |module| self.optional_linear(layer_idx, module);
        let q_a_layernorm = mla
            .q_lora_rank
            .map(|_| self.norm(layer_idx, Module::QANorm));
        Ok(Mla {
            q_proj: optional(Module::Q)?,
            q_a_proj: optional(Module::QA)?,
            q_a_layernorm: q_a_layernorm.transpose()?,
            q_b_proj: optional(Module::QB)?,
            kv_a_proj_with_mqa: linear(Module::KvA)?,
            kv_a_layernorm: self.norm(layer_idx, Module::KvANorm)?,
            kv_b_proj: linear(Module::KvB)?,
            o_proj: linear(Module::O)?,
            config: mla.clone(),
            heads: self.config.num_attention_heads,
            softmax_scale: self.config.rope.softmax_scale(mla.qk_head_dim()),
            layout: self.config.rope.layout,
        })
    }

    fn gqa(&self, layer_idx: usize, gqa: &GqaConfig) -> Result<Gqa, Error> {
        Ok(Gqa {
            q_proj: self.linear(layer_idx, Module::Q)?,
            k_proj: self.linear(layer_idx, Module::K)?,
            v_proj: self.linear(layer_idx, Module::V)?,
            o_proj: self.linear(layer_idx, Module::O)?,
            config: gqa.clone(),
            heads: self.config.num_attention_heads,
            softmax_scale: (gqa.head_dim as f64).powf(-0.5) as f32,
            layout: self.config.rope.layout,
        })
    }

    /// A feed-forward part of a layer; `module` says which.
    fn mlp(&self, layer_idx: usize, module: fn(Projection) -> Module) -> Result<Mlp, Error> {
        Ok(Mlp {
            gate_proj: self.linear(layer_idx, module(Projection::Gate))?,
            up_proj: self.linear(layer_idx, module(Projection::Up))?,
            down_proj: self.linear(layer_idx, module(Projection::Down))?,
        })
    }

    fn moe(&self, layer_idx: usize, moe: &MoeConfig) -> Result<Moe, Error> {
        let bias = ParamKey {
            part: ParamPart::CorrectionBias,
            ..ParamKey::weight(layer_idx, Module::Router)
        };
        let bias = bias.shape(self.config).map(|shape| {
            let values = self.vector_values(&bias.to_string(), shape[0], 0.0)?;
            Ok::<_, Error>(Tensor::from_floats(values.as_slice(), self.device))
        });
        let has_shared = moe.n_shared_experts > 0;
        let shared_experts = has_shared.then(|| self.mlp(layer_idx, Module::SharedExperts));
        Ok(Moe {
            gate: self.linear(layer_idx, Module::Router)?,
            router: Router {
                e_score_correction_bias: bias.transpose()?,
                config: moe.clone(),
            },
            experts: self.experts(layer_idx, moe.n_routed_experts)?,
            shared_experts: shared_experts.transpose()?,
        })
    }

    fn experts(&self, layer_idx: usize, n: usize) -> Result<Experts, Error> {
        let trained_ids = self.trained_experts(layer_idx, n)?;
        let (weights, subset) = match trained_ids {
            None => {
                let bank = self.bank(layer_idx, n)?;
                (ExpertWeights::Frozen(FrozenBank { bank }), None)
            }
            Some(ids) if self.training == Training::Full => {
                let trained = self.stacks(layer_idx, n, &ids)?;
                (ExpertWeights::Trained(trained), None)
            }
            Some(ids) => {
                let bank = self.bank(layer_idx, n)?;
                let trained = self.stacks(layer_idx, n, &ids)?;
                let subset = ExpertSubset::new(ids, &bank)?;
                let partial = PartiallyTrained { bank, trained };
                (ExpertWeights::Partial(partial), Some(subset))
            }
        };
        let mut experts = Experts {
            weights,
            lora: None,
            quantizer: None,
            subset,
            n_prefetch: 0,
            shard: None,
        };
        if let Some(ranks) = &self.ranks {
            experts.shard(ranks, layer_idx, n);
        }
        Ok(experts)
    }

    /// The trained experts of a layer, the same for every projection that is trained; none if none are.
    fn trained_experts(&self, layer_idx: usize, n: usize) -> Result<Option<Vec<usize>>, Error> {
        let trained_ids = |projection| {
            let key = |expert| expert_key(layer_idx, expert, projection).to_string();
            let trains = |expert: &usize| self.training.trains(&key(*expert));
            (0..n).filter(trains).collect::<Vec<_>>()
        };
        let [gate, up, down] = Projection::ALL.map(trained_ids);
        let counts = [gate.len(), up.len(), down.len()];
        let mut trained = [gate, up, down].into_iter().filter(|ids| !ids.is_empty());
        let Some(ids) = trained.next() else {
            return Ok(None);
        };
        if trained.all(|other| other == ids) {
            return Ok(Some(ids));
        }
        let [gate, up, down] = counts;
        Err(Error::Unsupported(format!(
            "`{}`: {gate} experts' gate_proj are to be trained, {up} up_proj and {down} down_proj; choose the same \
             experts for every projection, or none",
            Module::Experts.path(Some(layer_idx))
        )))
    }

    /// Views of a layer's experts in their published bytes. Fresh ones of other ranks are not made: one of this rank's stands in
    /// for each, and nothing reads it.
    fn bank(&self, layer_idx: usize, n: usize) -> Result<Arc<ExpertBank>, Error> {
        let own = match (&self.ranks, &self.source) {
            (Some(ranks), WeightSource::Fresh(_)) => ranks.own_places(n, None),
            _ => 0..n,
        };
        // A rank without experts needs their shape.
        let made = if own.is_empty() { 0..1 } else { own };
        let matrices = |projection| {
            let read = |expert| self.matrix(expert_key(layer_idx, expert, projection));
            let experts = made.clone().into_par_iter().map(read);
            let found = experts.collect::<Result<Vec<_>, _>>()?;
            let all = (0..n).map(|expert| {
                let place = made.contains(&expert).then(|| expert - made.start);
                found[place.unwrap_or(0)].clone()
            });
            self.placed(all.collect())
        };
        Ok(Arc::new(ExpertBank::new(
            matrices(Projection::Gate)?,
            matrices(Projection::Up)?,
            matrices(Projection::Down)?,
        )))
    }

    /// The values of those of a layer's `n` experts that are trained, as far as they are this rank's; each projection is
    /// trained if it is chosen.
    fn stacks(&self, layer_idx: usize, n: usize, trained_ids: &[usize]) -> Result<Stacks, Error> {
        let own_ids = match &self.ranks {
            Some(ranks) => &trained_ids[ranks.own_places(n, Some(trained_ids))],
            None => trained_ids,
        };
        let stack = |projection| {
            let key = |expert: usize| expert_key(layer_idx, expert, projection);
            let [out, width] = self.shape(key(trained_ids[0]));
            let mut values = Vec::with_capacity(own_ids.len() * out * width);
            for expert in own_ids {
                values.extend(self.values(key(*expert))?);
            }
            let trains = self.training.trains(&key(trained_ids[0]).to_string());
            let stack = parameter(values, [own_ids.len(), out, width], self.device);
            Ok::<_, Error>(if trains {
                stack
            } else {
                stack.set_require_grad(false)
            })
        };
        Ok(Stacks {
            gate_proj: stack(Projection::Gate)?,
            up_proj: stack(Projection::Up)?,
            down_proj: stack(Projection::Down)?,
        })
    }

    /// The shape of a matrix of the model.
    ///
    /// # Panics
    /// If a model of this config has no such matrix.
    fn shape(&self, key: ParamKey) -> [usize; 2] {
        let shape = key.shape(self.config);
        match shape.as_deref() {
            Some(&[out, width]) => [out, width],
            _ => unreachable!("`{key}` is no matrix of this model"),
        }
    }

    /// A weight in its published bytes; a fresh one in f32.
    fn matrix(&self, key: ParamKey) -> Result<Matrix, Error> {
        let [rows, cols] = self.shape(key);
        match self.source {
            WeightSource::Folder(folder) => self.read(folder, key),
            WeightSource::Fresh(_) => Ok(Matrix::from_f32(rows, cols, &self.values(key)?)),
        }
    }

    /// Frozen matrices of one shape, copied to the device if it is not the CPU. Their pages of the file are released.
    fn placed(&self, mut matrices: Vec<Matrix>) -> Result<Vec<Matrix>, Error> {
        let release = &mut |stored: &Matrix| {
            if let WeightSource::Folder(_) = self.source {
                checkpoint::advise_dontneed(stored.bytes());
            }
        };
        Matrix::place(&mut matrices, self.device, release)?;
        let mut copied = self.copied.lock().unwrap_or_else(PoisonError::into_inner);
        copied.extend(matrices.first().cloned());
        Ok(matrices)
    }

    fn read(&self, folder: &Folder, key: ParamKey) -> Result<Matrix, Error> {
        let block = self.config.fp8_block;
        read_matrix(folder, &key.to_string(), self.shape(key), block)
    }

    /// A linear layer, with its bias if a model of this config has one.
    pub(super) fn linear(
        &self,
        layer: impl Into<Option<usize>>,
        module: Module,
    ) -> Result<Linear, Error> {
        let weight = ParamKey::weight(layer, module);
        let mut linear = Linear::new(self.weight(weight)?);
        let bias = ParamKey {
            part: ParamPart::Bias,
            ..weight
        };
        if let Some(&[len]) = bias.shape(self.config).as_deref() {
            linear.bias = Some(self.vector(&bias.to_string(), len, 0.0)?);
        }
        Ok(linear)
    }

    /// A linear layer, if a model of this config has it.
    fn optional_linear(
        &self,
        layer: impl Into<Option<usize>>,
        module: Module,
    ) -> Result<Option<Linear>, Error> {
        let layer = layer.into();
        let shape = ParamKey::weight(layer, module).shape(self.config);
        shape.map(|_| self.linear(layer, module)).transpose()
    }

    fn weight(&self, key: ParamKey) -> Result<Weight, Error> {
        if self.training.trains(&key.to_string()) {
            let weight = parameter(self.values(key)?, self.shape(key), self.device);
            return Ok(Weight::Trained(weight));
        }
        let matrix = self.placed(vec![self.matrix(key)?])?.remove(0);
        Ok(Weight::Frozen(Frozen {
            matrix: Arc::new(matrix),
        }))
    }

    /// A matrix's values in f32.
    fn values(&self, key: ParamKey) -> Result<Vec<f32>, Error> {
        match self.source {
            WeightSource::Folder(folder) => {
                let stored = self.read(folder, key)?;
                let values = stored.to_f32();
                // They are not read again.
                checkpoint::advise_dontneed(stored.bytes());
                Ok(values)
            }
            WeightSource::Fresh(seed) => {
                let [rows, cols] = self.shape(key);
                let deviation = self.config.initializer_range;
                Ok(normal(seed, &key.to_string(), rows * cols, deviation))
            }
        }
    }

    pub(super) fn norm(
        &self,
        layer: impl Into<Option<usize>>,
        module: Module,
    ) -> Result<Norm, Error> {
        let key = ParamKey::weight(layer, module);
        let shape = key.shape(self.config);
        let len = shape.and_then(|shape| shape.first().copied());
        let len = len.expect("the caller asks for norms that the config has");
        let eps = match module {
            Module::QANorm | Module::KvANorm => LATENT_NORM_EPS,
            _ => self.config.rms_norm_eps,
        };
        Ok(Norm {
            weight: self.vector(&key.to_string(), len, 1.0)?,
            eps,
        })
    }

    /// A vector that is trained with the rest.
    fn vector(&self, key: &str, len: usize, fresh: f32) -> Result<Param<Tensor<1>>, Error> {
        let values = self.vector_values(key, len, fresh)?;
        if self.training.trains(key) {
            return Ok(parameter(values, [len], self.device));
        }
        let values = Tensor::from_floats(values.as_slice(), self.device);
        Ok(Param::initialized(ParamId::new(), values).set_require_grad(false))
    }

    fn vector_values(&self, key: &str, len: usize, fresh: f32) -> Result<Vec<f32>, Error> {
        let WeightSource::Folder(folder) = self.source else {
            return Ok(vec![fresh; len]);
        };
        let tensor = folder.tensor(key)?;
        tensor.expect_shape(&[len])?;
        Ok(tensor.to_f32()?)
    }
}

/// The weight of one projection of one expert.
fn expert_key(layer_idx: usize, expert: usize, projection: Projection) -> ParamKey {
    ParamKey::weight(layer_idx, Module::Expert(expert, projection))
}

/// Normal values of a given deviation, a function of the seed and the key (Box and Muller's method).
pub(crate) fn normal(seed: u64, key: &str, n: usize, deviation: f32) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed_for(seed, key));
    let mut open = || (f64::from(random.next_u32()) + 0.5) / 2f64.powi(32);
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        let (radius, angle) = (
            (-2.0 * open().ln()).sqrt(),
            2.0 * std::f64::consts::PI * open(),
        );
        values.extend(
            [radius * angle.cos(), radius * angle.sin()].map(|value| value as f32 * deviation),
        );
    }
    values.truncate(n);
    values
}
