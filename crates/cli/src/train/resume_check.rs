//! `moeforge resume-check`: a check that a run that is killed and resumed ends as an uninterrupted one.
//!
//! The runs are those of `moeforge train`, in processes of their own, ended by SIGKILL, which no program can handle: a
//! kill lands wherever the process is, opening the model, in a step, or half-way through a checkpoint. A run that
//! finishes before all kills are used is compared, and another run takes the rest. Of several ranks one is killed, which
//! must end the others.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use train::Recipe;

use crate::console::{Console, MISMATCH, Progress};
use crate::device::{DeviceArgs, VARIABLE};
use crate::host::launch::RankArgs;
use crate::train::{new_run, usage};

/// Check that killed-and-resumed training equals an uninterrupted run, bit for bit.
///
/// A run is killed at random moments and resumed after each kill, until it finishes. If kills are left, another run
/// starts. The final weights, optimizer, state and metrics are then compared with those of an uninterrupted run; if they
/// differ, the exit code is 4.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipe: TOML file. Choose a short run, because it is trained several times. Save checkpoints often
    /// (`train.save_every`), so that some kills come while one is written.
    recipe: PathBuf,
    /// Recipe setting to override, as section.key=value. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Number of kills.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    kills: u64,
    /// Random seed for the moments of the kills.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Command that starts ranks, such as `mpirun -n 2 --bind-to none`: one of those on this machine is killed each time.
    #[arg(long, value_name = "COMMAND")]
    launcher: Option<String>,
    #[command(flatten)]
    ranks: RankArgs,
    /// Folder for the runs. Default: a new folder in runs/. Killed runs that show no difference are removed.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON instead of a summary.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    // Errors in the recipe are reported here and not by a child process.
    Recipe::open(&args.recipe, &args.set).map_err(usage)?;
    let out = new_run(args.out.as_deref(), Some(&args.recipe), "-resume-check");
    let whole = out.join("whole");
    if whole.exists() {
        bail!(
            "`{}`: expected no run, found one; choose another --out",
            whole.display()
        );
    }
    console.note(format_args!("{}: uninterrupted run", whole.display()));
    let mut check = Check {
        args,
        longest: longest_life(train_whole(args, &whole)?, args.kills),
        whole,
        random: args.seed,
        tally: Tally::default(),
        progress: console.progress(args.kills, "killing"),
    };
    while check.tally.kills < args.kills && check.tally.differences.is_empty() {
        check.round(&out)?;
    }
    let tally = check.tally;
    check.progress.finish();
    console.result(if args.json {
        tally.to_json().to_string()
    } else {
        tally.to_text(&out)
    });
    Ok(if tally.differences.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(MISMATCH)
    })
}

/// The check under way.
struct Check<'a> {
    args: &'a Args,
    /// The uninterrupted run.
    whole: PathBuf,
    /// Maximum seconds before a process is killed.
    longest: f64,
    random: u64,
    tally: Tally,
    progress: Progress,
}

/// Trains uninterrupted. Returns the seconds until the first step and the seconds after it.
fn train_whole(args: &Args, run: &Path) -> anyhow::Result<[f64; 2]> {
    let started = Instant::now();
    let mut child = start(args, run)?;
    // A run writes this file when everything is open.
    let marker = run.join("precision.txt");
    while !marker.exists() && !has_ended(&mut child, Some(Duration::from_millis(5)))? {}
    expect_ranks(args, &mut child)?;
    let opening = started.elapsed().as_secs_f64();
    has_ended(&mut child, None)?;
    ended(&mut child).with_context(|| format!("{}: the run failed", run.display()))?;
    Ok([opening, started.elapsed().as_secs_f64() - opening])
}

/// Refuses a launcher whose ranks are not found: none of them would ever be killed.
fn expect_ranks(args: &Args, child: &mut Child) -> anyhow::Result<()> {
    let Some(launcher) = &args.launcher else {
        return Ok(());
    };
    if ranks_of(child.id())?.is_empty() && child.try_wait()?.is_none() {
        child.kill()?;
        bail!(
            "--launcher: expected a command that starts ranks as processes of its own on this machine, and `{launcher}` has none"
        );
    }
    Ok(())
}

/// The maximum time before a kill, such that one run takes all kills: with times drawn evenly up to it, the times left
/// after opening add up to most of the time of the steps.
fn longest_life([opening, steps]: [f64; 2], kills: u64) -> f64 {
    const SHARE: f64 = 0.7;
    // (longest − opening)² / (2 · longest) is a process's mean time for steps; kills times that is their share.
    let per_kill = 2.0 * SHARE * steps / kills.max(1) as f64;
    let half = opening + per_kill / 2.0;
    half + (half * half - opening * opening).sqrt()
}

/// Kills and differences.
#[derive(Debug, Default)]
struct Tally {
    /// Processes that were killed.
    kills: u64,
    /// Kills that left a half-written or half-removed checkpoint.
    while_saving: u64,
    /// Kills before there was a run directory.
    before_start: u64,
    /// Runs that finished.
    rounds: u64,
    /// Files that differ from the uninterrupted run's.
    differences: Vec<String>,
}

