"""How much does reading cost over the bare forward pass? Ratios of medians from interleaved rounds of one run.

64 passages in batches of 16, same batches and precision for all: (a) the bare trunk of the booted model, (b) the trunk of a
never-booted Hugging Face model with its default attention, (c) extract_activations of pooled resid_post at all layers.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

import lens_affect as la
from lens_affect.activations import _batches
from lens_affect.adapter import encode, pad_right, pad_token_id
from lens_affect.catalogue import CATALOGUE, fetch


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--texts", type=int, default=64)
    options.add_argument("--pooling", default="mean")
    options.add_argument("--dtype", default="float32")
    chosen = options.parse_args()
    dtype = getattr(torch, chosen.dtype)

    passages = la.load_stimuli("passages").select(rows=range(chosen.texts))
    model = la.load_model(chosen.model, dtype=dtype)
    bare = AutoModelForCausalLM.from_pretrained(fetch(CATALOGUE[chosen.model]), dtype=dtype).eval()
    encoded = [encode(model, text) for text in passages.texts]
    budget = 16 * max(len(e.ids) for e in encoded)
    batches = [
        pad_right([encoded[r] for r in rows], pad_token_id(model), torch.device("cpu"))
        for rows in _batches([len(e.ids) for e in encoded], budget)
    ]
    n_tokens = sum(int(mask.sum()) for _, mask in batches)

    def forward(trunk) -> None:
        with torch.no_grad():
            for tokens, mask in batches:
                trunk(input_ids=tokens, attention_mask=mask, use_cache=False)

    def read() -> None:
        la.extract_activations(model, passages, pooling=chosen.pooling, batch_tokens=budget)

    cases = {
        "bare forward, booted": lambda: forward(model.original_model.base_model),
        "bare forward, never booted": lambda: forward(bare.base_model),
        "extract_activations": read,
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for work in cases.values():
        work()  # warm up
    for _ in range(chosen.rounds):
        for name, work in cases.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(
        f"{chosen.model}, {chosen.dtype}, {chosen.pooling}: {n_tokens} tokens, {len(batches)} batches, {chosen.rounds} rounds"
    )
    for name, seconds in medians.items():
        print(
            f"{name:28s} {n_tokens / seconds:7.0f} tokens/s (median; {min(taken[name]):.2f} to {max(taken[name]):.2f} s)"
        )
    for name in list(cases)[:2]:
        print(f"extract_activations / {name}: {medians[name] / medians['extract_activations']:.3f} of its token rate")


if __name__ == "__main__":
    main()
