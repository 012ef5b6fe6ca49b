"""The slow, obvious versions that the tests compare with: dense weights, autograd, nothing clever."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatlora import LoRALinear, inject_lora

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def small_mlp(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    """8 -> 12 -> 8 -> 4. In float64, so that a comparison can be strict."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    return model.to(device=device, dtype=dtype)


def adapted_mlp(dtype: torch.dtype = torch.float64, device: str = "cpu", r: int = 3, dropout: float = 0.0) -> nn.Module:
    """The same with adapters in the middle of training: B is not zero, so W' is not W."""
    model = inject_lora(small_mlp(dtype, device), r, alpha=6, dropout=dropout)
    for layer in layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def batch(n: int = 16, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return x.to(device, dtype), torch.randint(4, (n,), generator=generator).to(device)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def dense_weight(layer: LoRALinear) -> Tensor:
    """E1: W + (alpha / r) B A, element by element as the formula says."""
    return layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A)


def read_eps(model: nn.Module) -> dict[str, Tensor]:
    """The noise of each layer, read from outside: what a perturbed layer does to the identity, less W'."""
    noise = {}
    with torch.no_grad():
        for name, layer in layers(model).items():
            identity = torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
            bias = 0 if layer.bias is None else layer.bias
            noise[name] = (layer(identity) - bias).T.to(layer.lora_A.dtype) - dense_weight(layer)
    return noise


def dense_loss(model: nn.Module, batch: tuple[Tensor, Tensor], eps: dict[str, Tensor]) -> Tensor:
    """The loss of a plain dense network at W + sBA + eps. Differentiable by A, B, the eps and the input."""
    plain = copy.deepcopy(small_mlp(batch[0].dtype, batch[0].device.type))
    weights = {f"{name}.weight": dense_weight(layer) + eps[name] for name, layer in layers(model).items()}
    biases = {f"{name}.bias": layer.bias for name, layer in layers(model).items() if layer.bias is not None}
    return nn.functional.cross_entropy(functional_call(plain, weights | biases, (batch[0],)), batch[1])


def frozen_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every frozen tensor as bytes: the strictest comparison there is."""
    return {
        name: p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
