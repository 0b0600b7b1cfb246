use std::ops::Range;

use super::{has, read, report, sources};

const MODEL: &str = "crates/model/src/";
/// What waits until the device has computed a tensor, and copies it.
const HOST_READS: [&str; 4] = ["into_data", "into_scalar", "to_data", "try_to_vec"];
/// The same, counted.
const COUNTED_READS: [&str; 3] = ["read_ints", "device::read", "device::{read"];
/// The files of the model that may wait.
const HOST_READERS: [&str; 4] = [
    "forward/exchange/mod.rs", // Rows go to other ranks.
    "export/trained.rs",       // Weights go into files.
    "export/importance.rs",    // The inputs of weights decide how they go into files.
    "adapt/peft_write.rs",     // Adapters go into files.
];
/// What multiplies weights with activations, and the files of the model that may call it: invariant 2 of
/// `crates/README.md`. An embedding and the loss are such products too, and may have files of their own.
const WEIGHT_OPS: [(&[&str], &[&str]); 3] = [
    (
        &[
            "linear_frozen",
            "linear_frozen_pair",
            "moe_frozen",
            "linear_trained",
            "linear_updated",
            "linear_fake_quantized",
            "linear_add",
            "heads_linear",
            "absorbed_attention",
            "experts_frozen",
            "experts_trained",
        ],
        &["modules/linear.rs", "modules/experts.rs"],
    ),
    (
        &["embed_frozen", "embed_trained"],
        &["modules/linear.rs", "modules/experts.rs"],
    ),
    (
        &["cross_entropy_frozen", "cross_entropy_trained"],
        &["modules/linear.rs", "modules/experts.rs"],
    ),
];
/// The files outside of the kernels with unsafe code.
const UNSAFE: [&str; 3] = [
    "crates/checkpoint/src/advice.rs", // Advises the system about maps.
    "crates/checkpoint/src/map.rs",    // Maps files.
    "tests/fuzz/memory.rs",            // Counts what is allocated.
];
const ESCAPE_HATCHES: [(&[&str], &str); 3] = [
    (
        &["#[allow(", "#![allow("],
        "keep the lint, or put it aside with `expect` and a reason",
    ),
    (
        &["#[ignore"],
        "let the test run, or delete it; a wrong behavior is asserted as it is",
    ),
    (
        &["todo!(", "unimplemented!("],
        "finish it, or return an error that says what is not supported",
    ),
];
const MOST_LINES: usize = 800;

#[test]
fn model_does_not_wait_for_the_device() {
    let in_forward = |path: &str| {
        path.strip_prefix(MODEL)
            .is_some_and(|file| !HOST_READERS.contains(&file))
    };
    let cure =
        "the model reads no tensor back; return the tensor, or argue for the file in HOST_READERS";
    report(&find(&COUNTED_READS, shipped, in_forward, cure));
}

#[test]
fn reads_of_the_device_are_counted() {
    let is_checked = |path: &str| path.contains("/src/") && !in_kernels(path);
    let cure = "read with `kernels::device::read`, which counts";
    report(&find(&HOST_READS, shipped, is_checked, cure));
}

#[test]
fn weights_meet_activations_in_two_files() {
    let mut findings = Vec::new();
    for (ops, homes) in WEIGHT_OPS {
        let elsewhere = |path: &str| {
            let is_home = path
                .strip_prefix(MODEL)
                .is_some_and(|file| homes.contains(&file));
            path.starts_with("crates/") && !in_kernels(path) && !is_home
        };
        let cure = format!("only {homes:?} of the model multiply with weights; call what is there");
        findings.extend(find(ops, shipped, elsewhere, &cure));
    }
    report(&findings);
}

#[test]
fn backends_and_unsafe_code_stay_in_their_places() {
    let cure = "burn's tensors know their backend; drop the type parameter";
    let mut findings = find(&[": Backend"], code, |path| !in_kernels(path), cure);
    let cure = format!("unsafe code is for crates/kernels and {UNSAFE:?}; do it safely, or there");
    let is_safe = |path: &str| !in_kernels(path) && !UNSAFE.contains(&path);
    findings.extend(find(&["unsafe"], code, is_safe, &cure));
    report(&findings);
}

#[test]
fn code_has_no_escape_hatches() {
    let hatches = ESCAPE_HATCHES.iter();
    let findings = hatches.flat_map(|(words, cure)| find(words, code, |_| true, cure));
    report(&findings.collect::<Vec<_>>());
}

#[test]
fn files_are_short() {
    let mut findings = Vec::new();
    for path in sources() {
        let count = n_shipped_lines(&read(&path));
        if count > MOST_LINES {
            findings.push(format!(
                "{path}: {count} lines without tests, at most {MOST_LINES}; split it"
            ));
        }
    }
    report(&findings);
}

