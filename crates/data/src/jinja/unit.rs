//! Small templates, and what Jinja2 makes of them.

use super::*;
use serde_json::json;

fn render(source: &str) -> Result<String> {
    let variables = [
        (
            "tool",
            json!({"z": "<a> & 'b'", "a": [1, 2.5, null, true, "é"]}),
        ),
        ("text", json!("a b")),
    ];
    let named = variables
        .iter()
        .map(|(name, value)| (*name, Value::of_json(value)));
    Template::parse(source)?.render(named.collect())
}

fn check(source: &str, expected: &str) {
    assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
}

fn refused(source: &str, expected: &str) {
    let problem = render(source).unwrap_err().to_string();
    assert!(problem.contains(expected), "{source}: {problem}");
}

#[test]
fn a_template_that_never_ends_is_stopped() {
    let loops =
        "{% for i in range(10000) %}{% for j in range(10000) %}{{ j }}{% endfor %}{% endfor %}";
    refused(loops, "takes more than");
    let text = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    refused(text, "makes too much text");
    refused("{{ 'a' * 9999999999 }}", "makes too much text");
    refused("{{ '%99999999d' % 1 }}", "width");
    refused(
        "{{ 'a'|replace('', 'b' * 60000000)|replace('b', 'b' * 60000000) }}",
        "makes too much text",
    );
    refused(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "calls itself too deeply",
    );
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}";
    refused(nested, "nested too deeply");
    refused(
        &format!("{{{{ {}1{} }}}}", "(".repeat(9999), ")".repeat(9999)),
        "nested too deeply",
    );
    refused(&"{% if x %}".repeat(9999), "nested too deeply");
    refused(
        &format!("{{{{ {}1 }}}}", "-".repeat(9999)),
        "nested too deeply",
    );
    let cycle = "{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = [b] %}{{ a.b }}";
    refused(cycle, "cannot print");
}

#[test]
fn white_space_goes_where_jinja_removes_it() {
    check("  {% if true %}\nx\n  {% endif %}\ny", "x\ny");
    check("a {%- if true -%} b {%- endif %} c\n", "ab c");
    check("a\r\n{# no #}\r\nb\n\n", "a\nb\n");
    check(" {%+ if true +%}\nx{% endif %}", " \nx");
    check("{% raw %}{{ a }}{% endraw %}\nb", "{{ a }}b");
}

#[test]
fn values_print_as_python_prints_them() {
    check(
        "{{ tool|tojson }}",
        r#"{"z": "<a> & 'b'", "a": [1, 2.5, null, true, "é"]}"#,
    );
    check(
        "{{ tool }}",
        r#"{'z': "<a> & 'b'", 'a': [1, 2.5, None, True, 'é']}"#,
    );
    check(
        "{{ none ~ true ~ 1e16 ~ 1.0 ~ (1,) }}",
        "NoneTrue1e+161.0(1,)",
    );
    check(
        "{{ 2 ** 100 }} {{ 7 // -2 }} {{ -7 % 3 }} {{ 7 / 2 }}",
        "1267650600228229401496703205376 -4 2 3.5",
    );
    check("{{ '%s is %05.1f%%' % ('x', 2.25) }}", "x is 002.2%");
    check(
        "{{ 'aaa'|replace('a', 'b', 2) }} {{ 'aaa'.replace('a', 'b', 1) }}",
        "bba baa",
    );
    check(
        "{{ text[::-1] }} {{ [1, 2, 3][-2:] }} {{ missing }}|",
        "b a [2, 3] |",
    );
}

#[test]
fn problems_name_their_line() {
    refused(
        "a\n{{ missing.key }}",
        "'missing' is undefined (line 2 of the template)",
    );
    refused(
        "\n\n{% if %}",
        "syntax error: expected an expression (line 3",
    );
    refused("{% include 'x' %}", "unknown tag 'include'");
    refused(
        "{{ raise_exception('roles must alternate') }}",
        "roles must alternate",
    );
    refused("{{ [].append(1) }}", "unsafe");
    refused("{{ 1|nothing }}", "no filter named 'nothing'");
}