impl Check<'_> {
    /// Kills and resumes one run until it finishes.
    fn round(&mut self, out: &Path) -> anyhow::Result<()> {
        let run = out.join(format!("killed-{}", self.tally.rounds + 1));
        loop {
            let mut child = start(self.args, &run)?;
            let kills_left = self.args.kills - self.tally.kills;
            let delay = (kills_left > 0).then(|| self.longest * self.uniform());
            let is_over = has_ended(&mut child, delay.map(Duration::from_secs_f64))?;
            if is_over || !self.kill(&mut child)? {
                if let Err(error) = ended(&mut child) {
                    let what = format!("{}: {error:#}", run.display());
                    self.tally.differences.push(what);
                    return Ok(());
                }
                break;
            }
            self.tally.note_kill(&run)?;
            let kills = self.tally.kills;
            let status = format!("in run {}", self.tally.rounds + 1);
            self.progress.update(kills, &status);
        }
        self.tally.rounds += 1;
        let differences = differences(&self.whole, &run)?;
        if differences.is_empty() {
            fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
        }
        self.tally.differences.extend(differences);
        Ok(())
    }

    /// Kills the process, or one of the ranks that it has started, which ends the others and their launcher. Returns whether
    /// there was anything to kill.
    fn kill(&mut self, child: &mut Child) -> anyhow::Result<bool> {
        if self.args.launcher.is_some() {
            return self.kill_rank(child);
        }
        child.kill()?;
        child.wait()?;
        Ok(true)
    }

    fn kill_rank(&mut self, launcher: &mut Child) -> anyhow::Result<bool> {
        let mut ranks = Vec::new();
        // Until the launcher has started them there is nothing to kill.
        while ranks.is_empty() && !has_ended(launcher, Some(Duration::from_millis(20)))? {
            ranks = ranks_of(launcher.id())?;
        }
        let number = (self.uniform() * ranks.len() as f64) as usize;
        let signaled = match ranks.get(number) {
            Some(rank) => Command::new("kill")
                .args(["-KILL", &rank.to_string()])
                .stderr(Stdio::null())
                .status()
                .context("cannot start `kill`")?
                .success(),
            None => false,
        };
        if !has_ended(launcher, Some(LONGEST_END))? {
            launcher.kill()?;
            bail!(
                "the launcher goes on {} s after a rank was killed",
                LONGEST_END.as_secs()
            );
        }
        // A rank that had just ended cannot be killed: the run is over.
        Ok(signaled)
    }

    /// The next random number from 0 to 1: SplitMix64.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Tally {
    /// Counts a kill, and what the process was doing.
    fn note_kill(&mut self, run: &Path) -> anyhow::Result<()> {
        self.kills += 1;
        self.before_start += u64::from(!is_run(run));
        if run.exists() {
            let names = fs::read_dir(run)?.collect::<Result<Vec<_>, _>>()?;
            let is_half = names.iter().any(|entry| {
                let name = entry.file_name();
                name.to_string_lossy().starts_with(".checkpoint-")
            });
            self.while_saving += u64::from(is_half);
        }
        Ok(())
    }

    fn to_text(&self, out: &Path) -> String {
        let mut text = format!(
            "kills: {}, in {} run(s); {} while a checkpoint was written or removed, {} before the run directory existed",
            self.kills, self.rounds, self.while_saving, self.before_start
        );
        if self.differences.is_empty() {
            text += "\nresumed: all\nfinal weights, optimizer, state and metrics: equal to the uninterrupted run's, bit for bit";
        } else {
            text += &format!("\nNOT EQUAL, see {}:", out.display());
            for difference in &self.differences {
                text += &format!("\n  {difference}");
            }
        }
        text
    }

    fn to_json(&self) -> Value {
        json!({
            "kills": self.kills,
            "runs": self.rounds,
            "kills_while_saving": self.while_saving,
            "kills_before_start": self.before_start,
            "equal": self.differences.is_empty(),
            "differences": self.differences,
        })
    }
}

/// The longest that ranks and their launcher may go on after one was killed.
const LONGEST_END: Duration = Duration::from_secs(60);

/// The processes of this program that a launcher has started, or that its own helpers have.
fn ranks_of(launcher: u32) -> anyhow::Result<Vec<u32>> {
    let listed = Command::new("ps")
        .args(["-A", "-o", "pid=,ppid=,comm="])
        .output()
        .context("cannot start `ps`, which finds the ranks")?;
    if !listed.status.success() {
        bail!("`ps`, which finds the ranks, ended with {}", listed.status);
    }
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let of_line = |line: &str| {
        let mut words = line.split_whitespace();
        let mut number = || words.next()?.parse::<u32>().ok();
        let (process, parent) = (number()?, number()?);
        let is_rank = words.next()?.rsplit('/').next()?.starts_with("moeforge");
        Some((process, parent, is_rank))
    };
    let all: Vec<_> = text.lines().filter_map(of_line).collect();
    let (mut parents, mut ranks) = (vec![launcher], Vec::new());
    while let Some(parent) = parents.pop() {
        for (process, _, is_rank) in all.iter().filter(|(_, of, _)| *of == parent) {
            parents.push(*process);
            ranks.extend(is_rank.then_some(*process));
        }
    }
    Ok(ranks)
}

