"""Flat-LoRA: low-rank fine-tuning that ends in a minimum which is flat in the full weight space.

Li et al., ICML 2025, https://arxiv.org/abs/2409.14396; equation numbers are those of its second version.

    model = inject_lora(model, r=8, alpha=16, targets=["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-4)
    for step, batch in enumerate(loader):  # step counts on over the epochs
        optimizer.zero_grad()
        with perturbed(model, sigma_at(step, total_steps, sigma=0.05), seed=(run, step)):
            loss_fn(model, batch).backward()
        optimizer.step()
    model = merge_lora(model)

LoRA.    A linear layer with m outputs and n inputs has a weight W (m, n). LoRA freezes W and trains two thin matrices,
         B (m, r) and A (r, n). The layer computes with the merged weight W' = W + s B A, where s = alpha / r.

Flat.    A minimum is flat if the loss stays low when the weights move a little. Such minima tend to generalise better.
         What is used in the end is W', so the loss should be flat around W', in all of its m n directions. Noise on A
         and B would not look there: while B is small, it moves the rows of W' only within the span of the r rows of A.

Noise.   So Flat-LoRA minimises the expected loss under noise on W',

             min over A, B of  E[ L(W' + eps) ]                       (eq. 6)
             eps_ij ~ N(0, sigma^2 |W'_i|^2 / n)                      (eq. 7)

         by a one-sample estimate: each step draws one eps, holds it constant, and updates A and B by the gradient at
         W' + eps. That takes one forward and one backward pass; sharpness-aware minimisation (`sam_step`) takes two.

Filter.  A filter is a row of W': the weights W'_i of one output. Its noise is scaled by its own length |W'_i|, so that
         strong and weak rows are perturbed alike. The length of W_i would miss what training has added to the row.

Sigma.   With the 1 / n, E|eps_i|^2 = sigma^2 |W'_i|^2: each row moves by a fraction sigma of its length, whatever n is.
         The outputs move alike: over independent inputs of mean zero and equal variance, the noise multiplies the
         variance of an output by 1 + sigma^2. Inputs x with another mean add sigma^2 |W'_i|^2 E(x)^2 to it
         (proposition 3.2). The paper's best values of sigma are 0.05 to 0.15.

Frozen.  W is never written. Since (W' + eps) x = (W + eps) x + s B A x, the layer makes W + eps in memory of its own,
         multiplies by it and drops it; the backward does so again. In between, a layer keeps one number per row and its
         place in a table of normals. So an exception or Ctrl-C leaves no noise behind. What may remain is the `.grad`
         of the step that was cut short, until the next `zero_grad`.

The end of this file lists the departures from the paper and from the authors' code.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

# ---- LoRA ----------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen nn.Linear, `base`, and a trainable update of low rank: h = W x + b + s B A x (eq. 1, with s).

    The rest of the model may use it like an nn.Linear whose weight is W'. B starts at zero, so the first output is that
    of `base`. A and B are float32 at least, since half precision would lose small updates.
    """

    def __init__(self, base: nn.Linear, r: int = 8, alpha: float = 16, dropout: float = 0.0) -> None:
        super().__init__()
        if not (r >= 1 and 0 < alpha < math.inf and 0 <= dropout < 1):
            raise ValueError(f"r must be >= 1, alpha > 0, 0 <= dropout < 1; got r={r!r}, {alpha=!r}, {dropout=!r}")
        self.out_features, self.in_features = base.weight.shape
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r

        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = base.weight.new_empty((r, self.in_features), dtype=dtype)
        B = base.weight.new_zeros((self.out_features, r), dtype=dtype)
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B = nn.Parameter(B)
        self.lora_dropout = nn.Dropout(dropout)
        self.base = base.requires_grad_(False)
        self.noise: RowNoise | None = None  # inside `perturbed`: what is added to W
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        # The adapter first: older autocast keeps the cast of x that is made in `_NoisyLinear`, without its gradient.
        down = F.linear(self.lora_dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., r)
        up = F.linear(down * self.scaling, self.lora_B)  # (..., m)
        out = self.base(x) if self.noise is None else noisy_linear(x, self.base, self.noise)  # (..., m)
        return (out + up).to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """W' (m, n), plus eps inside `perturbed`; differentiable. For models that use it without calling the layer."""
        weight = self.merged_weight(self.lora_A.dtype)
        if self.noise is not None:
            weight = self.noise.to(weight.device).added_to(weight)
        return weight.to(self.base.weight.dtype)

    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """W' = W + s B A (m, n), computed in `dtype`."""
        A = self.lora_A.to(dtype)
        B = self.lora_B.to(dtype)
        copy_of_W = self.base.weight.to(dtype, copy=True)
        return copy_of_W.addmm_(B, A, alpha=self.scaling)  # autocast would run `addmm` in half precision, not `addmm_`

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "noise": None}  # so a copy taken inside `perturbed` is clean

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept a checkpoint of the model without adapters too: its "fc.weight" is "fc.base.weight" here."""
        for key in ("weight", "bias"):
            if prefix + key in state_dict:
                state_dict[f"{prefix}base.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)


# ---- The noise -----------------------------------------------------------------------------------------------


def sigma_at(step: int, total_steps: int, sigma: float, schedule: str = "cosine") -> float:
    """Noise strength at `step`, counted in optimizer steps from 0.

    "cosine": sigma (1 - cos(pi step / total_steps)) / 2, which is 0 at the first step, sigma / 2 in the middle and
    just below sigma at the last. The paper says only that the strength grows along a cosine; the formula is that of
    the authors' code. "constant": sigma.
    """
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step must be from 0 to total_steps, got {step} of {total_steps}")
    if schedule == "cosine":
        return sigma * (1 - math.cos(math.pi * step / total_steps)) / 2
    if schedule == "constant":
        return sigma
    raise ValueError(f"schedule must be cosine or constant, got {schedule!r}")


@contextmanager
def perturbed(model: nn.Module, sigma: float, seed: Any) -> Iterator[None]:
    """Inside, every `LoRALinear` computes with W' + eps. eps is drawn by eq. 7 from W' as it is on entry.

    `seed`, a number or a tuple such as (run, step), and the layer's name fix eps. So it is the same in all that runs
    inside, such as the micro-batches of a step, on every device and in every thread, and no other layer changes it.
    No global generator is used. Under DistributedDataParallel, (run, step, rank) gives each rank an eps of its own:
    more samples of the expectation.

    A backward may come after the context. Only under activation checkpointing, which runs the forward again, it must
    lie inside: outside, `use_reentrant=False` raises an error, and `use_reentrant=True` gives a wrong gradient without
    a word. A model may be compiled, before or after its first noise, from PyTorch 2.5 on.

    ValueError: sigma is negative or not finite, the seed is no number, or the model has no adapters. RuntimeError: the
    model is perturbed already.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    seed = _plain_seed(seed)
    layers = lora_layers(model)
    _check_not_perturbed(layers)

    try:
        if sigma > 0:
            with torch.no_grad():
                for name, layer in layers.items():
                    # In one line, since a name for W' would keep it in memory until the context ends.
                    layer.noise = draw_noise(layer.merged_weight(layer.base.weight.dtype), sigma, seed, name)
        yield
    finally:
        for layer in layers.values():
            layer.noise = None
        # Autocast around a whole loop keeps half-precision copies of A and B, which the optimizer is about to change.
        torch.clear_autocast_cache()


