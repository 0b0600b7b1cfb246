//! Words between white space, as Python's `str.split()` finds them.

use data::is_space;

/// The words of a text.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_python() {
        let found: Vec<&str> = words("\u{a0}a\x1cb\x1f\t c\u{3000}\n\u{85}d\u{200b}e ").collect();
        assert_eq!(found, ["a", "b", "c", "d\u{200b}e"]);
        assert_eq!(words(" \x1d\n").count(), 0);
    }
}
