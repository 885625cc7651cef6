//! Peers that are Python libraries: a script in a process of its own, asked by a line of JSON and answering with one.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

pub struct Script {
    process: Child,
    /// What it wrote to stderr.
    complaints: tempfile::NamedTempFile,
    asked: ChildStdin,
    told: BufReader<ChildStdout>,
    path: PathBuf,
}

impl Script {
    /// `tests/bench/peers/{name}`, run by that interpreter.
    pub fn start(python: &Path, root: &Path, name: &str, args: &[&OsStr]) -> Script {
        let complaints = tempfile::NamedTempFile::new().unwrap();
        let path = root.join("tests/bench/peers").join(name);
        let mut process = Command::new(python)
            .arg(&path)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(complaints.reopen().unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; tools/setup.sh installs it", python.display()));
        let (asked, told) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Script { process, complaints, asked, told, path }
    }

    pub fn ask(&mut self, question: &Value) -> Value {
        let mut line = String::new();
        let told = writeln!(self.asked, "{question}")
            .and_then(|()| self.told.read_line(&mut line))
            .map_err(serde_json::Error::io)
            .and_then(|_| serde_json::from_str(&line));
        told.unwrap_or_else(|error| {
            let complaints = std::fs::read_to_string(self.complaints.path()).unwrap_or_default();
            panic!("{} says nothing ({error}): {complaints}", self.path.display())
        })
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
