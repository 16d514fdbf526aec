"""What modules are worth for a task: known answers by construction, exact restoration, joins and refusals."""

import math

import numpy as np
import pytest
import torch

from lens_affect.ablations import ablate_modules
from lens_affect.damage import neutral_loss
from lens_affect.lora import open_adapter_run
from lens_affect.models import load_model
from lens_affect.module_table import two_way_interval
from lens_affect.part_scores import KINDS, PartScores, fingerprint, join_parts, score_parts
from lens_affect.results import Provenance
from lens_affect.trainable import tuned_weights
from lens_affect.transfers import transfer_modules
from lens_affect.tuning import tune_module
from tests.planted_task import QUICK, TASK
from tests.tiny import make_hf_model, make_tokenizer


@pytest.fixture(scope="module")
def run(tunable):
    return tune_module(tunable, TASK, modules="all", rank=4, rate=0.02, steps=40, check_every=40, n_validation=8)


@pytest.fixture(scope="module")
def by_kind(tunable, run):
    arms = ("gate", "up", "attention", "mlp", "all")
    kinds = {kind: arms if kind != "equal_damage" else ("up",) for kind in KINDS}
    options = {"measure": "log_share", "target": 0.01, "examples": TASK.examples("train")}
    return {kind: score_parts(tunable, run, TASK, arms=chosen, kind=kind, **options) for kind, chosen in kinds.items()}


def test_everything_transferred_is_the_tuned_model_and_everything_reverted_is_the_base(
    tunable, by_kind, run, unchanged
):
    with tuned_weights(tunable, run):
        on_train = TASK.score(tunable, TASK.examples("train"))
    transfer, revert = by_kind["transfer"], by_kind["revert"]
    assert torch.equal(transfer.scores[4, 0], transfer.after[0])
    assert torch.equal(revert.scores[4, 0], revert.before)
    torch.testing.assert_close(transfer.after[0], on_train.gold_log_probability(), atol=1e-4, rtol=0)
    assert torch.equal(transfer.before, TASK.score(tunable, TASK.examples("train")).gold_log_probability())
    assert float(transfer.after.mean()) > float(transfer.before.mean())
    for kind in (transfer, revert):
        share = kind.to_frame().set_index("arm").loc["all"]
        assert share["share"] == pytest.approx(1.0)


def test_attention_transferred_is_mlp_reverted(by_kind):
    """The same weights by two ways."""
    transfer, revert = by_kind["transfer"], by_kind["revert"]
    torch.testing.assert_close(transfer.scores[2], revert.scores[3], atol=1e-4, rtol=0)
    torch.testing.assert_close(transfer.scores[3], revert.scores[2], atol=1e-4, rtol=0)


def test_one_transferred_module_scores_as_by_hand(tunable, run, by_kind, unchanged):
    with transfer_modules(tunable, open_adapter_run(run), modules="up"):
        by_hand = TASK.score(tunable, TASK.examples("train")).gold_log_probability()
    assert torch.equal(by_kind["transfer"].scores[1, 0], by_hand)


def test_noise_in_place_of_a_change_is_neither_the_change_nor_the_base(by_kind):
    noise, revert = by_kind["random_equal_norm"], by_kind["revert"]
    for arm in range(3):
        assert not torch.allclose(noise.scores[arm], revert.scores[arm], atol=1e-5)
        assert not torch.allclose(noise.scores[arm, 0], noise.after[0], atol=1e-5)


def test_equal_damage_is_that_of_the_tuned_model_at_the_scale_that_was_found(tunable, run, by_kind, unchanged):
    found = by_kind["equal_damage"]
    assert float(found.rises) == pytest.approx(0.01, rel=0.05)
    with transfer_modules(tunable, run, modules="all"):
        before = neutral_loss(tunable)
        with ablate_modules(tunable, modules="up", how="random_equal_norm", scale=float(found.scales)):
            assert (neutral_loss(tunable) - before).mean() == pytest.approx(0.01, rel=0.06)
            by_hand = TASK.score(tunable, TASK.examples("train")).gold_log_probability()
    torch.testing.assert_close(found.scores[0, 0], by_hand, atol=1e-5, rtol=0)


def test_the_model_is_as_before(by_kind, unchanged):
    """`unchanged` compares every weight."""


def planted(kind, gains, *, seeds=3, n=300, draw=0, noise=0.05):
    """Scores whose share of the gain is known: untuned 0, tuned 1 on average."""
    rng = np.random.default_rng(draw)
    before, after = rng.normal(0, 0.1, n), rng.normal(1, 0.1, (seeds, n))
    start = before if kind == "transfer" else after
    sign = 1 if kind == "transfer" else -1
    scores = np.stack([start + sign * g + rng.normal(0, noise, (seeds, n)) for g in gains.values()])
    nothing = np.full((len(gains), seeds), math.nan)
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (scores, before, after, np.ones_like(nothing), nothing)]
    return PartScores(
        kind,
        tuple(gains),
        tuple(range(seeds)),
        *tensors,
        tuple(f"run {seed}" for seed in range(seeds)),
        0.3 if kind == "equal_damage" else math.nan,
        tuple(map(str, range(n))),
        "a task",
        "accuracy",
        Provenance(model="planted"),
    )


