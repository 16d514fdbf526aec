"""Where pooled rows go while a model reads: memory-mapped files, or running moments. Memory does not grow with the texts."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lens_affect.results import full_disk_explained
from lens_affect.stimuli import Stimuli

CLOSED = -1


class Stored(NamedTuple):
    """What a store gives back when all rows are written."""

    rows: list[int]
    """Stimulus that stands for each entry."""
    counts: Tensor
    """Texts behind each entry."""
    arrays: dict[str, Tensor]
    """Values (means) by name, `[entry, layer, width]`."""
    squares: dict[str, Tensor]
    """Mean squares by name; empty where each entry is one text."""


class Spool:
    """Rows written as they come into safetensors files, then memory-mapped. Plain writes: written pages cost no resident memory."""

    def __init__(self, n_rows: int, shapes: dict[str, tuple[int, int]], folder: str | os.PathLike[str] | None) -> None:
        self._n_rows = n_rows
        self._temporary = None if folder else tempfile.mkdtemp(prefix="lens_affect-")
        self._folder = Path(folder or str(self._temporary))
        self._files: dict[str, tuple[int, int]] = {}
        try:
            with full_disk_explained(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                for name, shape in shapes.items():
                    self._reserve(name, shape)
        except BaseException:
            self.discard()
            raise

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _reserve(self, name: str, shape: tuple[int, int]) -> None:
        """A file with its header and room for all rows, so that a disk that is too small is found before any long work starts."""
        size = self._n_rows * math.prod(shape) * 4
        header = json.dumps(
            {name: {"dtype": "F32", "shape": [self._n_rows, *shape], "data_offsets": [0, size]}}
        ).encode()
        header += b" " * (-len(header) % 8)
        self._path(name).unlink(missing_ok=True)  # an earlier result may still be mapped from a file of this name
        descriptor = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files[name] = (descriptor, 8 + len(header))
        os.pwrite(descriptor, len(header).to_bytes(8, "little") + header, 0)
        os.posix_fallocate(descriptor, 8 + len(header), max(size, 1))

    def write(self, rows: list[int], pooled: dict[str, Tensor]) -> None:
        """Write a batch's rows where they belong."""
        with full_disk_explained(self._folder):
            for name, values in pooled.items():
                descriptor, offset = self._files[name]
                for row, value in zip(rows, values, strict=True):
                    data = value.contiguous().numpy().tobytes()
                    os.pwrite(descriptor, data, offset + row * len(data))

    def finish(self) -> Stored:
        """Close the files and map them."""
        from safetensors.torch import load_file

        arrays: dict[str, Tensor] = {}
        for name in self._files:
            self._close(name)
            arrays |= load_file(self._path(name))
        if self._temporary is not None:
            # An unlinked file stays readable through its mapping, so the folder's name is not needed any more.
            shutil.rmtree(self._temporary, ignore_errors=True)
        return Stored(list(range(self._n_rows)), torch.ones(self._n_rows, dtype=torch.long), arrays, {})

    def discard(self) -> None:
        """Leave nothing behind."""
        for name in self._files:
            self._close(name)
            self._path(name).unlink(missing_ok=True)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _close(self, name: str) -> None:
        descriptor, offset = self._files[name]
        if descriptor != CLOSED:
            os.close(descriptor)
            self._files[name] = (CLOSED, offset)


class Moments:
    """Mean and mean square per (emotion, group) cell."""

    def __init__(self, stimuli: Stimuli, shapes: dict[str, tuple[int, int]]) -> None:
        cells: dict[tuple[str, str], int] = {}
        self._first: list[int] = []
        self._cell = []
        for row, key in enumerate(zip(stimuli.emotions, stimuli.groups, strict=True)):
            if key not in cells:
                cells[key] = len(cells)
                self._first.append(row)
            self._cell.append(cells[key])
        self._counts = torch.zeros(len(cells), dtype=torch.long)
        self._mean = {name: torch.zeros(len(cells), *shape) for name, shape in shapes.items()}
        self._square = {name: torch.zeros(len(cells), *shape) for name, shape in shapes.items()}

    def write(self, rows: list[int], pooled: dict[str, Tensor]) -> None:
        """Add a batch's rows to their cells."""
        for i, row in enumerate(rows):
            cell = self._cell[row]
            self._counts[cell] += 1
            for name, values in pooled.items():
                # Running means do not lose digits as sums of squares of large activations would.
                self._mean[name][cell] += (values[i] - self._mean[name][cell]) / self._counts[cell]
                self._square[name][cell] += (values[i] ** 2 - self._square[name][cell]) / self._counts[cell]

    def finish(self) -> Stored:
        """Means and mean squares of all cells."""
        return Stored(self._first, self._counts, self._mean, self._square)

    def discard(self) -> None:
        """Nothing is on disk."""
