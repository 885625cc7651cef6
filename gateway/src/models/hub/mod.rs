//! Models from the Hugging Face hub: only the files that are needed, each checked, in a folder of ours. Once they are
//! there, and the revision is a commit, the hub is not asked again.
//!
//! `<folder>/<org>--<name>/<commit>/` holds the files, and a marker when they are all there; `refs/<branch>` beside it
//! names the commit that a branch or tag meant when the hub was last asked.

mod checksum;
mod client;
mod download;
mod listing;
mod progress;
mod reference;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use http_body_util::{BodyExt, Limited};
use rustix::fs::{FlockOperation, flock};

use crate::config::secret::Secret;
use client::{Client, Failure};
use download::{Listed, download, persist};
use listing::Revision;
use progress::Progress;
pub use progress::human;
use reference::is_commit;
pub use reference::{Reference, SCHEME};

const ENDPOINT: &str = "https://huggingface.co";
const IDLE: Duration = Duration::from_secs(30);
/// A list of files is not longer.
const LIST_BYTES_MAX: usize = 16 << 20;
/// A new name whenever a folder must hold more than before.
const COMPLETE: &str = "complete-2";
const REFS: &str = "refs";

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub struct Hub {
    pub endpoint: String,
    /// Sent to the endpoint and to nobody else.
    pub token: Option<Secret>,
    pub folder: PathBuf,
    /// How long the other side may say nothing.
    pub idle: Duration,
}

/// A model in the folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Kept {
    pub repository: String,
    pub commit: String,
    /// A `.gguf` file, or the folder itself.
    pub path: PathBuf,
    pub bytes: u64,
}

impl Hub {
    /// As the environment says: HF_ENDPOINT and HF_TOKEN, under the names that Hugging Face's own tools use.
    pub fn from_environment(folder: PathBuf) -> Hub {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Hub {
            endpoint: variable("HF_ENDPOINT").map_or(ENDPOINT.to_owned(), |url| url.trim_end_matches('/').to_owned()),
            token: variable("HF_TOKEN").map(Secret::new),
            folder,
            idle: IDLE,
        }
    }

    /// The model's folder or file, if it is here: of a branch or tag, what that meant when the hub was last asked.
    pub fn kept(&self, reference: &Reference) -> Option<PathBuf> {
        let place = self.place(reference);
        let commit = match reference.is_commit() {
            true => reference.revision.to_ascii_lowercase(),
            false => std::fs::read_to_string(place.join(REFS).join(&reference.revision)).ok()?,
        };
        let folder = place.join(Some(commit).filter(|commit| is_commit(commit))?);
        match &reference.file {
            Some(file) => Some(folder.join(file)).filter(|file| file.is_file()),
            None => folder.join(COMPLETE).is_file().then_some(folder),
        }
    }

