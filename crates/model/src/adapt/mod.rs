//! Adapters: low-rank updates on a model, and the files that they come from and go to.
//!
//! Routed experts come in two dialects. *Classic*: one pair of factors per expert and projection, named like any other
//! linear layer. *Fused* (PEFT on transformers 5): two wrappers nested on `mlp.experts`, each with stacked factors: `A`
//! holds rows `expert · rank + j`, `B` holds columns `j · experts + expert`. The inner wrapper, `experts.base_layer.*`,
//! is `gate_up_proj` (gate's rows first, one `A` for both), the outer, `experts.*`, is `down_proj`; if only one of the two
//! is adapted it owns `experts.*`.
//!
//! The dialect is kept: an adapter that was read fused is trained and written fused, since gate and up share a factor there.
//!
//! Source: huggingface/peft: src/peft/tuners/lora/layer.py, `ParamWrapper`; checked against adapters it wrote.

mod attach;
mod fresh;
mod lora_config;
mod mlx_read;
mod peft_config;
mod peft_patterns;
mod peft_read;
mod peft_whole;
mod peft_write;
mod restore;
mod update;
mod update_sizes;
mod weights;
mod whole;

pub use self::attach::attach;
pub use self::lora_config::{LoraConfig, Scaling, Share};
pub use self::update::AdaptedModule;
pub use self::weights::{AdapterWeights, Replacement, TokenRows, WeightUpdate};
