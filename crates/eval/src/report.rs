//! Scores of several models, as a table for people and as JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use crate::compare::{Difference, Verdict, compare_metrics, compare_text};
use crate::perplexity::TextScore;
use crate::task::{GroupResult, MetricResult, TaskResult};

/// Scores of several models on the same items, and the difference of each to the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalReport {
    /// The scores, the baseline's first.
    pub models: Vec<ModelScores>,
    /// One for each score of each model after the first.
    pub comparisons: Vec<Comparison>,
}

/// The scores of one model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelScores {
    /// Its name in the table.
    pub name: String,
    /// On text, if there is any.
    pub text: Option<TextScore>,
    /// On tasks.
    pub tasks: Vec<TaskResult>,
    /// On groups of tasks.
    pub groups: Vec<GroupResult>,
}

/// A score of a model compared with the same score of the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The model.
    pub model: String,
    /// The first model.
    pub baseline: String,
    /// `loss`, or the names of a task and a metric.
    pub measure: String,
    /// The difference, if the two were scored on the same items.
    pub difference: Option<Difference>,
    /// Why there is none, if there is none.
    pub problem: Option<String>,
}

impl EvalReport {
    /// Compares all models with the first, task by task.
    pub fn new(models: Vec<ModelScores>) -> Self {
        let comparisons = match models.as_slice() {
            [baseline, others @ ..] => others
                .iter()
                .flat_map(|model| comparisons(baseline, model))
                .collect(),
            [] => vec![],
        };
        Self {
            models,
            comparisons,
        }
    }

    /// The tables, and a line for each comparison.
    pub fn to_text(&self) -> String {
        let tables = [self.text_rows(), self.task_rows()];
        let filled = tables.iter().filter(|rows| rows.len() > 1);
        let mut text = filled
            .map(|rows| table(rows))
            .collect::<Vec<_>>()
            .join("\n");
        if !self.comparisons.is_empty() {
            text.push('\n');
        }
        for comparison in &self.comparisons {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", comparison.sentence());
        }
        text
    }

    /// Everything, down to the single samples and questions.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("its keys are strings, and its numbers are checked")
    }

    /// Models and their scores on text.
    fn text_rows(&self) -> Vec<Vec<String>> {
        let header = ["model", "loss", "perplexity", "bits/byte"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        if self.models.iter().any(|model| model.text.is_some()) {
            rows.extend(self.models.iter().map(|model| {
                let mut row = vec![model.name.clone()];
                row.extend(text_cells(model.text.as_ref()));
                row
            }));
        }
        rows
    }

    /// Metrics of tasks, and the number of each model.
    fn task_rows(&self) -> Vec<Vec<String>> {
        let mut measures: Vec<(&TaskResult, &MetricResult)> = Vec::new();
        for task in self.models.iter().flat_map(|model| &model.tasks) {
            for metric in &task.metrics {
                if !measures.iter().any(|known| is_same(*known, (task, metric))) {
                    measures.push((task, metric));
                }
            }
        }
        let names = self.models.iter().map(|model| model.name.clone());
        let header = ["task", "filter", "n-shot", "metric", ""];
        let mut rows = vec![header.into_iter().map(str::to_owned).chain(names).collect()];
        for (task, metric) in measures {
            let better = if metric.is_higher_better {
                "↑"
            } else {
                "↓"
            };
            let shots = task.fewshot.to_string();
            let cells = [
                &task.task,
                &metric.filter,
                &shots,
                metric.metric.name(),
                better,
            ];
            let of_models = self.models.iter().map(|model| {
                let found = model.metric((task, metric));
                found.map_or_else(none, |found| with_error(found.value, found.standard_error))
            });
            rows.push(
                cells
                    .map(str::to_owned)
                    .into_iter()
                    .chain(of_models)
                    .collect(),
            );
        }
        rows
    }
}

/// Whether two metrics are the same one of the same task.
fn is_same(first: (&TaskResult, &MetricResult), second: (&TaskResult, &MetricResult)) -> bool {
    let key = |(task, metric): (&TaskResult, &MetricResult)| {
        (task.task.clone(), metric.filter.clone(), metric.metric)
    };
    key(first) == key(second)
}

impl ModelScores {
    /// A metric of this model that is the same as another model's.
    fn metric(&self, same: (&TaskResult, &MetricResult)) -> Option<&MetricResult> {
        let of_task = |task: &'_ TaskResult| -> Option<usize> {
            task.metrics
                .iter()
                .position(|metric| is_same((task, metric), same))
        };
        let mut found = self
            .tasks
            .iter()
            .filter_map(|task| Some(&task.metrics[of_task(task)?]));
        found.next()
    }
}

impl Comparison {
    /// The comparison for people.
    fn sentence(&self) -> String {
        let Self {
            model,
            baseline,
            measure,
            ..
        } = self;
        let Some(found) = &self.difference else {
            let problem = self.problem.as_deref().unwrap_or_default();
            return format!("{measure}, {model} against {baseline}: not compared: {problem}");
        };
        let error = found.standard_error;
        let error = error.map_or_else(String::new, |error| format!(" ± {error:.4}"));
        let direction = match found.difference {
            difference if difference < 0.0 => "lower",
            difference if difference > 0.0 => "higher",
            _ => "equal",
        };
        let verdict = match found.verdict {
            Verdict::Beyond => "beyond twice its standard error",
            Verdict::Within if found.difference == 0.0 => "no difference overall",
            Verdict::Within => "within twice its standard error, so it may be chance",
            Verdict::Unknown => "too little variance between items to judge it",
        };
        let ratio = found.ratio;
        let ratio = ratio.map_or_else(String::new, |ratio| {
            format!(" ({:.1} standard errors)", ratio.abs())
        });
        format!(
            "{measure}, {model} against {baseline}: {:+.4}{error}{ratio}, {direction}: {verdict}",
            found.difference
        )
    }
}

