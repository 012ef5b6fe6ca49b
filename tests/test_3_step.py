"""A Flat-LoRA step: one noisy forward and backward pass, whose gradient updates the clean A and B."""

import math

import pytest
import reference as ref
import torch

from flatlora import flat_lora_step, inject_lora, lora_parameters, perturbed, sigma_at

# ---- The loop ----


def test_the_loop_of_the_docstring():  # eq. 6: p <- p - lr * (the gradient at W' + eps)
    model = ref.adapted_model()
    optimizer = ref.sgd(model, lr=0.1)

    for step in range(4):
        data = ref.batch(seed=step)
        start = ref.adapters(model)

        optimizer.zero_grad()
        with perturbed(model, sigma_at(step, 4, sigma=0.3), seed=step):
            ref.loss_fn(model, data).backward()
            gradients = ref.dense_gradients(model, data)
        optimizer.step()

        expected = [p - 0.1 * gradient for p, gradient in zip(start, gradients)]
        torch.testing.assert_close(ref.adapters(model), expected)


def test_flat_lora_step_is_that_loop_and_returns_the_noisy_loss():
    model, data = ref.adapted_model(), ref.batch()
    start = ref.adapters(model)
    with perturbed(model, sigma=0.3, seed=5):
        noisy_loss = ref.dense_loss(model, data).item()
        gradients = ref.dense_gradients(model, data)

    given = flat_lora_step(model, ref.loss_fn, [data], ref.sgd(model, lr=0.1), sigma=0.3, seed=5)

    assert given == pytest.approx(noisy_loss)
    expected = [p - 0.1 * gradient for p, gradient in zip(start, gradients)]
    torch.testing.assert_close(ref.adapters(model), expected)


def test_the_loop_accepts_a_model_from_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"])
    model = peft.get_peft_model(ref.plain_model(), config)
    ours = ref.adapted_model()
    for p, value in zip(lora_parameters(model), ref.adapters(ours)):
        p.data = value
    data = ref.batch()

    with perturbed(model, sigma=0.3, seed=0):
        ref.loss_fn(model, data).backward()

    with perturbed(ours, sigma=0.3, seed=0):  # same layer names and weights, so the same noise
        expected = ref.dense_gradients(ours, data)
    torch.testing.assert_close(ref.gradients(model), expected)
    torch.testing.assert_close(ref.loss_fn(model, data), ref.dense_loss(ours, data))  # after the noise


def test_sigma_zero_is_lora():
    model = ref.adapted_model(torch.float32)
    twin = ref.adapted_model(torch.float32)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    usual = torch.optim.AdamW(lora_parameters(twin), lr=0.01)

    for step in range(5):
        data = ref.batch(dtype=torch.float32, seed=step)
        flat_lora_step(model, ref.loss_fn, [data], optimizer, sigma=0, seed=step)

        usual.zero_grad()
        ref.loss_fn(twin, data).backward()
        usual.step()

    ref.assert_same_bits(ref.adapters(model), ref.adapters(twin))


# ---- Parts of the step ----


def test_a_step_runs_the_model_once():
    model = ref.adapted_model()
    passes = []

    def counting_loss_fn(model, batch):
        passes.append("forward")
        loss = ref.loss_fn(model, batch)
        loss.register_hook(lambda _: passes.append("backward"))
        return loss

    ref.flat_step(model, counting_loss_fn, [ref.batch()], ref.sgd(model))

    assert passes == ["forward", "backward"]


@pytest.mark.parametrize("take_step", [ref.flat_step, ref.sam_step])
def test_micro_batches_give_the_same_step_as_the_full_batch(take_step):
    model = ref.adapted_model()
    twin = ref.adapted_model()
    data = ref.batch(size=16)

    full_loss = take_step(model, ref.loss_fn, [data], ref.sgd(model))
    parts_loss = take_step(twin, ref.loss_fn, ref.quarters(data), ref.sgd(twin))

    assert parts_loss == pytest.approx(full_loss)
    torch.testing.assert_close(ref.adapters(twin), ref.adapters(model))


def test_leftover_gradients_are_ignored():
    model, data = ref.adapted_model(), ref.batch()
    ref.loss_fn(model, data).backward()

    ref.lora_step(model, ref.loss_fn, [data], ref.sgd(model, lr=0))

    torch.testing.assert_close(ref.gradients(model), ref.dense_gradients(model, data))


def test_clipping_uses_the_norm_over_all_trainable_parameters():
    model, data = ref.adapted_model(), ref.batch()
    gradients = ref.dense_gradients(model, data)
    norm = ref.norm_of(gradients)  # 0.4

    flat_lora_step(model, ref.loss_fn, [data], ref.sgd(model), sigma=0, seed=0, max_grad_norm=0.01)

    expected = [gradient * 0.01 / norm for gradient in gradients]
    torch.testing.assert_close(ref.gradients(model), expected, rtol=1e-4, atol=1e-8)


def nan(loss):
    return loss * math.nan


def infinite_slope(loss):
    return loss + (loss - loss.detach()).sqrt()  # adds 0, with an infinite gradient


@pytest.mark.parametrize(("spoil", "what"), [(nan, "loss"), (infinite_slope, "gradient")])
def test_a_nonfinite_loss_or_gradient_is_an_error_before_the_update(spoil, what):
    model = ref.adapted_model()
    start = ref.adapters(model)

    def spoiled_loss_fn(model, batch):
        return spoil(ref.loss_fn(model, batch))

    with pytest.raises(FloatingPointError, match=f"the .*{what} is not finite"):
        ref.flat_step(model, spoiled_loss_fn, [ref.batch()], ref.sgd(model))
    ref.assert_same_bits(ref.adapters(model), start)


def test_an_optimizer_made_before_an_adapter_is_an_error():
    model = inject_lora(ref.plain_model(), targets=["0"])
    optimizer = ref.sgd(model)
    inject_lora(model, targets=["2"])
    with pytest.raises(ValueError, match="lacks some trainable parameters"):
        ref.flat_step(model, ref.loss_fn, [ref.batch()], optimizer)
