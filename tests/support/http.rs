//! A small HTTP/1.1 client on purpose: it shows the bytes, and it can hang up anywhere.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// A response's head, and its body as far as it was read.
pub struct Open {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    chunked: bool,
    length: Option<usize>,
    read: Vec<u8>,
    /// Whoever reads late may find everything in the first pieces, the end too.
    ended: bool,
}

#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body ended as its framing promised.
    pub complete: bool,
}

/// Sends raw bytes and reads the head of what comes back.
pub fn raw(address: SocketAddr, bytes: &[u8]) -> std::io::Result<Open> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(bytes)?;
    read_head(BufReader::new(stream))
}

pub fn read_head(mut reader: BufReader<TcpStream>) -> std::io::Result<Open> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("no status in {line:?}")))?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').expect("a header has a colon");
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let find = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
    let chunked = find("transfer-encoding").is_some_and(|value| value == "chunked");
    let length = find("content-length").and_then(|value| value.parse().ok());
    Ok(Open { status, headers, reader, chunked, length, read: Vec::new(), ended: false })
}

/// A POST with a JSON body.
pub fn post(path: &str, key: Option<&str>, extra: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\ncontent-length: {}\r\n",
        body.len()
    );
    if let Some(key) = key {
        head.push_str(&format!("authorization: Bearer {key}\r\n"));
    }
    for (name, value) in extra {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub fn get(path: &str, key: Option<&str>) -> Vec<u8> {
    let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    format!("GET {path} HTTP/1.1\r\nhost: gateway\r\n{key}\r\n").into_bytes()
}

impl Open {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The next piece of a chunked body; `None` at its proper end, an error where it was cut.
    pub fn chunk(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        if self.ended {
            return Ok(None);
        }
        let mut size = String::new();
        if self.reader.read_line(&mut size)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let size = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
        let mut data = vec![0; size + 2];
        self.reader.read_exact(&mut data)?;
        data.truncate(size);
        self.read.extend_from_slice(&data);
        self.ended = size == 0;
        Ok((!self.ended).then_some(data))
    }

    /// Reads the rest; the answer has what was read before too.
    pub fn finish(self) -> Response {
        self.finish_and_keep().0
    }

    /// Reads the rest, and gives the connection back for what comes after it.
    pub fn finish_and_keep(mut self) -> (Response, BufReader<TcpStream>) {
        let complete = if self.chunked {
            loop {
                match self.chunk() {
                    Ok(Some(_)) => {}
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            }
        } else if let Some(length) = self.length {
            self.read.resize(length, 0);
            self.reader.read_exact(&mut self.read).is_ok()
        } else {
            self.reader.read_to_end(&mut self.read).is_ok()
        };
        (Response { status: self.status, headers: self.headers, body: self.read, complete }, self.reader)
    }
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The `data:` events of a stream, as they are.
    pub fn events(&self) -> Vec<String> {
        let text = std::str::from_utf8(&self.body).expect("a stream is UTF-8");
        text.split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").expect("every event is data").to_owned())
            .collect()
    }

    /// The events of a complete stream, parsed; checks that it ends with `[DONE]`.
    pub fn chunks(&self) -> Vec<Value> {
        assert!(self.complete, "the stream was cut");
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "a complete stream ends with [DONE]");
        events.iter().map(|event| serde_json::from_str(event).expect("every event is JSON")).collect()
    }
}
