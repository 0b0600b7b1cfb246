//! Scores of several models as a page of its own: tables, and each difference drawn with its interval.

use std::fmt::Write;

use ::eval::{Comparison, Difference, EvalReport, GateVerdict, Verdict, p_text};

use crate::report::{STYLE, escaped};

/// The width and height of the drawing of an interval, in pixels.
const DRAWING: [f64; 2] = [240.0, 18.0];

/// What the page has beyond a run's: colors that differ for people who see red and green alike.
const VERDICT_STYLE: &str = ".better,.passed{color:#0072b2}.worse,.failed{color:#b34a00}.open,.inconclusive{color:#666}\
    body{max-width:none}table{width:auto}td,th{white-space:nowrap;font-variant-numeric:tabular-nums}\
    svg{vertical-align:middle}.zero{stroke:#bbb}.interval{stroke:currentColor;stroke-width:2}circle{fill:currentColor}";

/// The page. `settings` are shown as they are, by their names.
pub(super) fn html_page(report: &EvalReport, settings: &[(String, String)]) -> String {
    let names: Vec<&str> = report.models.iter().map(|model| &*model.name).collect();
    let title = escaped(&format!("Evaluation of {}", names.join(", ")));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}{VERDICT_STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n"
    );
    gates(&mut page, report);
    for (heading, rows) in [("Text", report.text_rows()), ("Tasks", report.task_rows())] {
        if rows.len() > 1 {
            section(&mut page, heading);
            table(&mut page, &rows);
        }
    }
    differences(&mut page, report);
    if !report.routing.is_empty() {
        section(&mut page, "Routing");
        table(&mut page, &report.routing_rows());
    }
    work(&mut page, report);
    if !settings.is_empty() {
        section(&mut page, "Settings");
        let rows = settings
            .iter()
            .map(|(name, value)| vec![name.clone(), value.clone()]);
        let header = vec!["setting".to_owned(), "value".to_owned()];
        table(
            &mut page,
            &std::iter::once(header).chain(rows).collect::<Vec<_>>(),
        );
    }
    page.push_str("</body></html>\n");
    page
}

/// Appends; writing to a string cannot fail.
fn put(page: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = page.write_fmt(text);
}

fn section(page: &mut String, heading: &str) {
    put(page, format_args!("<h2>{heading}</h2>\n"));
}

