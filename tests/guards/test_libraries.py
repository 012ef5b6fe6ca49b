"""train_gpt2.py with transformers and PEFT: GPT-2 and its tokenizer, adapters as files, noise in PEFT's models."""

import importlib
import json
import os
import re
import time
from textwrap import indent

import numpy as np
import pytest
import reference as ref
import torch
from running import ending, results, run
from torch import nn

import flatlora
import train_gpt2

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: nothing here needs a network
try:
    transformers, peft, tokenizers = map(importlib.import_module, ("transformers", "peft", "tokenizers"))
    safetensors = importlib.import_module("safetensors.torch")
except Exception:  # under a torch before 2.6 transformers raises a NameError
    pytest.skip('needs the extra gpt2 and torch 2.6: pip install -e ".[gpt2]"', allow_module_level=True)

NAMES = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}
TOKENS = torch.randint(600, (2, 12), generator=torch.Generator().manual_seed(1))  # (B, T)


def fill(model, std=0.2, part=""):
    """Every parameter random, biases, norms and B included, so that none can be left out without a trace."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if part in name:
            p.data = torch.randn(p.shape, generator=generator) * std + ("ln" in name or "norm" in name)
    return model.eval()


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def theirs(kind="gpt2", **settings):
    if kind == "gpt2":
        sizes = {"vocab_size": 600, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return fill(transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | settings))))
    config = transformers.LlamaConfig(vocab_size=600, num_key_value_heads=1, **SMALL)
    return fill(transformers.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with its tokenizer, saved by transformers: tokenizer.json alone."""
    path = tmp_path_factory.mktemp("gpt2")
    theirs().save_pretrained(path)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([flatlora.__doc__], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(path)
    assert not (path / "vocab.json").exists()
    return path


def ours(kind, folder):
    """The same as `theirs`, for flatlora."""
    return train_gpt2.load_gpt2(str(folder))[0] if kind == "gpt2" else theirs(kind)


def logits(model, tokens=TOKENS):
    found = model(tokens)
    return getattr(found, "logits", found)  # (B, T, 600)


def same(a, b):
    return torch.allclose(logits(a), logits(b), rtol=0, atol=1e-5)


# ---- GPT-2 ---------------------------------------------------------------------------------------------------
def test_logits_are_those_of_transformers(folder):
    model = ours("gpt2", folder)
    assert same(model, theirs())
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_a_missing_weight_is_an_error(folder, tmp_path):
    model = theirs()
    state = model.state_dict()
    state.pop("transformer.h.1.attn.c_attn.bias")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"its weights are not those of GPT-2: .*c_attn\.bias"):
        train_gpt2.load_gpt2(str(tmp_path))


@pytest.mark.parametrize(
    "change", [{"activation_function": "gelu"}, {"scale_attn_by_inverse_layer_idx": True}], ids=str
)
def test_settings_that_compute_something_else_are_an_error(change, folder, tmp_path):
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="its settings are not those of GPT-2"):
        train_gpt2.load_gpt2(str(tmp_path))


