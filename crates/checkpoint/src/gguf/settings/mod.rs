//! The settings of a model: in a GGUF's metadata, and in the `config.json` of the folder that it was converted from.
//!
//! Source: ggml-org/llama.cpp: convert_hf_to_gguf.py, conversion/{base,deepseek}.py, src/models/deepseek2.cpp.

mod read;
mod tables;
mod write;

pub(crate) use self::read::{config, generation_config};
pub(crate) use self::write::{metadata, sampling};

/// A supported architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// R1's Llama distills, and other models of that shape.
    Llama,
    /// R1's Qwen distills.
    Qwen2,
    /// DeepSeek V2, V2-Lite, V3 and R1.
    DeepSeek2,
}

impl Architecture {
    pub(crate) const ALL: [(&'static str, Self); 3] = [
        ("llama", Self::Llama),
        ("qwen2", Self::Qwen2),
        ("deepseek2", Self::DeepSeek2),
    ];
}

/// The architecture of a family of folders.
pub(crate) fn architecture(family: &str) -> Option<(&'static str, Architecture)> {
    let name = match family {
        "deepseek_v2" | "deepseek_v3" => "deepseek2",
        other => other,
    };
    let mut known = Architecture::ALL.into_iter();
    known.find(|known| known.0 == name)
}
