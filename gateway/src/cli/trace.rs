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
    let stages = &answer["stages"];
    let millis = |mark: &Value| Some(mark["secs"].as_f64()? * 1e3 + mark["nanos"].as_f64()? / 1e6);
    let total = millis(&stages["closed"]).unwrap_or(0.0).max(0.001);
    let bar = |from: f64, to: f64| {
        let column = |at: f64| (at / total * WIDTH).round().clamp(0.0, WIDTH) as usize;
        let (start, end) = (column(from), column(to).max(column(from) + 1));
        format!("{}{}", " ".repeat(start), "█".repeat(end - start))
    };
    let mut from = 0.0;
    for (name, mark) in [
        ("auth", "identified"),
        ("body", "body_read"),
        ("route", "routed"),
        ("measure", "measured"),
        ("admit", "admitted"),
    ] {
        if let Some(to) = millis(&stages[mark]) {
            println!("{name:10} {:>10.3} ms  {}", to - from, bar(from, to));
            from = to;
        }
    }
    for span in answer["spans"].as_array().into_iter().flatten() {
        let name = span["name"].as_str().unwrap_or("");
        if let ("queue" | "prefill" | "decode", Some(start), Some(end)) =
            (name, span["start_ns"].as_f64(), span["end_ns"].as_f64())
        {
            println!("{name:10} {:>10.3} ms  {}", (end - start) / 1e6, bar(start / 1e6, end / 1e6));
        }
    }
    println!("{:10} {total:>10.3} ms  {}", "total", bar(0.0, total));
}
