"""The analyses run, use only public names, and their notebook copies are up to date and small."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import jupytext
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens_affect
import lens_affect.models
from lens_affect.models import load_model
from tests.affect_data import LABELS, write_goemotions
from tests.planted_runs import campaign
from tests.tiny import make_hf_model, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "analyses").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def narrow(real_model):
    """A random model as deep as SmolLM2, with its tokenizer, and of width 32: what the scripts print about it means nothing, but they run."""
    real = real_model("smollm2-135m-instruct")
    narrow = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = LlamaConfig.from_dict(real.original_model.config.to_dict() | narrow | {"initializer_range": 0.2})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    return load_model(model, tokenizer=real.tokenizer)


@pytest.fixture
def narrow_loading(narrow, monkeypatch):
    replace_loading(monkeypatch, narrow)


def replace_loading(monkeypatch, model):
    monkeypatch.setattr(lens_affect.models, "load_model", lambda name, **options: model)
    monkeypatch.setattr(lens_affect, "load_model", lambda name, **options: model, raising=False)
    monkeypatch.setenv("LENS_AFFECT_QUICK", "1")


@pytest.mark.weights
def test_the_layer_sweep_runs_in_quick_mode(narrow_loading, capsys):
    """What it prints about real weights is in the README's example, which is run too."""
    names = runpy.run_path(str(ROOT / "analyses" / "01_layer_sweep.py"))
    printed = capsys.readouterr().out
    assert "nearest_mean is best at layer" in printed
    assert "above the bar by" in printed
    assert names["curve"].n_emotions == 2
    assert len(names["stories"].stimuli) == names["stories"].n_wanted == 4
    assert len(names["both"][1].layer_rows) == 30


@pytest.mark.weights
def test_shape_and_methods_run_in_quick_mode(narrow_loading, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path))
    monkeypatch.delenv("LENS_AFFECT_DATA", raising=False)
    names = runpy.run_path(str(ROOT / "analyses" / "02_shape_and_methods.py"))
    printed = capsys.readouterr().out
    assert "shape: " in printed
    assert "plain mean: " in printed
    assert "third-party texts were not read" in printed
    assert set(names["card"].table["id"]) == {"P2", "P3", "P4", "P5", "P6", "P7"}


@pytest.mark.weights
def test_the_gate_runs_in_quick_mode(narrow_loading, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path))
    names = runpy.run_path(str(ROOT / "analyses" / "03_gate.py"))
    printed = capsys.readouterr().out
    assert "affect: denoise by logit difference, 12 pairs in 12 groups" in printed
    assert "affect: denoise by projection at layer 24, 3 pairs" in printed
    assert "positions last: the gate is special: cannot be decided" in printed
    assert list(names["tables"]["smollm2-135m-instruct", "all"]["site"]) == ["gate", "up", "attn_out"]
    assert "afraid" in names["view"].html


def test_steering_reads_the_committed_results(monkeypatch, capsys):
    monkeypatch.setenv("LENS_AFFECT_QUICK", "1")
    monkeypatch.delenv("LENS_AFFECT_RUNS", raising=False)
    names = runpy.run_path(str(ROOT / "analyses" / "04_steering.py"))
    printed = capsys.readouterr().out
    studies = names["studies"]
    assert {"smollm2-135m-instruct", "gemma-3-270m"} < set(studies)
    assert {"P8", "P9", "P10", "P12"} <= set(names["card"].table["id"])
    for name in ("smollm2-135m-instruct", "gemma-3-270m"):
        assert studies[name].verification.n_random == 5
        assert len(studies[name].boundaries) >= 1
        assert studies[name].inside is not None
        assert f"{name}: surgical" in printed or f"{name}: repetitive" in printed or f"{name}: explosive" in printed
    for study in studies.values():
        cells = study.dose.table[study.dose.table["kind"].isin(["steered", "random"])]
        change = cells.groupby(["kind", "strength"])["change"].mean().unstack("kind")
        off = (change["random"] / change["steered"] - 1).abs()
        assert float(off.max()) < 0.1, "controls move the stream as far as what they stand beside"
        assert study.transfer is not None


