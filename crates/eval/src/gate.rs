//! Bounds that a model's numbers must keep: passed if the near end of the interval clears the bound, failed if the far end misses it,
//! else open.

use std::fmt;

use serde::Serialize;

use crate::compare::MeasuredNumber;
use crate::error::{Error, Result};
use crate::interval::Interval;

/// A bound: `factbook acc >= base + 0.10`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// As it was written.
    pub text: String,
    /// The task, or `data` for the loss on text.
    pub task: String,
    /// The metric.
    pub metric: String,
    /// The filter, if there is more than one.
    pub filter: Option<String>,
    is_lower_bound: bool,
    bound: Bound,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    Fixed(f64),
    /// `factor` times the baseline's number, and something more.
    Base {
        factor: f64,
        more: f64,
    },
}

/// Whether a bound is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GateVerdict {
    /// It is.
    Passed,
    /// It is not.
    Failed,
    /// So many items do not say.
    Inconclusive,
}

/// What became of a gate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GateOutcome {
    /// The gate.
    pub gate: String,
    /// The model.
    pub model: String,
    /// What the number exceeds the bound by.
    pub beyond: f64,
    /// What that lies in, 95 times of 100.
    pub interval: Interval,
    /// Whether the bound is kept.
    pub verdict: GateVerdict,
}

/// What a gate looks like, for errors.
const FORM: &str = "a gate such as `mmlu acc >= 0.60`, `my_task acc >= base + 0.10` or `wikitext word_perplexity <= base * 1.02`";

impl Gate {
    /// # Errors
    /// If it is none.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = || Error::Gate {
            expected: FORM.into(),
            found: format!("`{text}`"),
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        let [task, metric, sign, bound @ ..] = words.as_slice() else {
            return Err(wrong());
        };
        let number = |text: &str| text.parse().ok().filter(|number: &f64| number.is_finite());
        let bound = match bound {
            ["base"] => Some(Bound::Base {
                factor: 1.0,
                more: 0.0,
            }),
            [fixed] => number(fixed).map(Bound::Fixed),
            ["base", "+", more] => number(more).map(|more| Bound::Base { factor: 1.0, more }),
            ["base", "-", less] => number(less).map(|less| Bound::Base {
                factor: 1.0,
                more: -less,
            }),
            ["base", "*", factor] => number(factor).map(|factor| Bound::Base { factor, more: 0.0 }),
            _ => None,
        };
        let (metric, filter) = match metric.split_once(',') {
            Some((metric, filter)) => (metric, Some(filter.to_owned())),
            None => (*metric, None),
        };
        Ok(Self {
            text: text.to_owned(),
            task: (*task).to_owned(),
            metric: metric.to_owned(),
            filter,
            is_lower_bound: match *sign {
                ">=" => true,
                "<=" => false,
                _ => return Err(wrong()),
            },
            bound: bound.ok_or_else(wrong)?,
        })
    }

    /// Whether it needs the number of a baseline.
    pub fn needs_baseline(&self) -> bool {
        matches!(self.bound, Bound::Base { .. })
    }

    /// What becomes of the gate.
    ///
    /// # Errors
    /// If it needs a baseline and there is none, or the two were not measured on the same items.
    pub fn outcome(
        &self,
        model: &str,
        number: &MeasuredNumber,
        base: Option<&MeasuredNumber>,
    ) -> Result<GateOutcome> {
        let (value, interval, bound) = match (self.bound, base) {
            (Bound::Fixed(bound), _) => (number.value(), number.interval(), bound),
            (Bound::Base { factor, more }, Some(base)) => {
                let interval = number.interval_beyond(base, factor)?;
                (number.value() - factor * base.value(), interval, more)
            }
            (Bound::Base { .. }, None) => {
                return Err(Error::Gate {
                    expected: format!("a baseline for `{}`", self.text),
                    found: "none".into(),
                });
            }
        };
        let [low, high] = interval.map(|end| end - bound);
        let (near, far) = match self.is_lower_bound {
            true => (low, high),
            false => (-high, -low),
        };
        Ok(GateOutcome {
            gate: self.text.clone(),
            model: model.to_owned(),
            beyond: value - bound,
            interval: [low, high],
            verdict: match (near >= 0.0, far < 0.0) {
                (true, _) => GateVerdict::Passed,
                (false, true) => GateVerdict::Failed,
                (false, false) => GateVerdict::Inconclusive,
            },
        })
    }
}

impl fmt::Display for GateVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Inconclusive => "inconclusive",
        })
    }
}

impl fmt::Display for GateOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            gate,
            model,
            beyond,
            interval: [low, high],
            verdict,
        } = self;
        write!(
            f,
            "gate `{gate}`, {model}: {verdict}; {beyond:+.4} beyond the bound [{low:+.4}, {high:+.4}]"
        )
    }
}

#[cfg(test)]
mod tests {
    use data::{Metric, MetricUse};

    use super::*;
    use crate::task::{MetricResult, RowValue};

    fn measured(right: usize, n: usize) -> MeasuredNumber {
        let value = |at| RowValue::Number(f64::from(u8::from(at < right)));
        let of = MetricUse::usual(Metric::Acc);
        MeasuredNumber::from(&MetricResult::new("none", &of, (0..n).map(value).collect()).unwrap())
    }

    #[test]
    fn gates_pass_fail_or_stay_open() {
        let verdict = |gate: &str, right: usize| {
            let base = measured(200, 400);
            Gate::parse(gate)
                .unwrap()
                .outcome("m", &measured(right, 400), Some(&base))
                .unwrap()
                .verdict
        };
        for (gate, right, expected) in [
            ("t acc >= 0.60", 280, GateVerdict::Passed),
            ("t acc >= 0.60", 245, GateVerdict::Inconclusive),
            ("t acc >= 0.60", 200, GateVerdict::Failed),
            ("t acc <= 0.60", 200, GateVerdict::Passed),
            ("t acc >= base + 0.10", 280, GateVerdict::Passed),
            ("t acc >= base + 0.10", 240, GateVerdict::Inconclusive),
            ("t acc >= base + 0.10", 200, GateVerdict::Failed),
            // A copy: 400 items do not tell these bounds from its own number.
            ("t acc >= base", 200, GateVerdict::Inconclusive),
            ("t acc >= base - 0.01", 200, GateVerdict::Passed),
            ("t acc >= base + 0.005", 200, GateVerdict::Inconclusive),
            ("t acc <= base * 1.02", 180, GateVerdict::Passed),
            ("t acc <= base * 0.50", 180, GateVerdict::Failed),
        ] {
            assert_eq!(verdict(gate, right), expected, "{gate} {right}");
        }
    }

    #[test]
    fn gates_are_read_or_refused() {
        let gate = Gate::parse("gsm8k exact_match,strict-match >= base").unwrap();
        assert_eq!(
            (
                gate.task.as_str(),
                gate.metric.as_str(),
                gate.filter.as_deref(),
                gate.needs_baseline()
            ),
            ("gsm8k", "exact_match", Some("strict-match"), true)
        );
        for wrong in [
            "",
            "t acc",
            "t acc > 0.5",
            "t acc >= x",
            "t acc >= base / 2",
            "t acc >= base + inf",
        ] {
            let problem = Gate::parse(wrong).unwrap_err().to_string();
            assert_eq!(problem, format!("expected {FORM}, found `{wrong}`"));
        }
        let problem = gate
            .outcome("m", &measured(1, 2), None)
            .unwrap_err()
            .to_string();
        assert_eq!(
            problem,
            "expected a baseline for `gsm8k exact_match,strict-match >= base`, found none"
        );
    }
}
