//! Tables that other programs wrote have the rows of their twins in JSON lines.

use super::*;
use crate::columns::Columns;
use crate::corpus::Corpus;
use crate::file::parse_line;
use crate::reader::{ReadOptions, RowFilter};
use crate::sample::Sample;
use crate::tokenizer::tests::tokenizer;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::PathBuf;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tables")
}

fn rows(path: &Path) -> Result<Vec<Value>, String> {
    let row = |row: Result<RowText>| row.and_then(|row| parse_line(&row.text));
    let table = Table::open(path).map_err(|problem| problem.to_string())?;
    let rows: Result<Vec<Value>> = table.map(row).collect();
    rows.map_err(|problem| problem.to_string())
}

/// The files of the goldens that have a twin, with it.
fn twins() -> Vec<(PathBuf, PathBuf)> {
    let files = fs::read_dir(goldens())
        .unwrap()
        .map(|file| file.unwrap().path());
    let mut twins: Vec<_> = files
        .filter(|file| file.is_file())
        .filter_map(|file| {
            let name = file.file_name()?.to_str()?.split('.').next()?;
            let twin = goldens().join(format!("{name}.jsonl"));
            (file != twin && twin.exists()).then_some((file, twin))
        })
        .collect();
    twins.sort();
    assert!(twins.len() >= 24, "{twins:?}");
    twins
}

#[test]
fn every_table_has_the_rows_of_its_twin() {
    for (file, twin) in twins() {
        let (found, mut expected) = (rows(&file).unwrap(), rows(&twin).unwrap());
        assert_eq!(found.len(), expected.len(), "{}", file.display());
        if file.ends_with("values.polars.parquet") {
            // Polars has no maps.
            expected
                .iter_mut()
                .for_each(|row| drop(row.as_object_mut().unwrap().remove("map")));
        }
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{} row {}", file.display(), index + 1);
        }
    }
}

#[test]
fn columns_without_a_form_in_json_are_named() {
    for (file, _) in twins() {
        let table = Table::open(&file).unwrap();
        let unread: Vec<_> = table
            .unread_columns()
            .iter()
            .map(|column| (column.name.as_str(), column.found.as_str()))
            .collect();
        let name = file.file_name().unwrap().to_str().unwrap();
        let expected = match name.starts_with("values.") {
            true => vec![("when", "timestamps"), ("day", "dates"), ("bytes", "bytes")],
            false => vec![],
        };
        assert_eq!(unread, expected, "{name}");
    }
}

fn corpus(path: &Path, cache: Option<&Path>) -> Result<Corpus, String> {
    // The messages of the goldens, without what their calls need.
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls }}{{ eos_token }}{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    let tokenizer = tokenizer(Some(template), true);
    let options = ReadOptions {
        tokenizer: Some(&tokenizer),
        max_length: 300,
        vocab_size: 288,
        filter: RowFilter::Samples,
        columns: &Columns::none(),
        cache,
        progress: &|_, _| {},
    };
    Corpus::open(&[path.to_path_buf()], options).map_err(|problem| problem.to_string())
}

fn samples(corpus: &Corpus) -> Vec<Sample> {
    // From the last to the first: places do not depend on the order of reading.
    (0..corpus.len())
        .rev()
        .map(|index| corpus.sample(index).unwrap())
        .collect()
}

#[test]
fn samples_are_those_of_the_twin_with_and_without_a_cache() {
    let folder = tempfile::tempdir().unwrap();
    for (file, twin) in twins() {
        if file.to_string_lossy().contains("values.") && !file.ends_with("values.zstd.parquet") {
            continue;
        }
        let expected = corpus(&twin, None).unwrap();
        let cache = folder.path().join("cache");
        let no_folder = folder.path().join("file");
        fs::write(&no_folder, "").unwrap();
        for cache in [
            None,
            Some(cache.as_path()),
            Some(&cache),
            Some(&no_folder.join("x")),
        ] {
            let found = corpus(&file, cache).unwrap();
            assert_eq!(
                samples(&found),
                samples(&expected),
                "{} {cache:?}",
                file.display()
            );
            assert_eq!(found.counts, expected.counts);
        }
    }
}

