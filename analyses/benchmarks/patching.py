"""How much faster are replayed patches than the host library's? Ratios of medians from interleaved rounds of one run.

32 pairs of about 20 tokens that differ in one word, padded in one batch. (a) lens_affect's replay, (b) the host library's
generic_activation_patch with the 32 pairs in its batch, (c) the same with one pair at a time. One cell is a site at a layer
and a position; positions are the last, all from the first differing one on, or each of these alone. Layers are spread so that
their mean is the mean of all layers. A host cell costs the same whatever its layer and position, so some are timed and
multiplied by the number that is needed; the replay runs all its cells.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from transformer_lens.patching import generic_activation_patch

import lens_affect as la
from lens_affect.adapter import encode, pad_right, pad_token_id
from lens_affect.recording import record
from lens_affect.replay import Patch, Replay
from lens_affect.sites import resolve_site

FRAMES = (
    "When the {} opened the letter from the hospital at breakfast, the whole family could see that the news was",
    "The old {} by the window kept looking at the photograph all afternoon and everybody felt a little",
    "My neighbour told me that the {} had come back last night, and since then she has been feeling",
    "Nobody had expected the {} to arrive at the station before noon, so the people on the platform were",
    "On that evening we heard about the {} on the radio, and in a moment the whole room became",
    "He read the message about the {} twice after the long meeting, went home alone and suddenly felt very",
    "She bought the {} in the little shop on the corner, walked home through the rain and was",
    "Before the manager finally spoke about the {} we had been waiting for months, and everyone in the office seemed",
)
WORDS = (("doctor", "teacher"), ("brother", "soldier"), ("letter", "garden"), ("winner", "storm"), ("music", "fire"))
"""Single tokens after a space; four of the five swaps are used for each frame."""
ANSWERS = (" happy", " sad")


def make_pairs(model, n: int) -> list[tuple]:
    """Clean and corrupted text as tokens, of equal length."""
    pairs = []
    for number, frame in enumerate(FRAMES * len(WORDS)):
        words = WORDS[(number // len(FRAMES) + number) % len(WORDS)]
        clean, corrupted = (encode(model, frame.format(word)) for word in words)
        if len(clean.ids) == len(corrupted.ids):
            pairs.append((clean, corrupted))
    if len(pairs) < n:
        raise SystemExit(f"only {len(pairs)} pairs have equal length; {n} were asked for")
    return pairs[:n]


class Case:
    """The pairs, recorded, with the cells of one position mode."""

    def __init__(self, model, pairs: list[tuple], site: str, layers: list[int], mode: str) -> None:
        self.model, self.pairs, self.layers, self.mode = model, pairs, layers, mode
        self.tokens, self.mask = pad_right(
            [c for c, _ in pairs] + [k for _, k in pairs], pad_token_id(model), torch.device("cpu")
        )
        self.lengths = self.mask.sum(1).tolist()
        self.first = [next(i for i, (a, b) in enumerate(zip(c.ids, k.ids, strict=True)) if a != b) for c, k in pairs]
        self.hook = resolve_site(model, site)
        self.answers = [model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ANSWERS]
        self.caches: dict = {}
        n = len(pairs)
        self.patches = [
            Patch(site, layer, pair + n, pair, first, last)
            for layer in layers
            for pair in range(n)
            for first, last in self.spans(pair)
        ]

    def spans(self, pair: int) -> list[tuple[int, int]]:
        first, last = self.first[pair], self.lengths[pair] - 1
        if self.mode == "last":
            return [(last, last)]
        return [(first, last)] if self.mode == "all" else [(p, p) for p in range(first, last + 1)]

    def host_cells(self, pairs: list[int]) -> int:
        """Forward passes that the host library needs for these pairs in one batch."""
        if self.mode != "each":
            return len(self.layers)
        positions = range(min(self.first[p] for p in pairs), max(self.lengths[p] for p in pairs))
        return len(self.layers) * len(positions)

    def cache_of(self, pairs: list[int], cells: list[tuple[int, int]]):
        """The host library's clean run: made once per sweep, so its time is not counted, as that of `record` is not."""
        names = {self.hook.at(layer) for layer, _ in cells}
        key = (*pairs, *sorted(names))
        if key not in self.caches:
            clean = self.tokens[pairs, : max(self.lengths[p] for p in pairs)]
            self.caches[key] = self.model.run_with_cache(clean, names_filter=lambda name: name in names)[1]
        return self.caches[key]

    def replay(self, replay: Replay) -> torch.Tensor:
        return replay.run(self.patches, measure=lambda o: o.output[:, 0] - o.output[:, 1])

    def host(self, pairs: list[int], cells: list[tuple[int, int]], kept: list | None = None) -> None:
        """Patch cells (layer, position) with the host library; in the modes `last` and `all` the position is of no account."""
        width = max(self.lengths[p] for p in pairs)
        corrupted = self.tokens[[p + len(self.pairs) for p in pairs], :width]
        rows, good, bad = torch.arange(len(pairs)), *self.answers
        last = torch.tensor([self.lengths[p] - 1 for p in pairs])
        columns = torch.arange(width)
        # the setter writes where this is true; each pair's own positions, as in the replay
        where = columns >= torch.tensor([self.first[p] for p in pairs])[:, None]
        where = columns == last[:, None] if self.mode == "last" else where & (columns <= last[:, None])

        def setter(activation, index, source):
            chosen = where & (columns == index[1]) if self.mode == "each" else where
            return torch.where(chosen.reshape(*chosen.shape, *[1] * (activation.ndim - 2)), source, activation)

        def metric(logits):
            if kept is not None:
                kept.append(logits[rows, last])
            return logits[rows, last, good] - logits[rows, last, bad]

        generic_activation_patch(
            self.model,
            corrupted,
            self.cache_of(pairs, cells),
            metric,
            setter,
            self.hook.hook.removeprefix("mlp.hook_").removeprefix("attn.hook_").removeprefix("hook_"),
            index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
            reduce="none",
        )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(model, pairs: list[tuple], chosen: argparse.Namespace, mode: str) -> None:
    n_layers, n_spread = int(model.cfg.n_layers), chosen.layers if mode != "each" else max(1, chosen.layers // 3)
    layers = [int(n_layers * (i + 0.5) / n_spread) for i in range(n_spread)]
    case = Case(model, pairs, chosen.site, layers, mode)
    recording = record(model, case.tokens, case.mask)
    # as patch_sites does: only the compared words are unembedded
    replay = Replay(model, recording, sites=[chosen.site], tokens=case.answers)
    whole = Replay(model, recording, sites=[chosen.site])
    everyone = list(range(len(pairs)))
    alone = everyone[:: max(1, len(pairs) // chosen.alone)]
    middle = int(statistics.median(case.first)) + 2
    batch_cells, alone_cells = [(layers[0], middle), (layers[-1], middle)], [(layers[len(layers) // 2], middle)]

    taken: dict[str, list[float]] = {"replay": [], "batch": [], "alone": []}
    case.replay(replay)  # warm up
    case.host(everyone, batch_cells)
    for pair in alone:
        case.host([pair], alone_cells)
    for _ in range(chosen.rounds):
        taken["batch"].append(seconds(lambda: case.host(everyone, batch_cells)) / len(batch_cells))
        taken["replay"].append(seconds(lambda: case.replay(replay)))
        taken["alone"].append(seconds(lambda: [case.host([p], alone_cells) for p in alone]) / len(alone))
    median = {name: statistics.median(times) for name, times in taken.items()}
    batch = median["batch"] * case.host_cells(everyone)
    one_by_one = median["alone"] * sum(case.host_cells([p]) for p in everyone)
    print(
        f"{mode:5s} {len(case.patches):5d} patches at layers {layers}: replay {median['replay']:.2f} s (way: {replay.way}); "
        f"host, {len(pairs)} pairs in a batch {batch:.1f} s, one pair at a time {one_by_one:.1f} s"
    )
    print(
        f"      {batch / median['replay']:.1f}x against the batch, {one_by_one / median['replay']:.1f}x against one pair at a time; "
        f"largest difference of a logit {difference(case, whole, everyone, batch_cells):.1e}"
    )


def difference(case: Case, replay: Replay, pairs: list[int], cells: list[tuple[int, int]]) -> float:
    """Largest difference between the last logits of both, over the host's timed cells."""
    kept: list[torch.Tensor] = []
    case.host(pairs, cells, kept)
    worst = 0.0
    for (layer, position), logits in zip(cells, kept, strict=True):
        ours = [p for p in case.patches if p.layer == layer and (case.mode != "each" or p.first == position)]
        found = replay.run(ours)
        worst = max(worst, float((found - logits[[p.source for p in ours]]).abs().max()))
    return worst


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--site", default="gate")
    options.add_argument("--pairs", type=int, default=32)
    options.add_argument("--layers", type=int, default=6, help="layers in the sample; a third of them for `each`")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--alone", type=int, default=4, help="pairs timed one at a time")
    options.add_argument("--modes", nargs="+", default=["last", "each", "all"])
    chosen = options.parse_args()
    model = la.load_model(chosen.model, dtype=torch.float32)
    pairs = make_pairs(model, chosen.pairs)
    lengths = [len(clean.ids) for clean, _ in pairs]
    firsts = [next(i for i, (a, b) in enumerate(zip(c.ids, k.ids, strict=True)) if a != b) for c, k in pairs]
    print(
        f"{chosen.model}, {chosen.site}: {len(pairs)} pairs of {min(lengths)} to {max(lengths)} tokens, "
        f"{torch.get_num_threads()} threads, {chosen.rounds} rounds; first differing positions {sorted(set(firsts))}"
    )
    with torch.no_grad():
        for mode in chosen.modes:
            compare(model, pairs, chosen, mode)


if __name__ == "__main__":
    main()
