//! Prompts: what a model is asked about a row, with examples before it.

use super::definition::{DocValue, FewshotSampler, FewshotSetup, TaskDefinition};
use super::metric::{Metric, OutputType};
use super::random::PythonRandom;
use super::task_row::TaskRow;
use super::values::{Target, TextValue};
use crate::{Error, Result};

/// The harness's seed of few-shot examples.
const FEWSHOT_SEED: u64 = 1234;

/// What a model is asked about a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What is scored or written after what.
    pub requests: Vec<TaskRequest>,
    /// The choices, if there are some.
    pub choices: Vec<String>,
    /// What `doc_to_target` gives.
    pub target: Target,
    /// The expected answer: the target, or the number of the right prompt if each choice is a prompt of its own.
    pub right: Target,
}

/// One text after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskRequest {
    /// What is given.
    pub context: String,
    /// What is scored after it; none if the model writes.
    pub continuation: Option<String>,
}

/// Rows that examples are taken from.
#[derive(Clone, Debug, PartialEq)]
pub struct FewshotPool {
    rows: Vec<TaskRow>,
    /// Whether a row that is asked about may be among them.
    holds_questions: bool,
}

impl FewshotPool {
    /// A pool of rows; `holds_questions` if they are those that are asked about.
    ///
    /// # Errors
    /// If the setup names a row that is not there.
    pub fn new(setup: &FewshotSetup, rows: Vec<TaskRow>, holds_questions: bool) -> Result<Self> {
        let rows = match &setup.indices {
            None => rows,
            Some(indices) => {
                let row = |at: &usize| {
                    let row = rows.get(*at).cloned();
                    row.ok_or_else(|| {
                        let expected = format!("`fewshot_indices` below {}", rows.len());
                        Error::schema(expected, at.to_string())
                    })
                };
                indices.iter().map(row).collect::<Result<_>>()?
            }
        };
        Ok(Self {
            rows,
            holds_questions,
        })
    }
}

/// Makes the questions of a task, row by row: random examples depend on the rows before.
#[derive(Debug)]
pub struct QuestionMaker<'a> {
    task: &'a TaskDefinition,
    pool: FewshotPool,
    count: usize,
    random: PythonRandom,
}

/// The parts of a prompt that a row gives, with a task's settings or those of its examples.
struct Forms<'a> {
    text: &'a DocValue,
    target: &'a DocValue,
    choice: Option<&'a DocValue>,
    gen_prefix: Option<&'a DocValue>,
    target_delimiter: &'a str,
}

impl<'a> QuestionMaker<'a> {
    /// For a task with so many examples, from a pool.
    pub fn new(task: &'a TaskDefinition, pool: FewshotPool, count: usize) -> Self {
        Self {
            task,
            pool,
            count,
            random: PythonRandom::new(FEWSHOT_SEED),
        }
    }

    /// What is asked about a row.
    ///
    /// # Errors
    /// If a template fails, gives something else than is expected, or there are too few examples.
    pub fn question(&mut self, row: &TaskRow) -> Result<Question> {
        let task = self.task;
        let before = self.before(row)?;
        let has_choices = task.choice.is_some();
        let choices = match &task.choice {
            Some(choice) => choice.choices(row)?,
            None => Vec::new(),
        };
        let target = task.target.target(row, has_choices)?;
        let mut right = target.clone();
        if task.output == OutputType::LoglikelihoodRolling {
            let whole = TaskRequest {
                context: String::new(),
                continuation: Some(answer_text(&target, &[])?),
            };
            return Ok(Question {
                requests: vec![whole],
                choices,
                right,
                target,
            });
        }
        let forms = self.forms();
        let text = task.text.text(row, has_choices)?;
        let (contexts, continuations) = match text {
            TextValue::Text(text) => {
                let context = before + &prompt(&forms, row, text)?;
                let continuations = match task.output {
                    OutputType::MultipleChoice => choices.clone(),
                    OutputType::GenerateUntil => Vec::new(),
                    _ => vec![answer_text(&target, &[])?],
                };
                (vec![context], continuations)
            }
            // Each choice is a prompt of its own, before the same text.
            TextValue::Choice(number) => {
                let without = Forms {
                    target_delimiter: "",
                    ..forms
                };
                let context =
                    |choice: &String| Ok(before.clone() + &prompt(&without, row, choice.clone())?);
                let contexts = choices.iter().map(context).collect::<Result<_>>()?;
                let continuation = answer_text(&target, &[])?;
                right = Target::Choice(number);
                (contexts, vec![continuation])
            }
        };
        Ok(Question {
            requests: self.requests(contexts, continuations, &choices),
            choices,
            target,
            right,
        })
    }

