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
# # Is gate_proj enough? Tuning single modules at equal rank and at equal size
#
# arXiv:2601.15906 tunes gate_proj alone and reports 96.6 % of the score of the fully tuned model with 24.5 % of its parameters. Three things decide
# what such a number means: what the untuned model scores (a percentage of a score is high for an arm that learned nothing where the base is good),
# what `up` and `down` reach, which cost exactly as much, and what attention reaches with as many weights. Here SmolLM2-135M-Instruct learns the 27
# emotions of GoEmotions through LoRA. The runs are made by `tune_arms.py` (hours); this page reads what is finished.

# %%
import logging
import os
import sys
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs")) / "tuning"
MODULES = ("gate", "up", "down", "attention")
pio.renderers.default = "json" if QUICK else "svg"
finished = la.load_runs(RUNS)
print(f"{len(finished)} finished runs")


def runs_of(kind):
    """Runs of one kind of arm, by seed."""
    found = [run for name, run in finished.items() if name.rpartition("-seed")[0] == kind]
    return sorted(found, key=lambda run: run.seed)


def together(kinds):
    """Label -> runs, without the kinds that have none yet."""
    return {label: runs for label, kind in kinds.items() if (runs := runs_of(kind))}


def equal_rank(task, rank):
    """Every arm with the same rank in each of its maps."""
    return together({m: f"{task}-{m}-rank{rank}" for m in (*MODULES, "all")})


def equal_size(task, rank):
    """Every arm with as many weights as the gate at this rank; `all` stays what it is, as the reference."""
    same = {m: f"{task}-{m}-rank{rank}" for m in ("gate", "up", "down")}
    fitted = {m: f"{task}-{m}-size-of-gate-rank{rank}" for m in ("attention", "random")}
    return together(same | fitted | {"all": f"{task}-all-rank{rank}"})


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


# %% [markdown]
# ## What each arm keeps
#
# `retention`: share of the gain of tuning everything. `percent_of_tuned`: share of the tuned model's score, as the paper counts. Intervals are over
# seeds and test comments together; `detectable` is the true difference between two arms that this design sees four times out of five.

# %%
tables = {}
for rank in (4, 1):
    for name, choose in (("equal rank", equal_rank), ("equal size", equal_size)):
        runs = choose("goemotions", rank)
        if "gate" in runs and "all" in runs:
            tables[f"{name}, rank {rank}"] = la.compare_arms(runs, reference="all")
for name, table in tables.items():
    print(f"{name}\n{table}", end="\n\n")

# %%
columns = [
    "arm",
    "n_parameters",
    "share_of_parameters",
    "n_seeds",
    "score",
    "low",
    "high",
    "retention",
    "retention_low",
    "retention_high",
]
shown = pd.concat({name: table.to_frame() for name, table in tables.items()}, names=["comparison"])
shown[[*columns, "percent_of_tuned", "percent_low", "percent_high", "cpu_seconds", "peak_megabytes"]].round(3)

# %%
for rank in (4, 1):
    pair = {n: t for n, t in tables.items() if n.endswith(f"rank {rank}") and t.arms["retention"].notna().any()}
    if pair:
        save(la.plot_retention(pair), f"module_retention_rank{rank}", *pair.values()).show()

# %% [markdown]
# An untuned model prefers a few labels whatever the comment says. Against the same model with these preferences taken out (batch calibration, from
# the unlabelled comments) the share of the gain is a stricter one.

# %%
rows = []
for name in tables:
    choose = equal_rank if name.startswith("equal rank") else equal_size
    runs = choose("goemotions", int(name[-1]))
    start = next(iter(runs.values()))[0].before.calibrated()
    stronger = la.compare_arms(
        runs, reference="all", after={m: [r.after for r in found] for m, found in runs.items()}, before=start
    )
    for row in stronger.to_frame().to_dict("records"):
        rows.append([name, stronger.base, *(row[c] for c in ("arm", "retention", "retention_low", "retention_high"))])
pd.DataFrame(rows, columns=["comparison", "untuned, calibrated", "arm", "retention", "low", "high"]).round(3)

# %% [markdown]
# ## The gate against its siblings
#
# Paired over seeds and comments: the difference in accuracy, and in the log of the right label's share, which is finer.

