"""Stores: rows come back where they were written, moments are those of the rows, nothing is left behind."""

import numpy as np
import pytest
import torch

from lens_affect.spool import Moments, Spool
from tests.test_activations import make_stimuli

SHAPES = {"resid_post": (3, 4), "embedding": (1, 4)}


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, *shape, generator=generator) for name, shape in SHAPES.items()}


def test_rows_written_in_any_order_come_back_in_theirs(tmp_path):
    store, values = Spool(5, SHAPES, tmp_path), rows(5)
    for batch in ([4, 0], [2], [1, 3]):
        store.write(batch, {name: v[batch] for name, v in values.items()})
    stored = store.finish()
    assert stored.rows == [0, 1, 2, 3, 4]
    assert stored.counts.tolist() == [1] * 5
    assert stored.squares == {}
    for name, value in values.items():
        assert torch.equal(stored.arrays[name], value)
        assert (tmp_path / f"{name}.safetensors").is_file()


def test_a_temporary_folder_is_gone_while_its_arrays_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, values = Spool(2, SHAPES, None), rows(2)
    assert len(list(tmp_path.iterdir())) == 1
    store.write([0, 1], values)
    stored = store.finish()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(stored.arrays["resid_post"], values["resid_post"])


def test_a_discarded_store_leaves_nothing(tmp_path):
    Spool(2, SHAPES, tmp_path).discard()
    assert list(tmp_path.iterdir()) == []


def test_moments_are_those_of_the_rows_of_each_cell():
    stimuli = make_stimuli("a", "b", "c", "d", "e")  # emotions a and b in turn, one group
    store, values = Moments(stimuli, SHAPES), rows(5, seed=1)
    for batch in ([3, 1], [0, 2, 4]):
        store.write(batch, {name: v[batch] for name, v in values.items()})
    stored = store.finish()
    assert stored.rows == [0, 1]
    assert stored.counts.tolist() == [3, 2]
    for name, value in values.items():
        for cell, of in enumerate(([0, 2, 4], [1, 3])):
            np.testing.assert_allclose(stored.arrays[name][cell], value[of].mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stored.squares[name][cell], (value[of] ** 2).mean(0), rtol=1e-5)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="disk"):
        Spool(2, SHAPES, tmp_path)
    assert list(tmp_path.iterdir()) == []