    fn requests(
        &self,
        contexts: Vec<String>,
        continuations: Vec<String>,
        choices: &[String],
    ) -> Vec<TaskRequest> {
        let task = self.task;
        let request = |context: &str, continuation: Option<String>| TaskRequest {
            context: context.to_owned(),
            continuation,
        };
        let delimiter = match task.output {
            OutputType::MultipleChoice => &*task.target_delimiter,
            _ => "",
        };
        let delimited = |text: &String| Some(format!("{delimiter}{text}"));
        let mut requests = Vec::new();
        for context in &contexts {
            match task.output {
                OutputType::GenerateUntil => requests.push(request(context, None)),
                _ => requests.extend(
                    continuations
                        .iter()
                        .map(|text| request(context, delimited(text))),
                ),
            }
        }
        let is_mutual = |metric: &super::metric::MetricUse| metric.metric == Metric::AccMutualInfo;
        if task.metrics.iter().any(is_mutual) {
            requests.extend(choices.iter().map(|choice| request("", delimited(choice))));
        }
        requests
    }

    fn forms(&self) -> Forms<'a> {
        let task = self.task;
        Forms {
            text: &task.text,
            target: &task.target,
            choice: task.choice.as_ref(),
            gen_prefix: task.gen_prefix.as_ref(),
            target_delimiter: &task.target_delimiter,
        }
    }

    /// Description and examples.
    fn before(&mut self, row: &TaskRow) -> Result<String> {
        let task = self.task;
        let mut text = match &task.description {
            Some(description) => description.printed(row)?,
            None => String::new(),
        };
        let usual = self.forms();
        let setup = &task.fewshot;
        let forms = Forms {
            text: setup.text.as_ref().unwrap_or(usual.text),
            target: setup.target.as_ref().unwrap_or(usual.target),
            choice: setup.choice.as_ref().or(usual.choice),
            gen_prefix: setup.gen_prefix.as_ref().or(usual.gen_prefix),
            target_delimiter: setup
                .target_delimiter
                .as_deref()
                .unwrap_or(usual.target_delimiter),
        };
        let delimiter = setup
            .fewshot_delimiter
            .as_deref()
            .unwrap_or(&task.fewshot_delimiter);
        for example in self.examples(row)? {
            text.push_str(&example_text(&forms, &example, task.choice.is_some())?);
            text.push_str(delimiter);
        }
        Ok(text)
    }

    /// The examples of a row.
    fn examples(&mut self, row: &TaskRow) -> Result<Vec<TaskRow>> {
        let count = self.count;
        if count == 0 {
            return Ok(Vec::new());
        }
        let rows = &self.pool.rows;
        let too_few = || {
            let expected = format!("at least {count} rows to take examples from");
            Error::schema(expected, rows.len().to_string())
        };
        let others = |places: Vec<usize>| -> Vec<TaskRow> {
            let chosen = places.into_iter().map(|place| &rows[place]);
            let chosen = chosen.filter(|other| !self.pool.holds_questions || *other != row);
            chosen.take(count).cloned().collect()
        };
        if self.task.fewshot.sampler == FewshotSampler::FirstN {
            let chosen = others((0..rows.len()).collect());
            return if chosen.len() == count {
                Ok(chosen)
            } else {
                Err(too_few())
            };
        }
        let drawn = count + usize::from(self.pool.holds_questions);
        let places = self.random.sample(rows.len(), drawn).ok_or_else(too_few)?;
        let chosen = others(places);
        if chosen.len() == count {
            return Ok(chosen);
        }
        // The row was drawn more than once.
        let rest: Vec<usize> = (0..rows.len())
            .filter(|place| rows[*place] != *row)
            .collect();
        let again = self.random.sample(rest.len(), count).ok_or_else(too_few)?;
        Ok(again.into_iter().map(|at| rows[rest[at]].clone()).collect())
    }
}

/// The question itself, ready for an answer.
fn prompt(forms: &Forms<'_>, row: &TaskRow, text: String) -> Result<String> {
    let prefix = match forms.gen_prefix {
        Some(prefix) => prefix.printed(row)?,
        None => String::new(),
    };
    if prefix.is_empty() {
        return Ok(text);
    }
    let delimiter = if needs_delimiter(&text, &prefix) {
        forms.target_delimiter
    } else {
        ""
    };
    Ok(format!("{text}{delimiter}{prefix}"))
}

