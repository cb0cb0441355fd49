"""Record which experts a converted model chooses on real text, for `kernels/benchmarks/run.py --routing trace FILE`.

Random routing is the worst case: a batch of tokens then uses nearly every expert. Neighbouring tokens of a text agree
more, and this file says how much. Each K is a run of its own, since the experts of a layer depend on what the layers
before it computed. The default text is the part of the built-in one that `emoe convert` keeps apart from calibration.

    python scripts/router_traces.py out/ --output traces.safetensors
    python scripts/router_traces.py out/ --text book.txt --tokens 8192 --top-k 16 --output traces.safetensors

File: tensors "k{K}.layer{i}", (T, K) int16 expert ids, rows in the order of the text; metadata "router_traces", JSON:
model, width (D), hidden (F), experts (E), top_k, layers, tokens (T), sequence_length, text, text_digest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import emoe  # noqa: F401 - teaches AutoModelForCausalLM to load converted models
from emoe.calibration.text import BUILTIN, IN_DOMAIN, TokenBlocks, load_blocks
from emoe.config import ConvertConfig
from emoe.errors import UserError
from emoe.runtime import atomic_write

UNION_TOKENS = (1, 2, 4, 8, 64, 512)
"""Batches of neighbouring tokens whose union of experts is printed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a converted causal model")
    parser.add_argument("--text", default=BUILTIN, help="a file, a folder, a dataset or 'builtin'")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a forward call")
    parser.add_argument("--top-k", type=int, action="append", help="may be repeated; default: E/8, E/4 and E/2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        record(arguments)
    except UserError as error:
        print(f"router_traces.py: {error}", file=sys.stderr)
        return 2
    return 0


def load(folder: Path):
    """Model and tokenizer. UserError if it is not a converted causal model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not (folder / "config.json").is_file():
        raise UserError(f"model: {folder} is not the folder of a checkpoint")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    except ValueError as error:
        raise UserError(f"model: {folder} is not a causal language model ({str(error).splitlines()[0]})") from None
    if not hasattr(model, "sparse_ffns"):
        raise UserError(f"model: {folder} is dense; `emoe convert` makes a converted one")
    if model.config.emoe_routing != "top-k" or model.config.emoe_allocation != "uniform":
        raise UserError(
            f"model: {folder} gives tokens different numbers of experts, the benchmark wants K for each; "
            "convert with --routing top-k --allocation uniform"
        )
    return model, AutoTokenizer.from_pretrained(folder)


def held_out(text: str, tokenizer, tokens: int, length: int, seed: int) -> TokenBlocks:
    """Blocks of the text; of the built-in one those that conversion does not calibrate on."""
    calibration_tokens = ConvertConfig.model_fields["calibration_tokens"].default if text == BUILTIN else length
    blocks = load_blocks(
        [text], tokenizer, length=length, calibration_tokens=calibration_tokens, held_out_tokens=tokens, seed=seed
    )
    if blocks.held_out[IN_DOMAIN].numel() < tokens:
        raise UserError(f"--tokens: {text} is too short; it gives {blocks.held_out[IN_DOMAIN].numel()} tokens")
    return blocks


@torch.inference_mode()
def trace(model, blocks_BT: Tensor, top_k: int) -> dict[int, Tensor]:
    """(T, K) int16 expert ids by layer index, at K = top_k."""
    model.set_top_k(top_k)
    chosen: dict[int, list[Tensor]] = {index: [] for index in model.sparse_ffns()}
    hooks = [
        ffn.router.register_forward_hook(
            lambda _module, _inputs, routing, kept=chosen[index]: kept.append(routing.experts_NK.to(torch.int16))
        )
        for index, ffn in model.sparse_ffns().items()
    ]
    for block_T in blocks_BT:
        model(block_T[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {index: torch.cat(parts) for index, parts in chosen.items()}


def mean_union(experts_TK: Tensor, tokens: int) -> float:
    """Distinct experts of `tokens` neighbours, mean over the windows that the trace divides into."""
    windows = experts_TK[: len(experts_TK) // tokens * tokens].long().reshape(-1, tokens * experts_TK.shape[1])
    used = torch.zeros(len(windows), int(experts_TK.max()) + 1).scatter_(1, windows, 1)
    return float(used.sum(1).mean())


def random_union(experts: int, top_k: int, tokens: int) -> float:
    """Expected distinct experts if every token chose K of E at random: E (1 - (1 - K/E)^N)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def record(arguments: argparse.Namespace) -> None:
    """Run the model at each K, write the file, print the unions."""
    model, tokenizer = load(arguments.model)
    config = model.config
    experts = config.num_experts
    top_ks = sorted(set(arguments.top_k or [experts // 8, experts // 4, experts // 2]))
    if not all(1 <= k < experts for k in top_ks):
        raise UserError(f"--top-k: {top_ks} must lie between 1 and {experts - 1}; at {experts} nothing is chosen")
    ffn = next(iter(model.sparse_ffns().values()))
    hidden, width = ffn.weight_views().up_FD.shape
    blocks = held_out(arguments.text, tokenizer, arguments.tokens, arguments.sequence_length, arguments.seed)
    tensors, layers = {}, list(model.sparse_ffns())
    for top_k in top_ks:
        by_layer = trace(model, blocks.held_out[IN_DOMAIN], top_k)
        tensors |= {f"k{top_k}.layer{i}": experts_TK for i, experts_TK in by_layer.items()}
        unions = []
        for tokens in UNION_TOKENS:
            if tokens <= blocks.held_out[IN_DOMAIN].numel():
                found = sum(mean_union(t, tokens) for t in by_layer.values()) / len(by_layer)
                unions.append(f"N {tokens}: {found:.1f} ({random_union(experts, top_k, tokens):.1f})")
        print(f"K {top_k} of {experts}, union of experts (random): {', '.join(unions)}", flush=True)
    facts = {
        "model": arguments.model.name,
        "width": width,
        "hidden": hidden,
        "experts": experts,
        "top_k": top_ks,
        "layers": layers,
        "tokens": blocks.held_out[IN_DOMAIN].numel(),
        "sequence_length": arguments.sequence_length,
        "text": arguments.text if arguments.text == BUILTIN else Path(arguments.text).name,
        "text_digest": blocks.digest,
    }
    with atomic_write(arguments.output) as temporary:
        save_file(tensors, temporary, metadata={"router_traces": json.dumps(facts)})
    print(f"written: {arguments.output}, {len(layers)} layers, {facts['tokens']} tokens")


if __name__ == "__main__":
    sys.exit(main())
