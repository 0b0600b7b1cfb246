//! The numbers of a group of tasks: means of those of its tasks.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/api/group.py; lm_eval/api/metrics.py, `pooled_sample_stderr`,
//! `unweighted_mean_stderr`.

use std::collections::BTreeSet;

use data::{Aggregation, GroupMetric, TaskGroup};
use serde::Serialize;

use super::row_values::RowValue;
use super::task_result::{MetricResult, TaskResult};

/// The result of a group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupResult {
    /// The name of the group.
    pub group: String,
    /// The name in tables.
    pub alias: Option<String>,
    /// Its tasks.
    pub tasks: Vec<String>,
    /// The items of its tasks.
    pub n: usize,
    /// Its metrics.
    pub metrics: Vec<GroupMean>,
}

/// The mean of a metric over tasks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupMean {
    /// The filter.
    pub filter: String,
    /// The metric's name.
    pub metric: String,
    /// Whether tasks weigh as much as they have items.
    pub by_size: bool,
    /// Whether more is better.
    pub is_higher_better: bool,
    /// The mean.
    pub value: f64,
    /// Its standard error, if all tasks have one.
    pub standard_error: Option<f64>,
    /// The items of all tasks, such that their mean is `value`; none if a task's number is no mean.
    #[serde(skip)]
    pub(crate) of_items: Option<Vec<RowValue>>,
}

impl GroupResult {
    /// The result of a group, from those of tasks.
    pub fn new(group: &TaskGroup, results: &[TaskResult]) -> Self {
        let is_member = |result: &&TaskResult| group.tasks.contains(&result.task);
        let members: Vec<&TaskResult> = results.iter().filter(is_member).collect();
        let of_metric = |of: &GroupMetric| {
            let filters: BTreeSet<String> = match &of.filters {
                Some(filters) => filters.iter().cloned().collect(),
                None => {
                    let all = members.iter().flat_map(|task| &task.metrics);
                    let same = all.filter(|found| found.metric.name() == of.metric);
                    same.map(|found| found.filter.clone()).collect()
                }
            };
            let of_filter = |filter| GroupMean::new(of, filter, &members);
            filters
                .into_iter()
                .filter_map(of_filter)
                .collect::<Vec<_>>()
        };
        Self {
            group: group.name.clone(),
            alias: group.alias.clone(),
            tasks: group.tasks.clone(),
            n: members.iter().map(|task| task.n).sum(),
            metrics: group.metrics.iter().flat_map(of_metric).collect(),
        }
    }
}

impl GroupMean {
    /// None if no task has the metric.
    fn new(of: &GroupMetric, filter: String, members: &[&TaskResult]) -> Option<Self> {
        let found = |task: &&TaskResult| -> Option<(f64, MetricResult)> {
            let same =
                |found: &&MetricResult| found.metric.name() == of.metric && found.filter == filter;
            let found = task.metrics.iter().find(same)?;
            Some((task.n as f64, found.clone()))
        };
        let parts: Vec<(f64, MetricResult)> = members.iter().filter_map(found).collect();
        let (_, first) = parts.first()?;
        let weight = |n: f64| if of.by_size { n } else { 1.0 };
        let weights: f64 = parts.iter().map(|(n, _)| weight(*n)).sum();
        let sum: f64 = parts.iter().map(|(n, part)| weight(*n) * part.value).sum();
        let errors: Option<Vec<(f64, f64)>> = parts
            .iter()
            .map(|(n, part)| Some((*n, part.standard_error?)))
            .collect();
        let total: f64 = parts.iter().map(|(n, _)| n).sum();
        // With weights by size it is the mean of all items as they are.
        let share = |n: f64| {
            if of.by_size {
                1.0
            } else {
                total / (weights * n)
            }
        };
        let items = parts.iter().map(|(n, part)| items(part, share(*n)));
        let items: Option<Vec<Vec<RowValue>>> = items.collect();
        Some(Self {
            of_items: items.map(|items| items.concat()),
            by_size: of.by_size,
            is_higher_better: first.is_higher_better,
            metric: of.metric.clone(),
            value: sum / weights,
            standard_error: errors.map(|errors| match of.by_size {
                true => pooled(&errors),
                false => of_plain_mean(&errors),
            }),
            filter,
        })
    }
}

