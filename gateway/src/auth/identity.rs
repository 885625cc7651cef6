//! Who is calling, and what they may.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::store::{OwnLimits, Tenant};
use crate::config::Limits;
use crate::network::{Network, is_in};
use crate::ports::Scope;
use crate::refusal::Refusal;

/// Somebody whom we know: by a key, or by a token of an issuer that we trust.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The wall: nothing is shared across it.
    pub tenant: String,
    pub key_id: String,
    pub key_name: String,
    /// Whose requests these are; then a request cannot say otherwise.
    pub user: Option<String>,
    pub tags: Vec<String>,
    /// What the issuer of a token calls their plan.
    pub tier: Option<String>,
    /// `None`: all of them.
    pub scopes: Option<BTreeSet<Scope>>,
    /// The names that they may ask for; `None`: all of them.
    pub models: Option<BTreeSet<String>>,
    /// Where they may call from; `None`: anywhere.
    pub networks: Option<Vec<Network>>,
    pub limits: OwnLimits,
}

/// Proof of who is calling. Only `Auth::identify` makes one. Whether they may come in is another question.
#[derive(Debug)]
pub struct Known {
    identity: Arc<Identity>,
    tenant: Option<Arc<Tenant>>,
    ip: IpAddr,
}

impl Known {
    pub(super) fn new(identity: Arc<Identity>, tenant: Option<Arc<Tenant>>, ip: IpAddr) -> Known {
        Known { identity, tenant, ip }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Lets them do what `scope` is for.
    ///
    /// # Errors
    /// `AddressNotAllowed` from elsewhere than they may call, `ScopeMissing` if they may not do that.
    pub fn enter(self, scope: Scope) -> Result<Caller, Refusal> {
        if self.identity.networks.as_ref().is_some_and(|networks| !is_in(self.ip, networks)) {
            return Err(Refusal::AddressNotAllowed { address: self.ip });
        }
        if self.identity.scopes.as_ref().is_some_and(|scopes| !scopes.contains(&scope)) {
            return Err(Refusal::ScopeMissing { scope });
        }
        Ok(Caller { identity: self.identity, of: self.tenant, ip: self.ip })
    }
}

/// Proof that somebody known is calling who may do what they came for. Only `Known::enter` makes one.
#[derive(Clone, Debug)]
pub struct Caller {
    identity: Arc<Identity>,
    /// What is known of their tenant beyond its name.
    of: Option<Arc<Tenant>>,
    ip: IpAddr,
}

impl Caller {
    pub fn key_id(&self) -> &str {
        &self.identity.key_id
    }
    pub fn key_name(&self) -> &str {
        &self.identity.key_name
    }
    pub fn tenant(&self) -> &str {
        &self.identity.tenant
    }
    pub fn user(&self) -> Option<&str> {
        self.identity.user.as_deref()
    }
    /// Their own, and their tenant's.
    pub fn tags(&self) -> Vec<String> {
        let of_tenant = self.of.iter().flat_map(|tenant| &tenant.tags);
        self.identity.tags.iter().chain(of_tenant).cloned().collect()
    }
    pub fn tier(&self) -> Option<&str> {
        self.identity.tier.as_deref()
    }
    /// The client's address, not that of a proxy of ours.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// Whether they may ask for the model of this name. To those who may not, it does not exist.
    pub fn may_use(&self, model: &str) -> bool {
        self.identity.models.as_ref().is_none_or(|models| models.contains(model))
    }

    /// Their own limits, and the default where they have none.
    pub fn limits(&self, default: &Limits) -> Limits {
        self.identity.limits(default)
    }
}

impl Identity {
    pub fn limits(&self, default: &Limits) -> Limits {
        let own = &self.limits;
        Limits {
            requests_per_minute: own.requests_per_minute.unwrap_or(default.requests_per_minute),
            tokens_per_minute: own.tokens_per_minute.unwrap_or(default.tokens_per_minute),
            concurrency: own.concurrency.unwrap_or(default.concurrency),
            per_day: own.per_day.unwrap_or(default.per_day),
        }
    }
}

#[cfg(test)]
impl Caller {
    /// A caller whose key is none of a store's.
    pub fn for_tests(id: &str, limits: OwnLimits) -> Caller {
        let (key_id, key_name, tenant) = (id.to_owned(), id.to_owned(), "default".to_owned());
        let identity = Identity { key_id, key_name, tenant, limits, ..Identity::default() };
        Caller { identity: Arc::new(identity), of: None, ip: IpAddr::from([127, 0, 0, 1]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(identity: &Identity, ip: &str, scope: Scope) -> Result<Caller, &'static str> {
        let known = Known::new(Arc::new(identity.clone()), None, ip.parse().unwrap());
        known.enter(scope).map_err(|refusal| refusal.describe().code)
    }

    #[test]
    fn a_caller_does_what_their_scopes_are_for_and_nothing_else() {
        for scope in Scope::ALL {
            assert_eq!(Scope::parse(scope.as_str()), Some(scope));
            let one = Identity { scopes: Some([scope].into()), ..Identity::default() };
            for asked in Scope::ALL {
                assert_eq!(enter(&one, "::1", asked).is_ok(), asked == scope, "{scope:?} for {asked:?}");
            }
            assert!(enter(&Identity::default(), "::1", scope).is_ok(), "without a list there is no bound");
            let none = Identity { scopes: Some(BTreeSet::new()), ..Identity::default() };
            assert_eq!(enter(&none, "::1", scope).unwrap_err(), "scope_missing", "an empty list is a list");
        }
    }

    #[test]
    fn a_caller_comes_from_where_they_may() {
        let networks = Some(vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/64".parse().unwrap()]);
        let bound = Identity { networks, ..Identity::default() };
        for (ip, allowed) in
            [("10.1.2.3", true), ("::ffff:10.1.2.3", true), ("2001:db8::9", true), ("11.0.0.1", false), ("::1", false)]
        {
            let entered = enter(&bound, ip, Scope::Models).map(|caller| caller.ip().to_string());
            assert_eq!(entered, if allowed { Ok(ip.to_owned()) } else { Err("address_not_allowed") }, "{ip}");
        }
    }

    #[test]
    fn a_model_that_is_not_listed_does_not_exist() {
        let mut caller = Caller::for_tests("a", OwnLimits::default());
        assert!(caller.may_use("assistant"));
        Arc::make_mut(&mut caller.identity).models = Some(["other".to_owned()].into());
        assert!(caller.may_use("other") && !caller.may_use("assistant") && !caller.may_use("Other"));
    }
}