def _check_not_perturbed(layers: Mapping[str, LoRALinear]) -> None:
    if any(layer.noise is not None for layer in layers.values()):
        raise RuntimeError("the model is perturbed already")


def _plain_seed(seed: Any) -> Any:
    """The seed in Python's own numbers, so that 1, 1.0, True, np.int64(1) and torch.tensor(1) are the same."""
    if hasattr(seed, "tolist"):  # of numpy or torch
        seed = seed.tolist()
    if isinstance(seed, (tuple, list)):
        return [_plain_seed(part) for part in seed]
    if isinstance(seed, (int, float)) and math.isfinite(seed):
        return int(seed) if seed == int(seed) else seed
    if isinstance(seed, str):
        return seed
    raise ValueError(f"seed must be a finite number, a text, or a tuple of these, got {seed!r}")


CIRCLE = 2**22  # length of the table of normals, about 4 million


class RowNoise(NamedTuple):
    """eps = signed_std * normals. The product is made anew for each use, in the dtype of W."""

    signed_std: Tensor  # (m, 1), the std of each row with a random sign
    normals: Tensor  # (m, n), a view of the table

    def added_to(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """weight + eps (m, n), rounded once."""
        return torch.addcmul(weight, self.normals, self.signed_std, out=out)

    def to(self, device: torch.device) -> RowNoise:
        return RowNoise(self.signed_std.to(device), self.normals.to(device))


def draw_noise(weight: Tensor, sigma: float, seed: Any, name: str = "") -> RowNoise:
    """Noise by eq. 7 for the rows of `weight`, that is W' (m, n) of the layer `name`, in its dtype and on its device.

    To draw fresh normals would be most of the cost of a step, so they are read from a table that is drawn once. Think
    of it as a circle of CIRCLE numbers. Each row of a layer is a window of n numbers; the windows stand at equal
    distances around the circle, from a random place on:

        row i = circle[start + i * distance : start + i * distance + n],    distance about CIRCLE / m

    All rows together are one strided view, so nothing is copied. Each row also gets a random sign: that of row i is the
    sign of the i-th number from a second random place on. The signs make the rows of a layer uncorrelated; the random
    places do so for layers and steps.

    Fresh normals would differ in this: in a layer of about CIRCLE weights (2,048 x 2,048) or more, the windows of
    neighbouring rows overlap. Such rows are uncorrelated, but not independent.
    """
    rows, columns = weight.shape
    distance = 8 * (CIRCLE // rows // 8)  # multiples of 8, since compiled kernels read 16 aligned bytes at once
    span = (rows - 1) * distance + columns

    generator = random.Random(json.dumps([_plain_seed(seed), name]))
    places = min(CIRCLE, 2 * CIRCLE - span)  # the table holds the circle twice, so that windows may pass its end
    start = generator.randrange(0, places, 8)
    start_of_signs = generator.randrange(CIRCLE)

    table = _table(weight)  # (2 * CIRCLE,)
    normals = table.as_strided((rows, columns), (distance, 1), start)  # (m, n), a view
    signs = table.as_strided((rows, 1), (1, 1), start_of_signs)  # (m, 1), a view
    std = filter_std(weight, sigma).to(weight.dtype)  # (m, 1)
    return RowNoise(std.copysign(signs), normals)


def filter_std(weight: Tensor, sigma: float) -> Tensor:
    """std of the noise of each row of W' (eq. 7): sigma |W'_i| / sqrt(n), (m, n) -> (m, 1).

    For one std per matrix, put `norms = norms.square().mean().sqrt().expand_as(norms)` before the last line.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)  # norms taken in bfloat16 are off by about 0.3 %
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=dtype)  # (m, 1)
    return norms * (sigma / math.sqrt(weight.shape[1]))


def _table(weight: Tensor) -> Tensor:
    """The circle twice over, (2 * CIRCLE,), in the dtype and on the device of `weight`."""
    table = _real_table(weight.dtype, weight.device)
    fake_mode = getattr(weight, "fake_mode", None)
    if fake_mode:  # PyTorch's tensors without numbers, for export and estimates of memory
        table = fake_mode.from_tensor(table)
    return table


@functools.cache
def _real_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Drawn once and kept, in a new thread, where the caller's inference mode, default device and the like are off."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_draw_table, dtype, device).result()


def _draw_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    normals = torch.empty(CIRCLE, dtype=torch.float32, device="cpu").normal_(generator=generator)
    return normals.repeat(2).to(device, dtype)


def noisy_linear(x: Tensor, linear: nn.Linear, noise: RowNoise) -> Tensor:
    """(W + eps) x + b, (..., n) -> (..., m). eps is a constant to the backward."""
    noise = noise.to(linear.weight.device)  # nn.DataParallel runs copies of a layer on other devices
    if torch.jit.is_tracing() or any(p.requires_grad for p in linear.parameters()):  # someone trains W or b too
        return F.linear(x, noise.added_to(linear.weight), linear.bias)  # autograd keeps W + eps
    return _NoisyLinear.apply(x, linear.weight, linear.bias, noise)


class _NoisyLinear(torch.autograd.Function):
    """(W + eps) x + b for a frozen layer. The backward makes W + eps again, so that no layer keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, noise: RowNoise) -> Tensor:
        ctx.save_for_backward(weight, *noise)
        noisy = noise.added_to(weight, out=_memory_for(weight))  # (m, n)
        return F.linear(x, noisy, bias)  # (..., m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, signed_std, normals = ctx.saved_tensors
        # As in `added_to`, with the factors swapped: a compiler would compute two equal sums once and keep the result.
        noisy = torch.addcmul(weight, signed_std, normals, out=_memory_for(weight))  # (m, n)
        return grad @ noisy.to(grad.dtype), None, None, None  # (..., n)


class _Memory(threading.local):
    """For each thread, one buffer per dtype."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_memory = _Memory()


def _memory_for(weight: Tensor) -> Tensor | None:
    """This thread's buffer, to make W + eps in, or None for new memory.

    On a CPU it takes longer to allocate a matrix than to make W + eps. On a GPU it does not.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled():  # this backward is itself differentiated: its graph will keep W + eps
        return None
    if type(weight) not in (Tensor, nn.Parameter):  # a tensor with ways of its own, such as a fake one
        return None
    if weight.dtype not in _memory.by_dtype:
        with torch.inference_mode(False):  # whose tensors could not be used outside of it
            _memory.by_dtype[weight.dtype] = torch.empty(0, dtype=weight.dtype, device="cpu")
    return _memory.by_dtype[weight.dtype].resize_(weight.shape)


# ---- The step ------------------------------------------------------------------------------------------------

LossFn = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> the mean loss of the batch, one number


def flat_lora_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: Optimizer,
    sigma: float,
    seed: Any,
    max_grad_norm: float = math.inf,
    scaler: GradScaler | None = None,
) -> float:
    """One step on the expected loss (eq. 6): the gradient at W' + eps updates A and B. Returns the noisy loss.

    `batches` is a list of micro-batches, which share one eps and count alike. `scaler` is for float16 autocast, which
    `loss_fn` enters. Errors as in `perturbed`, and ValueError: an argument, or the optimizer does not hold what trains.
    FloatingPointError, before the update: the loss or the gradient is not finite; with a `scaler` the loss alone, since
    the scaler passes over a step whose gradient is not finite.
    """
    _check_step(model, batches, optimizer, max_grad_norm)
    with perturbed(model, sigma, seed):
        optimizer.zero_grad()
        loss = _backward(model, loss_fn, batches, scaler)
    _update(optimizer, max_grad_norm, scaler)
    return loss


