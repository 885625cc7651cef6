//! The data folder: one process serves from it, and other commands find the running one through it.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// A data folder's places.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

/// Who is serving, for the other commands.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    pub pid: u32,
    pub data: SocketAddr,
    pub admin: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is in use by another glassgate; stop it, or give this one another --data-dir", .0.display())]
    Locked(PathBuf),
}

impl DataDir {
    /// Makes the folder if it is missing, readable by its owner alone.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(path: &Path) -> Result<DataDir, DataDirError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| DataDirError::Io { path: path.to_owned(), source })?;
        // An absolute path reads better in messages, and survives a change of folder.
        Ok(DataDir(path.canonicalize().unwrap_or_else(|_| path.to_owned())))
    }

    /// Claims the folder for this process until the returned file is dropped.
    ///
    /// # Errors
    /// `Locked` if somebody else serves from it.
    pub fn lock(&self) -> Result<File, DataDirError> {
        let path = self.0.join("lock");
        let io = |source| DataDirError::Io { path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(DataDirError::Locked(self.0.clone())),
            Err(error) => Err(io(error.into())),
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
    pub fn keys(&self) -> PathBuf {
        self.0.join("keys.sqlite")
    }
    /// What was last known of a key store that is elsewhere.
    pub fn keys_copy(&self) -> PathBuf {
        self.0.join("keys-copy.sqlite")
    }
    pub fn ledger(&self) -> PathBuf {
        self.0.join("ledger.sqlite")
    }
    pub fn pepper(&self) -> PathBuf {
        self.0.join("pepper")
    }
    pub fn quickstart_key(&self) -> PathBuf {
        self.0.join("quickstart.key")
    }
    pub fn admin_token(&self) -> PathBuf {
        self.0.join("admin.token")
    }
    pub fn traces(&self) -> PathBuf {
        self.0.join("traces.jsonl")
    }
    /// Models that were downloaded.
    pub fn hub(&self) -> PathBuf {
        self.0.join("hub")
    }
    /// What this folder's gateway is called among those that it shares counters with: the same in each of its lives, because
    /// they add to the same books.
    ///
    /// # Errors
    /// When the file can neither be read nor made.
    pub fn replica(&self) -> Result<String, DataDirError> {
        let path = self.0.join("replica");
        match std::fs::read_to_string(&path) {
            Ok(name) => Ok(name.trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let name = uuid::Uuid::new_v4().simple().to_string();
                write_secret(&path, &name)?;
                Ok(name)
            }
            Err(source) => Err(DataDirError::Io { path, source }),
        }
    }
    fn run_file(&self) -> PathBuf {
        self.0.join("run.json")
    }

    /// Tells other commands where we are.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_run(&self, run: &Run) -> Result<(), DataDirError> {
        let json = serde_json::to_string(run).unwrap_or_default();
        write_secret(&self.run_file(), &json)
    }

    /// Who is serving from here, if anybody said so.
    pub fn read_run(&self) -> Option<Run> {
        serde_json::from_slice(&std::fs::read(self.run_file()).ok()?).ok()
    }

    pub fn remove_run(&self) {
        // A file left behind is overwritten by the next start.
        let _ = std::fs::remove_file(self.run_file());
    }
}

/// Replaces a file that only its owner may read, in one step.
///
/// # Errors
/// When it cannot be written.
pub fn write_secret(path: &Path, text: &str) -> Result<(), DataDirError> {
    let io = |source| DataDirError::Io { path: path.to_owned(), source };
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new).map_err(io)?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(io)?;
    file.write_all(text.as_bytes()).map_err(io)?;
    file.sync_all().map_err(io)?;
    std::fs::rename(&new, path).map_err(io)
}
