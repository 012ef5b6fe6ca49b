"""Both scripts run from the command line, write what they print as JSON, and end bad input in one clear line."""

import argparse
import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import bench_cost
import numpy as np
import pytest
import torch
from reference import adapted_mlp, batch, dense_loss, dense_weight, layers, loss_fn, read_eps
from torch import nn

import train_gpt2
import train_toy
from flatlora import LoRALinear, flat_lora_step, lora_parameters, perturbed, read_safetensors

ROOT = Path(__file__).parent.parent
TOY = ["--seeds", "2", "--steps", "5", "--pretrain-steps", "5", "--samples", "1"]
GPT2 = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--pretrain-steps", "4"]
GPT2 += ["--steps", "4", "--batch-size", "2", "--r", "2", "--eval-windows", "8", "--sharpness-samples", "1"]
GPT2 += ["--length", "8"]
ALL = [*GPT2, "--seeds", "2", "--methods", *train_gpt2.METHODS, "--prompt", "def prompt("]


def run(script, *options, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the models are too small to share
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def ending(main, options, monkeypatch, capsys):
    """The one line that bad input leaves, before any work."""
    monkeypatch.setattr(sys, "argv", ["script", *options])
    with pytest.raises(SystemExit) as error:
        main()
    assert capsys.readouterr().out == "" and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """One tiny run of the main job with all the methods, shared by the tests that read what it left."""
    folder = tmp_path_factory.mktemp("gpt2")
    done = run("train_gpt2.py", *ALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "out" / "results.json").read_text())


# ---- train_gpt2.py -------------------------------------------------------------------------------------------


def test_the_main_job_prints_its_tables_and_samples(gpt2):
    _, printed, results = gpt2
    for words in ("Results", "Difference to lora, paired by seed", "---- base", "---- flat", "sharpness, full"):
        assert words in printed
    assert list(results["samples"]) == ["base", *train_gpt2.METHODS]
    row = next(line for line in printed.splitlines() if line.startswith("base "))
    assert f"{results['summary']['mean']['base']['test_loss']['mean']:.3f} ±" in row


def test_the_json_holds_every_run_and_every_metric(gpt2):
    _, _, results = gpt2
    methods = ["base", *train_gpt2.METHODS]
    assert [(r["seed"], r["method"]) for r in results["runs"]] == [(s, m) for s in (0, 1) for m in methods]
    for result in results["runs"]:
        for key in ("train_loss", "val_loss", "test_loss", "ood_loss", "sharp_full"):
            assert isinstance(result[key], float)
        assert result["test_bits"] == pytest.approx(result["test_loss"] / 0.6931472)
    first = {r["method"]: r for r in results["runs"] if r["seed"] == 0}
    assert {m: r.get("passes") for m, r in first.items()} == {
        "base": None, "lora": 1, "flat": 1, "sam": 2, "sam-full": 2, "full": 1
    }  # fmt: skip
    assert first["lora"]["trainable"] == first["flat"]["trainable"] == 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    difference = results["summary"]["difference"]["flat"]["test_loss"]
    flat, lora = ([r["test_loss"] for r in results["runs"] if r["method"] == m] for m in ("flat", "lora"))
    assert (
        difference["mean"] == pytest.approx((flat[0] - lora[0] + flat[1] - lora[1]) / 2, abs=1e-7)
        and difference["n"] == 2
    )


def test_every_method_starts_from_the_same_adapters_and_batches(tmp_path):
    """With sigma = 0 and rho = 0 the three methods are one, which they can be only under the same conditions."""
    options = [*GPT2, "--sigma", 0, "--rho", 0, "--lora-dropout", 0]
    assert run("train_gpt2.py", *options, cwd=tmp_path).returncode == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    losses = [[r[k] for k in ("train_loss", "test_loss", "ood_loss")] for r in runs if r["method"] != "base"]
    assert losses[0] == losses[1] and losses[0] == pytest.approx(losses[2], abs=1e-5)


def test_the_same_command_gives_the_same_numbers_and_reuses_the_base(gpt2):
    folder, _, results = gpt2
    base = next((folder / "out").glob("base-*.pt"))
    written = base.stat().st_mtime_ns
    again = run("train_gpt2.py", *ALL, cwd=folder)
    assert again.returncode == 0 and base.stat().st_mtime_ns == written and "pre-trained" not in again.stdout
    repeated = json.loads((folder / "out" / "results.json").read_text())
    timed = ("ms", "time")
    strip = lambda runs: [{k: v for k, v in r.items() if k not in timed} for r in runs]  # noqa: E731
    assert strip(repeated["runs"]) == strip(results["runs"]) and repeated["samples"] == results["samples"]


