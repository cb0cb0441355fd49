#!/usr/bin/env bash
# The main job on a real model: fetch SmolLM2-135M, convert every layer into 64 experts, load it back, let it write.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

OUTPUT="${1:-demo-output/smollm2-135m-emoe}"
emoe convert --model smollm2-135m --experts 64 --output "$OUTPUT" --overwrite
echo
emoe inspect "$OUTPUT" --brief
echo
python scripts/generate.py --model "$OUTPUT" --top-k 64 --top-k 48 --top-k 32 \
  --prompt "The library of the old town is"
