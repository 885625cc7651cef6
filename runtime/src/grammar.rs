//! Constrained output: which tokens may come next so that the answer keeps to a schema, an expression, a list or a
//! grammar. The only user of llguidance and toktrie; names no tensor library and no engine.
//!
//! Whoever writes a constraint is a stranger. Its size and its nesting are bounded before it is compiled, the compiler
//! has fuel and a stack of its own, and so has every mask: a constraint that is too much is refused or fails its own
//! request. Compiled grammars are kept by model, whoever asked for them: they hold nothing of an answer, but that one
//! was compiled before can be told by the time that it takes, so somebody who guesses a whole schema letter by letter
//! learns that it was in use.

use crate::text::detokenize::TokenBytes;
use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
};
use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};
use toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// What an answer must be, from its first letter to its last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// A JSON value of this JSON schema.
    JsonSchema(String),
    /// A text that this expression matches as a whole.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// A text of this grammar, in llguidance's dialect of Lark.
    Lark(String),
}

/// The constraint cannot be used; the text says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadGrammar(pub String);

const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Brackets within brackets. JSON of a request has at most 128 levels anyway; a schema has two for each of its own.
const NESTING_MAX: usize = 96;
/// Compiled grammars kept by a model. One takes from some kilobytes to a few megabytes.
const KEPT_MAX: usize = 32;
/// The compiler walks down schemas; a level takes a few kilobytes.
const STACK_BYTES: usize = 16 << 20;
/// The compiler's complaints quote what they are about.
const COMPLAINT_CHARS_MAX: usize = 300;
/// At most this much between two parts of a JSON value. With more, a model that loses its way writes spaces to the end.
const JSON_SPACE: &str = " ?";

/// Bounds what one grammar may cost. A mask's fuel is some milliseconds, which all sequences of a step wait for.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 1000,
        initial_lexer_fuel: 500_000,
        step_lexer_fuel: 50_000,
        step_max_items: 25_000,
        max_lexer_states: 10_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

impl Constraint {
    fn grammar(&self) -> Result<TopLevelGrammar, BadGrammar> {
        let bad = |why: String| Err(BadGrammar(why));
        let source_bytes = match self {
            Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Lark(text) => text.len(),
            Constraint::Choice(choices) => choices.iter().map(|choice| choice.len() + 1).sum(),
        };
        if source_bytes > SOURCE_BYTES_MAX {
            return bad(format!("is {source_bytes} bytes, at most {SOURCE_BYTES_MAX} are read"));
        }
        let grammar = match self {
            Constraint::JsonSchema(text) => {
                let mut schema: serde_json::Value =
                    serde_json::from_str(text).map_err(|error| BadGrammar(format!("is not JSON: {error}")))?;
                if !schema.is_object() && !schema.is_boolean() {
                    return bad("must be an object, or true or false".to_owned());
                }
                check_nesting(text)?;
                if let Some(fields) = schema.as_object_mut() {
                    fields.insert("x-guidance".to_owned(), serde_json::json!({ "whitespace_pattern": JSON_SPACE }));
                }
                GrammarWithLexer::from_json_schema(schema)
            }
            Constraint::Regex(text) => {
                check_nesting(text)?;
                // The compiler would drop it.
                if text.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1 {
                    return bad("ends in a backslash that quotes nothing".to_owned());
                }
                GrammarWithLexer::from_regex(text)
            }
            Constraint::Choice(choices) => {
                if choices.is_empty() || choices.iter().any(String::is_empty) {
                    return bad("must have at least one choice, and no empty one".to_owned());
                }
                // A string of Lark is written as one of JSON. A name in capitals makes them one expression: any number of
                // choices costs no more than their letters.
                let literals: Vec<String> =
                    choices.iter().map(|choice| serde_json::Value::from(choice.as_str()).to_string()).collect();
                GrammarWithLexer::from_lark(format!("start: CHOICE\nCHOICE: {}", literals.join(" | ")))
            }
            Constraint::Lark(text) => {
                check_nesting(text)?;
                GrammarWithLexer::from_lark(text.clone())
            }
        };
        Ok(TopLevelGrammar::from_grammar(grammar))
    }
}

/// Compilers call themselves for every bracket; a stack has an end.
fn check_nesting(text: &str) -> Result<(), BadGrammar> {
    let mut open = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > NESTING_MAX {
            return Err(BadGrammar(format!("is nested deeper than {NESTING_MAX} brackets")));
        }
    }
    Ok(())
}

/// The grammars of one model: its vocabulary in the form that masks are made from, and what was compiled lately.
pub(crate) struct Grammars {
    vocabulary: Arc<TokenBytes>,
    /// Tokens that end an answer.
    end: Vec<u32>,
    /// Rows of logits: tokens beyond the tokenizer's are never allowed.
    rows: usize,
    /// Made when the first grammar is.
    factory: OnceLock<Result<ParserFactory, BadGrammar>>,
    /// The latest at the back.
    kept: Mutex<VecDeque<Grammar>>,
    /// One at a time, so that strangers who send many take no more than one core.
    compiling: Mutex<()>,
}

