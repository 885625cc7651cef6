//! Figures of rounds → median, minimum and maximum: on the terminal, and in a file of `tests/bench/results/`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

pub type Spread = [f64; 3];

/// What was measured in each round, by name.
#[derive(Default)]
pub struct Rounds(pub Vec<Value>);

impl Rounds {
    pub fn of(&self, figure: &str) -> Spread {
        spread(self.0.iter().map(|round| round[figure].as_f64().unwrap()).collect())
    }

    /// The ratio within each round.
    pub fn over(&self, a: &str, b: &str) -> Spread {
        spread(self.0.iter().map(|round| round[a].as_f64().unwrap() / round[b].as_f64().unwrap()).collect())
    }
}

/// Median, minimum, maximum.
pub fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

/// Prints the table and writes it to a file, with the machine, the commit, the date, and `facts`.
pub fn publish(root: &Path, name: &str, table: &[(String, Spread)], facts: Value) {
    println!("{:60} {:>9} {:>9} {:>9}", "", "median", "min", "max");
    for (figure, [median, low, high]) in table {
        println!("{figure:60} {median:>9.2} {low:>9.2} {high:>9.2}");
    }
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut result = json!({
        "commit": said("git", &["describe", "--always", "--dirty", "--exclude", "*"]),
        "date": said("date", &["-u", "+%Y-%m-%d"]),
        // Not what this process may use: it may be pinned by now.
        "cores": cpu.lines().filter(|line| line.starts_with("processor")).count(),
        "cpu": cpu.lines().find(|line| line.starts_with("model name")).map(|line| line.split(':').nth(1).unwrap_or("").trim()),
        "median_min_max": table.iter().map(|(figure, spread)| (figure.clone(), json!(spread))).collect::<serde_json::Map<_, _>>(),
    });
    for (key, fact) in facts.as_object().unwrap() {
        result[key] = fact.clone();
    }
    let path = root.join("tests/bench/results").join(name);
    std::fs::write(&path, format!("{result:#}\n")).unwrap();
    println!("written to tests/bench/results/{name}");
}

pub fn said(program: &str, args: &[&str]) -> String {
    Command::new(program)
        .args(args)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}
