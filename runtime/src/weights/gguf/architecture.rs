//! The architectures whose GGUF form we know: a row each. Anything else is refused by name.

/// How a GGUF file of one architecture differs from the Hugging Face form of the same model.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// `model_type` of the configuration it becomes.
    pub model_type: &'static str,
    /// Rows of Q and K come in pairs (x0 y0 x1 y1 …) instead of halves (x0 x1 … y0 y1 …).
    pub pairs: bool,
    /// Norm weights are stored with one already added.
    pub plus_one: bool,
    /// There are norms in front of attention and MLP.
    pub pre_norms: bool,
    /// There are norms behind attention and MLP.
    pub post_norms: bool,
    /// Queries and keys have norms of their own.
    pub qk_norms: bool,
    /// Q, K, V are one matrix, and gate and up another.
    pub fused: bool,
    /// A head's width is not hidden_size / heads unless the file says so.
    pub own_head_dim: bool,
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    pairs: true,
    plus_one: false,
    pre_norms: true,
    post_norms: false,
    qk_norms: false,
    fused: false,
    own_head_dim: false,
};
const GEMMA: Architecture =
    Architecture { name: "gemma", model_type: "gemma", pairs: false, plus_one: true, own_head_dim: true, ..LLAMA };

const KNOWN: [Architecture; 10] = [
    LLAMA,
    Architecture { name: "granite", model_type: "granite", ..LLAMA },
    Architecture { name: "smollm3", model_type: "smollm3", ..LLAMA },
    Architecture { name: "qwen2", model_type: "qwen2", pairs: false, ..LLAMA },
    Architecture { name: "qwen3", model_type: "qwen3", pairs: false, qk_norms: true, own_head_dim: true, ..LLAMA },
    Architecture { name: "phi3", model_type: "phi3", pairs: false, fused: true, ..LLAMA },
    Architecture {
        name: "olmo2",
        model_type: "olmo2",
        pairs: false,
        pre_norms: false,
        post_norms: true,
        qk_norms: true,
        ..LLAMA
    },
    GEMMA,
    Architecture { name: "gemma2", model_type: "gemma2", post_norms: true, ..GEMMA },
    Architecture { name: "gemma3", model_type: "gemma3_text", post_norms: true, qk_norms: true, ..GEMMA },
];

pub(super) fn find(name: &str) -> Result<&'static Architecture, String> {
    KNOWN.iter().find(|known| known.name == name).ok_or_else(|| {
        let known: Vec<&str> = KNOWN.iter().map(|known| known.name).collect();
        format!("has the architecture `{name}` (supported: {})", known.join(", "))
    })
}
