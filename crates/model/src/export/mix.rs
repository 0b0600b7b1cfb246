//! The type of every tensor of a GGUF.
//!
//! A name like `q4_k_m` stands for the type of most matrices and for rules by which some get another: matrices with a large
//! effect for their size get more bits. Norms, routers and biases stay in f32. The rules are llama.cpp's, so that our files
//! have the size that its users expect. If rows are not whole blocks, a similar type with smaller blocks takes its place.
//!
//! Source: ggml-org/llama.cpp: src/llama-quant.cpp, `llama_tensor_get_type_impl` and `tensor_type_fallback`.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use checkpoint::{DType, GgufTensor, RowOrder};
use kernels::Ggml;

use super::importance::Importance;
use super::weight_format::encode;
use crate::config::{AttentionConfig, Family, ModelConfig};
use crate::keys::{Module, ParamKey, ParamPart, Projection};

/// The type of a tensor that we write into a GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision, or blocks.
    Ggml(Ggml),
}

impl GgufType {
    /// As files name it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::Ggml(format) => match format {
                Ggml::F16 => DType::F16,
                Ggml::Q8_0 => DType::Q8_0,
                Ggml::Q5_0 => DType::Q5_0,
                Ggml::Q5_1 => DType::Q5_1,
                Ggml::Q4_0 => DType::Q4_0,
                Ggml::Q4_1 => DType::Q4_1,
                Ggml::Q6K => DType::Q6K,
                Ggml::Q5K => DType::Q5K,
                Ggml::Q4K => DType::Q4K,
                Ggml::Q3K => DType::Q3K,
                Ggml::Q2K => DType::Q2K,
                Ggml::Iq4Nl => DType::Iq4Nl,
                Ggml::MxFp4 => DType::MxFp4,
            },
        }
    }

    /// Encodes a row, by the importance of its columns if it is known.
    ///
    /// # Panics
    /// If `out` is not as long as the blocks of `values`.
    pub(crate) fn encode(self, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        match (self, importance) {
            (Self::Ggml(format), Some(importance)) => {
                format.encode_weighted(values, importance, out);
            }
            (Self::Ggml(format), None) => format.encode(values, out),
            (Self::F32, _) => out.copy_from_slice(&encode(DType::F32, values)),
            (Self::Bf16, _) => out.copy_from_slice(&encode(DType::BF16, values)),
        }
    }

    /// This type, or one whose blocks fill rows of this width.
    fn for_width(self, width: usize) -> Self {
        match self {
            Self::F32 | Self::Bf16 => self,
            Self::Ggml(format) => Self::Ggml(format.for_width(width)),
        }
    }

    /// As users name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Ggml(format) => format.name(),
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        let formats = Ggml::WRITTEN.into_iter().map(Self::Ggml);
        [Self::F32, Self::Bf16].into_iter().chain(formats)
    }
}

impl FromStr for GgufType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |of: Self| of.name() == text;
        Self::all().find(|of| known(*of)).ok_or_else(|| {
            let known: Vec<_> = Self::all().map(Self::name).collect();
            let found: String = text.chars().filter(|c| !c.is_control()).take(40).collect();
            format!("expected one of {}, found `{found}`", known.join(", "))
        })
    }
}

/// A way to give every tensor a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixScheme {
    /// One type for all matrices; if it has blocks and is not `q8_0`, the head gets [`Ggml::Q6K`].
    Plain(GgufType),
    /// `q3_k_m`.
    Q3KM,
    /// `q4_k_s`.
    Q4KS,
    /// `q4_k_m`.
    Q4KM,
    /// `q5_k_m`.
    Q5KM,
}

