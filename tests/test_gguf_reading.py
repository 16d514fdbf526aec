"""A GGUF file's header is read as the gguf package reads it, once, and without memory maps for every field."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lens_affect.adapter import model_info
from lens_affect.catalogue import converted_gguf, read_card
from lens_affect.checkpoints import open_checkpoint
from lens_affect.gguf_reading import gguf_precision, gguf_title, read_gguf, reading_once
from lens_affect.models import load_model
from tests.tiny_gguf import make_model, write_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "Tiny.Q8_0.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0)
    return path


def test_fields_and_tensors_are_what_the_gguf_package_reads(file):
    ours, theirs = read_gguf(file), gguf.GGUFReader(str(file))
    assert list(ours.fields) == list(theirs.fields)
    assert all(ours.fields[name].contents() == theirs.fields[name].contents() for name in theirs.fields)
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours.tensors, theirs.tensors, strict=True))


def test_fields_are_no_memory_maps(file):
    """Slices of a memory map cost five times as much, and a vocabulary has some 800,000."""
    parts = [part for field in read_gguf(file).fields.values() for part in field.parts]
    assert parts
    assert not any(isinstance(part, np.memmap) for part in parts)


def test_transformers_reads_a_file_once_and_the_package_is_as_before(file, monkeypatch):
    read = []
    fields = gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda self, *a: read.append(self) or fields(self, *a))
    theirs, where = gguf.GGUFReader, {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with pytest.raises(RuntimeError, match="on the way"), reading_once():
        assert AutoConfig.from_pretrained(**where).hidden_size == 32
        AutoTokenizer.from_pretrained(**where)
        raise RuntimeError("on the way")
    assert len(read) == 1
    assert gguf.GGUFReader is theirs


@pytest.mark.parametrize(("kind", "precision"), [("Q8_0", "Q8_0"), ("F32", None)])
def test_the_precision_of_a_file_is_read_from_it(tmp_path, kind, precision):
    write_gguf(tmp_path / "m.gguf", make_model(), gguf.GGMLQuantizationType[kind])
    assert gguf_precision(tmp_path / "m.gguf") == precision


QWEN = {
    "name": "Qwen2.5 Coder 0.5B Instruct AWQ",
    "basename": "Qwen2.5-Coder",
    "size_label": "0.5B",
    "finetune": "Instruct-AWQ",
}


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (QWEN, "Qwen2.5-Coder-0.5B-Instruct (GGUF)"),
        ({"basename": "Tiny", "size_label": "10K"}, "Tiny-10K (GGUF)"),
        ({"name": "Tiny Model", "size_label": "10K"}, "Tiny Model (GGUF)"),
        ({"name": " "}, "my.Q8_0 (GGUF)"),
        ({}, "my.Q8_0 (GGUF)"),
    ],
)
def test_the_title_is_the_name_in_the_header_or_else_that_of_the_file(tmp_path, names, title):
    write_gguf(tmp_path / "my.Q8_0.gguf", make_model(), gguf.GGMLQuantizationType.F32, **names)
    assert gguf_title(tmp_path / "my.Q8_0.gguf") == title


def test_a_converted_file_is_called_by_its_header_in_card_provenance_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_AFFECT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0, **QWEN)
    assert read_card(converted_gguf(path))["title"] == "Qwen2.5-Coder-0.5B-Instruct (GGUF)"
    model = load_model(path, dtype=torch.float32)
    assert model_info(model).provenance.title == "Qwen2.5-Coder-0.5B-Instruct (GGUF) (Q8_0, dequantized)"
    assert open_checkpoint(path).title == "Qwen2.5-Coder-0.5B-Instruct (GGUF)"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough for a header"])
def test_a_file_that_is_no_gguf_is_refused_in_words(tmp_path, monkeypatch, content):
    monkeypatch.setenv("LENS_AFFECT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.gguf, which is no whole GGUF file .*fetch it again"):
        converted_gguf(tmp_path / "mine.gguf")


def test_a_gguf_that_is_cut_short_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_AFFECT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "whole.gguf", make_model(), gguf.GGMLQuantizationType.F32)
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "mine.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"mine\.gguf, which is no whole GGUF file"):
        converted_gguf(tmp_path / "mine.gguf")
