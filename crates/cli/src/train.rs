//! `moeforge train`: trains a recipe, or resumes a run.

pub(crate) mod find_lr;
pub(crate) mod precision;
pub(crate) mod resume_check;
mod samples;
mod signals;
mod task_scorer;
mod watcher;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use ::eval::GateVerdict;
use anyhow::Context;
use data::Corpus;
use kernels::device::is_gpu;
use model::OperandRounding;
use model::adapt::AdaptedModule;
use parallel::World;
use train::{HeapUse, RankLayout, Recipe, RunDir, Schedule, Session, SessionOptions};

use self::signals::Signals;
use self::task_scorer::RecipeTasks;
use self::watcher::Watcher;
use crate::console::{Console, DIVERGED, NO_MEMORY, NOT_FINITE, NOT_KEPT, WithCode, misuse};
use crate::device::{DeviceArgs, expect_right, record};
use crate::host::launch::{self, RankArgs};
use crate::host::scratch::Scratch;
use crate::open::{find, note_keys, token_cache};
use crate::plan::budget::BudgetArgs;
use crate::plan::run_memory::{approve, note_memory};
use crate::rows::{note_changed, note_ignored, note_unused};

/// Train with a recipe: pretraining, full fine-tuning, LoRA, DoRA or DPO.
///
/// Ctrl-C, SIGTERM or SIGUSR1 finishes the step, saves a checkpoint and exits with code 130, 143 or 138; a second one stops
/// at once. Other exit codes: 1 an error; 2 wrong usage or recipe; 3 a gate of the recipe is not kept; 5 too little memory, before the first step or after saving a checkpoint; 6 a loss
/// or gradient is not finite; 7 the loss diverged too often; 8 a rank waited too long for others. Checkpoints that were saved before are always kept.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipe: TOML file. Not needed with --resume.
    #[arg(required_unless_present = "resume")]
    recipe: Option<PathBuf>,
    /// Recipe setting to override, as section.key=value. May be repeated. With --resume: the length of the run, its
    /// learning rates, paths of files that were moved, and what is logged, measured and kept.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Run directory to create. Default: a new folder in runs/.
    #[arg(long, value_name = "RUN", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Run directory to resume from its latest checkpoint. A finished run goes on with --set train.steps=N.
    #[arg(long, value_name = "RUN", conflicts_with = "recipe")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    ranks: RankArgs,
    #[command(flatten)]
    budget: BudgetArgs,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let world = launch::join(&args.ranks, console)?;
    // A rank that is not the first has a run directory with metrics that nobody reads.
    let scratch = (!world.is_first()).then(|| Scratch::new("rank"));
    let scratch = scratch.transpose()?;
    let (run, mut session, tasks) = match &args.resume {
        Some(path) => resumed(path, args, &world, scratch.as_ref(), console)?,
        None => started(args, &world, scratch.as_ref(), console)?,
    };
    // The first rank asks them.
    let tasks = tasks.filter(|_| scratch.is_none());
    let mut watcher = Watcher::new(&session, (tasks, &run), Signals::listen()?, console)?;

    let fitted = session.fit(&run, &mut watcher);
    let (scorer, saved_activation_bytes, measured) = watcher.finish();
    fitted.map_err(with_code)?;
    let result = if session.adapted.is_empty() {
        "model"
    } else {
        "adapter"
    };
    console.detail(format_args!(
        "saved activations: at most {:.1} MiB (inputs of linear layers, SwiGLU and experts)",
        saved_activation_bytes as f64 / f64::from(1 << 20)
    ));
    console.memory();
    // What a GPU holds is not predicted.
    if let Some(measured) = measured.filter(|_| !is_gpu(&session.device())) {
        note_memory(&session.plan, &measured, console);
    }
    if !world.is_alone() {
        console.note(format_args!(
            "sent to other ranks: {:.1} MB",
            world.bytes_sent() as f64 / 1e6
        ));
    }
    let mut is_kept = true;
    if scratch.is_none() {
        console.result(run.path().join(result).display());
        let report = scorer.map(|scorer| scorer.judge(session.result_step()));
        if let Some(report) = report.transpose()?.flatten() {
            console.note(report.to_text().trim_end());
            is_kept = report
                .gates
                .iter()
                .all(|gate| gate.verdict == GateVerdict::Passed);
        }
    }
    drop((session, world));
    launch::leave();
    Ok(match is_kept {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(NOT_KEPT),
    })
}

