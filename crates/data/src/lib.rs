//! From rows of text to masked token batches.
//!
//! Reads a model's tokenizer and chat template and a user's JSON-lines files, marks which tokens
//! are trained, and hands out batches in an order that depends on a seed and a position alone.
//! Knows nothing of tensors and devices. Every file is untrusted.
//!
//! # Example
//! ```no_run
//! use moeforge_data::{Order, Shuffle, Split, Tokenizer, collate};
//! use std::path::Path;
//!
//! let tokenizer = Tokenizer::open(Path::new("models/deepseek"))?;
//! let split = Split::open(Path::new("data/train.jsonl"), Some(&tokenizer), 2048, tokenizer.vocab_size())?;
//! let mut order = Order::new(split.samples.len(), 42, Shuffle::Seeded);
//! let samples: Vec<_> = order.batch(0, 4).into_iter().map(|index| &split.samples[index]).collect();
//! let batch = collate(&samples, tokenizer.eos_id().unwrap_or(0));
//! println!("{} targets in {} rows", batch.trained_tokens, batch.rows);
//! # Ok::<(), moeforge_data::Error>(())
//! ```

mod tokenizer;
mod turn;

mod choice;
mod corpus;
mod file;
mod ids;
mod reader;
mod row;
mod sample;
mod split;
mod survey;
mod token_cache;

mod batch;
mod order;
mod packing;

mod error;

pub use batch::{Batch, IGNORE, collate, collate_rows};
pub use choice::{Choice, ChoiceRow, choices};
pub use corpus::{Corpus, Reading};
pub use error::{Error, Result};
pub use ids::read_ids;
pub use order::{Order, Shuffle};
pub use packing::Packing;
pub use reader::Wanted;
pub use row::Pair;
pub use sample::Sample;
pub use split::{Counts, Pairs, Split};
pub use survey::{Lengths, Repeats, Survey};
pub use tokenizer::{
    Bos, ChatTemplate, DecodeStream, GenerationPrompt, Special, Tokenizer, TokenizerFiles,
};
