//! A gateway of a test's own: the real binary, a free port, a data folder that goes away.

use std::fs::File;
use std::io::BufReader;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::http::{self, Open, Response};
use super::upstream::Upstream;
use super::{eventually, root};

pub struct TestGateway {
    folder: TempDir,
    pub child: Child,
    pub data: SocketAddr,
    pub admin: SocketAddr,
    pub key: String,
    life: u32,
}

/// A temporary folder with the shipped configuration, to be changed before the start. Its limits of tokens, money and
/// requests at a time are out of the way: tests send in seconds what one key is allowed in hours. `Setup::limited` has
/// limits of a test's own.
pub struct Setup(pub TempDir);

impl Setup {
    /// As a newcomer gets it, but without the route's cache and shadow: most tests count what is asked and what is made.
    pub fn shipped() -> Setup {
        let setup = Setup::with_cache_and_shadow();
        let path = setup.path("routes.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let (off, on): (Vec<&str>, Vec<&str>) =
            text.lines().partition(|line| line.starts_with("cache ") || line.starts_with("shadow "));
        assert_eq!(off.len(), 2, "the shipped route has a cache and a shadow");
        std::fs::write(&path, on.join("\n") + "\n").unwrap();
        setup
    }

    pub fn with_cache_and_shadow() -> Setup {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let configs = folder.path().join("configs");
        std::fs::create_dir(&configs).unwrap();
        for name in ["gateway.toml", "routes.toml", "prices.toml"] {
            std::fs::copy(root().join("configs").join(name), configs.join(name)).unwrap();
        }
        let setup = Setup(folder);
        let models = root().join("models").canonicalize().unwrap();
        setup.replace("gateway.toml", "../models", models.to_str().unwrap());
        // Nobody balances load over a test. (In an empty line, so that the others keep their numbers.)
        setup.replace("gateway.toml", "\n\n[storage]", "\npre_drain = \"0s\"\n[storage]");
        // A machine that has other things to do is no reason to refuse.
        setup.replace("routes.toml", "first_token = \"5s\", idle = \"10s\"", "first_token = \"60s\", idle = \"60s\"");
        // And tests guess more often than anybody may.
        append(&setup.path("gateway.toml"), "\n[auth]\nfailures_per_minute = 0\n");
        setup.limited(1_000_000_000, 10_000, "1_000_000")
    }

    /// Tokens a minute, requests at a time, and US dollars a day for every key.
    pub fn limited(self, tokens: u32, concurrency: u32, usd: &str) -> Setup {
        let path = self.path("gateway.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut found = 0;
        let lines = text.lines().map(|line| {
            let key = line.split(' ').next().unwrap_or_default();
            let value = match key {
                "tokens_per_minute" => tokens.to_string(),
                "concurrency" => concurrency.to_string(),
                "usd_per_day" => usd.to_owned(),
                _ => return line.to_owned(),
            };
            found += 1;
            format!("{key} = {value}")
        });
        let text = lines.collect::<Vec<_>>().join("\n") + "\n";
        assert_eq!(found, 3, "the shipped configuration shows its limits");
        std::fs::write(&path, text).unwrap();
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("configs").join(name)
    }

    /// Replaces text in a configuration file; it must be there.
    pub fn replace(&self, name: &str, from: &str, to: &str) {
        replace(&self.path(name), from, to);
    }

    /// The shipped configuration and a route `remote` to a mock: `remote-model`, priced like glimmer-2, and whatever the
    /// route is to have beyond that.
    pub fn upstream(upstream: &Upstream, route: &str) -> Setup {
        let setup = Setup::shipped();
        setup.add_upstream("mock", &upstream.url(), "remote-model");
        let text = format!("\n[routes.remote]\nsplit = {{ remote-model = 1 }}\n{route}\n");
        append(&setup.path("routes.toml"), &text);
        setup
    }

    /// An upstream with one model.
    pub fn add_upstream(&self, name: &str, url: &str, model: &str) {
        let text = format!(
            "\n[upstreams.{name}]\nurl = \"{url}\"\nconnect_timeout = \"10s\"\n[models.{model}]\nupstream = \"{name}\"\nname = \"their-model\"\n"
        );
        append(&self.path("routes.toml"), &text);
        append(
            &self.path("prices.toml"),
            &format!("\n[models.{model}]\ninput = 0.03\ncache_read = 0.01\noutput = 0.12\n"),
        );
    }

    pub fn start(self) -> TestGateway {
        let mut gateway = TestGateway::serve(self.0);
        gateway.wait_ready();
        gateway
    }

    /// As `start`, of one that has nothing to serve yet.
    pub fn start_unready(self) -> TestGateway {
        let mut gateway = TestGateway::serve(self.0);
        gateway.wait_up();
        gateway
    }

    /// As `start`, by another program that is given the command, and becomes it.
    pub fn start_under(self, program: &[&str]) -> TestGateway {
        std::fs::write(self.0.path().join("under"), program.join("\n")).unwrap();
        self.start()
    }

    /// Adds a line to what every process on this configuration finds in its environment.
    pub fn env(&self, name: &str, value: &str) {
        let path = self.0.path().join("environment");
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(path, format!("{before}{name}={value}\n")).unwrap();
    }

    /// Runs another command on this configuration.
    pub fn run(&self, args: &[&str]) -> Output {
        run(self.0.path(), args)
    }

    /// As `run`, without waiting for its end.
    pub fn spawn(&self, args: &[&str]) -> Child {
        command(self.0.path(), args).stdout(Stdio::null()).spawn().expect("the binary runs")
    }
}

pub fn append(path: &Path, more: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    std::fs::write(path, text + more).unwrap();
}

pub fn replace(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{} has no {from:?}", path.display());
    std::fs::write(path, text.replace(from, to)).unwrap();
}

fn binary(folder: &Path) -> Command {
    let environment = std::fs::read_to_string(folder.join("environment")).unwrap_or_default();
    let mut command = Command::new(env!("CARGO_BIN_EXE_glassgate"));
    // What a developer has exported is no part of a test.
    command.env_remove("GLASSGATE_API_KEY");
    command.envs(environment.lines().filter_map(|line| line.split_once('=')));
    command
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = binary(folder);
    command.args(args).arg("--config").arg(folder.join("configs/gateway.toml"));
    command.arg("--data-dir").arg(folder.join("data"));
    command
}

fn run(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().expect("the binary runs")
}

impl TestGateway {
    /// The shipped configuration on free ports.
    pub fn start() -> TestGateway {
        Setup::shipped().start()
    }

    fn serve(folder: TempDir) -> TestGateway {
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let child = spawn(folder.path(), 0);
        TestGateway { folder, child, data: nowhere, admin: nowhere, key: String::new(), life: 0 }
    }

    pub fn wait_ready(&mut self) {
        self.wait_up();
        eventually("the gateway to be ready", || (self.admin_get("/readyz").status == 200).then_some(()));
        // Of those that share a directory the first has made one.
        self.key = std::fs::read_to_string(self.data_dir().join("quickstart.key")).unwrap_or_default();
    }

    /// Until it can be asked.
    fn wait_up(&mut self) {
        let pid = self.child.id();
        let run = eventually("the gateway to write run.json", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the gateway ended with {status}:\n{}", self.stderr());
            }
            let run: Value = serde_json::from_slice(&std::fs::read(self.data_dir().join("run.json")).ok()?).ok()?;
            (run["pid"] == pid).then_some(run)
        });
        self.data = run["data"].as_str().unwrap().parse().unwrap();
        self.admin = run["admin"].as_str().unwrap().parse().unwrap();
    }

