//! Hashes of texts.

use sha2::{Digest, Sha256};

/// The SHA-256 of a text, in hexadecimal digits.
pub fn sha256(text: &str) -> String {
    let digits = Sha256::digest(text).into_iter();
    digits.map(|byte| format!("{byte:02x}")).collect()
}
