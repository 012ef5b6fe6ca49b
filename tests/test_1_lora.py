"""LoRA: a frozen linear layer plus s B A. How it is added, trained, saved, loaded and merged."""

import math

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import nn

from flatlora import (
    LoRALinear,
    add_lora,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    perturbed,
)

# ---- The layer ----


def test_layer_computes_wx_plus_sbax():  # eq. 1
    layer = ref.adapted_layer()
    W, b = layer.frozen_weight, layer.bias
    A, B = layer.lora_A, layer.lora_B
    s = 6 / 3  # alpha / r
    x = torch.randn(5, 7, 12)
    torch.testing.assert_close(layer(x), x @ W.T + b + s * (x @ A.T) @ B.T)


def test_weight_is_w_prime():  # for models that multiply by it instead of calling the layer
    layer = ref.adapted_layer()
    expected = layer.frozen_weight + (6 / 3) * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight, expected)


def test_assigning_to_weight_is_an_error():  # B A would be counted twice
    layer = ref.adapted_layer()
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(layer.weight)
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = layer.weight.detach()


def test_gradients_are_those_of_the_dense_formula():
    model, data = ref.adapted_model(), ref.batch()
    ref.loss_fn(model, data).backward()
    torch.testing.assert_close(ref.gradients(model), ref.dense_gradients(model, data))


def test_first_output_is_that_of_the_base_model():  # since B starts at zero
    model = ref.plain_model()
    x, _ = ref.batch()
    before = model(x)

    inject_lora(model, r=3, targets=["0", "2"])

    assert torch.equal(model(x), before)  # bit for bit


def test_a_starts_as_nn_linear_starts_its_weight():
    layer = add_lora(nn.Linear(10_000, 4), r=5)
    bound = 1 / math.sqrt(10_000)  # nn.Linear draws uniformly from -bound to bound
    std = bound / math.sqrt(3)  # of a uniform draw
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(std, rel=0.05)


def test_adapters_of_a_half_precision_layer_are_float32():  # which keeps small updates
    layer = add_lora(nn.Linear(12, 16, dtype=torch.bfloat16))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_dropout_acts_on_the_input_of_the_adapter():
    layer = ref.adapted_layer(dropout=0.5)
    x = torch.randn(5, 12)

    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)

    update = 2 * (dropped @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(out, x @ layer.frozen_weight.T + layer.bias + update)


def test_dropout_is_off_in_eval_mode():
    layer = ref.with_nonzero_B(add_lora(nn.Linear(12, 16).eval(), dropout=0.5))
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), x @ ref.merged(layer).T + layer.bias)


# ---- Which layers get adapters ----


class Projection(nn.Linear):
    """A user's subclass that computes exactly what nn.Linear does."""


