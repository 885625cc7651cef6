//! The head of an HTTP/1 request, read strictly: what two parsers could understand in two ways is refused.
//!
//! A server that is lenient where the proxy in front of it is not (or the other way round) lets one client's bytes become
//! another's request. So there is exactly one spelling of everything that frames a message, names its host or its path.
//! Nothing here reads a socket: bytes go in, a verdict comes out. `pingora` parses what passed here a second time; a
//! property test holds that it then understands the same.

use crate::refusal::Refusal;

/// A head may have this many bytes, its request line included …
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// … and this many header fields.
pub const FIELDS_MAX: usize = 100;
/// What stands after the chunks' sizes is ignored, and short.
const EXTENSION_BYTES_MAX: usize = 4 << 10;
/// 2³² − 1 bytes is more than any body may have.
const CHUNK_DIGITS_MAX: u8 = 8;
/// No digit more fits into 64 bits for certain.
const LENGTH_DIGITS_MAX: usize = 18;
const METHOD_BYTES_MAX: usize = 16;

/// Headers that say where a message ends, whom it is for or whom it is from. Written with `_`, some servers take them for the real ones.
const SENSITIVE: [&str; 12] = [
    "content-length",
    "transfer-encoding",
    "host",
    "connection",
    "upgrade",
    "te",
    "trailer",
    "expect",
    "authorization",
    "x-api-key",
    "x-forwarded-for",
    "content-type",
];

/// Looks for the end of the head in what has arrived, from `scanned` on, and moves `scanned` along. Line ends are checked
/// on the way, so that a head that can never end is refused at once.
///
/// # Errors
/// When a line does not end in CRLF, or the head is larger than allowed.
pub fn end(bytes: &[u8], scanned: &mut usize) -> Result<Option<usize>, Refusal> {
    while let Some(found) = bytes.get(*scanned..).and_then(|rest| rest.iter().position(|byte| *byte == b'\n')) {
        let after = *scanned + found + 1;
        if !bytes[..after].ends_with(b"\r\n") {
            return Err(framing("a line ends with LF alone"));
        }
        *scanned = after;
        if bytes[..after].ends_with(b"\r\n\r\n") {
            return if after > HEAD_BYTES_MAX { Err(Refusal::HeadTooLarge) } else { Ok(Some(after)) };
        }
    }
    *scanned = bytes.len();
    if bytes.len() > HEAD_BYTES_MAX { Err(Refusal::HeadTooLarge) } else { Ok(None) }
}

/// Checks a whole head, up to and with its empty line, and says how its body is framed.
///
/// # Errors
/// What about it is ambiguous, wrong, or too much.
pub fn check(head: &[u8]) -> Result<Framing, Refusal> {
    let mut lines = Lines(head);
    let (target, version) = request_line(lines.next().unwrap_or_default())?;
    let (mut host, mut length, mut chunked, mut fields) = (None, None, false, 0);
    for line in lines {
        if line.is_empty() {
            break;
        }
        fields += 1;
        if fields > FIELDS_MAX {
            return Err(Refusal::HeadTooLarge);
        }
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"host") {
            if host.replace(value).is_some() {
                return Err(authority_is("there is more than one Host"));
            }
        } else if name.eq_ignore_ascii_case(b"content-length") {
            if length.replace(content_length(value)?).is_some() {
                return Err(framing("there is more than one Content-Length"));
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(framing("the only Transfer-Encoding is one `chunked`"));
            }
            chunked = true;
        }
    }
    match (host, version) {
        (Some(host), _) => authority(host)?,
        (None, Version::Http11) => return Err(authority_is("there is no Host")),
        (None, Version::Http10) => {}
    }
    check_target(target, host)?;
    match (chunked, length) {
        (true, Some(_)) => Err(framing("there are both Content-Length and Transfer-Encoding")),
        (true, None) if version == Version::Http10 => Err(framing("HTTP/1.0 has no Transfer-Encoding")),
        (true, None) => Ok(Framing::Chunked(Chunks::default())),
        (false, length) => Ok(Framing::Length(length.unwrap_or(0))),
    }
}

/// Method and path of a refused head, for the record; without a query, which may hold what nobody should read.
pub fn guess(bytes: &[u8]) -> Option<(&str, &str)> {
    let line = bytes.split(|byte| !(b' '..=b'~').contains(byte)).next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    Some((method, target.split('?').next().unwrap_or(target)))
}

