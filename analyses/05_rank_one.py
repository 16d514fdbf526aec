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
# # Is the gate special where single modules do not reach the ceiling?
#
# At rank 4 every arm of 05_modules keeps nearly the whole gain of tuning everything, and arms that stand at one ceiling cannot differ. Here the same
# task (27 emotions of GoEmotions, SmolLM2-135M-Instruct, LoRA) at rank 1, the smallest there is, with scores along the way: an arm that needs fewer
# steps or weights shows it here. `tune_arms.py rank1` has made the runs; scores and learning curves of theirs are in `results`.

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
finished = {name: run for name, run in la.load_runs(RUNS).items() if "-rank1-" in name}
print(f"{len(finished)} finished runs at rank 1")


def runs_of(kind):
    """Runs of one kind of arm, by seed."""
    found = [run for name, run in finished.items() if name.rpartition("-seed")[0] == kind]
    return sorted(found, key=lambda run: run.seed)


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


ranked = {m: runs_of(f"goemotions-{m}-rank1") for m in ("gate", "up", "down", "attention", "all")}
fitted = {m: runs_of(f"goemotions-{m}-size-of-gate-rank1") for m in ("attention", "random")}
comparisons = {
    "equal rank": ranked,
    "equal size": {m: ranked[m] for m in ("gate", "up", "down")} | fitted | {"all": ranked["all"]},
    "rate / 4": {"attention": runs_of("goemotions-attention-rank1-rate0.008"), "all": ranked["all"]},
}

# %% [markdown]
# ## What each arm keeps
#
# The rule that chooses learning rates took 0.032 for attention at rank 1 (validation loss 2.47, against 2.52 at 0.008), and all three seeds came apart
# after its few steps. That arm stays in the table as the rule has it, beside the same one at a quarter of the rate.

# %%
tables = {name: la.compare_arms(runs, reference="all") for name, runs in comparisons.items()}
for name, table in tables.items():
    print(f"{name}\n{table}\n{table.contrasts.round(3).to_string(index=False)}", end="\n\n")
if any(table.arms["retention"].notna().any() for table in tables.values()):
    gate = tables["equal size"].contrasts.query("arm == 'gate' and other != 'all'")
    above = ", ".join(gate["other"][gate["low"] > 0]) or "none"
    kept = tables["equal size"].to_frame().set_index("arm")["retention"]["gate"]
    title = f"{tables['equal size'].provenance.title}, rank 1: the gate keeps {kept:.2f} of the gain; of {len(gate)} arms of its size<br>it is shown to be above: {above} (95 %, not corrected for {len(gate)} comparisons)"
    save(la.plot_retention(tables, title=title), "module_retention_rank1", *tables.values()).show()

# %%
columns = ["arm", "n_parameters", "share_of_parameters", "n_seeds", "score", "low", "high", "retention", "retention_low", "retention_high", "percent_of_tuned"]  # fmt: skip
pd.concat({name: table.to_frame()[columns] for name, table in tables.items()}, names=["comparison"]).round(3)

# %% [markdown]
# ## The claim of efficiency by its rule
#
# No task without affect was learned at rank 1, and without one the rule never says that the claim holds; it can say that it does not.

# %%
for name in ("equal rank", "equal size"):
    row = la.judge_efficiency(tables[name], source=f"{name}, rank 1")
    print(f"{row['id']}, {row['source']}: {row['verdict']}. {row['note']}", end="\n\n")

# %% [markdown]
# ## How they learn
#
# Where an arm is early on says more than where it ends.

# %%
curves = la.learning_curves(ranked | {f"{m}, gate's size": runs for m, runs in fitted.items()} | {"attention, rate / 4": comparisons["rate / 4"]["attention"]})  # fmt: skip
print(curves.round(3).to_string(index=False))
save(
    la.plot_learning(curves), "module_learning_rank1", la.LearningCurves(curves, tables["equal rank"].provenance)
).show()

# %% [markdown]
# ## What the same weights do to language and arithmetic
#
# Next-token loss on texts without emotion, and sums and differences. Positive gains are better.

# %%
kinds = {m: f"goemotions-{m}-rank1" for m in ranked} | {f"{m}, gate's size": f"goemotions-{m}-size-of-gate-rank1" for m in fitted}  # fmt: skip
kinds["attention, rate / 4"] = "goemotions-attention-rank1-rate0.008"
for task in ("neutral_text", "arithmetic"):
    folders = {m: [RUNS / f"{kind}-seed{run.seed}" / "controls" / task for run in runs_of(kind)] for m, kind in kinds.items()}  # fmt: skip
    after = {m: [la.TaskScores.load(f) for f in several] for m, several in folders.items()}
    before = la.TaskScores.load(RUNS / "base" / task)
    other = la.compare_arms({m: runs_of(k) for m, k in kinds.items()}, reference="all", after=after, before=before)
    print(f"{other.task}: {other.metric} {other.base:.3f} untuned, n = {other.n_examples}")
    print(other.to_frame()[["arm", "n_seeds", "score", "low", "high", "gain", "gain_low", "gain_high"]].round(3).to_string(index=False), end="\n\n")  # fmt: skip

# %% [markdown]
# ## What this supports, and what not
#
# One model of 135 million weights and one corpus; three seeds. It compares what single modules learn at the smallest rank, not where affect is represented.
