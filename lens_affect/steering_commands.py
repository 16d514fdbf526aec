"""Commands that push a model: `lens-affect steer`, `lens-affect regimes`."""

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
    with reporting_errors():
        import numpy as np
        import pandas as pd

        from lens_affect.doses import UNSTEERED, sweep_strengths
        from lens_affect.models import load_model

        found = saved_vectors(vectors)[0] if vectors else None
        strengths, chosen = parse_numbers(strength, float, "--strength"), parse_numbers(layers, int, "--layers")
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
        bool, typer.Option("--verify", help="Also steer 40 scenarios, with five random directions each.")
    ] = False,
    languages: Annotated[
        bool, typer.Option("--languages", help="Also look at foreign tokens that the vectors raise.")
    ] = False,
    bisect: Annotated[
        str, typer.Option(help="Comma-separated emotions whose boundaries between regimes are searched by bisection.")
    ] = "",
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
    with reporting_errors():
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
        found, _, best = saved_vectors(vectors or run) if vectors or run else (None, "", None)
        asked = load_scenarios(prompts) if prompts else None
        chosen = parse_numbers(layers, int, "--layers") or ([best] if best is not None else None)
        doses = parse_numbers(strengths, float, "--strengths") or "auto"
        reader: Any = load_judge(judge)
        with show_progress(quiet or json) as report:
            with report("load the model"):
                lens = load_model(model, dtype="float32")
            if found is None:
                found, _ = fit_on_passages(lens, None, report)
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
                    bisected=list(filter(None, bisect.split(","))),
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
