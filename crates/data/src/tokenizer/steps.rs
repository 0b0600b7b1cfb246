//! The steps that a text goes through before and after a tokenizer's model, with bounds on what they can do.
//!
//! A `tokenizer.json` is a program for texts: its normalizers, pre-tokenizers and decoders run one after another, and a step may
//! make a text longer. Thirty small steps that double it need more memory than any machine has, and a regular expression may
//! search for longer than anybody waits. Here a text may become [`MOST_GROWTH`] times as long, and searches take the time that
//! a budget grants them. Each text that is encoded or decoded goes through these steps, and so does each added token.
//!
//! The work of a step is that of the `tokenizers` library, except replacing and splitting by a pattern, where the searches are
//! counted.

use serde::de::DeserializeOwned;
use serde_json::Value;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokenizers::tokenizer::pattern::{Invert, Pattern};
use tokenizers::utils::SysRegex;
use tokenizers::{
    Decoder, DecoderWrapper, NormalizedString, Normalizer, NormalizerWrapper, Offsets,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Result, SplitDelimiterBehavior,
};

use super::charsmap::longest_replacement;

/// How many times as long a text may become. One character may become eighteen (NFKC), a space three bytes (SentencePiece),
/// each byte two (byte-level).
const MOST_GROWTH: usize = 64;
/// Short texts may grow by more: by what is put before them.
const ANY_GROWTH: usize = 256;
/// Published tokenizers have at most a dozen.
const MOST_STEPS: usize = 64;
/// Sequences of sequences.
const MOST_DEPTH: usize = 8;
/// The longest text in a step, a pattern. The longest published one has two thousand bytes.
const MOST_TEXT_BYTES: usize = 1 << 14;
/// The longest character map. SentencePiece's own has 320 thousand bytes.
const MOST_CHARSMAP_BYTES: usize = 1 << 20;
/// Values in all steps.
const MOST_VALUES: usize = 1 << 14;
/// Searches with a published pattern take less than a hundredth of this.
const SEARCH_TIME: Duration = Duration::from_secs(1);
const SEARCH_TIME_PER_BYTE: Duration = Duration::from_micros(10);
/// Matches between two looks at the clock. A single search ends by itself: the engine gives up after a million attempts.
const MATCHES_PER_LOOK: u32 = 32;

/// Steps that run one after another.
#[derive(Clone, Debug)]
pub(super) struct Steps<T>(Vec<T>);

/// A step that changes a text before it is split.
#[derive(Clone, Debug)]
pub(super) enum NormalizeStep {
    Replace(TextReplacement),
    Other(NormalizerWrapper),
}

/// A step that splits a text.
#[derive(Clone, Debug)]
pub(super) enum SplitStep {
    Pattern {
        pattern: Arc<SysRegex>,
        behavior: SplitDelimiterBehavior,
        is_inverted: bool,
    },
    Other(PreTokenizerWrapper),
}

/// A step that turns tokens into text.
#[derive(Clone, Debug)]
pub(super) enum DecodeStep {
    Replace(TextReplacement),
    Other(DecoderWrapper),
}

/// What matches a pattern becomes another text.
#[derive(Clone, Debug)]
pub(super) struct TextReplacement {
    pattern: Arc<SysRegex>,
    content: String,
}

/// A bound was exceeded where the library has no way to say so.
pub(super) struct Exceeded(pub(super) String);

impl Steps<NormalizeStep> {
    /// The steps of a `normalizer`; none if it is null.
    ///
    /// # Errors
    /// If it is malformed, or asks for too much.
    pub(super) fn normalizer(json: Value) -> Result<Option<Self>> {
        let steps = read::<NormalizerWrapper>("normalizer", json)?;
        let steps = steps.map(|root| {
            let mut steps = Vec::new();
            flatten(&root, &normalizers, &mut |step| {
                steps.push(NormalizeStep::new(step)?);
                Ok(())
            })?;
            Ok(Self(steps))
        });
        steps.transpose()
    }
}

fn normalizers(step: &NormalizerWrapper) -> Option<&[NormalizerWrapper]> {
    match step {
        NormalizerWrapper::Sequence(steps) => Some(steps.as_ref()),
        _ => None,
    }
}

