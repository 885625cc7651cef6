//! llama.cpp: `llama-bench` for one sequence, `llama-server` for many.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::super::process::{Process, beside, free_address};
use super::ours::threads;

pub struct Llama {
    programs: PathBuf,
}

impl Llama {
    pub fn find() -> Option<Llama> {
        let programs = beside("../llama/build/bin");
        programs.join("llama-bench").exists().then_some(Llama { programs })
    }

    /// Tokens a second: prefill of `prompt` tokens, decode of `decoded` after `depth`.
    pub fn speed(&self, file: &Path, prompt: u32, depth: u32, decoded: u32) -> (f64, f64) {
        let ask = |args: &[(&str, u32)]| {
            let mut command = Command::new(self.programs.join("llama-bench"));
            command.arg("-m").arg(file).args(["-t", &threads().to_string(), "-r", "1", "-o", "json"]);
            for (name, number) in args {
                command.args([*name, &number.to_string()]);
            }
            let output = command.stderr(Stdio::null()).output().unwrap();
            let tests: Value = serde_json::from_slice(&output.stdout).unwrap();
            tests[0]["avg_ts"].as_f64().unwrap()
        };
        (ask(&[("-p", prompt), ("-n", 0)]), ask(&[("-p", 0), ("-n", decoded), ("-d", depth)]))
    }

    /// A server with as many places as clients, and room for each.
    pub fn serve(&self, file: &Path, clients: usize, tokens_each: u32) -> Process {
        let address: SocketAddr = free_address();
        let mut command = Command::new(self.programs.join("llama-server"));
        command.arg("-m").arg(file).args([
            "--host",
            "127.0.0.1",
            "--port",
            &address.port().to_string(),
            "-t",
            &threads().to_string(),
            "-np",
            &clients.to_string(),
            "-c",
            &(clients as u32 * tokens_each).to_string(),
            "-cb",
        ]);
        Process::start(command, tempfile::tempdir().unwrap(), || is_ready(address).then_some(address))
    }
}

/// It answers 503 while it loads.
fn is_ready(address: SocketAddr) -> bool {
    use std::io::{Read, Write};
    let mut answer = String::new();
    let asked = std::net::TcpStream::connect(address).and_then(|mut stream| {
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")?;
        stream.read_to_string(&mut answer)
    });
    asked.is_ok() && answer.starts_with("HTTP/1.1 200 ")
}
