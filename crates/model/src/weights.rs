//! From a checkpoint's tensors to a model, and back. The only place that knows foreign shapes.
//!
//! Frozen weights stay mapped in their published bytes; a trained model converts each weight to f32 once. Fresh models
//! are built by the same walk, from a seed instead of a file: a weight's values depend on the seed and its key alone.

mod mtp;
mod stored;

use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor};
use checkpoint::{DType, Folder};
use kernels::{ExpertBank, Matrix, fp8};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

pub(crate) use self::mtp::mtp_keys;
pub use self::mtp::{fresh_mtp, load_mtp};
use self::stored::whole_name;
pub(crate) use self::stored::{is_scale, read_tensor, weight_names};
pub use self::stored::{read_matrix, scale_key};
use crate::Error;
use crate::attention::{Attention, Gqa, Mla};
use crate::config::{AttentionConfig, GqaConfig, MlaConfig, ModelConfig, MoeConfig};
use crate::decoder::{Decoder, DecoderLayer, Embedding, FeedForward, Model};
use crate::linear::{Frozen, Linear, Weight};
use crate::lora::parameter;
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::moe::experts::{Chosen, ExpertWeights, Experts, FrozenBank, PartlyTrained, Stacks};
use crate::moe::router::Router;
use crate::norm::Norm;
use crate::sites::{PROJECTIONS, matches};

/// Epsilon of the norms inside latent attention, whatever the config says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Which of a model's own weights change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Training {
    /// They stay in their published bytes; adapters may be trained on them.
    Frozen,
    /// All are trained, in f32.
    Full,
    /// Those whose keys match a pattern of the first list and none of the second; see [`matches()`].
    Chosen(Vec<String>, Vec<String>),
}

impl Training {
    fn trains(&self, key: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, key));
        match self {
            Self::Frozen => false,
            Self::Full => true,
            Self::Chosen(patterns, but) => any(patterns) && !any(but),
        }
    }

    /// Refuses a pattern that chooses no tensor.
    fn check(&self, config: &ModelConfig) -> Result<(), Error> {
        let Self::Chosen(patterns, _) = self else {
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
    let config = read_config(folder)?;
    training.check(&config)?;
    Builder {
        source: Source::Folder(folder),
        training,
        config: &config,
        device,
    }
    .model()
}

/// A model with fresh weights: normal with the config's `initializer_range`, norms one, biases zero. Those that are not
/// trained are held in f32.
///
/// # Errors
/// If a pattern of what is trained chooses nothing.
pub fn fresh(
    config: &ModelConfig,
    training: Training,
    seed: u64,
    device: &Device,
) -> Result<Model, Error> {
    training.check(config)?;
    Builder {
        source: Source::Fresh(seed),
        training,
        config,
        device,
    }
    .model()
}

/// The architecture of a checkpoint.
///
/// # Errors
/// If the config is not one we compute.
pub fn read_config(folder: &Folder) -> Result<ModelConfig, Error> {
    let mut config = ModelConfig::from_json(folder.config(), &folder.config_path())?;
    // A config may be silent about its scales; their dtype is not.
    if has_e8m0_scales(folder)? {
        config.fp8_scales = fp8::Scales::PowerOfTwo;
    }
    Ok(config)
}

/// Whether the block scales of a checkpoint are stored as powers of two; not if it has none.
pub(crate) fn has_e8m0_scales(folder: &Folder) -> Result<bool, Error> {
    match folder.names().find(|name| is_scale(name)) {
        Some(name) => Ok(folder.stored(name)?.dtype == DType::F8E8M0),
        None => Ok(false),
    }
}

/// Which of a checkpoint's tensors a model uses, and which it does not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Audit {
    /// Tensors the model reads.
    pub used: Vec<String>,
    /// Tensors of multi-token-prediction layers: no part of the model, but carried into every folder that is written; see
    /// [`load_mtp`].
    pub mtp: Vec<String>,
    /// Tensors that nothing here knows.
    pub unknown: Vec<String>,
}

/// Sorts a checkpoint's tensors by their use.
///
/// # Errors
/// If the config is not one we compute.
pub fn audit(folder: &Folder) -> Result<Audit, Error> {
    let config = read_config(folder)?;
    let used: std::collections::BTreeSet<String> =
        keys(&config).into_iter().map(|(key, _)| key).collect();
    let mut audit = Audit::default();
    for name in folder.names() {
        let weight = whole_name(name.strip_suffix("_scale_inv").unwrap_or(name));
        let layer = name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let mtp =
            config.num_hidden_layers..config.num_hidden_layers + config.num_nextn_predict_layers;
        let list = match layer {
            _ if used.contains(&*weight) => &mut audit.used,
            Some(layer) if mtp.contains(&layer) => &mut audit.mtp,
            _ => &mut audit.unknown,
        };
        list.push(name.into());
    }
    Ok(audit)
}

