//! Scores of models: loss, perplexity and bits per byte on held-out rows, tasks of the evaluation harness, and the differences of
//! several models on the same items. A score has a standard error, a difference an interval.
//!
//! ```no_run
//! use burn::tensor::Device;
//! use moeforge_eval::{EvalConfig, EvalReport, ModelScores, perplexity};
//!
//! let engine = infer::Engine::open("DeepSeek-V2-Lite".as_ref(), model::Compute::F32, Device::flex())?;
//! let tokenizer = data::Tokenizer::open("DeepSeek-V2-Lite".as_ref())?;
//! let vocab_size = engine.model.config.vocab_size;
//! let test = data::Split::open("data/test.jsonl".as_ref(), Some(&tokenizer), 1024, vocab_size)?;
//! let config = EvalConfig { batch_size: 8, compute: model::Compute::F32 };
//! let text = perplexity(&engine.model, &test.samples, &config, &mut (), &mut |_, _| {})?;
//! let scores = ModelScores { name: "V2-Lite".into(), text: Some(text), tasks: vec![], groups: vec![], experts: Default::default() };
//! println!("{}", EvalReport::new(vec![scores], &[])?.to_text());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod answer_store;
mod logits;
mod losses;

mod choice;
mod perplexity;

mod interval;

mod compare;
mod curves;
mod divergence;
mod expert_choices;
mod expert_load;
mod gate;
mod recompute;
mod report;
mod survival;

mod task;

mod error;

pub use answer_store::AnswerStore;
pub use choice::{multiple_choice, row_metrics};
pub use compare::{Difference, MeasuredNumber, Verdict};
pub use curves::{Curve, CurveConfig, CurveErrors, CurveReport};
pub use divergence::{Divergence, RoutingDivergence, divergence};
pub use error::{Error, Result};
pub use expert_choices::{ExpertChoices, LayerDivergence, RoutingComparison};
pub use expert_load::{ChosenExperts, ExpertLoad, choose, expert_loads};
pub use gate::{Gate, GateOutcome, GateVerdict};
pub use interval::Interval;
pub use losses::{EvalConfig, SampleLoss};
pub use perplexity::{TextScore, perplexity};
pub use recompute::{read_scores, recompute};
pub use report::{Comparison, EvalReport, ModelScores, p_text};
pub use survival::{SurvivalConfig, SurvivalModels, SurvivalReport, Survived, survival};
pub use task::{
    Answer, AnswerConfig, Answers, BleuCounts, ChrfCounts, GroupMean, GroupResult, MetricResult,
    RowValue, TaskRequests, TaskResult, TerCounts, expect_measured,
};