impl NormalizeStep {
    fn new(step: &NormalizerWrapper) -> Result<Self> {
        match step {
            NormalizerWrapper::Replace(step) => Ok(Self::Replace(TextReplacement::new(
                &serde_json::to_value(step)?,
            )?)),
            NormalizerWrapper::Precompiled(map) => {
                let map = serde_json::to_value(map)?;
                let longest = longest_replacement(&map["precompiled_charsmap"]);
                match longest {
                    Some(longest) if longest <= ANY_GROWTH => Ok(Self::Other(step.clone())),
                    Some(longest) => Err(format!(
                        "`normalizer`: expected a `Precompiled` map to at most {ANY_GROWTH} bytes, found {longest}"
                    )
                    .into()),
                    None => Err("`normalizer`: malformed `precompiled_charsmap`".into()),
                }
            }
            _ => Ok(Self::Other(step.clone())),
        }
    }
}

impl Normalizer for Steps<NormalizeStep> {
    /// # Panics
    /// With [`Exceeded`] if the text becomes too long: the library does not look at errors of normalizers.
    fn normalize(&self, text: &mut NormalizedString) -> Result<()> {
        let budget = SearchBudget::new("normalizer", text.get().len());
        for step in &self.0 {
            let done = match step {
                NormalizeStep::Replace(step) => step.replace(text, &budget),
                NormalizeStep::Other(step) => step.normalize(text),
            };
            let done = done.and_then(|()| budget.check_length(text.get().len()));
            if let Err(problem) = done {
                std::panic::resume_unwind(Box::new(Exceeded(problem.to_string())));
            }
        }
        Ok(())
    }
}

impl Steps<SplitStep> {
    /// The steps of a `pre_tokenizer`; none if it is null.
    ///
    /// # Errors
    /// If it is malformed, or asks for too much.
    pub(super) fn pre_tokenizer(json: Value) -> Result<Option<Self>> {
        let Some(root) = read::<PreTokenizerWrapper>("pre_tokenizer", json)? else {
            return Ok(None);
        };
        let (mut steps, mut growth) = (Vec::new(), 1usize);
        flatten(&root, &pre_tokenizers, &mut |step| {
            growth = growth.saturating_mul(SplitStep::growth(step));
            steps.push(SplitStep::new(step)?);
            Ok(())
        })?;
        if growth > MOST_GROWTH {
            return Err(format!(
                "`pre_tokenizer`: expected steps that make a text at most {MOST_GROWTH} times as long, found {growth} times"
            )
            .into());
        }
        Ok(Some(Self(steps)))
    }
}

fn pre_tokenizers(step: &PreTokenizerWrapper) -> Option<&[PreTokenizerWrapper]> {
    match step {
        PreTokenizerWrapper::Sequence(steps) => Some(steps.as_ref()),
        _ => None,
    }
}

impl SplitStep {
    fn new(step: &PreTokenizerWrapper) -> Result<Self> {
        let PreTokenizerWrapper::Split(split) = step else {
            return Ok(Self::Other(step.clone()));
        };
        let json = serde_json::to_value(split)?;
        Ok(Self::Pattern {
            pattern: pattern(&json)?,
            behavior: split.behavior,
            is_inverted: split.invert,
        })
    }

    /// How many times as long a step can make a text.
    fn growth(step: &PreTokenizerWrapper) -> usize {
        match step {
            // A byte beyond ASCII is a character of two bytes; a space before one byte is one more byte.
            PreTokenizerWrapper::ByteLevel(step) if step.add_prefix_space => 4,
            PreTokenizerWrapper::ByteLevel(_) => 2,
            // A space becomes a character, and another one stands before each piece.
            PreTokenizerWrapper::Metaspace(_) => 8,
            // These only split.
            _ => 1,
        }
    }
}

