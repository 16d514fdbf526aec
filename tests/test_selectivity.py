"""Selectivity: known losses come back in SDs, intervals cover, a planted module is found, and what is one function is not compared."""

import numpy as np
import pytest
import torch

from lens_affect.live_weights import LiveWeights
from lens_affect.results import Provenance
from lens_affect.selectivity import AblationTable, layer_bands, scan_ablations
from tests.test_transfers import same, state
from tests.tiny import make_hf_model


def table(affect_drop, control_drop, n=60, seed=0, how="shuffle", groups=None):
    """One arm per drop: scores of SD 2 and 0.5, each example a little differently hurt."""
    rng = np.random.default_rng(seed)
    before = [torch.from_numpy(rng.normal(size=m) * sd).float() for m, sd in ((n, 2.0), (2 * n, 0.5))]
    after = [
        torch.stack([b - sd * torch.from_numpy(d + 0.5 * rng.normal(size=len(b))).float() for d in drops])
        for b, sd, drops in ((before[0], 2.0, affect_drop), (before[1], 0.5, control_drop))
    ]
    names = ("gate", "up", "down")[: len(affect_drop)]
    return AblationTable(
        arms=names, bands=("0-2",) * len(names), scales=torch.ones(len(names)), affect=after[0], control=after[1],
        affect_before=before[0], control_before=before[1],
        affect_groups=tuple(groups or map(str, range(n))), control_groups=tuple(map(str, range(2 * n))),
        how=how, seed=0, provenance=Provenance(model="m"),
    )  # fmt: skip


def test_losses_are_in_standard_deviations_of_the_scores_before():
    found = table([1.0, 0.2], [0.4, 0.2])
    rows = found.to_frame().set_index("arm")
    a0, a1 = found.affect_before.double().numpy(), found.affect[0].double().numpy()
    assert rows.loc["gate", "affect_loss"] == pytest.approx((a0.mean() - a1.mean()) / a0.std(ddof=1), rel=1e-5)
    assert rows.loc["gate", "selectivity"] == pytest.approx(
        rows.loc["gate", "affect_loss"] - rows.loc["gate", "control_loss"]
    )
    assert rows.loc["gate", "low"] > 0 > rows.loc["up", "low"]
    assert (rows["n"].iloc[0], rows["n_control"].iloc[0]) == (60, 120)
    difference = found.compare("gate", "up").iloc[0]
    assert difference["difference"] == pytest.approx(rows.loc["gate", "selectivity"] - rows.loc["up", "selectivity"])
    assert difference["low"] > 0
    assert "most selective: gate in blocks 0-2" in str(found)


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = 0
    for seed in range(200):
        row = table([0.6], [0.4], n=40, seed=seed).to_frame().iloc[0]
        inside += row["low"] <= 0.2 <= row["high"]
    assert 0.90 <= inside / 200 <= 0.99


def test_examples_of_one_group_stay_together():
    plain, grouped = (
        table([1.0], [0.4], groups=groups).to_frame().iloc[0] for groups in (None, [str(i // 30) for i in range(60)])
    )
    assert plain["selectivity"] == pytest.approx(grouped["selectivity"])
    assert plain["high"] - plain["low"] != pytest.approx(grouped["high"] - grouped["low"], rel=0.01)


def test_zeroed_siblings_are_not_compared():
    found = table([1.0, 0.2, 0.1], [0.4, 0.2, 0.1], how="zero")
    for pair in (("gate", "up"), ("gate", "down"), ("up", "down")):
        with pytest.raises(ValueError, match="ablated by zero, which is one function"):
            found.compare(*pair)
    with pytest.raises(ValueError, match="ablated by zero, which is one function"):
        found.compare("gate", "mlp")
    assert "no arm is named" in str(found)
    with pytest.raises(ValueError, match=r"received the arm 'q' in 0-2; arms are \['gate', 'up', 'down'\]"):
        found.compare("gate", "q")
    assert len(table([1.0, 0.2], [0.4, 0.2]).compare("gate", "up")) == 1


def test_a_scan_finds_the_band_and_module_where_the_score_lives(tmp_path):
    model = make_hf_model("llama")
    before = state(model)
    live = LiveWeights(model)
    key = "layers.2.gate"
    start = live.read(key)
    rng = np.random.default_rng(0)
    spread, other = rng.normal(size=20), rng.normal(size=30)

    def affect(m):
        return spread - 5 * float((LiveWeights(m).read(key) - start).norm() / start.norm()) + 0 * rng.normal()

    seen = []
    found = scan_ablations(
        model, arms=["gate", "up"], affect=affect, control=lambda m: other, bands=3, scales={"gate": 0.5, "up": 0.5},
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    rows = found.to_frame().set_index(["arm", "band"])
    assert rows["selectivity"].idxmax() == ("gate", "2")
    assert rows.loc[("gate", "2"), "affect_loss"] == pytest.approx(2.5 / spread.std(ddof=1), rel=0.01)
    assert rows.drop(("gate", "2"))["selectivity"].abs().max() < 1e-6
    assert list(found.compare("gate", "up")["band"]) == ["0", "1", "2"]
    assert seen[-1] == (6, 6)
    assert same(model, before)
    found.save(tmp_path / "t")
    assert AblationTable.load(tmp_path / "t").to_frame().equals(found.to_frame())
    assert "most selective" in found._repr_html_()


def test_bands_cut_the_blocks_evenly():
    assert layer_bands(30, 3) == {f"{i}-{i + 9}": tuple(range(i, i + 10)) for i in (0, 10, 20)}
    with pytest.raises(ValueError, match="received 4 bands for 3 blocks"):
        layer_bands(3, 4)


def test_wrong_scans_are_refused():
    model = make_hf_model("llama")

    def attempt(message, **settings):
        options = {"arms": ["gate"], "affect": lambda m: np.arange(4.0), "control": lambda m: np.arange(3.0)}
        with pytest.raises(ValueError, match=message):
            scan_ablations(model, **options | settings)

    attempt("without a scale for \\['gate'\\]", scales={"up": 1.0})
    attempt("received the arms \\[\\]", arms=[])
    attempt("affect scores of shape \\(4,\\) that are not finite", affect=lambda m: np.full(4, np.nan))
    attempt("allowed is one each", affect_groups=["a"])
    sizes = iter([4, 3])
    attempt("one finite number per example, 4 as before", affect=lambda m: np.arange(float(next(sizes))))
