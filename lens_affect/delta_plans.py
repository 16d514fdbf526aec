"""What comparing two checkpoints will take, in memory and time, said before any weight is read.

Shapes come from the files' headers, or from configs where there are no weights yet; the machine's speed is measured on small matrices (under a
second).
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lens_affect.catalogue import CATALOGUE
from lens_affect.checkpoint_pairs import open_pair
from lens_affect.checkpoints import Checkpoint
from lens_affect.sizes import count_layers, module_shapes, read_config
from lens_affect.spectra import BLOCK_ENTRIES, BLOCK_ROWS, singular_values, spectral_norm
from lens_affect.tuning_plans import locate_config

DISK = 0.5e9
"""Bytes per second that a file is assumed to be read at."""
FIXED = 32e6
"""Bytes for what does not grow with the model: the allocator's slack and blocks of sums."""
_BYTES = {"F64": 8, "F32": 4, "float32": 4, "float64": 8, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class DeltaPlan:
    """What compare_modules will take."""

    name: str
    """The two checkpoints."""
    n_linear: int
    """Linear modules, all blocks."""
    parameters: int
    """Entries that are compared."""
    read_bytes: int
    """Bytes that are read from both sides; 0 from memory."""
    largest: tuple[int, int]
    """(outputs, inputs) of the largest linear module."""
    peak_bytes: int
    """Upper bound of the memory taken at once, beyond Python and its libraries; models in memory are not counted."""
    seconds: float
    """Estimated time on this machine, with the threads torch has now."""
    threads: int
    """Those threads."""
    spectrum: bool
    """Whether singular values are part of it."""
    assumed: str
    """Where shapes came from."""

    def to_frame(self) -> pd.DataFrame:
        """One row with the fields."""
        return pd.DataFrame([{**self.__dict__, "largest": "x".join(map(str, self.largest))}])

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.n_linear} linear modules, {self.parameters / 1e6:,.0f} M entries compared, {self.read_bytes / 1e9:.2f} GB read at "
            f"{DISK / 1e9:g} GB/s ({self.assumed})\n"
            f"memory at once: at most {self.peak_bytes / 1e6:,.0f} MB beyond the libraries (largest module {self.largest[0]} x {self.largest[1]})\n"
            f"time: about {_duration(self.seconds)} on {self.threads} thread{'s' if self.threads > 1 else ''}"
            f"{'' if self.spectrum else ', without singular values'}"
        )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def peak_bytes(largest: tuple[int, int], *, spectrum: bool = True) -> int:
    """Bound of the memory that comparing takes at once, from the shape of the largest linear module.

    The base, the tuned side and the change are in float32 (12 bytes an entry) beside one tensor as it is stored (4); singular values add the Gram
    matrix with the solver's copies in double precision, and a block of rows; everything else is read in blocks of `spectra.BLOCK_ENTRIES`.

    Args:
        largest: (outputs, inputs).
        spectrum: whether singular values are measured.
    """
    entries, side = largest[0] * largest[1], min(largest)
    gram = (40 * side**2 + 16 * BLOCK_ROWS * side) if spectrum else 0
    return int(FIXED + max(16 * entries + gram, 24 * BLOCK_ENTRIES))


