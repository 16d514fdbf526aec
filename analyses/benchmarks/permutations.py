"""How fast are permutation nulls? 1,000 relabellings x 30 layers x 20 emotions x 276 texts at d = 576, against scikit-learn.

scikit-learn's permutation_test_score does the same work for one layer and few relabellings (leave-one-topic-out nearest
centroid, labels shuffled within topics); its time is scaled to one relabelling of one layer.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from sklearn.model_selection import LeaveOneGroupOut, permutation_test_score
from sklearn.neighbors import NearestCentroid

import lens_affect as la


def planted(n_layers: int, texts: la.Stimuli, width: int) -> la.Activations:
    """Random activations with a little signal; the time does not depend on it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(texts), n_layers, width, generator=generator)
    for i, emotion in enumerate(texts.emotions):
        values[i, :, hash(emotion) % width] += 1.0
    return la.Activations(
        arrays={"resid_post": values},
        squares={},
        counts=torch.ones(len(texts), dtype=torch.long),
        layers=tuple(range(n_layers)),
        embedding={},
        stimuli=texts,
        n_layers=n_layers,
        pooling="mean",
        texts_with_sinks={"resid_post": torch.zeros(n_layers, dtype=torch.long)},
        provenance=la.Provenance(model="planted", numerics="hf"),
    )


def seconds(work, rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--permutations", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    passages = la.load_stimuli("passages")

    whole = planted(30, passages, 576)
    ours = seconds(lambda: la.localize(whole, n_permutations=chosen.permutations), chosen.rounds)
    print(
        f"localize, nearest_mean: {chosen.permutations} relabellings, 30 layers, 276 texts, d = 576: {ours:.1f} s (median of {chosen.rounds})"
    )

    emotional = [i for i, e in enumerate(passages.emotions) if e != "neutral"]
    x = whole.values[emotional, 0].numpy()
    y, groups = np.array(passages.emotions)[emotional], np.array(passages.groups)[emotional]
    few = 5
    theirs = seconds(
        lambda: permutation_test_score(
            NearestCentroid(), x, y, groups=groups, cv=LeaveOneGroupOut(), n_permutations=few
        ),
        chosen.rounds,
    ) / (few + 1)
    own = ours / (30 * (chosen.permutations + 1))
    print(
        f"one relabelling of one layer: scikit-learn {1e3 * theirs:.1f} ms, here {1e3 * own:.2f} ms: {theirs / own:.0f} times faster"
    )

    half = seconds(lambda: la.localize(planted(15, passages, 576), n_permutations=chosen.permutations), chosen.rounds)
    print(f"half the layers take {half / ours:.2f} of the time")
    for name in ("dprime", "valence", "mean_cosine_neutral"):
        took = seconds(lambda s=name: la.localize(whole, score=s, n_permutations=chosen.permutations), 1)
        print(f"localize, {name}: {took:.1f} s")


if __name__ == "__main__":
    main()
