"""Read the header of a GGUF file once, without numpy's slow memory maps.

A vocabulary of 262,144 pieces is some 800,000 small fields. The gguf package slices a memory map for each of them, and transformers reads the
whole file three times for one model: for its config, its tokenizer and its weights.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def read_gguf(path: Path) -> Any:
    """The gguf package's reader of a file, with fields and tensors as it gives them.

    Args:
        path: GGUF file.

    Raises:
        ValueError: a file that is no GGUF, or is cut short.
    """
    try:
        return _reader_class()(str(path))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"received {path}, which is no whole GGUF file ({error}); fetch it again and compare its size with the source's"
        ) from error


def gguf_precision(path: Path) -> str | None:
    """Name of the file's quantization, such as `Q4_1`, or None for 16 or 32 bits.

    Args:
        path: GGUF file.

    Raises:
        ValueError: a file that is no GGUF, or is cut short.
    """
    from gguf import LlamaFileType

    field = read_gguf(path).get_field("general.file_type")
    if field is None:
        return "quantized"
    name = LlamaFileType(field.contents()).name.removeprefix("MOSTLY_")
    return None if name in ("ALL_F32", "F16", "BF16") else name


def gguf_title(path: Path) -> str:
    """The model's name as the file's header gives it, and "(GGUF)", such as `Qwen2.5-Coder-0.5B-Instruct (GGUF)`; the file's stem where it gives none.

    Args:
        path: GGUF file.

    Raises:
        ValueError: a file that is no GGUF, or is cut short.
    """
    reader = read_gguf(path)

    def text(key: str) -> str:
        field = reader.get_field(f"general.{key}")
        return "" if field is None else str(field.contents()).strip()

    # llama.cpp takes the hyphens out of general.name; the fields that it makes of the same name keep them.
    parts = [part for key in ("basename", "size_label", "finetune") if (part := text(key))]
    name = "-".join(parts) if text("basename") else text("name")
    # What the weights were quantized with before is no part of the name: the precision is said beside it.
    return f"{re.sub('[-_ ](awq|gptq|gguf)$', '', name, flags=re.IGNORECASE) or path.stem} (GGUF)"


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Whoever asks the gguf package for a reader inside a `with` block, as transformers does, gets one per file, made once."""
    import gguf

    theirs = gguf.GGUFReader
    setattr(gguf, "GGUFReader", functools.cache(_reader_class()))  # noqa: B010 - transformers looks it up by name, at each call
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", theirs)  # noqa: B010


def _reader_class() -> Callable[..., Any]:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Its slices are plain arrays over the same map: a memory map's own ones copy their attributes each time."""

        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, value: np.ndarray) -> None:
            self._data = np.asarray(value)

    return Reader
