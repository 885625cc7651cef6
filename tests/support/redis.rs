//! A Redis of a test's own: the real server, which keeps nothing on disk.

use std::process::Command;

use tempfile::TempDir;

use super::server::{Program, Server};

pub struct Redis {
    pub server: Server,
    _folder: TempDir,
}

impl Redis {
    pub fn start() -> Redis {
        Redis::start_with(&[])
    }

    /// With more of its settings, as on its command line.
    pub fn start_with(settings: &[&str]) -> Redis {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (path, settings) =
            (folder.path().to_owned(), settings.iter().map(|&one| one.to_owned()).collect::<Vec<_>>());
        let server = Server::start(Program {
            log: path.join("log"),
            command: Box::new(move |port| {
                let mut command = Command::new("redis-server");
                command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
                command.arg("--dir").arg(&path).args(&settings);
                command
            }),
            serves: Box::new(|port, pid| {
                let info = ask(&url(port), &["info", "server"]).unwrap_or_default();
                // One that asks for a password serves too; nobody else's is on this port then, or ours would have ended.
                info.contains("NOAUTH") || info.lines().any(|line| line == format!("process_id:{pid}"))
            }),
        });
        Redis { server, _folder: folder }
    }

    pub fn url(&self) -> String {
        url(self.server.port)
    }

    /// What redis-cli prints for a command.
    pub fn ask(&self, command: &[&str]) -> String {
        ask(&self.url(), command).expect("it answers")
    }
}

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

fn ask(url: &str, command: &[&str]) -> Option<String> {
    let output = Command::new("redis-cli").args(["-u", url]).args(command).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.replace('\r', "");
    output.status.success().then(|| text.trim_end().to_owned())
}
