//! Scores of several models, as a table for people and as JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use crate::compare::{Difference, MeasuredNumber, Verdict, judge_all};
use crate::error::{Error, Result};
use crate::expert_choices::{ExpertChoices, RoutingComparison};
use crate::gate::{Gate, GateOutcome};
use crate::perplexity::TextScore;
use crate::task::{GroupMean, GroupResult, MetricResult, TaskResult};

/// Scores of several models on the same items, their differences, and what became of gates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalReport {
    /// The scores, the baseline's first.
    pub models: Vec<ModelScores>,
    /// One for each number of each pair of models.
    pub comparisons: Vec<Comparison>,
    /// One for each gate and each model after the first, or for the only model.
    pub gates: Vec<GateOutcome>,
    /// One for each pair of models that choose experts for the same tokens.
    pub routing: Vec<RoutingComparison>,
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
    /// The experts that it chooses for some tokens.
    #[serde(skip)]
    pub experts: ExpertChoices,
}

/// A number of a model compared with the same number of an earlier one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The model.
    pub model: String,
    /// The earlier model.
    pub baseline: String,
    /// `loss`, or the names of a task and a metric.
    pub measure: String,
    /// The difference, if the two were scored on the same items.
    pub difference: Option<Difference>,
    /// Why there is none, if there is none.
    pub problem: Option<String>,
    /// Whether more is better.
    #[serde(skip)]
    is_higher_better: bool,
}

/// The name of the numbers on text, in gates.
const TEXT: &str = "data";

impl EvalReport {
    /// Compares all models with those before them, number by number, and judges gates.
    ///
    /// # Errors
    /// If a gate's task, metric or baseline is not there.
    pub fn new(models: Vec<ModelScores>, gates: &[Gate]) -> Result<Self> {
        let pairs =
            (0..models.len()).flat_map(|second| (0..second).map(move |first| (first, second)));
        let mut comparisons: Vec<Comparison> = pairs
            .flat_map(|(first, second)| comparisons(&models[first], &models[second]))
            .collect();
        let found = comparisons.iter_mut().filter_map(|comparison| {
            let is_higher_better = comparison.is_higher_better;
            Some((comparison.difference.as_mut()?, is_higher_better))
        });
        judge_all(&mut found.collect::<Vec<_>>());
        let mut outcomes = Vec::new();
        for gate in gates {
            let (base, judged) = match models.as_slice() {
                [only] => (None, std::slice::from_ref(only)),
                [base, others @ ..] => (Some(base), others),
                [] => (None, &[][..]),
            };
            let base = base.map(|base| base.measured(gate)).transpose()?;
            for model in judged {
                outcomes.push(gate.outcome(&model.name, &model.measured(gate)?, base.as_ref())?);
            }
        }
        Ok(Self {
            routing: routing(&models),
            models,
            comparisons,
            gates: outcomes,
        })
    }

    /// The tables, and a line for each gate.
    pub fn to_text(&self) -> String {
        let tables = [
            self.text_rows(),
            self.task_rows(),
            self.comparison_rows(),
            self.routing_rows(),
        ];
        let filled = tables.iter().filter(|rows| rows.len() > 1);
        let mut text = filled
            .map(|rows| table(rows))
            .collect::<Vec<_>>()
            .join("\n");
        let problems = self.comparisons.iter().filter_map(|comparison| {
            let problem = comparison.problem.as_ref()?;
            let Comparison {
                measure,
                model,
                baseline,
                ..
            } = comparison;
            Some(format!(
                "{measure}, {model} against {baseline}: not compared: {problem}"
            ))
        });
        let gates = self.gates.iter().map(ToString::to_string);
        let n_left_out = self
            .comparisons
            .iter()
            .filter(|it| !self.is_shown(it))
            .count();
        let left_out = (n_left_out > 0).then(|| {
            format!("{n_left_out} differences between other models may be chance, and are left to the JSON and the page")
        });
        let lines: Vec<String> = left_out.into_iter().chain(problems).chain(gates).collect();
        if !lines.is_empty() {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n{}\n", lines.join("\n"));
        }
        text
    }

    /// Whether a table has a comparison: one with the baseline, or one that says something.
    fn is_shown(&self, comparison: &Comparison) -> bool {
        let is_of_baseline = |base: &ModelScores| base.name == comparison.baseline;
        let difference = comparison.difference.as_ref();
        self.models.first().is_some_and(is_of_baseline)
            || difference.is_none_or(|found| found.verdict != Verdict::Open)
    }