impl MixScheme {
    const MIXED: [(Self, &'static str, Ggml); 4] = [
        (Self::Q3KM, "q3_k_m", Ggml::Q3K),
        (Self::Q4KS, "q4_k_s", Ggml::Q4K),
        (Self::Q4KM, "q4_k_m", Ggml::Q4K),
        (Self::Q5KM, "q5_k_m", Ggml::Q5K),
    ];

    /// All, from many bits to few.
    pub fn all() -> Vec<Self> {
        let plain = GgufType::all().map(Self::Plain);
        plain.chain(Self::MIXED.map(|mixed| mixed.0)).collect()
    }

    /// The type of most matrices.
    pub(crate) fn most(self) -> GgufType {
        match self {
            Self::Plain(of) => of,
            _ => Self::MIXED
                .into_iter()
                .find(|mixed| mixed.0 == self)
                .map_or(GgufType::F32, |mixed| GgufType::Ggml(mixed.2)),
        }
    }

    /// `general.file_type`: a hint for people, by which tools name a file.
    pub fn file_type(self) -> u32 {
        match self {
            Self::Plain(GgufType::F32) => 0,
            Self::Plain(GgufType::Bf16) => 32,
            Self::Plain(GgufType::Ggml(format)) => match format {
                Ggml::F16 => 1,
                Ggml::Q4_0 => 2,
                Ggml::Q4_1 => 3,
                Ggml::Q8_0 => 7,
                Ggml::Q5_0 => 8,
                Ggml::Q5_1 => 9,
                Ggml::Q2K => 10,
                Ggml::Q3K => 11,
                Ggml::Q4K => 14,
                Ggml::Q5K => 16,
                Ggml::Q6K => 18,
                Ggml::Iq4Nl => 25,
                Ggml::MxFp4 => 38,
            },
            Self::Q3KM => 12,
            Self::Q4KS => 14,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
        }
    }
}

impl Display for MixScheme {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mixed = Self::MIXED.iter().find(|mixed| mixed.0 == *self);
        f.write_str(mixed.map_or_else(|| self.most().name(), |mixed| mixed.1))
    }
}

/// The parts of a model that may have a type of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixPart {
    /// The routed experts.
    Experts,
    /// The shared experts.
    Shared,
    /// Attention.
    Attention,
    /// Dense feed-forward layers.
    Dense,
    /// The embedding.
    Embedding,
    /// The output head.
    Head,
    /// Multi-token prediction, except for the layer in it.
    Mtp,
}

impl MixPart {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Experts, "experts"),
        (Self::Shared, "shared"),
        (Self::Attention, "attn"),
        (Self::Dense, "ffn"),
        (Self::Embedding, "embed"),
        (Self::Head, "head"),
        (Self::Mtp, "mtp"),
    ];

    /// The part that a parameter belongs to, if its type is a matter of choice.
    fn of(key: ParamKey) -> Option<Self> {
        if key.part != ParamPart::Weight {
            return None;
        }
        match key.module {
            Module::Embedding => Some(Self::Embedding),
            Module::Head => Some(Self::Head),
            Module::Q
            | Module::QA
            | Module::QB
            | Module::KvA
            | Module::KvB
            | Module::KvBKeys
            | Module::KvBValues
            | Module::K
            | Module::V
            | Module::O => Some(Self::Attention),
            Module::Mlp(_) => Some(Self::Dense),
            Module::Experts | Module::Expert(..) => Some(Self::Experts),
            Module::SharedExperts(_) => Some(Self::Shared),
            Module::MtpEmbedding | Module::MtpInput | Module::MtpHead => Some(Self::Mtp),
            Module::FinalNorm
            | Module::InputNorm
            | Module::PostAttentionNorm
            | Module::QANorm
            | Module::KvANorm
            | Module::Router
            | Module::MtpTokenNorm
            | Module::MtpHiddenNorm
            | Module::MtpNorm => None,
        }
    }
}

/// A scheme, and the parts of a model that have another type.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// The types.
    pub scheme: MixScheme,
    /// Parts with a type of their own.
    pub parts: Vec<(MixPart, GgufType)>,
    /// The importance matrix, if there is one.
    pub importance: Option<Importance>,
    /// Whether the modules for multi-token prediction are written too.
    pub mtp: bool,
}

impl Mix {
    /// A scheme, and a list like `experts=q4_k,attn=q8_0` or nothing.
    ///
    /// # Errors
    /// A sentence, if no part or type has the name.
    pub fn new(scheme: MixScheme, parts: &str) -> Result<Self, String> {
        let part = |text: &str| {
            let (part, of) = text.split_once('=').unwrap_or((text, ""));
            let known = MixPart::ALL.iter().find(|known| known.1 == part.trim());
            let part = known.map(|known| known.0).ok_or_else(|| {
                let known: Vec<_> = MixPart::ALL.iter().map(|known| known.1).collect();
                let known = known.join(", ");
                format!("expected PART=TYPE with a part of {known}, found `{text}`")
            })?;
            Ok::<_, String>((part, of.trim().parse()?))
        };
        let parts = parts.split(',').filter(|text| !text.trim().is_empty());
        let parts = parts.map(part).collect::<Result<_, _>>()?;
        Ok(Self {
            scheme,
            parts,
            importance: None,
            mtp: false,
        })
    }