# %%
rows = []
for name, table in tables.items():
    choose = equal_rank if name.startswith("equal rank") else equal_size
    finer = la.compare_arms(choose("goemotions", int(name[-1])), reference="all", measure="log_share")
    for found, measure in ((table, "accuracy"), (finer, "log share")):
        for other in found.arms["arm"]:
            if other != "gate":
                pair = found.contrast("gate", other)
                rows.append([name, measure, f"gate - {other}", *pair[["difference", "low", "high", "p", "detectable"]]])
contrasts = pd.DataFrame(
    rows, columns=["comparison", "measure", "contrast", "difference", "low", "high", "p", "detectable"]
)
contrasts.round(4)

# %% [markdown]
# ## How they learn

# %%
for rank in (4, 1):
    runs = equal_rank("goemotions", rank) | {
        f"{m}, gate's size": r for m, r in equal_size("goemotions", rank).items() if m in ("attention", "random")
    }
    if runs:
        curves = la.learning_curves(runs)
        save(
            la.plot_learning(curves),
            f"module_learning_rank{rank}",
            *[t for n, t in tables.items() if n == f"equal rank, rank {rank}"],
        ).show()

# %% [markdown]
# ## Other metrics of the same answers
#
# Weighted and macro F1, and the hit rate by our emotion wheels (not MER-UniBench's table), seed 0.

# %%
rows = {}
for name, runs in (
    equal_rank("goemotions", 4)
    | {f"{m}, gate's size": r for m, r in equal_size("goemotions", 4).items() if m in ("attention", "random")}
).items():
    if not rows:
        rows["untuned"] = la.measure_task(runs[0].before).to_frame().set_index("metric")["value"]
        rows["untuned, label priors taken out"] = (
            la.measure_task(runs[0].before.calibrated()).to_frame().set_index("metric")["value"]
        )
    rows[name] = la.measure_task(runs[0].after).to_frame().set_index("metric")["value"]
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# ## Controls: shuffled labels and a task without affect
#
# With shuffled labels nothing can be learned but how often labels are; with topics the same arms learn something that is no affect. If the gate were
# special for affect, it would have to be better there than here.

# %%
for task, title in (("goemotions_shuffled", "shuffled labels"), ("topics", "topics")):
    runs = together({m: f"{task}-{m}-rank4" for m in ("gate", "up", "attention", "all")})
    if "gate" in runs:
        control = la.compare_arms(runs, reference="all")
        print(f"{title}: untuned {control.base:.3f}, n = {control.n_examples}")
        print(
            control.to_frame()[["arm", "n_seeds", "score", "low", "high", "gain", "gain_low", "gain_high"]]
            .round(3)
            .to_string(index=False)
        )
        print(control.contrasts.round(3).to_string(index=False), end="\n\n")

# %% [markdown]
# ## What else the same weights change
#
# Next-token loss on texts without emotion, and sums and differences. Positive gains are better.


# %%
def on_another_task(runs, kinds, task):
    """The same weights on another task, where that was scored."""
    after = {}
    for label, several in runs.items():
        folders = [RUNS / f"{kinds[label]}-seed{run.seed}" / "controls" / task for run in several]
        if all((folder / "manifest.json").is_file() for folder in folders):
            after[label] = [la.TaskScores.load(folder) for folder in folders]
    base = RUNS / "base" / task
    if not after or not (base / "manifest.json").is_file():
        return None
    return la.compare_arms({k: runs[k] for k in after}, reference="all", after=after, before=la.TaskScores.load(base))


kinds = {m: f"goemotions-{m}-rank4" for m in (*MODULES, "all")}
kinds |= {f"{m}, gate's size": f"goemotions-{m}-size-of-gate-rank4" for m in ("attention", "random")}
for task in ("neutral_text", "arithmetic"):
    other = on_another_task(together(kinds), kinds, task)
    if other is not None:
        print(f"{other.task}: {other.metric} {other.base:.3f} untuned, n = {other.n_examples}")
        print(
            other.to_frame()[["arm", "n_seeds", "score", "low", "high", "gain", "gain_low", "gain_high"]]
            .round(3)
            .to_string(index=False),
            end="\n\n",
        )

# %% [markdown]
# ## Where tuning lands
#
# With everything tuned at one rank: the squared change per weight of each module against its fair share, over seeds, and beside the same model tuned on
# topics and on shuffled labels. The heatmap is seed 0, against its control.

