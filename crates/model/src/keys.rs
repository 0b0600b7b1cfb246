//! The parameters of a model: their keys in a checkpoint, and their shapes by the config.
//!
//! The architecture is written here once. The loader, the exporters, precision and the visitors of modules speak of a
//! [`Module`] and ask here for its name and for the shape of its weight.

use std::fmt::{Display, Formatter};

use crate::config::{AttentionConfig, ModelConfig};

/// A parameter of a model, as a checkpoint names it: `model.layers.3.self_attn.o_proj.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamKey {
    /// The decoder layer it belongs to, if any. The layers of multi-token prediction come after the model's own.
    pub layer: Option<usize>,
    /// The module that has it.
    pub module: Module,
    /// Which of the module's tensors.
    pub part: ParamPart,
}

/// A module that has parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    /// The token embedding.
    Embedding,
    /// The norm after the last layer.
    FinalNorm,
    /// The output head.
    Head,
    /// The norm before attention.
    InputNorm,
    /// The norm before the feed-forward part.
    PostAttentionNorm,
    /// Queries.
    Q,
    /// Queries of latent attention, into the bottleneck.
    QA,
    /// The norm inside the bottleneck of queries.
    QANorm,
    /// Queries of latent attention, out of the bottleneck.
    QB,
    /// The latent, and the rotated key that all heads share.
    KvA,
    /// The norm of the latent.
    KvANorm,
    /// Keys and values of all heads, from the latent.
    KvB,
    /// The rows of [`Self::KvB`] that make keys, as a GGUF stores them.
    KvBKeys,
    /// The rows of [`Self::KvB`] that make values, as a GGUF stores them.
    KvBValues,
    /// Keys.
    K,
    /// Values.
    V,
    /// The output of attention.
    O,
    /// A projection of a dense feed-forward layer.
    Mlp(Projection),
    /// The router.
    Router,
    /// All routed experts of a layer together.
    Experts,
    /// A projection of one routed expert.
    Expert(usize, Projection),
    /// A projection of the shared experts, which are fused into one.
    SharedExperts(Projection),
    /// Multi-token prediction: its embedding, if it has one of its own.
    MtpEmbedding,
    /// Multi-token prediction: the norm of the embedded token.
    MtpTokenNorm,
    /// Multi-token prediction: the norm of the hidden state.
    MtpHiddenNorm,
    /// Multi-token prediction: token and hidden state into the layer.
    MtpInput,
    /// Multi-token prediction: the last norm.
    MtpNorm,
    /// Multi-token prediction: its output head, if it has one of its own.
    MtpHead,
}

/// A projection of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// What is activated.
    Gate,
    /// What the activation multiplies.
    Up,
    /// Back to the residual stream.
    Down,
}

/// A tensor of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParamPart {
    /// The weight.
    Weight,
    /// The bias.
    Bias,
    /// The router's bias, which takes part in choosing experts only.
    CorrectionBias,
    /// The block scales of an FP8 weight.
    BlockScales,
}

/// What the layers' names start with, before the layer's number.
const LAYERS: &str = "model.layers.";
/// What an expert's name starts with, before its number.
const EXPERTS: &str = "mlp.experts";
/// Names of the projections of a feed-forward layer.
pub(crate) const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// The path of the token embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
/// The path of the output head.
pub(crate) const HEAD: &str = "lm_head";

/// The names of modules outside of layers.
const OUTSIDE: [(Module, &str); 3] = [
    (Module::Embedding, EMBEDDING),
    (Module::FinalNorm, "model.norm"),
    (Module::Head, HEAD),
];

/// The names of modules inside a layer, except for feed-forward projections.
const INSIDE: [(Module, &str); 22] = [
    (Module::InputNorm, "input_layernorm"),
    (Module::PostAttentionNorm, "post_attention_layernorm"),
    (Module::Q, "self_attn.q_proj"),
    (Module::QA, "self_attn.q_a_proj"),
    (Module::QANorm, "self_attn.q_a_layernorm"),
    (Module::QB, "self_attn.q_b_proj"),
    (Module::KvA, "self_attn.kv_a_proj_with_mqa"),
    (Module::KvANorm, "self_attn.kv_a_layernorm"),
    (Module::KvB, "self_attn.kv_b_proj"),
    (Module::KvBKeys, "self_attn.k_b_proj"),
    (Module::KvBValues, "self_attn.v_b_proj"),
    (Module::K, "self_attn.k_proj"),
    (Module::V, "self_attn.v_proj"),
    (Module::O, "self_attn.o_proj"),
    (Module::Router, "mlp.gate"),
    (Module::Experts, EXPERTS),
    (Module::MtpEmbedding, "embed_tokens"),
    (Module::MtpTokenNorm, "enorm"),
    (Module::MtpHiddenNorm, "hnorm"),
    (Module::MtpInput, "eh_proj"),
    (Module::MtpNorm, "shared_head.norm"),
    (Module::MtpHead, "shared_head.head"),
];

