"""train_gpt2.py: its help, its errors, its table against the JSON file, and its GPT-2 against transformers."""

import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import TINY, ending, results, run

import train_gpt2

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here needs a network


def test_help_says_that_more_processes_make_a_larger_batch(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "-h")
    assert "more processes make a larger batch" in " ".join(capsys.readouterr().out.split())


# ---- What a user gets wrong ----------------------------------------------------------------------------------
WRONG = {
    "--out SHORT": "SHORT",
    "--text nowhere": "No such file or directory: 'nowhere'",
    "--text SHORT": "the val text needs more than 16 tokens (--block-size), got 8",
    "--text SHORT LATIN": "LATIN is not in UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 3",
    "--lora-dropout 1": "--lora-dropout must be from 0 to 0.99, got 1.0",
    "--sigma -1": "--sigma must be from 0 to 1000000, got -1.0",
    "--rho nan": "--rho must be from 0 to 1000000, got nan",
    "--r 0": "--r must be from 1 to 1000000, got 0",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_ends_in_one_line_before_the_first_step(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "train", None)
    Path("SHORT").write_bytes(b"x" * 40)
    Path("LATIN").write_text("José", "latin-1")
    assert WRONG[words] in ending("out", *TINY, "flat", *words.split())
    assert capsys.readouterr().out == ""


def test_out_of_memory_names_the_batch_size_and_another_error_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpt2, "get_batch", lambda *_: torch.empty(10**15))
    assert "try a smaller --batch-size" in ending(tmp_path, *TINY, "lora")
    monkeypatch.setattr(train_gpt2, "get_batch", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(tmp_path, *TINY, "lora")


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path):
    assert "not finite" in ending(tmp_path, *TINY, "flat", "--sigma=1000000", "--lr=1000000")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_cannot_show_a_character_shows_the_others(encoding, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    run(tmp_path / "ü☃", *TINY, "lora", "--prompt=☃")
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert "ü☃/results".encode(encoding, "replace") in shown
    assert b"lora writes:\n" in shown


# ---- The table -----------------------------------------------------------------------------------------------
STUDENT = {2: 12.706, 3: 4.303, 7: 2.447, 10: 2.262, 40: 2.262}  # 97.5 % points of t; above 10 the last is used


@pytest.mark.parametrize("n", [1, *STUDENT])
def test_the_table_holds_means_and_paired_differences(n):
    numbers = np.random.default_rng(n).normal(size=(n, 3, 4))  # seeds, methods, columns
    runs = [{"method": "base", "seed": 0, "val_loss": 1234.5678, "test_loss": 2.0, "ood_loss": 3.0}]
    for seed, method in np.ndindex(n, 3):
        losses = dict(zip(["val_loss", "test_loss", "ood_loss", "sharpness"], numbers[seed, method]))
        runs.append({"method": train_gpt2.METHODS[method], "seed": seed, **losses})
    lines = train_gpt2.report(runs, 3456).splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["base", "1234.5678", "2.0000", "3.0000", "-"]
    for row, method in enumerate(train_gpt2.METHODS):
        expected = [method, *(f"{mean:.4f}" for mean in numbers[:, row].mean(axis=0))]
        if method != "lora" and n > 1:
            gaps = numbers[:, row, 1] - numbers[:, 0, 1]
            half = STUDENT[n] * gaps.std(ddof=1) / math.sqrt(n)
            expected += [f"{gaps.mean():+.4f}", "+-", f"{half:.4f}"]
        assert lines[2 + row].split() == expected
    assert lines[5] == f"Seeds: {n}; base models: 1; test tokens: 3,456."
    assert lines[6:] == (["The 95 % intervals cover the seeds only."] if n > 1 else [])


def test_what_is_printed_is_in_the_json(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("a few words " * 50)  # 600 bytes
    run(tmp_path, *TINY, "lora", "flat", "lora", "--seeds=2", "--text", text)
    printed = capsys.readouterr().out
    found = results(tmp_path)
    assert len(found["runs"]) == 1 + 2 * 2  # each method once
    report = train_gpt2.report(found["runs"], 4 * 16)  # four windows of 16 tokens
    assert printed.startswith(report)
    assert found["report"] == report
    assert "\nflat writes:\ndef " in printed


# ---- The model -----------------------------------------------------------------------------------------------
def test_bfloat16_is_autocast():
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    tokens = torch.arange(32).reshape(2, 16)
    exact = train_gpt2.loss_fn(model, (tokens, tokens))
    rough = train_gpt2.loss_fn(model, (tokens, tokens), "bfloat16")
    assert 0 < abs(rough - exact) < 0.05


# ---- OpenAI's GPT-2, through transformers --------------------------------------------------------------------
def theirs():
    """A small GPT-2 of transformers. All parameters are random, so that leaving one out changes the logits."""
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    sizes = {"vocab_size": 600, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean="ln" in name, std=0.2)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """This model and a tokenizer of words."""
    path = tmp_path / "gpt2"
    theirs().save_pretrained(path)
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_logits_are_those_of_transformers(folder):
    model = train_gpt2.GPT.from_pretrained(str(folder))
    assert model.lm_head.weight is model.transformer["wte"].weight
    tokens = torch.arange(64).reshape(2, 32)  # (B, T)
    torch.testing.assert_close(model(tokens), theirs()(tokens).logits, rtol=0, atol=1e-5)


OTHERS = [
    {"activation_function": "gelu"},
    {"layer_norm_epsilon": 1e-3},
    {"tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"model_type": "gpt_neo"},
]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_a_gpt2_with_other_settings_is_an_error(change, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    (key,) = change
    with pytest.raises(train_gpt2.UsageError, match=f"its {key} is not "):
        train_gpt2.GPT.from_pretrained(str(folder))


def test_a_missing_weight_is_an_error(folder):
    model = theirs()
    state = model.state_dict()
    del state["transformer.h.1.attn.c_attn.bias"]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(train_gpt2.UsageError, match=r"lacks weights: .*h\.1\.attn\.c_attn\.bias"):
        train_gpt2.GPT.from_pretrained(str(folder))


def test_a_model_in_a_folder_is_fine_tuned_by_lora_and_flat_with_its_tokenizer(folder, tmp_path):
    (tmp_path / "text").write_text("a b " * 100)
    words = ["--steps=2", "--eval-windows=4", "--init", folder, "--text", tmp_path / "text", "--ood", tmp_path / "text"]
    ending(tmp_path, *words, "--init=nowhere")
    assert "--block-size must be at most 32 for this model, got 33" in ending(tmp_path, *words, "--block-size=33")
    assert run(tmp_path, *words, "--block-size=16") == 2 * 2
    found = results(tmp_path)
    assert [each["method"] for each in found["runs"]] == ["base", "lora", "flat"]
    assert found["options"]["lr"] == 2e-4
    x = torch.tensor([[1, 2] * 8])  # every window of the evaluation, (1, T)
    expected = F.cross_entropy(theirs()(x).logits[0], 3 - x[0])
    assert found["runs"][0]["val_loss"] == pytest.approx(expected.item(), abs=1e-5)