# %%
there = (RUNS / "study" / "transfer" / "manifest.json").is_file()
study = la.ModuleStudy.load(RUNS / "study") if there else None
if study:
    print(study.landing)
    for other in ("up", "down", "attention"):
        ratio = study.landing.ratio("gate", other) if len(study.transfer.seeds) > 1 else None
        if ratio:
            print(f"gate over {other}: {ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
    for control in study.landing.runs[1:]:
        against = study.landing.against("gate", control) if len(study.transfer.seeds) > 1 else None
        if against:
            print(f"gate over its share in {control}: {against.estimate:.2f} [{against.low:.2f}, {against.high:.2f}]")
study.landing.by_module().round(3) if study else None

# %%
whole, topics = runs_of("goemotions-all-rank4"), runs_of("topics-all-rank4")
if whole and topics and not QUICK:
    delta = la.compare_modules("smollm2-135m-instruct", whole[0], control=topics[0])
    print(delta)
    save(la.plot_delta(delta, measure="concentration"), "module_delta", delta).show()
    print(delta.by_module().round(4).to_string(index=False), end="\n\n")
    others = {
        "another seed": whole[1:2],
        "topics": topics[:1],
        "shuffled labels": runs_of("goemotions_shuffled-all-rank4")[:1],
    }
    for name, other in others.items():  # do two fine-tunes change a module alike?
        for run in other:
            alike = delta.compare(la.compare_modules("smollm2-135m-instruct", run, spectrum=False))
            print(f"against {name}\n{alike}", end="\n\n")

# %% [markdown]
# ## What single modules of the tuned model are worth
#
# The change of one module alone in the untuned model; the tuned model with one module taken back; with noise of the same norm in its place; and with
# noise in the module that raises the loss on neutral text by 0.3 nats. 0 is nothing, 1 the whole gain of tuning everything.

# %%
if study:
    kinds = [study.transfer, study.revert, study.random_equal_norm, study.equal_damage]
    for part in kinds:
        print(part, end="\n\n")
    if any(part.to_frame()["share"].notna().any() for part in kinds):
        save(la.plot_parts(kinds), "module_parts", *kinds).show()

# %% [markdown]
# The same in the task without affect.

# %%
if study:
    for part in (study.control_transfer, study.control_revert):
        print(part or "not finished", end="\n\n")

# %% [markdown]
# Noise in thirds of the blocks, at the scales at which all blocks together damage language alike: what affect loses minus what language loses, both in
# standard deviations over examples of the tuned model's scores.

# %%
bands = study.bands if study else None
if bands:
    print(bands)
    if bands.to_frame()["selectivity"].notna().any():
        save(la.plot_selectivity(bands), "module_selectivity", bands).show()

# %% [markdown]
# ## The claims by their rules

# %%
card = la.module_scorecard(study) if study else None
if card:
    print(card)
card.table[["id", "source", "paper_statistic", "sound_statistic", "low", "high", "null", "n", "verdict"]].round(
    3
) if card else None

# %%
if card:
    for row in card.table.to_dict("records"):
        print(f"{row['id']}, {row['source']}: {row['verdict']}. {row['note']}", end="\n\n")

# %% [markdown]
# ## What this supports, and what not
#
# One model of 135 million weights, stored in four bits; LoRA; 64 steps of 16 comments of at most 12 words; one affect task to be understood
# (05_writing has the one to be written); English. It can say whether the gate stands out here, at equal rank and equal size, against siblings and
# controls. It cannot say what 7 billion weights, images, sound, eight benchmarks or 300,000 steps would show. Scores are of the label's first token,
# label priors left in unless stated.
#
# ## Is the gate enough, and is it special?
#
# The rule: the gate is special only if it is better than `up` and than attention, by the lower limit of the difference in accuracy, at equal rank
# and at equal size. If an interval holds 0, nothing was seen; whether a difference of interest could have been seen is in the last column.

# %%
judged = contrasts[(contrasts["measure"] == "accuracy") & contrasts["contrast"].isin(["gate - up", "gate - attention"])]
for comparison, part in judged.groupby("comparison", sort=False):
    better, worse = (part["low"] > 0).all(), (part["high"] < 0).any()
    verdict = "better than both" if better else "worse than one of them" if worse else "not shown to differ from both"
    print(f"{comparison}: the gate is {verdict} (detectable {part['detectable'].max():.3f})")
