//! Addresses and networks: what a range holds, who counts as one, and who the client behind our own proxies is.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use http::HeaderMap;

/// Nobody has more proxies in a row; what lies beyond was written by somebody else.
const HOPS_MAX: usize = 16;

/// A range of addresses such as `10.0.0.0/8`; a lone address is a range of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    first: IpAddr,
    /// Leading bits that all of it share.
    bits: u8,
}

impl Network {
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.first.is_ipv4() && masked(address, self.bits) == self.first
    }
}

impl FromStr for Network {
    /// What must be written instead.
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Network, Self::Err> {
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let first: IpAddr =
            address.parse().map_err(|_| "must be an address or a range such as \"10.0.0.0/8\" or \"2001:db8::/32\"")?;
        if first != first.to_canonical() {
            return Err("must be written as IPv4, without `::ffff:`");
        }
        let most = if first.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Some(most), |bits| bits.parse().ok().filter(|bits| *bits <= most));
        let bits = bits.ok_or("must have at most 32 bits after the `/`, or 128 of an IPv6 address")?;
        if masked(first, bits) != first {
            return Err(
                "has bits set beyond its length; a range begins with its first address, as \"10.0.0.0/8\" does",
            );
        }
        Ok(Network { first, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

fn masked(address: IpAddr, bits: u8) -> IpAddr {
    let bits = u32::from(bits);
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(bits)).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(bits)).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}

/// Who counts as one: an IPv6 host has a /64 to itself, and picks from it as it likes.
pub fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

/// Whether one of `networks` holds the address.
pub fn is_in(address: IpAddr, networks: &[Network]) -> bool {
    networks.iter().any(|network| network.contains(address))
}

/// Who is asking: the peer, or, if that is a proxy of ours, the last one in `X-Forwarded-For` that is not. Each proxy of
/// ours has written down whom it heard, at the end; what stands before that was written by strangers.
pub fn client(peer: IpAddr, headers: &HeaderMap, trusted: &[Network]) -> IpAddr {
    let mut client = peer.to_canonical();
    let lists = headers.get_all("x-forwarded-for").iter().rev();
    let hops = lists.flat_map(|list| list.to_str().unwrap_or_default().rsplit(','));
    for hop in hops.take(HOPS_MAX) {
        if !is_in(client, trusted) {
            break;
        }
        // A proxy that does not say whom it heard stands for them.
        let Some(before) = hop_address(hop.trim()) else { break };
        client = before.to_canonical();
    }
    client
}

/// Some proxies write the port too.
fn hop_address(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(hop);
    bare.parse().ok().or_else(|| Some(hop.parse::<std::net::SocketAddr>().ok()?.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn networks(texts: &[&str]) -> Vec<Network> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_range_holds_what_shares_its_bits_in_either_spelling() {
        let ours = networks(&["10.0.0.0/8", "192.168.7.9", "2001:db8::/33", "0.0.0.0/32"]);
        for inside in ["10.0.0.0", "10.255.255.255", "::ffff:10.1.2.3", "192.168.7.9", "2001:db8:7fff::1"] {
            assert!(is_in(ip(inside), &ours), "{inside}");
        }
        for outside in ["11.0.0.0", "9.255.255.255", "192.168.7.8", "2001:db8:8000::1", "::10.1.2.3", "0.0.0.1"] {
            assert!(!is_in(ip(outside), &ours), "{outside}");
        }
        let all = networks(&["0.0.0.0/0", "::/0"]);
        assert!(is_in(ip("203.0.113.9"), &all[..1]) && !is_in(ip("::1"), &all[..1]) && is_in(ip("::1"), &all));
        assert_eq!(ours[1].to_string(), "192.168.7.9/32");
    }

    #[test]
    fn what_is_no_range_says_what_to_write() {
        for (text, hint) in [
            ("localhost", "such as"),
            ("10.0.0.0/33", "at most 32"),
            ("10.0.0.0/-1", "at most 32"),
            ("::/129", "or 128"),
            ("10.0.0.1/8", "first address"),
            ("::ffff:10.0.0.0/104", "as IPv4"),
            ("", "such as"),
        ] {
            let said = text.parse::<Network>().unwrap_err();
            assert!(said.contains(hint), "{text}: {said}");
        }
    }

    /// The peer, what `X-Forwarded-For` says, and who is asking. `10.0.0.0/8` and `fd00::/8` are ours.
    #[test]
    fn nobody_can_say_that_they_are_somebody_else() {
        let ours = networks(&["10.0.0.0/8", "fd00::/8"]);
        let table: &[(&str, &[&str], &str)] = &[
            ("203.0.113.5", &[], "203.0.113.5"),
            // A stranger's header is theirs.
            ("203.0.113.5", &["198.51.100.1"], "203.0.113.5"),
            ("203.0.113.5", &["10.0.0.1"], "203.0.113.5"),
            ("::ffff:203.0.113.5", &["198.51.100.1"], "203.0.113.5"),
            // One proxy: the last entry is its own word.
            ("10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            ("::ffff:10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["127.0.0.1", "198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["198.51.100.1", "1.1.1.1"], "1.1.1.1"),
            // A client that says it is a proxy of ours, behind one.
            ("10.0.0.1", &["1.1.1.1, 10.9.9.9, 198.51.100.1"], "198.51.100.1"),
            // Two proxies.
            ("10.0.0.1", &["1.1.1.1, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
            ("10.0.0.1", &["198.51.100.1,fd00::2"], "198.51.100.1"),
            ("fd00::1", &["2001:db8::7"], "2001:db8::7"),
            // Ports, brackets, blanks.
            ("10.0.0.1", &["198.51.100.1:4711"], "198.51.100.1"),
            ("10.0.0.1", &["[2001:db8::7]:443"], "2001:db8::7"),
            ("10.0.0.1", &["[2001:db8::7]"], "2001:db8::7"),
            ("10.0.0.1", &["  198.51.100.1\t"], "198.51.100.1"),
            // A proxy that does not know stands for its clients; what comes before its word is not looked at.
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1, unknown"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1,"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1", ""], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1, 10.0.0.2, ::gg"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1, \u{e9}"], "10.0.0.1"),
            // Only ours all the way: the first of them began it.
            ("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ];
        for (peer, lists, expected) in table {
            let mut headers = HeaderMap::new();
            for list in *lists {
                headers.append("x-forwarded-for", http::HeaderValue::from_bytes(list.as_bytes()).unwrap());
            }
            assert_eq!(client(ip(peer), &headers, &ours), ip(expected), "{peer} {lists:?}");
            assert_eq!(client(ip(peer), &headers, &[]), ip(peer).to_canonical(), "without proxies it is the peer");
        }
        let mut endless = HeaderMap::new();
        endless
            .append("x-forwarded-for", ["1.1.1.1", &"10.0.0.2,".repeat(5_000), "10.0.0.2"].concat().parse().unwrap());
        assert_eq!(client(ip("10.0.0.1"), &endless, &ours), ip("10.0.0.2"), "it is not followed for ever");
    }
}
