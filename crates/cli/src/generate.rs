//! `generate`: what the model writes after a prompt.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use data::{Bos, ChatTemplate, DecodeStream, GenerationPrompt, Special, Tokenizer};
use infer::{Engine, GenerateConfig, Generation, SampleConfig, Sequence, Stop};
use model::Compute;
use serde_json::{Value, json};

use crate::console::{Console, Progress};
use crate::open::{ModelArgs, Opened};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to continue. May be repeated.
    #[arg(long, value_name = "TEXT", required_unless_present = "ids")]
    pub(crate) prompt: Vec<String>,
    /// JSON file with rows of token ids to continue: `{"input_ids": [[…], …]}`.
    #[arg(long, value_name = "FILE.json", conflicts_with = "prompt")]
    pub(crate) ids: Option<PathBuf>,
    /// Prompts that are continued side by side, where there are several.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    pub(crate) batch: u64,
    /// Put the prompt to the model as a user's message, with the chat template.
    #[arg(long, conflicts_with = "ids")]
    pub(crate) chat: bool,
    /// Most new tokens.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token. Default: generation_config.json's if it samples, else 0.
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Mass of the likeliest tokens to draw from. Default: generation_config.json's if it samples, else 1.
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Where the random numbers start.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Go on after tokens that end a text.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object instead of text; several prompts give a list of them.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let opened = args.model.open(console)?;
    let prompts = prompts(args, &opened)?;
    let config = config(args, &opened)?;
    let Opened {
        model,
        tokenizer,
        device,
        ..
    } = opened;
    let engine = Engine {
        model,
        compute: Compute::Int8,
        device,
    };
    let tokenizer = tokenizer.as_ref();
    match prompts.as_slice() {
        [prompt] if !args.json => {
            let generation = stream(&engine, prompt, &config, (tokenizer, console))?;
            console.note(summary(&generation));
        }
        _ => together(args, (&engine, tokenizer), &prompts, &config, console)?,
    }
    console.memory();
    Ok(ExitCode::SUCCESS)
}