const DENSE: &str = "mlp";
const SHARED: &str = "mlp.shared_experts";

impl ParamKey {
    /// The weight of a module.
    pub fn weight(layer: impl Into<Option<usize>>, module: Module) -> Self {
        Self {
            layer: layer.into(),
            module,
            part: ParamPart::Weight,
        }
    }

    /// The parameter that a checkpoint's key names; none if it is not one that we know.
    pub fn parse(key: &str) -> Option<Self> {
        let (path, suffix) = key.rsplit_once('.')?;
        let part = ParamPart::ALL.into_iter().find(|p| p.suffix() == suffix)?;
        let (layer, module) = Module::parse(path)?;
        Some(Self {
            layer,
            module,
            part,
        })
    }

    /// The same parameter of another module.
    #[must_use]
    pub fn with_module(self, module: Module) -> Self {
        Self { module, ..self }
    }

    /// The shape that it has in a model; none if a model of this config has no such parameter, or only its checkpoint knows.
    pub fn shape(&self, config: &ModelConfig) -> Option<Vec<usize>> {
        let weight = weight_shape(self.layer, self.module, config)?;
        let exists = match self.part {
            ParamPart::Weight => return Some(weight),
            ParamPart::Bias => {
                let gqa = match &config.attention {
                    AttentionConfig::Gqa(gqa) => Some(gqa),
                    AttentionConfig::Mla(_) => None,
                };
                match self.module {
                    Module::Q | Module::K | Module::V => gqa.is_some_and(|gqa| gqa.qkv_bias),
                    Module::O => gqa.is_some_and(|gqa| gqa.o_bias),
                    Module::Mlp(_) => config.mlp_bias,
                    _ => false,
                }
            }
            ParamPart::CorrectionBias => {
                let has_bias = config.moe.as_ref().is_some_and(|m| m.has_correction_bias);
                has_bias && self.module == Module::Router
            }
            ParamPart::BlockScales => false,
        };
        exists.then(|| vec![weight[0]])
    }
}

impl Display for ParamKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let path = self.module.path(self.layer);
        write!(f, "{path}.{}", self.part.suffix())
    }
}

impl ParamPart {
    const ALL: [Self; 4] = [
        Self::Weight,
        Self::Bias,
        Self::CorrectionBias,
        Self::BlockScales,
    ];

    /// The last component of its key.
    fn suffix(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
            Self::CorrectionBias => "e_score_correction_bias",
            Self::BlockScales => "weight_scale_inv",
        }
    }
}

impl Projection {
    /// All, in the order of the forward pass.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// The name of its module.
    pub fn name(self) -> &'static str {
        PROJECTIONS[self as usize]
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// The shape of its weight in a layer of some inner width.
    fn shape(self, inner: usize, hidden: usize) -> Vec<usize> {
        match self {
            Self::Gate | Self::Up => vec![inner, hidden],
            Self::Down => vec![hidden, inner],
        }
    }
}

impl Module {
    /// The layer and the module that a path names: `model.layers.3.self_attn.o_proj`.
    pub fn parse(path: &str) -> Option<(Option<usize>, Self)> {
        let named = |names: &[(Self, &str)], name: &str| {
            let known = names.iter().find(|known| known.1 == name);
            known.map(|known| known.0)
        };
        let Some(layer) = layer_of(path) else {
            return Some((None, named(&OUTSIDE, path)?));
        };
        let (_, name) = path[LAYERS.len()..].split_once('.')?;
        if let Some(module) = named(&INSIDE, name) {
            return Some((Some(layer), module));
        }
        let (owner, projection) = name.rsplit_once('.')?;
        let projection = Projection::parse(projection)?;
        let module = match owner {
            DENSE => Self::Mlp(projection),
            SHARED => Self::SharedExperts(projection),
            _ => {
                let (EXPERTS, expert) = owner.rsplit_once('.')? else {
                    return None;
                };
                Self::Expert(expert.parse().ok()?, projection)
            }
        };
        Some((Some(layer), module))
    }

