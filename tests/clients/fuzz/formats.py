"""Texts of the formats that the admin API's document has beyond JSON Schema's own: all of them are to be understood."""

import datetime
import ipaddress

import schemathesis
from hypothesis import strategies as st


def network(address, bits):
    length = address.max_prefixlen
    return str(ipaddress.ip_network((int(address) >> (length - bits) << (length - bits), bits)))


def networks(version, bits):
    # An IPv4 address in IPv6 is to be written as what it is.
    plain = st.ip_addresses(v=version).filter(lambda address: version == 4 or address.ipv4_mapped is None)
    return st.builds(network, plain, st.integers(1, bits))


times = st.builds(lambda count, unit: f"{count}{unit}", st.integers(0, 10_000), st.sampled_from("smhd"))
dates = st.dates(min_value=datetime.date(1980, 1, 1), max_value=datetime.date(2200, 1, 1))
moments = dates.map(lambda date: f"{date}T12:30:00Z")

FORMATS = {
    "network": networks(4, 32) | networks(6, 128),
    "moment": times | dates.map(str) | moments,
    "moment-or-age": times.filter(lambda time: time[0] != "0") | dates.map(str),
    "time-zone": st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Pacific/Apia"]),
    "span": st.sampled_from(["0s", "250ms", "2s", "1m"]),
    "pace": st.sampled_from(["1/second", "10/minute"]),
    "share": st.sampled_from(["no", "strict", "5%"]),
}
for name, strategy in FORMATS.items():
    schemathesis.openapi.format(name, strategy)
