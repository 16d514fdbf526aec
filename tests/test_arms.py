"""What must be true: sizes agree within 1 % or are refused, ranks are what was asked, a draw is repeatable."""

import pytest

from lens_affect.arms import TOLERANCE, plan_arm
from lens_affect.sizes import count_parameters, module_shapes

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
}
QWEN7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
}


def cost(config, arm):
    shapes = module_shapes(config)
    return sum(rank * sum(shapes[place.split(".")[-1]]) for place, rank in arm.ranks.items())


def test_published_sizes_of_the_issue():
    assert (
        plan_arm(SMOLLM2, "gate", rank=20).n_parameters
        == plan_arm(SMOLLM2, "attention", rank=11).n_parameters
        == 42240 * 30
    )
    assert {plan_arm(SMOLLM2, m, method="full").n_parameters for m in ("gate", "up", "down", "attention")} == {
        884736 * 30
    }
    share = plan_arm(SMOLLM2, "gate", rank=4).n_parameters / plan_arm(SMOLLM2, "all", rank=4).n_parameters
    assert share == pytest.approx(0.208, abs=5e-4)
    assert plan_arm(QWEN7B, "all", rank=16).n_parameters == 40370176
    assert plan_arm(QWEN7B, "gate", rank=16).n_parameters == 10092544


@pytest.mark.parametrize(
    "modules", ["q", "k", "o", "gate", "down", "attention", "mlp", "all", "random", ("gate", "down")]
)
@pytest.mark.parametrize("config", [SMOLLM2, QWEN7B], ids=["smollm2", "qwen7b"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_equal_size_is_met_within_one_percent(config, modules, rank):
    wanted = plan_arm(config, "gate", rank=rank).n_parameters
    options = {"rank": rank} if modules == "random" else {}
    arm = plan_arm(config, modules, n_parameters=wanted, **options)
    assert arm.n_parameters == cost(config, arm)
    assert abs(arm.n_parameters / wanted - 1) <= TOLERANCE
    assert min(arm.ranks.values()) >= 1
    if modules != "random":
        assert max(arm.ranks.values()) - min(arm.ranks.values()) <= 1


def test_attention_at_the_gates_size_is_exact_in_smollm2_and_says_so():
    arm = plan_arm(SMOLLM2, "attention", n_parameters=253_440)
    assert arm.n_parameters == 253_440
    assert len(arm.ranks) == 120
    assert "rank 2 to 3: 253,440 weights in 120 maps" in str(arm)
    assert "(+0.38% of 253,440)" in str(plan_arm(SMOLLM2, "all", n_parameters=253_440))


def test_equal_rank_counts_as_the_config_says():
    for modules in ("k", "attention", "mlp", "all"):
        assert plan_arm(SMOLLM2, modules, rank=3).n_parameters == count_parameters(SMOLLM2, modules, rank=3)
    assert set(plan_arm(SMOLLM2, "gate", rank=2, layers=[3, 7]).ranks) == {"layers.3.gate", "layers.7.gate"}


def test_random_maps_are_repeatable_differ_by_seed_and_are_as_many_weights_as_the_gate():
    first, again, other = (plan_arm(SMOLLM2, "random", rank=4, seed=s) for s in (0, 0, 1))
    assert first == again
    assert set(first.ranks) != set(other.ranks)
    assert abs(first.n_parameters / plan_arm(SMOLLM2, "gate", rank=4).n_parameters - 1) <= TOLERANCE
    assert len({place.split(".")[-1] for place in first.ranks}) >= 5
    whole = plan_arm(SMOLLM2, "random", method="full")
    assert abs(whole.n_parameters / (884736 * 30) - 1) <= TOLERANCE


def test_full_tuning_of_a_size_takes_whole_maps_of_some_layers():
    arm = plan_arm(SMOLLM2, "gate", method="full", n_parameters=884736 * 10)
    assert len(arm.ranks) == 10
    assert set(arm.ranks.values()) == {0}


def test_none_trains_nothing():
    arm = plan_arm(SMOLLM2, "none", rank=4)
    assert arm.n_parameters == 0
    assert arm.ranks == {}
    assert arm.difference == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": "gate"}, "allowed is one of the two"),
        ({"modules": "gate", "rank": 2, "n_parameters": 5}, "allowed is one of the two"),
        ({"modules": "gate", "rank": 0}, "received rank=0"),
        ({"modules": "gates", "rank": 1}, "received module 'gates'"),
        ({"modules": "gate", "n_parameters": 0}, "received n_parameters=0"),
        ({"modules": "gate", "n_parameters": 2000}, "ask for a larger size"),
        ({"modules": "gate", "method": "full", "n_parameters": 900}, "ask for a larger size"),
        ({"modules": "random"}, "received no rank for random maps"),
        ({"modules": "gate", "rank": 1, "method": "prefix"}, "received method 'prefix'"),
        ({"modules": "gate", "rank": 1, "layers": [30]}, "received layers"),
    ],
)
def test_wrong_input_is_refused_with_the_next_step(options, message):
    with pytest.raises(ValueError, match=message):
        plan_arm(SMOLLM2, **options)