impl PreTokenizer for Steps<SplitStep> {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        // The length is known to be bounded, and asking for it takes time.
        let mut budget = None;
        for step in &self.0 {
            let SplitStep::Pattern {
                pattern,
                behavior,
                is_inverted,
            } = step
            else {
                let SplitStep::Other(step) = step else {
                    continue;
                };
                step.pre_tokenize(text)?;
                continue;
            };
            let budget =
                &*budget.get_or_insert_with(|| SearchBudget::new("pre_tokenizer", bytes_of(text)));
            let search = PatternSearch { pattern, budget };
            text.split(|_, piece| match is_inverted {
                true => piece.split(Invert(&search), *behavior),
                false => piece.split(&search, *behavior),
            })?;
        }
        Ok(())
    }
}

fn bytes_of(text: &PreTokenizedString) -> usize {
    use tokenizers::{OffsetReferential, OffsetType};
    let pieces = text.get_splits(OffsetReferential::Original, OffsetType::None);
    pieces.iter().map(|piece| piece.0.len()).sum()
}

impl Steps<DecodeStep> {
    /// The steps of a `decoder`; none if it is null.
    ///
    /// # Errors
    /// If it is malformed, or asks for too much.
    pub(super) fn decoder(json: Value) -> Result<Option<Self>> {
        let steps = read::<DecoderWrapper>("decoder", json)?;
        let steps = steps.map(|root| {
            let mut steps = Vec::new();
            flatten(&root, &decoders, &mut |step| {
                steps.push(match step {
                    DecoderWrapper::Replace(step) => {
                        DecodeStep::Replace(TextReplacement::new(&serde_json::to_value(step)?)?)
                    }
                    _ => DecodeStep::Other(step.clone()),
                });
                Ok(())
            })?;
            Ok(Self(steps))
        });
        steps.transpose()
    }
}

fn decoders(step: &DecoderWrapper) -> Option<&[DecoderWrapper]> {
    match step {
        DecoderWrapper::Sequence(steps) => Some(steps.get_decoders()),
        _ => None,
    }
}

impl Decoder for Steps<DecodeStep> {
    fn decode_chain(&self, mut tokens: Vec<String>) -> Result<Vec<String>> {
        let length = |tokens: &[String]| tokens.iter().map(String::len).sum::<usize>();
        let budget = SearchBudget::new("decoder", length(&tokens));
        for step in &self.0 {
            tokens = match step {
                DecodeStep::Replace(step) => {
                    let tokens = tokens.iter().map(|token| step.replaced(token, &budget));
                    tokens.collect::<Result<_>>()?
                }
                DecodeStep::Other(step) => step.decode_chain(tokens)?,
            };
            budget.check_length(length(&tokens))?;
        }
        Ok(tokens)
    }
}

impl TextReplacement {
    fn new(step: &Value) -> Result<Self> {
        let content = step["content"].as_str().unwrap_or_default().to_owned();
        Ok(Self {
            pattern: pattern(step)?,
            content,
        })
    }

    fn replace(&self, text: &mut NormalizedString, budget: &SearchBudget) -> Result<()> {
        let found = self.find(text.get(), budget)?;
        text.replace(Found(found), &self.content)
    }

    /// As the library's decoder does it.
    fn replaced(&self, text: &str, budget: &SearchBudget) -> Result<String> {
        let mut replaced = String::new();
        for ((start, end), is_match) in self.find(text, budget)? {
            replaced.push_str(match is_match {
                true => &self.content,
                false => text.get(start..end).unwrap_or_default(),
            });
        }
        Ok(replaced)
    }

    /// The matches, if what replaces them is not too long.
    fn find(&self, text: &str, budget: &SearchBudget) -> Result<Vec<(Offsets, bool)>> {
        let pattern = &*self.pattern;
        let found = (&PatternSearch { pattern, budget }).find_matches(text)?;
        let matches = found.iter().filter(|part| part.1).count();
        budget.check_length(matches.saturating_mul(self.content.len()))?;
        Ok(found)
    }
}

/// Matches that are known already.
struct Found(Vec<(Offsets, bool)>);

impl Pattern for Found {
    fn find_matches(&self, _: &str) -> Result<Vec<(Offsets, bool)>> {
        Ok(self.0.clone())
    }
}

/// What the steps may do with one text.
struct SearchBudget {
    section: &'static str,
    /// Bytes of the text at the beginning.
    length: usize,
    started: Instant,
    matches: Cell<u32>,
}

