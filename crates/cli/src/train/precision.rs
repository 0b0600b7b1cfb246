//! `moeforge precision`: the effect of lower precision on the training losses of a recipe.
//!
//! The runs are those of `moeforge train`, one after another, with the same seed and data. They differ in precision
//! (with FP8, the optimizer keeps its moments in bf16 unless the recipe says otherwise). One twin differs only in a
//! rounding of the initial values: its deviation is the noise that the others have to be compared with.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use ::eval::{Curve, CurveConfig, CurveReport};
use anyhow::{Context, bail};
use serde_json::Value;
use train::{Recipe, RunDir};

use crate::console::{Console, misuse};
use crate::host::resident::Resident;
use crate::plot::{Axes, Line, Mark, Plot};
use crate::train::usage;

/// Compare training in f32, bf16 and FP8: losses step by step, speed and memory.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipe: TOML file.
    recipe: PathBuf,
    /// Recipe setting to override, as section.key=value. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Folder for the runs, `report.json`, `report.txt` and `loss_error.svg`. Existing runs are resumed.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Weight of the newest step in the exponential moving average of losses, above 0 and at most 1.
    #[arg(long, value_name = "A", default_value_t = 0.02)]
    smoothing: f64,
    /// Number of initial steps to exclude from the loss comparison.
    #[arg(long, value_name = "N", default_value_t = 100)]
    skip: usize,
    /// Control run: also train in FP8 without scales.
    #[arg(long)]
    control: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// The runs: name, and settings of `[precision]`. The others are compared with the first. The last is the control run,
/// which shows a difference that matters.
const RUNS: [(&str, &[&str]); 5] = [
    ("bf16", &["precision.compute=bf16"]),
    (
        "bf16, start rounded",
        &["precision.compute=bf16", "precision.round_start=true"],
    ),
    ("fp8", &["precision.compute=fp8"]),
    ("f32", &["precision.compute=f32"]),
    ("fp8, unscaled", &["precision.compute=fp8-unscaled"]),
];

const NOTE: &str = "\nsaved: activations for the backward pass (inputs of linear layers, SwiGLU and experts)\n\
     peak: memory without mapped files\nFP8 is simulated: exact values, f32 arithmetic";

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    if !(args.smoothing > 0.0 && args.smoothing <= 1.0) {
        return Err(misuse(format!(
            "--smoothing: expected a number above 0 and at most 1, found {}",
            args.smoothing
        )));
    }
    // Errors in the recipe or in existing runs are reported once, before the first run.
    let n_runs = RUNS.len() - usize::from(!args.control);
    let mut runs = Vec::new();
    for (name, settings) in &RUNS[..n_runs] {
        let folder = args.out.join(name.replace(", ", "-").replace(' ', "-"));
        let settings = all_settings(args, settings);
        let recipe = Recipe::open(&args.recipe, &settings).map_err(usage)?;
        if folder.join("recipe.toml").exists() && RunDir::open(&folder)?.recipe()? != recipe {
            bail!(
                "`{}`: expected a run of this recipe, found one of another; choose another --out",
                folder.display()
            );
        }
        runs.push((name, folder, settings));
    }
    let mut curves = Vec::new();
    for (name, folder, settings) in runs {
        console.note(format_args!("{name}:"));
        let peak_bytes = train(args, &settings, &folder)?;
        curves.push(curve(name, &folder, peak_bytes)?);
    }
    let config = CurveConfig {
        smoothing: args.smoothing,
        skip: args.skip,
    };
    let report = CurveReport::new(curves, config)?;
    let (text, json) = (report.to_text() + NOTE, format!("{:#}", report.to_json()));
    checkpoint::write_file(&args.out.join("report.txt"), format!("{text}\n").as_bytes())?;
    checkpoint::write_file(
        &args.out.join("report.json"),
        format!("{json}\n").as_bytes(),
    )?;
    let svg = plot(&report).to_svg();
    checkpoint::write_file(&args.out.join("loss_error.svg"), svg.as_bytes())?;
    console.result(if args.json { &json } else { &text });
    Ok(ExitCode::SUCCESS)
}

/// The settings of a run, the user's first.
fn all_settings(args: &Args, settings: &[&str]) -> Vec<String> {
    let own = settings.iter().copied().chain(["train.log_every=1"]);
    let users = args.set.iter().cloned();
    users.chain(own.map(Into::into)).collect()
}

/// Trains, or resumes a run. Returns its peak memory without mapped files; none if the operating system does not tell
/// or the run was finished before.
fn train(args: &Args, settings: &[String], folder: &Path) -> anyhow::Result<Option<u64>> {
    if ["model", "adapter"]
        .iter()
        .any(|name| folder.join(name).exists())
    {
        return Ok(None);
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.arg("train");
    if folder.join("recipe.toml").exists() {
        command.arg("--resume").arg(folder);
    } else {
        command.arg(&args.recipe).arg("--out").arg(folder);
        for setting in settings {
            command.args(["--set", setting]);
        }
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start `moeforge train`")?;
    let mut peak_bytes = None;
    loop {
        peak_bytes = peak_bytes.max(Resident::of(child.id()).map(|held| held.own));
        match child.try_wait()? {
            None => std::thread::sleep(Duration::from_millis(20)),
            Some(status) if status.success() => return Ok(peak_bytes),
            Some(status) => bail!("{}: `moeforge train` failed, {status}", folder.display()),
        }
    }
}

/// The metrics of a run.
fn curve(name: &str, folder: &Path, peak_bytes: Option<u64>) -> anyhow::Result<Curve> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let (mut losses, mut tokens, mut seconds, mut saved_activation_bytes) =
        (Vec::new(), 0.0, 0.0, None);
    for (number, line) in (1..).zip(text.lines()) {
        let line: Value = serde_json::from_str(line)
            .with_context(|| format!("{}:{number}: expected JSON", path.display()))?;
        saved_activation_bytes =
            saved_activation_bytes.max(line["saved_activation_bytes"].as_u64());
        let [loss, n, s] = ["loss", "tokens", "seconds"].map(|key| line[key].as_f64());
        if let (Some(loss), Some(n), Some(s)) = (loss, n, s) {
            losses.push(loss);
            (tokens, seconds) = (tokens + n, seconds + s);
        }
    }
    Ok(Curve {
        name: name.into(),
        losses,
        tokens_per_second: tokens / seconds,
        saved_activation_bytes,
        peak_bytes,
    })
}

fn plot(report: &CurveReport) -> Plot {
    let skip = report.config.skip;
    let lines = report.runs.iter().skip(1).map(|run| Line {
        name: run.curve.name.clone(),
        points: (skip + 1..)
            .zip(&run.errors)
            .map(|(step, error)| (step as f64, 100.0 * error))
            .collect(),
    });
    let first = &report.runs[0].curve.name;
    Plot {
        title: format!("Relative difference of the smoothed loss to that of {first}"),
        x: "step".into(),
        y: "difference, %".into(),
        lines: lines.collect(),
        mark: Some(Mark::Y(0.25, "0.25 %, DeepSeek-V3's bound".into())),
        axes: Axes::FromZero,
    }
}