/// The error for a file of these bytes.
fn refused(name: &str, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    rows(&path)
        .unwrap_err()
        .replace(&folder.path().display().to_string(), "DIR")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

#[test]
fn files_of_other_kinds_are_called_by_their_names() {
    let check = |name: &str, bytes: &[u8], expected: &str| {
        let problem = refused(name, bytes);
        assert!(problem.contains(expected), "{problem}");
    };
    let arrow = fs::read(goldens().join("saved/train/data-00000-of-00001.arrow")).unwrap();
    check(
        "a.arrow",
        &arrow,
        "DIR/a.arrow: expected rows, found an Arrow file; write the rows as Parquet",
    );
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    check(
        "a.parquet",
        pointer,
        "DIR/a.parquet: this is a git-lfs pointer",
    );
    check(
        "a.jsonl.xz",
        b"\xFD7zXZ\0rest",
        "found an xz file; unpack it first",
    );
    check(
        "a.parquet",
        b"{}\n",
        "expected a Parquet file, which ends with `PAR1`, found one of a few bytes",
    );
    let parquet = fs::read(goldens().join("chats.parquet")).unwrap();
    check(
        "a.parquet",
        &parquet[..parquet.len() - 9],
        "found other bytes (is it complete?)",
    );
    check(
        "a.parquet.gz",
        &gzip(&parquet),
        "found one packed as a whole; unpack it first",
    );
    check(
        "a.jsonl",
        b"[\n{}\n]",
        "expected a JSON object, found malformed JSON",
    );
}

#[test]
fn kinds_do_not_depend_on_names_where_bytes_tell_them() {
    let folder = tempfile::tempdir().unwrap();
    let same = |name: &str, bytes: &[u8], expected: Value| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        assert_eq!(Value::from(rows(&path).unwrap()), expected, "{name}");
    };
    let row = json!([{"a": 1}]);
    same("a", b"{\"a\": 1}\n", row.clone());
    same("a.json", b"{\"a\": 1}\n", row.clone());
    same("a.json", b"\n [{\"a\": 1}]", row.clone());
    same("a.jsonl", &gzip(b"{\"a\": 1}\n"), row.clone());
    same("a.JSON.gz", &gzip(b"[{\"a\": 1}]"), row);
    same(
        "a.csv.gz",
        &gzip(b"a,b\n1,\n"),
        json!([{"a": "1", "b": null}]),
    );
    let parquet = fs::read(goldens().join("chats.parquet")).unwrap();
    same(
        "a.bin",
        &parquet,
        rows(&goldens().join("chats.jsonl")).unwrap().into(),
    );
}

/// Files that were found by mutation, and that an earlier version did not survive.
#[test]
fn broken_files_are_refused() {
    let files = fs::read_dir(goldens().join("broken")).unwrap();
    for file in files.map(|file| file.unwrap().path()) {
        let problem = rows(&file).unwrap_err();
        assert!(
            problem.contains("expected "),
            "{}: {problem}",
            file.display()
        );
    }
}

#[test]
fn bombs_are_refused_at_the_stated_limit() {
    let lines = "{}\n".repeat(50 << 20);
    let problem = refused("a.jsonl.gz", &gzip(lines.as_bytes()));
    assert!(
        problem.contains("cannot read: it unpacks to more than "),
        "{problem}"
    );
    let cut = &gzip(b"{\"a\": 1}\n{\"a\": 2}\n")[..20];
    assert!(refused("a.jsonl.gz", cut).contains("a.jsonl.gz: cannot read: "));
    assert_eq!(unpacked_limit(1000), (64 << 20) + 200_000);
}
