//! `glassgate trace`: one request, from the running gateway.

use serde_json::Value;

use super::{Outcome, Place, client, text};

/// Columns of the waterfall.
const WIDTH: f64 = 40.0;

pub fn run(place: &Place, id: &str, json: bool) -> Outcome {
    if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Err("an id has letters, digits and '-' only".into());
    }
    let data_dir = place.data_dir()?;
    let (status, body) = client::get(&data_dir, &format!("/admin/requests/{id}"))?;
    let answer: Value = serde_json::from_slice(&body).map_err(text)?;
    if status != 200 {
        return Err(answer["error"]["message"].as_str().unwrap_or("the gateway said no").to_owned());
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&answer).map_err(text)?);
        return Ok(());
    }
    show(&answer);
    Ok(())
}

fn show(answer: &Value) {
    let record = &answer["record"];
    let word = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
    println!(
        "{} {} → {} {} {}",
        word("method"),
        word("path"),
        record["status"],
        word("outcome"),
        record["error_type"].as_str().unwrap_or("")
    );
    println!("request {}  trace {}  at {}", word("request_id"), word("trace_id"), word("ts"));
    println!("key {} ({}), tenant {}", word("key_name"), word("key_id"), word("tenant"));
    println!("route {} → model {} (config {})", word("route"), word("model"), word("config_hash"));
    if let Some(tokens) = record["tokens"].as_object() {
        let kinds: Vec<String> = tokens
            .iter()
            .filter(|(_, count)| count.as_u64() != Some(0))
            .map(|(kind, count)| format!("{kind} {count}"))
            .collect();
        println!("tokens {}  billed {} USD at prices {}", kinds.join(", "), word("cost_usd"), word("price_version"));
    }
    println!();
    println!("{:10} {:>10}    {:>10}", "stage", "at", "took");
    let stages = answer["stages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let millis = |stage: &Value, end: &str| stage[end].as_f64().unwrap_or(0.0) / 1e6;
    let total = record["duration_ms"].as_f64().unwrap_or(0.0).max(0.001);
    for stage in stages {
        let (from, to) = (millis(stage, "start_ns"), millis(stage, "end_ns"));
        row(stage["name"].as_str().unwrap_or(""), from, to, total, stage["detail"].as_str().unwrap_or(""));
    }
    row("total", 0.0, total, total, "");
}

/// One line of the waterfall: when it began, how long it took, and both as a bar.
fn row(name: &str, from: f64, to: f64, total: f64, detail: &str) {
    let column = |at: f64| (at / total * WIDTH).round().clamp(0.0, WIDTH) as usize;
    // What is too short to be seen still has its place.
    let start = column(from).min(WIDTH as usize - 1);
    let end = column(to).max(start + 1);
    let bar = format!("{}{}{}", " ".repeat(start), "█".repeat(end - start), " ".repeat(WIDTH as usize - end));
    println!("{}", format!("{name:10} {from:>10.3} ms {:>10.3} ms  {bar}  {detail}", to - from).trim_end());
}
