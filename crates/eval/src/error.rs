//! The one error type of this crate.

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to score.
    #[error("expected at least one {expected} to score, found none")]
    Nothing {
        /// What is missing.
        expected: &'static str,
    },
    /// Training runs without a step to compare.
    #[error("expected runs of more than the {skip} skipped steps, found {found}")]
    TooShort {
        /// Skipped steps.
        skip: usize,
        /// Steps of the shortest run.
        found: usize,
    },
    /// A token outside of the model's vocabulary.
    #[error(
        "sample {sample}: expected token ids below the vocabulary size {vocab_size}, found {id}"
    )]
    Vocabulary {
        /// The sample, counted from 0.
        sample: usize,
        /// The id.
        id: u32,
        /// One more than the largest id the model has.
        vocab_size: usize,
    },
    /// A sample has more tokens than the model has positions.
    #[error(
        "sample {sample}: expected at most the model's {limit} positions, found {found} tokens"
    )]
    ContextLength {
        /// The sample, counted from 0.
        sample: usize,
        /// `max_position_embeddings`.
        limit: usize,
        /// Its length.
        found: usize,
    },
    /// A loss that is not finite.
    #[error("sample {sample}: expected a finite loss, found {loss}")]
    NotFinite {
        /// The sample, counted from 0.
        sample: usize,
        /// Its summed loss.
        loss: f64,
    },
    /// A choice without a token to score: its only token is the first of the sequence.
    #[error(
        "question {question}: choice {choice}: expected a token before it, found none; \
         give the question a prompt"
    )]
    Unscored {
        /// The question, counted from 0.
        question: usize,
        /// The choice, counted from 0.
        choice: usize,
    },
    /// A report that is none.
    #[error("expected a report of `eval`: {problem}")]
    Report {
        /// What is wrong.
        problem: String,
    },
    /// What is kept of a piece of work is not what such work has.
    #[error("expected the kept answers of `{key}`, found something else; delete the file")]
    Kept {
        /// The key of the work.
        key: String,
    },
    /// Answers cannot be kept.
    #[error("cannot keep answers: {0}")]
    Keep(#[source] std::io::Error),
    /// Tokens cannot be scored.
    #[error(transparent)]
    Infer(#[from] infer::Error),
    /// A task's tokens or filters fail.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// Something failed for an item of a task.
    #[error("row {number}: {problem}")]
    Item {
        /// The number of the item, counted from 0.
        number: usize,
        /// What failed.
        problem: Box<Self>,
    },
    /// A metric that is not measured on such answers.
    #[error("`{metric}`: expected a metric of other answers, found {found}")]
    Metric {
        /// The metric.
        metric: &'static str,
        /// The answers.
        found: String,
    },
    /// A filter of texts on scores.
    #[error(
        "filter `{filter}`: expected `take_first` for answers without a text, found other filters"
    )]
    Filter {
        /// The name of the filter.
        filter: String,
    },
    /// An aggregation of other values.
    #[error("expected {expected} for this aggregation, found {found}")]
    Aggregation {
        /// The values it takes.
        expected: &'static str,
        /// The values.
        found: &'static str,
    },
    /// The model's weights cannot be quantized.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// An adapter that changes no logit.
    #[error("expected an adapter with an effect, found one that changes no logit")]
    NoEffect,
    /// Models with different vocabularies.
    #[error("expected models of one vocabulary, found sizes {expected} and {found}")]
    OtherVocabulary {
        /// The reference's vocabulary size.
        expected: usize,
        /// The model's vocabulary size.
        found: usize,
    },
    /// A gate that is none, or cannot be judged.
    #[error("expected {expected}, found {found}")]
    Gate {
        /// What a gate is or needs.
        expected: String,
        /// The gate.
        found: String,
    },
    /// Two models were not scored on the same items.
    #[error("expected the same {items} for both models, found {first} and {second}")]
    NotPaired {
        /// What was counted.
        items: &'static str,
        /// Their number for the first model.
        first: usize,
        /// Their number for the second model.
        second: usize,
    },
}

impl Error {
    /// The error, of an item.
    pub(crate) fn of_item(self, number: usize) -> Self {
        Self::Item {
            number,
            problem: Box::new(self),
        }
    }
}
