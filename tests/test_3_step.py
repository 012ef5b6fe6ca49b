"""A Flat-LoRA step: one noisy forward and backward pass, whose gradient updates the clean A and B."""

import copy

import pytest
import reference as ref
import torch

from flatlora import flat_lora_step, inject_lora, lora_parameters, perturbed, sigma_at

# ---- The loop ----


def test_the_loop_of_the_docstring():  # eq. 6: p <- p - lr * (the gradient at W' + eps)
    model = ref.adapted_model()
    optimizer = ref.sgd(model, lr=0.1)

    for step in range(1, 4):
        data = ref.batch(seed=step)
        start = ref.adapters(model)

        optimizer.zero_grad()
        with perturbed(model, sigma_at(step, 4, sigma=0.3), seed=(0, step)):
            ref.loss_fn(model, data).backward()
            gradients = ref.dense_gradients(model, data)
        optimizer.step()

        expected = [p - 0.1 * gradient for p, gradient in zip(start, gradients)]
        torch.testing.assert_close(ref.adapters(model), expected)


def test_flat_lora_step_is_that_loop():
    model = ref.adapted_model()
    optimizer = ref.sgd(model, lr=0.1)
    data = ref.batch()
    start = ref.adapters(model)
    with perturbed(model, sigma=0.3, seed=5):
        gradients = ref.dense_gradients(model, data)

    flat_lora_step(model, ref.loss_fn, [data], optimizer, sigma=0.3, seed=5)

    expected = [p - 0.1 * gradient for p, gradient in zip(start, gradients)]
    torch.testing.assert_close(ref.adapters(model), expected)


def test_a_step_returns_the_noisy_loss():
    model = ref.adapted_model()
    optimizer = ref.sgd(model)
    data = ref.batch()
    with perturbed(model, sigma=0.3, seed=5):
        expected = ref.dense_loss(model, data).item()

    given = flat_lora_step(model, ref.loss_fn, [data], optimizer, sigma=0.3, seed=5)

    assert given == pytest.approx(expected)


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


def test_clipping_takes_the_norm_over_all_that_trains():
    model = ref.adapted_model()
    optimizer = ref.sgd(model)
    data = ref.batch()
    gradients = ref.dense_gradients(model, data)
    norm = ref.norm_of(gradients)  # 0.4

    flat_lora_step(model, ref.loss_fn, [data], optimizer, sigma=0, seed=0, max_grad_norm=0.01)

    expected = [gradient * 0.01 / norm for gradient in gradients]
    torch.testing.assert_close(ref.gradients(model), expected, rtol=1e-4, atol=1e-8)


def test_clipping_takes_all_param_groups_together():
    model = ref.adapted_model()
    first, *rest = lora_parameters(model)
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)

    flat_lora_step(model, ref.loss_fn, [ref.batch()], optimizer, sigma=0, seed=0, max_grad_norm=0.01)

    assert ref.norm_of(ref.gradients(model)) == pytest.approx(0.01, rel=1e-3)


def test_micro_batches_take_the_step_of_the_whole_batch():
    model = ref.adapted_model()
    twin = ref.adapted_model()
    data = ref.batch(size=16)

    whole_loss = ref.flat_step(model, ref.loss_fn, [data], ref.sgd(model))
    parts_loss = ref.flat_step(twin, ref.loss_fn, ref.quarters(data), ref.sgd(twin))

    assert parts_loss == pytest.approx(whole_loss)
    torch.testing.assert_close(ref.adapters(twin), ref.adapters(model))


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


def test_gradients_left_over_do_not_count():
    model = ref.adapted_model()
    data = ref.batch()
    ref.loss_fn(model, data).backward()

    ref.lora_step(model, ref.loss_fn, [data], ref.sgd(model, lr=0))

    torch.testing.assert_close(ref.gradients(model), ref.dense_gradients(model, data))


def test_each_process_has_its_own_noise():  # under DistributedDataParallel its number, the rank, is in the seed
    model = ref.adapted_model()
    optimizer = ref.sgd(model, lr=0)
    data = ref.batch()

    given = []
    for rank in (0, 1):
        flat_lora_step(model, ref.loss_fn, [data], optimizer, sigma=0.3, seed=(0, rank))
        given.append(ref.gradients(model)[0].clone())

    assert not torch.allclose(given[0], given[1], rtol=0.01)


def test_a_grad_scaler_changes_no_bit():
    model = ref.adapted_model(torch.float32)
    twin = ref.adapted_model(torch.float32)
    batches = [ref.batch(dtype=torch.float32)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    same = {"sigma": 0.3, "seed": 0, "max_grad_norm": 0.01}

    flat_lora_step(model, ref.loss_fn, batches, ref.sgd(model), **same)
    flat_lora_step(twin, ref.loss_fn, batches, ref.sgd(twin), **same, scaler=scaler)

    ref.assert_same_bits(ref.adapters(twin), ref.adapters(model))


def test_a_grad_scaler_passes_over_an_overflow():
    model = ref.adapted_model(torch.float32)
    batches = [ref.batch(dtype=torch.float32)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    start = ref.adapters(model)

    def large_loss_fn(model, batch):
        return 100 * ref.loss_fn(model, batch)  # times 2^127, infinite in float32

    flat_lora_step(model, large_loss_fn, batches, ref.sgd(model), sigma=0.3, seed=0, scaler=scaler)

    ref.assert_same_bits(ref.adapters(model), start)
    assert scaler.get_scale() == 2.0**126


# ---- The optimizer ----


def test_an_optimizer_made_before_the_adapters_is_an_error():
    model = ref.plain_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inject_lora(model, r=3)
    with pytest.raises(ValueError, match=r"does not hold .*0\.lora_A"):
        ref.flat_step(model, ref.loss_fn, [ref.batch()], optimizer)


def test_an_optimizer_made_before_a_later_injection_is_an_error():
    model = inject_lora(ref.plain_model(), targets=["0"])
    optimizer = ref.sgd(model)
    inject_lora(model, targets=["2"])
    with pytest.raises(ValueError, match=r"does not hold .*2\.lora_A"):
        ref.flat_step(model, ref.loss_fn, [ref.batch()], optimizer)


def test_an_optimizer_of_a_copy_is_an_error():
    model = ref.adapted_model()
    optimizer = ref.sgd(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"does not hold .*0\.lora_A"):
        ref.flat_step(model, ref.loss_fn, [ref.batch()], optimizer)


def test_an_optimizer_that_holds_the_base_is_an_error():
    model = ref.adapted_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds 3 frozen parameters"):
        ref.flat_step(model, ref.loss_fn, [ref.batch()], optimizer)
