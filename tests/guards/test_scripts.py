"""train_gpt2.py: it is what -h says, refuses what it cannot use, prints what it wrote, and reads GPT-2."""

import io
import json
import math
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from running import TINY, ending, results, run

import train_gpt2

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here needs a network


def test_help_fits_two_screens_and_says_that_processes_enlarge_the_batch(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(tmp_path, "-h")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 80
    assert "more processes make a larger batch" in " ".join(" ".join(lines).split())


# ---- What a user gets wrong ----------------------------------------------------------------------------------
WRONG = {
    "--out SHORT": "SHORT",
    "--text nowhere": "No such file or directory: 'nowhere'",
    "--text SHORT": "the val text has 8 tokens, not more than --block-size 16",
    "--ood EMPTY": "the ood text has 0 tokens",
    "--text SHORT LATIN": "LATIN is not in UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 3",
    "--lora-dropout 1": "--lora-dropout must be from 0 to 0.99, got 1.0",
    "--sigma -1": "--sigma must be from 0 to 1000000, got -1.0",
    "--rho nan": "--rho must be from 0 to 1000000, got nan",
    "--r 0": "--r must be from 1 to 1000000, got 0",
    "--steps 1000000000000": "--steps must be from 1 to 1000000, got 1000000000000",
    # the next three by argparse, after the usage
    "--r x": "--r: invalid int value: 'x'",
    "--rr 1": "unrecognized arguments: --rr 1",
    "--methods full": "invalid choice: 'full'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_ends_in_one_line_before_the_first_step(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "train", None)
    Path("SHORT").write_bytes(b"x" * 40)
    Path("EMPTY").write_bytes(b"")
    Path("LATIN").write_text("José", "latin-1")
    with pytest.raises(SystemExit) as end:
        run("out", *TINY, "flat", *words.split())
    printed = capsys.readouterr()
    line = end.value.code
    if line == 2:  # argparse's own error
        line = printed.err.splitlines()[-1]
    assert line.startswith("train_gpt2.py: ")
    assert WRONG[words] in line
    assert "\n" not in line
    assert printed.out == ""


def test_out_of_memory_names_the_batch_size_and_another_error_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpt2, "get_batch", lambda *_: torch.empty(10**15))
    assert "try a smaller --batch-size" in ending(tmp_path, *TINY, "lora")
    monkeypatch.setattr(train_gpt2, "get_batch", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(tmp_path, *TINY, "lora")


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path):
    assert "not finite" in ending(tmp_path, *TINY, "flat", "--sigma=1000000", "--lr=1000000")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_shows_what_it_can_after_the_results_are_written(encoding, monkeypatch, tmp_path):
    out = tmp_path / "ü☃"

    class Stream(io.BytesIO):
        def write(self, content):
            assert list(out.glob("results-*"))
            return super().write(content)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Stream(), encoding))
    run(out, *TINY, "lora", "--prompt=☃")
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert "ü☃/results".encode(encoding, "replace") in shown
    assert b"lora writes:\n" in shown


# ---- The table -----------------------------------------------------------------------------------------------
STUDENT = {2: 12.706, 3: 4.303, 7: 2.447, 10: 2.262, 40: 2.262}  # 97.5 % points of t; from 10 on the last stays


def made_up(n):
    """Runs of n seeds, of which no two losses are equal."""
    runs = [{"method": "base", "seed": 0, "val_loss": 1234.5678, "test_loss": 2.0, "ood_loss": 3.0}]
    for seed in range(n):
        for k, method in enumerate(("lora", "flat", "sam")):
            losses = {"val_loss": k + seed / 7, "test_loss": k + math.sin(seed * (k + 1)), "ood_loss": 0.1 * k}
            runs.append({"method": method, "seed": seed, **losses, "sharpness": k - seed / 9})
    return runs


@pytest.mark.parametrize("n", [1, *STUDENT])
def test_the_table_holds_means_and_paired_differences(n):
    runs = made_up(n)
    text = train_gpt2.report(runs, 3456)
    assert max(map(len, text.splitlines())) <= 80
    _, base, *rows, last = text.splitlines()
    assert base.split() == ["base", "1234.5678", "2.0000", "3.0000", "-"]
    check_rows(rows, runs)
    assert last.startswith(f"n = {n}; ")
    assert last.endswith(": one base, 3,456 tokens of test text")
    assert ("intervals cover seeds only" in last) == (n > 1)


def check_rows(rows, runs):
    by = {}
    for each in runs[1:]:
        by.setdefault(each["method"], []).append(each)
    for row, (method, own) in zip(rows, by.items(), strict=True):
        expected = [method]
        for key in ("val_loss", "test_loss", "ood_loss", "sharpness"):
            mean = statistics.mean(each[key] for each in own)
            expected.append(f"{mean:.4f}")
        if method != "lora" and len(own) > 1:
            gaps = [one["test_loss"] - other["test_loss"] for one, other in zip(own, by["lora"], strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            expected += [f"{statistics.mean(gaps):+.4f}", "+-", f"{STUDENT[len(gaps)] * error:.4f}"]
        assert row.split() == expected


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
    for name in ("base", "flat"):
        assert f"\n{name} writes:\ndef " in printed


# ---- The model -----------------------------------------------------------------------------------------------
def test_c_proj_starts_smaller():
    mlp = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=8, n_head=2, n_embd=64, block_size=64)).transformer["h"][7].mlp
    assert mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8) = 4


def test_bfloat16_is_autocast_and_a_text_is_written_token_by_token():
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    tokens = torch.arange(32).reshape(2, 16)
    exact, rough = (train_gpt2.loss_fn(model, (tokens, tokens), dtype) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert 0 < abs(rough - exact) < 0.05

    text = [1, 2]
    for _ in range(30):
        logits = model(torch.tensor([text[-16:]]))
        text.append(logits[0, -1].argmax().item())
    assert model.generate([1, 2], 30, temperature=1e-6) == text


def test_learning_rate_by_hand():
    by_hand = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 11: 0.55, 20: 0.1}  # a warm-up of two steps
    for step, rate in by_hand.items():
        assert train_gpt2.learning_rate(step, 20, 1.0) == pytest.approx(rate)
    assert train_gpt2.learning_rate(99, 5000, 1.0) == pytest.approx(100 / 101)  # of at most a hundred


# ---- OpenAI's GPT-2, through transformers --------------------------------------------------------------------
def theirs():
    """A small GPT-2 of transformers, all of whose parameters are random, so that none can be left out unnoticed."""
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    sizes = {"vocab_size": 600, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2 + ("ln" in name)
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
    tokens = torch.randint(600, (2, 32), generator=torch.Generator().manual_seed(1))  # (B, T)
    torch.testing.assert_close(model(tokens), theirs()(tokens).logits, rtol=0, atol=1e-5)


OTHERS = [{"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}, {"tie_word_embeddings": False}]
OTHERS += [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"model_type": "gpt_neo"}]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_settings_that_compute_something_else_are_an_error(change, folder):
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


def test_a_folder_is_fine_tuned_by_lora_and_flat_with_its_tokenizer(folder, tmp_path):
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
