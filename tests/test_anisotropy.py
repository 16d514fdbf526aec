"""Anisotropy: by hand on Hugging Face's states, known answers on planted residuals, refusals."""

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect.anisotropy import Anisotropy, _mean_cosine, _spread, measure_anisotropy, neutral_sentences
from lens_affect.stimuli import EMOTIONS, named_emotion
from tests.test_activations import bos_of, hf_states, token_ids
from tests.tiny import DENSE

SENTENCES = ("Water boils.", "A hexagon has six sides.", "Iron can rust.", "Light travels faster than sound.")


def test_identical_vectors_have_cosine_one_and_orthogonal_ones_zero():
    same = _mean_cosine(torch.ones(4, 7, dtype=torch.double) * torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert same["mean_cosine"] == pytest.approx(1)
    assert same["high"] - same["low"] == pytest.approx(0, abs=1e-9)
    assert _mean_cosine(torch.eye(5, dtype=torch.double))["mean_cosine"] == pytest.approx(0, abs=1e-12)


def test_a_cone_has_the_cosine_that_its_width_implies():
    rng = np.random.default_rng(0)
    # Unit noise around an offset of length 3 sqrt(d): the expected cosine is 9 / (9 + 1).
    cloud = torch.from_numpy(rng.standard_normal((400, 300)) + 3)
    found = _mean_cosine(cloud)
    assert found["mean_cosine"] == pytest.approx(0.9, abs=0.005)
    assert found["low"] < 0.9 < found["high"]


def test_the_jackknife_is_the_loop_over_sentences():
    vectors = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double() + 0.3

    def mean(v):
        unit = v / v.norm(dim=1, keepdim=True)
        return float((unit @ unit.T)[*torch.triu_indices(len(v), len(v), 1)].mean())

    without = np.array([mean(vectors[torch.arange(6) != i]) for i in range(6)])
    half = stats.t.ppf(0.975, 5) * np.sqrt(5 / 6 * ((without - without.mean()) ** 2).sum())
    found = _mean_cosine(vectors)
    assert found["mean_cosine"] == pytest.approx(mean(vectors))
    assert (found["low"], found["high"]) == pytest.approx((mean(vectors) - half, mean(vectors) + half))


def test_the_participation_ratio_counts_equal_dimensions():
    corners = torch.cat([torch.eye(8), -torch.eye(8)]).double()
    assert _spread(corners)["participation_ratio"] == pytest.approx(8)
    corners[:, 0] *= 1e4
    assert _spread(corners)["participation_ratio"] == pytest.approx(1, abs=1e-6)
    assert _spread(corners)["top3_share"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", DENSE)
def test_every_number_is_what_numpy_gives_on_hugging_faces_states(tiny_model, family):
    model = tiny_model(family)
    found = measure_anisotropy(model, SENTENCES)
    bos = bos_of(family)
    states = [hf_states(model.original_model, bos + token_ids(s)) for s in SENTENCES]
    for layer in (0, 1, 2):
        by_text = [layers[layer] for layers, _ in states]
        last = np.stack([s[-1] for s in by_text])
        unit = last / np.linalg.norm(last, axis=1, keepdims=True)
        pairs = (unit @ unit.T)[np.triu_indices(4, 1)]
        ordinary = np.concatenate([s[1:] for s in by_text])  # position 0 is left out with and without BOS
        lengths = [np.linalg.norm(s[1:], axis=1) for s in by_text]
        limits = [3 * np.sort(n)[(len(n) - 1) // 2] for n in lengths]
        kept = np.concatenate([s[1:][n <= limit] for s, n, limit in zip(by_text, lengths, limits, strict=True)])
        eigenvalues = np.linalg.svd(kept - kept.mean(0), compute_uv=False) ** 2
        squares = np.sort((kept**2).sum(0))
        # torch's median of an even number is the lower one
        first = np.sort([np.linalg.norm(s[0]) for s in by_text])[1]
        other = np.sort(np.linalg.norm(ordinary, axis=1))[(len(ordinary) - 1) // 2]
        row = found.at(layer)
        assert row["sink_tokens"] == len(ordinary) - len(kept)
        assert row["mean_cosine"] == pytest.approx(pairs.mean(), abs=1e-4)
        assert row["participation_ratio"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-3)
        assert row["top3_share"] == pytest.approx(squares[-3:].sum() / squares.sum(), rel=1e-3)
        assert row["sink_ratio"] == pytest.approx(first / other, rel=1e-3)
        assert row["depth"] == pytest.approx((layer + 1) / 3)
    assert found.table["row"].tolist() == ["embedding", "0", "1", "2"]
    assert found.n_tokens == sum(len(bos + token_ids(s)) - 1 for s in SENTENCES)


def test_our_sentences_are_twenty_distinct_ones_without_emotion():
    sentences = neutral_sentences()
    assert len(set(sentences)) == 20
    assert not [s for s in sentences for e in EMOTIONS if named_emotion(s, e)]


def test_it_is_printed_saved_and_refused(tiny_model, tmp_path):
    found = measure_anisotropy(tiny_model("llama"))
    assert "mean cosine of" in str(found)
    assert "20 sentences" in str(found)
    again = Anisotropy.load(found.save(tmp_path / "a"))
    np.testing.assert_allclose(again.table["mean_cosine"], found.table["mean_cosine"])
    with pytest.raises(ValueError, match="received 2 sentences; at least 3"):
        measure_anisotropy(tiny_model("llama"), SENTENCES[:2])
    with pytest.raises(ValueError, match="without an ordinary token"):
        measure_anisotropy(tiny_model("llama"), [*SENTENCES, ""])
    with pytest.raises(ValueError, match="received layer 9; there are embedding, 0, 1, 2"):
        found.at(9)
