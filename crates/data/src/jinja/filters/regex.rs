//! Regular expressions as Python's `re` reads and replaces them.

use std::sync::Arc;

use fancy_regex::{Captures, Regex, RegexBuilder};

/// Steps back that a match may take. A pattern that takes more is one that explodes.
const BACKTRACKS: usize = 1_000_000;

/// A pattern.
#[derive(Clone, Debug)]
pub(crate) struct PythonRegex {
    regex: Arc<Regex>,
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
        let mut builder = RegexBuilder::new(&pattern);
        let regex = builder.backtrack_limit(BACKTRACKS).build();
        let regex = regex.map_err(|problem| problem.to_string())?;
        Ok(Self {
            regex: Arc::new(regex),
        })
    }

    /// All matches, from left to right. One of nothing may follow another of something, as in Python.
    ///
    /// # Errors
    /// In words: if a match takes too many steps.
    pub(crate) fn matches<'t>(&self, text: &'t str) -> Result<Vec<Captures<'t>>, String> {
        let (mut found, mut from) = (Vec::new(), 0);
        while from <= text.len() {
            let captures = self.regex.captures_from_pos(text, from);
            let Some(captures) = captures.map_err(|problem| problem.to_string())? else {
                break;
            };
            let Some(whole) = captures.get(0) else {
                break;
            };
            let next = text[whole.end()..].chars().next();
            from = whole.end();
            if whole.start() == whole.end() {
                from += next.map_or(1, char::len_utf8);
            }
            found.push(captures);
        }
        Ok(found)
    }

    /// `re.sub`: up to `count` matches replaced, or all if it is 0.
    ///
    /// # Errors
    /// In words: if `by` has an unknown escape or group, or as [`Self::matches`].
    pub(crate) fn replace(&self, text: &str, by: &str, count: usize) -> Result<String, String> {
        let parts = self.parts(by)?;
        let most = if count == 0 { usize::MAX } else { count };
        let (mut made, mut end) = (String::new(), 0);
        for captures in self.matches(text)?.iter().take(most) {
            let Some(whole) = captures.get(0) else {
                continue;
            };
            made.push_str(&text[end..whole.start()]);
            for part in &parts {
                match part {
                    ReplacementPart::Text(text) => made.push_str(text),
                    // A group without a match is nothing.
                    ReplacementPart::Group(at) => {
                        made.push_str(captures.get(*at).map_or("", |group| group.as_str()));
                    }
                }
            }
            end = whole.end();
        }
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
        let exploding = sub(r"(a*)*(b|c)+\1x", "", &"a".repeat(200), 0);
        assert!(exploding.unwrap_err().contains("backtrack"));
    }
}
