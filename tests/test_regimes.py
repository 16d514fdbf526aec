"""Regimes: the rule by its table, cells by hand, planted boundaries, the paper's own rule on its published cases."""

import doctest
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lens_affect import regimes
from lens_affect.doses import UNSTEERED, DoseResponse
from lens_affect.judgements import Judgement
from lens_affect.regimes import (
    DAMAGE,
    REGIMES,
    RegimeMap,
    Thresholds,
    classify_regimes,
    damage_of,
    jeong_regime,
    regime_of,
    run_jeong_regime,
)
from lens_affect.results import Provenance
from tests.test_patching import vectors_of

RULE = Thresholds(1.5, 2.25, 0.1)


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(regimes)
    assert found.attempted >= 2
    assert found.failed == 0


@pytest.mark.parametrize(
    ("ratio", "repetition", "gain", "regime"),
    [
        (1.0, 0.0, 0.1, "surgical"),
        (1.0, 0.0, -0.1, "inert"),
        (1.0, 0.0, 0.0, "inert"),
        (1.0, 0.0, None, "undecided"),
        (1.0, 0.0, math.nan, "undecided"),
        (1.49, 0.1, 0.1, "surgical"),
        (1.6, 0.0, 0.1, "degraded"),
        (0.6, 0.0, 0.1, "degraded"),
        (2.3, 0.0, 0.1, "explosive"),
        (0.1, 0.11, 0.1, "repetitive_collapse"),
        (9.0, 0.9, 0.1, "repetitive_collapse"),
        (9.0, math.nan, 0.1, "explosive"),
        (math.nan, 0.0, 0.1, "invalid"),
        (math.inf, 0.0, 0.1, "invalid"),
    ],
)
def test_the_rule_is_the_table(ratio, repetition, gain, regime):
    assert regime_of(ratio, repetition, gain, RULE) == regime


def test_a_limit_for_the_length_stands_in_for_the_general_one():
    assert damage_of(1.0, 0.2, RULE, limit=0.3) == "sound"
    assert damage_of(1.0, 0.05, RULE, limit=0.01) == "repetitive_collapse"


def planted(cells, *, n_prompts=8, noise=0.02, seed=0, empty=0) -> DoseResponse:
    """A dose-response with log ratio and repetition per (kind, emotion, strength), 20 tokens a text, two prompts a group."""
    generator = np.random.default_rng(seed)
    every = {(k, "", 0.0): (0.0, 0.0) for k in UNSTEERED} | cells
    rows = []
    for (kind, emotion, strength), (log_ratio, repetition) in every.items():
        for prompt in range(n_prompts):
            gone = kind == "steered" and prompt < empty
            rows.append(
                {
                    "kind": kind,
                    "emotion": emotion,
                    "vector": emotion,
                    "strength": strength,
                    "prompt": prompt,
                    "scale": strength,
                    "group": f"topic {prompt // 2}",
                    "text": "" if gone else "some text",
                    "n_tokens": 0 if gone else 20,
                    "finished": True,
                    "finite": True,
                    "nll": math.nan if gone else 3 + log_ratio + generator.normal(0, noise),
                    "nll_unsteered": 3.0,
                    "repetition": math.nan if gone else repetition,
                    "longest_loop": 0.0,
                    "compression": 0.7,
                    "distinct_1": 0.9,
                    "distinct_2": 1.0,
                    "kl": abs(log_ratio),
                    "change": abs(strength),
                }
            )
    return DoseResponse(
        table=pd.DataFrame(rows),
        tokens=torch.zeros(len(rows), 20, dtype=torch.long),
        limits=torch.full((21,), 0.1),
        norms=torch.ones(3),
        prompts=tuple(f"prompt {i}" for i in range(n_prompts)),
        emotions=tuple(dict.fromkeys(e for k, e, _ in cells if k == "steered")),
        strengths=tuple(sorted({s for *_, s in cells})),
        layers=(1,),
        scope="response",
        mode="add",
        form="chat",
        longest=20,
        unit="token",
        scorer="planted",
        seed=0,
        name="planted",
        provenance=Provenance(model="planted"),
    )