    /// Differences that are judged together.
    fn comparison_rows(&self) -> Vec<Vec<String>> {
        let header = [
            "measure",
            "model",
            "against",
            "difference",
            "95 % interval",
            "p (Holm)",
            "shows from",
            "verdict",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for comparison in self.comparisons.iter().filter(|it| self.is_shown(it)) {
            let Some(found) = &comparison.difference else {
                continue;
            };
            let [low, high] = found.interval;
            let verdict = match found.verdict {
                Verdict::Better => "better",
                Verdict::Worse => "worse",
                Verdict::Open => "may be chance",
            };
            rows.push(vec![
                comparison.measure.clone(),
                comparison.model.clone(),
                comparison.baseline.clone(),
                format!("{:+.4}", found.difference),
                format!("[{low:+.4}, {high:+.4}]"),
                p_text(found.p_holm),
                format!("{:.4}", found.shows_from),
                verdict.to_owned(),
            ]);
        }
        rows
    }

    /// A table of the differences in routing; only names of columns if there are none.
    pub fn routing_rows(&self) -> Vec<Vec<String>> {
        let header = [
            "routing",
            "against",
            "tokens",
            "choices changed",
            "most",
            "load divergence",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for compared in &self.routing {
            let [changed, load] = compared.means();
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            let most = compared.most_changed().map_or_else(none, |most| {
                format!("{} in layer {}", percent(most.changed), most.layer)
            });
            let names = [compared.model.clone(), compared.baseline.clone()];
            let numbers = [
                compared.tokens.to_string(),
                percent(changed),
                most,
                format!("{load:.4} bits"),
            ];
            rows.push(names.into_iter().chain(numbers).collect());
        }
        rows
    }

    /// Everything, down to the single samples and questions.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("its keys are strings, and its numbers are checked")
    }

    /// A table of models and their scores on text; only names of columns if there is no text.
    pub fn text_rows(&self) -> Vec<Vec<String>> {
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

    /// A table of the metrics of tasks and of groups, and the number of each model.
    pub fn task_rows(&self) -> Vec<Vec<String>> {
        let mut measures: Vec<Measure<'_>> = Vec::new();
        for measure in self.models.iter().flat_map(ModelScores::measures) {
            let is_known = |known: &Measure<'_>| known.is_same(&measure);
            if !matches!(measure, Measure::Text(_)) && !measures.iter().any(is_known) {
                measures.push(measure);
            }
        }
        let names = self.models.iter().map(|model| model.name.clone());
        let header = ["task", "filter", "n-shot", "metric", ""];
        let mut rows = vec![header.into_iter().map(str::to_owned).chain(names).collect()];
        for measure in measures {
            let better = if measure.is_higher_better() {
                "↑"
            } else {
                "↓"
            };
            let fewshot = match measure {
                Measure::Task(task, _) => task.fewshot.to_string(),
                _ => String::new(),
            };
            let [task, metric, filter] = measure.key();
            let cells = [task, filter, &fewshot, metric, better].map(str::to_owned);
            let of_models = self.models.iter().map(|model| {
                let found = model.measure(&measure);
                found.map_or_else(none, |found| {
                    let (value, error) = found.value();
                    with_error(value, error)
                })
            });
            rows.push(cells.into_iter().chain(of_models).collect());
        }
        rows
    }
}

/// A probability with three decimals.
pub fn p_text(p: f64) -> String {
    match p < 0.001 {
        true => "< 0.001".to_owned(),
        false => format!("{p:.3}"),
    }
}

/// The routing of each pair of models.
fn routing(models: &[ModelScores]) -> Vec<RoutingComparison> {
    let pairs = (0..models.len()).flat_map(|second| (0..second).map(move |first| (first, second)));
    let compared = pairs.filter_map(|(first, second)| {
        let (baseline, model) = (&models[first], &models[second]);
        let (tokens, layers) = model.experts.compare(&baseline.experts)?;
        Some(RoutingComparison {
            model: model.name.clone(),
            baseline: baseline.name.clone(),
            tokens,
            layers,
        })
    });
    compared.collect()
}

/// A number of a model, and what it comes from.
#[derive(Clone, Copy, Debug)]
enum Measure<'a> {
    /// The loss on text.
    Text(&'a TextScore),
    Task(&'a TaskResult, &'a MetricResult),
    Group(&'a GroupResult, &'a GroupMean),
}

impl<'a> Measure<'a> {
    /// The names of the task, the metric and the filter.
    fn key(&self) -> [&'a str; 3] {
        match *self {
            Self::Text(_) => [TEXT, "loss", ""],
            Self::Task(task, metric) => [&task.task, metric.metric.name(), &metric.filter],
            Self::Group(group, mean) => [&group.group, &mean.metric, &mean.filter],
        }
    }

    fn is_same(&self, other: &Measure<'_>) -> bool {
        self.key() == other.key()
    }

    fn is_higher_better(&self) -> bool {
        match self {
            Self::Text(_) => false,
            Self::Task(_, metric) => metric.is_higher_better,
            Self::Group(_, mean) => mean.is_higher_better,
        }
    }

    /// The number and its standard error.
    fn value(&self) -> (f64, Option<f64>) {
        match self {
            Self::Text(text) => (text.loss, text.standard_error),
            Self::Task(_, metric) => (metric.value, metric.standard_error),
            Self::Group(_, mean) => (mean.value, mean.standard_error),
        }
    }

    /// The number with its items; none for a mean of numbers that are no means of items themselves.
    fn measured(&self) -> Option<MeasuredNumber> {
        match *self {
            Self::Text(text) => Some(text.into()),
            Self::Task(_, metric) => Some(metric.into()),
            Self::Group(_, mean) => MeasuredNumber::of_group(mean),
        }
    }

    /// What it is called next to others of the same model: with the filter only if there are several.
    fn shown(&self, all: &[Measure<'_>]) -> String {
        let [task, metric, filter] = self.key();
        let is_other = |other: &&Measure<'_>| {
            let [of, _, found] = other.key();
            of == task && found != filter
        };
        match (self, all.iter().find(is_other)) {
            (Self::Text(_), _) => metric.to_owned(),
            (_, None) => format!("{task} {metric}"),
            (_, Some(_)) => format!("{task} {metric},{filter}"),
        }
    }
}

impl ModelScores {
    /// All of its numbers.
    fn measures(&self) -> Vec<Measure<'_>> {
        let text = self.text.iter().map(Measure::Text);
        let tasks = self.tasks.iter().flat_map(|task| {
            let metrics = task.metrics.iter();
            metrics.map(move |metric| Measure::Task(task, metric))
        });
        let groups = self.groups.iter().flat_map(|group| {
            let means = group.metrics.iter();
            means.map(move |mean| Measure::Group(group, mean))
        });
        text.chain(tasks).chain(groups).collect()
    }

    /// The number that is the same as another model's.
    fn measure(&self, same: &Measure<'_>) -> Option<Measure<'_>> {
        let all = self.measures().into_iter();
        let mut found = all.filter(|measure| measure.is_same(same));
        found.next()
    }

    /// The number that a gate is about.
    fn measured(&self, gate: &Gate) -> Result<MeasuredNumber> {
        let text = &gate.text;
        let missing = |found: String| Error::Gate {
            expected: format!("a task and metric of this evaluation in the gate `{text}`"),
            found,
        };
        let all = self.measures();
        let of_task = all.iter().filter(|measure| measure.key()[0] == gate.task);
        let of_task: Vec<&Measure<'_>> = of_task.collect();
        if of_task.is_empty() {
            let mut known: Vec<&str> = all.iter().map(|measure| measure.key()[0]).collect();
            known.dedup();
            let known = known.join(", ");
            return Err(missing(format!("`{}`; there are {known}", gate.task)));
        }
        let is_wanted = |measure: &&&Measure<'_>| {
            let [_, metric, filter] = measure.key();
            metric == gate.metric && gate.filter.as_ref().is_none_or(|wanted| wanted == filter)
        };
        let wanted: Vec<&&Measure<'_>> = of_task.iter().filter(is_wanted).collect();
        let [only] = wanted.as_slice() else {
            let which = match wanted.len() {
                0 => "no such metric",
                _ => "several",
            };
            let name = |measure: &&Measure<'_>| {
                let [_, metric, filter] = measure.key();
                format!("{metric},{filter}")
            };
            let known: Vec<String> = of_task.iter().map(name).collect();
            return Err(missing(format!("{which}; there are {}", known.join(", "))));
        };
        let no_items = || missing("a mean of numbers that are no means of items".into());
        only.measured().ok_or_else(no_items)
    }
}

