//! `chat`: a conversation with a model, in its chat template.

use std::io::{BufRead, IsTerminal, Read};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, bail};
use data::GenerationPrompt;
use infer::{ChatHistory, Engine, Error, FinishReason, GenerateConfig};
use signal_hook::consts::SIGINT;

use super::sampling::SamplingArgs;
use super::{PrefillProgress, summary};
use crate::console::{Console, printable};
use crate::open::{EngineArgs, GenerationExtent, ModelArgs, SpeculationArgs};

/// Chat with a model, using its chat template.
///
/// Each line of stdin is a message, or a command: `/help` lists them. `//text` is the message `/text`. Ctrl-D ends the
/// chat, and Ctrl-C stops an answer. The model reads each message once: earlier turns stay in the KV cache.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// System message. Default: none.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Turn on reasoning, if the chat template has a switch for it.
    #[arg(long)]
    think: bool,
    /// Maximum number of new tokens per answer. Default: the rest of the context length.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: Option<u64>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    speculation: SpeculationArgs,
}

const COMMANDS: &str = "\
/clear   start a new conversation
/help    list commands
/quit    end the chat, as /exit and Ctrl-D do
//text   send the message /text
Ctrl-C   stop an answer";

/// A line of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Message(&'a str),
    Clear,
    Help,
    Quit,
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn of(line: &'a str) -> Self {
        match line {
            "" => Self::Nothing,
            "/clear" => Self::Clear,
            "/help" | "/?" => Self::Help,
            "/quit" | "/exit" => Self::Quit,
            _ if line.starts_with("//") => Self::Message(&line[1..]),
            _ if line.starts_with('/') => Self::Unknown(line),
            _ => Self::Message(line),
        }
    }
}

/// Tokens that a conversation has room for at first.
const CHAT_CONTEXT: usize = 4096;

/// Maximum length of a line of input, in bytes.
const LONGEST_LINE: u64 = 1 << 20;

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let opened = args.model.open(console)?;
    let tokenizer = Arc::clone(opened.expect_chat_template()?);
    let generation_prompt = if args.think {
        GenerationPrompt::Think
    } else {
        GenerationPrompt::Add
    };
    // A conversation grows; what it needs at the start is one answer's.
    let extent = GenerationExtent {
        sequences: 1,
        context: args.max_tokens.map_or(CHAT_CONTEXT, |n| n as usize),
    };
    let mut chat = Chat {
        engine: opened.engine(args.engine, args.speculation, extent, console)?,
        history: ChatHistory::new(tokenizer, generation_prompt, args.system.clone()),
        config: GenerateConfig {
            max_tokens: args.max_tokens.map_or(usize::MAX, |n| n as usize),
            sample: args.sampling.config(&opened.folder)?,
            stop_ids: args.sampling.stop_ids(&opened, console)?,
            logprobs: None,
        },
        stop_strings: &args.sampling.stop,
    };
    let interrupted = listen()?;
    let is_typed = std::io::stdin().is_terminal();
    if is_typed {
        console.note("/help lists commands, /quit or Ctrl-D ends the chat, Ctrl-C stops an answer");
    }
    while let Some(line) = next_line(&mut chat.engine, is_typed, console)? {
        match Input::of(line.trim()) {
            Input::Nothing => {}
            Input::Quit => break,
            Input::Clear => chat.history.clear(),
            Input::Help => console.note(COMMANDS),
            // A model would answer it as a message, and nobody would see why.
            Input::Unknown(command) => {
                let problem = format!(
                    "expected a command that /help lists, found `{}`; // in place of / makes it a message",
                    printable(command, &[])
                );
                if !is_typed {
                    bail!("stdin: {problem}");
                }
                console.note(problem);
            }
            Input::Message(message) => {
                interrupted.store(false, Ordering::Relaxed);
                let answered = chat.answer(message, &interrupted, console);
                interrupted.store(true, Ordering::Relaxed);
                match answered {
                    Err(problem) if is_typed => console.note(format_args!("{problem:#}")),
                    answered => answered?,
                }
            }
        }
    }
    console.memory();
    Ok(ExitCode::SUCCESS)
}

/// A flag that Ctrl-C sets. While the flag is set, Ctrl-C ends the program: between answers, and the second time during
/// one.
fn listen() -> anyhow::Result<Arc<AtomicBool>> {
    const CODE: i32 = 128 + SIGINT;
    let interrupted = Arc::new(AtomicBool::new(true));
    let flag = || Arc::clone(&interrupted);
    // In this order: the second one changes the flag that the first one reads.
    signal_hook::flag::register_conditional_shutdown(SIGINT, CODE, flag())
        .and_then(|_| signal_hook::flag::register(SIGINT, flag()))
        .context("cannot listen to signals")?;
    Ok(interrupted)
}

/// The next line of stdin; none at the end.
fn next_line(
    engine: &mut Engine,
    is_typed: bool,
    console: &Console,
) -> anyhow::Result<Option<String>> {
    if is_typed {
        console.ask("> ");
        // In the time that a person takes to think and type.
        engine.repack_all(&mut |_, _| ());
    }
    let mut line = String::new();
    let mut stdin = std::io::stdin().lock().take(LONGEST_LINE);
    let read = stdin.read_line(&mut line).context("stdin")?;
    if read as u64 == LONGEST_LINE {
        bail!("stdin: expected lines of less than {LONGEST_LINE} bytes, found a longer one");
    }
    Ok((read > 0).then_some(line))
}

/// A conversation, and the engine that answers.
struct Chat<'a> {
    engine: Engine,
    history: ChatHistory,
    /// `max_tokens` may exceed the model's positions.
    config: GenerateConfig,
    stop_strings: &'a [String],
}

impl Chat<'_> {
    /// Answers a message, and shows the answer as it comes. If the answer cannot start, the message is forgotten.
    fn answer(
        &mut self,
        text: &str,
        interrupted: &AtomicBool,
        console: &Console,
    ) -> anyhow::Result<()> {
        let asked = self
            .history
            .ask(&self.engine, text, &self.config, self.stop_strings);
        let mut completion = match asked {
            Err(full @ Error::ConversationLength { .. }) => {
                bail!("{full}; /clear starts a new one")
            }
            asked => asked?,
        };
        let mut prefill = PrefillProgress::new(completion.sequence(), console);
        while completion.finish_reason().is_none() {
            let piece = completion.step(&mut self.engine)?;
            prefill.update(completion.sequence());
            console.stream(piece);
            if interrupted.load(Ordering::Relaxed) {
                completion.cancel();
            }
        }
        let completed = completion.finish()?;
        console.stream(format_args!("{}\n", completed.rest));
        self.history.answer(&completed);
        console.detail(summary(&completed.generation));
        let limit = self.engine.model.config.max_position_embeddings;
        let is_full = completed.prefix.token_ids().len() + 1 >= limit;
        if completed.generation.finish_reason == FinishReason::Length && is_full {
            bail!(
                "the answer ends here: the conversation fills the model's {limit} positions; /clear starts a new one"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_messages() {
        for (line, expected) in [
            ("", Input::Nothing),
            ("hello /help", Input::Message("hello /help")),
            ("/help", Input::Help),
            ("/?", Input::Help),
            ("/exit", Input::Quit),
            ("/clear", Input::Clear),
            ("/clear all", Input::Unknown("/clear all")),
            ("/usr/bin", Input::Unknown("/usr/bin")),
            ("/", Input::Unknown("/")),
            ("//usr/bin", Input::Message("/usr/bin")),
            ("// comment", Input::Message("/ comment")),
        ] {
            assert_eq!(Input::of(line), expected, "{line}");
        }
    }
}
