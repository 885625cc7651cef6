//! A Postgres of a test's own: the real server, in a folder that goes away.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::server::{Program, Server};

/// Who may do everything there; no password is asked for.
const USER: &str = "glassgate";
/// Whom it runs as where the tests are root's, which it refuses to be. The package makes this account.
const ACCOUNT: &str = "postgres";

/// The file that says that the disk is full.
const FULL: &str = "full";

pub struct Postgres {
    pub server: Server,
    folder: TempDir,
}

impl Postgres {
    /// As quick as it can be: what it acknowledges survives its own death, not the machine's.
    pub fn start() -> Postgres {
        Postgres::start_with(&["fsync=off", "synchronous_commit=off"])
    }

    /// With these settings, as in its configuration.
    pub fn start_with(settings: &[&str]) -> Postgres {
        Postgres::start_in(folder(), settings, &[])
    }

    /// On a disk that is full between `fill` and `clear`.
    pub fn start_on_small_disk() -> Postgres {
        let folder = folder();
        let [library, mark] = ["full_disk.so", FULL].map(|name| folder.path().join(name));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/support/full_disk.c");
        succeed(Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source));
        Postgres::start_in(folder, &["fsync=off"], &[("LD_PRELOAD", library), ("FULL_DISK", mark)])
    }

    pub fn fill(&self) {
        std::fs::write(self.folder.path().join(FULL), "").unwrap();
    }

    pub fn clear(&self) {
        std::fs::remove_file(self.folder.path().join(FULL)).unwrap();
    }

    /// With TLS, under this certificate and its key, in PEM.
    pub fn start_tls(certificate: &str, key: &str) -> Postgres {
        let folder = folder();
        let paths = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
        for (path, text) in paths.iter().zip([certificate, key]) {
            std::fs::write(path, text).unwrap();
            succeed(Command::new("chmod").arg("600").arg(path));
            give(path);
        }
        let [cert, key] = paths.map(|path| path.display().to_string());
        let settings = ["ssl=on", &format!("ssl_cert_file={cert}"), &format!("ssl_key_file={key}")];
        Postgres::start_in(folder, &settings, &[])
    }

    fn start_in(folder: TempDir, settings: &[&str], environment: &[(&'static str, PathBuf)]) -> Postgres {
        let (path, programs) = (folder.path().to_owned(), programs());
        let data = path.join("data");
        let mut initdb = as_account(&programs.join("initdb"));
        succeed(
            initdb.args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", USER]).arg(&data),
        );
        let (asked, pid_file) = (programs.join("pg_isready"), data.join("postmaster.pid"));
        let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
        let environment = environment.to_vec();
        let server = Server::start(Program {
            log: path.join("log"),
            command: Box::new(move |port| {
                let mut command = as_account(&programs.join("postgres"));
                command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k"]).arg(&path);
                command.envs(environment.iter().map(|(name, value)| (name, value)));
                command.args(settings.iter().flat_map(|setting| ["-c", setting]));
                command
            }),
            serves: Box::new(move |port, pid| {
                let written = std::fs::read_to_string(&pid_file).unwrap_or_default();
                let mut ready = Command::new(&asked);
                ready.args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()]);
                written.lines().next() == Some(pid.to_string().as_str()) && ready.status().unwrap().success()
            }),
        });
        Postgres { server, folder }
    }

    pub fn url(&self) -> String {
        format!("postgres://{USER}@127.0.0.1:{}/postgres", self.server.port)
    }

    /// What a statement gives: a row a line, columns apart by `|`.
    pub fn ask(&self, sql: &str) -> String {
        let mut psql = Command::new(programs().join("psql"));
        let output = psql.args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql, &self.url()]).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}

fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    give(folder.path());
    folder
}

/// To whom it runs as.
fn give(path: &Path) {
    if is_root() {
        succeed(Command::new("chown").arg(ACCOUNT).arg(path));
    }
}

/// Debian keeps them out of the way, a folder for each version.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions.max_by_key(|entry| entry.file_name().to_string_lossy().parse::<u32>().unwrap_or_default());
    newest.expect("Postgres is installed; `tools/setup.sh test` does that").path().join("bin")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn as_account(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", ACCOUNT, "--regid", ACCOUNT, "--clear-groups"]).arg(program);
    // It may not enter the folder that root is in.
    command.current_dir("/");
    command
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
