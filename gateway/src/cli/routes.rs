//! `glassgate routes`: how requests are routed, and why.

use std::sync::Arc;

use clap::Subcommand;

use super::{Outcome, Place, keys, text};
use crate::app::Snapshot;
use crate::dispatch::upstream::Upstreams;
use crate::models::Models;
use crate::observe::metrics::Metrics;

#[derive(Subcommand)]
pub enum RoutesCommand {
    /// Show which variant a caller gets, and why
    Explain {
        /// The route: what clients send as `model`
        #[arg(long)]
        route: String,
        /// Id or name of an API key
        #[arg(long)]
        key: Option<String>,
        /// The value of the route's session header
        #[arg(long)]
        session: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub fn run(place: &Place, command: RoutesCommand) -> Outcome {
    let RoutesCommand::Explain { route, key, session, json } = command;
    let config = place.config()?;
    glassgate_runtime::set_threads(config.gateway.engine.threads);
    // Loaded as `serve` would load them: a model that cannot serve changes the answer.
    let models = Models::start(&config.gateway.engine, place.intake(&config), Arc::new(Metrics::new()))?;
    let loaded = models.load(&config.models);
    let key_id = match key {
        Some(key) => {
            let found = keys::one(&place.control()?.store().map_err(text)?, &key)?;
            found.who.key_id.clone()
        }
        None => String::new(),
    };
    let servers = Upstreams::default().open(&config.upstreams)?;
    let snapshot = Snapshot::build(config, &loaded, &servers, 0);
    let explained =
        snapshot.routing.explain(&route, &key_id, session.as_deref()).map_err(|refusal| refusal.message())?;
    if json {
        println!("{}", serde_json::to_string_pretty(&explained).map_err(text)?);
        return Ok(());
    }
    println!("route    {}", explained.route);
    println!(
        "sticks to {}",
        if key_id.is_empty() && explained.unit == "key=" {
            "nothing: pass --session or --key"
        } else {
            &explained.unit
        }
    );
    for variant in &explained.variants {
        let mark = if explained.chosen.as_deref() == Some(variant.name.as_str()) { "→" } else { " " };
        let draw = variant.draw.map_or("-".to_owned(), |draw| format!("{draw:.6}"));
        let state = if variant.available { "" } else { "  (cannot serve)" };
        println!(
            "{mark} {:20} weight {:>6}  share {:>6.2} %  draw {draw}{state}",
            variant.name,
            variant.weight,
            variant.share * 100.0
        );
    }
    println!("The lowest draw, -ln(u)/weight with u a hash of route, unit and variant, wins.");
    Ok(())
}