/// A table, the first row of which names the columns.
fn table(page: &mut String, rows: &[Vec<String>]) {
    page.push_str("<table>\n");
    for (at, row) in rows.iter().enumerate() {
        let kind = if at == 0 { "th" } else { "td" };
        page.push_str("<tr>");
        for cell in row {
            put(page, format_args!("<{kind}>{}</{kind}>", escaped(cell)));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

fn gates(page: &mut String, report: &EvalReport) {
    if report.gates.is_empty() {
        return;
    }
    section(page, "Gates");
    page.push_str("<ul>\n");
    for outcome in &report.gates {
        let class = match outcome.verdict {
            GateVerdict::Passed => "passed",
            GateVerdict::Failed => "failed",
            GateVerdict::Inconclusive => "inconclusive",
        };
        let text = escaped(&outcome.to_string());
        put(page, format_args!("<li class=\"{class}\">{text}</li>\n"));
    }
    page.push_str("</ul>\n");
}

/// Differences, on one scale for each measure and baseline, so that models compare.
fn differences(page: &mut String, report: &EvalReport) {
    if report.comparisons.is_empty() {
        return;
    }
    section(page, "Differences");
    page.push_str("<p>Each line is the 95 % interval of a difference on the same items; all are judged together (Holm).</p>\n<table>\n<tr><th>measure</th><th>model</th><th>against</th><th>difference</th><th></th><th>p (Holm)</th><th>shows from</th><th>verdict</th></tr>\n");
    for comparison in &report.comparisons {
        let Comparison {
            measure,
            model,
            baseline,
            difference,
            problem,
            ..
        } = comparison;
        let [measure, model, baseline] = [measure, model, baseline].map(|text| escaped(text));
        let begin = format!("<tr><td>{measure}</td><td>{model}</td><td>{baseline}</td>");
        let Some(found) = difference else {
            let problem = escaped(problem.as_deref().unwrap_or_default());
            put(
                page,
                format_args!("{begin}<td colspan=\"5\">not compared: {problem}</td></tr>\n"),
            );
            continue;
        };
        let same = report.comparisons.iter().filter(|other| {
            other.measure == comparison.measure && other.baseline == comparison.baseline
        });
        let ends = same
            .filter_map(|other| other.difference)
            .flat_map(|other| other.interval);
        let scale = ends
            .filter(|end| end.is_finite())
            .map(f64::abs)
            .fold(0.0, f64::max);
        let (class, verdict) = match found.verdict {
            Verdict::Better => ("better", "better"),
            Verdict::Worse => ("worse", "worse"),
            Verdict::Open => ("open", "may be chance"),
        };
        put(
            page,
            format_args!(
                "{begin}<td>{:+.4}</td><td class=\"{class}\">{}</td><td>{}</td><td>{:.4}</td><td class=\"{class}\">{verdict}</td></tr>\n",
                found.difference,
                drawing(found, scale),
                p_text(found.p_holm).replace('<', "&lt;"),
                found.shows_from,
            ),
        );
    }
    page.push_str("</table>\n");
}

/// A difference and its interval around zero, which is in the middle; `scale` is at the sides.
fn drawing(found: &Difference, scale: f64) -> String {
    let [width, height] = DRAWING;
    let [low, high] = found.interval;
    if !(scale > 0.0 && low.is_finite() && high.is_finite()) {
        return String::new();
    }
    let middle = height / 2.0;
    let x = |value: f64| width / 2.0 + value / scale * (width / 2.0 - 6.0);
    let [start, end, point, zero] = [low, high, found.difference, 0.0].map(x);
    format!(
        "<svg width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{low:+.4} to {high:+.4}\"><title>[{low:+.4}, {high:+.4}]</title><line class=\"zero\" x1=\"{zero:.1}\" x2=\"{zero:.1}\" y1=\"0\" y2=\"{height}\"/><line class=\"interval\" x1=\"{start:.1}\" x2=\"{end:.1}\" y1=\"{middle}\" y2=\"{middle}\"/><circle cx=\"{point:.1}\" cy=\"{middle}\" r=\"4\"/></svg>"
    )
}

/// What each model read for each task.
fn work(page: &mut String, report: &EvalReport) {
    let mut rows = vec![
        [
            "model",
            "task",
            "items",
            "requests cut",
            "tokens read",
            "without sharing",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for model in &report.models {
        for task in &model.tasks {
            let numbers = [
                task.n,
                task.answers.n_cut,
                task.answers.read,
                task.answers.asked,
            ];
            let names = [model.name.clone(), task.task.clone()];
            rows.push(
                names
                    .into_iter()
                    .chain(numbers.map(|n| n.to_string()))
                    .collect(),
            );
        }
    }
    if rows.len() > 1 {
        section(page, "Work");
        table(page, &rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_names_is_text() {
        let report = EvalReport {
            models: Vec::new(),
            comparisons: Vec::new(),
            gates: Vec::new(),
            routing: Vec::new(),
        };
        let settings = [("<script>".to_owned(), "\"&\"".to_owned())];
        let page = html_page(&report, &settings);
        assert!(
            page.contains("<td>&lt;script&gt;</td><td>\"&amp;\"</td>"),
            "{page}"
        );
        assert!(!page.contains("<script>"), "{page}");
    }

    #[test]
    fn intervals_lie_around_zero_in_the_middle() {
        let found = |interval| Difference {
            difference: 0.5,
            interval,
            p: 0.01,
            p_holm: 0.01,
            shows_from: 0.5,
            verdict: Verdict::Better,
        };
        let svg = drawing(&found([0.0, 1.0]), 1.0);
        for expected in [
            "x1=\"120.0\" x2=\"120.0\"",
            "x1=\"120.0\" x2=\"234.0\"",
            "cx=\"177.0\"",
            "<title>[+0.0000, +1.0000]</title>",
        ] {
            assert!(svg.contains(expected), "{svg}");
        }
        assert_eq!(drawing(&found([f64::NEG_INFINITY, f64::INFINITY]), 1.0), "");
        assert_eq!(drawing(&found([0.0, 0.0]), 0.0), "");
    }
}