class Net(nn.Module):
    """Layer names as in a language model. The head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(5, 8)
        self.h = nn.ModuleList()
        for _ in range(2):
            block = {"attn": Projection(8, 8), "xattn": nn.Linear(8, 8)}
            self.h.append(nn.ModuleDict(block))
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.wte.weight


def trainable_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


TARGETS = [
    (["attn"], ["h.0.attn", "h.1.attn"]),  # every layer of that name, but not h.0.xattn
    (["1.xattn", "0.attn"], ["h.0.attn", "h.1.xattn"]),  # a longer name selects one layer
    (r"h\.0|h\.1\..*", ["h.1.attn", "h.1.xattn"]),  # an expression must match the full name; no layer is called "h.0"
    (".*", ["h.0.attn", "h.0.xattn", "h.1.attn", "h.1.xattn"]),  # skips the embedding and the tied head
]


@pytest.mark.parametrize(("targets", "names"), TARGETS, ids=str)
def test_targets_name_layers(targets, names):
    model = inject_lora(Net(), r=2, targets=targets)
    assert list(lora_layers(model)) == names
    assert all("lora_" in name for name in trainable_names(model))  # and nothing else


NO_TARGETS = [
    (["attn", "atn"], "'atn' cannot be used: no layer has this name"),  # a typo
    (
        [".attn"],
        "no layer has this name",
    ),  # a dot in a list is literal; as a regular expression it would match h.0.xattn
    ("attn", "no layer has this name"),  # an expression must match the full name
    (["attn", "wte"], "wte is of type Embedding, not nn.Linear"),
    (["head"], "head shares its weight with another layer"),
]


@pytest.mark.parametrize(("targets", "reason"), NO_TARGETS, ids=str)
def test_a_target_that_cannot_get_an_adapter_is_an_error_with_the_reason(targets, reason):
    model = Net()
    with pytest.raises(ValueError, match=reason):
        inject_lora(model, r=2, targets=targets)
    assert type(model.h[0]["attn"]) is Projection  # nothing was changed
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_an_error():
    model = inject_lora(Net(), r=2, targets=["0.attn"])
    with pytest.raises(ValueError, match=r"h\.0\.attn has an adapter already"):
        inject_lora(model, r=2, targets=["attn"])


def test_a_layer_changes_in_place_and_back():
    model = Net()
    layer = model.last = model.h[1]["attn"]  # held twice
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("hook"))

    inject_lora(model, r=2, targets=["attn"])

    assert layer is model.last is model.h[1]["attn"]
    assert isinstance(layer, LoRALinear)
    layer(torch.ones(8))
    assert calls == ["hook"]

    merge_lora(model)

    assert layer is model.last is model.h[1]["attn"]
    assert type(layer) is Projection


# ---- Trainable parameters ----


def model_with_a_head():
    """The body has an adapter. The new head, a normalisation and a linear layer, is fully trained."""
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))
    model = nn.ModuleDict({"body": nn.Linear(12, 16), "head": head})
    inject_lora(model, r=2, targets=["body"])
    model["head"].requires_grad_()
    return model


def test_the_adapters_and_what_is_unfrozen_later_are_trainable():
    model = model_with_a_head()
    expected = [model["body"].lora_A, model["body"].lora_B, *model["head"].parameters()]
    given = lora_parameters(model)
    assert [id(p) for p in given] == [id(p) for p in expected]


def test_a_later_injection_keeps_trainable_parameters():
    model = model_with_a_head()
    before = lora_parameters(model)
    values = ref.adapters(model)  # copies of them

    inject_lora(model, r=3, targets=["1"])  # in the head

    ref.assert_same_bits(before, values)
    added = {"head.1.lora_A", "head.1.lora_B"}
    kept = {"body.lora_A", "body.lora_B", "head.0.weight", "head.0.bias"}
    assert set(trainable_names(model)) == kept | added


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_is_an_error(dtype):  # most updates would be rounded away
    model = ref.adapted_model().to(dtype)
    with pytest.raises(ValueError, match="trainable parameters must be float32"):
        lora_parameters(model)


# ---- Saving and loading ----


def test_the_state_holds_all_trainable_parameters_and_scalings():
    state = lora_state_dict(ref.adapted_model())
    assert list(state) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "0.scaling", "2.scaling"]
    assert state["0.scaling"] == 6 / 3


def test_a_state_loads_and_is_a_copy():
    model = ref.adapted_model()
    other = inject_lora(ref.plain_model(), r=3, alpha=60, targets=["0", "2"])
    x, _ = ref.batch()
    expected = model(x)

    state = lora_state_dict(model)
    load_lora_state_dict(other, state)
    assert torch.equal(other(x), expected)

    nn.init.zeros_(model[0].lora_B)
    nn.init.zeros_(other[0].lora_B)
    assert state["0.lora_B"].any()


def test_a_head_is_in_the_state():
    model, other = model_with_a_head(), model_with_a_head()
    model["head"](torch.randn(5, 16))  # moves BatchNorm's running mean

    load_lora_state_dict(other, lora_state_dict(model))

    expected = model["head"].state_dict()  # with the running mean
    torch.testing.assert_close(other["head"].state_dict(), expected, rtol=0, atol=0)


def test_a_state_of_version_02_is_an_error_and_changes_nothing():
    model = ref.adapted_model()
    before = ref.adapters(model)
    state = lora_state_dict(model)
    state["0.lora_A"] += 1
    state["0.alpha"] = state.pop("0.scaling")

    with pytest.raises(ValueError, match=r"0\.scaling is missing"):
        load_lora_state_dict(model, state)
    ref.assert_same_bits(ref.adapters(model), before)


def test_the_state_of_a_frozen_model_is_an_error():  # such as a copy for an average of weights
    model = ref.adapted_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing trains"):
        lora_state_dict(model)


# ---- Merging ----


def test_merging_keeps_the_output():
    model = ref.adapted_model()
    x, _ = ref.batch()
    expected = model(x)

    assert merge_lora(model) is model

    torch.testing.assert_close(model(x), expected)
    assert model.state_dict().keys() == ref.plain_model().state_dict().keys()
    assert trainable_names(model) == []


def test_merging_does_not_write_the_base():
    model = ref.adapted_model()
    W = model[0].frozen_weight
    before = ref.bytes_of(W)
    merge_lora(model)
    assert ref.bytes_of(W) == before


def test_merging_inside_perturbed_is_an_error():
    model = ref.adapted_model()
    with perturbed(model, sigma=0.3, seed=0), pytest.raises(ValueError, match="outside of `perturbed`"):
        merge_lora(model)


def test_a_merged_weight_that_overflows_is_an_error():
    model = ref.adapted_model(torch.float16)
    nn.init.constant_(model[2].lora_B, 1e8)  # float16 ends at 65504
    with pytest.raises(FloatingPointError, match="merged weight of '2' is not finite"):
        merge_lora(model)
    assert isinstance(model[2], LoRALinear)
