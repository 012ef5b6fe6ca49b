"""Flat-LoRA: low-rank fine-tuning that looks for a minimum which is flat in the full weight space.
Li et al., ICML 2025, https://arxiv.org/abs/2409.14396; equation numbers are those of its version 2.

LoRA: a linear layer with m outputs and n inputs has a weight W (m, n). LoRA freezes W and trains two thin matrices, B
(m, r) and A (r, n); the layer computes with the merged weight W' = W + s B A, where s = alpha / r.
Flat: a minimum is flat if the loss stays low when the weights move a little. Such minima tend to generalise better.
What is used in the end is W', so the loss should be flat around W', in all of its m n directions. Noise on A and B
does not look there: while B is small it moves each row of W' only within the span of the r rows of A (eq. 4).
Filter: a row of W', the weights of one output. Its noise is scaled by its own norm, so that strong and weak rows are
perturbed alike. Scaled by the rows of W, the noise would miss what training has added to them.

    min over A, B of  E[ L(W + s B A + eps) ],    eps_ij ~ N(0, sigma^2 |W'_i|^2 / n)               (eq. 6, eq. 7)

Sigma: the strength. With the 1 / n, E|eps_i|^2 = sigma^2 |W'_i|^2 whatever n is: each row moves by a fraction sigma
of itself, and each output with it (proposition 3.2). A step draws one eps and applies the gradient at W' + eps to A
and B: one forward and backward, where sharpness-aware minimisation (SAM) needs two. In a loop of your own:

    model = inject_lora(model, r=8, alpha=16, targets=["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-4)
    for step, batch in enumerate(loader):
        with perturbed(model, sigma_at(step, total_steps, sigma=0.05), seed=(run, step)):
            loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    merge_lora(model)  # inference is plain; `flat_lora_step` is the loop's body with micro-batches, clipping, checks

W is never written. Each product makes W + eps in memory of its own; from forward to backward a layer keeps two numbers
per row, from which eps is made again. So an exception or Ctrl-C leaves nothing to undo.
Departures. From the paper: eps is cut from a table of normals (`_plus_noise`). From the authors' code, which adds eps
to W and later regenerates and subtracts it: W keeps its bits (theirs drifts in bfloat16); eps follows from (seed,
layer), not from the clock; every nn.Linear is covered or refused; the schedule counts optimizer steps.
"""

import copy
import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_thread, _tables = threading.local(), dict[tuple[torch.dtype, torch.device], Tensor]()  # see `_plus_noise`


class LoRALinear(nn.Module):
    """A frozen nn.Linear, `base`, with a trainable update of low rank: h = W x + b + s B A x (eq. 1). To the rest of
    the model it is an nn.Linear with the weight W'. B starts at zero, so the first output is that of `base`."""

    def __init__(self, base: nn.Linear, r: int = 8, alpha: float = 16, dropout: float = 0.0) -> None:
        super().__init__()
        if not (r >= 1 and 0 < alpha < math.inf and 0 <= dropout < 1):
            raise ValueError(f"r must be >= 1, alpha > 0, 0 <= dropout < 1; got r={r!r}, {alpha=!r}, {dropout=!r}")
        self.lora_dropout = nn.Dropout(dropout)
        self.r, self.scaling, (self.out_features, self.in_features) = r, alpha / r, base.weight.shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # half precision would lose small updates
        A = nn.init.kaiming_uniform_(base.weight.new_empty((r, self.in_features), dtype=dtype), a=math.sqrt(5))
        B = base.weight.new_zeros((self.out_features, r), dtype=dtype)
        self.lora_A, self.lora_B, self.base = nn.Parameter(A), nn.Parameter(B), base.requires_grad_(False)
        self._added: dict[str, Any] = {}  # inside a perturbation, to W, A or B: a tensor, or noise as (std, start)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(self.lora_dropout(x).to(self.lora_A.dtype), self._moved("A", self.lora_A))  # (..., r)
        if isinstance(noise := self._added.get("W"), tuple):
            out = _NoisyLinear.apply(x, self.base.weight, self.bias, *noise)  # (..., m)
        else:
            out = F.linear(x, self._moved("W", self.base.weight), self.bias)  # (..., m)
        return (out + F.linear(down * self.scaling, self._moved("B", self.lora_B))).to(out.dtype)  # (..., m)

    @property
    def weight(self) -> Tensor:
        """W' (m, n), plus eps inside a perturbation; differentiable. For models that read it past the forward."""
        W, A, B = (self._moved(k, p) for k, p in (("W", self.base.weight), ("A", self.lora_A), ("B", self.lora_B)))
        with torch.autocast(W.device.type, enabled=False):
            return torch.addmm(W.to(A.dtype), B * self.scaling, A).to(W.dtype)

    bias = property(lambda self: self.base.bias)

    def _moved(self, name: str, p: Tensor) -> Tensor:
        added = self._added.get(name)
        return p if added is None else _plus_noise(p, *added) if isinstance(added, tuple) else (p + added).to(p.dtype)

    def _points(self, space: str) -> dict[str, Tensor]:
        if space not in ("full", "lora"):
            raise ValueError(f"space must be full or lora, got {space!r}")
        return {"W": self.weight} if space == "full" else {"A": self.lora_A, "B": self.lora_B}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_added": {}}  # so a copy taken inside a perturbation is clean