/// Made by `tests/goldens/chat_templates.py` with transformers and jinja2.
const PAIRS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../tests/goldens/chat_templates/golden.json"
);

#[test]
fn renderings_are_those_of_hugging_face() {
    let text = std::fs::read_to_string(PAIRS).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let special_tokens = serde_json::from_value(golden["special_tokens"].clone()).unwrap();
    let special_tokens: std::collections::BTreeMap<String, serde_json::Value> = special_tokens;
    let mut pairs = 0;
    for of in golden["templates"].as_array().unwrap() {
        let (name, source) = (&of["template"], of["source"].as_str().unwrap());
        let template = crate::ChatTemplate::new(source, special_tokens.clone()).unwrap();
        let chats = golden["chats"].as_array().unwrap().iter();
        for (chat, expected) in chats.zip(of["rendered"].as_array().unwrap()) {
            let chat = chat.as_str().unwrap();
            let found = template.render_json(chat);
            match expected.as_str() {
                Some(expected) => assert_eq!(found.unwrap(), expected, "{name} of {chat}"),
                None => assert!(found.is_err(), "{name} of {chat}"),
            }
            pairs += 1;
        }
    }
    assert_eq!(pairs, 120);
}

fn render_for_harness(source: &str) -> Result<String> {
    let doc = json!({"question": "q", "choices": ["a", "b"], "answer": {"label": 1}});
    let names = ["question", "choices", "answer"];
    let variables = names.map(|name| (name, Value::of_json(&doc[name])));
    Template::parse_as(source, Syntax::Harness)?.render(variables.into())
}

/// What Jinja2 makes of them in an environment with `StrictUndefined` and `keep_trailing_newline`.
#[test]
fn templates_of_tasks_keep_white_space_and_refuse_names_without_a_value() {
    for (source, expected) in [
        ("{{question}}\n", "q\n"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\n  \nb\n  \nc"),
        ("a\n  {%- if true -%}\nb\n  {%- endif %}\nc", "ab\nc"),
        (
            "{{ missing | default('x') }}{{ missing is defined }}",
            "xFalse",
        ),
        ("{{ answer.label }}{{ choices[answer['label']] }}", "1b"),
        ("{{ answer.other | default('y') }}", "y"),
        ("{{ question | regex_replace('(.)', '<\\\\1>') }}", "<q>"),
        (
            "{{ 'aaa' | regex_replace(pattern='a', repl='b', count=2) }}",
            "bba",
        ),
    ] {
        assert_eq!(
            render_for_harness(source).as_deref(),
            Ok(expected),
            "{source}"
        );
    }
    for (source, name) in [
        ("{{ missing }}", "missing"),
        ("{% if missing %}x{% endif %}", "missing"),
        ("{{ 'a' ~ missing }}", "missing"),
        ("{{ answer.other }}", "other"),
        ("{{ missing.label | default('x') }}", "missing"),
        ("{% for x in missing %}{% endfor %}", "missing"),
        ("{{ missing | upper }}", "missing"),
        ("{{ choices[7] }}", ""),
    ] {
        let problem = render_for_harness(source).unwrap_err().to_string();
        assert!(
            problem.contains(name) && problem.contains("undefined"),
            "{source}: {problem}"
        );
    }
}

#[test]
fn a_lone_expression_is_a_value() {
    let doc = [("choices", Value::of_json(&json!(["it's", "b"])))];
    let of =
        |source: &str| Template::parse_as(source, Syntax::Harness)?.evaluate(doc.clone().into());
    assert_eq!(
        of("{{ choices }}")
            .unwrap()
            .unwrap()
            .elements(&Budget::default())
            .unwrap()
            .len(),
        2
    );
    assert!(of("{{ choices }} ").unwrap().is_none());
    assert!(of("text").unwrap().is_none());
}