@pytest.mark.parametrize("change", [["--n-embd", "8"], ["--pretrain-steps", "3"], ["--dtype", "bfloat16"]])
def test_a_changed_configuration_gets_a_base_of_its_own(gpt2, change):
    folder, _, _ = gpt2
    before = set((folder / "out").glob("base-*.pt"))
    done = run("train_gpt2.py", *GPT2, "--methods", "lora", *change, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(set((folder / "out").glob("base-*.pt")) - before) == 1


def test_a_saved_adapter_generates_again_what_the_run_showed(gpt2):
    folder, _, results = gpt2
    state = torch.load(folder / "out" / "sam.pt", weights_only=True)
    assert all(".lora_" in name for name in state["adapters"])  # adapters only
    options = ["--sample", "--adapter", "out/sam.pt", "--prompt", "def prompt(", "--length", 8]
    done = run("train_gpt2.py", *options, cwd=folder)
    assert done.returncode == 0 and done.stdout.split("-\n", 1)[1] == results["samples"]["sam"] + "\n"


def test_own_text_replaces_the_data(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 8)  # any bytes will do
    options = ["--text", text, "--ood", text, "--pretrain-text", text, "--methods", "flat", "--grad-accum", 2]
    assert run("train_gpt2.py", *GPT2, *options, cwd=tmp_path).returncode == 0


def test_the_model_is_gpt2():
    model = train_gpt2.GPT(train_gpt2.GPTConfig(2, 2, 8, 4))
    names = dict(model.named_parameters())
    assert "transformer.h.1.attn.c_attn.weight" in names and "transformer.wpe.weight" in names
    assert "lm_head.weight" not in names  # tied to transformer.wte.weight
    tokens = torch.randint(256, (1, 4))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 256
    torch.testing.assert_close(model(tokens)[0, :3], model(changed)[0, :3])  # causal
    assert not torch.allclose(model(tokens)[0, 3], model(changed)[0, 3])


def test_files_are_dealt_out_and_short_lists_are_cut():
    files = [bytes([i]) for i in range(7)]
    assert train_gpt2.split(files) == {"train": bytes([0, 3, 4, 5]), "val": bytes([1, 6]), "test": bytes([2])}
    assert train_gpt2.split([bytes(range(10))]) == {
        "train": bytes(range(6)), "val": bytes([6, 7]), "test": bytes([8, 9])
    }  # fmt: skip


def test_own_text_is_used_whole_and_the_built_in_one_is_cut(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"ab" * 50_000)
    sizes = []
    for options in (["--text", str(tmp_path / "text")], [], ["--train-bytes", "500"]):
        size = lambda args, own: sizes.append(len(train_gpt2.load_data(args)["train"]))  # noqa: E731
        monkeypatch.setattr(train_gpt2, "compare", size)
        monkeypatch.setattr(sys, "argv", ["script", *options])
        train_gpt2.main()
    assert sizes == [60_000, 30_000, 500]


def test_missing_standard_library_sources_name_the_option():
    with pytest.raises(ValueError, match="no sources of its package nothing_here: give your own text, --text FILE"):
        train_gpt2.package_sources("nothing_here", "--text")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", "-1"], "sigma must be a finite number >= 0, got -1"),
        (["--rho", "nan"], "--rho must be at least 0 and finite, got nan"),
        (["--r", "0"], "r must be an integer from 1 to"),
        (["--r", "17"], "r must be an integer from 1 to min(m, n) = 16, got 17"),
        (["--schedule", "cubic"], "schedule must be one of cosine, linear, constant, got 'cubic'"),
        (["--noise", "white"], "--noise must be one of rows, base, matrix, undivided, got white"),
        (["--draws", "two"], "--draws must be one of window, micro-batch, antithetic, got two"),
        (["--methods", "adam"], "--methods takes lora, flat, sam, sam-full, full, alone or as METHOD:OPTION=VALUE"),
        (["--methods", "flat:n_embd=8"], "got flat:n_embd=8"),
        (["--methods", "lora", "flat:schedule=cubic"], "schedule must be one of cosine, linear, constant, got 'cubic'"),
        (["--methods", "lora", "flat:r=17"], "r must be an integer from 1 to min(m, n) = 16, got 17"),
        (["--methods", "lora", "flat:lr=0"], "--lr must be above 0 and finite, got 0.0"),
        (["--sharpness-sigma", "0.1", "nan"], "--sharpness-sigma must be at least 0 and finite, got [0.1, nan]"),
        (["--device", "tpu"], "--device must be cpu, cuda or auto, got 'tpu'"),
        (["--dtype", "int8"], "--dtype must be float32 or bfloat16, got 'int8'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--train-bytes", "0"], "--train-bytes must be at least 1, got 0"),
        (["--lr", "inf"], "--lr must be above 0 and finite, got inf"),
        (["--n-head", "3"], "--n-embd must be a multiple of --n-head = 3, got 16"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--warmup", "-1"], "--warmup must be at least 0 and finite, got -1"),
        (["--text", "EMPTY"], "EMPTY is empty"),
        (["--text", "SHORT"], "text is 3 bytes, shorter than --block-size 16 + 1"),
        (["--text", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--sample"], "--sample needs --adapter FILE and --prompt TEXT"),
        (["--sample", "--adapter", "nowhere.pt", "--prompt", "a"], "nowhere.pt does not exist"),
        (["--sample", "--adapter", "SHORT", "--prompt", "a"], "SHORT is not a checkpoint of this script"),
        (["--sample", "--adapter", "OTHER", "--prompt", "a"], "OTHER is not a checkpoint of this script"),
        (["--sample", "--adapter", "WRONG", "--prompt", "a"], "the adapters do not fit the model"),
    ],
)
def test_bad_input_ends_in_one_clear_line(gpt2, tmp_path, monkeypatch, capsys, options, words):
    folder, _, _ = gpt2
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "SHORT").write_bytes(b"short")
    torch.save({"weights": torch.ones(1)}, tmp_path / "OTHER")
    base = next((folder / "out").glob("base-*.pt"))
    torch.save({"base": str(base), "r": 2, "alpha": 4, "adapters": {"x": torch.ones(1)}}, tmp_path / "WRONG")
    monkeypatch.chdir(tmp_path)
    assert words in ending(train_gpt2.main, [*GPT2, *options], monkeypatch, capsys)


