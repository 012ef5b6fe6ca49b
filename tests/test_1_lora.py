"""LoRA: a frozen linear layer plus s B A, which is put in, trained, saved, loaded and merged."""

import copy
import math

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import nn

from flatlora import (
    LoRALinear,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
)

# ---- The layer ----


def test_layer_computes_wx_plus_sbax():  # eq. 1
    layer = ref.adapted_layer()
    W, b = layer.base.weight, layer.base.bias
    A, B = layer.lora_A, layer.lora_B
    s = 6 / 3  # alpha / r
    x = torch.randn(5, 7, 12)
    torch.testing.assert_close(layer(x), x @ W.T + b + s * (x @ A.T) @ B.T)


def test_weight_is_w_prime():  # for whoever reads `layer.weight`
    layer = ref.adapted_layer()
    expected = layer.base.weight + (6 / 3) * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight, expected)


def test_gradients_are_those_of_the_dense_formula():
    model, data = ref.adapted_model(), ref.batch()
    ref.loss_fn(model, data).backward()
    torch.testing.assert_close(ref.gradients(model), ref.dense_gradients(model, data))


def test_first_output_is_the_bases():
    model = ref.plain_model()
    x, _ = ref.batch()
    before = model(x)

    inject_lora(model, r=3)

    assert torch.equal(model(x), before)  # bit for bit


@pytest.mark.parametrize("n", [1_000, 10_000])
def test_a_starts_as_nn_linear_starts_its_weight(n):
    layer = LoRALinear(nn.Linear(n, 4), r=5)
    bound = 1 / math.sqrt(n)  # nn.Linear draws uniformly from -bound to bound
    std = bound / math.sqrt(3)  # of a uniform draw
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(std, rel=0.05)


def test_b_starts_at_zero():
    layer = LoRALinear(nn.Linear(12, 16), r=5)
    assert torch.equal(layer.lora_B, torch.zeros(16, 5))


def test_adapters_of_a_half_precision_layer_are_float32():  # which would lose small updates
    layer = LoRALinear(nn.Linear(12, 16, dtype=torch.bfloat16))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_dropout_acts_on_the_adapter_path():
    layer = ref.adapted_layer(dropout=0.5)
    x = torch.randn(5, 12)

    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)

    adapter_path = 2 * (dropped @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(out, layer.base(x) + adapter_path)


def test_dropout_is_off_in_evaluation():
    layer = ref.adapted_layer(dropout=0.5)
    x = torch.randn(5, 12)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, ref.merged(layer), layer.bias))


# ---- Which layers get adapters ----