/// A run, its session, and the tasks that its model is asked.
type OpenedRun = (RunDir, Session, Option<RecipeTasks>);

/// A new run of a recipe, with its session.
fn started(
    args: &Args,
    world: &World,
    scratch: Option<&Scratch>,
    console: &Console,
) -> anyhow::Result<OpenedRun> {
    let path = args.recipe.as_deref().unwrap_or(Path::new(""));
    let mut recipe = Recipe::open(path, &args.set).map_err(usage)?;
    share_out(&mut recipe, world.ranks(), console);
    let tasks = RecipeTasks::of(&recipe, args.budget, console)?;
    let session = open_rank((recipe, None), world, args, console)?;
    // The run directory is created last, so that a run that cannot start leaves none.
    let path = match scratch {
        None => new_run(args.out.as_deref(), args.recipe.as_deref(), ""),
        Some(scratch) => run_in(scratch),
    };
    let run = RunDir::create(&path, &session.recipe)?;
    record_device(&run, &session, args)?;
    let (path, steps) = (run.path().display(), session.total_steps());
    console.note(format_args!("{path}: {steps} steps"));
    Ok((run, session, tasks))
}

/// An existing run, perhaps with other settings, and its session as of the latest checkpoint.
fn resumed(
    path: &Path,
    args: &Args,
    world: &World,
    scratch: Option<&Scratch>,
    console: &Console,
) -> anyhow::Result<OpenedRun> {
    let run = run_of_first(path, world, scratch)?;
    let before = run.recipe().map_err(usage)?;
    let recipe = run.changed_recipe(&args.set).map_err(usage)?;
    let found = run.locate(&recipe)?;
    let tasks = RecipeTasks::of(&found, args.budget, console)?;
    tasks
        .iter()
        .try_for_each(|tasks| tasks.expect_start(&run))?;
    let named = (found, recipe.model.path.as_deref());
    let mut session = open_rank(named, world, args, console)?;
    let step = session.resume(&run)?;
    if recipe != before {
        run.replace_recipe(&recipe)?;
    }
    record_device(&run, &session, args)?;
    let ends = [&before, &session.recipe].map(|recipe| recipe.total_steps(session.train.rows()));
    console.note(progress_of(&session, &run, step, ends));
    if let Some(text) = new_rates([&before, &recipe], ends, session.steps_done()) {
        console.note(text);
    }
    Ok((run, session, tasks))
}

/// Opens the session of a rank, and says what it is and how ranks share it out.
fn open_rank(
    (recipe, base_name): (Recipe, Option<&str>),
    world: &World,
    args: &Args,
    console: &Console,
) -> anyhow::Result<Session> {
    let asked = args.ranks.layout();
    let session = launch::first_of_machine_first(world, || {
        open_named(
            (recipe, base_name),
            (&args.device, args.budget),
            (world, asked),
            console,
        )
    })?;
    describe(&session, console)?;
    if world.ranks() > 1 {
        console.note(format_args!("layout: {}", session.layout()));
        if let (None, Some(why)) = (asked.ep, session.why_experts_stay_whole()) {
            console.note(format_args!("ranks do not share out experts: {why}"));
        }
    }
    Ok(session)
}

