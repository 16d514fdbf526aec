"""Commands of the module laboratory: what they print and save, and wrong input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lens_affect.cli import app
from tests.test_checkpoint_pairs import changed, save
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
runner = CliRunner()


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


def test_delta_compares_with_another_fine_tune(model_folder, tuned_folder, tmp_path):
    save(changed("mistral", gate=-0.05), tmp_path / "other", make_tokenizer())
    command = ["delta", model_folder, tuned_folder, "--norms-only", "--against", str(tmp_path / "other")]
    done = runner.invoke(app, [*command, "--out", str(tmp_path / "d"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "most alike in gate, -1.000" in " ".join(done.stdout.split())
    assert "angles in degrees" in " ".join(done.stdout.split())
    assert {"against", "against.csv"} <= {path.name for path in (tmp_path / "d").iterdir()}
    rows = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert len(rows) == 21
    for row in rows:
        if row["module"] == "gate":
            assert row["cosine"] == pytest.approx(-1, abs=1e-4)
            assert row["output_angle"] == pytest.approx(0, abs=0.1)
        else:
            assert row["cosine"] is None


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


@pytest.fixture
def labelled(tmp_path):
    """A user's table with two labels."""
    rows = "".join(f"Word {i},{'joy' if i % 2 else 'anger'}\n" for i in range(40))
    (tmp_path / "mine.csv").write_text("text,label\n" + rows)
    return str(tmp_path / "mine.csv")


def test_labels_are_shuffled_for_a_control(model_folder, labelled, tmp_path):
    command = [
        "tune",
        model_folder,
        "--task",
        labelled,
        "--modules",
        "gate",
        "--steps",
        "1",
        "--seeds",
        "0",
        "--rank",
        "1",
    ]
    done = runner.invoke(app, [*command, "--shuffled-labels", "--out", str(tmp_path / "runs"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "shuffled labels" in done.stdout
    wrong = runner.invoke(app, ["tune", model_folder, "--task", "arithmetic", "--shuffled-labels", "--quiet"])
    assert wrong.exit_code == 2
    assert "one label per text" in wrong.stderr


def test_a_table_may_be_a_control(model_folder, tuned_folder, labelled):
    command = ["transfer", model_folder, tuned_folder, "--modules", "gate", "--quiet"]
    done = runner.invoke(app, [*command, "--task", labelled, "--control-task"])
    assert done.exit_code == 0, done.output
    assert "on mine (control): accuracy" in done.stdout
    wrong = runner.invoke(app, [*command, "--task", "topics", "--control-task"])
    assert wrong.exit_code == 2
    assert "a table of your own" in wrong.stderr


def test_transfer_scores_a_task(model_folder, tuned_folder, labelled):
    command = ["transfer", model_folder, tuned_folder, "--modules", "gate,all", "--task", labelled]
    done = runner.invoke(app, [*command, "--quiet"])
    assert done.exit_code == 0, done.output
    assert "share of the gain that a module alone brings to the untuned model" in done.stdout
    rows = {row["modules"]: row for row in json.loads(runner.invoke(app, [*command, "--json"]).stdout)}
    assert rows["none"]["task_score"] is None
    assert 0 <= rows["all"]["task_score"] <= 1
    assert "leave one out" in runner.invoke(app, [*command, "--layers", "1"]).stderr


@pytest.mark.parametrize("how", [["--scale", "0.5"], ["--target", "0.002"]])
def test_ablate_says_how_selective_it_is(model_folder, labelled, how):
    command = ["ablate", model_folder, "--modules", "up", "--task", labelled, *how]
    done = runner.invoke(app, [*command, "--quiet"])
    assert done.exit_code == 0, done.output
    assert "affect and 36 control examples" in done.stdout
    rows = {
        row.get("modules", row.get("arm")): row for row in json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    }
    assert {"selectivity", "affect_loss", "control_loss"} <= set(rows["up"])


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
    assert {"arms.csv", "contrasts.csv", "learning.html"} <= {path.name for path in (tmp_path / "runs").iterdir()}
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