    /// `kill -9`, and a new life on the same data.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.restart();
    }

    /// A new life after the process has ended.
    pub fn restart(&mut self) {
        self.life += 1;
        self.child = spawn(self.folder.path(), self.life);
        self.wait_ready();
    }

    pub fn terminate(&self) {
        self.signal("-TERM");
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    /// SIGTERM, and waits for the end, after which everything is on disk.
    pub fn stop(&mut self) {
        self.terminate();
        self.wait_end();
    }

    pub fn wait_end(&mut self) {
        let status = eventually("the gateway to end", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}:\n{}", self.stderr());
    }

    pub fn config(&self, name: &str) -> PathBuf {
        self.folder.path().join("configs").join(name)
    }
    pub fn data_dir(&self) -> PathBuf {
        let folder = self.folder.path().join("data");
        // One that has mounts of its own is looked into from outside.
        let apart = self.folder.path().join("under").exists() && folder.join("outside").exists();
        if apart { format!("/proc/{}/root{}", self.child.id(), folder.display()).into() } else { folder }
    }
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("stderr.{}", self.life))).unwrap_or_default()
    }
    /// The access log of this life.
    pub fn stdout(&self) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("stdout.{}", self.life))).unwrap_or_default()
    }

    /// Runs another command beside the running gateway.
    pub fn run(&self, args: &[&str]) -> Output {
        run(self.folder.path(), args)
    }

    /// Runs another command, which must succeed, and gives what it printed.
    pub fn cli(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn admin_get(&self, path: &str) -> Response {
        let request = format!("GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", self.admin);
        http::raw(self.admin, request.as_bytes()).expect("the admin listener answers").finish()
    }

    /// A request to /admin with the token.
    pub fn admin(&self, method: &str, path: &str) -> Response {
        self.operate(method, path, "", "")
    }

    /// A request to /admin with the token, more lines of the head (each with its end), and a body.
    pub fn operate(&self, method: &str, path: &str, head: &str, body: &str) -> Response {
        let token = std::fs::read_to_string(self.data_dir().join("admin.token")).unwrap();
        let (host, length) = (self.admin, body.len());
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n{head}content-length: {length}\r\n\r\n{body}"
        );
        http::raw(self.admin, request.as_bytes()).expect("the admin listener answers").finish()
    }

    pub fn metrics(&self) -> String {
        String::from_utf8(self.admin_get("/metrics").body).unwrap()
    }

    /// The sum of a family over all series whose labels contain every given text.
    pub fn metric(&self, family: &str, labels: &[&str]) -> f64 {
        metric(&self.metrics(), family, labels)
    }

    /// Sends bytes, checks what every response must have, and gives the body.
    pub fn send(&self, bytes: &[u8]) -> Response {
        let response = self.open(bytes).finish();
        check(&response);
        response
    }

    /// Sends bytes and reads the head only.
    pub fn open(&self, bytes: &[u8]) -> Open {
        http::raw(self.data, bytes).expect("the gateway answers")
    }

    /// Sends bytes and reads nothing.
    pub fn open_unread(&self, bytes: &[u8]) -> std::net::TcpStream {
        let mut stream = std::net::TcpStream::connect(self.data).expect("the gateway listens");
        std::io::Write::write_all(&mut stream, bytes).expect("the gateway reads");
        stream
    }

    pub fn post(&self, body: &Value) -> Response {
        self.send(&self.chat_bytes(body, &[]))
    }

    pub fn chat_bytes(&self, body: &Value, headers: &[(&str, &str)]) -> Vec<u8> {
        http::post("/v1/chat/completions", Some(&self.key), headers, body.to_string().as_bytes())
    }

    /// A greedy answer to one question, as text.
    pub fn ask(&self, question: &str) -> String {
        let response = self.post(&chat(question));
        assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
        response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }
}

