"""LoRA: a frozen linear layer plus s B A, which can be put in, saved, loaded and merged, and whose `.weight` is W'."""

import copy

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import nn

import flatlora
from flatlora import LoRALinear, inject_lora, lora_parameters, merge_lora, perturbed


@pytest.mark.parametrize("r", [1, 3, 300])  # a rank above the layer's size is a waste, but no error
def test_the_layer_computes_with_w_plus_s_b_a(r):  # eq. 1
    layer = ref.in_training(LoRALinear(nn.Linear(192, 256).double(), r=r, alpha=6))
    x = torch.randn(5, 7, 192, dtype=torch.float64)
    assert layer.scaling == 6 / r
    torch.testing.assert_close(layer(x), x @ ref.dense_weight(layer).T + layer.base.bias)
    torch.testing.assert_close(layer.weight, ref.dense_weight(layer))


@pytest.mark.parametrize("dtype", ref.DTYPES)
def test_adapters_start_kaiming_uniform_and_zero_and_leave_the_output_unchanged_bit_for_bit(dtype):
    model, (x, _) = ref.plain_model(dtype).eval(), ref.batch(dtype=dtype)
    before = model(x)
    after = inject_lora(model, r=16, dropout=0.5)(x)
    assert after.dtype == dtype and torch.equal(after, before)
    A, B, bound = model[0].lora_A, model[0].lora_B, 1 / 192**0.5  # a row of A starts like a row of an nn.Linear
    assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05) and not B.any()
    assert A.dtype == B.dtype == torch.float32  # half precision would lose small updates
    assert not any(module.training for module in model.modules())  # the mode is that of the model


def test_dropout_acts_on_the_adapter_path_only_and_only_in_training():
    layer, (x, _) = ref.adapted_model(dropout=0.5)[0], ref.batch()
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), layer.base(x) + 2 * dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer.eval()(x), x @ ref.dense_weight(layer).T + layer.base.bias)


class Tree(nn.Module):
    """Names as a language model has them. The head is tied to the embedding, and the last block has two names."""

    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.wte.weight
        self.h = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)}) for _ in range(2))
        self.last = self.h[1]


def test_targets_are_names_or_one_expression_and_a_tied_weight_is_passed_over():
    def adapted(targets):
        return list(ref.layers(inject_lora(Tree(), r=2, targets=targets)))

    assert adapted(["attn"]) == ["h.0.attn", "h.1.attn"]
    assert adapted(["1.mlp", "0.attn"]) == ["h.0.attn", "h.1.mlp"]
    assert adapted(r".*\.0\.(attn|mlp)|attn") == ["h.0.attn", "h.0.mlp"]  # "attn" alone is nobody's whole name
    assert adapted(".*") == ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]  # not the head: an adapter would untie it


def test_a_layer_with_two_names_is_adapted_once_and_merged_at_both():
    model = inject_lora(Tree(), r=2, targets=["last.attn"])
    assert isinstance(model.last["attn"], LoRALinear) and model.h[1]["attn"] is model.last["attn"]
    merge_lora(model)
    assert type(model.last["attn"]) is nn.Linear and model.h[1]["attn"] is model.last["attn"]


def test_only_the_adapters_train_and_a_second_injection_leaves_the_first_as_it_is():
    model = ref.plain_model()
    base, first = model[0], inject_lora(model, r=2, targets=["0"])[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]
    inject_lora(model, r=3)  # every linear layer that has no adapter yet, and not the base of one that has
    assert model[0] is first and first.base is base and [layer.r for layer in ref.layers(model).values()] == [2, 3, 3]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_the_state_is_a_copy_of_the_adapters_and_loads_back():
    model, other = ref.adapted_model(), inject_lora(ref.plain_model(), r=3, alpha=6)
    state = flatlora.lora_state_dict(model)
    assert list(state) == [f"{i}.lora_{factor}" for i in (0, 2, 4) for factor in "AB"]
    flatlora.load_lora_state_dict(other, state)
    assert torch.equal(other(ref.batch()[0]), model(ref.batch()[0]))
    nn.init.zeros_(model[0].lora_B)
    assert state["0.lora_B"].all()  # a snapshot stays what it was


def test_merge_gives_plain_layers_with_the_same_output_and_does_not_write_the_base():
    model, (x, _) = ref.adapted_model(), ref.batch()
    expected, base, before = model(x), model[0].base.weight, ref.frozen_bytes(model)
    assert merge_lora(model) is model and type(model[0]) is nn.Linear and model[4].bias is None
    torch.testing.assert_close(model(x), expected)
    assert model[0].weight is not base and base.numpy().tobytes() == before["0.base.weight"]


class ChunkedHead(nn.Module):
    """A loss in chunks, so that the logits of all tokens are never in memory at once."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 5, bias=False)

    def forward(self, x):  # (B, T, C)
        chunks = self.body(x).flatten(0, 1).split(4)  # each (4, C)
        return torch.stack([F.cross_entropy(chunk @ self.head.weight.T, torch.arange(4)) for chunk in chunks])


class FunctionalAttention(nn.Module):
    """WavLM's attention hands the weights of its projections to a function."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):  # (B, T, C)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        weights = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        rest = (None, bias, None, None, False, 0.0, self.out.weight, self.out.bias)
        return F.multi_head_attention_forward(x, x, x, 16, 2, *rest, use_separate_proj_weight=True, **weights)[0]


READERS = {
    "chunked head": ChunkedHead,
    "functional attention": FunctionalAttention,
    # nn.MultiheadAttention hands over its out_proj; in evaluation the whole layer becomes one fused kernel.
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
}


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_a_model_that_reads_weight_gets_w_prime_with_the_noise_and_its_gradient(make, sigma, monkeypatch):
    fused, kernel = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(1) or kernel(*a))
    torch.manual_seed(0)
    plain, x = make().double().eval(), torch.randn(2, 6, 16, dtype=torch.float64)
    model = ref.in_training(inject_lora(copy.deepcopy(plain), r=2))
    with perturbed(model, sigma, seed=0):
        eps = ref.read_eps(model)
        with torch.no_grad():
            output = model(x)
        assert len(fused) == ("linear1" in dict(plain.named_modules()))  # the fused kernel really ran
        grads = torch.autograd.grad(model(x).square().sum(), lora_parameters(model))
    dense = ref.dense_call(plain, model, eps, x)
    torch.testing.assert_close(output, dense)
    torch.testing.assert_close(grads, torch.autograd.grad(dense.square().sum(), lora_parameters(model)))
    assert not torch.allclose(output, plain(x), rtol=0.01)  # so the comparison could tell
    if sigma == 0:
        torch.testing.assert_close(merge_lora(model)(x), output)