impl SearchBudget {
    fn new(section: &'static str, length: usize) -> Self {
        Self {
            section,
            length,
            started: Instant::now(),
            matches: Cell::new(0),
        }
    }

    fn check_length(&self, found: usize) -> Result<()> {
        let most = self
            .length
            .saturating_mul(MOST_GROWTH)
            .saturating_add(ANY_GROWTH);
        if found <= most {
            return Ok(());
        }
        let (section, length) = (self.section, self.length);
        Err(format!("the `{section}` makes {length} bytes longer than {most}").into())
    }

    /// Counts a match, and looks at the clock now and then.
    fn check_time(&self) -> Result<()> {
        self.matches.set(self.matches.get().wrapping_add(1));
        if !self.matches.get().is_multiple_of(MATCHES_PER_LOOK) {
            return Ok(());
        }
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        let most = SEARCH_TIME + SEARCH_TIME_PER_BYTE.saturating_mul(length);
        if self.started.elapsed() <= most {
            return Ok(());
        }
        let (section, length) = (self.section, self.length);
        Err(format!(
            "the patterns of the `{section}` search {length} bytes for longer than {most:.1?}"
        )
        .into())
    }
}

/// A pattern, and the budget of its searches.
struct PatternSearch<'a> {
    pattern: &'a SysRegex,
    budget: &'a SearchBudget,
}

impl Pattern for &PatternSearch<'_> {
    /// As the library finds them.
    fn find_matches(&self, text: &str) -> Result<Vec<(Offsets, bool)>> {
        if text.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let (mut parts, mut last) = (Vec::new(), 0);
        for (start, end) in self.pattern.find_iter(text) {
            self.budget.check_time()?;
            if last != start {
                parts.push(((last, start), false));
            }
            parts.push(((start, end), true));
            last = end;
        }
        if last != text.len() {
            parts.push(((last, text.len()), false));
        }
        Ok(parts)
    }
}

/// The pattern of a step that has one.
fn pattern(step: &Value) -> Result<Arc<SysRegex>> {
    let pattern = &step["pattern"];
    let regex = match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
        (Some(text), _) => SysRegex::new(&regex::escape(text)),
        (_, Some(regex)) => SysRegex::new(regex),
        _ => Err("expected a `pattern` of `String` or `Regex`".into()),
    };
    regex.map(Arc::new)
}

/// The library's form of a section; none if it is null.
fn read<T: DeserializeOwned>(section: &str, json: Value) -> Result<Option<T>> {
    check(section, &json)?;
    let read = serde_json::from_value(json);
    read.map_err(|problem| format!("`{section}`: {problem}").into())
}

