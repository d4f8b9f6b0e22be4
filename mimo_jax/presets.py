"""Model sizes that the config files share: `tiny`, `100m`, `1b`, `7b`. `7b` is the published system, number for number.

Every size keeps what defines the architecture: 20 RVQ levels, 8 channels with delays 0-7, patches of 4 frames.
"""

from __future__ import annotations

from mimo_jax.config import (
    A2TConfig,
    AudioLMConfig,
    AudioTokenizerConfig,
    ComputeConfig,
    ConfigError,
    MelConfig,
    RVQConfig,
    TransformerConfig,
)

SIZES = ("tiny", "100m", "1b", "7b")

# Text vocabularies. A tokenizer trained here has the special tokens at ids 1..11, so `<|empty|>` is 6; the
# published one (Hugging Face `tokenizer.json`) has it at 151667. Rows beyond the tokenizer's own stay unused.
_VOCAB = {"tiny": (1024, 6), "100m": (8192, 6), "1b": (151_680, 151_667), "7b": (151_680, 151_667)}


def check_size(size: str | None) -> str:
    """Returns `size`, or raises ConfigError naming the sizes there are."""
    if size not in SIZES:
        raise ConfigError(f"size: expected FILE:SIZE with SIZE one of {', '.join(SIZES)}, got {size!r}")
    return size


def audio_tokenizer(size: str) -> AudioTokenizerConfig:
    """The audio tokenizer: 1.29 B parameters at `7b` (report section 2.1)."""
    d, layers, heads, d_ff = {
        "tiny": (128, 4, 2, 384),
        "100m": (640, 10, 10, 2560),
        "1b": (1024, 24, 16, 4096),
        "7b": (1280, 32, 20, 5120),
    }[size]
    v, v_layers, v_heads, v_ff = (96, 3, 2, 256) if size == "tiny" else (256, 16, 16, 1024)
    return AudioTokenizerConfig(
        mel=MelConfig(),
        encoder=TransformerConfig.codec(d, layers, heads, d_ff, causal=False),
        decoder=TransformerConfig.codec(d, layers, heads, d_ff, causal=True),
        vocoder=TransformerConfig.codec(v, v_layers, v_heads, v_ff, causal=False, window=(40, 10)),
        # Few steps of few vectors: at decay 0.99 the codebooks cannot follow the encoder and collapse to one entry, and
        # a batch has about as many vectors as the first codebook entries: a threshold of 2 would call most dead.
        rvq=RVQConfig(ema_decay=0.8, dead_code_threshold=0.3) if size == "tiny" else RVQConfig(),
        encoder_skip_layer=3,
    )


def a2t_decoder(size: str) -> A2TConfig:
    """The text decoder of the audio-to-text objective. The report does not state its size; these are ours."""
    d, layers, heads, head_dim, d_ff = {
        "tiny": (128, 2, 4, 32, 384),
        "100m": (512, 6, 8, 64, 1408),
        "1b": (1024, 12, 16, 64, 2816),
        "7b": (2048, 24, 16, 128, 5632),
    }[size]
    return A2TConfig(TransformerConfig.qwen2(d, layers, heads, head_dim, d_ff), vocab_size=_VOCAB[size][0])


def audio_lm(size: str) -> AudioLMConfig:
    """The audio language model: 8,018,587,648 parameters at `7b`, of which 7,622,619,136 are the LLM (report, 2.2)."""
    vocab_size, empty_id = _VOCAB[size]
    t = TransformerConfig.qwen2
    llm, encoder, decoder = {
        "tiny": (
            t(192, 4, 6, 32, 512, num_kv_heads=2),
            t(96, 2, 6, 16, 384, causal=False),
            t(96, 3, 6, 16, 384),
        ),
        "100m": (
            t(768, 10, 12, 64, 2048, num_kv_heads=4),
            t(256, 4, 16, 16, 1024, causal=False),
            t(256, 8, 16, 16, 1024),
        ),
        "1b": (
            t(1536, 24, 12, 128, 4096, num_kv_heads=4),
            t(512, 6, 32, 16, 2048, causal=False),
            t(512, 12, 32, 16, 2048),
        ),
        "7b": (
            t(4096, 36, 32, 128, 11008, num_kv_heads=8),
            t(1024, 6, 64, 16, 4096, causal=False),
            t(1024, 16, 64, 16, 4096),
        ),
    }[size]
    return AudioLMConfig(vocab_size, empty_id, llm, encoder, decoder)


def compute(size: str) -> ComputeConfig:
    """float32 without remat at `tiny` (CPU); bfloat16 activations with remat at the other sizes (accelerators)."""
    if size == "tiny":
        return ComputeConfig()
    if size == "100m":
        return ComputeConfig(dtype="bfloat16", remat="dots")
    # An eighth of the patches of a row at a time: so a micro-batch of one row fits 16 GiB at `7b`.
    return ComputeConfig(dtype="bfloat16", remat="full", patch_chunk=768)
