//! `generate`: what the model writes after a prompt.

mod adapters;
pub(crate) mod chat;
mod sampling;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use data::{Bos, ChatTemplate, GenerationPrompt, Special, Tokenizer};
use infer::{Engine, GenerateConfig, Generation, Logprobs, Sequence, Stop, TextStream};
use serde_json::{Value, json};

use self::sampling::SamplingArgs;
use crate::console::{Console, Progress};
use crate::open::{DeviceName, EngineArgs, ModelArgs, Opened, cache_object, cache_summary};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    model: String,
    /// Folder of a LoRA adapter (PEFT) to attach. Several are held over one base, one for each prompt in their order; `-` is
    /// none.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Where to compute. This build has the CPU only.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// Text to continue. May be repeated.
    #[arg(long, value_name = "TEXT", required_unless_present = "ids")]
    prompt: Vec<String>,
    /// JSON file with rows of token ids to continue: `{"input_ids": [[…], …]}`.
    #[arg(long, value_name = "FILE.json", conflicts_with = "prompt")]
    ids: Option<PathBuf>,
    /// Prompts that are continued side by side, where there are several.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    batch: u64,
    /// Put the prompt to the model as a user's message, with the chat template.
    #[arg(long, conflicts_with = "ids")]
    chat: bool,
    /// Most new tokens.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// With --json: how probable the model found every new token, and the N likeliest in its place.
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    /// Print one JSON object instead of text; several prompts give a list of them.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let model = ModelArgs {
        model: args.model.clone(),
        adapter: adapters::only(&args.adapter),
        device: args.device,
    };
    let opened = model.open(console)?;
    let prompts = prompts(args, &opened)?;
    let config = GenerateConfig {
        max_tokens: args.max_tokens,
        sample: args.sampling.config(&opened.folder)?,
        stop_ids: args.sampling.stop_ids(&opened)?,
        logprobs: args.logprobs,
    };
    let (mut engine, tokenizer) = (
        opened.engine(args.engine, console)?,
        opened.tokenizer.as_ref(),
    );
    let adapted = adapters::hold(&args.adapter, prompts.len(), &mut engine, console)?;
    let mut writings = Vec::new();
    for _ in &prompts {
        writings.push(Writing::new(tokenizer, &args.sampling.stop)?);
    }
    match (prompts.as_slice(), writings.pop()) {
        ([prompt], Some(writing)) if !args.json => {
            let generation = stream(&mut engine, prompt, &config, (writing, console))?;
            console.note(summary(&generation));
        }
        (_, last) => {
            writings.extend(last);
            let begun = prompts
                .iter()
                .zip(&adapted)
                .map(|(prompt, adapted)| match adapted {
                    Some(number) => engine.begin_adapted(*number, prompt, &config),
                    None => engine.begin(prompt, &config),
                });
            let begun = begun.collect::<Result<Vec<_>, _>>()?;
            together(args, &mut engine, (&prompts, begun), (writings, console))?;
        }
    }
    if let Some(traffic) = engine.model.expert_traffic() {
        console.note(cache_summary(traffic));
    }
    console.memory();
    Ok(ExitCode::SUCCESS)
}

/// What a sequence writes: text where there is a tokenizer, ids where there is none.
struct Writing<'a> {
    tokenizer: Option<&'a Tokenizer>,
    stream: Option<TextStream<'a>>,
    /// All of it so far.
    text: String,
}

impl<'a> Writing<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, stops: &[String]) -> anyhow::Result<Self> {
        if tokenizer.is_none() && !stops.is_empty() {
            bail!("--stop: expected a model with a tokenizer, found none");
        }
        let stream = tokenizer.map(|tokenizer| TextStream::new(tokenizer, stops));
        Ok(Self {
            tokenizer,
            stream: stream.transpose()?,
            text: String::new(),
        })
    }

    /// What a step added that is certain. A string that ends the text ends the sequence.
    fn step(&mut self, sequence: &mut Sequence) -> anyhow::Result<String> {
        let Some(id) = sequence.new_token() else {
            return Ok(String::new());
        };
        let piece = match &mut self.stream {
            None => format!("{id} "),
            Some(stream) => {
                let piece = stream.step(id)?;
                if stream.stopped_by().is_some() {
                    sequence.stop();
                }
                piece
            }
        };
        self.text += &piece;
        Ok(piece)
    }

    /// What was held back, once the sequence has ended.
    fn finish(&mut self) -> anyhow::Result<String> {
        let rest = self.stream.take().map(TextStream::finish).transpose()?;
        let rest = rest.unwrap_or_default();
        self.text += &rest;
        Ok(rest)
    }
}

