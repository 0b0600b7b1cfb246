//! Errors of a training run, with the evidence.
//!
//! A message is one sentence that stands alone: causes are part of it, not a chain below it.

use std::path::{Path, PathBuf};

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a training run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model file.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),

    /// A data file.
    #[error(transparent)]
    Data(#[from] data::Error),

    /// Something between ranks.
    #[error(transparent)]
    Rank(#[from] parallel::RankError),

    /// The micro-batches of a step cannot be shared out.
    #[error(
        "train.accumulate: expected a multiple of the number of ranks, {ranks}, found {accumulate}; a smaller `batch_size` \
         and a larger `accumulate` make the same step"
    )]
    Rounds {
        /// Number of ranks.
        ranks: usize,
        /// Micro-batches of a step.
        accumulate: usize,
    },

    /// A layout that the ranks, the model or the recipe do not allow.
    #[error("--layout: {0}")]
    Layout(String),

    /// A rank that makes another run.
    #[error(
        "rank {rank} differs in its {what}: all ranks need the same program, recipe, model and rows, and get the same weights"
    )]
    OtherRank {
        /// Which one.
        rank: usize,
        /// What differs.
        what: &'static str,
    },

    /// The operating system refused.
    #[error("cannot {act} `{}`: {cause}", path.display())]
    Io {
        /// The attempted act, as a verb.
        act: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        cause: std::io::Error,
    },

    /// A file is longer than any real one.
    #[error("`{}`: expected at most {limit_bytes} bytes, found more", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The longest accepted length.
        limit_bytes: u64,
    },

    /// A recipe is not TOML.
    #[error("{place}: {problem}")]
    Syntax {
        /// File and line.
        place: String,
        /// The parser's error.
        problem: String,
    },

    /// An override is not an assignment.
    #[error("--set: expected `section.key=value`, found `{found}`")]
    Override {
        /// The override, shortened.
        found: String,
    },

    /// A recipe has a section or key that does not exist.
    #[error("{place}: unknown {found}, {hint}")]
    Unknown {
        /// File and line, or the override.
        place: String,
        /// The section or key.
        found: String,
        /// The probable meaning, or the names that exist.
        hint: String,
    },

    /// A setting has a wrong type or is out of range.
    #[error("{place}: {key}: expected {expected}, found {found}")]
    Setting {
        /// File and line, the override, or the file for a default.
        place: String,
        /// `section.key`.
        key: String,
        /// The accepted values.
        expected: String,
        /// The value, shortened.
        found: String,
    },

    /// The directory of a new run is in use.
    #[error(
        "`{}`: expected no such file or an empty folder, found {found}; to continue a run, use `--resume`",
        path.display()
    )]
    RunExists {
        /// The run directory.
        path: PathBuf,
        /// What exists there.
        found: &'static str,
    },

    /// A folder is not a run directory.
    #[error("`{}`: expected a run directory with `recipe.toml`, found none", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },

    /// No tensor is trained.
    #[error(
        "train: expected at least one tensor that is trained, found none; see train.unfrozen_parameters and train.router"
    )]
    NothingTrained,

    /// A pattern of `optimizer.no_decay` matches no trained tensor.
    #[error(
        "optimizer.no_decay: expected patterns that match a trained tensor, such as `{example}`, found `{}`, which \
         matches none",
        shown(pattern)
    )]
    NothingSpared {
        /// The pattern.
        pattern: String,
        /// The name of a trained tensor.
        example: String,
    },

    /// Another process trains in this run directory.
    #[error("`{}`: another process is using this run directory", path.display())]
    RunInUse {
        /// The run directory.
        path: PathBuf,
    },

    /// A line of the metrics is malformed.
    #[error("{}:{line}: expected an object with a `step`, found {problem}", path.display())]
    Metrics {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The parser's error.
        problem: String,
    },

    /// The state of a checkpoint does not parse.
    #[error("`{}`: {cause}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// The parser's error, with line and column.
        cause: serde_json::Error,
    },

    /// A tensor of the optimizer's state has another dtype than this run's.
    #[error("`{}`: tensor `{tensor}`: expected dtype {expected}, found {found}", path.display())]
    OptimizerDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// This run's dtype.
        expected: checkpoint::DType,
        /// The file's dtype.
        found: checkpoint::DType,
    },

    /// The adapter to continue from was trained for an unknown format.
    #[error("`{}`: {cause}", path.join("moeforge.json").display())]
    TrainedFor {
        /// The adapter.
        path: PathBuf,
        /// The problem with the name.
        cause: kernels::Error,
    },

    /// The loss scale of a checkpoint does not fit the run.
    #[error(
        "`{}`: expected a loss scale of at most 2^{max_exponent} in f16 and none in other formats, found otherwise",
        path.join("state.json").display()
    )]
    LossScale {
        /// The checkpoint.
        path: PathBuf,
        /// The largest exponent of a scale.
        max_exponent: u32,
    },

    /// The optimizer's state has a tensor that the run does not train.
    #[error(
        "`{}`: expected {expected} tensors, found {found}, among them `{tensor}`, which this run does not train",
        path.display()
    )]
    OptimizerExtra {
        /// The file.
        path: PathBuf,
        /// Tensors of the run.
        expected: usize,
        /// Tensors in the file.
        found: usize,
        /// One tensor too many.
        tensor: String,
    },

    /// A model.
    #[error(transparent)]
    Model(#[from] model::Error),

    /// A recipe asks for what only the CPU computes.
    #[error(
        "`{key}`: expected {expected} on a GPU, which computes nothing else yet, found {found}; set it so, or train with \
         `--device cpu`"
    )]
    NotOnGpu {
        /// The key.
        key: String,
        /// What a GPU computes.
        expected: String,
        /// What the recipe says.
        found: String,
    },
    /// The recipe's model was not found.
    #[error("{0}")]
    Resolve(String),

    /// No data folder has a training split.
    #[error(
        "no training split (`train.jsonl`, `.json`, `.csv` or `.parquet`) in {}",
        listed(folders)
    )]
    NoTrainingData {
        /// The folders of the recipe.
        folders: Vec<PathBuf>,
    },

    /// A data folder with a weight has no row to train on.
    #[error(
        "`data.weights`: expected a row to train on in every folder of positive weight, found none in {}",
        listed(folders)
    )]
    NoWeightedRows {
        /// Those folders.
        folders: Vec<PathBuf>,
    },

    /// No data folder has a validation split, and a setting needs one.
    #[error(
        "`{key}` needs validation rows: no `validation.jsonl`, `valid.jsonl`, `val.jsonl` or the like in {}",
        listed(folders)
    )]
    NoValidationData {
        /// The setting.
        key: &'static str,
        /// The folders of the recipe.
        folders: Vec<PathBuf>,
    },

    /// The best checkpoint is gone.
    #[error(
        "`{}`: expected the best checkpoint, found none; without it there is no best model to export",
        path.display()
    )]
    NoBest {
        /// Where it was.
        path: PathBuf,
    },

    /// The loss diverged again after the last permitted rollback.
    #[error(
        "step {step}: loss {loss:.4} after {smoothed:.4} on average, and the run has already been rolled back {rollbacks} times; \
         `{}` is from before the spike; try a lower `optimizer.learning_rate` or a tighter `optimizer.clip`",
        run.join(format!("checkpoint-{anchor}")).display()
    )]
    Diverged {
        /// The run directory.
        run: PathBuf,
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// The average before the spike.
        smoothed: f64,
        /// Rollbacks so far.
        rollbacks: u64,
        /// The step of the last good checkpoint.
        anchor: u64,
    },

    /// A sample could not be generated.
    #[error("eval.prompts: \"{}\": {problem}", shown(prompt))]
    Sample {
        /// The prompt.
        prompt: String,
        /// What went wrong.
        problem: String,
    },

    /// The recipe's tasks cannot be asked, or have not what the recipe keeps the best checkpoint of.
    #[error("eval.tasks: {problem}")]
    Tasks {
        /// What went wrong.
        problem: String,
    },

    /// A setting that a run keeps was changed.
    #[error(
        "`{}`: settings that cannot change while a run goes on: {}; give {} back, or start a new run, which may \
         continue from this one's adapter (`model.adapter`) or model",
        path.display(), changes.join("; "), if changes.len() == 1 { "its old value" } else { "their old values" }
    )]
    OtherSettings {
        /// The run directory, or the checkpoint.
        path: PathBuf,
        /// What was changed.
        changes: Vec<String>,
    },

    /// The settings in a checkpoint do not parse.
    #[error("`{}`: `settings`: {}", path.join("state.json").display(), shown(cause.message()))]
    Settings {
        /// The checkpoint.
        path: PathBuf,
        /// The parser's error.
        cause: toml::de::Error,
    },

    /// A checkpoint belongs to another base.
    #[error(
        "`{}`: trained on another model than `{model}` is now; give the place of the right one with \
         `--set model.path=…`, or start a new run",
        path.display()
    )]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// The name of the model.
        model: String,
    },

    /// A run has come further than its recipe goes.
    #[error(
        "`{}`: expected at least {step} steps, because the run has made as many, found {total}; see train.steps and \
         train.epochs",
        run.display()
    )]
    PastEnd {
        /// The run directory.
        run: PathBuf,
        /// Steps made.
        step: u64,
        /// Steps of the recipe.
        total: u64,
    },

    /// A file or folder of a run's recipe is gone.
    #[error(
        "`{}`: {key}: `{}` was found in none of {}; {}",
        run.join("recipe.toml").display(), path.display(), listed(places),
        // The adapter cannot be another, and the run has a copy of it, except in the moment in which it begins.
        if *key == "model.adapter" { "put it back".to_owned() } else { format!("give its new place with `--set {key}=…`") }
    )]
    Lost {
        /// The run directory.
        run: PathBuf,
        /// The setting.
        key: &'static str,
        /// Its value.
        path: PathBuf,
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },

    /// A checkpoint belongs to other training rows.
    #[error(
        "`{}`: made with other training rows, or another tokenizer or chat template; start a new run",
        path.display()
    )]
    OtherData {
        /// The checkpoint.
        path: PathBuf,
    },

    /// A signal asked the run to stop.
    #[error(
        "stopped by {} after step {step}, which is saved; continue with `moeforge train --resume {}`",
        signal_name(*.signal), run.display()
    )]
    Interrupted {
        /// The run directory.
        run: PathBuf,
        /// The step that was saved.
        step: u64,
        /// The signal's number.
        signal: i32,
    },

    /// The machine is about to run out of memory.
    #[error(
        "stopped after step {step}, which is saved: the machine has {} MiB of memory left, less than {}; \
         close other programs and continue with `moeforge train --resume {}`, or start a new run with a smaller \
         `train.batch_size` or with `train.checkpointing = \"block\"`",
        available_bytes >> 20, limit_bytes >> 20, run.display()
    )]
    LowMemory {
        /// The run directory.
        run: PathBuf,
        /// The step that was saved.
        step: u64,
        /// Bytes left.
        available_bytes: u64,
        /// Below this a run stops.
        limit_bytes: u64,
    },

    /// The run needs more memory than there is.
    #[error("{0}")]
    TooLarge(
        /// What it needs, what there is, and what would help.
        String,
    ),

    /// A loss or gradient is infinite or not a number.
    #[error(
        "step {step}: loss {loss}, gradient norm {norm}; first not finite: {first}; the last checkpoint is intact"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// The norm of its gradient.
        norm: f64,
        /// The first of them on the way from the weights to the gradients.
        first: String,
    },
}