class Net(nn.Module):
    """Names as a language model has them. The head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(5, 8)
        self.h = nn.ModuleList()
        for _ in range(2):
            block = {"attn": nn.Linear(8, 8), "xattn": nn.Linear(8, 8)}
            self.h.append(nn.ModuleDict(block))
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.wte.weight


def adapted_names(targets):
    return list(lora_layers(inject_lora(Net(), r=2, targets=targets)))


def test_a_name_stands_for_all_layers_called_so():
    assert adapted_names(["attn"]) == ["h.0.attn", "h.1.attn"]  # not h.0.xattn


def test_a_longer_name_stands_for_one_layer():
    assert adapted_names(["1.xattn", "0.attn"]) == ["h.0.attn", "h.1.xattn"]


def test_a_dot_in_a_name_is_a_dot():
    with pytest.raises(ValueError, match="fits none of"):
        adapted_names([".attn"])  # if it stood for any letter, this were h.0.xattn


def test_a_string_is_one_expression_for_whole_names():
    assert adapted_names(r"h\.0|h\.1\..*") == ["h.1.attn", "h.1.xattn"]  # no layer is called "h.0"


def test_a_tied_layer_is_passed_over():  # an adapter would untie it
    assert "head" not in adapted_names(".*")


def test_a_layer_held_by_two_modules_gets_one_adapter():
    model = Net()
    model.last = model.h[1]["attn"]

    inject_lora(model, r=2, targets=["attn"])

    assert isinstance(model.last, LoRALinear)
    assert model.last is model.h[1]["attn"]


def test_a_layer_held_by_two_modules_is_merged_in_both():
    model = Net()
    model.last = model.h[1]["attn"]

    merge_lora(inject_lora(model, r=2, targets=["attn"]))

    assert type(model.last) is nn.Linear
    assert model.last is model.h[1]["attn"]


def test_a_lone_layer_is_adapted():
    layer = inject_lora(nn.Linear(12, 16), r=2)
    assert isinstance(layer, LoRALinear)


# ---- What trains ----


def names_that_train(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_only_the_adapters_train():
    model = inject_lora(ref.plain_model(), r=2)
    assert names_that_train(model) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]


def test_a_later_injection_leaves_the_first_alone():
    model = ref.with_nonzero_B(inject_lora(ref.plain_model(), r=2, targets=["0"]))
    first = lora_parameters(model)
    values = ref.adapters(model)  # copies of them

    inject_lora(model, r=3)

    assert model[0].lora_A is first[0]
    assert model[0].lora_B is first[1]
    ref.assert_same_bits([model[0].lora_A, model[0].lora_B], values)
    assert model[2].r == 3
    assert names_that_train(model) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]


@pytest.mark.parametrize("mode", [True, False])
def test_adapters_have_the_mode_of_the_model(mode):
    model = inject_lora(ref.plain_model().train(mode), r=2, dropout=0.5)
    assert model[0].lora_dropout.training == mode


def model_with_a_head():
    """A new head, a normalisation and two linear layers, which trains whole."""
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 8), nn.Linear(8, 4))
    model = nn.Sequential()
    model.add_module("body", nn.Linear(12, 16))
    model.add_module("head", head)
    return inject_lora(model, r=2, modules_to_save=["head"])


def test_modules_to_save_train_whole():
    model = model_with_a_head()
    head = list(model.head.parameters())
    assert all(p.requires_grad for p in head)


def test_modules_to_save_get_no_adapters():
    model = model_with_a_head()
    assert list(lora_layers(model)) == ["body"]  # and neither of the two linear layers in the head


def test_modules_to_save_are_lora_parameters():
    model = model_with_a_head()
    expected = [model.body.lora_A, model.body.lora_B, *model.head.parameters()]
    given = lora_parameters(model)
    assert [id(p) for p in given] == [id(p) for p in expected]


def test_modules_to_save_are_in_the_state():
    model = model_with_a_head()
    state = lora_state_dict(model)
    for name, tensor in model.head.state_dict().items():  # with BatchNorm's running mean
        assert torch.equal(state[f"head.{name}"], tensor)


def test_modules_to_save_load():
    model, other = model_with_a_head(), model_with_a_head()
    model(torch.randn(5, 12))  # moves the running mean

    load_lora_state_dict(other, lora_state_dict(model))

    assert torch.equal(other.head[0].running_mean, model.head[0].running_mean)
    assert torch.equal(other.head[1].weight, model.head[1].weight)


# ---- Saving, loading, merging ----


def test_the_state_is_all_that_trains_with_each_alpha():
    state = lora_state_dict(ref.adapted_model())
    assert list(state) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "0.alpha", "2.alpha"]
    assert state["0.alpha"] == 6


def test_the_state_is_a_copy():
    model = ref.adapted_model()
    state = lora_state_dict(model)
    nn.init.zeros_(model[0].lora_B)
    assert state["0.lora_B"].any()


def test_the_state_loads():
    model, other = ref.adapted_model(), inject_lora(ref.plain_model(), r=3, alpha=6)
    load_lora_state_dict(other, lora_state_dict(model))
    ref.assert_same_bits(ref.adapters(other), ref.adapters(model))


def test_a_loaded_state_is_copied():
    model = ref.adapted_model()
    state = lora_state_dict(model)
    load_lora_state_dict(model, state)
    nn.init.zeros_(model[0].lora_B)
    assert state["0.lora_B"].any()


def test_merging_keeps_the_output():
    model = ref.adapted_model()
    x, _ = ref.batch()
    expected = model(x)

    assert merge_lora(model) is model
    assert type(model[0]) is type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_merging_does_not_write_the_base():
    model = ref.adapted_model()
    base = model[0].base.weight
    before = ref.bytes_of(base)
    merge_lora(model)
    assert ref.bytes_of(base) == before


def test_a_merged_layer_is_frozen():
    assert names_that_train(merge_lora(ref.adapted_model())) == []


@pytest.mark.parametrize("mode", [True, False])
def test_a_merged_layer_has_the_mode_of_the_model(mode):
    model = ref.adapted_model()
    model.train(mode)
    merge_lora(model)
    assert model[0].training == mode


def test_a_lone_layer_is_merged():
    layer = ref.adapted_layer()  # a model of one layer, which `merge_lora` cannot replace inside of it

    linear = merge_lora(layer)

    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear.weight, ref.merged(layer))
    assert torch.equal(linear.bias, layer.bias)


# ---- Models that read `weight` and do without the layer's forward ----


class ChunkedHead(nn.Module):
    """Reads `head.weight` past the layer: a loss in chunks, without the logits of all tokens in memory at once."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):  # (B, T, C)
        losses = []
        for chunk in self.body(x).flatten(0, 1).split(4):  # (4, C)
            logits = chunk @ self.head.weight.T  # (4, 5)
            losses.append(F.cross_entropy(logits, torch.arange(4)))
        return torch.stack(losses)


def test_a_model_that_reads_weight_computes_with_w_prime():
    plain = ChunkedHead().double()
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), ref.dense_call(plain, model, x))


def test_a_model_that_reads_weight_trains_the_adapter():
    plain = ChunkedHead().double()
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2))
    x = torch.randn(2, 6, 16, dtype=torch.float64)

    model(x).sum().backward()

    dense_loss = ref.dense_call(plain, model, x).sum()  # `plain` with W' = W + s B A: autograd reaches A and B
    expected = torch.autograd.grad(dense_loss, lora_parameters(model))
    torch.testing.assert_close(ref.gradients(model), list(expected))
