"""Commands that push a model: what they print and save, and wrong input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lens_affect.cli import app
from lens_affect.steering_study import SteeringStudy
from lens_affect.sweeps import load_sweep

ROOT = Path(__file__).resolve().parent.parent
runner = CliRunner()


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
    kept = runner.invoke(app, [*command, "--run", finished, "--bisect", "happy", "--json"])
    assert kept.exit_code == 0, kept.output
    assert {row["strength"] for row in json.loads(kept.stdout)} == {0.2, 0.8}
    assert list(load_sweep(finished).steering) == ["neutral"]
    page = (Path(finished) / "report.html").read_text()
    assert "What happens when you push" in page
    assert "Strengths tried on the way to the boundaries of happy" in page
    unknown = runner.invoke(
        app, ["regimes", model_folder, "--judge", "my aunt", "--out", str(tmp_path / "x"), "--quiet"]
    )
    assert unknown.exit_code == 2
