//! Regular expressions as Python's `re` reads and replaces them.

use std::ops::ControlFlow;
use std::sync::Arc;

use fancy_regex::{Captures, Regex, RegexBuilder};

use crate::jinja::budget::MAX_TEXT_BYTES;

/// Steps back that a match may take. A pattern that takes more is one that explodes.
const BACKTRACKS: usize = 1_000_000;

/// A pattern.
#[derive(Clone, Debug)]
pub(crate) struct PythonRegex {
    regex: Arc<Regex>,
    /// The same where a search begins, for a match of something.
    filled_here: Arc<Regex>,
}

/// A part of what stands for a match.
enum ReplacementPart {
    Text(String),
    Group(usize),
}

impl PythonRegex {
    /// # Errors
    /// In words: if it is none.
    pub(crate) fn new(pattern: &str) -> Result<Self, String> {
        // Python's end of the text is what is `\z` elsewhere.
        let pattern = pattern.replace(r"\Z", r"\z");
        let compile = |pattern: &str| {
            let mut builder = RegexBuilder::new(pattern);
            let regex = builder.backtrack_limit(BACKTRACKS).build();
            regex.map(Arc::new).map_err(|problem| problem.to_string())
        };
        Ok(Self {
            regex: compile(&pattern)?,
            filled_here: compile(&format!(r"\G(?:{pattern})(?!\G)"))?,
        })
    }

