//! Evaluation tasks: the files of EleutherAI's evaluation harness, read as it reads them.
//!
//! A task says where its rows are, what a model is asked about each, and how its answers are judged. Python is not run: a key that
//! needs it is refused with its file and line, and so is every key and value that is not known here.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/config/task.py, lm_eval/tasks.

mod dataset;
mod definition;
mod encoding;
mod filtering;
mod included;
mod items;
mod keys;
mod metric;
mod pattern;
mod question;
mod random;
mod sha256;
mod task_chat;
mod task_index;
mod task_row;
mod task_set;
mod twin;
mod values;
mod yaml;

pub use dataset::TaskDataset;
pub use definition::{
    DatasetSource, FewshotSampler, FewshotSetup, GenerationSettings, TaskDefinition, TaskSplits,
};
pub use encoding::{ScoredTokens, TaskEncoder};
pub use filtering::Filtered;
pub use items::{ItemLimits, TaskItem, TaskItems};
pub use metric::{
    Aggregation, Filter, FilterPipeline, Ignored, Metric, MetricUse, OutputType, RegexFilter,
};
pub use pattern::Pattern;
pub use question::{FewshotPool, Question, QuestionMaker, TaskRequest};
pub use random::PythonRandom;
pub use sha256::sha256;
pub use task_chat::{TaskChat, without_thought};
pub use task_index::TaskIndex;
pub use task_row::TaskRow;
pub use task_set::{GroupMetric, TaskGroup, TaskSet};
pub use twin::ResultsTwin;
pub use values::{Target, count_words};
