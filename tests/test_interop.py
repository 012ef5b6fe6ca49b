"""The same weights in `transformers` and `peft`: equal logits, gradients and text, and adapters that go both ways."""

import json
import os
import re
import warnings
from collections import OrderedDict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: nothing here needs a network

import pytest
import torch
import torch.nn.functional as F
from reference import frozen_bytes

import train_gpt2
from flatlora import (
    LoRALinear,
    flat_lora_step,
    inject_lora,
    load_peft,
    lora_parameters,
    merge_lora,
    read_safetensors,
    save_peft,
)

REASON = 'needs the extra interop: pip install -e ".[interop]"'
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=REASON)

GPT2_LAYERS = ["c_attn", "c_proj", "c_fc"]
LLAMA_LAYERS = ["q_proj", "v_proj", "down_proj"]
CPU = torch.device("cpu")


def randomise(model, std=0.2):
    """All parameters random, biases and norms included, so that none can be left out without a trace."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + ("ln" in name or "norm" in name))
    return model.eval()


def hf_gpt2(cls=transformers.GPT2LMHeadModel, **changes):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 70, **changes}
    return randomise(cls(transformers.GPT2Config(**sizes)))


def hf_llama():
    config = transformers.LlamaConfig(
        vocab_size=70, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return randomise(transformers.LlamaForCausalLM(config))


def hf_bert():
    config = transformers.BertConfig(
        vocab_size=70, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return randomise(transformers.BertForMaskedLM(config))


def tokens(batch=2, length=12):
    return torch.randint(70, (batch, length), generator=torch.Generator().manual_seed(1))


def ours(folder):
    return train_gpt2.load_gpt2(str(folder), train_gpt2.gpt2_config(str(folder), 0.0), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 as transformers saves it."""
    path = tmp_path_factory.mktemp("hf")
    hf_gpt2().save_pretrained(path)
    return path


def clone_state(model):
    return {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}


def write_layout(layout, folder):
    """The four forms in which a GPT-2 is met, of one model."""
    model = hf_gpt2()
    model.save_pretrained(folder)
    state = clone_state(model)
    if layout in ("bin", "bare bin"):
        (folder / "model.safetensors").unlink()
    if layout in ("bare", "bare bin"):  # the released file: no prefix, no head, the causal mask as a buffer
        del state["lm_head.weight"]
        state = {k.removeprefix("transformer."): v for k, v in state.items()}
        for i in range(2):
            state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if layout == "bare":
        safetensors_torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout != "safetensors":
        torch.save(state, folder / "pytorch_model.bin")
    return model


# ---- GPT-2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "bare", "bin", "bare bin"])
def test_logits_and_gradients_are_those_of_transformers(tmp_path, layout):
    theirs = write_layout(layout, tmp_path)
    model, x = ours(tmp_path), tokens()
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-5, atol=1e-5)
    for m in (model, theirs):
        logits = m(x) if m is model else m(x).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        conv1d = re.search(r"\.c_\w+\.weight$", name)
        torch.testing.assert_close(grad, expected[name].T if conv1d else expected[name], rtol=1e-5, atol=1e-5)


def test_greedy_text_is_that_of_transformers(tmp_path):
    theirs, prompt = hf_gpt2(), tokens(1, 5)
    theirs.transformer.wpe.weight.data.mul_(20)  # else a tied random model repeats its last token
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None)
    got = train_gpt2.generate(ours(tmp_path), prompt[0].tolist(), 20, temperature=1.0, top_k=1, seed=0)
    assert got == expected[0, 5:].tolist() and len(set(got)) > 3


def test_the_loaded_model_is_tied_and_owns_its_memory(folder):
    model = ours(folder)
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())
    inject_lora(model, r=2, targets=".*")  # the head shares its weight and is passed over
    assert type(model.lm_head) is torch.nn.Linear


def write_vocabulary(folder):
    """vocab.json and merges.txt of 600 tokens, learnt from a text; the text and the tokenizer that wrote them."""
    pytest.importorskip("tiktoken", reason='needs the extra gpt2: pip install -e ".[gpt2]"')
    tokenizers = pytest.importorskip("tokenizers", reason=REASON)
    text = (
        Path(__file__).with_name("test_lora.py").read_text() + " naïve Ünïcödé  words,\n\n\n  they'll 1234 do...  \t"
    ) * 2
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    return text, bpe


