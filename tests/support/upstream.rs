//! A scripted upstream: a real HTTP/1.1 server on loopback that counts what it is asked and plays what it is told.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

/// What one call gets.
#[derive(Clone, Debug)]
pub enum Script {
    /// An answer of these pieces of text, streamed or whole as it was asked for.
    Answer(Vec<String>),
    /// Any bytes at all as the response, then the connection stays open.
    Raw(Vec<u8>),
    /// Bytes, and then the sending side is closed.
    HalfClose(Vec<u8>),
    /// Bytes, and then the connection is reset.
    Cut(Vec<u8>),
    /// Bytes, and then nothing, until the gate opens or the other side leaves.
    Hang(Vec<u8>),
    /// An answer once the gate opens.
    Gated(Vec<String>),
    /// An answer after a while.
    Late(Duration, Vec<String>),
}

impl Script {
    /// Tokens of the answer that it will report.
    fn tells(&self, asked: &Asked) -> Option<u64> {
        let (Script::Answer(pieces) | Script::Gated(pieces) | Script::Late(_, pieces)) = self else { return None };
        Some(pieces.len() as u64 * asked.body["n"].as_u64().unwrap_or(1))
    }
}

/// One call as it arrived.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Value,
    pub bytes: usize,
    /// The connection's number: calls on one connection share it.
    pub connection: usize,
    /// Calls that came on this connection before it.
    pub earlier: usize,
    /// Tokens of the answer that it was going to be told, if it was told any.
    pub told: Option<u64>,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// What the first message, or the prompt, says.
    pub fn text(&self) -> &str {
        self.body["messages"][0]["content"].as_str().or(self.body["prompt"].as_str()).unwrap_or_default()
    }
}

#[derive(Default)]
struct State {
    scripts: VecDeque<Script>,
    /// Asked when no script is left.
    decide: Option<fn(&Asked) -> Script>,
    /// Played when no script is left.
    otherwise: Option<Script>,
    asked: Vec<Asked>,
    /// Connections that the other side closed while they hung.
    left: usize,
    open: bool,
}

