//! The models that are evaluated, the baseline first.

use std::path::{Path, PathBuf};

use super::Args;

/// A model, maybe with an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Contestant<'a> {
    pub(super) model: &'a str,
    pub(super) adapter: Option<&'a Path>,
    /// What it is called; none for the names of its files.
    pub(super) name: Option<&'a str>,
}

/// An adapter of the first model, and what the two are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedAdapter {
    name: Option<String>,
    path: PathBuf,
}

impl From<&str> for NamedAdapter {
    /// `NAME=DIR`, or a folder alone; so is a text of which all is a folder.
    fn from(text: &str) -> Self {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !Path::new(text).exists() => Self {
                name: Some(name.to_owned()),
                path: path.into(),
            },
            _ => Self {
                name: None,
                path: text.into(),
            },
        }
    }
}

/// All models, the baseline first: the one that is named, or else the first model without its adapters, or else the first.
pub(super) fn contestants(args: &Args) -> Vec<Contestant<'_>> {
    let plain = |model| Contestant {
        model,
        adapter: None,
        name: None,
    };
    let Some((first, others)) = args.models.split_first() else {
        return Vec::new();
    };
    let adapted = args.adapter.iter().map(|adapter| Contestant {
        model: first,
        adapter: Some(&adapter.path),
        name: adapter.name.as_deref(),
    });
    let adapted: Vec<Contestant<'_>> = adapted.collect();
    let mut all: Vec<Contestant<'_>> = match args.baseline.as_deref() {
        Some("none") => Vec::new(),
        Some(baseline) => vec![plain(baseline)],
        None if !adapted.is_empty() => vec![plain(first)],
        None => Vec::new(),
    };
    match adapted.is_empty() {
        true => all.push(plain(first)),
        false => all.extend(adapted),
    }
    all.extend(others.iter().map(|model| plain(model)));
    all
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct TestCli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn an_adapter_is_compared_with_its_base_unless_told_otherwise() {
        let check = |line: &str, expected: &[(&str, Option<&str>, Option<&str>)]| {
            let line = format!("eval {line} --data d");
            let args = TestCli::parse_from(line.split_whitespace()).args;
            let expected = expected.iter().map(|(model, adapter, name)| Contestant {
                model,
                adapter: adapter.map(Path::new),
                name: *name,
            });
            assert_eq!(contestants(&args), expected.collect::<Vec<_>>(), "{line}");
        };
        let plain = |model| (model, None, None);
        let adapted = |adapter| ("m", Some(adapter), None);
        check("m", &[plain("m")]);
        check("m --adapter a", &[plain("m"), adapted("a")]);
        check("m --adapter a --baseline none", &[adapted("a")]);
        check("m --adapter a --baseline b", &[plain("b"), adapted("a")]);
        check("m --baseline b", &[plain("b"), plain("m")]);
        check("m n o", &[plain("m"), plain("n"), plain("o")]);
        check(
            "m n --adapter x=a --adapter b",
            &[
                plain("m"),
                ("m", Some("a"), Some("x")),
                adapted("b"),
                plain("n"),
            ],
        );
    }
}
