//! Scores of several models, as a table for people and as JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use crate::choice::ChoiceScore;
use crate::compare::{Difference, Verdict, compare_choices, compare_text};
use crate::perplexity::TextScore;

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
    /// On questions.
    pub tasks: Vec<TaskScore>,
}

/// The score on one set of questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskScore {
    /// The name of the set in the table.
    pub task: String,
    /// The score.
    pub score: ChoiceScore,
}

/// A score of a model compared with the same score of the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The model.
    pub model: String,
    /// The first model.
    pub baseline: String,
    /// `loss`, or the name of a task.
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

    /// The table, and a line for each comparison.
    pub fn to_text(&self) -> String {
        let mut text = table(&self.rows());
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

    fn rows(&self) -> Vec<Vec<String>> {
        let has_text = self.models.iter().any(|model| model.text.is_some());
        let mut tasks: Vec<&str> = Vec::new();
        for task in self.models.iter().flat_map(|model| &model.tasks) {
            if !tasks.contains(&task.task.as_str()) {
                tasks.push(&task.task);
            }
        }
        let mut header = vec!["model".to_owned()];
        if has_text {
            header.extend(["loss", "perplexity", "bits/byte"].map(str::to_owned));
        }
        header.extend(tasks.iter().map(|task| format!("{task} accuracy")));

        let mut rows = vec![header];
        for model in &self.models {
            let mut row = vec![model.name.clone()];
            if has_text {
                row.extend(text_cells(model.text.as_ref()));
            }
            for task in &tasks {
                let found = model.tasks.iter().find(|score| score.task == *task);
                row.push(found.map_or_else(none, |found| {
                    with_error(found.score.accuracy, Some(found.score.standard_error))
                }));
            }
            rows.push(row);
        }
        rows
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
    for second in &model.tasks {
        let same = |first: &&TaskScore| first.task == second.task;
        if let Some(first) = baseline.tasks.iter().find(same) {
            let found = compare_choices(&first.score, &second.score);
            comparisons.push(comparison(&format!("{} accuracy", second.task), found));
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
    use super::*;
    use crate::losses::SampleLoss;

    fn scores(name: &str, losses: &[f64], correct: &[bool]) -> ModelScores {
        let loss = |loss_sum: &f64| SampleLoss {
            loss_sum: *loss_sum,
            tokens: 2,
        };
        ModelScores {
            name: name.into(),
            text: Some(TextScore::new(losses.iter().map(loss).collect(), Some(20)).unwrap()),
            tasks: vec![TaskScore {
                task: "capitals".into(),
                score: ChoiceScore::of(correct.to_vec()).unwrap(),
            }],
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
model  loss             perplexity  bits/byte  capitals accuracy
base   3.0000 ± 0.5774  20.086      1.2984     0.2500 ± 0.2165
tuned  1.7500 ± 0.4330  5.755       0.7574     0.5000 ± 0.2500

loss, tuned against base: -1.2500 ± 0.1443 (8.7 standard errors), lower: beyond twice its standard error
capitals accuracy, tuned against base: +0.2500 ± 0.2500 (1.0 standard errors), higher: within twice its standard error, so it may be chance
";
        assert_eq!(report().to_text(), expected);
    }

    #[test]
    fn what_is_missing_or_not_comparable_is_said() {
        let mut report = report();
        report.models[1].text.as_mut().unwrap().per_sample.pop();
        report.models[1].tasks.clear();
        let text = EvalReport::new(report.models).to_text();
        assert!(text.lines().nth(2).unwrap().ends_with("  -"), "{text}");
        let expected = "loss, tuned against base: not compared: expected the same number of samples for both models, found 3 and 2";
        assert_eq!(text.lines().last().unwrap(), expected);
    }

    #[test]
    fn json_has_every_number() {
        let json = report().to_json();
        assert_eq!(json["models"][0]["text"]["loss"], 3.0);
        assert_eq!(json["models"][0]["text"]["per_sample"][2]["tokens"], 2);
        assert_eq!(json["models"][1]["tasks"][0]["score"]["accuracy"], 0.5);
        assert_eq!(json["comparisons"][0]["measure"], "loss");
        assert_eq!(json["comparisons"][0]["difference"]["difference"], -1.25);
        assert_eq!(json["comparisons"][0]["difference"]["verdict"], "beyond");
    }
}
