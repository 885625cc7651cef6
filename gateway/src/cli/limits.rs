//! `glassgate limits`: rules beside the limits of every key.

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{Outcome, Place, actor, client, text};
use crate::admin::rules::all;
use crate::control::{Change, CheckedRule};

#[derive(Subcommand)]
pub enum LimitsCommand {
    /// List the rules that bind, and where each is from
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Put a rule, before one of the configuration with its name; a running gateway holds to it within a second
    Put {
        /// What the rule is called in refusals and metrics
        name: String,
        #[command(flatten)]
        words: Box<Words>,
    },
    /// Delete a rule that was put; one of the configuration with its name binds again
    Delete { name: String },
    /// Which limits bind a key or who has a token, how each stands in the running gateway, and which says no first
    #[command(group(clap::ArgGroup::new("who").required(true).multiple(true).args(["key", "user"])))]
    Explain {
        /// Its id, its name, or tenant/name
        #[arg(long, conflicts_with_all = ["issuer", "tenant", "tier"])]
        key: Option<String>,
        /// Of a token: the name of its [[auth.jwt]], where there are several
        #[arg(long)]
        issuer: Option<String>,
        /// Of a token, where it says one
        #[arg(long)]
        tenant: Option<String>,
        /// Of a token, likewise
        #[arg(long)]
        tier: Option<String>,
        /// What it asks for as `model`
        #[arg(long)]
        route: Option<String>,
        /// The model that answers
        #[arg(long)]
        model: Option<String>,
        /// Whose requests they are: as the token says, or where the key does not
        #[arg(long)]
        user: Option<String>,
        /// Where they come from
        #[arg(long)]
        ip: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// What a `[[limits.rules]]` says.
#[derive(Args)]
pub struct Words {
    /// In units of --of; US dollars of usd
    #[arg(long, value_name = "N")]
    limit: f64,
    /// requests, tokens, input_tokens, output_tokens, concurrency or usd
    #[arg(long)]
    of: String,
    /// second, minute, day or month; nothing for concurrency
    #[arg(long)]
    per: Option<String>,
    /// Who shares a counter: key, user, tenant, route, model, ip; several with commas. Nobody: all share one
    #[arg(long, value_delimiter = ',')]
    by: Vec<String>,
    /// Whom it binds, as tenant=acme, tag=blue or tier=free (may be given several times); all by default
    #[arg(long, value_name = "WHAT=NAME", value_parser = super::keys::pair)]
    only: Vec<(String, String)>,
    /// Whose days and months, such as Europe/Berlin
    #[arg(long)]
    zone: Option<String>,
    /// hard, soft or throttle
    #[arg(long)]
    mode: Option<String>,
    /// Requests that are let in all the same, such as 10/minute
    #[arg(long, value_name = "PACE")]
    throttle: Option<String>,
    /// How long a request may wait for room, such as 2s
    #[arg(long, value_name = "TIME")]
    wait: Option<String>,
    /// No burst: at most the limit in every second or minute
    #[arg(long)]
    exact: bool,
    /// Reserve the most that can be of prompts for somebody else's server
    #[arg(long)]
    strict: bool,
    /// Count with other gateways: strict, or what each may take ahead, such as 5%
    #[arg(long, value_name = "HOW")]
    shared: Option<String>,
    /// What holds where the others are out of reach: local, open or closed
    #[arg(long)]
    down: Option<String>,
}

impl Words {
    fn object(self) -> Map<String, Value> {
        let whole = self.limit.fract() == 0.0 && self.limit.abs() < 9e15;
        let limit = if whole { json!(self.limit as i64) } else { json!(self.limit) };
        let only = (!self.only.is_empty()).then(|| Value::from_iter(self.only));
        let by = (!self.by.is_empty()).then_some(self.by);
        let flag = |is: bool| is.then_some(true);
        let words = json!({
            "limit": limit, "of": self.of, "per": self.per, "by": by, "only": only, "zone": self.zone, "mode": self.mode,
            "throttle": self.throttle, "wait": self.wait, "exact": flag(self.exact), "strict": flag(self.strict),
            "shared": self.shared, "down": self.down,
        });
        words.as_object().cloned().unwrap_or_default()
    }
}

pub fn run(place: &Place, command: LimitsCommand) -> Outcome {
    let control = place.control()?;
    match command {
        LimitsCommand::List { json } => {
            let stored = control.store().map_err(text)?.rules().map_err(text)?;
            list(&all(&place.config()?.gateway, &stored), json);
            Ok(())
        }
        LimitsCommand::Put { name, words } => {
            let rule = CheckedRule::new(&name, words.object(), &place.config()?).map_err(text)?;
            control.apply(&actor(), Change::PutRule(rule), None).map(drop).map_err(text)
        }
        LimitsCommand::Delete { name } => {
            control.apply(&actor(), Change::DeleteRule { name }, None).map(drop).map_err(text)
        }
        LimitsCommand::Explain { key, issuer, tenant, tier, route, model, user, ip, json } => {
            let who = [("key", key), ("issuer", issuer), ("tenant", tenant), ("tier", tier), ("user", user)];
            let said = who.into_iter().chain([("route", route), ("model", model), ("ip", ip)]);
            let said = said.filter_map(|(name, value)| Some(format!("{name}={}", escaped(&value?))));
            let query = said.collect::<Vec<_>>().join("&");
            let (status, body) = client::get(control.data_dir(), &format!("/admin/limits?{query}"))?;
            let told: Value = serde_json::from_slice(&body).map_err(text)?;
            if status != 200 {
                return Err(told["error"]["message"].as_str().unwrap_or("the gateway does not say why").to_owned());
            }
            if json {
                println!("{told:#}")
            } else {
                explain(&told)
            }
            Ok(())
        }
    }
}

/// As a part of a query.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn list(rules: &[Value], json: bool) {
    if json {
        println!("{}", Value::from(rules.to_vec()));
        return;
    }
    println!("{:24} {:>16} {:14} {:8} {:20} {:9} from", "name", "limit", "of", "per", "by", "mode");
    for rule in rules {
        let by: Vec<String> = rule["by"].as_array().into_iter().flatten().map(told).collect();
        let by = if by.is_empty() { "all together".to_owned() } else { by.join(", ") };
        let from = match (rule["origin"].as_str(), rule["replaces"].as_bool()) {
            (Some("store"), Some(true)) => "store, instead of the configuration's".to_owned(),
            (origin, _) => origin.unwrap_or("-").to_owned(),
        };
        let [name, limit, of, per, mode] = ["name", "limit", "of", "per", "mode"].map(|word| told(&rule[word]));
        println!("{name:24} {limit:>16} {of:14} {per:8} {by:20} {mode:9} {from}");
    }
}

fn explain(answer: &Value) {
    println!(
        "{:24} {:>16} {:>16} {:>16} {:14} {:8} {:10} from",
        "rule", "limit", "used", "reserved", "of", "per", "scope"
    );
    for rule in answer["rules"].as_array().into_iter().flatten() {
        let words = ["name", "limit", "used", "reserved", "of", "per", "scope", "origin"];
        let [name, limit, used, reserved, of, per, scope, from] = words.map(|word| told(&rule[word]));
        let needs: Vec<String> =
            rule["needs"].as_array().into_iter().flatten().map(|one| format!("--{}", told(one))).collect();
        let needs = if needs.is_empty() {
            String::new()
        } else {
            format!("  (say {} to see how it stands)", needs.join(" and "))
        };
        println!("{name:24} {limit:>16} {used:>16} {reserved:>16} {of:14} {per:8} {scope:10} {from}{needs}");
    }
    match (&answer["refuses"], &answer["nearest"]) {
        (Value::Null, nearest) => println!("nothing refuses a request now; `{}` has the least left", told(nearest)),
        (refuses, _) => println!("`{}` refuses requests now", told(&refuses["rule"])),
    }
}

fn told(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
