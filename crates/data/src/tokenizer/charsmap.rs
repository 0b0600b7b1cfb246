//! The character map of a `Precompiled` normalizer: base64 of the size of a trie, the trie, and the texts that it leads to, each
//! with a zero at its end.
//!
//! Source: google/sentencepiece: src/normalizer.cc, `DecodePrecompiledCharsMap`.

use serde_json::Value;

/// The bytes of the longest text that a character can become; none if the map is malformed.
pub(super) fn longest_replacement(map: &Value) -> Option<usize> {
    let bytes = decoded(map.as_str()?)?;
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    let texts = rest.get(u32::from_le_bytes(*size) as usize..)?;
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max()
}

/// The bytes of a base64 text.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let mut bits = 0u32;
        for byte in group {
            bits = bits << 6 | digit(*byte)?;
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend(&bits.to_be_bytes()[1..][..group.len() * 3 / 4]);
    }
    Some(bytes)
}

fn digit(byte: u8) -> Option<u32> {
    Some(u32::from(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_text_follows_the_trie() {
        // A trie of two bytes, and the texts "abc", "" and "de".
        let map = "AgAAAP//YWJjAABkZQA=";
        assert_eq!(longest_replacement(&map.into()), Some(3));
        for malformed in ["", "AgA", "AgAAAP", "////f///", "A*AAAP//", "\u{e9}"] {
            assert_eq!(longest_replacement(&malformed.into()), None, "{malformed}");
        }
    }
}
