"""Rules within a budget: against all combinations, what a file takes, and bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.calibration import allocate as module
from jaxquant.calibration.allocate import Choice
from tests.cases import mostly_further, unpadded


def normal(shape, seed=0, scale=1.0):
    return scale * jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PARAMS = {
    "first": {"kernel": normal((48, 40), scale=3.0), "bias": jnp.zeros(40)},
    "second": {"kernel": normal((48, 40), seed=1)},  # by the programs of the first
    "third": {"kernel": normal((48, 40), seed=2, scale=0.1)},
}
CHOICES = [jq.LayerRule(".*kernel", k=k) for k in (2, 4, 8, 16)]
CHOICE_OF_ALL = [jq.LayerRule(".*", k=k) for k in (2, 3, 4, 8, 16)]


def quantized(params, rules, **guide):
    plan = jq.slq(params, rounds=(1,), rules=rules)
    return jq.quantize_round(plan, params, jq.init(plan, params), **guide)[:2]


def squared_error(new, old):
    return sum(
        float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (new, old)), strict=True)
    )


@pytest.mark.parametrize("budget", mostly_further([3_000, 4_000], 3_000))
def test_files_keep_the_budget_and_nearly_fill_it(budget, tmp_path):
    rules = jq.allocate(PARAMS, bytes=budget, choices=CHOICES)
    new, state = quantized(PARAMS, rules)
    path = tmp_path / "file"
    jq.save(path, jq.pack(new, state))
    assert 0.85 * budget < path.stat().st_size <= budget
    assert squared_error(new, PARAMS) == pytest.approx(rules.loss, rel=1e-4)


def test_bits_are_of_the_weights_that_are_quantized():
    rules = jq.allocate(PARAMS, bits=2.45, choices=CHOICES)
    assert 2.4 < rules.bits <= 2.45
    assert rules.size == sum(PARAMS[name]["kernel"].size for name in PARAMS)
    assert [rule.pattern for rule in rules] == [rf"{name}/kernel" for name in PARAMS]


def test_it_loses_less_than_uniform_bits_of_the_same_bytes():
    for k in (4, 8):
        uniform = [jq.LayerRule(".*kernel", k=k)]
        same = jq.allocate(PARAMS, bits=30, choices=uniform)
        better = jq.allocate(PARAMS, bits=same.bits, choices=CHOICES)
        assert better.loss < 0.8 * same.loss
        assert better.bytes <= same.bytes


EXTREMES = {"bits": 3.0, "choices": [CHOICES[0], CHOICES[-1]]}  # quicker to compile than all
ONES = jax.tree.map(jnp.ones_like, PARAMS)
HEAVY = ONES | {"third": {"kernel": 1e6 * ONES["third"]["kernel"]}}


def test_what_matters_more_gets_more():
    found = jq.allocate(PARAMS, **EXTREMES, sensitivity=HEAVY)
    plain = jq.allocate(PARAMS, **EXTREMES, sensitivity=ONES)
    assert found[2].k == 16 > plain[2].k
    told = jq.Calibration(sensitivity=HEAVY, moments={})
    assert list(jq.allocate(PARAMS, **EXTREMES, calibration=told)) == list(found)


@pytest.mark.further
def test_what_matters_more_by_guided_moments_gets_more_too():
    found = jq.allocate(PARAMS, **EXTREMES, sensitivity=HEAVY)
    moments = {f"{name}/kernel": jnp.eye(48) for name in ("first", "second")}
    guided = jq.Calibration(
        sensitivity=None, moments=moments | {"third/kernel": 1e6 * jnp.eye(48)}, guided=True
    )
    assert list(jq.allocate(PARAMS, **EXTREMES, calibration=guided)) == list(found)


def test_losses_with_guided_moments_are_what_a_calibrated_round_loses():
    kernel, mix = normal((4, 5, 6)), normal((30, 30), seed=1)
    moments = mix @ mix.T
    told = jq.Calibration(
        sensitivity=None, moments={"w": moments}, guided=True, input_axes=(("w", -2),)
    )
    rule = jq.LayerRule("w", k=3)
    rules = jq.allocate({"w": kernel}, bits=30, choices=[rule], calibration=told)
    new, _ = quantized({"w": kernel}, [rule], calibration=told)
    change = np.asarray(new["w"] - kernel, np.float64).reshape(4, 30)
    expected = np.sum(change * (change @ np.asarray(moments, np.float64)))
    assert rules.loss == pytest.approx(expected, rel=1e-3)
    near, _ = quantized({"w": kernel}, [rule])
    change = np.asarray(near["w"] - kernel, np.float64).reshape(4, 30)
    assert rules.loss < 0.8 * np.sum(change * (change @ np.asarray(moments, np.float64)))


WIDTH = 48
PAIR = {"apart": normal((WIDTH, WIDTH), seed=3), "together": normal((WIDTH, WIDTH), seed=4)}


def tokens_and_their_mean(params, x):  # [texts, tokens, WIDTH], [texts, ...]
    together = jnp.mean(x @ params["together"], axis=1)
    return x @ params["apart"] / x.shape[1], together


def texts(seed):  # whose tokens are much alike
    return normal((96, 1, WIDTH), seed=seed) + normal((96, 16, WIDTH), seed=seed + 1, scale=0.3)


def lost(params, batches):
    """Return the squared change of the answers of an example."""
    total = 0.0
    for batch in batches:
        new, old = (tokens_and_their_mean(x, batch) for x in (params, PAIR))
        total += squared_error(new, old)
    return total / sum(map(len, batches))


def test_with_the_function_one_loss_of_each_weight_is_what_its_answers_lose():
    batches = [texts(5), texts(7)[:32]]
    seen = jq.calibrate(tokens_and_their_mean, PAIR, batches, guided=True)
    choices = [jq.LayerRule(".*", k=k) for k in (2, 4, 8)]
    plain = jq.allocate(PAIR, bits=30, choices=choices, calibration=seen)
    told = jq.allocate(
        PAIR,
        bits=30,
        choices=choices,
        calibration=seen,
        function=tokens_and_their_mean,
        batches=iter(batches),
    )
    new, _ = quantized(PAIR, choices[1:2], calibration=seen)
    for name in PAIR:
        before, after = (
            {x.rule.k: x.loss for x in own.table if x.path == name} for own in (plain, told)
        )
        assert after[4] == pytest.approx(lost(PAIR | {name: new[name]}, batches), rel=1e-4)
        factor = after[4] / before[4]
        assert all(after[k] == pytest.approx(factor * before[k], rel=1e-4) for k in before)
        # Of tokens that are alike, and meet, what calibration takes to be apart adds up.
        assert 0.9 < factor < 1.1 if name == "apart" else 12 < factor < 16


@pytest.mark.further
def test_with_the_function_what_meets_gets_more_and_less_is_lost():
    batches = [texts(5), texts(7)]
    seen = jq.calibrate(tokens_and_their_mean, PAIR, batches, guided=True)
    ways = {}, {"function": tokens_and_their_mean, "batches": batches}
    plain, told = (
        jq.allocate(PAIR, bits=2.2, choices=CHOICE_OF_ALL, calibration=seen, **own) for own in ways
    )
    assert (told[0].k, told[1].k, plain[0].k, plain[1].k) == (2, 8, 4, 4)
    errors = [lost(quantized(PAIR, x, calibration=seen)[0], [texts(9)]) for x in (told, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_losses_of_predictions_are_twice_their_divergence():
    def logits(params, x):
        return x @ params["second"]["kernel"]

    batch = normal((32, 48), seed=6)
    choices = [jq.LayerRule("second/.*", k=k) for k in (4, 8)]
    rules = jq.allocate(
        PARAMS, bits=30, choices=choices, function=logits, batches=[batch], outputs="categorical"
    )
    new, _ = quantized(PARAMS, choices[:1])
    ours, theirs = (scipy.special.log_softmax(logits(x, batch), axis=1) for x in (new, PARAMS))
    expected = 2 * np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=1))
    assert max(choice.loss for choice in rules.table) == pytest.approx(expected, rel=1e-3)


def test_the_function_may_take_a_module_of_nnx():
    model = nnx.Linear(24, 16, rngs=nnx.Rngs(0))
    model.kernel[...] = normal((24, 16))
    batch = normal((4, 24), seed=1)
    options = {"bits": 30, "choices": [jq.LayerRule("kernel", k=4)], "batches": [batch]}
    found = jq.allocate(model, function=lambda model, x: model(x), **options)
    params = {"kernel": model.kernel[...]}
    same = jq.allocate(params, function=lambda params, x: x @ params["kernel"], **options)
    assert found.loss == pytest.approx(same.loss, rel=1e-4)


def test_other_budgets_come_from_the_same_table():
    found = jq.allocate(PARAMS, bits=2.1, choices=CHOICES)
    for budget in ({"bits": 3.5}, {"bytes": 3_000}):
        same = jq.allocate(PARAMS, choices=CHOICES, **budget)
        other = found.within(**budget)
        assert list(other) == list(same) != list(found)
        assert (other.loss, other.bytes) == (same.loss, same.bytes)
    with pytest.raises(ValueError, match="of bytes or bits"):
        found.within()
    with pytest.raises(ValueError, match=r"of bits 1\.\d+, got 0\.1"):
        found.within(bits=0.1)


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
    monkeypatch.setattr(module, "_KS", (8,))
    params = {name: PARAMS[name] for name in ("first", "second")}
    rules = jq.allocate(params, bits=3.3)
    assert [choice.path for choice in rules.table].count("first/kernel") == 2
    assert any(rule.scaled for rule in rules)
    assert not any("bias" in rule.pattern for rule in rules)


def test_it_prints_as_a_table():
    choices = [*CHOICES[:2], jq.LayerRule("first/kernel", bits=3)]
    lines = unpadded(str(jq.allocate(PARAMS, bits=3, choices=choices))).splitlines()
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
        ({"bits": float("nan")}, "expected a budget that is a finite number, got nan"),
        ({"bytes": float("inf")}, "expected a budget that is a finite number, got inf"),
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
        ({"bits": 3, "function": max}, "expected a function with batches"),
        ({"bits": 3, "batches": [jnp.ones(2)]}, "expected a function with batches"),
        ({"bits": 3, "outputs": "logits"}, "expected outputs to be one of"),
        (
            {
                "bits": 3,
                "function": lambda params, x: jnp.log(-jnp.abs(params["first"]["kernel"])),
                "batches": [jnp.ones(2)],
            },
            "first/kernel: expected finite answers if it is quantized, got nan",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jq.allocate(PARAMS, **{"choices": CHOICES} | arguments)