/// Each number that both models have.
fn comparisons(baseline: &ModelScores, model: &ModelScores) -> Vec<Comparison> {
    let all = model.measures();
    let compare = |second: &Measure<'_>| {
        let first = baseline.measure(second)?.measured()?;
        let found = second.measured()?.difference(&first);
        Some(Comparison {
            model: model.name.clone(),
            baseline: baseline.name.clone(),
            measure: second.shown(&all),
            problem: found.as_ref().err().map(ToString::to_string),
            difference: found.ok(),
            is_higher_better: second.is_higher_better(),
        })
    };
    all.iter().filter_map(compare).collect()
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
    use data::{Metric, MetricUse};

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
            text: Some(
                TextScore::new(
                    losses.iter().map(loss).collect(),
                    Some(20 * losses.len() / 3),
                )
                .unwrap(),
            ),
            tasks: vec![task(correct)],
            groups: Vec::new(),
            experts: ExpertChoices::default(),
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
            fewshot: 2,
            n: correct.len(),
            n_rows: correct.len(),
            answers: Answers::default(),
            metrics: vec![MetricResult::new("none", &of, values.collect()).unwrap()],
            filtered: Vec::new(),
        }
    }

    fn report() -> EvalReport {
        let base = scores(
            "base",
            &[4.0, 6.0, 8.0].repeat(3),
            &[true, false, false, false],
        );
        let tuned = scores(
            "tuned",
            &[2.0, 3.5, 5.0].repeat(3),
            &[true, false, true, false],
        );
        let gates = ["capitals acc >= base - 0.9", "data loss <= 0.9"];
        let gates = gates.map(|gate| Gate::parse(gate).unwrap());
        EvalReport::new(vec![base, tuned], &gates).unwrap()
    }

    #[test]
    fn the_tables_are_aligned_and_compare_with_the_first() {
        let text = report().to_text();
        let (tables, rest) = text.split_at(text.find("measure").unwrap());
        let expected = "\
model  loss             perplexity  bits/byte
base   3.0000 ± 0.2887  20.086      1.2984
tuned  1.7500 ± 0.2165  5.755       0.7574

task      filter  n-shot  metric     base             tuned
capitals  none    2       acc     ↑  0.2500 ± 0.2500  0.5000 ± 0.2887

";
        assert_eq!(tables, expected);
        let lines: Vec<&str> = rest.lines().collect();
        assert!(
            lines[1].starts_with("loss          tuned  base     -1.2500     [-1.4"),
            "{rest}"
        );
        assert!(lines[1].ends_with("  better"), "{rest}");
        assert!(
            lines[2].starts_with("capitals acc  tuned  base     +0.2500     [-0."),
            "{rest}"
        );
        assert!(lines[2].ends_with("  may be chance"), "{rest}");
        assert!(
            lines[4].starts_with("gate `capitals acc >= base - 0.9`, tuned: passed; +1.1500"),
            "{rest}"
        );
        assert!(
            lines[5].starts_with("gate `data loss <= 0.9`, tuned: failed; +0.8500"),
            "{rest}"
        );
    }

    #[test]
    fn what_is_missing_or_not_comparable_is_said() {
        let mut report = report();
        report.models[1].text.as_mut().unwrap().per_sample.pop();
        report.models[1].tasks.clear();
        let models = report.models.clone();
        let text = EvalReport::new(models, &[]).unwrap().to_text();
        assert!(text.lines().nth(5).unwrap().ends_with("  -"), "{text}");
        let expected = "loss, tuned against base: not compared: expected the same number of items for both models, found 9 and 8";
        assert_eq!(text.lines().last().unwrap(), expected);
        for (gate, expected) in [
            ("capitals acc >= 1", "`capitals`; there are data"),
            (
                "data loss >= base",
                "expected the same number of items for both models, found 9 and 8",
            ),
        ] {
            let gate = Gate::parse(gate).unwrap();
            let problem = EvalReport::new(report.models.clone(), &[gate])
                .unwrap_err()
                .to_string();
            assert!(problem.ends_with(expected), "{problem}");
        }
        report.models.truncate(1);
        let gate = Gate::parse("capitals f1 >= 1").unwrap();
        let problem = EvalReport::new(report.models, &[gate])
            .unwrap_err()
            .to_string();
        assert!(
            problem.ends_with("found no such metric; there are acc,none"),
            "{problem}"
        );
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
        assert_eq!(json["comparisons"][1]["difference"]["verdict"], "open");
        assert_eq!(json["gates"][0]["verdict"], "passed");
    }
}
