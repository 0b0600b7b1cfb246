//! `moeforge report`: a run as one page that needs nothing else, for a browser, a colleague, or an archive.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde_json::Value;
use train::Recipe;

use crate::console::Console;
use crate::open::name_of;
use crate::plot::{Axes, Heatmap, Line, Plot};

/// Writes a run's page. The run may still be going on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run directory, as `train` writes it.
    run: PathBuf,
    /// HTML file to write. Default: `report.html` in the run directory.
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
    // The page in the run is this program's own, and is made again as the run goes on.
    if let Some(out) = &args.out {
        checkpoint::expect_absent(out)?;
    }
    let recipe = Recipe::open(&recipe, &[])?;
    let metrics = args.run.join("metrics.jsonl");
    let log = Log::read(&metrics)?;
    let origin = Origin {
        run: name_of(&args.run),
        last_step: utc(fs::metadata(&metrics)?.modified()?),
        machine: machine(),
    };
    let page = page(&args.run, &origin, &recipe, &log);
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| args.run.join("report.html"));
    checkpoint::write_file(&out, page.as_bytes())?;
    console.result(out.display());
    Ok(ExitCode::SUCCESS)
}

/// What the title of the page says.
struct Origin {
    run: String,
    /// When the run's last step was logged.
    last_step: String,
    /// The machine that makes the page: a run does not record its own.
    machine: String,
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

    /// One line for each layer, of a number of the objects in a list. If there are many layers: the least, the mean and
    /// the most.
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

/// An exponential moving average over a tenth of the points, at most about 20. Its bias towards the start is corrected
/// as in Adam: the weights of the points seen so far add up to 1.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let weight = 1.0 / (points.len() as f64 / 10.0).clamp(1.0, 20.0);
    let (mut average, mut weights) = (0.0, 0.0);
    let follow = |(x, y): &(f64, f64)| {
        weights = (1.0 - weight) * weights + weight;
        average += (y - average) * weight / weights;
        (*x, average)
    };
    points.iter().map(follow).collect()
}

/// How pages look.
pub(crate) const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}\
    h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:2em 0 .5em;border-bottom:1px solid #ddd}\
    h1,h2,p,td{overflow-wrap:anywhere}\
    .sub{color:#666;margin:.2em 0}.facts{display:flex;flex-wrap:wrap;gap:.8em;margin-top:1.5em}\
    .fact{border:1px solid #ddd;border-radius:8px;padding:.6em 1em;min-width:8em}\
    .fact b{display:block;font-size:1.25em}.fact span{color:#666;font-size:.85em}\
    .plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:1em}\
    .plots svg,.map svg{box-sizing:border-box;width:100%;max-width:640px;height:auto;border:1px solid #eee;\
    border-radius:8px}\
    pre{background:#f6f6f4;border-radius:8px;padding:1em;overflow-x:auto;font-size:13px;line-height:1.4}\
    table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.35em .8em .35em 0;\
    border-bottom:1px solid #eee}td{white-space:pre-wrap}td:first-child{white-space:nowrap;color:#666}";

fn page(run: &Path, origin: &Origin, recipe: &Recipe, log: &Log) -> String {
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
    let mut page = header(origin, &base.unwrap_or_default(), &data.join(", "));
    page += &facts(log);
    page += &splits(log);
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

/// The head of the page, and its title: the run, its model and data, its date, the program's version and the machine.
fn header(origin: &Origin, base: &str, data: &str) -> String {
    let program = concat!("moeforge ", env!("CARGO_PKG_VERSION"));
    let [run, date, machine] =
        [&origin.run, &origin.last_step, &origin.machine].map(|text| escaped(text));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <title>{run} · {date} · {program} · {machine}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n\
         <h1>{run}</h1><p class=\"sub\">{} on {}</p>\n\
         <p class=\"sub\">last step {date} · page by {program} on {machine}</p>\n",
        escaped(base),
        escaped(data)
    )
}

/// A moment to the minute, in UTC.
fn utc(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let [days, minutes] = [seconds / 86_400, seconds % 86_400 / 60];
    // Years that begin in March have their leap day at the end; 400 of them have 146,097 days. From H. Hinnant,
    // chrono-Compatible Low-Level Date Algorithms, `civil_from_days`.
    let days = days + 719_468;
    let day_of_era = days % 146_097;
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, is_next_year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = days / 146_097 * 400 + year + is_next_year;
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02} UTC",
        minutes / 60,
        minutes % 60
    )
}

/// This machine: its processor as the system calls it, how many of them, and the system.
pub(crate) fn machine() -> String {
    let linux = fs::read_to_string("/proc/cpuinfo").ok();
    let linux = linux.as_deref().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let mac = || {
        let words = ["-n", "machdep.cpu.brand_string"];
        let output = Command::new("sysctl").args(words).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (!name.is_empty()).then_some(name)
    };
    let name = linux.or_else(mac);
    let name = name.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let n = std::thread::available_parallelism().map_or(1, |n| n.get());
    let unit = if n == 1 { "CPU" } else { "CPUs" };
    format!("{name}, {n} {unit}, {}", std::env::consts::OS)
}

/// The numbers that a reader looks for first.
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

/// The sizes of the splits, and what was left out of them.
fn splits(log: &Log) -> String {
    let splits = log.last("data").and_then(|line| line["data"].as_object());
    let sentence = |(name, split): (&String, &Value)| {
        let number = |key: &str| split[key].as_u64().unwrap_or(0);
        let left_out = match number("left_out") {
            0 => String::new(),
            n => format!("; {n} samples left out, with nothing in them to train on"),
        };
        format!(
            "<p class=\"sub\">{}: {} samples of {} rows, {} tokens, {} targets{left_out}</p>\n",
            escaped(name),
            number("samples"),
            number("rows"),
            number("tokens"),
            number("trained_tokens")
        )
    };
    splits.into_iter().flatten().map(sentence).collect()
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
        plot("Rewards", "nats", Axes::Tight, log.lines(&rewards)),
        plot(
            "Accuracy: share of pairs with a higher reward for the chosen answer",
            "share",
            Axes::FromZero,
            log.lines(&accuracies),
        ),
        plot(
            "Learning rate",
            "learning rate",
            Axes::FromZero,
            one(log.numbers("learning_rate")),
        ),
        plot(
            "Gradient norm, before clipping",
            "norm",
            Axes::FromZero,
            one(log.numbers("grad_norm")),
        ),
        plot("Speed", "tokens/s", Axes::FromZero, one(rate)),
    ];
    let plots = plots.into_iter().chain(score_plots(log));
    let plots = plots.chain(expert_plots(log));
    plots.filter(|plot| !plot.lines.is_empty()).collect()
}

