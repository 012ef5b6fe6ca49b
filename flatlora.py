"""Flat-LoRA in one file: low-rank fine-tuning that looks for a minimum flat in the full weight space.

Li, He, Li, Wang, Shang, Huang: "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", ICML 2025,
https://arxiv.org/abs/2409.14396. Equation numbers below are those of its second arXiv version.

LoRA trains B (m, r) and A (r, n) beside a frozen weight W (m, n); the model computes with the merged weight
W' = W + s B A, where s = alpha / r. Flat-LoRA minimises the expected loss under noise on the *merged* weight,

    min over A, B of  E[ L(W + s B A + eps) ],    eps_ij ~ N(0, sigma^2 |W'_i|^2 / n)    (eq. 6, eq. 7)

with one sample of eps a step. A row W'_i is a "filter": scaled by its norm, the noise changes every row by a
fraction sigma of itself. eps is not stored: it is made from a seed when a product needs it, then dropped, unless
`keep` asks for a copy of the noisy weights in exchange for time.

    model = inject_lora(model, r=8, alpha=16, targets=["c_attn", "c_proj"])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-4)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    for step, batch in enumerate(loader):
        sigma = sigma_at(step, total_steps, 0.05)
        loss = flat_lora_step(model, loss_fn, [batch], optimizer, sigma, seed=(run_seed, step))
    merge_lora(model)  # inference is plain: no noise, no adapters
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Seed = int | Sequence[Any]  # an int >= 0, or a (nested) sequence of them, such as (run, step)
Batches = Sequence[Any]  # the micro-batches of one step, each what loss_fn takes
LossFn = Callable[[nn.Module, Any], Tensor]  # loss_fn(model, batch) -> scalar, a mean over the batch
Law = Callable[["LoRALinear", float], Tensor]  # law(layer, sigma) -> std of the noise of each row, (m, 1)

# ---- LoRA ----------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable low-rank update: h = W x + b + s B A x (eq. 1).

                      +--- W (m, n), frozen --------------+
        x (..., n) ---+                                   +---> h (..., m)
                      +--- A (r, n) --- B (m, r) --- s ---+

    `weight` and `bias` are the Parameters of `base` itself (same storage), frozen here. B starts at zero, so the
    first output is that of `base`. The adapters are float32 also over a half-precision base, where their small
    updates would round away (float64 over a float64 base). ValueError: see `_check_lora`.
    """

    def __init__(self, base: nn.Linear, r: int = 8, alpha: float = 16, dropout: float = 0.0) -> None:
        super().__init__()
        _check_lora("base", base, r, alpha, dropout)
        self.in_features, self.out_features, self.r, self.scaling = base.in_features, base.out_features, r, alpha / r
        self.weight = base.weight.requires_grad_(False)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(self.weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, r, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_dropout = nn.Dropout(dropout)
        self.train(base.training)
        # None outside a perturbation. Inside: W + eps, or (std, seed, scratch) to make it from.
        self._noise: tuple[Tensor, int, Tensor] | Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> h (..., m)."""
        if self._noise is None:
            out = F.linear(x, self.weight, self.bias)  # (..., m)
        elif isinstance(self._noise, Tensor):
            out = F.linear(x, self._noise.to(self.weight.dtype), self.bias)  # (..., m)
        else:
            out = _NoisyLinear.apply(x, self.weight, self.bias, *self._noise)  # (..., m)
        down = F.linear(self.lora_dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., r)
        return torch.add(out, F.linear(down, self.lora_B), alpha=self.scaling).to(out.dtype)  # (..., m)

    def merged_weight(self) -> Tensor:
        """W' = W + s B A, (m, n), in the dtype of the adapters so that nothing is rounded away."""
        return torch.addmm(self.weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scaling)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain, frozen `nn.Linear` with weight W', rounded once to the dtype of W; this layer stays as it is.

        RuntimeError inside a perturbation, FloatingPointError where W' is not finite in that dtype.
        """
        if self._noise is not None:
            raise RuntimeError("the model is perturbed: merge outside of the perturbation")
        merged = self.merged_weight().to(self.weight.dtype)
        if not merged.isfinite().all():
            raise FloatingPointError(f"the merged weight is not finite in {merged.dtype}")
        linear = nn.Linear(self.in_features, self.out_features, device="meta")  # meta: draws no random numbers
        linear.weight = nn.Parameter(merged, requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)


def inject_lora(
    model: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, targets: str | Sequence[str] = ".*"
) -> nn.Module:
    """Freeze `model`, put a `LoRALinear` in place of each `nn.Linear` named by `targets`, return the model.

    `targets` is a regular expression for the whole module name, or a list of names, where "c_attn" or
    "attn.c_attn" stands for every "transformer.h.N.attn.c_attn". A layer whose weight a second module uses too
    (GPT-2's lm_head, which is wte) is passed over, since an adapter would untie the two. Layers adapted by an
    earlier call stay trainable.

    ValueError, before anything is changed: the expression or one of the names matches no such layer, or a
    matched layer does not pass `_check_lora`, or is one that the model reads past its forward.
    """
    linears = _linears(model)
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(name)}" for name in targets]
    try:
        matches = [[name for name in linears if re.fullmatch(pattern, name)] for pattern in patterns]
    except re.error as error:
        raise ValueError(f"targets must be a regular expression or a list of names, got {targets!r}: {error}") from None
    if not matches or not all(matches):
        raise ValueError(
            f"targets must name nn.Linear layers with a weight of their own, got {targets!r}; "
            f"this model has {', '.join(linears) or 'none'}"
        )
    return _inject(model, {name: (r, alpha, dropout) for names in matches for name in names})


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All lora_A and lora_B, in module order: what the optimizer gets."""
    return list(_named_adapters(model).values())


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters, `{"transformer.h.0.attn.c_attn.lora_A": (r, n), ...}`, without the base weights."""
    return {name: p.detach().clone() for name, p in _named_adapters(model).items()}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the adapters of `lora_state_dict` in. ValueError, before any is written: one is missing, not in the model,
    of another shape, or holds something else than finite numbers."""
    adapters = _named_adapters(model)
    check_fit("the adapters", {name: p.shape for name, p in adapters.items()}, state)
    if bad := [name for name, value in state.items() if not (value.is_floating_point() and value.isfinite().all())]:
        raise ValueError(f"the adapters must hold finite floating-point numbers, which {bad[:3]} do not")
    for name, p in adapters.items():
        p.copy_(state[name])


def merge_lora(model: nn.Module) -> nn.Module:
    """Put the merged plain `nn.Linear` in place of each `LoRALinear`, return the model.

    ValueError without such a layer, otherwise as `LoRALinear.merge`; nothing is changed then.
    """
    merged = {name: layer.merge() for name, layer in _lora_layers(model).items()}
    for name, linear in merged.items():
        if name:
            _replace(model, name, linear)
    return merged.get("", model)  # "": the model is a LoRALinear itself


# ---- The noise -----------------------------------------------------------------------------------------------


def filter_std(weight: Tensor, sigma: float) -> Tensor:
    """std of the noise of each row, (m, 1): sigma |W'_i| / sqrt(n) (eq. 7). In float32 at least: norms of bf16
    rows taken in bf16 are off by about 0.3 %."""
    _check_nonnegative("sigma", sigma)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=dtype)  # (m, 1)
    return norm * (sigma / math.sqrt(weight.shape[1]))


def sigma_at(step: int, total_steps: int, sigma: float, schedule: str = "cosine") -> float:
    """Noise strength at `step`, which counts optimizer steps from 0: sigma times a factor of t = step / total_steps.

    "cosine" (1 - cos(pi t)) / 2, from 0 at the first step towards 1. The paper only says that the strength grows
    along a cosine; the formula is the official code's. "linear" t, "constant" 1.
    """
    _check_nonnegative("sigma", sigma)
    _check_choice("schedule", schedule, ("cosine", "linear", "constant"))
    if not (total_steps >= 1 and 0 <= step <= total_steps):
        raise ValueError(f"step must be from 0 to total_steps = {total_steps!r} >= 1, got {step!r}")
    t = step / total_steps
    return sigma * {"cosine": 0.5 * (1 - math.cos(math.pi * t)), "linear": t, "constant": 1.0}[schedule]


@contextmanager
def perturbed(model: nn.Module, sigma: float, seed: Seed, keep: bool = False, law: Law | None = None) -> Iterator[None]:
    """Inside, every `LoRALinear` computes (W' + eps) x, with eps drawn by eq. 7 from W' as it is on entry.

    eps depends on (seed, layer) only: the same in every forward and backward inside, independent between layers
    and seeds, and drawn from generators of its own. W is not written: each product forms W + eps and drops it.
    With `keep` W + eps is made once, on entry, and kept inside: a copy of the adapted weights buys one draw
    instead of two for each forward and backward. The numbers are the same.
    `law(layer, sigma)` puts other stds, (m, 1), in place of those of eq. 7; with their negatives eps is mirrored.
    A backward under activation checkpointing runs the forward again, so it belongs inside as well.

    ValueError: bad sigma or seed, no `LoRALinear` in the model. RuntimeError: already perturbed. With sigma = 0
    nothing is drawn and this is plain LoRA.
    """
    _check_nonnegative("sigma", sigma)
    if sigma == 0:
        yield
        return
    layers = list(_lora_layers(model).values())
    with torch.no_grad():
        stds = [law(layer, sigma) if law else filter_std(layer.merged_weight(), sigma) for layer in layers]
        seeds = _seeds(seed, len(layers))
        if keep:
            noise: list[Any] = [_noisy(layer.weight, std, s) for layer, std, s in zip(layers, stds, seeds)]
        else:  # one buffer for all the products inside
            scratch = torch.empty(max(layer.weight.nbytes for layer in layers), dtype=torch.uint8)
            noise = [(std, s, scratch) for std, s in zip(stds, seeds)]
    with _noise_set(layers, noise):
        yield


class _NoisyLinear(torch.autograd.Function):
    """(W + eps) x + b. Keeps W (no copy), the seed and the m numbers of std for the backward; eps is made twice.

    W and b are frozen, so the only gradient is that by x. Those by A and B come from the LoRA path of
    `LoRALinear.forward`: eps is a constant there, and the noise reaches them through x and the loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, std: Tensor, *recipe: Any) -> Tensor:
        ctx.save_for_backward(weight, std)
        ctx.recipe, ctx.dtype = recipe, x.dtype
        return F.linear(x, _noisy(weight, std, *recipe), bias)  # (..., m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, std = ctx.saved_tensors
        noisy = _noisy(weight, std, *ctx.recipe).to(grad.dtype)  # grad is half precision under autocast
        return (grad @ noisy).to(ctx.dtype), None, None, None, None, None  # (..., n)


def _noisy(weight: Tensor, std: Tensor, seed: int, scratch: Tensor | None = None) -> Tensor:
    """W + eps, (m, n), added in float32 and rounded once to the dtype of W.

    Drawing the normals is most of what Flat-LoRA costs on a CPU. There all but small layers look them up in a
    table, 16 random bits a number, in a half to a third of the time of `normal_`: in blocks of rows, so that the table
    stays in the cache and no second (m, n) is made, and into `scratch`, since fresh memory is slow too.
    """
    by_table = weight.device.type == "cpu" and weight.numel() >= 2**15
    generator: Any = np.random.SFC64(seed) if by_table else torch.Generator(weight.device).manual_seed(seed)
    if by_table and scratch is not None:
        noisy = scratch[: weight.nbytes].view(weight.dtype).view(weight.shape)
    else:
        noisy = torch.empty_like(weight)
    size = max(1, 2 ** (16 if by_table else 24) // weight.shape[1])  # rows a block
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        block = weight[rows]
        if by_table:
            bits = generator.random_raw(-(-block.numel() // 4)).view(np.uint16)[: block.numel()]
            normals = _NORMALS.index_select(0, torch.from_numpy(bits).int()).view_as(block)
        else:
            normals = torch.empty(block.shape, dtype=std.dtype, device=std.device).normal_(generator=generator)
        torch.addcmul(block, normals, std[rows], out=noisy[rows])
    return noisy


# The normal quantiles at the middles of 65,536 equal shares, scaled to variance 1. They end at 4.32, beyond which
# a normal number lies once in 64,000 draws.
_NORMALS = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
_NORMALS = (_NORMALS / _NORMALS.square().mean().sqrt()).float()


# ---- Training steps ------------------------------------------------------------------------------------------


def flat_lora_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    sigma: float,
    seed: Seed,
    max_grad_norm: float | None = None,
    keep: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """One step on the expected loss (eq. 6): forward and backward at W' + eps, update of A and B at W'.

    `batches` are the micro-batches of the step. Their mean loss counts and they share one eps, as in the official
    code. Give each step a seed of its own, such as (run, step). With sigma = 0 this is the LoRA step (and with no
    `LoRALinear` in the model, the plain one). `keep` is that of `perturbed`: faster, more so with many
    micro-batches, for one copy of the adapted weights. Returns the loss, which for sigma > 0 is the noisy one.

    `scaler` scales the loss under float16 autocast, and skips the update where a gradient overflows. Under
    DistributedDataParallel put the rank into the seed: each rank draws its own eps, one more sample of eq. 6.

    ValueError: no batch, or as `perturbed`. FloatingPointError, before the update: the loss is not finite, or
    without a scaler the gradient.
    """
    optimizer.zero_grad()
    with perturbed(model, sigma, seed, keep):
        loss = _mean_loss(model, loss_fn, batches, backward=True, scaler=scaler)
    _update(optimizer, max_grad_norm, scaler)
    return loss


def sam_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    rho: float,
    space: str = "lora",
    max_grad_norm: float | None = None,
) -> float:
    """The baseline, sharpness-aware minimisation (Foret et al. 2021), in two passes: the gradient at the point moved
    by rho along the normalised gradient of the first pass updates A and B.

    "lora" moves A and B; "full" moves W' itself (eq. 5), the ideal, for an (m, n) gradient a layer. The norm is
    over all layers. Afterwards the factors are restored exactly; W is not written. Returns the loss of the first
    pass. Errors as in `flat_lora_step`, before the update.
    """
    _check_nonnegative("rho", rho)
    _check_choice("space", space, ("lora", "full"))
    optimizer.zero_grad()
    layers = list(_lora_layers(model).values())
    if space == "lora":
        factors = lora_parameters(model)
        loss = _mean_loss(model, loss_fn, batches, backward=True)
        perturbation = _factors_at(factors, _ascent(factors, rho))
    else:
        weights = [layer.weight.to(layer.lora_A.dtype, copy=True).requires_grad_() for layer in layers]
        with _noise_set(layers, weights):  # the gradient by W is the gradient by W'
            loss = _mean_loss(model, loss_fn, batches, backward=True)
        perturbation = _noise_set(layers, _ascent(weights, rho))
    optimizer.zero_grad()
    with perturbation:
        _mean_loss(model, loss_fn, batches, backward=True)
    _update(optimizer, max_grad_norm)
    return loss


@torch.no_grad()
def sharpness(
    model: nn.Module, loss_fn: LossFn, batches: Batches, sigma: float, samples: int, seed: Seed, space: str = "full"
) -> float:
    """Mean increase of the loss, E[L(w + eps)] - L(w), over `samples` draws of filter-scaled noise (eq. 7).

    "full": w = W'. "lora": w = (A, B), the same law on the rows of A and of B. One seed gives the same directions
    at every sigma, so calls with growing sigma trace the landscape along them. The model is measured in the mode
    it is in: call `model.eval()` first. ValueError: samples below 1, or as `perturbed`.
    """
    _check_nonnegative("sigma", sigma)
    _check_choice("space", space, ("full", "lora"))
    if not (isinstance(samples, int) and samples >= 1):
        raise ValueError(f"samples must be an integer >= 1, got {samples!r}")
    factors, clean, increase = lora_parameters(model), _mean_loss(model, loss_fn, batches), 0.0
    for sample in range(samples):
        if space == "full":
            perturbation = perturbed(model, sigma, (seed, sample))
        else:
            seeds = _seeds((seed, sample), len(factors))
            perturbation = _factors_at(factors, [_noisy(p, filter_std(p, sigma), s) for p, s in zip(factors, seeds)])
        with perturbation:
            increase += (_mean_loss(model, loss_fn, batches) - clean) / samples
    return increase


# ---- Adapter files of Hugging Face PEFT ----------------------------------------------------------------------

_PEFT_KEY = "base_model.model.{}.{}.weight"
_PEFT_KNOWN = [  # settings that load_peft follows, or that have no effect of their own
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "task_type",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode", "peft_version",
    "base_model_name_or_path", "revision", "auto_mapping", "megatron_core", "qalora_group_size",
]  # fmt: skip
_PEFT_FIXED = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}


def save_peft(model: nn.Module, folder: str | Path, base_model: str, fan_in_fan_out: bool = False) -> None:
    """Write the adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors` in `folder`.

    `base_model` names the model on which PEFT is to load them. `fan_in_fan_out`: that model holds the layers as
    Conv1D, as GPT-2 does; A (r, n) and B (m, r) are written alike. ValueError without a `LoRALinear` in the model,
    ImportError without safetensors.
    """
    save_file, layers = _safetensors().torch.save_file, _lora_layers(model)
    if "" in layers:
        raise ValueError("a LoRALinear by itself has no name in PEFT's files: give the model that holds it")
    first = next(iter(layers.values()))
    config: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": base_model, "inference_mode": True}
    config |= {"target_modules": list(layers), "fan_in_fan_out": fan_in_fan_out, "lora_dropout": first.lora_dropout.p}
    for key, pattern, value in (
        ("r", "rank_pattern", lambda layer: layer.r),
        ("lora_alpha", "alpha_pattern", lambda layer: layer.scaling * layer.r),
    ):  # the patterns are expressions for the end of a name: without ^ that of "0" would fit "1.0" too
        others = {name: value(layer) for name, layer in layers.items() if value(layer) != value(first)}
        config |= {key: value(first), pattern: {f"^{re.escape(name)}": v for name, v in others.items()}}
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {_PEFT_KEY.format(*name.rsplit(".", 1)): p.contiguous() for name, p in lora_state_dict(model).items()}
    save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """`inject_lora` from an adapter that PEFT trained: its layers, ranks, scalings and weights. Returns the model.

    rsLoRA's alpha / sqrt(r), rank_pattern and alpha_pattern are followed. ValueError, before anything is changed:
    a setting that makes it more than LoRA, a key of no layer that `inject_lora` would choose (DoRA's magnitudes,
    modules_to_save), a weight missing or mis-shaped, a model with adapters. ImportError without safetensors.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRALinear layers already: load_peft puts in its own")
    state = read_safetensors(Path(folder) / "adapter_model.safetensors")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    more = {k: v for k, v in config.items() if v and k not in _PEFT_KNOWN and v not in _PEFT_FIXED.get(k, [])}
    if more or not state:
        raise ValueError(f"{folder} must hold LoRA weights and no more, got {more or 'none'}")
    settings, shapes = {}, {}
    for name, linear in _linears(model).items():
        keys = [_PEFT_KEY.format(name, factor) for factor in ("lora_A", "lora_B")]
        if state.keys().isdisjoint(keys):
            continue
        r, alpha = (
            next(
                (v for k, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", name)),
                config.get(key),
            )
            for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        _check_lora(name, linear, r, alpha, dropout := config.get("lora_dropout", 0.0))
        settings[name] = (r, alpha * math.sqrt(r) if config.get("use_rslora") else alpha, dropout)
        shapes |= zip(keys, ((r, linear.in_features), (linear.out_features, r)))
    check_fit(f"the adapters of {folder}", shapes, state)
    _inject(model, settings)
    load_lora_state_dict(model, {k[len("base_model.model.") : -len(".weight")]: v for k, v in state.items()})
    return model


# ---- What the above share ------------------------------------------------------------------------------------


def check_fit(what: str, shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> None:
    """ValueError unless `state` holds exactly these names, in these shapes. Of many names the first three are shown."""
    other = [k for k in shapes.keys() & state.keys() if getattr(state[k], "shape", None) != tuple(shapes[k])]
    names = [sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys()), sorted(other)]
    if any(names):
        missing, extra, other = (x[:3] + [f"and {len(x) - 3} more"] * (len(x) > 3) for x in names)
        raise ValueError(
            f"{what} do not fit the model: missing {missing}, not in the model {extra}, of another shape {other}"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. ValueError for a damaged one, ImportError without safetensors."""
    safetensors = _safetensors()
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError('safetensors is not installed: pip install -e ".[gpt2]"') from None
    return safetensors


def _check_nonnegative(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_lora(name: str, base: Any, r: Any, alpha: Any, dropout: Any) -> None:
    """ValueError unless `base` is a plain nn.Linear with a finite weight, 1 <= r <= min(m, n), alpha > 0 and
    0 <= dropout < 1."""
    if type(base) is not nn.Linear:
        kind = type(base).__name__
        reason = {
            "Conv1D": "it stores its weight transposed, (n, m), so a row is no filter",
            "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads its weight past its forward",
        }.get(kind, "another class may compute something else")
        raise ValueError(f"{name}: must be a plain nn.Linear, got {kind}: {reason}")
    if not (base.weight.is_meta or base.weight.isfinite().all()):
        raise ValueError(f"{name}: the weight must be finite")
    limit = min(base.weight.shape)
    if not (isinstance(r, int) and 1 <= r <= limit):
        raise ValueError(f"{name}: r must be an integer from 1 to min(m, n) = {limit}, got {r!r}")
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be a number >= 0 and < 1, got {dropout!r}")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """What `inject_lora` chooses from. Conv1D, Hugging Face's GPT-2 layer, is among them to be refused, not skipped."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {model!r}")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    linears = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    return {name: m for name, m in linears.items() if name and uses[id(m.weight)] == 1}


def _inject(model: nn.Module, settings: Mapping[str, tuple[int, float, float]]) -> nn.Module:
    """Freeze the model and put LoRALinear(base, r, alpha, dropout) at these names. All are checked first."""
    for name, lora in settings.items():
        _check_lora(name, model.get_submodule(name), *lora)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(f"{name}: nn.TransformerEncoderLayer reads its weight past its forward in evaluation")
    model.requires_grad_(False)
    for name, lora in settings.items():
        _replace(model, name, LoRALinear(model.get_submodule(name), *lora))
    for p in lora_parameters(model):
        p.requires_grad_(True)
    return model


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {model!r}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRALinear layer: call inject_lora first")
    return layers


def _named_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    layers = _lora_layers(model).items()
    return {f"{name}.{key}".lstrip("."): getattr(layer, key) for name, layer in layers for key in ("lora_A", "lora_B")}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _seeds(seed: Seed, count: int) -> list[int]:
    """A seed for each layer. Hashed, because seed + index would give neighbouring steps the same noise."""
    try:
        return np.random.SeedSequence([seed]).generate_state(count, np.uint64).tolist()
    except (TypeError, ValueError):
        raise ValueError(f"seed must be an integer >= 0 or a sequence of such, got {seed!r}") from None


@contextmanager
def _noise_set(layers: Sequence[LoRALinear], values: Sequence[Any]) -> Iterator[None]:
    if any(layer._noise is not None for layer in layers):
        raise RuntimeError("the model is perturbed already: perturbations do not nest")
    try:
        for layer, value in zip(layers, values):
            layer._noise = value
        yield
    finally:
        for layer in layers:
            layer._noise = None


@contextmanager
def _factors_at(factors: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the factors hold other tensors; afterwards the very ones they held before."""
    own = [p.data for p in factors]
    try:
        for p, value in zip(factors, values):
            p.data = value
        yield
    finally:
        for p, value in zip(factors, own):
            p.data = value


@torch.no_grad()
def _ascent(points: Sequence[Tensor], rho: float) -> list[Tensor]:
    """points + rho g / |g|, with g their gradient and the norm over all of them."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in points]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    return [p + g * (rho / norm.clamp_min(1e-12)) for p, g in zip(points, grads)]


def _mean_loss(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    backward: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """The mean loss of the micro-batches; with `backward`, its gradient is added to the `.grad`s."""
    if not (isinstance(batches, Sequence) and len(batches)):
        raise ValueError(f"batches must hold at least one micro-batch, in a list or tuple, got {batches!r}")
    losses = []
    for i, batch in enumerate(batches):
        # DistributedDataParallel exchanges gradients in a backward: once a step is enough, with the last micro-batch.
        no_sync = getattr(model, "no_sync", nullcontext) if i + 1 < len(batches) else nullcontext
        with no_sync():
            loss = loss_fn(model, batch)
            if not (isinstance(loss, Tensor) and loss.numel() == 1):
                raise ValueError(f"loss_fn must return a tensor of one number, got {loss!r}")
            loss = loss / len(batches)
            if backward:
                (loss if scaler is None else scaler.scale(loss)).backward()
        losses.append(loss.detach())
    mean = float(torch.stack(losses).sum())  # one wait for the device, not one a micro-batch
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is not finite: {mean}")
    return mean


def _update(
    optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None = None
) -> None:
    limit = math.inf if max_grad_norm is None else max_grad_norm
    if not (isinstance(limit, (int, float)) and limit > 0):
        raise ValueError(f"max_grad_norm must be None or a number > 0, got {max_grad_norm!r}")
    if scaler is not None:
        scaler.unscale_(optimizer)  # before the norm is taken
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)
    if scaler is not None:
        scaler.step(optimizer)  # no step where a gradient overflowed
        scaler.update()
    elif math.isfinite(norm):
        optimizer.step()
    else:
        raise FloatingPointError(f"the gradient is not finite: its norm is {float(norm)}")
