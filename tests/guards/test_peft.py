"""Noise in models with LoRA from PEFT, on nn.Linear, GPT-2's Conv1D and 4-bit layers, in the usual ways of training."""

import copy
import pickle
import tempfile

import pytest
import reference as ref
import torch
from libraries import library, needs_torch_27
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import flatlora
from flatlora import lora_parameters, perturbed

accelerate, bitsandbytes, peft, transformers = map(library, ["accelerate", "bitsandbytes", "peft", "transformers"])

TOKENS = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(1))  # (B, T)
SEED = (1, 2)

# ---- Models --------------------------------------------------------------------------------------------------


def filled(model, part=""):
    """All parameters random, B included, so that leaving one out changes the output."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if part in name:
            p.data = 0.2 * torch.randn(p.shape, generator=generator) + ("norm" in name)
    return model


def llama(**settings):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, **sizes, **settings)
    return filled(transformers.LlamaForCausalLM(config))


def gpt2():
    config = transformers.GPT2Config(vocab_size=100, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return filled(transformers.GPT2LMHeadModel(config))


def quantised(**settings):
    """A Llama in 4 bits."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    with tempfile.TemporaryDirectory() as folder:
        llama(attention_bias=True).save_pretrained(folder)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    return model.train()  # otherwise bitsandbytes may pack the weights for another kernel


def adapted(base, **settings):
    targets = ["c_attn", "c_proj"] if isinstance(base, transformers.GPT2LMHeadModel) else ["q_proj", "down_proj"]
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": targets, **settings})
    return filled(peft.get_peft_model(base, config), "lora_")