def _check_step(model: nn.Module, batches: Any, optimizer: Optimizer, max_grad_norm: float) -> None:
    """ValueError for what would train nothing, or something else, without a word."""
    _check_batches(batches)
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm!r}")

    held = _held_by(optimizer)
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if left_out:
        raise ValueError(f"the optimizer does not hold {left_out[:3]}, {len(left_out)} in all, which train")
    frozen = sum(not p.requires_grad for p in held)
    if frozen:
        raise ValueError(f"the optimizer holds {frozen} frozen parameters: give it lora_parameters(model)")

    gradient_state = getattr(optimizer, "gradient_state", None)  # of an optimizer that accelerate has prepared
    if gradient_state is not None and not gradient_state.sync_gradients:
        raise ValueError(
            "inside accelerate's `accumulate` an optimizer skips steps: use `perturbed` there, or leave "
            "it out and give all micro-batches to the step"
        )


def _held_by(optimizer: Optimizer) -> dict[nn.Parameter, None]:
    """Its parameters, in order."""
    return dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])


def _check_batches(batches: Any) -> None:
    if not isinstance(batches, (list, tuple)) or not batches:
        raise ValueError(f"batches must be a list of one batch or more, got {type(batches).__name__}")


def _backward(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], scaler: GradScaler | None) -> float:
    """Add the gradient of the mean loss of the micro-batches to the `.grad`s, return that loss."""
    losses = []
    for i, batch in enumerate(batches):
        wait = nullcontext()
        if i < len(batches) - 1 and hasattr(model, "no_sync"):
            wait = model.no_sync()  # DistributedDataParallel: one exchange of gradients, at the last micro-batch
        with wait:
            loss = _checked_loss(loss_fn(model, batch)) / len(batches)
            scaled = loss if scaler is None else scaler.scale(loss)
            scaled.backward()
        losses.append(loss.detach())
    return _require_finite("loss", torch.stack(losses).sum())


