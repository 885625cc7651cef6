//! The processes that are measured: the gateway, pingora with nothing on top, nginx.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

const START: Duration = Duration::from_secs(30);

/// A process that serves; it ends with this value.
pub struct Process {
    child: Child,
    /// Nanoseconds of each thread that was ever seen: those that have ended have worked too.
    threads: Mutex<HashMap<OsString, u64>>,
    /// Its configuration and data.
    _folder: tempfile::TempDir,
    pub address: SocketAddr,
    pub ready: Duration,
}

impl Process {
    /// The gateway beside this program, on a free port, with the `gateway.toml` that is in the folder. The second value is
    /// a key.
    pub fn gateway(folder: tempfile::TempDir) -> (Process, String) {
        let mut command = Command::new(beside("glassgate"));
        command.arg("serve");
        Process::serve(command, folder)
    }

    /// The gateway without limits and ledger.
    pub fn ungoverned(folder: tempfile::TempDir) -> (Process, String) {
        let mut command = Command::new(ourselves());
        command.arg("ungoverned");
        Process::serve(command, folder)
    }

    fn serve(mut command: Command, folder: tempfile::TempDir) -> (Process, String) {
        let data_dir = folder.path().join("data");
        command.args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"]);
        command.arg(folder.path().join("configs/gateway.toml")).arg("--data-dir").arg(&data_dir);
        let process = Process::start(command, folder, || {
            let run: Value = serde_json::from_slice(&std::fs::read(data_dir.join("run.json")).ok()?).ok()?;
            Some(run["data"].as_str()?.parse().unwrap())
        });
        let key = std::fs::read_to_string(data_dir.join("quickstart.key")).unwrap();
        (process, key)
    }

    pub fn bare(origin: SocketAddr) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("stdout");
        let mut command = Command::new(beside("examples/bare"));
        command.arg(origin.to_string());
        Process::start(command, folder, || std::fs::read_to_string(&told).ok()?.strip_suffix('\n')?.parse().ok())
    }

    pub fn nginx(origin: SocketAddr) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let address = free_address();
        let config = include_str!("nginx.conf");
        let config = config.replace("{address}", &address.to_string()).replace("{origin}", &origin.to_string());
        std::fs::write(folder.path().join("nginx.conf"), config).unwrap();
        let mut command = Command::new("nginx");
        command.env("PATH", path()).args(["-e", "stderr", "-c", "nginx.conf", "-p"]).arg(folder.path());
        Process::start(command, folder, || TcpStream::connect(address).ok().map(|_| address))
    }

    /// SMG, a gateway in Rust, with one key to check and its metrics on.
    pub fn smg(origin: SocketAddr, key: &str) -> Process {
        let (address, metrics) = (free_address(), free_address());
        let mut command = Command::new(peer("smg"));
        command
            .args(["launch", "--backend", "openai", "--log-level", "error", "--api-key", key])
            .args(["--host", "127.0.0.1", "--port", &address.port().to_string()])
            .args(["--prometheus-host", "127.0.0.1", "--prometheus-port", &metrics.port().to_string()])
            .args(["--worker-urls", &format!("http://{origin}")]);
        let is_ready = || {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"GET /readiness HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            std::io::Result::Ok(answer.starts_with("HTTP/1.1 200 "))
        };
        Process::start(command, tempfile::tempdir().unwrap(), || is_ready().ok()?.then_some(address))
    }

    /// Starts it and waits until it says where it serves. What it prints is in its folder.
    pub fn start(
        mut command: Command,
        folder: tempfile::TempDir,
        mut ready: impl FnMut() -> Option<SocketAddr>,
    ) -> Process {
        let output = |name: &str| File::create(folder.path().join(name)).unwrap();
        let complaints = folder.path().join("stderr");
        let began = Instant::now();
        let child = command
            .stdout(output("stdout"))
            .stderr(output("stderr"))
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}; tools/setup.sh bench installs what is missing"));
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        // From here on it ends with us, also if we give up.
        let mut process = Process { child, threads: Mutex::default(), _folder: folder, address, ready: Duration::ZERO };
        process.address = loop {
            if let Some(address) = ready() {
                break address;
            }
            if began.elapsed() > START {
                panic!("{command:?} does not start: {}", std::fs::read_to_string(complaints).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        process.ready = began.elapsed();
        process
    }

    /// User and system time, from the kernel's scheduler accounting (nanoseconds) of every thread.
    pub fn cpu(&self) -> Duration {
        let mut threads = self.threads.lock();
        threads.extend(threads_cpu(self.child.id()));
        Duration::from_nanos(threads.values().sum())
    }

    /// The same, once it does nothing any more: what it puts off until later is work for the requests too.
    pub fn cpu_at_rest(&self) -> Duration {
        let mut last = self.cpu();
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.cpu();
            if now - last < Duration::from_micros(500) {
                return now;
            }
            last = now;
        }
        last
    }

    pub fn resident_mib(&self) -> f64 {
        self.memory_kib("status", "VmRSS") / 1024.0
    }

    /// Resident, and its share of what is resident for several: `VmRSS` and `Pss` in KiB.
    pub fn memory(&self) -> (f64, f64) {
        (self.memory_kib("status", "VmRSS"), self.memory_kib("smaps_rollup", "Pss"))
    }

    fn memory_kib(&self, file: &str, name: &str) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.split(':').next() == Some(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn cpu(pid: u32) -> Duration {
    Duration::from_nanos(threads_cpu(pid).map(|(_, nanos)| nanos).sum())
}

fn threads_cpu(pid: u32) -> impl Iterator<Item = (OsString, u64)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        Some((task.file_name(), stat.split(' ').next()?.parse().ok()?))
    })
}

/// Where nginx is, also for who is not root.
pub fn path() -> String {
    format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A program of those that were installed to be measured beside.
pub fn peer(name: &str) -> PathBuf {
    beside("../peers/bin").join(name)
}

/// From the folder of the profile that this program was built with.
pub fn beside(name: &str) -> PathBuf {
    ourselves().parent().unwrap().parent().unwrap().join(name)
}

pub fn ourselves() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// For those who cannot tell which port they were given.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
