"""Sweeps on a tiny model: steps, resume after a kill, refusals."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lens_affect import activations, models, sweeps
from lens_affect.adapter import model_info
from lens_affect.cli import app
from lens_affect.nulls import p_text
from lens_affect.report import write_report
from lens_affect.stories import MAXIMUM_OVERLAP
from lens_affect.sweeps import SweepSpec, _claim, load_sweep, make_spec, quick, run_sweep
from tests.tiny import make_hf_model, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "emotions": ("happy", "sad", "angry"),
    "scores": ("nearest_mean", "mean_cosine_neutral"),
    "n_permutations": 20,
    "n_stories": 3,
    "story_tokens": 24,
    "minimum_story_tokens": 4,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    make_hf_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return run_sweep(make_spec(model=model_folder, **SMALL), out)


def test_a_sweep_gives_a_curve_per_method_and_score_and_saves_them(finished):
    assert set(finished.curves) == {(m, s) for m in ("comprehension", "generation") for s in SMALL["scores"]}
    table = pd.read_csv(finished.folder / "curves.csv")
    assert len(table) == 2 * 2 * (3 + 1)
    pd.testing.assert_frame_equal(table.astype({"row": str}), finished.to_frame(), check_dtype=False)
    again = load_sweep(finished.folder)
    pd.testing.assert_frame_equal(again.to_frame(), finished.to_frame())
    assert again.stories is not None
    assert again.stories.counts == finished.stories.counts


def test_a_spec_that_was_being_written_when_a_process_died_does_not_stand_in_the_way(tmp_path):
    (tmp_path / ".spec.json.123.tmp").write_text("{")
    _claim(tmp_path, make_spec(model="mine"), resume=True)
    assert (tmp_path / "spec.json").is_file()
    with pytest.raises(FileExistsError, match="go on with --resume"):
        _claim(tmp_path, make_spec(model="mine"), resume=False)


def test_the_headline_carries_interval_null_and_bar(finished):
    sentence = finished.headline("comprehension")
    for part in ("3 emotions", "95 % interval", "shuffled labels", "bag-of-words bar"):
        assert part in sentence
    curve = finished.curves["comprehension", "nearest_mean"]
    p = p_text(float(curve.p_family[curve.row(curve.best_layer)]), curve.n_permutations)
    assert p in sentence
    smallest = p_text(1 / (curve.n_permutations + 1), curve.n_permutations)
    assert smallest.endswith(f"the smallest that {curve.n_permutations} permutations allow")
    assert ("do not clear" in sentence) != ("vectors clear" in sentence)


def test_the_headline_tells_where_stories_are_missing(finished):
    assert "could be had" not in finished.headline("generation")
    stories = finished.stories
    sad = [i for i, emotion in enumerate(stories.stimuli.emotions) if emotion == "sad"]
    kept = stories.stimuli.select(rows=[i for i in range(len(stories.stimuli)) if i != sad[0]])
    fewer = replace(finished, stories=replace(stories, stimuli=kept))
    assert fewer.headline("generation").endswith("; not every story could be had: 'sad' has the fewest, 2 of 3.")
    assert fewer.headline("comprehension") == finished.headline("comprehension")


def test_finished_steps_are_not_repeated(finished):
    def refuse(name, dtype):
        raise AssertionError("the model was loaded again")

    stamps = {p: p.stat().st_mtime_ns for p in (finished.folder / "steps").rglob("manifest.json")}
    again = run_sweep(finished.spec, finished.folder, resume=True, load=refuse)
    assert stamps == {p: p.stat().st_mtime_ns for p in (finished.folder / "steps").rglob("manifest.json")}
    pd.testing.assert_frame_equal(again.to_frame(), finished.to_frame())


def test_a_damaged_step_is_done_again(model_folder, tmp_path):
    spec = make_spec(model=model_folder, methods=("comprehension",), **SMALL)
    first = run_sweep(spec, tmp_path / "run")
    before = first.to_frame()
    arrays = tmp_path / "run" / "steps" / "curve-comprehension-nearest_mean" / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-4] + b"oops")
    again = run_sweep(spec, tmp_path / "run", resume=True)
    pd.testing.assert_frame_equal(again.to_frame(), before)


def test_a_killed_run_resumes_to_the_same_tables(model_folder, finished, tmp_path):
    out = tmp_path / "killed"
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from lens_affect.sweeps import make_spec, run_sweep\n"
        f"run_sweep(make_spec(model={model_folder!r}, **{SMALL!r}), {str(out)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "steps" / "vectors-comprehension" / "manifest.json").is_file():
        assert process.poll() is None or (out / "curves.csv").is_file()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {p.parent.name: p.stat().st_mtime_ns for p in (out / "steps").glob("*/manifest.json")}
    resumed = run_sweep(finished.spec, out, resume=True)
    for name, stamp in done.items():
        assert (out / "steps" / name / "manifest.json").stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(resumed.to_frame(), finished.to_frame())


def leftovers(folder):
    """Temporary files and folders."""
    return [p for p in folder.rglob(".*") if p.name.endswith(".tmp")]


def test_control_c_during_a_sweep_says_how_to_go_on_and_resuming_gives_the_same_tables(
    model_folder, finished, tmp_path
):
    out = tmp_path / "interrupted"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs inherit "ignore"
        "import torch; torch.set_num_threads(1)\n"
        "from lens_affect.console import reporting_errors\n"
        "from lens_affect.sweeps import make_spec, run_sweep\n"
        "with reporting_errors():\n"
        f"    run_sweep(make_spec(model={model_folder!r}, **{SMALL!r}), {str(out)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "steps" / "activations-comprehension" / "manifest.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted; finished steps are kept: run the same command with --resume" in said
    assert "Traceback" not in said
    assert leftovers(out) == []
    assert not (out / "curves.csv").is_file()
    resumed = run_sweep(finished.spec, out, resume=True)
    pd.testing.assert_frame_equal(resumed.to_frame(), finished.to_frame())


def test_control_c_in_every_step_of_a_sweep_costs_nothing_but_that_step(model_folder, finished, tmp_path):
    """Every step is interrupted once: in its middle where it reports progress, else when it has just been saved."""
    interrupted = []

    @contextlib.contextmanager
    def report(name):
        if name in interrupted:
            yield lambda done, total: None
            return
        interrupted.append(name)

        def stop(done, total):
            raise KeyboardInterrupt

        yield stop
        raise KeyboardInterrupt

    out = tmp_path / "run"
    for _ in range(40):
        done = {p: p.stat().st_mtime_ns for p in out.glob("steps/*/manifest.json")}
        try:
            resumed = run_sweep(finished.spec, out, resume=out.exists(), report=report)
            break
        except KeyboardInterrupt:
            assert leftovers(out) == []
            assert all(p.stat().st_mtime_ns == stamp for p, stamp in done.items())
    steps = {p.parent.name.replace("-", " ") for p in out.glob("steps/*/manifest.json")}
    assert steps | {"load the model"} == set(interrupted)
    pd.testing.assert_frame_equal(resumed.to_frame(), finished.to_frame())


@pytest.fixture
def asked(monkeypatch):
    """The specs that `lens-affect sweep` would run."""
    specs = []

    def keep(spec, out, **options):
        specs.append(spec)
        raise RuntimeError("kept")

    monkeypatch.setattr(sweeps, "run_sweep", keep)
    return specs


def test_the_demo_asks_for_six_stories_of_64_tokens_and_200_permutations(asked):
    """What `make demo` calls, up to the run itself."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(row for row in makefile.splitlines() if "$(BIN)/lens-affect sweep" in row)
    arguments = shlex.split(line[line.index("sweep") :])
    done = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert "kept" in done.stderr, done.output
    (spec,) = asked
    assert spec.model == "smollm2-135m-instruct"
    assert spec.methods == ("comprehension", "generation")
    assert len(spec.emotions) == 20
    assert spec.n_stories >= 6
    assert spec.story_tokens >= spec.minimum_story_tokens >= 64
    assert spec.n_permutations == 200
    assert MAXIMUM_OVERLAP <= 0.5