def _checked_loss(loss: Tensor) -> Tensor:
    """The loss with the shape (). ValueError: it is not one number."""
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return the mean over the batch, one number, got {tuple(loss.shape)}")
    return loss.reshape(())


def _require_finite(name: str, value: Tensor) -> float:
    if not value.isfinite():
        raise FloatingPointError(f"the {name} is not finite: {value.item()}")
    return value.item()


def _update(optimizer: Optimizer, max_grad_norm: float, scaler: GradScaler | None) -> None:
    """Clip, check and apply the gradients."""
    if scaler is not None:
        scaler.unscale_(optimizer)  # before the norm is taken
    norm = nn.utils.clip_grad_norm_(_held_by(optimizer), max_grad_norm)

    if scaler is None:
        _require_finite("norm of the gradient", norm)
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


# ---- To compare with: SAM, and how flat a minimum is ---------------------------------------------------------


def sam_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: Optimizer,
    rho: float,
    max_grad_norm: float = math.inf,
) -> float:
    """One step of sharpness-aware minimisation (Foret et al. 2021) of A and B. Returns the loss of the first pass.

    The first pass gives the gradient g, over all layers. The second one gives the gradient at (A, B) + rho g / |g|, by
    which A and B are updated from where they were. So W' is moved only as a change of A and B can move it (eq. 3).
    The `modules_to_save` are moved too, on which Flat-LoRA puts no noise. Under DistributedDataParallel g is the mean
    over the ranks. Errors as in `flat_lora_step`.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
    _check_step(model, batches, optimizer, max_grad_norm)
    _check_not_perturbed(lora_layers(model))
    parameters = lora_parameters(model)

    optimizer.zero_grad()
    loss = _backward(model, loss_fn, batches, scaler=None)
    moving = [p for p in parameters if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in moving]).norm()
    shifts = [rho * p.grad / norm.clamp_min(1e-12) for p in moving]

    optimizer.zero_grad()
    with moved(moving, shifts):
        _backward(model, loss_fn, batches, scaler=None)
    _update(optimizer, max_grad_norm, scaler=None)
    return loss


@contextmanager
def moved(parameters: Sequence[Tensor], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each parameter is moved by its shift; afterwards it has its bits again."""
    before = [p.detach().clone() for p in parameters]
    try:
        _write(parameters, [p + shift for p, shift in zip(before, shifts)])
        yield
    finally:
        _write(parameters, before)


