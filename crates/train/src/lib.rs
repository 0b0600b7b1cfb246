//! Training runs: the recipe, the learning rate, the run directory and what a checkpoint holds.
//!
//! A run is told everything by a [`Recipe`] and writes everything into a [`RunDir`]. It can be
//! killed at any moment and resumed from its latest checkpoint, to the same bits: a checkpoint is
//! whole or absent, and nothing that enters a result comes from a clock.
//!
//! ```no_run
//! use std::path::Path;
//! use moeforge_train::{Recipe, RunDir, Schedule, State};
//!
//! let recipe = Recipe::open(Path::new("recipe.toml"), &["train.steps=10".to_owned()])?;
//! let run = RunDir::create(Path::new("runs/first"), &recipe)?;
//! let mut metrics = run.metrics(None)?;
//! let schedule = Schedule::new(recipe.optimizer.learning_rate, &recipe.schedule);
//! for step in 0..10 {
//!     let learning_rate = schedule.rate(step, 10);
//!     metrics.append(step + 1, &serde_json::json!({ "learning_rate": learning_rate }))?;
//! }
//! if let Some((step, folder)) = run.latest()? {
//!     assert_eq!(State::read(&folder)?.step, step);
//! }
//! # Ok::<(), moeforge_train::Error>(())
//! ```

mod balance;
mod checkpoint_state;
mod dataset;
mod diagnosis;
mod dpo;
mod error;
mod events;
mod export;
mod fit;
mod loss_scale;
mod optimizer;
mod session;

mod recipe;
mod routing;
mod schedule;

mod metrics;
mod run_dir;

pub use self::checkpoint_state::{Best, State, read_optimizer, write_optimizer};
pub use self::dataset::Dataset;
pub use self::dpo::Rewards;
pub use self::error::{Error, Result};
pub use self::events::{Host, Memory};
pub use self::fit::{
    Census, Event, RangeTest, RatePoint, Sample, StepReport, TensorGradient, Watchdog, Zero,
    steepest,
};
pub use self::loss_scale::LossScale;
pub use self::metrics::Metrics;
pub use self::recipe::{
    Checkpointing, Compute, DataSection, DpoSection, EvalSection, ExpertsShare, ExportDType,
    LoraSection, Loss, Method, ModelSection, Moments, OptimizerSection, PrecisionSection, Recipe,
    RouterTraining, ScheduleKind, ScheduleSection, TrainSection,
};
pub use self::routing::{LayerDrift, LayerLoad};
pub use self::run_dir::RunDir;
pub use self::schedule::Schedule;
pub use self::session::{Session, Surroundings, open_folder, tokenizer_of};
