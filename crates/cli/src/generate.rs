//! `generate`: the model's continuation of a prompt.

mod adapters;
pub(crate) mod chat;
mod sampling;
mod summary;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use data::{Bos, GenerationPrompt, Tokenizer};
use infer::{
    Completed, Completion, Engine, GenerateConfig, Sequence, StepOutput, chat_prompt, message,
};
use serde_json::Value;

use self::sampling::SamplingArgs;
use self::summary::{object, summary};
use crate::console::{Console, Progress, printable};
use crate::device::DeviceArgs;
use crate::open::{
    EngineArgs, GenerationExtent, ModelArgs, Opened, SpeculationArgs, cache_object, cache_summary,
};

/// Generate text that continues one or more prompts.
///
/// The text of a single prompt is printed as it is generated. Several prompts are decoded together, and each text is
/// printed under its prompt.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    model: String,
    /// LoRA adapter to apply to all prompts: PEFT folder. Or one per prompt, in the same order; `-` means none.
    ///
    /// Sequences with the same adapter are decoded together. Each text is the same as if its prompt ran alone.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Prompt to continue. May be repeated; each text is then labeled with its prompt.
    #[arg(long, value_name = "TEXT", required_unless_present = "ids")]
    prompt: Vec<String>,
    /// Prompts as token ids: JSON file `{"input_ids": [[…], …]}`.
    #[arg(long, value_name = "FILE.json", conflicts_with = "prompt")]
    ids: Option<PathBuf>,
    /// Maximum number of sequences decoded together.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    batch: u64,
    /// Format each prompt as a user message, with the chat template.
    #[arg(long, conflicts_with = "ids")]
    chat: bool,
    /// Maximum number of new tokens per prompt.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: u64,
    /// Print JSON instead of text: one object, or a list with one object per prompt if there are several.
    #[arg(long)]
    json: bool,
    /// Print the log-probability of every new token, and those of the N most likely tokens at its position. Needs --json.
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    speculation: SpeculationArgs,
}

/// A prompt: its tokens, and what an answer is labeled with.
struct Prompt {
    ids: Vec<u32>,
    label: String,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let model = ModelArgs {
        model: args.model.clone(),
        adapter: adapters::only(&args.adapter),
        device: args.device.clone(),
    };
    let opened = model.open(console)?;
    let prompts = prompts(args, &opened)?;
    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max();
    let extent = GenerationExtent {
        sequences: prompts.len().min(args.batch as usize).max(1),
        context: longest
            .unwrap_or(0)
            .saturating_add(args.max_tokens as usize),
    };
    let mut engine = opened.engine(args.engine, args.speculation, extent, console)?;
    let completions = start(args, &opened, &prompts, &mut engine, console)?;
    match <[Completion; 1]>::try_from(completions) {
        Ok([completion]) if !args.json => {
            let completed = stream(completion, &mut engine, console)?;
            console.note(summary(&completed.generation));
        }
        completions => {
            let completions = completions.map_or_else(|several| several, Vec::from);
            let completed = generate_batch(args, &mut engine, completions, console)?;
            let tokenizer = opened.tokenizer.as_deref();
            print(args, &engine, &prompts, &completed, tokenizer, console)?;
        }
    }
    if let Some(traffic) = engine.model.expert_traffic() {
        console.note(cache_summary(traffic));
    }
    console.memory();
    Ok(ExitCode::SUCCESS)
}

fn prompts(args: &Args, opened: &Opened) -> anyhow::Result<Vec<Prompt>> {
    if let Some(file) = &args.ids {
        let rows = (1..).zip(data::read_ids(file)?);
        let prompt = |(row, ids)| Prompt {
            ids,
            label: format!("row {row} of {}", file.display()),
        };
        return Ok(rows.map(prompt).collect());
    }
    let tokenizer = if args.chat {
        opened.expect_chat_template()?
    } else {
        opened.expect_tokenizer()?
    };
    let prompt = |text: &String| {
        let ids = if args.chat {
            question(tokenizer, text)?
        } else {
            tokenizer.encode(text, Bos::Add)?
        };
        let label = printable(text, &[]);
        Ok(Prompt { ids, label })
    };
    args.prompt.iter().map(prompt).collect()
}

/// The token ids of a user message in the tokenizer's chat template.
pub(crate) fn question(tokenizer: &Tokenizer, text: &str) -> anyhow::Result<Vec<u32>> {
    let messages = [message("user", text)];
    Ok(chat_prompt(tokenizer, &messages, GenerationPrompt::Add)?)
}

