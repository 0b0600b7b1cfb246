//! The text of a template in tokens, with white space removed where Jinja removes it.
//!
//! For chats, `trim_blocks`: the line end after a block or a comment goes; and `lstrip_blocks`: so do blanks between a line's
//! beginning and a block or a comment. `-` removes all white space on its side, `+` keeps what would go.
//!
//! Source: pallets/jinja: src/jinja2/lexer.py.

use super::python::is_space;
use super::{Error, Result, Syntax};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// Text outside of tags.
    Text(String),
    /// `{{` and `}}`, `{%` and `%}`.
    EmitBegin,
    EmitEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    /// An operator or a bracket.
    Symbol(&'static str),
}

/// Symbols, longer ones first.
const SYMBOLS: [&str; 28] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";", "!", "@",
];

/// Tokens with their lines.
pub(super) fn tokens(source: &str, syntax: Syntax) -> Result<Vec<(Token, u32)>> {
    let unix = source.replace("\r\n", "\n").replace('\r', "\n");
    let unix = match syntax {
        // One line end at the end of a file is not part of the template.
        Syntax::Chat => unix.strip_suffix('\n').unwrap_or(&unix),
        Syntax::Harness => &unix,
    };
    let mut lexer = Lexer {
        source: unix,
        trims: syntax == Syntax::Chat,
        at: 0,
        line: 1,
        line_starts: true,
        tokens: Vec::new(),
    };
    while lexer.at < unix.len() {
        lexer.text_and_tag()?;
    }
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    source: &'s str,
    /// Whether blocks remove white space around them by themselves.
    trims: bool,
    at: usize,
    line: u32,
    /// Whether the last tag ended with a line end that it removed, or this is the beginning.
    line_starts: bool,
    tokens: Vec<(Token, u32)>,
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn fail<T>(&self, problem: &str) -> Result<T> {
        Err(Error::syntax(problem, self.line))
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    /// Goes on by a number of bytes.
    fn skip(&mut self, bytes: usize) {
        let skipped = &self.rest()[..bytes];
        self.line += skipped.matches('\n').count() as u32;
        self.line_starts = skipped.ends_with('\n');
        self.at += bytes;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        let space = rest.len() - rest.trim_start_matches(is_space).len();
        if space > 0 {
            self.skip(space);
        }
    }

    /// Text up to a tag, and the tag.
    fn text_and_tag(&mut self) -> Result<()> {
        let rest = self.rest();
        let mut braces = rest.match_indices('{').map(|(at, _)| at);
        let tag = braces.find(|&at| rest[at + 1..].starts_with(['{', '%', '#']));
        let Some(tag) = tag else {
            self.text(rest);
            self.skip(rest.len());
            return Ok(());
        };
        let (text, begin) = (&rest[..tag], &rest[tag..]);
        let kind = begin.as_bytes()[1];
        let sign = begin[2..]
            .chars()
            .next()
            .filter(|sign| matches!(sign, '-' | '+'));
        self.text(self.before_tag(text, kind, sign));
        self.skip(tag + 2 + sign.map_or(0, |_| 1));
        match kind {
            b'#' => self.comment(),
            b'{' => {
                self.push(Token::EmitBegin);
                self.tag(Token::EmitEnd)
            }
            _ => match self.raw_begin() {
                Some(length) => self.raw(length),
                None => {
                    self.push(Token::BlockBegin);
                    self.tag(Token::BlockEnd)
                }
            },
        }
    }

    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Text(text.to_owned()));
        }
    }

    /// The text before a tag, without the white space that the tag removes.
    fn before_tag(&self, text: &'s str, kind: u8, sign: Option<char>) -> &'s str {
        match sign {
            Some('-') => text.trim_end_matches(is_space),
            None if kind != b'{' && self.trims => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let begins = line > 0 || self.line_starts;
                match begins && text[line..].chars().all(is_space) {
                    true => &text[..line],
                    false => text,
                }
            }
            _ => text,
        }
    }

    /// Behind the end of a tag, with what it removes: `close` without its sign.
    fn close(&mut self, close: &str) -> bool {
        let rest = self.rest();
        let bare = rest.trim_start_matches(['-', '+']);
        let sign = &rest[..rest.len() - bare.len()];
        if !bare.starts_with(close) || sign.len() > 1 || (close == "}}" && sign == "+") {
            return false;
        }
        let after = &bare[close.len()..];
        let removed = match sign {
            "-" => after.len() - after.trim_start_matches(is_space).len(),
            "" if self.trims && close != "}}" && after.starts_with('\n') => 1,
            _ => 0,
        };
        self.skip(sign.len() + close.len() + removed);
        true
    }

    fn comment(&mut self) -> Result<()> {
        let Some(end) = self.rest().find("#}") else {
            return self.fail("missing end of comment tag");
        };
        let comment = &self.rest()[..end];
        let sign = usize::from(comment.ends_with(['-', '+']));
        self.skip(end - sign);
        self.close("#}");
        Ok(())
    }

    /// The length of `raw %}`, if that comes next.
    fn raw_begin(&self) -> Option<usize> {
        let rest = self.rest();
        let after = rest.trim_start_matches(is_space).strip_prefix("raw")?;
        let after = after.trim_start_matches(is_space);
        let after = match after.strip_prefix("-%}") {
            Some(after) => after.trim_start_matches(is_space),
            None => after.strip_prefix("%}")?,
        };
        Some(rest.len() - after.len())
    }

    /// Text up to `{% endraw %}`.
    fn raw(&mut self, begin: usize) -> Result<()> {
        self.skip(begin);
        let rest = self.rest();
        for (at, _) in rest.match_indices("{%") {
            let inside = &rest[at + 2..];
            let sign = inside
                .chars()
                .next()
                .filter(|sign| matches!(sign, '-' | '+'));
            let name = inside[sign.map_or(0, |_| 1)..].trim_start_matches(is_space);
            let Some(after) = name.strip_prefix("endraw") else {
                continue;
            };
            let after = after.trim_start_matches(is_space);
            let text = self.before_tag(&rest[..at], b'%', sign);
            self.text(text);
            self.skip(rest.len() - after.len());
            return match self.close("%}") {
                true => Ok(()),
                false => self.fail("expected the end of `endraw`"),
            };
        }
        self.fail("missing end of raw directive")
    }

    /// The tokens of a tag and its end.
    fn tag(&mut self, end: Token) -> Result<()> {
        let close = if end == Token::EmitEnd { "}}" } else { "%}" };
        let mut brackets = 0_usize;
        loop {
            self.skip_space();
            if brackets == 0 && self.close(close) {
                self.push(end);
                return Ok(());
            }
            let Some(first) = self.rest().chars().next() else {
                return self.fail("unexpected end of template");
            };
            match first {
                '"' | '\'' => self.string(first)?,
                '0'..='9' => self.number()?,
                _ if first.is_alphabetic() || first == '_' => {
                    let is_name = |char: char| char.is_alphanumeric() || char == '_';
                    let rest = self.rest();
                    let length = rest.find(|char| !is_name(char)).unwrap_or(rest.len());
                    self.push(Token::Name(rest[..length].to_owned()));
                    self.skip(length);
                }
                _ => {
                    let Some(symbol) = SYMBOLS.iter().find(|s| self.rest().starts_with(**s)) else {
                        return self.fail(&format!("unexpected char {first:?}"));
                    };
                    match *symbol {
                        "(" | "[" | "{" => brackets += 1,
                        ")" | "]" | "}" if brackets == 0 => {
                            return self.fail(&format!("unexpected '{symbol}'"));
                        }
                        ")" | "]" | "}" => brackets -= 1,
                        _ => {}
                    }
                    self.push(Token::Symbol(symbol));
                    self.skip(symbol.len());
                }
            }
        }
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let body = &self.rest()[1..];
        let mut chars = body.char_indices();
        let end = loop {
            match chars.next() {
                Some((_, '\\')) => _ = chars.next(),
                Some((at, char)) if char == quote => break at,
                Some(_) => {}
                None => return self.fail("missing end of string"),
            }
        };
        let Some(text) = unescaped(&body[..end]) else {
            return self.fail("expected escapes as Python has them in strings");
        };
        self.push(Token::Str(text));
        self.skip(end + 2);
        Ok(())
    }

    /// An integer (`1_000`, `0x1f`) or a float (`1.5`, `1e3`).
    fn number(&mut self) -> Result<()> {
        let rest = self.rest();
        let digits = |text: &str| {
            let is_digit = |char: char| char.is_ascii_digit() || char == '_';
            text.find(|char| !is_digit(char)).unwrap_or(text.len())
        };
        let radix = match rest.get(..2).unwrap_or_default() {
            "0x" | "0X" => 16,
            "0o" | "0O" => 8,
            "0b" | "0B" => 2,
            _ => 10,
        };
        if radix != 10 {
            let length = rest[2..]
                .find(|char: char| !char.is_digit(radix) && char != '_')
                .map_or(rest.len(), |length| length + 2);
            return self.integer(
                length,
                i128::from_str_radix(&plain(&rest[2..length]), radix),
            );
        }
        let whole = digits(rest);
        let mut length = whole;
        // `rows.0.1` is two indices.
        let is_index = self.source[..self.at].ends_with('.');
        if is_index {
            return self.integer(length, plain(&rest[..length]).parse());
        }
        if rest[length..].starts_with('.')
            && rest[length + 1..].starts_with(|c: char| c.is_ascii_digit())
        {
            length += 1 + digits(&rest[length + 1..]);
        }
        if let Some(exponent) = rest[length..].strip_prefix(['e', 'E']) {
            let unsigned = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if unsigned.starts_with(|c: char| c.is_ascii_digit()) {
                length += 1 + (exponent.len() - unsigned.len()) + digits(unsigned);
            }
        }
        if length == whole {
            return self.integer(length, plain(&rest[..length]).parse());
        }
        let Ok(number) = plain(&rest[..length]).parse() else {
            return self.fail("expected a number");
        };
        self.push(Token::Float(number));
        self.skip(length);
        Ok(())
    }

    fn integer(
        &mut self,
        length: usize,
        value: Result<i128, std::num::ParseIntError>,
    ) -> Result<()> {
        let Ok(value) = value else {
            return self.fail("expected an integer of at most 127 bits");
        };
        self.push(Token::Int(value));
        self.skip(length);
        Ok(())
    }
}

/// A number without its underscores.
fn plain(number: &str) -> String {
    number.replace('_', "")
}

/// A string with Python's escapes resolved. Unknown ones stay as they are.
fn unescaped(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        if char != '\\' {
            out.push(char);
            continue;
        }
        let code = |chars: &mut std::str::Chars<'_>, digits: usize| {
            let code: String = chars.by_ref().take(digits).collect();
            let value = u32::from_str_radix(&code, 16).ok()?;
            (code.len() == digits).then(|| char::from_u32(value))?
        };
        match chars.next()? {
            '\n' => {}
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\u{b}'),
            'x' => out.push(code(&mut chars, 2)?),
            'u' => out.push(code(&mut chars, 4)?),
            'U' => out.push(code(&mut chars, 8)?),
            'N' => return None,
            same @ ('\\' | '\'' | '"') => out.push(same),
            first @ '0'..='7' => {
                let mut value = first.to_digit(8)?;
                for _ in 0..2 {
                    let Some(digit) = chars.clone().next().and_then(|char| char.to_digit(8)) else {
                        break;
                    };
                    value = value * 8 + digit;
                    chars.next();
                }
                out.push(char::from_u32(value)?);
            }
            other => out.extend(['\\', other]),
        }
    }
    Some(out)
}
