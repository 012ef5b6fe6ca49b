"""One Flat-LoRA step: one noisy forward and backward, whose gradient updates the clean A and B."""

import copy
from contextlib import nullcontext

import pytest
import reference as ref
import torch

from flatlora import flat_lora_step, inject_lora, lora_parameters


def test_the_step_in_ten_lines():  # eq. 6
    model, data = ref.adapted_model(), ref.batch()
    eps = ref.draw(model, sigma=0.3, seed=(0, 5))
    loss = ref.dense_loss(model, data, eps)
    gradients = torch.autograd.grad(loss, lora_parameters(model))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    expected = [p - 0.1 * g * (0.01 / norm) for p, g in zip(ref.adapters(model), gradients)]
    given = flat_lora_step(model, ref.loss_fn, [data], ref.sgd(model), sigma=0.3, seed=(0, 5), max_grad_norm=0.01)
    assert given == pytest.approx(loss.item())
    torch.testing.assert_close(ref.adapters(model), expected, rtol=1e-6, atol=1e-9)
    assert norm > 0.02  # so it was clipped


@pytest.mark.parametrize(("name", "passes"), [("lora", 1), ("flat", 1), ("sam", 2), ("sam full", 2)])
def test_micro_batches_take_the_step_of_the_whole_batch_in_as_many_passes(name, passes):
    (whole, parts), (x, y), forward, backward = (ref.adapted_model(), ref.adapted_model()), ref.batch(16), [], []

    def counting_loss_fn(model, batch):
        forward.append(1)
        loss = ref.loss_fn(model, batch)
        loss.register_hook(lambda _: backward.append(1))
        return loss

    loss = ref.STEPS[name](whole, ref.loss_fn, [(x, y)], ref.sgd(whole))
    for lr in (0, 0.1):  # what the first step leaves in the gradients must not count in the second
        given = ref.STEPS[name](parts, counting_loss_fn, list(zip(x.split(4), y.split(4))), ref.sgd(parts, lr))
    assert given == pytest.approx(loss) and len(forward) == len(backward) == 2 * 4 * passes
    torch.testing.assert_close(ref.adapters(parts), ref.adapters(whole))


def test_ranks_with_a_noise_each_average_their_gradients():
    """What DistributedDataParallel does, as a loop: the rank is in the seed, and the expectation has two samples."""
    model, data = ref.adapted_model(), [ref.batch(seed=1), ref.batch(seed=2)]
    given, expected = [], []
    for rank in (0, 1):
        dense = ref.dense_loss(model, data[rank], ref.draw(model, 0.3, seed=(0, rank))) / 2
        expected.append(torch.autograd.grad(dense, lora_parameters(model)))
        flat_lora_step(model, ref.loss_fn, [data[rank]], ref.sgd(model, lr=0), 0.3, seed=(0, rank))
        given.append([p.grad / 2 for p in lora_parameters(model)])
    torch.testing.assert_close([a + b for a, b in zip(*given)], [a + b for a, b in zip(*expected)])


@pytest.mark.parametrize("device", ref.DEVICES)
def test_a_grad_scaler_changes_no_bit_and_skips_the_step_on_overflow(device):
    plain, scaled = ref.adapted_model(torch.float32, device), ref.adapted_model(torch.float32, device)
    data, scaler = ref.batch(dtype=torch.float32, device=device), torch.amp.GradScaler(device, init_scale=2.0**10)
    flat_lora_step(plain, ref.loss_fn, [data], ref.sgd(plain), 0.3, seed=0, max_grad_norm=0.01)
    flat_lora_step(scaled, ref.loss_fn, [data], ref.sgd(scaled), 0.3, seed=0, max_grad_norm=0.01, scaler=scaler)
    after = ref.adapters(scaled)
    assert all(torch.equal(a, b) for a, b in zip(after, ref.adapters(plain)))
    scaler.update(2.0**127)  # the scaled loss is infinite in float32
    flat_lora_step(scaled, lambda m, b: 100 * ref.loss_fn(m, b), [data], ref.sgd(scaled), 0.3, seed=0, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(after, ref.adapters(scaled))) and scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("change", ["injection", "second injection", "copy", "assignment"])
@pytest.mark.parametrize("step", ref.STEPS.values(), ids=ref.STEPS)
def test_an_optimizer_made_before_the_adapters_is_an_error_that_names_them(change, step):
    model = inject_lora(ref.plain_model(), r=3, targets=["2"]) if change == "second injection" else ref.plain_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    inject_lora(model, r=3, targets=["0", "4"])
    if change == "copy":
        model, optimizer = copy.deepcopy(model), ref.sgd(model)
    if change == "assignment":
        optimizer = ref.sgd(model)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(ValueError, match=r"optimizer does not hold .*0\.lora_A"):
        step(model, ref.loss_fn, [ref.batch()], optimizer)


@pytest.mark.parametrize("step", ref.STEPS.values(), ids=ref.STEPS)
@pytest.mark.parametrize("device", ref.DEVICES)
def test_autocast_around_the_whole_loop_trains_as_autocast_inside_the_loss(step, device):
    def autocast_loss_fn(model, batch):
        with torch.autocast(device, torch.bfloat16):
            return ref.loss_fn(model, batch)

    results, data = [], [ref.batch(dtype=torch.float32, device=device)]
    for around in (True, False):
        model, values = ref.adapted_model(torch.float32, device), []
        with torch.autocast(device, torch.bfloat16) if around else nullcontext():  # keeps casts of A and B
            for _ in range(3):
                values.append(step(model, autocast_loss_fn, data, ref.sgd(model, lr=0.5)))
                values.append(ref.SHARPNESS["sharpness lora"](model, autocast_loss_fn, data))
        results.append((values, [p.tolist() for p in ref.adapters(model)]))
    assert results[0] == results[1] and values[1]
