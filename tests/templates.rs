//! A chat template is a program of strangers. Whatever it does, it does to a child of the gateway, and to the talk that
//! made it do so.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::fs::{read_dir, read_to_string};
use std::io::BufReader;
use std::process::Command;

use serde_json::json;

use crate::sources::{copy, with_template};
use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, chat, chat_with};
use crate::support::http::{Response, read_head};

/// Harmless in all talks on which a model is tried before it serves.
const WAITS: &str = "{% set last = messages[-1].content %}\
    {% set s = namespace(x='xxxxxxxx') %}\
    {% if 'allot' in last %}{% for i in range(100) %}{% set s.x = s.x ~ s.x %}{% endfor %}{% endif %}\
    {% if 'dwell' in last %}{% for i in range(20) %}{% set s.x = s.x ~ s.x %}{% endfor %}\
        {% for i in range(99999) %}{% if s.x ~ 'a' == s.x %}a{% endif %}{% endfor %}{% endif %}\
    {% if 'prattle' in last %}{% for i in range(20) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";

fn start() -> TestGateway {
    let setup = Setup::shipped();
    with_template(&copy(&setup, "waits"), WAITS);
    setup.env("MODEL_PATH", setup.0.path().join("more").to_str().unwrap());
    setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"waits\"");
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-2 = 1");
    setup.start()
}

/// The gateway's children that render, and the state of each.
fn children(gateway: u32) -> Vec<(u32, char)> {
    let pids = read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| {
        // (`pid (name) state parent …`) It may be gone by now.
        let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        (fields.next()? == gateway.to_string()).then_some((pid, state))
    })
    .collect()
}

fn peak_kib(pid: u32) -> u64 {
    let status = read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

fn kill(pid: u32) {
    assert!(Command::new("kill").arg("-KILL").arg(pid.to_string()).status().unwrap().success());
}

fn expect_refusal(response: &Response, says: &str) {
    let error = response.json()["error"].clone();
    assert_eq!((response.status, &error["code"]), (400, &json!("invalid_parameter")), "{error}");
    assert_eq!(error["param"], "messages");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("chat template") && message.contains(says), "{message}");
}

#[test]
fn a_talk_that_sets_off_a_template_costs_neither_the_gateway_nor_the_next_talk_anything() {
    let gateway = start();
    let before = gateway.ask("What is Glassgate?");
    let peak = peak_kib(gateway.child.id());
    for _ in 0..3 {
        expect_refusal(&gateway.post(&chat("Please allot.")), "MiB of memory");
        // 8 MiB of text that somebody would have to tokenise.
        expect_refusal(&gateway.post(&chat("Please prattle.")), "KiB of these messages");
        assert_eq!(gateway.ask("What is Glassgate?"), before);
    }
    let grown = peak_kib(gateway.child.id()) - peak;
    assert!(grown < 64 << 10, "the gateway itself took {grown} KiB more");
}

#[test]
fn a_template_that_does_not_end_is_ended_and_who_waits_behind_it_is_served() {
    let gateway = start();
    let before = gateway.ask("What is Glassgate?");
    let endless = gateway.open_unread(&gateway.chat_bytes(&chat("Please dwell."), &[]));
    eventually("the template to run", || {
        children(gateway.child.id()).iter().any(|(_, state)| *state == 'R').then_some(())
    });
    assert_eq!(gateway.ask("What is Glassgate?"), before, "asked while the child is busy");
    expect_refusal(&read_head(BufReader::new(endless)).unwrap().finish(), "seconds");
}

#[test]
fn a_child_that_is_killed_between_talks_is_buried_and_replaced_and_no_client_sees_it() {
    let gateway = start();
    let own = gateway.child.id();
    let before = gateway.ask("What is Glassgate?");
    let mut seen = BTreeSet::new();
    for round in 0..3 {
        let living: Vec<_> = children(own).into_iter().filter(|(_, state)| *state != 'Z').collect();
        assert!(!living.is_empty());
        for (pid, _) in living {
            assert!(seen.insert(pid), "{pid} was killed before");
            kill(pid);
        }
        if round == 1 {
            eventually("the dead to be buried", || children(own).is_empty().then_some(()));
        }
        assert_eq!(gateway.ask("What is Glassgate?"), before);
    }
}

#[test]
fn the_children_end_with_the_gateway_even_in_the_midst_of_a_talk() {
    let mut gateway = start();
    let own = gateway.child.id();
    let _endless = gateway.open_unread(&gateway.chat_bytes(&chat_with("Please dwell.", json!({"seed": 1})), &[]));
    eventually("the template to run", || children(own).iter().any(|(_, state)| *state == 'R').then_some(()));
    let all = children(own);
    kill(own);
    gateway.child.wait().unwrap();
    for (pid, _) in all {
        // Who inherits it may leave a zombie; that runs no more.
        eventually("a child to end", || {
            let stat = read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" Z")).then_some(())
        });
    }
}
