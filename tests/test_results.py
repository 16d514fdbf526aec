"""Saving and loading: whole or not at all, and equal to what was saved."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors
import safetensors.torch
import torch

import lens_affect
from lens_affect.activations import Activations
from lens_affect.localization import LocalizationCurve, localize
from lens_affect.results import (
    Provenance,
    atomic_folder,
    content_hash,
    file_sha256,
    full_disk_explained,
    git_state,
    load_result,
    package_versions,
    save_result,
    write_text_atomically,
)
from lens_affect.stimuli import Stimuli
from lens_affect.stories import Stories
from lens_affect.vectors import EmotionVectors, fit_vectors


@dataclass(frozen=True)
class Inner:
    scores: torch.Tensor
    title: str


@dataclass(frozen=True)
class Everything:
    """One field of every kind that a result may have."""

    floats: torch.Tensor
    halves: torch.Tensor
    counts: torch.Tensor
    flags: torch.Tensor
    scalar: torch.Tensor
    nothing: torch.Tensor
    transposed: torch.Tensor
    by_site: dict[str, torch.Tensor]
    no_sites: dict[str, torch.Tensor]
    table: pd.DataFrame
    empty_table: pd.DataFrame
    stimuli: Stimuli
    inner: Inner
    provenance: Provenance
    names: tuple[str, ...]
    nested: tuple[tuple[int, ...], ...]
    settings: dict[str, tuple[float, ...]]
    missing: float
    unbounded: float
    number: int
    flag: bool
    optional: str | None
    text: str
    derived: int = field(init=False, default=5)


@pytest.fixture
def everything(passages):
    return Everything(
        floats=torch.tensor([[1.5, math.nan], [math.inf, -0.0]]),
        halves=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
        counts=torch.tensor([1, -(2**60)]),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(2.5, dtype=torch.double),
        nothing=torch.empty(0, 3),
        transposed=torch.arange(6.0).view(2, 3).T,
        by_site={"resid_post": torch.ones(2), "blocks.0/mlp/gate": torch.zeros(1, 2)},
        no_sites={},
        table=pd.DataFrame({"emotion": ["sad", "glücklich"], "score": [0.25, math.nan], "n": [1, 2]}),
        empty_table=pd.DataFrame(columns=["emotion", "row", "p"]),
        stimuli=passages.select(emotions=["happy", "neutral"], groups=["train"]),
        inner=Inner(torch.tensor([1.0, 2.0]), "inside"),
        provenance=Provenance(
            model="Tiny", seed=0, source_precision="Q4_1", versions={"torch": "2"}, checks={"logits": "ok"}
        ),
        names=("a", "ü", 'quote " and \n line'),
        nested=((1, 2), ()),
        settings={"band": (0.35, math.nan)},
        missing=math.nan,
        unbounded=-math.inf,
        number=-3,
        flag=True,
        optional=None,
        text="",
    )


def assert_same(a: Any, b: Any, where: str = "result") -> None:
    """Equal in type, dtype, bits and order; NaN equals NaN."""
    assert type(a) is type(b), where
    if dataclasses.is_dataclass(a):
        for item in dataclasses.fields(a):
            assert_same(getattr(a, item.name), getattr(b, item.name), f"{where}.{item.name}")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(torch.nan_to_num(a, nan=-7.25), torch.nan_to_num(b, nan=-7.25)), where
        assert torch.equal(a.isnan(), b.isnan()), where
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b)
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), where


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Round trips


def test_every_kind_of_field_comes_back_as_it_was(everything, tmp_path):
    place = save_result(everything, tmp_path / "deep" / "er" / "result")
    assert place == tmp_path / "deep" / "er" / "result"
    assert_same(load_result(Everything, place), everything)


def test_a_second_save_of_the_loaded_result_has_the_same_bytes(everything, tmp_path):
    save_result(everything, tmp_path / "a")
    save_result(load_result(Everything, tmp_path / "a"), tmp_path / "b")
    assert left_in(tmp_path / "a") == left_in(tmp_path / "b")
    for name in ("arrays.safetensors", "result.json", "stimuli/result.json", "inner/arrays.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_open_formats_are_written(everything, tmp_path):
    save_result(everything, tmp_path / "r")
    assert {p.suffix for p in (tmp_path / "r").rglob("*") if p.is_file()} == {".safetensors", ".parquet", ".json"}
    with safetensors.safe_open(tmp_path / "r" / "arrays.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("transposed"), np.arange(6.0).reshape(2, 3).T)
    assert pd.read_parquet(tmp_path / "r" / "table.parquet")["emotion"].tolist() == ["sad", "glücklich"]


def test_the_manifest_holds_the_hash_of_every_other_file(everything, tmp_path):
    place = save_result(everything, tmp_path / "r")
    manifest = json.loads((place / "manifest.json").read_text())
    files = {name for name in left_in(place) if (place / name).is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == files
    for name in files:
        assert manifest["files"][name] == hashlib.sha256((place / name).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def planted(passages):
    stimuli = passages.select(emotions=["happy", "sad", "angry", "neutral"])
    generator = torch.Generator().manual_seed(0)
    means = {e: torch.randn(8, generator=generator) for e in stimuli.labels}
    values = torch.stack([means[e] for e in stimuli.emotions])[:, None] + torch.randn(
        len(stimuli), 3, 8, generator=generator
    )
    return Activations(
        arrays={"resid_post": values},
        squares={},
        counts=torch.ones(len(stimuli), dtype=torch.long),
        layers=(0, 1, 2),
        embedding={"embedding": torch.randn(len(stimuli), 8, generator=generator)},
        stimuli=stimuli,
        n_layers=3,
        pooling="mean",
        texts_with_sinks={"resid_post": torch.zeros(3, dtype=torch.long)},
        provenance=Provenance(model="planted", numerics="hf"),
    )


def test_activations_and_vectors_come_back_as_they_were(planted, tmp_path):
    planted.save(tmp_path / "activations")
    assert_same(Activations.load(tmp_path / "activations"), planted)
    vectors = fit_vectors(planted)
    vectors.save(tmp_path / "vectors")
    assert_same(EmotionVectors.load(tmp_path / "vectors"), vectors)


@pytest.mark.parametrize(
    ("score", "n_permutations"),
    [("nearest_mean", 20), pytest.param("nearest_mean", 0), ("mean_cosine_neutral", 20)],
)
def test_curves_come_back_as_they_were(planted, tmp_path, score, n_permutations):
    curve = localize(planted, score=score, n_permutations=n_permutations)
    curve.save(tmp_path / "curve")
    assert_same(LocalizationCurve.load(tmp_path / "curve"), curve)


def test_stories_come_back_as_they_were(passages, tmp_path):
    table = pd.DataFrame(
        {"emotion": ["happy"], "slot": [0], "verdict": ["accepted"], "names_emotion": [False], "tokens": [70]}
    )
    stories = Stories(passages, table, len(passages), "chat", Provenance(model="Tiny", seed=3))
    stories.save(tmp_path / "stories")
    assert_same(Stories.load(tmp_path / "stories"), stories)
    assert Stories.load(tmp_path / "stories").stimuli.hash == passages.hash


# Refusals


def test_an_existing_folder_is_refused_and_stays_as_it_is(everything, tmp_path):
    save_result(everything, tmp_path / "r")
    before = (tmp_path / "r" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="existing folder .*r; allowed is a new one: choose another name or over"):
        save_result(everything, tmp_path / "r")
    assert (tmp_path / "r" / "manifest.json").stat().st_mtime_ns == before
    assert left_in(tmp_path)[0] == "r"


def test_overwriting_replaces_everything_that_was_there(everything, tmp_path):
    save_result(everything, tmp_path / "r")
    (tmp_path / "r" / "stray.txt").write_text("x")
    save_result(everything.inner, tmp_path / "r", overwrite=True)
    assert left_in(tmp_path) == ["r", "r/arrays.safetensors", "r/manifest.json", "r/result.json"]
    assert_same(load_result(Inner, tmp_path / "r"), everything.inner)


@pytest.mark.parametrize("name", ["arrays.safetensors", "table.parquet", "result.json", "stimuli/result.json"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named_with_the_hash_it_should_have(everything, tmp_path, name, harm):
    place = save_result(everything, tmp_path / "r")
    expected = file_sha256(place / name)
    data = bytearray((place / name).read_bytes())
    data[len(data) // 2] ^= 1
    match harm:
        case "flipped":
            (place / name).write_bytes(data)
        case "truncated":
            (place / name).write_bytes(data[:-1])
        case "missing":
            (place / name).unlink()
    with pytest.raises(ValueError, match=rf"damaged or missing file .*{name}.*{expected}: make the result again"):
        load_result(Everything, place)


def test_another_kind_of_result_is_refused_with_both_names(everything, planted, tmp_path):
    save_result(everything.inner, tmp_path / "r")
    with pytest.raises(ValueError, match=r"received a Inner in .*; EmotionVectors\.load reads only its own kind"):
        EmotionVectors.load(tmp_path / "r")


@pytest.mark.parametrize("there", ["nothing", "a folder without a manifest", "a file"])
def test_a_place_without_a_result_is_refused_with_what_to_pass(tmp_path, there):
    place = tmp_path / "r"
    if there == "a file":
        place.write_text("x")
    elif there != "nothing":
        place.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no saved result .*pass a folder that \.save\(\) wrote"):
        load_result(Inner, place)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"format": 1, "res', id="truncated"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'{"format": 1}', id="without its keys"),
        pytest.param(b'{"format": 1, "result": "Inner", "files": []}', id="files that are no table"),
        pytest.param(b"\x80\x02}q\x00.", id="binary"),
    ],
)
def test_a_damaged_manifest_is_refused_with_what_to_do(everything, tmp_path, content):
    place = save_result(everything.inner, tmp_path / "r")
    (place / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged manifest .*manifest\.json.*make the result again"):
        load_result(Inner, place)


def test_another_format_is_refused_with_the_one_that_is_read(everything, tmp_path):
    place = save_result(everything.inner, tmp_path / "r")
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="received format 99 in .*this version reads format 1"):
        load_result(Inner, place)


# All or nothing


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path):
    with atomic_folder(tmp_path / "r") as place:
        (place / "a.txt").write_text("x")
        assert place.parent == tmp_path  # the same file system, so that the last step is one rename
        assert not (tmp_path / "r").exists()
    assert left_in(tmp_path) == ["r", "r/a.txt"]


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), KeyboardInterrupt(), SystemExit(3), OSError(errno.EACCES, "no")]
)
def test_a_failing_block_leaves_nothing_and_its_own_error(tmp_path, error):
    with pytest.raises(type(error)) as raised, atomic_folder(tmp_path / "r") as place:
        (place / "a.txt").write_text("x")
        raise error
    assert raised.value is error
    assert left_in(tmp_path) == []


def test_a_failing_block_leaves_what_should_have_been_replaced(tmp_path):
    write_text_atomically(tmp_path / "r" / "old.txt", "old")
    with pytest.raises(RuntimeError, match="ours"), atomic_folder(tmp_path / "r", overwrite=True) as place:
        (place / "new.txt").write_text("new")
        raise RuntimeError("ours")
    assert left_in(tmp_path) == ["r", "r/old.txt"]


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_result(Inner(torch.ones(3), title=Path("no text")), tmp_path / "r")
    assert left_in(tmp_path) == []


# A full disk

FULL_DISK = r"received a full disk while writing .*r \(\d+ MB free\).*Free some space, or name a folder on another disk"


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for_tensors(tensors: Any, path: Any, **_: Any) -> Any:
    Path(path).write_bytes(b"half")
    # what safetensors 0.8.0 raised on a full tmpfs: no OSError
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def half_a_text(self: Path, text: str, **_: Any) -> int:
    self.write_bytes(text.encode()[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


PLACES = {
    "a folder": ("os.mkdir", no_space),
    "a text": ("pathlib.Path.write_text", half_a_text),
    "a table": ("pandas.DataFrame.to_parquet", no_space),
    "tensors": ("safetensors.torch.save_file", no_space_for_tensors),
    "the flush": ("os.fsync", no_space),
    "the rename": ("os.replace", no_space),
}


@pytest.mark.parametrize("what", [pytest.param(w) if w == "tensors" else w for w in PLACES])
def test_a_full_disk_leaves_nothing_and_says_what_to_do(everything, tmp_path, monkeypatch, what):
    with monkeypatch.context() as patch, pytest.raises(OSError, match=FULL_DISK) as raised:
        patch.setattr(*PLACES[what])
        save_result(everything, tmp_path / "r")
    assert raised.value.errno == errno.ENOSPC
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("what", PLACES)
def test_a_full_disk_does_not_cost_the_result_that_was_there(everything, tmp_path, monkeypatch, what):
    save_result(everything.inner, tmp_path / "r")
    with monkeypatch.context() as patch, pytest.raises(Exception, match="full disk|No space left"):
        patch.setattr(*PLACES[what])
        save_result(everything, tmp_path / "r", overwrite=True)
    assert_same(load_result(Inner, tmp_path / "r"), everything.inner)
    assert os.listdir(tmp_path) == ["r"]


def test_a_failing_rename_does_not_cost_the_result_that_was_there(everything, tmp_path, monkeypatch):
    save_result(everything.inner, tmp_path / "r")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=FULL_DISK):
        patch.setattr("os.replace", no_space)
        save_result(dataclasses.replace(everything.inner, title="new"), tmp_path / "r", overwrite=True)
    assert_same(load_result(Inner, tmp_path / "r"), everything.inner)


def test_a_used_up_quota_is_a_full_disk_and_a_forbidden_folder_is_not(tmp_path):
    with pytest.raises(OSError, match=FULL_DISK), full_disk_explained(tmp_path / "not" / "there" / "r"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(PermissionError, match="^.Errno 13. no$"), full_disk_explained(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_disk_that_is_really_full_gives_the_same_message(tmp_path):
    """A tmpfs of 200 kB in a mount namespace of the child's own; skipped where that is not permitted."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*namespace, "mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)],
            check=False,
            capture_output=True,
        ).returncode
    ):
        pytest.skip("no mount namespace may be made here")
    script = tmp_path.with_suffix(".py")
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import torch
            from lens_affect.results import Provenance, save_result
            from lens_affect.stimuli import load_stimuli
            from lens_affect.stories import Stories
            import pandas as pd
            stories = Stories(load_stimuli(), pd.DataFrame({"x": range(200_000)}), 2, "chat", Provenance())
            import dataclasses
            Tensors = dataclasses.make_dataclass("Tensors", [("values", torch.Tensor)])
            for result in (stories, Tensors(torch.randn(200_000))):
                try:
                    save_result(result, sys.argv[1] + "/r")
                except Exception as error:
                    print(type(error).__name__, error, os.listdir(sys.argv[1]))
            """
        )
    )
    mount = f'mount -t tmpfs -o size=200k tmpfs "{tmp_path}" && exec "$0" "$1" "{tmp_path}"'
    done = subprocess.run(
        [*namespace, "sh", "-c", mount, sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(lens_affect.__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(lens_affect.__file__).parents[1])},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("OSError [Errno 28] received a full disk while writing")
        assert line.endswith("[]")


# Texts


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_text_atomically(tmp_path / "new" / "r", "old ü")
    assert path.read_text(encoding="utf-8") == "old ü"
    for what in ("a text", "the rename"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=FULL_DISK):
            patch.setattr(*PLACES[what])
            write_text_atomically(path, "new")
        assert path.read_text(encoding="utf-8") == "old ü"
        assert left_in(tmp_path) == ["new", "new/r"]
    write_text_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_killed_writer_leaves_no_half_result_and_does_not_stand_in_the_way(everything, tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from lens_affect.results import atomic_folder
        with atomic_folder(sys.argv[1]) as place:
            (place / "a.txt").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
        """
    )
    root = Path(lens_affect.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "r").exists()
    save_result(everything.inner, tmp_path / "r")
    assert_same(load_result(Inner, tmp_path / "r"), everything.inner)


