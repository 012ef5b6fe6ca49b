"""Flat-LoRA: low-rank fine-tuning that finds minima which are flat in the full weight space.

Li et al., ICML 2025, https://arxiv.org/abs/2409.14396; equation numbers are those of its second version.

    model = inject_lora(model, r=8, alpha=16, targets=["q_proj", "v_proj"])  # or PEFT's get_peft_model
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-4)
    for step, batch in enumerate(batches):  # total_steps batches, counted over all epochs
        optimizer.zero_grad()
        with perturbed(model, sigma_at(step, total_steps, sigma=0.05), seed=step):
            loss_fn(model, batch).backward()
        optimizer.step()
    model = merge_lora(model)  # for PEFT: model.merge_and_unload()

LoRA.    A linear layer has a weight W with m rows (outputs) and n columns (inputs). LoRA freezes W and trains two thin
         matrices, B (m, r) and A (r, n). The layer computes with the merged weight W' = W + s B A, where s = alpha / r.

Flat.    A minimum is flat if the loss stays low when the weights move a little. Such minima often generalise better.
         Inference uses W', so the loss should be flat around W', in all of its m n directions. Noise on A and B would
         miss most of them. While B is near zero, noise on A has almost no effect on W', and noise on B moves the rows
         of W' only within the span of A's r rows.

Noise.   So Flat-LoRA minimises the expected loss under noise on W',

             min over A, B of  E[ L(W' + eps) ]                       (eq. 6)
             eps_ij ~ N(0, sigma^2 |W'_i|^2 / n)                      (eq. 7)

         with a one-sample estimate: each step draws one eps, holds it constant, and updates A and B with the gradient
         at W' + eps. That takes one forward and one backward pass; sharpness-aware minimisation (`sam_step`) takes two.

Filter.  A filter is a row of W': the weights W'_i of one output. Its noise is scaled by its norm |W'_i|, so that strong
         and weak rows are perturbed in proportion. Using |W_i| would ignore what training has added to the row.

Sigma.   Because of the 1 / n, E|eps_i|^2 = sigma^2 |W'_i|^2: each row moves by about a fraction sigma of its norm,
         however many inputs it has. The effect on the outputs does not depend on n either (proposition 3.2). For
         independent inputs with equal variance and mean 0, the noise multiplies the variance of every output by
         1 + sigma^2. A mean mu adds sigma^2 |W'_i|^2 mu^2. The paper's best values of sigma are 0.05 to 0.15.

Frozen.  W is never modified. Since (W' + eps) x = (W + eps) x + s B A x, the layer computes W + eps in new memory,
         multiplies by it and frees it; the backward pass recomputes it. In between, a layer keeps one number per row
         and a start position in a shared table of normal numbers (32 MB in float32, 16 MB in half precision). An
         exception or Ctrl-C leaves no noise behind.

The method ends at the section "For comparison". After it come SAM, the functions that add, save and merge adapters, the
support for PEFT's layers, and the differences from the paper and from the authors' code. `full` and `dense` matter only
for weights that are sharded or stored in 4 bits; otherwise they return what they are given.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- LoRA ----------------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """An nn.Linear with a frozen W and a trainable low-rank update: h = W x + b + s B A x (eq. 1, with s).

    `add_lora` turns an nn.Linear into a LoRALinear in place. W becomes the parameter `frozen_weight`.
    """

    noise: Noise | None  # inside `perturbed`: what is added to W

    def forward(self, x: Tensor) -> Tensor:
        # Adapter first: `_NoisyLinear` casts x without gradients, and older autocast caches that cast. If the adapter
        # ran second, it would get the cached cast and pass no gradient to x.
        down = F.linear(self.lora_dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., r)
        up = F.linear(down * self.scaling, self.lora_B)  # (..., m)
        out = noisy_linear(x, self.frozen_weight, self.bias, self.noise)  # (..., m)
        return (out + up).to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """W' (m, n), plus eps inside `perturbed`, for models that multiply by it instead of calling the layer.

        Differentiable. It includes no `lora_dropout`, which acts on the input of the adapter.
        """
        weight = self.merged_weight(self.lora_A.dtype)
        if self.noise is not None:
            weight = self.noise.added_to(weight)
        return weight.to(self.frozen_weight.dtype)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s B A (m, n), computed in `dtype`, or in that of W."""
        W = full(self.frozen_weight)
        W = W.to(dtype or W.dtype, copy=True)
        A = full(self.lora_A).to(W.dtype)
        B = full(self.lora_B).to(W.dtype)
        return W.addmm_(B, A, alpha=self.scaling)  # autocast would run `addmm` in half precision, but not `addmm_`

    def set_noise(self, noise: Noise | None) -> None:
        self.noise = noise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "noise": None}  # so a copy made inside `perturbed` is clean

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept a checkpoint of the model without adapters, too (with strict=False, since it has no A and B)."""
        if prefix + "weight" in state_dict:
            state_dict[prefix + "frozen_weight"] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_lora(layer: nn.Linear, r: int = 8, alpha: float = 16, dropout: float = 0.0) -> LoRALinear:
    """Turn the layer into a LoRALinear by changing its class, so that every reference to the layer stays valid.

    B starts at zero, so the output does not change. A and B are float32, since half precision would lose small updates.
    """
    W = layer.weight
    m, n = W.shape
    dtype = torch.promote_types(W.dtype, torch.float32)  # float64 if W is
    A = nn.init.kaiming_uniform_(W.new_empty(r, n, dtype=dtype), a=math.sqrt(5))
    B = W.new_zeros(m, r, dtype=dtype)

    layer.requires_grad_(False)
    layer.scaling = alpha / r
    layer.lora_dropout = nn.Dropout(dropout).train(layer.training)
    layer.lora_A = nn.Parameter(A)
    layer.lora_B = nn.Parameter(B)
    layer.noise = None

    layer.plain_class = type(layer)
    layer.__class__ = LoRALinear
    layer.frozen_weight = layer._parameters.pop("weight")
    return layer


# ---- Noise ---------------------------------------------------------------------------------------------------


def sigma_at(step: int, total_steps: int, sigma: float) -> float:
    """Noise strength at an optimizer step, counted from 0: it grows from 0 to `sigma` along a cosine.

    With gradient accumulation, count both `step` and `total_steps` in optimizer steps, not in micro-batches. The paper
    says only "cosine"; the formula is that of the authors' code. ValueError: step is not in 0 to total_steps.
    """
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be from 0 to total_steps, got {step} of {total_steps}")
    return sigma * (1 - math.cos(math.pi * step / total_steps)) / 2


@contextmanager
def perturbed(model: nn.Module, sigma: float, seed: Any) -> Iterator[None]:
    """Inside, every LoRA layer of the model computes with W' + eps. eps is drawn by eq. 7, with W' as it is on entry.

    `seed` is a number or a tuple such as (run, step). Together with the layer's name it determines the random numbers
    behind eps. So give each step a new seed. Its micro-batches share one eps, in one context or in several entered with
    the same seed. No global random generator is used. In distributed training, (run, step, rank) gives each process its
    own eps, so that each step averages over more samples of the noise.

    Activation checkpointing repeats the forward pass during the backward, so call backward inside the context. Outside,
    the repeated pass has no noise, and the gradient may be silently wrong.

    ValueError: sigma is negative or not finite, the seed is None or nan, or the model has no LoRA layer. RuntimeError:
    the model is perturbed already.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    if seed is None:
        raise ValueError("seed must be a number or a tuple, new for each step, got None")
    layers = lora_layers(model)
    if any(layer.noise is not None for layer in layers.values()):
        raise RuntimeError("the model is perturbed already")

    try:
        if sigma > 0:
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.set_noise(draw_noise(layer.merged_weight(), sigma, seed, name))
        yield
    finally:
        for layer in layers.values():
            layer.set_noise(None)
        torch.clear_autocast_cache()  # it may hold copies of A and B, which the optimizer is about to change