def sizes(spec):
    return spec.n_stories, spec.minimum_story_tokens, spec.story_tokens, spec.story_rounds, spec.n_permutations


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", (12, 64, 256, 4, 1000)),
        ("--quick", (6, 64, 80, 3, 200)),
        ("--quick --permutations 1000 --stories 12", (12, 64, 80, 3, 1000)),
        ("--quick --story-tokens 256", (6, 64, 256, 3, 200)),
        ("--story-tokens 64", (12, 64, 64, 4, 1000)),
        ("--story-tokens 40", (12, 40, 40, 4, 1000)),
    ],
)
def test_a_size_that_is_named_wins_and_short_stories_may_be_asked_for(asked, options, expected):
    CliRunner().invoke(app, ["sweep", "gpt2", "--quiet", *options.split()])
    assert [sizes(spec) for spec in asked] == [expected]


def test_the_quick_size_replaces_any_other_and_can_be_met():
    small = quick(SweepSpec(model="m", n_stories=20, minimum_story_tokens=100, n_permutations=5000))
    assert sizes(small) == (6, 80, 80, 3, 200)


def test_a_misspelt_model_leaves_the_folder_free_for_the_right_one(tmp_path):
    for wrong in ("smollm3", str(tmp_path / "missing.gguf")):
        with pytest.raises(ValueError, match="received"):
            run_sweep(make_spec(model=wrong, **SMALL), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_finished_run_is_taken_up_where_its_model_is_gone(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    spec = finished.spec.model_copy(update={"model": str(tmp_path / "moved")})
    (tmp_path / "run" / "spec.json").write_text(json.dumps({"hash": spec.hash, "spec": spec.model_dump()}))
    pd.testing.assert_frame_equal(run_sweep(spec, tmp_path / "run", resume=True).to_frame(), finished.to_frame())


class _Stopped(Exception):
    pass


def stop_before(step):
    """A report that ends the run when a step is about to begin."""

    def report(name):
        if name == step:
            raise _Stopped
        return contextlib.nullcontext(lambda done, total: None)

    return report


@pytest.mark.parametrize(
    ("least_cosine", "left_in", "gain_on_resuming"),
    [(1.1, "float32", 3.0), (0.9, "bfloat16", 0.5)],
)
def test_a_resumed_run_goes_on_in_the_precision_that_was_settled(
    model_folder, tmp_path, monkeypatch, least_cosine, left_in, gain_on_resuming
):
    """bfloat16 pays; the first reading keeps it or finds it too coarse. The stories come after that reading."""
    monkeypatch.setattr(activations, "MINIMUM_COSINE", least_cosine)
    monkeypatch.setattr(models, "_bfloat16_gain", lambda *args: 3.0)
    light = {"scores": ("mean_cosine_neutral",), "n_permutations": 0, "emotions": ("happy", "sad"), "n_stories": 2}
    spec = make_spec(model=model_folder, **SMALL | light)
    whole = run_sweep(spec, tmp_path / "whole")
    wrote_in = []
    real = sweeps.write_stories

    def watched(model, *args, **options):
        wrote_in.append((model_info(model).provenance.dtype, model_info(model).precision_is_automatic))
        return real(model, *args, **options)

    monkeypatch.setattr(sweeps, "write_stories", watched)
    with pytest.raises(_Stopped):
        run_sweep(spec, tmp_path / "run", report=stop_before("stories"))
    assert wrote_in == []
    monkeypatch.setattr(models, "_bfloat16_gain", lambda *args: gain_on_resuming)
    resumed = run_sweep(spec, tmp_path / "run", resume=True)
    assert wrote_in == [(left_in, left_in == "bfloat16")]  # and a later reading may still find bfloat16 too coarse
    assert resumed.stories.provenance.dtype == whole.stories.provenance.dtype == left_in
    assert resumed.stimuli["generation"] == whole.stimuli["generation"]
    pd.testing.assert_frame_equal(resumed.to_frame(), whole.to_frame())


def test_a_precision_counts_only_once_its_step_is_saved(model_folder, tmp_path, monkeypatch):
    """A run that dies between the two starts again as if the step had not been done."""
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 1.1)
    monkeypatch.setattr(models, "_bfloat16_gain", lambda *args: 3.0)
    light = {"scores": ("mean_cosine_neutral",), "n_permutations": 0, "emotions": ("happy", "sad")}
    spec = make_spec(model=model_folder, methods=("comprehension",), **SMALL | light)
    whole = run_sweep(spec, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "precision.json").read_text())["activations-comprehension"] == "float32"
    shutil.rmtree(tmp_path / "run" / "steps")
    asked = []

    def load(name, dtype):
        asked.append(dtype)
        return sweeps._load_default(name, dtype)

    again = run_sweep(spec, tmp_path / "run", resume=True, load=load)
    assert asked == ["auto"]
    pd.testing.assert_frame_equal(again.to_frame(), whole.to_frame())