/// The completions of all prompts, each with its adapter.
fn start(
    args: &Args,
    opened: &Opened,
    prompts: &[Prompt],
    engine: &mut Engine,
    console: &Console,
) -> anyhow::Result<Vec<Completion>> {
    let config = GenerateConfig {
        max_tokens: args.max_tokens as usize,
        sample: args.sampling.config(&opened.folder)?,
        stop_ids: args.sampling.stop_ids(opened, console)?,
        logprobs: args.logprobs,
    };
    let adapters = adapters::add(&args.adapter, prompts.len(), engine, console)?;
    let started = prompts.iter().zip(adapters).map(|(prompt, adapter)| {
        let sequence = match adapter {
            Some(index) => engine.start_with_adapter(index, &prompt.ids, &config)?,
            None => engine.start(&prompt.ids, &config)?,
        };
        let tokenizer = opened.tokenizer.clone();
        Completion::new(sequence, tokenizer, &args.sampling.stop).context("--stop")
    });
    started.collect()
}

/// Continues one prompt, and shows the text as soon as it is complete.
fn stream(
    mut completion: Completion,
    engine: &mut Engine,
    console: &Console,
) -> anyhow::Result<Completed> {
    let mut prefill = PrefillProgress::new(completion.sequence(), console);
    while completion.finish_reason().is_none() {
        let piece = completion.step(engine)?;
        prefill.update(completion.sequence());
        console.stream(piece);
    }
    let completed = completion.finish()?;
    console.stream(format_args!("{}\n", completed.rest));
    Ok(completed)
}

/// Continues several prompts together, with one progress bar.
fn generate_batch(
    args: &Args,
    engine: &mut Engine,
    completions: Vec<Completion>,
    console: &Console,
) -> anyhow::Result<Vec<Completed>> {
    let mut n_tokens = vec![0; completions.len()];
    let total = completions.len() * args.max_tokens as usize;
    let mut progress = console.progress(total as u64, "tokens");
    let on_step = &mut |output: StepOutput<'_>| {
        n_tokens[output.number] = match output.completion.finish_reason() {
            // A text that ended early does not use the rest of its tokens.
            Some(_) => args.max_tokens as usize,
            None => output.completion.sequence().token_ids().len(),
        };
        progress.update(n_tokens.iter().sum::<usize>() as u64, "");
    };
    let completed = engine.complete_all(completions, args.batch as usize, on_step);
    progress.finish();
    Ok(completed?)
}

/// Prints JSON, or each answer under its prompt.
fn print(
    args: &Args,
    engine: &Engine,
    prompts: &[Prompt],
    completed: &[Completed],
    tokenizer: Option<&Tokenizer>,
    console: &Console,
) -> anyhow::Result<()> {
    let mut objects = Vec::new();
    for (number, (prompt, completed)) in (1..).zip(prompts.iter().zip(completed)) {
        if args.json {
            let mut object = object(prompt.ids.len(), completed, tokenizer)?;
            if let Some(traffic) = engine.model.expert_traffic() {
                object["expert_cache"] = cache_object(traffic);
            }
            objects.push(object);
            continue;
        }
        let gap = if number == 1 { "" } else { "\n" };
        console.result(format_args!(
            "{gap}[{number}/{}] {}\n{}",
            prompts.len(),
            prompt.label,
            completed.text
        ));
        console.note(summary(&completed.generation));
    }
    match objects.len() {
        0 => {}
        1 => console.result(objects.remove(0)),
        _ => console.result(Value::from(objects)),
    }
    Ok(())
}

/// Progress of reading a prompt that takes more than one step.
struct PrefillProgress<'a> {
    console: &'a Console,
    progress: Option<Progress>,
    tokens: usize,
}

impl<'a> PrefillProgress<'a> {
    fn new(sequence: &Sequence, console: &'a Console) -> Self {
        Self {
            console,
            progress: None,
            tokens: sequence.unread_tokens(),
        }
    }

    /// Updates the progress bar, and removes it before the first word of the answer.
    fn update(&mut self, sequence: &Sequence) {
        let left = sequence.unread_tokens();
        if left == 0 {
            if let Some(progress) = self.progress.take() {
                progress.finish();
            }
            return;
        }
        let begin = || self.console.progress(self.tokens as u64, "prompt tokens");
        let progress = self.progress.get_or_insert_with(begin);
        progress.update((self.tokens - left) as u64, "");
    }
}
