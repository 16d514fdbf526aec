"""The command line: `lens-affect sweep MODEL`, `scorecard RUN`, `recommend RUN`, `study SPEC`, `patch MODEL`,
`explain MODEL TEXT`, `steer MODEL PROMPT`, `regimes MODEL`, `delta BASE TUNED`, `transfer BASE TUNED`, `ablate MODEL`, `tune MODEL`,
`catalogue`, `doctor MODEL`.

Exit code 2 for wrong input, 1 for a run that failed. Heavy imports happen inside the commands, so --help answers at once.
"""

import json as json_module
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_affect.console import (
    VECTORS_HELP,
    fit_on_passages,
    print_table,
    reporting_errors,
    saved_vectors,
    show_progress,
)
from lens_affect.module_commands import ablate, delta, transfer, tune
from lens_affect.steering_commands import regimes, steer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find where emotion lives in a language model, with intervals and nulls beside every number.",
)


class Method(StrEnum):
    """Where the texts come from."""

    both = "both"
    comprehension = "comprehension"
    generation = "generation"


@app.callback()
def _start() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    method: Annotated[
        Method, typer.Option(help="Read given passages, stories the model writes, or both.")
    ] = Method.both,
    emotions: Annotated[str, typer.Option(help="Comma-separated; all of the stimuli's by default.")] = "",
    stimuli: Annotated[
        str,
        typer.Option(
            help="'passages', or a CSV, TSV, Parquet or JSONL file with columns text, emotion and optionally group, source."
        ),
    ] = "passages",
    score: Annotated[
        str,
        typer.Option(
            help="Comma-separated scores; by default nearest_mean, dprime, valence and mean_cosine_neutral as labels and folds allow."
        ),
    ] = "",
    pooling: Annotated[
        str, typer.Option(help="mean, mean_without_sinks, last, midpoint or after:N.")
    ] = "mean_without_sinks",
    stories: Annotated[
        int | None, typer.Option(help="Stories per emotion; 12 by default, 6 with --quick.", show_default=False)
    ] = None,
    story_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest story in tokens; 256 by default, 80 with --quick. The shortest is 64, or this if it is less.",
            show_default=False,
        ),
    ] = None,
    permutations: Annotated[
        int | None,
        typer.Option(help="Relabellings behind each null; 1000 by default, 200 with --quick.", show_default=False),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also compare text, context, pooling and baseline one at a time (ten more readings)."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="The demo's size: 6 short stories per emotion, 200 permutations, where nothing else is named.",
        ),
    ] = False,
    out: Annotated[str, typer.Option(help="Folder of the run; runs/MODEL by default.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; no finished step is repeated.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Emotion vectors and localization curves at every layer, and a report that opens in a browser."""
    with reporting_errors():
        from lens_affect.sweeps import QUICK, SweepSpec, make_spec, run_sweep

        sizes = {"n_stories": stories, "story_tokens": story_tokens, "n_permutations": permutations}
        settings: dict[str, Any] = QUICK.copy() if quick else {}
        settings |= {name: size for name, size in sizes.items() if size is not None}
        if "story_tokens" in settings:
            shortest = SweepSpec.model_fields["minimum_story_tokens"].default
            settings["minimum_story_tokens"] = min(shortest, settings["story_tokens"])
        settings |= {
            "model": model,
            "methods": ("comprehension", "generation") if method is Method.both else (method.value,),
            "stimuli": stimuli,
            "pooling": pooling,
            "compare_methods": compare,
            "seed": seed,
            "dtype": dtype,
        }
        if emotions:
            settings["emotions"] = tuple(e.strip() for e in emotions.split(","))
        if score:
            settings["scores"] = tuple(s.strip() for s in score.split(","))
        spec = make_spec(**settings)
        folder = Path(out or Path("runs") / Path(model).name)
        with show_progress(quiet or json) as report:
            done = run_sweep(spec, folder, resume=resume, report=report)
            with report("write the report"):
                from lens_affect.report import write_report

                page = write_report(done)
        if json:
            print(
                json_module.dumps(
                    {
                        "headlines": {m: done.headline(m) for m in spec.methods},
                        "report": str(page),
                        "curves": str(folder / "curves.csv"),
                    },
                    indent=1,
                )
            )
            return
        for name in spec.methods:
            print(done.headline(name))
        print(f"Report: {page.absolute()}")


@app.command()
def scorecard(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished sweeps, or of studies of modules.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Judge the published claims by finished runs, each by its declared rule."""
    with reporting_errors():
        from lens_affect.module_study import ModuleStudy
        from lens_affect.scorecard import make_scorecard, module_scorecard
        from lens_affect.sweeps import load_sweep

        modules = [ModuleStudy.load(run) for run in runs if (Path(run) / "landing" / "manifest.json").is_file()]
        sweeps = [load_sweep(run) for run in runs if not (Path(run) / "landing" / "manifest.json").is_file()]
        card = make_scorecard(sweeps, modules=modules) if sweeps else module_scorecard(modules)
        if json:
            print(card.to_frame().to_json(orient="records", indent=1))
            return
        _print_scorecard(card)


@app.command()
def recommend(
    run: Annotated[str, typer.Argument(help="Folder of a finished sweep.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Which layer, text and pooling to use for a model, with intervals, and what could not be decided."""
    with reporting_errors():
        from lens_affect.advice import recommend as advise
        from lens_affect.sweeps import load_sweep

        advice = advise(load_sweep(run))
        if json:
            print(advice.to_frame().to_json(orient="records", indent=1))
            return
        table = advice.to_frame()
        table["answer"] = table["answer"].where(table["decided"], "not decided")
        print_table(table[["question", "answer", "why"]], f"Recommended for {advice.provenance.title}")


@app.command()
def patch(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    sites: Annotated[
        str, typer.Option(help="Comma-separated; gate, its siblings and what holds them by default.")
    ] = "",
    pairs: Annotated[
        str,
        typer.Option(
            help="affect, number, tense, or a CSV, TSV, Parquet or JSONL file with columns clean, corrupted, clean_words, corrupted_words."
        ),
    ] = "affect",
    positions: Annotated[str, typer.Option(help="all (from the first difference on), last, or each.")] = "all",
    metric: Annotated[str, typer.Option(help="logit_difference, kl or projection.")] = "logit_difference",
    vectors: Annotated[str, typer.Option(help="For projection. " + VECTORS_HELP)] = "",
    read_layer: Annotated[
        int | None, typer.Option(help="For projection: 0-based block that is read; the last one by default.")
    ] = None,
    direction: Annotated[str, typer.Option(help="denoise or noise.")] = "denoise",
    controls: Annotated[
        str, typer.Option(help="Comma-separated donors: self, random, topic, other_emotion, rank8, rank32.")
    ] = "random",
    drop: Annotated[bool, typer.Option("--drop", help="Leave out pairs of unequal token length.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    run: Annotated[
        str,
        typer.Option(
            help="Folder of a finished sweep of this model: the map is kept there and its report gets a section on it."
        ),
    ] = "",
    out: Annotated[str, typer.Option(help="Folder of the map; runs/MODEL-PAIRS-POSITIONS by default.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the map as JSON.")] = False,
) -> None:
    """Which site carries an emotion from one text to its counterpart: gate_proj against its siblings, with controls."""
    with reporting_errors():
        from lens_affect.adapter import model_info
        from lens_affect.contrasts import load_pairs
        from lens_affect.models import load_model
        from lens_affect.patching import GATE_AGAINST_SIBLINGS, patch_sites
        from lens_affect.plotting_patching import plot_patching
        from lens_affect.report import write_report
        from lens_affect.style import save_figure
        from lens_affect.sweeps import MAPS, load_sweep

        chosen = load_pairs(pairs)
        name = "-".join([chosen.name, positions, *([] if metric == "logit_difference" else [metric])])
        sweep = load_sweep(run) if run else None
        folder = Path(out or (sweep.folder / MAPS / name if sweep else Path("runs") / f"{Path(model).name}-{name}"))
        if folder.exists():
            raise FileExistsError(f"received the folder {folder}, which is there already; choose another with --out")
        with show_progress(quiet or json) as report:
            saved = vectors or (run if metric == "projection" else "")
            found_vectors = saved_vectors(saved)[0] if saved else None
            with report("load the model"):
                loaded = load_model(model, dtype=dtype)
            if sweep:
                next(iter(sweep.vectors.values())).require_match(model_info(loaded).provenance)
            if metric == "projection" and found_vectors is None:
                found_vectors, _ = fit_on_passages(loaded, read_layer, report)
            with report("patch") as progress:
                found = patch_sites(
                    loaded,
                    chosen,
                    sites=tuple(filter(None, sites.split(","))) or GATE_AGAINST_SIBLINGS,
                    positions=positions,
                    metric=metric,
                    vectors=found_vectors,
                    read_layer=read_layer,
                    direction=direction,
                    controls=tuple(filter(None, controls.split(","))),
                    drop=drop or None,
                    seed=seed,
                    progress=progress,
                )
        found.save(folder)
        found.to_frame().to_csv(folder / "map.csv", index=False)
        page = save_figure(plot_patching(found), folder / "map-figure", found)
        if sweep:
            page = write_report(sweep)
        if json:
            print(found.to_frame().to_json(orient="records", indent=1))
            return
        print(found)
        print(f"{'Report' if sweep else 'Figure'}: {page.absolute()}")


@app.command()
def study(
    spec: Annotated[str, typer.Argument(help="YAML file, such as analyses/specs/jeong2026.yaml.")],
    only: Annotated[str, typer.Option(help="Comma-separated cells; all by default.")] = "",
    out: Annotated[str, typer.Option(help="Folder of the study; runs/NAME by default.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="The demo's size for every model, instead of the file's.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Sweep several models from one file and judge the claims over all of them; finished steps are never repeated."""
    with reporting_errors():
        from lens_affect.study import load_study, run_study
        from lens_affect.sweeps import quick as quick_size
        from lens_affect.sweeps import run_sweep

        asked = load_study(spec)
        with show_progress(quiet or json) as report:
            card = run_study(
                asked,
                out or Path("runs") / asked.name,
                only=tuple(filter(None, only.split(","))),
                run=lambda s, *a, **k: run_sweep(quick_size(s) if quick else s, *a, **k),
                report=report,
            )
        if json:
            print(card.to_frame().to_json(orient="records", indent=1))
            return
        _print_scorecard(card)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    text: Annotated[str, typer.Argument(help="The text to explain.")],
    emotion: Annotated[str, typer.Option(help="Whose vector the text is projected on.")],
    vectors: Annotated[
        str,
        typer.Option(help=VECTORS_HELP),
    ] = "",
    layer: Annotated[
        int | None,
        typer.Option(help="0-based block to take apart; the sweep's best one, or the middle one, by default."),
    ] = None,
    out: Annotated[str, typer.Option(help="Page to write; explain-EMOTION.html by default.")] = "",
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Which tokens of a text carry an emotion, layer by layer, and which heads and neurons write it."""
    with reporting_errors():
        from lens_affect.attribution import attribute_direction, write_explanation
        from lens_affect.models import load_model
        from lens_affect.projections import projection_by_layer
        from lens_affect.stimuli import load_stimuli

        page = Path(out or f"explain-{Path(emotion).name}.html")
        found, origin, best = saved_vectors(vectors) if vectors else (None, "", None)
        # wrong names end here, before anything is loaded
        if found is None:
            load_stimuli("passages").select(emotions=[emotion])
        else:
            found.vector(emotion, found.layers[0] if layer is None else layer)
        with show_progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if found is None:
                found, origin = fit_on_passages(lens, layer, report)
            at = layer if layer is not None else best if best is not None else found.n_layers // 2
            with report("read the text"):
                parts = attribute_direction(lens, text, found, emotion, at)
                by_layer = projection_by_layer(lens, text, found, emotion)
                write_explanation(page, parts, by_layer, origin)
        if json:
            largest = {
                name: json_module.loads(str(t.to_json(orient="records")))
                for name, t in (("parts", parts.largest_parts()), ("neurons", parts.top_neurons()))
            }
            print(
                json_module.dumps(
                    {"headline": str(parts), "vectors": origin, "layer": at, **largest, "page": str(page)}, indent=1
                )
            )
        else:
            print(parts)
            print(origin)
            print(f"Page: {page.absolute()}")
        if open_page:
            typer.launch(str(page.absolute()))


for command in (steer, regimes, delta, transfer, ablate, tune):
    app.command()(command)


@app.command()
def catalogue(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the models that have a short name, and which are cached."""
    with reporting_errors():
        from lens_affect.catalogue import cache_folder, catalogue_frame

        table = catalogue_frame()
        if json:
            print(table.to_json(orient="records", indent=1))
            return
        print_table(table, f"Models (cache: {cache_folder()})")


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Run the self-checks of a model and print what they measured; exit code 1 if one fails."""
    with reporting_errors():
        from lens_affect.models import load_model
        from lens_affect.selfchecks import SelfCheckError, check_model

        try:
            report = check_model(load_model(model))
        except SelfCheckError as error:  # what failed is what was asked for
            report = error.report
        if json:
            print(report.to_frame().to_json(orient="records", indent=1))
        else:
            print_table(report.to_frame(), str(report))
        if report.failed:
            for check in report.failed:
                print(f"{check.name}: {check.advice}", file=sys.stderr)
            raise SystemExit(1)


def _print_scorecard(card: Any) -> None:
    shown = card.to_frame()[
        ["id", "claim", "model", "source", "sound_statistic", "low", "high", "null", "n", "verdict"]
    ].round(2)
    shown = shown.rename(columns={"sound_statistic": "sound"}).astype(object).where(shown.notna(), "")
    print_table(shown, "Scorecard")
    print(card)


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