@torch.no_grad()
def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.copy_(value)
    torch.clear_autocast_cache()  # see `perturbed`


@torch.no_grad()
def sharpness(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], sigma: float, samples: int, seed: Any
) -> float:
    """Mean rise of the loss, E[L(W' + eps)] - L(W'), over `samples` draws of eps by eq. 7.

    One seed gives the same directions at every sigma, and never those of a training step. Call `model.eval()` first.
    Errors as in `perturbed`, and for batches, samples (ValueError) and a loss that is not finite (FloatingPointError).
    """
    _check_batches(batches)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}")

    clean = _mean_loss(model, loss_fn, batches)
    noisy = []
    for sample in range(samples):
        with perturbed(model, sigma, ("sharpness", seed, sample)):
            noisy.append(_mean_loss(model, loss_fn, batches))
    return sum(noisy) / samples - clean


def _mean_loss(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    losses = [_checked_loss(loss_fn(model, batch)) for batch in batches]
    return _require_finite("loss", torch.stack(losses).mean())


# ---- Adapters: into a model, to a file, merged -----------------------------------------------------------------


def inject_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ".*",
    modules_to_save: str | Sequence[str] = (),
) -> nn.Module:
    """Freeze `model`, put a `LoRALinear` in place of each nn.Linear named by `targets`, return the model.

    `targets`: a regular expression for the whole name, or a list of names, where "q_proj" is every layer called so.
    `modules_to_save` (PEFT's word): likewise, the modules that train whole, such as a new classification head. They
    get no adapters and no noise. A later call adds its own layers and changes nothing else. What is no nn.Linear is
    passed over, and so is a weight that two modules hold, such as GPT-2's lm_head and wte, which an adapter would part.

    ValueError, before anything is changed: r, alpha or dropout; a name that fits nothing; a layer that does more than
    W x + b or has a weight that is quantised, complex, empty or too large.
    """
    whole = _select("modules_to_save", modules_to_save, dict(_named_modules(model)))
    chosen = _select("targets", targets, _possible_targets(model, whole.values()))
    if not chosen:
        raise ValueError(f"targets must name one layer or more, got {targets!r}")
    for name, layer in chosen.items():
        _check_linear(name, layer)

    adapters = {}
    for layer in dict.fromkeys(chosen.values()):  # each once: a layer may have several names
        adapters[layer] = LoRALinear(layer, r, alpha, dropout)
    if not _has_adapters(model):
        model.requires_grad_(False)
    _replace(model, adapters)
    for module in whole.values():
        module.requires_grad_(True)
    return adapters.get(model, model)  # the model may be an nn.Linear itself


