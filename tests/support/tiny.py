"""Tiny random models of every family, saved as real checkpoints with a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB, WIDTH, HIDDEN, LAYERS = 96, 32, 48, 4

_GATED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _GATED | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "n_inner": HIDDEN}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {k: v for k, v in _GATED.items() if k != "num_key_value_heads"} | {"type_vocab_size": 1}

CONFIGS: dict[str, dict] = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": None},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"sliding_window_pattern": 2},
    "phi3": _GATED,
    "gpt2": _GPT | _SPECIAL,
    "gpt_neo": {
        **_SPECIAL,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": 4,
        "intermediate_size": HIDDEN,
        "attention_types": [[["global", "local"], LAYERS // 2]],
        "window_size": 16,
        "max_position_embeddings": 128,
    },
    "gptj": _GPT | _SPECIAL | {"rotary_dim": 4},
    "gpt_neox": _BERT | {"rotary_pct": 0.5},
    "opt": {
        **_SPECIAL,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "ffn_dim": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": WIDTH,
    },
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": 132},
}


def tiny_model(family: str, seed: int = 0, head: str | None = None, **changes):
    """A random stock model in eval mode, fp32. Weights are large enough for the FFNs to matter, biases are not zero."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**(CONFIGS[family] | changes))
    auto = head or ("AutoModelForMaskedLM" if family in ("bert", "roberta") else "AutoModelForCausalLM")
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            norm = parameter.ndim == 1 and "norm" in name.lower() + "ln_" * ("ln_" in name)
            parameter.copy_(1 + noise if norm and name.endswith("weight") and "gemma" not in family else noise)
    model.tie_weights()
    return model


def tiny_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer trained on a sentence, with pad, bos, eos and mask; ids stay below `VOCAB`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<mask>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)


TEXT = (
    "A model that was trained densely holds groups of neurons which answer to the same words. "
    "To find them we watch which neurons fire together, and we keep apart what never meets. "
)


def tiny_checkpoint(folder: Path, family: str = "llama", seed: int = 0, **kwargs) -> Path:
    """`tiny_model` with `tiny_tokenizer`, saved."""
    tiny_model(family, seed, **kwargs).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder
