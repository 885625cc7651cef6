//! The hub's protocol, spoken by a real server: what is downloaded is what was meant, whatever happens on the way.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use glassgate::config::secret::Secret;
use glassgate::models::hub::{Hub, Reference};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// How the servers misbehave; each wish is granted so many times.
#[derive(Clone, Debug, Default)]
struct Mischief {
    /// Connections cut in the middle of a large file.
    cuts: u32,
    /// Answers of this status to requests for files.
    refuses: (u32, u16),
    /// Requests whose range is ignored.
    ignores_range: u32,
    /// Large files whose bytes are not those that were listed.
    lies: u32,
    /// The list of files gives neither sizes nor checksums.
    bare_list: bool,
    /// Heads that never come.
    silent: u32,
    /// Requests for the list of files that fail in passing.
    busy: u32,
    /// The list is that of another commit.
    strays: bool,
}

#[derive(Debug)]
struct Seen {
    is_cdn: bool,
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

struct Site {
    files: BTreeMap<String, Vec<u8>>,
    mischief: Mutex<Mischief>,
    seen: Mutex<Vec<Seen>>,
    cdn: SocketAddr,
}

/// Hub and CDN on two ports, and the folder that models go to.
struct Stage {
    site: Arc<Site>,
    hub: Hub,
    folder: tempfile::TempDir,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

fn checksum(name: &str, bytes: &[u8]) -> String {
    if is_large(name) {
        return hex(digest(&SHA256, bytes).as_ref());
    }
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
}

fn large() -> Vec<u8> {
    (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect()
}

impl Stage {
    fn new(mischief: Mischief) -> Stage {
        let files = [
            ("config.json", b"{\"model_type\": \"llama\"}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
            ("model.safetensors", large()),
            ("model-Q8_0.gguf", large()[..100_000].to_vec()),
            ("README.md", b"not needed".to_vec()),
            ("pytorch_model.bin", b"never".to_vec()),
        ];
        Stage::of(files.into(), mischief)
    }

    fn of(files: Vec<(&str, Vec<u8>)>, mischief: Mischief) -> Stage {
        let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let cdn = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", hub.local_addr().unwrap());
        let (mischief, seen) = (Mutex::new(mischief), Mutex::default());
        let site = Arc::new(Site { files, mischief, seen, cdn: cdn.local_addr().unwrap() });
        for (listener, is_cdn) in [(hub, false), (cdn, true)] {
            let site = site.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let site = site.clone();
                    // A client that goes away is part of the play.
                    std::thread::spawn(move || site.answer(stream, is_cdn).ok());
                }
            });
        }
        let folder = tempfile::tempdir().unwrap();
        let (token, path) = (Some(Secret::new(TOKEN)), folder.path().join("hub"));
        let hub = Hub { endpoint, token, folder: path, idle: Duration::from_millis(500) };
        Stage { site, hub, folder }
    }

    fn fetch(&self, reference: &str) -> Result<PathBuf, String> {
        self.hub.fetch(&Reference::parse(reference).unwrap())
    }

    fn asked(&self, what: &str) -> usize {
        self.site.seen.lock().unwrap().iter().filter(|seen| seen.path.contains(what)).count()
    }

