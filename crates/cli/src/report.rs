//! `moeforge report`: a run as one page that needs nothing else, for a browser, a colleague, or an archive.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::Value;
use train::Recipe;

use crate::console::Console;
use crate::open::name_of;
use crate::plot::{Axes, Heatmap, Line, Plot};

/// Writes a run's page. The run may still be going on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run directory.
    run: PathBuf,
    /// The page; default: `report.html` in the run directory.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let recipe = args.run.join("recipe.toml");
    if !recipe.is_file() {
        bail!(
            "`{}`: expected a run directory with `recipe.toml`, found none",
            args.run.display()
        );
    }
    let recipe = Recipe::open(&recipe, &[])?;
    let log = Log::read(&args.run.join("metrics.jsonl"))?;
    let page = page(&args.run, &recipe, &log);
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| args.run.join("report.html"));
    checkpoint::write_file(&out, page.as_bytes())?;
    console.result(out.display());
    Ok(ExitCode::SUCCESS)
}

/// The lines of a run's metrics.
struct Log(Vec<Value>);

impl Log {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| {
            format!("cannot read `{}`: the run has no steps yet", path.display())
        })?;
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.split_inclusive('\n')) {
            match serde_json::from_str(line) {
                Ok(value) => lines.push(value),
                // The line that is just being written.
                Err(_) if !line.ends_with('\n') => {}
                Err(error) => bail!("{}:{number}: expected JSON, found {error}", path.display()),
            }
        }
        Ok(Self(lines))
    }

    /// What the lines say, by step.
    fn series(&self, number: impl Fn(&Value) -> Option<f64>) -> Vec<(f64, f64)> {
        let points = self.0.iter().filter_map(|line| {
            let step = line["step"].as_f64()?;
            Some((step, number(line)?))
        });
        points.collect()
    }

    /// The numbers under a key, by step.
    fn numbers(&self, key: &str) -> Vec<(f64, f64)> {
        self.series(|line| line[key].as_f64())
    }

    /// One line for each name, of the numbers under its key.
    fn lines(&self, named_keys: &[(&str, &str)]) -> Vec<Line> {
        let lines = named_keys.iter();
        lines
            .map(|(name, key)| named(name, self.numbers(key)))
            .collect()
    }

    /// One line for each layer, of what the objects in a list under `list` say; of many layers the least, the mean and the
    /// most.
    fn layers(&self, list: &str, key: &str) -> Vec<Line> {
        let mut lines: Vec<(u64, Line)> = Vec::new();
        for line in &self.0 {
            for object in line[list].as_array().into_iter().flatten() {
                let number = object[key].as_f64();
                let point = line["step"].as_f64().zip(number);
                let (Some(layer), Some(point)) = (object["layer"].as_u64(), point) else {
                    continue;
                };
                match lines.iter_mut().find(|(found, _)| *found == layer) {
                    Some((_, line)) => line.points.push(point),
                    None => lines.push((layer, named(&format!("layer {layer}"), vec![point]))),
                }
            }
        }
        let lines: Vec<Line> = lines.into_iter().map(|(_, line)| line).collect();
        if lines.len() <= 5 {
            lines
        } else {
            summed_up(&lines)
        }
    }

    /// The last line that has a key.
    fn last(&self, key: &str) -> Option<&Value> {
        self.0.iter().rev().find(|line| line.get(key).is_some())
    }
}

fn named(name: &str, points: Vec<(f64, f64)>) -> Line {
    Line {
        name: name.to_owned(),
        points,
    }
}