def plan_delta(
    base: Any, tuned: Any, *, control: Any = None, spectrum: bool = True, any_base: bool = False
) -> DeltaPlan:
    """Say what compare_modules will take, before any weight is read.

    Args:
        base: as for compare_modules; a folder may hold a config.json alone, and of a hub model that is not here only the config is fetched.
        tuned: the same.
        control: also read, without singular values.
        spectrum: as for compare_modules.
        any_base: as for compare_modules.

    Returns:
        The plan. Memory is a bound that the tests hold compare_modules to; time is an estimate.

    Raises:
        ValueError: as compare_modules, for what names and shapes show.

    Example:
        >>> print(plan_delta("base-folder", "tuned-folder"))  # doctest: +SKIP
    """
    config_only = _config_only(base)
    if config_only is not None:
        shapes, extra, width = _from_config(config_only)
        name, assumed = str(base), "shapes and precision from config.json, both sides as large"
        read = 2 * width * (sum(a * b for a, b in shapes) + extra)
    else:
        pair = open_pair(base, tuned, any_base=any_base)
        keys = (*pair.keys, *pair.untouched_keys)
        parts = [pair.base.parts[key] for key in keys]
        shapes = [(p.shape[0], p.shape[1]) for p in parts if p.is_linear]
        extra = sum(p.size for p in parts if not p.is_linear)
        sides = [side for side in (pair.base, pair.tuned) if side.source is not None]
        read = sum(_stored_bytes(side, keys) for side in sides)
        name, assumed = (
            f"{pair.base.title} -> {pair.tuned.title}",
            "shapes from the files" if sides else "shapes from memory",
        )
    read += read // 2 if control is not None else 0
    largest = max(shapes, key=lambda s: s[0] * s[1])
    return DeltaPlan(
        name=name,
        n_linear=len(shapes),
        parameters=sum(a * b for a, b in shapes) + extra,
        read_bytes=read,
        largest=largest,
        peak_bytes=peak_bytes(largest, spectrum=spectrum),
        seconds=read / DISK
        + _seconds(shapes, extra, spectrum)
        + (_seconds(shapes, extra, False) if control is not None else 0),
        threads=torch.get_num_threads(),
        spectrum=spectrum,
        assumed=assumed,
    )


def _config_only(base: Any) -> Any:
    """The config of a folder without weights, or of a hub model whose weights are not here; None for everything else."""
    if not isinstance(base, str | Path):
        return None
    if Path(base).is_dir():
        there = (Path(base) / "config.json").is_file() and not any(Path(base).glob("*.safetensors"))
        return read_config(Path(base)) if there else None
    entry = CATALOGUE.get(str(base))
    if (entry is not None and entry.source != "hub") or Path(base).suffix == ".gguf":
        return None
    hub_id = str(entry.hub_id) if entry is not None else str(base)
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    if "/" not in hub_id or any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names):
        return None
    return locate_config(hub_id)


def _from_config(config: Any) -> tuple[list[tuple[int, int]], int, int]:
    shapes = list(module_shapes(config).values()) * count_layers(config)
    hidden, vocabulary = module_shapes(config)["o"][0], int(config.get("vocab_size") or 0)
    width = _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    return shapes, hidden * vocabulary * (1 if config.get("tie_word_embeddings") else 2), width


def _stored_bytes(side: Any, keys: tuple[str, ...]) -> int:
    if isinstance(side, Checkpoint):
        parts = [side.parts[key] for key in keys if key in side.parts]
        return sum(part.size * _BYTES.get(side.store.dtypes[part.tensor], 2) for part in parts)
    return sum(math.prod(shape) * _BYTES.get(side.store.dtypes[name], 2) for name, shape in side.store.shapes.items())


def _seconds(shapes: list[tuple[int, int]], extra: int, spectrum: bool) -> float:
    per_entry, gram, eigen, lanczos = _rates()
    total = per_entry * (sum(a * b for a, b in shapes) + extra)
    if spectrum:
        total += sum(gram * max(s) * min(s) ** 2 + eigen * min(s) ** 3 + lanczos * s[0] * s[1] for s in shapes)
    return total


@functools.cache
def _rates() -> tuple[float, float, float, float]:
    """Seconds per entry of subtracting and summing, per product of the Gram matrix, per cube of its side, and per entry of a spectral norm."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    entry = _timed(lambda: (x - 1.0).double().square().sum()) * 2 / x.numel()
    eigen = _timed(lambda: torch.linalg.eigvalsh(x[:, :384].T.double() @ x[:, :384].double())) / 384**3
    whole = _timed(lambda: singular_values(x[:, :512]))
    gram = max(whole - eigen * 512**3, 0.1 * whole) / (1024 * 512**2)
    return entry, gram, eigen, _timed(lambda: spectral_norm(x)) / x.numel()


def _timed(work: Callable[[], Any]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
