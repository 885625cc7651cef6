//! One file: what is there already is kept, what is missing is asked for, and nothing gets its name before its checksum
//! is right.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG};
use http::{HeaderMap, StatusCode, Uri};
use http_body_util::BodyExt;

use super::checksum::Checksum;
use super::client::{Answer, Client, Failure};
use super::progress::Progress;

/// Tries in a row that brought nothing new.
const FRUITLESS_MAX: u32 = 5;
/// The hub cannot silence us for longer.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What the hub's list says of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub name: String,
    pub bytes: Option<u64>,
    pub checksum: Option<Checksum>,
}

/// Asks until that succeeds or fails for good, or has so often failed in passing that it counts. `have`: how much there is
/// of what is asked for; as long as that grows, nothing is lost.
pub(super) async fn persist<T>(
    have: impl Fn() -> u64,
    mut ask: impl AsyncFnMut() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut fruitless = 0;
    loop {
        let before = have();
        match ask().await {
            Err(Failure::Passing { why, after }) => {
                fruitless = if have() > before { 0 } else { fruitless + 1 };
                if fruitless == FRUITLESS_MAX {
                    return Err(Failure::Passing { why, after });
                }
                tokio::time::sleep(after.min(WAIT_MAX)).await;
            }
            outcome => return outcome,
        }
    }
}

/// Makes `folder/name` be the file at `url`.
pub(super) async fn download(
    client: &Client,
    url: &Uri,
    listed: &Listed,
    folder: &Path,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let whole = folder.join(&listed.name);
    let part = folder.join(format!("{}.part", listed.name));
    let io = |error: std::io::Error| format!("{}: {error}", part.display());
    // A module's files lie in a folder of their own.
    std::fs::create_dir_all(whole.parent().unwrap_or(folder)).map_err(io)?;
    let have = || part.metadata().map_or(0, |about| about.len());
    let fetched = persist(have, async || fetch(client, url, listed, &part, progress).await).await;
    fetched.map_err(|failure| match failure {
        Failure::Final(why) => Failure::Final(format!("{}: {why}", listed.name)),
        Failure::Passing { why, after } => {
            let why = format!("{}: {why}; what has come is kept, try again to go on", listed.name);
            Failure::Passing { why, after }
        }
    })?;
    Ok(std::fs::rename(&part, whole).map_err(io)?)
}

/// Asks once for what is missing, and checks the whole.
async fn fetch(
    client: &Client,
    url: &Uri,
    listed: &Listed,
    part: &Path,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let broken = |error: std::io::Error| Failure::Final(format!("{}: {error}", part.display()));
    let mut file = OpenOptions::new().create(true).append(true).open(part).map_err(broken)?;
    let mut have = file.metadata().map_err(broken)?.len();
    if listed.bytes.is_some_and(|bytes| have > bytes) {
        file.set_len(0).map_err(broken)?;
        have = 0;
    }
    let (mut expected, mut checksum) = (listed.bytes, listed.checksum.clone());
    if expected != Some(have) {
        let Answer { response, first } = client.get(url, have).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // There is no more: what is here is the whole file, or was thrown away and is asked for anew.
            let checksum = checksum.or_else(|| etag(&first));
            let again = |why: Failure| Failure::Passing { why: why.to_string(), after: Duration::ZERO };
            return verify(part, have, checksum.as_ref()).map_err(again);
        }
        let start =
            if response.status() == StatusCode::PARTIAL_CONTENT { range_start(response.headers()) } else { Some(0) };
        match start {
            Some(start) if start == have => {}
            // Somebody ignores ranges: from the beginning then.
            Some(0) => {
                file.set_len(0).map_err(broken)?;
                have = 0;
            }
            _ => return Err(Failure::Final("the answer is another part of the file than was asked for".to_owned())),
        }
        let rest = number(response.headers(), CONTENT_LENGTH.as_str());
        expected = expected.or(number(&first, "x-linked-size")).or(rest.map(|rest| have + rest));
        checksum = checksum.or_else(|| etag(&first));
        progress.file(&listed.name, expected, have);
        let mut body = response.into_body();
        loop {
            let frame = tokio::time::timeout(client.idle, body.frame()).await;
            let passing = |why: String| Failure::Passing { why, after: Duration::ZERO };
            let frame = frame.map_err(|_| passing(format!("nothing came for {:?}", client.idle)))?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| passing(format!("the connection broke: {error}")))?;
            if let Ok(data) = frame.into_data() {
                have += data.len() as u64;
                if expected.is_some_and(|expected| have > expected) {
                    return Err(reject(part, "is longer than the hub said"));
                }
                file.write_all(&data).map_err(broken)?;
                progress.came(data.len() as u64);
            }
        }
    }
    if let Some(expected) = expected.filter(|&expected| have < expected) {
        let why = format!("the connection ended after {have} of {expected} bytes");
        return Err(Failure::Passing { why, after: Duration::ZERO });
    }
    file.sync_all().map_err(broken)?;
    verify(part, have, checksum.as_ref())?;
    progress.done();
    Ok(())
}

fn verify(part: &Path, len: u64, checksum: Option<&Checksum>) -> Result<(), Failure> {
    let broken = |error: std::io::Error| Failure::Final(format!("{}: {error}", part.display()));
    let checksum = checksum.ok_or_else(|| Failure::Final("the hub gives no checksum for it".to_owned()))?;
    let mut file = File::open(part).map_err(broken)?;
    let mut sum = checksum.start(len);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(broken)? {
            0 => break,
            n => sum.update(&buffer[..n]),
        }
    }
    if checksum.is(sum) { Ok(()) } else { Err(reject(part, "does not have the checksum that the hub said")) }
}

/// What is wrong as a whole cannot be mended by more bytes.
fn reject(part: &Path, why: &str) -> Failure {
    let kept = std::fs::remove_file(part).err().map(|error| format!(" ({}: {error})", part.display()));
    Failure::Final(format!("what came {why}; it was thrown away{}", kept.unwrap_or_default()))
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// The entity tag of the file itself; the one of a redirect's target may be anything.
fn etag(first: &HeaderMap) -> Option<Checksum> {
    let tag = first.get("x-linked-etag").or_else(|| first.get(ETAG))?;
    Checksum::from_etag(tag.to_str().ok()?)
}

/// `bytes 100-199/200` begins at 100.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}
