"""Wrong arguments and layers that cannot get an adapter: an error that says why, before anything has changed."""

import math
import re

import pytest
import reference as ref
import torch
from torch import nn

import flatlora
from flatlora import add_lora, inject_lora, lora_layers, lora_state_dict, perturbed


def call(model, name, **changed):
    """Call the function of that name with valid arguments, except for the changed ones."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = {"loss_fn": ref.loss_fn, "batches": [ref.batch()], "optimizer": optimizer}
    valid = {
        "perturbed": {"sigma": 0.1, "seed": 0},
        "flat_lora_step": {**step, "sigma": 0.1, "seed": 0},
        "sam_step": {**step, "rho": 0.1},
        "sharpness": {"loss_fn": ref.loss_fn, "batches": [ref.batch()], "sigma": 0.1, "samples": 1, "seed": 0},
        "lora_parameters": {},
        "lora_state_dict": {},
        "merge_lora": {},
    }
    result = getattr(flatlora, name)(model, **(valid[name] | changed))
    if name == "perturbed":
        result.__enter__()


WRONG = [
    ("perturbed", {"sigma": -0.1}, "sigma must be a finite number >= 0, got -0.1"),
    ("perturbed", {"sigma": math.nan}, "got nan"),
    ("perturbed", {"sigma": math.inf}, "got inf"),
    ("perturbed", {"sigma": 0, "seed": None}, "seed must be a number or a tuple, new for each step, got None"),
    ("flat_lora_step", {"sigma": -0.1}, "sigma must be a finite number >= 0, got -0.1"),
    ("flat_lora_step", {"batches": []}, "batches must be a list of at least one batch"),
    ("sam_step", {"batches": []}, "batches must be a list of at least one batch"),
    ("sharpness", {"sigma": -0.1}, "sigma must be a finite number >= 0, got -0.1"),
]


@pytest.mark.parametrize(("name", "changed", "words"), WRONG, ids=str)
def test_a_wrong_argument(name, changed, words):
    model = ref.adapted_model()
    start = ref.adapters(model)
    with pytest.raises(ValueError, match=re.escape(words)):
        call(model, name, **changed)
    ref.assert_same_bits(ref.adapters(model), start)


@pytest.mark.parametrize("name", ["perturbed", "flat_lora_step", "sam_step", "sharpness", "lora_parameters"])
def test_a_model_without_adapters(name):
    with pytest.raises(ValueError, match="the model has no LoRA layer: call inject_lora or PEFT's get_peft_model"):
        call(ref.plain_model(), name)


@pytest.mark.parametrize("sigma", [0, 0.1])
@pytest.mark.parametrize("name", ["perturbed", "flat_lora_step", "sharpness"])
def test_perturbing_twice_at_once_is_an_error(name, sigma):
    model = ref.adapted_model()
    with perturbed(model, 0.1, 1), pytest.raises(RuntimeError, match="the model is perturbed already"):
        call(model, name, sigma=sigma)


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_of_the_schedule(step):
    with pytest.raises(ValueError, match=f"step must be from 0 to total_steps, got {step} of 10"):
        flatlora.sigma_at(step, 10, 0.1)


# ---- States --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["5.lora_A", "2.lora_A"])  # not in the model, of another shape
def test_a_state_that_does_not_fit_changes_nothing(name):
    model = ref.adapted_model()
    start = ref.adapters(model)
    state = lora_state_dict(model)
    state["0.lora_A"] += 1
    state[name] = torch.ones(3)
    with pytest.raises(ValueError, match=f"{name} is missing from the state, not in the model or of a different shape"):
        flatlora.load_lora_state_dict(model, state)
    ref.assert_same_bits(ref.adapters(model), start)


def test_a_lone_layer_is_a_model():
    layer, other = ref.adapted_layer(), add_lora(nn.Linear(12, 16), r=3, alpha=60)
    assert list(lora_state_dict(layer)) == ["lora_A", "lora_B", "scaling"]
    flatlora.load_lora_state_dict(other, lora_state_dict(layer))
    assert other.scaling == 2
    merged = flatlora.merge_lora(other)
    assert type(merged) is nn.Linear
    assert vars(merged).keys() == vars(nn.Linear(12, 16)).keys()


def test_a_checkpoint_of_the_model_without_adapters_loads():
    plain, model = ref.plain_model(), ref.adapted_model()
    checkpoint = {name: p + 1 for name, p in plain.state_dict().items()}
    names = list(checkpoint)
    result = model.load_state_dict(checkpoint, strict=False)
    assert result.missing_keys == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    assert not result.unexpected_keys
    assert torch.equal(model[2].frozen_weight, plain[2].weight + 1)
    assert list(checkpoint) == names  # the caller's is unchanged


def test_two_names_that_are_equal_without_wrappers():
    model = inject_lora(nn.ModuleDict({"module": nn.Linear(3, 3)}), targets=["module"])
    model.add_module("_orig_mod", add_lora(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="two parts of the model are called '' without the names of wrappers"):
        lora_layers(model)


# ---- Layers that do more than W x + b ------------------------------------------------------------------------


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x / 2)


class ForeignTensor(torch.Tensor):
    """A subclass, like the weights of quantised layers."""


def forward_of_the_instance(layer):  # as accelerate does
    layer.forward = layer.forward


def forward_of_the_class(layer):
    layer.__class__ = Halved


def weight_of_another_class(layer):
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(ForeignTensor))


CHANGES = [
    (forward_of_the_class, "is of type Halved, not nn.Linear"),
    (forward_of_the_instance, "has its own forward"),
    (weight_of_another_class, "a weight that is not a plain parameter"),
    (nn.utils.parametrizations.weight_norm, "a weight that is not a plain parameter"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_a_layer_that_does_more_is_an_error_if_listed_and_skipped_by_an_expression(change, reason):
    model = ref.plain_model()
    change(model[2])
    with pytest.raises(ValueError, match=reason):
        inject_lora(model, targets=["2"])
    assert list(lora_layers(inject_lora(model, targets=".*"))) == ["0"]
