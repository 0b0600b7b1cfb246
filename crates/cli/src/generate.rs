//! `generate`: what the model writes after a prompt.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use data::{Bos, ChatTemplate, GenerationPrompt, Special, Tokenizer};
use infer::{Engine, GenerateConfig, Generation, SampleConfig, Stop};
use model::Compute;
use serde_json::{Value, json};

use crate::console::Console;
use crate::open::{ModelArgs, Opened};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to continue.
    #[arg(long, value_name = "TEXT", required_unless_present = "ids")]
    pub(crate) prompt: Option<String>,
    /// JSON file with rows of token ids to continue, each in turn: `{"input_ids": [[…], …]}`.
    #[arg(long, value_name = "FILE.json", conflicts_with = "prompt")]
    pub(crate) ids: Option<PathBuf>,
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
    /// Print one JSON object instead of text; several rows of ids give a list of them.
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
    let (engine, tokenizer) = (Engine { model, device }, tokenizer.as_ref());

    let mut objects = Vec::new();
    for prompt in &prompts {
        if args.json {
            let generation =
                engine.generate(prompt, &config, &mut |_| ControlFlow::Continue(()))?;
            objects.push(object(prompt, &generation, tokenizer)?);
        } else {
            let generation = stream(&engine, prompt, &config, (tokenizer, console))?;
            console.note(summary(prompt, &generation));
        }
    }
    match objects.len() {
        0 => {}
        1 => console.result(objects.remove(0)),
        _ => console.result(Value::from(objects)),
    }
    console.memory();
    Ok(ExitCode::SUCCESS)
}

fn prompts(args: &Args, opened: &Opened) -> anyhow::Result<Vec<Vec<u32>>> {
    if let Some(file) = &args.ids {
        return Ok(data::read_ids(file)?);
    }
    let text = args.prompt.as_deref().unwrap_or_default();
    let tokenizer = opened.expect_tokenizer()?;
    if !args.chat {
        return Ok(vec![tokenizer.encode(text, Bos::Add)?]);
    }
    let template = tokenizer.chat_template().with_context(|| {
        let folder = opened.folder.path().display();
        format!("{folder}: expected a chat template for `--chat`, found none")
    })?;
    Ok(vec![question(tokenizer, template, text)?])
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
        compute: Compute::Int8,
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
    let Some(tokenizer) = tokenizer else {
        let generation = engine.generate(prompt, config, &mut |id| {
            console.stream(format_args!("{id} "));
            ControlFlow::Continue(())
        })?;
        console.stream("\n");
        return Ok(generation);
    };
    let mut text = tokenizer.decode_stream(Special::Skip);
    let mut problem = None;
    let generation = engine.generate(prompt, config, &mut |id| match text.step(id) {
        Ok(piece) => {
            console.stream(piece.unwrap_or_default());
            ControlFlow::Continue(())
        }
        Err(error) => {
            problem = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = problem {
        return Err(error.into());
    }
    console.stream(format_args!("{}\n", text.finish()?.unwrap_or_default()));
    Ok(generation)
}

fn object(
    prompt: &[u32],
    generation: &Generation,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Value> {
    let decode = |tokenizer: &Tokenizer| tokenizer.decode(&generation.token_ids, Special::Skip);
    let [prefill, decode_rate] = rates(prompt, generation);
    Ok(json!({
        "token_ids": generation.token_ids,
        "text": tokenizer.map(decode).transpose()?,
        "prompt_tokens": prompt.len(),
        "stopped": match generation.stopped {
            Stop::EndOfText(_) => "end_of_text",
            Stop::MaxTokens => "max_tokens",
            Stop::Caller => "caller",
        },
        "prefill_tokens_per_sec": prefill,
        "decode_tokens_per_sec": decode_rate,
    }))
}

fn summary(prompt: &[u32], generation: &Generation) -> String {
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(" ({rate:.1}/s)"));
    let [prefill, decode] = rates(prompt, generation).map(rate);
    let why = match generation.stopped {
        Stop::EndOfText(_) => "at the end of its text",
        Stop::MaxTokens => "at --max-tokens",
        Stop::Caller => "early",
    };
    let (read, written) = (prompt.len(), generation.token_ids.len());
    format!("{read} tokens read{prefill}, {written} written{decode}, stopped {why}")
}

/// Tokens read and passes made per second; none where nothing was measured.
fn rates(prompt: &[u32], generation: &Generation) -> [Option<f64>; 2] {
    let rate = |count: usize, secs: f64| (count > 0 && secs > 0.0).then(|| count as f64 / secs);
    [
        rate(prompt.len(), generation.prefill_secs),
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