def test_the_byte_pairs_are_those_of_the_tokenizers_library(tmp_path):
    text, bpe = write_vocabulary(tmp_path)
    encode, decode = train_gpt2.tokenizer(str(tmp_path))
    ids = encode(text.encode())
    assert ids == bpe.encode(text).ids and len(ids) < len(text.encode()) / 2
    assert decode(ids) == text.encode()
    end = bpe.token_to_id("<|endoftext|>")
    assert decode([end, 600]).decode() == "<|endoftext|>\N{REPLACEMENT CHARACTER}"  # 600: no word of these
    for damaged in ("{", "[]", '{"a": 0}', '{"<|endoftext|>": 0, "\\u4e00": 1}'):
        (tmp_path / "vocab.json").write_text(damaged)
        with pytest.raises(ValueError, match="not a vocabulary of GPT-2's kind"):
            train_gpt2.tokenizer(str(tmp_path))


def test_text_goes_in_and_comes_out_as_byte_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hf_gpt2(vocab_size=600).save_pretrained("base")
    text, bpe = write_vocabulary(tmp_path / "base")
    Path("my.txt").write_text(text)
    options = ["--init", "base", "--text", "my.txt", "--block-size", "16", "--steps", "2", "--lr", "0.01"]
    options += ["--prompt", "def test", "--length", "20"]
    monkeypatch.setattr("sys.argv", ["script", *options])
    train_gpt2.main()
    results = json.loads(Path("out/results.json").read_text())
    part = text.encode()[4 * len(text.encode()) // 5 :].decode(errors="replace")
    tokens_a_byte = len(bpe.encode(part).ids) / len(part.encode())
    for run in results["runs"]:
        assert run["test_bits"] == pytest.approx(run["test_loss"] / 0.6931472 * tokens_a_byte, rel=1e-3)
        assert "ood_loss" not in run
    assert capsys.readouterr().out.count("validation") == 1  # the table; two steps are below the interval
    Path("base").rename("moved")
    monkeypatch.setattr(
        "sys.argv", ["script", "--sample", "--adapter", "out/flat.pt", "--init", "moved", *options[-4:]]
    )
    train_gpt2.main()
    assert capsys.readouterr().out.split("-\n", 1)[1] == results["samples"]["flat"] + "\n"
    assert (
        results["samples"]["flat"].startswith("def test") and results["samples"]["flat"] != results["samples"]["base"]
    )


def test_the_command_line_fine_tunes_samples_and_writes_for_peft(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for name, size in (("train", 400), ("val", 200)):
        ids = torch.randint(70, (size,), generator=torch.Generator().manual_seed(size))
        (tmp_path / "data" / f"{name}.bin").write_bytes(ids.to(torch.int16).numpy().tobytes())
    monkeypatch.chdir(tmp_path)
    options = ["--init", str(folder), "--data", "data", "--peft", "--block-size", "16", "--steps", "4", "--r", "2"]
    monkeypatch.setattr("sys.argv", ["script", *options, "--eval-interval", "2", "--lr", "0.01"])
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    train_gpt2.main()
    printed = capsys.readouterr().out
    assert "step 2: validation" in printed and "step 4: validation" in printed
    assert "Text as each model goes on" not in printed  # no vocab.json, no network, and none is needed
    result = json.loads(Path("out/results.json").read_text())["runs"]
    assert [r["method"] for r in result] == ["base", "flat"] and all(r.get("ood_loss") is None for r in result)
    model = inject_lora(ours(folder), 2, 16, targets=train_gpt2.TARGETS)
    content = torch.load("out/flat.pt", weights_only=True)
    assert content["base"] == str(folder)
    train_gpt2.load_lora_state_dict(model, content["adapters"])
    served = peft.PeftModel.from_pretrained(hf_gpt2(), "out/flat").eval()
    torch.testing.assert_close(served(tokens()).logits, model(tokens()), rtol=1e-5, atol=1e-5)
    assert (model(tokens()) - ours(folder)(tokens())).abs().max() > 1e-3


def no_network(url, path, **options):
    raise OSError("no route to host")


# ---- PEFT ----------------------------------------------------------------------------------------------------


def pair(kind, folder):
    """The model as flatlora trains it, the one that PEFT loads on, and the layers to adapt."""
    if kind == "gpt2":
        return ours(folder), hf_gpt2(), GPT2_LAYERS
    return hf_llama(), hf_llama(), LLAMA_LAYERS


def logits(model):
    out = model(tokens())
    return getattr(out, "logits", out)


def fill(model):
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_loads_what_save_peft_writes(kind, folder, tmp_path):
    model, theirs, names = pair(kind, folder)
    inject_lora(model, r=2, alpha=8, targets=names[:1])
    inject_lora(model, r=3, alpha=6, targets=names[1:])  # other layers, another rank and scaling
    save_peft(fill(model).eval(), tmp_path, "the base", fan_in_fan_out=kind == "gpt2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert not [str(w.message) for w in caught if "fan_in" in str(w.message) or "keys" in str(w.message)]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(pair(kind, folder)[0])).abs().max() > 0.01
    keys = read_safetensors(tmp_path / "adapter_model.safetensors")
    name = "transformer.h.0.attn.c_attn" if kind == "gpt2" else "model.layers.0.self_attn.q_proj"
    assert keys[f"base_model.model.{name}.lora_A.weight"].shape == (2, 16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (kind == "gpt2") and config["base_model_name_or_path"] == "the base"


def test_a_short_name_does_not_lend_its_rank_to_a_longer_one(tmp_path):
    def make():
        linear = lambda: torch.nn.Linear(8, 8)  # noqa: E731
        layers = {"first": linear(), "0": linear(), "1": torch.nn.Sequential(linear())}
        return randomise(torch.nn.Sequential(OrderedDict(layers)))

    model, x = inject_lora(make(), r=2, targets=["first"]), torch.randn(3, 8)
    inject_lora(model, r=3, alpha=5, targets="0")
    inject_lora(model, r=2, targets=r"1\.0")
    save_peft(fill(model), tmp_path, "the base")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(loaded(x), model(x))
    torch.testing.assert_close(load_peft(make(), tmp_path)(x), model(x))


SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {".*_proj": 2}, "alpha_pattern": {r".*\.(c_attn|q_proj)": 3}},
    {"use_rslora": True, "rank_pattern": {r".*\.1\..*": 5}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "rslora", "patterns", "both"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_load_peft_reads_what_peft_trained(kind, settings, folder, tmp_path):
    model, theirs, names = pair(kind, folder)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=kind == "gpt2", **settings)
    theirs = fill(peft.get_peft_model(theirs, config)).eval()
    theirs.save_pretrained(tmp_path)
    before, frozen = logits(model), {id(p) for p in model.parameters()}
    assert load_peft(model, tmp_path) is model
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - before).abs().max() > 0.01
    assert [p.requires_grad for p in model.parameters()] == [id(p) not in frozen for p in model.parameters()]
    torch.testing.assert_close(logits(merge_lora(model)), logits(theirs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_peft_adapter_is_trained_on_and_goes_back(kind, folder, tmp_path):
    model, theirs, names = pair(kind, folder)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=kind == "gpt2")
    fill(peft.get_peft_model(theirs, config)).save_pretrained(tmp_path / "before")
    before = logits(load_peft(model, tmp_path / "before")).detach()
    train(model)
    save_peft(model.eval(), tmp_path / "after", "the base", fan_in_fan_out=kind == "gpt2")
    loaded = peft.PeftModel.from_pretrained(pair(kind, folder)[1], tmp_path / "after").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - before).abs().max() > 0.01


def edit(folder, change_config=None, change_state=None):
    config, state = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if change_config:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change_config}))
    if change_state:
        tensors = read_safetensors(state)
        change_state(tensors)
        safetensors_torch.save_file(tensors, state)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "state", "words"),
    [
        ({"use_dora": True}, None, "no more, got {'use_dora': True}"),
        ({"bias": "all"}, None, "got {'bias': 'all'}"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, None, "pissa"),
        ({"peft_type": "IA3"}, None, "IA3"),
        ({"a_setting_of_the_future": 1}, None, "a_setting_of_the_future"),
        ({"r": 3}, None, "another shape .*q_proj.lora_A"),
        ({"r": None}, None, "q_proj: r must be an integer from 1 to"),
        (None, lambda state: state.pop(A), r"missing .*q_proj.lora_A"),
        (None, lambda state: state.update({A: torch.ones(4, 3)}), "another shape .*q_proj.lora_A"),
        (None, lambda state: state.update({A.replace("q_", "x_"): torch.ones(4, 3)}), "not in the model .*x_proj"),
        (
            None,
            lambda state: state.update({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}),
            "not in the model .*lora_magnitude_vector",
        ),
        (None, lambda state: state.update({"lm_head.weight": torch.ones(3)}), "not in the model .*lm_head.weight"),
        (None, lambda state: state.clear(), "got none"),
    ],
)
def test_more_or_less_than_lora_is_refused_by_name(tmp_path, config, state, words):
    settings = peft.LoraConfig(r=4, target_modules=LLAMA_LAYERS)
    fill(peft.get_peft_model(hf_llama(), settings)).save_pretrained(tmp_path)
    edit(tmp_path, config, state)
    model = hf_llama()
    with pytest.raises(ValueError, match=words):
        load_peft(model, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed


def test_a_damaged_file_and_a_model_with_adapters_are_refused(tmp_path):
    model = inject_lora(hf_llama(), r=2, targets=LLAMA_LAYERS)
    save_peft(model, tmp_path, "the base")
    with pytest.raises(ValueError, match="has LoRALinear layers already"):
        load_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or no safetensors file"):
        load_peft(hf_llama(), tmp_path)
    for nameless in (hf_llama(), LoRALinear(torch.nn.Linear(4, 4), r=2)):
        with pytest.raises(ValueError, match=r"inject_lora first|has no name in PEFT's files"):
            save_peft(nameless, tmp_path, "the base")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_peft(hf_llama(), tmp_path / "nowhere")


# ---- Any model -----------------------------------------------------------------------------------------------


def train(model, steps=4):
    """A few Flat-LoRA steps; the sum of the gradients' sizes of each adapter over them."""
    optimizer, sizes = torch.optim.AdamW(lora_parameters(model), lr=0.02), 0
    losses = []

    def loss_fn(model, batch):
        return F.cross_entropy(logits(model).flatten(0, 1), batch.flatten())

    for step in range(steps):
        losses.append(flat_lora_step(model, loss_fn, [tokens()], optimizer, 0.02, (0, step)))
        sizes = sizes + torch.stack([p.grad.abs().max() for p in lora_parameters(model)])
    return losses, sizes


@pytest.mark.parametrize(
    ("make", "targets"),
    [(hf_llama, ".*_proj"), (hf_bert, r".*(query|key|value|dense)"), (hf_bert, ["query", "value"])],
)
def test_hugging_face_models_train_as_they_are(make, targets):
    model = inject_lora(make(), r=2, targets=targets)
    assert {type(m) for n, m in model.named_modules() if n.endswith(("q_proj", "query"))} == {LoRALinear}
    base = frozen_bytes(model)
    losses, sizes = train(model)
    assert losses[-1] < losses[0]
    assert (sizes > 0).all()  # every adapter is in the computation: none is read past its forward
    assert frozen_bytes(model) == base
    expected = logits(model.eval())
    torch.testing.assert_close(logits(merge_lora(model)), expected, rtol=1e-5, atol=1e-4)


def test_conv1d_is_refused_with_the_reason():
    for targets in (".*", ["c_attn"]):
        with pytest.raises(ValueError, match=r"attn.c_attn: must be a plain nn.Linear, got Conv1D: .*transposed"):
            inject_lora(hf_gpt2(), r=2, targets=targets)
    model = hf_gpt2(transformers.GPT2ForSequenceClassification)  # has one nn.Linear, `score`: no reason to pass over 8
    with pytest.raises(ValueError, match="got Conv1D"):
        inject_lora(model, r=1)


# ---- The recipes of the README -------------------------------------------------------------------------------


def test_the_hugging_face_recipes_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_llama().save_pretrained("base")
    loader = [{"input_ids": tokens(), "labels": tokens()} for _ in range(4)]
    names = {"base": "base", "loader": loader, "total_steps": 4, "run_seed": 0}
    text = (Path(__file__).parent.parent / "README.md").read_text()
    fine_tune, go_on = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(fine_tune, names)
    loaded = peft.PeftModel.from_pretrained(hf_llama(), "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(names["model"].eval()), rtol=1e-5, atol=1e-5)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA_LAYERS)
    fill(peft.get_peft_model(hf_llama(), settings)).save_pretrained("adapter")  # one that PEFT trained
    exec(go_on, names)
    loaded = peft.PeftModel.from_pretrained(hf_llama(), "adapter-flat").eval()
    torch.testing.assert_close(logits(loaded), logits(names["model"].eval()), rtol=1e-5, atol=1e-5)
    assert len(lora_parameters(names["model"])) == 2 * 2 * len(LLAMA_LAYERS)
