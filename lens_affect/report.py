"""A sweep in, one offline HTML page out: no address is loaded from anywhere, and every text is escaped."""

import html
import importlib.util
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from lens_affect.advice import recommend
from lens_affect.localization import LocalizationCurve
from lens_affect.plotting import (
    plot_anisotropy,
    plot_curves,
    plot_emotions,
    plot_methods,
    plot_reliability,
    plot_similarity,
    plot_valence_arousal,
)
from lens_affect.plotting_patching import plot_patching, plot_positions, plot_siblings
from lens_affect.plotting_steering import (
    plot_boundaries,
    plot_dose,
    plot_inside,
    plot_judged,
    plot_languages,
    plot_regimes,
    plot_scripts,
    plot_verification,
)
from lens_affect.results import write_text_atomically
from lens_affect.scorecard import make_scorecard
from lens_affect.scores import SCORES
from lens_affect.shapes import MINIMUM_LAYERS
from lens_affect.steering_study import SteeringStudy
from lens_affect.sweeps import Sweep

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
p.finding { background: #f3f6f9; border-left: 4px solid #0072B2; padding: .6rem 1rem; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .2rem .6rem; border-bottom: 1px solid #eee; text-align: right; }
td:first-child, th:first-child { text-align: left; } td { vertical-align: top; } table.words td, table.words th { text-align: left; } .note { color: #555; font-size: .9rem; } figure { margin: 1rem 0; overflow-x: auto; }
blockquote { border-left: 3px solid #ddd; margin: .5rem 0; padding: 0 1rem; font-size: .9rem; }
</style>
<script>{{ plotly_js | safe }}</script>
</head>
<body>
<h1>{{ title }}</h1>
{% for sentence in headlines %}<p class="finding">{{ sentence }}</p>
{% endfor %}
<p class="note">A score above its null says that the labels can be read from a layer, not that the model uses them. Intervals are 95 % over
topics (held out one at a time); the faint bands are where 95 % of label shufflings fall, and dotted lines are their 5 % thresholds after correction over all layers.</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}
{% for figure in section.figures %}<figure>{{ figure | safe }}</figure>
{% endfor %}
{% for quote in section.quotes %}<blockquote><strong>{{ quote[0] }}</strong>: {{ quote[1] }}</blockquote>
{% endfor %}
{% for table in section.tables %}{{ table | safe }}
{% endfor %}
{% endfor %}
</body>
</html>
"""
)


def write_report(sweep: Sweep, path: str | Path | None = None) -> Path:
    """Write a sweep's report.

    Args:
        sweep: a finished sweep.
        path: of the page; `report.html` in the sweep's folder by default.

    Returns:
        The path.
    """
    from plotly.offline import get_plotlyjs

    first = next(iter(sweep.curves.values()))
    sections = [_scorecard(sweep), *(_curves(sweep, score) for score in sweep.spec.scores)]
    sections += [
        _methods(sweep),
        _anisotropy(sweep),
        _emotions(sweep),
        _geometry(sweep),
        _reliability(sweep),
        _patching(sweep),
        *_steering(sweep),
        _texts(sweep),
        _provenance(first),
    ]
    page = _PAGE.render(
        title=f"Where emotion can be read in {first.provenance.title}",
        headlines=[sweep.headline(method) for method in sweep.spec.methods],
        sections=[s for s in sections if s],
        plotly_js=get_plotlyjs(),
    )
    return write_text_atomically(path or sweep.folder / "report.html", page)


def _html(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def _scorecard(sweep: Sweep) -> dict[str, Any]:
    card, advice = make_scorecard(sweep), recommend(sweep)
    shapes = []
    for method in sweep.spec.methods:
        curve = sweep.curves.get((method, "nearest_mean"))
        if curve is not None and len(curve.layer_rows) >= MINIMUM_LAYERS:
            shapes.append(f"{curve.score}, {curve.method}: {curve.shape()}.")
    columns = [
        "id",
        "claim",
        "source",
        "verdict",
        "published",
        "paper_statistic",
        "sound_statistic",
        "low",
        "high",
        "null",
        "n",
    ]
    headings = {"paper_statistic": "paper's statistic", "sound_statistic": "sound statistic"}
    verdict = _words(pd.DataFrame(card.table[columns]).rename(columns=headings))
    rules = _words(pd.DataFrame(card.table[["id", "source", "rule", "note"]]))
    told = advice.table[["question", "answer", "why"]].assign(
        answer=advice.table["answer"].where(advice.table["decided"], "not decided")
    )
    return {
        "title": "Scorecard: published claims against this run",
        "texts": [f"{str(card).splitlines()[-1]}.", *shapes],
        "tables": [
            verdict,
            f"<details><summary>Rules, and what the statistics are</summary>{rules}</details>",
            "<h3>What to use for this model</h3>" + _words(told),
        ],
    }


def _words(table: pd.DataFrame) -> str:
    """A table of sentences, left-aligned."""
    return table.to_html(index=False, border=0, escape=True, na_rep="", float_format="%.2f", classes="words")


def _methods(sweep: Sweep) -> dict[str, Any]:
    if sweep.comparison is None:
        return {}
    return {
        "title": "Text, context, pooling, baseline: one changed at a time",
        "texts": [str(sweep.comparison).replace("\n", ". ") + "."],
        "figures": [
            _html(plot_methods(sweep.comparison, metric=m)) for m in ("accuracy", "mean_cosine", "shift", "spread")
        ],
        "tables": [
            f"<details><summary>All cells</summary>{sweep.comparison.table.round(4).to_html(index=False, border=0, escape=True)}</details>"
        ],
    }


def _anisotropy(sweep: Sweep) -> dict[str, Any]:
    texts = [str(sweep.anisotropy).replace("\n", "; ") + "."]
    texts += [
        f"{method}: at layer {curve.best_layer} accuracy is {float(curve.values[curve.row(curve.best_layer)]):.2f}; random directions from the same "
        f"activations reach {float(curve.null_mean[curve.row(curve.best_layer)]):.2f} on average, and their family-wise 5 % limit is "
        f"{float(curve.threshold[curve.row(curve.best_layer)]):.2f}."
        for method, curve in sweep.directions.items()
    ]
    return {"title": "Anisotropy", "texts": texts, "figures": [_html(plot_anisotropy(sweep.anisotropy))]}


def _curves(sweep: Sweep, score: str) -> dict[str, Any]:
    curves = [sweep.curves[method, score] for method in sweep.spec.methods]
    bars = [sweep.bars[m].accuracy for m in sweep.spec.methods] if SCORES[score].kind == "accuracy" else None
    texts = [f"{SCORES[score].description} {SCORES[score].better.capitalize()} is better."]
    texts += [str(curve).replace("\n", ". ") for curve in curves]
    return {
        "title": f"{score} by layer",
        "texts": texts,
        "figures": [_html(plot_curves(curves, bar=bars))],
        "tables": [_table(curves)],
    }


def _table(curves: list[LocalizationCurve]) -> str:
    frames = [c.to_frame().assign(method=c.method) for c in curves]
    table = pd.concat(frames)[
        ["method", "row", "depth", "score", "low", "high", "null_mean", "threshold", "p", "p_family", "n"]
    ]
    return (
        f"<details><summary>All numbers</summary>{table.round(4).to_html(index=False, border=0, escape=True)}</details>"
    )


def _emotions(sweep: Sweep) -> dict[str, Any]:
    curves = [c for c in sweep.curves.values() if c.score in ("nearest_mean", "dprime") and not c.per_emotion.empty]
    return {"title": "Which emotions", "figures": [_html(plot_emotions(c)) for c in curves]} if curves else {}


def _layer(sweep: Sweep, method: str) -> int:
    score = "nearest_mean" if "nearest_mean" in sweep.spec.scores else sweep.spec.scores[0]
    return sweep.curves[method, score].best_layer


def _geometry(sweep: Sweep) -> dict[str, Any]:
    figures = []
    for method in sweep.spec.methods:
        layer = _layer(sweep, method)
        figures += [
            _html(plot_valence_arousal(sweep.vectors[method], layer)),
            _html(plot_similarity(sweep.vectors[method], layer)),
        ]
    return {"title": "Geometry of the emotion vectors", "figures": figures}


def _reliability(sweep: Sweep) -> dict[str, Any]:
    return {
        "title": "How reliable the vectors are",
        "texts": [
            "Each vector is fitted on two random halves of the topics; the cosine between the two, stepped up to full length, is its reliability."
        ],
        "figures": [_html(plot_reliability(list(sweep.vectors.values())))],
    }


def _patching(sweep: Sweep) -> dict[str, Any]:
    maps = sweep.maps
    if not maps:
        return {}
    texts = [
        "A site's activation is taken from one text of a pair and put into the other. An effect of 0 moves nothing, 1 everything that the two texts "
        "differ in; a random donor is a random direction as long as the difference. Sites are nested: mlp_out holds what gate and up can move."
    ]
    figures, tables = [], []
    for name, found in maps.items():
        texts.append(f"{name}: {str(found).replace(chr(10), '. ')}.")
        if len(found.positions) == 1:
            figures += [_html(plot_siblings(found, per_change=p)) for p in (False, True)]
            figures.append(_html(plot_patching(found)))
        else:
            figures += [_html(plot_positions(found, site)) for site in found.sites[:4]]
        table = found.to_frame().round(4).to_html(index=False, border=0, escape=True)
        tables.append(f"<details><summary>All numbers of {html.escape(name)}</summary>{table}</details>")
    return {"title": "Which site carries it: activation patching", "texts": texts, "figures": figures, "tables": tables}


def _steering(sweep: Sweep) -> list[dict[str, Any]]:
    sections = []
    for name, study in sweep.steering.items():
        texts = [
            "An emotion's direction is added at one layer in doses that are shares of the residual stream's norm. A text's perplexity is taken against the "
            "unsteered text of the same prompt, under the unsteered model; a cell is surgical where its texts are sound and an external classifier sees more of "
            "the target than under random directions of the same dose.",
            *str(study).splitlines(),
        ]
        figures = [_html(plot_dose(study.dose, measure=m)) for m in ("perplexity_ratio", "repetition")]
        figures.append(_html(plot_regimes(study.regimes)))
        if set(study.dose.emotions) & set(study.judgement.emotions):
            figures.append(_html(plot_judged(study.dose, study.judgement)))
        if study.boundaries:
            figures.append(_html(plot_boundaries(study.boundaries)))
        if study.verification is not None:
            figures.append(_html(plot_verification(study.verification)))
        figures.append(_html(plot_scripts(study)))
        if importlib.util.find_spec("lingua"):  # an extra; scripts need none
            figures.append(_html(plot_languages(study)))
        tables = [
            f"<details><summary>All cells of {html.escape(name)}</summary>{_round(study.regimes.table)}</details>"
        ]
        if study.verification is not None:
            tables.append(
                f"<details><summary>Verification by strength</summary>{_round(study.verification.to_frame())}</details>"
            )
        for found in study.boundaries:
            words = f"Strengths tried on the way to the boundaries of {html.escape(found.emotion)}"
            tables.append(f"<details><summary>{words}</summary>{_round(found.to_frame())}</details>")
        sections.append(
            {
                "title": f"What happens when you push: {name}",
                "texts": texts,
                "figures": figures,
                "quotes": study.samples(),
                "tables": tables,
            }
        )
        sections += [_crosslingual(name, study), _inside(name, study)]
    return sections


def _crosslingual(name: str, study: SteeringStudy) -> dict[str, Any]:
    parts = (study.scripts, study.meaning, study.transfer)
    if not any(parts):
        return {}
    tables = []
    if study.scripts is not None:
        found = study.scripts.to_frame()
        # Scripts that neither the vectors nor random directions bring up fill a page with zeros.
        tables.append("<h3>Scripts of the tokens that the vectors raise</h3>" + _round(pd.DataFrame(found[(found["share"] > 0) | (found["random"] > 0)])))  # fmt: skip
    if study.meaning is not None:
        columns = ["language", "effect", "low", "high", "p_family", "control_effect", "control_p_family", "own_top", "others_top", "n_emotions", "n_words", "verdict"]  # fmt: skip
        tables.append("<h3>Do foreign words of an emotion stand higher under its vector?</h3>" + _round(pd.DataFrame(study.meaning.table[columns])))  # fmt: skip
    if study.transfer is not None:
        found = study.transfer.to_frame()
        found = found[found["layer"] == study.transfer.best_layer]
        columns = ["source", "target", "accuracy", "low", "high", "null_mean", "p_family", "cosine_disjoint", "corrected", "tokens_per_word", "n"]  # fmt: skip
        tables.append("<h3>Vectors of one language used in another</h3>" + _round(pd.DataFrame(found[columns])))
    return {
        "title": f"Other languages: {name}",
        "texts": [line for part in parts if part is not None for line in str(part).splitlines()],
        "tables": tables,
    }


def _inside(name: str, study: SteeringStudy) -> dict[str, Any]:
    if study.inside is None:
        return {}
    return {
        "title": f"Behaviour and inside together: {name}",
        "texts": [
            "The judge sees a text alone; vectors from other texts than those that steered see the unsteered model while it reads the same text. The "
            "correlation is taken within each dose, so that the dose, which drives both, explains nothing.",
            *str(study.inside).splitlines(),
        ],
        "figures": [_html(plot_inside(study.inside))],
        "tables": [f"<details><summary>All numbers</summary>{_round(study.inside.to_frame())}</details>"],
    }


def _round(table: pd.DataFrame) -> str:
    return table.round(4).to_html(index=False, border=0, escape=True)


def _texts(sweep: Sweep) -> dict[str, Any]:
    texts = [f"{method}: {stimuli}. {sweep.bars[method]}." for method, stimuli in sweep.stimuli.items()]
    quotes: list[tuple[str, str]] = []
    if sweep.stories is not None:
        texts.append(str(sweep.stories).replace("\n", ". "))
        found = sweep.stories.stimuli
        quotes = [
            (f"{found.emotions[i]}, {found.groups[i]}", found.texts[i])
            for i in range(0, len(found), max(len(found) // 4, 1))
        ][:4]
    return {"title": "What was read", "texts": texts, "quotes": quotes}


def _provenance(curve: LocalizationCurve) -> dict[str, Any]:
    facts = curve.provenance
    rows = {
        name: getattr(facts, name)
        for name in facts.__dataclass_fields__
        if name not in ("versions", "checks", "elapsed_seconds")
    }
    rows |= {f"version of {k}": v for k, v in facts.versions.items()} | {
        f"check: {k}": v for k, v in facts.checks.items()
    }
    table = pd.DataFrame({"": list(rows), "value": [str(v) for v in rows.values()]})
    return {"title": "Provenance", "tables": [table.to_html(index=False, border=0, escape=True)]}