/// The items of a task, each times a factor; none if they are not what its number is the mean of.
fn items(part: &MetricResult, factor: f64) -> Option<Vec<RowValue>> {
    let scaled = |item: &RowValue| match item {
        RowValue::Number(number) => Some(RowValue::Number(number * factor)),
        _ => None,
    };
    match part.aggregation {
        Aggregation::Mean => part.of_items.iter().map(scaled).collect(),
        _ => None,
    }
}

/// The error of a mean over the items of all tasks, from numbers of items and errors.
fn pooled(errors: &[(f64, f64)]) -> f64 {
    let items: f64 = errors.iter().map(|(n, _)| n).sum();
    let squares: f64 = errors
        .iter()
        .map(|(n, error)| (n - 1.0) * error.powi(2) * n)
        .sum();
    (squares / (items - errors.len() as f64) / items).sqrt()
}

/// The error of a mean over tasks.
fn of_plain_mean(errors: &[(f64, f64)]) -> f64 {
    let squares: f64 = errors.iter().map(|(_, error)| error.powi(2)).sum();
    squares.sqrt() / errors.len() as f64
}

#[cfg(test)]
mod tests {
    use data::{Metric, MetricUse};

    use super::*;
    use crate::task::Answers;

    fn task(name: &str, numbers: &[f64]) -> TaskResult {
        let values = numbers
            .iter()
            .map(|number| RowValue::Number(*number))
            .collect();
        let of = MetricUse::usual(Metric::Acc);
        TaskResult {
            task: name.into(),
            version: "1".into(),
            fewshot: 0,
            n: numbers.len(),
            n_rows: numbers.len(),
            answers: Answers::default(),
            metrics: vec![MetricResult::new("none", &of, values).unwrap()],
            filtered: Vec::new(),
        }
    }

    // Errors are those of the harness 0.4.13.
    #[test]
    fn means_and_errors_are_those_of_the_harness() {
        let results = [
            task("a", &[1.0, 0.0, 1.0, 1.0]),
            task("b", &[0.0, 1.0]),
            task("c", &[1.0, 1.0]),
        ];
        let group = |by_size, filters| TaskGroup {
            name: "g".into(),
            alias: None,
            tasks: vec!["a".into(), "b".into()],
            metrics: vec![GroupMetric {
                metric: "acc".into(),
                filters,
                by_size,
            }],
        };
        let found = GroupResult::new(&group(true, None), &results);
        assert_eq!((found.n, found.metrics.len()), (6, 1));
        let mean = &found.metrics[0];
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}");
        close(mean.value, 4.0 / 6.0);
        let mean_of_items = |mean: &GroupMean| {
            let items = mean.of_items.as_ref().unwrap();
            let sum: f64 = items
                .iter()
                .map(|item| match item {
                    RowValue::Number(number) => *number,
                    _ => f64::NAN,
                })
                .sum();
            sum / items.len() as f64
        };
        close(mean_of_items(mean), mean.value);
        assert!(
            mean.of_items
                .as_ref()
                .unwrap()
                .contains(&RowValue::Number(1.0))
        );
        close(mean.standard_error.unwrap(), 0.228_217_732_293_819_2);
        let mean = &GroupResult::new(&group(false, None), &results).metrics[0];
        close(mean.value, 0.625);
        close(mean_of_items(mean), mean.value);
        close(mean.standard_error.unwrap(), 0.279_508_497_187_473_7);
        let other = group(true, Some(vec!["strict".into()]));
        assert!(GroupResult::new(&other, &results).metrics.is_empty());
    }
}