def test_another_model_and_a_missing_one_end_in_one_line(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    words = ["--text", flatlora.__file__, "--block-size=16", "--init"]
    assert "cannot be used" in ending(tmp_path / "out", *words, tmp_path)
    assert "nowhere cannot be used" in ending(tmp_path / "out", *words, "nowhere")


@pytest.mark.parametrize("text", ["", "\n", "naïve Ünïcödé 日本 🤷🏽‍♀️ \r\n\x85 x'S  ", flatlora.__doc__])
def test_text_survives_the_tokenizer(text, folder):
    _, tokenizer = train_gpt2.load_gpt2(str(folder))
    tokens = train_gpt2.encode(tokenizer, text.encode())
    assert train_gpt2.decode(tokenizer, tokens.tolist()) == text


WORDS = ["--block-size=16", "--batch-size=2", "--grad-accum=1", "--steps=2", "--lr=0.1", "--r=2", "--eval-windows=4"]


def test_a_folder_is_fine_tuned_and_served_by_peft_and_both_write_a_text(folder, tmp_path, capsys):
    words = [*WORDS, "--init", folder, "--text", flatlora.__file__]
    assert len(run(tmp_path, *words, "--peft", "--prompt=def test")) == 4  # lora and flat
    printed = capsys.readouterr().out
    adapter = next(path for path in tmp_path.glob("flat-0-*") if path.is_dir())
    served = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()  # which reads the base's folder in it
    base, tokenizer = train_gpt2.load_gpt2(str(folder))
    model = train_gpt2.model_for(base, "flat", train_gpt2.Recipe(r=2, alpha=16.0)).eval()
    train_gpt2.restore(model, train_gpt2.load(adapter.with_suffix(".pt"))["trained"])
    assert same(model, served)
    assert not same(model, theirs())

    for name, one in {"base": base, "flat": model}.items():
        tokens = train_gpt2.encode(tokenizer, b"def test").tolist()
        text = train_gpt2.decode(tokenizer, train_gpt2.generate(one, tokens, 200))
        assert f"{name} writes:\n\n{indent(text, '    ')}\n" in printed


def test_files_of_nanogpt_are_used(folder, tmp_path):
    """Every window lies in train.bin, and the losses of the base are those of the halves of val.bin."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 300, 500, dtype=np.uint16)
    val = rng.integers(300, 600, 500, dtype=np.uint16)
    train.tofile(tmp_path / "train.bin")
    val.tofile(tmp_path / "val.bin")
    steps = run(tmp_path / "out", *WORDS, "--init", folder, "--data", tmp_path)
    for _, _, batches, _ in steps:
        for x in batches[0][0]:
            window = x.cpu().numpy().astype(np.uint16)
            assert window.tobytes() in train.tobytes()
    model = ours("gpt2", folder)
    halves = {"val": val[:250], "test": val[250:]}
    for name, part in halves.items():
        data = {key: torch.from_numpy(part) for key in ("val", "test", "ood")}
        recipe = train_gpt2.Recipe(block_size=16, batch_size=2, eval_windows=4)
        expected = train_gpt2.losses(model, data, recipe)["val_loss"]
        of_base = results(tmp_path / "out")["runs"][0]
        assert of_base[f"{name}_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_missing_extra_is_named_before_the_first_step(monkeypatch, tmp_path):
    real = importlib.import_module

    def missing(name):
        if name in ("transformers", "peft"):
            raise ImportError("no module")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    words = ["--init", tmp_path, "--text", flatlora.__file__]
    assert 'transformers is needed (ImportError: no module): pip install -e ".[gpt2]"' in ending(tmp_path, *words)
    assert "peft is needed" in ending(tmp_path, *words, "--peft")


# ---- Adapters in PEFT's files --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, wrap", [("gpt2", ref.data_parallel), ("llama", torch.compile)])
def test_peft_loads_what_is_saved(kind, wrap, folder, tmp_path):
    first, *others = NAMES[kind]
    model = flatlora.inject_lora(ours(kind, folder), 2, 8, targets=[first])
    flatlora.inject_lora(model, 3, 6, targets=others)  # another rank and scaling
    fill(model, 0.1, "lora_")
    train_gpt2.save_peft(wrap(model), tmp_path, "the base", fan_in_fan_out=kind == "gpt2")
    loaded = peft.PeftModel.from_pretrained(theirs(kind), tmp_path).eval()
    assert same(loaded, model)
    assert not same(loaded, theirs(kind))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] == (kind == "gpt2")


SETTINGS = {"plain": {}, "rslora": {"use_rslora": True}, "head": {"modules_to_save": ["lm_head"]}}
SETTINGS |= {init: {"init_lora_weights": init} for init in ("gaussian", "orthogonal")}
SETTINGS["patterns"] = {"rank_pattern": {".*_proj": 2}, "alpha_pattern": {r".*\.(c_attn|q_proj)": 3}}
SETTINGS["both"] = {"use_rslora": True, "rank_pattern": {r".*\.1\..*": 5}, "alpha_pattern": {"c_proj|v_proj": 5}}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", NAMES)
def test_what_peft_trained_is_loaded_trained_on_and_goes_back(kind, settings, folder, tmp_path):
    more = {"target_modules": NAMES[kind], "fan_in_fan_out": kind == "gpt2", **SETTINGS[settings]}
    trained = peft.get_peft_model(theirs(kind), peft.LoraConfig(r=4, lora_alpha=6, **more))
    fill(fill(trained, 0.1, "lora_"), 0.3, "modules_to_save").save_pretrained(tmp_path)
    if kind == "gpt2" and settings == "head":  # the head is tied to the embedding, and PEFT trains a copy
        with pytest.raises(ValueError, match="tied weight"):
            train_gpt2.load_peft(ours(kind, folder), tmp_path)
        return
    model = train_gpt2.load_peft(ours(kind, folder), tmp_path)
    assert same(model, trained)
    assert not same(model, theirs(kind))
    fill(model, 0.2, "lora_")  # in place of training
    train_gpt2.save_peft(model, tmp_path, "the base", fan_in_fan_out=kind == "gpt2")
    assert same(peft.PeftModel.from_pretrained(theirs(kind), tmp_path).eval(), model)
    assert not same(model, trained)


def test_a_classification_head_goes_to_peft_and_back(tmp_path):
    def make():
        config = transformers.LlamaConfig(vocab_size=600, num_key_value_heads=1, pad_token_id=0, **SMALL)
        return fill(transformers.LlamaForSequenceClassification(config))

    model = flatlora.inject_lora(make(), 2, 8, targets=["q_proj"], modules_to_save=["score"])
    fill(fill(model, 0.1, "lora_"), 0.4, "score")
    train_gpt2.save_peft(model, tmp_path, "the base", task_type="SEQ_CLS")
    assert same(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), model)
    assert same(train_gpt2.load_peft(make(), tmp_path), model)
    assert not same(make(), model)

    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    del tensors["base_model.model.score.weight"]
    safetensors.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"cannot be used: .*score\.weight"):
        train_gpt2.load_peft(make(), tmp_path)


def test_a_short_name_does_not_lend_its_rank_to_a_longer_one(tmp_path):
    def make():
        model = nn.Sequential(nn.Embedding(600, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model.append(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
        return fill(model)

    model = flatlora.inject_lora(make(), 2, 5, targets=r"1|3\.2")
    flatlora.inject_lora(model, 3, 5, targets="2")
    fill(model, 0.2, "lora_")
    train_gpt2.save_peft(model, tmp_path, "the base")
    assert same(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), model)
    assert not same(make(), model)
    assert same(train_gpt2.load_peft(make(), tmp_path), model)


MORE = {
    "use_dora": {"use_dora": True},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "lora_bias": {"lora_bias": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("words", [*MORE, "of_the_future"])
def test_more_than_lora_is_refused_by_name(words, tmp_path):
    base = theirs("llama")
    model = theirs("llama")
    for each in (base, model):
        each.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(16))
    config = peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **MORE.get(words, {})})
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    if words == "of_the_future":
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {words: 1}))
    with pytest.raises(ValueError, match=words):
        train_gpt2.load_peft(model, tmp_path)
    assert not any(isinstance(module, flatlora.LoRALinear) for module in model.modules())


def test_what_is_trained_beside_the_adapters_is_an_error(tmp_path):
    model = flatlora.inject_lora(theirs("llama"), 2, targets=["q_proj"])
    model.model.layers[0].self_attn.q_proj.base.bias = nn.Parameter(torch.ones(16))
    with pytest.raises(ValueError, match=r"q_proj\.base\.bias"):
        train_gpt2.save_peft(model, tmp_path / "adapter", "the base")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], [r"gate_proj", "up_proj", "down_proj"]])
def test_a_mixture_of_experts_is_served_or_refused(targets, tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    config = transformers.Qwen3MoeConfig(vocab_size=600, num_key_value_heads=1, head_dim=8, **SMALL, **sizes)

    def make():
        return fill(transformers.Qwen3MoeForCausalLM(config))

    model = fill(flatlora.inject_lora(make(), 2, 8, targets=targets), 0.2, "lora_")
    if "gate_proj" in targets:  # of the dense first layer; PEFT takes these names for the experts
        with pytest.raises(ValueError, match="the adapter, tried in PEFT, cannot be used"):
            train_gpt2.save_peft(model, tmp_path / "adapter", "the base")
        assert not (tmp_path / "adapter").exists()
    else:
        train_gpt2.save_peft(model, tmp_path, "the base")
        assert same(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), model)
        assert not same(make(), model)


def without_a(tensors):
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]


def with_another(tensors):
    tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"] = torch.ones(2, 16)


def of_another_shape(tensors):
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 16)


CHANGES = {"missing or left over, .*q_proj.lora_A": without_a, "no place for .*o_proj.lora_A": with_another}
CHANGES |= {"size mismatch for .*q_proj.lora_A": of_another_shape}


@pytest.mark.parametrize("words", CHANGES)
def test_missing_and_unexpected_tensors_are_an_error_and_change_nothing(words, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 3})
    peft.get_peft_model(theirs("llama"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    CHANGES[words](tensors)
    safetensors.save_file(tensors, path)
    model = theirs("llama")
    with pytest.raises(ValueError, match=words):
        train_gpt2.load_peft(model, tmp_path)
    assert not any(isinstance(module, flatlora.LoRALinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_plain_adapter_has_a_plain_configuration(tmp_path):
    """Programs that serve adapters read r and lora_alpha, not all of them the patterns."""
    model = flatlora.inject_lora(theirs("llama"), 2, 8, targets=["q_proj", "v_proj"])
    train_gpt2.save_peft(model, tmp_path, "the base", task_type="CAUSAL_LM")
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"]) == (2, 8)
    assert found["rank_pattern"] == found["alpha_pattern"] == {}
    assert (found["task_type"], found["base_model_name_or_path"]) == ("CAUSAL_LM", "the base")


def test_a_model_with_adapters_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = flatlora.inject_lora(theirs("llama"), 2, targets=["v_proj"])
    with pytest.raises(ValueError, match="has adapters already"):
        train_gpt2.load_peft(model, tmp_path)


def test_four_hundred_layers_load_in_seconds(tmp_path):
    def make():
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(400)))

    peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=".*[0-9]")).save_pretrained(tmp_path)
    begin = time.process_time()
    model = train_gpt2.load_peft(make(), tmp_path)
    train_gpt2.save_peft(model, tmp_path / "again", "the base")
    assert time.process_time() - begin < 10
    assert len(flatlora.lora_layers(model)) == 400


# ---- Noise in PEFT's models ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", NAMES)
def test_noise_in_a_peft_model_is_that_of_inject_lora(kind, folder, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=NAMES[kind], fan_in_fan_out=kind == "gpt2")
    model = fill(peft.get_peft_model(theirs(kind), config), 0.2, "lora_")
    model.save_pretrained(tmp_path)
    own = train_gpt2.load_peft(ours(kind, folder), tmp_path)
    clean = logits(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with train_gpt2.perturbed_peft(model, 0.3, (1, 2)), flatlora.perturbed(own, 0.3, (1, 2)):
        noisy = logits(model)
        largest = noisy.abs().max().item()
        torch.testing.assert_close(noisy, logits(own), rtol=0, atol=1e-6 * largest)
        noisy.square().mean().backward()
        logits(own).square().mean().backward()
        for name, layer in flatlora.lora_layers(own).items():
            base = model.get_submodule(f"base_model.model.{name}").base_layer
            noise = base.forward.keywords["noise"]
            assert torch.equal(noise.normals, layer.noise.normals)
            assert torch.equal(noise.signed_std.sign(), layer.noise.signed_std.sign())
            torch.testing.assert_close(noise.signed_std, layer.noise.signed_std)
            A = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
            torch.testing.assert_close(A.grad, layer.lora_A.grad, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(noisy, clean, atol=1e-2)
    assert torch.equal(logits(model), clean)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


class Noisy(transformers.Trainer):
    def training_step(self, model, *rest):
        with train_gpt2.perturbed_peft(model, 0.5, seed=(0, self.state.global_step)):
            return super().training_step(model, *rest)


def test_trainer_trains_under_noise_with_accumulation_and_peft_loads_it(tmp_path):
    def trained(kind):
        torch.manual_seed(0)
        model = adapted(target_modules=["q_proj", "v_proj"])
        data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
        options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
        args = transformers.TrainingArguments(str(tmp_path / "trainer"), **options)
        kind(model, args, train_dataset=data).train()
        return model.eval()

    noisy = trained(Noisy)
    assert not same(noisy, trained(transformers.Trainer))
    noisy.save_pretrained(tmp_path)
    assert same(peft.PeftModel.from_pretrained(theirs("llama"), tmp_path).eval(), noisy)
    assert same(train_gpt2.load_peft(theirs("llama"), tmp_path), noisy)


def adapted(**settings):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
    return peft.get_peft_model(theirs("llama"), config)


def two_active():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model = adapted()
    model.merge_adapter()
    return model


def disabled():
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


def in_eight_bits():
    model = adapted()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


REFUSED = {
    "more than plain LoRA": lambda: adapted(use_dora=True),
    "nn.Linear or Conv1D": lambda: adapted(target_modules=["embed_tokens"]),
    "one active adapter, .*'other'": two_active,
    "not merged": merged,
    "not disabled": disabled,
    "int8": in_eight_bits,
    "call get_peft_model": lambda: theirs("llama"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_plain_lora_is_refused_before_anything_changes(words):
    model = REFUSED[words]()
    with pytest.raises(ValueError, match=words), train_gpt2.perturbed_peft(model, 0.1, 0):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


def test_perturbations_of_a_peft_model_do_not_nest_and_end_with_an_error():
    model = adapted()
    clean = logits(model)
    noisy = train_gpt2.perturbed_peft(model, 0.1, 0)
    with pytest.raises(ValueError, match="do not nest"), noisy, train_gpt2.perturbed_peft(model, 0.1, 0):
        pass
    assert torch.equal(logits(model), clean)
    words = re.escape("sigma must be a finite number >= 0")
    with pytest.raises(ValueError, match=words), train_gpt2.perturbed_peft(model, -1, 0):
        pass
