use super::*;
use crate::file::require_text;
use crate::tokenizer::tests::{folder, goldens};
use crate::{Bos, GenerationPrompt, Special, Tokenizer, TokenizerFiles};
use std::path::Path;

fn file(name: &str) -> Value {
    let path = goldens().join("../gguf_tokens").join(name);
    serde_json::from_str(&require_text(&path, 1 << 20).unwrap()).unwrap()
}

/// The keys of a golden file.
fn keys(golden: &Value) -> GgufTokens {
    let list = |key: &str| golden.get(key).cloned().unwrap_or(json!([]));
    GgufTokens {
        model: golden["model"].as_str().unwrap().to_owned(),
        pre: golden["pre"].as_str().map(str::to_owned),
        tokens: serde_json::from_value(list("tokens")).unwrap(),
        types: serde_json::from_value(list("types")).unwrap(),
        scores: serde_json::from_value(list("scores")).unwrap(),
        merges: serde_json::from_value(list("merges")).unwrap(),
        bos: Some(1),
        eos: Some(2),
        add_space_prefix: golden["add_space_prefix"].as_bool(),
        ..GgufTokens::default()
    }
}

fn files(gguf: &GgufTokens) -> crate::Result<TokenizerFiles> {
    TokenizerFiles::from_gguf(Path::new("model.gguf"), gguf.clone())
}

fn tokenizer(gguf: &GgufTokens) -> Tokenizer {
    Tokenizer::new(&files(gguf).unwrap()).unwrap()
}

/// Ids of every text are llama.cpp's, and give the text again.
fn check_ids(name: &str, gguf: &GgufTokens, texts: &Value, ids: &Value) {
    let tokenizer = tokenizer(gguf);
    let texts: Vec<String> = serde_json::from_value(texts.clone()).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(ids.clone()).unwrap();
    assert!(texts.len() > 30 && texts.len() == ids.len());
    for (text, expected) in texts.iter().zip(&ids) {
        let found = tokenizer.encode(text, Bos::Never).unwrap();
        assert_eq!(&found, expected, "{name}: {text:?}");
        // SentencePiece writes a space after a control token and one kind of space for two.
        let changes = gguf.model == "llama" && text.contains(['<', '▁']);
        let composed = matches!(name, "qwen2" | "deepseek-r1-qwen") && !text.is_ascii();
        if !changes && !composed {
            assert_eq!(&tokenizer.decode(&found, Special::Keep).unwrap(), text);
        }
    }
}

#[test]
fn byte_level_ids_are_those_of_llama_cpp() {
    let golden = file("byte_level.json");
    let all = golden["ids"].as_object().unwrap();
    assert_eq!(all.len(), 9);
    for (pre, ids) in all {
        let gguf = GgufTokens {
            pre: Some(pre.clone()),
            ..keys(&golden)
        };
        check_ids(pre, &gguf, &golden["texts"], ids);
    }
}

#[test]
fn sentencepiece_ids_are_those_of_llama_cpp() {
    for name in ["sentencepiece.json", "sentencepiece_bare.json"] {
        let golden = file(name);
        check_ids(name, &keys(&golden), &golden["texts"], &golden["ids"]);
    }
}

