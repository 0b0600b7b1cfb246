//! Numbers of JSON that the reader would round: integers of more than 64 bits and floats of more than 15 digits.
//!
//! A template prints numbers as Python does, and Python keeps them. So before a row is read, such a number is replaced by an
//! object with its digits, which everything else takes for an object without a meaning.

use serde_json::Value;
use std::borrow::Cow;

/// The only key of the object. No data has it: it begins with a character that JSON does not allow unescaped.
const EXACT_NUMBER: &str = "\u{0}number";
/// Longer numbers may be rounded.
const MAX_EXACT_CHARS: usize = 15;

/// The digits of a number that was kept by [`keep_exact`].
pub(crate) fn exact(value: &Value) -> Option<&str> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    object.get(EXACT_NUMBER)?.as_str()
}

/// JSON with its long numbers as objects. What is no JSON stays what it is.
pub(crate) fn keep_exact(json: &str) -> Cow<'_, str> {
    let bytes = json.as_bytes();
    let mut out = String::new();
    let (mut at, mut copied, mut in_string) = (0, 0, false);
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'-' | b'0'..=b'9' if !in_string => {
                let length = number_length(&bytes[at..]);
                let number = &json[at..at + length];
                if (length > MAX_EXACT_CHARS && is_number(number)) || number == "-0" {
                    out.push_str(&json[copied..at]);
                    match number {
                        // An integer in Python, a float for the reader.
                        "-0" => out.push('0'),
                        number => out.push_str(&format!("{{\"\\u0000number\":\"{number}\"}}")),
                    }
                    copied = at + length;
                }
                at += length;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    match copied {
        0 => Cow::Borrowed(json),
        _ => Cow::Owned(out + &json[copied..]),
    }
}

fn number_length(bytes: &[u8]) -> usize {
    let ends = |byte: &u8| !matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
    bytes.iter().position(ends).unwrap_or(bytes.len())
}

/// Whether JSON allows the number.
fn is_number(text: &str) -> bool {
    serde_json::from_str::<serde_json::Number>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_numbers_keep_their_digits_and_all_else_stays() {
        let check = |json: &str, expected: &str| assert_eq!(keep_exact(json), expected, "{json}");
        let kept = |number: &str| format!("{{\"\\u0000number\":\"{number}\"}}");
        for same in [
            "[1, -2.5e3, 123456789012345]",
            r#"{"a": "12345678901234567890", "b\"": "\\12345678901234567890"}"#,
            "[12345678901234567890.]",
            "01234567890123456789",
        ] {
            check(same, same);
        }
        let big = "123456789012345678901234567890";
        check(&format!("[{big},0.1]"), &format!("[{},0.1]", kept(big)));
        check("-0.12345678901234567", &kept("-0.12345678901234567"));
        check("[-0, -0.0]", "[0, -0.0]");
        let value: Value = serde_json::from_str(&keep_exact(big)).unwrap();
        assert_eq!(exact(&value), Some(big));
        assert_eq!(exact(&serde_json::json!({"a": big})), None);
    }
}
