"""Wrong arguments: each ends in an error that says what is wrong, and nothing has changed by then."""

import functools
import math
import re
from contextlib import contextmanager

import numpy as np
import pytest
import reference as ref
import torch
from torch import nn

import flatlora


def everything(model):
    """All that an error could have changed."""
    x, _ = ref.batch()
    parameters = [(name, p.requires_grad, ref.bytes_of(p)) for name, p in model.named_parameters()]
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    output = ref.bytes_of(model(x))  # would show a noise that was left behind
    return parameters, modules, output


@contextmanager
def raises_and_changes_nothing(model, exception, words):
    before = everything(model)
    with pytest.raises(exception, match=re.escape(words)) as error:
        yield
    assert error.type is exception  # not one derived from it
    assert everything(model) == before


def call(model, name, changed):
    """The function of that name, with arguments that are right but for the changed ones."""
    state = flatlora.lora_state_dict(ref.adapted_model())
    loss = {"loss_fn": ref.loss_fn, "batches": [ref.batch()]}
    step = {**loss, "optimizer": ref.sgd(model)}
    right = {
        "inject_lora": {},
        "flat_lora_step": {**step, "sigma": 0.1, "seed": 0},
        "sam_step": {**step, "rho": 0.1},
        "sharpness": {**loss, "sigma": 0.1, "samples": 1, "seed": 0},
        "perturbed": {"sigma": 0.1, "seed": 0},
        "load_lora_state_dict": {"state": state},
        "merge_lora": {},
    }
    arguments = right[name] | changed
    result = getattr(flatlora, name)(model, **arguments)
    if name == "perturbed":
        result.__enter__()


NOT_INJECTED = [
    ({"r": 0}, "r must be >= 1, alpha > 0, 0 <= dropout < 1; got r=0, alpha=16, dropout=0.0"),
    ({"alpha": 0}, "got r=8, alpha=0"),
    ({"alpha": math.inf}, "got r=8, alpha=inf"),
    ({"dropout": 1}, "dropout=1"),
    ({"targets": "0.bias"}, "targets: '0.bias' fits none of the 2 that can be: 0, 2"),
    ({"targets": ["0", "nothing"]}, "nothing' fits none of the 2 that can be: 0, 2"),
    ({"targets": []}, "targets must name one layer or more, got []"),
    ({"modules_to_save": ["nothing"]}, "modules_to_save: "),
    ({"modules_to_save": ["0", "2"]}, "fits none of the 0"),  # so no layer is left to adapt
]


@pytest.mark.parametrize(("changed", "words"), NOT_INJECTED, ids=str)
def test_what_cannot_be_injected(changed, words):
    model = ref.plain_model()
    with raises_and_changes_nothing(model, ValueError, words):
        flatlora.inject_lora(model, **changed)