/// Cuts the batch of a step into as many micro-batches as ranks need, if it can be cut so: batches of samples of similar
/// length have others when they are smaller.
pub(crate) fn share_out(recipe: &mut Recipe, ranks: usize, console: &Console) {
    let train = &mut recipe.train;
    if train.accumulate.is_multiple_of(ranks) || recipe.data.group_by_length {
        return;
    }
    let rows = train.batch_size * train.accumulate;
    let mut counts = (train.accumulate..=rows).filter(|n| n.is_multiple_of(ranks));
    if let Some(accumulate) = counts.find(|n| rows.is_multiple_of(*n)) {
        (train.accumulate, train.batch_size) = (accumulate, rows / accumulate);
        console.note(format_args!(
            "{ranks} ranks: train.batch_size = {}, train.accumulate = {accumulate}, the same step",
            train.batch_size
        ));
    }
}

/// The run directory of a rank that is not the first.
fn run_in(scratch: &Scratch) -> PathBuf {
    scratch.path().join("run")
}

/// An existing run; on a rank that is not the first, a new one of the same recipe.
fn run_of_first(path: &Path, world: &World, scratch: Option<&Scratch>) -> anyhow::Result<RunDir> {
    let mut run = None;
    let recipe = world.first_does("recipe", || {
        let opened = RunDir::open(path)?;
        let recipe = opened.recipe().map_err(usage)?.to_toml();
        run = Some(opened);
        Ok::<_, anyhow::Error>(recipe.into_bytes())
    })?;
    let Some(scratch) = scratch else {
        return run.context("the first rank has opened its run");
    };
    let file = scratch.write("recipe.toml", &String::from_utf8_lossy(&recipe))?;
    let recipe = Recipe::open(&file, &[]).map_err(usage)?;
    Ok(RunDir::create(&run_in(scratch), &recipe)?)
}

/// Writes what a run computes on into its directory.
fn record_device(run: &RunDir, session: &Session, args: &Args) -> anyhow::Result<()> {
    let text = record(&session.device(), args.device.name().as_deref());
    Ok(checkpoint::write_file(
        &run.path().join("device.txt"),
        text.as_bytes(),
    )?)
}

/// Where a resumed run goes on, and whether its end has moved.
fn progress_of(session: &Session, run: &RunDir, step: Option<u64>, ends: [u64; 2]) -> String {
    let (path, [before, now]) = (run.path().display(), ends);
    let step = step.unwrap_or(0);
    let moved = if before == now {
        String::new()
    } else {
        format!(", which ended at {before} before")
    };
    if !session.is_finished() {
        return format!("{path}: resuming after step {step} of {now}{moved}");
    }
    let cure = if step < now {
        "the validation loss stopped falling: `--set eval.patience=N` lets it go on"
    } else {
        "`--set train.steps=N` lets it go on"
    };
    format!("{path}: finished after step {step} of {now}{moved}; {cure}")
}

/// The learning rates of a run that goes on by another schedule, or to another end; none if nothing differs. Given the
/// recipes and the ends, before and now, and the steps that are made.
fn new_rates(recipes: [&Recipe; 2], ends: [u64; 2], step: u64) -> Option<String> {
    let of = |recipe: &Recipe| (recipe.schedule.clone(), recipe.optimizer.learning_rate);
    let is_same = of(recipes[0]) == of(recipes[1]) && ends[0] == ends[1];
    if is_same || step == 0 || step >= ends[1] {
        return None;
    }
    let [before, now] =
        recipes.map(|recipe| Schedule::new(recipe.optimizer.learning_rate, &recipe.schedule));
    let last = ends[1];
    Some(format!(
        "learning rate: {:.2e} in step {step}, by the schedule until then; {:.2e} in step {}, and {:.2e} in step {last}, \
         where the schedule ends now",
        before.rate(step - 1, ends[0]),
        now.rate(step, last),
        step + 1,
        now.rate(last - 1, last),
    ))
}

/// The exit code of a session that was not opened.
fn opening(error: train::Error) -> anyhow::Error {
    match error {
        train::Error::TooLarge(_) => with_code(error),
        error => error.into(),
    }
}