/// The keys and shapes of all tensors a model of this config has, scales left out.
pub fn keys(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut keys = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    keys.extend((0..config.num_hidden_layers).flat_map(|layer_idx| layer_keys(config, layer_idx)));
    keys.push(("model.norm.weight".into(), vec![hidden]));
    if !config.tie_word_embeddings {
        keys.push(("lm_head.weight".into(), vec![vocab, hidden]));
    }
    keys
}

/// Those of a layer.
fn layer_keys(config: &ModelConfig, layer_idx: usize) -> Vec<(String, Vec<usize>)> {
    let (hidden, mut keys) = (config.hidden_size, Vec::new());
    let mut add = |key: String, shape: &[usize]| keys.push((key, shape.to_vec()));
    let at = |name: &str| format!("model.layers.{layer_idx}.{name}");
    add(at("input_layernorm.weight"), &[hidden]);
    add(at("post_attention_layernorm.weight"), &[hidden]);
    for (name, shape) in attention_keys(config) {
        add(at(&format!("self_attn.{name}")), &shape);
    }
    let mlp = |prefix: &str, width: usize| {
        PROJECTIONS.map(|projection| {
            let shape = if projection == "down_proj" {
                [hidden, width]
            } else {
                [width, hidden]
            };
            (at(&format!("{prefix}.{projection}.weight")), shape)
        })
    };
    let Some(moe) = config
        .moe
        .as_ref()
        .filter(|moe| moe.is_moe_layer(layer_idx))
    else {
        mlp("mlp", config.intermediate_size)
            .into_iter()
            .for_each(|(key, shape)| add(key, &shape));
        return keys;
    };
    add(at("mlp.gate.weight"), &[moe.n_routed_experts, hidden]);
    if moe.has_correction_bias {
        add(
            at("mlp.gate.e_score_correction_bias"),
            &[moe.n_routed_experts],
        );
    }
    for expert in 0..moe.n_routed_experts {
        mlp(&format!("mlp.experts.{expert}"), moe.moe_intermediate_size)
            .into_iter()
            .for_each(|(key, shape)| add(key, &shape));
    }
    if moe.n_shared_experts > 0 {
        let width = moe.n_shared_experts * moe.moe_intermediate_size;
        mlp("mlp.shared_experts", width)
            .into_iter()
            .for_each(|(key, shape)| add(key, &shape));
    }
    keys
}

fn attention_keys(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    let weight = |name: &str, shape: [usize; 2]| (format!("{name}.weight"), shape.to_vec());
    match &config.attention {
        AttentionConfig::Mla(mla) => {
            let (rank, q_width) = (mla.kv_lora_rank, heads * mla.qk_head_dim());
            let mut keys = match mla.q_lora_rank {
                None => vec![weight("q_proj", [q_width, hidden])],
                Some(q_rank) => vec![
                    weight("q_a_proj", [q_rank, hidden]),
                    ("q_a_layernorm.weight".into(), vec![q_rank]),
                    weight("q_b_proj", [q_width, q_rank]),
                ],
            };
            keys.push(weight(
                "kv_a_proj_with_mqa",
                [rank + mla.qk_rope_head_dim, hidden],
            ));
            keys.push(("kv_a_layernorm.weight".into(), vec![rank]));
            keys.push(weight(
                "kv_b_proj",
                [heads * (mla.qk_nope_head_dim + mla.v_head_dim), rank],
            ));
            keys.push(weight("o_proj", [hidden, heads * mla.v_head_dim]));
            keys
        }
        AttentionConfig::Gqa(gqa) => {
            let (q_width, kv_width) =
                (heads * gqa.head_dim, gqa.num_key_value_heads * gqa.head_dim);
            let widths = [
                ("q_proj", q_width),
                ("k_proj", kv_width),
                ("v_proj", kv_width),
            ];
            let mut keys: Vec<_> = widths
                .iter()
                .map(|(name, width)| weight(name, [*width, hidden]))
                .collect();
            if gqa.qkv_bias {
                keys.extend(
                    widths
                        .iter()
                        .map(|(name, width)| (format!("{name}.bias"), vec![*width])),
                );
            }
            keys.push(weight("o_proj", [hidden, q_width]));
            keys
        }
    }
}

