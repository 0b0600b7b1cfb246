//! How ranks share a run out. It is chosen at launch and is no part of a recipe.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use model::{ExchangeKind, ExpertRanks, RowWire};
use parallel::World;

use crate::recipe::SettingWords;

impl SettingWords for ExchangeKind {
    const WORDS: &'static [(&'static str, Self)] = &[("slots", Self::Slots), ("rows", Self::Rows)];
}

impl SettingWords for RowWire {
    const WORDS: &'static [(&'static str, Self)] = &[("f32", Self::F32), ("bf16", Self::Bf16)];
}

impl SettingWords for bool {
    const WORDS: &'static [(&'static str, Self)] = &[("on", true), ("off", false)];
}

/// How ranks share a run out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankLayout {
    /// Ranks that share out the micro-batches of a step: all of them. None: as many as there are.
    pub(crate) dp: Option<usize>,
    /// Ranks that share out the experts. None: all, if experts are trained, else 1.
    pub ep: Option<usize>,
    /// What travels between them.
    exchange: Option<ExchangeKind>,
    /// The format of what travels.
    wire: Option<RowWire>,
    /// Whether two micro-batches of a rank take turns, so that rows travel while something is computed. It changes memory and
    /// time, no bit.
    overlap: Option<bool>,
}

/// The ranks of a run, and how they share it out.
#[derive(Debug)]
pub(crate) struct JoinedRanks {
    pub(crate) world: World,
    /// Nothing is left open.
    pub(crate) layout: RankLayout,
    /// Those that share out experts, if any do.
    pub(crate) experts: Option<Arc<ExpertRanks>>,
    /// Why trained experts are not shared out, unless they may be.
    pub(crate) why_whole: Option<String>,
}

impl Default for JoinedRanks {
    /// One rank.
    fn default() -> Self {
        Self {
            world: World::alone(),
            layout: RankLayout::default().with(1, 1),
            experts: None,
            why_whole: None,
        }
    }
}

impl RankLayout {
    /// This one with a number of ranks, and of those that share out experts: nothing is left open.
    pub(crate) fn with(self, ranks: usize, ep: usize) -> Self {
        let shares = ep > 1;
        Self {
            dp: Some(ranks),
            ep: Some(ep),
            exchange: shares.then(|| self.exchange()),
            wire: shares.then(|| self.wire()),
            overlap: shares.then(|| self.overlaps()),
        }
    }

    /// What travels between ranks.
    pub(crate) fn exchange(self) -> ExchangeKind {
        self.exchange.unwrap_or_default()
    }

    /// The format of what travels.
    pub(crate) fn wire(self) -> RowWire {
        self.wire.unwrap_or_default()
    }

    /// Whether micro-batches take turns.
    pub(crate) fn overlaps(self) -> bool {
        self.overlap.unwrap_or(true)
    }

    /// A setting that has no meaning unless ranks share out experts, if there is one.
    pub(crate) fn of_experts_alone(self) -> Option<&'static str> {
        let given = [
            ("exchange", self.exchange.is_some()),
            ("wire", self.wire.is_some()),
            ("overlap", self.overlap.is_some()),
        ];
        let mut given = given.into_iter();
        given.find_map(|(key, is_given)| is_given.then_some(key))
    }
}

impl FromStr for RankLayout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut layout = Self::default();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key {
                "dp" => set(&mut layout.dp, key, ranks(value))?,
                "ep" => set(&mut layout.ep, key, ranks(value))?,
                "exchange" => set(&mut layout.exchange, key, of_word(value))?,
                "wire" => set(&mut layout.wire, key, of_word(value))?,
                "overlap" => set(&mut layout.overlap, key, of_word(value))?,
                _ => {
                    return Err(format!(
                        "expected dp=N, ep=N, exchange=slots|rows, wire=f32|bf16 or overlap=on|off, with commas between; \
                         found `{part}`"
                    ));
                }
            }
        }
        if layout.exchange() == ExchangeKind::Slots && layout.wire() != RowWire::F32 {
            return Err(
                "`exchange=slots` has the bits of one rank, and `wire=bf16` rounds; use exchange=rows"
                    .into(),
            );
        }
        Ok(layout)
    }
}

/// Sets what was not set before.
fn set<T>(setting: &mut Option<T>, key: &str, value: Result<T, String>) -> Result<(), String> {
    let value = value.map_err(|why| format!("`{key}`: {why}"))?;
    match setting.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("`{key}` is there twice")),
    }
}

fn ranks(value: &str) -> Result<usize, String> {
    let ranks = value.parse().ok().filter(|n| *n > 0);
    ranks.ok_or_else(|| format!("expected a number of ranks, from 1; found `{value}`"))
}

fn of_word<T: SettingWords>(word: &str) -> Result<T, String> {
    let words = T::WORDS.iter().map(|(word, _)| *word);
    let expected = || words.collect::<Vec<_>>().join(" or ");
    T::find(word).ok_or_else(|| format!("expected {}; found `{word}`", expected()))
}

/// As it is read, without what is left open.
impl fmt::Display for RankLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<usize>| number.map(|number| number.to_string());
        let word = |word: Option<&'static str>| word.map(str::to_owned);
        let settings = [
            ("dp", number(self.dp)),
            ("ep", number(self.ep)),
            ("exchange", word(self.exchange.and_then(SettingWords::word))),
            ("wire", word(self.wire.and_then(SettingWords::word))),
            ("overlap", word(self.overlap.and_then(SettingWords::word))),
        ];
        let given = settings
            .into_iter()
            .filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        f.write_str(&given.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read_or_refused_by_name() {
        let read = |text: &str| text.parse::<RankLayout>();
        let layout = read("ep=2,exchange=slots").unwrap();
        assert_eq!(layout.to_string(), "ep=2,exchange=slots");
        assert_eq!(
            layout.with(4, 2).to_string(),
            "dp=4,ep=2,exchange=slots,wire=f32,overlap=on"
        );
        let layout = read("ep=1,dp=4").unwrap();
        assert_eq!(layout.to_string(), "dp=4,ep=1");
        assert_eq!(layout.with(4, 1), layout);
        for (text, expected) in [
            (
                "ep=0",
                "`ep`: expected a number of ranks, from 1; found `0`",
            ),
            (
                "dp=x",
                "`dp`: expected a number of ranks, from 1; found `x`",
            ),
            ("ep=2,ep=4", "`ep` is there twice"),
            (
                "pp=2",
                "expected dp=N, ep=N, exchange=slots|rows, wire=f32|bf16 or overlap=on|off, with commas between; found `pp=2`",
            ),
            ("wire=f16", "`wire`: expected f32 or bf16; found `f16`"),
            (
                "wire=bf16,exchange=slots",
                "`exchange=slots` has the bits of one rank, and `wire=bf16` rounds; use exchange=rows",
            ),
            ("overlap=yes", "`overlap`: expected on or off; found `yes`"),
            (
                "exchange=all",
                "`exchange`: expected slots or rows; found `all`",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), expected);
        }
    }
}
