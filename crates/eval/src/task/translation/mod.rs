//! Metrics of translations, as sacrebleu has them: of each text its counts, of a corpus the score of their sums.

mod bleu;
mod chrf;
mod ter;
mod words;

#[cfg(test)]
mod golden;

pub use bleu::BleuCounts;
pub(crate) use bleu::{bleu, bleu_counts};
pub use chrf::ChrfCounts;
pub(crate) use chrf::{chrf, chrf_counts};
pub use ter::TerCounts;
pub(crate) use ter::{ter, ter_counts};
