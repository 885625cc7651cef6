//! The weights that all engines are given, made once: bf16, and what `llama-quantize` makes of it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::process::{beside, peer};

pub struct Model {
    pub name: &'static str,
    pub is_small: bool,
    /// In Hugging Face's layout, bf16.
    pub folder: PathBuf,
    pub files: Vec<File>,
}

pub struct File {
    pub kind: &'static str,
    pub path: PathBuf,
    /// Not quantised: the numbers of the folder.
    pub is_original: bool,
}

/// 896 numbers a row are no multiple of 256: there, only what feeds back into the residual can be Q4_K, and the rest is
/// Q8_0 as our own quantiser has it.
const NARROW: &[&str] =
    &["--token-embedding-type", "q8_0", "--tensor-type", "attn_.*=q8_0", "--tensor-type", "ffn_(gate|up)=q8_0"];

pub fn prepare(root: &Path) -> Vec<Model> {
    let folder = beside("../bench");
    let llama = beside("../llama");
    std::fs::create_dir_all(&folder).unwrap();
    let mut python = Command::new(peer("python"));
    python.arg(root.join("tests/bench/peers/weights.py")).arg(&folder).arg(llama.join("vendor/llama.cpp/gguf-py"));
    must(python);
    [("qwen2.5-0.5b", NARROW), ("llama3.2-1b", &[] as &[&str])]
        .map(|(name, q4_k)| {
            let bf16 = folder.join(format!("{name}.gguf"));
            let mut files = Vec::new();
            for (kind, theirs, options) in [("q8_0", "Q8_0", &[] as &[&str]), ("q4_k", "Q4_K_M", q4_k)] {
                let path = folder.join(format!("{name}.{kind}.gguf"));
                if !path.exists() {
                    let part = path.with_extension("part");
                    let mut quantize = Command::new(llama.join("build/bin/llama-quantize"));
                    quantize.args(options).args([&bf16, &part]).arg(theirs).stdout(Stdio::null()).stderr(Stdio::null());
                    must(quantize);
                    std::fs::rename(part, &path).unwrap();
                }
                files.push(File { kind, path, is_original: false });
            }
            files.push(File { kind: "bf16", path: bf16, is_original: true });
            Model { name, is_small: name.ends_with("0.5b"), folder: folder.join(name), files }
        })
        .into()
}

fn must(mut command: Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}; run `tools/setup.sh bench`"));
    assert!(status.success(), "{command:?}: {status}");
}
