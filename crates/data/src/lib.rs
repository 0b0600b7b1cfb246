//! From rows of text to masked token batches.
//!
//! Reads a model's tokenizer and chat template and a user's tables, marks the trained tokens, and makes batches in an
//! order that depends on a seed and a position alone. Knows nothing of tensors and devices. Every file is untrusted.
//!
//! # Example
//! ```no_run
//! use moeforge_data::{SampleOrder, Shuffle, Split, Tokenizer, collate};
//! use std::path::Path;
//!
//! let tokenizer = Tokenizer::open(Path::new("models/deepseek"))?;
//! let split = Split::open(Path::new("data/train.jsonl"), Some(&tokenizer), 2048, tokenizer.vocab_size())?;
//! let mut order = SampleOrder::new(split.samples.len(), 42, Shuffle::Seeded);
//! let samples: Vec<_> = order.batch(0, 4).into_iter().map(|index| &split.samples[index]).collect();
//! let batch = collate(&samples, tokenizer.eos_id().unwrap_or(0));
//! println!("{} targets in {} rows", batch.trained_tokens, batch.rows);
//! # Ok::<(), moeforge_data::Error>(())
//! ```

mod common_prefix;
mod companions;
mod jinja;
mod notes;
mod tokenizer;
mod turn;

mod choice;
mod columns;
mod corpus;
mod data_folder;
mod endings;
mod entry;
mod file;
mod ids;
mod reader;
mod row;
mod sample;
mod split;
mod survey;
mod table;
mod task;
mod token_cache;

mod batch;
mod order;
mod packing;

mod error;

pub use batch::{Batch, IGNORE, collate, collate_rows};
pub use choice::{Choice, choices};
pub use columns::Columns;
pub use companions::companions;
pub use corpus::Corpus;
pub use data_folder::{DataFolder, SplitName};
pub use entry::Counts;
pub use error::{Error, Place, Result};
pub use ids::read_ids;
pub use jinja::is_space;
pub use order::{SampleOrder, Shuffle};
pub use packing::Packing;
pub use reader::{ReadOptions, RowFilter};
pub use row::PreferencePair;
pub use sample::Sample;
pub use split::{Pairs, Split};
pub use survey::{Lengths, Repeats, Survey};
pub use task::{
    Aggregation, DatasetSource, FewshotPool, FewshotSampler, FewshotSetup, Filter, FilterPipeline,
    Filtered, GenerationSettings, GroupMetric, Ignored, ItemLimits, Metric, MetricUse, OutputType,
    Pattern, PythonRandom, Question, QuestionMaker, RegexFilter, ResultsTwin, ScoredTokens, Target,
    TaskChat, TaskDataset, TaskDefinition, TaskEncoder, TaskGroup, TaskIndex, TaskItem, TaskItems,
    TaskRequest, TaskRow, TaskSet, TaskSplits, count_words, sha256, without_thought,
};
pub use tokenizer::{
    Bos, ChatTemplate, DecodeStream, GenerationPrompt, GgufEnds, Special, Tokenizer,
    TokenizerFiles, eos_token_ids, unknown_metadata,
};
