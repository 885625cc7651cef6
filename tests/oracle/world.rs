//! The gateway of the oracle, the upstreams that can fail in every way, and what a client can do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::{CLIENT_SPAN, Call, Prompt, Seen};
use crate::support::gateway::{Setup, TestGateway, append};
use crate::support::http::{self, Open, Response};
use crate::support::upstream::{Asked, Script, Upstream, delta, event, response, stream_head, stream_of, words};

/// Routes beside the shipped one. Those with a shadow mirror everything.
const ROUTES: &str = r#"
[routes.remote]
split = { remote-model = 1 }
[routes.guarded]
split = { remote-model = 1 }
fallback = ["spare-model", "glimmer-2"]
[routes.impatient]
split = { remote-model = 1 }
fallback = ["glimmer-1"]
timeouts = { first_token = "150ms", idle = "5s", total = "60s" }
[routes.cached]
split = { glimmer-1 = 1 }
cache = { ttl = "10m" }
[routes.shared]
split = { remote-model = 1 }
cache = { ttl = "10m" }
[routes.mirrored]
split = { glimmer-1 = 1 }
shadow = { variant = "mirror-model", sample = 1.0 }
[routes.rehearsed]
split = { remote-model = 1 }
shadow = { variant = "glimmer-2", sample = 1.0 }
"#;
pub const SHADOWS: [(&str, &str); 2] = [("mirrored", "mirror-model"), ("rehearsed", "glimmer-2")];