fn comparisons(baseline: &ModelScores, model: &ModelScores) -> Vec<Comparison> {
    let comparison = |measure: &str, found: crate::Result<Difference>| {
        let problem = found.as_ref().err().map(ToString::to_string);
        Comparison {
            model: model.name.clone(),
            baseline: baseline.name.clone(),
            measure: measure.to_owned(),
            difference: found.ok(),
            problem,
        }
    };
    let mut comparisons = Vec::new();
    if let (Some(first), Some(second)) = (&baseline.text, &model.text) {
        comparisons.push(comparison("loss", compare_text(first, second)));
    }
    for task in &model.tasks {
        for second in &task.metrics {
            if let Some(first) = baseline.metric((task, second)) {
                let measure = format!("{} {}", task.task, second.metric.name());
                comparisons.push(comparison(&measure, compare_metrics(first, second)));
            }
        }
    }
    comparisons
}

fn text_cells(score: Option<&TextScore>) -> [String; 3] {
    let Some(score) = score else {
        return [none(), none(), none()];
    };
    let bits = score.bits_per_byte;
    [
        with_error(score.loss, score.standard_error),
        format!("{:.3}", score.perplexity),
        bits.map_or_else(none, |bits| format!("{bits:.4}")),
    ]
}

fn with_error(value: f64, error: Option<f64>) -> String {
    match error {
        Some(error) => format!("{value:.4} ± {error:.4}"),
        None => format!("{value:.4}"),
    }
}

/// The cell of a missing number.
fn none() -> String {
    "-".to_owned()
}

/// Columns two spaces apart, as wide as their widest cell.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use data::{Metric, MetricUse, OutputType};

    use super::*;
    use crate::losses::SampleLoss;
    use crate::task::{Answers, RowValue};

    fn scores(name: &str, losses: &[f64], correct: &[bool]) -> ModelScores {
        let loss = |loss_sum: &f64| SampleLoss {
            loss_sum: *loss_sum,
            tokens: 2,
        };
        ModelScores {
            name: name.into(),
            text: Some(TextScore::new(losses.iter().map(loss).collect(), Some(20)).unwrap()),
            tasks: vec![task(correct)],
            groups: Vec::new(),
        }
    }

    fn task(correct: &[bool]) -> TaskResult {
        let values = correct
            .iter()
            .map(|right| RowValue::Number(f64::from(u8::from(*right))));
        let of = MetricUse::usual(Metric::Acc);
        TaskResult {
            task: "capitals".into(),
            version: "1".into(),
            output: OutputType::MultipleChoice,
            fewshot: 2,
            n: correct.len(),
            n_rows: correct.len(),
            answers: Answers::default(),
            metrics: vec![MetricResult::new("none", &of, values.collect()).unwrap()],
            filtered: Vec::new(),
        }
    }

    fn report() -> EvalReport {
        let base = scores("base", &[4.0, 6.0, 8.0], &[true, false, false, false]);
        // Differences −2, −2.5, −3 over 2 tokens: mean −1.25, residuals ½, 0, −½: √(1.5 · ½) / 6 = 0.1443.
        let tuned = scores("tuned", &[2.0, 3.5, 5.0], &[true, false, true, false]);
        EvalReport::new(vec![base, tuned])
    }

    #[test]
    fn the_table_is_aligned_and_compares_with_the_first() {
        let expected = "\
model  loss             perplexity  bits/byte
base   3.0000 ± 0.5774  20.086      1.2984
tuned  1.7500 ± 0.4330  5.755       0.7574

task      filter  n-shot  metric     base             tuned
capitals  none    2       acc     ↑  0.2500 ± 0.2500  0.5000 ± 0.2887

loss, tuned against base: -1.2500 ± 0.1443 (8.7 standard errors), lower: beyond twice its standard error
capitals acc, tuned against base: +0.2500 ± 0.2500 (1.0 standard errors), higher: within twice its standard error, so it may be chance
";
        assert_eq!(report().to_text(), expected);
    }

    #[test]
    fn what_is_missing_or_not_comparable_is_said() {
        let mut report = report();
        report.models[1].text.as_mut().unwrap().per_sample.pop();
        report.models[1].tasks.clear();
        let text = EvalReport::new(report.models).to_text();
        assert!(text.lines().nth(5).unwrap().ends_with("  -"), "{text}");
        let expected = "loss, tuned against base: not compared: expected the same number of samples for both models, found 3 and 2";
        assert_eq!(text.lines().last().unwrap(), expected);
    }

    #[test]
    fn json_has_every_number() {
        let json = report().to_json();
        assert_eq!(json["models"][0]["text"]["loss"], 3.0);
        assert_eq!(json["models"][0]["text"]["per_sample"][2]["tokens"], 2);
        assert_eq!(json["models"][1]["tasks"][0]["metrics"][0]["value"], 0.5);
        assert_eq!(json["models"][1]["tasks"][0]["metrics"][0]["metric"], "acc");
        assert_eq!(json["comparisons"][0]["measure"], "loss");
        assert_eq!(json["comparisons"][0]["difference"]["difference"], -1.25);
        assert_eq!(json["comparisons"][0]["difference"]["verdict"], "beyond");
    }
}