/// Where weights come from.
enum Source<'a> {
    Folder(&'a Folder),
    Fresh(u64),
}

/// Walks the architecture and makes each part.
struct Builder<'a> {
    source: Source<'a>,
    training: Training,
    config: &'a ModelConfig,
    device: &'a Device,
}

impl Builder<'_> {
    fn model(&self) -> Result<Model, Error> {
        let config = self.config;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed_tokens = Embedding {
            weight: self.weight("model.embed_tokens.weight", [vocab, hidden])?,
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer_idx| self.layer(layer_idx))
            .collect::<Result<_, _>>()?;
        let norm = self.norm("model.norm", hidden, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(self.linear("lm_head", [vocab, hidden])?)
        };
        Ok(Model {
            model: Decoder {
                embed_tokens,
                layers,
                norm,
            },
            lm_head,
            config: config.clone(),
        })
    }

    fn layer(&self, layer_idx: usize) -> Result<DecoderLayer, Error> {
        let (config, at) = (self.config, format!("model.layers.{layer_idx}"));
        let self_attn = match &config.attention {
            AttentionConfig::Mla(mla) => Attention::Mla(self.mla(&format!("{at}.self_attn"), mla)?),
            AttentionConfig::Gqa(gqa) => Attention::Gqa(self.gqa(&format!("{at}.self_attn"), gqa)?),
        };
        let mlp = match config
            .moe
            .as_ref()
            .filter(|moe| moe.is_moe_layer(layer_idx))
        {
            Some(moe) => FeedForward::Moe(self.moe(&format!("{at}.mlp"), moe)?),
            None => FeedForward::Dense(self.mlp(&format!("{at}.mlp"), config.intermediate_size)?),
        };
        Ok(DecoderLayer {
            input_layernorm: self.norm(
                &format!("{at}.input_layernorm"),
                config.hidden_size,
                config.rms_norm_eps,
            )?,
            self_attn,
            post_attention_layernorm: self.norm(
                &format!("{at}.post_attention_layernorm"),
                config.hidden_size,
                config.rms_norm_eps,
            )?,
            mlp,
        })
    }

    fn mla(&self, at: &str, mla: &MlaConfig) -> Result<Mla, Error> {
        let (hidden, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let (rank, q_width) = (mla.kv_lora_rank, heads * mla.qk_head_dim());
        let linear = |name: &str, shape| self.linear(&format!("{at}.{name}"), shape);
        let norm = |name: &str, width| self.norm(&format!("{at}.{name}"), width, LATENT_NORM_EPS);
        Ok(Mla {
            q_proj: if mla.q_lora_rank.is_none() {
                Some(linear("q_proj", [q_width, hidden])?)
            } else {
                None
            },
            q_a_proj: mla
                .q_lora_rank
                .map(|q_rank| linear("q_a_proj", [q_rank, hidden]))
                .transpose()?,
            q_a_layernorm: mla
                .q_lora_rank
                .map(|q_rank| norm("q_a_layernorm", q_rank))
                .transpose()?,
            q_b_proj: mla
                .q_lora_rank
                .map(|q_rank| linear("q_b_proj", [q_width, q_rank]))
                .transpose()?,
            kv_a_proj_with_mqa: linear(
                "kv_a_proj_with_mqa",
                [rank + mla.qk_rope_head_dim, hidden],
            )?,
            kv_a_layernorm: norm("kv_a_layernorm", rank)?,
            kv_b_proj: linear(
                "kv_b_proj",
                [heads * (mla.qk_nope_head_dim + mla.v_head_dim), rank],
            )?,
            o_proj: linear("o_proj", [hidden, heads * mla.v_head_dim])?,
            config: mla.clone(),
            heads,
            softmax_scale: self.config.rope.softmax_scale(mla.qk_head_dim()),
            layout: self.config.rope.layout,
        })
    }

    fn gqa(&self, at: &str, gqa: &GqaConfig) -> Result<Gqa, Error> {
        let (hidden, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let biased = |name: &str, out| {
            let mut linear = self.linear(&format!("{at}.{name}"), [out, hidden])?;
            if gqa.qkv_bias {
                linear.bias = Some(self.vector(&format!("{at}.{name}.bias"), out, 0.0)?);
            }
            Ok::<_, Error>(linear)
        };
        let kv_width = gqa.num_key_value_heads * gqa.head_dim;
        Ok(Gqa {
            q_proj: biased("q_proj", heads * gqa.head_dim)?,
            k_proj: biased("k_proj", kv_width)?,
            v_proj: biased("v_proj", kv_width)?,
            o_proj: self.linear(&format!("{at}.o_proj"), [hidden, heads * gqa.head_dim])?,
            config: gqa.clone(),
            heads,
            softmax_scale: self.config.rope.softmax_scale(gqa.head_dim),
            layout: self.config.rope.layout,
        })
    }

    fn mlp(&self, at: &str, inner: usize) -> Result<Mlp, Error> {
        let hidden = self.config.hidden_size;
        Ok(Mlp {
            gate_proj: self.linear(&format!("{at}.gate_proj"), [inner, hidden])?,
            up_proj: self.linear(&format!("{at}.up_proj"), [inner, hidden])?,
            down_proj: self.linear(&format!("{at}.down_proj"), [hidden, inner])?,
        })
    }

    fn moe(&self, at: &str, moe: &MoeConfig) -> Result<Moe, Error> {
        let shared = moe.n_shared_experts * moe.moe_intermediate_size;
        let bias = format!("{at}.gate.e_score_correction_bias");
        Ok(Moe {
            gate: self.linear(
                &format!("{at}.gate"),
                [moe.n_routed_experts, self.config.hidden_size],
            )?,
            router: Router {
                e_score_correction_bias: if moe.has_correction_bias {
                    Some(self.constant(&bias, moe.n_routed_experts)?)
                } else {
                    None
                },
                config: moe.clone(),
                n_prefetch: 0,
            },
            experts: self.experts(&format!("{at}.experts"), moe)?,
            shared_experts: if shared > 0 {
                Some(self.mlp(&format!("{at}.shared_experts"), shared)?)
            } else {
                None
            },
        })
    }

    fn experts(&self, at: &str, moe: &MoeConfig) -> Result<Experts, Error> {
        let n = moe.n_routed_experts;
        let key = |expert: usize, projection: &str| format!("{at}.{expert}.{projection}.weight");
        let trains = |expert: usize, projection| self.training.trains(&key(expert, projection));
        let [gate, up, down] = PROJECTIONS.map(|projection| {
            (0..n)
                .filter(|expert| trains(*expert, projection))
                .collect::<Vec<_>>()
        });
        let chosen = [&gate, &up, &down]
            .into_iter()
            .find(|chosen| !chosen.is_empty());
        let is_even = |numbers: &&Vec<usize>| numbers.is_empty() || Some(*numbers) == chosen;
        if ![&gate, &up, &down].iter().all(is_even) {
            return Err(Error::Unsupported(format!(
                "`{at}`: {} experts' gate_proj are to be trained, {} up_proj and {} down_proj; choose the same \
                 experts for every projection, or none",
                gate.len(),
                up.len(),
                down.len()
            )));
        }
        let weights = match chosen {
            None => ExpertWeights::Frozen(FrozenBank {
                bank: self.bank(at, moe)?,
            }),
            Some(_) if self.training == Training::Full => {
                let all: Vec<usize> = (0..n).collect();
                ExpertWeights::Trained(self.stacks(at, moe, &all)?)
            }
            Some(numbers) => ExpertWeights::Partly(PartlyTrained {
                bank: self.bank(at, moe)?,
                trained: self.stacks(at, moe, numbers)?,
            }),
        };
        let chosen = match &weights {
            ExpertWeights::Partly(partly) => {
                chosen.map(|numbers| Chosen::new(numbers.clone(), &partly.bank))
            }
            _ => None,
        };
        Ok(Experts {
            weights,
            lora: None,
            quantizer: None,
            chosen,
        })
    }

    /// Views of a layer's experts in their published bytes.
    fn bank(&self, at: &str, moe: &MoeConfig) -> Result<Arc<ExpertBank>, Error> {
        let (inner, hidden) = (moe.moe_intermediate_size, self.config.hidden_size);
        let bank = |projection: &str, shape| {
            let key = |expert| format!("{at}.{expert}.{projection}.weight");
            (0..moe.n_routed_experts)
                .into_par_iter()
                .map(|expert| self.matrix(&key(expert), shape))
                .collect::<Result<Vec<_>, _>>()
        };
        let [gate, up, down] = PROJECTIONS;
        Ok(Arc::new(ExpertBank::new(
            bank(gate, [inner, hidden])?,
            bank(up, [inner, hidden])?,
            bank(down, [hidden, inner])?,
        )))
    }

    /// The values of some experts, each projection trained if it is chosen.
    fn stacks(&self, at: &str, moe: &MoeConfig, numbers: &[usize]) -> Result<Stacks, Error> {
        let (inner, hidden) = (moe.moe_intermediate_size, self.config.hidden_size);
        let stack = |projection: &str, [out, width]: [usize; 2]| {
            let key = |expert: usize| format!("{at}.{expert}.{projection}.weight");
            let mut values = Vec::with_capacity(numbers.len() * out * width);
            for expert in numbers {
                values.extend(self.values(&key(*expert), [out, width])?);
            }
            let trains = self.training.trains(&key(numbers[0]));
            let stack = parameter(values, [numbers.len(), out, width], self.device);
            Ok::<_, Error>(if trains {
                stack
            } else {
                stack.set_require_grad(false)
            })
        };
        let [gate, up, down] = PROJECTIONS;
        Ok(Stacks {
            gate_proj: stack(gate, [inner, hidden])?,
            up_proj: stack(up, [inner, hidden])?,
            down_proj: stack(down, [hidden, inner])?,
        })
    }

    /// A weight in its published bytes; a fresh one in f32.
    fn matrix(&self, key: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        match self.source {
            Source::Folder(folder) => read_matrix(folder, key, shape, self.config.fp8_block),
            Source::Fresh(_) => Ok(Matrix::from_f32(
                shape[0],
                shape[1],
                &self.values(key, shape)?,
            )),
        }
    }

    fn linear(&self, at: &str, shape: [usize; 2]) -> Result<Linear, Error> {
        Ok(Linear {
            weight: self.weight(&format!("{at}.weight"), shape)?,
            bias: None,
            lora: None,
            quantizer: None,
        })
    }

    fn weight(&self, key: &str, shape: [usize; 2]) -> Result<Weight, Error> {
        if self.training.trains(key) {
            let values = self.values(key, shape)?;
            return Ok(Weight::Trained(parameter(values, shape, self.device)));
        }
        let matrix = Arc::new(self.matrix(key, shape)?);
        Ok(Weight::Frozen(Frozen { matrix }))
    }

    /// A matrix's values in f32.
    fn values(&self, key: &str, [out, width]: [usize; 2]) -> Result<Vec<f32>, Error> {
        match self.source {
            Source::Folder(folder) => {
                Ok(read_matrix(folder, key, [out, width], self.config.fp8_block)?.to_f32())
            }
            Source::Fresh(seed) => Ok(normal(
                seed,
                key,
                out * width,
                self.config.initializer_range,
            )),
        }
    }

    fn norm(&self, at: &str, width: usize, eps: f32) -> Result<Norm, Error> {
        Ok(Norm {
            weight: self.vector(&format!("{at}.weight"), width, 1.0)?,
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

    /// A vector that never has a gradient.
    fn constant(&self, key: &str, len: usize) -> Result<Tensor<1>, Error> {
        Ok(Tensor::from_floats(
            self.vector_values(key, len, 0.0)?.as_slice(),
            self.device,
        ))
    }

    fn vector_values(&self, key: &str, len: usize, fresh: f32) -> Result<Vec<f32>, Error> {
        let Source::Folder(folder) = self.source else {
            return Ok(vec![fresh; len]);
        };
        let tensor = folder.tensor(key)?;
        tensor.expect_shape(&[len])?;
        Ok(tensor.to_f32()?)
    }
}

/// Normal values of a given deviation, a function of the seed and the key (Box and Muller's method).
fn normal(seed: u64, key: &str, n: usize, deviation: f32) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(crate::lora::mixed_seed(seed, key));
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

/// The checkpoint keys a trained tensor of a model stands for, each with its part of the flat values. Empty for adapters.
pub fn parameter_keys(
    parameter: &str,
    len: usize,
    model: &Model,
) -> Vec<(String, std::ops::Range<usize>)> {
    if parameter.contains(".lora.") {
        return vec![];
    }
    // Field names are keys, except for stacked experts: `….experts.weights.up_proj` holds all of them, and
    // `….experts.weights.trained.up_proj` some.
    let Some((layer, projection)) = parameter.split_once(".experts.weights.") else {
        return vec![(parameter.into(), 0..len)];
    };
    let projection = projection.strip_prefix("trained.").unwrap_or(projection);
    let numbers = model.expert_numbers(layer);
    let size = len / numbers.len().max(1);
    let key = |expert| format!("{layer}.experts.{expert}.{projection}.weight");
    let parts = (0..).zip(numbers);
    parts
        .map(|(place, expert)| (key(expert), place * size..(place + 1) * size))
        .collect()
}
