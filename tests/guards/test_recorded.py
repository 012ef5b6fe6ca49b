"""The noise and the steps are those of version 0.2, number for number, so that measurements made with it stay valid.

recorded.json was written by commit 35c0266, from `noise_numbers` and `step_numbers` below.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from flatlora import draw_noise, flat_lora_step, inject_lora, lora_parameters, sam_step, sigma_at

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())
SEEDS = [0, -7, 2**40, [3, 5], [1, [2, 3]]]
SHAPES = [(1, 1), (16, 12), (50, 3000), (3000, 50), (2500, 2600)]  # in the last one, the windows of rows overlap
# Sums differ in the last bit between processors, after which a number in half precision may be rounded the other way.
TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


def wave(*shape, phase=0.0):
    """Numbers between -1 and 1, made without a random generator."""
    count = math.prod(shape)
    return torch.sin(phase + torch.arange(count, dtype=torch.float64)).reshape(shape)


def noise_numbers(shape, dtype, seed):
    """The first and last two entries of eps and its norm."""
    weight = wave(*shape).to(getattr(torch, dtype))
    eps = draw_noise(weight, 0.3, seed, "h.0.q_proj").added_to(torch.zeros_like(weight)).double()
    return [*eps.flatten()[:2].tolist(), *eps.flatten()[-2:].tolist(), eps.norm().item()]


def step_numbers(method):
    """The losses of ten steps, then the sum of the norms of all trainable parameters."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4, bias=False)).double()
    for i, p in enumerate(model.parameters()):
        p.data = 0.5 * wave(*p.shape, phase=i)
    inject_lora(model, r=3, alpha=6, targets=["0", "2"])
    for i, p in enumerate(lora_parameters(model)):
        p.data = 0.3 * wave(*p.shape, phase=10 + i)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.05)

    def loss_fn(model, phase):
        return nn.functional.cross_entropy(model(wave(32, 12, phase=phase)), torch.arange(32) % 4)

    numbers = []
    for step in range(10):
        batches = [step, step + 0.5]
        if method == "sam":
            loss = sam_step(model, loss_fn, batches, optimizer, rho=0.3, max_grad_norm=1.0)
        else:
            sigma = sigma_at(step, 10, sigma=0.5) if method == "flat" else 0.0
            loss = flat_lora_step(model, loss_fn, batches, optimizer, sigma, [7, step], max_grad_norm=1.0)
        numbers.append(loss)
    return [*numbers, sum(p.norm().item() for p in lora_parameters(model))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_noise_is_that_of_version_02(shape, dtype):
    for seed in SEEDS:
        expected = RECORDED["noise"][f"{list(shape)} {dtype} {seed}"]
        assert noise_numbers(shape, dtype, seed) == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["lora", "flat", "sam"])
def test_ten_steps_are_those_of_version_02(method):
    assert step_numbers(method) == pytest.approx(RECORDED["steps"][method], rel=1e-6)
