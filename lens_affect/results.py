"""Provenance, and saving and loading of results.

A result is a frozen dataclass. It is saved as a folder: tensors in `arrays.safetensors`, tables as Parquet, everything
else in `result.json`, and a `manifest.json` with the SHA-256 of every file. A folder appears under its name only when it
is complete (write beside it, then rename), and nothing is ever unpickled.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """What a number needs to be trusted and repeated. Unknown is None, never a guess."""

    model: str = "none"
    """Name of the model as a reader knows it, without its precision."""
    source: str | None = None
    """Where the weights came from: a package, a hub id, a folder."""
    revision: str | None = None
    """Hub revision, where there is one."""
    weights_sha256: str | None = None
    """Hash of the weight file, or of the parameters of a model that was handed over in memory."""
    source_precision: str | None = None
    """Precision of the stored weights where it is below the one they run in, e.g. `Q4_1`."""
    dtype: str | None = None
    """Precision of the forward pass, e.g. `float32`."""
    numerics: str | None = None
    """`hf` (raw weights, equal to Hugging Face) or `compatibility` (norms folded, weights centred)."""
    bos: str | None = None
    """`prepended`, `template` or `none`; both, joined by `+`, when a run read plain texts and chats."""
    chat_template_hash: str | None = None
    """First 16 hex digits of the SHA-256 of the chat template."""
    stimuli_hash: str | None = None
    """First 16 hex digits of the SHA-256 over texts, labels, groups and prompts."""
    seed: int | None = None
    """Seed of whatever was drawn at random in this step."""
    device: str | None = None
    """`cpu`, `cuda`, ..."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of lens_affect, torch, transformers and transformer-lens."""
    git_commit: str | None = None
    """Commit of the working directory the code was imported from, where it is a checkout."""
    git_dirty: bool | None = None
    """Whether that checkout had uncommitted changes."""
    elapsed_seconds: float = math.nan
    """Duration of the step."""
    checks: dict[str, str] = field(default_factory=dict)
    """Outcome of every self-check of the model (selfchecks.py)."""

    @property
    def title(self) -> str:
        """Model name with the precision its weights were stored in; every printed name uses this."""
        return f"{self.model} ({self.source_precision}, dequantized)" if self.source_precision else self.model

    def updated(self, **changes: Any) -> "Provenance":
        """The same provenance for the next step, with some fields changed."""
        return dataclasses.replace(self, **changes)


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that decide numbers; a missing one is left out."""
    versions = {}
    for name in ("lens-affect", "torch", "transformers", "transformer-lens", "numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout this package is imported from, or (None, None)."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package inside somebody else's repository (a virtual environment, say) is not a checkout of ours.
    if git("ls-files", "--error-unmatch", "results.py") is None:
        return None, None
    status = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD"), None if status is None else bool(status)


class Stopwatch:
    """Seconds since it was made: `Stopwatch().seconds`."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Elapsed wall-clock seconds."""
        return round(time.monotonic() - self._start, 3)


def content_hash(*parts: Any) -> str:
    """First 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def full_disk_explained(place: Path) -> Iterator[None]:
    """Turn "no space left on device" into a message that says where, how much is free, and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports a failed write as an error of its own kind
        full = (
            error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else "os error 28" in str(error)
        )
        if not full:
            raise
        free = shutil.disk_usage(_existing_parent(place)).free
        raise OSError(
            errno.ENOSPC,
            f"received a full disk while writing {place} ({free / 1e6:.0f} MB free); nothing half-written was left "
            "behind. Free some space, or name a folder on another disk (out=, spool=, or LENS_AFFECT_CACHE)",
        ) from error


def _existing_parent(place: Path) -> Path:
    return next(parent for parent in (place, *place.absolute().parents) if parent.exists())


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the given name when the block ends, and vanishes when it fails.

    Raises:
        FileExistsError: the folder is there already and `overwrite` is False.
        OSError: the disk is full; nothing is left behind.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"received the existing folder {target}; allowed is a new one: choose another name or overwrite"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    with full_disk_explained(target):
        try:
            remove_abandoned(target)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise


