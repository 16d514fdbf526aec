"""How fast is generate against Hugging Face's own at the same batch size? And how fast does a cached model load?

Interleaved rounds of one run, ratios of medians; sampling with temperature 0.7 and top-p 0.95 in both, no early stop.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import lens_affect as la
from lens_affect.adapter import encode_prompt
from lens_affect.catalogue import CATALOGUE, fetch

PROMPT = "Write a short story of three to five paragraphs about a character who is feeling hopeful. The story takes place at a school."


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--tokens", type=int, default=32)
    chosen = options.parse_args()

    model = la.load_model(chosen.model, dtype=torch.float32)
    bare = AutoModelForCausalLM.from_pretrained(fetch(CATALOGUE[chosen.model]), dtype=torch.float32).eval()
    head = encode_prompt(model, PROMPT)[0]
    for rows in chosen.rows:
        ids = torch.tensor([head] * rows)
        settings = {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
            "top_k": 0,
            "max_new_tokens": chosen.tokens,
            "min_new_tokens": chosen.tokens,
        }
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for round_number in range(chosen.rounds + 1):
            start = time.perf_counter()
            la.generate(model, [PROMPT] * rows, max_new_tokens=chosen.tokens, stop=[])
            ours = time.perf_counter() - start
            start = time.perf_counter()
            bare.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
            if round_number:  # the first round warms up
                taken["ours"].append(ours)
                taken["theirs"].append(time.perf_counter() - start)
        ours, theirs = (statistics.median(taken[k]) for k in ("ours", "theirs"))
        print(
            f"{rows:4d} rows: {rows * chosen.tokens / ours:6.1f} tokens/s, {theirs / ours:.3f} of Hugging Face generate (never booted)",
            flush=True,
        )

    code = "import time; import torch, transformers, lens_affect as la; from transformer_lens.model_bridge import TransformerBridge; "
    code += f"la.load_model; t = time.perf_counter(); la.load_model({chosen.model!r}); print(time.perf_counter() - t)"
    loads = [
        float(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
        )
        for _ in range(3)
    ]
    print(
        f"loading {chosen.model} from the cache, self-checks included, imports not: {statistics.median(loads):.1f} s (median of 3)"
    )


if __name__ == "__main__":
    main()
