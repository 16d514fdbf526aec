"""Several models with one set of settings, from one YAML file: swept one after the other, judged together."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lens_affect.scorecard import ModelFacts, Scorecard, make_scorecard
from lens_affect.sweeps import Sweep, make_spec, run_sweep


class StudyCell(BaseModel):
    """One model of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Short name; its run lies in a folder of this name."""
    model: str
    """Hub id, catalogue name, folder or GGUF file."""
    family: str
    """Architecture family."""
    tuning: Literal["base", "instruct", "unknown"]
    """Tuned on instructions or not."""
    pair: str = ""
    """Name shared by a base model and its instruct version."""
    parameters: str = ""
    """Size as published, such as 124M."""
    memory_gb: float
    """Memory that the weights need in float32, in GB; half of it in bfloat16."""
    certain: bool = True
    """Whether the source names this model, or it is inferred."""
    of_the_paper: bool = True
    """False for a cell that was added, such as one that runs without a model hub."""


class StudySpec(BaseModel):
    """Several models with one set of settings. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Of the study."""
    about: str = ""
    """What it re-does."""
    settings: dict[str, Any] = {}
    """Of every sweep (sweeps.SweepSpec), without the model."""
    cells: tuple[StudyCell, ...]
    """The models."""


def load_study(path: str | os.PathLike[str]) -> StudySpec:
    """Read a study from a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a study: an unknown or missing key, or settings that no sweep takes.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"received {file}, which is no file; give a study such as analyses/specs/jeong2026.yaml"
        )
    try:
        spec = StudySpec(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(
            f"received {file}, which is no YAML mapping ({error}); see analyses/specs/jeong2026.yaml"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"received {'.'.join(map(str, first['loc']))} = {first.get('input')!r} in {file}: {first['msg']}; allowed keys of a cell are "
            f"{', '.join(StudyCell.model_fields)}"
        ) from error
    for cell in spec.cells:
        make_spec(model=cell.model, **spec.settings)
    return spec


def run_study(
    spec: StudySpec,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    run: Callable[..., Sweep] = run_sweep,
    **options: Any,
) -> Scorecard:
    """Sweep every model of a study (resuming what is there) and judge the claims over all of them.

    Args:
        spec: the study.
        out: one folder per cell is made in it; the scorecard goes to `scorecard.csv`.
        only: names of cells; all by default.
        run: does a sweep.
        options: passed to run_sweep (load, report).

    Raises:
        ValueError: a name that is no cell.
    """
    unknown = set(only) - {c.name for c in spec.cells}
    if unknown:
        raise ValueError(f"received cells {sorted(unknown)}; allowed are {[c.name for c in spec.cells]}")
    chosen = [c for c in spec.cells if not only or c.name in only]
    folder = Path(out)
    sweeps = [run(make_spec(model=c.model, **spec.settings), folder / c.name, resume=True, **options) for c in chosen]
    facts = {c.model: ModelFacts(family=c.family, tuning=c.tuning, pair=c.pair) for c in chosen}
    card = make_scorecard(sweeps, facts)
    card.table.to_csv(folder / "scorecard.csv", index=False)
    (folder / "study.json").write_text(json.dumps(spec.model_dump(), indent=1), encoding="utf-8")
    return card
