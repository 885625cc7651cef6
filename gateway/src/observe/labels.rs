//! Labels whose values come from outside: how many have a series of their own.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;

use crate::accounting::feedback::Score;

/// Names of feedback, and labels of one name, that are told apart; clients choose both, and the rest share `other`.
pub const FEEDBACK_NAMES_MAX: usize = 32;
pub const FEEDBACK_LABELS_MAX: usize = 16;
/// Names and labels that are told apart for one tenant, so that none can use up what all share.
pub const FEEDBACK_WORDS_OF_TENANT_MAX: usize = 16;

/// Values of a label that is not from the configuration: so many have a series of their own, the rest share one.
pub struct Bounded {
    max: usize,
    known: Mutex<HashSet<String>>,
}

impl Bounded {
    pub fn to(max: usize) -> Bounded {
        Bounded { max, known: Mutex::default() }
    }

    pub fn label(&self, value: &str) -> String {
        let mut known = self.known.lock();
        if !known.contains(value) {
            if known.len() >= self.max {
                return "other".into();
            }
            known.insert(value.to_owned());
        }
        value.to_owned()
    }
}

/// The names and labels of feedback that have series.
#[derive(Default)]
pub struct Vocabulary {
    /// Labels by their name; the names themselves by none.
    known: HashMap<String, HashSet<String>>,
    /// What each tenant has said of these.
    said: HashMap<String, HashSet<(String, String)>>,
}

impl Vocabulary {
    /// A name and a value as they are counted.
    pub fn words(&mut self, tenant: &str, name: &str, score: &Score) -> (String, String) {
        let name = self.word(tenant, "", name, FEEDBACK_NAMES_MAX);
        let value = match score {
            Score::Boolean(true) => "true".to_owned(),
            Score::Boolean(false) => "false".to_owned(),
            Score::Number(_) => "number".to_owned(),
            Score::Label(label) => self.word(tenant, &name, label, FEEDBACK_LABELS_MAX),
        };
        (name, value)
    }

    /// The word, or `other`. Which of them is settled when the tenant first says it, whatever others say later: what is
    /// revised is taken from the series that it was counted in.
    fn word(&mut self, tenant: &str, of: &str, word: &str, max: usize) -> String {
        let known = self.known.entry(of.to_owned()).or_default();
        let said = self.said.entry(tenant.to_owned()).or_default();
        let pair = (of.to_owned(), word.to_owned());
        if !said.contains(&pair) {
            let is_full = known.len() >= max && !known.contains(word);
            if is_full || said.len() >= FEEDBACK_WORDS_OF_TENANT_MAX {
                return "other".to_owned();
            }
            known.insert(word.to_owned());
            said.insert(pair);
        }
        word.to_owned()
    }
}