    /// Like [`Hub::pull`], but when the hub cannot be asked for the moment, what is here of a branch is good enough.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn fetch(&self, reference: &Reference) -> Result<PathBuf, String> {
        match (self.bring(reference), self.kept(reference)) {
            (Err(Failure::Passing { why, .. }), Some(path)) => {
                tracing::warn!(%reference, %why, "the hub cannot be asked: the model is the one that was last fetched");
                Ok(path)
            }
            (outcome, _) => outcome.map_err(|failure| format!("{reference}: {failure}")),
        }
    }

    /// The model's folder or file; what is missing is downloaded. Blocks until it is there.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn pull(&self, reference: &Reference) -> Result<PathBuf, String> {
        self.bring(reference).map_err(|failure| format!("{reference}: {failure}"))
    }

    fn bring(&self, reference: &Reference) -> Result<PathBuf, Failure> {
        if let Some(path) = self.kept(reference).filter(|_| reference.is_commit()) {
            return Ok(path);
        }
        // On a thread of its own: the caller may be inside another executor.
        std::thread::scope(|scope| {
            let download = scope.spawn(|| {
                let executor = tokio::runtime::Builder::new_current_thread().enable_all().build();
                executor.map_err(|error| error.to_string())?.block_on(self.download(reference))
            });
            download.join().unwrap_or_else(|_| Err(Failure::Final("the download ended in a panic".to_owned())))
        })
    }

    async fn download(&self, reference: &Reference) -> Result<PathBuf, Failure> {
        let client = Client::new(self.token.clone(), self.idle)?;
        let revision = persist(|| 0, async || self.revision(&client, reference).await).await?;
        let place = self.place(reference);
        let folder = place.join(&revision.sha);
        let io = |error: std::io::Error| format!("{}: {error}", folder.display());
        std::fs::create_dir_all(&folder).map_err(io)?;
        let _lock = lock(&place.join("lock")).map_err(io)?;
        self.files(&client, reference, &revision.first(reference)?, &folder).await?;
        if reference.file.is_none() {
            self.files(&client, reference, &revision.named(&folder)?, &folder).await?;
            std::fs::write(folder.join(COMPLETE), "").map_err(io)?;
        }
        if !reference.is_commit() {
            let refs = place.join(REFS);
            std::fs::create_dir_all(&refs).map_err(io)?;
            std::fs::write(refs.join(&reference.revision), &revision.sha).map_err(io)?;
        }
        Ok(reference.file.as_ref().map_or(folder.clone(), |file| folder.join(file)))
    }

    /// Downloads those of `files` that `folder` does not hold.
    async fn files(
        &self,
        client: &Client,
        reference: &Reference,
        files: &[Listed],
        folder: &Path,
    ) -> Result<(), Failure> {
        let missing: Vec<&Listed> = files.iter().filter(|file| !folder.join(&file.name).is_file()).collect();
        if !missing.is_empty() {
            let bytes: u64 = missing.iter().filter_map(|file| file.bytes).sum();
            eprintln!("{reference}: {} files, {}, to {}", missing.len(), human(bytes), folder.display());
        }
        let commit = folder.file_name().unwrap_or_default().to_string_lossy();
        let mut progress = Progress::on_stderr();
        for file in missing {
            let url = self.url(&format!("/{}/resolve/{commit}/{}", reference.repository, file.name))?;
            download(client, &url, file, folder, &mut progress).await?;
        }
        Ok(())
    }

    async fn revision(&self, client: &Client, reference: &Reference) -> Result<Revision, Failure> {
        let Reference { repository, revision: asked, .. } = reference;
        let url = self.url(&format!("/api/models/{repository}/revision/{asked}?blobs=true"))?;
        let response = client.get(&url, 0).await?.response;
        let body = tokio::time::timeout(self.idle, Limited::new(response.into_body(), LIST_BYTES_MAX).collect());
        let body = body.await.map_err(|_| client.passing("the hub's list of files does not end".to_owned()))?;
        let broken = |error| client.passing(format!("the hub's list of files cannot be read: {error}"));
        let body = body.map_err(broken)?.to_bytes();
        let revision: Revision = serde_json::from_slice(&body)
            .map_err(|error| format!("the hub's list of files cannot be understood: {error}"))?;
        if !is_commit(&revision.sha) {
            return Err(Failure::Final("the hub names no commit".to_owned()));
        }
        if reference.is_commit() && !asked.eq_ignore_ascii_case(&revision.sha) {
            return Err(Failure::Final(format!("the hub answers with another commit: {}", revision.sha)));
        }
        Ok(revision)
    }

    fn url(&self, path: &str) -> Result<Uri, String> {
        let url = format!("{}{path}", self.endpoint);
        url.parse().map_err(|error| format!("{url} is no URL ({error}): check HF_ENDPOINT"))
    }

    fn place(&self, reference: &Reference) -> PathBuf {
        self.folder.join(reference.repository.replace('/', "--"))
    }

    /// Every model that is complete.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Kept>, String> {
        let mut kept = Vec::new();
        for place in entries(&self.folder)? {
            let name = place.file_name().unwrap_or_default().to_string_lossy().replacen("--", "/", 1);
            for folder in entries(&place)? {
                let commit = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !is_commit(&commit) {
                    continue;
                }
                let files = entries(&folder)?;
                let bytes = |path: &PathBuf| path.metadata().map_or(0, |about| about.len());
                let add = |path: PathBuf, bytes| Kept { repository: name.clone(), commit: commit.clone(), path, bytes };
                if folder.join(COMPLETE).is_file() {
                    let of_folder = files.iter().filter(|path| path.is_file() && !is_gguf(path));
                    kept.push(add(folder.clone(), of_folder.map(bytes).sum()));
                }
                kept.extend(files.into_iter().filter(|path| is_gguf(path)).map(|path| add(path.clone(), bytes(&path))));
            }
        }
        Ok(kept)
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}

/// Sorted; nothing if the folder does not exist yet.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let read = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(Vec::new()),
        read => read,
    };
    let paths = read.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>());
    let mut paths = paths.map_err(|error| format!("{}: {error}", folder.display()))?;
    paths.sort();
    Ok(paths)
}

/// Waits until no other process downloads the same model.
fn lock(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}
