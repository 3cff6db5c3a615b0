"""Tasks of your own: what a network learns besides the classes of images."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import own
from train import arrays, experiment, program, states, tasks
from train import config as configs
from train.config import Config, Data, Fit, Quantize
from train.networks import Answers


def make_config(**changes):
    return Config(
        **{
            "data": Data(name=own.sequences),
            "model": own.Tagger,
            "task": own.tag,
            "fit": Fit(epochs=(1,)),
            "quantize": Quantize(bits=2, rounds=(3,)),
            "retrain": Fit(distill_weight=0.5),
            "batch_size": 12,
            "eval_batch_size": 4,
            **changes,
        }
    )


def test_each_token_of_a_sequence_is_labelled():
    job = experiment.check(make_config())
    assert experiment.title(job) == (
        "tests.own:Tagger for tests.own:tag on tests.own:sequences, "
        "24 examples to train on and 6 to test with"
    )
    # As deep as a pass comes to them late.
    order = ["tokens/embedding", "neighbours/kernel", "answer/kernel"]
    assert [layer.path for layer in job.plan.selection.by_depth()] == order
    functions = states.functions(job)
    state = states.fresh(job, functions)
    params = state.train.params
    test = job.dataset.test
    result = functions.evaluate(params, {}, test)  # 6 of them, by four
    logits = own.Tagger().apply({"params": params}, test.images)
    logits = np.asarray(logits)
    right = logits.argmax(-1) == test.labels
    assert result["accuracy"] == pytest.approx(right.mean(), rel=1e-6)  # a share of each
    logged = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(logged, test.labels[..., None], -1).mean()
    assert result["loss"] == pytest.approx(expected, rel=1e-5)


def test_one_program_counts_shares_too():
    job = experiment.check(make_config(one_program=True, retrain=Fit(epochs=(1,))))
    functions = states.functions(job)
    state = states.fresh(job, functions)
    rows, rates = np.arange(24).reshape(2, 12), np.zeros(2, np.float32)
    key = np.zeros(2, np.uint32)
    run = program.build(job.config, job.plan, functions.parts)
    _, _, records = jax.eval_shape(
        run,
        *state,
        *program.put_data(functions.parts, job.dataset.train, job.dataset.test),
        np.zeros((1, 3, 2), np.uint32),
        np.float32(0),
        np.float32(0),
        program.make_steps([program.Epoch(0, True, True, rows, rates, key)]),
    )
    assert records.epoch_correct.dtype == records.retrained.correct.dtype == jnp.float32


def test_a_task_may_be_named_and_a_config_tells_its_name():
    config = configs.override_field(make_config(), "task=tests.own:tag")
    assert config.task == "tests.own:tag"
    assert experiment.check(config).task.imitate is tasks.soft_targets
    assert configs.difference(configs.to_json(make_config()), configs.to_json(config)) == ""
    without = configs.to_json(Config()).replace('  "task": "",\n', "")
    assert without != configs.to_json(Config())
    assert configs.difference(without, configs.to_json(Config())) == ""  # of earlier versions


def test_without_a_task_images_are_classified():
    config = Config(data=Data(name=own.arrays), model=own.Linen, batch_size=12)
    job = experiment.check(config)
    answers = Answers(jnp.array([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]), [])
    logged = jax.nn.log_softmax(answers.logits)
    labels = jnp.array([1, 2])
    np.testing.assert_array_equal(job.task.correct(answers, labels), [True, False])
    np.testing.assert_allclose(
        job.task.losses(answers, labels), -logged[np.arange(2), labels], rtol=1e-6
    )


def test_images_may_have_a_task_of_their_own_that_changes_the_loss_alone():
    config = Config(data=Data(name=own.arrays), model=own.Linen, task=own.smoothed, batch_size=12)
    job = experiment.check(config)
    answers = Answers(jnp.array([[0.0, 2.0, 1.0]]), [])
    assert float(job.task.losses(answers, jnp.array([1]))[0]) == 2.0
    assert job.task.answer_mirrored is not None
    dense = [layer.path for layer in job.plan.selection.by_depth()]
    assert dense == ["stem/kernel", "body/kernel", "answer/kernel"]


def test_the_network_of_a_task_may_be_of_no_library():
    job = experiment.check(
        make_config(task=own.pure, model="small_cnn", retrain=Fit(feature_weight=1.0))
    )
    assert [layer.path for layer in job.plan.selection.by_depth()] == ["z_first", "a_second"]


def with_(**changes):
    """Return `tag` with other parts."""
    return functools.partial(own.tag, **changes)


def replaced(**changes):
    """Return `tag` of which fields are replaced afterwards."""
    return lambda network, dataset: own.tag(network, dataset)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nowhere:task"}, "task: expected a module nowhere that can be imported"),
        ({"task": "tests.own:nothing"}, "task: expected nothing in tests.own, got no such name"),
        ({"task": "tag"}, "task: expected package.module:name, got 'tag'"),
        ({"task": 3}, "task: expected a valid string, a class or a function, got 3"),
        (
            {"task": ""},
            "task: expected a function of your own for the inputs and targets of",
        ),
        ({"task": lambda width: width}, "to need no arguments but network, dataset, got 'width'"),
        ({"task": lambda: 3}, "to return a train.tasks.Task, got builtins:int"),
        ({"task": lambda: 1 / 0}, "ZeroDivisionError: division by zero"),
        (
            {"task": with_(losses=lambda answers, targets: answers.logits.mean())},
            "expected losses to be floating point [2] for 2 examples, got float32[]",
        ),
        (
            {"task": with_(correct=lambda answers, targets: targets)},
            "expected correct to be floating point or bool [2] for 2 examples, got int32[2, 6]",
        ),
        (
            {"task": with_(correct=lambda answers, targets: targets[:, 0])},
            "expected correct to be floating point or bool [2] for 2 examples, got int32[2]",
        ),
        (
            {"task": with_(losses=lambda answers, targets: answers.logits @ targets)},
            "losses: TypeError: dot_general requires contracting dimensions to have the same shape",
        ),
        (
            {"task": with_(imitate=lambda ours, teacher, temperature: ours.nothing)},
            "imitate: AttributeError: 'Answers' object has no attribute 'nothing'",
        ),
        (
            {"task": replaced(answer=lambda variables, inputs, key: (inputs, {}))},
            "expected answer to give train.networks.Answers, got",
        ),
        (
            {"task": replaced(init=lambda key: {"weights": jnp.zeros(3)})},
            "expected variables in params and batch_stats, got weights",
        ),
        (
            {"task": with_(imitate=None)},
            "retrain.distill_weight: expected 0, tests.own:tag(imitate=None) gives no imit",
        ),
        (
            {"model": "small_cnn", "batch_size": 4, "data": Data(name=own.regression)},
            "names classes, of w",
        ),
        ({"model": own.Linen}, "'num_classes' without a def"),
        (
            {"retrain": Fit(distill_weight=1.0, mirrored_teacher=True)},
            "images that may be mirrored",
        ),
        ({"retrain": Fit(feature_weight=1.0)}, "tests.own:Tagger gives no features"),
    ],
)
def test_what_is_no_task_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        experiment.check(make_config(**changes))
    assert "\n" not in str(error.value).partition("contracting")[0]


def test_targets_that_are_no_classes_have_none():
    job = experiment.check(
        make_config(
            data=Data(name=own.regression),
            model=lambda: nn.Dense(8),
            task=with_(
                losses=lambda answers, targets: jnp.abs(answers.logits[:, 0] - targets),
                correct=lambda answers, targets: answers.logits[:, 0] < targets,
            ),
            batch_size=4,
        )
    )
    assert job.dataset.num_classes == 0
    assert "on tests.own:regression, 8 examples to train on and 2" in experiment.title(job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": None},
            "and maybe test_inputs, test_targets, got no inputs",
        ),
        ({"images": np.ones(3)}, "got 'images'"),
        ({"test_inputs": np.ones((2, 3))}, "got no test_targets"),
        ({"targets": np.ones(9)}, "targets: expected one for each of 10 inputs, got 9"),
        (
            {"inputs": np.ones((10, 0))},
            "inputs: expected integers or floating point [N, ...]",
        ),
        (
            {"inputs": np.full(10, "a")},
            "inputs: expected integers or floating point [N, ...]",
        ),
        (
            {"inputs": np.full(10, np.nan)},
            "expected finite numbers in float32, got 10 others",
        ),
        ({"targets": np.full(10, 2**40)}, "targets: expected integers in int32, got 10 others"),
        (
            {"test_inputs": np.ones((2, 4)), "test_targets": np.ones(2)},
            "test_inputs: expected float32[10, 3] as of inputs, got float32[2, 4]",
        ),
        (
            {"test_inputs": np.ones((2, 3)), "test_targets": np.ones(3)},
            "test_targets: expected one for each of 2 test_inputs, got 3",
        ),
        ({"inputs": np.ones((4, 3)), "targets": np.ones(4)}, "or five examples or more to take"),
    ],
)
def test_inputs_and_targets_that_do_not_fit_are_named(changes, message):
    given = {name: x for name, x in {**own.regression(), **changes}.items() if x is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        arrays.load(lambda: given)


def test_every_fifth_of_inputs_and_targets_is_kept_for_testing():
    made = arrays.load(own.regression)
    assert made.labels.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and made.test_labels.tolist() == [4, 9]
    assert made.images.dtype == np.float32 and made.images.shape == (8, 3)
    given = arrays.load(
        lambda: {**own.regression(), "test_inputs": np.ones((1, 3)), "test_targets": [2.0]}
    )
    assert len(given.images) == 10 and given.test_labels.tolist() == [2]


def test_no_mirror_image_without_an_answer_to_it():
    config = Config(
        data=Data(name=lambda: {**own.arrays(), "flip": True}),
        model=own.Linen,
        task=lambda network, dataset: own.smoothed(network, dataset)._replace(answer_mirrored=None),
        batch_size=12,
    )
    experiment.check(config)
    mirrored = Fit(feature_weight=0.0, distill_weight=1.0, mirrored_teacher=True)
    with pytest.raises(ValueError, match=r"retrain.mirrored_teacher: expected false, .* gives no "):
        experiment.check(dataclasses.replace(config, retrain=mirrored))
