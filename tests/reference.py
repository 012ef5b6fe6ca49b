"""The slow, obvious versions that the tests compare with: dense weights, plain loops, nothing clever."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

import flatlora
from flatlora import LoRALinear, inject_lora, lora_parameters, perturbed

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {  # (model, loss_fn, batches, optimizer) -> loss
    "lora": lambda *arguments: flatlora.flat_lora_step(*arguments, sigma=0, seed=0),
    "flat": lambda *arguments: flatlora.flat_lora_step(*arguments, sigma=0.3, seed=0),
    "sam": lambda *arguments: flatlora.sam_step(*arguments, rho=0.3),
    "sam full": lambda *arguments: flatlora.sam_step(*arguments, rho=0.3, space="full"),
}
SHARPNESS = {
    "sharpness": lambda *arguments: flatlora.sharpness(*arguments[:3], sigma=0.3, samples=2, seed=0),
    "sharpness lora": lambda *arguments: flatlora.sharpness(*arguments[:3], 0.3, 2, 0, space="lora"),
}


def plain_model(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    """192 -> 256 -> 8 -> 4: the first weight is 256 x 192. In float64, so that a comparison can be strict."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 256), nn.Tanh(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    return model.to(device, dtype)


def adapted_model(dtype: torch.dtype = torch.float64, device: str = "cpu", dropout: float = 0.0) -> nn.Module:
    return in_training(inject_lora(plain_model(dtype, device), r=3, alpha=6, dropout=dropout))


def in_training(model: nn.Module) -> nn.Module:
    """B as in the middle of training, not zero, so that W' is not W."""
    torch.manual_seed(1)
    for layer in layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def batch(n: int = 16, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 192, generator=generator)  # (n, 192)
    return x.to(device, dtype), torch.randint(4, (n,), generator=generator).to(device)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(lora_parameters(model), lr=lr)


def adapters(model: nn.Module) -> list[Tensor]:
    """A copy of every A and B as they are now."""
    return [p.detach().clone() for p in lora_parameters(model)]


def frozen_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the base as bytes: the strictest comparison there is."""
    base = {name: p.detach().cpu() for name, p in model.named_parameters() if "lora_" not in name}
    return {name: p.contiguous().view(torch.uint8).numpy().tobytes() for name, p in base.items()}


def dense_weight(layer: LoRALinear) -> Tensor:
    """W' = W + s B A, (m, n), as the formula says."""
    return layer.base.weight + layer.scaling * (layer.lora_B @ layer.lora_A)


def dense_call(plain: nn.Module, model: nn.Module, eps: dict[str, Tensor], x: Tensor) -> Tensor:
    """What `plain`, the model without adapters, computes at the weights W' + eps. Differentiable by all of them."""
    weights = {f"{name}.weight": dense_weight(layer) + eps[name] for name, layer in layers(model).items()}
    biases = {f"{name}.bias": layer.base.bias for name, layer in layers(model).items() if layer.base.bias is not None}
    return functional_call(plain, weights | biases, (x,))


def dense_loss(model: nn.Module, batch: tuple[Tensor, Tensor], eps: dict[str, Tensor]) -> Tensor:
    """`loss_fn` of an `adapted_model` at the weights W' + eps."""
    plain = plain_model(batch[0].dtype, batch[0].device.type)
    return nn.functional.cross_entropy(dense_call(plain, model, eps, batch[0]), batch[1])


@torch.no_grad()
def read_eps(model: nn.Module) -> dict[str, Tensor]:
    """The noise of each layer, read from outside: what the layer does to the identity, less the bias and W'."""
    noise = {}
    for name, layer in layers(model).items():
        identity = torch.eye(layer.in_features).to(layer.base.weight)  # (n, n)
        bias = 0 if layer.base.bias is None else layer.base.bias
        noise[name] = (layer(identity) - bias).T - dense_weight(layer)  # (m, n)
    return noise


def draw(model: nn.Module, sigma: float = 0.3, seed: object = 0) -> dict[str, Tensor]:
    with perturbed(model, sigma, seed):
        return read_eps(model)


def fresh_eps(layer: LoRALinear, sigma: float, generator: torch.Generator) -> Tensor:
    """Eq. 7 as it stands in the paper: fresh normals for each row of W', (m, n)."""
    rows = dense_weight(layer).tolist()
    stds = [sigma * math.sqrt(sum(w * w for w in row)) / math.sqrt(len(row)) for row in rows]
    return torch.stack([torch.normal(0.0, std, (len(rows[0]),), generator=generator) for std in stds])
