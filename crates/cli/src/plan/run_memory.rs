//! The memory of a training run: whether it is there, and what the run took.

use ::train::{Forecast, HeapUse, PROGRAM, PROGRAM_MAPPED, StepMemory, TrainingPlan};

use super::budget::{BudgetArgs, too_large};
use super::knobs::{proposal, training_knobs};
use super::lines::{PlanLine, size};
use crate::console::Console;
use crate::host::resident::Resident;

/// The program's own memory by component.
pub(crate) fn own_lines(plan: &TrainingPlan) -> Vec<PlanLine> {
    let lines = [
        ("trained and converted weights", plan.weights),
        ("low-rank updates", plan.updates),
        ("running means of AdamW", plan.moments),
        ("a step: activations, gradients, temporaries", plan.step),
        ("scratch of threads", plan.scratch),
        ("writing the result", plan.result),
        ("gaps between blocks", plan.gaps),
        ("the program", PROGRAM),
    ];
    let lines = lines.into_iter();
    lines
        .map(|(what, bytes)| PlanLine {
            what: what.into(),
            bytes,
            note: "",
        })
        .collect()
}

/// The memory that a run took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MeasuredMemory {
    /// At its peak.
    pub(crate) resident: Resident,
    /// Of the step that took most.
    pub(crate) step: StepMemory,
}

/// A difference of a tenth is worth a line.
const TOLD_DIFFERENCE: f64 = 0.1;
/// Sizes below this differ by what the program itself takes.
const LEAST_TOLD: f64 = 256.0 * (1 << 20) as f64;

/// Shows what a run took beside what was predicted, and which component is to blame for a difference.
pub(crate) fn note_memory(plan: &TrainingPlan, measured: &MeasuredMemory, console: &Console) {
    let (own, mapped) = (
        measured.resident.own as f64,
        measured.resident.mapped as f64,
    );
    console.note(format_args!(
        "memory: {} of its own ({} predicted), {} mapped ({} predicted)",
        size(own),
        size(plan.own()),
        size(mapped),
        size(plan.mapped + PROGRAM_MAPPED)
    ));
    if (own - plan.own()).abs() <= TOLD_DIFFERENCE * own || own.max(plan.own()) < LEAST_TOLD {
        return;
    }
    if let Some((component, found, predicted)) = blamed(plan, measured) {
        console.note(format_args!(
            "memory: the prediction is off by {:.0} %, most of all for {component}: {} found, {} predicted",
            100.0 * (plan.own() / own - 1.0),
            size(found),
            size(predicted)
        ));
    }
}

/// The component with the largest difference, as it was found and predicted.
fn blamed(plan: &TrainingPlan, measured: &MeasuredMemory) -> Option<(&'static str, f64, f64)> {
    let step = &measured.step;
    let (resting, saved, whole) = (step.resting as f64, step.saved as f64, step.step as f64);
    let held = plan.weights + plan.updates + plan.moments + plan.scratch;
    let rest = measured.resident.own as f64 - resting - whole;
    let components = [
        ("weights, updates and running means", resting, held),
        ("saved activations", saved, plan.saved),
        (
            "gradients and temporaries",
            whole - saved,
            plan.step - plan.saved,
        ),
        (
            "the program, its result and gaps",
            rest,
            PROGRAM + plan.result + plan.gaps,
        ),
    ];
    let difference = |of: &(&str, f64, f64)| (of.1 - of.2).abs();
    let most = |a: &(&str, f64, f64), b: &(&str, f64, f64)| difference(a).total_cmp(&difference(b));
    components.into_iter().max_by(most)
}

/// Decides on a run that is about to open its model.
///
/// # Errors
/// A sentence with the best knobs, if the run needs more than there is.
pub(crate) fn approve(
    forecast: &Forecast<'_>,
    budget: BudgetArgs,
    console: &Console,
) -> Result<HeapUse, String> {
    let plan = forecast.plan();
    let Some(limit) = budget.limit() else {
        return Ok(HeapUse::Fast);
    };
    let bytes = limit.bytes as f64;
    if plan.without_gaps() > bytes {
        let knobs = training_knobs(forecast, Some(limit.bytes));
        let batch = forecast.batch;
        let what = format!("training on {} rows of {} tokens", batch.rows, batch.seq);
        let mut text = too_large(&what, plan.without_gaps(), &limit, &knobs);
        match proposal(forecast, limit.bytes) {
            Some((settings, plan)) => {
                let needed = size(plan.without_gaps());
                text.push_str(&format!("\nit fits with {settings}: {needed}"));
            }
            None => text.push_str("\nno setting makes it fit"),
        }
        return Err(text);
    }
    let rest = (bytes - plan.own()).max(0.0);
    if plan.mapped > rest {
        console.note(format_args!(
            "weights of {} are read from their file, and {} of memory are left for them: each step reads some from disk again, which is slow",
            size(plan.mapped),
            size(rest)
        ));
    }
    Ok(if plan.own() <= bytes {
        HeapUse::Fast
    } else {
        HeapUse::Tight
    })
}