def test_a_folder_with_another_run_is_refused_and_the_difference_named(finished):
    other = finished.spec.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match=r"holds another run \(seed is 0 there and 1 here\).*--out"):
        run_sweep(other, finished.folder, resume=True)


def test_a_finished_folder_without_resume_is_refused(finished):
    with pytest.raises(FileExistsError, match="--resume"):
        run_sweep(finished.spec, finished.folder)


def test_a_folder_with_other_files_is_refused(model_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        run_sweep(make_spec(model=model_folder, **SMALL), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"emotions": ("happy", "awe")}, "received 'awe'; allowed labels are"),
        ({"scores": ("accuracy",)}, "received scores \\['accuracy'\\]; allowed are"),
        ({"colour": "red"}, "colour.*allowed keys are model, methods"),
        ({"n_stories": 0}, "n_stories = 0"),
        ({"pooling": "maximum"}, "received pooling='maximum'; allowed are 'mean', .* and 'after:N'"),
        ({"pooling": "after:x"}, "received pooling='after:x'"),
        (
            {"story_tokens": 32},
            "received minimum_story_tokens=64 with story_tokens=32; .* allowed is a minimum of up to 32",
        ),
        ({"stimuli": "no_such.csv"}, "allowed are 'passages', 'passages_es', 'passages_zh' or a .csv"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        make_spec(model="never-loaded", **settings)


def test_an_unfinished_folder_cannot_be_loaded(tmp_path, model_folder):
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        load_sweep(tmp_path)


def test_the_spec_hash_depends_on_every_field():
    spec = SweepSpec(model="m")
    assert spec.hash == SweepSpec(model="m").hash
    changes = {
        "model": "n",
        "methods": ("generation",),
        "emotions": ("sad",),
        "stimuli": "x.csv",
        "stimuli_hash": "1",
        "scores": ("dprime",),
    }
    changes |= {"pooling": "last", "n_stories": 5, "story_tokens": 99, "minimum_story_tokens": 9, "story_rounds": 1}
    changes |= {"n_permutations": 7, "seed": 3, "dtype": "float32", "compare_methods": True}
    assert set(changes) == set(SweepSpec.model_fields)
    for key, value in changes.items():
        assert spec.model_copy(update={key: value}).hash != spec.hash
    assert quick(spec).n_permutations == 200


def test_a_comparison_is_a_step_of_its_own_and_needs_both_methods(model_folder, tmp_path):
    small = SMALL | {"scores": ("nearest_mean",), "compare_methods": True}
    run = run_sweep(make_spec(model=model_folder, **small), tmp_path / "run")
    assert run.comparison is not None
    assert run.comparison.n_topics == 3
    assert (run.folder / "steps" / "comparison" / "manifest.json").is_file()
    assert str(load_sweep(run.folder).comparison) == str(run.comparison)
    assert set(run.directions) == {"comprehension", "generation"}
    assert run.directions["comprehension"].null == "directions"
    with pytest.raises(
        ValueError, match=r"received compare_methods=True with methods \['comprehension'\]; both are needed"
    ):
        make_spec(model=model_folder, **small | {"methods": ("comprehension",)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"emotions": ("happy", "sad"), "n_stories": 4},
            "received n_stories=4 with 2 labels.*only 16 relabellings; 20 are",
        ),
        ({"emotions": ("happy",)}, "telling apart needs at least two"),
    ],
)
def test_texts_that_allow_no_null_are_refused_before_any_is_written(settings, message):
    with pytest.raises(ValueError, match=message):
        make_spec(model="nowhere", **settings)
    assert make_spec(model="nowhere", emotions=("happy", "sad"), n_stories=4, n_permutations=0).n_stories == 4


