"""The command line: `lens-affect sweep MODEL`, `scorecard RUN`, `recommend RUN`, `study SPEC`, `patch MODEL`,
`explain MODEL TEXT`, `steer MODEL PROMPT`, `regimes MODEL`, `delta BASE TUNED`, `transfer BASE TUNED`, `ablate MODEL`, `tune MODEL`,
`catalogue`, `doctor MODEL`.

Exit code 2 for wrong input, 1 for a run that failed. Heavy imports happen inside the commands, so --help answers at once.
"""

import json as json_module
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find where emotion lives in a language model, with intervals and nulls beside every number.",
)


VECTORS_HELP = "Folder of a finished sweep or of saved emotion vectors; by default they are fitted on our passages."


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
        str, typer.Option(help="Comma-separated scores.")
    ] = "nearest_mean,dprime,valence,mean_cosine_neutral",
    pooling: Annotated[
        str, typer.Option(help="mean, mean_without_sinks, last, midpoint or after:N.")
    ] = "mean_without_sinks",
    stories: Annotated[int, typer.Option(help="Stories per emotion.")] = 12,
    story_tokens: Annotated[int, typer.Option(help="Longest story in tokens.")] = 256,
    permutations: Annotated[int, typer.Option(help="Relabellings behind each null.")] = 1000,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also compare text, context, pooling and baseline one at a time (ten more readings)."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="The demo's size: 6 short stories per emotion, 200 permutations.")
    ] = False,
    out: Annotated[str, typer.Option(help="Folder of the run; runs/MODEL by default.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; no finished step is repeated.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Emotion vectors and localization curves at every layer, and a report that opens in a browser."""
    with _errors():
        from lens_affect.sweeps import make_spec, run_sweep
        from lens_affect.sweeps import quick as quick_size

        settings: dict[str, Any] = {
            "model": model,
            "methods": ("comprehension", "generation") if method is Method.both else (method.value,),
            "stimuli": stimuli,
            "scores": tuple(filter(None, score.split(","))),
            "pooling": pooling,
            "n_stories": stories,
            "story_tokens": story_tokens,
            "n_permutations": permutations,
            "compare_methods": compare,
            "seed": seed,
            "dtype": dtype,
        }
        if emotions:
            settings["emotions"] = tuple(e.strip() for e in emotions.split(","))
        spec = make_spec(**settings)
        spec = quick_size(spec) if quick else spec
        folder = Path(out or Path("runs") / Path(model).name)
        with _progress(quiet or json) as report:
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
    runs: Annotated[list[str], typer.Argument(help="Folders of finished sweeps.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Judge the published claims by finished runs, each by its declared rule."""
    with _errors():
        from lens_affect.scorecard import make_scorecard
        from lens_affect.sweeps import load_sweep

        card = make_scorecard([load_sweep(run) for run in runs])
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
    with _errors():
        from lens_affect.advice import recommend as advise
        from lens_affect.sweeps import load_sweep

        advice = advise(load_sweep(run))
        if json:
            print(advice.to_frame().to_json(orient="records", indent=1))
            return
        table = advice.to_frame()
        table["answer"] = table["answer"].where(table["decided"], "not decided")
        _print_table(table[["question", "answer", "why"]], f"Recommended for {advice.provenance.title}")


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
    with _errors():
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
        with _progress(quiet or json) as report:
            saved = vectors or (run if metric == "projection" else "")
            found_vectors = _saved_vectors(saved)[0] if saved else None
            with report("load the model"):
                loaded = load_model(model, dtype=dtype)
            if sweep:
                next(iter(sweep.vectors.values())).require_match(model_info(loaded).provenance)
            if metric == "projection" and found_vectors is None:
                found_vectors, _ = _fit_on_passages(loaded, read_layer, report)
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
    quick: Annotated[bool, typer.Option("--quick", help="The demo's size for every model.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Sweep several models from one file and judge the claims over all of them; finished steps are never repeated."""
    with _errors():
        from lens_affect.study import load_study, run_study
        from lens_affect.sweeps import quick as quick_size
        from lens_affect.sweeps import run_sweep

        asked = load_study(spec)
        with _progress(quiet or json) as report:
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
    with _errors():
        from lens_affect.attribution import attribute_direction, write_explanation
        from lens_affect.models import load_model
        from lens_affect.projections import projection_by_layer
        from lens_affect.stimuli import load_stimuli

        page = Path(out or f"explain-{Path(emotion).name}.html")
        found, origin, best = _saved_vectors(vectors) if vectors else (None, "", None)
        # wrong names end here, before anything is loaded
        if found is None:
            load_stimuli("passages").select(emotions=[emotion])
        else:
            found.vector(emotion, found.layers[0] if layer is None else layer)
        with _progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if found is None:
                found, origin = _fit_on_passages(lens, layer, report)
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


def _saved_vectors(folder: str) -> tuple[Any, str, int | None]:
    """Vectors of a folder, where they come from, and the best layer where a sweep has found one."""
    from lens_affect.vectors import EmotionVectors

    if (Path(folder) / "manifest.json").is_file():
        found = EmotionVectors.load(folder)
        return found, f"Vectors: {folder} ({found.source})", None
    from lens_affect.sweeps import load_sweep

    sweep = load_sweep(folder)
    method = sweep.spec.methods[0]
    curve = sweep.curves.get((method, "nearest_mean"))
    return sweep.vectors[method], f"Vectors: {folder}, {method}", curve.best_layer if curve else None


def _fit_on_passages(model: Any, layer: int | None, report: Callable[[str], Any]) -> tuple[Any, str]:
    from lens_affect.activations import extract_activations
    from lens_affect.stimuli import load_stimuli
    from lens_affect.vectors import fit_vectors

    if layer is not None and not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"received layer {layer}; allowed are 0 to {model.cfg.n_layers - 1}")
    passages = load_stimuli("passages")
    with report("fit vectors on the passages") as progress:
        activations = extract_activations(model, passages, pooling="mean_without_sinks", progress=progress)
    return fit_vectors(
        activations
    ), f"Vectors: fitted now on our {len(passages)} passages; --vectors FOLDER takes saved ones"


@app.command()
def steer(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="A request, or an opening to be continued.")],
    emotion: Annotated[str, typer.Option(help="Whose direction is added.")],
    strength: Annotated[
        str, typer.Option(help="Comma-separated shares of the residual stream's norm; negative pushes away.")
    ] = "0.4",
    layers: Annotated[str, typer.Option(help="Comma-separated 0-based blocks; the middle one by default.")] = "",
    vectors: Annotated[str, typer.Option(help=VECTORS_HELP)] = "",
    tokens: Annotated[int, typer.Option(help="Longest text.")] = 48,
    seed: Annotated[int, typer.Option(help="Of sampling and of the random direction.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What a model writes without steering, pushed along an emotion, and pushed as far along a random direction."""
    with _errors():
        import numpy as np
        import pandas as pd

        from lens_affect.doses import UNSTEERED, sweep_strengths
        from lens_affect.models import load_model

        found = _saved_vectors(vectors)[0] if vectors else None
        strengths, chosen = _numbers(strength, float, "--strength"), _numbers(layers, int, "--layers")
        with _progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if found is None:
                found, _ = _fit_on_passages(lens, None, report)
            with report("write") as progress:
                dose = sweep_strengths(
                    lens,
                    found,
                    [prompt],
                    emotions=[emotion],
                    layers=chosen or None,
                    strengths=strengths,
                    n_tokens=tokens,
                    seed=seed,
                    progress=progress,
                )
        keep = dose.column("kind") != UNSTEERED[1]
        shown = pd.DataFrame(
            {name: dose.column(name)[keep] for name in ("kind", "strength", "text", "repetition", "kl", "change")}
        )
        shown.insert(3, "perplexity_ratio", np.exp(dose.log_ratio[keep]))
        if json:
            print(shown.to_json(orient="records", indent=1))
            return
        shown.loc[:, "text"] = [" ".join(text.split()) for text in shown["text"]]
        _print_table(shown.round(2), f"{dose.provenance.title}: {emotion}")


@app.command()
def regimes(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    emotions: Annotated[
        str, typer.Option(help="Comma-separated targets on neutral prompts.")
    ] = "happy,sad,afraid,angry",
    prompts: Annotated[
        str, typer.Option(help="File of prompts (column prompt), or a set of ours; 12 neutral ones by default.")
    ] = "",
    strengths: Annotated[
        str, typer.Option(help="Comma-separated shares of the residual stream's norm; -0.8 to 1.6 by default.")
    ] = "",
    layers: Annotated[
        str, typer.Option(help="Comma-separated 0-based blocks; the run's best one, or the middle one, by default.")
    ] = "",
    vectors: Annotated[str, typer.Option(help=VECTORS_HELP)] = "",
    judge: Annotated[str, typer.Option(help="embedded, lexicon, or a classifier's hub id or folder.")] = "embedded",
    verify: Annotated[
        bool, typer.Option("--verify", help="Also steer 40 scenarios, with five random directions each.")
    ] = False,
    languages: Annotated[
        bool, typer.Option("--languages", help="Also look at foreign tokens that the vectors raise.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Longest text.")] = 48,
    run: Annotated[
        str, typer.Option(help="Folder of a sweep: its vectors are used, and the study goes into its report.")
    ] = "",
    out: Annotated[str, typer.Option(help="Folder of the study; runs/regimes-MODEL by default.")] = "",
    seed: Annotated[int, typer.Option(help="Of sampling and of random directions.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Print the study if the folder holds one.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Push a model in doses and say what becomes of its texts: surgical, inert, degraded, repetitive or explosive."""
    with _errors():
        from lens_affect.judges import load_judge
        from lens_affect.models import load_model
        from lens_affect.plotting_steering import plot_dose, plot_regimes
        from lens_affect.report import write_report
        from lens_affect.scenarios import load_scenarios
        from lens_affect.steering_study import SteeringStudy, study_steering
        from lens_affect.style import save_figure
        from lens_affect.sweeps import STEERING, load_sweep

        folder = Path(run) / STEERING / "neutral" if run else Path(out or f"runs/regimes-{Path(model).stem}")
        if (folder / "regimes").exists():
            if not resume:
                raise FileExistsError(
                    f"received {folder}, which holds a study; choose another folder with --out, remove it, or print it with --resume"
                )
            print(SteeringStudy.load(folder))
            return
        found, _, best = _saved_vectors(vectors or run) if vectors or run else (None, "", None)
        asked = load_scenarios(prompts) if prompts else None
        chosen = _numbers(layers, int, "--layers") or ([best] if best is not None else None)
        doses = _numbers(strengths, float, "--strengths") or "auto"
        reader: Any = load_judge(judge)
        with _progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if found is None:
                found, _ = _fit_on_passages(lens, None, report)
            with report("push") as progress:
                study = study_steering(
                    lens,
                    found,
                    reader,
                    prompts=asked,
                    emotions=list(filter(None, emotions.split(","))),
                    layers=chosen,
                    strengths=doses,
                    scenarios=load_scenarios() if verify else None,
                    languages=languages,
                    n_tokens=tokens,
                    seed=seed,
                    progress=progress,
                )
        study.save(folder)
        study.regimes.table.to_csv(folder / "regimes.csv", index=False)
        for name in ("perplexity_ratio", "repetition"):
            save_figure(plot_dose(study.dose, measure=name), folder / f"dose-{name}", study.dose)
        page = save_figure(plot_regimes(study.regimes), folder / "regimes-figure", study.regimes)
        if run:
            page = write_report(load_sweep(run))
        if json:
            print(study.regimes.to_frame().to_json(orient="records", indent=1))
            return
        print(study)
        print(f"{'Report' if run else 'Figure'}: {page.absolute()}")


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    """Comma-separated numbers.

    Raises:
        ValueError: something that is none.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"received {option} {text!r}; allowed are comma-separated numbers, e.g. 0.2,0.4") from None


WEIGHTS_HELP = "Folder, hub id, catalogue name or GGUF file."
TUNED_HELP = "The same, or a LoRA adapter's folder or hub id."


@app.command()
def delta(
    base: Annotated[str, typer.Argument(help=WEIGHTS_HELP)],
    tuned: Annotated[str, typer.Argument(help=TUNED_HELP)],
    control: Annotated[str, typer.Option(help="A fine-tune of the same base on something that is not affect.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it takes in memory and time.")] = False,
    norms_only: Annotated[
        bool, typer.Option("--norms-only", help="No singular values: no spectral norm, no effective rank.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter whose config names another base.")
    ] = False,
    out: Annotated[
        str, typer.Option(help="Folder of the result, with tables and a heatmap; nothing is kept by default.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table of modules and blocks as JSON.")] = False,
) -> None:
    """Where a fine-tune changed the weights: every linear module and block, one tensor at a time."""
    with _errors():
        from lens_affect.delta_plans import plan_delta
        from lens_affect.deltas import compare_modules

        if plan:
            planned = plan_delta(base, tuned, control=control or None, spectrum=not norms_only, any_base=any_base)
            print(planned.to_frame().to_json(orient="records", indent=1) if json else planned)
            return
        _require_new(out)
        with _progress(quiet or json) as report, report("compare") as progress:
            found = compare_modules(
                base, tuned, control=control or None, spectrum=not norms_only, any_base=any_base, progress=progress
            )
        page = None
        if out:
            from lens_affect.plotting_modules import plot_delta
            from lens_affect.style import save_figure

            found.save(out)
            found.to_frame().to_csv(Path(out) / "delta.csv", index=False)
            changed = bool(found.to_frame()["share_of_change"].notna().any())
            page = save_figure(plot_delta(found), Path(out) / "delta-figure", found) if changed else None
        if json:
            print(found.to_frame().to_json(orient="records", indent=1))
            return
        _print_table(found.by_module().round(4), "Change by module")
        print(found)
        for note in found.notes:
            print(f"Note: {note}")
        if page:
            print(f"Figure: {page.absolute()}")


def _require_new(out: str) -> None:
    if out and Path(out).exists():
        raise FileExistsError(f"received the folder {out}, which is there already; choose another with --out")


@app.command()
def transfer(
    base: Annotated[str, typer.Argument(help="The model that is changed: " + WEIGHTS_HELP)],
    tuned: Annotated[str, typer.Argument(help=TUNED_HELP)],
    modules: Annotated[
        str,
        typer.Option(help="Comma-separated arms: q, k, v, o, gate, up, down, attention, mlp, all; gate+up for a pair."),
    ] = "attention,gate,up,down,gate+up,all",
    layers: Annotated[str, typer.Option(help="Comma-separated 0-based blocks; all by default.")] = "",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter whose config names another base.")
    ] = False,
    out: Annotated[str, typer.Option(help="CSV file for the table; nothing is kept by default.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Put modules of a tuned model into the base, arm by arm, and measure the next-token loss on neutral text."""
    with _errors():
        from lens_affect.damage import neutral_loss
        from lens_affect.models import load_model
        from lens_affect.transfers import transfer_modules

        _require_new(out)
        blocks = _numbers(layers, int, "--layers") or None
        with _progress(quiet or json) as report:
            with report("load the base"):
                model = load_model(base, dtype="float32")
            before = neutral_loss(model)
            rows = [_loss_row("none", 0.0, before, None)]
            with report("transfer") as progress:
                arms = [arm for arm in modules.split(",") if arm.strip()]
                for i, arm in enumerate(arms):
                    with transfer_modules(model, tuned, modules=arm, layers=blocks, any_base=any_base) as found:
                        rows.append(_loss_row(arm, found.share, neutral_loss(model), before))
                    progress(i + 1, len(arms))
        _show_losses(rows, f"{base} with modules of {tuned}: loss on neutral text, nats per token", out, json)


@app.command()
def ablate(
    model: Annotated[str, typer.Argument(help=WEIGHTS_HELP)],
    modules: Annotated[
        str,
        typer.Option(help="Comma-separated arms: q, k, v, o, gate, up, down, attention, mlp, all; gate+up for a pair."),
    ] = "attention,gate,up,down",
    layers: Annotated[str, typer.Option(help="Comma-separated 0-based blocks; all by default.")] = "",
    how: Annotated[str, typer.Option(help="base, random_equal_norm, mean, shuffle or zero.")] = "random_equal_norm",
    base: Annotated[str, typer.Option(help="What the model was tuned from, for base and random_equal_norm.")] = "",
    scale: Annotated[
        float, typer.Option(help="Share of the way to the target; for random_equal_norm the c of c |W|.")
    ] = 0.1,
    target: Annotated[
        float, typer.Option(help="Rise of the loss in nats per token that every arm is brought to; overrides --scale.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of random weights and orders.")] = 0,
    out: Annotated[str, typer.Option(help="CSV file for the table; nothing is kept by default.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Ablate modules, arm by arm, and measure the next-token loss on neutral text; --target finds scales of equal damage."""
    with _errors():
        from lens_affect.ablations import ablate_modules
        from lens_affect.damage import equal_damage, neutral_loss
        from lens_affect.models import load_model

        _require_new(out)
        blocks = _numbers(layers, int, "--layers") or None
        arms = [arm.strip() for arm in modules.split(",") if arm.strip()]
        options: dict[str, Any] = {"layers": blocks, "how": how, "base": base or None, "seed": seed}
        with _progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            with report("ablate") as progress:
                if target:
                    found = equal_damage(lens, arms=arms, target=target, progress=progress, **options)
                else:
                    before = neutral_loss(lens)
                    rows = [_loss_row("none", 0.0, before, None, "scale")]
                    for i, arm in enumerate(arms):
                        with ablate_modules(lens, modules=arm, scale=scale, **options):
                            rows.append(_loss_row(arm, scale, neutral_loss(lens), before, "scale"))
                        progress(i + 1, len(arms))
        if target:
            if out:
                found.to_frame().to_csv(out, index=False)
            if json:
                print(found.to_frame().to_json(orient="records", indent=1))
                return
            _print_table(found.to_frame().round(4), "Scales of equal damage")
            print(found)
            return
        _show_losses(rows, f"{model} ablated by {how}: loss on neutral text, nats per token", out, json)


def _loss_row(arm: str, size: float, loss: Any, before: Any, name: str = "share") -> dict[str, Any]:
    """Mean loss over texts, and its rise with a 95 % interval over texts."""
    import math

    from lens_affect.statistics import mean_interval

    rise = None if before is None else mean_interval(loss - before)
    limits = (math.nan,) * 3 if rise is None else (float(rise.estimate), float(rise.low), float(rise.high))
    return {
        "modules": arm,
        name: size,
        "loss": float(loss.mean()),
        **dict(zip(("rise", "low", "high"), limits, strict=True)),
        "n": len(loss),
    }


def _show_losses(rows: list[dict[str, Any]], title: str, out: str, json: bool) -> None:
    import pandas as pd

    table = pd.DataFrame(rows)
    if out:
        table.to_csv(out, index=False)
    if json:
        print(table.to_json(orient="records", indent=1))
        return
    shown = table.round(4)
    _print_table(shown.astype(object).where(shown.notna(), ""), title)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    task: Annotated[
        str, typer.Option(help="A task of ours (an unknown name lists them), or a table with columns text, label.")
    ] = "goemotions",
    modules: Annotated[
        str,
        typer.Option(
            help="Comma-separated arms: q, k, v, o, gate, up, down, attention, mlp, all, none, random; q+v is one arm."
        ),
    ] = "gate,up,attention,all",
    method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 4,
    equal_size: Annotated[
        bool, typer.Option("--equal-size", help="Every arm but all trains as many weights as the gate at this rank.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Training steps of 16 rows.")] = 100,
    seeds: Annotated[str, typer.Option(help="Comma-separated; one run of each arm per seed.")] = "0,1,2",
    n_test: Annotated[int, typer.Option("--test", help="Test rows; as many as there are if fewer.")] = 2000,
    max_words: Annotated[int, typer.Option(help="Longest text of GoEmotions and MELD; 0 for any.")] = 16,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory and time it will take, from the config alone, and stop.")
    ] = False,
    out: Annotated[
        str, typer.Option(help="Folder of the runs; runs/MODEL-tune-TASK by default. Finished runs are kept.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Tune single modules on a task, at equal rank or equal size, and compare what each keeps of tuning all of them."""
    with _errors():
        import pandas as pd

        arms = tuple(part.strip() for part in modules.split(",") if part.strip())
        chosen = _numbers(seeds, int, "--seeds")
        if plan:
            plans = _tuning_plans(model, arms, method, rank, equal_size, steps, n_test)
            if json:
                print(pd.concat([p.to_frame() for p in plans]).to_json(orient="records", indent=1))
                return
            for planned in plans:
                print(planned)
            print(f"{len(chosen)} seeds: {len(chosen)} times the time of each arm")
            return
        from lens_affect.models import load_model
        from lens_affect.module_table import compare_arms
        from lens_affect.tasks import load_task
        from lens_affect.tuning import run_arms

        learned = load_task(task, max_words=max_words or None)
        folder = Path(out or Path("runs") / f"{Path(model).name}-tune-{learned.name}")
        with _progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            runs = run_arms(
                *(lens, learned),
                modules=arms,
                seeds=chosen,
                method=method,
                rank=rank,
                equal_size=equal_size,
                steps=steps,
                n_test=min(n_test, len(learned.examples("test"))),
                folder=folder,
                report=report,
            )
        table = compare_arms(runs, reference="all")
        table.to_frame().to_csv(folder / "arms.csv", index=False)
        table.contrasts.to_csv(folder / "contrasts.csv", index=False)
        if json:
            print(table.to_frame().to_json(orient="records", indent=1))
            return
        print(table)
        shown = [
            "arm",
            "n_parameters",
            "n_seeds",
            "score",
            "low",
            "high",
            "retention",
            "percent_of_tuned",
            "cpu_seconds",
        ]
        _print_table(table.to_frame()[shown].round(3), table.task)
        print(f"Runs: {folder.absolute()}")


def _tuning_plans(
    model: str, arms: tuple[str, ...], method: str, rank: int, equal_size: bool, steps: int, n_test: int
) -> list[Any]:
    """One plan per arm, from a config; of a hub model only the config is fetched."""
    from lens_affect.tuning import arm_size
    from lens_affect.tuning_plans import locate_config, plan_tuning

    config = locate_config(model)
    plans = []
    for arm in arms:
        size: dict[str, Any] = arm_size(config, arm, method, rank, equal_size)
        plans.append(plan_tuning(config, arm, method=method, steps=steps, n_test=n_test, **size))
    return plans


@app.command()
def catalogue(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the models that have a short name, and which are cached."""
    with _errors():
        from lens_affect.catalogue import cache_folder, catalogue_frame

        table = catalogue_frame()
        if json:
            print(table.to_json(orient="records", indent=1))
            return
        _print_table(table, f"Models (cache: {cache_folder()})")


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Run the self-checks of a model and print what they measured; exit code 1 if one fails."""
    with _errors():
        from lens_affect.models import load_model
        from lens_affect.selfchecks import check_model

        report = check_model(load_model(model))
        if json:
            print(report.to_frame().to_json(orient="records", indent=1))
        else:
            _print_table(report.to_frame(), str(report))
        if report.failed:
            for check in report.failed:
                print(f"{check.name}: {check.advice}", file=sys.stderr)
            raise SystemExit(1)


def _print_scorecard(card: Any) -> None:
    shown = card.to_frame()[
        ["id", "claim", "model", "source", "sound_statistic", "low", "high", "null", "n", "verdict"]
    ].round(2)
    shown = shown.rename(columns={"sound_statistic": "sound"}).astype(object).where(shown.notna(), "")
    _print_table(shown, "Scorecard")
    print(card)


def _print_table(table: Any, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for column in table.columns:
        drawn.add_column(str(column))
    for row in table.itertuples(index=False):
        drawn.add_row(*("yes" if v is True else "" if v is False else str(v) for v in row))
    # In a pipe a table of 80 columns would hide its numbers.
    Console(width=None if sys.stdout.isatty() else 200).print(drawn)


@contextmanager
def _errors() -> Iterator[None]:
    """Wrong input ends with code 2, a failed run with 1; both with one message and no traceback (LENS_AFFECT_DEBUG=1 shows it)."""
    try:
        yield
    except (ValueError, TypeError, FileExistsError, FileNotFoundError) as error:
        _fail(error, 2)
    except (RuntimeError, OSError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted; finished steps are kept: run the same command with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("LENS_AFFECT_DEBUG"):
        raise error
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], Any]]:
    """Progress bars on a terminal, a line per step elsewhere, nothing with --quiet."""
    if quiet:
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    @contextmanager
    def step(name: str) -> Iterator[Callable[[int, int], None]]:
        start = time.monotonic()
        task = bars.add_task(name, total=None)
        last = [start]

        def update(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - last[0] > 15:
                last[0] = time.monotonic()
                console.print(f"  {name}: {done} of {total}")

        if not console.is_terminal:
            console.print(f"{name} ...")
        yield update
        bars.update(task, completed=1, total=1) if bars.tasks[task].total is None else None
        if not console.is_terminal:
            console.print(f"  {name}: done in {time.monotonic() - start:.0f} s")

    with bars:
        yield step


@contextmanager
def _nothing(name: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