WRAPPERS = {  # PyTorch's modules around a module, and what each calls the one inside
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # checkpoint_wrapper
    "OptimizedModule": "_orig_mod",  # torch.compile
}


def _named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module, as `named_modules` gives them, but as if there were no wrappers.

    A module with several names comes once under each. What is inside of a LoRALinear does not come.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
            yield from _named_modules(model._modules[WRAPPERS[kind.__name__]], name)
            return

    yield name, model
    if isinstance(model, LoRALinear):
        return
    for key, child in model._modules.items():  # `named_children` would leave out a second name
        if child is not None:
            yield from _named_modules(child, f"{name}.{key}".lstrip("."))


def _possible_targets(model: nn.Module, whole: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The nn.Linear layers whose weight no other module holds, without those that train whole, now or already."""
    training = set()
    for module in whole:
        if _has_adapters(module):
            raise ValueError("modules_to_save: a module with adapters inside cannot train whole")
        training.update(module.modules())

    modules = dict(_named_modules(model))
    if _has_adapters(model):  # what an earlier call left to train
        training.update(module for module in modules.values() if _trains_whole(module))

    holders = Counter(p for module in set(modules.values()) for p in module.parameters(recurse=False))
    possible = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or module in training:
            continue
        is_tied = holders[module.weight] > 1
        if not is_tied:
            possible[name] = module
    return possible


def _has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def _trains_whole(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.requires_grad for p in parameters)


def _select(argument: str, wanted: str | Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `modules` that the expression or the names stand for. ValueError: one that stands for none."""
    patterns = [wanted]
    if not isinstance(wanted, str):
        patterns = [rf"(.*\.)?{re.escape(name)}" for name in wanted]  # "attn" is "h.0.attn", but not "h.0.xattn"
    found = set()
    for pattern in patterns:
        names = [name for name in modules if re.fullmatch(pattern, name)]
        if not names:
            some = ", ".join([*modules][:8])
            raise ValueError(f"{argument}: {pattern!r} fits none of the {len(modules)} that can be: {some} ...")
        found.update(names)
    return {name: module for name, module in modules.items() if name in found}


def _check_linear(name: str, layer: nn.Module) -> None:
    """ValueError unless `layer` computes W x + b and no more, with a W for which there is noise."""
    hooks = [layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks]
    own_forward = getattr(layer.forward, "__func__", None) is not nn.Linear.forward
    if any(hooks) or own_forward or "weight" not in layer._parameters:
        raise ValueError(f"{name} has hooks, a parametrization or its own forward, which an adapter would drop")
    check_numbers(f"{name}.weight", layer.weight)
    rows, columns = layer.weight.shape  # see `draw_noise`: rows start 8 numbers apart or more, within one circle
    if not (1 <= rows <= CIRCLE // 8 and 1 <= columns <= CIRCLE):
        raise ValueError(
            f"{name}.weight must have 1 to {CIRCLE // 8} rows and 1 to {CIRCLE} columns, got {rows, columns}"
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_numbers(name: str, p: Any) -> None:
    """ValueError unless `p` is a parameter of plain floating-point numbers: not quantised, not a DTensor (FSDP 2)."""
    fake = hasattr(p, "fake_mode")  # see `_table`
    if not (type(p) is nn.Parameter or fake) or p.dtype not in FLOATS:
        what = f"{type(p).__name__} of {getattr(p, 'dtype', 'no dtype')}"
        raise ValueError(f"{name} must be an nn.Parameter in float16, bfloat16, float32 or float64, got a {what}")


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` in the place of each module that it lists, under all of its names."""
    for parent in list(model.modules()):  # listed first, since the new modules hold the old ones
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The `LoRALinear`s by name. ValueError: there are none, or one is sharded, offloaded or on the meta device."""
    layers = {name: module for module, name in module_names(model).items() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRALinear layer: call inject_lora first")
    for name, layer in layers.items():
        m, n = layer.out_features, layer.in_features
        _check_present(f"lora_A of {name!r}", layer.lora_A, (layer.r, n))
        _check_present(f"lora_B of {name!r}", layer.lora_B, (m, layer.r))
        _check_present(f"base.weight of {name!r}", layer.base.weight, (m, n))
    return layers


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """The first name of each module."""
    names: dict[nn.Module, str] = {}
    for name, module in _named_modules(model):
        names.setdefault(module, name)
    return names


def _check_present(name: str, p: Any, shape: tuple[int, int]) -> None:
    """ValueError unless all of `p` is in memory: FSDP leaves a part on each rank, offloading by accelerate none."""
    check_numbers(name, p)
    if p.shape != shape or p.device.type == "meta":
        raise ValueError(f"{name} must be all in memory, got {tuple(p.shape)} of {shape} on {p.device}")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """lora_A and lora_B of each layer, and the modules that train whole with their buffers (BatchNorm's), by name."""
    trained: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        trained.update(layer.named_parameters(prefix=name, recurse=False))
    for module, name in module_names(model).items():
        if _trains_whole(module):
            trained.update(module.state_dict(prefix=f"{name}.".lstrip("."), keep_vars=True))
    return trained


def _alphas(model: nn.Module) -> dict[str, Tensor]:
    """What a state holds beside `_trained`, as tensors since the formats of files want them."""
    alphas = {}
    for name, layer in lora_layers(model).items():
        alphas[f"{name}.alpha".lstrip(".")] = torch.tensor(layer.alpha, dtype=torch.float64, device="cpu")
    return alphas


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets: lora_A and lora_B of each layer and the `modules_to_save`, in a fixed order."""
    return [p for p in dict.fromkeys(_trained(model).values()) if p.requires_grad]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of lora_A, lora_B and alpha of each layer, and of the `modules_to_save`.

    `{"h.0.q_proj.lora_A": (r, n), "h.0.q_proj.lora_B": (m, r), ..., "h.0.q_proj.alpha": (), ...}`
    """
    alphas = _alphas(model)
    copies = {name: tensor.detach().clone() for name, tensor in _trained(model).items()}
    return copies | alphas


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy in what `lora_state_dict` gave. ValueError, before any is written: it does not fit the model."""
    alphas = _alphas(model)
    trained = _trained(model)
    expected = trained | alphas
    given = alphas | dict(state)  # an older state holds no alpha: the model's is taken
    for name in sorted(expected.keys() | given.keys()):
        if name not in given or name not in expected or given[name].shape != expected[name].shape:
            raise ValueError(f"{name} is missing, not in the model or of another shape")
    for name, alpha in alphas.items():
        if given[name] != alpha:
            raise ValueError(f"{name} is {given[name].item()} in the state and {alpha.item()} in the model")

    for name, tensor in trained.items():
        tensor.copy_(state[name])
    torch.clear_autocast_cache()  # see `perturbed`


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Put a plain, frozen nn.Linear with weight W' in place of each `LoRALinear`, return the model.

    RuntimeError, before anything is changed: the model is perturbed, or a W' is not finite.
    """
    plain = {}
    layers = lora_layers(model)
    _check_not_perturbed(layers)
    for name, layer in layers.items():
        weight = layer.weight
        if not weight.isfinite().all():
            raise RuntimeError(f"{name} cannot be merged: W' is not finite in {weight.dtype}")
        linear = copy.deepcopy(layer.base).requires_grad_(False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        plain[layer] = linear

    _replace(model, plain)
    return plain.get(model, model)  # the model may be a LoRALinear itself


# ---- Departures ----------------------------------------------------------------------------------------------
#
# From the paper:
# - The normals are windows of one table instead of fresh ones, which would cost more than all else; `draw_noise` says
#   what is not exact about it.
# - The std, the normals, W + eps and the W' whose length is taken have the dtype of W, which halves the memory traffic
#   of a half-precision model. In bfloat16 a small sigma rounds away: 0.01 still moves four weights of five, 0.001 one
#   of five. So the first steps of the cosine have less noise than asked for.
# - W' has the scaling s, which the formulas of the paper leave out and its code has.
#
# From the authors' code. Theirs adds eps to the stored W before the first micro-batch of a step. After the last one it
# draws the same eps again, from a seed that it kept, and subtracts it.
# - Here W keeps its bits. To add and subtract rounds twice, by which a "frozen" bfloat16 W drifts.
# - Here eps follows from (seed, name of the layer). There it follows from the clock, by way of torch's global
#   generator: a run cannot be repeated, and its dropout is not that of a run without noise.
# - Here every adapter gets noise. There only adapters on one class of PEFT's layers do; others train without it, and
#   nothing says so.
# - Here the schedule counts optimizer steps up to a `total_steps` that is given. There its length takes no account of a
#   limit on the number of steps, nor of the number of processes.
# Alike are: one eps per step, shared by its micro-batches, and a strength that grows from zero along a cosine.
