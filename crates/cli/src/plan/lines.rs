//! Sizes, models and lines of a plan in words.

use model::ModelConfig;
use model::export::WeightFormat;
use model::footprint::WeightBytes;
use model::keys::keys;
use serde_json::Value;

pub(crate) const GIB: f64 = (1_u64 << 30) as f64;

/// A line of a plan: what takes memory, and how much.
pub(crate) struct PlanLine {
    pub(crate) what: String,
    pub(crate) bytes: f64,
    pub(crate) note: &'static str,
}

/// The number of a model's parameters.
#[derive(Debug, PartialEq)]
pub(crate) struct ParameterCounts {
    pub(crate) total: u64,
    /// Those that one token uses: of the routed experts, top-k.
    pub(crate) active: u64,
}

/// Counts parameters by the shapes of the config, including embedding and output head, without the MTP layer.
///
/// Source: deepseek-ai/DeepSeek-V3: README_WEIGHTS.md (what counts as active).
pub(crate) fn parameters(config: &ModelConfig) -> ParameterCounts {
    let (mut shared, mut routed) = (0, 0);
    for (key, shape) in keys(config) {
        let numbers: u64 = shape.iter().map(|axis| *axis as u64).product();
        if key.contains(".mlp.experts.") {
            routed += numbers;
        } else {
            shared += numbers;
        }
    }
    let (top_k, experts) = config
        .moe
        .as_ref()
        .map_or((1, 1), |moe| (moe.choice.top_k, moe.n_routed_experts));
    ParameterCounts {
        total: shared + routed,
        active: shared + routed / experts as u64 * top_k as u64,
    }
}

/// The family and the size of a model, for the first line.
pub(crate) fn described(name: &str, config: &ModelConfig) -> String {
    let counts = parameters(config);
    let billions = |count: u64| count as f64 / 1e9;
    format!(
        "{name} ({}), {:.2} B parameters, {:.2} B of them active",
        config.model_type.name(),
        billions(counts.total),
        billions(counts.active)
    )
}

/// Bytes by format as lines.
pub(crate) fn format_lines(weights: &WeightBytes, note: &'static str) -> Vec<PlanLine> {
    let line = |(format, bytes): (&String, &f64)| PlanLine {
        what: format!("weights in {format}"),
        bytes: *bytes,
        note,
    };
    weights.by_format.iter().map(line).collect()
}

/// Gigabytes per second over bytes per token.
pub(crate) fn speed(bandwidth: f64, bytes: f64) -> f64 {
    bandwidth * 1e9 / bytes.max(1.0)
}

/// A number of sequences.
pub(crate) fn sequences(n: u64) -> String {
    match n {
        1 => "1 sequence".into(),
        n => format!("{n} sequences"),
    }
}

/// A size for people.
pub(crate) fn size(bytes: f64) -> String {
    const MIB: f64 = (1 << 20) as f64;
    if bytes < GIB {
        return format!("{:.0} MiB", bytes / MIB);
    }
    let gib = bytes / GIB;
    let digits = if gib < 100.0 { 2 } else { 0 };
    format!("{gib:.digits$} GiB")
}

/// The format in which a config's weights are published.
pub(crate) fn published_format(json: &Value) -> WeightFormat {
    let dtype = json["dtype"]
        .as_str()
        .or_else(|| json["torch_dtype"].as_str());
    match (json["quantization_config"]["quant_method"].as_str(), dtype) {
        (Some("fp8"), _) => WeightFormat::Fp8,
        (_, Some("float32")) => WeightFormat::F32,
        (_, Some("float16")) => WeightFormat::F16,
        _ => WeightFormat::Bf16,
    }
}