#[test]
fn the_tokenizer_is_the_one_that_its_text_describes() {
    let mut all = vec![deepseek_v3()];
    for name in ["sentencepiece.json", "sentencepiece_bare.json"] {
        all.push(keys(&file(name)));
    }
    let golden = file("byte_level.json");
    all.extend(
        golden["ids"]
            .as_object()
            .unwrap()
            .keys()
            .map(|pre| GgufTokens {
                pre: Some(pre.clone()),
                add_eos: Some(true),
                ..keys(&golden)
            }),
    );
    let texts = [
        "",
        "a",
        " Hello  world's 1234567\n\n\tna\u{EF}ve \u{4E13}\u{5BB6} <s>x</s>",
        "\u{1F680}\u{200D} e\u{301}",
    ];
    for gguf in all {
        // The library's own reading, and its own steps.
        let read = tokenizers::Tokenizer::from_bytes(gguf.to_json().unwrap()).unwrap();
        let built = gguf.build().unwrap();
        assert_eq!(
            built.get_vocab(true),
            read.get_vocab(true),
            "{:?}",
            gguf.pre
        );
        assert_eq!(
            built.get_added_tokens_decoder(),
            read.get_added_tokens_decoder()
        );
        for text in texts {
            let [built_as, read_as] =
                [built.encode(text, false), read.encode(text, false)].map(Result::unwrap);
            assert_eq!(built_as.get_ids(), read_as.get_ids(), "{text}");
            assert_eq!(built_as.get_offsets(), read_as.get_offsets(), "{text}");
            let ids = built_as.get_ids();
            let [built_as, read_as] =
                [built.decode(ids, false), read.decode(ids, false)].map(Result::unwrap);
            assert_eq!(built_as, read_as, "{text}");
        }
    }
}

/// What a GGUF says of the golden model's tokenizer.
fn deepseek_v3() -> GgufTokens {
    let path = goldens().join("tokenizer.json");
    let file: Value = serde_json::from_str(&require_text(&path, 1 << 20).unwrap()).unwrap();
    let mut gguf = GgufTokens {
        model: "gpt2".into(),
        pre: Some("deepseek-v3".into()),
        tokens: vec![String::new(); 288],
        types: vec![1; 288],
        merges: serde_json::from_value(file["model"]["merges"].clone()).unwrap(),
        bos: Some(0),
        eos: Some(1),
        padding: Some(1),
        add_bos: Some(true),
        ..GgufTokens::default()
    };
    for (text, id) in file["model"]["vocab"].as_object().unwrap() {
        gguf.tokens[id.as_u64().unwrap() as usize].clone_from(text);
    }
    for added in file["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        gguf.tokens[id] = added["content"].as_str().unwrap().to_owned();
        gguf.types[id] = if added["special"] == json!(true) {
            3
        } else {
            4
        };
    }
    gguf
}

#[test]
fn a_gguf_gives_the_ids_of_the_tokenizer_it_was_made_from() {
    let original = Tokenizer::open(&goldens()).unwrap();
    let tokenizer = tokenizer(&deepseek_v3());
    let texts = file("byte_level.json")["texts"].clone();
    let mut texts: Vec<String> = serde_json::from_value(texts).unwrap();
    texts.push(
        "<｜begin▁of▁sentence｜>a<｜User｜>b<think>\nc</think> d<｜end▁of▁sentence｜>".into(),
    );
    for text in &texts {
        for bos in [Bos::Add, Bos::Never] {
            let expected = original.encode(text, bos).unwrap();
            assert_eq!(tokenizer.encode(text, bos).unwrap(), expected, "{text:?}");
            for special in [Special::Keep, Special::Skip] {
                let decode = |from: &Tokenizer| from.decode(&expected, special).unwrap();
                assert_eq!(decode(&tokenizer), decode(&original));
            }
        }
    }
    let facts = |from: &Tokenizer| (from.bos_id(), from.eos_id(), from.vocab_size());
    assert_eq!(facts(&tokenizer), facts(&original));
}