    /// The type of a tensor of a GGUF, by the config of what is written.
    pub fn type_of(&self, tensor: &GgufTensor, config: &ModelConfig) -> GgufType {
        let [_, found] = self.wanted_and_found(tensor, config);
        found
    }

    /// The type that the scheme gives a tensor, and the one that fits the width of its rows.
    pub(crate) fn wanted_and_found(
        &self,
        tensor: &GgufTensor,
        config: &ModelConfig,
    ) -> [GgufType; 2] {
        let key = tensor.keys.first().and_then(|key| ParamKey::parse(key));
        let key = key.map(|key| match tensor.rows {
            RowOrder::Keys { .. } => key.with_module(Module::KvBKeys),
            RowOrder::Values { .. } => key.with_module(Module::KvBValues),
            RowOrder::Same | RowOrder::Interleaved { .. } => key,
        });
        let width = tensor.shape.last().filter(|_| tensor.shape.len() > 1);
        let part = key.and_then(MixPart::of);
        let (Some(key), Some(part), Some(width)) = (key, part, width) else {
            return [GgufType::F32; 2];
        };
        let own = self.parts.iter().find(|own| own.0 == part);
        let wanted = match own {
            Some((_, own)) => *own,
            None => self.by_rule(part, key, *width, config),
        };
        [wanted, wanted.for_width(*width)]
    }

    /// The type by the rules of the scheme.
    fn by_rule(
        &self,
        part: MixPart,
        key: ParamKey,
        width: usize,
        config: &ModelConfig,
    ) -> GgufType {
        let most = self.scheme.most();
        let GgufType::Ggml(format) = most else {
            return most;
        };
        if format == Ggml::F16 {
            return most;
        }
        let is_head =
            part == MixPart::Head || (part == MixPart::Embedding && config.tie_word_embeddings);
        let of = match part {
            _ if is_head && !width.is_multiple_of(format.block()) => Ggml::Q8_0,
            _ if is_head && format == Ggml::Q8_0 => format,
            _ if is_head => Ggml::Q6K,
            MixPart::Embedding | MixPart::Head => format,
            _ => self.in_layer(format, key, config),
        };
        GgufType::Ggml(of)
    }

