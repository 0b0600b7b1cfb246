//! `moeforge find-lr`: a learning rate for a recipe, from a short run of growing rates.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};
use train::{Event, RangeTest, RatePoint, Recipe, steepest};

use crate::console::{Console, misuse};
use crate::device::DeviceArgs;
use crate::plot::{Axes, Line, Mark, Plot};
use crate::train::{open_session, usage, with_code};

/// Find a learning rate: a short run raises it step by step until the loss diverges.
///
/// Prints a suggestion and writes a plot. No run is saved.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipe: TOML file.
    recipe: PathBuf,
    /// Recipe setting to override, as section.key=value. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// First learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 1e-6)]
    from: f64,
    /// Last learning rate. The run ends earlier if the loss diverges.
    #[arg(long, value_name = "RATE", default_value_t = 1.0)]
    to: f64,
    /// Number of steps from the first to the last rate.
    #[arg(long, value_name = "N", default_value_t = 100)]
    steps: u64,
    /// Plot of the loss: SVG file to write.
    #[arg(long, value_name = "FILE.svg", default_value = "find-lr.svg")]
    out: PathBuf,
    /// Print JSON with every step, instead of the suggestion alone.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let test = range(args)?;
    checkpoint::expect_absent(&args.out)?;
    let recipe = Recipe::open(&args.recipe, &args.set).map_err(usage)?;
    let in_recipe = recipe.optimizer.learning_rate;
    let mut session = open_session(recipe, &args.device, console)?;
    let mut progress = console.progress(test.steps, "learning rates");
    let points = session.range_test(test, &mut |event: &Event| {
        if let Event::Step(report) = event {
            let status = format!("lr {:.1e} loss {:.4}", report.learning_rate, report.loss);
            progress.update(report.step, &status);
        }
    });
    progress.finish();
    let points = points.map_err(with_code)?;
    let suggestion = steepest(&points);
    let plot = plot(&points, suggestion);
    checkpoint::write_file(&args.out, plot.to_svg().as_bytes())?;
    if args.json {
        console.result(to_json(&points, suggestion));
        return Ok(ExitCode::SUCCESS);
    }
    console.note(format_args!(
        "{}: {} steps, learning rates up to {:.1e}; the recipe's is {in_recipe:.1e}",
        args.out.display(),
        points.len(),
        points.last().map_or(args.from, |point| point.rate)
    ));
    match suggestion {
        Some(rate) => {
            console.note("suggested peak learning rate, where the loss falls fastest:");
            console.result(format_args!("{rate:.1e}"));
        }
        None => console.note("no suggestion: the loss never falls; check the data"),
    }
    Ok(ExitCode::SUCCESS)
}

fn range(args: &Args) -> anyhow::Result<RangeTest> {
    let holds = args.from > 0.0 && args.to > args.from && args.to.is_finite() && args.steps >= 5;
    if !holds {
        let message = format!(
            "--from, --to, --steps: expected 0 < from < to and at least 5 steps, found {} to {} in {} steps",
            args.from, args.to, args.steps
        );
        return Err(misuse(message));
    }
    Ok(RangeTest {
        from: args.from,
        to: args.to,
        steps: args.steps,
    })
}

fn plot(points: &[RatePoint], suggestion: Option<f64>) -> Plot {
    let line = |name: &str, y: fn(&RatePoint) -> f64| Line {
        name: name.into(),
        points: points.iter().map(|point| (point.rate, y(point))).collect(),
    };
    Plot {
        title: "Loss while the learning rate grows".into(),
        x: "learning rate, logarithmic".into(),
        y: "loss, nats".into(),
        lines: vec![line("smoothed", |p| p.smoothed), line("step", |p| p.loss)],
        mark: suggestion.map(|rate| Mark::X(rate, format!("suggestion: {rate:.1e}"))),
        axes: Axes::LogX,
    }
}

fn to_json(points: &[RatePoint], suggestion: Option<f64>) -> Value {
    let point = |p: &RatePoint| json!({"learning_rate": p.rate, "loss": p.loss, "smoothed_loss": p.smoothed});
    json!({
        "suggestion": suggestion,
        "steps": points.iter().map(point).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suggestion_is_marked_and_the_axes_are_named() {
        let point = |rate, loss| RatePoint {
            rate,
            loss,
            smoothed: loss,
        };
        let points = [point(1e-4, 5.0), point(1e-3, 4.0), point(1e-2, 3.5)];
        let svg = plot(&points, Some(1e-3)).to_svg();
        // The line has its middle point where the mark is.
        let line = svg
            .lines()
            .find(|line| line.contains("#0072b2\" stroke-w"))
            .unwrap();
        let mark = svg.lines().find(|line| line.contains("5 4")).unwrap();
        assert!(
            line.contains(" 271.0,") && mark.matches("271.0,").count() == 2,
            "{svg}"
        );
        for words in ["suggestion: 1.0e-3", ">learning rate", ">loss, nats"] {
            assert!(svg.contains(words), "`{words}` is not in {svg}");
        }
        assert!(!plot(&points, None).to_svg().contains("suggestion"));
    }
}