class Noise(NamedTuple):
    """eps (m, n) = scale * normals, multiplied out only where it is used."""

    scale: Tensor  # (m, 1), the standard deviation of each row, with a random sign
    normals: Tensor  # (m, n), a view of the table

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, self.normals, self.scale).to(weight.dtype)


def draw_noise(merged: Tensor, sigma: float, seed: Any, name: str = "") -> Noise:
    """eps for the layer `name`, whose W' is `merged` (m, n). It is a fast substitute for

        row_std(merged, sigma) * torch.randn(m, n)

    Drawing that many normals would take longer than everything else in the layer, so they are read from a table of
    TABLE_SIZE normals that is drawn once. Row i is the window of n numbers that begins at start + i * spacing, times a
    random sign. The table wraps around: its last number is followed by its first.

    The seed and the name determine `start` and the signs. All rows are one strided view, so nothing is copied.

    Over random seeds, each eps_ij has nearly the distribution of eq. 7, and any two are uncorrelated. They are not all
    independent, since all layers and steps share the table. In a layer of more than 4 million weights, as in most
    layers of a 7B model, the windows of its rows overlap.
    """
    m, n = merged.shape
    spacing = max(8, TABLE_SIZE // m // 8 * 8)  # compiled kernels need rows that are aligned to 8 numbers
    length = (m - 1) * spacing + n  # from the first number of the first row to the last number of the last row
    table = normal_table(merged.dtype, merged.device)  # (2 * TABLE_SIZE,)

    # The seed and the name are written as JSON. `tolist` converts numpy's and torch's numbers.
    text = json.dumps([seed, name], default=lambda number: number.tolist(), allow_nan=False)
    generator = random.Random(text)
    # The table wraps around by a second copy of itself, in which the last row must end.
    start = generator.randrange(0, min(TABLE_SIZE, len(table) - length), 8)
    start_of_signs = generator.randrange(TABLE_SIZE)

    normals = table.as_strided((m, n), (spacing, 1), start)
    signs = table.as_strided((m, 1), (1, 1), start_of_signs)
    return Noise(row_std(merged, sigma).copysign(signs), normals)


def row_std(merged: Tensor, sigma: float) -> Tensor:
    """Standard deviation of the noise in each row of W': sigma |W'_i| / sqrt(n), (m, n) -> (m, 1)."""
    dtype = torch.promote_types(merged.dtype, torch.float32)  # a norm taken in bfloat16 would be off by 0.3 %
    norm = torch.linalg.vector_norm(merged, dim=1, keepdim=True, dtype=dtype)
    # For one standard deviation per matrix, add:  norm = norm.square().mean().sqrt().expand_as(norm)
    return (norm * (sigma / math.sqrt(merged.shape[1]))).to(merged.dtype)


TABLE_SIZE = 2**22


@functools.cache
def normal_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """TABLE_SIZE normals, twice in a row, so that windows can run past the end: (2 * TABLE_SIZE,)."""
    normals = torch.empty(TABLE_SIZE, dtype=torch.float32, device="cpu")
    normals.normal_(generator=torch.Generator("cpu").manual_seed(0))
    return normals.repeat(2).to(device, dtype)


def noisy_linear(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise | None) -> Tensor:
    """(W + eps) x + b, (..., n) -> (..., m)."""
    if noise is None:
        return F.linear(x, weight, bias)
    if weight.requires_grad:  # W was unfrozen and trains, too
        return F.linear(x, noise.added_to(weight), bias)
    return _NoisyLinear.apply(x, weight, bias, noise)


class _NoisyLinear(torch.autograd.Function):
    """Computes W + eps in the forward and once more in the backward, so that it need not be kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.noise = noise
        noisy = noise.added_to(dense(weight, noise.scale.dtype))  # (m, n)
        return F.linear(x, noisy, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_of_x = grad_of_bias = None
        if ctx.needs_input_grad[0]:
            W = dense(weight, ctx.noise.scale.dtype)
            # The factors are swapped on purpose: torch.compile would merge equal expressions, and so keep W + eps.
            noisy = torch.addcmul(W, ctx.noise.scale, ctx.noise.normals)  # (m, n)
            grad_of_x = grad @ noisy.to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_of_x, None, grad_of_bias, None


# ---- The training step ---------------------------------------------------------------------------------------

LossFn = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> the mean loss of the batch


def flat_lora_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    sigma: float,
    seed: Any,
    max_grad_norm: float = math.inf,
) -> float:
    """One step on the expected loss (eq. 6). Returns the mean loss under eps.

    `batches` is a list of micro-batches of equal size, which share one eps. With a GradScaler, or an optimizer that
    accelerate has prepared, write the loop around `perturbed` yourself: this step would not unscale the gradient.

    Errors as in `perturbed`. ValueError: the optimizer lacks a trainable parameter. FloatingPointError, before the
    parameters change: the loss or the gradient is not finite.
    """
    optimizer.zero_grad()
    with perturbed(model, sigma, seed):
        loss = add_gradient(model, loss_fn, batches)
    update(model, optimizer, max_grad_norm)
    return loss


def add_gradient(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    """Add the gradient of the mean loss over the batches to `.grad`. Returns that loss."""
    if not batches:
        raise ValueError("batches must be a list of at least one batch")
    total = torch.zeros(())
    for batch in batches:
        loss = loss_fn(model, batch) / len(batches)
        loss.backward()
        total = total + loss.detach()
    return finite("loss", total)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Clip the gradient, check that it is finite, and let the optimizer step."""
    parameters = lora_parameters(model)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if not held.issuperset(parameters):
        raise ValueError("the optimizer lacks some trainable parameters: add LoRA, then give it lora_parameters(model)")
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    finite("norm of the gradient", full(norm))
    optimizer.step()


def finite(name: str, value: Tensor) -> float:
    if not value.isfinite():
        raise FloatingPointError(f"the {name} is not finite: {value.item()}")
    return value.item()


# ---- For comparison: SAM, and a measure of sharpness ---------------------------------------------------------


def sam_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    rho: float,
    max_grad_norm: float = math.inf,
) -> float:
    """One step of SAM (Foret et al. 2021) on all trainable parameters. Returns the first pass's loss.

    The first pass gives the gradient g. The second gives the gradient at (A, B) + rho g / |g|, the worst point nearby.
    A and B are then restored and updated with that gradient. So W' moves only as A and B can move it (eq. 3).

    Errors as in `flat_lora_step`. ValueError: rho is negative or not finite.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
    optimizer.zero_grad()
    loss = add_gradient(model, loss_fn, batches)
    parameters = [p for p in lora_parameters(model) if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    shifts = [rho * p.grad / norm.clamp_min(1e-12) for p in parameters]

    optimizer.zero_grad()
    with moved(parameters, shifts):
        add_gradient(model, loss_fn, batches)
    update(model, optimizer, max_grad_norm)
    return loss


@contextmanager
def moved(parameters: Sequence[Tensor], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each parameter is moved by its shift. Afterwards it is restored exactly."""
    before = [p.detach().clone() for p in parameters]
    try:
        write(parameters, [p + shift for p, shift in zip(before, shifts)])
        yield
    finally:
        write(parameters, before)


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.copy_(value)
    torch.clear_autocast_cache()  # as in `perturbed`