    /// The type of a matrix of a layer.
    fn in_layer(&self, most: Ggml, key: ParamKey, config: &ModelConfig) -> Ggml {
        let (layers, experts) = (
            config.num_hidden_layers + config.num_nextn_predict_layers,
            config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts),
        );
        let layer = key.layer.unwrap_or(0);
        let has_8_experts = experts == 8;
        let is_plain = |of| self.scheme == MixScheme::Plain(GgufType::Ggml(of));
        let (is_q2, is_codebook) = (is_plain(Ggml::Q2K), is_plain(Ggml::Iq4Nl));
        let more_bits = needs_more_bits(layer, layers);
        if matches!(key.module, Module::V | Module::KvB) {
            let of = match self.scheme {
                _ if is_q2 && queries_per_key(config) >= 4 => Ggml::Q4K,
                _ if is_q2 => Ggml::Q3K,
                _ if is_codebook && queries_per_key(config) >= 4 => Ggml::Q5K,
                MixScheme::Q3KM if layer < 2 => Ggml::Q5K,
                MixScheme::Q3KM => Ggml::Q4K,
                MixScheme::Q4KM | MixScheme::Q5KM if more_bits => Ggml::Q6K,
                MixScheme::Q4KS if layer < 4 => Ggml::Q5K,
                _ => most,
            };
            // In models of 80 layers eight heads share each of these: they are small and much used.
            let is_70b = layers == 80 && matches!(config.model_type, Family::Llama | Family::Qwen2);
            return match of {
                _ if has_8_experts => Ggml::Q8_0,
                Ggml::Q3K | Ggml::Q4K if is_70b => Ggml::Q5K,
                of => of,
            };
        }
        if key.module == Module::K && has_8_experts {
            return Ggml::Q8_0;
        }
        if is_down(key.module) {
            // The inputs of the first layers have outliers, to which a search by importance gives the whole range of a block.
            let (is_first, is_weighted) = (layer < layers / 8, self.importance.is_some());
            let has_outliers = is_first && is_weighted;
            return match self.scheme {
                MixScheme::Plain(_) if has_outliers && most == Ggml::Q4_0 => Ggml::Q4_1,
                MixScheme::Plain(_) if has_outliers && most == Ggml::Q5_0 => Ggml::Q5_1,
                _ if is_codebook && is_first && !is_weighted => Ggml::Q5K,
                _ if is_q2 => Ggml::Q3K,
                MixScheme::Q3KM if layer < layers / 16 => Ggml::Q5K,
                MixScheme::Q3KM => Ggml::Q4K,
                MixScheme::Q4KM | MixScheme::Q5KM if more_bits => Ggml::Q6K,
                MixScheme::Q4KS if layer < layers / 8 => Ggml::Q5K,
                _ => most,
            };
        }
        if key.module == Module::O {
            let is_low = matches!(most, Ggml::Q2K | Ggml::Q3K | Ggml::Q4K | Ggml::Iq4Nl);
            return match self.scheme {
                _ if has_8_experts && is_low => Ggml::Q5K,
                _ if is_q2 => Ggml::Q3K,
                MixScheme::Q3KM => Ggml::Q4K,
                _ => most,
            };
        }
        most
    }
}

/// Whether a module is a down projection.
fn is_down(module: Module) -> bool {
    matches!(
        module,
        Module::Mlp(Projection::Down)
            | Module::Expert(_, Projection::Down)
            | Module::SharedExperts(Projection::Down)
    )
}

