"""Let a converted model write, at several numbers of experts, through transformers alone: `emoe` is not imported."""

from __future__ import annotations

import argparse
import logging as standard_logging
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a converted checkpoint")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--top-k", type=int, action="append", help="experts a token uses; may be repeated")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to write")
    arguments = parser.parse_args()

    if not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model: {arguments.model} is no folder of a model; `emoe convert` makes one")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it
        standard_logging.getLogger(name).setLevel(standard_logging.ERROR)
    # The checkpoint brings its own modelling code; the flag says that we trust it. (The tokenizer has none, but
    # transformers reads the model's config to choose its class.)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True).eval()
    prompt = tokenizer(arguments.prompt, return_tensors="pt")
    print(f"{type(model).__name__} loaded through AutoModelForCausalLM: {model.num_parameters():,} parameters")
    for top_k in arguments.top_k or [model.config.num_experts_per_tok]:
        model.set_top_k(top_k)
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(
                **prompt,
                max_new_tokens=arguments.tokens,
                min_new_tokens=arguments.tokens,
                do_sample=False,
                repetition_penalty=1.2,
                pad_token_id=tokenizer.eos_token_id,
            )
        rate = arguments.tokens / (time.perf_counter() - start)
        text = " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())
        print(f"\n{top_k} of {model.config.num_experts} experts ({rate:.1f} tokens/s): {text}")


if __name__ == "__main__":
    main()
