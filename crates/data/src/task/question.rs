//! Prompts: what a model is asked about a row, with examples before it.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/api/task.py, `fewshot_context`, `build_qa_turn`, `construct_requests`.

use super::definition::{DocValue, FewshotSampler, TaskDefinition};
use super::metric::{Metric, OutputType};
use super::random::PythonRandom;
use super::task_chat::{Role, TaskChat, Turn};
use super::task_row::TaskRow;
use super::values::{Target, TextValue};
use crate::jinja::is_space;
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
    pub fn new(rows: Vec<TaskRow>, holds_questions: bool) -> Self {
        Self {
            rows,
            holds_questions,
        }
    }
}

/// Makes the questions of a task, row by row: random examples depend on the rows before.
#[derive(Debug)]
pub struct QuestionMaker<'a> {
    task: &'a TaskDefinition,
    pool: FewshotPool,
    count: usize,
    chat: &'a TaskChat<'a>,
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
    /// For a task with a number of examples from a pool, as a conversation or not.
    pub fn new(
        task: &'a TaskDefinition,
        pool: FewshotPool,
        count: usize,
        chat: &'a TaskChat<'a>,
    ) -> Self {
        Self {
            task,
            pool,
            count,
            chat,
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
        let prefix = forms.prefix(row)?;
        let context = |text: String, delimiter: &str| {
            let mut turns = before.clone();
            turns.extend(asked(text, &prefix, delimiter));
            self.chat.render(turns, !prefix.is_empty())
        };
        let (contexts, continuations) = match task.text.text(row, has_choices)? {
            TextValue::Text(text) => {
                let continuations = match task.output {
                    OutputType::MultipleChoice => choices.clone(),
                    OutputType::GenerateUntil => Vec::new(),
                    _ => vec![answer_text(&target, &[])?],
                };
                (vec![context(text, forms.target_delimiter)?], continuations)
            }
            // Each choice is a prompt of its own, before the same text.
            TextValue::Choice(number) => {
                let contexts = choices.iter().map(|choice| context(choice.clone(), ""));
                let continuation = answer_text(&target, &[])?;
                right = Target::Choice(number);
                (contexts.collect::<Result<_>>()?, vec![continuation])
            }
        };
        let delimiter = self.delimiter(&prefix);
        Ok(Question {
            requests: self.requests(contexts, continuations, &choices, delimiter),
            choices,
            target,
            right,
        })
    }

    /// What is between a prompt and a choice. In a conversation, the template is.
    fn delimiter(&self, prefix: &str) -> &'a str {
        let is_inside = prefix.chars().next_back().is_some_and(|c| !is_space(c));
        match self.task.output {
            OutputType::MultipleChoice if !self.chat.is_chat() || is_inside => {
                &self.task.target_delimiter
            }
            _ => "",
        }
    }

    fn requests(
        &self,
        contexts: Vec<String>,
        continuations: Vec<String>,
        choices: &[String],
        delimiter: &str,
    ) -> Vec<TaskRequest> {
        let task = self.task;
        let request = |context: &str, continuation: Option<String>| TaskRequest {
            context: context.to_owned(),
            continuation,
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

    /// The system's text and the description, and examples.
    fn before(&mut self, row: &TaskRow) -> Result<Vec<Turn>> {
        let task = self.task;
        let description = match &task.description {
            Some(description) => description.printed(row)?,
            None => String::new(),
        };
        let system = self.chat.system.unwrap_or_default();
        let system = joined(system, &description, &task.fewshot_delimiter);
        let mut turns = Vec::new();
        if !system.is_empty() {
            turns.push(Turn::new(Role::System, system, ""));
        }
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
        let delimiter = setup.fewshot_delimiter.as_deref();
        let delimiter = delimiter.unwrap_or(&task.fewshot_delimiter);
        for example in self.examples(row)? {
            turns.extend(forms.example(&example, task.choice.is_some(), delimiter)?);
        }
        Ok(turns)
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

impl Forms<'_> {
    /// What an answer begins with; empty if it is free.
    fn prefix(&self, row: &TaskRow) -> Result<String> {
        match self.gen_prefix {
            Some(prefix) => prefix.printed(row),
            None => Ok(String::new()),
        }
    }

    /// A question with its answer, and what is between it and the next.
    fn example(&self, row: &TaskRow, has_choices: bool, end: &str) -> Result<Vec<Turn>> {
        let mut choices = match self.choice {
            Some(choice) => choice.choices(row)?,
            None => Vec::new(),
        };
        let text = match self.text.text(row, has_choices)? {
            TextValue::Text(text) => text,
            TextValue::Choice(number) => {
                let text = chosen(&choices, number)?;
                choices.clear();
                text
            }
        };
        let target = self.target.target(row, has_choices)?;
        let prefix = self.prefix(row)?;
        if target == Target::Text(String::new()) {
            return Ok(asked(text, &prefix, self.target_delimiter));
        }
        let answer = joined(&prefix, &answer_text(&target, &choices)?, " ");
        let delimiter = match prefix.is_empty() || needs_delimiter(&text, &prefix) {
            true => self.target_delimiter,
            false => "",
        };
        Ok(vec![
            Turn::new(Role::User, text, delimiter),
            Turn::new(Role::Assistant, answer, end),
        ])
    }
}

/// A question that is still to be answered, and what the answer begins with.
fn asked(text: String, prefix: &str, delimiter: &str) -> Vec<Turn> {
    if prefix.is_empty() {
        return vec![Turn::new(Role::User, text, "")];
    }
    let delimiter = match needs_delimiter(&text, prefix) {
        true => delimiter,
        false => "",
    };
    vec![
        Turn::new(Role::User, text, delimiter),
        Turn::new(Role::Assistant, prefix.to_owned(), ""),
    ]
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
    let is_text = |end: Option<char>| end.is_some_and(|c| !is_space(c));
    is_text(before.chars().next_back()) && is_text(after.chars().next())
}

/// Two texts with a delimiter between them if there is no white space.
fn joined(before: &str, after: &str, delimiter: &str) -> String {
    match needs_delimiter(before, after) {
        true => format!("{before}{delimiter}{after}"),
        false => format!("{before}{after}"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::{ChatTemplate, GenerationPrompt, TaskIndex};

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

    fn golden(name: &str) -> serde_json::Value {
        let text = std::fs::read_to_string(folder().join(name)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Prompts and continuations of each row of a task.
    fn asked(task: &TaskDefinition, chat: &TaskChat<'_>) -> serde_json::Value {
        let rows = rows(&task.dataset.files[0].1[0]);
        let setup = &task.fewshot;
        let pool = match &setup.samples {
            Some(samples) => samples
                .iter()
                .map(|row| TaskRow::new(row.as_object().unwrap().clone()))
                .collect(),
            None => rows.clone(),
        };
        let pool = FewshotPool::new(pool, setup.split == task.splits.test);
        let mut maker = QuestionMaker::new(task, pool, setup.count.unwrap_or(0), chat);
        let of_row = |row: &TaskRow| -> serde_json::Value {
            let requests = maker.question(row).unwrap().requests.into_iter();
            let pairs =
                requests.map(|request| serde_json::json!([request.context, request.continuation]));
            pairs.collect()
        };
        rows.iter().map(of_row).collect()
    }

    fn same(task: &TaskDefinition, chat: &TaskChat<'_>, expected: &serde_json::Value, what: &str) {
        let found = asked(task, chat);
        let (found, expected) = (found.as_array().unwrap(), expected.as_array().unwrap());
        assert_eq!(found.len(), expected.len(), "{what}");
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found, expected, "{what} {at}");
        }
    }

    /// What the harness asks for each row of tasks of all kinds: text by text.
    #[test]
    fn questions_are_those_of_the_harness() {
        let (index, golden) = (TaskIndex::open(&folder()).unwrap(), golden("asked.json"));
        let golden = golden.as_object().unwrap();
        assert_eq!(index.names().count(), golden.len());
        for (name, expected) in golden {
            same(
                &index.task(name).unwrap(),
                &TaskChat::default(),
                expected,
                name,
            );
        }
    }

    /// The same in a chat template: examples as turns or in one message, with and without a system message and thoughts.
    #[test]
    fn conversations_are_those_of_the_harness() {
        let (index, golden) = (TaskIndex::open(&folder()).unwrap(), golden("chats.json"));
        let source = std::fs::read_to_string(folder().join("chat_template.jinja")).unwrap();
        let tokens = [
            ("bos_token", "<｜begin▁of▁sentence｜>"),
            ("eos_token", "<｜end▁of▁sentence｜>"),
        ];
        let tokens = tokens.map(|(name, token)| (name.to_owned(), token.into()));
        let template = ChatTemplate::new(&source, tokens.into()).unwrap();
        let kinds = [
            ("turns", false, None, None),
            ("system", false, Some("Answer well."), None),
            (
                "one message",
                true,
                Some("Answer well."),
                Some(GenerationPrompt::NoThink),
            ),
        ];
        assert_eq!(golden.as_object().unwrap().len(), kinds.len());
        for (kind, is_single_turn, system, generation_prompt) in kinds {
            let chat = TaskChat {
                template: Some(&template),
                system,
                is_single_turn,
                generation_prompt,
                ..TaskChat::default()
            };
            let tasks = golden[kind].as_object().unwrap();
            assert_eq!(index.names().count(), tasks.len());
            for (name, expected) in tasks {
                let what = format!("{kind} {name}");
                same(&index.task(name).unwrap(), &chat, expected, &what);
            }
        }
    }
}