/// A question with its answer.
fn example_text(forms: &Forms<'_>, row: &TaskRow, has_choices: bool) -> Result<String> {
    let mut choices = match forms.choice {
        Some(choice) => choice.choices(row)?,
        None => Vec::new(),
    };
    let text = match forms.text.text(row, has_choices)? {
        TextValue::Text(text) => text,
        TextValue::Choice(number) => {
            let text = chosen(&choices, number)?;
            choices.clear();
            text
        }
    };
    let target = forms.target.target(row, has_choices)?;
    let prefix = match forms.gen_prefix {
        Some(prefix) => prefix.printed(row)?,
        None => String::new(),
    };
    if target == Target::Text(String::new()) {
        return prompt(forms, row, text);
    }
    let answer = answer_text(&target, &choices)?;
    let (delimiter, answer) = match prefix.is_empty() {
        true => (forms.target_delimiter, answer),
        false => {
            let delimiter = if needs_delimiter(&text, &prefix) {
                forms.target_delimiter
            } else {
                ""
            };
            (delimiter, joined(&prefix, &answer))
        }
    };
    Ok(format!("{text}{delimiter}{answer}"))
}

/// The text of an answer.
fn answer_text(target: &Target, choices: &[String]) -> Result<String> {
    match target {
        Target::Text(text) => Ok(text.clone()),
        Target::Choice(number) if choices.is_empty() => Ok(number.to_string()),
        Target::Choice(number) => chosen(choices, *number),
        Target::Any(targets) => match targets.first() {
            Some(first) => answer_text(first, &[]),
            None => Err(Error::schema("an answer", "an empty list")),
        },
    }
}

/// A choice by its number; below 0, from the end.
fn chosen(choices: &[String], number: i64) -> Result<String> {
    let at = if number < 0 {
        number + choices.len() as i64
    } else {
        number
    };
    let found = usize::try_from(at).ok().and_then(|at| choices.get(at));
    found.cloned().ok_or_else(|| {
        let expected = format!("the number of one of {} choices", choices.len());
        Error::schema(expected, format!("`{number}`"))
    })
}

/// Whether two texts have no white space where they meet.
fn needs_delimiter(before: &str, after: &str) -> bool {
    let ends = before
        .chars()
        .next_back()
        .is_some_and(|c| !crate::jinja::is_space(c));
    ends && after
        .chars()
        .next()
        .is_some_and(|c| !crate::jinja::is_space(c))
}

/// Two texts with a space between them if there is none.
fn joined(before: &str, after: &str) -> String {
    let between = if needs_delimiter(before, after) {
        " "
    } else {
        ""
    };
    format!("{before}{between}{after}")
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::TaskIndex;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/harness_tasks")
    }

    fn rows(name: &str) -> Vec<TaskRow> {
        let text = std::fs::read_to_string(folder().join(name)).unwrap();
        let rows = text
            .lines()
            .map(|line| TaskRow::new(serde_json::from_str(line).unwrap()));
        rows.collect()
    }

    /// What the harness asks for each row of tasks of all kinds: text by text.
    #[test]
    fn questions_are_those_of_the_harness() {
        let index = TaskIndex::open(&folder()).unwrap();
        let asked = std::fs::read_to_string(folder().join("asked.json")).unwrap();
        let asked: serde_json::Value = serde_json::from_str(&asked).unwrap();
        let asked = asked.as_object().unwrap();
        assert_eq!(index.names().count(), asked.len());
        for (name, expected) in asked {
            let task = index.task(name).unwrap();
            let rows = rows(&task.dataset.files[0].1[0]);
            let setup = &task.fewshot;
            let pool = match &setup.samples {
                Some(samples) => samples
                    .iter()
                    .map(|row| TaskRow::new(row.as_object().unwrap().clone()))
                    .collect(),
                None => rows.clone(),
            };
            let holds_questions = setup.split == task.splits.test;
            let pool = FewshotPool::new(setup, pool, holds_questions).unwrap();
            let mut maker = QuestionMaker::new(&task, pool, setup.count.unwrap_or(0));
            for (at, row) in rows.iter().enumerate() {
                let question = maker.question(row).unwrap();
                let found: Vec<serde_json::Value> = question
                    .requests
                    .iter()
                    .map(|request| serde_json::json!([request.context, request.continuation]))
                    .collect();
                assert_eq!(serde_json::Value::Array(found), expected[at], "{name} {at}");
            }
            assert_eq!(rows.len(), expected.as_array().unwrap().len(), "{name}");
        }
    }
}