    /// Its path in a model, or in a layer of it.
    pub fn path(self, layer: Option<usize>) -> String {
        let layer = layer.map_or(String::new(), |layer| format!("{LAYERS}{layer}."));
        match self {
            Self::Mlp(projection) => format!("{layer}{DENSE}.{}", projection.name()),
            Self::SharedExperts(projection) => format!("{layer}{SHARED}.{}", projection.name()),
            Self::Expert(expert, projection) => {
                format!("{layer}{EXPERTS}.{expert}.{}", projection.name())
            }
            _ => {
                let names = OUTSIDE.iter().chain(&INSIDE);
                let name = names.into_iter().find(|known| known.0 == self);
                format!("{layer}{}", name.map_or("", |known| known.1))
            }
        }
    }
}

/// The shape of a module's weight; none if a model of this config has no such module.
fn weight_shape(layer: Option<usize>, module: Module, config: &ModelConfig) -> Option<Vec<usize>> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let moe = config
        .moe
        .as_ref()
        .filter(|moe| layer.is_some_and(|layer| moe.is_moe_layer(layer)));
    match module {
        Module::Head if config.tie_word_embeddings => None,
        Module::Embedding | Module::Head | Module::MtpEmbedding | Module::MtpHead => {
            Some(vec![vocab, hidden])
        }
        Module::FinalNorm
        | Module::InputNorm
        | Module::PostAttentionNorm
        | Module::MtpTokenNorm
        | Module::MtpHiddenNorm
        | Module::MtpNorm => Some(vec![hidden]),
        Module::MtpInput => Some(vec![hidden, 2 * hidden]),
        Module::Mlp(projection) => match moe {
            None => Some(projection.shape(config.intermediate_size, hidden)),
            Some(_) => None,
        },
        Module::Router => Some(vec![moe?.n_routed_experts, hidden]),
        Module::Experts => None,
        Module::Expert(expert, projection) => {
            let moe = moe.filter(|moe| expert < moe.n_routed_experts)?;
            Some(projection.shape(moe.moe_intermediate_size, hidden))
        }
        Module::SharedExperts(projection) => {
            let moe = moe.filter(|moe| moe.n_shared_experts > 0)?;
            Some(projection.shape(moe.n_shared_experts * moe.moe_intermediate_size, hidden))
        }
        _ => attention_shape(module, config),
    }
}

/// [`weight_shape`] of a module of attention.
fn attention_shape(module: Module, config: &ModelConfig) -> Option<Vec<usize>> {
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    let shape = match &config.attention {
        AttentionConfig::Mla(mla) => {
            let (latent, q_width) = (mla.kv_lora_rank, heads * mla.qk_head_dim());
            match (module, mla.q_lora_rank) {
                (Module::Q, None) => vec![q_width, hidden],
                (Module::QA, Some(q_rank)) => vec![q_rank, hidden],
                (Module::QANorm, Some(q_rank)) => vec![q_rank],
                (Module::QB, Some(q_rank)) => vec![q_width, q_rank],
                (Module::KvA, _) => vec![latent + mla.qk_rope_head_dim, hidden],
                (Module::KvANorm, _) => vec![latent],
                (Module::KvB, _) => {
                    vec![heads * (mla.qk_nope_head_dim + mla.v_head_dim), latent]
                }
                (Module::O, _) => vec![hidden, heads * mla.v_head_dim],
                _ => return None,
            }
        }
        AttentionConfig::Gqa(gqa) => {
            let q_width = heads * gqa.head_dim;
            match module {
                Module::Q => vec![q_width, hidden],
                Module::K | Module::V => vec![gqa.num_key_value_heads * gqa.head_dim, hidden],
                Module::O => vec![hidden, q_width],
                _ => return None,
            }
        }
    };
    Some(shape)
}

/// The keys and shapes of all tensors that a model of this config has, block scales left out.
pub fn keys(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let outside = |module| with_shape(ParamKey::weight(None, module), config);
    let layers = 0..config.num_hidden_layers;
    let mut keys = Vec::new();
    keys.extend(outside(Module::Embedding));
    keys.extend(layers.flat_map(|layer_idx| layer_keys(config, layer_idx)));
    keys.extend(outside(Module::FinalNorm));
    keys.extend(outside(Module::Head));
    keys
}

