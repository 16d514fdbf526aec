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
# # Is gate_proj enough to write affect?
#
# arXiv:2601.15906 claims the gate for generation too. As in 05_modules single modules of SmolLM2-135M-Instruct are tuned at equal rank and at equal
# size, here on comments of GoEmotions after the request to write one sentence that expresses their emotion. Eight sentences for each of 27 emotions
# are then sampled and read by a classifier that never saw the model. The emotion's own name is taken out before it reads, and what has fewer
# than four different words left counts as nothing. `tune_arms.py` has made the runs; scores and learning curves of theirs are in `results`.

# %%
import os
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE / "results")) / "tuning"
pio.renderers.default = "json" if QUICK else "svg"
finished = {name: run for name, run in la.load_runs(RUNS).items() if name.startswith("writing-")}
print(f"{len(finished)} finished runs of writing")


def runs_of(kind):
    """Runs of one kind of arm, by seed."""
    found = [run for name, run in finished.items() if name.rpartition("-seed")[0] == kind]
    return sorted(found, key=lambda run: run.seed)


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


ranked = {m: runs_of(f"writing-{m}-rank4") for m in ("gate", "up", "down", "attention", "all")}
fitted = {m: runs_of(f"writing-{m}-size-of-gate-rank4") for m in ("attention", "random")}
comparisons = {
    "equal rank": ranked,
    "equal size": {m: ranked[m] for m in ("gate", "up", "down")} | fitted | {"all": ranked["all"]},
}

# %% [markdown]
# ## What each arm keeps
#
# Of the judge's probability of the emotion that was asked for.

# %%
tables = {name: la.compare_arms(runs, reference="all") for name, runs in comparisons.items()}
for name, table in tables.items():
    print(f"{name}\n{table}\n{table.contrasts.round(3).to_string(index=False)}", end="\n\n")
save(la.plot_gains(tables), "module_gains_writing", *tables.values()).show()

# %%
columns = ["arm", "n_parameters", "n_seeds", "score", "low", "high", "gain_low", "gain_high", "percent_of_tuned", "cpu_seconds"]  # fmt: skip
pd.concat({name: table.to_frame()[columns] for name, table in tables.items()}, names=["comparison"]).round(3)

# %% [markdown]
# ## How they learn

# %%
curves = la.learning_curves(ranked | {f"{m}, gate's size": runs for m, runs in fitted.items()})
save(
    la.plot_learning(curves), "module_learning_writing", la.LearningCurves(curves, tables["equal rank"].provenance)
).show()

# %% [markdown]
# ## What they write
#
# The first sentence asked for of four emotions, before tuning, with everything and with the gate alone (seed 0).

# %%
for name, scores in (("untuned", ranked["all"][0].before), ("all", ranked["all"][0].after), ("gate", ranked["gate"][0].after)):  # fmt: skip
    for i in [i for i, labels in enumerate(scores.gold) if labels[0] in ("joy", "anger", "fear", "gratitude")][:4]:
        print(f"{name}, {scores.gold[i][0]} ({scores.values[i]:.2f}): {scores.predicted[i]}")
    print()

# %% [markdown]
# ## What else the same weights change
#
# Next-token loss on texts without emotion, and sums and differences. Positive gains are better.

# %%
kinds = {m: f"writing-{m}-rank4" for m in ranked} | {f"{m}, gate's size": f"writing-{m}-size-of-gate-rank4" for m in fitted}  # fmt: skip
for task in ("neutral_text", "arithmetic"):
    folder = {m: [RUNS / f"{kind}-seed{run.seed}" / "controls" / task for run in runs_of(kind)] for m, kind in kinds.items()}  # fmt: skip
    after = {m: [la.TaskScores.load(f) for f in several] for m, several in folder.items()}
    before = la.TaskScores.load(RUNS / "base" / task)
    other = la.compare_arms({m: runs_of(k) for m, k in kinds.items()}, reference="all", after=after, before=before)
    print(f"{other.task}: {other.metric} {other.base:.3f} untuned, n = {other.n_examples}")
    print(other.to_frame()[["arm", "n_seeds", "score", "low", "high", "gain", "gain_low", "gain_high"]].round(3).to_string(index=False), end="\n\n")  # fmt: skip

# %% [markdown]
# ## Where tuning lands, and what single modules of the tuned model are worth
#
# 0 is nothing, 1 the whole gain of tuning everything. Beside it the same modules of a model tuned on topics, a task without affect.

# %%
study = la.ModuleStudy.load(RUNS / "study_writing")
print(study.landing, end="\n\n")
parts = [study.transfer, study.revert, study.random_equal_norm, study.equal_damage]
for part in (*parts, study.control_transfer, study.control_revert):
    print(part or "not measured", end="\n\n")
if any(part.to_frame()["share"].notna().any() for part in parts):
    save(la.plot_parts(parts), "module_parts_writing", *parts).show()

# %% [markdown]
# ## The claims by their rules

# %%
card = la.module_scorecard(study)
print(card, end="\n\n")
for row in card.table.to_dict("records"):
    print(f"{row['id']}, {row['source']}: {row['verdict']}. {row['note']}", end="\n\n")
card.table[["id", "source", "paper_statistic", "sound_statistic", "low", "high", "null", "n", "verdict"]].round(3)

# %% [markdown]
# ## What this supports, and what not
#
# One model of 135 million weights, one corpus, sentences of at most 24 tokens, and a judge that was trained on the same corpus as the arms: it says how
# well a sentence passes for a comment with that emotion, not how well it is written.
