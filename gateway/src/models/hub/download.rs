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

/// Makes `folder/name` be the file at `url`.
pub(super) async fn download(
    client: &Client,
    url: &Uri,
    listed: &Listed,
    folder: &Path,
    progress: &mut Progress,
) -> Result<(), String> {
    let part = folder.join(format!("{}.part", listed.name));
    let io = |error: std::io::Error| format!("{}: {error}", part.display());
    let mut fruitless = 0;
    loop {
        let have = part.metadata().map_or(0, |about| about.len());
        match fetch(client, url, listed, &part, progress).await {
            Ok(()) => break,
            Err(Failure::Final(why)) => return Err(format!("{}: {why}", listed.name)),
            Err(Failure::Passing { why, after }) => {
                let now = part.metadata().map_or(0, |about| about.len());
                fruitless = if now > have { 0 } else { fruitless + 1 };
                if fruitless == FRUITLESS_MAX {
                    return Err(format!("{}: {why}; what has come is kept, try again to go on", listed.name));
                }
                tokio::time::sleep(after.min(WAIT_MAX)).await;
            }
        }
    }
    std::fs::rename(&part, folder.join(&listed.name)).map_err(io)
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
