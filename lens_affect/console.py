"""What the commands share: one message per error with its exit code, progress, tables, vectors given by a folder."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

VECTORS_HELP = "Folder of a finished sweep or of saved emotion vectors; by default they are fitted on our passages."


def saved_vectors(folder: str) -> tuple[Any, str, int | None]:
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


def fit_on_passages(
    model: Any, layer: int | None, report: Callable[[str], Any], *, topics: list[str] | None = None
) -> tuple[Any, str]:
    """Vectors from our passages (of some topics), and where they come from; a layer that is not there ends it before anything is read."""
    from lens_affect.activations import extract_activations
    from lens_affect.stimuli import load_stimuli
    from lens_affect.vectors import fit_vectors

    if layer is not None and not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"received layer {layer}; allowed are 0 to {model.cfg.n_layers - 1}")
    passages = load_stimuli("passages")
    passages = passages if topics is None else passages.select(groups=topics)
    with report("fit vectors on the passages") as progress:
        activations = extract_activations(model, passages, pooling="mean_without_sinks", progress=progress)
    return fit_vectors(
        activations
    ), f"Vectors: fitted now on our {len(passages)} passages; --vectors FOLDER takes saved ones"


def parse_numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    """Comma-separated numbers.

    Raises:
        ValueError: something that is none.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"received {option} {text!r}; allowed are comma-separated numbers, e.g. 0.2,0.4") from None


def print_table(table: Any, title: str) -> None:
    """A table as wide as it needs to be in a pipe."""
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
def reporting_errors() -> Iterator[None]:
    """Wrong input ends with code 2, a failed run with 1; both with one message and no traceback (LENS_AFFECT_DEBUG=1 shows it)."""
    with _noting_interrupts() as interrupts:
        try:
            yield
        except KeyboardInterrupt:
            _stop()
        except (ValueError, TypeError, FileExistsError, FileNotFoundError) as error:
            _stop() if interrupts else _fail(error, 2)
        except (RuntimeError, OSError) as error:
            _stop() if interrupts else _fail(error, 1)


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Every Ctrl-C: compiled libraries that are hit by one may end with another error, which is then no fault of the input."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    # A job in the background ignores the signal, and only the main thread may ask for it.
    asked = threading.current_thread() is threading.main_thread()
    if not asked or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop() -> None:
    print("interrupted; finished steps are kept: run the same command with --resume", file=sys.stderr)
    raise SystemExit(130) from None


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("LENS_AFFECT_DEBUG"):
        raise error
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[str], Any]]:
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