#[test]
fn a_folder_with_its_files_has_the_same_tokenizer() {
    let mut gguf = deepseek_v3();
    gguf.add_eos = Some(true);
    gguf.chat_templates = vec![(
        DEFAULT.into(),
        "{{ bos_token }}{{ messages[0].content }}{{ pad_token }}".into(),
    )];
    let files = files(&gguf).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let texts = files.files().unwrap();
    for (name, text) in &texts {
        std::fs::write(folder.path().join(name), text.as_bytes()).unwrap();
    }
    let (written, direct) = (
        Tokenizer::open(folder.path()).unwrap(),
        Tokenizer::new(&files).unwrap(),
    );
    assert_eq!(written.identity(), direct.identity());
    let rendered = written.chat_template().unwrap().render(
        &[json!({"role": "user", "content": "hi"})],
        None,
        GenerationPrompt::Add,
    );
    let expected = "<｜begin▁of▁sentence｜>hi<｜end▁of▁sentence｜>";
    assert_eq!(rendered.unwrap(), expected);
    // Other tools let the file's post-processor add BOS and EOS.
    let other = tokenizers::Tokenizer::from_bytes(texts[0].1.as_bytes()).unwrap();
    let ids = |text: &str, special: bool| other.encode(text, special).unwrap().get_ids().to_vec();
    assert_eq!(
        ids("hi", true),
        [vec![0], ids("hi", false), vec![1]].concat()
    );
}

#[test]
fn bos_is_added_where_the_kind_of_tokenizer_wants_it() {
    let check = |change: fn(&mut GgufTokens), expected: bool| {
        let mut gguf = deepseek_v3();
        gguf.add_bos = None;
        change(&mut gguf);
        let ids = tokenizer(&gguf).encode("hi", Bos::Add).unwrap();
        assert_eq!(ids.first() == Some(&0), expected);
    };
    check(|_| {}, false);
    check(|gguf| gguf.pre = Some("llama-bpe".into()), true);
    check(
        |gguf| (gguf.pre, gguf.bos) = (Some("llama-bpe".into()), None),
        false,
    );
    check(
        |gguf| (gguf.pre, gguf.add_bos) = (Some("llama-bpe".into()), Some(false)),
        false,
    );
    check(|gguf| gguf.add_bos = Some(true), true);
}

#[test]
fn tokens_may_hold_spaces_or_nothing_and_merges_may_repeat() {
    let gguf = GgufTokens {
        tokens: [" ", "a", " a", "", "", " a "].map(String::from).to_vec(),
        ..GgufTokens::default()
    };
    let vocabulary = vocabulary(&gguf).unwrap();
    assert_eq!(vocabulary.ids["[EMPTY_4]"], 4);
    let listed = ["  a", " a  ", "  a"].map(String::from);
    // The second splits into " a" and " ", as its first space is part of a token.
    assert_eq!(
        merges(&listed, &vocabulary).unwrap(),
        [(" ", "a"), (" a", " ")]
    );
}

/// The message of a file that was changed.
fn check_problem(mut gguf: GgufTokens, change: fn(&mut GgufTokens), expected: &str) {
    change(&mut gguf);
    let tokenizer = files(&gguf).and_then(|files| Tokenizer::new(&files));
    let problem = tokenizer.unwrap_err().to_string();
    let expected = format!("model.gguf: `tokenizer.{expected}");
    assert!(problem.starts_with(&expected), "{problem}\n{expected}");
}

#[test]
fn malformed_kinds_are_named() {
    let check = |change, expected: &str| check_problem(deepseek_v3(), change, expected);
    check(
        |gguf| gguf.model = "bert".into(),
        "ggml.model`: expected gpt2 or llama, found `bert`",
    );
    let known = "ggml.pre`: expected one of default, gpt-2, smollm, llama-bpe, llama3, llama-v3, qwen2, \
                 deepseek-r1-qwen, deepseek-llm, deepseek-coder, deepseek-v3, found";
    check(|gguf| gguf.pre = Some("x".into()), &format!("{known} `x`"));
    check(
        |gguf| gguf.pre = None,
        &format!("{known} none; convert the model again"),
    );
    check(
        |gguf| gguf.chat_templates = vec![(DEFAULT.into(), "{% if %}".into())],
        "chat_template`: ",
    );
}

