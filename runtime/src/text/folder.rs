//! A model's text side, tokenizer and chat template, from its folder or its GGUF file.

use super::{
    Message, TemplateError, TextError,
    template::{Template, TemplateSource},
    tokenizer::Tokenizer,
    vocabulary,
};
use crate::{
    settings::Renders,
    weights::{WeightError, folder, gguf::Vocabulary},
};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
/// Where newer folders keep the template; it wins over the one in the configuration.
const TEMPLATE: &str = "chat_template.jinja";

pub(crate) struct TextSide {
    tokenizer: Tokenizer,
    chat: Chat,
}

enum Chat {
    /// The model brings no chat template.
    Never,
    Here(Box<Template>),
    Elsewhere(TemplateSource),
}

impl TextSide {
    /// The files that this reads.
    pub fn files(folder: &Path) -> Vec<PathBuf> {
        [TOKENIZER, CONFIG, TEMPLATE].map(|name| folder.join(name)).into()
    }

    /// `vocab`: how many ids the model knows.
    pub fn read(folder: &Path, vocab: usize, renders: Renders) -> Result<TextSide, WeightError> {
        let path = folder.join(TOKENIZER);
        let json = folder::read_text(&path)?.ok_or_else(|| WeightError::new(&path, "is missing"))?;
        let tokenizer = Tokenizer::new(&json, vocab).map_err(|why| WeightError::new(&path, why))?;

        let mut path = folder.join(CONFIG);
        let config = folder::read_json(&path)?.unwrap_or(Value::Null);
        let mut source = chat_template(&config).map_err(|why| WeightError::new(&path, why))?;
        if let Some(text) = folder::read_text(&folder.join(TEMPLATE))? {
            path = folder.join(TEMPLATE);
            source = Some(text);
        }
        let source = source.map(|text| TemplateSource { text, special: special_tokens(&config) });
        TextSide::new(tokenizer, source, renders).map_err(|why| WeightError::new(&path, why))
    }

    /// The text side of the GGUF file `path`.
    pub fn from_vocabulary(
        path: &Path,
        vocabulary: &Vocabulary,
        vocab: usize,
        renders: Renders,
    ) -> Result<TextSide, WeightError> {
        let bad = |why: String| WeightError::new(path, why);
        let json = vocabulary::tokenizer_json(vocabulary).map_err(bad)?;
        let tokenizer = Tokenizer::new(&json, vocab).map_err(|why| bad(format!("its vocabulary {why}")))?;
        let text = |id: u32| Value::from(vocabulary.tokens[id as usize].as_str());
        let special = vocabulary.named.iter().map(|&(name, id)| (name.to_owned(), text(id))).collect();
        let source = vocabulary.template.clone().map(|text| TemplateSource { text, special });
        TextSide::new(tokenizer, source, renders).map_err(bad)
    }

    /// A template that is rendered here is tried on a short conversation, so that one that cannot work is found now.
    fn new(mut tokenizer: Tokenizer, source: Option<TemplateSource>, renders: Renders) -> Result<TextSide, String> {
        // What marks turns must not be something that a user can type.
        if let Some(source) = &source {
            tokenizer.guard_markers_in(&source.text)?;
        }
        let bad = |error: TemplateError| format!("its chat template does not work: {error}");
        let chat = match (source, renders) {
            (None, _) => Chat::Never,
            (Some(source), Renders::Here) => Chat::Here(Box::new(Template::new(&source).map_err(bad)?)),
            (Some(source), Renders::Elsewhere) => Chat::Elsewhere(source),
        };
        let text = TextSide { tokenizer, chat };
        if let Chat::Here(_) = text.chat {
            let hello = Message { role: "user".to_owned(), content: "Hello".to_owned() };
            let prompt = text.prompt(&[hello]).map_err(bad)?;
            text.encode(&prompt).map_err(|error| bad(TemplateError(error.0)))?;
        }
        Ok(text)
    }

    pub fn prompt(&self, messages: &[Message]) -> Result<String, TemplateError> {
        match &self.chat {
            Chat::Here(template) => template.render(&self.guarded(messages)),
            Chat::Elsewhere(_) => Err(TemplateError("this model's chat template is rendered elsewhere".to_owned())),
            Chat::Never => Err(TemplateError("this model has no chat template".to_owned())),
        }
    }

    /// The template, if it is to be rendered elsewhere.
    pub fn template(&self) -> Option<&TemplateSource> {
        match &self.chat {
            Chat::Elsewhere(source) => Some(source),
            Chat::Here(_) | Chat::Never => None,
        }
    }

    /// The messages as a template may see them: see `guard`.
    pub fn guarded(&self, messages: &[Message]) -> Vec<Message> {
        let safe = |text: &String| self.tokenizer.guarded(text).unwrap_or_else(|| text.clone());
        messages.iter().map(|message| Message { role: safe(&message.role), content: safe(&message.content) }).collect()
    }

    pub fn encode(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        self.tokenizer.encode(rendered)
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// The template itself, or the one called `default` in a list of named ones.
fn chat_template(config: &Value) -> Result<Option<String>, String> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            let source = default.and_then(|entry| entry.get("template")).and_then(Value::as_str);
            source
                .map(|source| Some(source.to_owned()))
                .ok_or_else(|| "its chat templates have no `default`".to_owned())
        }
        Some(_) => Err("`chat_template` must be a string or a list".to_owned()),
    }
}

/// `bos_token`, `eos_token` and their like; each is a string or an object with its `content`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let fields = config.as_object().into_iter().flatten();
    let tokens = fields.filter(|(name, _)| name.ends_with("_token")).filter_map(|(name, value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((name.clone(), Value::from(text)))
    });
    tokens.collect()
}
