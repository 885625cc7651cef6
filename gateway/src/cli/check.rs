//! `glassgate check`: would this configuration serve?

use std::sync::Arc;

use super::{Outcome, Place};
use crate::models::Models;
use crate::observe::metrics::Metrics;

pub fn run(place: &Place) -> Outcome {
    let config = place.config()?;
    glassgate_runtime::set_threads(config.gateway.engine.threads);
    let models = Models::start(&config.gateway.engine, place.intake(&config), Arc::new(Metrics::new()))?;
    let mut broken = Vec::new();
    for (name, outcome) in models.load(&config.models) {
        match outcome {
            Ok(_) => println!("model {name}: ready"),
            Err(why) => broken.push(format!("model `{name}`: {why}")),
        }
    }
    for route in &config.routes {
        let split: Vec<String> = route.split.iter().map(|(name, weight)| format!("{name} {weight}")).collect();
        println!("route {}: {}", route.name, split.join(", "));
    }
    for model in config.unpriced() {
        println!("model {model}: has no price, so it is free");
    }
    if !broken.is_empty() {
        return Err(broken.join("\n"));
    }
    println!("ok: {} (hash {})", place.config.display(), config.hash);
    Ok(())
}