@pytest.mark.parametrize("noise", [0.02, 0.6])
def test_perplexities_per_byte_lead_to_the_same_labels_as_per_token(noise):
    """Texts of four bytes a token: every log ratio per byte is a quarter of the one per token."""
    grid = {
        ("steered", "calm", s): (log_ratio, 0.0) for s, log_ratio in ((0.1, 0.1), (0.2, 0.6), (0.4, 4.5), (0.8, -2.0))
    }
    dose = planted(grid, noise=noise)
    table = dose.table.assign(
        text="abcd" * 20, nll=dose.column("nll") / 4, nll_unsteered=dose.column("nll_unsteered") / 4
    )
    per_byte = replace(dose, table=table, unit="byte", scorer="another")
    tokens, found = classify_regimes(dose), classify_regimes(per_byte)
    assert found.damage == tokens.damage
    assert len(set(found.damage)) == 3
    assert found.thresholds.r_ok**4 == pytest.approx(tokens.thresholds.r_ok, rel=0.03)  # a quantile between two values
    assert found.thresholds.r_high == pytest.approx(found.thresholds.r_ok**2)


def judged(dose, gains, *, emotions=("calm", "sad"), seed=0) -> Judgement:
    """Probabilities of 0.2 plus a gain per (kind, emotion judged, strength), with a little noise."""
    generator = np.random.default_rng(seed)
    values = torch.full((len(dose.table), len(emotions)), 0.2)
    for i, (kind, emotion, strength) in enumerate(dose.table[["kind", "emotion", "strength"]].itertuples(index=False)):
        for k, name in enumerate(emotions):
            own = kind == "steered" and emotion == name
            values[i, k] += gains.get((kind, strength), 0.0) * (own or kind != "steered") + generator.normal(0, 0.01)
    return Judgement(
        probabilities=values,
        emotions=emotions,
        labels=(("calm",), ("sadness",)),
        matches=("exact", "exact"),
        top=("calm",) * len(dose.table),
        auc=torch.tensor([0.9, 0.9]),
        judge="planted",
        title="a planted judge",
        multi_label=True,
        provenance=Provenance(model="planted"),
    )


CELLS = {
    ("steered", "calm", 0.1): (0.0, 0.0),
    ("steered", "calm", 0.2): (0.05, 0.0),
    ("steered", "calm", 0.4): (0.6, 0.02),
    ("steered", "calm", 0.8): (1.5, 0.0),
    ("steered", "calm", 1.6): (-1.0, 0.8),
    ("random", "", 0.1): (0.0, 0.0),
    ("random", "", 0.2): (0.0, 0.0),
}


def test_planted_cells_get_their_regime_with_certainty():
    dose = planted(CELLS)
    found = classify_regimes(dose, judged(dose, {("steered", 0.2): 0.3}))
    assert [found.regime("calm", s) for s in found.strengths] == [
        "inert",
        "surgical",
        "degraded",
        "explosive",
        "repetitive_collapse",
    ]
    own = found.table[found.table["kind"] == "steered"].set_index("strength")
    assert own.loc[0.8, "p_explosive"] > 0.99
    assert own.loc[0.2, "gain"] == pytest.approx(0.3, abs=0.02)
    assert own.loc[1.6, "share_repetitive_collapse"] == 1
    probabilities = [f"p_{name}" for name in REGIMES]
    assert np.allclose(found.table[probabilities].sum(axis=1), 1)
    assert found.null == "against random directions"
    with pytest.raises(ValueError, match=r"received 'calm' at 0.3"):
        found.regime("calm", 0.3)


def test_a_gain_that_random_directions_have_too_is_none():
    dose = planted(CELLS)
    found = classify_regimes(dose, judged(dose, {("steered", 0.2): 0.3, ("random", 0.2): 0.3}))
    assert found.regime("calm", 0.2) == "inert"
    without = planted({k: v for k, v in CELLS.items() if k[0] == "steered"})
    assert classify_regimes(without, judged(without, {("steered", 0.2): 0.3})).null == "against the unsteered texts"


def test_without_a_judge_that_can_name_the_emotion_sound_cells_are_undecided():
    dose = planted(CELLS)
    assert classify_regimes(dose).regime("calm", 0.2) == "undecided"
    assert (
        classify_regimes(dose, replace(judged(dose, {}), emotions=("proud", "sad"))).regime("calm", 0.1) == "undecided"
    )
    with pytest.raises(ValueError, match="received a judgement of 3 texts for"):
        classify_regimes(dose, replace(judged(dose, {}), probabilities=torch.zeros(3, 2)))


def test_empty_texts_count_and_are_invalid_where_they_are_most():
    few, most = (planted(CELLS, empty=n) for n in (3, 5))
    assert classify_regimes(few).regime("calm", 0.8) == "explosive"
    assert classify_regimes(few).table.query("kind == 'steered'")["share_invalid"].iloc[0] == pytest.approx(3 / 8)
    assert classify_regimes(most).regime("calm", 0.8) == "invalid"


def test_the_worse_of_two_equally_frequent_labels_is_taken():
    labels = np.array(["sound", "sound", "explosive", "explosive"])
    assert regimes._regime(labels, 1.0) == "explosive"
    assert next(iter(DAMAGE)) == "invalid"


