//! One rule: how much of what, in which time, and who shares it.

use std::time::Duration;

use jiff::tz::TimeZone;

use crate::api::limit::{Dimension, Of, Only, Per};

/// What happens where a limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The request is refused.
    Hard,
    /// It is let in, and told.
    Soft,
    /// From then on so many requests are let in a time.
    Throttle { requests: u64, per: Per },
}

impl Mode {
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Hard => "hard",
            Mode::Soft => "soft",
            Mode::Throttle { .. } => "throttle",
        }
    }
}

/// How gateways share a rule's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// What a gateway takes ahead, in ten-thousandths of the limit; `None`: each request asks.
    pub lease: Option<u64>,
    pub down: Down,
    /// How many gateways there are.
    pub replicas: u64,
}

/// What holds where the shared counters are out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// Each gateway holds to its part of the limit.
    Local,
    /// No limit.
    Open,
    /// Every request is refused.
    Closed,
}

impl Down {
    pub const ALL: [Down; 3] = [Down::Local, Down::Open, Down::Closed];

    pub fn as_str(self) -> &'static str {
        match self {
            Down::Local => "local",
            Down::Open => "open",
            Down::Closed => "closed",
        }
    }
}

impl Sharing {
    /// What a gateway takes ahead, as it is written: `strict`, or a part of the limit.
    pub fn taken_ahead(self) -> String {
        self.lease.map_or_else(|| "strict".to_owned(), |lease| format!("{}%", lease as f64 / 100.0))
    }
}

/// A family of counters: one for each subject, which is what `by` says of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub name: String,
    /// In units of `of`; nano-dollars of money.
    pub limit: u64,
    pub of: Of,
    /// `None` for what is counted at a time.
    pub per: Option<Per>,
    /// Sorted, each once. Empty: everybody shares one counter.
    pub by: Vec<Dimension>,
    /// Only requests of these; empty: all.
    pub only: Vec<(Only, String)>,
    /// Whose days and months they are.
    pub zone: TimeZone,
    pub mode: Mode,
    /// No burst: at most the limit in every window, wherever it begins.
    pub exact: bool,
    /// Reserves the most that can be, not the most that is likely, and counts no more than that.
    pub strict: bool,
    /// How long a request may wait for room instead of being refused.
    pub wait: Duration,
    /// `None`: each gateway counts for itself.
    pub shared: Option<Sharing>,
}

/// Whom a request is counted for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subjects {
    pub key: String,
    pub key_name: String,
    pub user: Option<String>,
    pub tenant: String,
    /// Known once the body is read, like the model.
    pub route: Option<String>,
    pub model: Option<String>,
    pub ip: Option<String>,
    /// The key's, and its tenant's.
    pub tags: Vec<String>,
    pub tier: Option<String>,
}

impl Subjects {
    /// Who has none of a dimension is one with all who have none: leaving it out frees nobody.
    fn get(&self, dimension: Dimension) -> String {
        match dimension {
            Dimension::Key => self.key.clone(),
            Dimension::User => self.user.clone().unwrap_or_default(),
            Dimension::Tenant => self.tenant.clone(),
            Dimension::Route => self.route.clone().unwrap_or_default(),
            Dimension::Model => self.model.clone().unwrap_or_default(),
            Dimension::Ip => self.ip.clone().unwrap_or_default(),
        }
    }
}

/// A counter's name among all: a hash, so that it is as small for those who choose long names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(pub [u8; 16]);

impl Subject {
    /// The one that newcomers share where there are too many.
    pub const OTHER: Subject = Subject([0; 16]);
}

impl Rule {
    /// Whether the rule is about this request.
    pub fn binds(&self, subjects: &Subjects) -> bool {
        self.only.iter().all(|(only, wanted)| match only {
            Only::By(dimension) => {
                subjects.get(*dimension) == *wanted || *dimension == Dimension::Key && subjects.key_name == *wanted
            }
            Only::Tag => subjects.tags.contains(wanted),
            Only::Tier => subjects.tier.as_ref() == Some(wanted),
        })
    }

    /// Whether it shows before the body is read whom it binds.
    pub fn is_known_at_door(&self) -> bool {
        self.by.iter().all(|one| one.is_known_at_door()) && self.only.iter().all(|(only, _)| only.is_known_at_door())
    }

    /// Whether models are counted apart: one that stands in for another then has limits of its own.
    pub fn is_by_model(&self) -> bool {
        self.by.contains(&Dimension::Model) || self.only.iter().any(|(only, _)| *only == Only::By(Dimension::Model))
    }

    /// Whether there may be as many subjects as clients like.
    pub fn is_clients_choice(&self) -> bool {
        self.by.iter().any(|dimension| dimension.is_clients_choice())
    }

    pub fn subject(&self, subjects: &Subjects) -> Subject {
        let mut hash = blake3::Hasher::new();
        for dimension in &self.by {
            let value = subjects.get(*dimension);
            hash.update(&(value.len() as u64).to_le_bytes());
            hash.update(value.as_bytes());
        }
        let mut subject = [0; 16];
        subject.copy_from_slice(&hash.finalize().as_bytes()[..16]);
        Subject(subject)
    }

    /// Whether counts under one rule mean something under the other: then an edit forgives nothing.
    pub fn counts_like(&self, other: &Rule) -> bool {
        (&self.name, self.of, self.per, &self.by, self.exact, &self.zone)
            == (&other.name, other.of, other.per, &other.by, other.exact, &other.zone)
    }
}