impl Grammars {
    pub fn new(vocabulary: Arc<TokenBytes>, end: Vec<u32>, rows: usize) -> Grammars {
        Grammars {
            vocabulary,
            end,
            rows,
            factory: OnceLock::new(),
            kept: Mutex::default(),
            compiling: Mutex::default(),
        }
    }

    /// Compiles, or finds what was compiled before. May take some hundred milliseconds.
    pub fn compile(&self, constraint: &Constraint) -> Result<Grammar, BadGrammar> {
        if let Some(found) = self.find(constraint) {
            return Ok(found);
        }
        let grammar = constraint.grammar()?;
        let _alone = self.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = self.find(constraint) {
            return Ok(found);
        }
        let compiled = std::thread::scope(|scope| {
            let compile = || catch_unwind(AssertUnwindSafe(|| self.matcher(grammar)));
            let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, compile).map_err(|error| BadGrammar(error.to_string()))?;
            thread
                .join()
                .and_then(|outcome| outcome)
                .unwrap_or_else(|_| Err(BadGrammar("cannot be compiled".to_owned())))
        })?;
        let grammar = Grammar(Arc::new(Compiled { constraint: constraint.clone(), matcher: Mutex::new(compiled) }));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(grammar.clone());
        Ok(grammar)
    }

    fn find(&self, constraint: &Constraint) -> Option<Grammar> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|grammar| grammar.0.constraint == *constraint)?;
        let found = kept.remove(at)?;
        kept.push_back(found.clone());
        Some(found)
    }

    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, BadGrammar> {
        let factory = self.factory.get_or_init(|| self.make_factory()).as_ref().map_err(Clone::clone)?;
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        // The first mask shows whether there is any text at all, and whether its fuel is enough to begin.
        match matcher.compute_mask_or_eos() {
            Ok(mask) if mask.is_zero() => Err(BadGrammar("allows no text".to_owned())),
            Ok(_) => Ok(matcher),
            Err(error) => Err(complaint(&error)),
        }
    }

    fn make_factory(&self) -> Result<ParserFactory, BadGrammar> {
        let Some(&first) = self.end.first() else {
            return Err(BadGrammar("cannot be kept to by a model without an end token".to_owned()));
        };
        let words: Vec<Vec<u8>> = (0..self.rows as u32).map(|id| self.vocabulary.of(id).to_vec()).collect();
        let trie = TokTrie::from(&TokRxInfo::new(self.rows as u32, first), &words).with_eos_tokens(&self.end);
        let tokens: TokEnv = Arc::new(Tokens(trie));
        let made = ParserFactory::new(&tokens, InferenceCapabilities::default(), &SlicedBiasComputer::general_slices());
        let mut factory = made.map_err(|error| complaint(&error))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(factory)
    }
}

/// What the compiler says, at a length for a client: its first line, and the one that names an expression's fault.
fn complaint(error: &impl fmt::Display) -> BadGrammar {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    // Its name for a grammar that cannot go on from its beginning.
    if first.starts_with("NoExtension") {
        return BadGrammar("allows no text".to_owned());
    }
    let fault = lines.find(|line| line.starts_with("error:"));
    let whole = fault.map_or(first.to_owned(), |fault| format!("{first} {fault}"));
    BadGrammar(whole.chars().take(COMPLAINT_CHARS_MAX).collect())
}

/// Our vocabulary for llguidance. It never forces tokens, so it never needs the tokenizer's own way to cut a text.
struct Tokens(TokTrie);

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// A compiled constraint of one model. Cheap to clone.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    constraint: Constraint,
    /// At its beginning. Only ever cloned.
    matcher: Mutex<Matcher>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grammar").field(&self.0.constraint).finish()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Grammar) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Grammar {
    /// A new answer's state. Nothing of it is shared with another's: what one may cost does not depend on others.
    pub(crate) fn begin(&self) -> GrammarState {
        let matcher = self.0.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        GrammarState { matcher, next: None }
    }
}

/// How far one answer has come in its grammar. Knows tokens only, so it outlives whatever happens to their keys and
/// values.
pub(crate) struct GrammarState {
    matcher: Matcher,
    /// What may come next, if that was asked already.
    next: Option<Result<SimpleVob, BadGrammar>>,
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrammarState")
    }
}

impl GrammarState {
    /// Finds out what may come next, so that the next mask is there when it is needed.
    pub fn prepare(&mut self) {
        if self.next.is_none() {
            self.next = Some(self.matcher.compute_mask_or_eos().map_err(|error| complaint(&error)));
        }
    }

    /// Makes every token impossible that the grammar does not allow next. Once nothing may follow, only the end tokens
    /// are left.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), BadGrammar> {
        self.prepare();
        let Some(mask) = self.next.take().transpose()? else { return Ok(()) };
        let words = mask.as_slice();
        for (chunk, at) in logits.chunks_mut(32).zip(0..) {
            let word = words.get(at).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (logit, bit) in chunk.iter_mut().zip(0..) {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    /// Goes on by a token that the mask allowed.
    pub fn accept(&mut self, id: u32) -> Result<(), BadGrammar> {
        // The end token behind what has already ended.
        if self.matcher.is_stopped() {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(|error| complaint(&error))
    }
}

#[cfg(test)]
mod tests;
