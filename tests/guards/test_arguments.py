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


@contextmanager
def raises_and_changes_nothing(model, exception, words):
    def state():
        parameters = [(name, p.requires_grad, p.detach().numpy().tobytes()) for name, p in model.named_parameters()]
        output = model(ref.batch()[0]).detach().numpy().tobytes()  # would show a perturbation that was left behind
        return parameters, output, [(name, type(m), m.training) for name, m in model.named_modules()]

    before = state()
    with pytest.raises(exception, match=re.escape(words)) as error:
        yield
    assert error.type is exception  # not one derived from it
    assert state() == before


def call(model, name, changed):
    """The function of that name, with arguments that are right but for the changed ones."""
    loss = {"model": model, "loss_fn": ref.loss_fn, "batches": [ref.batch()]}
    step = {**loss, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    arguments = {
        "inject_lora": {"model": model},
        "flat_lora_step": {**step, "sigma": 0.1, "seed": 0},
        "sam_step": {**step, "rho": 0.1},
        "sharpness": {**loss, "sigma": 0.1, "samples": 1, "seed": 0},
        "perturbed": {"model": model, "sigma": 0.1, "seed": 0},
        "load_lora_state_dict": {"model": model, "state": STATE},
        "merge_lora": {"model": model},
        "filter_std": {"weight": torch.ones(2, 3), "sigma": 0.1},
        "sigma_at": {"step": 0, "total_steps": 10, "sigma": 0.1},
    }[name]
    result = getattr(flatlora, name)(**{**arguments, **changed})
    if name == "perturbed":
        result.__enter__()


STATE = {name: p + 1 for name, p in flatlora.lora_state_dict(ref.adapted_model()).items()}
WRONG = [
    ("inject_lora", {"r": 0}, ValueError, "r must be >= 1, alpha > 0, 0 <= dropout < 1; got r=0, alpha=16"),
    ("inject_lora", {"alpha": math.inf}, ValueError, "got r=8, alpha=inf"),
    ("inject_lora", {"targets": "0.bias"}, ValueError, "of which there are ['0', '2', '4']; got '0.bias'"),
    ("inject_lora", {"targets": ["0", "nothing"]}, ValueError, "got ['0', 'nothing']"),
    ("flat_lora_step", {"loss_fn": lambda m, b: m(b[0])}, RuntimeError, "invalid for input of size 64"),
    ("flat_lora_step", {"loss_fn": lambda *_: torch.ones(())}, RuntimeError, "does not require grad"),
    ("flat_lora_step", {"batches": []}, RuntimeError, "expects a non-empty TensorList"),
    ("flat_lora_step", {"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be above 0, got nan"),
    ("sam_step", {"rho": -1}, ValueError, "rho must be a finite number >= 0, got -1"),
    ("sam_step", {"space": "W"}, ValueError, "space must be full or lora, got 'W'"),
    ("sam_step", {"model": ref.plain_model()}, ValueError, "the model has no LoRALinear layer: call inject_lora first"),
    ("perturbed", {"sigma": math.nan}, ValueError, "sigma must be a finite number >= 0, got nan"),
    ("perturbed", {"seed": {1}}, TypeError, "int() argument must be a string"),
    ("load_lora_state_dict", {"state": {}}, ValueError, "missing, not in the model or of another shape: ['0.lora_A', "),
    ("load_lora_state_dict", {"state": {**STATE, "5.lora_A": STATE["4.lora_A"]}}, ValueError, "['5.lora_A'], 1 in all"),
    ("load_lora_state_dict", {"state": {**STATE, "4.lora_A": torch.ones(3)}}, ValueError, "['4.lora_A'], 1 in all"),
    ("merge_lora", {"model": ref.plain_model()}, ValueError, "no LoRALinear layer: call inject_lora first"),
    ("sigma_at", {"step": 11}, ValueError, "step / total_steps must be from 0 to 1, schedule in ['cosine'"),
    ("sigma_at", {"schedule": "cos"}, ValueError, "'linear', 'constant']; got 0.0, 'cos'"),
]


@pytest.mark.parametrize(("name", "changed", "exception", "words"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_argument_changes_nothing(name, changed, exception, words):
    model = ref.plain_model() if name == "inject_lora" else ref.adapted_model()
    with raises_and_changes_nothing(model, exception, words):
        call(model, name, changed)


@pytest.mark.parametrize("name", ["flat_lora_step", "sam_step", "sharpness", "perturbed", "merge_lora"])
def test_nothing_that_perturbs_or_merges_runs_inside_a_perturbation(name):
    model, words = ref.adapted_model(), "it is perturbed" if name == "merge_lora" else "perturbations do not nest"
    with raises_and_changes_nothing(model, RuntimeError, words), flatlora.perturbed(model, 0.1, 1):
        call(model, name, {})


def change_class(layer):
    layer.__class__ = type("Halved", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x / 2)})


def change_forward(layer):  # as accelerate does
    layer.forward = functools.update_wrapper(functools.partial(layer.forward), layer.forward)


OWN_WAYS = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, x, y: 2 * y),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, x: x),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda module, x, y: None),
    "forward of the instance": change_forward,
    "forward of the class": change_class,
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer),
}


@pytest.mark.parametrize("change", OWN_WAYS.values(), ids=OWN_WAYS)
def test_a_layer_with_hooks_or_a_forward_of_its_own_is_named(change):
    model = ref.plain_model()
    change(model[2])  # the second of three
    with raises_and_changes_nothing(model, ValueError, "2 has hooks, a parametrization or its own forward"):
        flatlora.inject_lora(model, r=2)
    assert list(ref.layers(flatlora.inject_lora(model, r=2, targets=["0"]))) == ["0"]  # the others may be adapted


def test_numbers_of_numpy_are_numbers():
    ends = []
    for real, whole in ((float, int), (np.float32, np.int64)):
        model = flatlora.inject_lora(ref.plain_model(), whole(3), real(4))
        flatlora.flat_lora_step(model, ref.loss_fn, [ref.batch()], ref.sgd(model), real(0.5), (whole(7), 1), real(0.25))
        ends.append(ref.adapters(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-8)