/// The least, the mean and the most of lines over the same steps.
fn summed_up(lines: &[Line]) -> Vec<Line> {
    let over = |sum: fn(&[f64]) -> f64| {
        let point = |i: usize| {
            let at = |line: &Line| line.points.get(i).map(|(_, y)| *y);
            let ys: Vec<f64> = lines.iter().filter_map(at).collect();
            (lines[0].points[i].0, sum(&ys))
        };
        (0..lines[0].points.len()).map(point).collect()
    };
    vec![
        named(
            "least",
            over(|ys| ys.iter().copied().fold(f64::INFINITY, f64::min)),
        ),
        named(
            "mean of layers",
            over(|ys| ys.iter().sum::<f64>() / ys.len() as f64),
        ),
        named(
            "most",
            over(|ys| ys.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        ),
    ]
}

/// An exponential average over a tenth of the points, at most about 20, and over fewer at the start.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let span = (points.len() as f64 / 10.0).clamp(1.0, 20.0);
    let mut average = 0.0;
    let follow = |(i, (x, y)): (usize, &(f64, f64))| {
        average += (y - average) / span.min(i as f64 + 1.0);
        (*x, average)
    };
    points.iter().enumerate().map(follow).collect()
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1.5em}\
    h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:2em 0 .5em;border-bottom:1px solid #ddd}\
    .sub{color:#666;margin:.2em 0 1.5em}.facts{display:flex;flex-wrap:wrap;gap:.8em}\
    .fact{border:1px solid #ddd;border-radius:8px;padding:.6em 1em;min-width:8em}\
    .fact b{display:block;font-size:1.25em}.fact span{color:#666;font-size:.85em}\
    .plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:1em}\
    .plots svg{width:100%;height:auto;border:1px solid #eee;border-radius:8px}\
    .map svg{width:100%;max-width:760px;height:auto;border:1px solid #eee;border-radius:8px}\
    pre{background:#f6f6f4;border-radius:8px;padding:1em;overflow-x:auto;font-size:13px;line-height:1.4}\
    table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.35em .8em .35em 0;\
    border-bottom:1px solid #eee}td{white-space:pre-wrap}td:first-child{white-space:nowrap;color:#666}";

fn page(run: &Path, recipe: &Recipe, log: &Log) -> String {
    let name = escaped(&name_of(run));
    let base = recipe.model.path.clone().or_else(|| {
        let config = recipe.model.config.as_ref()?;
        Some(format!("fresh weights of {}", config.display()))
    });
    let data: Vec<String> = recipe
        .data
        .path
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n\
         <h1>{name}</h1><p class=\"sub\">{} on {}</p>\n",
        escaped(&base.unwrap_or_default()),
        escaped(&data.join(", "))
    );
    page += &facts(log);
    page += "<h2>Curves</h2><div class=\"plots\">";
    for plot in plots(log) {
        page += &plot.to_svg();
    }
    page += "</div>\n";
    page += &experts(log);
    page += &samples(log);
    page += &rollbacks(log);
    // What is not there has no chapter.
    let precision = fs::read_to_string(run.join("precision.txt")).unwrap_or_default();
    for (title, text) in [("Precision", precision), ("Recipe", recipe.to_toml())] {
        if !text.is_empty() {
            let _ = writeln!(page, "<h2>{title}</h2><pre>{}</pre>", escaped(&text));
        }
    }
    page + "</body></html>\n"
}

/// The numbers one looks for first.
fn facts(log: &Log) -> String {
    let (losses, valid) = (log.numbers("loss"), log.numbers("valid_loss"));
    let best = valid.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let sum = |key: &str| {
        log.0
            .iter()
            .filter_map(|line| line[key].as_f64())
            .sum::<f64>()
    };
    let mut facts = Vec::new();
    if let Some((step, _)) = losses.last() {
        facts.push(("steps", format!("{step}")));
    }
    if let Some((_, loss)) = smoothed(&losses).last() {
        facts.push(("training loss, smoothed", format!("{loss:.4}")));
    }
    if let Some((step, loss)) = best {
        facts.push(("lowest validation loss", format!("{loss:.4} at {step}")));
    }
    if let Some((_, loss)) = valid.last() {
        facts.push(("last validation loss", format!("{loss:.4}")));
    }
    if sum("seconds") > 0.0 {
        let rate = sum("tokens") / sum("seconds");
        facts.push(("tokens per second", format!("{rate:.0}")));
    }
    let fact =
        |(name, value)| format!("<div class=\"fact\"><b>{value}</b><span>{name}</span></div>");
    let facts: String = facts.into_iter().map(fact).collect();
    format!("<div class=\"facts\">{facts}</div>\n")
}

fn plots(log: &Log) -> Vec<Plot> {
    let losses = log.numbers("loss");
    let rate = log.series(|line| Some(line["tokens"].as_f64()? / line["seconds"].as_f64()?));
    let one = |points| vec![named("", points)];
    let loss = vec![
        named("smoothed", smoothed(&losses)),
        named("validation", log.numbers("valid_loss")),
        named("training", losses),
    ];
    let rewards = [
        ("chosen", "rewards/chosen"),
        ("rejected", "rewards/rejected"),
        ("margin", "rewards/margins"),
        ("validation margin", "valid_rewards/margins"),
    ];
    let accuracies = [
        ("training", "rewards/accuracies"),
        ("validation", "valid_rewards/accuracies"),
    ];
    let plots = [
        plot("Loss", "nats", Axes::Tight, loss),
        plot(
            "Rewards of answers",
            "nats",
            Axes::Tight,
            log.lines(&rewards),
        ),
        plot(
            "Share of pairs in which the chosen answer has the larger reward",
            "",
            Axes::FromZero,
            log.lines(&accuracies),
        ),
        plot(
            "Learning rate",
            "",
            Axes::FromZero,
            one(log.numbers("learning_rate")),
        ),
        plot(
            "Gradient norm, before clipping",
            "",
            Axes::FromZero,
            one(log.numbers("grad_norm")),
        ),
        plot("Speed", "tokens/s", Axes::FromZero, one(rate)),
    ];
    let plots = plots.into_iter().chain(expert_plots(log));
    plots.filter(|plot| !plot.lines.is_empty()).collect()
}

/// What the routers do.
fn expert_plots(log: &Log) -> [Plot; 3] {
    [
        plot(
            "Evenness of the experts' load (entropy, 1 is even)",
            "",
            Axes::Tight,
            log.layers("experts", "entropy"),
        ),
        plot(
            "Experts without a token",
            "",
            Axes::FromZero,
            log.layers("experts", "dead"),
        ),
        plot(
            "Share of routing choices that changed from the base",
            "",
            Axes::FromZero,
            log.layers("routing_drift", "drift"),
        ),
    ]
}

/// Lines over the steps; those without a point are left out.
fn plot(title: &str, y: &str, axes: Axes, mut lines: Vec<Line>) -> Plot {
    lines.retain(|line| !line.points.is_empty());
    Plot {
        title: title.to_owned(),
        x: "step".to_owned(),
        y: y.to_owned(),
        lines,
        mark: None,
        axes,
    }
}

/// The load of all experts, over the last steps that were written down.
fn experts(log: &Log) -> String {
    let Some(line) = log.last("experts") else {
        return String::new();
    };
    let row = |layer: &Value| {
        let loads = layer["load"].as_array()?.iter();
        let loads: Vec<f64> = loads.filter_map(Value::as_f64).collect();
        let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
        let relative = loads.iter().map(|load| load / mean.max(1e-9)).collect();
        Some((format!("layer {}", layer["layer"].as_u64()?), relative))
    };
    let layers = line["experts"].as_array().into_iter().flatten();
    let map = Heatmap {
        title: format!(
            "Load at step {}: white is none, the darkest blue three times an even share or more",
            line["step"]
        ),
        x: "expert".into(),
        rows: layers.filter_map(row).collect(),
        most: 3.0,
    };
    format!(
        "<h2>Experts</h2><div class=\"map\">{}</div>\n",
        map.to_svg()
    )
}

fn samples(log: &Log) -> String {
    let mut rows: Vec<(&str, u64, &str)> = Vec::new();
    for line in &log.0 {
        for sample in line["samples"].as_array().into_iter().flatten() {
            let texts = sample["prompt"].as_str().zip(sample["text"].as_str());
            if let (Some((prompt, text)), Some(step)) = (texts, line["step"].as_u64()) {
                rows.push((prompt, step, text));
            }
        }
    }
    // By prompt, in the order of the first step, and then by step.
    let mut prompts: Vec<&str> = rows.iter().map(|(prompt, ..)| *prompt).collect();
    let mut seen = Vec::new();
    prompts.retain(|prompt| {
        !seen.contains(prompt) && {
            seen.push(*prompt);
            true
        }
    });
    let mut html = String::new();
    for prompt in prompts {
        let _ = write!(
            html,
            "<h2>Sample: {}</h2><table><tr><th>step</th><th>text</th></tr>",
            escaped(prompt)
        );
        for (_, step, text) in rows.iter().filter(|row| row.0 == prompt) {
            let _ = write!(html, "<tr><td>{step}</td><td>{}</td></tr>", escaped(text));
        }
        html += "</table>\n";
    }
    html
}

fn rollbacks(log: &Log) -> String {
    let mut html = String::new();
    for line in &log.0 {
        let back = &line["rolled_back"];
        let (Some(from), Some(step)) = (back["from_step"].as_u64(), line["step"].as_u64()) else {
            continue;
        };
        let [loss, smoothed] = ["loss", "smoothed_loss"].map(|key| back[key].as_f64());
        let _ = write!(
            html,
            "<tr><td>{from} → {}</td><td>loss {:.4} after {:.4} on average</td></tr>",
            step.saturating_sub(1),
            loss.unwrap_or(f64::NAN),
            smoothed.unwrap_or(f64::NAN)
        );
    }
    if html.is_empty() {
        return html;
    }
    format!(
        "<h2>Spikes that the run went back from</h2><table><tr><th>steps</th><th>why</th></tr>{html}</table>\n"
    )
}

/// A text between tags.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smoothed_line_starts_at_its_first_point_and_follows_the_mean() {
        let points: Vec<_> = (0..1000)
            .map(|i| (f64::from(i), f64::from(i % 2)))
            .collect();
        let found = smoothed(&points);
        assert_eq!(found[..2], [(0.0, 0.0), (1.0, 0.5)]);
        assert!((found[999].1 - 0.5).abs() < 0.05);
        assert_eq!(smoothed(&points[..4]), points[..4]);
        assert!(smoothed(&[]).is_empty());
    }

    #[test]
    fn texts_cannot_become_tags_and_a_line_that_is_being_written_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = "{\"step\":1,\"samples\":[{\"prompt\":\"<b>\",\"text\":\"</td>&\"}]}\n";
        fs::write(&path, format!("{line}{{\"st")).unwrap();
        let html = samples(&Log::read(&path).unwrap());
        assert!(
            html.contains("&lt;b&gt;") && html.contains("&lt;/td&gt;&amp;"),
            "{html}"
        );
        fs::write(&path, format!("{{\"st\n{line}")).unwrap();
        let error = Log::read(&path).err().unwrap().to_string();
        assert!(error.contains("metrics.jsonl:1: expected JSON"), "{error}");
    }
}