@torch.no_grad()
def sharpness(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], sigma: float, samples: int, seed: Any
) -> float:
    """How much noise raises the loss: E[L(W' + eps)] - L(W'), as a mean over `samples` draws of eps.

    The same seed gives the same directions at every sigma. Call `model.eval()` first. Errors as in `perturbed`.
    FloatingPointError: a loss is not finite.
    """

    def mean_loss() -> float:
        losses = [loss_fn(model, batch) for batch in batches]
        return finite("loss", torch.stack(losses).mean())

    clean = mean_loss()
    noisy = 0.0
    for sample in range(samples):
        with perturbed(model, sigma, ("sharpness", seed, sample)):  # a seed that no training step uses
            noisy += mean_loss()
    return noisy / samples - clean


# ---- Adapters in a model -------------------------------------------------------------------------------------


def inject_lora(
    model: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, *, targets: str | Sequence[str]
) -> nn.Module:
    """Freeze the model and add LoRA to the layers named by `targets`. Returns the model.

    `targets` is a list of names, where "q_proj" means every layer of that name, or one regular expression that must
    match the full name. The expression skips layers that cannot get an adapter; in a list, such a layer is an error. To
    train a part in full, such as a new head, unfreeze it afterwards: `model.head.requires_grad_()`.

    ValueError, before anything is changed: no layer has the name, or a layer of that name cannot get an adapter.
    """
    is_list = not isinstance(targets, str)
    modules = dict(model.named_modules())
    holders = Counter(p for module in modules.values() for p in module.parameters(recurse=False))

    chosen = set()
    for target in targets if is_list else [targets]:
        pattern = rf"(.*\.)?{re.escape(target)}" if is_list else target
        named = {name: obstacle(module, holders) for name, module in modules.items() if re.fullmatch(pattern, name)}
        fitting = {name for name, reason in named.items() if not reason}
        if not fitting or (is_list and len(fitting) < len(named)):
            reasons = [f"{name} {reason}" for name, reason in named.items() if reason]
            raise ValueError(f"targets: {target!r} cannot be used: {reasons[:3] or 'no layer has this name'}")
        chosen |= fitting

    if not any(isinstance(module, LoRALinear) for module in modules.values()):
        model.requires_grad_(False)
    for name, module in modules.items():  # in the model's order, whatever the order of the targets
        if name in chosen:
            add_lora(module, r, alpha, dropout)
    return model