/// Continues several prompts side by side, and prints what came after each in their order.
fn together(
    args: &Args,
    (engine, tokenizer): (&Engine, Option<&Tokenizer>),
    prompts: &[Vec<u32>],
    config: &GenerateConfig,
    console: &Console,
) -> anyhow::Result<()> {
    let whole = prompts.len() * config.max_tokens;
    let mut progress = console.progress(whole as u64, "tokens");
    let mut written = vec![0; prompts.len()];
    let on_step = &mut |number: usize, sequence: &mut Sequence| {
        written[number] = match sequence.stopped() {
            // What an ended text did not use of its tokens is done with too.
            Some(_) => config.max_tokens,
            None => sequence.token_ids().len(),
        };
        progress.update(written.iter().sum::<usize>() as u64, "");
    };
    let generations = engine.generate_all(prompts, config, args.batch as usize, on_step)?;
    progress.finish();

    let mut objects = Vec::new();
    for (prompt, generation) in prompts.iter().zip(&generations) {
        let text = tokenizer
            .map(|tokenizer| tokenizer.decode(&generation.token_ids, Special::Skip))
            .transpose()?;
        if args.json {
            objects.push(object(prompt, generation, text));
        } else {
            console.result(text.unwrap_or_else(|| listed(&generation.token_ids)));
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

/// Ids, where there is no tokenizer that could say what they mean.
fn listed(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    ids.join(" ")
}

fn prompts(args: &Args, opened: &Opened) -> anyhow::Result<Vec<Vec<u32>>> {
    if let Some(file) = &args.ids {
        return Ok(data::read_ids(file)?);
    }
    let tokenizer = opened.expect_tokenizer()?;
    if !args.chat {
        let texts = args.prompt.iter();
        let prompts = texts.map(|text| Ok(tokenizer.encode(text, Bos::Add)?));
        return prompts.collect();
    }
    let template = tokenizer.chat_template().with_context(|| {
        let folder = opened.folder.path().display();
        format!("{folder}: expected a chat template for `--chat`, found none")
    })?;
    let texts = args.prompt.iter();
    texts
        .map(|text| question(tokenizer, template, text))
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

fn config(args: &Args, opened: &Opened) -> anyhow::Result<GenerateConfig> {
    let eos = opened.tokenizer.as_ref().and_then(Tokenizer::eos_id);
    let (temperature, top_p) = published_sampling(opened.folder.generation_config());
    Ok(GenerateConfig {
        max_tokens: args.max_tokens,
        sample: SampleConfig {
            temperature: args.temperature.unwrap_or(temperature),
            top_p: args.top_p.unwrap_or(top_p),
            seed: args.seed,
        },
        stop_ids: if args.ignore_eos {
            Vec::new()
        } else {
            infer::end_of_text_ids(&opened.folder, eos)?
        },
    })
}

/// Temperature and top-p as a model's publisher recommends them. Without a word of sampling, the likeliest token.
fn published_sampling(config: Option<&Value>) -> (f32, f32) {
    let samples = |config: &&Value| config.get("do_sample").and_then(Value::as_bool) == Some(true);
    let Some(config) = config.filter(samples) else {
        return (0.0, 1.0);
    };
    // Absent ones are 1 in Hugging Face's tools.
    let number = |key| config.get(key).and_then(Value::as_f64).unwrap_or(1.0) as f32;
    (number("temperature"), number("top_p"))
}

/// Generates, and shows text as soon as it is complete: ids where there is no tokenizer.
fn stream(
    engine: &Engine,
    prompt: &[u32],
    config: &GenerateConfig,
    (tokenizer, console): (Option<&Tokenizer>, &Console),
) -> anyhow::Result<Generation> {
    let mut text = tokenizer.map(|tokenizer| tokenizer.decode_stream(Special::Skip));
    let mut sequence = engine.begin(prompt, config)?;
    let mut reading = Reading::new(&sequence, console);
    while sequence.stopped().is_none() {
        engine.step([&mut sequence])?;
        reading.update(&sequence);
        let Some(id) = sequence.new_token() else {
            continue;
        };
        match &mut text {
            Some(text) => console.stream(text.step(id)?.unwrap_or_default()),
            None => console.stream(format_args!("{id} ")),
        }
    }
    let rest = text.map(DecodeStream::finish).transpose()?.flatten();
    console.stream(format_args!("{}\n", rest.unwrap_or_default()));
    Ok(sequence.finish().0)
}

/// Progress in reading a prompt that takes several steps.
pub(crate) struct Reading {
    progress: Option<Progress>,
    tokens: usize,
}

impl Reading {
    pub(crate) fn new(sequence: &Sequence, console: &Console) -> Self {
        let tokens = sequence.unread_tokens();
        let progress = console.progress(tokens as u64, "prompt tokens");
        Self {
            progress: Some(progress),
            tokens,
        }
    }

    /// Shows how far it is; takes the bar away before the first word of the answer.
    pub(crate) fn update(&mut self, sequence: &Sequence) {
        let left = sequence.unread_tokens();
        if left > 0 {
            if let Some(progress) = &mut self.progress {
                progress.update((self.tokens - left) as u64, "");
            }
        } else if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }
}

fn object(prompt: &[u32], generation: &Generation, text: Option<String>) -> Value {
    let [prefill, decode_rate] = rates(generation);
    json!({
        "token_ids": generation.token_ids,
        "text": text,
        "prompt_tokens": prompt.len(),
        "stopped": match generation.stopped {
            Stop::EndOfText(_) => "end_of_text",
            Stop::MaxTokens => "max_tokens",
            Stop::Caller => "caller",
        },
        "prefill_tokens_per_sec": prefill,
        "decode_tokens_per_sec": decode_rate,
    })
}

fn summary(generation: &Generation) -> String {
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(" ({rate:.1}/s)"));
    let [prefill, decode] = rates(generation).map(rate);
    let why = match generation.stopped {
        Stop::EndOfText(_) => "at the end of its text",
        Stop::MaxTokens => "at --max-tokens",
        Stop::Caller => "early",
    };
    let (read, written) = (generation.prefill_tokens, generation.token_ids.len());
    format!("{read} tokens read{prefill}, {written} written{decode}, stopped {why}")
}

/// Tokens read and passes made per second; none where nothing was measured.
fn rates(generation: &Generation) -> [Option<f64>; 2] {
    let rate = |count: usize, secs: f64| (count > 0 && secs > 0.0).then(|| count as f64 / secs);
    [
        rate(generation.prefill_tokens, generation.prefill_secs),
        rate(generation.decode_steps, generation.decode_secs),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_what_the_publisher_recommends() {
        let check = |config: Value, expected| {
            assert_eq!(published_sampling(Some(&config)), expected, "{config}");
        };
        check(
            json!({"do_sample": true, "temperature": 0.5, "top_p": 0.75}),
            (0.5, 0.75),
        );
        check(json!({"do_sample": true}), (1.0, 1.0));
        check(json!({"do_sample": false, "temperature": 0.5}), (0.0, 1.0));
        check(json!({"temperature": 0.5}), (0.0, 1.0));
        assert_eq!(published_sampling(None), (0.0, 1.0));
    }
}