    #[track_caller]
    fn assert_whole(&self, folder: &std::path::Path, names: &[&str]) {
        for name in names {
            assert_eq!(std::fs::read(folder.join(name)).unwrap(), self.site.files[*name], "{name}");
        }
    }
}

fn take(count: &mut u32) -> bool {
    let granted = *count > 0;
    *count = count.saturating_sub(1);
    granted
}

impl Site {
    fn answer(&self, mut stream: TcpStream, is_cdn: bool) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let (range, authorization) = (headers.get("range").cloned(), headers.get("authorization").cloned());
        self.seen.lock().unwrap().push(Seen { is_cdn, path: path.clone(), range: range.clone(), authorization });
        let head = |status: &str, headers: String| format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
        if path.starts_with("/api/models/") {
            let mut mischief = self.mischief.lock().unwrap();
            if take(&mut mischief.busy) {
                return stream.write_all(head("503 Busy", "content-length: 0\r\n".to_owned()).as_bytes());
            }
            let body = self.list(mischief.bare_list, mischief.strays).to_string();
            let known = path.contains("/org/name/revision/");
            let status = if known { "200 OK" } else { "404 Not Found" };
            return stream.write_all((head(status, format!("content-length: {}\r\n", body.len())) + &body).as_bytes());
        }
        let place = if is_cdn { "/blobs/".to_owned() } else { format!("/resolve/{COMMIT}/") };
        let name = path.split_once(&place).unwrap_or_default().1.to_owned();
        let Some(bytes) = self.files.get(&name) else {
            return stream.write_all(head("404 Not Found", "content-length: 0\r\n".to_owned()).as_bytes());
        };
        let mut mischief = self.mischief.lock().unwrap();
        if take(&mut mischief.silent) {
            drop(mischief);
            // Held open until the client gives up.
            return reader.read_line(&mut line).map(|_| ());
        }
        if take(&mut mischief.refuses.0) {
            let headers = "retry-after: 0\r\ncontent-length: 0\r\n".to_owned();
            return stream.write_all(head(&format!("{} No", mischief.refuses.1), headers).as_bytes());
        }
        let etag = checksum(&name, bytes);
        if is_large(&name) && !is_cdn {
            let headers = format!(
                "location: http://{}/blobs/{name}\r\nx-linked-etag: \"{etag}\"\r\nx-linked-size: {}\r\ncontent-length: 0\r\n",
                self.cdn,
                bytes.len()
            );
            return stream.write_all(head("302 Found", headers).as_bytes());
        }
        let from =
            range.and_then(|range| range.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok()).unwrap_or(0);
        let from: usize = if take(&mut mischief.ignores_range) { 0 } else { from };
        if from >= bytes.len() {
            let headers = format!("content-range: bytes */{}\r\ncontent-length: 0\r\n", bytes.len());
            return stream.write_all(head("416 Range Not Satisfiable", headers).as_bytes());
        }
        let mut bytes = bytes[from..].to_vec();
        if is_large(&name) && take(&mut mischief.lies) {
            bytes[0] ^= 1;
        }
        let cut = is_large(&name) && bytes.len() > 1000 && take(&mut mischief.cuts);
        drop(mischief);
        let total = from + bytes.len();
        let part =
            if from > 0 { format!("content-range: bytes {from}-{}/{total}\r\n", total - 1) } else { String::new() };
        let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
        let headers = format!("etag: \"{etag}\"\r\ncontent-length: {}\r\n{part}", bytes.len());
        stream.write_all(head(status, headers).as_bytes())?;
        stream.write_all(if cut { &bytes[..bytes.len() / 2] } else { &bytes })
    }

    fn list(&self, bare: bool, strays: bool) -> serde_json::Value {
        let files = self.files.iter().map(|(name, bytes)| match (bare, is_large(name)) {
            (true, _) => serde_json::json!({"rfilename": name}),
            (false, true) => serde_json::json!({
                "rfilename": name, "size": bytes.len(), "blobId": "0".repeat(40),
                "lfs": {"sha256": checksum(name, bytes), "size": bytes.len()},
            }),
            (false, false) => {
                serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": checksum(name, bytes)})
            }
        });
        let sha = if strays { "f".repeat(40) } else { COMMIT.to_owned() };
        serde_json::json!({"sha": sha, "siblings": files.collect::<Vec<_>>()})
    }
}

const FOLDER: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

#[test]
fn a_model_comes_with_what_it_needs_and_the_token_stays_with_the_hub() {
    for bare_list in [false, true] {
        let stage = Stage::new(Mischief { bare_list, ..Mischief::default() });
        let folder = stage.fetch("hf://org/name@main").unwrap();
        assert!(folder.ends_with(format!("org--name/{COMMIT}")), "{}", folder.display());
        stage.assert_whole(&folder, &FOLDER);
        assert!(!folder.join("README.md").exists() && !folder.join("model-Q8_0.gguf").exists());
        let seen = stage.site.seen.lock().unwrap();
        assert!(seen.iter().any(|seen| seen.is_cdn));
        for seen in seen.iter() {
            let expected = (!seen.is_cdn).then(|| format!("Bearer {TOKEN}"));
            assert_eq!(seen.authorization, expected, "{}", seen.path);
        }
        assert!(!format!("{:?}", stage.hub).contains(TOKEN));
    }
}