/// The exit code of a run that did not finish.
pub(crate) fn with_code(error: train::Error) -> anyhow::Error {
    let code = match error {
        train::Error::NotFinite { .. } => NOT_FINITE,
        train::Error::LowMemory { .. } | train::Error::TooLarge(_) => NO_MEMORY,
        train::Error::Diverged { .. } => DIVERGED,
        // The code that shells use.
        train::Error::Interrupted { signal, .. } => (128 + signal) as u8,
        other => return other.into(),
    };
    let message = error.to_string();
    anyhow::Error::new(WithCode { code, message })
}

/// Label of the tokenizing progress, with its unit.
pub(crate) const TOKENIZING: &str = "tokenizing (kB)";

/// Opens the session of a recipe, with a progress bar for tokenizing.
pub(crate) fn open_session(
    recipe: Recipe,
    device: &DeviceArgs,
    console: &Console,
) -> anyhow::Result<Session> {
    let alone = (&World::alone(), RankLayout::default());
    let place = (device, BudgetArgs::default());
    open_named((recipe, None), place, alone, console)
}

/// [`open_session`] with the name of the base in an adapter, if it is not the recipe's path, as one of some ranks.
fn open_named(
    (recipe, base_name): (Recipe, Option<&str>),
    (device, budget): (&DeviceArgs, BudgetArgs),
    ranks: (&World, RankLayout),
    console: &Console,
) -> anyhow::Result<Session> {
    let device = device.open()?;
    if is_gpu(&device) && budget.memory_budget.is_some() {
        return Err(misuse(
            "`--memory-budget`: what a GPU holds is not planned; the option is for `--device cpu`"
                .into(),
        ));
    }
    let (progress, cache) = (RefCell::new(None), token_cache());
    let options = SessionOptions {
        device: &device,
        resolve: &|model| find(model).map_err(|error| train::Error::Resolve(format!("{error:#}"))),
        base_name,
        token_cache: cache.as_deref(),
        tokenizing: &|done, total| {
            let mut progress = progress.borrow_mut();
            progress
                .get_or_insert_with(|| console.progress(total / 1000, TOKENIZING))
                .update_of(done / 1000, total / 1000);
        },
        ranks: Some(ranks),
        approve: &|forecast| match is_gpu(&device) {
            true => Ok(HeapUse::Fast),
            false => approve(forecast, budget, console),
        },
    };
    let session = Session::open_with(recipe, options).map_err(opening)?;
    expect_right(&device, session.config(), console)?;
    if let Some(progress) = progress.into_inner() {
        progress.finish();
    }
    note_unused(&session.train.unused_files, console);
    if let Some(base) = session.base_folder() {
        note_keys(base, console)?;
    }
    note_reading("training rows", &session.train.corpus, console);
    if let Some(corpus) = &session.valid {
        note_reading("validation rows", corpus, console);
    }
    for warning in session.warnings() {
        console.note(format_args!("warning: {warning}"));
    }
    note_endless(
        &session.train.corpus,
        "training rows",
        &end_ids(&session)?,
        console,
    )?;
    Ok(session)
}

