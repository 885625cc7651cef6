//! Chat templates: the Jinja that a model folder brings, rendered as the Python side would. A template is a program: its
//! steps are bounded here, its memory is not. What strangers wrote belongs into a process that may be lost.

use super::{Message, TemplateError, generation, python, strftime};
use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Serializer, ser::Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Instructions one rendering may take; a thousand messages need about a tenth. Beyond it the rendering fails.
const FUEL: u64 = 2_000_000;

/// A template as its model brings it, to be compiled here or in another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TemplateSource {
    pub(crate) text: String,
    /// `bos_token`, `eos_token` and their like, by name.
    pub(crate) special: Map<String, serde_json::Value>,
}

/// A compiled template.
pub struct Template {
    environment: Environment<'static>,
    special: Value,
}

const NAME: &str = "chat";
/// Several times the longest that is known.
const SOURCE_BYTES_MAX: usize = 128 << 10;

impl Template {
    pub fn new(source: &TemplateSource) -> Result<Template, TemplateError> {
        let TemplateSource { text, special } = source;
        if text.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError(format!("it has {} bytes (at most {SOURCE_BYTES_MAX})", text.len())));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As the Python side configures Jinja.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| describe(&error))?);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("trim", python::trim);
        environment.add_function("raise_exception", |why: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, why))
        });
        environment.add_function("strftime_now", |format: String| strftime::now(&format));
        environment.add_filter("tojson", to_json);
        // Jinja reads every kind of line end as one.
        let text = generation::without_marks(&text.replace("\r\n", "\n").replace('\r', "\n"));
        environment.add_template_owned(NAME, text).map_err(|error| describe(&error))?;
        Ok(Template { environment, special: Value::from(Serde(special)) })
    }

    /// The conversation as the model was trained to read it, up to where its answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        let values = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => true,
            tools => (),
            documents => (),
            ..self.special.clone()
        };
        let template = self.environment.get_template(NAME).map_err(|error| describe(&error))?;
        // Nobody's template may end us by what the library did not think of.
        match catch_unwind(AssertUnwindSafe(|| template.render(values))) {
            Ok(rendered) => rendered.map_err(|error| describe(&error)),
            Err(_) => Err(TemplateError("it cannot be rendered".to_owned())),
        }
    }
}

/// What a template says with `raise_exception` is meant for the caller; the rest of an error is ours.
fn describe(error: &Error) -> TemplateError {
    TemplateError(error.detail().map_or_else(|| error.to_string(), str::to_owned))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…)`, and no other options. The built-in filter escapes for HTML instead.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let is_ours = |name| -> Result<bool, Error> { Ok(!options.get::<Option<bool>>(name)?.unwrap_or(false)) };
    if !is_ours("ensure_ascii")? || !is_ours("sort_keys")? {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii and sort_keys are not supported"));
    }
    options.assert_all_used()?;
    let fail = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, OneLine)).map_err(fail)?,
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(fail)?;
        }
    }
    String::from_utf8(out).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// `", "` and `": "` between values, as Python writes them.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::{Map, Message, Template, TemplateError, TemplateSource};

    fn render(source: &str, messages: &[(&str, &str)]) -> Result<String, TemplateError> {
        let special = Map::from_iter([("bos_token".to_owned(), "<s>".into())]);
        let messages: Vec<Message> = messages
            .iter()
            .map(|&(role, content)| Message { role: role.to_owned(), content: content.to_owned() })
            .collect();
        Template::new(&TemplateSource { text: source.to_owned(), special })?.render(&messages)
    }

    #[test]
    fn templates_may_use_what_python_would_give_them() {
        let chat = [("user", " Hi, it's <you> "), ("assistant", "한국어")];
        let cases = [
            (
                "{{ bos_token }}{% for m in messages %}\n    {{ m['role'].upper() }}:{{ m.content | trim }};{% endfor %}\n",
                "<s>    USER:Hi, it's <you>;    ASSISTANT:한국어;",
            ),
            (
                "{{ messages | tojson }}",
                r#"[{"role": "user", "content": " Hi, it's <you> "}, {"role": "assistant", "content": "한국어"}]"#,
            ),
            (
                "{{ {'a': [1, true, none], 'b': {}} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1,\n    true,\n    null\n  ],\n  \"b\": {}\n}",
            ),
            ("{{ messages[0].content.strip().split(' ')[0].startswith('Hi') }} {{ tools is none }}", "True True"),
            ("{%- for m in messages -%}{%- if loop.index0 == 1 -%}{%- break -%}{%- endif -%}x{%- endfor -%}", "x"),
            ("{% if add_generation_prompt %}go{% endif %}{{ undefined_name }}", "go"),
            ("{{ strftime_now('%Y') | length }}", "4"),
        ];
        for (source, want) in cases {
            assert_eq!(render(source, &chat).as_deref(), Ok(want), "{source}");
        }
    }

    #[test]
    fn a_template_may_refuse_in_its_own_words_and_may_not_run_for_ever() {
        let refused = render("{{ raise_exception('Roles must alternate') }}", &[("user", "x")]);
        assert_eq!(refused, Err(TemplateError("Roles must alternate".to_owned())));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(render(endless, &[]).is_err());
        assert!(render("{% for %}", &[]).is_err());
    }
}