#[test]
fn comments_literals_and_tests_are_told_from_code() {
    let checks = [
        ("a // unsafe\nb", "a          \nb"),
        ("a /* unsafe\n */ b", "a          \n    b"),
        (
            r#"f("\"unsafe", 'x', '"', '\'', 'é')"#,
            "f(          ,    ,    ,     ,     )",
        ),
        (
            r##"f(r#"unsafe " "#, r"\", b"x")"##,
            "f(              ,     , b   )",
        ),
        ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
    ];
    for (text, code) in checks {
        assert_eq!(without_literals(text), code);
    }
    let code = "#[cfg(test)]\nuse a::b;\nfn f() {}\n#[cfg(test)]\nmod tests { fn g(x: [u8; 2]) {} }\nfn h() {}";
    let items: Vec<_> = test_items(code)
        .into_iter()
        .map(|item| &code[item])
        .collect();
    assert_eq!(
        items,
        [
            "#[cfg(test)]\nuse a::b;",
            "#[cfg(test)]\nmod tests { fn g(x: [u8; 2]) {} }"
        ]
    );
}

/// Where code has one of `words`.
fn find(
    words: &[&str],
    code: fn(&str) -> String,
    is_checked: impl Fn(&str) -> bool,
    cure: &str,
) -> Vec<String> {
    let mut findings = Vec::new();
    for path in sources().iter().filter(|path| is_checked(path)) {
        for (line_idx, line) in code(path).lines().enumerate() {
            for word in words.iter().filter(|word| has(line, word)) {
                findings.push(format!("{path}:{}: `{word}`: {cure}", line_idx + 1));
            }
        }
    }
    findings
}

fn in_kernels(path: &str) -> bool {
    path.starts_with("crates/kernels/")
}

/// Lines of a source file without its tests.
pub(super) fn n_shipped_lines(text: &str) -> usize {
    let code = without_literals(text);
    let tests = test_items(&code).into_iter();
    code.lines().count() - tests.map(|item| code[item].lines().count()).sum::<usize>()
}

/// A source file with spaces in place of its comments and literals.
fn code(path: &str) -> String {
    without_literals(&read(path))
}

/// A source file with spaces in place of its comments, literals and tests.
fn shipped(path: &str) -> String {
    let mut code = code(path);
    for item in test_items(&code) {
        let blanked = blank(&code[item.clone()]);
        code.replace_range(item, &blanked);
    }
    code
}

/// A source file with spaces in place of its comments and literals.
pub(super) fn without_literals(text: &str) -> String {
    without(text, |_| true)
}

/// A source file with spaces in place of its comments.
pub(super) fn without_comments(text: &str) -> String {
    without(text, |literal| literal.starts_with('/'))
}

fn without(text: &str, is_left_out: impl Fn(&str) -> bool) -> String {
    let (mut code, mut rest) = (String::with_capacity(text.len()), text);
    while !rest.is_empty() {
        // Nothing else begins a comment or a literal.
        let plain = rest.find(['/', '"', '\'', 'r']).unwrap_or(rest.len());
        code.push_str(&rest[..plain]);
        rest = &rest[plain..];
        let (literal, tail) = rest.split_at(literal_len(rest));
        if is_left_out(literal) {
            code.push_str(&blank(literal));
        } else {
            code.push_str(literal);
        }
        rest = tail;
        if let Some(next) = rest.chars().next().filter(|_| literal.is_empty()) {
            code.push(next);
            rest = &tail[next.len_utf8()..];
        }
    }
    code
}

/// As many bytes of nothing, in as many lines.
pub(super) fn blank(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte == b'\n' { '\n' } else { ' ' })
        .collect()
}

/// Bytes of the comment, string or character at the start of `rest`; 0 if there is none.
fn literal_len(rest: &str) -> usize {
    let until = |from: usize, end: &str| {
        rest[from..]
            .find(end)
            .map_or(rest.len(), |at| from + at + end.len())
    };
    let raw = rest.strip_prefix('r').unwrap_or("").trim_start_matches('#');
    if rest.starts_with("//") {
        rest.find('\n').unwrap_or(rest.len())
    } else if rest.starts_with("/*") {
        until(2, "*/")
    } else if rest.starts_with('"') {
        let mut is_escaped = true; // As if, so that the opening quote does not close the string.
        let is_end = |c: char| {
            let ends = c == '"' && !is_escaped;
            is_escaped = c == '\\' && !is_escaped;
            ends
        };
        rest.find(is_end).map_or(rest.len(), |end| end + 1)
    } else if raw.starts_with('"') {
        let hashes = rest.len() - raw.len() - 1;
        until(hashes + 2, &format!("\"{}", "#".repeat(hashes)))
    } else if rest.starts_with("'\\") {
        until(3, "'")
    } else if rest.starts_with('\'') {
        // Without a quote two characters on, it is a lifetime.
        let closing = rest.char_indices().nth(2).filter(|(_, c)| *c == '\'');
        closing.map_or(0, |(at, _)| at + 1)
    } else {
        0
    }
}

/// Where `code` has items that only tests see.
pub(super) fn test_items(code: &str) -> Vec<Range<usize>> {
    let marks = code
        .match_indices("#[cfg(test)]")
        .map(|(start, mark)| (start, start + mark.len()));
    marks
        .map(|(start, item)| start..item + item_len(&code[item..]))
        .collect()
}

/// Bytes up to the semicolon or the brace that ends the item.
fn item_len(code: &str) -> usize {
    let mut depth = 0;
    let is_end = |c: char| {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && matches!(c, ';' | '}')
    };
    code.find(is_end).map_or(code.len(), |end| end + 1)
}
