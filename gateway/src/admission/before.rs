//! What was used in the present days and months before this process began: a restart forgives no spending.

use std::collections::HashMap;

use super::core::calendar::Period;
use super::core::rule::{Rule, Subject, Subjects};
use super::rules::period;
use crate::accounting::row::Sum;
use crate::api::limit::{Dimension, Of, Per};

/// By the rule's name: what it counted, the period in which this process began, and what each subject had used of it.
#[derive(Debug, Default)]
pub struct Before(HashMap<String, (Rule, Period, HashMap<Subject, u64>)>);

impl Before {
    /// Asks `since` for what was spent from a moment on, once for each day and month that a rule has: by all whose ledger it
    /// is, or for rules that are shared by this gateway alone, as each tells the others.
    ///
    /// # Errors
    /// Those of `since`.
    pub fn read<'r, E>(
        rules: impl Iterator<Item = &'r Rule>,
        now_ns: i64,
        names: &HashMap<String, String>,
        since: impl Fn(i64, bool) -> Result<Vec<Sum>, E>,
    ) -> Result<Before, E> {
        let mut sums: HashMap<(i64, bool), Vec<Sum>> = HashMap::new();
        let mut before = Before::default();
        // Who has a token goes by the name of its issuer.
        let issuer = |id: &str| id.strip_prefix("jwt:").and_then(|id| id.split('/').next()).map(str::to_owned);
        let name = |id: &String| names.get(id).cloned().or_else(|| issuer(id)).unwrap_or_default();
        for rule in rules.filter(|rule| rule.per.is_some_and(Per::is_calendar)) {
            let period = period(rule, now_ns);
            let of_all = rule.shared.is_none();
            let spent = match sums.entry((period.start_ns, of_all)) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(new) => new.insert(since(period.start_ns, of_all)?),
            };
            let mut used: HashMap<Subject, u64> = HashMap::new();
            for spent in spent {
                let subjects = Subjects {
                    key: spent.key_id.clone(),
                    key_name: name(&spent.key_id),
                    user: spent.user.clone(),
                    tenant: spent.tenant.clone(),
                    route: Some(spent.route.clone()),
                    model: Some(spent.model.clone()),
                    ..Subjects::default()
                };
                // The ledger does not know addresses: what is counted by them begins anew.
                if rule.binds(&subjects) && !rule.by.contains(&Dimension::Ip) {
                    let used = used.entry(rule.subject(&subjects)).or_default();
                    *used = used.saturating_add(counted(spent, rule.of));
                }
            }
            before.0.insert(rule.name.clone(), (rule.clone(), period, used));
        }
        Ok(before)
    }

    /// What a subject had used, and in which period.
    pub fn used(&self, rule: &Rule, subject: Subject) -> Option<(Period, u64)> {
        let (_, period, used) = self.0.get(&rule.name).filter(|(then, ..)| then.counts_like(rule))?;
        Some((*period, used.get(&subject).copied()?))
    }

    /// The first period that a new counter knows, and what was used of it. A clock that shows an earlier one than at the
    /// start is wrong.
    pub fn first(&self, rule: &Rule, subject: Subject, at: Period) -> (Period, u64) {
        match self
            .0
            .get(&rule.name)
            .filter(|(then, period, _)| then.counts_like(rule) && at.start_ns <= period.start_ns)
        {
            Some((_, period, used)) => {
                (Period { now_ns: at.now_ns, ..*period }, used.get(&subject).copied().unwrap_or_default())
            }
            None => (at, 0),
        }
    }
}

fn counted(spent: &Sum, of: Of) -> u64 {
    match of {
        Of::Requests => spent.requests,
        Of::Tokens => spent.input_tokens.saturating_add(spent.output_tokens),
        Of::InputTokens => spent.input_tokens,
        Of::OutputTokens => spent.output_tokens,
        Of::Concurrency => 0,
        Of::Usd => spent.billed.0,
    }
}
