//! Compares renderings of chat templates with those of Hugging Face's library.
//!
//! ```text
//! cargo run -p moeforge-data --example chat_templates -- PAIRS.json
//! ```
//!
//! `tests/goldens/chat_templates.py` makes `PAIRS.json` from the templates of installed packages or of folders. The exit code is
//! 1 if any rendering differs.

use moeforge_data::ChatTemplate;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::error::Error;

/// What the script wrote.
#[derive(Deserialize)]
struct TemplatePairs {
    special_tokens: BTreeMap<String, serde_json::Value>,
    /// The variables of each chat, as JSON.
    chats: Vec<String>,
    templates: Vec<Rendered>,
}

#[derive(Deserialize)]
struct Rendered {
    template: String,
    source: String,
    /// For each chat; none where Jinja2 refuses it.
    rendered: Vec<Option<String>>,
}

#[expect(clippy::print_stdout, reason = "what an example is run for")]
fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args()
        .nth(1)
        .ok_or("usage: chat_templates PAIRS.json")?;
    let pairs: TemplatePairs = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let (mut equal, mut refused, mut different) = (0, 0, 0);
    for of in &pairs.templates {
        let template = ChatTemplate::new(&of.source, pairs.special_tokens.clone());
        for (number, (chat, expected)) in pairs.chats.iter().zip(&of.rendered).enumerate() {
            let found = match &template {
                Ok(template) => template.render_json(chat),
                Err(problem) => Err(moeforge_data::Error::Template(problem.to_string())),
            };
            match (&found, expected) {
                (Ok(found), Some(expected)) if found == expected => equal += 1,
                (Err(_), None) => refused += 1,
                _ => {
                    different += 1;
                    println!(
                        "{} of chat {number}:\n  expected {expected:?}\n  found    {found:?}",
                        of.template
                    );
                }
            }
        }
    }
    println!(
        "{} templates: {equal} pairs equal, {refused} refused by both, {different} different",
        pairs.templates.len()
    );
    match different {
        0 => Ok(()),
        _ => Err("some renderings differ".into()),
    }
}
