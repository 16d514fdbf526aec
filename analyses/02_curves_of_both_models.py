"""Question: at which depth are emotions told apart best, in both models whose weights a package ships?

Settings: our passages, 12 topics held out one at a time, sinks left out of the mean, 1,000 label permutations within topics.
Writes figures/curves_both_models.{html,json,png}; the PNG needs a Chromium (BROWSER_PATH).
"""

import json
import shutil
from pathlib import Path

import lens_affect as la

FIGURES = Path(__file__).resolve().parent.parent / "figures"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
SCORES = ("nearest_mean", "mean_cosine_neutral")


def main() -> None:
    passages = la.load_stimuli("passages")
    curves: dict[str, list[la.LocalizationCurve]] = {score: [] for score in SCORES}
    for name in MODELS:
        activations = la.extract_activations(la.load_model(name), passages, pooling="mean_without_sinks")
        for score in SCORES:
            curves[score].append(la.localize(activations, score=score, n_permutations=1000, seed=0))
            print(curves[score][-1], flush=True)
    bar = la.lexical_bar(passages)
    print(bar)
    for curve in curves["nearest_mean"]:
        print(curve.provenance.title, bar.compare(curve))
    save(
        la.plot_curves(
            curves["nearest_mean"],
            bar=bar.accuracy,
            title=finding("20 emotions are told apart best at", curves["nearest_mean"]),
        ),
        curves["nearest_mean"],
        "curves_both_models",
    )
    paper = "The paper's statistic (lower is called better) is lowest at"
    save(
        la.plot_curves(curves["mean_cosine_neutral"], title=finding(paper, curves["mean_cosine_neutral"])),
        curves["mean_cosine_neutral"],
        "paper_statistic_both_models",
    )


def finding(start: str, curves: list[la.LocalizationCurve]) -> str:
    """Best depth of every model with its 95 % interval over topics."""
    parts = []
    for c in curves:
        low, high = c.best_depth_interval()
        parts.append(f"depth {c.depth[c.row(c.best_layer)]:.2f} [{low:.2f}, {high:.2f}] in {c.provenance.title}")
    return f"{start}<br>" + "<br>and ".join(parts)


def save(figure, curves: list[la.LocalizationCurve], name: str) -> None:
    """The figure as HTML (sharing one plotly.min.js), its numbers as JSON, and a PNG where a browser is found."""
    FIGURES.mkdir(exist_ok=True)
    figure.write_html(FIGURES / f"{name}.html", include_plotlyjs="directory")
    numbers = [
        {
            "model": c.provenance.title,
            "score": c.score,
            "better": c.better,
            "stimuli": c.method,
            "curve": c.to_frame().to_dict(orient="list"),
        }
        | {
            "best_layer": c.best_layer,
            "best_depth_interval": c.best_depth_interval(),
            "n_permutations": c.n_permutations,
        }
        | {"provenance": c.provenance.__dict__}
        for c in curves
    ]
    (FIGURES / f"{name}.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    try:
        figure.write_image(FIGURES / f"{name}.png", scale=2)
    except Exception as error:  # kaleido raises its own kinds; the interactive figure is there already
        print(
            f"no PNG: {str(error).splitlines()[0]} (a Chromium is {'found' if shutil.which('chromium') else 'not found'})"
        )


if __name__ == "__main__":
    main()
