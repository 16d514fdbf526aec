"""Commands of the module laboratory: `lens-affect delta`, `transfer`, `ablate`, `tune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lens_affect.console import parse_numbers, print_table, reporting_errors, show_progress

WEIGHTS_HELP = "Folder, hub id, catalogue name or GGUF file."
TUNED_HELP = "The same, or a LoRA adapter's folder or hub id."
SELECTIVITY = ["affect_loss", "control_loss", "selectivity", "selectivity_low", "selectivity_high"]

Arms = Annotated[
    str, typer.Option(help="Comma-separated arms: q, k, v, o, gate, up, down, attention, mlp, all; gate+up for a pair.")
]
Blocks = Annotated[str, typer.Option(help="Comma-separated 0-based blocks; all by default.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Take an adapter whose config names another base.")]
ScoredTask = Annotated[
    str,
    typer.Option(help="Also score a task of ours (an unknown name lists them), or a table with columns text, label."),
]
ControlTask = Annotated[
    bool, typer.Option("--control-task", help="The table given as --task is a task without affect.")
]
TestRows = Annotated[int, typer.Option("--test", help="Test rows of the task; as many as there are if fewer.")]
TableFile = Annotated[str, typer.Option(help="CSV file for the table; nothing is kept by default.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print the table as JSON.")]


def delta(
    base: Annotated[str, typer.Argument(help=WEIGHTS_HELP)],
    tuned: Annotated[str, typer.Argument(help=TUNED_HELP)],
    control: Annotated[str, typer.Option(help="A fine-tune of the same base on something that is not affect.")] = "",
    against: Annotated[
        str,
        typer.Option(help="Another fine-tune of the same base: cosine and principal angles between the two changes."),
    ] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it takes in memory and time.")] = False,
    norms_only: Annotated[
        bool, typer.Option("--norms-only", help="No singular values: no spectral norm, no effective rank.")
    ] = False,
    any_base: AnyBase = False,
    out: Annotated[
        str, typer.Option(help="Folder of the result, with tables and a heatmap; nothing is kept by default.")
    ] = "",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Where a fine-tune changed the weights: every linear module and block, one tensor at a time."""
    with reporting_errors():
        from lens_affect.delta_plans import plan_delta
        from lens_affect.deltas import compare_modules

        if plan:
            planned = plan_delta(base, tuned, control=control or None, spectrum=not norms_only, any_base=any_base)
            print(planned.to_frame().to_json(orient="records", indent=1) if json else planned)
            return
        _require_new(out)
        with show_progress(quiet or json) as report, report("compare") as progress:
            found = compare_modules(
                base, tuned, control=control or None, spectrum=not norms_only, any_base=any_base, progress=progress
            )
        alike = None
        if against:
            with show_progress(quiet or json) as report, report("compare with the other one") as progress:
                other = compare_modules(base, against, spectrum=False, any_base=any_base)
                alike = found.compare(other, progress=progress)
        page = None
        if out:
            from lens_affect.plotting_modules import plot_delta
            from lens_affect.style import save_figure

            found.save(out)
            found.to_frame().to_csv(Path(out) / "delta.csv", index=False)
            if alike is not None:
                alike.save(Path(out) / "against")
                alike.to_frame().to_csv(Path(out) / "against.csv", index=False)
            changed = bool(found.to_frame()["share_of_change"].notna().any())
            page = save_figure(plot_delta(found), Path(out) / "delta-figure", found) if changed else None
        if json:
            table: Any = found.to_frame()
            if alike is not None:
                table = table.merge(alike.to_frame(), on=["module", "layer"], how="left")
            print(table.to_json(orient="records", indent=1))
            return
        print_table(found.by_module().round(4), "Change by module")
        print(found)
        if alike is not None:
            print_table(alike.by_module().round(4), f"Beside the change of {against} (angles in degrees)")
            print(alike)
        for note in found.notes:
            print(f"Note: {note}")
        if page:
            print(f"Figure: {page.absolute()}")


def _require_new(out: str) -> None:
    if out and Path(out).exists():
        raise FileExistsError(f"received the folder {out}, which is there already; choose another with --out")