/// A host and perhaps a port, in one plain spelling.
///
/// # Errors
/// When it could be read as anything else.
pub fn authority(text: &[u8]) -> Result<(), Refusal> {
    let wrong = || Err(authority_is("the host is not a plain name or address, with or without a port"));
    let rest = if let Some(address) = text.strip_prefix(b"[") {
        let Some(end) = address.iter().position(|byte| *byte == b']') else { return wrong() };
        let plain = address[..end].iter().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'));
        if end == 0 || !plain {
            return wrong();
        }
        &address[end + 1..]
    } else {
        let end = text.iter().position(|byte| *byte == b':').unwrap_or(text.len());
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
        if end == 0 || !text[..end].iter().all(plain) {
            return wrong();
        }
        &text[end..]
    };
    let port = match rest {
        [] => return Ok(()),
        [b':', port @ ..] => port,
        _ => return wrong(),
    };
    let number = std::str::from_utf8(port).ok().filter(|_| port.iter().all(u8::is_ascii_digit));
    if number.is_some_and(|number| number.parse::<u16>().is_ok()) { Ok(()) } else { wrong() }
}

/// A path and perhaps a query, in one plain spelling: no two paths that could mean the same resource.
///
/// # Errors
/// When a server could resolve it to another path.
pub fn path(text: &[u8]) -> Result<(), Refusal> {
    let end = text.iter().position(|byte| *byte == b'?').unwrap_or(text.len());
    let (path, query) = text.split_at(end);
    if path.first() != Some(&b'/') {
        return Err(path_is("it does not begin with `/`"));
    }
    let mut segments = path[1..].split(|byte| *byte == b'/').peekable();
    while let Some(segment) = segments.next() {
        if segment.is_empty() && segments.peek().is_some() {
            return Err(path_is("it has an empty segment (`//`)"));
        }
        if segment == b"." || segment == b".." {
            return Err(path_is("it has a `.` or `..` segment"));
        }
    }
    let mut rest = path;
    while let [byte, after @ ..] = rest {
        rest = match byte {
            b'%' => {
                escape(after)?;
                after.get(2..).unwrap_or_default()
            }
            b'/' => after,
            _ if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(byte) => after,
            _ => return Err(path_is("it has a character that must be percent-encoded")),
        };
    }
    if query.iter().any(|byte| !byte.is_ascii_graphic() || b"#\\\"<>".contains(byte)) {
        return Err(path_is("its query has a character that must be percent-encoded"));
    }
    Ok(())
}

/// What stands after a `%`. An escaped separator or dot is another spelling of the path; a control byte is an attack.
fn escape(digits: &[u8]) -> Result<(), Refusal> {
    let digit = |at: usize| digits.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    match digit(0).zip(digit(1)).map(|(high, low)| high * 16 + low) {
        None => Err(path_is("it has a `%` without two hexadecimal digits")),
        Some(0..=0x1f | 0x7f) => Err(path_is("it has an escaped control character")),
        Some(0x2e | 0x2f | 0x5c) => Err(path_is("it has an escaped dot or separator")),
        Some(_) => Ok(()),
    }
}

/// A head's lines, without their CRLF.
struct Lines<'h>(&'h [u8]);

impl<'h> Iterator for Lines<'h> {
    type Item = &'h [u8];

    fn next(&mut self) -> Option<&'h [u8]> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        let (line, rest) = self.0.split_at(end + 1);
        self.0 = rest;
        // `end` saw that every LF has its CR.
        Some(line.strip_suffix(b"\r\n").unwrap_or(line))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Http10,
    Http11,
}

fn request_line(line: &[u8]) -> Result<(&[u8], Version), Refusal> {
    let wrong = |why| Err(Refusal::BadHead { why });
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return wrong("the request line is not `METHOD target HTTP/1.1`");
    };
    if method.is_empty() || method.len() > METHOD_BYTES_MAX || !method.iter().all(u8::is_ascii_uppercase) {
        return wrong("the method is not a word of capital letters");
    }
    if method == b"CONNECT" {
        return wrong("CONNECT is not served: this is no forward proxy");
    }
    match version {
        b"HTTP/1.1" => Ok((target, Version::Http11)),
        b"HTTP/1.0" => Ok((target, Version::Http10)),
        _ => wrong("the version is not HTTP/1.1"),
    }
}

fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(framing("a header is folded over two lines"));
    }
    let Some(colon) = line.iter().position(|byte| *byte == b':') else {
        return Err(Refusal::BadHead { why: "a header has no colon" });
    };
    let (name, value) = (&line[..colon], trim(&line[colon + 1..]));
    if matches!(name.last(), Some(b' ' | b'\t')) {
        return Err(framing("there is whitespace before a header's colon"));
    }
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err(Refusal::BadHead { why: "a header's name has a character that no name may have" });
    }
    if name.contains(&b'_') && SENSITIVE.iter().any(|sensitive| is_alike(name, sensitive.as_bytes())) {
        return Err(framing("a header's name imitates another one with `_`"));
    }
    if value.contains(&b'\r') {
        return Err(framing("there is a CR within a line"));
    }
    if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
        return Err(Refusal::BadHead { why: "a header's value has a control character" });
    }
    Ok((name, value))
}

