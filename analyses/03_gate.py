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

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))  # our warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # a few pairs and layers of one model: what the tests run
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")[: 1 if QUICK else 2]
READ = {"smollm2-135m-instruct": 24, "gemma-3-270m": 14}  # depth 0.83: behind the best layers, before the last ones
CONTROLS = ("random", "topic", "other_emotion", "rank8", "rank32")
# Name -> pairs, how many of them (for time; as many of each topic and side), and what is asked of them.
MAPS = {
    "affect, last": ("affect", 48, {"positions": "last", "controls": CONTROLS}),
    "number, last": ("number", 24, {"positions": "last", "controls": ("random", "rank8")}),
    "tense, last": ("tense", 24, {"positions": "last", "controls": ("random", "rank8")}),
    "affect, all": ("affect", 36, {"positions": "all"}),
    "number, all": ("number", 24, {"positions": "all"}),
    "tense, all": ("tense", 24, {"positions": "all"}),
    "affect, projection": ("affect", 12, {"positions": "all", "metric": "projection"}),
    "affect, each": ("affect", 12, {"positions": "each", "sites": ("gate", "attn_out"), "controls": ()}),
}
if QUICK:
    small = {"layers": [20, 23], "controls": ("random",), "sites": ("gate", "up", "attn_out")}
    MAPS = {
        "affect, last": ("affect", 12, {"positions": "last", **small}),
        "affect, all": ("affect", 6, {"positions": "all", **small}),
        "affect, projection": ("affect", 3, {"metric": "projection", **small, "sites": ("gate", "up")}),
        "affect, each": ("affect", 3, {"positions": "each", **small, "sites": ("gate", "attn_out"), "layers": [20]}),
    }
pio.renderers.default = "json" if QUICK else "svg"


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


def emotion_vectors(name):
    """Emotion vectors of a model from our passages, fitted once."""
    if name not in vectors:
        passages = la.load_stimuli("passages")
        if QUICK:
            passages = passages.select(groups=["train", "garden"])
        activations = la.extract_activations(loaded(name), passages, pooling="mean_without_sinks")
        vectors[name] = la.fit_vectors(activations)
    return vectors[name]


def patched(model, name):
    """A map of one model, made once."""
    folder = RUNS / "patching" / model / name.replace(", ", "-")
    if not (folder / "manifest.json").is_file():
        kind, n, asked = MAPS[name]
        if asked.get("metric") == "projection":
            asked = {**asked, "vectors": emotion_vectors(model), "read_layer": READ[model]}
        la.patch_sites(loaded(model), la.load_pairs(kind).sample(n), **asked).save(folder)
    return la.PatchingMap.load(folder)


# %%
models, vectors = {}, {}
maps = {(model, name): patched(model, name) for model in MODELS for name in MAPS}
for found in maps.values():
    print(found, end="\n\n")

# %% [markdown]
# ## The gate beside its siblings
#
# 0: the patch moves nothing, 1: it restores the other text's next word. Bands: 95 % over topics; dotted: a random direction as long as the
# difference. `attn_out` stands for `z` and `o`, `mlp_out` for `act` and `down`, which carry the same patch.

# %%
for model in MODELS:
    found = maps[model, "affect, all"]
    save(la.plot_siblings(found), f"gate_siblings_{model}", found).show()
    save(la.plot_siblings(found, per_change=True), f"gate_siblings_per_change_{model}", found).show()

# %%
for (model, name), found in maps.items():
    if name.endswith("all"):
        save(la.plot_patching(found), f"gate_map_{name.split(',')[0]}_{model}", found)
    if name == "affect, all":
        la.plot_patching(found).show()

# %% [markdown]
# ## The last position only, with every control
#
# One row per donor. `topic`: another text on the same topic with the emotion of the text that runs; `other_emotion`: a third emotion; `rank8` and
# `rank32`: the difference held to its principal directions in other topics, so that no site gains by its width.

