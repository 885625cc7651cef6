//! A server program of a test's own: started on a free port, frozen, killed, restarted, and gone when the test is.

use std::fs::File;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Ports that are tried: somebody may take one between its choice and the server's start.
const PORTS_TRIED: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);

/// How it is started on a port, in the foreground, and whether the process of this id serves there.
pub struct Program {
    pub command: Box<dyn Fn(u16) -> Command + Send + Sync>,
    pub serves: Box<dyn Fn(u16, u32) -> bool + Send + Sync>,
    /// Where its output goes.
    pub log: PathBuf,
}

pub struct Server {
    program: Arc<Program>,
    pub port: u16,
    child: Child,
}

impl Server {
    pub fn start(program: Program) -> Server {
        let program = Arc::new(program);
        for _ in 0..PORTS_TRIED {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut server = Server { child: spawn(&program, port), program: program.clone(), port };
            if server.comes_up() {
                return server;
            }
        }
        panic!("it does not start:\n{}", std::fs::read_to_string(&program.log).unwrap_or_default());
    }

    /// Whether it serves, or has ended instead.
    fn comes_up(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if (self.program.serves)(self.port, self.child.id()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// Stops everything it does, with its connections open: to who waits for it, it is neither there nor gone.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    pub fn kill(&mut self) {
        // Frozen first, so that it has no more children than those that are found.
        self.freeze();
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// A new life at the same port.
    pub fn restart(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.kill();
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.child = spawn(&self.program, self.port);
            if self.comes_up() {
                return;
            }
            // A killed child may hold on to what they share for a moment, and no new life begins until it is gone.
            let said = || std::fs::read_to_string(&self.program.log).unwrap_or_default();
            assert!(Instant::now() < deadline, "it does not start again:\n{}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What it has printed.
    pub fn log(&self) -> Vec<u8> {
        std::fs::read(&self.program.log).unwrap_or_default()
    }

    /// To the process and its children: some servers have one for each connection.
    fn signal(&self, signal: Signal) {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
        for pid in std::iter::once(pid as i32).chain(children) {
            // One that has ended meanwhile needs none.
            let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

fn spawn(program: &Program, port: u16) -> Child {
    let file = || Stdio::from(File::options().create(true).append(true).open(&program.log).unwrap());
    let mut command = (program.command)(port);
    let spawned = command.stdin(Stdio::null()).stdout(file()).stderr(file()).spawn();
    spawned.unwrap_or_else(|error| {
        panic!("{:?}: {error}; `tools/setup.sh test` installs what tests need", command.get_program())
    })
}