def test_labelled_outputs_are_measured_by_their_text_and_those_that_are_gone_keep_what_was_stored():
    names = runpy.run_path(str(ROOT / "analyses" / "tune_regimes.py"))
    table = lens_affect.labelled_texts.load_labelled_texts().table.astype(object)
    kept = table.where(table.notna(), None).to_dict("records")
    origins = [o for o in dict.fromkeys(row["origin"] for row in kept) if o != "written"]
    doses = {o: names["load_dose"](o) for o in origins}
    rows = [{k: v for k, v in row.items() if k not in names["MEASURED"]} | {"row": -1} for row in kept]
    names["measure_outputs"](rows, doses, kept)
    for o in origins:
        own = [(row, before) for row, before in zip(rows, kept, strict=True) if row["origin"] == o]
        there = [row["text"] in doses[o].texts for row, _ in own]
        assert 0.8 < sum(there) / len(own) <= 1
        for (row, before), found in zip(own, there, strict=True):
            assert "row" not in row
            if not found:
                assert all(row[name] == before[name] for name in names["MEASURED"])
            i = doses[o].texts.index(row["text"]) if found else -1
            assert not found or row["n_tokens"] == doses[o].table["n_tokens"].iloc[i]
    strange = {"text": "never written", "origin": origins[0]}
    with pytest.raises(ValueError, match="received 'never written', which neither a sweep of"):
        names["measure_outputs"]([strange], doses, kept)


def test_sweeps_are_made_once_and_again_where_they_were_asked_for_otherwise(model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path))
    few = lens_affect.load_stimuli("passages").select(
        emotions=["happy", "afraid", "loving"], groups=["train", "garden", "school", "kitchen"]
    )
    prompts = {"neutral": lens_affect.load_scenarios("neutral").select(rows=[0, 1, 2])}
    prompts["scenarios"] = lens_affect.load_scenarios().select(emotions=["loving"])  # the word list knows enough of it
    monkeypatch.setattr(lens_affect, "load_stimuli", lambda name: few, raising=False)
    monkeypatch.setattr(lens_affect, "load_scenarios", lambda name="scenarios": prompts[name], raising=False)
    words = lens_affect.load_judge("lexicon")
    monkeypatch.setattr(lens_affect, "load_judge", lambda name="embedded": words, raising=False)
    names = runpy.run_path(str(ROOT / "analyses" / "steer_models.py"))
    subject = names["Subject"]("model", model_folder, 1)
    names["neutral"].__globals__.update(TOKENS=6, EMOTIONS=("happy",))
    for block in ("neutral", "scenarios", "spread", "inside"):
        names[block](subject)
    folder = tmp_path / "steering" / "model"
    asked = ("dose", "scenario_dose", "spread_dose", "halves-dose")
    doses = {name: lens_affect.DoseResponse.load(folder / name) for name in asked}
    kinds = {name: set(dose.table["kind"]) for name, dose in doses.items()}
    assert {"steered", "random"} <= kinds["dose"] == kinds["halves-dose"]
    assert {"steered", "random", "other_emotion"} <= kinds["scenario_dose"]
    assert kinds["spread_dose"] - kinds["dose"] == {"random_in_spread"}
    assert lens_affect.Verification.load(folder / "spread_verification").n_random == 5
    for name, dose in doses.items():
        assert len(lens_affect.Judgement.load(folder / name.replace("dose", "judgement")).top) == len(dose.texts)
    topics = [set(json.loads((folder / f"vectors-{half}.json").read_text())["topics"]) for half in (0, 1)]
    assert topics[0] | topics[1] == set(few.groups)
    assert not topics[0] & topics[1]

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    names["neutral"](subject)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    names["neutral"].__globals__.update(TOKENS=5)
    names["neutral"](subject)
    again = {p.relative_to(folder).parts[0] for p, made in written.items() if p.stat().st_mtime_ns != made}
    assert again == {"dose", "judgement", "regimes"}
    names["publish"](tmp_path / "results")
    study = lens_affect.SteeringStudy.load(tmp_path / "results" / "steering" / "model")
    assert study.verification.n_random == 5
    assert study.inside is not None
    assert not list((tmp_path / "results").rglob("*.lock"))
    assert not list((tmp_path / "results").rglob("vectors*"))