/// Checks that a section is not far larger than any real one: reading it copies it once for each depth.
pub(super) fn check(section: &str, json: &Value) -> Result<()> {
    // Sequences are lists in objects, a pattern is an object, and the template of a post-processor is the deepest.
    const MOST_NESTED: usize = 2 * MOST_DEPTH + 4;

    let mut values = vec![(json, 0)];
    let mut seen = 0;
    while let Some((value, depth)) = values.pop() {
        seen += 1;
        let problem = |expected: String| Err(format!("`{section}`: expected {expected}").into());
        if seen > MOST_VALUES {
            return problem(format!("at most {MOST_VALUES} values, found more"));
        }
        if depth > MOST_NESTED {
            return problem(format!("at most {MOST_NESTED} levels, found more"));
        }
        match value {
            Value::Array(list) => values.extend(list.iter().map(|value| (value, depth + 1))),
            Value::Object(fields) => {
                for (key, value) in fields {
                    let most = match key.as_str() {
                        "precompiled_charsmap" => MOST_CHARSMAP_BYTES,
                        _ => MOST_TEXT_BYTES,
                    };
                    let length = key.len().max(value.as_str().map_or(0, str::len));
                    if length > most {
                        return problem(format!("texts of at most {most} bytes, found {length}"));
                    }
                    values.push((value, depth + 1));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Visits the steps of sequences of sequences in their order.
fn flatten<T>(
    step: &T,
    parts: &impl Fn(&T) -> Option<&[T]>,
    visit: &mut impl FnMut(&T) -> Result<()>,
) -> Result<()> {
    let mut left = vec![step];
    let mut seen = 0;
    while let Some(step) = left.pop() {
        match parts(step) {
            Some(parts) => left.extend(parts.iter().rev()),
            None => {
                seen += 1;
                if seen > MOST_STEPS {
                    return Err(format!("expected at most {MOST_STEPS} steps, found more").into());
                }
                visit(step)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::tests::folder;
    use crate::{Bos, Special, Tokenizer};
    use serde_json::{Value, json};

    /// What the golden tokenizer with other sections says to a short text, its first error.
    fn refusal(change: impl FnOnce(&mut Value)) -> Option<String> {
        let folder = folder(|file, _| change(file));
        let tokenizer = match Tokenizer::open(folder.path()) {
            Ok(tokenizer) => tokenizer,
            Err(problem) => return Some(problem.to_string()),
        };
        let ids = match tokenizer.encode("a naive bomb", Bos::Add) {
            Ok(ids) => ids,
            Err(problem) => return Some(problem.to_string()),
        };
        let decoded = tokenizer.decode(&ids, Special::Keep);
        decoded.err().map(|problem| problem.to_string())
    }

    fn check(section: &str, json: Value, expected: &str) {
        let found = refusal(|file| file[section] = json.clone()).unwrap_or_default();
        assert!(found.contains(expected), "{section} {json:.200}: {found}");
    }

    fn sequence(parts: &str, step: &Value, n: usize) -> Value {
        let mut sequence = json!({"type": "Sequence"});
        sequence[parts] = vec![step.clone(); n].into();
        sequence
    }

    fn replace(from: &str, to: &str) -> Value {
        json!({"type": "Replace", "pattern": {"String": from}, "content": to})
    }

    #[test]
    fn steps_that_double_a_text_end_soon() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let double = replace("a", "aa");
        check(
            "pre_tokenizer",
            sequence("pretokenizers", &bytes, 30),
            "`pre_tokenizer`: expected steps that make a text at most 64 times as long, found 1073741824 times",
        );
        check(
            "normalizer",
            sequence("normalizers", &double, 30),
            "the `normalizer` makes",
        );
        check(
            "normalizer",
            sequence("normalizers", &json!({"type": "ByteLevel"}), 30),
            "the `normalizer` makes",
        );
        check(
            "decoder",
            sequence("decoders", &double, 30),
            "the `decoder` makes",
        );
        let spaced = json!({"type": "BPEDecoder", "suffix": ""});
        check(
            "decoder",
            sequence("decoders", &spaced, 30),
            "the `decoder` makes",
        );
        check(
            "normalizer",
            replace("a", &"x".repeat(4096)),
            "the `normalizer` makes",
        );
        check(
            "normalizer",
            json!({"type": "Prepend", "prepend": "x".repeat(4096)}),
            "the `normalizer` makes",
        );
        // Sequences of sequences.
        let mut nested = double;
        for _ in 0..5 {
            nested = sequence("normalizers", &nested, 3);
        }
        check("normalizer", nested, "expected at most 64 steps");
    }

    #[test]
    fn added_tokens_take_the_same_steps() {
        let found = refusal(|file| {
            file["normalizer"] = sequence("normalizers", &replace("a", "aa"), 30);
            file["added_tokens"][0]["content"] = "a".into();
            file["added_tokens"][0]["normalized"] = true.into();
        });
        let found = found.unwrap();
        assert!(
            found.contains("tokenizer.json: the `normalizer` makes 1 bytes longer than 320"),
            "{found}"
        );
    }

    #[test]
    fn sections_far_larger_than_real_ones_are_refused() {
        check(
            "normalizer",
            sequence("normalizers", &json!({"type": "NFC"}), 65),
            "expected at most 64 steps",
        );
        check(
            "decoder",
            replace(&"a".repeat(20_000), ""),
            "`decoder`: expected texts of at most 16384 bytes, found 20000",
        );
        check(
            "pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": vec![json!(null); 20_000]}),
            "`pre_tokenizer`: expected at most 16384 values",
        );
        let mut deep = json!({"type": "Digits", "individual_digits": true});
        for _ in 0..12 {
            deep = sequence("pretokenizers", &deep, 1);
        }
        check(
            "pre_tokenizer",
            deep,
            "`pre_tokenizer`: expected at most 20 levels",
        );
        // A map to 300 bytes.
        let map = format!("AgAAAAAA{}", "QUFB".repeat(100));
        check(
            "normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": map}),
            "`Precompiled` map to at most 256 bytes, found 300",
        );
        let model = |key: &str, value: Value, expected: &str| {
            let found = refusal(|file| file["model"][key] = value).unwrap_or_default();
            assert!(found.contains(expected), "{key}: {found}");
        };
        model(
            "continuing_subword_prefix",
            "x".repeat(65).into(),
            "`model.continuing_subword_prefix`: expected at most 64 bytes, found 65",
        );
        let found = refusal(|file| file["model"]["vocab"]["a".repeat(20_000)] = 5.into()).unwrap();
        assert!(
            found.contains("expected tokens of at most 16384 bytes, found one of 20000"),
            "{found}"
        );
        let found =
            refusal(|file| file["added_tokens"][0]["content"] = "a".repeat(20_000).into()).unwrap();
        assert!(
            found.contains("`added_tokens`: expected at most 16384 bytes, found 20000"),
            "{found}"
        );
        let words = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100_000, "vocab": {"[UNK]": 0}});
        check(
            "model",
            words,
            "`model.max_input_chars_per_word`: expected at most 1000, found 100000",
        );
    }

    #[test]
    fn patterns_that_match_nothing_end() {
        for pattern in ["", "a*", "(?=a)", "\\b"] {
            let regex = json!({"Regex": pattern});
            let split =
                json!({"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": false});
            let replace = json!({"type": "Replace", "pattern": regex, "content": "x"});
            for (section, step) in [
                ("pre_tokenizer", split),
                ("normalizer", replace.clone()),
                ("decoder", replace),
            ] {
                refusal(|file| file[section] = step);
            }
        }
    }

    #[test]
    fn searches_that_take_long_are_ended() {
        // A match is a letter; whether it is a longer one takes 2^18 attempts, each time.
        let pattern = json!({"Regex": "(?:aa?){17}(?=b)|a"});
        let folder = folder(|file, _| {
            file["pre_tokenizer"] = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
        });
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let found = tokenizer
            .encode(&"a".repeat(3000), Bos::Never)
            .unwrap_err()
            .to_string();
        assert!(
            found.contains("the patterns of the `pre_tokenizer` search 3000 bytes for longer than"),
            "{found}"
        );
    }

    #[test]
    fn post_processors_are_read_and_not_run() {
        const BOS: &str = "<\u{FF5C}begin\u{2581}of\u{2581}sentence\u{FF5C}>";
        let sequence_of = |pieces: &[Value]| {
            json!({
                "type": "TemplateProcessing", "single": pieces, "pair": pieces,
                "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}
            })
        };
        let a = json!({"Sequence": {"id": "A", "type_id": 0}});
        let bos = json!({"SpecialToken": {"id": BOS, "type_id": 0}});
        let adds = |processor: Value| {
            let folder = folder(|file, config| {
                file["post_processor"] = processor;
                *config = json!({});
            });
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            tokenizer.encode("x", Bos::Add).unwrap()[0] == 0
        };
        let double = sequence_of(&[a.clone(), a.clone()]);
        assert!(!adds(
            json!({"type": "Sequence", "processors": vec![double; 30]})
        ));
        let begin = sequence_of(&[bos.clone(), a.clone()]);
        assert!(adds(begin.clone()));
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        assert!(adds(
            json!({"type": "Sequence", "processors": [bytes, begin]})
        ));
        assert!(!adds(sequence_of(&[a.clone(), bos.clone()])));
        assert!(!adds(sequence_of(&[bos.clone(), bos, a])));
        assert!(adds(
            json!({"type": "RobertaProcessing", "sep": ["a", 5], "cls": [BOS, 0], "trim_offsets": true, "add_prefix_space": true})
        ));
    }
}
