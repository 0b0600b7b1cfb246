//! `moeforge train`: trains a recipe, or resumes a run.

pub(crate) mod find_lr;
pub(crate) mod precision;
pub(crate) mod resume_check;
mod samples;
mod signals;
mod watcher;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use data::Corpus;
use model::OperandRounding;
use model::adapt::AdaptedModule;
use train::{Recipe, RunDir, Session, SessionOptions};

use self::signals::Signals;
use self::watcher::Watcher;
use crate::console::{Console, NO_MEMORY, NOT_FINITE, STOPPED, USAGE, WithCode, printable};
use crate::device::default_device;
use crate::open::{find, token_cache};

/// Train with a recipe: pretraining, full fine-tuning, LoRA, DoRA or DPO.
///
/// Ctrl-C finishes the step, saves a checkpoint and exits with code 130. A second Ctrl-C stops at once. Other exit
/// codes: 2 wrong recipe; 5 too little memory; 6 a loss or gradient is not finite; 7 the loss diverged. The last
/// checkpoint is kept.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipe: TOML file. Not needed with --resume.
    #[arg(required_unless_present = "resume")]
    recipe: Option<PathBuf>,
    /// Recipe setting to override, as section.key=value. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "resume")]
    set: Vec<String>,
    /// Run directory to create. Default: a new folder in runs/.
    #[arg(long, value_name = "RUN", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Run directory to resume from its latest checkpoint.
    #[arg(long, value_name = "RUN", conflicts_with = "recipe")]
    resume: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (recipe, old_run) = open_recipe(args)?;
    let mut session = open_session(recipe, console)?;
    let mut watcher = Watcher::new(&session, Signals::listen()?, console)?;
    // The run directory is created last, so that a run that cannot start leaves none.
    let (run, resumed) = match old_run {
        Some(run) => {
            let step = session.resume(&run)?;
            (run, step)
        }
        None => {
            let path = new_run(args.out.as_deref(), args.recipe.as_deref(), "");
            (RunDir::create(&path, &session.recipe)?, None)
        }
    };
    describe(&session, resumed, run.path(), console)?;

    let fitted = session.fit(&run, &mut watcher);
    let saved_activation_bytes = watcher.finish();
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
    console.result(run.path().join(result).display());
    Ok(ExitCode::SUCCESS)
}

/// The exit code of a run that did not finish.
pub(crate) fn with_code(error: train::Error) -> anyhow::Error {
    let code = match error {
        train::Error::NotFinite { .. } => NOT_FINITE,
        train::Error::LowMemory { .. } => NO_MEMORY,
        train::Error::Diverged { .. } => STOPPED,
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
pub(crate) fn open_session(recipe: Recipe, console: &Console) -> anyhow::Result<Session> {
    let (progress, cache) = (RefCell::new(None), token_cache());
    let options = SessionOptions {
        device: &default_device(),
        resolve: &|model| find(model).map_err(|error| train::Error::Resolve(format!("{error:#}"))),
        token_cache: cache.as_deref(),
        tokenizing: &|done, total| {
            let mut progress = progress.borrow_mut();
            progress
                .get_or_insert_with(|| console.progress(total / 1000, TOKENIZING))
                .update_of(done / 1000, total / 1000);
        },
    };
    let session = Session::open_with(recipe, options)?;
    if let Some(progress) = progress.into_inner() {
        progress.finish();
    }
    let corpora = [Some(&session.train.corpus), session.valid.as_ref()];
    for corpus in corpora.into_iter().flatten() {
        note_reading(corpus, console);
    }
    Ok(session)
}

/// Notes what was ignored in the data, and what is not as the rows have it.
pub(crate) fn note_reading(corpus: &Corpus, console: &Console) {
    if !corpus.ignored_keys.is_empty() {
        let names: Vec<String> = corpus
            .ignored_keys
            .iter()
            .map(|key| printable(key, &[]))
            .collect();
        console.note(format_args!("ignored keys in rows: {}", names.join(", ")));
    }
    for note in &corpus.notes {
        console.note(format_args!("{}", printable(note, &[])));
    }
    let (counts, samples) = (corpus.counts, corpus.len());
    if counts.untrained_samples > 0 {
        console.note(format_args!(
            "{} of {samples} samples have no trained token",
            counts.untrained_samples
        ));
    }
    if let Some(problem) = &corpus.cache_problem {
        console.note(format_args!(
            "tokenized rows are not cached for the next run: {problem}"
        ));
    }
}

/// The recipe, and the run directory if a run is resumed.
fn open_recipe(args: &Args) -> anyhow::Result<(Recipe, Option<RunDir>)> {
    if let Some(path) = &args.resume {
        let run = RunDir::open(path)?;
        return Ok((run.recipe().map_err(usage)?, Some(run)));
    }
    let path = args.recipe.as_deref().unwrap_or(Path::new(""));
    Ok((Recipe::open(path, &args.set).map_err(usage)?, None))
}

/// A wrong recipe, with the exit code of wrong usage.
pub(crate) fn usage(error: train::Error) -> anyhow::Error {
    anyhow::Error::new(WithCode {
        code: USAGE,
        message: error.to_string(),
    })
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

fn describe(
    session: &Session,
    resumed: Option<u64>,
    run: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    if !session.adapted.is_empty() {
        console.note(adapted_table(&session.adapted));
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
    console.note(match resumed {
        Some(step) => format!(
            "{}: resuming after step {step} of {}",
            run.display(),
            session.total_steps()
        ),
        None => format!("{}: {} steps", run.display(), session.total_steps()),
    });
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
        table += &format!(
            "\n{kind:width$}  {n:6}  {:4}  {:5}  {parameters:10}",
            first.rank, first.alpha
        );
    }
    table
}