/// The first and the last eighth of the layers, and every third between.
fn needs_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// Query heads that share a key: all in latent attention, as llama.cpp computes it.
fn queries_per_key(config: &ModelConfig) -> usize {
    match &config.attention {
        AttentionConfig::Mla(_) => config.num_attention_heads,
        AttentionConfig::Gqa(gqa) => config.num_attention_heads / gqa.num_key_value_heads.max(1),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    /// A V3 with as many layers and experts as the published one, and a Llama.
    fn configs() -> [ModelConfig; 2] {
        let read = |json| ModelConfig::from_json(&json, Path::new("config.json")).unwrap();
        [
            read(json!({
                "model_type": "deepseek_v3", "hidden_act": "silu", "vocab_size": 129_280, "hidden_size": 7168,
                "intermediate_size": 18_432, "num_hidden_layers": 61, "num_attention_heads": 128,
                "max_position_embeddings": 4096, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
                "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
            })),
            read(json!({
                "model_type": "llama", "hidden_act": "silu", "vocab_size": 1000, "hidden_size": 4096,
                "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": true,
            })),
        ]
    }

    /// A tensor of a checkpoint's key, or of one part of it.
    fn tensor(key: &str, shape: &[usize], rows: RowOrder) -> GgufTensor {
        GgufTensor {
            name: String::new(),
            shape: shape.to_vec(),
            keys: vec![key.into()],
            rows,
        }
    }

    fn types(scheme: &str, config: &ModelConfig, tensors: &[GgufTensor]) -> Vec<&'static str> {
        let all = MixScheme::all();
        let scheme = all
            .iter()
            .find(|known| known.to_string() == scheme)
            .unwrap();
        let mix = Mix::new(*scheme, "").unwrap();
        let of = |tensor| mix.type_of(tensor, config).name();
        tensors.iter().map(of).collect()
    }

    /// Tensors of every kind that a V3 has.
    fn tensors_of_v3() -> [GgufTensor; 10] {
        let (keys, values) = (
            RowOrder::Keys {
                heads: 128,
                width: 128,
            },
            RowOrder::Values {
                heads: 128,
                width: 128,
            },
        );
        let at = |layer: usize, name: &str| format!("model.layers.{layer}.{name}");
        let kv_b = at(3, "self_attn.kv_b_proj.weight");
        let [first, next] = [6, 7].map(|layer| at(layer, "mlp.experts.0.down_proj.weight"));
        [
            tensor(
                "model.embed_tokens.weight",
                &[129_280, 7168],
                RowOrder::Same,
            ),
            tensor("lm_head.weight", &[129_280, 7168], RowOrder::Same),
            tensor(&at(0, "input_layernorm.weight"), &[7168], RowOrder::Same),
            tensor(&at(3, "mlp.gate.weight"), &[256, 7168], RowOrder::Same),
            tensor(
                &at(3, "mlp.gate.e_score_correction_bias"),
                &[256],
                RowOrder::Same,
            ),
            tensor(&kv_b, &[128, 512, 128], keys),
            tensor(&kv_b, &[128, 128, 512], values),
            tensor(&first, &[256, 7168, 2048], RowOrder::Same),
            tensor(&next, &[256, 7168, 2048], RowOrder::Same),
            tensor(
                &at(9, "mlp.shared_experts.down_proj.weight"),
                &[7168, 2048],
                RowOrder::Same,
            ),
        ]
    }

    #[test]
    fn a_deepseek_gets_the_types_that_llama_cpp_gives_it() {
        let [v3, _] = configs();
        let tensors = tensors_of_v3();
        let fixed = |of: [&'static str; 2], keys: &'static str, rest: [&'static str; 4]| {
            let [embed, head] = of;
            [&[embed, head, "f32", "f32", "f32", keys][..], &rest].concat()
        };
        assert_eq!(
            types("q4_k_m", &v3, &tensors),
            fixed(["q4_k", "q6_k"], "q5_0", ["q4_k", "q6_k", "q4_k", "q6_k"])
        );
        assert_eq!(
            types("q4_k_s", &v3, &tensors),
            fixed(["q4_k", "q6_k"], "q5_0", ["q4_k", "q5_k", "q4_k", "q4_k"])
        );
        assert_eq!(
            types("q2_k", &v3, &tensors),
            fixed(["q2_k", "q6_k"], "q4_0", ["q2_k", "q3_k", "q3_k", "q3_k"])
        );
        assert_eq!(
            types("iq4_nl", &v3, &tensors),
            fixed(
                ["iq4_nl", "q6_k"],
                "iq4_nl",
                ["iq4_nl", "q5_k", "iq4_nl", "iq4_nl"]
            )
        );
        assert_eq!(types("q8_0", &v3, &tensors)[..2], ["q8_0", "q8_0"]);
        assert_eq!(
            types("bf16", &v3, &tensors)[..4],
            ["bf16", "bf16", "f32", "f32"]
        );
    }

    #[test]
    fn a_llama_gets_the_types_that_llama_cpp_gives_it() {
        let [_, llama] = configs();
        let at = |layer: usize, name: &str| format!("model.layers.{layer}.{name}.weight");
        let values = |layer| {
            tensor(
                &at(layer, "self_attn.v_proj"),
                &[1024, 4096],
                RowOrder::Same,
            )
        };
        let down = |layer| tensor(&at(layer, "mlp.down_proj"), &[4096, 11_008], RowOrder::Same);
        let tensors = [
            tensor("model.embed_tokens.weight", &[1000, 4096], RowOrder::Same),
            values(0),
            values(5),
            values(6),
            tensor(&at(5, "self_attn.o_proj"), &[4096, 4096], RowOrder::Same),
            down(1),
            down(2),
        ];
        let expected = ["q6_k", "q5_k", "q4_k", "q4_k", "q4_k", "q5_k", "q4_k"];
        assert_eq!(types("q3_k_m", &llama, &tensors), expected);
        let expected = ["q6_k", "q6_k", "q5_k", "q6_k", "q5_k", "q6_k", "q6_k"];
        assert_eq!(types("q5_k_m", &llama, &tensors), expected);
        let expected = ["q6_k", "q4_k", "q4_k", "q4_k", "q3_k", "q3_k", "q3_k"];
        assert_eq!(types("q2_k", &llama, &tensors), expected);
        let expected = ["q6_k", "q5_k", "q5_k", "q5_k", "iq4_nl", "q5_k", "q5_k"];
        assert_eq!(types("iq4_nl", &llama, &tensors), expected);
    }
}
