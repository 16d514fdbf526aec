# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is the gate special? Activation patching of gate_proj against its siblings
#
# arXiv:2601.15906 says that affect lands in the feed-forward gating projection, not in attention. Here its activation is taken from a text
# whose situation ends well (or badly) and put into the same text with the other outcome, and the same is done with its siblings. The gate
# counts as special only if it moves more than `up` (same width, same input) and more than attention, at equal change of the residual stream
# too, in both models, and not in the same way for pairs without any affect. Maps are saved, so a second start repeats none.

# %%
import os
from pathlib import Path

import plotly.io as pio

import lens_affect as la

QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # a few pairs and layers of one model: what the tests run
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")[: 1 if QUICK else 2]
EVERY = {"affect": 4, "number": 2, "tense": 2}  # 42 pairs of each set: what two cores do in an hour
pio.renderers.default = "json" if QUICK else "png"


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


def patched(name, kind, *, positions, every, controls):
    """A map of one model and set of pairs, made once."""
    folder = RUNS / "patching" / f"{name}-{kind}-{positions}"
    if not (folder / "manifest.json").is_file():
        if name not in models:
            models[name] = la.load_model(name, dtype="float32")
        pairs = la.load_pairs(kind)
        pairs = pairs.select(range(0, len(pairs), every))
        layers = [0, 10, 20] if QUICK else None
        found = la.patch_sites(models[name], pairs, positions=positions, layers=layers, controls=controls)
        found.save(folder)
    return la.PatchingMap.load(folder)


# %%
models = {}
maps = {
    (name, kind): patched(
        name,
        kind,
        positions="all",
        every=20 if QUICK else EVERY[kind],
        controls=("random", "rank8") if kind == "affect" and not QUICK else ("random",),
    )
    for name in MODELS
    for kind in (("affect",) if QUICK else ("affect", "number", "tense"))
}
for found in maps.values():
    print(found, end="\n\n")
