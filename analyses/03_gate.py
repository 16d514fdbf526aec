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
import logging
import os
import sys
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

logging.basicConfig(stream=sys.stdout, format="%(message)s")  # warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # a few pairs and layers of one model: what the tests run
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")[: 1 if QUICK else 2]
# Every n-th pair, for time: 42, 42 and 21 for SmolLM2; 28, 21 and 21 for Gemma. All 12 topics are among the affective ones.
EVERY = {
    "smollm2-135m-instruct": {"affect": 4, "number": 2, "tense": 4},
    "gemma-3-270m": {"affect": 6, "number": 4, "tense": 4},
}
pio.renderers.default = "json" if QUICK else "png"


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


def loaded(name):
    """A model, loaded once."""
    if name not in models:
        models[name] = la.load_model(name, dtype="float32")
    return models[name]


def patched(name, kind, *, positions, every, controls):
    """A map of one model and set of pairs, made once."""
    folder = RUNS / "patching" / f"{name}-{kind}-{positions}"
    if not (folder / "manifest.json").is_file():
        pairs = la.load_pairs(kind)
        pairs = pairs.select(range(0, len(pairs), every))
        layers = [10, 20] if QUICK else None
        found = la.patch_sites(loaded(name), pairs, positions=positions, layers=layers, controls=controls)
        found.save(folder)
    return la.PatchingMap.load(folder)


# %%
models = {}
maps = {
    (name, kind): patched(
        name,
        kind,
        positions="all",
        every=20 if QUICK else EVERY[name][kind],
        controls=("random", "rank8") if (name, kind) == (MODELS[0], "affect") and not QUICK else ("random",),
    )
    for name in MODELS
    for kind in (("affect",) if QUICK else ("affect", "number", "tense"))
}
for found in maps.values():
    print(found, end="\n\n")

# %% [markdown]
# ## The gate beside its siblings
#
# 0: the patch moves nothing, 1: it restores the other text's next word. Bands: 95 % over topics; dotted: a random direction as long as the
# difference. `attn_out` stands for `z` and `o`, `mlp_out` for `act` and `down`, which carry the same patch.

# %%
for (name, kind), found in maps.items():
    if kind == "affect":
        save(la.plot_siblings(found), f"gate_siblings_{name}", found).show()

# %%
for (name, kind), found in maps.items():
    if kind == "affect":
        save(la.plot_siblings(found, per_change=True), f"gate_siblings_per_change_{name}", found).show()

# %%
for (name, kind), found in maps.items():
    save(la.plot_patching(found), f"gate_map_{kind}_{name}", found)
    if kind == "affect":
        la.plot_patching(found).show()

# %% [markdown]
# ## Gate against up, and against attention

# %%
rows = []
for (name, kind), found in maps.items():
    for rival in ("up", "attn_out"):
        for per_change in (False, True):
            mean = found.compare("gate", rival, per_change=per_change).iloc[-1]
            rows.append([name, kind, f"gate - {rival}", per_change, *mean[["difference", "low", "high"]]])
pd.DataFrame(rows, columns=["model", "pairs", "contrast", "per change", "mean over layers", "low", "high"]).round(3)

# %% [markdown]
# ## The verdict

# %%
verdict = la.judge_gate(
    [m for (_, kind), m in maps.items() if kind == "affect"], [m for (_, kind), m in maps.items() if kind != "affect"]
)
print(verdict)
verdict.table.round(3)

# %% [markdown]
# ## Can the gradient stand in for the patch?
#
# Attribution patching estimates every cell from one backward pass. `rho_cells`: rank correlation with the exact effects over layers;
# `rho_pairs`: over single pairs and layers.

# %%
tables = {}
for name in MODELS:
    exact = maps[name, "affect"]
    pairs = la.load_pairs("affect")
    pairs = pairs.select(range(0, len(pairs), 20 if QUICK else EVERY[name]["affect"]))
    quick = la.approximate_patches(loaded(name), pairs, sites=exact.sites, layers=exact.layers)
    tables[name] = la.agreement(exact, quick)
pd.concat(tables, names=["model"]).round(2)

# %% [markdown]
# ## Which tokens carry it: a text through the emotion vector

# %%
text = "She heard the footsteps behind her and her hands began to shake."
model = loaded(MODELS[0])
passages = la.load_stimuli("passages")
if QUICK:
    passages = passages.select(emotions=["afraid", "happy", "neutral"], groups=["train", "garden", "school"])
vectors = la.fit_vectors(la.extract_activations(model, passages, pooling="mean_without_sinks"))
layer = int(model.cfg.n_layers) // 2
parts = la.attribute_direction(model, text, vectors, "afraid", layer)
by_layer = la.projection_by_layer(model, text, vectors, "afraid")
view = la.view_tokens(by_layer, by_layer.values, start_layer=layer, title=f"afraid in {by_layer.provenance.title}")
if not QUICK:
    view.save(FIGURES / f"tokens_afraid_{MODELS[0]}.html")
print(parts)
view  # noqa: B018
