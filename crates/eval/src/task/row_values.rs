//! The values of metrics for one item.

use data::{
    Aggregation, Filtered, Ignored, Metric, MetricUse, OutputType, ResultsTwin, Target,
    TaskDefinition, TaskItem,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answers::Answer;
use super::translation::{BleuCounts, ChrfCounts, TerCounts, bleu_counts, chrf_counts, ter_counts};
use crate::error::{Error, Result};

/// What an item adds to a metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum RowValue {
    /// A number; of metrics that are right or wrong, 1 or 0.
    Number(f64),
    /// A number, and how much it weighs.
    Weighted(f64, f64),
    /// The right label and the chosen one.
    Labels(i64, i64),
    /// Counts for BLEU.
    Bleu(BleuCounts),
    /// Counts for chrF.
    Chrf(ChrfCounts),
    /// Counts for TER.
    Ter(TerCounts),
}

/// The largest count that is read: more tokens, bytes or items than any evaluation has. Sums of larger ones could overflow.
pub(crate) const LARGEST_COUNT: u64 = 1 << 32;

/// The numbers in a value.
fn numbers(value: &Value) -> Box<dyn Iterator<Item = f64> + '_> {
    match value {
        Value::Object(entries) => Box::new(entries.values().flat_map(numbers)),
        Value::Array(values) => Box::new(values.iter().flat_map(numbers)),
        other => Box::new(other.as_f64().into_iter()),
    }
}

impl RowValue {
    /// A value as it is serialized; `how` says which of two numbers it is.
    pub(crate) fn read(how: Aggregation, value: &Value) -> Option<Self> {
        if let Some(number) = value.as_f64() {
            return Some(Self::Number(number));
        }
        let has_counts = !numbers(value).any(|number| number > LARGEST_COUNT as f64);
        let counts = match how {
            Aggregation::Bleu => BleuCounts::deserialize(value).ok().map(Self::Bleu),
            Aggregation::Chrf => ChrfCounts::deserialize(value).ok().map(Self::Chrf),
            Aggregation::Ter => TerCounts::deserialize(value).ok().map(Self::Ter),
            _ => None,
        };
        if counts.is_some() {
            return counts.filter(|_| has_counts);
        }
        let [first, second] = value.as_array()?.as_slice() else {
            return None;
        };
        match how {
            Aggregation::F1 | Aggregation::Mcc => {
                Some(Self::Labels(first.as_i64()?, second.as_i64()?))
            }
            _ => Some(Self::Weighted(first.as_f64()?, second.as_f64()?)),
        }
    }
}

/// The chosen label of a choice that is none.
const NO_CHOICE: i64 = -100;

/// The answers to an item, as its metrics take them.
enum ItemAnswers<'a> {
    Choices(ChoiceAnswers<'a>),
    /// Of one text after a prompt.
    Continuation {
        logprob: f64,
        is_greedy: bool,
    },
    /// Of a whole text.
    Whole {
        logprob: f64,
        text: &'a str,
    },
    Written(&'a TaskItem, &'a Filtered),
    /// The share of probability of what is true.
    TrueMass(f64),
}

/// The values of a task's metrics for an item.
///
/// # Errors
/// If an answer has not the form that a metric needs.
pub(super) fn row_values(
    task: &TaskDefinition,
    item: &TaskItem,
    answers: &[Answer],
    filtered: Option<&Filtered>,
) -> Result<Vec<RowValue>> {
    let answers = match (task.output, filtered) {
        (OutputType::MultipleChoice, _) if task.process_results == Some(ResultsTwin::TrueMass) => {
            ItemAnswers::TrueMass(true_mass(item, answers)?)
        }
        (OutputType::MultipleChoice, _) => ItemAnswers::Choices(ChoiceAnswers::new(item, answers)?),
        (OutputType::Loglikelihood, _) => {
            let (logprob, is_greedy) = likelihood(answers.first())?;
            ItemAnswers::Continuation { logprob, is_greedy }
        }
        (OutputType::LoglikelihoodRolling, _) => {
            let (logprob, _) = likelihood(answers.first())?;
            let text = item.question.requests.first();
            let text = text.and_then(|request| request.continuation.as_deref());
            let text = match task.process_results {
                Some(ResultsTwin::OriginalPage) => item.row.page()?,
                _ => text.unwrap_or_default(),
            };
            ItemAnswers::Whole { logprob, text }
        }
        (OutputType::GenerateUntil, Some(filtered)) => ItemAnswers::Written(item, filtered),
        (OutputType::GenerateUntil, None) => {
            let expected = "written answer";
            return Err(Error::Nothing { expected });
        }
    };
    task.metrics.iter().map(|of| answers.value(of)).collect()
}

