//! Multiple choice in rows of our own: is the right continuation the most likely one?

use data::{Choice, Metric, MetricUse, Sample};
use model::Model;

use crate::answer_store::AnswerStore;
use crate::error::{Error, Result};
use crate::losses::{EvalConfig, SampleLoss, losses};
use crate::task::{Answers, ChoiceAnswers, MetricResult, RowValue, TaskResult};

/// What is measured: the most likely choice, that per character, and that per UTF-8 byte. A longer choice is less likely for its
/// length alone, and bytes do not depend on the tokenizer.
const METRICS: [Metric; 3] = [Metric::Acc, Metric::AccNorm, Metric::AccBytes];

/// The names of what is measured on rows.
pub fn row_metrics() -> impl Iterator<Item = &'static str> {
    METRICS.into_iter().map(Metric::name)
}

/// Scores a model on the questions of a task. Of equally likely choices the first is its answer. `progress` counts choices.
///
/// # Errors
/// If there is no question, a choice does not fit the model or has nothing before it, a loss is not finite, or the store fails.
pub fn multiple_choice(
    model: &Model,
    task: &str,
    questions: &[Choice],
    config: &EvalConfig,
    store: &mut dyn AnswerStore,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TaskResult> {
    let samples: Vec<&Sample> = questions.iter().flat_map(|q| &q.samples).collect();
    let losses = losses(model, &samples, config, store, progress)?;
    result(task, questions, &losses)
}

/// The result, from the losses of all choices in the order of the questions.
fn result(task: &str, questions: &[Choice], losses: &[SampleLoss]) -> Result<TaskResult> {
    if questions.is_empty() {
        let expected = "question";
        return Err(Error::Nothing { expected });
    }
    let mut rest = losses;
    let mut values = METRICS.map(|_| Vec::with_capacity(questions.len()));
    for (question, content) in questions.iter().enumerate() {
        let (losses, others) = rest.split_at(content.samples.len());
        rest = others;
        if let Some(choice) = losses.iter().position(|loss| loss.tokens == 0) {
            return Err(Error::Unscored { question, choice });
        }
        let answers = ChoiceAnswers {
            texts: &content.texts,
            labels: vec![content.answer as i64],
            logprobs: losses.iter().map(|loss| -loss.loss_sum).collect(),
            is_greedy: Vec::new(),
            alone: Vec::new(),
        };
        for (values, metric) in values.iter_mut().zip(METRICS) {
            values.push(answers.value(metric)?);
        }
    }
    let metrics = METRICS.into_iter().zip(values);
    let metric = |(metric, values): (Metric, Vec<RowValue>)| {
        let of = MetricUse::usual(metric);
        MetricResult::new("none", &of, values)
    };
    Ok(TaskResult {
        task: task.to_owned(),
        version: "rows".into(),
        fewshot: 0,
        n: questions.len(),
        n_rows: questions.len(),
        answers: Answers::default(),
        metrics: metrics.map(metric).collect::<Result<_>>()?,
        filtered: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(texts: &[&str], answer: usize) -> Choice {
        let sample = Sample {
            ids: vec![1, 2],
            trained: vec![false, true],
            trained_bytes: 1,
            truncated: false,
        };
        Choice {
            samples: vec![sample; texts.len()],
            texts: texts.iter().map(|text| (*text).to_owned()).collect(),
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
    fn the_most_likely_choice_is_the_answer_by_length_or_not() {
        // What is right if choice 0, 1 or 2 is: each metric chooses one.
        for (sums, texts, chosen) in [
            (&[3.0, 2.0, 4.0][..], &["a", "b", "c"][..], [1, 1, 1]),
            // 3/6 < 2/2 < 4/2, although 2 is the smallest sum.
            (&[3.0, 2.0, 4.0], &["aaaaaa", "bb", "cc"], [1, 0, 0]),
            (&[2.0, 1.0], &["aa", "b"], [1, 0, 0]),
            // 4/4 per character and 4/8 per byte, next to 2.5/4.
            (&[4.0, 2.5], &["éééé", "bbbb"], [1, 1, 0]),
        ] {
            for answer in 0..texts.len() {
                let found = result("t", &[question(texts, answer)], &losses(sums)).unwrap();
                let found: Vec<f64> = found.metrics.iter().map(|metric| metric.value).collect();
                let expected = chosen.map(|chosen| f64::from(u8::from(chosen == answer)));
                assert_eq!(found, expected, "{sums:?} {texts:?} {answer}");
            }
        }
    }

    #[test]
    fn accuracy_and_its_error_are_those_worked_out_by_hand() {
        // Answers 1, 1, 0, 1 where 1, 0, 0, 1 are right.
        let questions = [
            question(&["a", "b"], 1),
            question(&["a", "b"], 0),
            question(&["a", "b", "c"], 0),
            question(&["a", "b"], 1),
        ];
        let sums = losses(&[5.0, 4.0, 8.0, 1.0, 1.0, 3.0, 9.0, 2.0, 1.0]);
        let found = result("t", &questions, &sums).unwrap();
        let acc = &found.metrics[0];
        let right: Vec<RowValue> = [1.0, 0.0, 1.0, 1.0].map(RowValue::Number).to_vec();
        assert_eq!((acc.value, &acc.of_items, found.n), (0.75, &right, 4));
        // √(3 · (1/4)² + (3/4)²) / √(3 · 4)
        assert!((acc.standard_error.unwrap() - 0.25).abs() < 1e-15);
    }

    #[test]
    fn questions_without_a_score_are_refused() {
        let mut none = losses(&[1.0, 2.0]);
        none[1].tokens = 0;
        let problem = result("t", &[question(&["a", "b"], 0)], &none).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "question 0: choice 1: expected a token before it, found none; give the question a prompt"
        );
        let problem = result("t", &[], &[]).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "expected at least one question to score, found none"
        );
    }
}