def transfer(
    base: Annotated[str, typer.Argument(help="The model that is changed: " + WEIGHTS_HELP)],
    tuned: Annotated[str, typer.Argument(help=TUNED_HELP)],
    modules: Arms = "attention,gate,up,down,gate+up,all",
    layers: Blocks = "",
    any_base: AnyBase = False,
    task: ScoredTask = "",
    control_task: ControlTask = False,
    n_test: TestRows = 512,
    out: TableFile = "",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Put modules of a tuned model into the base, arm by arm, and measure the next-token loss on neutral text, and a task."""
    with reporting_errors():
        import pandas as pd

        from lens_affect.checkpoint_pairs import open_pair
        from lens_affect.damage import neutral_loss
        from lens_affect.models import load_model
        from lens_affect.transfers import transfer_modules

        _require_new(out)
        blocks = parse_numbers(layers, int, "--layers") or None
        if task and blocks:
            raise ValueError(
                "received --layers beside --task; a task is scored with modules of all blocks: leave one out"
            )
        scored = _task_examples(task, n_test, control_task)
        parts = None
        with show_progress(quiet or json) as report:
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
            if scored is not None:
                from lens_affect.part_scores import score_parts

                with report("score the task") as progress:
                    parts = score_parts(model, tuned, scored[0], arms=arms, examples=scored[1], progress=progress)
                known = {row["arm"]: row for row in parts.to_frame().to_dict("records")}
                shown = ("score", "share", "share_low", "share_high")
                rows = [row | {f"task_{c}": known.get(row["modules"], {}).get(c) for c in shown} for row in rows]
        _show_table(
            pd.DataFrame(rows), f"{base} with modules of {tuned}: loss on neutral text, nats per token", out, json
        )
        if not json:
            for note in open_pair(model, tuned, any_base=any_base).notes:
                print(f"Note: {note}")
        if parts is not None:
            if not json:
                print(parts)
            if bool(parts.to_frame()["share"].notna().to_numpy().any()):
                from lens_affect.plotting_modules import plot_parts

                _save_figure(lambda: plot_parts(parts), out, json, parts)


def ablate(
    model: Annotated[str, typer.Argument(help=WEIGHTS_HELP)],
    modules: Arms = "attention,gate,up,down",
    layers: Blocks = "",
    how: Annotated[str, typer.Option(help="base, random_equal_norm, mean, shuffle or zero.")] = "random_equal_norm",
    base: Annotated[str, typer.Option(help="What the model was tuned from, for base and random_equal_norm.")] = "",
    scale: Annotated[
        float | None,
        typer.Option(
            help="Share of the way to the target; for random_equal_norm without a base the c of c |W|. 1 by default, 0.1 for c."
        ),
    ] = None,
    target: Annotated[
        float, typer.Option(help="Rise of the loss in nats per token that every arm is brought to; overrides --scale.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of random weights and orders.")] = 0,
    task: ScoredTask = "",
    n_test: TestRows = 512,
    out: TableFile = "",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Ablate modules, arm by arm, and measure the next-token loss on neutral text; --target finds scales of equal damage, --task the selectivity."""
    with reporting_errors():
        import pandas as pd

        from lens_affect.ablations import ablate_modules
        from lens_affect.damage import equal_damage, neutral_loss
        from lens_affect.models import load_model

        _require_new(out)
        blocks = parse_numbers(layers, int, "--layers") or None
        _refuse_adapter(model)
        scale = scale if scale is not None else 0.1 if how == "random_equal_norm" and not base else 1.0
        arms = [arm.strip() for arm in modules.split(",") if arm.strip()]
        options: dict[str, Any] = {"layers": blocks, "how": how, "base": base or None, "seed": seed}
        scored = _task_examples(task, n_test)
        selective = None
        with show_progress(quiet or json) as report:
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
            scales: Any = found.scale_of if target else scale
            if scored is not None and scales:  # no arm may have reached the target
                with report("score the task") as progress:
                    selective = _selectivity(lens, scored, arms, scales, options, progress)
        told = None
        if selective is not None:
            named = {"low": "selectivity_low", "high": "selectivity_high"}
            told = selective.to_frame().set_index("arm").rename(columns=named)[SELECTIVITY]
        if target:
            table = found.to_frame()
            table = table if told is None else table.join(told, on="arm")
            _show_table(table, "Scales of equal damage", out, json)
            if not json:
                print(found)
        else:
            table = pd.DataFrame(rows)
            table = table if told is None else table.join(told, on="modules")
            _show_table(table, f"{model} ablated by {how}: loss on neutral text, nats per token", out, json)
        if selective is not None:
            if not json:
                print(selective)
            if bool(selective.to_frame()["selectivity"].notna().to_numpy().any()):
                from lens_affect.plotting_modules import plot_selectivity

                _save_figure(lambda: plot_selectivity(selective), out, json, selective)


def _save_figure(draw: Any, out: str, json: bool, *results: Any) -> None:
    """Beside the table, where one is kept."""
    if not out:
        return
    from lens_affect.style import save_figure

    page = save_figure(draw(), Path(out).with_name(f"{Path(out).stem}-figure"), *results)
    if not json:
        print(f"Figure: {page.absolute()}")


def _refuse_adapter(model: str) -> None:
    if (Path(model) / "adapter_config.json").is_file():
        raise ValueError(
            f"received the adapter {model} as the model that is ablated; allowed is a whole model: merge it into its base and name that folder, or use "
            "lens-affect transfer BASE ADAPTER"
        )


def _task_examples(name: str, n: int, control: bool = False) -> tuple[Any, Any] | None:
    """A task with its test examples; None where none was asked for."""
    if not name:
        return None
    from lens_affect.tasks import load_task

    task = load_task(name, affective=False if control else None)
    return task, task.examples("test", n=min(n, len(task.examples("test"))))


def _selectivity(
    model: Any, scored: tuple[Any, Any], arms: list[str], scales: Any, options: dict[str, Any], progress: Any
) -> Any:
    """Task lost minus language lost, in SDs, with every arm ablated."""
    from lens_affect.checkpoints import open_checkpoint
    from lens_affect.damage import neutral_loss
    from lens_affect.selectivity import scan_ablations

    task, examples = scored
    sign = 1.0 if task.score(model, examples[:1]).better == "high" else -1.0
    blocks = options["layers"] or range(open_checkpoint(model).n_layers)
    return scan_ablations(
        model,
        arms=[arm for arm in arms if not isinstance(scales, dict) or arm in scales],
        affect=lambda m: sign * task.score(m, examples).values.double().numpy(),
        control=lambda m: -neutral_loss(m),
        bands={f"{min(blocks)}-{max(blocks)}": tuple(blocks)},
        how=options["how"],
        base=options["base"],
        scales=scales,
        affect_groups=[e.group for e in examples],
        seed=options["seed"],
        progress=progress,
    )


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


def _show_table(table: Any, title: str, out: str, json: bool) -> None:
    if out:
        table.to_csv(out, index=False)
    if json:
        print(table.to_json(orient="records", indent=1))
        return
    shown = table.round(4)
    print_table(shown.astype(object).where(shown.notna(), ""), title)


def tune(
    model: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or GGUF file.")],
    task: Annotated[
        str, typer.Option(help="A task of ours (an unknown name lists them), or a table with columns text, label.")
    ] = "goemotions",
    control_task: ControlTask = False,
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
    n_test: TestRows = 2000,
    max_words: Annotated[int, typer.Option(help="Longest text of GoEmotions and MELD; 0 for any.")] = 16,
    shuffled: Annotated[
        bool, typer.Option("--shuffled-labels", help="A control: the labels of training rows permuted.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory and time it will take, from the config alone, and stop.")
    ] = False,
    out: Annotated[
        str, typer.Option(help="Folder of the runs; runs/MODEL-tune-TASK by default. Finished runs are kept.")
    ] = "",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Tune single modules on a task, at equal rank or equal size, and compare what each keeps of tuning all of them."""
    with reporting_errors():
        arms = tuple(part.strip() for part in modules.split(",") if part.strip())
        chosen = parse_numbers(seeds, int, "--seeds")
        if plan:
            _print_plans(_tuning_plans(model, arms, method, rank, equal_size, steps, n_test), len(chosen), json)
            return
        from lens_affect.models import load_model
        from lens_affect.module_table import compare_arms
        from lens_affect.tuning import run_arms

        learned = _learned_task(task, max_words, shuffled, control_task)
        folder = Path(out or Path("runs") / f"{Path(model).name}-tune-{learned.name}")
        with show_progress(quiet or json) as report:
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
        pages = _keep_tables(table, runs, folder)
        if json:
            print(table.to_frame().to_json(orient="records", indent=1))
            return
        print(table)
        shown = ["arm", "n_parameters", "size_difference", "n_seeds", "score", "low", "high"]
        shown += ["retention", "percent_of_tuned", "cpu_seconds"]
        print_table(table.to_frame()[shown].round(3), table.task)
        print(f"Runs: {folder.absolute()}")
        for page in pages:
            print(f"Figure: {page.absolute()}")


def _learned_task(name: str, max_words: int, shuffled: bool, control: bool) -> Any:
    """A task, or its control with permuted labels."""
    from lens_affect.tasks import ChoiceTask, load_task

    task = load_task(name, max_words=max_words or None, affective=False if control else None)
    if not shuffled:
        return task
    if not isinstance(task, ChoiceTask):
        raise ValueError(f"received --shuffled-labels for {task.name}; allowed are tasks of one label per text")
    return task.shuffled()


def _keep_tables(table: Any, runs: Any, folder: Path) -> list[Path]:
    """Tables and figures beside the runs; the pages of the figures."""
    from lens_affect.module_table import LearningCurves, learning_curves
    from lens_affect.plotting_tuning import plot_learning, plot_retention
    from lens_affect.style import save_figure

    table.to_frame().to_csv(folder / "arms.csv", index=False)
    table.contrasts.to_csv(folder / "contrasts.csv", index=False)
    pages = []
    if bool(table.arms["retention"].notna().to_numpy().any()):
        pages.append(save_figure(plot_retention(table), folder / "retention", table))
    if (curves := learning_curves(runs)).size:
        pages.append(save_figure(plot_learning(curves), folder / "learning", LearningCurves(curves, table.provenance)))
    return pages


def _print_plans(plans: list[Any], n_seeds: int, json: bool) -> None:
    import pandas as pd

    if json:
        print(pd.concat([p.to_frame() for p in plans]).to_json(orient="records", indent=1))
        return
    for planned in plans:
        print(planned)
    print(f"{n_seeds} seeds: {n_seeds} times the time of each arm")


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
