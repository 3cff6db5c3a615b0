"""Rules within a budget: against all combinations, what a file takes, and bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.calibration import allocate as module
from jaxquant.calibration.allocate import Choice


def normal(shape, seed=0, scale=1.0):
    return scale * jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PARAMS = {
    "first": {"kernel": normal((48, 40), scale=3.0), "bias": jnp.zeros(40)},
    "second": {"kernel": normal((40, 64), seed=1)},
    "third": {"kernel": normal((3, 3, 16, 24), seed=2, scale=0.1)},
}
CHOICES = [jq.LayerRule(".*kernel", k=k) for k in (2, 3, 4, 8, 16)]


def quantized(params, rules):
    plan = jq.slq(params, rounds=(1,), rules=rules)
    return jq.quantize_round(plan, params, jq.init(plan, params))[:2]


def squared_error(new, old):
    return sum(
        float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (new, old)), strict=True)
    )


def test_files_keep_the_budget_and_nearly_fill_it(tmp_path):
    for budget in (3_000, 4_000):
        rules = jq.allocate(PARAMS, bytes=budget, choices=CHOICES)
        new, state = quantized(PARAMS, rules)
        path = tmp_path / f"{budget}.jq"
        jq.save(path, jq.pack(new, state))
        assert 0.85 * budget < path.stat().st_size <= budget
        assert squared_error(new, PARAMS) == pytest.approx(rules.loss, rel=1e-4)


def test_bits_are_of_the_weights_that_are_quantized():
    rules = jq.allocate(PARAMS, bits=2.5, choices=CHOICES)
    assert 2.3 < rules.bits <= 2.5
    assert rules.size == sum(PARAMS[name]["kernel"].size for name in PARAMS)
    assert [rule.pattern for rule in rules] == [rf"{name}/kernel" for name in PARAMS]


def test_it_loses_less_than_uniform_bits_of_the_same_bytes():
    for k in (4, 8):
        uniform = [jq.LayerRule(".*kernel", k=k)]
        same = jq.allocate(PARAMS, bits=30, choices=uniform)
        better = jq.allocate(PARAMS, bits=same.bits, choices=CHOICES)
        assert better.loss < 0.8 * same.loss
        assert better.bytes <= same.bytes


def test_what_matters_more_gets_more():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    heavy = ones | {"third": {"kernel": 1e6 * ones["third"]["kernel"]}}
    found = jq.allocate(PARAMS, bits=2.5, choices=CHOICES, sensitivity=heavy)
    plain = jq.allocate(PARAMS, bits=2.5, choices=CHOICES, sensitivity=ones)
    assert found[2].k == 16 > plain[2].k
    told = jq.Calibration(sensitivity=heavy, moments={})
    assert list(jq.allocate(PARAMS, bits=2.5, choices=CHOICES, calibration=told)) == list(found)
    moments = {f"{name}/kernel": jnp.eye(n) for name, n in (("first", 48), ("second", 40))}
    guided = jq.Calibration(
        sensitivity=None, moments=moments | {"third/kernel": 1e6 * jnp.eye(144)}, guided=True
    )
    assert list(jq.allocate(PARAMS, bits=2.5, choices=CHOICES, calibration=guided)) == list(found)


def test_losses_with_guided_moments_are_what_others_cannot_make_up_for():
    kernel, mix = normal((4, 5, 6)), normal((30, 30), seed=1)
    moments = mix @ mix.T
    told = jq.Calibration(
        sensitivity=None, moments={"w": moments}, guided=True, input_axes=(("w", -2),)
    )
    rule = jq.LayerRule("w", k=3)
    rules = jq.allocate({"w": kernel}, bits=30, choices=[rule], calibration=told)
    new, _ = quantized({"w": kernel}, [rule])
    damped = np.asarray(moments, np.float64)
    damped += 0.01 * np.mean(np.diag(damped)) * np.eye(30)
    order, energies = list(np.argsort(-np.diag(moments), kind="stable")), np.zeros(30)
    for place, i in enumerate(order):  # the variance of an input, given those after it
        after = order[place + 1 :]
        known = np.linalg.solve(damped[np.ix_(after, after)], damped[after, i])
        energies[i] = damped[i, i] - damped[i, after] @ known
    squares = np.sum((new["w"] - kernel).reshape(4, 30) ** 2, axis=0)
    assert rules.loss == pytest.approx(float(squares @ energies), rel=1e-3)


def test_a_choice_is_for_the_weights_that_it_matches():
    choices = [
        jq.LayerRule("first/.*", k=4),
        jq.LayerRule("first/.*", k=16, block=(-1, 1), scaled=True),
        jq.LayerRule("second/.*", k=3),
    ]
    rules = jq.allocate(PARAMS, bits=30, choices=choices)
    assert [(rule.pattern, rule.k, rule.scaled) for rule in rules] == [
        ("first/kernel", 16, True),
        ("second/kernel", 3, False),
    ]
    assert [choice.path for choice in rules.table].count("first/kernel") == 2


def test_without_choices_what_is_selected_by_default_is_tried(monkeypatch):
    monkeypatch.setattr(module, "_KS", (2, 8))
    params = {name: PARAMS[name] for name in ("first", "second")}
    rules = jq.allocate(params, bits=3.3)
    assert [choice.path for choice in rules.table].count("first/kernel") == 4
    assert any(rule.scaled for rule in rules)
    assert not any("bias" in rule.pattern for rule in rules)


def test_it_prints_as_a_table():
    choices = [jq.LayerRule("first/kernel", bits=3), *CHOICES[:2]]
    lines = str(jq.allocate(PARAMS, bits=3, choices=choices)).splitlines()
    assert lines[2].startswith("| first/kernel | 5 | ")
    assert "bits a weight" in lines[-1]


choice = st.tuples(st.integers(0, 1000), st.integers(1, 400))


@given(
    st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(0.0, 1.0),
)
def test_of_all_combinations_it_finds_one_of_least_loss(table, share):
    rule = jq.LayerRule(".*", k=2)
    of_weights = [[Choice("w", rule, float(loss), size) for loss, size in own] for own in table]
    sizes = [[choice.bytes for choice in own] for own in of_weights]
    least, most = (sum(map(function, sizes)) for function in (min, max))
    budget = least + int(share * (most - least))
    within = [
        sum(choice.loss for choice in combination)
        for combination in itertools.product(*of_weights)
        if sum(choice.bytes for choice in combination) <= budget
    ]
    found = module._best(of_weights, budget)
    assert sum(choice.bytes for choice in found) <= budget
    assert sum(choice.loss for choice in found) == min(within)


def test_budgets_of_many_units_are_kept_and_nearly_as_good():
    rng = np.random.default_rng(0)
    rule = jq.LayerRule(".*", k=2)
    of_weights = [
        [
            Choice("w", rule, float(loss) * 4.0**-b, int(b * 10**6 + rng.integers(1000)))
            for b in range(1, 9)
        ]
        for loss in rng.lognormal(0, 3, 50)
    ]
    budget = 50 * 4 * 10**6
    found = module._best(of_weights, budget)
    assert sum(choice.bytes for choice in found) <= budget
    uniform = sum(own[2].loss for own in of_weights)
    assert sum(choice.loss for choice in found) < 0.2 * uniform


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a budget of bytes or bits"),
        ({"bits": 3, "bytes": 3}, "expected a budget of bytes or bits"),
        (
            {"bits": 0.5},
            r"expected a budget that the smallest choices keep, of bits 1\.\d+, got 0\.5",
        ),
        ({"bytes": 100}, "of bytes .*, got 100"),
        ({"bits": 3, "choices": [jq.LayerRule(".*")]}, "choices: expected k or bits"),
        ({"bits": 3, "choices": [jq.LayerRule("nothing", k=2)]}, "'nothing'"),
        ({"bits": 3, "choices": []}, "choices: expected at least one"),
        ({"bits": 3, "choices": [jq.LayerRule(".*bias", k=2)]}, "some that can quantize a weight"),
        (
            {"bits": 3, "calibration": jq.Calibration(sensitivity=None, moments={})},
            "expected sensitivities or guided moments",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jq.allocate(PARAMS, **{"choices": CHOICES} | arguments)
