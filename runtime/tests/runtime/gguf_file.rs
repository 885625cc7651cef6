//! Writes GGUF files for tests, good ones and such as nobody should believe.

/// A pair's type and value, as they stand in the file.
pub type Pair = Vec<u8>;

pub struct Stored {
    pub name: String,
    /// As the file counts: columns first.
    pub shape: Vec<u64>,
    pub kind: u32,
    /// From the beginning of the data; where it lies, unless a test says otherwise.
    pub offset: Option<u64>,
    pub bytes: Vec<u8>,
}

/// A file before it is written.
pub struct File {
    pub version: u32,
    pub pairs: Vec<(String, Pair)>,
    pub tensors: Vec<Stored>,
    pub alignment: usize,
    pub vocab: usize,
}

fn pair(kind: u32, value: &[u8]) -> Pair {
    [&kind.to_le_bytes(), value].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn number(n: u32) -> Pair {
    pair(4, &n.to_le_bytes())
}

pub fn real(x: f32) -> Pair {
    pair(6, &x.to_le_bytes())
}

pub fn text(text: &str) -> Pair {
    pair(8, &string(text))
}

pub fn text_list(texts: &[String]) -> Pair {
    let items: Vec<u8> = texts.iter().flat_map(|text| string(text)).collect();
    pair(9, &[&8u32.to_le_bytes()[..], &(texts.len() as u64).to_le_bytes(), &items].concat())
}

pub fn i32_list(numbers: &[i32]) -> Pair {
    let items: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    pair(9, &[&5u32.to_le_bytes()[..], &(numbers.len() as u64).to_le_bytes(), &items].concat())
}

const HIDDEN: u64 = 32;
const INNER: u64 = 48;
const KV: u64 = 16;

impl File {
    /// A Llama of one layer with seeded f32 weights and a byte-level vocabulary without merges.
    pub fn tiny(tokens: &[String]) -> File {
        let mut file = File { version: 3, pairs: Vec::new(), tensors: Vec::new(), alignment: 32, vocab: tokens.len() };
        file.set("general.architecture", text("llama"));
        for (key, n) in [
            ("context_length", 128),
            ("embedding_length", HIDDEN as u32),
            ("block_count", 1),
            ("feed_forward_length", INNER as u32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            file.set(&format!("llama.{key}"), number(n));
        }
        file.set("llama.attention.layer_norm_rms_epsilon", real(1e-5));
        file.set("tokenizer.ggml.model", text("gpt2"));
        file.set("tokenizer.ggml.pre", text("gpt-2"));
        file.set("tokenizer.ggml.tokens", text_list(tokens));
        file.set("tokenizer.ggml.merges", text_list(&[]));
        file.set("tokenizer.ggml.eos_token_id", number(1));
        for (name, shape) in [
            ("token_embd", vec![HIDDEN, tokens.len() as u64]),
            ("output_norm", vec![HIDDEN]),
            ("blk.0.attn_norm", vec![HIDDEN]),
            ("blk.0.attn_q", vec![HIDDEN, HIDDEN]),
            ("blk.0.attn_k", vec![HIDDEN, KV]),
            ("blk.0.attn_v", vec![HIDDEN, KV]),
            ("blk.0.attn_output", vec![HIDDEN, HIDDEN]),
            ("blk.0.ffn_norm", vec![HIDDEN]),
            ("blk.0.ffn_gate", vec![HIDDEN, INNER]),
            ("blk.0.ffn_up", vec![HIDDEN, INNER]),
            ("blk.0.ffn_down", vec![INNER, HIDDEN]),
        ] {
            let count: u64 = shape.iter().product();
            let bytes = (0..count).flat_map(|i| ((i * 37 % 101) as f32 / 101.0 - 0.5).to_le_bytes()).collect();
            file.tensors.push(Stored { name: format!("{name}.weight"), shape, kind: 0, offset: None, bytes });
        }
        file
    }

    /// One token for each byte.
    pub fn of_bytes() -> File {
        File::tiny(&crate::support::letters().map(String::from).collect::<Vec<_>>())
    }

    pub fn set(&mut self, key: &str, value: Pair) {
        match self.pairs.iter_mut().find(|(known, _)| known == key) {
            Some(pair) => pair.1 = value,
            None => self.pairs.push((key.to_owned(), value)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.pairs.retain(|(known, _)| known != key);
    }

    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the tiny model")
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.with_counts(self.tensors.len() as u64, self.pairs.len() as u64)
    }

    /// With counts that may be lies.
    pub fn with_counts(&self, tensors: u64, pairs: u64) -> Vec<u8> {
        let mut out =
            [&b"GGUF"[..], &self.version.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat();
        for (key, value) in &self.pairs {
            out.extend([string(key), value.clone()].concat());
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            out.extend(tensor.shape.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}
