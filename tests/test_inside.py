"""Behaviour and inside: a planted link is found within doses, the dose alone is none, and what is read is the text as it was written."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lens_affect.activations import extract_activations
from lens_affect.adapter import encode_prompt, run_trunk
from lens_affect.doses import sweep_strengths
from lens_affect.inside import InsideOutside, correlate_inside, read_projections
from lens_affect.judgements import Judgement
from lens_affect.results import Provenance
from lens_affect.stimuli import Stimuli
from tests.test_patching import vectors_of
from tests.test_prefixes import stream

PROMPTS = [f"Tell me about the {name}" for name in "cat dog hat sun cup bed car map jar key".split()]


@pytest.fixture(scope="module")
def dose(tiny_model):
    model = tiny_model("llama")
    asked = {"emotions": ["calm", "sad"], "strengths": [0.2, 0.6], "n_tokens": 12, "seed": 1}
    return sweep_strengths(model, vectors_of(model), PROMPTS, layers=1, n_random=2, **asked)


def judgement_of(values, emotions=("calm", "sad")) -> Judgement:
    return Judgement(
        probabilities=torch.as_tensor(np.asarray(values), dtype=torch.float32),
        emotions=emotions,
        labels=tuple((e,) for e in emotions),
        matches=("exact",) * len(emotions),
        top=("calm",) * len(values),
        auc=torch.full((len(emotions),), 0.9),
        judge="planted",
        title="a planted judge",
        multi_label=True,
        provenance=Provenance(model="planted"),
    )


def test_a_projection_is_that_of_the_texts_own_tokens_behind_its_prompt(tiny_model, dose):
    model = tiny_model("llama")
    vectors = vectors_of(model)
    found = read_projections(model, dose, vectors, layer=1)
    for i in (0, 25, 60):
        head = encode_prompt(model, PROMPTS[dose.table["prompt"][i]])[0]
        body = [t for t in dose.tokens[i].tolist() if t >= 0]
        ids = torch.tensor([[*head, *body]])
        rows = stream(model, 1, lambda ids=ids: run_trunk(model, ids, torch.ones_like(ids)))[0, len(head) :]
        norms = rows.norm(dim=-1)
        ordinary = rows[norms <= 3 * norms.nanmedian()]
        expected = ordinary.mean(0) @ vectors.directions[:, 1].T
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_bare_texts_are_read_as_extraction_reads_them(tiny_model, dose):
    """Another way to the same number: the text as a stimulus that answers its prompt."""
    model = tiny_model("llama")
    vectors = vectors_of(model)
    rows = [i for i in range(12) if dose.texts[i].strip()]
    kept = [
        i
        for i in rows
        if model.tokenizer(dose.texts[i], add_special_tokens=False)["input_ids"]
        == [t for t in dose.tokens[i].tolist() if t >= 0]
    ]
    assert kept
    stimuli = Stimuli(
        texts=tuple(dose.texts[i] for i in kept),
        emotions=("calm",) * len(kept),
        groups=tuple(map(str, kept)),
        sources=("test",) * len(kept),
        prompts=tuple(dose.prompts[dose.table["prompt"][i]] for i in kept),
    )
    activations = extract_activations(model, stimuli, pooling="mean_without_sinks")
    torch.testing.assert_close(
        vectors.project(activations)[:, :, 1],
        read_projections(model, dose, vectors, layer=1)[kept],
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_planted_link_is_found_and_is_the_largest(tiny_model, dose):
    model = tiny_model("llama")
    inside = read_projections(model, dose, vectors_of(model), layer=1)
    noise = np.random.default_rng(0).standard_normal(len(inside))
    planted = np.stack([inside[:, 0].numpy(), noise], axis=1)  # calm is judged by its projection, sad by nothing
    found = correlate_inside(
        model, dose, judgement_of(1 / (1 + np.exp(-planted))), vectors_of(model), n_permutations=200
    )
    table = found.to_frame().set_index(["texts", "emotion"])
    for texts in ("unsteered", "steered", "random"):
        assert table.loc[(texts, "calm"), "rho"] == pytest.approx(1.0)
        assert table.loc[(texts, "calm"), "p_family"] == pytest.approx(1 / 201)
        assert abs(table.loc[(texts, "sad"), "rho"]) < 0.6
    assert found.layer == 1
    assert "most calm 1.00" in str(found)


def test_a_dose_that_drives_both_is_no_link_within_doses(tiny_model, dose):
    model = tiny_model("llama")
    generator = np.random.default_rng(3)
    driven = dose.table["strength"].to_numpy()[:, None] + 0.01 * generator.random((len(dose.table), 2))
    inside = torch.tensor(dose.table["strength"].to_numpy()[:, None] + 0.01 * generator.random((len(dose.table), 4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_affect.inside.read_projections", lambda *a, **k: inside.float())
        found = correlate_inside(model, dose, judgement_of(driven), vectors_of(model), n_permutations=200)
    row = found.to_frame().set_index(["texts", "emotion"]).loc[("steered", "calm")]
    assert row["rho_pooled"] > 0.6  # 0.75 is the most that two doses allow
    assert abs(row["rho"]) < 0.5
    assert row["p"] > 0.02


def test_without_a_link_p_is_uniform_and_intervals_hold_zero(tiny_model, dose):
    model, low, inside_interval = tiny_model("llama"), [], []
    inside = torch.randn(len(dose.table), 4, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_affect.inside.read_projections", lambda *a, **k: inside)
        for seed in range(60):
            values = np.random.default_rng(seed).random((len(dose.table), 2))
            table = correlate_inside(model, dose, judgement_of(values), vectors_of(model), n_permutations=99).to_frame()
            own = table[table["texts"] == "steered"]
            low += [float(p) for p in own["p"]]
            inside_interval += [bool(a <= 0 <= b) for a, b in own[["low", "high"]].to_numpy()]
    assert 0.35 < np.mean(low) < 0.65
    assert np.mean(np.array(low) <= 0.1) < 0.2
    assert np.mean(inside_interval) > 0.85


def test_empty_texts_have_no_value_and_are_left_out(tiny_model, dose):
    model = tiny_model("llama")
    gone = dose.tokens.clone()
    gone[0] = -1
    projections = read_projections(model, replace(dose, tokens=gone), vectors_of(model), layer=1)
    assert bool(projections[0].isnan().all())
    assert bool(projections[1:].isfinite().all())
    values = np.random.default_rng(0).random((len(dose.table), 2))
    found = correlate_inside(
        model, replace(dose, tokens=gone), judgement_of(values), vectors_of(model), n_permutations=20
    )
    rows = found.to_frame().set_index(["texts", "emotion"])
    assert rows.loc[("unsteered", "calm"), "n"] == 2 * len(PROMPTS) - 1


def test_it_is_saved_and_loaded_and_wrong_input_is_said(tiny_model, dose, tmp_path):
    model = tiny_model("llama")
    values = np.random.default_rng(0).random((len(dose.table), 2))
    found = correlate_inside(model, dose, judgement_of(values), vectors_of(model), n_permutations=20)
    same = InsideOutside.load(found.save(tmp_path / "inside"))
    assert str(same) == str(found)
    pd.testing.assert_frame_equal(same.to_frame(), found.to_frame())
    assert "<table" in found._repr_html_()
    assert not math.isnan(float(found.projections[0, 0]))
    with pytest.raises(ValueError, match="received a judgement of 3 texts"):
        correlate_inside(model, dose, judgement_of(values[:3]), vectors_of(model))
    with pytest.raises(ValueError, match="received layer 9; these vectors have 0 to"):
        correlate_inside(model, dose, judgement_of(values), vectors_of(model), layer=9)
    with pytest.raises(ValueError, match="nothing is shared"):
        correlate_inside(model, dose, judgement_of(values, ("proud", "angry")), vectors_of(model))