# ---- train_gpt2.py --init and --data -------------------------------------------------------------------------


def gpt2_folder(path, config=None, weights=None):
    """A random GPT-2 in Hugging Face's layout, in the format that needs no extra, with changes to its files."""
    path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(2, 2, 8, 32, vocab_size=300))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {k: (v.t() if k.endswith(conv1d) else v).contiguous() for k, v in model.state_dict().items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # a buffer of older files
    state.update(weights or {})
    torch.save({k: v for k, v in state.items() if v is not None}, path / "pytorch_model.bin")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 32, "vocab_size": 300}
    (path / "config.json").write_text(json.dumps({**sizes, "activation_function": "gelu_new", **(config or {})}))
    return model


def bins(path, train=2000, val=100, dtype=np.uint16, top=300):
    path.mkdir(exist_ok=True)
    for name, size in (("train", train), ("val", val)):
        np.random.default_rng(size).integers(0, top, size).astype(dtype).tofile(path / f"{name}.bin")


INIT = ["--init", "gpt2", "--data", "data", "--block-size", "16", "--steps", "2", "--eval-interval", "1"]


def test_a_folder_of_gpt2_and_one_of_nanogpt_fine_tune_without_an_extra(tmp_path):
    gpt2_folder(tmp_path / "base")
    bins(tmp_path / "data")
    options = [*INIT, "--init", "base", "--methods", "lora", "flat", "full", "--sharpness-samples", "1"]
    code = f"import sys; sys.argv[1:] = {options}; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import train_gpt2; train_gpt2.main()\n"
    code += "print('imported', {'safetensors', 'tiktoken', 'transformers', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(", seed 0, step 1: validation ") == 3 and "imported set()" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for run in results["runs"]:
        assert run["val_loss"] != run["test_loss"]  # the halves of val.bin
        assert "ood_loss" not in run and "test_bits" not in run and run["sharp_full"] is not None
    assert torch.load(tmp_path / "out" / "flat.pt", weights_only=True)["base"] == "base"


def test_the_weights_of_a_folder_are_the_models(tmp_path):
    expected = gpt2_folder(tmp_path)
    model = train_gpt2.load_gpt2(str(tmp_path), train_gpt2.gpt2_config(str(tmp_path), 0.0), torch.device("cpu"))
    tokens = torch.randint(300, (2, 32))
    assert torch.equal(model(tokens), expected(tokens))
    assert model.lm_head.weight is model.transformer["wte"].weight and not model.training


