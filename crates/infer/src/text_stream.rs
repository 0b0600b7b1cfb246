//! New tokens to text, up to the first stop string.
//!
//! A stop string may begin in one token and end in another, so text that may be the beginning of one is held back until
//! the next tokens decide.

use std::sync::Arc;

use data::{DecodeStream, Special, Tokenizer};

use crate::error::{Error, Result};

/// Decodes ids as they come, and detects stop strings.
#[derive(Clone, Debug)]
pub struct TextStream {
    decoder: DecodeStream,
    stops: StopStrings,
}

impl TextStream {
    /// A text that ends before the first of these strings.
    ///
    /// # Errors
    /// If one of them is empty.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: &[String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::EmptyStop);
        }
        Ok(Self {
            decoder: DecodeStream::new(tokenizer, Special::Skip),
            stops: StopStrings {
                strings: stops.to_vec(),
                held: String::new(),
                found: None,
            },
        })
    }

    /// Takes the next id; returns the text that is now certain.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn step(&mut self, id: u32) -> Result<String> {
        let piece = self.decoder.step(id)?.unwrap_or_default();
        Ok(self.stops.pass(&piece))
    }

    /// The stop string that ended the text, if one did. No text follows it.
    pub fn stop_string(&self) -> Option<&str> {
        let found = self.stops.found?;
        Some(&self.stops.strings[found])
    }

    /// The text that was held back until the end.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        let rest = self.decoder.finish()?.unwrap_or_default();
        let mut text = self.stops.pass(&rest);
        if self.stops.found.is_none() {
            text += &self.stops.held;
        }
        Ok(text)
    }
}

/// Passes text through up to the first stop string.
#[derive(Clone, Debug)]
struct StopStrings {
    strings: Vec<String>,
    /// The end of the text so far, if a stop string may begin there.
    held: String,
    /// The index of the string that was found.
    found: Option<usize>,
}

impl StopStrings {
    /// Adds a piece of text; returns the text that may be shown.
    fn pass(&mut self, piece: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        let mut text = std::mem::take(&mut self.held) + piece;
        let places = self.strings.iter().enumerate();
        let first = places
            .filter_map(|(number, string)| Some((text.find(string.as_str())?, number)))
            .min();
        if let Some((at, number)) = first {
            self.found = Some(number);
            text.truncate(at);
            return text;
        }
        let may_begin = |at: &usize| self.strings.iter().any(|s| s.starts_with(&text[*at..]));
        let mut places = text.char_indices().map(|(at, _)| at);
        if let Some(at) = places.find(may_begin) {
            self.held = text.split_off(at);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_passes_up_to_the_first_stop_string() {
        let check = |strings: &[&str], pieces: &[&str], expected: &[&str], found: Option<usize>| {
            let mut stops = StopStrings {
                strings: strings.iter().map(|string| (*string).to_owned()).collect(),
                held: String::new(),
                found: None,
            };
            let passed: Vec<_> = pieces.iter().map(|piece| stops.pass(piece)).collect();
            assert_eq!(passed, expected, "{strings:?} {pieces:?}");
            assert_eq!(stops.found, found, "{strings:?} {pieces:?}");
        };
        check(&[], &["a", "b"], &["a", "b"], None);
        check(&["\n\n"], &["a\n", "\nb", "c"], &["a", "", ""], Some(0));
        check(&["\n\n"], &["a\n", "b\n", "\n"], &["a", "\nb", ""], Some(0));
        // Of several, the one that begins first in the text.
        check(&["c", "abc"], &["xa", "b", "cd"], &["x", "", ""], Some(1));
        check(&["aab"], &["aa", "a", "b!"], &["", "a", ""], Some(0));
        check(&["aab"], &["aa", "c"], &["", "aac"], None);
        check(&["né"], &["n", "e né", "x"], &["", "ne ", ""], Some(0));
    }
}
