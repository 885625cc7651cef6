//! What was used in the present days and months before this process began: a restart forgives no spending.

use std::collections::HashMap;

use super::core::calendar::Period;
use super::core::rule::{Rule, Subject, Subjects};
use super::rules::period;
use crate::accounting::row::Sum;
use crate::api::limit::{Dimension, Of, Only, Per};

/// By the rule's name: what it counted, the period in which this process began, and what each subject had used of it.
#[derive(Debug, Default)]
pub struct Before(HashMap<String, (Rule, Period, HashMap<Subject, u64>)>);

/// What rules ask of those who spent, and the ledger does not say.
#[derive(Debug, Default)]
pub struct Callers {
    /// Names and tags of keys, by their ids.
    pub keys: HashMap<String, (String, Vec<String>)>,
    /// Tags of tenants.
    pub tenants: HashMap<String, Vec<String>>,
}

impl Callers {
    fn subjects(&self, spent: &Sum) -> Subjects {
        let (name, own) = self.keys.get(&spent.key_id).cloned().unwrap_or_default();
        // Who has a token goes by the name of its issuer.
        let key_name = issuer(&spent.key_id).map_or(name, str::to_owned);
        let tenants = self.tenants.get(&spent.tenant).into_iter().flatten().cloned();
        Subjects {
            key: spent.key_id.clone(),
            key_name,
            user: spent.user.clone(),
            tenant: spent.tenant.clone(),
            route: Some(spent.route.clone()),
            model: Some(spent.model.clone()),
            tags: own.into_iter().chain(tenants).collect(),
            ..Subjects::default()
        }
    }
}

fn issuer(key_id: &str) -> Option<&str> {
    key_id.strip_prefix("jwt:").and_then(|id| id.split('/').next())
}

impl Before {
    /// Asks `since` for what was spent from a moment on, once for each day and month that a rule has: by all whose ledger it
    /// is, or for rules that are shared by this gateway alone, as each tells the others.
    ///
    /// # Errors
    /// Those of `since`.
    pub fn read<'r, E>(
        rules: impl Iterator<Item = &'r Rule>,
        now_ns: i64,
        callers: &Callers,
        since: impl Fn(i64, bool) -> Result<Vec<Sum>, E>,
    ) -> Result<Before, E> {
        let mut sums: HashMap<(i64, bool), Vec<Sum>> = HashMap::new();
        let mut before = Before::default();
        for rule in rules.filter(|rule| rule.per.is_some_and(Per::is_calendar)) {
            let period = period(rule, now_ns);
            let of_all = rule.shared.is_none();
            let spent = match sums.entry((period.start_ns, of_all)) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(new) => new.insert(since(period.start_ns, of_all)?),
            };
            let mut used: HashMap<Subject, u64> = HashMap::new();
            for spent in spent {
                let mut subjects = callers.subjects(spent);
                let tier = rule.only.iter().find(|(only, _)| *only == Only::Tier).map(|(_, tier)| tier);
                // The ledger knows no plans. A user of an issuer has one, so what they spent was spent on it.
                subjects.tier = tier.filter(|_| issuer(&spent.key_id).is_some()).cloned();
                let is_known = tier.is_none() || rule.by.contains(&Dimension::User);
                // Nor does it know addresses: what is counted by them begins anew.
                if is_known && rule.binds(&subjects) && !rule.by.contains(&Dimension::Ip) {
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

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;
    use crate::accounting::core::NanoUsd;
    use crate::admission::core::set::Moment;
    use crate::admission::rules::Defaults;

    fn used(rule: &Rule, subjects: &Subjects) -> u64 {
        let sum = |key_id: &str, tenant: &str, user: Option<&str>, billed| Sum {
            key_id: key_id.into(),
            tenant: tenant.into(),
            user: user.map(str::to_owned),
            billed: NanoUsd(billed),
            ..Sum::default()
        };
        let sums = [
            sum("a", "acme", None, 1),
            sum("b", "acme", None, 10),
            sum("c", "beta", None, 100),
            sum("jwt:corp", "beta", Some("u1"), 1_000),
            sum("jwt:corp", "beta", Some("u2"), 10_000),
        ];
        let callers = Callers {
            keys: [("a".to_owned(), ("alice".to_owned(), vec!["blue".to_owned()]))].into(),
            tenants: [("beta".to_owned(), vec!["blue".to_owned()])].into(),
        };
        let now_ns = 20_000 * 86_400_000_000_000;
        let read = Before::read([rule].into_iter(), now_ns, &callers, |_, _| Ok::<_, ()>(sums.to_vec())).unwrap();
        let at = Moment { now: std::time::Duration::ZERO, period: period(rule, now_ns) };
        read.first(rule, rule.subject(subjects), at.period).1
    }

    #[test]
    fn what_was_spent_is_counted_by_tags_of_keys_and_tenants_and_by_the_plans_of_users() {
        let plain = Defaults::default().per_day().as_ref().clone();
        let rule =
            |only, by: &[Dimension]| Rule { only: vec![only], by: by.to_vec(), zone: TimeZone::UTC, ..plain.clone() };
        let blue = (Only::Tag, "blue".to_owned());
        let of = |tenant: &str| Subjects { tenant: tenant.into(), ..Subjects::default() };
        assert_eq!(used(&rule(blue.clone(), &[Dimension::Tenant]), &of("acme")), 1);
        assert_eq!(used(&rule(blue, &[]), &of("acme")), 11_101);
        let free = (Only::Tier, "free".to_owned());
        let user = |user: &str| Subjects { user: Some(user.into()), ..Subjects::default() };
        assert_eq!(used(&rule(free.clone(), &[Dimension::User]), &user("u1")), 1_000);
        assert_eq!(used(&rule(free, &[]), &user("u1")), 0, "whose plan it was, nobody knows");
        let name = (Only::By(Dimension::Key), "corp".to_owned());
        assert_eq!(used(&rule(name, &[]), &of("beta")), 11_000, "tokens go by the name of their issuer");
    }
}
