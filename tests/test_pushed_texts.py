"""Pushed texts: rows are planned with their controls, cells are written anew until they were moved as far as they should be."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from lens_affect.pushed_texts import (
    Planned,
    PushedText,
    Writer,
    by_cell,
    control_targets,
    direction_in_spread,
    mean_change,
    plan_controls,
)
from tests.test_patching import vectors_of

PROMPTS = ["Hello there", "Write about a cat in the garden", "Why"]


def planned(kind, emotion, change, prompt=0, strength=0.4):
    row = Planned(kind, emotion, emotion, strength, prompt)
    return PushedText(row, "x", (1,), False, True, strength, torch.zeros(1, 4), 0.0, 0.0, change)


def writer_of(model, layers=(1,)):
    sampling = {"max_new_tokens": 10, "temperature": 0.7, "top_p": 0.95}
    return Writer(model, vectors_of(model), PROMPTS, layers, "response", "add", "plain", 1, sampling, 96)


def test_each_prompt_has_its_targets_and_each_target_its_controls():
    rows = plan_controls([("sad",), ("calm", "sad")], [0.2, 0.4], ["random", "other_emotion"], 2, ["sad", "calm"], 0)
    assert Counter(row.kind for row in rows) == {"steered": 6, "random": 8, "other_emotion": 6}
    assert {(r.emotion, r.prompt) for r in rows if r.kind == "steered"} == {("sad", 0), ("sad", 1), ("calm", 1)}
    assert {r.vector for r in rows if r.kind == "random" and r.prompt == 0} == {"random 0", "random 0.1"}
    assert all(r.vector != r.emotion for r in rows if r.kind == "other_emotion")
    fewer = plan_controls([("sad",), ("calm", "sad")], [0.2, 0.4], ["random"], 1, ["sad", "calm"], 0)
    assert set(fewer) <= set(rows)


def test_random_directions_in_the_spread_are_named_by_prompt_as_isotropic_ones_are():
    rows = plan_controls([("sad",)] * 2, [0.4], ["random_in_spread"], 2, ["sad", "calm", "happy"], 0)
    names = [r.vector for r in rows if r.kind == "random_in_spread"]
    assert names == ["random in spread 0", "random in spread 1", "random in spread 0.1", "random in spread 1.1"]
    assert all(r.emotion == "" for r in rows if r.kind == "random_in_spread")


def test_directions_in_the_spread_have_the_covariance_of_the_emotions_raw_vectors(tiny_model):
    """Planted: raw vectors along three axes, of lengths 3, 2 and 1 at one layer, and turned at the other."""
    vectors = vectors_of(tiny_model("llama"), ("calm", "sad", "happy", "neutral"))
    directions = torch.zeros_like(vectors.directions)
    lengths = torch.tensor([3.0, 2.0, 1.0, 50.0])
    for e in range(4):
        directions[e, 0, e] = directions[e, 1, 10 + e] = directions[e, 2, e] = 1.0
    planted = replace(vectors, directions=directions, raw_norms=lengths[:, None].expand(4, 3))
    draws = torch.stack([direction_in_spread(planted, (0, 1), np.random.default_rng(i)) for i in range(4000)])
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(4000, 2))
    assert float(draws[:, 0, 3:].abs().max()) == 0.0  # `neutral` is no emotion, and nothing lies outside their span
    torch.testing.assert_close(draws[:, 0, :3], draws[:, 1, 10:13])  # the same mixture at both layers
    # Of unit draws from N(0, diag(9, 4, 1)), compared with draws made directly.
    direct = np.random.default_rng(1).standard_normal((200_000, 3)) * [3.0, 2.0, 1.0]
    direct /= np.linalg.norm(direct, axis=1, keepdims=True)
    found = (draws[:, 0, :3].double().T @ draws[:, 0, :3].double() / 4000).numpy()
    assert found == pytest.approx(direct.T @ direct / len(direct), abs=0.03)
    assert draws[:, 0, :3].mean(0).abs().max() < 0.05
    with pytest.raises(ValueError, match="they have no spread"):
        direction_in_spread(replace(planted, raw_norms=torch.zeros(4, 3)), (0,), np.random.default_rng(0))


def test_a_control_should_move_the_stream_as_the_steered_texts_of_its_strength_do():
    texts = [
        *(planned("steered", "sad", 0.2), planned("steered", "sad", 0.4, 1), planned("steered", "calm", 0.6)),
        *(planned("steered", "sad", 9.0, strength=0.8), planned("steered", "calm", math.nan, 1)),
        *(planned("random", "", 1.0), planned("other_emotion", "sad", 1.0), planned("unsteered", "", 0.0)),
    ]
    found = control_targets(texts)
    assert found == pytest.approx({("random", "", 0.4): 0.4, ("other_emotion", "sad", 0.4): 0.3})
    assert by_cell(texts)["steered", "sad", 0.4] == [0, 1]


@pytest.mark.parametrize("wanted", [0.1, 0.7])
def test_cells_are_written_anew_until_they_changed_as_wanted_and_others_stay(tiny_model, wanted):
    writer = writer_of(tiny_model("gemma3"))
    rows = [Planned("steered", e, e, 0.4, p) for e in ("sad", "calm") for p in range(3)]
    before = writer.write(rows)
    after = writer.equalize(before, {("steered", "sad", 0.4): wanted})
    assert [t.row for t in after] == rows
    assert after[3:] == before[3:]
    assert mean_change(after[:3]) == pytest.approx(wanted, rel=0.05)
    assert len({t.scale for t in after[:3]}) == 1
    assert after[0].scale == pytest.approx(wanted, rel=0.3)
    assert torch.equal(after[0].vectors, writer.write(rows[:1], {rows[0].cell: after[0].scale / 0.4})[0].vectors)


def test_what_cannot_be_reached_is_said(tiny_model, caplog):
    writer = writer_of(tiny_model("gemma3"))
    rows = [Planned("steered", "sad", "sad", 0.4, p) for p in range(3)]
    found = writer.equalize(writer.write(rows), {("steered", "sad", 0.4): 1e4})
    assert "1 of 1 groups of texts could not be brought to within 5 %" in caplog.text
    assert "steered sad +0.4" in caplog.text
    assert found[0].scale == pytest.approx(10)  # no further than the largest strength


def test_progress_counts_what_is_written_anew(tiny_model):
    writer, seen = writer_of(tiny_model("gemma3")), []
    writer.progress, writer.expected = lambda done, total: seen.append((done, total)), 3
    writer.equalize(
        writer.write([Planned("steered", "sad", "sad", 0.4, p) for p in range(3)]), {("steered", "sad", 0.4): 0.2}
    )
    assert seen[0] == (3, 3)
    assert len(seen) > 1
    assert all(done <= total for done, total in seen)
    assert seen[-1][0] == seen[-1][1]
