//! The families: what each does differently from a Llama, one row each. Defaults are those of its transformers
//! configuration, for files that leave a key out. `docs/models.md` says how to add one.

use super::{Norms, QkNorm};
use crate::kernels::cpu::Activation;

/// What `config.json` does not say because the family's code says it.
pub(super) struct Family {
    pub model_type: &'static str,
    pub norms: Norms,
    /// Norm weights are stored as their distance from 1.
    pub norms_from_one: bool,
    pub qk_norm: Option<QkNorm>,
    /// Query, key and value have a bias whatever `attention_bias` says.
    pub qkv_bias: bool,
    /// The file holds q, k, v as one matrix, and gate, up as another.
    pub fused: bool,
    /// In effect where the file names none. A `gelu` in the file of a tanh family means the tanh approximation.
    pub activation: Activation,
    /// Embeddings are multiplied by √hidden_size.
    pub embeds_by_root: bool,
    /// Reads `embedding_multiplier`, `attention_multiplier`, `residual_multiplier`, `logits_scaling`.
    pub multipliers: bool,
    /// Reads `query_pre_attn_scalar`, with this default.
    pub query_scalar: Option<f64>,
    /// Attention's cap, then the logits'.
    pub softcaps: [Softcap; 2],
    pub windows: Windows,
    /// `sliding_window` where the file says nothing.
    pub window: Option<usize>,
    pub head_dim: Option<usize>,
    pub norm_eps: f64,
    pub theta: f64,
    /// Layers with a window have a base of their own: `rope_local_base_freq`, with this default.
    pub local_theta: Option<f64>,
    /// Reads `partial_rotary_factor`.
    pub partial_rotary: bool,
    /// Reads `no_rope_layers`, or leaves out one layer in `no_rope_layer_interval`, with this default.
    pub no_rope_interval: Option<usize>,
    pub tied: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Softcap {
    /// The family knows none.
    Never,
    Asked,
    /// Unless the file says null.
    Usual(f64),
}

/// Which layers see only the latest `sliding_window` keys, unless `layer_types` says it.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Windows {
    Never,
    /// `layer_types` is not read.
    Always,
    /// All but one in `sliding_window_pattern`, with this default.
    AllButOneIn(usize),
    /// With `use_sliding_window`: from layer `max_window_layers` on.
    FromLayer(usize),
    /// With `use_sliding_window`: those without rotary positions.
    WithoutRope,
}

const LLAMA: Family = Family {
    model_type: "llama",
    norms: Norms::BEFORE,
    norms_from_one: false,
    qk_norm: None,
    qkv_bias: false,
    fused: false,
    activation: Activation::Silu,
    embeds_by_root: false,
    multipliers: false,
    query_scalar: None,
    softcaps: [Softcap::Never, Softcap::Never],
    windows: Windows::Never,
    window: None,
    head_dim: None,
    norm_eps: 1e-6,
    theta: 1e4,
    local_theta: None,
    partial_rotary: false,
    no_rope_interval: None,
    tied: false,
};

const GEMMA: Family = Family {
    model_type: "gemma",
    norms_from_one: true,
    activation: Activation::GeluTanh,
    embeds_by_root: true,
    head_dim: Some(256),
    tied: true,
    ..LLAMA
};

pub(super) const FAMILIES: &[Family] = &[
    LLAMA,
    Family { model_type: "mistral", windows: Windows::Always, window: Some(4096), ..LLAMA },
    Family { model_type: "qwen2", qkv_bias: true, windows: Windows::FromLayer(28), window: Some(4096), ..LLAMA },
    Family {
        model_type: "qwen3",
        qk_norm: Some(QkNorm::Head),
        windows: Windows::FromLayer(28),
        window: Some(4096),
        head_dim: Some(128),
        ..LLAMA
    },
    GEMMA,
    Family {
        model_type: "gemma2",
        norms: Norms::AROUND,
        query_scalar: Some(256.0),
        softcaps: [Softcap::Usual(50.0), Softcap::Usual(30.0)],
        windows: Windows::AllButOneIn(2),
        window: Some(4096),
        ..GEMMA
    },
    Family {
        model_type: "gemma3_text",
        norms: Norms::AROUND,
        qk_norm: Some(QkNorm::Head),
        query_scalar: Some(256.0),
        softcaps: [Softcap::Never, Softcap::Asked],
        windows: Windows::AllButOneIn(6),
        window: Some(4096),
        theta: 1e6,
        local_theta: Some(1e4),
        ..GEMMA
    },
    Family { model_type: "phi3", fused: true, windows: Windows::Always, norm_eps: 1e-5, partial_rotary: true, ..LLAMA },
    Family { model_type: "granite", multipliers: true, ..LLAMA },
    Family { model_type: "olmo2", norms: Norms::AFTER, qk_norm: Some(QkNorm::Whole), norm_eps: 1e-5, ..LLAMA },
    Family {
        model_type: "smollm3",
        windows: Windows::WithoutRope,
        theta: 2e6,
        no_rope_interval: Some(4),
        tied: true,
        ..LLAMA
    },
];
