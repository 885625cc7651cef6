//! Asks the running gateway's admin listener. One request, one answer, no keep-alive: a page of std is enough.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::data_dir::DataDir;

const PATIENCE: Duration = Duration::from_secs(5);

/// GETs a path below `/admin`; returns status and body.
///
/// # Errors
/// When no gateway runs from this data folder, or it does not answer.
pub fn get(data_dir: &DataDir, path: &str) -> Result<(u16, Vec<u8>), String> {
    let run = data_dir.read_run().ok_or_else(|| format!("no gateway runs from {}", data_dir.path().display()))?;
    let token = std::fs::read_to_string(data_dir.admin_token())
        .map_err(|error| format!("{}: {error}", data_dir.admin_token().display()))?;
    let failed =
        |error: std::io::Error| format!("the gateway at {} (pid {}) does not answer: {error}", run.admin, run.pid);
    let mut stream = TcpStream::connect_timeout(&run.admin, PATIENCE).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n",
        run.admin
    )
    .map_err(failed)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(failed)?;
    parse(&answer).ok_or_else(|| "the gateway's answer cannot be read".to_owned())
}

fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer[end + 4..].to_vec()))
}