/// Those of a layer.
pub(crate) fn layer_keys(
    config: &ModelConfig,
    layer_idx: usize,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    /// What comes before the feed-forward part, in the order in which files are written.
    const ATTENTION: [(Module, ParamPart); 17] = [
        (Module::InputNorm, ParamPart::Weight),
        (Module::PostAttentionNorm, ParamPart::Weight),
        (Module::Q, ParamPart::Weight),
        (Module::QA, ParamPart::Weight),
        (Module::QANorm, ParamPart::Weight),
        (Module::QB, ParamPart::Weight),
        (Module::KvA, ParamPart::Weight),
        (Module::KvANorm, ParamPart::Weight),
        (Module::KvB, ParamPart::Weight),
        (Module::K, ParamPart::Weight),
        (Module::V, ParamPart::Weight),
        (Module::Q, ParamPart::Bias),
        (Module::K, ParamPart::Bias),
        (Module::V, ParamPart::Bias),
        (Module::O, ParamPart::Weight),
        (Module::O, ParamPart::Bias),
        (Module::Router, ParamPart::Weight),
    ];
    let experts = config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts);
    let experts = (0..experts).flat_map(|expert| {
        let of_expert = Projection::ALL.map(|projection| Module::Expert(expert, projection));
        of_expert.map(|module| (module, ParamPart::Weight))
    });
    let parts_of = |of: fn(Projection) -> Module, part| Projection::ALL.map(|p| (of(p), part));
    let parts = ATTENTION
        .into_iter()
        .chain([(Module::Router, ParamPart::CorrectionBias)])
        .chain(parts_of(Module::Mlp, ParamPart::Weight))
        .chain(parts_of(Module::Mlp, ParamPart::Bias))
        .chain(experts)
        .chain(parts_of(Module::SharedExperts, ParamPart::Weight));
    parts.filter_map(move |(module, part)| {
        let layer = Some(layer_idx);
        with_shape(
            ParamKey {
                layer,
                module,
                part,
            },
            config,
        )
    })
}

/// A key with its shape, if a model of this config has it.
pub(crate) fn with_shape(key: ParamKey, config: &ModelConfig) -> Option<(String, Vec<usize>)> {
    Some((key.to_string(), key.shape(config)?))
}

/// The number of the layer that a path or key lies in.
pub fn layer_of(path: &str) -> Option<usize> {
    path.strip_prefix(LAYERS)?.split('.').next()?.parse().ok()
}

/// The key of a weight's block scales. Despite its name (`_inv`), they multiply.
pub fn scale_key(key: &str) -> String {
    format!("{key}_scale_inv")
}

/// Whether a key is that of block scales.
pub(crate) fn is_scale(key: &str) -> bool {
    key.ends_with(".weight_scale_inv")
}

/// The key of the weight that block scales are of; any other key as it is.
pub(crate) fn weight_of_scale(key: &str) -> &str {
    key.strip_suffix("_scale_inv").unwrap_or(key)
}

/// A seed for what has this name, so that its random values do not depend on what else there is: FNV-1a of the name.
pub fn seed_for(seed: u64, name: &str) -> u64 {
    seed ^ checkpoint::fnv1a(0, name.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_read_as_what_it_was_written_for() {
        for name in ["deepseek_v2_lite", "deepseek_v3", "qwen2_distill"] {
            let path = crate::goldens::path(name).join("config.json");
            let json = std::fs::read_to_string(&path).unwrap();
            let json = serde_json::from_str(&json).unwrap();
            let config = ModelConfig::from_json(&json, &path).unwrap();
            for (key, shape) in keys(&config) {
                let parsed = ParamKey::parse(&key).unwrap();
                assert_eq!(parsed.to_string(), key);
                assert_eq!(parsed.shape(&config), Some(shape), "{key}");
            }
        }
    }

    #[test]
    fn other_names_are_no_keys() {
        for key in [
            "model.layers.1.self_attn.indexer.wk.weight",
            "model.layers.1.mlp.experts.x.up_proj.weight",
            "model.layers.1.mlp.experts.up_proj.weight",
            "model.layers.1.lm_head.weight",
            "self_attn.o_proj.weight",
            "lm_head",
        ] {
            assert_eq!(ParamKey::parse(key), None, "{key}");
        }
        assert_eq!(layer_of("model.layers.12.mlp"), Some(12));
        assert_eq!(layer_of("lm_head.weight"), None);
    }
}