# Provenance and hashes


def test_a_quantized_model_says_so_in_every_title():
    assert Provenance(model="SmolLM2-135M").title == "SmolLM2-135M"
    assert Provenance(model="SmolLM2-135M", source_precision="Q4_1").title == "SmolLM2-135M (Q4_1, dequantized)"


def test_updating_a_provenance_leaves_the_old_one(everything):
    later = everything.provenance.updated(seed=9)
    assert (later.seed, everything.provenance.seed) == (9, 0)
    assert later.updated(seed=0) == everything.provenance.updated()


def test_content_hashes_depend_on_content_order_and_boundaries():
    hashes = [content_hash(*parts) for parts in (("ab", "c"), ("a", "bc"), ("c", "ab"), (("ab", "c"),), (), ("ä",))]
    assert len(set(hashes)) == len(hashes)
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash("x") == hashlib.sha256(b'["x"]').hexdigest()[:16]


def test_file_hashes_are_those_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(256)) * 9000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(bytes(range(256)) * 9000).hexdigest()


def test_versions_and_commit_are_those_in_use():
    assert package_versions()["torch"] == torch.__version__
    here = Path(lens_affect.__file__).parent
    asked = subprocess.run(["git", "log", "-1", "--format=%H", "--", "results.py"], cwd=here, capture_output=True, text=True, check=False)  # fmt: skip
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    tracked = asked.returncode == 0 and asked.stdout.strip()
    assert git_state()[0] == (head.stdout.strip() if tracked else None)
