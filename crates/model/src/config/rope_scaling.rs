//! Rotary positions in a `config.json`, in both dialects: `rope_scaling` with `rope_theta`, and `rope_parameters`, which has
//! everything.
//!
//! Where a file has both, `rope_scaling` counts, in transformers 4 and 5 alike. Where the two versions would read different
//! numbers from the same file, it is refused.
//!
//! Source: huggingface/transformers 5.24: modeling_rope_utils.py, and the `yarn_apply_mscale` of its DeepSeek models.

use kernels::RopeLayout;
use serde_json::json;

use super::fields::Fields;
use super::{Family, RopeConfig, RopeScaling};
use crate::Error;

/// The base of the frequencies in a config that has none.
const DEFAULT_THETA: f64 = 10_000.0;

#[derive(Clone, Copy)]
enum RopeType {
    Plain,
    Linear,
    Yarn,
    Llama3,
}

const ROPE_TYPES: [(&str, RopeType); 4] = [
    ("default", RopeType::Plain),
    ("linear", RopeType::Linear),
    ("yarn", RopeType::Yarn),
    ("llama3", RopeType::Llama3),
];

pub(super) fn rope(keys: &Fields<'_>, family: Family) -> Result<RopeConfig, Error> {
    let (published, whole) = (
        keys.object("rope_scaling")?,
        keys.object("rope_parameters")?,
    );
    let object = published.as_ref().or(whole.as_ref());
    let theta = theta(keys, object)?;
    if let (Some(counts), Some(other)) = (&published, &whole) {
        check_other(counts, other, theta)?;
    }
    keys.only("partial_rotary_factor", &[json!(1)])?;
    let scaling = match object {
        Some(object) => scaling(keys, object, family)?,
        None => RopeScaling::Plain,
    };
    let interleaved = match family {
        Family::DeepseekV2 => true,
        Family::DeepseekV3 => keys.flag_or("rope_interleave", true)?,
        Family::Qwen2 | Family::Llama => false,
    };
    Ok(RopeConfig {
        theta,
        scaling,
        layout: if interleaved {
            RopeLayout::Interleaved
        } else {
            RopeLayout::HalfSplit
        },
    })
}

/// The base of the frequencies: in the object that counts, next to it, or in both alike.
fn theta(keys: &Fields<'_>, object: Option<&Fields<'_>>) -> Result<f64, Error> {
    let beside = keys.number_or("rope_theta", DEFAULT_THETA)?;
    let theta = match object {
        Some(object) => object.number_or("rope_theta", beside)?,
        None => beside,
    };
    if theta <= 1.0 {
        return Err(keys.wrong("rope_theta", "a number above 1"));
    }
    match object {
        Some(object) if keys.has("rope_theta") && theta != beside => {
            Err(object.wrong("rope_theta", &format!("{beside}, as beside it")))
        }
        _ => Ok(theta),
    }
}

/// Checks the dialect that does not count. What it says else is not used, and said to be so.
fn check_other(counts: &Fields<'_>, other: &Fields<'_>, theta: f64) -> Result<(), Error> {
    if other.number_or("rope_theta", theta)? != theta {
        let expected = format!("{theta}, which counts since there is a `rope_scaling` too");
        return Err(other.wrong("rope_theta", &expected));
    }
    for (key, value) in other.entries() {
        let is_default = key.ends_with("type") && value == "default";
        if is_default || counts.peek(key) == Some(value) {
            other.without_effect(&[key]);
        }
    }
    Ok(())
}

fn scaling(keys: &Fields<'_>, object: &Fields<'_>, family: Family) -> Result<RopeScaling, Error> {
    object.only("partial_rotary_factor", &[json!(1)])?;
    // What other programs' converters read there.
    object.only("attn_factor", &[json!(1)])?;
    object.only("extrapolation_factor", &[json!(1)])?;
    object.without_effect(&["finetuned"]);
    let mut entries = object.entries();
    if let Some((layers, _)) = entries.find(|(_, value)| value.is_object()) {
        return Err(object.wrong(layers, "settings that all layers share"));
    }
    let kind = match (object.peek("rope_type"), object.peek("type")) {
        (None, None) => RopeType::Plain,
        (Some(new), Some(old)) if new != old => {
            return Err(object.wrong("type", &format!("{new}, as `rope_type` says")));
        }
        (Some(_), _) => object.one_of("rope_type", &ROPE_TYPES)?,
        (None, Some(_)) => object.one_of("type", &ROPE_TYPES)?,
    };
    object.without_effect(&["rope_type", "type"]);
    let is_latent = matches!(family, Family::DeepseekV2 | Family::DeepseekV3);
    if is_latent && !matches!(kind, RopeType::Plain | RopeType::Yarn) {
        // It would scale the softmax with other types too.
        object.only("mscale_all_dim", &[json!(0)])?;
    }
    match kind {
        RopeType::Plain => Ok(RopeScaling::Plain),
        RopeType::Linear => Ok(RopeScaling::Linear {
            factor: object.positive("factor")?,
        }),
        RopeType::Yarn => yarn(keys, object),
        RopeType::Llama3 => {
            let (low, high) = (
                object.positive("low_freq_factor")?,
                object.positive("high_freq_factor")?,
            );
            if low >= high {
                return Err(object.wrong("high_freq_factor", "more than `low_freq_factor`"));
            }
            Ok(RopeScaling::Llama3 {
                factor: object.positive("factor")?,
                original: original(keys, object)?,
                low,
                high,
            })
        }
    }
}

fn yarn(keys: &Fields<'_>, object: &Fields<'_>) -> Result<RopeScaling, Error> {
    let original = original(keys, object)?;
    // Null is another thing than no key, for transformers.
    let factor = if object.mentions("factor") && !object.has("factor") {
        object.without_effect(&["factor"]);
        keys.size("max_position_embeddings")? as f64 / original
    } else {
        object.positive("factor")?
    };
    if object.mentions("truncate") && !object.has("truncate") {
        return Err(object.wrong("truncate", "true or false"));
    }
    let attention_factor = if object.has("attention_factor") {
        Some(object.positive("attention_factor")?)
    } else {
        None
    };
    Ok(RopeScaling::Yarn {
        factor,
        original,
        beta_fast: object.positive_or("beta_fast", 32.0)?,
        beta_slow: object.positive_or("beta_slow", 1.0)?,
        mscale: object.number_or("mscale", 0.0)?,
        mscale_all_dim: object.number_or("mscale_all_dim", 0.0)?,
        attention_factor,
        truncate: object.flag_or("truncate", true)?,
    })
}

/// The context length before scaling. Some files have it outside the object, where it takes precedence.
fn original(keys: &Fields<'_>, object: &Fields<'_>) -> Result<f64, Error> {
    const KEY: &str = "original_max_position_embeddings";
    let outside = if keys.has(KEY) {
        Some(keys.positive(KEY)?)
    } else {
        None
    };
    let inside = if object.has(KEY) {
        Some(object.positive(KEY)?)
    } else {
        None
    };
    match (outside, inside) {
        (Some(outside), Some(inside)) if outside != inside => {
            Err(object.wrong(KEY, &format!("{outside}, as beside it")))
        }
        (Some(length), _) | (None, Some(length)) => Ok(length),
        (None, None) => Ok(keys.size("max_position_embeddings")? as f64),
    }
}