def obstacle(module: nn.Module, holders: Mapping[Tensor, int]) -> str:
    """Why a module cannot get an adapter; empty if it can. `holders` counts the modules that hold a parameter."""
    if isinstance(module, LoRALinear):
        return "has an adapter already"
    if type(module).forward is not nn.Linear.forward:
        return f"is of type {type(module).__name__}, not nn.Linear"
    if "forward" in vars(module) or type(module.weight) is not nn.Parameter:
        return "has its own forward, as under accelerate's hooks, or a weight that is not a plain parameter"
    if holders[module.weight] > 1:
        return "shares its weight with another layer"
    return ""


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, for the optimizer: the adapters, and whatever else was unfrozen.

    ValueError: the model has no LoRA layer, or a trainable parameter is in half precision, which loses small updates.
    """
    lora_layers(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"trainable parameters must be float32, got {tuple(p.shape)} in {p.dtype}")
    return parameters


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, and the buffers of modules that train in full, such as BatchNorm's running mean."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            named += module.state_dict(prefix=f"{name}.", keep_vars=True).items()
    return by_bare_name(named)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all trainable parameters, by name, with each layer's scaling. For PEFT, use its `save_pretrained`.

    `{"h.0.q_proj.lora_A": (r, n), "h.0.q_proj.lora_B": (m, r), ..., "h.0.q_proj.scaling": (), ...}`

    The running statistics of a frozen BatchNorm are not in it, though they move in training mode: put it in eval mode.

    ValueError: nothing trains, as in a frozen copy of the model.
    """
    state = {name: full(tensor.detach()).clone() for name, tensor in trained_state(model).items()}
    if not state:
        raise ValueError("nothing trains in this model, so there is nothing to save")
    for name, layer in own_layers(model).items():
        state[f"{name}.scaling".lstrip(".")] = torch.tensor(layer.scaling, dtype=torch.float64, device="cpu")
    return state


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state from `lora_state_dict`. ValueError, before anything is changed: it does not fit the model.

    A state saved by version 0.2 holds alpha instead of scaling and is rejected. To convert it: scaling = alpha / r.
    """
    own = lora_state_dict(model)
    for name in own | dict(state):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise ValueError(f"{name} is missing from the state, not in the model or of a different shape")
    for name, tensor in trained_state(model).items():
        tensor.copy_(state[name])
    for name, layer in own_layers(model).items():
        layer.scaling = state[f"{name}.scaling".lstrip(".")].item()


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Turn each LoRALinear back into a plain, frozen layer, whose weight is W'. Returns the model.

    ValueError: the model is perturbed or from PEFT. FloatingPointError: a W' is not finite in the dtype of W; the layer
    and all after it keep their adapters.
    """
    for name, layer in own_layers(model).items():
        if layer.noise is not None:
            raise ValueError("merge the model outside of `perturbed`")
        merged = layer.weight
        finite(f"merged weight of {name!r}", merged.abs().max())
        layer.__class__ = layer.plain_class
        layer.weight = nn.Parameter(merged, requires_grad=False)
        del layer.frozen_weight, layer.lora_A, layer.lora_B, layer.lora_dropout
        del layer.scaling, layer.noise, layer.plain_class
    return model