@pytest.mark.parametrize("kind", ["transfer", "revert"])
def test_planted_shares_are_recovered(kind):
    table = planted(kind, {"gate": 0.7, "up": 0.4}).to_frame().set_index("arm")
    for arm, share in (("gate", 0.7), ("up", 0.4)):
        assert table.loc[arm, "share_low"] < share < table.loc[arm, "share_high"]
        assert table.loc[arm, "share_high"] - table.loc[arm, "share_low"] < 0.1


@pytest.mark.parametrize("kind", ["transfer", "revert"])
def test_a_contrast_is_positive_where_the_first_arm_matters_more(kind):
    found = planted(kind, {"gate": 0.7, "up": 0.4})
    assert found.contrast("gate", "up").low > 0.2
    assert found.contrast("up", "gate").high < -0.2
    by_hand = two_way_interval((found.scores[0] - found.scores[1]).double().numpy(), found.groups)
    assert abs(found.contrast("gate", "up").estimate) == pytest.approx(abs(by_hand.estimate))
    with pytest.raises(ValueError, match="allowed are"):
        found.contrast("gate", "nose")


def test_nothing_gained_has_no_share():
    found = planted("transfer", {"gate": 0.0})
    flat = PartScores(
        **{n: getattr(found, n) for n in found.__dataclass_fields__} | {"after": found.before.expand(3, -1)}
    )
    assert flat.to_frame()["share"].isna().all()
    row = flat.to_frame().iloc[0]
    assert f"scores: gate {row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in str(flat)


def test_an_arm_without_its_damage_is_not_measured_and_the_others_are(tmp_path):
    found = planted("equal_damage", {"gate": 0.5, "up": 0.2})
    found.scores[1, 2], found.scales[1, 2] = math.nan, math.nan
    table = found.to_frame().set_index("arm")
    assert table["n_seeds"].to_dict() == {"gate": 3, "up": 2}
    assert found.contrast("gate", "up").n_seeds == 2
    found.save(tmp_path / "parts")
    assert str(PartScores.load(tmp_path / "parts")) == str(found)
    assert "when noise raises the loss" in str(found)


def test_seeds_join_and_strangers_do_not():
    whole = planted("transfer", {"gate": 0.7, "up": 0.4})
    each = [
        PartScores(
            **{n: getattr(whole, n) for n in whole.__dataclass_fields__}
            | {n: getattr(whole, n)[:, i : i + 1] for n in ("scores", "scales", "rises")}
            | {"after": whole.after[i : i + 1], "seeds": (i,), "tuned": (f"run {i}",)}
        )
        for i in range(3)
    ]
    joined = join_parts(each)
    assert torch.equal(joined.scores, whole.scores)
    assert joined.to_frame().equals(whole.to_frame())
    with pytest.raises(ValueError, match="different seeds"):
        join_parts([each[0], each[0]])
    with pytest.raises(ValueError, match="2 kinds"):
        join_parts([whole, planted("revert", {"gate": 0.7, "up": 0.4})])


def test_scores_of_other_examples_and_runs_of_another_base_are_refused(tunable, run):
    few, others = TASK.examples("test")[:4], TASK.examples("train")[:4]
    before = TASK.score(tunable, others)
    with pytest.raises(ValueError, match="other examples"):
        score_parts(tunable, run, TASK, arms=("gate",), examples=few, before=before, after=before)
    stranger = load_model(make_hf_model("llama", seed=7), tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="weights differ"):
        score_parts(stranger, run, TASK, arms=("gate",), examples=few)
    assert fingerprint(run) != fingerprint(tune_module(tunable, TASK, modules="gate", rank=1, rate=0.01, **QUICK))


@pytest.mark.parametrize("bad", [{"kind": "zero"}, {"measure": "f1"}, {"arms": ()}, {"arms": ("nose",)}])
def test_refusals(tunable, run, bad):
    with pytest.raises(ValueError, match="allowed are"):
        score_parts(tunable, run, TASK, **bad)


def test_what_differences_could_be_seen_is_printed():
    found = planted("transfer", {"gate": 0.8, "up": 0.3, "down": 0.3})
    pairs = [found.contrast(a, b).detectable for a, b in (("gate", "up"), ("gate", "down"), ("up", "down"))]
    assert found.detectable == pytest.approx(float(np.median(pairs)))
    assert f"minimum detectable difference between two arms {found.detectable:.3f} (median, power 80%)" in str(found)
    assert math.isnan(planted("transfer", {"gate": 0.8}).detectable)
