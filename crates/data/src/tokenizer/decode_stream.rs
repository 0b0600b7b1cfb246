//! Decoding ids that arrive one at a time, without ever showing half a character.
//!
//! The text of a token depends on its neighbors (leading spaces, bytes of one character spread over several tokens), so single
//! ids cannot be decoded alone. The decoder has a short window: ids that are already shown, as context, and ids that are not.
//! After each id it decodes the shown part and the whole window; the difference is new text. If that ends in `U+FFFD`, a
//! character is incomplete and nothing is shown yet.

use crate::common_prefix::common_prefix;
use crate::error::Result;
use crate::tokenizer::{Special, Tokenizer};

/// Turns ids into text as they come. See [`Tokenizer::decode_stream`].
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    special: Special,
    window: Vec<u32>,
    /// Number of ids of the window that are already shown.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, special: Special) -> Self {
        Self {
            tokenizer,
            special,
            window: Vec::new(),
            shown: 0,
        }
    }

    /// Takes the next id; returns the text that it completes, if any.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn step(&mut self, id: u32) -> Result<Option<String>> {
        self.window.push(id);
        let text = self.new_text()?;
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(None);
        }
        // The ids just shown become the context of the next.
        self.window.drain(..self.shown);
        self.shown = self.window.len();
        Ok(Some(text))
    }

    /// The rest at the end: bytes that never became a character.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(self) -> Result<Option<String>> {
        let text = self.new_text()?;
        Ok((!text.is_empty()).then_some(text))
    }

    fn new_text(&self) -> Result<String> {
        let context = self
            .tokenizer
            .decode(&self.window[..self.shown], self.special)?;
        let whole = self.tokenizer.decode(&self.window, self.special)?;
        let start = common_prefix(&context, &whole);
        Ok(whole[start..].to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Bos;
    use crate::tokenizer::tests::goldens;

    fn pieces(ids: &[u32]) -> (Vec<Option<String>>, Option<String>) {
        let tokenizer = Tokenizer::open(&goldens()).unwrap();
        let mut stream = tokenizer.decode_stream(Special::Skip);
        let steps = ids.iter().map(|&id| stream.step(id).unwrap()).collect();
        (steps, stream.finish().unwrap())
    }

    #[test]
    fn characters_of_several_tokens_arrive_whole() {
        let tokenizer = Tokenizer::open(&goldens()).unwrap();
        for text in ["naïve café 🚀!", "深度求索", "a  b\n\nc", "🚀👩‍🚀"] {
            let ids = tokenizer.encode(text, Bos::Never).unwrap();
            let (steps, rest) = pieces(&ids);
            assert!(steps.len() >= text.chars().count() / 2);
            assert!(
                steps
                    .iter()
                    .flatten()
                    .all(|piece| !piece.contains('\u{fffd}')),
                "{steps:?}"
            );
            assert_eq!(steps.into_iter().flatten().collect::<String>(), text);
            assert_eq!(rest, None);
        }
    }

    #[test]
    fn plain_tokens_are_shown_at_once() {
        let tokenizer = Tokenizer::open(&goldens()).unwrap();
        let ids = tokenizer.encode("the cat", Bos::Never).unwrap();
        assert!(pieces(&ids).0.iter().all(Option::is_some));
    }

    #[test]
    fn broken_bytes_are_shown_with_what_follows_or_at_the_end() {
        let tokenizer = Tokenizer::open(&goldens()).unwrap();
        let half = tokenizer.encode("é", Bos::Never).unwrap()[0];
        let a = tokenizer.token_id("a").unwrap();
        let b = tokenizer.token_id("b").unwrap();
        let (steps, rest) = pieces(&[a, half, b, half]);
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(steps, [text("a"), None, text("\u{fffd}b"), None]);
        assert_eq!(rest, text("\u{fffd}"));
    }
}