impl From<parallel::ShortMessage> for Error {
    fn from(error: parallel::ShortMessage) -> Self {
        Self::Rank(error.into())
    }
}

fn listed(folders: &[PathBuf]) -> String {
    let names = folders
        .iter()
        .map(|folder| format!("`{}`", folder.display()));
    names.collect::<Vec<_>>().join(", ")
}

/// The name of a signal.
fn signal_name(signal: i32) -> String {
    match signal {
        2 => "SIGINT".into(),
        15 => "SIGTERM".into(),
        other => format!("signal {other}"),
    }
}

/// Makes an [`Error::Io`] of an error of the operating system: `.map_err(io("read", path))`.
// This and `shown` are in `checkpoint` too, for its own errors: a crate's errors are its own, and neither is worth a crate
// below both.
pub(crate) fn io(act: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |cause| match checkpoint::broken_link(&path, &cause) {
        Some([link, target]) => checkpoint::Error::BrokenLink {
            act,
            path,
            link,
            target,
        }
        .into(),
        None => Error::Io { act, path, cause },
    }
}

/// The beginning of a text from a file or the command line, fit for a message: without control characters, which could
/// steer a terminal, and at most 80 characters.
pub(crate) fn shown(text: &str) -> String {
    const MAX_SHOWN_CHARS: usize = 80;
    let mut shown = String::new();
    for c in text.chars().take(MAX_SHOWN_CHARS) {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(MAX_SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}