#[test]
fn what_is_here_is_not_asked_for_again() {
    let stage = Stage::new(Mischief::default());
    let pinned = format!("hf://org/name@{COMMIT}");
    let folder = stage.fetch(&pinned).unwrap();
    let asked = stage.asked("");
    assert_eq!(stage.fetch(&pinned).unwrap(), folder);
    assert_eq!(stage.asked(""), asked, "a commit that is here needs no hub");
    // A branch may have moved: the list is asked for, the files are not.
    assert_eq!(stage.fetch("hf://org/name@main").unwrap(), folder);
    assert_eq!(stage.asked(""), asked + 1);

    let file = stage.fetch(&format!("{pinned}/model-Q8_0.gguf")).unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), stage.site.files["model-Q8_0.gguf"]);
    let kept: Vec<PathBuf> = stage.hub.list().unwrap().into_iter().map(|kept| kept.path).collect();
    assert_eq!(kept, [folder, file]);
}

#[test]
fn cut_connections_are_resumed_where_they_broke() {
    let stage = Stage::new(Mischief { cuts: 3, ..Mischief::default() });
    let folder = stage.fetch("hf://org/name").unwrap();
    stage.assert_whole(&folder, &FOLDER);
    let seen = stage.site.seen.lock().unwrap();
    let ranges: Vec<&str> = seen.iter().filter(|seen| seen.is_cdn).filter_map(|seen| seen.range.as_deref()).collect();
    assert_eq!(ranges, ["bytes=600000-", "bytes=900000-", "bytes=1050000-"]);
}

#[test]
fn a_server_that_ignores_ranges_costs_time_and_nothing_else() {
    // The first answer is cut, the next begins at zero although the rest was asked for.
    let stage = Stage::new(Mischief { cuts: 1, ignores_range: 5, ..Mischief::default() });
    let folder = stage.fetch("hf://org/name").unwrap();
    stage.assert_whole(&folder, &FOLDER);
}

#[test]
fn bytes_that_are_not_those_that_were_meant_are_thrown_away() {
    let stage = Stage::new(Mischief { lies: 1, ..Mischief::default() });
    let why = stage.fetch("hf://org/name").unwrap_err();
    assert!(why.contains("model.safetensors") && why.contains("checksum"), "{why}");
    let left = stage.folder.path().join(format!("hub/org--name/{COMMIT}"));
    assert!(!left.join("model.safetensors").exists() && !left.join("model.safetensors.part").exists());
    assert_eq!(stage.hub.list().unwrap(), [], "what is not complete is not listed");
    let folder = stage.fetch("hf://org/name").unwrap();
    stage.assert_whole(&folder, &FOLDER);
}

#[test]
fn a_busy_or_silent_hub_is_asked_again_and_a_refusal_is_explained() {
    let stage = Stage::new(Mischief { refuses: (2, 429), ..Mischief::default() });
    stage.assert_whole(&stage.fetch("hf://org/name").unwrap(), &FOLDER);
    let stage = Stage::new(Mischief { silent: 1, ..Mischief::default() });
    stage.assert_whole(&stage.fetch("hf://org/name").unwrap(), &FOLDER);
    for (status, says) in [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check name, revision and file"), (410, "410")] {
        let stage = Stage::new(Mischief { refuses: (1, status), ..Mischief::default() });
        let why = stage.fetch("hf://org/name").unwrap_err();
        assert!(why.contains(says) && !why.contains(TOKEN), "{why}");
    }
    let stage = Stage::new(Mischief::default());
    let why = stage.fetch("hf://org/other").unwrap_err();
    assert!(why.contains("hf://org/other@main") && why.contains("knows no"), "{why}");
    let why = stage.fetch("hf://org/name@main/missing.gguf").unwrap_err();
    assert!(why.contains("model-Q8_0.gguf"), "{why}");
}

