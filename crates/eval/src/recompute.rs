//! The numbers of a report, computed once more from the values of single items that it has.

use data::{Aggregation, GroupMetric, Metric, MetricUse, TaskGroup};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::expert_choices::{ExpertChoices, RoutingComparison};
use crate::gate::Gate;
use crate::losses::SampleLoss;
use crate::perplexity::TextScore;
use crate::report::{EvalReport, ModelScores};
use crate::task::{Answers, GroupResult, LARGEST_COUNT, MetricResult, RowValue, TaskResult};

/// What two numbers may differ by, as a share of them: reading a number changes its last bit at most.
const READ_TOLERANCE: f64 = 1e-9;

/// What is read of a report: all that its numbers are made from.
#[derive(Debug, Deserialize)]
struct Stated {
    models: Vec<StatedModel>,
    gates: Vec<StatedGate>,
    /// It is measured, not computed from items.
    routing: Vec<RoutingComparison>,
}

#[derive(Debug, Deserialize)]
struct StatedModel {
    name: String,
    text: Option<StatedText>,
    tasks: Vec<StatedTask>,
    groups: Vec<StatedGroup>,
}

#[derive(Debug, Deserialize)]
struct StatedText {
    bytes: Option<usize>,
    per_sample: Vec<SampleLoss>,
}

#[derive(Debug, Deserialize)]
struct StatedTask {
    task: String,
    version: String,
    fewshot: usize,
    n: usize,
    n_rows: usize,
    n_cut: usize,
    read: usize,
    asked: usize,
    metrics: Vec<StatedMetric>,
}