# %%
rows = []
for model in MODELS:
    found = maps[model, "affect, last"]
    for donor in ("counterpart", *found.controls):
        effects = found.normalized(donor=donor)[0][:, :, 0]
        for site in ("gate", "up", "mlp_out", "attn_out"):
            if site in found.sites:
                of_site = effects[found.sites.index(site)]
                rows.append([model, donor, site, of_site.mean(), of_site.max(), found.layers[of_site.argmax()]])
table = pd.DataFrame(rows, columns=["model", "donor", "site", "mean over layers", "largest", "at layer"])
table.pivot(index=["model", "donor"], columns="site", values=["mean over layers", "largest"]).round(3)

# %%
for model in MODELS:
    found = maps[model, "affect, last"]
    save(la.plot_siblings(found), f"gate_siblings_last_{model}", found).show()

# %% [markdown]
# ## Each position by itself
#
# Where in the text a patch of the gate, and of attention, moves the next word.

# %%
for model in MODELS:
    found = maps[model, "affect, each"]
    for site in ("gate", "attn_out"):
        save(la.plot_positions(found, site), f"gate_positions_{site}_{model}", found).show()

# %% [markdown]
# ## The emotion vector instead of the next word
#
# The same patches, measured by the projection of the residual stream of a later layer on the clean emotion's vector minus that on the
# corrupted emotion's.

# %%
for model in MODELS:
    found = maps[model, "affect, projection"]
    sites = [s for s in ("gate", "up", "attn_out", "mlp_out") if s in found.sites]
    save(la.plot_siblings(found, sites=sites), f"gate_projection_{model}", found).show()

# %% [markdown]
# ## Gate against up, and against attention

# %%
rows = []
for (model, name), found in maps.items():
    for rival in ("up", "attn_out"):
        if len(found.positions) == 1 and rival in found.sites:
            for per_change in (False, True):
                mean = found.compare("gate", rival, per_change=per_change).iloc[-1]
                rows.append([model, name, f"gate - {rival}", per_change, *mean[["difference", "low", "high"]]])
pd.DataFrame(rows, columns=["model", "map", "contrast", "per change", "mean over layers", "low", "high"]).round(3)

# %% [markdown]
# ## The verdict

# %%
verdicts = {}
for place in ("all", "last"):
    of_place = {key: found for key, found in maps.items() if key[1].endswith(place)}
    affective = [found for (_, name), found in of_place.items() if name.startswith("affect")]
    others = [found for (_, name), found in of_place.items() if not name.startswith("affect")]
    verdicts[place] = la.judge_gate(affective, others)
    print(f"positions {place}: {verdicts[place]}", end="\n\n")
verdicts["all"].table.round(3)

# %% [markdown]
# ## Can the gradient stand in for the patch?
#
# Attribution patching estimates every cell from one backward pass. `rho_cells`: rank correlation with the exact effects over layers;
# `rho_pairs`: over single pairs and layers.

# %%
tables = {}
for model in MODELS:
    for place in ("all", "last"):
        kind, n, _ = MAPS[f"affect, {place}"]
        exact = maps[model, f"affect, {place}"]
        quick = la.approximate_patches(
            loaded(model), la.load_pairs(kind).sample(n), sites=exact.sites, layers=exact.layers, positions=place
        )
        tables[model, place] = la.agreement(exact, quick)
pd.concat(tables, names=["model", "positions"]).round(2)

# %% [markdown]
# ## Which tokens carry it: a text through the emotion vector

# %%
text = "She heard the footsteps behind her and her hands began to shake."
model, of_model = loaded(MODELS[0]), emotion_vectors(MODELS[0])
layer = int(model.cfg.n_layers) // 2
parts = la.attribute_direction(model, text, of_model, "afraid", layer)
by_layer = la.projection_by_layer(model, text, of_model, "afraid")
view = la.view_tokens(by_layer, by_layer.values, start_layer=layer, title=f"afraid in {by_layer.provenance.title}")
if not QUICK:
    view.save(FIGURES / f"tokens_afraid_{MODELS[0]}.html")
print(parts)
view  # noqa: B018