impl ItemAnswers<'_> {
    fn value(&self, of: &MetricUse) -> Result<RowValue> {
        let problem = |found: &str| {
            let metric = of.metric.name();
            let found = found.to_owned();
            Err(Error::Metric { metric, found })
        };
        match (self, of.metric) {
            (Self::Choices(choices), metric) => choices.value(metric),
            (Self::Continuation { is_greedy, .. }, Metric::Acc) => {
                Ok(RowValue::Number(truth(*is_greedy)))
            }
            (Self::Continuation { logprob, .. }, Metric::Perplexity) => {
                Ok(RowValue::Number(*logprob))
            }
            (Self::Continuation { .. }, _) => problem("the likelihood of a text"),
            (Self::Whole { logprob, text }, Metric::WordPerplexity) => {
                let words = data::count_words(text) as f64;
                Ok(RowValue::Weighted(*logprob, words))
            }
            (Self::Whole { logprob, text }, Metric::BytePerplexity | Metric::BitsPerByte) => {
                Ok(RowValue::Weighted(*logprob, text.len() as f64))
            }
            (Self::Whole { .. }, _) => problem("the likelihood of a whole text"),
            (Self::Written(item, answers), Metric::ExactMatch) => {
                exact_match(item, answers, &of.ignored)
            }
            (
                Self::Written(item, answers),
                metric @ (Metric::Bleu | Metric::Chrf | Metric::Ter),
            ) => translation(metric, item, answers),
            (Self::Written(..), _) => problem("written answers"),
            (Self::TrueMass(mass), Metric::Acc) => Ok(RowValue::Number(*mass)),
            (Self::TrueMass(_), _) => problem("a share of probability"),
        }
    }
}

/// What an item adds to a metric of translations: the counts of the answer against the one that is expected.
fn translation(metric: Metric, item: &TaskItem, answers: &Filtered) -> Result<RowValue> {
    let problem = |found: &str| {
        let metric = metric.name();
        let found = found.to_owned();
        Err(Error::Metric { metric, found })
    };
    let expected = match &item.question.right {
        Target::Any(_) => return problem("several expected answers"),
        one => one.to_string(),
    };
    let Filtered::One(text) = answers else {
        return problem("several answers");
    };
    let expected = [expected.as_str()];
    Ok(match metric {
        Metric::Bleu => RowValue::Bleu(bleu_counts(text, &expected)),
        Metric::Chrf => RowValue::Chrf(chrf_counts(text, &expected)),
        _ => RowValue::Ter(ter_counts(text, &expected)),
    })
}

/// The share of the choices' probability that true ones have.
fn true_mass(item: &TaskItem, answers: &[Answer]) -> Result<f64> {
    let is_true = item.row.true_choices()?;
    let logprobs: Vec<f64> = answers
        .iter()
        .map(|answer| Ok(likelihood(Some(answer))?.0))
        .collect::<Result<_>>()?;
    // Relative to the largest, so that none is too small for a number.
    let largest = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let masses: Vec<f64> = logprobs
        .iter()
        .map(|logprob| (logprob - largest).exp())
        .collect();
    let of_true = masses.iter().zip(is_true).filter(|(_, is_true)| *is_true);
    Ok(of_true.map(|(mass, _)| mass).sum::<f64>() / masses.iter().sum::<f64>())
}

fn truth(is_true: bool) -> f64 {
    f64::from(u8::from(is_true))
}

fn likelihood(answer: Option<&Answer>) -> Result<(f64, bool)> {
    match answer {
        Some(Answer::Likelihood { logprob, is_greedy }) => Ok((*logprob, *is_greedy)),
        _ => Err(Error::Nothing {
            expected: "text with a probability",
        }),
    }
}

/// How likely the choices of a question are.
pub(crate) struct ChoiceAnswers<'a> {
    pub(crate) texts: &'a [String],
    /// The right choices.
    pub(crate) labels: Vec<i64>,
    /// After the prompt.
    pub(crate) logprobs: Vec<f64>,
    pub(crate) is_greedy: Vec<bool>,
    /// Without the prompt, if that was asked.
    pub(crate) alone: Vec<f64>,
}

