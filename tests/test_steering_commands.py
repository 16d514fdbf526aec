"""Commands that push a model: what they print and save, and wrong input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lens_affect.cli import app
from lens_affect.console import saved_vectors
from lens_affect.steering_commands import COMMAND, _is_finished, _note, slug
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


def test_a_command_that_was_stopped_goes_on_and_a_finished_one_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_affect.steering_study.saved_parts", lambda folder: ("dose",))
    said = {"model": "x", "seed": 0}
    for finished in (False, True):
        _note(tmp_path, said, finished=finished)
        assert _is_finished(tmp_path, said, resume=True, own=True) == finished
        with pytest.raises(FileExistsError, match="print or finish it with --resume"):
            _is_finished(tmp_path, said, resume=False, own=True)
        with pytest.raises(
            FileExistsError, match="that was asked for with model 'x' and not 'y'; give the same command"
        ):
            _is_finished(tmp_path, said | {"model": "y"}, resume=True, own=True)


def test_models_with_a_point_in_their_names_have_folders_of_their_own():
    names = ["meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B", "Llama-3.2-3B", "/models/a b/x.gguf", "../x"]
    assert [slug(name) for name in names] == [
        "meta-llama-Llama-3.2-3B",
        "meta-llama-Llama-3.1-8B",
        "Llama-3.2-3B",
        "models-a-b-x.gguf",
        "x",
    ]
    assert slug("..") == "model"


def test_steer_and_regimes_take_the_best_layer_of_the_run_that_gives_the_vectors(model_folder, finished, monkeypatch):
    seen = []

    def sweep(*given, layers, **options):
        seen.append(layers)
        raise ValueError("enough")

    best = saved_vectors(finished)[2]
    assert best is not None
    monkeypatch.setattr("lens_affect.doses.sweep_strengths", sweep)
    command = ["steer", model_folder, "Hello", "--emotion", "happy", "--vectors", finished, "--quiet"]
    runner.invoke(app, command)
    runner.invoke(app, [*command, "--layers", "0,1"])
    assert seen == [[best], [0, 1]]


def test_regimes_tries_languages_and_reads_inside(model_folder, finished, tmp_path, monkeypatch):
    """What the study itself makes of it is tested there."""
    seen, fitted = [], []

    def study(model, vectors, judge, **asked):
        seen.append((vectors, asked))
        raise ValueError("enough")

    def fit(model, layer, report, *, topics=None):
        fitted.append(topics)
        vectors = saved_vectors(finished)[0]
        return replace(vectors, provenance=vectors.provenance.updated(stimuli_hash=str(topics))), ""

    monkeypatch.setattr("lens_affect.steering_study.study_steering", study)
    monkeypatch.setattr("lens_affect.steering_commands.fit_on_passages", fit)
    command = ["regimes", model_folder, "--judge", "lexicon", "--quiet", "--out", str(tmp_path / "study")]
    runner.invoke(app, [*command, "--languages", "--reading", "halves"])
    vectors, asked = seen[0]
    assert asked["languages"]
    assert {name: texts.name for name, texts in asked["transfer"].items()} == {
        "English": "passages",
        "Spanish": "passages_es",
        "Chinese": "passages_zh",
    }
    assert len(fitted) == 2
    assert not set(fitted[0]) & set(fitted[1])
    assert len(set(fitted[0]) | set(fitted[1])) == 12
    assert (vectors.provenance.stimuli_hash, asked["reading"].provenance.stimuli_hash) == (
        str(fitted[0]),
        str(fitted[1]),
    )
    runner.invoke(app, [*command, "--reading", finished])
    assert seen[1][1]["reading"].source == saved_vectors(finished)[0].source
    assert seen[1][1]["transfer"] is None
    assert seen[1][1]["folder"] == tmp_path / "study"
    both = runner.invoke(app, [*command, "--reading", "halves", "--vectors", finished])
    assert both.exit_code == 2
    assert "received --reading halves with --vectors or --run" in both.stderr
    same = runner.invoke(app, [*command, "--reading", finished, "--vectors", finished])
    assert same.exit_code == 2
    assert "whose vectors are from the texts of those that steer" in same.stderr
    assert len(seen) == 2


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
    slash = command.index(finished)  # a / at the end makes no other command
    as_json = [*command[:slash], f"{finished}/", *command[slash + 1 :], "--out", str(tmp_path / "study")]
    told = runner.invoke(app, [*as_json, "--resume", "--json"])
    assert {row["strength"] for row in json.loads(told.stdout)} == {0.2, 0.8}
    both = runner.invoke(app, [*command, "--run", finished, "--out", str(tmp_path / "study")])
    assert both.exit_code == 2
    assert "received --run and --out" in both.stderr
    other = runner.invoke(app, [*command, "--out", str(tmp_path / "study"), "--resume", "--seed", "3"])
    assert other.exit_code == 2
    assert "that was asked for with seed 0 and not 3; give the same command" in other.stderr
    (tmp_path / "study" / COMMAND).unlink()
    unknown = runner.invoke(app, [*command, "--out", str(tmp_path / "study"), "--resume"])
    assert unknown.exit_code == 2
    assert "that does not say what was asked for" in unknown.stderr
    kept = runner.invoke(app, [*command, "--run", finished, "--bisect", "happy", "--json"])
    assert kept.exit_code == 0, kept.output
    assert {row["strength"] for row in json.loads(kept.stdout)} == {0.2, 0.8}
    assert list(load_sweep(finished).steering) == ["neutral"]
    twice = runner.invoke(app, [*command, "--run", finished, "--bisect", "happy"])
    assert twice.exit_code == 2
    assert "holds a study; remove it, or print" in twice.stderr.replace("\n", " ")
    page = (Path(finished) / "report.html").read_text()
    assert "What happens when you push" in page
    assert "Strengths tried on the way to the boundaries of happy" in page
    assert next(iter(load_sweep(finished).steering.values())).dose.kinds == ("steered", "random", "other_emotion")
    unknown = runner.invoke(
        app, ["regimes", model_folder, "--judge", "my aunt", "--out", str(tmp_path / "x"), "--quiet"]
    )
    assert unknown.exit_code == 2