def test_the_base_is_shared_and_not_written(tmp_path, monkeypatch):
    """Adapters need no copy of a large base; "full" gets its own, trainable though the base was frozen before."""
    gpt2_folder(tmp_path / "base")
    bins(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    bases, models, finetune = [], [], train_gpt2.finetune

    def spy(base, *rest):
        bases.append({k: v.clone() for k, v in base.state_dict().items()})
        model, result = finetune(base, *rest)
        models.append(model)
        bases.append({k: v.clone() for k, v in base.state_dict().items()})
        return model, result

    monkeypatch.setattr(train_gpt2, "finetune", spy)
    monkeypatch.setattr(sys, "argv", ["script", *INIT, "--init", "base", "--methods", "flat", "lora", "full"])
    train_gpt2.main()
    assert all(torch.equal(v, bases[0][k]) for state in bases for k, v in state.items())
    flat, lora, full = (model.transformer["h"][0].mlp.c_fc.weight for model in models)
    assert flat is lora and not torch.equal(full, flat)


def test_a_bin_is_mapped_and_not_read_into_memory(tmp_path):
    for name in ("train", "val"):
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(2**36)  # 64 GiB of zeros that take no place on the disk
    data = train_gpt2.read_bins(tmp_path)
    assert len(data["train"]) == 2**35 and len(data["val"]) == len(data["test"]) == 2**34
    x, y = train_gpt2.windows(data["train"], torch.tensor([2**35 - 9]), 8, torch.device("cpu"))
    assert x.shape == y.shape == (1, 8)


def test_ids_above_an_int16_are_read_as_they_are(tmp_path):
    np.arange(65_000, 65_100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    data = train_gpt2.read_bins(tmp_path)
    x, y = train_gpt2.windows(data["train"], torch.tensor([5]), 3, torch.device("cpu"))
    assert x.tolist() == [[65_005, 65_006, 65_007]] and y.tolist() == [[65_006, 65_007, 65_008]]
    assert data["val"].tolist() == list(range(50)) and data["test"].tolist() == list(range(50, 100))


C_ATTN, WTE = "transformer.h.1.attn.c_attn", "transformer.wte.weight"


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({}, {f"{C_ATTN}.bias": None}, f"missing ['{C_ATTN}.bias'], not in the model [], of another shape []"),
        ({}, {"transformer.h.1.attn.masks": torch.ones(1)}, "not in the model ['transformer.h.1.attn.masks']"),
        ({}, {"h.1.attn.c_attn.bias": torch.ones(24)}, "not in the model ['h.1.attn.c_attn.bias']"),  # prefixes mixed
        ({}, {f"{C_ATTN}.weight": torch.ones(24, 8)}, f"of another shape ['{C_ATTN}.weight']"),  # not as Conv1D
        ({}, {"lm_head.weight": torch.zeros(300, 8)}, "lm_head.weight differs from wte.weight"),
        ({"n_layer": 3}, {}, "missing ['transformer.h.2.attn.c_attn.bias',"),
        ({"n_layer": 1}, {}, "not in the model ['transformer.h.1.attn.c_attn.bias',"),
        ({"n_embd": 16}, {}, "of another shape ["),
        ({"vocab_size": 301}, {}, f"of another shape ['{WTE}']"),
        ({"n_positions": 64}, {}, "of another shape ['transformer.wpe.weight']"),
        ({"n_head": 3}, {}, "config.json: n_layer, n_head, n_embd, n_positions and vocab_size cannot be [2, 3, 8,"),
        ({"activation_function": "gelu"}, {}, "config.json: activation_function must be 'gelu_new', got 'gelu'"),
        ({"model_type": "llama"}, {}, "model_type must be 'gpt2', got 'llama'"),
        ({"layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
    ],
)
def test_a_folder_that_is_not_this_gpt2_ends_in_one_line(tmp_path, monkeypatch, capsys, config, weights, words):
    gpt2_folder(tmp_path / "base", config, weights)
    bins(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert words in ending(train_gpt2.main, [*INIT, "--init", "base"], monkeypatch, capsys)


def damage(folder):
    """Files that are not what they are named, each in a folder of its own."""
    for name in ("TRUNCATED", "EMPTY", "LIST", "NOCONFIG", "NOWEIGHTS", "BIG"):
        gpt2_folder(folder / name)
    file = folder / "TRUNCATED" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    (folder / "EMPTY" / "pytorch_model.bin").write_bytes(b"")
    torch.save([torch.ones(1)], folder / "LIST" / "pytorch_model.bin")
    (folder / "NOCONFIG" / "config.json").write_text("{")
    (folder / "NOWEIGHTS" / "pytorch_model.bin").unlink()
    gpt2_folder(folder / "BIG", {"vocab_size": 70_000}, {WTE: torch.zeros(70_000, 8), "lm_head.weight": None})
    for name, options in {
        "WIDE": {"dtype": np.uint32},
        "LARGE": {"top": 301, "train": 99_999},
        "SMALL": {"val": 20},
    }.items():
        bins(folder / name, **options)
    bins(folder / "ODD")
    with open(folder / "ODD" / "val.bin", "ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--init", "TRUNCATED"], "TRUNCATED/pytorch_model.bin is truncated or no file of weights"),
        (["--init", "EMPTY"], "EMPTY/pytorch_model.bin is truncated or no file of weights"),
        (["--init", "LIST"], "LIST/pytorch_model.bin is truncated or no file of weights"),
        (["--init", "NOCONFIG"], "NOCONFIG/config.json is no JSON"),
        (["--init", "NOWEIGHTS"], "or a folder with model.safetensors or pytorch_model.bin, got NOWEIGHTS"),
        (["--init", "nowhere"], "--init must be gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with config.json"),
        (["--init", "BIG"], "--data holds uint16 numbers, too small for a vocabulary of 70000"),
        (["--data", "WIDE"], "train.bin holds 32-bit numbers, as of a vocabulary larger than uint16"),
        (["--data", "LARGE"], "the train text has the token 300, the model 300 of them"),
        (["--data", "SMALL"], "the val text is 10 tokens, shorter than --block-size 16 + 1"),
        (["--data", "ODD"], "val.bin must hold uint16 numbers, got 201 bytes"),
        (["--data", "nowhere"], "nowhere/train.bin"),
        (["--text", "TEXT"], "--data stands in place of --text"),
        (["--n-layer", "2"], "--init brings a trained model: it goes without --n-layer"),
        (["--block-size", "33"], "--block-size must be at most the model's 32, got 33"),
        (["--eval-interval", "-1"], "--eval-interval must be at least 0"),
    ],
)
def test_bad_models_and_data_end_in_one_clear_line(tmp_path, monkeypatch, capsys, options, words):
    gpt2_folder(tmp_path / "base")
    bins(tmp_path / "data")
    damage(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert words in ending(train_gpt2.main, [*INIT, "--init", "base", *options], monkeypatch, capsys)


def test_a_byte_level_base_takes_bins_of_bytes_only(tmp_path, monkeypatch, capsys):
    bins(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    words = ending(train_gpt2.main, [*GPT2, "--data", "data"], monkeypatch, capsys)
    assert words == "train_gpt2.py: the train text has the token 299, the model 256 of them"
    bins(tmp_path / "data", top=256)
    monkeypatch.setattr(sys, "argv", ["script", *GPT2, "--data", "data", "--methods", "flat"])
    train_gpt2.main()
    assert "---- flat" in capsys.readouterr().out  # bytes can be shown
    assert "--peft needs --init" in ending(train_gpt2.main, [*GPT2, "--peft"], monkeypatch, capsys)


def test_without_a_network_one_line_says_what_was_tried_and_what_else_there_is(tmp_path, monkeypatch, capsys):
    def no_network(request, *rest):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    url = "https://huggingface.co/openai-community/gpt2-xl/resolve/main/config.json"
    words = ending(train_gpt2.main, ["--init", "gpt2-xl"], monkeypatch, capsys)
    assert words == f"train_gpt2.py: cannot download {url} (no route to host); --init DIR takes a folder with it"
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]  # no half of a file
    pytest.importorskip("tiktoken", reason='needs the extra gpt2: pip install -e ".[gpt2]"')
    gpt2_folder(tmp_path / "base")  # holds no vocabulary
    words = ending(train_gpt2.main, ["--init", str(tmp_path / "base"), "--block-size", "16"], monkeypatch, capsys)
    assert "gpt2/resolve/main/vocab.json (no route to host)" in words and "--data DIR does without" in words


def test_a_released_model_is_downloaded_once(tmp_path, monkeypatch):
    gpt2_folder(tmp_path / "release")
    tried = []

    def download(url, path):
        tried.append(url)
        Path(path).write_bytes((tmp_path / "release" / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for _ in range(2):
        assert train_gpt2.gpt2_config("gpt2", 0.0).vocab_size == 300
    assert tried == ["https://huggingface.co/openai-community/gpt2/resolve/main/config.json"]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    for call in (lambda: read_safetensors(tmp_path / "x"), lambda: train_gpt2.tokenizer("gpt2")):
        with pytest.raises(ImportError, match=r'is not installed: pip install -e "\.\[gpt2\]"'):
            call()


def printed_from(path, capsys):
    """The tables that the script printed when it wrote this file."""
    content = json.loads(path.read_text())
    if path.stem == "cost":
        print(
            bench_cost.memory_table(content), *(bench_cost.time_table(content, a) for a in content["time"]), sep="\n\n"
        )
    elif content["config"]["tune"] in (True, "True"):
        key = "test_loss" if path.stem.startswith("toy") else "val_loss"
        print(train_toy.choice(content["runs"], titles_of(content), key, 4))
    else:
        of = train_toy if path.stem.startswith("toy") else train_gpt2
        train_toy.report(content["runs"], titles_of(content), of.METRICS, of.PAIRED, of.BRIEF)
        if path.stem == "toy":
            print(f"\n{train_toy.chart(train_toy.landscape(content['runs'], titles_of(content)))}")
            print(f"\n{train_toy.verdict(content['runs'])}")
    return capsys.readouterr().out


def titles_of(content):
    return list(dict.fromkeys(run["method"] for run in content["runs"]))


def test_every_number_of_the_readmes_tables_is_in_the_json_of_its_run(capsys):
    """The blocks of the README are those that the scripts print from assets/, and each "x ± y" of its prose is a cell
    of such a table."""
    readme = (ROOT / "README.md").read_text()
    printed = "\n\n".join(printed_from(path, capsys) for path in sorted((ROOT / "assets").glob("*.json")))
    blocks = {block.strip("\n") for block in printed.split("\n\n")}
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    shown = [block.strip("\n") for language, text in fences if not language for block in text.split("\n\n")]
    tables = [block for block in shown if any(mark in block for mark in ("---", "|", "±"))]
    assert len(tables) > 15 and set(tables) <= blocks, set(tables) - blocks
    prose = re.sub(r"^```.*?^```$", "", readme, flags=re.DOTALL | re.MULTILINE).replace("\N{MINUS SIGN}", "-")
    number = r"([+-]?\d+\.?\d*) ?± ?(\d+\.?\d*)"
    cells = {(mean.lstrip("+"), half) for mean, half in re.findall(number, printed)}
    cited = {(mean.lstrip("+"), half) for mean, half in re.findall(number, prose)}
    assert len(cited) > 20 and cited <= cells, cited - cells
    section = re.search(r"\n## What flatness buys\n(.*?)\n## ", prose, re.DOTALL)[1]
    numbers = [set(re.findall(r"\d+\.\d\d+", text)) for text in (section, printed)]
    assert len(numbers[0]) > 50 and numbers[0] <= numbers[1], numbers[0] - numbers[1]


def test_every_json_comes_from_a_command_of_the_readme():
    readme = re.sub(r" \\\n *", " ", (ROOT / "README.md").read_text())
    commands = re.findall(r"^python (train_toy|train_gpt2)\.py(.*)  # (\S+)\.json$", readme, re.MULTILINE)
    assert {name for _, _, name in commands} == {p.stem for p in (ROOT / "assets").glob("*.json")} - {"cost"}
    for script, words, name in commands:
        config = json.loads((ROOT / "assets" / f"{name}.json").read_text())["config"]
        given = dict.fromkeys(["tune"], "False") | {"seeds": {"train_toy": "20", "train_gpt2": "1"}[script]}
        for option in re.findall(r"--(\S+)((?: (?!--)\S+)*)", words):
            values = [v for word in option[1].split() for v in braces(word)]
            found = {"methods": values, "sharpness-sigma": [*map(float, values)] if "sigma" in option[0] else None}
            given[option[0].replace("-", "_")] = str(found.get(option[0], values[0] if values else True))
        given.setdefault("methods", str(["lora", "flat", "sam"]))
        for key, value in given.items():
            assert str(config[key]) == value or float(config[key]) == float(value), (name, key)


def braces(word):
    """What bash makes of it: a{b,c}d is abd acd."""
    found = re.match(r"(.*?)\{(.*?)\}(.*)", word)
    return [word] if not found else [w for x in found[2].split(",") for w in braces(f"{found[1]}{x}{found[3]}")]


def test_the_readme_names_the_settings_that_the_tuning_chose(capsys):
    lines = (ROOT / "README.md").read_text().splitlines()
    chosen = 0
    for path in (ROOT / "assets").glob("*tuning*.json"):
        for row in printed_from(path, capsys).split("\n")[4:]:
            grid, tried, best, validation = re.split(r" {2,}", row) if row else ["", "", "", ""]
            chosen += bool(grid)
            assert any(all(word in line for word in (grid, tried, best, validation)) for line in lines), row
    assert chosen == 16


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    defined = {
        name for file in ROOT.glob("tests/test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 15 and named <= defined


@pytest.mark.parametrize("file", ["flatlora.py", "train_toy.py", "train_gpt2.py"])
def test_nothing_beyond_torch_numpy_and_tqdm_is_imported(file):
    """Not on top, that is: the extras are imported inside the functions that need them."""
    tree = ast.parse((ROOT / file).read_text())
    inner = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    names = {False: set(), True: set()}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        names[node in inner] |= {module.split(".")[0] for module in modules}
    assert names[False] - sys.stdlib_module_names <= {"torch", "numpy", "tqdm", "flatlora", "train_toy"}
    assert names[True] - sys.stdlib_module_names <= {"safetensors", "tiktoken", "matplotlib"}


def test_the_plain_loop_of_the_readme_runs():
    class MyModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj, self.out = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.out(self.q_proj(x).tanh() * self.v_proj(x))

    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    loader = [{"x": torch.randn(3, 8), "y": torch.tensor([0, 1, 2])} for _ in range(4)]
    names = {"MyModel": MyModel, "loader": loader, "total_steps": 4, "run_seed": 0, "torch": torch, "F": nn.functional}
    exec(code, names)
    assert {type(m) for m in names["model"].children()} == {nn.Linear}  # merged


# ---- train_toy.py --------------------------------------------------------------------------------------------


def test_the_toy_prints_table_landscape_and_verdict(tmp_path):
    done = run("train_toy.py", *TOY, "--methods", *train_toy.METHODS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Results", "paired by seed", "Landscape", "Figure 1 of the paper"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 + 16  # four methods; three fit 80 columns
    results = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert [(r["seed"], r["method"]) for r in results["runs"]] == [(s, m) for s in (0, 1) for m in train_toy.METHODS]
    for result in results["runs"]:
        assert list(result["landscape_full"]) == ["0.3", "0.1", "0.2", "0.4", "0.5", "0.6"]
        assert result["landscape_full"]["0.3"] == result["sharp_full"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", "-1"], "sigma must be a finite number >= 0"),
        (["--r", "99"], "r must be an integer from 1 to"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--label-noise", "2"], "--label-noise must be from 0 to 1"),
        (["--schedule", "cubic"], "schedule must be one of"),
        (["--noise", "white"], "--noise must be one of rows, base, matrix, undivided, got white"),
        (["--methods", "adam"], "--methods takes lora, flat, sam, sam-full, alone or as METHOD:OPTION=VALUE"),
        (["--methods", "lora", "flat:grad_accum=0"], "--grad-accum must be at least 1, got 0"),
        (["--gradient-draws", "1"], "--gradient-draws must be 0 or at least 2, for a variance, got 1"),
        (["--sharpness-sigma", "-1"], "--sharpness-sigma must be at least 0 and finite, got [-1.0]"),
        (["--plot", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["--plot", __file__], "is no JSON of a run with several methods"),
    ],
)
def test_the_toy_ends_bad_input_in_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in ending(train_toy.main, [*TOY, *options], monkeypatch, capsys)


def test_a_shell_sees_the_line_and_a_failure(tmp_path):
    for script in ("train_toy.py", "train_gpt2.py"):
        done = run(script, "--sigma", "-1", cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == f"{script}: sigma must be a finite number >= 0, got -1.0\n"


def test_words_that_the_command_line_does_not_know_end_in_one_line_after_the_usage(monkeypatch, capsys):
    for script, options in (
        (train_toy, ["--methods", "flat:sigma=much"]),
        (train_gpt2, ["--r", "x"]),
        (train_gpt2, ["--rr", "1"]),
    ):
        monkeypatch.setattr(sys, "argv", ["script.py", *options])
        with pytest.raises(SystemExit) as error:
            script.main()
        assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 2


def test_intervals_are_student_t():
    stat = train_toy.interval([1.0, 2.0, 3.0, 4.0])
    assert stat == {"mean": 2.5, "half": pytest.approx(3.182 * 1.2909944 / 2), "n": 4}
    assert train_toy.interval([5.0])["half"] is None and train_toy.interval([1.0, None]) is None
    assert train_toy.interval([1.0, math.inf]) is None


def toy_run(method, seed, low, high):
    landscapes = {"landscape_lora": {"0.3": low}, "landscape_full": {"0.3": high}}
    return {"method": method, "seed": seed, "sharp_lora": low, "sharp_full": high, **landscapes}


def test_the_chart_shows_every_method_once_a_strength_also_where_the_loss_falls():
    runs = [toy_run("lora", 0, 0.0, 0.6), toy_run("flat:sigma=1", 0, -0.5, 0.0)]
    panels = train_toy.landscape(runs, ["lora", "flat:sigma=1"])
    assert {at: stat["mean"] for at, stat in panels["full space"]["lora"].items()} == {0.0: 0.0, 0.3: 0.6}
    lines = train_toy.chart(panels).splitlines()
    assert "".join(lines[1:-1]).count("L") == "".join(lines[1:-1]).count("F") == 2 * 2
    assert lines[1].startswith(" 0.60 |") and lines[1].endswith("L") and lines[-2].startswith(" 0.00 |LF  LF")
    assert train_toy.chart(train_toy.landscape(runs[:1], ["lora"])).count("L") == 2 * 2 + 1  # and that of "LoRA space"


def test_the_verdict_can_go_either_way():
    sharp, flat = ([toy_run("lora", i, low + i / 1000, 0.3) for i in range(3)] for low in (0.1, 0.3))
    assert "is shown here" in train_toy.verdict(sharp).replace("\n", " ")
    assert "is NOT shown here" in train_toy.verdict(flat).replace("\n", " ")


def test_a_method_is_compared_with_lora_under_the_same_options_or_else_with_the_first(capsys):
    titles = ["lora", "lora:r=1", "flat:r=1", "flat", "sam:rho=2"]
    partners = {title: train_toy.partner(title, titles) for title in titles}
    assert partners == {t: "lora:r=1" if t == "flat:r=1" else "lora" for t in titles}
    runs = [{"method": t, "seed": s, "x": i * (s + 1), "ms": 10.0 + i} for i, t in enumerate(titles) for s in (0, 1)]
    summary = train_toy.report(runs, titles, {"x": ("x", 1), "time": ("time", 2)}, ["x"], ["x", "time"])
    assert {t: stat["x"]["mean"] for t, stat in summary["difference"].items()} == {
        "lora:r=1": 1.5, "flat:r=1 - lora": 1.5, "flat": 4.5, "sam:rho=2": 6.0
    }  # fmt: skip
    assert summary["mean"]["flat:r=1"]["time"]["mean"] == pytest.approx(12 / 11)
    printed = capsys.readouterr().out
    assert "Difference to lora, paired by seed" in printed and "\nflat:r=1 - lora " in printed


def test_the_choice_is_the_lowest_mean_of_each_grid():
    losses = {"lora:lr=1": (1, 4), "lora:lr=2": (2, 2), "sam:lr=1,rho=1": (5, 5), "sam:lr=2,rho=1": (1, 8)}
    runs = [{"method": t, "seed": s, "loss": float(v[s])} for t, v in losses.items() for s in (0, 1)]
    rows = [line.split() for line in train_toy.choice(runs, list(losses), "loss", 1).splitlines()[4:]]
    assert [row[:4] for row in rows] == [["lora:lr", "2", "lr=2", "2.0"], ["sam:lr,rho", "2", "lr=2,rho=1", "4.5"]]


def test_tuning_measures_validation_alone_and_each_method_with_its_own_options(gpt2, tmp_path):
    for script, options, file, key in (
        ("train_toy.py", TOY, "toy.json", "test_loss"),
        ("train_gpt2.py", GPT2, "results.json", "val_loss"),
    ):
        methods = ["lora:lr=1e-3", "lora:lr=2e-3", "lora:steps=2,lora_dropout=0.5", "flat:draws=micro-batch"]
        done = run(script, *options, "--tune", "--methods", *methods, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Best of each grid by validation loss" in done.stdout and "lora:steps,lora_dropout" in done.stdout
        runs = json.loads((tmp_path / "out" / file).read_text())["runs"]
        losses = {r["method"]: r[key] for r in runs if r["seed"] == 0}
        assert list(losses) == methods and len(set(losses.values())) == 4
        done = run(script, *options, "--tune", "--methods", "lora", "--lr", "2e-3", cwd=tmp_path)
        alone = json.loads((tmp_path / "out" / file).read_text())["runs"][0]
        assert alone[key] == losses["lora:lr=2e-3"]  # an option of one method is that option
        found = {k for r in runs for k in r if k.endswith(("loss", "bits")) or k.startswith("sharp")}
        assert found <= {key, key.replace("loss", "bits")}


def test_the_json_is_compact_and_keeps_eight_digits(tmp_path):
    content = {"a": [1 / 3, {"b": [1, 2], "c": "[x\ny]"}], "n": None}
    train_toy.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [0.33333333, {"b": [1, 2], "c": "[x\ny]"}], "n": None} and '"b": [ 1, 2 ]' in text


def test_a_rank_above_the_size_of_a_layer_is_its_size_with_the_same_scaling():
    args = argparse.Namespace(r=16, alpha=32, lora_dropout=0.0)
    model = train_toy.adapt(train_toy.mlp(), args)
    assert [(layer.r, layer.scaling) for layer in model[::2]] == [(16, 2), (16, 2), (4, 2)]


def test_pictures_are_drawn_from_the_runs_in_both_modes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    from matplotlib.image import imread

    bars, errorbar = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, y, **k: (bars.append((x, k["xerr"])), errorbar(self, x, y, **k))
    )
    files = [ROOT / "assets" / f"{name}.json" for name in ("toy", "gpt2-methods")]
    train_toy.plot(files, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"toy-{figure}-{mode}.png" for figure in ("landscape", "differences") for mode in ("light", "dark")
    }
    for mode, shade in (("light", 1.0), ("dark", 13 / 255)):
        assert imread(tmp_path / f"toy-differences-{mode}.png")[0, 0, 0] == pytest.approx(shade, abs=0.01)
    stats = json.loads(files[0].read_text())["summary"]["difference"]
    assert bars[: len(stats)] == [(stat["test_loss"]["mean"], stat["test_loss"]["half"]) for stat in stats.values()]


def test_pictures_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'matplotlib is not installed: pip install -e "\.\[plot\]"'):
        train_toy.plot([ROOT / "assets" / "toy.json"], tmp_path)


def test_the_low_rank_change_is_of_low_rank_and_of_the_given_size():
    torch.manual_seed(0)
    teacher = train_toy.random_teacher()
    changed = train_toy.low_rank_change(teacher, 0.3, rank=2)
    delta = changed[2].weight - teacher[2].weight
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 2
    assert delta.norm() / teacher[2].weight.norm() == pytest.approx(0.3, rel=1e-4)
    assert not any(isinstance(m, (LoRALinear, nn.Dropout)) for m in changed.modules())


# ---- Ablations -----------------------------------------------------------------------------------------------


def test_each_law_has_the_stds_that_its_name_says():
    model = adapted_mlp()
    for layer in layers(model).values():
        m, n = layer.weight.shape
        rows = torch.stack([0.3 * row.norm() / math.sqrt(n) for row in dense_weight(layer)])[:, None]  # eq. 7, (m, 1)
        stds = {name: law(layer, 0.3) for name, law in train_toy.NOISE.items()}
        torch.testing.assert_close(stds["rows"], rows)
        torch.testing.assert_close(stds["base"], 0.3 * layer.weight.norm(dim=1, keepdim=True) / math.sqrt(n))
        torch.testing.assert_close(
            stds["undivided"], 0.3 * torch.stack([r.norm() for r in dense_weight(layer)])[:, None]
        )
        assert stds["matrix"].shape == (m, 1) and stds["matrix"].std() < 1e-12  # one std, and E |eps|^2 of eq. 7:
        assert (m * n * stds["matrix"][0] ** 2).item() == pytest.approx((n * rows.square().sum()).item())


def ablation(**options):
    settings = {"noise": "rows", "draws": "window", "method": "flat", "sigma": 0.3}
    return argparse.Namespace(**{**settings, **options})


@pytest.mark.parametrize("draws", train_toy.DRAWS)
def test_the_draws_of_a_window_are_those_of_the_name(draws):
    """The gradient of a step over four micro-batches, against the dense loss under the noise that each should get."""
    model, args = adapted_mlp(), ablation(noise="matrix", draws=draws)
    batches = [batch(seed=i) for i in range(4)]
    seeds = {
        "window": [5] * 4,
        "micro-batch": [(5, i) for i in range(4)],
        "antithetic": [(5, 0), (5, 0), (5, 1), (5, 1)],
    }
    loss = 0.0
    for i, (data, seed) in enumerate(zip(batches, seeds[draws])):
        with perturbed(model, 0.3, seed, law=train_toy.NOISE["matrix"]):
            eps = read_eps(model)
        sign = -1 if draws == "antithetic" and i % 2 else 1
        loss = loss + dense_loss(model, data, {name: sign * e for name, e in eps.items()}) / 4
    expected = torch.autograd.grad(loss, lora_parameters(model))
    noisy_loss_fn, sigma = train_toy.ablated(loss_fn, 0.3, 5, args)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.0)
    assert flat_lora_step(model, noisy_loss_fn, batches, optimizer, sigma, 5) == pytest.approx(loss.item())
    torch.testing.assert_close([p.grad for p in lora_parameters(model)], list(expected))


def test_the_method_itself_is_handed_on_as_it_is():
    assert train_toy.ablated(loss_fn, 0.3, 5, ablation()) == (loss_fn, 0.3)
    assert train_toy.ablated(loss_fn, 0.0, 5, ablation(noise="base")) == (loss_fn, 0.0)


def test_the_gradients_noise_vanishes_in_antithetic_pairs_of_a_quadratic_loss():
    """For a quadratic loss the gradient is linear in eps: +eps and -eps on one batch cancel. Two draws halve it."""
    model = adapted_mlp()
    layer = next(iter(layers(model).values()))
    quadratic = lambda m, data: (layer(data[0]) - 1).square().mean()  # noqa: E731
    steps = [[batch(seed=i)] * 2 for i in range(200)]
    sizes = {d: train_toy.gradient_noise(layer, quadratic, steps, ablation(draws=d), 0) for d in train_toy.DRAWS}
    assert sizes["antithetic"] < 1e-20 * sizes["window"] and sizes["window"] > 0
    assert sizes["micro-batch"] == pytest.approx(sizes["window"] / 2, rel=0.15)


def test_the_gradients_noise_is_measured_against_that_of_the_batches():
    model, args = adapted_mlp(), ablation()
    steps, gradients = [[batch(seed=i)] for i in range(5)], {0.0: [], 0.3: []}
    for i in range(5):
        for sigma, data in ((0.0, steps[i][0]), (0.3, steps[0][0])):
            with perturbed(model, sigma, (7, i)):
                loss = loss_fn(model, data)
            grads = torch.autograd.grad(loss, lora_parameters(model))
            gradients[sigma].append(torch.cat([g.flatten() for g in grads]))
    data, noise = (sum((g - sum(gs) / 5).square().sum() for g in gs) for gs in gradients.values())
    assert train_toy.gradient_noise(model, loss_fn, steps, args, 7) == pytest.approx((noise / data).item())
