//! Multiple choice: is the right continuation the most likely one?

use data::{Choice, Sample};
use model::Model;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::losses::{EvalConfig, SampleLoss, losses};

/// The score of a model on multiple-choice questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChoiceScore {
    /// Share of questions answered right.
    pub accuracy: f64,
    /// The standard error of `accuracy` as the mean of independent questions: `√(p(1 − p) / n)`.
    pub standard_error: f64,
    /// Number of questions.
    pub n: usize,
    /// Whether each was answered right, in their order.
    pub correct: Vec<bool>,
}

/// Scores a model on questions. Its answer is the choice with the highest log-likelihood per UTF-8 byte after the
/// prompt; ties go to the first. Per byte, because a longer choice is less likely for its length alone, and bytes do
/// not depend on the tokenizer. `progress` counts choices.
///
/// # Errors
/// If there is no question, a choice does not fit the model or has nothing before it, or a loss is not finite.
///
/// Source: EleutherAI/lm-evaluation-harness: lm_eval/api/task.py, `acc_norm`, which divides by characters.
pub fn multiple_choice(
    model: &Model,
    questions: &[Choice],
    config: &EvalConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<ChoiceScore> {
    let samples: Vec<&Sample> = questions.iter().flat_map(|q| &q.samples).collect();
    let losses = losses(model, &samples, config, progress)?;
    ChoiceScore::new(questions, &losses)
}

impl ChoiceScore {
    /// The score, from the losses of all choices in the order of the questions.
    fn new(questions: &[Choice], losses: &[SampleLoss]) -> Result<Self> {
        let mut rest = losses;
        let mut correct = Vec::with_capacity(questions.len());
        for (question, content) in questions.iter().enumerate() {
            let (losses, others) = rest.split_at(content.samples.len());
            rest = others;
            if let Some(choice) = losses.iter().position(|loss| loss.tokens == 0) {
                return Err(Error::Unscored { question, choice });
            }
            correct.push(answer(losses, &content.choice_bytes) == content.answer);
        }
        Self::of(correct)
    }

    /// # Errors
    /// If there is no question.
    pub(crate) fn of(correct: Vec<bool>) -> Result<Self> {
        let n = correct.len();
        if n == 0 {
            let expected = "question";
            return Err(Error::Nothing { expected });
        }
        let accuracy = correct.iter().filter(|correct| **correct).count() as f64 / n as f64;
        Ok(Self {
            accuracy,
            standard_error: (accuracy * (1.0 - accuracy) / n as f64).sqrt(),
            n,
            correct,
        })
    }
}

/// The choice with the lowest loss per byte; ties go to the first.
fn answer(losses: &[SampleLoss], bytes: &[usize]) -> usize {
    let per_byte = losses.iter().zip(bytes);
    let per_byte = per_byte.map(|(loss, bytes)| loss.loss_sum / *bytes as f64);
    let best = per_byte.enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
    best.map_or(0, |(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(bytes: &[usize], answer: usize) -> Choice {
        let sample = Sample {
            ids: vec![1, 2],
            trained: vec![false, true],
            trained_bytes: 1,
            truncated: false,
        };
        Choice {
            samples: vec![sample; bytes.len()],
            choice_bytes: bytes.to_vec(),
            answer,
        }
    }

    fn losses(sums: &[f64]) -> Vec<SampleLoss> {
        let loss = |loss_sum: &f64| SampleLoss {
            loss_sum: *loss_sum,
            tokens: 1,
        };
        sums.iter().map(loss).collect()
    }

    #[test]
    fn the_most_likely_choice_per_byte_is_the_answer() {
        for (sums, bytes, expected) in [
            (&[3.0, 2.0, 4.0][..], &[1, 1, 1][..], 1),
            // 3/6 < 2/2 < 4/2, although 2 is the smallest sum.
            (&[3.0, 2.0, 4.0], &[6, 2, 2], 0),
            (&[2.0, 1.0], &[2, 1], 0),
        ] {
            assert_eq!(answer(&losses(sums), bytes), expected, "{sums:?} {bytes:?}");
        }
    }

    #[test]
    fn accuracy_and_its_error_are_those_worked_out_by_hand() {
        // Answers 1, 0, 2, 0 where 1, 0, 0, 1 are right.
        let questions = [
            question(&[1, 1], 1),
            question(&[1, 4], 0),
            question(&[1, 1, 9], 0),
            question(&[1, 1], 1),
        ];
        let sums = losses(&[5.0, 4.0, 1.0, 8.0, 2.0, 3.0, 9.0, 1.0, 2.0]);
        let score = ChoiceScore::new(&questions, &sums).unwrap();
        assert_eq!(score.correct, [true, true, false, false]);
        // √(0.5 · 0.5 / 4)
        assert_eq!(
            (score.accuracy, score.standard_error, score.n),
            (0.5, 0.25, 4)
        );
    }

    #[test]
    fn questions_without_a_score_are_refused() {
        let mut none = losses(&[1.0, 2.0]);
        none[1].tokens = 0;
        let problem = ChoiceScore::new(&[question(&[1, 1], 0)], &none).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "question 0: choice 1: expected a token before it, found none; give the question a prompt"
        );
        let problem = ChoiceScore::new(&[], &[]).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "expected at least one question to score, found none"
        );
    }
}