/// Everything an upstream can be asked to do, told by the prompt's first word.
fn play(asked: &Asked) -> Script {
    let error = |status: &str| Script::Raw(response(status, &[], r#"{"error":{"message":"boom"}}"#));
    let begun = || stream_of(&["One ", "two ", "three "].map(|word| delta(json!({"content": word}), None)));
    match asked.text().split(' ').next().unwrap_or_default() {
        "500" => error("500 Internal Server Error"),
        "400" => error("400 Bad Request"),
        "401" => error("401 Unauthorized"),
        "429" => error("429 Too Many Requests"),
        "closed" => Script::Cut(Vec::new()),
        "garbage" => Script::Cut(b"SSH-2.0-OpenSSH\r\n\r\n".to_vec()),
        "nothing" => Script::HalfClose([stream_head(false), b"data: [DONE]\n\n".to_vec()].concat()),
        "hang" => Script::Hang(Vec::new()),
        "cut" => Script::Cut(begun()),
        "half" => Script::HalfClose(begun()),
        "error" => Script::HalfClose([begun(), event(&json!({"error": {"message": "overloaded"}}))].concat()),
        "silent" if asked.body["stream"] == true => {
            let last = delta(json!({"content": "four"}), Some("stop"));
            Script::HalfClose([begun(), event(&last), b"data: [DONE]\n\n".to_vec()].concat())
        }
        "silent" => {
            let message = json!({"role": "assistant", "content": "One two three four"});
            let body = json!({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]});
            Script::Raw(response("200 OK", &[], &body.to_string()))
        }
        // Only a connection that was used before can have been closed meanwhile.
        "stale" if asked.earlier > 0 => Script::Cut(Vec::new()),
        "many" => Script::Answer(words(&"word ".repeat(300))),
        "late" => Script::Late(Duration::from_millis(40), words("Better late than never.")),
        _ => Script::Answer(words("Hello from upstream.")),
    }
}

/// The one who stands in first fails where all are to fail.
fn stand_in(asked: &Asked) -> Script {
    match asked.text().ends_with("everywhere") {
        true => Script::Raw(response("500 Internal Server Error", &[], "{}")),
        false => Script::Answer(words("Hello from the spare.")),
    }
}

pub struct World {
    pub gateway: TestGateway,
    pub mock: Upstream,
    pub spare: Upstream,
    pub mirror: Upstream,
    keys: BTreeMap<&'static str, Key>,
    traces: AtomicU64,
}

struct Key {
    token: String,
    id: String,
    tenant: &'static str,
}

/// One request before it is sent.
pub struct Ask {
    pub seen: Seen,
    pub bytes: Vec<u8>,
}

impl Ask {
    /// As long as before, and of no type that we take.
    pub fn untyped(mut self) -> Ask {
        let text = String::from_utf8(self.bytes).expect("a request is UTF-8");
        (self.bytes, self.seen.prompt) = (text.replace("application/json", "application/text").into(), None);
        self
    }

    /// As long as before, and no JSON any more.
    pub fn broken(mut self) -> Ask {
        self.seen.prompt = None;
        *self.bytes.last_mut().expect("a body") = b'?';
        self
    }
}

impl World {
    pub fn start() -> World {
        let [mock, spare, mirror] = [(); 3].map(|()| Upstream::start());
        mock.decides(play);
        spare.decides(stand_in);
        mirror.decides(play);
        let setup = Setup::shipped();
        for (name, server) in [("mock", &mock), ("spare", &spare), ("mirror", &mirror)] {
            let model = if name == "mock" { "remote-model".to_owned() } else { format!("{name}-model") };
            setup.add_upstream(name, &server.url(), &model);
        }
        append(&setup.path("routes.toml"), ROUTES);
        setup.replace("gateway.toml", "[listen]", "[listen]\nthreads = 2");
        append(&setup.path("gateway.toml"), "\n[shadow]\nconcurrency = 8\nqueue_max = 200\n");
        let many = ["--rpm", "1000000"].as_slice();
        let keys = [
            ("one", "default", many),
            ("two", "default", many),
            ("three", "other", many),
            ("requests", "default", ["--rpm", "1"].as_slice()),
            ("tokens", "other", ["--rpm", "1000000", "--tpm", "60"].as_slice()),
            ("money", "other", ["--rpm", "1000000", "--usd-per-day", "0.000001"].as_slice()),
            ("places", "default", ["--rpm", "1000000", "--concurrency", "1"].as_slice()),
        ];
        let gateway = setup.start();
        let keys = keys.map(|(name, tenant, limits)| {
            let token =
                gateway.cli(&[&["keys", "create", name, "--tenant", tenant], limits].concat()).trim().to_owned();
            let id = token.split('-').nth(1).expect("a key has an id").to_owned();
            (name, Key { token, id, tenant })
        });
        World { gateway, mock, spare, mirror, keys: keys.into(), traces: AtomicU64::new(1) }
    }

    /// Asks with every key until it is known. What it is told before is a refusal like any other.
    pub fn knock(&self) -> Vec<Seen> {
        let mut seen = Vec::new();
        for name in self.keys.keys() {
            eventually("the keys to count", || {
                let told = self.whole(self.ask("models", name, "/v1/models", &json!({})));
                let is_known = told.status == 200;
                seen.push(Seen { authenticated: is_known, ..told });
                is_known.then_some(())
            });
        }
        seen
    }

    /// A chat.
    pub fn chat(&self, kind: &'static str, key: &str, route: &str, question: &str, more: Value) -> Ask {
        let mut body = json!({"model": route, "temperature": 0, "messages": [{"role": "user", "content": question}]});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        self.ask(kind, key, "/v1/chat/completions", &body)
    }

    /// A text completion.
    pub fn text(&self, kind: &'static str, key: &str, route: &str, prompt: &str, more: Value) -> Ask {
        let mut body = json!({"model": route, "temperature": 0, "prompt": prompt});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        self.ask(kind, key, "/v1/completions", &body)
    }

    pub fn ask(&self, kind: &'static str, key: &str, path: &str, body: &Value) -> Ask {
        let key = self.keys.get(key);
        let prompt = body["messages"][0]["content"].as_str().map(|text| Prompt::Chat(text.to_owned()));
        let prompt = prompt.or_else(|| body["prompt"].as_str().map(|text| Prompt::Text(text.to_owned())));
        // Every trace is the client's own: it tells requests apart even where no answer was read.
        let trace_id = format!("{:032x}", (1_u128 << 120) | u128::from(self.traces.fetch_add(1, Ordering::Relaxed)));
        let session = format!("session-{trace_id}");
        let headers = [("traceparent", format!("00-{trace_id}-{CLIENT_SPAN}-01")), ("x-session-id", session)];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        let text = body.to_string();
        let token = key.map(|key| key.token.as_str());
        let bytes = match path {
            "/v1/models" | "/health" => get(path, token, &headers),
            _ => http::post(path, token, &headers, text.as_bytes()),
        };
        let seen = Seen {
            kind,
            request_id: String::new(),
            trace_id,
            tenant: key.map(|key| key.tenant.to_owned()).unwrap_or_default(),
            key_id: key.map(|key| key.id.clone()).unwrap_or_default(),
            authenticated: key.is_some(),
            op: match path {
                "/v1/chat/completions" => "chat",
                "/v1/completions" => "text_completion",
                "/v1/feedback" => "feedback",
                "/v1/models" => "models",
                "/health" => "health",
                _ => "other",
            },
            route: body["model"].as_str().unwrap_or_default().to_owned(),
            stream: body["stream"] == true,
            n: body["n"].as_u64().unwrap_or(1),
            prompt,
            same: None,
            bytes_in: text.len() as u64,
            status: 0,
            error_code: None,
            usage: None,
            cost_usd: None,
            cache: None,
            is_read: false,
            bytes_out: None,
            pieces: 0,
        };
        Ask { seen, bytes }
    }

    /// Reads the answer to its end.
    pub fn whole(&self, ask: Ask) -> Seen {
        ask.seen.read(&self.send(&ask.bytes))
    }

    fn send(&self, bytes: &[u8]) -> Response {
        self.gateway.open(bytes).finish()
    }

    /// Reads the head and so many pieces, and leaves.
    pub fn leave(&self, ask: Ask, after: usize) -> Seen {
        let mut open = self.gateway.open(&ask.bytes);
        if open.status != 200 {
            return ask.seen.read(&open.finish());
        }
        let mut seen = begun(ask, &open);
        for _ in 0..after {
            let Ok(Some(data)) = open.chunk() else { break };
            let text = String::from_utf8_lossy(&data).into_owned();
            text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).for_each(|event| seen.event(event));
        }
        seen
    }

    /// Leaves before anything was read.
    pub fn leave_unread(&self, ask: Ask) -> Seen {
        drop(self.gateway.open_unread(&ask.bytes));
        ask.seen
    }

    /// Several clients with the same request at once.
    pub fn together(&self, asks: Vec<Ask>) -> Vec<Seen> {
        thread::scope(|scope| {
            let clients: Vec<_> = asks.into_iter().map(|ask| scope.spawn(|| self.whole(ask))).collect();
            clients.into_iter().map(|client| client.join().expect("a client")).collect()
        })
    }
}

pub fn calls(servers: [(&'static str, &Upstream); 3]) -> Vec<Call> {
    let of = |(name, server): (&'static str, &Upstream)| {
        server.asked().into_iter().map(move |asked| Call::new(name, &asked)).collect::<Vec<_>>()
    };
    servers.into_iter().flat_map(of).collect()
}

fn begun(ask: Ask, open: &Open) -> Seen {
    let mut seen = ask.seen;
    seen.told(open.status, open.header("x-request-id"), open.header("x-glassgate-cache"));
    seen
}

pub fn get(path: &str, token: Option<&str>, headers: &[(&str, &str)]) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let key = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!("GET {path} HTTP/1.1\r\nhost: gateway\r\n{key}{headers}\r\n").into_bytes()
}

/// What may be answered with the same answer.
pub fn same(mut ask: Ask, name: &str) -> Ask {
    ask.seen.same = Some(name.to_owned());
    ask
}
