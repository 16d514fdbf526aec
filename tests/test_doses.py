"""Dose and response: rows of one prompt differ by the dose alone, every measure is that of the text, nothing is dropped."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lens_affect.adapter import add_hooks, encode_prompt, model_info
from lens_affect.doses import CONTROLS, MEASURES, UNSTEERED, DoseResponse, sweep_strengths
from lens_affect.generation import generate
from lens_affect.models import load_model
from lens_affect.regimes import R_OK, Thresholds, classify_regimes, damage_labels
from lens_affect.repetition import repetition_share
from lens_affect.scenarios import load_scenarios
from lens_affect.scoring import score_texts
from lens_affect.sites import resolve_site
from lens_affect.statistics import mean_interval
from lens_affect.steering import make_push, residual_norms
from tests.test_patching import vectors_of
from tests.tiny import make_hf_model, make_tokenizer

PROMPTS = ["Hello there", "Write about a cat in the garden", "Why"]
SMALL = {"emotions": ["calm", "sad"], "strengths": [-0.5, 0.5], "n_tokens": 14, "seed": 1}


@pytest.fixture(scope="module")
def dose(tiny_model):
    model = tiny_model("llama")
    return sweep_strengths(model, vectors_of(model), PROMPTS, layers=1, controls=list(CONTROLS), **SMALL)


def test_every_cell_has_every_prompt_and_nothing_is_dropped(dose):
    assert len(dose.table) == 2 * 3 + 2 * 2 * 3 + 2 * (2 * 3) + 2 * 2 * 3
    cells = dose.to_frame()
    assert (cells["n"] == 3).all()
    assert set(cells["kind"]) == {*UNSTEERED, "steered", *CONTROLS}
    assert {"perplexity_ratio", "perplexity_ratio_low", "repetition", "kl", "change", "n_empty"} <= set(cells)
    assert dose.kinds == ("steered", "random", "random_in_spread", "other_emotion")


def test_random_directions_and_those_of_another_emotion_stand_beside_the_steered_texts_by_default(tiny_model):
    model = tiny_model("llama")
    small = SMALL | {"strengths": [0.5], "n_tokens": 4}
    assert sweep_strengths(model, vectors_of(model), PROMPTS, layers=1, **small).kinds == (
        "steered",
        "random",
        "other_emotion",
    )


def test_a_text_of_the_sweep_is_what_its_row_alone_would_write(tiny_model, dose):
    model = tiny_model("llama")
    push = make_push(model, vectors_of(model), "sad", layers=1, strength=-0.5)
    alone = generate(
        model, [PROMPTS[1]], interventions=push.interventions(), max_new_tokens=14, row_seeds=["1"], seed=1
    )
    rows = dose.table.query("kind == 'steered' and emotion == 'sad' and strength == -0.5 and prompt == 1")
    assert rows["text"].item() == alone.texts[0]
    assert tuple(t for t in dose.tokens[rows.index[0]].tolist() if t >= 0) == alone.tokens[0]
    plain = generate(model, [PROMPTS[1]], max_new_tokens=14, row_seeds=["1"], seed=1)
    assert dose.table.query("kind == 'unsteered' and prompt == 1")["text"].item() == plain.texts[0]
    again = dose.table.query("kind == 'unsteered_again' and prompt == 1")["text"].item()
    assert again != plain.texts[0]


def test_measures_are_those_of_the_text(tiny_model, dose):
    model = tiny_model("llama")
    i = int(dose.table.query("kind == 'steered' and emotion == 'calm' and strength == 0.5 and prompt == 2").index[0])
    row = dose.table.loc[i]
    tokens = tuple(t for t in dose.tokens[i].tolist() if t >= 0)
    head = encode_prompt(model, PROMPTS[2])[0]
    push = make_push(model, vectors_of(model), "calm", layers=1, strength=0.5)
    scores = score_texts(model, [head], [tokens], interventions=push.interventions())
    assert row["nll"] == pytest.approx(float(scores.nll[0]), abs=1e-5)
    assert row["kl"] == pytest.approx(float(scores.kl[0]), rel=1e-3)
    assert row["change"] == pytest.approx(float(scores.change[0]), rel=1e-4)
    assert row["repetition"] == pytest.approx(repetition_share(tokens), nan_ok=True)
    unsteered = dose.table.query("kind == 'unsteered' and prompt == 2")["nll"].item()
    assert dose.log_ratio[i] == pytest.approx(row["nll"] - unsteered)
    plain = dose.table[dose.table["kind"].isin(UNSTEERED)]
    assert plain["kl"].abs().max() == 0 == plain["change"].abs().max()


def deviations(found):
    """Achieved change of every control cell over that of the steered texts beside it."""
    change = found.table.groupby(["kind", "emotion", "strength"])["change"].mean()
    steered = found.table[found.table["kind"] == "steered"]
    for (kind, emotion, strength), achieved in change.items():
        if kind in CONTROLS:
            beside = steered[(steered["strength"] == strength) & (steered["emotion"].isin([emotion]) | (emotion == ""))]
            yield achieved / beside["change"].mean()


@pytest.mark.parametrize(
    ("scope", "mode", "layers"),
    [
        ("response", "add", 1),
        ("response", "add", [0, 1, 2]),
        ("prompt", "add", 1),
        ("all", "add", [0, 2]),
        ("response", "clamp", 1),
        ("all", "clamp", 0),
    ],
)
def test_controls_move_the_stream_as_far_as_the_steered_texts_beside_them(tiny_model, scope, mode, layers):
    model = tiny_model("gemma3")
    found = sweep_strengths(
        *(model, vectors_of(model), PROMPTS), layers=layers, scope=scope, mode=mode, controls=list(CONTROLS), **SMALL
    )
    assert list(deviations(found)) == pytest.approx([1.0] * 8, abs=0.05)
    changes = found.control_changes()
    assert len(changes) == len(CONTROLS) * 4
    assert found.unequal == pytest.approx(changes["deviation"].abs().max())
    assert f"as each emotion at each strength to {100 * found.unequal:.0f} %" in str(found)
    steered = found.table[found.table["kind"] == "steered"]
    if layers == 1 and mode == "add":
        assert (steered["scale"] == steered["strength"]).all()  # the norms set the dose
    if isinstance(layers, list):
        achieved = steered.groupby(["emotion", "strength"])["change"].mean()
        assert achieved.tolist() == pytest.approx([0.5] * 4, rel=0.05)
    factors = found.table[found.table["kind"] == "random"].groupby("strength")["scale"].nunique()
    assert (factors == 1).all()  # one scalar per cell


def test_equality_is_stated_for_each_emotion_by_itself(dose):
    """Random texts serve two emotions at once: as far as their mean, and off each of them by half."""
    planted = {("steered", "calm"): 0.2, ("steered", "sad"): 0.6, ("random", ""): 0.4, ("random_in_spread", ""): 0.4}
    planted |= {("other_emotion", "calm"): 0.2, ("other_emotion", "sad"): 0.6}
    change = [planted.get((k, e), 0.0) for k, e in zip(dose.table["kind"], dose.table["emotion"], strict=True)]
    found = replace(dose, table=dose.table.assign(change=change))
    assert found.unequal == pytest.approx(1.0)
    off = found.control_changes().set_index(["control", "emotion", "strength"])["deviation"]
    assert off["random", "calm", 0.5] == pytest.approx(1.0)
    assert off["random", "sad", 0.5] == pytest.approx(-1 / 3)
    assert off["other_emotion", "sad", 0.5] == pytest.approx(0.0)
    assert (
        "as the mean of the emotions to 0 %, as each emotion at each strength to 100 % (most: random beside calm"
        in str(found)
    )


def test_random_texts_are_compared_on_the_prompts_of_the_emotion(dose):
    prompt = dose.table["prompt"].to_numpy()
    kept = ~((dose.table["kind"] == "steered") & (dose.table["emotion"] == "calm") & (prompt != 0))
    table = dose.table[kept].reset_index(drop=True)
    table["change"] = np.where(table["kind"] == "random", np.where(table["prompt"] == 0, 0.2, 0.9), 0.2)
    off = replace(dose, table=table).control_changes().query("control == 'random' and emotion == 'calm'")["deviation"]
    assert off.tolist() == pytest.approx([0.0, 0.0])


def test_texts_that_were_written_anew_are_what_their_own_dose_writes(tiny_model):
    model = tiny_model("gemma3")
    how = {"layers": 1, "mode": "clamp", "controls": ["other_emotion"]}
    found = sweep_strengths(model, vectors_of(model), PROMPTS, **how, **SMALL)
    rows = found.table[found.table["kind"] == "other_emotion"]
    i = int((rows["scale"] / rows["strength"] - 1).abs().idxmax())
    row = found.table.loc[i]
    assert row["scale"] != row["strength"]
    push = make_push(model, vectors_of(model), row["vector"], layers=1, strength=row["scale"], mode="clamp")
    alone = generate(
        *(model, [PROMPTS[row["prompt"]]]),
        **{"interventions": push.interventions(), "max_new_tokens": 14, "row_seeds": [str(row["prompt"])], "seed": 1},
    )
    assert row["text"] == alone.texts[0]
    assert alone.tokens[0] == tuple(t for t in found.tokens[i].tolist() if t >= 0)
    scores = score_texts(
        model, [encode_prompt(model, PROMPTS[row["prompt"]])[0]], alone.tokens, interventions=push.interventions()
    )
    assert row["change"] == pytest.approx(float(scores.change[0]), rel=1e-4)


def test_cells_are_geometric_means_over_prompts_with_a_t_interval(dose):
    cell = dose.to_frame().query("kind == 'steered' and emotion == 'calm' and strength == 0.5").iloc[0]
    rows = dose.cells()["steered", "calm", 0.5]
    expected = mean_interval(dose.log_ratio[rows])
    assert cell["perplexity_ratio"] == pytest.approx(math.exp(float(expected.estimate)))
    assert cell["perplexity_ratio_low"] == pytest.approx(math.exp(float(expected.low)))
    assert cell["kl"] == pytest.approx(dose.table.loc[rows, "kl"].mean())
    assert all(f"{m}_high" in cell for m in MEASURES)
    assert cell["perplexity_ratio_n"] == 3
    # A text under 12 tokens has no repetition: every mean says how many texts are behind it.
    short = dose.table["repetition"].to_numpy(float).copy()
    short[rows[0]] = math.nan
    cells = replace(dose, table=dose.table.assign(repetition=short)).to_frame()
    cell = cells.query("kind == 'steered' and emotion == 'calm' and strength == 0.5").iloc[0]
    assert (cell["n"], cell["repetition_n"], cell["kl_n"]) == (3, int(np.isfinite(short[rows]).sum()), 3)
    assert cell["repetition_n"] < 3


def test_random_directions_are_the_same_for_all_strengths_and_another_emotion_is_another(dose):
    other = dose.table[dose.table["kind"] == "other_emotion"]
    assert (other["vector"] != other["emotion"]).all()
    random = dose.table[dose.table["kind"] == "random"]
    assert set(random["vector"]) == {"random 0", "random 1", "random 2"}


def test_batches_and_seeds(tiny_model, dose):
    model = tiny_model("llama")
    parts = sweep_strengths(
        model, vectors_of(model), PROMPTS, layers=1, controls=list(CONTROLS), rows_at_once=5, **SMALL
    )
    assert parts.texts == dose.texts
    other = sweep_strengths(model, vectors_of(model), PROMPTS, layers=1, controls=[], **(SMALL | {"seed": 2}))
    assert other.texts[:3] != dose.texts[:3]


def test_several_layers_reach_the_change_of_one(tiny_model):
    model = tiny_model("gemma3")
    found = sweep_strengths(
        model,
        vectors_of(model),
        PROMPTS,
        layers=[0, 1, 2],
        controls=["random"],
        emotions=["calm"],
        strengths=[0.4],
        n_tokens=14,
    )
    steered = found.table[~found.table["kind"].isin(UNSTEERED)]
    assert (steered["scale"] != 0.4).all()
    assert steered.groupby("kind")["change"].mean().tolist() == pytest.approx([0.4, 0.4], rel=0.05)


def test_scenarios_are_openings_for_a_model_without_a_template_and_requests_for_one_with(tiny_model):
    scenarios = load_scenarios("neutral").select(rows=[0, 1])
    small = {"emotions": ["sad"], "strengths": [0.5], "n_tokens": 4, "controls": []}
    for chat, form, texts in ((False, "continue", scenarios.openings), (True, "chat", scenarios.requests)):
        model = tiny_model("llama", chat=chat)
        found = sweep_strengths(model, vectors_of(model), scenarios, **small)
        assert (found.form, found.prompts) == (form, texts)
        assert set(found.table["group"]) == set(scenarios.groups)
        assert found.name == "neutral"


def test_another_scorer_counts_per_token_or_per_byte(tiny_model, dose):
    model = tiny_model("llama")
    small = {"layers": 1, "controls": [], **SMALL}
    same = sweep_strengths(model, vectors_of(model), PROMPTS, scorer=tiny_model("qwen2"), **small)
    assert same.unit == "token"
    assert "ratio of perplexities (per token, under the unsteered model itself)" in str(dose)
    assert f"(per token, under {model_info(tiny_model('qwen2')).provenance.title})" in str(same)
    assert same.texts == dose.texts[: len(same.texts)]
    assert not np.allclose(same.column("nll"), dose.column("nll")[: len(same.table)], equal_nan=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<another>"])
    other = sweep_strengths(
        model, vectors_of(model), PROMPTS, scorer=load_model(make_hf_model("qwen2"), tokenizer=tokenizer), **small
    )
    assert other.unit == "byte"
    assert f"(per byte, under {other.scorer})" in str(other)
    row = other.table.iloc[4]
    head, body = encode_prompt(model, PROMPTS[row["prompt"]])[0], tokenizer(row["text"], add_special_tokens=False)
    scores = score_texts(tiny_model("qwen2"), [head], [body["input_ids"]])
    expected = float(scores.nll[0]) * int(scores.n_tokens[0]) / len(row["text"].encode())
    assert row["nll"] == pytest.approx(expected, rel=1e-4)


def test_thresholds_under_a_foreign_scorer_are_per_byte(tiny_model, dose):
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    tokenizer.add_tokens(["<another>"])
    small = {"layers": 1, "controls": list(CONTROLS), **SMALL}
    foreign = sweep_strengths(
        model, vectors_of(model), PROMPTS, scorer=load_model(make_hf_model("llama"), tokenizer=tokenizer), **small
    )
    plain = dose.table[dose.table["kind"].isin(UNSTEERED)]
    per_token = sum(len(text.encode()) for text in plain["text"]) / plain["n_tokens"].sum()
    limits = Thresholds.of(foreign)
    assert limits.unit == "byte"
    assert limits.r_high == pytest.approx(limits.r_ok**2)
    assert limits.r_ok >= R_OK ** (1 / per_token)
    # Two samples that are one and the same leave only the floor: R_OK per token, as the same factor per byte.
    table = foreign.table.assign(nll=np.where(foreign.table["kind"] == UNSTEERED[1], foreign.column("nll_unsteered"), foreign.column("nll")))  # fmt: skip
    assert Thresholds.of(replace(foreign, table=table)).r_ok ** per_token == pytest.approx(R_OK)
    with pytest.raises(ValueError, match="received thresholds per token for perplexities per byte"):
        damage_labels(foreign, Thresholds.of(dose))
    assert "ratio of perplexities per byte unchanged up to" in str(classify_regimes(foreign))
    assert "ratio of perplexities per token unchanged up to" in str(classify_regimes(dose))


def test_texts_that_end_at_once_are_counted_and_have_no_value(tiny_model, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("lens_affect.generation.stop_tokens", lambda m: tuple(range(model.cfg.d_vocab)))
    found = sweep_strengths(model, vectors_of(model), PROMPTS, layers=1, controls=[], **SMALL)
    cells = found.to_frame()
    assert (cells["n_empty"] == 3).all()
    assert cells["perplexity_ratio"].isna().all()
    assert (cells["n"] == 3).all()
    assert (cells[[f"{m}_n" for m in ("perplexity_ratio", "repetition", "kl", "change")]] == 0).all(axis=None)
    assert (cells["n_tokens_n"] == 3).all()
    assert "0 empty" not in str(found)
    assert found.table["finished"].all()


def test_a_push_into_logits_that_are_not_finite_is_invalid_and_the_sweep_goes_on():
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    vectors = vectors_of(model)
    limit = 6 * float(residual_norms(model)[1])  # an ordinary position never comes near it

    def overflow(value, hook):  # as in float16
        return value.masked_fill((value.norm(dim=-1) > limit)[:, :, None], float("nan"))

    with add_hooks(model, [(resolve_site(model, "resid_post").at(2), overflow)]):
        found = sweep_strengths(
            model, vectors, PROMPTS, layers=1, emotions=["calm"], strengths=[0.2, 9.0], n_tokens=14, seed=1
        )
    regimes = classify_regimes(found)
    far = found.table[(found.table["kind"] == "steered") & (found.table["strength"] == 9.0)]
    assert not far["finite"].any()
    assert (far["n_tokens"] == 0).all()
    assert regimes.regime("calm", 9.0) == "invalid"
    assert regimes.regime("calm", 0.2) != "invalid"
    assert found.table[found.table["strength"] < 1]["finite"].all()
    assert len(found.table) == 2 * 3 + 2 * 3 * 3  # nothing is dropped


def test_a_sweep_comes_back_from_disk_and_shows_itself(dose, tmp_path):
    again = DoseResponse.load(dose.save(tmp_path / "dose"))
    assert again.to_frame().equals(dose.to_frame())
    assert str(again) == str(dose)
    assert "2 emotions x 2 strengths at layer 1" in str(dose)
    assert len(str(dose).splitlines()) <= 5
    assert "<table" in dose._repr_html_()
    assert torch.equal(again.norms, dose.norms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emotions": []}, r"received emotions=\[\]; allowed is a list"),
        ({"emotions": "calm"}, "received emotions='calm'; allowed is a list"),
        ({"emotions": ["hungry"]}, "received emotion 'hungry'; there are vectors for"),
        ({"strengths": [0.0]}, r"received strengths \[0.0\]; allowed are different ones other than 0"),
        ({"strengths": [float("nan")]}, "received strength nan"),
        ({"controls": ["topic"]}, r"received controls \['topic'\]; allowed are"),
        ({"mode": "ablate"}, "received mode='ablate'; allowed are 'add' and 'clamp'"),
        ({"layers": 9}, r"received layers \[9\]"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_before_any_text_is_written(tiny_model, change, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        sweep_strengths(model, vectors_of(model), PROMPTS, **(SMALL | change))


@pytest.mark.parametrize("control", ["other_emotion", "random_in_spread"])
def test_controls_that_need_more_emotions_than_there_are_vectors_for_are_refused_in_words(tiny_model, control):
    model = tiny_model("llama")
    alone = vectors_of(model, ("calm", "neutral"))
    with pytest.raises(ValueError, match=rf"received controls \['{control}'\] with vectors of \['calm'\]"):
        sweep_strengths(model, alone, PROMPTS, emotions=["calm"], strengths=[0.5], controls=[control])


def test_a_scorer_that_cannot_read_the_texts_is_refused_before_they_are_written(tiny_model, monkeypatch):
    model = tiny_model("llama")
    other = tiny_model("qwen2")
    monkeypatch.setattr("lens_affect.doses.context_window", lambda reader: 20 if reader is other else 512)
    monkeypatch.setattr("lens_affect.pushed_texts.generate", None)  # nothing may be written
    with pytest.raises(ValueError, match="context window of the scorer, .*, holds 20"):
        sweep_strengths(model, vectors_of(model), PROMPTS, scorer=other, **SMALL)


def test_texts_that_are_too_long_for_another_tokenizer_have_no_perplexity_and_the_rest_is_kept(tiny_model, caplog):
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    tokenizer.add_tokens(["<another>"])
    scorer = load_model(make_hf_model("qwen2"), tokenizer=tokenizer)
    small = {"layers": 1, "controls": [], **SMALL}
    whole = sweep_strengths(model, vectors_of(model), PROMPTS, scorer=scorer, **small)
    with pytest.MonkeyPatch.context() as patched:
        longest = max(len(encode_prompt(scorer, p)[0]) for p in PROMPTS) + SMALL["n_tokens"]
        patched.setattr("lens_affect.doses.context_window", lambda scorer: longest)
        found = sweep_strengths(model, vectors_of(model), PROMPTS, scorer=scorer, **small)
    assert found.texts == whole.texts
    lost = found.table["nll"].isna() & whole.table["nll"].notna()
    assert np.allclose(found.table["nll"][~lost], whole.table["nll"][~lost], rtol=1e-4, equal_nan=True)
    assert ("beyond the scorer's context window" in caplog.text) == bool(lost.any())


def test_no_prompts_and_prompts_beyond_the_window_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="received 0 prompts"):
        sweep_strengths(model, vectors_of(model), [], **SMALL)
    with pytest.raises(ValueError, match="the context window of the model, .*, holds 512"):
        sweep_strengths(model, vectors_of(model), ["word " * 5000], **SMALL)