pub struct Upstream {
    pub address: SocketAddr,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Upstream {
    /// Answers "Hello from upstream." to everything that no script is for.
    pub fn start() -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared: Arc<(Mutex<State>, Condvar)> = Arc::default();
        shared.0.lock().unwrap().otherwise = Some(Script::Answer(words("Hello from upstream.")));
        let upstream = Upstream { address, shared: shared.clone() };
        thread::spawn(move || {
            for (number, stream) in listener.incoming().flatten().enumerate() {
                let shared = shared.clone();
                thread::spawn(move || serve(stream, number, &shared));
            }
        });
        upstream
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The next call gets this.
    pub fn plays(&self, script: Script) -> &Upstream {
        self.shared.0.lock().unwrap().scripts.push_back(script);
        self
    }

    /// Every call without a script of its own gets this.
    pub fn always(&self, script: Script) -> &Upstream {
        self.shared.0.lock().unwrap().otherwise = Some(script);
        self
    }

    /// Every call gets what this says: many clients at once each have their own script.
    pub fn decides(&self, decide: fn(&Asked) -> Script) -> &Upstream {
        self.shared.0.lock().unwrap().decide = Some(decide);
        self
    }

    pub fn was_asked(&self, what: impl Fn(&Asked) -> bool) -> bool {
        self.shared.0.lock().unwrap().asked.iter().any(what)
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.shared.0.lock().unwrap().asked.clone()
    }

    pub fn calls(&self) -> usize {
        self.shared.0.lock().unwrap().asked.len()
    }

    /// Hanging calls that the gateway has left.
    pub fn left(&self) -> usize {
        self.shared.0.lock().unwrap().left
    }

    /// Lets everything that hangs go on to its end.
    pub fn release(&self) {
        self.shared.0.lock().unwrap().open = true;
        self.shared.1.notify_all();
    }
}

/// A text in pieces as models stream it.
pub fn words(text: &str) -> Vec<String> {
    text.split_inclusive(' ').map(str::to_owned).collect()
}

/// Prompt tokens that the mock reports for every request.
pub const PROMPT_TOKENS: u64 = 11;

pub fn usage(completion: usize) -> Value {
    json!({"prompt_tokens": PROMPT_TOKENS, "completion_tokens": completion, "total_tokens": PROMPT_TOKENS + completion as u64,
           "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {"reasoning_tokens": 1}})
}

pub fn event(value: &Value) -> Vec<u8> {
    format!("data: {value}\n\n").into_bytes()
}

/// A chunk of a chat stream, with the upstream's own id and model.
pub fn delta(delta: Value, finish: Option<&str>) -> Value {
    json!({"id": "chatcmpl-theirs", "object": "chat.completion.chunk", "created": 1, "model": "their-model",
           "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}], "usage": null})
}

/// The head of a stream whose end is the end of the connection, or of its chunks.
pub fn stream_head(chunked: bool) -> Vec<u8> {
    let framing = if chunked { "transfer-encoding: chunked" } else { "connection: close" };
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n{framing}\r\n\r\n").into_bytes()
}

/// A stream from its head through these events, not chunked.
pub fn stream_of(events: &[Value]) -> Vec<u8> {
    let mut bytes = stream_head(false);
    events.iter().for_each(|value| bytes.extend(event(value)));
    bytes
}

/// A response with a body.
pub fn response(status: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    format!("{head}\r\n{body}").into_bytes()
}

fn serve(stream: TcpStream, connection: usize, shared: &(Mutex<State>, Condvar)) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut out = stream.try_clone().ok()?;
    for earlier in 0.. {
        let mut asked = Asked { earlier, ..read(&mut reader, connection)? };
        let script = {
            let mut state = shared.0.lock().unwrap();
            let decided = state.scripts.pop_front().or_else(|| state.decide.map(|decide| decide(&asked)));
            let script = decided.or_else(|| state.otherwise.clone());
            asked.told = script.as_ref().and_then(|script| script.tells(&asked));
            state.asked.push(asked.clone());
            script?
        };
        match script {
            Script::Late(after, pieces) => {
                thread::sleep(after);
                answer(&mut out, &asked, &pieces).ok()?;
            }
            Script::Answer(pieces) => answer(&mut out, &asked, &pieces).ok()?,
            Script::Raw(bytes) => out.write_all(&bytes).ok()?,
            Script::HalfClose(bytes) => {
                out.write_all(&bytes).ok()?;
                out.shutdown(Shutdown::Write).ok()?;
            }
            Script::Cut(bytes) => {
                out.write_all(&bytes).ok()?;
                // What is written must arrive before the cut does.
                thread::sleep(Duration::from_millis(20));
                rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).ok()?;
                return None;
            }
            Script::Gated(pieces) => {
                if !hang(&stream, shared) {
                    return None;
                }
                stream.set_read_timeout(None).ok()?;
                answer(&mut out, &asked, &pieces).ok()?;
            }
            Script::Hang(bytes) => {
                out.write_all(&bytes).ok()?;
                hang(&stream, shared);
                return None;
            }
        }
        if asked.header("connection") == Some("close") {
            return None;
        }
    }
    None
}

/// Waits until released, or until the other side is gone: whether it is still there.
fn hang(stream: &TcpStream, shared: &(Mutex<State>, Condvar)) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    loop {
        let mut byte = [0];
        let gone = match (&*stream).read(&mut byte) {
            Ok(count) => count == 0,
            Err(error) => !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
        };
        let mut state = shared.0.lock().unwrap();
        if gone {
            state.left += 1;
        }
        if gone || state.open {
            return !gone;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>, connection: usize) -> Option<Asked> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    let length = headers.iter().find(|(name, _)| name == "content-length")?.1.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).ok()?;
    Some(Asked { path, headers, body, bytes: length, connection, earlier: 0, told: None })
}

fn answer(out: &mut impl Write, asked: &Asked, pieces: &[String]) -> std::io::Result<()> {
    let n = asked.body["n"].as_u64().unwrap_or(1);
    let is_chat = asked.path.ends_with("/chat/completions");
    let tokens = pieces.len() * n as usize;
    // As OpenAI does: who leaves it open is told what it came to be.
    let service = asked.body["service_tier"].as_str().map(|asked| if asked == "auto" { "default" } else { asked });
    let serviced = |mut value: Value| {
        service.into_iter().for_each(|service| value["service_tier"] = service.into());
        value
    };
    if asked.body["stream"] == true {
        out.write_all(&stream_head(true))?;
        let mut chunk = |value: String| -> std::io::Result<()> {
            let data = format!("data: {value}\n\n");
            out.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes())
        };
        let say = |index: u64, text: Option<&str>, finish: Option<&str>| match is_chat {
            true => {
                let mut value = delta(text.map_or(json!({}), |text| json!({"content": text})), finish);
                value["choices"][0]["index"] = index.into();
                value
            }
            false => json!({"id": "cmpl-theirs", "object": "text_completion", "created": 1, "model": "their-model",
                            "choices": [{"index": index, "text": text.unwrap_or(""), "logprobs": null, "finish_reason": finish}]}),
        };
        if is_chat {
            chunk(delta(json!({"role": "assistant", "content": ""}), None).to_string())?;
        }
        for index in 0..n {
            for piece in pieces {
                chunk(serviced(say(index, Some(piece), None)).to_string())?;
            }
            chunk(serviced(say(index, None, Some("stop"))).to_string())?;
        }
        if asked.body["stream_options"]["include_usage"] == true {
            let mut last = say(0, None, None);
            (last["choices"], last["usage"]) = (json!([]), usage(tokens));
            chunk(last.to_string())?;
        }
        chunk("[DONE]".into())?;
        return out.write_all(b"0\r\n\r\n");
    }
    let text = pieces.concat();
    let choices: Vec<Value> = (0..n)
        .map(|index| match is_chat {
            true => json!({"index": index, "message": {"role": "assistant", "content": text, "refusal": null}, "finish_reason": "stop"}),
            false => json!({"index": index, "text": text, "finish_reason": "stop"}),
        })
        .collect();
    let body = json!({"id": "chatcmpl-theirs", "object": "chat.completion", "created": 1, "model": "their-model",
                      "choices": choices, "usage": usage(tokens)});
    out.write_all(&response("200 OK", &[], &serviced(body).to_string()))
}
