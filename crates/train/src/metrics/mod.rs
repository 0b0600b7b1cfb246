//! `metrics.jsonl`: one JSON object per line, appended during a run.
//!
//! A line is written in one piece and without a buffer, so a killed run loses at most the line it was writing. A resumed run
//! writes the lines after its checkpoint again, so they are cut off first. Nothing here reads a clock.

pub(crate) mod event_file;
pub(crate) mod journal;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::io;
use crate::{Error, Result};

/// The file in a run directory.
pub(crate) const METRICS_NAME: &str = "metrics.jsonl";

/// Maximum length of a line that is read. Real ones have a few hundred bytes.
const MAX_METRICS_LINE_BYTES: u64 = 1 << 20;

/// The metrics of a run, open for appending.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

#[derive(Serialize)]
struct MetricsLine<'a, T> {
    step: u64,
    #[serde(flatten)]
    values: &'a T,
}

#[derive(Deserialize)]
struct StepOfLine {
    step: u64,
    /// Whether the line is about a validation pass.
    #[serde(default, rename = "valid_loss", deserialize_with = "is_there")]
    is_validation: bool,
}

/// Whether a key is there, even with the `null` of a number that is not finite.
fn is_there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// The last line that stays when a run is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastLine {
    /// The step of the checkpoint.
    pub(crate) step: u64,
    /// Whether the step's validation pass is made again, with all that follows.
    pub(crate) validation_due: bool,
}

impl LastLine {
    /// The last line of a step.
    pub(crate) fn of_step(step: u64) -> Self {
        Self {
            step,
            validation_due: false,
        }
    }

    /// Whether a line of a step stays.
    fn keeps(self, step: u64, is_validation: bool) -> bool {
        step < self.step || step == self.step && !(self.validation_due && is_validation)
    }
}

impl Metrics {
    /// Opens the file, creating it if need be, and cuts off everything that a run that continues after `last` will write
    /// again: the first line after that and everything that follows, and an incomplete last line. Without `last` the run
    /// starts from its beginning, and nothing stays.
    ///
    /// # Errors
    /// If the file cannot be written, or a line that should stay is malformed.
    pub(crate) fn open(path: &Path, last: Option<LastLine>) -> Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.read(true).append(true).create(true);
        let file = options.open(path).map_err(io("open", path))?;
        let valid_bytes = match last {
            Some(last) => valid_bytes(path, &file, last)?,
            None => 0,
        };
        file.set_len(valid_bytes).map_err(io("shorten", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Appends a line: `step`, then the fields of `values`, a struct or a map without a field of that name. A number that is
    /// not finite becomes `null`.
    ///
    /// The lines of a step must be written before its checkpoint: a run that is resumed there does not write them again.
    ///
    /// # Errors
    /// If writing fails.
    ///
    /// # Panics
    /// If `values` is neither a struct nor a map.
    pub fn append(&mut self, step: u64, values: &impl Serialize) -> Result<()> {
        let line = MetricsLine { step, values };
        let mut line = serde_json::to_string(&line).expect("metrics are a struct or a map");
        line.push('\n');
        // One call and no buffer: a process that is killed here leaves the line or a part of it.
        self.file
            .write_all(line.as_bytes())
            .map_err(io("write", &self.path))
    }
}

/// The training loss and the validation loss of a step, where they were logged.
pub(crate) type LoggedLosses = BTreeMap<u64, [Option<f64>; 2]>;

/// The losses in a run's metrics, up to a step. Of a step that a run went back over, the later ones.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn logged_losses(path: &Path, last_step: u64) -> Result<LoggedLosses> {
    #[derive(Deserialize)]
    struct LossLine {
        step: u64,
        loss: Option<f64>,
        valid_loss: Option<f64>,
    }

    let mut reader = BufReader::new(File::open(path).map_err(io("open", path))?);
    let mut losses = LoggedLosses::new();
    loop {
        let mut line = Vec::new();
        (&mut reader)
            .take(MAX_METRICS_LINE_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(io("read", path))?;
        if line.is_empty() {
            return Ok(losses);
        }
        let Ok(line) = serde_json::from_slice::<LossLine>(&line) else {
            continue;
        };
        if line.step <= last_step && (line.loss.is_some() || line.valid_loss.is_some()) {
            let [trained, valid] = losses.entry(line.step).or_default();
            *trained = line.loss.or(*trained);
            *valid = line.valid_loss.or(*valid);
        }
    }
}

/// The number of bytes from the start that hold lines up to the last one that stays.
fn valid_bytes(path: &Path, file: &File, last: LastLine) -> Result<u64> {
    let mut reader = BufReader::new(file);
    let mut valid_bytes = 0;
    for number in 1.. {
        let mut line = Vec::new();
        (&mut reader)
            .take(MAX_METRICS_LINE_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(io("read", path))?;
        let is_last = reader.fill_buf().map_err(io("read", path))?.is_empty();
        if is_last && line.last() != Some(&b'\n') {
            // The end of the file, or the part of a line that was written.
            break;
        }
        match serde_json::from_slice::<StepOfLine>(&line) {
            Ok(line) if !last.keeps(line.step, line.is_validation) => break,
            Ok(_) => valid_bytes += line.len() as u64,
            // After a loss of power the last line may have its length and not its content.
            Err(_) if is_last => break,
            Err(cause) => {
                return Err(Error::Metrics {
                    path: path.to_owned(),
                    line: number,
                    problem: cause.to_string(),
                });
            }
        }
    }
    Ok(valid_bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[derive(Serialize)]
    struct Values {
        loss: f64,
        rate: Option<f64>,
    }

    #[test]
    fn lines_are_there_as_soon_as_they_are_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, None).unwrap();
        let values = Values {
            loss: 0.5,
            rate: None,
        };
        metrics.append(1, &values).unwrap();
        let first = "{\"step\":1,\"loss\":0.5,\"rate\":null}\n";
        assert_eq!(fs::read_to_string(&path).unwrap(), first);
        metrics.append(2, &json!({"loss": 0.25})).unwrap();
        let both = format!("{first}{{\"step\":2,\"loss\":0.25}}\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), both);
    }

    #[test]
    fn a_resumed_run_keeps_the_lines_up_to_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let whole = "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval\":1}\n{\"step\":4}\n";
        let check = |text: &str, last_step: Option<u64>, expected: &str| {
            fs::write(&path, text).unwrap();
            let last = last_step.map(LastLine::of_step);
            let mut metrics = Metrics::open(&path, last).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), expected, "{text:?}");
            metrics.append(9, &json!({})).unwrap();
            let appended = format!("{expected}{{\"step\":9}}\n");
            assert_eq!(fs::read_to_string(&path).unwrap(), appended);
        };
        check(whole, Some(4), whole);
        check(whole, Some(3), &whole[..42]);
        check(whole, Some(2), &whole[..42]);
        check(whole, Some(0), "");
        check(whole, None, "");
        check("", Some(3), "");
        // Cut short in the middle of a line, before its end, and with lost content.
        check(&whole[..48], Some(9), &whole[..42]);
        check(whole.trim_end(), Some(9), &whole[..42]);
        check("{\"step\":1}\n\0\0\0\0\n", Some(9), "{\"step\":1}\n");
        check("{\"ste", Some(9), "");
    }