def remove_abandoned(target: Path) -> None:
    """Temporary folders of this process, and of processes that were killed."""
    for folder in target.parent.glob(f".{target.name}.*.tmp"):
        owner = folder.name.removesuffix(".tmp").rsplit(".", 1)[-1]
        if owner.isdigit() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file so that a reader sees the old one or the whole new one, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with full_disk_explained(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def save_result(result: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a result dataclass as a folder, atomically.

    Args:
        result: a frozen dataclass whose fields are tensors, dicts of tensors, tables, other results or JSON values.
        folder: where to; its parents are made.
        overwrite: replace what is there.
    """
    from safetensors.torch import save_file

    with atomic_folder(folder, overwrite=overwrite) as place:
        arrays: dict[str, torch.Tensor] = {}
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(result):
            value = getattr(result, item.name)
            if not item.init:
                continue
            if isinstance(value, torch.Tensor):
                arrays[item.name] = value
            elif _is_tensor_dict(value):
                arrays |= {f"{item.name}/{key}": tensor for key, tensor in value.items()}
            elif isinstance(value, pd.DataFrame):
                value.to_parquet(place / f"{item.name}.parquet")
            elif isinstance(value, Provenance):
                plain[item.name] = dataclasses.asdict(value)
            elif dataclasses.is_dataclass(value):
                save_result(value, place / item.name)
            else:
                plain[item.name] = value
        if arrays:
            save_file(_unshared(arrays), place / "arrays.safetensors")
        (place / "result.json").write_text(json.dumps(plain, indent=1, sort_keys=True), encoding="utf-8")
        files = {str(f.relative_to(place)): file_sha256(f) for f in sorted(place.rglob("*")) if f.is_file()}
        manifest = {"format": FORMAT, "result": type(result).__name__, "files": files}
        (place / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return Path(folder)


def _unshared(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, with a copy of those whose memory another one uses (safetensors refuses to guess)."""
    seen: set[int] = set()
    found = {}
    for name, value in arrays.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone().contiguous() if place in seen else value.contiguous()
        seen.add(place)
    return found


def load_result(cls: type[T], folder: str | os.PathLike[str]) -> T:
    """Load what `save_result` wrote, after checking every file against its hash.

    Raises:
        FileNotFoundError: no result of ours is in the folder.
        ValueError: another kind of result, a newer format, or a damaged file.
    """
    place = Path(folder)
    manifest = _read_manifest(place)
    if manifest["result"] != cls.__name__:
        raise ValueError(f"received a {manifest['result']} in {place}; {cls.__name__}.load reads only its own kind")
    for name, expected in manifest["files"].items():
        file = place / name
        if not file.is_file() or file_sha256(file) != expected:
            raise ValueError(
                f"received a damaged or missing file {file}; its SHA-256 should be {expected}: make the result again"
            )

    plain = json.loads((place / "result.json").read_text(encoding="utf-8"))
    arrays = _read_arrays(place / "arrays.safetensors")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if not item.init:
            continue
        if item.name in arrays:
            values[item.name] = arrays[item.name]
        elif prefixed := {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{item.name}/")}:
            values[item.name] = prefixed
        elif (place / f"{item.name}.parquet").is_file():
            values[item.name] = pd.read_parquet(place / f"{item.name}.parquet")
        elif (place / item.name / "manifest.json").is_file():
            values[item.name] = load_result(item.type, place / item.name)  # pyright: ignore[reportArgumentType]
        elif item.type is Provenance:
            values[item.name] = Provenance(**plain[item.name])
        elif item.name in plain:
            values[item.name] = _tupled(plain[item.name])
    return cls(**values)


def _read_manifest(place: Path) -> dict[str, Any]:
    path = place / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"received {place}, which holds no saved result (no manifest.json); pass a folder that .save() wrote"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"received a damaged manifest {path}: make the result again") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"received a damaged manifest {path}: make the result again")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"received format {manifest.get('format')} in {place}; this version reads format {FORMAT}")
    if not isinstance(manifest.get("result"), str) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"received a damaged manifest {path}: make the result again")
    return manifest


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        return {}
    from safetensors.torch import load_file

    return load_file(path)  # memory-mapped: pages are read when they are touched


def _is_tensor_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _tupled(value: Any) -> Any:
    """JSON has lists only; sequences in results are tuples."""
    if isinstance(value, list):
        return tuple(_tupled(v) for v in value)
    if isinstance(value, dict):
        return {k: _tupled(v) for k, v in value.items()}
    return value