/// Without the spaces and tabs around it, and nothing else: a stray CR must be seen.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// Whether two names are the same once `_` is read as `-`.
fn is_alike(name: &[u8], other: &[u8]) -> bool {
    let plain = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == other.len() && name.iter().map(plain).eq(other.iter().copied())
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn content_length(value: &[u8]) -> Result<u64, Refusal> {
    let digits = Some(value)
        .filter(|value| (1..=LENGTH_DIGITS_MAX).contains(&value.len()) && value.iter().all(u8::is_ascii_digit))
        .and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
    digits.ok_or_else(|| framing("the Content-Length is not one number"))
}

fn check_target(target: &[u8], host: Option<&[u8]>) -> Result<(), Refusal> {
    if target.first() == Some(&b'/') {
        return path(target);
    }
    let scheme =
        |scheme: &[u8]| target.get(..scheme.len()).filter(|start| start.eq_ignore_ascii_case(scheme)).is_some();
    let rest = match () {
        () if scheme(b"http://") => &target[b"http://".len()..],
        () if scheme(b"https://") => &target[b"https://".len()..],
        () => return Err(path_is("it does not begin with `/`")),
    };
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    authority(&rest[..end])?;
    if host.is_some_and(|host| host != &rest[..end]) {
        return Err(authority_is("the request line and Host name different hosts"));
    }
    path(&rest[end..])
}

fn framing(why: &'static str) -> Refusal {
    Refusal::BadFraming { why }
}

fn authority_is(why: &'static str) -> Refusal {
    Refusal::BadAuthority { why }
}

fn path_is(why: &'static str) -> Refusal {
    Refusal::BadPath { why }
}

/// How much of a message is still to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked(Chunks),
}

impl Framing {
    pub fn is_done(&self) -> bool {
        matches!(self, Framing::Length(0) | Framing::Chunked(Chunks { state: ChunkState::Done, .. }))
    }

    /// How many of these bytes, the next ones of the body, still belong to this message.
    ///
    /// # Errors
    /// When a chunk is framed in a way that another server could read differently.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        match self {
            Framing::Length(left) => {
                let taken = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= taken as u64;
                Ok(taken)
            }
            Framing::Chunked(chunks) => chunks.take(bytes),
        }
    }
}

/// Follows a chunked body without looking at its data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunks {
    state: ChunkState,
    size: u64,
    digits: u8,
    extension: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkState {
    #[default]
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    LastCr,
    LastLf,
    Done,
}

impl Chunks {
    fn take(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        use ChunkState::{Data, DataCr, DataLf, Done, Extension, LastCr, LastLf, Size, SizeLf};
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            if self.state == Done {
                break;
            }
            if self.state == Data {
                let left = bytes.len() - at;
                let step = usize::try_from(self.size).map_or(left, |size| size.min(left));
                self.size -= step as u64;
                at += step;
                if self.size == 0 {
                    self.state = DataCr;
                }
                continue;
            }
            self.state = match (self.state, byte) {
                (Size, _) if byte.is_ascii_hexdigit() => {
                    if self.digits == CHUNK_DIGITS_MAX {
                        return Err(framing("a chunk's size has too many digits"));
                    }
                    self.digits += 1;
                    self.size = self.size * 16 + u64::from(char::from(*byte).to_digit(16).unwrap_or(0));
                    Size
                }
                (Size, b'\r') if self.digits > 0 => SizeLf,
                (Size, b';') if self.digits > 0 => Extension,
                (Extension, b'\r') => SizeLf,
                (Extension, _) if *byte >= b' ' && *byte != 0x7f || *byte == b'\t' => {
                    self.extension += 1;
                    if self.extension > EXTENSION_BYTES_MAX {
                        return Err(framing("chunk extensions are too long"));
                    }
                    Extension
                }
                (SizeLf, b'\n') if self.size == 0 => LastCr,
                (SizeLf, b'\n') => Data,
                (DataCr, b'\r') => DataLf,
                (DataLf, b'\n') => {
                    *self = Chunks { extension: self.extension, ..Chunks::default() };
                    Size
                }
                (LastCr, b'\r') => LastLf,
                (LastCr, _) => return Err(framing("there are trailers after the last chunk")),
                (LastLf, b'\n') => Done,
                _ => return Err(framing("a chunk is not framed by its size and CRLF")),
            };
            at += 1;
        }
        Ok(at)
    }
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
