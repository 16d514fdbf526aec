"""Commands that push a model: `lens-affect steer`, `lens-affect regimes`."""

import re
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_affect.console import (
    VECTORS_HELP,
    fit_on_passages,
    parse_numbers,
    print_table,
    reporting_errors,
    saved_vectors,
    show_progress,
)

SPOKEN = {"English": "passages", "Spanish": "passages_es", "Chinese": "passages_zh"}
"""Languages whose vectors are tried in each other, with our texts."""
COMMAND = "command.json"
"""File in a study's folder that says which command made it, and whether it came to its end."""


def steer(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="A request, or an opening to be continued.")],
    emotion: Annotated[str, typer.Option(help="Whose direction is added.")],
    strength: Annotated[
        str, typer.Option(help="Comma-separated shares of the residual stream's norm; negative pushes away.")
    ] = "0.4",
    layers: Annotated[
        str,
        typer.Option(
            help="Comma-separated 0-based blocks; the best one of the run in --vectors, or the middle one, by default."
        ),
    ] = "",
    vectors: Annotated[str, typer.Option(help=VECTORS_HELP)] = "",
    tokens: Annotated[int, typer.Option(help="Longest text.")] = 48,
    seed: Annotated[int, typer.Option(help="Of sampling and of the random direction.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What a model writes without steering, pushed along an emotion, and pushed as far along a random direction."""
    with reporting_errors():
        import numpy as np
        import pandas as pd

        from lens_affect.doses import UNSTEERED, sweep_strengths
        from lens_affect.models import load_model

        found, _, best = saved_vectors(vectors) if vectors else (None, "", None)
        strengths, chosen = parse_numbers(strength, float, "--strength"), _layers(layers, best)
        with show_progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if found is None:
                found, _ = fit_on_passages(lens, None, report)
            with report("write") as progress:
                dose = sweep_strengths(
                    lens,
                    found,
                    [prompt],
                    emotions=[emotion],
                    layers=chosen,
                    strengths=strengths,
                    controls=("random",),
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
        print_table(shown.round(2), f"{dose.provenance.title}: {emotion}")


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
        bool,
        typer.Option(
            "--verify", help="Also steer 40 scenarios, with five random directions and another emotion's each."
        ),
    ] = False,
    languages: Annotated[
        bool,
        typer.Option(
            "--languages",
            help="Also look at foreign tokens that the vectors raise, and try vectors of English, Spanish and Chinese in each other.",
        ),
    ] = False,
    reading: Annotated[
        str,
        typer.Option(
            help="Also correlate the judge with what vectors from other texts read inside the model: their folder, or `halves`, which fits both from our "
            "passages, half of the topics to steer and half to read."
        ),
    ] = "",
    bisect: Annotated[
        str, typer.Option(help="Comma-separated emotions whose boundaries between regimes are searched by bisection.")
    ] = "",
    tokens: Annotated[int, typer.Option(help="Longest text.")] = 48,
    run: Annotated[
        str, typer.Option(help="Folder of a sweep: its vectors are used, and the study goes into its report.")
    ] = "",
    out: Annotated[
        str, typer.Option(help="Folder of the study; runs/regimes-MODEL by default, with - for each / in the name.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of sampling and of random directions.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Print the study if the folder holds it, or make its missing parts.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Push a model in doses and say what becomes of its texts: surgical, inert, degraded, repetitive or explosive."""
    with reporting_errors():
        from lens_affect.judges import load_judge
        from lens_affect.models import load_model
        from lens_affect.plotting_steering import plot_dose, plot_regimes
        from lens_affect.report import write_report
        from lens_affect.scenarios import load_scenarios
        from lens_affect.steering_study import SteeringStudy, study_steering
        from lens_affect.stimuli import load_stimuli
        from lens_affect.style import save_figure
        from lens_affect.sweeps import load_sweep

        folder = _folder_of(model, run, out)
        said = {"model": model, "emotions": emotions, "prompts": prompts, "strengths": strengths, "layers": layers}
        said |= {"vectors": _place(vectors), "judge": judge, "verify": verify, "languages": languages}
        said |= {"reading": _place(reading), "bisect": bisect, "tokens": tokens, "run": _place(run), "seed": seed}
        if _is_finished(folder, said, resume, own=not run):
            _show(SteeringStudy.load(folder), json)
            return
        if reading == "halves" and (vectors or run):
            raise ValueError(
                "received --reading halves with --vectors or --run; allowed is --reading halves alone, which fits both from our passages, or a folder of "
                "vectors from other texts than those that steer"
            )
        found, _, best = saved_vectors(vectors or run) if vectors or run else (None, "", None)
        reads = saved_vectors(reading)[0] if reading and reading != "halves" else None
        asked = load_scenarios(prompts) if prompts else None
        chosen = _layers(layers, best)
        doses = parse_numbers(strengths, float, "--strengths") or "auto"
        reader: Any = load_judge(judge)
        spoken = {language: load_stimuli(name) for language, name in SPOKEN.items()} if languages else None
        with show_progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if reading == "halves":
                topics = list(dict.fromkeys(load_stimuli("passages").groups))
                found, reads = (fit_on_passages(lens, None, report, topics=topics[half::2])[0] for half in (0, 1))
            elif found is None:
                found, _ = fit_on_passages(lens, None, report)
            if reads is not None and reads.provenance.stimuli_hash == found.provenance.stimuli_hash:
                raise ValueError(
                    f"received --reading {reading}, whose vectors are from the texts of those that steer; allowed are vectors from other texts, or halves"
                )
            _note(folder, said, finished=False)
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
                    transfer=spoken,
                    bisected=list(filter(None, bisect.split(","))),
                    reading=reads,
                    folder=folder,
                    n_tokens=tokens,
                    seed=seed,
                    progress=progress,
                )
        study.regimes.table.to_csv(folder / "regimes.csv", index=False)
        for name in ("perplexity_ratio", "repetition"):
            save_figure(plot_dose(study.dose, measure=name), folder / f"dose-{name}", study.dose)
        page = save_figure(plot_regimes(study.regimes), folder / "regimes-figure", study.regimes)
        if run:
            page = write_report(load_sweep(run))
        _note(folder, said, finished=True)
        _show(study, json)
        if not json:
            print(f"{'Report' if run else 'Figure'}: {page.absolute()}")


def slug(model: str) -> str:
    """A folder's name for a model: its whole name, so that Llama-3.2-3B and Llama-3.1-8B have folders of their own."""
    return re.sub(r"[^\w.+-]+", "-", model).strip("-.") or "model"


def _folder_of(model: str, run: str, out: str) -> Path:
    """Where the study lies."""
    from lens_affect.sweeps import STEERING

    if run and out:
        raise ValueError("received --run and --out; allowed is one of them: a study of a run lies in the run's folder")
    return Path(run) / STEERING / "neutral" if run else Path(out or f"runs/regimes-{slug(model)}")


def _show(study: Any, json: bool) -> None:
    """A study in words, or its cells as JSON."""
    print(study.regimes.to_frame().to_json(orient="records", indent=1) if json else study)


def _place(path: str) -> str:
    """A path without what makes no difference, such as a / at its end."""
    return str(Path(path)) if path else ""


def _layers(asked: str, best: int | None) -> list[int] | None:
    """The layers that are asked for, else the best one of a run, else None for the middle one."""
    return parse_numbers(asked, int, "--layers") or ([best] if best is not None else None)


def _note(folder: Path, said: dict[str, Any], *, finished: bool) -> None:
    from lens_affect.results import write_text_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / COMMAND, dumps({"asked": said, "finished": finished}, indent=1))


def _is_finished(folder: Path, said: dict[str, Any], resume: bool, *, own: bool) -> bool:
    """Whether the folder holds the study that is asked for, from beginning to end.

    Raises:
        FileExistsError: the folder holds a study, and no --resume was given, or it was asked for otherwise.
    """
    from lens_affect.steering_study import different, saved_parts

    elsewhere = "choose another folder with --out, " if own else ""
    note = folder / COMMAND
    before = loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    if saved_parts(folder):
        if not resume:
            raise FileExistsError(
                f"received {folder}, which holds a study; {elsewhere}remove it, or print or finish it with --resume"
            )
        if before is None or before["asked"] != said:
            raise FileExistsError(
                f"received --resume for {folder}, which holds a study {different(before and before['asked'], said)}; give the same command, {elsewhere}"
                "or remove it"
            )
        return bool(before["finished"])
    return False