def own_file(path, labels, word="text"):
    rows = "".join(f"{word} {i} {e} of topic {t},{e},{t}\n" for i in range(2) for e in labels for t in "abcdef")
    path.write_text("text,emotion,group\n" + rows)
    return path


def test_a_users_own_labels_are_what_is_read_and_written(tmp_path, caplog):
    mine = own_file(tmp_path / "mine.csv", ("awe", "schadenfreude", "neutral"))
    spec = make_spec(model="nowhere", stimuli=str(mine))
    assert spec.emotions == ("awe", "schadenfreude")  # stories too are about these
    assert spec.scores == ("nearest_mean", "mean_cosine_neutral")
    assert "without valence: score='valence' needs pleasant and unpleasant emotions" in caplog.text
    assert "without dprime: received score='dprime' for folds of which 0 hold 'awe' beside two texts" in caplog.text
    plain = own_file(tmp_path / "plain.csv", ("happy", "sad"))
    read = make_spec(model="nowhere", stimuli=str(plain), methods=("comprehension",))
    assert read.scores == (
        "nearest_mean",
        "dprime",
        "valence",
    )  # two texts of each per topic; of the stories there is one
    assert make_spec(model="nowhere", stimuli=str(plain)).scores == ("nearest_mean", "valence")
    with pytest.raises(ValueError, match="needs texts labelled 'neutral'"):
        make_spec(model="nowhere", stimuli=str(plain), scores=("mean_cosine_neutral",))
    chosen = make_spec(model="nowhere", stimuli=str(mine), emotions=("schadenfreude", "awe"))
    assert chosen.emotions == ("schadenfreude", "awe")