    /// Visits all matches from left to right, until `visit` says that it is enough. As in Python, a match of nothing may follow
    /// one of something, and after one of nothing, something may match in the same place.
    ///
    /// # Errors
    /// In words: if a match takes too many steps, or those of `visit`.
    pub(crate) fn each_match<'t>(
        &self,
        text: &'t str,
        mut visit: impl FnMut(Captures<'t>) -> Result<ControlFlow<()>, String>,
    ) -> Result<(), String> {
        let words = |problem: fancy_regex::Error| problem.to_string();
        let (mut from, mut is_after_nothing) = (0, false);
        while from <= text.len() {
            let mut found = None;
            if is_after_nothing {
                found = self
                    .filled_here
                    .captures_from_pos(text, from)
                    .map_err(words)?;
                if found.is_none() {
                    from += text[from..].chars().next().map_or(1, char::len_utf8);
                }
            }
            if found.is_none() && from <= text.len() {
                found = self.regex.captures_from_pos(text, from).map_err(words)?;
            }
            let Some((captures, whole)) = found.and_then(|of| of.get(0).map(|all| (of, all)))
            else {
                return Ok(());
            };
            from = whole.end();
            is_after_nothing = whole.start() == whole.end();
            if visit(captures)?.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// `re.sub`: up to `count` matches replaced, or all if it is 0.
    ///
    /// # Errors
    /// In words: if `by` has an unknown escape or group, or as [`Self::matches`].
    pub(crate) fn replace(&self, text: &str, by: &str, count: usize) -> Result<String, String> {
        let parts = self.parts(by)?;
        let most = if count == 0 { usize::MAX } else { count };
        let (mut made, mut end, mut done) = (String::new(), 0, 0);
        self.each_match(text, |captures| {
            let Some(whole) = captures.get(0) else {
                return Ok(ControlFlow::Continue(()));
            };
            made.push_str(&text[end..whole.start()]);
            for part in &parts {
                made.push_str(match part {
                    ReplacementPart::Text(text) => text,
                    // A group without a match is nothing.
                    ReplacementPart::Group(at) => captures.get(*at).map_or("", |it| it.as_str()),
                });
            }
            if made.len() > MAX_TEXT_BYTES {
                return Err("makes too much text".into());
            }
            (end, done) = (whole.end(), done + 1);
            Ok(match done < most {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        })?;
        made.push_str(&text[end..]);
        Ok(made)
    }

    /// What stands for a match: text, and groups by number or name.
    fn parts(&self, by: &str) -> Result<Vec<ReplacementPart>, String> {
        let (mut parts, mut text) = (Vec::new(), String::new());
        let mut rest = by;
        while let Some(at) = rest.find('\\') {
            text.push_str(&rest[..at]);
            let escape = &rest[at + 1..];
            let Some(first) = escape.chars().next() else {
                return Err("bad escape (end of pattern)".into());
            };
            let plain = [
                ('n', '\n'),
                ('r', '\r'),
                ('t', '\t'),
                ('\\', '\\'),
                ('a', '\u{7}'),
                ('b', '\u{8}'),
                ('f', '\u{c}'),
                ('v', '\u{b}'),
            ];
            rest = &escape[first.len_utf8()..];
            if let Some((_, c)) = plain.iter().find(|(name, _)| *name == first) {
                text.push(*c);
            } else if first.is_ascii_alphanumeric() {
                let (group, after) = self.group(escape)?;
                parts.push(ReplacementPart::Text(std::mem::take(&mut text)));
                parts.push(ReplacementPart::Group(group));
                rest = after;
            } else {
                text.extend(['\\', first]);
            }
        }
        text.push_str(rest);
        parts.push(ReplacementPart::Text(text));
        Ok(parts)
    }

    /// The group that an escape names, and what follows it.
    fn group<'t>(&self, escape: &'t str) -> Result<(usize, &'t str), String> {
        let n_groups = self.regex.captures_len();
        let (name, rest) = if let Some(named) = escape.strip_prefix("g<") {
            named
                .split_once('>')
                .ok_or("missing >, unterminated name")?
        } else {
            let digits = escape
                .bytes()
                .take(2)
                .take_while(u8::is_ascii_digit)
                .count();
            escape.split_at(digits)
        };
        let by_name = || {
            self.regex
                .capture_names()
                .position(|known| known == Some(name))
        };
        let is_octal = !escape.starts_with('g') && name.starts_with('0');
        let group = name.parse().ok().or_else(by_name);
        let group = group.filter(|group| *group < n_groups && !is_octal && !name.is_empty());
        group.map(|group| (group, rest)).ok_or_else(|| {
            let shown: String = escape.chars().take(8).collect();
            format!("unknown escape or group `\\{shown}`")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sub(pattern: &str, by: &str, text: &str, count: usize) -> Result<String, String> {
        PythonRegex::new(pattern)?.replace(text, by, count)
    }

    // What Python 3.11 gives.
    #[test]
    fn replacements_are_those_of_python() {
        for (pattern, by, text, count, expected) in [
            ("x*", "-", "abxd", 0, "-a-b--d-"),
            ("a*?", "-", "aa", 0, "-----"),
            ("|a", "-", "a", 0, "---"),
            (r"\b|\w", "-", "ab", 0, "----"),
            ("(?i)A|", "-", "xa", 0, "-x--"),
            ("b", "", "abcb", 1, "acb"),
            (r"(\w+) (\w+)", r"\2 \1", "a b c d", 0, "b a d c"),
            (r"(?P<n>\d)", r"<\g<n>\g<0>>", "a1", 0, "a<11>"),
            (r"(a)|b", r"[\1]", "ab", 0, "[a][]"),
            ("a", r"\n\\\-", "a", 0, "\n\\\\-"),
            ("é", "e", "été", 0, "ete"),
            ("", "-", "é", 0, "-é-"),
        ] {
            assert_eq!(
                sub(pattern, by, text, count).as_deref(),
                Ok(expected),
                "{pattern} {by}"
            );
        }
        for (by, problem) in [
            (r"\q", r"unknown escape or group `\q`"),
            (r"\2", r"unknown escape or group `\2`"),
            (r"\g<x>y", r"unknown escape or group `\g<x>y`"),
            (r"\g<1", "missing >, unterminated name"),
            ("\\", "bad escape (end of pattern)"),
        ] {
            assert_eq!(sub("(a)", by, "a", 0), Err(problem.into()), "{by}");
        }
        let growing = sub("", &"a".repeat(1 << 20), &"b".repeat(1 << 10), 0);
        assert_eq!(growing, Err("makes too much text".into()));
        let exploding = sub(r"(a*)*(b|c)+\1x", "", &"a".repeat(200), 0);
        assert!(exploding.unwrap_err().contains("backtrack"));
    }
}
