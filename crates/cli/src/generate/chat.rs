//! `chat`: a conversation with a model, in its chat template.
//!
//! Every turn is rendered whole, and what the model has read of the rendering before it does not read again. That holds
//! whatever the template does to earlier turns, such as leaving out what the model thought.

use std::io::{BufRead, IsTerminal, Read};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, bail};
use data::{Bos, ChatTemplate, GenerationPrompt, Tokenizer};
use infer::{Context, Engine, GenerateConfig, Sequence, Stop};
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;

use super::sampling::SamplingArgs;
use super::{Reading, Writing, summary};
use crate::console::Console;
use crate::open::{EngineArgs, ModelArgs};

/// Talks with a model. Every line of stdin is a message; `/clear` begins again, `/quit` ends. Ctrl-C stops an answer.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told before the first message.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Let the model think before it answers, where its template can be told so.
    #[arg(long)]
    think: bool,
    /// Most new tokens of an answer. Default: as many as the model's positions leave room for.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: Option<u64>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Longest line that is read, in bytes.
const LONGEST_LINE: u64 = 1 << 20;

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let opened = args.model.open(console)?;
    let (tokenizer, template) = opened.expect_chat_template()?;
    let mut chat = Chat {
        engine: opened.engine(args.engine, console)?,
        tokenizer,
        template,
        generation_prompt: if args.think {
            GenerationPrompt::Think
        } else {
            GenerationPrompt::Add
        },
        config: GenerateConfig {
            max_tokens: args.max_tokens.map_or(usize::MAX, |n| n as usize),
            sample: args.sampling.config(&opened.folder)?,
            stop_ids: args.sampling.stop_ids(&opened)?,
            logprobs: None,
        },
        stop_strings: &args.sampling.stop,
        system: args.system.as_deref(),
        messages: Vec::new(),
        context: None,
    };
    chat.clear();
    let interrupted = listen()?;
    let is_typed = std::io::stdin().is_terminal();
    if is_typed {
        console.note("/clear begins again, /quit or Ctrl-D ends, Ctrl-C stops an answer");
    }
    while let Some(line) = next_line(&mut chat.engine, is_typed, console)? {
        match line.trim() {
            "" => {}
            "/quit" => break,
            "/clear" => chat.clear(),
            message => {
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

/// Whether Ctrl-C came since this was last set to false. While it is true, Ctrl-C ends the program: between answers, and
/// the second time while one is on its way.
fn listen() -> anyhow::Result<Arc<AtomicBool>> {
    const CODE: i32 = 128 + SIGINT;
    let interrupted = Arc::new(AtomicBool::new(true));
    let flag = || Arc::clone(&interrupted);
    // In this order: what the first one reads, the second one changes.
    signal_hook::flag::register_conditional_shutdown(SIGINT, CODE, flag())
        .and_then(|_| signal_hook::flag::register(SIGINT, flag()))
        .context("cannot listen to signals")?;
    Ok(interrupted)
}

/// The next line of stdin; none at its end.
fn next_line(
    engine: &mut Engine,
    is_typed: bool,
    console: &Console,
) -> anyhow::Result<Option<String>> {
    if is_typed {
        console.ask("> ");
        // While somebody thinks and types.
        engine.repack(&mut |_, _| ());
    }
    let mut line = String::new();
    let mut stdin = std::io::stdin().lock().take(LONGEST_LINE);
    let read = stdin.read_line(&mut line).context("stdin")?;
    if read as u64 == LONGEST_LINE {
        bail!("stdin: expected lines of less than {LONGEST_LINE} bytes, found a longer one");
    }
    Ok((read > 0).then_some(line))
}

/// A conversation.
struct Chat<'a> {
    engine: Engine,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    generation_prompt: GenerationPrompt,
    /// `max_tokens` may be more than there is room for.
    config: GenerateConfig,
    stop_strings: &'a [String],
    system: Option<&'a str>,
    messages: Vec<Value>,
    /// What the model has read.
    context: Option<Context>,
}

impl Chat<'_> {
    /// Forgets all but what the model is told before the first message.
    fn clear(&mut self) {
        self.context = None;
        let system = self.system.into_iter();
        self.messages = system.map(|text| message("system", text)).collect();
    }

    /// Answers a message, and shows the answer as it comes. If that cannot be done, the message is forgotten.
    fn answer(
        &mut self,
        text: &str,
        interrupted: &AtomicBool,
        console: &Console,
    ) -> anyhow::Result<()> {
        self.messages.push(message("user", text));
        let mut sequence = match self.begin() {
            Ok(sequence) => sequence,
            Err(problem) => {
                self.messages.pop();
                return Err(problem);
            }
        };
        let mut writing = Writing::new(Some(self.tokenizer), self.stop_strings)?;
        let mut reading = Reading::new(&sequence, console);
        while sequence.stopped().is_none() {
            self.engine.step([&mut sequence])?;
            reading.update(&sequence);
            console.stream(writing.step(&mut sequence)?);
            if interrupted.load(Ordering::Relaxed) {
                sequence.stop();
            }
        }
        console.stream(format_args!("{}\n", writing.finish()?));
        let (generation, context) = sequence.finish();
        if generation.token_ids.is_empty() && generation.stopped == Stop::Caller {
            // Interrupted before the first word: as if it had not been asked.
            self.messages.pop();
        } else {
            self.messages.push(message("assistant", &writing.text));
        }
        console.detail(summary(&generation));
        let limit = self.limit();
        let is_full = context.token_ids().len() + 1 >= limit;
        self.context = Some(context);
        if generation.stopped == Stop::MaxTokens && is_full {
            bail!(
                "the answer ends here: the conversation fills the model's {limit} positions; /clear begins a new one"
            );
        }
        Ok(())
    }

    /// The answer to the messages so far, before its first token.
    fn begin(&mut self) -> anyhow::Result<Sequence> {
        let text = self
            .template
            .render(&self.messages, None, self.generation_prompt)?;
        let prompt = self.tokenizer.encode(&text, Bos::Never)?;
        let (limit, found) = (self.limit(), prompt.len());
        if found >= limit {
            bail!(
                "expected the conversation to leave room in the model's {limit} positions, found {found} tokens; \
                 /clear begins a new one"
            );
        }
        let config = GenerateConfig {
            max_tokens: self.config.max_tokens.min(limit - found),
            ..self.config.clone()
        };
        let context = self.context.take();
        let context = context.unwrap_or_else(|| self.engine.context());
        Ok(Sequence::new(
            &self.engine.model,
            context,
            &prompt,
            &config,
        )?)
    }

    fn limit(&self) -> usize {
        self.engine.model.config.max_position_embeddings
    }
}

fn message(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}
