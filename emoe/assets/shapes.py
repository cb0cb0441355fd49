"""Shapes of well-known models, so that `emoe estimate` needs neither a hub nor weights.

Each is what matters of that model's config.json, with the family's own field names: transformers' configuration class
takes it as keywords. A test builds every one on the meta device and compares its parameters with the published count.
"""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]


def _gated(
    model_type: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> Shape:
    """Llama and its descendants: gated FFN, RMSNorm, grouped heads."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **more,
    }


def _gpt2(hidden: int, layers: int, heads: int, *, positions: int = 1024, vocab: int = 50257) -> Shape:
    """``n_inner`` is None in the published files and means ``4 * n_embd``."""
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_inner": None,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }


def _gpt_neo(hidden: int, layers: int, heads: int) -> Shape:
    return {
        "model_type": "gpt_neo",
        "hidden_size": hidden,
        "intermediate_size": None,
        "num_layers": layers,
        "num_heads": heads,
        "attention_types": [[["global", "local"], layers // 2]],
        "max_position_embeddings": 2048,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    }


def _pythia(hidden: int, layers: int, heads: int) -> Shape:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50304,
        "tie_word_embeddings": False,
    }


def _opt(hidden: int, layers: int, heads: int) -> Shape:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "tie_word_embeddings": True,
    }


def _encoder(model_type: str, hidden: int, layers: int, heads: int, vocab: int, positions: int, types: int) -> Shape:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }


_TIED: Shape = {"tie_word_embeddings": True}
_LLAMA3: Shape = {"rope_theta": 500000.0, "max_position_embeddings": 8192}
_QWEN3: Shape = {"head_dim": 128, "max_position_embeddings": 32768}
_GEMMA: Shape = {"head_dim": 256, "max_position_embeddings": 8192, **_TIED}
_SMOL: Shape = {"max_position_embeddings": 8192, "rope_theta": 100000.0, "bos_token_id": 1, "eos_token_id": 2, **_TIED}

SHAPES: dict[str, Shape] = {
    # hidden, FFN, layers, heads, key/value heads, vocabulary
    "llama2-7b": _gated("llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "llama2-13b": _gated("llama", 5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
    "llama2-70b": _gated("llama", 8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096),
    "llama3-8b": _gated("llama", 4096, 14336, 32, 32, 8, 128256, **_LLAMA3),
    "llama3.1-8b": _gated("llama", 4096, 14336, 32, 32, 8, 128256, **{**_LLAMA3, "max_position_embeddings": 131072}),
    "llama3.2-1b": _gated("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **{**_LLAMA3, **_TIED}),
    "llama3.2-3b": _gated("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **{**_LLAMA3, **_TIED}),
    "tinyllama-1.1b": _gated("llama", 2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048),
    "smollm2-135m": _gated("llama", 576, 1536, 30, 9, 3, 49152, **_SMOL),
    "smollm2-360m": _gated("llama", 960, 2560, 32, 15, 5, 49152, **_SMOL),
    "smollm2-1.7b": _gated("llama", 2048, 8192, 24, 32, 32, 49152, **_SMOL),
    "mistral-7b": _gated("mistral", 4096, 14336, 32, 32, 8, 32000, max_position_embeddings=32768),
    "qwen2-0.5b": _gated("qwen2", 896, 4864, 24, 14, 2, 151936, **_TIED),
    "qwen2-1.5b": _gated("qwen2", 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "qwen2-7b": _gated("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-0.5b": _gated("qwen2", 896, 4864, 24, 14, 2, 151936, **_TIED),
    "qwen2.5-1.5b": _gated("qwen2", 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "qwen2.5-3b": _gated("qwen2", 2048, 11008, 36, 16, 2, 151936, **_TIED),
    "qwen2.5-7b": _gated("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-0.6b": _gated("qwen3", 1024, 3072, 28, 16, 8, 151936, **{**_QWEN3, **_TIED}),
    "qwen3-1.7b": _gated("qwen3", 2048, 6144, 28, 16, 8, 151936, **{**_QWEN3, **_TIED}),
    "qwen3-4b": _gated("qwen3", 2560, 9728, 36, 32, 8, 151936, **{**_QWEN3, **_TIED}),
    "qwen3-8b": _gated("qwen3", 4096, 12288, 36, 32, 8, 151936, **_QWEN3),
    "gemma2-2b": _gated("gemma2", 2304, 9216, 26, 8, 4, 256000, **_GEMMA),
    "gemma2-9b": _gated("gemma2", 3584, 14336, 42, 16, 8, 256000, **_GEMMA),
    "gemma3-270m": _gated("gemma3_text", 640, 2048, 18, 4, 1, 262144, **_GEMMA),
    "gemma3-1b": _gated("gemma3_text", 1152, 6912, 26, 4, 1, 262144, **_GEMMA),
    "phi3-mini": _gated("phi3", 3072, 8192, 32, 32, 32, 32064, max_position_embeddings=4096),
    # hidden, layers, heads
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "iglm": _gpt2(512, 4, 8, positions=512, vocab=33),
    "iglm-s": _gpt2(192, 3, 6, positions=512, vocab=33),
    "gpt-neo-125m": _gpt_neo(768, 12, 12),
    "gpt-neo-1.3b": _gpt_neo(2048, 24, 16),
    "gptj-6b": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_inner": None,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
        "tie_word_embeddings": False,
    },
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "bert-base": _encoder("bert", 768, 12, 12, 30522, 512, 2),
    "bert-large": _encoder("bert", 1024, 24, 16, 30522, 512, 2),
    "roberta-base": _encoder("roberta", 768, 12, 12, 50265, 514, 1),
    "roberta-large": _encoder("roberta", 1024, 24, 16, 50265, 514, 1),
    "all-minilm-l6-v2": _encoder("bert", 384, 6, 12, 30522, 512, 2),
}
