//! Values of options that several verbs share, each documented once.

use clap::ValueEnum;
use model::export::WeightFormat;
use model::export::mix::MixScheme;
use model::{ActivationQuant, CacheType};

/// Help of `--compute`, whose default differs between verbs.
pub(crate) const COMPUTE_HELP: &str = "\
    Quantization of activations. `generate`, `chat` and `bench` default to int8 for speed, as llama.cpp does, and on a GPU to f32, which has no other \
    yet; \
    `eval`, `compare` and `logits` default to f32, so that scores measure the weights alone";

/// Help of `--cache`.
pub(crate) const CACHE_HELP: &str =
    "KV-cache data type. Default: f16; on a GPU f32, which has no other yet";

/// How activations are quantized in products with weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeValue {
    /// No quantization.
    F32,
    /// Quantization that depends on the weight's format: int8 for GGUF blocks; bf16 for bf16 weights, except in the
    /// output head; none for f32, f16 and FP8 weights.
    Int8,
}

impl ComputeValue {
    pub(crate) fn quant(self) -> ActivationQuant {
        match self {
            Self::F32 => ActivationQuant::None,
            Self::Int8 => ActivationQuant::MatchWeight,
        }
    }

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }
}

/// KV-cache data types. Batching and speculative decoding change no bit of a text, whatever the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheValue {
    /// Exact.
    F32,
    /// Half the memory of f32. Values above 65,504 overflow and end the text with an error; they are rare in practice.
    F16,
    /// Half the memory of f32, with the same range and 8 significant bits.
    Bf16,
    /// About a quarter of the memory of f32: 8 bits per value, and one scale per 32 values.
    #[value(name = "q8_0")]
    Q8_0,
}

impl CacheValue {
    /// The value of a type.
    pub(crate) fn of(cache: CacheType) -> Self {
        match cache {
            CacheType::F32 => Self::F32,
            CacheType::F16 => Self::F16,
            CacheType::Bf16 => Self::Bf16,
            CacheType::Q8_0 => Self::Q8_0,
        }
    }

    pub(crate) fn cache_type(self) -> CacheType {
        match self {
            Self::F32 => CacheType::F32,
            Self::F16 => CacheType::F16,
            Self::Bf16 => CacheType::Bf16,
            Self::Q8_0 => CacheType::Q8_0,
        }
    }
}

/// Weight formats of Hugging Face folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FolderFormat {
    /// All weights in bf16.
    #[value(name = "hf:bf16", alias = "bf16")]
    Bf16,
    /// All weights in f16. Values above 65,504 are refused.
    #[value(name = "hf:f16", alias = "f16")]
    F16,
    /// All weights in f32.
    #[value(name = "hf:f32", alias = "f32")]
    F32,
    /// FP8 in blocks for attention and experts, as in DeepSeek's own checkpoints; bf16 for all other weights.
    #[value(name = "hf:fp8", alias = "fp8")]
    Fp8,
}

impl FolderFormat {
    pub(crate) fn weight_format(self) -> WeightFormat {
        match self {
            Self::Bf16 => WeightFormat::Bf16,
            Self::F16 => WeightFormat::F16,
            Self::F32 => WeightFormat::F32,
            Self::Fp8 => WeightFormat::Fp8,
        }
    }
}

/// A weight format, and the kind of file that holds it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OutputFormat {
    Folder(FolderFormat),
    Gguf(MixScheme),
}

impl OutputFormat {
    /// A format by its name, such as `hf:fp8` or `gguf:q4_k_m`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("hf:")
            && let Ok(format) = FolderFormat::from_str(text, false)
        {
            return Ok(Self::Folder(format));
        }
        let schemes = MixScheme::all().into_iter();
        let mut named = schemes.map(|scheme| (format!("gguf:{scheme}"), scheme));
        match named.find(|named| named.0 == text) {
            Some((_, scheme)) => Ok(Self::Gguf(scheme)),
            None => Err(format!("expected one of {}", Self::names().join(", "))),
        }
    }

    /// The names of all formats.
    fn names() -> Vec<String> {
        let folders = FolderFormat::value_variants().iter();
        let folders = folders.filter_map(ValueEnum::to_possible_value);
        let folders = folders.map(|value| value.get_name().to_owned());
        let schemes = MixScheme::all().into_iter();
        folders
            .chain(schemes.map(|scheme| format!("gguf:{scheme}")))
            .collect()
    }
}