/// A greedy chat request.
pub fn chat(question: &str) -> Value {
    json!({"model": "assistant", "temperature": 0, "messages": [{"role": "user", "content": question}]})
}

/// A chat request with more fields.
pub fn chat_with(question: &str, more: Value) -> Value {
    let mut request = chat(question);
    for (name, value) in more.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

/// A request to the route `remote`.
pub fn remote(more: Value) -> Value {
    let mut request = chat_with("Hello?", more);
    request["model"] = "remote".into();
    request
}

/// A stream of exactly so many tokens.
pub fn long(tokens: u32) -> Value {
    chat_with("Count up from 1 to 99.", json!({"stream": true, "max_tokens": tokens, "ignore_eos": true}))
}

pub fn metric(text: &str, family: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter(|line| line.starts_with(&format!("{family}{{")) || line.starts_with(&format!("{family} ")))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

/// What holds for every response: an id, a trace, and for errors OpenAI's shape.
pub fn check(response: &Response) {
    assert!(response.header("x-request-id").is_some_and(|id| id.len() == 32), "no x-request-id: {response:?}");
    assert!(response.header("traceparent").is_some_and(|trace| trace.len() == 55), "no traceparent: {response:?}");
    if response.status >= 400 && !response.body.is_empty() {
        let body = response.json();
        if body.get("status").is_some() {
            return; // /health has a shape of its own
        }
        let error = &body["error"];
        for field in ["message", "type", "code"] {
            assert!(error[field].is_string(), "the error has no {field}: {body}");
        }
        assert!(error.as_object().unwrap().contains_key("param"));
    }
}

impl Drop for TestGateway {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(folder: &Path, life: u32) -> Child {
    let file = |name: &str| File::create(folder.join(format!("{name}.{life}"))).unwrap();
    let mut command = binary(folder);
    if let Ok(under) = std::fs::read_to_string(folder.join("under")) {
        let mut words = under.lines();
        let mut wrapped = Command::new(words.next().expect("a program"));
        wrapped.args(words).arg(command.get_program());
        wrapped.env_remove("GLASSGATE_API_KEY");
        command = wrapped;
    }
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"])
        .arg(folder.join("configs/gateway.toml"))
        .arg("--data-dir")
        .arg(folder.join("data"))
        .stdout(Stdio::from(file("stdout")))
        .stderr(Stdio::from(file("stderr")))
        .stdin(Stdio::null())
        .spawn()
        .expect("the binary starts")
}

/// A kept-alive connection.
pub fn connect(address: SocketAddr) -> (std::net::TcpStream, BufReader<std::net::TcpStream>) {
    let stream = std::net::TcpStream::connect(address).unwrap();
    let reader = BufReader::new(stream.try_clone().unwrap());
    (stream, reader)
}
