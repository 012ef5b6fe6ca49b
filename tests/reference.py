"""What the tests share: a tiny model, and the slow, obvious version of each equation."""

import gc
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

import flatlora
from flatlora import add_lora, inject_lora, lora_layers, lora_parameters

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")

# ---- A tiny model ----


def plain_model(dtype=torch.float64, device="cpu"):
    """12 -> 16 -> 4, the second layer without a bias. In float64, so that a comparison can be strict."""
    torch.manual_seed(0)
    first = nn.Linear(12, 16)
    second = nn.Linear(16, 4, bias=False)
    return nn.Sequential(first, nn.Tanh(), second).to(device, dtype)


def adapted_model(dtype=torch.float64, device="cpu"):
    """The tiny model with adapters, whose s is 6 / 3 = 2."""
    model = inject_lora(plain_model(dtype, device), r=3, alpha=6, targets=["0", "2"])
    return with_nonzero_B(model)


def adapted_layer(m=16, n=12, dropout=0.0):
    """One layer of n inputs and m outputs, whose s is 6 / 3 = 2. In float32."""
    torch.manual_seed(0)
    layer = add_lora(nn.Linear(n, m), r=3, alpha=6, dropout=dropout)
    return with_nonzero_B(layer)


def with_nonzero_B(model):
    """B as in the middle of training, not zero, so that W' is not W."""
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def batch(size=16, dtype=torch.float64, device="cpu", seed=1):
    """Inputs (size, 12) and one of four classes for each (size,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 12, generator=generator)
    y = torch.randint(4, (size,), generator=generator)
    return x.to(device, dtype), y.to(device)


def quarters(batch):
    """The batch as four micro-batches of equal size."""
    x, y = batch
    size = len(x) // 4
    return list(zip(x.split(size), y.split(size)))


def loss_fn(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def sgd(model, lr=0.1):
    return torch.optim.SGD(lora_parameters(model), lr=lr)


# ---- The three kinds of step, with the same arguments ----


def lora_step(model, loss_fn, batches, optimizer):
    return flatlora.flat_lora_step(model, loss_fn, batches, optimizer, sigma=0, seed=0)


def flat_step(model, loss_fn, batches, optimizer):
    return flatlora.flat_lora_step(model, loss_fn, batches, optimizer, sigma=0.3, seed=0)


def sam_step(model, loss_fn, batches, optimizer):
    return flatlora.sam_step(model, loss_fn, batches, optimizer, rho=0.3)


# ---- The equations ----


def merged(layer):
    """W' = W + s B A, (m, n)."""
    return layer.frozen_weight + layer.scaling * (layer.lora_B @ layer.lora_A)


def row_std(merged, sigma):
    """Eq. 7, in plain Python: sigma |W'_i| / sqrt(n) for each row of W' (m, n), as (m, 1)."""
    stds = []
    for row in merged.tolist():
        norm = math.sqrt(sum(w * w for w in row))
        stds.append([sigma * norm / math.sqrt(len(row))])
    return torch.tensor(stds, dtype=merged.dtype)


def plain_noise(merged, sigma):
    """Eq. 7 with freshly drawn normals, (m, n): the noise for which that of `perturbed` is a substitute."""
    m, n = merged.shape
    return row_std(merged, sigma) * torch.randn(m, n)


def eps_of(layer):
    """The noise that a layer has inside `perturbed`, (m, n); zero outside of it."""
    if layer.noise is None:
        return torch.zeros_like(layer.frozen_weight)
    return layer.noise.scale * layer.noise.normals


def noise_of(model, sigma=0.3, seed=0):
    """The noise of each layer under this seed."""
    with flatlora.perturbed(model, sigma, seed):
        return {name: eps_of(layer) for name, layer in lora_layers(model).items()}


def dense_output(model, x):
    """The tiny model's output, from its dense weights W' + eps, (size, 12) -> (size, 4)."""
    first, tanh, second = model
    W1 = merged(first) + eps_of(first)
    W2 = merged(second) + eps_of(second)

    hidden = tanh(x @ W1.T + first.bias)  # (size, 16)
    return hidden @ W2.T


def dense_loss(model, batch):
    """`loss_fn`, from the dense weights."""
    x, y = batch
    return nn.functional.cross_entropy(dense_output(model, x), y)


def dense_gradients(model, batch):
    """The gradient of the dense loss with respect to each A and B."""
    return list(torch.autograd.grad(dense_loss(model, batch), lora_parameters(model)))


def dense_call(plain, model, x):
    """The output of any `plain` model with the weights W' + eps of `model`, its copy with adapters."""
    weights = {}
    for name, layer in lora_layers(model).items():
        weights[f"{name}.weight".lstrip(".")] = merged(layer) + eps_of(layer)
    return functional_call(plain, weights, (x,))


# ---- Snapshots ----


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def adapters(model):
    """A copy of all trainable parameters."""
    return copies(lora_parameters(model))


def gradients(model):
    return copies(p.grad for p in lora_parameters(model))


def base_bytes(model):
    """Every frozen tensor as bytes: the strictest comparison there is."""
    frozen = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            frozen[name] = bytes_of(p)
    return frozen


def norm_of(tensors):
    """The norm of all of them as one vector."""
    squares = sum(tensor.square().sum().item() for tensor in tensors)
    return math.sqrt(squares)


def bytes_of(tensor):
    numbers = tensor.detach().cpu().contiguous()
    return numbers.view(torch.uint8).numpy().tobytes()


def assert_same_bits(given, expected):
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def storage_address(tensor):
    """The address of its storage, which all views of a tensor share."""
    return tensor.untyped_storage().data_ptr()


def storage_addresses(size):
    """Storage addresses of all tensors in this process that take up `size` bytes or more."""
    found = set()
    for thing in gc.get_objects():
        ordinary = type(thing) in (Tensor, nn.Parameter)
        if ordinary and thing.layout == torch.strided and thing.nbytes >= size:
            found.add(storage_address(thing))
    return found
