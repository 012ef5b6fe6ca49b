"""LoRA adds s B A to a frozen linear layer, can be put in, saved, loaded and merged, and never touches the base."""

import copy

import pytest
import torch
from reference import adapted_mlp, batch, dense_weight, frozen_bytes, layers, small_mlp
from torch import nn

from flatlora import (
    LoRALinear,
    inject_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    perturbed,
)
from train_gpt2 import GPT, TARGETS, GPTConfig


def test_forward_is_the_dense_layer_with_the_merged_weight():  # E1
    layer = LoRALinear(nn.Linear(8, 12).double(), r=3, alpha=6)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    expected = x @ dense_weight(layer).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged_weight(), dense_weight(layer))
    assert layer.scaling == 2.0  # alpha / r


def test_adapters_start_kaiming_uniform_and_zero():
    layer = LoRALinear(nn.Linear(1000, 50), r=20)
    bound = 1 / 1000**0.5  # kaiming_uniform with a = sqrt(5)
    assert layer.lora_A.shape == (20, 1000) and layer.lora_B.shape == (50, 20)
    assert layer.lora_A.abs().max() <= bound and abs(layer.lora_A.std() / (bound / 3**0.5) - 1) < 0.05
    assert torch.count_nonzero(layer.lora_B) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_injection_leaves_the_outputs_unchanged_bit_for_bit(dtype):
    model = small_mlp(dtype)
    x = torch.randn(5, 8).to(dtype)
    before = model(x)
    inject_lora(model, r=2)
    after = model(x)
    assert after.dtype == before.dtype and torch.equal(after, before)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))  # also over a half-precision base


def test_the_base_keeps_its_own_storage_and_is_frozen():
    base = nn.Linear(8, 12)
    layer = LoRALinear(base, r=2)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_injection_freezes_everything_but_the_adapters():
    model = inject_lora(GPT(GPTConfig(1, 2, 8, 4)), r=2, targets=["c_attn"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"transformer.h.0.attn.c_attn.lora_{factor}" for factor in "AB"]


def test_dropout_acts_on_the_adapter_path_only_and_only_in_training():
    model = adapted_mlp(dropout=0.5)
    x, _ = batch()
    layer = model[0]
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), base + 2 * dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer.eval()(x), x @ dense_weight(layer).T + layer.bias)


def test_injection_keeps_the_mode_of_the_model():
    model = inject_lora(small_mlp().eval(), r=2, dropout=0.5)
    assert not any(module.training for module in model.modules())


def test_targets_are_names_or_one_expression_for_the_whole_name():
    def adapted(targets):
        return list(layers(inject_lora(GPT(GPTConfig(2, 2, 8, 4)), r=2, targets=targets)))

    h = "transformer.h"
    assert adapted(["attn.c_attn"]) == [f"{h}.0.attn.c_attn", f"{h}.1.attn.c_attn"]
    assert adapted(["c_proj"]) == [f"{h}.{i}.{part}.c_proj" for i in (0, 1) for part in ("attn", "mlp")]
    assert adapted([f"{h}.1.mlp.c_fc"]) == [f"{h}.1.mlp.c_fc"]
    assert adapted(r".*\.0\..*c_(fc|attn)") == [f"{h}.0.attn.c_attn", f"{h}.0.mlp.c_fc"]
    assert len(adapted(TARGETS)) == 8
    assert len(adapted(r".*c_fc|nothing")) == 2  # an expression may have parts that match nothing, a list may not


def test_a_tied_weight_is_never_adapted():
    model = GPT(GPTConfig(1, 2, 8, 4))
    inject_lora(model, r=2, targets=".*")
    assert len(layers(model)) == 4 and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer["wte"].weight
    with pytest.raises(ValueError, match="weight of their own"):
        inject_lora(GPT(GPTConfig(1, 2, 8, 4)), r=2, targets=["lm_head"])


def test_two_injections_give_two_ranks_and_both_train():
    model = inject_lora(small_mlp(), r=2, targets=["0"])
    inject_lora(model, r=3, targets=["2"])
    assert [layer.r for layer in layers(model).values()] == [2, 3]
    assert all(p.requires_grad for p in lora_parameters(model)) and len(lora_parameters(model)) == 4


def test_a_failed_injection_changes_nothing():
    model = small_mlp()
    with pytest.raises(ValueError, match="4: r must be"):
        inject_lora(model, r=8)  # fits the first two layers, not the last, which is 8 -> 4
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


