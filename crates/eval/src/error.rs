//! The one error type of this crate.

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to score, so no mean.
    #[error("expected at least one {expected} to score, found none")]
    Nothing {
        /// What there should be.
        expected: &'static str,
    },
    /// Training runs with no step to compare.
    #[error("expected runs of more than the {skip} steps that are left out, found {found}")]
    TooShort {
        /// How many steps are left out.
        skip: usize,
        /// How many the shortest run has.
        found: usize,
    },
    /// A token the model has no embedding for.
    #[error(
        "sample {sample}: expected token ids below the vocabulary size {vocab_size}, found {id}"
    )]
    Vocabulary {
        /// Which sample, counted from 0.
        sample: usize,
        /// The id.
        id: u32,
        /// One more than the largest id the model has.
        vocab_size: usize,
    },
    /// A sample is longer than the model can read.
    #[error(
        "sample {sample}: expected at most the model's {limit} positions, found {found} tokens"
    )]
    ContextLength {
        /// Which sample, counted from 0.
        sample: usize,
        /// `max_position_embeddings`.
        limit: usize,
        /// Its length.
        found: usize,
    },
    /// The model computed something that is no number.
    #[error("sample {sample}: expected a finite loss, found {loss}")]
    NotFinite {
        /// Which sample, counted from 0.
        sample: usize,
        /// Its summed loss.
        loss: f64,
    },
    /// A choice has no token whose likelihood could be asked for: its only one is the first of its sequence.
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
    /// The model cannot be read as asked.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// An adapter that changes no logit.
    #[error("expected an adapter with an effect, found one that changes no logit")]
    NoEffect,
    /// Models whose predictions are of different things.
    #[error("expected models of one vocabulary, found sizes {expected} and {found}")]
    OtherVocabulary {
        /// The vocabulary's size of the reference.
        expected: usize,
        /// That of the model.
        found: usize,
    },
    /// Two models were not scored on the same items.
    #[error("expected the same {items} for both models, found {first} and {second}")]
    NotPaired {
        /// What was counted.
        items: &'static str,
        /// How many the first model has.
        first: usize,
        /// How many the second model has.
        second: usize,
    },
}