#[derive(Debug, Deserialize)]
struct StatedMetric {
    filter: String,
    metric: String,
    aggregation: String,
    is_higher_better: bool,
    of_items: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct StatedGroup {
    group: String,
    alias: Option<String>,
    tasks: Vec<String>,
    metrics: Vec<StatedMean>,
}

#[derive(Debug, Deserialize)]
struct StatedMean {
    filter: String,
    metric: String,
    by_size: bool,
}

#[derive(Debug, Deserialize)]
struct StatedGate {
    gate: String,
}

/// The scores that a report has, with those of single items.
///
/// # Errors
/// If it is no report of [`EvalReport::to_json`].
pub fn read_scores(report: &Value) -> Result<Vec<ModelScores>> {
    let stated = Stated::deserialize(report).map_err(|problem| wrong(&problem.to_string()))?;
    let models = stated.models.into_iter().map(StatedModel::scores);
    models.collect()
}

/// The places of a report that are not what its own items give, each with what it says and what they give.
///
/// # Errors
/// If it is no report of [`EvalReport::to_json`].
pub fn recompute(report: &Value) -> Result<Vec<String>> {
    let stated = Stated::deserialize(report).map_err(|problem| wrong(&problem.to_string()))?;
    // A gate has an outcome for each model but the baseline.
    let n_judged = stated.models.len().saturating_sub(1).max(1);
    let gates = stated.gates.iter().step_by(n_judged);
    let gates = gates.map(|stated| Gate::parse(&stated.gate));
    let gates = gates.collect::<Result<Vec<Gate>>>()?;
    let mut computed = EvalReport::new(read_scores(report)?, &gates)?;
    computed.routing = stated.routing;
    let computed = computed.to_json();
    let mut found = Vec::new();
    compare("", report, &computed, &mut found);
    Ok(found)
}

/// Refuses a count that cannot be one.
fn expect_count(name: &str, count: usize) -> Result<()> {
    match count as u64 > LARGEST_COUNT {
        true => Err(wrong(&format!(
            "expected at most {LARGEST_COUNT} as `{name}`, found {count}"
        ))),
        false => Ok(()),
    }
}

fn wrong(problem: &str) -> Error {
    Error::Report {
        problem: problem.to_owned(),
    }
}

impl StatedModel {
    fn scores(self) -> Result<ModelScores> {
        let text = self.text.map(|text| {
            for sample in &text.per_sample {
                expect_count("tokens", sample.tokens)?;
            }
            TextScore::new(text.per_sample, text.bytes)
        });
        let tasks = self.tasks.into_iter().map(StatedTask::result);
        let tasks = tasks.collect::<Result<Vec<_>>>()?;
        let groups = self.groups.into_iter();
        Ok(ModelScores {
            name: self.name,
            text: text.transpose()?,
            groups: groups.map(|group| group.result(&tasks)).collect(),
            experts: ExpertChoices::default(),
            tasks,
        })
    }
}

impl StatedTask {
    fn result(self) -> Result<TaskResult> {
        expect_count("n", self.n)?;
        let of_items = self.metrics.first().map(|metric| metric.of_items.len());
        let metrics = self.metrics.into_iter().map(StatedMetric::result);
        Ok(TaskResult {
            task: self.task,
            version: self.version,
            fewshot: self.fewshot,
            n: of_items.unwrap_or(self.n),
            n_rows: self.n_rows,
            answers: Answers {
                n_cut: self.n_cut,
                read: self.read,
                asked: self.asked,
                of_items: Vec::new(),
            },
            metrics: metrics.collect::<Result<_>>()?,
            filtered: Vec::new(),
        })
    }
}

impl StatedMetric {
    fn result(self) -> Result<MetricResult> {
        let unknown = |name: &str| wrong(&format!("unknown name `{name}`"));
        let of = MetricUse {
            aggregation: Aggregation::of_name(&self.aggregation)
                .ok_or_else(|| unknown(&self.aggregation))?,
            is_higher_better: self.is_higher_better,
            ..MetricUse::usual(Metric::of_name(&self.metric).ok_or_else(|| unknown(&self.metric))?)
        };
        let value = |(number, value): (usize, &Value)| {
            RowValue::read(of.aggregation, value)
                .ok_or_else(|| wrong(&format!("{}: unknown value of item {number}", self.metric)))
        };
        let values = self.of_items.iter().enumerate().map(value);
        MetricResult::new(&self.filter, &of, values.collect::<Result<_>>()?)
    }
}

impl StatedGroup {
    fn result(self, tasks: &[TaskResult]) -> GroupResult {
        let metrics = self.metrics.into_iter().map(|mean| GroupMetric {
            metric: mean.metric,
            filters: Some(vec![mean.filter]),
            by_size: mean.by_size,
        });
        let group = TaskGroup {
            name: self.group,
            alias: self.alias,
            tasks: self.tasks,
            metrics: metrics.collect(),
        };
        GroupResult::new(&group, tasks)
    }
}

/// Lists what differs, with the keys that lead to it.
fn compare(path: &str, stated: &Value, computed: &Value, found: &mut Vec<String>) {
    let inner = |key: &str| match path {
        "" => key.to_owned(),
        _ => format!("{path}.{key}"),
    };
    match (stated, computed) {
        (Value::Object(first), Value::Object(second)) => {
            let added = second.keys().filter(|key| !first.contains_key(*key));
            for key in first.keys().chain(added) {
                compare(&inner(key), &stated[key], &computed[key], found);
            }
        }
        (Value::Array(first), Value::Array(second)) if first.len() == second.len() => {
            for (at, (first, second)) in first.iter().zip(second).enumerate() {
                compare(&format!("{path}[{at}]"), first, second, found);
            }
        }
        _ if is_same(stated, computed) => {}
        _ => found.push(format!(
            "{path}: stated {}, computed {}",
            short(stated),
            short(computed)
        )),
    }
}

fn is_same(first: &Value, second: &Value) -> bool {
    match (first.as_f64(), second.as_f64()) {
        (Some(first), Some(second)) => {
            let largest = first.abs().max(second.abs());
            (first - second).abs() <= READ_TOLERANCE * largest
        }
        _ => first == second,
    }
}

/// A value, or only what kind it is.
fn short(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("{} values", values.len()),
        Value::Object(_) => "several values".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(name: &str, losses: [f64; 3], right: [u8; 4]) -> ModelScores {
        let loss = |loss_sum| SampleLoss {
            loss_sum,
            tokens: 2,
        };
        let values = right
            .map(|right| RowValue::Number(f64::from(right)))
            .to_vec();
        let of = MetricUse::usual(Metric::Acc);
        let task = TaskResult {
            task: "capitals".into(),
            version: "1".into(),
            fewshot: 2,
            n: 4,
            n_rows: 9,
            answers: Answers::default(),
            metrics: vec![MetricResult::new("none", &of, values).unwrap()],
            filtered: Vec::new(),
        };
        let group = TaskGroup {
            name: "all".into(),
            alias: None,
            tasks: vec!["capitals".into()],
            metrics: vec![GroupMetric {
                metric: "acc".into(),
                filters: None,
                by_size: true,
            }],
        };
        ModelScores {
            name: name.into(),
            text: Some(TextScore::new(losses.map(loss).to_vec(), Some(20)).unwrap()),
            groups: vec![GroupResult::new(&group, std::slice::from_ref(&task))],
            experts: ExpertChoices::default(),
            tasks: vec![task],
        }
    }

    fn report() -> EvalReport {
        let base = scores("base", [4.0, 6.0, 8.0], [1, 0, 0, 0]);
        let tuned = scores("tuned", [2.0, 3.5, 5.0], [1, 0, 1, 0]);
        let gates = ["capitals acc >= base - 0.9", "data loss <= 0.9"];
        let gates = gates.map(|gate| Gate::parse(gate).unwrap());
        EvalReport::new(vec![base, tuned], &gates).unwrap()
    }

    #[test]
    fn numbers_are_those_that_the_items_give() {
        let text = report().to_json().to_string();
        let json = || serde_json::from_str::<Value>(&text).unwrap();
        assert_eq!(recompute(&json()).unwrap(), Vec::<String>::new());
        let changed = |change: &dyn Fn(&mut Value)| {
            let mut json = json();
            change(&mut json);
            recompute(&json).unwrap()
        };
        let found = changed(&|json| json["gates"][1]["verdict"] = "passed".into());
        assert_eq!(
            found,
            ["gates[1].verdict: stated \"passed\", computed \"inconclusive\""]
        );
        let found =
            changed(&|json| json["models"][1]["tasks"][0]["metrics"][0]["value"] = 0.75.into());
        assert_eq!(
            found,
            ["models[1].tasks[0].metrics[0].value: stated 0.75, computed 0.5"]
        );
        // An item changes all that is computed from it.
        let found = changed(&|json| {
            json["models"][1]["tasks"][0]["metrics"][0]["of_items"][3] = 1.0.into();
        });
        assert!(found.len() > 3, "{found:?}");
        let found = changed(&|json| json["comparisons"] = Value::Array(Vec::new()));
        assert_eq!(found, ["comparisons: stated 0 values, computed 3 values"]);
        let mut other = json();
        other["models"][0]["tasks"][0]["metrics"][0]["metric"] = "best".into();
        let problem = recompute(&other).unwrap_err().to_string();
        assert_eq!(problem, "expected a report of `eval`: unknown name `best`");
    }
}
