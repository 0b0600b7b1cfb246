//! How ranks share a run out. It is chosen at launch and is no part of a recipe.

use std::fmt;
use std::str::FromStr;

use model::{ExchangeKind, RowWire};

/// How ranks share a run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankLayout {
    /// Ranks that compute different micro-batches: all of them.
    pub dp: Option<usize>,
    /// Ranks that share out the experts. None: all, if experts are trained, else 1.
    pub ep: Option<usize>,
    /// What travels between them.
    pub exchange: ExchangeKind,
    /// The format of what comes back.
    pub wire: RowWire,
    /// Whether two micro-batches of a rank take turns, so that rows travel while something is computed. It changes memory and
    /// time, no bit.
    pub overlap: bool,
}

impl Default for RankLayout {
    fn default() -> Self {
        Self {
            dp: None,
            ep: None,
            exchange: ExchangeKind::default(),
            wire: RowWire::default(),
            overlap: true,
        }
    }
}

impl FromStr for RankLayout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut layout = Self::default();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let ranks = || match value.parse() {
                Ok(n) if n > 0 => Ok(Some(n)),
                _ => Err(format!("`{key}` is a number of ranks; found `{value}`")),
            };
            match key {
                "dp" => layout.dp = ranks()?,
                "ep" => layout.ep = ranks()?,
                "exchange" => {
                    let kind = value.parse();
                    layout.exchange =
                        kind.map_err(|why| format!("`exchange`: {why}; found `{value}`"))?;
                }
                "wire" => {
                    let wire = value.parse();
                    layout.wire = wire.map_err(|why| format!("`wire`: {why}; found `{value}`"))?;
                }
                "overlap" => {
                    layout.overlap = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(format!("`overlap`: expected on or off; found `{value}`")),
                    }
                }
                _ => {
                    return Err(format!(
                        "expected ep=N, dp=N, exchange=slots|rows, wire=f32|bf16 or overlap=on|off, with commas between; found `{part}`"
                    ));
                }
            }
        }
        if layout.exchange == ExchangeKind::Slots && layout.wire != RowWire::F32 {
            return Err("`exchange=slots` has the bits of one rank, and `wire=bf16` rounds; use exchange=rows".into());
        }
        Ok(layout)
    }
}

impl fmt::Display for RankLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ep = self.ep.unwrap_or(1);
        if let Some(dp) = self.dp {
            write!(f, "dp={dp},")?;
        }
        write!(f, "ep={ep}")?;
        match ep {
            1 => Ok(()),
            _ => {
                let overlap = if self.overlap { "on" } else { "off" };
                let (exchange, wire) = (self.exchange, self.wire);
                write!(f, ",exchange={exchange},wire={wire},overlap={overlap}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read_or_refused_by_name() {
        let read = |text: &str| text.parse::<RankLayout>();
        let layout = read("ep=2,dp=4,exchange=slots").unwrap();
        assert_eq!(
            layout.to_string(),
            "dp=4,ep=2,exchange=slots,wire=f32,overlap=on"
        );
        assert_eq!(read("ep=1").unwrap().to_string(), "ep=1");
        for (text, expected) in [
            ("ep=0", "`ep` is a number of ranks; found `0`"),
            ("dp=x", "`dp` is a number of ranks; found `x`"),
            (
                "pp=2",
                "expected ep=N, dp=N, exchange=slots|rows, wire=f32|bf16 or overlap=on|off, with commas between; found `pp=2`",
            ),
            (
                "exchange=all",
                "`exchange`: expected slots or rows; found `all`",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), expected);
        }
    }
}
