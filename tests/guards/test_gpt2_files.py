"""train_gpt2.py and files from outside: Hugging Face's GPT-2, its tokenizer, PEFT's adapters, and downloads."""

import http.client
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from running import ending, run
from torch import nn

import flatlora
import train_gpt2

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: nothing here needs a network
EXTRAS = 'needs the extras interop and gpt2: pip install -e ".[interop,gpt2]"'
transformers, peft = (pytest.importorskip(name, reason=EXTRAS) for name in ("transformers", "peft"))
tokenizers, safetensors = (pytest.importorskip(name, reason=EXTRAS) for name in ("tokenizers", "safetensors.torch"))
pytest.importorskip("tiktoken", reason=EXTRAS)

NAMES = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}
TOKENS = torch.randint(600, (2, 12), generator=torch.Generator().manual_seed(1))  # (B, T)
SOURCE = Path(flatlora.__file__).read_text("utf-8")


def fill(model, std=0.2, part=""):
    """Every parameter random, biases, norms and B included, so that none can be left out without a trace."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if part in name:
            p.data = torch.randn(p.shape, generator=generator) * std + ("ln" in name or "norm" in name)
    return model.eval()


def theirs(kind="gpt2"):
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=600, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        return fill(transformers.GPT2LMHeadModel(config))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=600, num_key_value_heads=1, **sizes)
    return fill(transformers.LlamaForCausalLM(config))


def ours(kind, folder):
    """The same as `theirs`, for flatlora."""
    theirs(kind).save_pretrained(folder)
    return train_gpt2.load_gpt2(str(folder), torch.device("cpu")) if kind == "gpt2" else theirs(kind)


def same(a, b):
    logits = [getattr(out, "logits", out) for out in (a(TOKENS), b(TOKENS))]  # (B, T, 600) each
    return torch.allclose(*logits, rtol=0, atol=1e-5)


# ---- GPT-2 ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_logits_are_those_of_transformers(name, bare, tmp_path):
    assert same(ours("gpt2", tmp_path), theirs())
    state = safetensors.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if bare:  # the released file: no prefix, no head, the causal mask as a buffer
        state = {key.removeprefix("transformer."): p for key, p in state.items() if key != "lm_head.weight"}
        state |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    (torch.save if "bin" in name else safetensors.save_file)(state, tmp_path / name)
    model = train_gpt2.load_gpt2(str(tmp_path), torch.device("cpu"))
    assert same(model, theirs()) and model.lm_head.weight is model.transformer["wte"].weight


C_ATTN = "transformer.h.1.attn.c_attn"
OTHER = {
    "it is not GPT-2 with {'activation_function': 'gelu'}": ({"activation_function": "gelu"}, {}),
    "config.json cannot be used: RuntimeError: shape": ({"n_head": 3}, {}),
    f'Missing key(s) in state_dict: "{C_ATTN}.bias"': ({}, {f"{C_ATTN}.bias": None}),
    f'Unexpected key(s) in state_dict: "{C_ATTN}.mask"': ({}, {f"{C_ATTN}.mask": torch.ones(1)}),
    f"size mismatch for {C_ATTN}.weight": ({}, {f"{C_ATTN}.weight": torch.ones(48, 16)}),  # as nn.Linear, not as Conv1D
    "lm_head.weight differs from wte.weight": ({}, {"lm_head.weight": torch.ones(600, 16)}),
}


@pytest.mark.parametrize("words", OTHER)
def test_another_model_is_refused_by_name(words, tmp_path):
    ours("gpt2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | OTHER[words][0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = safetensors.load_file(tmp_path / "model.safetensors") | OTHER[words][1]
    safetensors.save_file({k: p for k, p in state.items() if p is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(words)):
        train_gpt2.load_gpt2(str(tmp_path), torch.device("cpu"))


# ---- Text ----------------------------------------------------------------------------------------------------
ODD = [
    "",
    "\n",
    "naïve Ünïcödé  words,\n\n  they'll 1234 do...  \t",
    "日本 \u200d🤷🏽‍♀️ \r\n\x00\x85\u3000 x'S  ",
    SOURCE * 5,
]
LONG = [" " * 10**6, "\n" * 10**6, f"{' ' * 10**5}word\n" * 3]  # on which tiktoken fails


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """vocab.json of 600 tokens, learnt from the texts above, and the tokenizer that wrote it."""
    bpe, folder = tokenizers.ByteLevelBPETokenizer(), tmp_path_factory.mktemp("vocabulary")
    bpe.train_from_iterator(ODD, 600, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    return folder, bpe


@pytest.mark.parametrize("text", [*ODD, *LONG], ids=range(8))
def test_tokens_are_those_of_the_tokenizers_library(text, vocabulary):
    encode, decode = train_gpt2.tokenizer(str(vocabulary[0]))
    for case in (text, f"a{text} {text}b"):  # SOURCE * 5 is longer than the pieces in which it is encoded
        assert text in LONG or encode(case.encode()) == vocabulary[1].encode(case).ids
        assert decode(encode(case.encode())) == case.encode()


def test_a_folder_is_fine_tuned_sampled_and_served_by_peft(vocabulary, tmp_path, capsys):
    base, plain = tmp_path / "base", theirs()
    model = flatlora.inject_lora(ours("gpt2", base), 2, 16, targets=train_gpt2.TARGETS)
    shutil.copy(vocabulary[0] / "vocab.json", base)
    words = ["--init", base, "--text", flatlora.__file__, "--block-size=16", "--steps=2", "--lr=0.1", "--r=2", "--peft"]
    assert len(run(tmp_path / "out", *words)) == 2 and same(model, plain)  # B is still zero
    flatlora.load_lora_state_dict(model, torch.load(tmp_path / "out" / "flat.pt", weights_only=True)["adapters"])
    assert not same(model, plain) and same(model, peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "flat"))
    encode, decode = train_gpt2.tokenizer(str(base))
    text = decode([*(tokens := encode(b"def test")), *train_gpt2.generate(model, tokens, 20)])
    base.rename(tmp_path / "moved")
    capsys.readouterr()
    words = ["--sample", tmp_path / "out" / "flat.pt", "--init", tmp_path / "moved", "--prompt", "def test"]
    run(tmp_path, *words, "--length=20")
    assert capsys.readouterr().out == text.decode(errors="replace") + "\n"


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), None])
def test_a_truncated_download_ends_in_one_line(error, monkeypatch, tmp_path):
    def download(url, path):
        content = (tmp_path / url.rpartition("/")[2]).read_bytes()
        Path(path).write_bytes(content[: 999 if "model" in url else None])
        if error:
            raise error

    ours("gpt2", tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    words = "config.json (IncompleteRead(0 bytes read)" if error else "gpt2/model.safetensors cannot be used: "
    assert words in ending(tmp_path, "--init=gpt2")


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    ours("gpt2", tmp_path)
    for module in ("tiktoken", "safetensors.torch"):  # the weights are read first
        monkeypatch.setitem(sys.modules, module, None)
        words = f'{module.partition(".")[0]} is not installed: pip install -e ".[gpt2]"'
        assert words in ending(tmp_path, "--init", tmp_path, "--text", flatlora.__file__, "--block-size=16")


# ---- Adapters in PEFT's files --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, wrap", [("gpt2", nn.DataParallel), ("llama", torch.compile)])
def test_peft_loads_what_is_saved(kind, wrap, tmp_path):
    model = flatlora.inject_lora(ours(kind, tmp_path), 2, 8, targets=NAMES[kind][:1])
    fill(flatlora.inject_lora(model, 3, 6, targets=NAMES[kind][1:]), 0.1, "lora_")  # another rank and scaling
    train_gpt2.save_peft(wrap(model), tmp_path, "the base", fan_in_fan_out=kind == "gpt2")
    loaded = peft.PeftModel.from_pretrained(theirs(kind), tmp_path).eval()
    assert same(loaded, model) and not same(loaded, theirs(kind))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] == (kind == "gpt2")


SETTINGS = {"plain": {}, "rslora": {"use_rslora": True}}
SETTINGS["patterns"] = {"rank_pattern": {".*_proj": 2}, "alpha_pattern": {r".*\.(c_attn|q_proj)": 3}}
SETTINGS["both"] = {"use_rslora": True, "rank_pattern": {r".*\.1\..*": 5}, "alpha_pattern": {"c_proj|v_proj": 5}}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", NAMES)
def test_what_peft_trained_is_loaded_trained_on_and_goes_back(kind, settings, tmp_path):
    more = {"target_modules": NAMES[kind], "fan_in_fan_out": kind == "gpt2", **SETTINGS[settings]}
    trained = fill(peft.get_peft_model(theirs(kind), peft.LoraConfig(r=4, lora_alpha=6, **more)), 0.1, "lora_")
    trained.save_pretrained(tmp_path)
    model = train_gpt2.load_peft(ours(kind, tmp_path), tmp_path)
    assert same(model, trained) and not same(model, theirs(kind))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == flatlora.lora_state_dict(model).keys()
    fill(model, 0.2, "lora_")  # in place of training
    train_gpt2.save_peft(model, tmp_path, "the base", fan_in_fan_out=kind == "gpt2")
    assert same(peft.PeftModel.from_pretrained(theirs(kind), tmp_path).eval(), model) and not same(model, trained)


def test_a_short_name_does_not_lend_its_rank_to_a_longer_one(tmp_path):
    def make():
        longer = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        return fill(nn.Sequential(nn.Embedding(600, 8), nn.Linear(8, 8), nn.Linear(8, 8), longer))

    model = flatlora.inject_lora(flatlora.inject_lora(make(), 2, 5, targets=r"1|3\.2"), 3, 5, targets="2")
    train_gpt2.save_peft(fill(model, 0.2, "lora_"), tmp_path, "the base")
    assert same(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), model) and not same(make(), model)
    assert same(train_gpt2.load_peft(make(), tmp_path), model)


MORE = {"lora_magnitude_vector": {"use_dora": True}, "lm_head": {"modules_to_save": ["lm_head"]}}
MORE |= {"embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]}, "bias": {"bias": "all"}}
MORE |= {"pissa": {"init_lora_weights": "pissa"}}


@pytest.mark.parametrize("words", MORE)
def test_more_than_lora_is_refused_by_name(words, tmp_path):
    base, model = theirs("llama"), theirs("llama")
    base.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(16))
    config = peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **MORE[words]})
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        train_gpt2.load_peft(model, tmp_path)
    assert not any(isinstance(module, flatlora.LoRALinear) for module in model.modules())


def test_what_is_trained_beside_the_adapters_is_an_error(tmp_path):
    model = flatlora.inject_lora(theirs("llama"), 2, targets=["q_proj"])
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'lm_head\.weight'"):
        train_gpt2.save_peft(model, tmp_path / "adapter", "the base")
    assert not (tmp_path / "adapter").exists()