/// The tokens that end a text of a session's model.
fn end_ids(session: &Session) -> anyhow::Result<Vec<u32>> {
    let mut ids = session.end_ids.clone();
    if let Some(base) = session.base_folder() {
        ids.extend(infer::end_of_text(base, None)?.ids);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Warns of samples that do not teach the model to end a text.
pub(crate) fn note_endless(
    corpus: &Corpus,
    file: &str,
    end_ids: &[u32],
    console: &Console,
) -> anyhow::Result<()> {
    let Some(samples) = corpus.endless_samples(end_ids)? else {
        return Ok(());
    };
    let cure = if end_ids.is_empty() {
        "the model names no such token; give `eos_token` in tokenizer_config.json".to_owned()
    } else {
        format!("these are {end_ids:?}; let rows or the chat template end with one")
    };
    console.note(format_args!(
        "warning: {file}: none of {samples} samples trains a token that ends a text, so a model does not learn to end one: {cure}"
    ));
    Ok(())
}

/// Notes what was ignored in the data, which has a name, and what is not as the rows have it.
pub(crate) fn note_reading(what: &str, corpus: &Corpus, console: &Console) {
    note_ignored(&corpus.ignored_keys, console);
    note_changed(&corpus.notes, console);
    let (untrained, left_out) = (corpus.counts.untrained_samples, corpus.left_out);
    if untrained > 0 {
        let samples = corpus.len() + left_out;
        let pairs = match left_out > untrained {
            true => format!(", {left_out} with the other answers of their pairs"),
            false => String::new(),
        };
        console.note(format_args!(
            "{what}: {untrained} of {samples} samples have nothing to train on, because it is masked or beyond the maximum \
             length: training leaves them out{pairs}"
        ));
    }
    if let Some(problem) = &corpus.cache_problem {
        console.note(format_args!(
            "tokenized rows are not cached for the next run: {problem}"
        ));
    }
}

/// A wrong recipe, with the exit code of wrong usage.
pub(crate) fn usage(error: train::Error) -> anyhow::Error {
    misuse(error.to_string())
}

/// The folder of a new run: `out`, or a folder in runs/ named by the recipe, the purpose and the time.
pub(crate) fn new_run(out: Option<&Path>, recipe: Option<&Path>, purpose: &str) -> PathBuf {
    let name = recipe.and_then(Path::file_stem);
    let name = name.map_or_else(|| "run".into(), |name| name.to_string_lossy());
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    out.map_or_else(
        || Path::new("runs").join(format!("{name}{purpose}-{seconds}")),
        Path::to_owned,
    )
}

/// What a session trains, on which samples.
fn describe(session: &Session, console: &Console) -> anyhow::Result<()> {
    if !session.adapted.is_empty() {
        console.note(adapted_table(&session.adapted));
    }
    if let Some(unread) = session.unread_by_peft() {
        console.note(unread);
    }
    let (counts, samples) = (session.train.corpus.counts, session.train.corpus.len());
    console.note(format_args!(
        "{} trained parameters; {samples} samples of {} rows{}, {} tokens, {} targets{}",
        session.trained_parameters(),
        counts.rows,
        if session.recipe.data.packing {
            format!(", packed into {} sequences", session.train.rows())
        } else {
            String::new()
        },
        counts.tokens,
        counts.trained_tokens,
        if counts.truncated_rows > 0 {
            format!(
                "; {} rows were truncated to data.max_length",
                counts.truncated_rows
            )
        } else {
            String::new()
        },
    ));
    if session.compute() != OperandRounding::F32 || session.quantizer.is_some() {
        console.note(session.policy()?);
    }
    Ok(())
}

/// The adapted modules, one line per kind.
fn adapted_table(adapted: &[AdaptedModule]) -> String {
    let mut kinds: Vec<(String, usize, &AdaptedModule, usize)> = Vec::new();
    for module in adapted {
        let kind: Vec<&str> = module
            .module
            .split('.')
            .skip_while(|part| *part != "layers")
            .skip(2)
            .collect();
        let kind = if kind.is_empty() {
            module.module.clone()
        } else {
            kind.join(".")
        };
        match kinds.iter_mut().find(|(name, _, first, _)| {
            *name == kind && (first.rank, first.alpha) == (module.rank, module.alpha)
        }) {
            Some((_, n, _, parameters)) => {
                (*n, *parameters) = (*n + 1, *parameters + module.parameters)
            }
            None => kinds.push((kind, 1, module, module.parameters)),
        }
    }
    let width = kinds
        .iter()
        .map(|(kind, ..)| kind.len())
        .max()
        .unwrap_or(0)
        .max("module".len());
    let mut table = format!("{:width$}  layers  rank  alpha  parameters", "module");
    for (kind, n, first, parameters) in &kinds {
        // A whole weight has neither.
        let [rank, alpha] = match first.rank {
            0 => ["-".into(), "-".into()],
            rank => [rank.to_string(), first.alpha.to_string()],
        };
        table += &format!("\n{kind:width$}  {n:6}  {rank:>4}  {alpha:>5}  {parameters:10}");
    }
    table
}