impl<'a> ChoiceAnswers<'a> {
    fn new(item: &'a TaskItem, answers: &[Answer]) -> Result<Self> {
        let texts = &item.question.choices;
        let all: Vec<(f64, bool)> = answers
            .iter()
            .map(|answer| likelihood(Some(answer)))
            .collect::<Result<_>>()?;
        let (first, alone) = all.split_at(texts.len().min(all.len()));
        let label = |target: &Target| match target {
            Target::Choice(number) => *number,
            Target::Text(text) => {
                let at = texts.iter().position(|choice| choice == text);
                at.map_or(NO_CHOICE, |at| at as i64)
            }
            Target::Any(_) => NO_CHOICE,
        };
        Ok(Self {
            texts,
            labels: match &item.question.right {
                Target::Any(targets) => targets.iter().map(label).collect(),
                one => vec![label(one)],
            },
            logprobs: first.iter().map(|(logprob, _)| *logprob).collect(),
            is_greedy: first.iter().map(|(_, is_greedy)| *is_greedy).collect(),
            alone: alone.iter().map(|(logprob, _)| *logprob).collect(),
        })
    }

    /// The choice with the largest log-probability in relation to its length; the first of several.
    fn chosen(&self, length: impl Fn(&str) -> usize) -> i64 {
        let choices = self.logprobs.iter().zip(self.texts);
        largest(choices.map(|(logprob, text)| logprob / length(text) as f64))
    }

    /// # Errors
    /// If the metric is none of choices, or takes one right choice and there are several.
    pub(crate) fn value(&self, metric: Metric) -> Result<RowValue> {
        let chosen = || self.chosen(|_| 1);
        let right = |chosen: i64| RowValue::Number(truth(self.labels.contains(&chosen)));
        let chars = |text: &str| text.chars().count();
        let problem = |found: String| Error::Metric {
            metric: metric.name(),
            found,
        };
        Ok(match metric {
            Metric::Acc => right(chosen()),
            Metric::AccNorm => right(self.chosen(chars)),
            Metric::AccBytes => right(self.chosen(str::len)),
            Metric::AccMutualInfo => {
                let raised = self.logprobs.iter().zip(&self.alone);
                right(largest(raised.map(|(after, alone)| after - alone)))
            }
            Metric::ExactMatch => {
                let mut greedy = (0i64..).zip(&self.is_greedy).filter(|(_, greedy)| **greedy);
                RowValue::Number(truth(greedy.any(|(at, _)| self.labels.contains(&at))))
            }
            Metric::F1 | Metric::Mcc => match self.labels.as_slice() {
                [label] => RowValue::Labels(*label, chosen()),
                several => {
                    let n = several.len();
                    return Err(problem(format!("{n} right choices of one question")));
                }
            },
            _ => return Err(problem("choices".into())),
        })
    }
}

/// The place of the largest number; the first of several.
fn largest(numbers: impl Iterator<Item = f64>) -> i64 {
    let better = |best: (i64, f64), (at, number): (i64, f64)| match number > best.1 {
        true => (at, number),
        false => best,
    };
    (0..)
        .zip(numbers)
        .reduce(better)
        .map_or(NO_CHOICE, |(at, _)| at)
}

/// 1 if an answer is one of those that are expected. Of several answers, the share of these.
fn exact_match(item: &TaskItem, answers: &Filtered, ignored: &Ignored) -> Result<RowValue> {
    let question = &item.question;
    let text = |target: &Target| match target {
        Target::Text(text) => Some(text.clone()),
        Target::Choice(number) if question.choices.is_empty() => Some(number.to_string()),
        Target::Choice(number) => {
            let at = usize::try_from(*number).ok()?;
            question.choices.get(at).cloned()
        }
        Target::Any(_) => None,
    };
    let expected: Vec<String> = match &question.right {
        // A number in a list is no text.
        Target::Any(targets) => targets
            .iter()
            .filter(|target| matches!(target, Target::Text(_)))
            .filter_map(text)
            .collect(),
        one => text(one).into_iter().collect(),
    };
    let comparable = |text: &String| ignored.of_match(text);
    let expected: Vec<String> = expected
        .iter()
        .map(comparable)
        .collect::<data::Result<_>>()?;
    let answers = match answers {
        Filtered::One(answer) => std::slice::from_ref(answer),
        Filtered::Many(answers) => answers,
    };
    let answers: Vec<String> = answers
        .iter()
        .map(comparable)
        .collect::<data::Result<_>>()?;
    let right = answers
        .iter()
        .filter(|answer| expected.contains(answer))
        .count();
    Ok(RowValue::Number(right as f64 / answers.len().max(1) as f64))
}