def inject_lora(
    model: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, targets: str | Sequence[str] = ".*"
) -> nn.Module:
    """Freeze `model`, put a `LoRALinear` in place of each nn.Linear named by `targets`, return the model. `targets`: a
    regular expression for the whole name, or a list of names, where "c_attn" is every "transformer.h.N.attn.c_attn".
    A weight that two modules hold (GPT-2's lm_head and wte) is passed over, to stay tied. Earlier adapters stay.
    ValueError, before anything is changed: a target matches nothing, or a layer does more than W x + b."""
    held = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    linears = {}
    for path, parent in model.named_modules(remove_duplicate=False):  # a layer may have several names
        for name, m in parent._modules.items():
            if isinstance(m, nn.Linear) and held.count(id(m.weight)) <= 1 and not isinstance(parent, LoRALinear):
                linears[f"{path}.{name}".lstrip(".")] = m
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(name)}" for name in targets]
    chosen = {m: name for name, m in linears.items() if any(re.fullmatch(p, name) for p in patterns)}
    if not chosen or not all(any(re.fullmatch(p, name) for name in linears) for p in patterns):
        raise ValueError(f"targets must name untied nn.Linear layers, of which there are {[*linears]}; got {targets!r}")
    for layer, name in chosen.items():
        own = "weight" not in layer._parameters or any(v for k, v in vars(layer).items() if re.match("_.*ward_", k))
        if own or getattr(layer.forward, "__func__", None) is not nn.Linear.forward:
            raise ValueError(f"{name} has hooks, a parametrization or its own forward, which an adapter would drop")
    new = {layer: LoRALinear(layer, r, alpha, dropout) for layer in chosen}
    for parent in list(model.modules()):  # listed before the layers get into their adapters
        parent._modules.update({k: new.get(m, m) for k, m in parent._modules.items()})
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".lora_A", ".lora_B")))
    return model


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # names without those of wrappers
    layers = {f"{k}.".replace("_orig_mod.", "")[:-1]: m for k, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRALinear layer: call inject_lora first")
    return layers


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All lora_A and lora_B, in module order: what the optimizer gets."""
    return [p for layer in _lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters, `{"transformer.h.0.attn.c_attn.lora_A": (r, n), ...}`, without the base."""
    names = [f"{name}.{key}".lstrip(".") for name in _lora_layers(model) for key in ("lora_A", "lora_B")]
    return {name: p.detach().clone() for name, p in zip(names, lora_parameters(model))}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy in what `lora_state_dict` gave. ValueError, before any is written: names or shapes do not fit the model."""
    own, given = ({name: p.shape for name, p in named.items()} for named in (lora_state_dict(model), state))
    if unfit := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
        raise ValueError(f"missing, not in the model or of another shape: {unfit[:3]}, {len(unfit)} in all")
    for name, p in zip(own, lora_parameters(model)):
        p.copy_(torch.as_tensor(state[name]))
    torch.clear_autocast_cache()  # as in `_set`


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Put a plain, frozen nn.Linear with weight W' in place of each `LoRALinear`, return the model. RuntimeError,
    before anything is changed: the model is perturbed, or a W' is not finite."""
    merged = {}
    for name, layer in _lora_layers(model).items():
        merged[layer] = copy.deepcopy(layer.base).requires_grad_(False)
        merged[layer].weight = nn.Parameter(layer.weight, requires_grad=False)
        if layer._added or not layer.weight.isfinite().all():
            raise RuntimeError(f"{name} cannot be merged: it is perturbed, or W' is not finite in {layer.weight.dtype}")
    model.apply(lambda parent: parent._modules.update({k: merged.get(m, m) for k, m in parent._modules.items()}))
    return merged.get(model, model)  # the model may be a LoRALinear itself


def filter_std(weight: Tensor, sigma: float) -> Tensor:
    """std of the noise of each row, (m, n) -> (m, 1): sigma |W'_i| / sqrt(n) (eq. 7)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)  # norms taken in bfloat16 are off by about 0.3 %
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=dtype) * (sigma / math.sqrt(weight.shape[1]))


def sigma_at(step: int, total_steps: int, sigma: float, schedule: str = "cosine") -> float:
    """Noise strength at `step`, counted in optimizer steps from 0: sigma times a factor of t = step / total_steps.
    "cosine", (1 - cos(pi t)) / 2: 0 at the first step, 1/2 in the middle, just below 1 at the last. The paper says
    only that it grows along a cosine; the formula is that of the authors' code. "linear": t. "constant": 1."""
    t = step / total_steps
    factors = {"cosine": 0.5 * (1 - math.cos(math.pi * t)), "linear": t, "constant": 1.0}
    if not 0 <= t <= 1 or schedule not in factors:
        raise ValueError(f"step / total_steps must be from 0 to 1, schedule in {[*factors]}; got {t}, {schedule!r}")
    return sigma * factors[schedule]


@contextmanager
def perturbed(model: nn.Module, sigma: float, seed: Any, space: str = "full") -> Iterator[None]:
    """Inside, every `LoRALinear` computes with W' + eps, with eps drawn by eq. 7 from W' as it is on entry. `seed`, an
    integer or a tuple such as (run, step), and the position of the layer fix eps: the same in all that runs inside, on
    every device, in every thread. No global generator is used. A backward may come after the context, but not under
    activation checkpointing, which runs the forward again. `space`: `sharpness`. RuntimeError: perturbed already."""
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    generator = random.Random(json.dumps(seed, default=int))  # as text, so that 12, (1, 2) and (1, 2, 0) differ
    layers, noise = list(_lora_layers(model).values()) if sigma else [], []
    for layer in layers:
        noise.append({})
        for name, p in layer._points(space).items():
            bits = torch.frombuffer(bytearray(generator.randbytes(8 * len(p))), dtype=torch.int64).to(p.device)
            noise[-1][name] = filter_std(p.detach(), sigma) * bits.sign()[:, None], bits % 2**22  # (m, 1), (m,)
            del p  # W' is not to live on inside
    with _set(layers, noise):
        yield


@contextmanager
def _set(layers: Sequence[LoRALinear], added: Sequence[dict[str, Any]]) -> Iterator[None]:
    if any(layer._added for layer in layers):
        raise RuntimeError("the model is perturbed already: perturbations do not nest")
    try:
        for layer, values in zip(layers, added):
            layer._added = values
        yield
    finally:
        for layer in layers:
            layer._added = {}
        torch.clear_autocast_cache()  # autocast around a loop would keep its casts of A and B over their update


class _NoisyLinear(torch.autograd.Function):
    """(W + eps) x + b. For the backward it keeps W itself and two numbers per row, and makes eps again, in fresh memory
    if a graph of the backward is to keep it. Gradients by W and b are for whoever unfreezes them; eps is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, std: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight, std, start)
        return F.linear(x, _plus_noise(weight, std, start, reuse=True), bias)  # (..., m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, std, start = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, m)
        noisy = _plus_noise(weight, std, start, reuse=not torch.is_grad_enabled()).to(grad.dtype)  # (m, n)
        by_w = rows.T @ x.reshape(-1, weight.shape[1]).to(grad.dtype) if ctx.needs_input_grad[1] else None  # (m, n)
        return grad @ noisy, by_w, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _plus_noise(weight: Tensor, std: Tensor, start: Tensor, reuse: bool = False) -> Tensor:
    """W + eps, (m, n), with eps_i = std_i table[start_i : start_i + n], added in float32 and rounded once. A window of
    a table is a copy; fresh normals would be nearly all that Flat-LoRA costs on a CPU. Starts and signs are drawn
    independently, so rows, layers and steps are uncorrelated. Not exact: a row is one of 2^23 vectors, and two rows
    may hold shifted pieces of one stretch (0.04 % of the pairs at n = 768). `reuse`: into memory that this thread
    keeps, since fresh memory takes several times as long as the noise (a GPU's allocator keeps it by itself)."""
    with torch.inference_mode(False):  # whose tensors could not be used outside of it
        windows = _table(std.dtype, weight.device).as_strided((2**22, weight.shape[1]), (1, 1))  # row k starts at k
        memory = _thread.__dict__.setdefault(std.dtype, torch.empty(0, dtype=std.dtype))
    out = memory.resize_(weight.shape) if reuse and weight.device.type == "cpu" else None
    normals = torch.index_select(windows, 0, start, out=out)  # (m, n)
    return torch.addcmul(weight, normals, std, out=out).to(weight.dtype)


def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """2^22 standard normals, the same on every device, and the first 2^20 once more for the windows at the end."""
    if (dtype, device) not in _tables:
        normals = torch.empty(2**22).normal_(generator=torch.Generator().manual_seed(0))
        _tables[dtype, device] = torch.cat([normals, normals[: 2**20]]).to(device, dtype)
    return _tables[dtype, device]


def flat_lora_step(
    model: nn.Module,
    loss_fn: Callable,
    batches: Sequence,
    optimizer: torch.optim.Optimizer,
    sigma: float,
    seed: Any,
    max_grad_norm: float = math.inf,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """One step on the expected loss (eq. 6): the gradient at W' + eps updates A and B. Returns the noisy loss. All
    micro-`batches` share one eps, as in the authors' code; `loss_fn(model, batch)` is a mean. `scaler`: for float16
    autocast. Under DistributedDataParallel put the rank into the seed. ValueError: an argument, or a parameter that
    is to train is not in the optimizer. FloatingPointError, before the update: the loss or gradient is not finite."""
    with perturbed(model, sigma, seed):
        loss = _loss(model, loss_fn, batches, optimizer, scaler)
    _update(optimizer, max_grad_norm, scaler)
    return loss


def _loss(model: nn.Module, loss_fn: Callable, batches: Sequence, optimizer: Any = None, scaler: Any = None) -> float:
    """The mean loss of the micro-batches. With an optimizer, its gradient replaces what the `.grad`s held."""
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
            raise ValueError(f"the optimizer does not hold {left[:3]}, {len(left)} in all: make it anew or freeze them")
        optimizer.zero_grad()
    losses = []
    for i, batch in enumerate(batches):
        with nullcontext() if i + 1 == len(batches) else getattr(model, "no_sync", nullcontext)():  # DDP: one exchange
            loss = loss_fn(model, batch).reshape(()) / len(batches)
            if optimizer is not None:
                (scaler.scale(loss) if scaler else loss).backward()
        losses.append(loss.detach())
    if not math.isfinite(mean := float(torch.stack(losses).sum())):  # one wait for the device, not one per batch
        raise FloatingPointError(f"the loss is not finite: {mean}")
    return mean


def _update(optimizer: torch.optim.Optimizer, max_grad_norm: float, scaler: Any = None) -> None:
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm!r}")
    scaler.unscale_(optimizer)  # before the norm is taken
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm)
    if not (scaler.is_enabled() or norm.isfinite()):
        raise FloatingPointError(f"the gradient is not finite: its norm is {float(norm)}")
    scaler.step(optimizer)
    scaler.update()


def sam_step(
    model: nn.Module,
    loss_fn: Callable,
    batches: Sequence,
    optimizer: torch.optim.Optimizer,
    rho: float,
    space: str = "lora",
    max_grad_norm: float = math.inf,
) -> float:
    """The baseline, sharpness-aware minimisation (Foret et al. 2021), in two passes: the gradient at the point moved
    by rho along the first gradient, normalised over all layers, updates A and B. "lora" moves A and B, and W' only as
    eq. 3 says; "full" moves W' (eq. 5), the ideal, at two (m, n) per layer. Returns the first loss; errors as above."""
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
    layers = list(_lora_layers(model).values())
    zeros = [{k: torch.zeros_like(p, requires_grad=True) for k, p in x._points(space).items()} for x in layers]
    with _set(layers, zeros):  # the gradient by a zero is that by what it is added to
        loss = _loss(model, loss_fn, batches, optimizer)
    scale = rho / nn.utils.clip_grad_norm_([z for own in zeros for z in own.values()], math.inf).clamp_min(1e-12)
    with _set(layers, [{k: z.grad * scale for k, z in own.items() if z.grad is not None} for own in zeros]):
        _loss(model, loss_fn, batches, optimizer)
    _update(optimizer, max_grad_norm)
    return loss


@torch.no_grad()
def sharpness(
    model: nn.Module, loss_fn: Callable, batches: Sequence, sigma: float, samples: int, seed: Any, space: str = "full"
) -> float:
    """Mean increase of the loss, E[L(w + eps)] - L(w), over `samples` draws of noise by eq. 7. "full": w = W'. "lora":
    w = (A, B), by the same law on their rows; at equal sigma it moves W' far less. One seed gives the same directions
    at every sigma, and never those of a training step. Call `model.eval()` first. Errors as in `perturbed`."""
    clean, rises = _loss(model, loss_fn, batches), []
    for sample in range(samples):
        with perturbed(model, sigma, ("sharpness", seed, sample), space):
            rises.append(_loss(model, loss_fn, batches) - clean)
    return sum(rises) / len(rises)