def test_the_band_covers_what_two_unsteered_texts_differ_by():
    calm = Thresholds.of(planted(CELLS, noise=0.01))
    assert (calm.r_ok, calm.r_high) == (1.5, 2.25)
    noisy = planted(CELLS, noise=0.8)
    wide = Thresholds.of(noisy)
    first, again = (noisy.column("nll")[noisy.column("kind") == k].astype(float) for k in UNSTEERED)
    assert wide.r_ok == pytest.approx(float(np.quantile(np.exp(np.r_[again - first, first - again]), 0.975)))
    assert wide.r_high == pytest.approx(wide.r_ok**2)
    assert wide.repetition == pytest.approx(0.1)


def test_a_close_cell_has_probabilities_between():
    dose = planted({("steered", "calm", 0.4): (math.log(1.5), 0.0)}, noise=0.2)
    row = classify_regimes(dose, thresholds=RULE).table.iloc[0]
    assert 0.05 < row["p_degraded"] < 0.95


def test_the_papers_rule_counts_whitespace_words_and_so_misses_chinese_loops():
    loop, short, plain = "be free be free be free be free", "no", "they walked home and talked about the day"
    assert jeong_regime([loop] * 6 + [plain] * 4) == "repetitive_collapse"
    assert jeong_regime([loop] * 5 + [plain] * 5) == "surgical"
    assert jeong_regime([short] * 4 + [plain] * 6) == "explosive"
    assert jeong_regime(["平静平静平静平静平静平静"] * 10) == "explosive"


def test_the_papers_rule_on_a_sweep_labels_each_cell_by_its_texts_alone():
    loop, plain = "be free be free be free be free", "they walked home and talked about the day"
    dose = planted({("steered", "calm", s): (9.0, 0.9) for s in (0.1, 0.2, 0.4)}, n_prompts=10)
    said = {0.0: [plain] * 10, 0.1: [plain] * 10, 0.2: [loop] * 6 + [plain] * 4, 0.4: ["no"] * 4 + [plain] * 6}
    texts = [said[s][p] for s, p in zip(dose.column("strength"), dose.column("prompt"), strict=True)]
    dose = replace(dose, table=dose.table.assign(text=texts))
    found = classify_regimes(dose, protocol="jeong2026")
    expected = {0.1: "surgical", 0.2: "repetitive_collapse", 0.4: "explosive"}
    assert {s: found.regime("calm", s) for s in expected} == expected
    assert {s: jeong_regime(said[s]) for s in expected} == expected
    own = found.table[found.table["kind"] == "steered"].set_index("strength")
    assert own.loc[0.2, "share_repetitive_collapse"] == pytest.approx(0.6)
    assert 0.5 < own.loc[0.2, "p_repetitive_collapse"] < 1
    assert own.loc[0.1, "p_surgical"] == 1
    assert "by the rule in the paper's code" in str(found)
    assert "perplexities" not in str(found)
    assert classify_regimes(dose).regime("calm", 0.1) == "repetitive_collapse"
    with pytest.raises(ValueError, match=r"received protocol='paper'; allowed are \['lens_affect', 'jeong2026'\]"):
        classify_regimes(dose, protocol="paper")
    with pytest.raises(ValueError, match="received thresholds with protocol='jeong2026'"):
        classify_regimes(dose, protocol="jeong2026", thresholds=RULE)


def test_the_papers_measurement_runs_on_its_two_scenarios(tiny_model):
    model = tiny_model("llama")
    label, samples = run_jeong_regime(
        model, vectors_of(model, ("calm", "hostile")), strengths=(0.01, 0.05), max_new_tokens=4
    )
    assert label in ("surgical", "explosive", "repetitive_collapse")
    assert samples[["emotion", "strength"]].to_numpy().tolist() == [
        ["calm", 0.01],
        ["calm", 0.05],
        ["hostile", 0.01],
        ["hostile", 0.05],
    ]
    assert label == jeong_regime(samples["text"].tolist())


def test_a_map_comes_back_from_disk_and_shows_itself(tmp_path):
    dose = planted(CELLS)
    found = classify_regimes(dose, judged(dose, {("steered", 0.2): 0.3}))
    again = RegimeMap.load(found.save(tmp_path / "map"))
    assert again.to_frame().equals(found.to_frame())
    assert str(again) == str(found)
    assert "+0.2: surgical 1" in str(found)
    assert "+1.6: repetitive collapse 1" in str(found)
    assert "_" not in str(found)
    assert "a planted judge" in str(found)
    assert len(str(found).splitlines()) <= 5
    assert "surgical" in found._repr_html_()
