//! Reading the command line: numbers below 0 are values, not options, and each mistake is one sentence.

use std::ffi::OsString;
use std::io::Write;
use std::num::{IntErrorKind, ParseIntError};

use clap::error::{ContextKind, ContextValue};
use clap::{Command, CommandFactory, FromArgMatches};

use crate::console::{USAGE, unwritten};

/// The arguments of the program; ends it if they are wrong, or ask for help.
pub(crate) fn parse<T: CommandFactory + FromArgMatches>() -> T {
    match read(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(problem) => std::process::exit(explain(&problem)),
    }
}

fn read<T: CommandFactory + FromArgMatches>(
    words: impl IntoIterator<Item = OsString>,
) -> clap::error::Result<T> {
    let mut command = with_negative_numbers(T::command());
    let matches = command.try_get_matches_from_mut(words)?;
    T::from_arg_matches(&matches).map_err(|problem| problem.format(&mut command))
}

/// Lets each option have a number below 0, so that its own rules refuse it.
fn with_negative_numbers(command: Command) -> Command {
    command
        .mut_args(|arg| match arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        })
        .mut_subcommands(with_negative_numbers)
}

/// Prints help or a mistake, and gives the exit code.
fn explain(problem: &clap::Error) -> i32 {
    if let Some(sentence) = number(problem) {
        let _ = writeln!(std::io::stderr(), "error: {sentence}");
        return i32::from(USAGE);
    }
    match problem.print().and_then(|()| std::io::stdout().flush()) {
        Err(unprinted) if !problem.use_stderr() => unwritten(&unprinted),
        _ => problem.exit_code(),
    }
}

/// A sentence on a value that is not a whole number; none for other mistakes.
fn number(problem: &clap::Error) -> Option<String> {
    let text = |kind| match problem.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (option, value) = (
        text(ContextKind::InvalidArg)?,
        text(ContextKind::InvalidValue)?,
    );
    let cause = std::error::Error::source(problem)?.downcast_ref::<ParseIntError>()?;
    let expected = match cause.kind() {
        IntErrorKind::PosOverflow => "a smaller whole number",
        _ => "a whole number from 0 up",
    };
    let found = value.escape_default();
    Some(format!("`{option}`: expected {expected}, found `{found}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Arguments {
        #[command(subcommand)]
        verb: Verb,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Verb {
        Act {
            #[arg(long)]
            count: Option<usize>,
            #[arg(long, value_parser = clap::value_parser!(u64).range(1..=5))]
            bounded: Option<u64>,
            #[arg(long)]
            factor: Option<f32>,
            #[arg(long, short)]
            quiet: bool,
        },
    }

    fn act(words: &str) -> Result<String, String> {
        let words = ["program", "act"].into_iter().chain(words.split(' '));
        let read: clap::error::Result<Arguments> = read(words.map(OsString::from));
        let shown = |problem: clap::Error| number(&problem).unwrap_or_else(|| problem.to_string());
        read.map(|read| format!("{:?}", read.verb)).map_err(shown)
    }

    #[test]
    fn numbers_below_zero_are_values() {
        let found = act("--factor -1.5 -q").unwrap();
        assert!(found.contains("factor: Some(-1.5), quiet: true"), "{found}");
        for (words, expected) in [
            (
                "--count -1",
                "`--count <COUNT>`: expected a whole number from 0 up, found `-1`",
            ),
            (
                "--count 1.5",
                "`--count <COUNT>`: expected a whole number from 0 up, found `1.5`",
            ),
            (
                "--bounded -7",
                "`--bounded <BOUNDED>`: expected a whole number from 0 up, found `-7`",
            ),
        ] {
            assert_eq!(act(words).unwrap_err(), expected);
        }
        assert!(act("--bounded 6").unwrap_err().contains("1..=5"));
    }
}
