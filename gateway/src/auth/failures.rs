//! Who keeps guessing is not listened to for a while, by host (an IPv6 network of 64 bits is one).
//!
//! Each failed guess puts off the moment at which all is forgiven by its share of a minute; more than a minute off is
//! refused. So a minute's worth may come at once, and comes back evenly.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;

use crate::network::host;

/// Hosts that are remembered. The one that has waited longest goes first: whoever has that many addresses needs no limit
/// on one of them.
const HOSTS_MAX: usize = 65_536;
const MINUTE: Duration = Duration::from_secs(60);
/// Looked at with each failure, so that hosts are forgotten as fast as they come.
const SWEPT: usize = 2;

#[derive(Debug, Default)]
pub struct Failures(Mutex<Hosts>);

#[derive(Debug, Default)]
struct Hosts {
    /// When a host is forgiven, on a clock of the caller's.
    forgiven: HashMap<IpAddr, Duration>,
    /// Each host once.
    order: VecDeque<IpAddr>,
}

impl Failures {
    /// Whether somebody may try; if not, when again. `per_minute` 0 refuses nobody.
    pub fn may_try(&self, from: IpAddr, per_minute: u32, now: Duration) -> Result<(), Duration> {
        let Some(share) = MINUTE.checked_div(per_minute) else { return Ok(()) };
        let hosts = self.0.lock();
        let wait = hosts.forgiven.get(&host(from)).map_or(Duration::ZERO, |forgiven| forgiven.saturating_sub(now));
        match (wait + share).saturating_sub(MINUTE) {
            Duration::ZERO => Ok(()),
            too_much => Err(too_much),
        }
    }

    /// Notes a guess that was wrong.
    pub fn failed(&self, from: IpAddr, per_minute: u32, now: Duration) {
        let Some(share) = MINUTE.checked_div(per_minute) else { return };
        let from = host(from);
        let mut hosts = self.0.lock();
        hosts.sweep(now);
        let forgiven = hosts.forgiven.get(&from).copied();
        if forgiven.is_none() {
            if hosts.order.len() >= HOSTS_MAX
                && let Some(oldest) = hosts.order.pop_front()
            {
                hosts.forgiven.remove(&oldest);
            }
            hosts.order.push_back(from);
        }
        hosts.forgiven.insert(from, forgiven.unwrap_or_default().max(now) + share);
    }
}

impl Hosts {
    fn sweep(&mut self, now: Duration) {
        for _ in 0..SWEPT {
            let Some(host) = self.order.pop_front() else { return };
            if self.forgiven.get(&host).is_some_and(|forgiven| *forgiven > now) {
                self.order.push_back(host);
            } else {
                self.forgiven.remove(&host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_minutes_worth_of_guesses_and_then_one_at_a_time() {
        let failures = Failures::default();
        let at = Duration::from_secs(1_000);
        let guess = |from: &str, now| {
            let may = failures.may_try(ip(from), 20, now);
            if may.is_ok() {
                failures.failed(ip(from), 20, now);
            }
            may
        };
        for _ in 0..20 {
            assert_eq!(guess("203.0.113.1", at), Ok(()));
        }
        assert_eq!(guess("203.0.113.1", at), Err(Duration::from_secs(3)));
        assert_eq!(guess("::ffff:203.0.113.1", at), Err(Duration::from_secs(3)), "the same host in another spelling");
        assert_eq!(guess("203.0.113.2", at), Ok(()), "a neighbour is not to blame");
        assert_eq!(guess("203.0.113.1", at + Duration::from_secs(3)), Ok(()), "one came back");
        assert!(guess("203.0.113.1", at + Duration::from_secs(3)).is_err());
        let later = at + Duration::from_secs(63);
        assert_eq!((0..30).filter(|_| guess("203.0.113.1", later).is_ok()).count(), 20, "all of them did");
        for host in 0..20 {
            assert_eq!(guess(&format!("2001:db8::{host}"), at), Ok(()));
        }
        assert!(guess("2001:db8::ffff", at).is_err(), "a /64 is one host");
        assert_eq!(guess("2001:db8:0:1::1", at), Ok(()), "another network is not");
        for _ in 0..100 {
            failures.failed(ip("203.0.113.9"), 0, at);
        }
        assert_eq!(failures.may_try(ip("203.0.113.9"), 0, at), Ok(()), "0 refuses nobody");
    }

    #[test]
    fn a_million_hosts_are_no_more_memory_than_the_bound_and_the_forgiven_are_forgotten() {
        let failures = Failures::default();
        let host = |number: u32| IpAddr::V4((0x0a00_0000 + number).into());
        for number in 0..1_000_000 {
            failures.failed(host(number), 20, Duration::from_millis(u64::from(number) / 100));
        }
        let count = |failures: &Failures| {
            let hosts = failures.0.lock();
            assert_eq!(hosts.forgiven.len(), hosts.order.len());
            hosts.order.len()
        };
        assert!(count(&failures) <= HOSTS_MAX);
        for number in 0..HOSTS_MAX as u32 {
            failures.failed(host(1), 20, Duration::from_secs(1_000_000) + Duration::from_nanos(number.into()));
        }
        assert_eq!(count(&failures), 1, "who has not guessed for a minute is forgotten");
    }
}
