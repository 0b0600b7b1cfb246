//! The items of a task: its rows, and what a model is asked about each.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::dataset::TaskDataset;
use super::definition::TaskDefinition;
use super::metric::OutputType;
use super::question::{FewshotPool, Question, QuestionMaker};
use super::sha256::sha256;
use super::task_chat::TaskChat;
use super::task_row::TaskRow;
use super::twin::RowsTwin;
use super::values::Target;
use crate::{Error, Place, Result};

/// A row of a task, and what a model is asked about it.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskItem {
    /// The row.
    pub row: TaskRow,
    /// The question.
    pub question: Question,
}

/// The items of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskItems {
    /// The first ones, or all.
    pub items: Vec<TaskItem>,
    /// Rows of the split that they are from.
    pub n_rows: usize,
}

impl TaskItem {
    /// The SHA-256 of the first request's context, or of the whole text if that is scored, in hexadecimal digits.
    pub fn prompt_hash(&self, output: OutputType) -> String {
        let first = self.question.requests.first();
        let text = first.map(|request| match (output, &request.continuation) {
            (OutputType::LoglikelihoodRolling, Some(text)) => text.as_str(),
            _ => request.context.as_str(),
        });
        sha256(text.unwrap_or_default())
    }

    /// The SHA-256 of the expected answer, in hexadecimal digits.
    pub fn target_hash(&self) -> String {
        sha256(&self.question.target.to_string())
    }
}

/// How many items a task has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ItemLimits {
    /// Examples before each question; none is what the task says. A task that says 0 has none, whatever is wanted.
    pub fewshot: Option<usize>,
    /// The first rows; none is all of them.
    pub rows: Option<usize>,
}

/// Refuses a target that is none of the choices.
fn expect_choice(question: &Question) -> Result<()> {
    let choices = &question.choices;
    let targets = match &question.right {
        Target::Any(targets) => targets.as_slice(),
        one => std::slice::from_ref(one),
    };
    let is_choice = |target: &&Target| match target {
        Target::Choice(number) => usize::try_from(*number).is_ok_and(|at| at < choices.len()),
        Target::Text(text) => choices.contains(text),
        Target::Any(_) => false,
    };
    let other = targets.iter().find(|target| !is_choice(target));
    match other.filter(|_| !choices.is_empty()) {
        None => Ok(()),
        Some(other) => {
            let found = match other {
                Target::Choice(number) => format!("`{number}`"),
                Target::Text(text) => format!("`{text}`"),
                Target::Any(_) => "a list".into(),
            };
            let expected = format!("a target among {} choices", choices.len());
            Err(Error::schema(expected, found))
        }
    }
}

impl TaskDefinition {
    /// Examples before each question.
    pub fn fewshot_count(&self, wanted: Option<usize>) -> usize {
        match (self.fewshot.count, wanted) {
            (Some(0), _) => 0,
            (usual, wanted) => wanted.or(usual).unwrap_or(0),
        }
    }

    /// The items of the task, in the order of its rows.
    ///
    /// # Errors
    /// If a split is absent, or something fails for a row: with the number of the row.
    pub fn items(
        &self,
        dataset: &TaskDataset,
        limits: ItemLimits,
        chat: &TaskChat<'_>,
    ) -> Result<TaskItems> {
        let malformed = |problem: Error| Error::malformed(&self.file, problem.to_string());
        let splits = &self.splits;
        let Some(split) = splits.test.as_deref().or(splits.validation.as_deref()) else {
            let found = "none";
            return Err(malformed(Error::schema(
                "`test_split` or `validation_split`",
                found,
            )));
        };
        let rows = self.rows(dataset, split, self.process_docs);
        let mut rows = rows.map_err(malformed)?;
        let count = self.fewshot_count(limits.fewshot);
        let pool = match count {
            0 => Vec::new(),
            _ => self
                .fewshot_rows(dataset, split, &rows)
                .map_err(malformed)?,
        };
        let n_rows = rows.len();
        rows.truncate(limits.rows.unwrap_or(usize::MAX));
        // That the two are the same is what the harness looks at, also if both are absent.
        let holds_questions = self.fewshot.split == splits.test;
        let pool = FewshotPool::new(pool, holds_questions);
        let mut maker = QuestionMaker::new(self, pool, count, chat);
        let items = rows.into_iter().enumerate().map(|(number, row)| {
            let question = maker.question(&row).and_then(|question| {
                expect_choice(&question)?;
                Ok(question)
            });
            let question =
                question.map_err(|problem| problem.at(&self.file, Place::Row(number)))?;
            Ok(TaskItem { row, question })
        });
        Ok(TaskItems {
            items: items.collect::<Result<_>>()?,
            n_rows,
        })
    }

    /// The files that its rows are in: those of the questions, and those of examples if there are any.
    ///
    /// # Errors
    /// As [`TaskDataset::files`].
    pub fn data_files(&self, dataset: &TaskDataset, fewshot: usize) -> Result<Vec<PathBuf>> {
        let splits = &self.splits;
        let evaluated = splits.test.as_deref().or(splits.validation.as_deref());
        let of_examples = match (fewshot, &self.fewshot.samples) {
            (0, _) => None,
            (_, Some(_)) if self.fewshot.split.is_none() => None,
            _ => self.example_split(),
        };
        let mut files = BTreeSet::new();
        for split in evaluated.into_iter().chain(of_examples) {
            files.extend(dataset.files(split)?.iter().cloned());
        }
        Ok(files.into_iter().collect())
    }

    /// The split that examples are taken from, unless they are in the task's file.
    fn example_split(&self) -> Option<&str> {
        let splits = &self.splits;
        let usual = [&splits.training, &splits.validation, &splits.test];
        let usual = usual.into_iter().flatten().next();
        self.fewshot.split.as_ref().or(usual).map(String::as_str)
    }

    /// Rows that examples are taken from; `rows` are those of the evaluated split.
    fn fewshot_rows(
        &self,
        dataset: &TaskDataset,
        evaluated: &str,
        rows: &[TaskRow],
    ) -> Result<Vec<TaskRow>> {
        let setup = &self.fewshot;
        if let (None, Some(samples)) = (&setup.split, &setup.samples) {
            let row = |sample: &serde_json::Value| {
                TaskRow::new(sample.as_object().cloned().unwrap_or_default())
            };
            return Ok(samples.iter().map(row).collect());
        }
        match self.example_split() {
            Some(split) if split != evaluated || setup.process_docs.is_some() => {
                let twin = setup.process_docs.or(self.process_docs);
                self.rows(dataset, split, twin)
            }
            _ => Ok(rows.to_vec()),
        }
    }

    /// The rows of a split, and what is made of them.
    fn rows(
        &self,
        dataset: &TaskDataset,
        split: &str,
        twin: Option<RowsTwin>,
    ) -> Result<Vec<TaskRow>> {
        let rows = dataset.rows(split)?;
        let rows = match twin {
            Some(twin) => twin.apply(rows)?,
            None => rows,
        };
        match rows.is_empty() {
            true => Err(Error::schema(
                format!("rows of {} in `{split}`", self.name),
                "none",
            )),
            false => Ok(rows),
        }
    }
}