WRONG = [
    ("inject_lora", {"modules_to_save": ["0"]}, "modules_to_save: a module with adapters inside"),
    ("flat_lora_step", {"sigma": -0.1}, "sigma must be a finite number >= 0, got -0.1"),
    ("flat_lora_step", {"max_grad_norm": math.nan}, "max_grad_norm must be above 0, got nan"),
    ("flat_lora_step", {"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
    ("sam_step", {"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
    ("sam_step", {"rho": -1}, "rho must be a finite number >= 0, got -1"),
    ("sam_step", {"rho": math.inf}, "rho must be a finite number >= 0, got inf"),
    ("sharpness", {"sigma": -0.1}, "sigma must be a finite number >= 0, got -0.1"),
    ("perturbed", {"sigma": -0.1}, "sigma must be a finite number >= 0, got -0.1"),
    ("perturbed", {"sigma": math.nan}, "sigma must be a finite number >= 0, got nan"),
    ("perturbed", {"sigma": math.inf}, "sigma must be a finite number >= 0, got inf"),
    ("perturbed", {"seed": {1}}, "seed must be a finite number, a text, or a tuple of these, got {1}"),
    ("perturbed", {"seed": None}, "seed must be a finite number, a text, or a tuple of these, got None"),
    ("perturbed", {"seed": (0, math.nan)}, "seed must be a finite number, a text, or a tuple of these, got nan"),
    ("load_lora_state_dict", {"state": {}}, "0.lora_A is missing, not in the model or of another shape"),
]


@pytest.mark.parametrize(("name", "changed", "words"), WRONG, ids=str)
def test_a_wrong_argument_changes_nothing(name, changed, words):
    model = ref.adapted_model()
    with raises_and_changes_nothing(model, ValueError, words):
        call(model, name, changed)


@pytest.mark.parametrize("name", ["5.lora_A", "2.lora_A"])  # not in the model, of another shape
def test_a_state_that_does_not_fit_changes_nothing(name):
    model = ref.adapted_model()
    state = flatlora.lora_state_dict(model)
    state["0.lora_A"] += 1
    state[name] = torch.ones(3)
    with raises_and_changes_nothing(model, ValueError, f"{name} is missing, not in the model or of another shape"):
        flatlora.load_lora_state_dict(model, state)


@pytest.mark.parametrize(("step", "total_steps"), [(11, 10), (-1, 10), (0, 0)])
def test_a_step_outside_of_the_schedule(step, total_steps):
    with pytest.raises(ValueError, match=f"step must be from 0 to total_steps, got {step} of {total_steps}"):
        flatlora.sigma_at(step, total_steps, 0.1)


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="schedule must be cosine or constant, got 'linear'"):
        flatlora.sigma_at(0, 10, 0.1, "linear")


@pytest.mark.parametrize("use", [flatlora.merge_lora, flatlora.lora_parameters, flatlora.lora_state_dict])
def test_a_model_without_adapters(use):
    model = ref.plain_model()
    with raises_and_changes_nothing(model, ValueError, "the model has no LoRALinear layer: call inject_lora first"):
        use(model)


@pytest.mark.parametrize("name", ["flat_lora_step", "sam_step", "sharpness", "perturbed", "merge_lora"])
def test_nothing_of_the_kind_inside_a_perturbation(name):
    model = ref.adapted_model()
    words = "the model is perturbed already"
    with flatlora.perturbed(model, 0.1, 1), raises_and_changes_nothing(model, RuntimeError, words):
        call(model, name, {})


def test_a_loss_that_nothing_trains():
    model = ref.adapted_model()

    def constant(model, batch):
        return torch.ones(())

    with raises_and_changes_nothing(model, RuntimeError, "does not require grad"):
        call(model, "flat_lora_step", {"loss_fn": constant})


# ---- Layers that do more than W x + b ----


def forward_hook(layer):
    layer.register_forward_hook(lambda module, x, y: 2 * y)


def forward_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, x: x)


def backward_hook(layer):
    layer.register_full_backward_hook(lambda module, x, y: None)


def backward_pre_hook(layer):
    layer.register_full_backward_pre_hook(lambda module, y: None)


def forward_of_the_instance(layer):  # as accelerate does
    layer.forward = functools.update_wrapper(functools.partial(layer.forward), layer.forward)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x / 2)


def forward_of_the_class(layer):
    layer.__class__ = Halved


def parametrization(layer):
    nn.utils.parametrizations.weight_norm(layer)


OWN_WAYS = [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook]
OWN_WAYS += [forward_of_the_instance, forward_of_the_class, parametrization]


@pytest.mark.parametrize("change", OWN_WAYS)
def test_a_layer_with_a_way_of_its_own_is_named(change):
    model = ref.plain_model()
    change(model[2])
    with raises_and_changes_nothing(model, ValueError, "2 has hooks, a parametrization or its own forward"):
        flatlora.inject_lora(model, r=2)


def test_its_neighbours_may_be_adapted():
    model = ref.plain_model()
    forward_hook(model[2])
    flatlora.inject_lora(model, r=2, targets=["0"])
    assert list(flatlora.lora_layers(model)) == ["0"]


def test_a_subclass_that_computes_alike_is_adapted():
    class Named(nn.Linear):
        pass

    model = flatlora.inject_lora(nn.Sequential(Named(12, 4)), r=2)
    assert list(flatlora.lora_layers(model)) == ["0"]


def end_of_a_step(real, whole):
    model = flatlora.inject_lora(ref.plain_model(), whole(3), real(4))
    optimizer = ref.sgd(model)
    seed = (whole(7), 1)
    flatlora.flat_lora_step(model, ref.loss_fn, [ref.batch()], optimizer, real(0.5), seed, real(0.25))
    return ref.adapters(model)


def test_numbers_of_numpy_are_numbers():
    torch.testing.assert_close(end_of_a_step(np.float32, np.int64), end_of_a_step(float, int), rtol=1e-5, atol=1e-8)
