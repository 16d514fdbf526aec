"""How much does reading cost over the bare forward pass, and does it gain as much from bfloat16? Ratios of medians from interleaved rounds of one run.

64 passages in batches of 16, same batches for all, each precision with models of its own: (a) the bare trunk of the booted model, (b) the trunk of
a never-booted Hugging Face model with its default attention, (c) extract_activations of pooled resid_post at all layers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

import lens_affect as la
from lens_affect.activations import _batches
from lens_affect.adapter import encode, pad_right, pad_token_id
from lens_affect.catalogue import CATALOGUE, fetch

BOOTED, NEVER, READING = "bare forward, booted", "bare forward, never booted", "extract_activations"


def cases_of(
    name: str, dtype: torch.dtype, passages: la.Stimuli, pooling: str
) -> tuple[dict[str, Callable[[], None]], int]:
    """What is timed in one precision, and how many tokens each reads."""
    model = la.load_model(name, dtype=dtype)
    bare = AutoModelForCausalLM.from_pretrained(fetch(CATALOGUE[name]), dtype=dtype).eval()
    encoded = [encode(model, text) for text in passages.texts]
    budget = 16 * max(len(e.ids) for e in encoded)
    batches = [
        pad_right([encoded[r] for r in rows], pad_token_id(model), torch.device("cpu"))
        for rows in _batches([len(e.ids) for e in encoded], budget)
    ]

    def forward(trunk) -> None:
        with torch.no_grad():
            for tokens, mask in batches:
                trunk(input_ids=tokens, attention_mask=mask, use_cache=False)

    return {
        BOOTED: lambda: forward(model.original_model.base_model),
        NEVER: lambda: forward(bare.base_model),
        READING: lambda: (la.extract_activations(model, passages, pooling=pooling, batch_tokens=budget), None)[1],
    }, sum(int(mask.sum()) for _, mask in batches)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--texts", type=int, default=64)
    options.add_argument("--pooling", default="mean")
    options.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    chosen = options.parse_args()
    passages = la.load_stimuli("passages").select(rows=range(chosen.texts))
    found = {name: cases_of(chosen.model, getattr(torch, name), passages, chosen.pooling) for name in chosen.dtype}
    cases = {(dtype, case): work for dtype, (of_dtype, _) in found.items() for case, work in of_dtype.items()}
    n_tokens = next(iter(found.values()))[1]
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    for round_number in range(chosen.rounds + 1):
        for key, work in cases.items():
            start = time.perf_counter()
            work()
            if round_number:  # the first one warms up
                taken[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    print(f"{chosen.model}, {chosen.pooling}: {len(passages)} passages, {n_tokens} tokens, {chosen.rounds} rounds")
    for (dtype, case), seconds in medians.items():
        lowest, highest = min(taken[dtype, case]), max(taken[dtype, case])
        print(f"{dtype}, {case:26s} {n_tokens / seconds:7.0f} tokens/s (median; {lowest:.2f} to {highest:.2f} s)")
    for dtype in chosen.dtype:
        for case in (BOOTED, NEVER):
            print(
                f"{dtype}: {READING} reaches {medians[dtype, case] / medians[dtype, READING]:.3f} of the rate of {case}"
            )
    if {"float32", "bfloat16"} <= set(chosen.dtype):
        gains = {case: medians["float32", case] / medians["bfloat16", case] for case in (BOOTED, READING)}
        print(
            f"bfloat16 over float32: {gains[BOOTED]:.2f} for {BOOTED}, {gains[READING]:.2f} for {READING}, "
            f"{gains[READING] / gains[BOOTED]:.3f} of it"
        )


if __name__ == "__main__":
    main()