def with_two_adapters(active):
    """The second one has another rank and scaling, and is only on some of the layers."""
    model = adapted(llama())
    model.add_adapter("second", peft.LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj"]))
    model.base_model.set_adapter(active)
    return filled(model, "second")


MODELS = {
    "Linear": lambda: adapted(llama()),
    "Conv1D": lambda: adapted(gpt2(), fan_in_fan_out=True),
    "4 bits": lambda: adapted(quantised()),
    "4 bits twice": lambda: adapted(quantised(bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4")),
    "rsLoRA": lambda: adapted(llama(), use_rslora=True),
    "biases": lambda: adapted(llama(attention_bias=True), bias="lora_only"),
    "head": lambda: adapted(llama(), modules_to_save=["lm_head"]),
    "two adapters": lambda: with_two_adapters(["default", "second"]),
    "one of two": lambda: with_two_adapters(["second"]),
}
KINDS = ["Linear", "Conv1D", "4 bits"]

# ---- The slow, obvious way -----------------------------------------------------------------------------------


def numbers(tensor):
    if hasattr(tensor, "quant_state"):
        tensor = bitsandbytes.functional.dequantize_4bit(tensor, tensor.quant_state)
    return tensor.float()


def with_adapters_and_noise(W, layer, name, sigma, seed):
    """W' + eps, where W' = W + s B A summed over the active adapters. Without any, W itself."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active:
        return W
    for adapter in active:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        W = W + layer.scaling[adapter] * (B @ A)
    ones = flatlora.draw_noise(torch.ones_like(W), 1.0, seed, name)
    return W + ref.row_std(W, sigma) * ones.scale.sign() * ones.normals


def dense_call(model, tokens, sigma=0.3, seed=SEED):
    """The logits of the model without adapters whose weights are W + s B A + eps, all dequantised."""
    inner = model.get_base_model()
    plain = type(inner)(inner.config).train(inner.training)
    weights = {}
    for name, _ in plain.named_parameters():
        path, _, kind = name.rpartition(".")
        module = inner.get_submodule(path)
        if hasattr(module, "modules_to_save"):
            module = module.modules_to_save["default"]
        weight = numbers(getattr(module, kind))
        if hasattr(module, "lora_A") and kind == "weight":
            is_transposed = isinstance(module.base_layer, transformers.pytorch_utils.Conv1D)
            W = weight.T if is_transposed else weight
            W = with_adapters_and_noise(W, module, path, sigma, seed)
            weight = W.T if is_transposed else W
        weights[name] = weight
    return functional_call(plain, weights, (tokens,)).logits


def loss_of(logits, tokens):
    """The loss of predicting the next token."""
    logits, targets = logits[:, :-1], tokens[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_fn(model, tokens):
    return loss_of(model(tokens).logits, tokens)


def dense_loss(model, tokens, sigma=0.3, seed=SEED):
    return loss_of(dense_call(model, tokens, sigma, seed), tokens)


def gradients(loss, model):
    return torch.autograd.grad(loss, lora_parameters(model))


def assert_close_in_norm(given, expected, tolerance):
    errors = [one - other for one, other in zip(given, expected)]
    assert ref.norm_of(errors) < tolerance * ref.norm_of(expected)


def traces(model):
    """The class and the attribute names of each module, which show noise that is left behind."""
    return [(type(module), list(vars(module))) for module in model.modules()]


# ---- Each kind of model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_model_computes_with_w_prime_plus_eps(make):
    model = make()
    clean = model(TOKENS).logits
    before = traces(model)
    with perturbed(model, 0.3, SEED):
        loss = loss_fn(model, TOKENS)
        given = gradients(loss, model)
    expected = dense_loss(model, TOKENS)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(given, gradients(expected, model))
    assert all(gradient.any() for gradient in given)
    assert torch.equal(model(TOKENS).logits, clean)
    assert traces(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_stay_bit_identical(kind):
    model = MODELS[kind]()
    optimizer = ref.sgd(model)
    before = ref.base_bytes(model)
    for seed in range(3):
        flatlora.flat_lora_step(model, loss_fn, [TOKENS, TOKENS], optimizer, 0.3, seed)
    flatlora.sam_step(model, loss_fn, [TOKENS], optimizer, rho=0.1)
    flatlora.sharpness(model, loss_fn, [TOKENS], 0.3, samples=1, seed=0)
    assert ref.base_bytes(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_w_is_kept_for_the_backward(kind):
    model = MODELS[kind]()
    layer = flatlora.lora_layers(model).popitem()[1]
    own = {ref.storage_address(p) for p in model.parameters()}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    _, n = layer.merged_weight().shape
    x = torch.ones(3, n, requires_grad=True)
    with perturbed(model, 0.3, SEED), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer.layer(x)
    assert kept
    assert all(tensor.numel() < 16 * n or ref.storage_address(tensor) in own for tensor in kept)


def test_float32_states_before_4_bit_layers_that_compute_in_bfloat16():
    model = quantised(bnb_4bit_compute_dtype=torch.bfloat16)
    model = adapted(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    with perturbed(model, 0.3, SEED):
        given = gradients(loss_fn(model, TOKENS), model)
        for layer in flatlora.lora_layers(model).values():
            assert layer.noise.scale.dtype == torch.bfloat16
            assert layer.layer(torch.ones(3, 64)).dtype == torch.float32
    assert_close_in_norm(given, gradients(dense_loss(model, TOKENS), model), 0.1)


# ---- Usual ways of training ----------------------------------------------------------------------------------


class FlatTrainer(transformers.Trainer):
    """All micro-batches of a step see the same noise. `seen` is for the tests."""

    def training_step(self, model, inputs, *rest):
        self.seen.append(inputs["input_ids"])
        sigma = flatlora.sigma_at(self.state.global_step, self.state.max_steps, sigma=0.3)
        with perturbed(model, sigma, seed=(0, self.state.global_step)):
            return super().training_step(model, inputs, *rest)


CHECKPOINTING = {
    "none": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_gives_the_same_steps_as_the_slow_loop(kind, checkpointing, tmp_path):
    model = MODELS[kind]()
    model.enable_input_require_grads()  # for reentrant checkpointing
    twin = copy.deepcopy(model)
    rows = torch.randint(100, (12, 12), generator=torch.Generator().manual_seed(2))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.5}
    options |= {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    options |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = transformers.TrainingArguments(str(tmp_path), **options, **CHECKPOINTING[checkpointing])
    labels = rows.clone()
    labels[:, 0] = -100  # Trainer divides by the number of labels, and the first token is not predicted
    data = [{"input_ids": row, "labels": of_row} for row, of_row in zip(rows, labels)]
    trainer = FlatTrainer(model, args, train_dataset=data)
    trainer.seen = []
    trainer.train()

    optimizer = torch.optim.SGD(lora_parameters(twin), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        sigma = flatlora.sigma_at(step, 3, sigma=0.3)
        for tokens in trainer.seen[2 * step : 2 * step + 2]:
            (dense_loss(twin, tokens, sigma, (0, step)) / 2).backward()
        nn.utils.clip_grad_norm_(lora_parameters(twin), 0.5)
        optimizer.step()
    torch.testing.assert_close(ref.adapters(model), ref.adapters(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    model = MODELS[kind]()
    with perturbed(model, 0.3, SEED), torch.autocast("cpu", torch.bfloat16):
        given = gradients(loss_fn(model, TOKENS), model)
    assert_close_in_norm(given, gradients(dense_loss(model, TOKENS), model), 0.1)


SMALL = {
    "Linear": nn.Linear(16, 16),
    "Conv1D": transformers.pytorch_utils.Conv1D(16, 16),
    "4 bits": bitsandbytes.nn.Linear4bit(16, 16, compute_dtype=torch.float32).to("cpu"),
}


@needs_torch_27
@pytest.mark.parametrize("kind", KINDS)
def test_twelve_compiled_steps_with_and_without_noise_are_two_graphs(kind):
    layers = [copy.deepcopy(SMALL[kind]) for _ in range(2)]
    model = adapted(nn.Sequential(*layers), target_modules=["0", "1"])
    x = torch.randn(5, 16)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        with perturbed(model, 0.1 * (step % 3), step):
            given = gradients(compiled(x).square().sum(), model)
            expected = gradients(model(x).square().sum(), model)
        torch.testing.assert_close(given, expected)
    assert counter.frame_count <= 2


def test_disable_adapter_inside_perturbed_turns_the_noise_off():
    model = adapted(llama())
    with model.disable_adapter():
        clean = model(TOKENS).logits
    with perturbed(model, 0.3, SEED):
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, clean)
        torch.testing.assert_close(loss_fn(model, TOKENS), dense_loss(model, TOKENS))


# ---- Copies --------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_inside_perturbed_is_clean_and_can_be_perturbed_later(kind, make):
    model = MODELS[kind]()
    clean = model(TOKENS).logits
    with perturbed(model, 0.3, SEED):
        twin = make(model)
        noisy = model(TOKENS).logits
        assert torch.equal(twin(TOKENS).logits, clean)
    with perturbed(twin, 0.3, SEED):
        assert torch.equal(twin(TOKENS).logits, noisy)


# ---- Errors --------------------------------------------------------------------------------------------------


def on(layer, **settings):
    return adapted(nn.Sequential(layer), target_modules=["0"], **settings)


def after(change, model):
    change(model)
    return model


def repacked():
    """The state in which bitsandbytes leaves a layer after an evaluation on some CPUs."""
    model = adapted(quantised())
    for layer in flatlora.lora_layers(model).values():
        layer.base.weight.quant_state.packing_format_for_cpu = True
    return model


LINEAR = nn.Linear(8, 8)
REFUSED = {
    "DoRA": lambda: on(LINEAR, use_dora=True),
    "merged": lambda: after(lambda model: model.merge_adapter(), on(LINEAR)),
    "disabled": lambda: after(lambda model: model.base_model.disable_adapter_layers(), on(LINEAR)),
    "hooks": lambda: accelerate.cpu_offload(on(LINEAR)),
    "repacked": repacked,
    "Linear8bitLt": lambda: on(bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)),
    "Embedding": lambda: on(nn.Embedding(8, 8)),
    "Conv2d": lambda: on(nn.Conv2d(3, 4, 1)),
    "no LoRA layer": llama,
}


@pytest.mark.parametrize("words", REFUSED)
def test_an_adapter_that_is_more_than_lora_on_a_linear_layer_is_an_error(words):
    model = REFUSED[words]()
    before = traces(model)
    with pytest.raises(ValueError, match=words), perturbed(model, 0.3, SEED):
        pass
    assert traces(model) == before


@pytest.mark.parametrize("use", [flatlora.merge_lora, flatlora.lora_state_dict])
def test_merging_and_saving_are_left_to_peft(use):
    with pytest.raises(ValueError, match="save_pretrained, from_pretrained and merge_and_unload"):
        use(adapted(llama()))


def test_perturbing_twice_at_once_is_an_error():
    model = adapted(llama())
    with pytest.raises(RuntimeError, match="perturbed already"), perturbed(model, 0.1, 0), perturbed(model, 0.1, 1):
        pass
