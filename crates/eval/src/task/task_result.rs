//! How good a model's answers to a task are.

use data::{
    Aggregation, FilterPipeline, Filtered, Metric, MetricUse, OutputType, TaskDefinition, TaskItem,
};

use serde::{Serialize, Serializer};

use super::aggregate::aggregate;
use super::answers::{Answer, Answers};
use super::bootstrap::standard_error;
use super::row_values::{RowValue, row_values};
use crate::error::{Error, Result};

/// The result of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskResult {
    /// The name of the task.
    pub task: String,
    /// Its version.
    pub version: String,
    /// Examples before each question.
    pub fewshot: usize,
    /// The number of items.
    pub n: usize,
    /// The number of rows that they are the first ones of.
    pub n_rows: usize,
    /// What the model answered.
    #[serde(flatten)]
    pub answers: Answers,
    /// For each filter all metrics.
    pub metrics: Vec<MetricResult>,
    /// For each filter what is left of the answers to each item, if they are texts.
    #[serde(skip)]
    pub filtered: Vec<Vec<Filtered>>,
}

/// A metric of answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MetricResult {
    /// The filter that made of answers what is measured.
    pub filter: String,
    /// The metric.
    #[serde(serialize_with = "name")]
    pub metric: Metric,
    /// How the values of items become one number.
    #[serde(serialize_with = "aggregation_name")]
    pub aggregation: Aggregation,
    /// Whether more is better.
    pub is_higher_better: bool,
    /// The number.
    pub value: f64,
    /// Its standard error, if it has one.
    pub standard_error: Option<f64>,
    /// The values of items, in their order.
    pub of_items: Vec<RowValue>,
}

fn name<S: Serializer>(metric: &Metric, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(metric.name())
}

fn aggregation_name<S: Serializer>(
    how: &Aggregation,
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(how.name())
}

/// Refuses a task whose metrics or filters are not there for its answers, before anything is asked.
///
/// # Errors
/// If there is such a metric or filter.
pub fn expect_measured(task: &TaskDefinition) -> Result<()> {
    if task.output != OutputType::GenerateUntil {
        let changing = task.filters.iter().find(|filter| !filter.is_plain());
        return match changing {
            None => Ok(()),
            Some(filter) => Err(Error::Filter {
                filter: filter.name.clone(),
            }),
        };
    }
    let of_texts = [Metric::ExactMatch, Metric::Bleu, Metric::Chrf, Metric::Ter];
    let mut metrics = task.metrics.iter().map(|of| of.metric);
    match metrics.find(|metric| !of_texts.contains(metric)) {
        None => Ok(()),
        Some(metric) => Err(Error::Metric {
            metric: metric.name(),
            found: "written answers, of which `exact_match`, `bleu`, `chrf` and `ter` are measured"
                .into(),
        }),
    }
}

impl TaskResult {
    /// The result of answers to all items. The numbers are the examples before each question, and the rows of the split.
    ///
    /// # Errors
    /// If there is no item, a filter or metric does not fit the answers, or a pattern takes too many steps: with the number of the
    /// item.
    pub fn new(
        task: &TaskDefinition,
        items: &[TaskItem],
        (fewshot, n_rows): (usize, usize),
        answers: Answers,
    ) -> Result<Self> {
        if items.is_empty() {
            return Err(Error::Nothing { expected: "item" });
        }
        let (mut metrics, mut filtered) = (Vec::new(), Vec::new());
        for pipeline in &task.filters {
            let left = texts_left(task, pipeline, items, &answers)?;
            let of_item = |(number, item): (usize, &TaskItem)| {
                let answers = &answers.of_items[number];
                row_values(task, item, answers, left.get(number))
                    .map_err(|problem| problem.of_item(number))
            };
            let rows: Vec<Vec<RowValue>> = items
                .iter()
                .enumerate()
                .map(of_item)
                .collect::<Result<_>>()?;
            for (at, of) in task.metrics.iter().enumerate() {
                let values = rows.iter().map(|row| row[at]).collect();
                metrics.push(MetricResult::new(&pipeline.name, of, values)?);
            }
            filtered.push(left);
        }
        Ok(Self {
            task: task.name.clone(),
            version: task.version.clone(),
            fewshot,
            n: items.len(),
            n_rows,
            answers,
            metrics,
            filtered,
        })
    }
}

impl MetricResult {
    /// # Errors
    /// If the values are of another kind than the aggregation's.
    pub(crate) fn new(filter: &str, of: &MetricUse, values: Vec<RowValue>) -> Result<Self> {
        Ok(Self {
            filter: filter.to_owned(),
            metric: of.metric,
            aggregation: of.aggregation,
            is_higher_better: of.is_higher_better,
            value: aggregate(of.aggregation, &values.iter().collect::<Vec<_>>())?,
            standard_error: standard_error(of.aggregation, &values)?,
            of_items: values,
        })
    }
}

/// What a filter leaves of the answers to each item; nothing if they are no texts.
fn texts_left(
    task: &TaskDefinition,
    pipeline: &FilterPipeline,
    items: &[TaskItem],
    answers: &Answers,
) -> Result<Vec<Filtered>> {
    if task.output != OutputType::GenerateUntil {
        return match pipeline.is_plain() {
            true => Ok(Vec::new()),
            false => Err(Error::Filter {
                filter: pipeline.name.clone(),
            }),
        };
    }
    let rows = items.iter().zip(&answers.of_items).enumerate();
    rows.map(|(number, (item, answers))| {
        let texts = answers.iter().filter_map(|answer| match answer {
            Answer::Text(text) => Some(text.clone()),
            Answer::Likelihood { .. } => None,
        });
        let left = pipeline.apply(&texts.collect::<Vec<_>>(), &item.row);
        left.map_err(|problem| Error::from(problem).of_item(number))
    })
    .collect()
}
