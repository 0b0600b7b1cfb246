//! Output: results to stdout, everything else to stderr; plain lines if stderr is not a terminal.

pub(crate) mod arguments;

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::host::resident::Resident;

/// How much is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Quiet,
    Normal,
    Verbose,
}

/// The two output streams of the program.
#[derive(Debug)]
pub(crate) struct Console {
    level: Level,
    /// Bars on the terminal that others come below.
    bars: Option<MultiProgress>,
}

/// Plain progress lines come no more often than this.
const LINE_EVERY: Duration = Duration::from_secs(5);

impl Console {
    pub(crate) fn new(quiet: bool, verbose: bool) -> Self {
        let level = match (quiet, verbose) {
            (true, _) => Level::Quiet,
            (_, true) => Level::Verbose,
            _ => Level::Normal,
        };
        Self { level, bars: None }
    }

    /// The same for a part of the work, with bars below that of the whole.
    pub(crate) fn below(&self, progress: &Progress) -> Self {
        Self {
            level: self.level,
            bars: Some(progress.bars.clone()),
        }
    }

    /// The option that makes another process print as much, if there is one.
    pub(crate) fn flag(&self) -> Option<&'static str> {
        match self.level {
            Level::Quiet => Some("--quiet"),
            Level::Normal => None,
            Level::Verbose => Some("--verbose"),
        }
    }

    /// A line of a result. A closed pipe ends the program quietly.
    pub(crate) fn result(&self, text: impl Display) {
        self.stream(format_args!("{text}\n"));
    }

    /// A piece of a result, shown at once. If it cannot be written, as on a full disk, the program ends with an error.
    pub(crate) fn stream(&self, text: impl Display) {
        let mut out = std::io::stdout().lock();
        if let Err(problem) = write!(out, "{text}").and_then(|()| out.flush()) {
            std::process::exit(unwritten(&problem));
        }
    }

    /// A note for the user.
    pub(crate) fn note(&self, text: impl Display) {
        if self.level == Level::Quiet {
            return;
        }
        let write = || {
            let _ = writeln!(std::io::stderr(), "{text}");
        };
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    /// A prompt for the user's input.
    pub(crate) fn ask(&self, text: &str) {
        if self.level != Level::Quiet {
            let _ = write!(std::io::stderr(), "{text}");
        }
    }

    /// A note with --verbose.
    pub(crate) fn detail(&self, text: impl Display) {
        if self.level == Level::Verbose {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// The program's memory, with --verbose. Call it while the model is open.
    pub(crate) fn memory(&self) {
        if let Some(Resident { mapped, own }) = Resident::own() {
            let mib = |bytes: u64| bytes >> 20;
            self.detail(format_args!(
                "memory: {} MiB of mapped files, {} MiB other",
                mib(mapped),
                mib(own)
            ));
        }
    }

    pub(crate) fn error(&self, error: &anyhow::Error) {
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
    }

    /// Progress over `total` units of work.
    pub(crate) fn progress(&self, total: u64, what: &'static str) -> Progress {
        let visible = self.level != Level::Quiet;
        let terminal = std::io::stderr().is_terminal();
        if let Some(bars) = &self.bars {
            return Progress::new(bars.clone(), total, what).lines(visible && !terminal);
        }
        let target = if visible && terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Progress::new(MultiProgress::with_draw_target(target), total, what)
            .lines(visible && !terminal)
    }
}

/// A progress bar, or plain lines now and then.
#[derive(Debug)]
pub(crate) struct Progress {
    /// The bars on the terminal, one below the other.
    bars: MultiProgress,
    bar: ProgressBar,
    what: &'static str,
    lines: bool,
    started: Instant,
    last_line: Option<Instant>,
}

impl Progress {
    fn new(bars: MultiProgress, total: u64, what: &'static str) -> Self {
        let bar = bars.add(ProgressBar::new(total));
        if let Ok(style) = ProgressStyle::with_template(
            "{msg} [{bar:24}] {pos}/{len} {elapsed} elapsed, {eta} left",
        ) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what);
        Self {
            bars,
            bar,
            what,
            lines: false,
            started: Instant::now(),
            last_line: None,
        }
    }

    fn lines(self, lines: bool) -> Self {
        Self { lines, ..self }
    }

    /// Progress of a part of the work, in a bar below this one.
    pub(crate) fn part(&self, total: u64, what: &'static str) -> Self {
        Self::new(self.bars.clone(), total, what).lines(self.lines)
    }

    /// Sets the position and the total.
    pub(crate) fn update_of(&mut self, position: u64, total: u64) {
        self.bar.set_length(total);
        self.update(position, "");
    }

    /// Sets the position and the text before the bar.
    pub(crate) fn update(&mut self, position: u64, status: &str) {
        self.bar.set_message(format!("{} {status}", self.what));
        self.bar.set_position(position);
        let total = self.bar.length().unwrap_or(0);
        let since = self.last_line.unwrap_or(self.started).elapsed();
        if self.lines && (since >= LINE_EVERY || (position == total && self.last_line.is_some())) {
            let left = self.started.elapsed().as_secs_f64() / position.max(1) as f64
                * total.saturating_sub(position) as f64;
            let _ = writeln!(
                std::io::stderr(),
                "{} {position}/{total} {status} {left:.0} s left",
                self.what
            );
            self.last_line = Some(Instant::now());
        }
    }

    /// A line that stays, above the bar.
    pub(crate) fn line(&self, text: &str) {
        if self.lines || self.bar.is_hidden() {
            if self.lines {
                let _ = writeln!(std::io::stderr(), "{text}");
            }
        } else {
            self.bar.println(text);
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// The exit code if the standard output cannot be written. Nobody reads a closed pipe, such as that of `head`: that is no error.
pub(crate) fn unwritten(problem: &std::io::Error) -> i32 {
    if problem.kind() == ErrorKind::BrokenPipe {
        return 0;
    }
    let _ = writeln!(
        std::io::stderr(),
        "error: cannot write the standard output: {problem}"
    );
    1
}

/// A text of a model or a file without control characters, which could steer a terminal, except those in `kept`.
pub(crate) fn printable(text: &str, kept: &[char]) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && !kept.contains(&c) {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

/// An error that has an exit code of its own.
#[derive(Debug)]
pub(crate) struct WithCode {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Display for WithCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for WithCode {}

/// Wrong usage.
pub(crate) fn misuse(message: String) -> anyhow::Error {
    anyhow::Error::new(WithCode {
        code: USAGE,
        message,
    })
}

/// Ends the program in a sentence about `what` as soon as anything panics, on any thread, without unwinding.
pub(crate) fn end_at_panics(what: String, cure: &'static str, code: u8) {
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or("no message");
        let first = message.lines().next().unwrap_or_default();
        let at = panic.location().map(|at| format!(" ({at})"));
        let at = at.unwrap_or_default();
        let _ = writeln!(
            std::io::stderr(),
            "error: {what} failed: {first}{at}; what was saved before is whole{cure}"
        );
        std::process::exit(i32::from(code));
    }));
}

/// The exit code of wrong usage, including a wrong recipe.
pub(crate) const USAGE: u8 = 2;
/// A bound that an evaluation should keep is not kept, or not surely.
pub(crate) const NOT_KEPT: u8 = 3;
/// A verification found a difference.
pub(crate) const MISMATCH: u8 = 4;
/// The machine has too little memory.
pub(crate) const NO_MEMORY: u8 = 5;
/// A loss or gradient became infinite or not a number.
pub(crate) const NOT_FINITE: u8 = 6;
/// The loss of a run diverged too often; its checkpoint stays.
pub(crate) const DIVERGED: u8 = 7;

/// A rank has waited too long for others.
#[cfg(feature = "mpi")]
pub(crate) const RANKS_LOST: u8 = 8;

/// A measurement, or its error: a loss that is not finite has an exit code of its own.
pub(crate) fn finite<T>(found: ::eval::Result<T>, of: &dyn Display) -> anyhow::Result<T> {
    found.map_err(|problem| {
        let message = format!("{of}: {problem}");
        match problem {
            ::eval::Error::NotFinite { .. } => anyhow::Error::new(WithCode {
                code: NOT_FINITE,
                message,
            }),
            _ => anyhow::Error::msg(message),
        }
    })
}

/// The exit code of an error: 1 unless it carries its own.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    error
        .downcast_ref::<WithCode>()
        .map_or(ExitCode::FAILURE, |error| ExitCode::from(error.code))
}
