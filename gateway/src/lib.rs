//! Glassgate: an observability-first serving gateway for language models.
//!
//! # Layout, in reading order
//! - `invoke`: THE request path on one page. Read this first
//! - `exchange`: the one record of a request; `answer`: what every way of answering yields; `refusal`: every way we say no
//! - `guard`: who may connect and what a head is; `network`: addresses, and who is behind our proxies; `proxy`: pingora's phases; `relay`: answer → client; `server`: listeners,
//!   signals, the end
//! - stages, in the order of the path: `auth`, `admission`, `routing`, `dispatch`; below them `accounting` and `models`
//! - `observe`: a closed record → metrics, log line, spans
//! - `feedback`: what clients say of answers
//! - `database`: how a Postgres is reached, for whoever keeps things there
//! - `config`: three files → what they mean; `app`: the stages built from it
//! - `control`: every change that operators make, and the record of them
//! - `admin`, `cli`: for the people who run it; `when`: the spans of time that they ask for

#![forbid(unsafe_code)]

pub mod accounting;
pub mod admin;
pub mod admission;
pub mod answer;
pub mod api;
pub mod app;
pub mod auth;
pub mod cache;
pub mod cli;
pub mod config;
pub mod control;
pub mod data_dir;
pub mod database;
pub mod dispatch;
pub mod exchange;
pub mod feedback;
pub mod guard;
pub mod invoke;
pub mod models;
pub mod network;
pub mod observe;
pub mod outbound;
pub mod ports;
pub mod proxy;
pub mod refusal;
pub mod relay;
pub mod routing;
pub mod server;
pub mod shadow;
pub mod when;