#[test]
fn what_came_whole_before_the_end_is_not_asked_for_again_and_what_is_not_it_is_thrown_away() {
    let whole = large();
    let longer = [&whole[..], b"x"].concat();
    for (part, cdn_asked) in [(whole, 1), (longer, 2)] {
        // Without sizes in the list only a range beyond the end tells.
        let stage = Stage::new(Mischief { bare_list: true, ..Mischief::default() });
        let folder = stage.folder.path().join(format!("hub/org--name/{COMMIT}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("model.safetensors.part"), part).unwrap();
        assert_eq!(stage.fetch("hf://org/name").unwrap(), folder);
        stage.assert_whole(&folder, &FOLDER);
        assert_eq!(stage.asked("/blobs/"), cdn_asked);
    }
}

#[test]
fn an_encoder_comes_with_what_its_modules_keep_in_folders_of_their_own() {
    let modules = br#"[{"path": "", "type": "m.Transformer"}, {"path": "1_Pooling", "type": "m.Pooling"},
        {"path": "../up", "type": "m.Pooling"}, {"path": "2_Normalize", "type": "m.Normalize"}]"#;
    let files = vec![
        ("config.json", b"{}".to_vec()),
        ("modules.json", modules.to_vec()),
        ("sentence_bert_config.json", b"{}".to_vec()),
        ("config_sentence_transformers.json", b"{}".to_vec()),
        ("1_Pooling/config.json", b"{\"pooling_mode\": \"mean\"}".to_vec()),
        ("../up/config.json", b"{}".to_vec()),
        ("model.safetensors", large()),
    ];
    let names: Vec<&str> = files.iter().map(|(name, _)| *name).filter(|name| !name.starts_with("..")).collect();
    let stage = Stage::of(files.clone(), Mischief::default());
    let folder = stage.fetch("hf://org/name").unwrap();
    stage.assert_whole(&folder, &names);
    assert_eq!(stage.asked("up"), 0, "nothing is fetched to another folder");
}

#[test]
fn of_many_weights_only_the_shards_that_the_index_names_come() {
    let index =
        br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let with_index = |index: &[u8]| {
        vec![
            ("config.json", b"{}".to_vec()),
            ("model.safetensors.index.json", index.to_vec()),
            ("model-1.safetensors", large()),
            ("model-2.safetensors", large()[..5000].to_vec()),
            ("consolidated.safetensors", large()),
        ]
    };
    let stage = Stage::of(with_index(index), Mischief::default());
    let folder = stage.fetch("hf://org/name").unwrap();
    stage.assert_whole(&folder, &["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]);
    assert!(!folder.join("consolidated.safetensors").exists());
    for name in ["../model-1.safetensors", "/etc/passwd", "config.json", "model-3.safetensors"] {
        let index = serde_json::json!({"weight_map": {"a": name}}).to_string();
        let why = Stage::of(with_index(index.as_bytes()), Mischief::default()).fetch("hf://org/name").unwrap_err();
        assert!(why.contains(name) && why.contains("no file of weights"), "{why}");
    }
}

#[test]
fn a_branch_that_was_fetched_serves_while_the_hub_cannot_be_asked() {
    let stage = Stage::new(Mischief { busy: 4, ..Mischief::default() });
    let main = Reference::parse("hf://org/name@main").unwrap();
    assert_eq!(stage.hub.kept(&main), None);
    let folder = stage.fetch("hf://org/name@main").unwrap();
    assert_eq!(stage.asked("/api/"), 5, "the list is asked for as files are");
    assert_eq!(stage.hub.kept(&main), Some(folder.clone()));
    assert_eq!(stage.hub.kept(&Reference::parse("hf://org/name@other").unwrap()), None);

    stage.site.mischief.lock().unwrap().busy = u32::MAX;
    assert_eq!(stage.hub.fetch(&main).unwrap(), folder);
    let why = stage.hub.pull(&main).unwrap_err();
    assert!(why.contains("503"), "who pulls wants what is there now: {why}");
    assert!(stage.fetch("hf://org/name@other").unwrap_err().contains("503"));
}

#[test]
fn another_commit_than_the_one_that_was_asked_for_is_refused() {
    let stage = Stage::new(Mischief { strays: true, ..Mischief::default() });
    let why = stage.fetch(&format!("hf://org/name@{COMMIT}")).unwrap_err();
    assert!(why.contains("another commit: ffff"), "{why}");
    assert_eq!(stage.hub.list().unwrap(), []);
}