#[test]
fn malformed_tokens_are_named() {
    let check = |change, expected: &str| check_problem(deepseek_v3(), change, expected);
    check(
        |gguf| gguf.tokens.clear(),
        "ggml.tokens`: expected 1 to 2^32 tokens, found 0",
    );
    check(
        |gguf| gguf.tokens[7] = gguf.tokens[5].clone(),
        "ggml.tokens`: expected distinct tokens, found \"#\" as 5 and as 7",
    );
    check(
        |gguf| gguf.types.truncate(5),
        "ggml.token_type`: expected one for each of 288 tokens, found 5",
    );
    check(
        |gguf| gguf.types[3] = 9,
        "ggml.token_type`: expected 0 to 6, found 9 for token 3",
    );
}

#[test]
fn malformed_roles_are_named() {
    let check = |change, expected: &str| check_problem(deepseek_v3(), change, expected);
    check(
        |gguf| gguf.bos = Some(288),
        "ggml.bos_token_id`: expected an id below 288, found 288",
    );
    check(
        |gguf| gguf.eos = Some(u32::MAX),
        "ggml.eos_token_id`: expected an id below 288",
    );
    check(
        |gguf| gguf.unknown = Some(999),
        "ggml.unknown_token_id`: expected an id below 288",
    );
    check(
        |gguf| gguf.padding = Some(999),
        "ggml.padding_token_id`: expected an id below 288",
    );
    check(
        |gguf| gguf.bos = None,
        "ggml.add_bos_token`: expected a `tokenizer.ggml.bos_token_id` to add, found none",
    );
    check(
        |gguf| (gguf.eos, gguf.add_eos) = (None, Some(true)),
        "ggml.add_eos_token`: expected a `tokenizer.ggml.eos_token_id` to add, found none",
    );
}

#[test]
fn malformed_merges_are_named() {
    let check = |change, found: &str| {
        let expected = "ggml.merges`: expected two tokens that make a third, found ";
        check_problem(deepseek_v3(), change, &format!("{expected}{found}"));
    };
    check(|gguf| gguf.merges[1] = "ab".into(), "\"ab\" as merge 1");
    check(|gguf| gguf.merges[1].clear(), "\"\" as merge 1");
    check(
        |gguf| gguf.merges[2] = "a zz".into(),
        "\"a zz\" (no token is \"zz\") as merge 2",
    );
    check(
        |gguf| gguf.merges[2] = "a ~".into(),
        "\"a ~\" (no token is \"a~\") as merge 2",
    );
    check(
        |gguf| gguf.merges[2] = "a ".into(),
        "\"a \" (no token is \"\") as merge 2",
    );
    let none = "ggml.merges`: expected merges, found none";
    check_problem(deepseek_v3(), |gguf| gguf.merges.clear(), none);
}

#[test]
fn malformed_sentencepiece_is_named() {
    let check = |change, expected: &str| {
        check_problem(keys(&file("sentencepiece.json")), change, expected);
    };
    check(
        |gguf| gguf.scores.truncate(5),
        "ggml.scores`: expected one for each of 700 tokens, found 5",
    );
    check(
        |gguf| gguf.scores[9] = f32::NAN,
        "ggml.scores`: expected numbers, found NaN for token 9",
    );
    check(
        |gguf| gguf.tokens[699] = "a".repeat(1025),
        "ggml.tokens`: expected at most 1024 bytes, found 1025 in token 699",
    );
    check(
        |gguf| (gguf.types[0], gguf.tokens[14]) = (1, "x0A".into()),
        "ggml.tokens`: expected a token for every byte or one of type 2 (unknown), found no <0x0A>",
    );
    check(
        |gguf| gguf.types[260..].fill(3),
        "ggml.tokens`: expected tokens made of others, found none",
    );
}

#[test]
fn problems_of_a_folder_still_name_its_files() {
    let folder = folder(|_, config| config["chat_template"] = json!("{% if %}"));
    let problem = Tokenizer::open(folder.path()).unwrap_err().to_string();
    assert!(problem.contains("tokenizer_config.json: "), "{problem}");
}