/// Starts or resumes a run.
fn start(args: &Args, run: &Path) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let launcher = args.launcher.as_deref().unwrap_or_default();
    let words = launcher.split_whitespace().map(OsString::from);
    let mut words = words.chain([program.into_os_string()]);
    let started = words.next().context("the program has a path")?;
    let mut command = Command::new(&started);
    command.args(words);
    command.args(["train", "--quiet"]);
    command.args(args.ranks.words());
    if is_run(run) {
        command.arg("--resume").arg(run);
    } else {
        command.arg(&args.recipe).arg("--out").arg(run);
        for setting in &args.set {
            command.args(["--set", setting]);
        }
    }
    command
        .envs(args.device.name().map(|name| (VARIABLE, name)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", started.display()))
}

fn is_run(folder: &Path) -> bool {
    folder.join("recipe.toml").is_file()
}

/// Waits until a process has ended, or until a time limit. Returns whether it has ended.
fn has_ended(child: &mut Child, longest: Option<Duration>) -> anyhow::Result<bool> {
    let Some(longest) = longest else {
        child.wait()?;
        return Ok(true);
    };
    let started = Instant::now();
    while child.try_wait()?.is_none() {
        let left = longest.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        std::thread::sleep(left.min(Duration::from_millis(2)));
    }
    Ok(true)
}

/// The result of a process that has ended, with its error output if it failed.
fn ended(child: &mut Child) -> anyhow::Result<()> {
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut said)?;
    }
    bail!("`moeforge train` ended with {status}: {}", said.trim())
}

/// The files that differ between two runs: result, checkpoints, and metrics except times.
fn differences(whole: &Path, run: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let folders: BTreeSet<String> = [whole, run]
        .into_iter()
        .map(compared_folders)
        .collect::<anyhow::Result<Vec<_>>>()?
        .concat()
        .into_iter()
        .collect();
    for folder in folders {
        let names = [whole, run].map(|run| file_names(&run.join(&folder)));
        let [expected, names] = names;
        let all: BTreeSet<String> = expected?.into_iter().chain(names?).collect();
        for name in all {
            let paths = [whole, run].map(|run| run.join(&folder).join(&name));
            if !same_bytes(&paths)? {
                found.push(format!("{folder}/{name}"));
            }
        }
    }
    let [expected, metrics] = [whole, run].map(metrics);
    if expected? != metrics? {
        found.push("metrics.jsonl".into());
    }
    Ok(found)
}

/// A run's result and its checkpoints.
fn compared_folders(run: &Path) -> anyhow::Result<Vec<String>> {
    let names = file_names(run)?.into_iter();
    let is_compared = |name: &String| {
        ["adapter", "model"].contains(&name.as_str()) || name.starts_with("checkpoint-")
    };
    Ok(names.filter(is_compared).collect())
}

/// The names in a folder; none if there is no folder.
fn file_names(folder: &Path) -> anyhow::Result<Vec<String>> {
    if !folder.exists() {
        return Ok(vec![]);
    }
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// Whether two files exist and are equal.
fn same_bytes(paths: &[PathBuf; 2]) -> anyhow::Result<bool> {
    if !paths.iter().all(|path| path.is_file()) {
        return Ok(false);
    }
    let open = |path: &PathBuf| -> anyhow::Result<_> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(BufReader::with_capacity(1 << 20, file))
    };
    let (mut a, mut b) = (open(&paths[0])?, open(&paths[1])?);
    loop {
        let (x, y) = (a.fill_buf()?, b.fill_buf()?);
        let n = x.len().min(y.len());
        if n == 0 || x[..n] != y[..n] {
            return Ok(x.is_empty() && y.is_empty());
        }
        a.consume(n);
        b.consume(n);
    }
}

/// The lines of a run's metrics, without times and without what a process took of memory.
fn metrics(run: &Path) -> anyhow::Result<Vec<Value>> {
    let path = run.join("metrics.jsonl");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line)
            .with_context(|| format!("{}: expected JSON", path.display()))?;
        if let Some(line) = line.as_object_mut() {
            line.remove("seconds");
        }
        Ok(line)
    });
    let is_of_run = |line: &anyhow::Result<Value>| {
        line.as_ref()
            .map_or(true, |line| line.get("memory").is_none())
    };
    lines.filter(is_of_run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_so_long_that_one_run_takes_all_kills() {
        for (opening, steps, kills) in [(0.3, 60.0, 100), (2.0, 10.0, 7), (0.0, 5.0, 1)] {
            let longest = longest_life([opening, steps], kills);
            // The mean of what is left after opening, of lives drawn evenly: summed up here.
            let n = 100_000;
            let lives = (0..n).map(|i| longest * (f64::from(i) + 0.5) / f64::from(n));
            let mean = lives.map(|life| (life - opening).max(0.0)).sum::<f64>() / f64::from(n);
            let share = mean * kills as f64 / steps;
            assert!((share - 0.7).abs() < 1e-3, "{share}");
        }
    }
}