def test_a_sweep_of_two_emotions_runs_through_with_what_the_default_scores_allow(model_folder, tmp_path, caplog):
    light = {"n_permutations": 20, "n_stories": 5, "story_tokens": 24, "minimum_story_tokens": 4}
    spec = make_spec(model=model_folder, emotions=("happy", "sad"), **light)
    assert spec.scores == ("nearest_mean", "valence", "mean_cosine_neutral")
    assert "without dprime: " in caplog.text
    run = run_sweep(spec, tmp_path / "run")
    assert np.isfinite(run.to_frame().drop(columns=["method", "score", "row"]).to_numpy(float)).all()
    assert write_report(run).is_file()
    with pytest.raises(ValueError, match="received score='dprime' for folds"):
        make_spec(model=model_folder, emotions=("happy", "sad"), scores=("dprime",), **light)


def test_texts_that_were_edited_since_are_another_run_and_a_finished_run_keeps_its_own(model_folder, tmp_path):
    mine = own_file(tmp_path / "mine.csv", ("awe", "dread", "neutral"))
    settings = SMALL | {"methods": ("comprehension",), "stimuli": str(mine), "n_permutations": 0}
    settings = {k: v for k, v in settings.items() if k not in ("scores", "emotions")}
    run = run_sweep(make_spec(model=model_folder, **settings), tmp_path / "run")
    own_file(mine, ("awe", "dread", "neutral"), word="edited")
    with pytest.raises(ValueError, match="stimuli_hash is .* there and .* here"):
        run_sweep(make_spec(model=model_folder, **settings), run.folder, resume=True)
    mine.unlink()
    again = load_sweep(run.folder)
    assert again.stimuli["comprehension"].texts == run.stimuli["comprehension"].texts
    assert again.stimuli["comprehension"].texts[0].startswith("text 0")


def test_a_users_file_with_one_topic_is_refused_before_it_is_read(tmp_path):
    rows = "".join(f"text {i} {e},{e},kitchen\n" for i in range(3) for e in ("happy", "sad"))
    (tmp_path / "mine.csv").write_text("text,emotion,group\n" + rows)
    with pytest.raises(ValueError, match="which allows no curve: received 1 groups"):
        make_spec(model="nowhere", stimuli=str(tmp_path / "mine.csv"), methods=("comprehension",))
