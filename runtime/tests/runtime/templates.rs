//! Chat templates beside transformers, byte for byte: `tests/templates/make.py` writes what this compares with.

use crate::support::messages;
use glassgate_runtime::{Message, Template, TemplateSource};
use serde_json::{Value, json};

/// What Python can do and we refuse, so that nobody is answered to another text than the model was trained on.
const REFUSED_HERE: [&str; 16] = [
    // Of an empty text, by a mistake of the library.
    "last[::-1]",
    "messages | tojson(separators=(',', ':'))",
    "{'b': 1, 'a': 2} | tojson(sort_keys=true)",
    "last | tojson(ensure_ascii=true)",
    "last | tojson(4)",
    "'%05.1f' % 2.25",
    "last | wordcount",
    "last.removeprefix('Hello')",
    "last.partition(' ')[0]",
    "last.encode()",
    "messages.copy() | length",
    "last.zfill(3)",
    "cycler('a', 'b').next()",
    "joiner(',')() ~ 'x'",
    "'a-b' | replace('-', '') | center(5)",
    "'a b' | urlencode",
];

fn render(text: &Value, special: &Value, talk: &[Message]) -> Result<String, String> {
    let source: TemplateSource = serde_json::from_value(json!({"text": text, "special": special})).expect("a source");
    let template = Template::new(&source).map_err(|error| error.to_string())?;
    template.render(talk).map_err(|error| error.to_string())
}

#[test]
fn templates_say_what_transformers_makes_of_them_or_refuse() {
    let path = [env!("CARGO_MANIFEST_DIR"), "/tests/templates/cases.json"].concat();
    let whole: Value = serde_json::from_slice(&std::fs::read(path).expect("cases.json")).expect("valid JSON");
    let talks: Vec<Vec<Message>> = whole["talks"].as_array().expect("talks").iter().map(messages).collect();
    let mut refused_here = Vec::new();
    for case in whole["cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("a name");
        let expected = case["rendered"].as_array().expect("one for all talks, or one for each");
        let mut is_refused_here = false;
        for (number, talk) in talks.iter().enumerate() {
            let expected = expected.get(number).unwrap_or(&expected[0]).as_str();
            match render(&case["text"], &whole["special"], talk) {
                Ok(got) => assert_eq!(Some(got.as_str()), expected, "{name}, talk {number}"),
                Err(why) => {
                    is_refused_here |= expected.is_some();
                    assert!(expected.is_none() || REFUSED_HERE.contains(&name), "{name}, talk {number}: {why}");
                }
            }
        }
        refused_here.extend(is_refused_here.then_some(name));
    }
    assert_eq!(refused_here, REFUSED_HERE);
}