# What torch.compile, DistributedDataParallel, checkpoint_wrapper and PEFT insert into the names of modules.
WRAPPERS = r"(?:^|\.)(?:_orig_mod|module|_checkpoint_wrapped_module|base_model\.model)(?=\.|$)"


def by_bare_name(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Index by name, without the parts that wrappers insert: wrapping must change neither a saved state nor the noise,
    which depends on the layer's name. ValueError: two things get the same name."""
    result: dict[str, Any] = {}
    for name, thing in named:
        bare = re.sub(WRAPPERS, "", name).lstrip(".")
        if result.setdefault(bare, thing) is not thing:
            raise ValueError(f"two parts of the model are called {bare!r} without the names of wrappers")
    return result


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | PeftLayer]:
    """The LoRA layers by name, from `inject_lora` or PEFT. ValueError: there are none."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found.append((name, module))
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            layer = PeftLayer(name, module)
            if layer.adapters:  # an active adapter may lie on some layers only
                found.append((name, layer))
    if not found:
        raise ValueError("the model has no LoRA layer: call inject_lora or PEFT's get_peft_model first")
    return by_bare_name(found)


def own_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not all(isinstance(layer, LoRALinear) for layer in layers.values()):
        raise ValueError("this model is from PEFT: use its save_pretrained, from_pretrained and merge_and_unload")
    return layers


# ---- Models with LoRA from PEFT ------------------------------------------------------------------------------


class PeftLayer:
    """One of PEFT's LoRA layers, as `perturbed` sees it. ValueError: it does more than W x + b + s B A x.

    Its frozen layer is an nn.Linear, GPT-2's Conv1D, which holds W transposed, or a Linear4bit of bitsandbytes.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.layer = layer
        self.base = layer.base_layer
        self.kind = frozen_class(self.base)
        plain = self.kind.forward is nn.Linear.forward or self.kind.__name__ in ("Conv1D", "Linear4bit")
        if not plain or "forward" in vars(self.base):
            raise ValueError(f"{name}: there is no noise for LoRA on {self.kind.__name__}, or with accelerate's hooks")
        if layer.lora_variant or layer.merged or layer.disable_adapters:
            raise ValueError(f"{name}: there is no noise for DoRA and other variants, merged or disabled adapters")
        quant_state = getattr(self.base.weight, "quant_state", None)
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError(f"{name}: bitsandbytes repacked W for inference on this CPU, so it cannot get noise")
        self.adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        self.noise = getattr(self.base, "noise", None)

    def merged_weight(self) -> Tensor:
        """W' (m, n)."""
        W = full(weight_of(self.base))
        if hasattr(W, "quant_state"):
            W = dense(W, self.base.compute_dtype or W.quant_state.dtype)
        merged = W.clone()
        for adapter in self.adapters:
            A = full(self.layer.lora_A[adapter].weight).to(W.dtype)
            B = full(self.layer.lora_B[adapter].weight).to(W.dtype)
            merged.addmm_(B, A, alpha=self.layer.scaling[adapter])
        return merged

    def set_noise(self, noise: Noise | None) -> None:
        """Change the class of the frozen layer: to a NoisyBase, or back if there is no noise."""
        attributes = vars(self.base)  # bypasses nn.Module's __setattr__, which would register the owner as a submodule
        if noise is not None:
            attributes.update(noise=noise, owner=self.layer)
            self.base.__class__ = noisy_class(self.kind)
        else:
            attributes.pop("noise", None)
            attributes.pop("owner", None)
            self.base.__class__ = self.kind


