"""What the commands share: progress goes to stderr, one message per error, numbers and tables."""

import signal
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lens_affect.cli import app
from lens_affect.console import parse_numbers, print_table, reporting_errors, saved_vectors
from lens_affect.sweeps import load_sweep

ROOT = Path(__file__).resolve().parent.parent
runner = CliRunner()


def test_progress_is_shown_and_goes_to_stderr(model_folder, tmp_path):
    command = ["sweep", model_folder, "--method", "comprehension", "--emotions", "happy,sad", "--score", "nearest_mean"]
    done = runner.invoke(app, [*command, "--permutations", "20", "--out", str(tmp_path / "run")])
    assert "activations comprehension: done in" in done.stderr
    assert "activations comprehension" not in done.stdout


def test_wrong_input_ends_with_code_2_and_a_failed_run_with_1(capsys, monkeypatch):
    for error, code in (
        (ValueError("received x"), 2),
        (FileExistsError("there"), 2),
        (RuntimeError("broke"), 1),
        (OSError("disk"), 1),
    ):
        with pytest.raises(SystemExit) as ended, reporting_errors():
            raise error
        assert ended.value.code == code
        assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"
    monkeypatch.setenv("LENS_AFFECT_DEBUG", "1")
    with pytest.raises(ValueError, match="received x"), reporting_errors():
        raise ValueError("received x")


def test_an_interrupted_run_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as ended, reporting_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "--resume" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a run in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_a_library_turned_into_another_error_is_an_interrupt(interruptible, capsys):
    def hit():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("half an import") from None

    with pytest.raises(SystemExit) as ended, reporting_errors():
        hit()
    assert ended.value.code == 130
    assert "half an import" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(SystemExit) as ended, reporting_errors():  # the next command is told of its own error
        raise ValueError("wrong")
    assert ended.value.code == 2


def test_numbers_are_read_from_commas():
    assert parse_numbers("0.2, 0.4,", float, "--strength") == [0.2, 0.4]
    assert parse_numbers("", int, "--layers") == []
    with pytest.raises(ValueError, match="received --layers 'a,b'; allowed are comma-separated numbers"):
        parse_numbers("a,b", int, "--layers")


def test_a_table_in_a_pipe_keeps_all_its_columns(capsys):
    print_table(pd.DataFrame({f"column {i}": [i] for i in range(12)} | {"told": [True]}), "A title")
    shown = capsys.readouterr().out
    assert "column 11" in shown
    assert "yes" in shown


def test_vectors_are_taken_from_a_folder_or_from_a_sweep(finished, tmp_path):
    of_sweep, told, best = saved_vectors(finished)
    assert best == load_sweep(finished).curves["comprehension", "nearest_mean"].best_layer
    assert finished in told
    of_sweep.save(tmp_path / "vectors")
    saved, _, none = saved_vectors(str(tmp_path / "vectors"))
    assert saved.emotions == of_sweep.emotions
    assert none is None
