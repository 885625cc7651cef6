//! The end-to-end tests: the real binary, the bundled models, real clients on loopback. A test is named as a promise.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on should stop loudly"
)]

mod support;

mod admin;
mod answers;
mod bad_input;
mod cache;
mod callers;
mod canary;
mod clients;
mod completions;
mod config;
mod dashboards;
mod demo;
mod deploy;
mod directory;
mod drain;
mod embeddings;
mod endings;
mod engine;
mod faults;
mod feedback;
mod glimmer;
mod golden;
mod guard;
mod hub;
mod key_stores;
mod keys;
mod kill;
mod ledger;
mod limits;
mod moving;
mod operators;
mod oracle;
mod panics;
mod postgres;
mod prices;
mod readme;
mod reprice;
mod rules;
mod shadow;
mod shared;
mod shared_keys;
mod shared_outage;
mod sources;
mod steered;
mod stores;
mod templates;
mod tidy;
mod tls;
mod token_ids;
mod tokens;
mod traces;
mod upstreams;
mod verify;
mod versions;
mod waiting;