class NoisyBase:
    """Mixed into the class of a frozen layer, so that it computes with W + eps."""

    def forward(self, x: Tensor) -> Tensor:
        if self.owner.disable_adapters:  # the reference model of DPO
            return super().forward(x)
        if not hasattr(self.weight, "quant_state"):
            return noisy_linear(x, weight_of(self), self.bias, self.noise)
        dtype = self.noise.scale.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return noisy_linear(x.to(dtype), self.weight, bias, self.noise).to(x.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """So a copy made inside `perturbed` is clean."""
        attributes = {key: value for key, value in vars(self).items() if key not in ("noise", "owner")}
        return object.__new__, (frozen_class(self),), attributes


@functools.cache
def noisy_class(kind: type) -> type:
    return type(f"Noisy{kind.__name__}", (NoisyBase, kind), {})


def frozen_class(base: nn.Module) -> type:
    """The class of a frozen layer outside of the noise."""
    return type(base).__bases__[1] if isinstance(base, NoisyBase) else type(base)


def weight_of(base: nn.Module) -> Tensor:
    """W of a frozen layer of PEFT: (m, n), or packed in 4 bits."""
    return base.weight.t() if frozen_class(base).__name__ == "Conv1D" else base.weight


def full(tensor: Tensor) -> Tensor:
    """The tensor itself or, if PyTorch's fully_shard has split it across processes, the full tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight itself or, if bitsandbytes stores it in 4 bits, its dequantized values (m, n) in `dtype`."""
    if not hasattr(weight, "quant_state"):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), weight.quant_state).to(dtype)


# ---- Differences from the paper and from the authors' code ---------------------------------------------------
#
# From the paper:
# - The normals come from a table instead of being drawn for each step; `draw_noise` explains what differs.
# - eps, W + eps and the W' whose row norms are taken have the dtype of W. In bfloat16, weak noise is rounded away:
#   sigma 0.01 still moves four weights out of five, sigma 0.001 only one. So the first steps of the schedule have less
#   noise than requested.
# - W' includes the scaling s, which the paper's formulas omit and the authors' code includes.
#
# From the authors' code, which adds eps to the stored W before the first micro-batch of a step and, after the last one,
# redraws it from a stored seed and subtracts it:
# - Here W is never modified. Adding and subtracting rounds twice, so a "frozen" bfloat16 W drifts.
# - Here eps is determined by the seed and the layer's name. There it depends on the clock, through torch's global
#   generator: a run cannot be repeated, and its dropout differs from that of a run without noise.
# - Here every adapter gets noise. There only adapters on one class of PEFT's layers do; the others silently train
#   without noise.
# - Here the schedule runs over the given total_steps. There its length ignores a limit on the number of steps, and the
#   number of processes.
# Unchanged: one eps per step, shared by its micro-batches, and a strength that grows from zero along a cosine.