@pytest.mark.weights
def test_foreign_tokens_run_in_quick_mode(narrow_loading, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path))
    names = runpy.run_path(str(ROOT / "analyses" / "04_foreign_tokens.py"))
    assert "random directions" in capsys.readouterr().out
    assert list(names["tables"]) == ["smollm2-135m-instruct"]


def test_modules_reads_finished_runs_and_says_when_the_gate_is_special(monkeypatch, capsys, tmp_path):
    shares = {"gate": (0.55, 100), "up": (0.4, 100), "down": (0.4, 100), "attention": (0.35, 180), "all": (0.6, 400)}
    planted = {f"goemotions-{m}-rank4": runs for m, runs in campaign(shares, n=600).items()}
    fitted = {"attention": (0.35, 100), "random": (0.3, 100)}
    planted |= {f"goemotions-{m}-size-of-gate-rank4": runs for m, runs in campaign(fitted, n=600).items()}
    for kind, runs in planted.items():
        for one in runs:
            one.save(tmp_path / "tuning" / f"{kind}-seed{one.seed}" / "tuned")
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path))
    monkeypatch.setenv("LENS_AFFECT_QUICK", "1")
    names = runpy.run_path(str(ROOT / "analyses" / "05_modules.py"))
    printed = capsys.readouterr().out
    assert "21 finished runs" in printed
    assert "equal rank, rank 4: the gate is better than both" in printed
    assert "equal size, rank 4: the gate is better than both" in printed
    assert list(names["tables"]) == ["equal rank, rank 4", "equal size, rank 4"]


