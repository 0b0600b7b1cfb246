//! The evaluation harness's tasks: what a model answers, and how good that is.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/api/task.py, `process_results`; lm_eval/api/metrics.py.

mod aggregate;
mod answers;
mod bootstrap;
mod group_result;
mod row_values;
mod task_result;
mod translation;

pub(crate) use aggregate::aggregate;
pub use answers::{Answer, AnswerConfig, Answers, TaskRequests};
pub use group_result::{GroupMean, GroupResult};
pub use row_values::RowValue;
pub(crate) use row_values::{ChoiceAnswers, LARGEST_COUNT};
pub use task_result::{MetricResult, TaskResult, expect_measured};
pub use translation::{BleuCounts, ChrfCounts, TerCounts};
