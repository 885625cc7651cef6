//! Models from the Hugging Face hub: only the files that are needed, each checked, in a folder of ours. Once they are
//! there, and the revision is a commit, the hub is not asked again.
//!
//! `<folder>/<org>--<name>/<commit>/` holds the files; `complete` in it says that they are all there.

mod checksum;
mod client;
mod download;
mod progress;
mod reference;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use http_body_util::{BodyExt, Limited};
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;

use crate::config::secret::Secret;
use checksum::Checksum;
use client::{Client, Failure};
use download::{Listed, download};
use progress::Progress;
pub use progress::human;
pub use reference::{Reference, SCHEME};

const ENDPOINT: &str = "https://huggingface.co";
const IDLE: Duration = Duration::from_secs(30);
/// A list of files is not longer.
const LIST_BYTES_MAX: usize = 16 << 20;
const COMPLETE: &str = "complete";
/// What a folder may hold besides weights.
const SMALL: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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

/// What `/api/models/…/revision/…` says, of which we believe as much as we check.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
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

    /// The model's folder or file, if it is here and cannot have changed.
    pub fn kept(&self, reference: &Reference) -> Option<PathBuf> {
        let folder = self.place(reference).join(&reference.revision);
        match &reference.file {
            _ if !reference.is_commit() => None,
            Some(file) => Some(folder.join(file)).filter(|file| file.is_file()),
            None => folder.join(COMPLETE).is_file().then_some(folder),
        }
    }

    /// The model's folder or file; what is missing is downloaded. Blocks until it is there.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn fetch(&self, reference: &Reference) -> Result<PathBuf, String> {
        if let Some(path) = self.kept(reference) {
            return Ok(path);
        }
        // On a thread of its own: the caller may be inside another executor.
        std::thread::scope(|scope| {
            let pull = scope.spawn(|| {
                let executor = tokio::runtime::Builder::new_current_thread().enable_all().build();
                executor.map_err(|error| error.to_string())?.block_on(self.pull(reference))
            });
            pull.join().unwrap_or_else(|_| Err("the download ended in a panic".to_owned()))
        })
        .map_err(|why| format!("{reference}: {why}"))
    }

    async fn pull(&self, reference: &Reference) -> Result<PathBuf, String> {
        let client = Client::new(self.token.clone(), self.idle)?;
        let revision = self.revision(&client, reference).await?;
        let wanted = wanted(&revision, reference)?;
        let place = self.place(reference);
        let folder = place.join(&revision.sha);
        let io = |error: std::io::Error| format!("{}: {error}", folder.display());
        std::fs::create_dir_all(&folder).map_err(io)?;
        let _lock = lock(&place.join("lock")).map_err(io)?;
        let missing: Vec<&Listed> = wanted.iter().filter(|file| !folder.join(&file.name).is_file()).collect();
        if !missing.is_empty() {
            let bytes: u64 = missing.iter().filter_map(|file| file.bytes).sum();
            eprintln!("{reference}: {} files, {}, to {}", missing.len(), human(bytes), folder.display());
        }
        let mut progress = Progress::on_stderr();
        for file in missing {
            let url = self.url(&format!("/{}/resolve/{}/{}", reference.repository, revision.sha, file.name))?;
            download(&client, &url, file, &folder, &mut progress).await?;
        }
        if let Some(file) = &reference.file {
            return Ok(folder.join(file));
        }
        std::fs::write(folder.join(COMPLETE), "").map_err(io)?;
        Ok(folder)
    }

    async fn revision(&self, client: &Client, reference: &Reference) -> Result<Revision, String> {
        let Reference { repository, revision, .. } = reference;
        let url = self.url(&format!("/api/models/{repository}/revision/{revision}?blobs=true"))?;
        let answer = client.get(&url, 0).await.map_err(|failure| match failure {
            Failure::Passing { why, .. } | Failure::Final(why) => why,
        })?;
        let body = tokio::time::timeout(self.idle, Limited::new(answer.response.into_body(), LIST_BYTES_MAX).collect());
        let body = body.await.map_err(|_| "the hub's list of files does not end".to_owned())?;
        let body = body.map_err(|error| format!("the hub's list of files cannot be read: {error}"))?.to_bytes();
        let revision: Revision = serde_json::from_slice(&body)
            .map_err(|error| format!("the hub's list of files cannot be understood: {error}"))?;
        let is_commit = revision.sha.len() == 40 && revision.sha.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_commit.then_some(revision).ok_or_else(|| "the hub names no commit".to_owned())
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
            for folder in entries(&place)?.into_iter().filter(|path| path.is_dir()) {
                let commit = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let files = entries(&folder)?;
                let bytes = |path: &PathBuf| path.metadata().map_or(0, |about| about.len());
                let add = |path: PathBuf, bytes| Kept { repository: name.clone(), commit: commit.clone(), path, bytes };
                if folder.join(COMPLETE).is_file() {
                    let of_folder = files.iter().filter(|path| !is_gguf(path));
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

/// The files that a model needs, in the order in which they are fetched: small ones first.
fn wanted(revision: &Revision, reference: &Reference) -> Result<Vec<Listed>, String> {
    let has = |name: &str| revision.siblings.iter().any(|file| file.rfilename == name);
    let is_wanted = |name: &str| match &reference.file {
        Some(file) => name == file,
        None if has(SINGLE) => SMALL.contains(&name) || name == SINGLE,
        // The index names the shards; the validator reads it, and it cannot name a file in another folder.
        None => SMALL.contains(&name) || name == INDEX || (reference::is_name(name) && name.ends_with(".safetensors")),
    };
    let files = revision.siblings.iter().filter(|file| is_wanted(&file.rfilename)).map(|file| Listed {
        name: file.rfilename.clone(),
        bytes: file.size,
        checksum: match (&file.lfs, &file.blob) {
            (Some(lfs), _) => Checksum::from_etag(&lfs.sha256),
            (None, blob) => blob.as_deref().and_then(Checksum::from_etag),
        },
    });
    let mut files: Vec<Listed> = files.collect();
    files.sort_by_key(|file| (file.name.ends_with(".safetensors"), file.name.clone()));
    match &reference.file {
        Some(file) if files.is_empty() => {
            let known: Vec<&str> = revision.siblings.iter().map(|file| file.rfilename.as_str()).collect();
            let known = known.into_iter().filter(|name| name.ends_with(".gguf")).collect::<Vec<_>>().join(", ");
            Err(format!("has no file `{file}` (it has: {known})"))
        }
        None if !has("config.json") || !files.iter().any(|file| file.name.ends_with(".safetensors")) => {
            Err("has no config.json with safetensors beside it; name the .gguf file that you want".to_owned())
        }
        _ => Ok(files),
    }
}