def test_merge_gives_plain_linears_with_the_same_outputs_and_leaves_the_base_alone():
    model, (x, _) = adapted_mlp(), batch()
    expected, base, weight = model(x), frozen_bytes(model), model[0].weight
    random_state = torch.get_rng_state()
    merged = merge_lora(copy.deepcopy(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not layers(merged) and type(merged[0]) is nn.Linear and merged[4].bias is None
    torch.testing.assert_close(merged(x), expected)
    merge_lora(model)
    assert model[0].weight is not weight  # a new tensor: the frozen one is not written
    assert base["0.weight"] == weight.detach().numpy().tobytes()


def test_a_model_that_is_one_adapted_layer_merges_too():
    layer, x = LoRALinear(nn.Linear(8, 4), r=2), torch.randn(3, 8)
    nn.init.normal_(layer.lora_B)
    merged = merge_lora(layer)
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x))


def test_merge_rounds_a_half_precision_base_once():
    layer = LoRALinear(nn.Linear(8, 12).bfloat16(), r=3)
    nn.init.normal_(layer.lora_B)
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert layer.merged_weight().dtype == torch.float32
    torch.testing.assert_close(layer.merge().weight, exact.bfloat16(), rtol=0, atol=1e-2)
    assert (layer.merge().weight == exact.bfloat16()).double().mean() > 0.98


def test_merge_refuses_while_perturbed():
    model = adapted_mlp()
    with perturbed(model, 0.1, seed=0), pytest.raises(RuntimeError, match="perturbed"):
        merge_lora(model)
    assert len(layers(model)) == 3


def test_the_state_holds_the_adapters_only_and_loads_back():
    model, other = adapted_mlp(), inject_lora(small_mlp(), r=3, alpha=6)
    state = lora_state_dict(model)
    assert list(state) == [f"{i}.{name}" for i in (0, 2, 4) for name in ("lora_A", "lora_B")]
    load_lora_state_dict(other, state)
    assert torch.equal(other(batch()[0]), model(batch()[0]))
    with torch.no_grad():
        model[0].lora_B.add_(1)
    assert not torch.equal(state["0.lora_B"], model[0].lora_B)  # a copy: a snapshot stays what it was


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("0.lora_A"), r"missing \['0.lora_A'\]"),
        (lambda state: state.update({"9.lora_A": torch.ones(1)}), r"not in the model \['9.lora_A'\]"),
        (lambda state: state.update({"2.lora_B": torch.ones(8, 1)}), r"another shape \['2.lora_B'\]"),
        (lambda state: state.update({"2.lora_B": None}), r"another shape \['2.lora_B'\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(change, words):
    model = adapted_mlp()
    state = {name: torch.zeros_like(p) for name, p in lora_state_dict(model).items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        load_lora_state_dict(model, state)
    assert all(torch.count_nonzero(p) for p in lora_parameters(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r must be an integer from 1 to min"),
        ({"r": 9}, "r must be an integer from 1 to min"),
        ({"r": 2.0}, "r must be an integer"),
        ({"alpha": 0}, "alpha must be a finite number > 0"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"dropout": 1}, "dropout must be a number >= 0 and < 1"),
        ({"targets": ["0", "nothing"]}, "targets must name"),
        ({"targets": "nothing"}, "this model has 0, 2, 4"),
        ({"targets": []}, "targets must name"),
        ({"targets": "*.c_attn"}, "targets must be a regular expression or a list of names"),
    ],
)
def test_bad_injection_arguments_say_what_is_allowed(options, words):
    with pytest.raises(ValueError, match=words):
        inject_lora(small_mlp(), **{"r": 2, **options})


@pytest.mark.parametrize("targets", [".*", ["out_proj"]])
def test_a_projection_that_is_read_past_its_forward_is_refused_with_the_reason(targets):
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    words = (
        "0.out_proj: must be a plain nn.Linear, got NonDynam.*: nn.MultiheadAttention reads its weight past its forward"
    )
    with pytest.raises(ValueError, match=words):
        inject_lora(model, r=2, targets=targets)


def test_the_linears_of_a_transformer_encoder_layer_are_refused_with_the_reason():
    """In evaluation it hands linear1.weight to a fused kernel: the adapters would count in training only."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"layers\.0\.linear1: nn.TransformerEncoderLayer reads its weight past"):
        inject_lora(model, r=2, targets=["linear1", "linear2"])
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed


def test_a_model_without_adapters_is_an_error_everywhere():
    for call in (lora_parameters, lora_state_dict, merge_lora, lambda m: load_lora_state_dict(m, {})):
        with pytest.raises(ValueError, match="inject_lora first"):
            call(small_mlp())