    #[test]
    fn a_validation_pass_that_is_made_again_is_cut_off_with_all_that_follows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let kept =
            "{\"step\":2,\"valid_loss\":1}\n{\"step\":4,\"loss\":1}\n{\"step\":4,\"experts\":[]}\n";
        let rest = "{\"step\":4,\"valid_loss\":null}\n{\"step\":4,\"samples\":[]}\n";
        for (validation_due, expected) in
            [(true, kept.to_owned()), (false, format!("{kept}{rest}"))]
        {
            fs::write(&path, format!("{kept}{rest}")).unwrap();
            let last = LastLine {
                step: 4,
                validation_due,
            };
            Metrics::open(&path, Some(last)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), expected);
        }
    }

    #[test]
    fn a_malformed_line_within_is_named_and_nothing_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let text = "{\"step\":1}\n{\"loss\":1}\n{\"step\":3}\n";
        fs::write(&path, text).unwrap();
        let last = Some(LastLine::of_step(3));
        let error = Metrics::open(&path, last).unwrap_err().to_string();
        let expected =
            ":2: expected an object with a `step`, found missing field `step` at line 1 column 10";
        assert!(error.ends_with(expected), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn losses_are_the_latest_of_each_step_up_to_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_NAME);
        let lines = "{\"step\":1,\"loss\":3.0}\n{\"step\":2,\"loss\":2.0}\n{\"step\":2,\"valid_loss\":2.5}\n\
                     {\"step\":2,\"rolled_back\":{\"loss\":9.0}}\n{\"step\":2,\"loss\":1.0}\nno line\n\
                     {\"step\":3,\"samples\":[]}\n{\"step\":4,\"loss\":0.5}\n{\"step\":4,\"lo";
        fs::write(&path, lines).unwrap();
        let expected = [(1, [Some(3.0), None]), (2, [Some(1.0), Some(2.5)])];
        assert_eq!(logged_losses(&path, 3).unwrap(), expected.into());
        assert_eq!(logged_losses(&path, 4).unwrap()[&4], [Some(0.5), None]);
    }
}