/// Continues several prompts side by side, and prints what came after each in their order.
fn together(
    args: &Args,
    engine: &mut Engine,
    (prompts, begun): (&[Vec<u32>], Vec<Sequence>),
    (mut writings, console): (Vec<Writing<'_>>, &Console),
) -> anyhow::Result<()> {
    let whole = prompts.len() * args.max_tokens;
    let mut progress = console.progress(whole as u64, "tokens");
    let (mut written, mut problem) = (vec![0; prompts.len()], None);
    let on_step = &mut |number: usize, sequence: &mut Sequence| {
        if let Err(found) = writings[number].step(sequence) {
            problem.get_or_insert(found);
            sequence.stop();
        }
        written[number] = match sequence.stopped() {
            // What an ended text did not use of its tokens is done with too.
            Some(_) => args.max_tokens,
            None => sequence.token_ids().len(),
        };
        progress.update(written.iter().sum::<usize>() as u64, "");
    };
    let generations = engine.finish_all(begun, args.batch as usize, on_step)?;
    progress.finish();
    if let Some(problem) = problem {
        return Err(problem);
    }

    let mut objects = Vec::new();
    for ((prompt, generation), mut writing) in prompts.iter().zip(&generations).zip(writings) {
        writing.finish()?;
        if args.json {
            let mut object = object(prompt, generation, &writing)?;
            if let Some(traffic) = engine.model.expert_traffic() {
                object["expert_cache"] = cache_object(traffic);
            }
            objects.push(object);
        } else {
            console.result(writing.text);
            console.note(summary(generation));
        }
    }
    match objects.len() {
        0 => {}
        1 => console.result(objects.remove(0)),
        _ => console.result(Value::from(objects)),
    }
    Ok(())
}

fn prompts(args: &Args, opened: &Opened) -> anyhow::Result<Vec<Vec<u32>>> {
    if let Some(file) = &args.ids {
        return Ok(data::read_ids(file)?);
    }
    let texts = args.prompt.iter();
    if args.chat {
        let (tokenizer, template) = opened.expect_chat_template()?;
        return texts
            .map(|text| question(tokenizer, template, text))
            .collect();
    }
    let tokenizer = opened.expect_tokenizer()?;
    texts
        .map(|text| Ok(tokenizer.encode(text, Bos::Add)?))
        .collect()
}

/// The ids of a user's message, put with a chat template.
pub(crate) fn question(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    text: &str,
) -> anyhow::Result<Vec<u32>> {
    let message = json!({"role": "user", "content": text});
    let text = template.render(&[message], None, GenerationPrompt::Add)?;
    Ok(tokenizer.encode(&text, Bos::Never)?)
}

/// Generates, and shows text as soon as it is complete.
fn stream(
    engine: &mut Engine,
    prompt: &[u32],
    config: &GenerateConfig,
    (mut writing, console): (Writing<'_>, &Console),
) -> anyhow::Result<Generation> {
    let mut sequence = engine.begin(prompt, config)?;
    let mut reading = Reading::new(&sequence, console);
    while sequence.stopped().is_none() {
        engine.step([&mut sequence])?;
        reading.update(&sequence);
        console.stream(writing.step(&mut sequence)?);
    }
    console.stream(format_args!("{}\n", writing.finish()?));
    Ok(sequence.finish().0)
}

/// Progress in reading a prompt; there is none where one step reads it.
struct Reading<'a> {
    console: &'a Console,
    progress: Option<Progress>,
    tokens: usize,
}

impl<'a> Reading<'a> {
    fn new(sequence: &Sequence, console: &'a Console) -> Self {
        Self {
            console,
            progress: None,
            tokens: sequence.unread_tokens(),
        }
    }

    /// Shows how far it is; takes the bar away before the first word of the answer.
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

fn object(prompt: &[u32], generation: &Generation, writing: &Writing<'_>) -> anyhow::Result<Value> {
    let [prefill, decode_rate] = rates(generation);
    let mut object = json!({
        "token_ids": generation.token_ids,
        "text": writing.tokenizer.map(|_| &writing.text),
        "prompt_tokens": prompt.len(),
        "stopped": match generation.stopped {
            Stop::EndOfText(_) => "end_of_text",
            Stop::MaxTokens => "max_tokens",
            Stop::Caller => "stop_string",
        },
        "prefill_tokens_per_sec": prefill,
        "decode_tokens_per_sec": decode_rate,
        "guessed": generation.guessed,
        "guessed_right": generation.guessed_right,
    });
    let tokens = generation.token_ids.iter().zip(&generation.logprobs);
    let logprobs = tokens.map(|(id, logprobs)| logprobs_object(*id, logprobs, writing.tokenizer));
    let logprobs = logprobs.collect::<anyhow::Result<Vec<_>>>()?;
    if !logprobs.is_empty() {
        object["logprobs"] = logprobs.into();
    }
    Ok(object)
}

/// A token with its logprob, and the likeliest in its place.
fn logprobs_object(
    id: u32,
    logprobs: &Logprobs,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Value> {
    let one = |id: u32, logprob: f64| {
        let text = tokenizer.map(|tokenizer| tokenizer.decode(&[id], Special::Keep));
        let text = text.transpose()?;
        anyhow::Ok(json!({"id": id, "text": text, "logprob": logprob}))
    };
    let mut object = one(id, logprobs.chosen)?;
    let top = logprobs.top.iter().map(|(id, logprob)| one(*id, *logprob));
    object["top"] = top.collect::<anyhow::Result<Vec<_>>>()?.into();
    Ok(object)
}

fn summary(generation: &Generation) -> String {
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(" ({rate:.1}/s)"));
    let [prefill, decode] = rates(generation).map(rate);
    let why = match generation.stopped {
        Stop::EndOfText(_) => "at the end of its text",
        Stop::MaxTokens => "at --max-tokens",
        Stop::Caller => "early, as asked",
    };
    let (read, written) = (generation.prefill_tokens, generation.token_ids.len());
    let guessed = match (generation.guessed_right, generation.guessed) {
        (_, 0) => String::new(),
        (right, guessed) => {
            let share = 100.0 * right as f64 / guessed as f64;
            format!(", {right} of {guessed} guesses right ({share:.0} %)")
        }
    };
    format!("{read} tokens read{prefill}, {written} written{decode}{guessed}, stopped {why}")
}

/// Tokens read, and tokens chosen after the first, per second; none where nothing was measured.
fn rates(generation: &Generation) -> [Option<f64>; 2] {
    let rate = |count: usize, secs: f64| (count > 0 && secs > 0.0).then(|| count as f64 / secs);
    [
        rate(generation.prefill_tokens, generation.prefill_secs),
        rate(generation.decode_steps, generation.decode_secs),
    ]
}