def test_the_arms_are_tuned_one_after_the_other_and_read_by_the_analysis(
    few_neutral_texts, monkeypatch, capsys, tmp_path
):
    """The whole chain on a tiny model: first seed of every arm, a second start that trains nothing, and the page that reads them."""
    write_goemotions(tmp_path / "data")
    monkeypatch.setattr("lens_affect.tasks.load_judge", LetterCounts)
    monkeypatch.setenv("LENS_AFFECT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path))
    monkeypatch.setenv("LENS_AFFECT_QUICK", "1")
    names = runpy.run_path(str(ROOT / "analyses" / "tune_arms.py"))
    run, jobs, task_of = names["run"], [job for job in names["campaign"]() if job.seed == 0], names["task_of"]
    run.__globals__.update(
        STEPS=2, CHECK_EVERY=2, N_TEST=8, N_PARTS=8, DAMAGE=0.01, task_of=lambda name: shorter(task_of(name))
    )
    asked = names["options"]  # the tiny tokenizer makes some prompts longer than the 32 tokens of the real runs
    run.__globals__.update(options=lambda job, model: asked(job, model) | {"max_tokens": 128, "n_validation": 4})
    monkeypatch.setattr("lens_affect.task_metrics.N_RESAMPLES", 50)
    monkeypatch.setattr("lens_affect.damage.MOST_TRIALS", 3)
    monkeypatch.setattr(lens_affect, "choose_rate", lambda *a, **k: 0.01, raising=False)
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    for job in jobs:
        run(model, job)
    folders = {path.name for path in (tmp_path / "tuning").glob("goemotions*-seed0")}
    assert folders == {job.name for job in jobs if job.name.startswith("goemotions")}
    assert all(
        (tmp_path / "tuning" / name / "adapter" / "adapter_config.json").is_file()
        for name in folders
        if "full" not in name
    )
    for folder, missing in (("study", []), ("study_writing", ["bands"])):
        study = lens_affect.ModuleStudy.load(tmp_path / "tuning" / folder)
        without = [name for name in study.__dataclass_fields__ if getattr(study, name) is None]
        assert without == ["writing", "writing_transfer", "writing_revert", *missing]
        assert len(list((tmp_path / "tuning" / folder / "seeds").iterdir())) == len(names["KINDS"]) + 3
    weights = {
        job.block: lens_affect.Tuned.load(tmp_path / "tuning" / job.name / "tuned").arm.n_parameters
        for job in jobs
        if job.modules == "gate"
    }
    assert weights["full"] == 3 * 32 * 48
    assert weights["equal"] == 4 * weights["rank1"] == weights["topics"] == weights["writing"]
    assert "G1" in capsys.readouterr().out

    monkeypatch.setattr(lens_affect, "tune_module", None, raising=False)  # a second start would fail if it trained
    for job in jobs:
        run(model, job)
    published = tmp_path / "results" / "tuning"
    names["publish"](published)
    files = [path for path in published.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert not [path for path in files if path.suffix == ".lock"]
    assert not any(run.trained for run in lens_affect.load_runs(published).values())
    for kept in ("rates", "base", "delta", "study/transfer", "study/bands", "goemotions-gate-rank4-seed0/controls"):
        made = {path.name for path in (tmp_path / "tuning" / kept).iterdir() if path.suffix != ".lock"}
        assert made
        assert {path.name for path in (published / kept).iterdir()} == made
    runpy.run_path(str(ROOT / "analyses" / "05_modules.py"))
    printed = capsys.readouterr().out
    assert "35 finished runs" in printed
    assert "G4, reverted, " in printed
    assert "next-token loss on texts without emotion" in printed
    monkeypatch.setenv("LENS_AFFECT_RUNS", str(tmp_path / "results"))
    runpy.run_path(str(ROOT / "analyses" / "05_damage.py"))
    printed = capsys.readouterr().out
    assert "against the control all tuned on topics, seed 0" in printed
    assert "shuffled labels\n" in printed
    assert "output_angle" in printed
    assert "gate minus attention" in printed
    assert lens_affect.AblationTable.load(published / "study" / "bands").control_name == "topics"
    runpy.run_path(str(ROOT / "analyses" / "05_rank_one.py"))
    printed = capsys.readouterr().out
    assert "8 finished runs at rank 1" in printed
    assert "sums and differences" in printed
    runpy.run_path(str(ROOT / "analyses" / "05_writing.py"))
    printed = capsys.readouterr().out
    assert "7 finished runs of writing" in printed
    assert "G4, reverted, one sentence that expresses one of 27 emotions, judged: cannot be decided" in printed


def shorter(task):
    """The same task with few texts to be scored on, and short ones to be written."""
    brief = {"max_new_tokens": 6} if hasattr(task, "max_new_tokens") else {}
    return dataclasses.replace(task, splits=task.splits | {"test": task.splits["test"][:12]}, **brief)


class LetterCounts:
    """A judge that calls a text by the emotion whose letters it holds most of."""

    name, title, labels, multi_label = "letters", "letters", tuple(LABELS), False

    def score(self, texts):
        counts = [[sum(text.lower().count(x) for x in label) / len(label) for label in LABELS] for text in texts]
        return torch.tensor(counts).softmax(-1)

    def auc(self, emotion):
        return float("nan")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_analyses_use_only_public_names(script):
    source = script.read_text()
    assert set(re.findall(r"\bla\.(\w+)", source)) <= set(lens_affect.__all__)
    assert not re.findall(r"from lens_affect\b|import lens_affect\.", source)


@pytest.mark.parametrize("notebook", sorted((ROOT / "analyses").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_executed_copies_of_their_scripts(notebook):
    assert notebook.stat().st_size < 1e6
    cells = json.loads(notebook.read_text())["cells"]
    script = jupytext.read(notebook.with_suffix(".py"))
    assert ["".join(c["source"]) for c in cells] == [c["source"] for c in script["cells"]]
    counts = [c["execution_count"] for c in cells if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr" or o["output_type"] == "error"]
    printed = "".join("".join(o.get("text", "")) for o in outputs)
    assert "Traceback" not in printed  # nor a path of the machine that it ran on
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/", printed)


@pytest.mark.parametrize("numbers", sorted((ROOT / "figures").glob("*.json")), ids=lambda p: p.name)
def test_every_figure_has_its_numbers_and_its_picture(numbers):
    for one in json.loads(numbers.read_text()):
        assert one["provenance"]["model"]
        assert one["title"]
        assert all(len(row) == len(one["table"]["columns"]) for row in one["table"]["data"])
        assert one["table"]["data"]
    assert numbers.with_suffix(".html").is_file()
    assert numbers.with_suffix(".png").is_file()