/// The scores of tasks, a plot for each metric and a line for each filter of answers.
fn score_plots(log: &Log) -> Vec<Plot> {
    let mut plots: Vec<Plot> = Vec::new();
    for line in &log.0 {
        for score in line["scores"].as_array().into_iter().flatten() {
            let text = |key: &str| score[key].as_str().unwrap_or_default();
            let title = format!("{} {}", text("task"), text("metric"));
            let filter = text("filter");
            let point = line["step"].as_f64().zip(score["value"].as_f64());
            let at = plots.iter().position(|plot| plot.title == title);
            let at = at.unwrap_or_else(|| {
                plots.push(plot(&title, "score", Axes::Tight, Vec::new()));
                plots.len() - 1
            });
            let lines = &mut plots[at].lines;
            match lines.iter_mut().find(|line| line.name == filter) {
                Some(line) => line.points.extend(point),
                None => lines.push(named(filter, point.into_iter().collect())),
            }
        }
    }
    plots
}

/// What the routers do.
fn expert_plots(log: &Log) -> [Plot; 3] {
    [
        plot(
            "Entropy of the experts' load; 1 is even",
            "entropy",
            Axes::Tight,
            log.layers("experts", "entropy"),
        ),
        plot(
            "Experts without a token",
            "experts",
            Axes::FromZero,
            log.layers("experts", "dead"),
        ),
        plot(
            "Routing drift: share of expert choices that differ from the base's",
            "share",
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
            "Load of the experts at step {}: from none (white) to three times an even share or more",
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
        "<h2>Rollbacks after loss spikes</h2><table><tr><th>steps</th><th>why</th></tr>{html}</table>\n"
    )
}

/// A text between tags.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_is_unbiased_from_the_first_point_on() {
        let line =
            |y: fn(i32) -> f64| -> Vec<_> { (0..1000).map(|i| (f64::from(i), y(i))).collect() };
        let constant = line(|_| 2.7);
        assert_eq!(smoothed(&constant), constant);
        // After the second point both count, the later one slightly more.
        let points = line(|i| f64::from(i % 2));
        let found = smoothed(&points);
        assert_eq!(found[0], (0.0, 0.0));
        assert!((found[1].1 - 1.0 / 1.95).abs() < 1e-12, "{:?}", found[1]);
        assert!((found[999].1 - 0.5).abs() < 0.05);
        assert_eq!(smoothed(&points[..4]), points[..4]);
        assert!(smoothed(&[]).is_empty());
    }

    #[test]
    fn the_title_has_run_date_version_and_machine() {
        let origin = Origin {
            run: "a <run>".into(),
            last_step: utc(UNIX_EPOCH + std::time::Duration::from_secs(1_764_352_590)),
            machine: "CPU, 2 CPUs".into(),
        };
        let html = header(&origin, "base", "data");
        let version = env!("CARGO_PKG_VERSION");
        let title = format!(
            "<title>a &lt;run&gt; · 2025-11-28 17:56 UTC · moeforge {version} · CPU, 2 CPUs</title>"
        );
        assert!(html.contains(&title), "{html}");
        let seen = &html[html.find("<body>").unwrap()..];
        for words in [
            "a &lt;run&gt;",
            "2025-11-28",
            version,
            "CPU, 2 CPUs",
            "base on data",
        ] {
            assert!(seen.contains(words), "`{words}` is not in {seen}");
        }
        assert!(machine().contains(" CPU"), "{}", machine());
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let day = |days: u64| {
            utc(UNIX_EPOCH + std::time::Duration::from_secs(86_400 * days))[..10].to_owned()
        };
        let days = [0, 58, 59, 10_956, 11_015, 11_016, 20_454, 20_453];
        let dates = [
            "1970-01-01",
            "1970-02-28",
            "1970-03-01",
            "1999-12-31",
            "2000-02-28",
            "2000-02-29",
            "2026-01-01",
            "2025-12-31",
        ];
        assert_eq!(days.map(day), dates);
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
