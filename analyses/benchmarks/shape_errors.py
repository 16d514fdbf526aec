"""How often is the label of a curve wrong? Planted curves with 12 topics, 30 layers and AR(1) 0.8 noise over layers.

Heights are peak to trough in between-topic standard deviations at a layer. `--real` adds curves of a model's activations
whose labels were shuffled within topics: whatever shape they show is noise.
"""

import argparse
from dataclasses import replace

import numpy as np

import lens_affect as la

TOPICS, LAYERS, RESAMPLES = 12, 30, 1000
DEPTH = (np.arange(LAYERS) + 1) / LAYERS
SHAPES = {
    "flat": (0 * DEPTH, (0.0,)),
    "parabola": (4 * (DEPTH - 0.5) ** 2, (1.0, 1.5, 2.0)),
    "V": (2 * np.abs(DEPTH - 0.5), (1.0, 1.5, 2.0)),
    "V, lowest at 0.7": (np.where(DEPTH < 0.7, (0.7 - DEPTH) / 0.7, (DEPTH - 0.7) / 0.3), (1.0, 1.5, 2.0)),
    "rising": (DEPTH, (1.5, 4.0)),
    "rising, then level": (np.minimum(1, 2 * DEPTH), (1.5, 4.0)),
    "level, then rising": (np.maximum(0, 2 * DEPTH - 1), (1.5, 4.0)),
}


def noise(rng: np.random.Generator) -> np.ndarray:
    """`[topic, layer]`, standard deviation 1 at every layer, correlation 0.8 between neighbours."""
    steps = rng.standard_normal((TOPICS, LAYERS))
    for layer in range(1, LAYERS):
        steps[:, layer] = 0.8 * steps[:, layer - 1] + 0.6 * steps[:, layer]
    return steps


def planted(curve: np.ndarray, n_curves: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of curves that get each label."""
    found = []
    for _ in range(n_curves):
        topics = curve + noise(rng)
        resampled = topics[rng.integers(0, TOPICS, (RESAMPLES, TOPICS))].mean(1)
        found.append(la.curve_shape(DEPTH, resampled, better="low", n_groups=TOPICS).label)
    return {label: found.count(label) / n_curves for label in dict.fromkeys(found)}


def shuffled(model: str, n_curves: int, rng: np.random.Generator) -> dict[str, float]:
    """Labels of curves of real activations with labels shuffled within topics."""
    passages = la.load_stimuli("passages")
    activations = la.extract_activations(la.load_model(model), passages, pooling="mean_without_sinks")
    found = []
    for draw in range(n_curves):
        emotions = np.array(passages.emotions, dtype=object)
        for topic in set(passages.groups):
            here = np.array([g == topic and e != "neutral" for g, e in zip(passages.groups, emotions, strict=True)])
            emotions[here] = rng.permutation(emotions[here])
        mixed = replace(activations, stimuli=replace(passages, emotions=tuple(emotions)))
        found.append(la.localize(mixed, n_permutations=99, seed=draw).shape().label)
    return {label: found.count(label) / n_curves for label in dict.fromkeys(found)}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--curves", type=int, default=1000)
    options.add_argument("--real", metavar="MODEL", help="also shuffle the labels of this model's activations")
    options.add_argument("--shuffles", type=int, default=200)
    chosen = options.parse_args()
    for name, (curve, heights) in SHAPES.items():
        for height in heights:
            rates = planted(height * curve, chosen.curves, np.random.default_rng(0))
            print(f"{name:20s} height {height:.1f}: " + ", ".join(f"{k} {v:.3f}" for k, v in rates.items()), flush=True)
    if chosen.real:
        rates = shuffled(chosen.real, chosen.shuffles, np.random.default_rng(0))
        print(f"shuffled labels of {chosen.real}: " + ", ".join(f"{k} {v:.3f}" for k, v in rates.items()))


if __name__ == "__main__":
    main()
