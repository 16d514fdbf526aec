"""How fast is steering: against Hugging Face's generate, and a sweep in shared batches against one call per cell and per text?

Interleaved rounds of one run, ratios of medians. All ways write and score the same texts; of the slow ways only every n-th call is run and its time
multiplied, which favours them where a call warms up. What a sweep writes anew until its controls move the stream as far as the steered texts, the
slow ways are charged for at their own price per text. How much batching can bring on this machine is told by Hugging Face's generate, which is timed
with one row and with many.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lens_affect as la
from lens_affect.adapter import encode_prompt
from lens_affect.catalogue import CATALOGUE, fetch
from lens_affect.scoring import score_texts

EMOTIONS = ("happy", "sad", "afraid", "angry")
STRENGTHS = (-0.4, 0.1, 0.2, 0.4, 0.8, 1.6)


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median time of each way over rounds in turn, after one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            found = way()
            if round_number:
                taken[name].append(found)
    return {name: statistics.median(times) for name, times in taken.items()}


def generation(model: Any, vectors: Any, name: str, layer: int, rows: int, tokens: int, rounds: int) -> None:
    """Steered rows against Hugging Face's generate without steering, at the same batch size."""
    bare = AutoModelForCausalLM.from_pretrained(fetch(CATALOGUE[name]), dtype=torch.float32).eval()
    scenarios = la.load_scenarios()
    form = "chat" if model.tokenizer.chat_template else "continue"
    prompts = [scenarios.prompts(form)[i % len(scenarios)] for i in range(rows)]
    heads = [encode_prompt(model, p, form=form)[0] for p in prompts]
    width = max(map(len, heads))
    ids = torch.tensor([[0] * (width - len(h)) + list(h) for h in heads])
    mask = torch.tensor([[0] * (width - len(h)) + [1] * len(h) for h in heads])
    push = la.make_push(model, vectors, "happy", layers=layer, strength=0.2)
    settings = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 0,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
    }

    def ours() -> float:
        return seconds(
            lambda: la.generate(
                model, prompts, interventions=push.interventions(), max_new_tokens=tokens, stop=[], form=form
            )
        )

    def theirs() -> float:
        return seconds(lambda: bare.generate(ids, attention_mask=mask, pad_token_id=0, **settings))

    def theirs_alone() -> float:
        short = heads[0]
        return seconds(lambda: bare.generate(torch.tensor([list(short)]), pad_token_id=0, **settings))

    found = interleaved({"ours": ours, "theirs": theirs, "alone": theirs_alone}, rounds)
    print(
        f"Hugging Face generate makes {rows * found['alone'] / found['theirs']:.2f} times as many tokens per second with {rows} rows as with one: what batches can "
        "bring on this machine",
        flush=True,
    )
    print(
        f"steered generation, {rows} rows of {len(set(prompts))} prompts: {rows * tokens / found['ours']:.1f} tokens/s, {found['theirs'] / found['ours']:.2f} of "
        "Hugging Face generate without steering (never booted)",
        flush=True,
    )


def sweep(model: Any, vectors: Any, layer: int, tokens: int, rounds: int, every: int) -> None:
    """4 emotions x 6 strengths x 10 prompts with random directions: shared batches, one call per cell, one call per text."""
    scenarios = la.load_scenarios("neutral")
    scenarios = scenarios.select(rows=range(10))
    form = "chat" if model.tokenizer.chat_template else "continue"
    prompts = scenarios.prompts(form)
    cells: list[Any] = [(e, s) for e in EMOTIONS for s in STRENGTHS]
    # Random directions cost what an emotion's own do; the two samples without steering are cells without a push.
    cells += [("calm", s) for s in STRENGTHS] + [None, None]

    def written(texts: list[str], cell: Any) -> None:
        changes = (
            ()
            if cell is None
            else la.make_push(model, vectors, cell[0], layers=layer, strength=cell[1]).interventions()
        )
        found = la.generate(
            model, texts, interventions=changes, max_new_tokens=tokens, form=form, row_seeds=list(texts)
        )
        score_texts(model, [encode_prompt(model, t, form=form)[0] for t in texts], found.tokens, interventions=changes)

    written_in_all = [0]

    def note(done: int, total: int) -> None:
        written_in_all[0] = done

    def shared() -> float:
        options = {"emotions": list(EMOTIONS), "layers": layer, "strengths": STRENGTHS, "n_tokens": tokens}
        return seconds(lambda: la.sweep_strengths(model, vectors, scenarios, progress=note, **options))

    def per_cell() -> float:
        some = cells[:: max(1, every // 4)]
        return seconds(lambda: [written(list(prompts), cell) for cell in some]) * len(cells) / len(some)

    def per_text() -> float:
        calls = [([p], cell) for cell in cells for p in prompts]
        some = calls[::every]
        return seconds(lambda: [written(*call) for call in some]) * len(calls) / len(some)

    found = interleaved({"shared": shared, "cell": per_cell, "text": per_text}, rounds)
    n = len(cells) * len(prompts)
    charged = written_in_all[0] / n
    print(
        f"sweep of {len(EMOTIONS)} emotions x {len(STRENGTHS)} strengths x {len(prompts)} prompts with random directions, {n} texts of up to "
        f"{tokens} tokens and {written_in_all[0] - n} written anew: {found['shared']:.1f} s; one call per emotion and strength takes "
        f"{charged * found['cell'] / found['shared']:.2f} times as long, one per text {charged * found['text'] / found['shared']:.2f} times",
        flush=True,
    )


def main() -> None:
    """Print the ratios."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--layer", type=int, default=14)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--every", type=int, default=16, help="of the calls per text, how many are run")
    chosen = options.parse_args()
    model = la.load_model(chosen.model, dtype=torch.float32)
    passages = la.load_stimuli("passages").select(groups=["train", "garden", "school"])
    vectors = la.fit_vectors(la.extract_activations(model, passages))
    generation(model, vectors, chosen.model, chosen.layer, chosen.rows, chosen.tokens, chosen.rounds)
    sweep(model, vectors, chosen.layer, chosen.tokens, chosen.rounds, chosen.every)


if __name__ == "__main__":
    main()
