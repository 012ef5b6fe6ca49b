"""The front page: its size, its links, the tests that it names, and its code, which runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatlora
import train_gpt2

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", ROOT / "tests" / "evidence" / "README.md"]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, flags=re.S | re.M)


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_and_named_tests_are_there(page):
    text = page.read_text("utf-8")
    for target in re.findall(r'(?:\]\(|src="|srcset=")([^)\s#"]+)', text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    sources = ""
    for path in Path(ROOT, "tests").rglob("test_*.py"):
        sources += path.read_text("utf-8")
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name


def test_the_changed_loop_trains_and_merges():
    """The lines of the diff that are new or stay, on a model with the layers that they name."""
    (diff,) = blocks("diff")
    code = ""
    for line in diff.splitlines(keepends=True):
        if not line.startswith("-"):
            code += line[1:]
    code = code.replace("loss.backward()", "loss.backward(); losses.append(loss.item())")

    class MyModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)
            self.v_proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.v_proj(self.q_proj(x).tanh())

    x = torch.randn(16, 8)
    y = torch.randint(8, (16,))
    loader = [{"x": x, "y": y}] * 20
    losses = []
    scope = {"torch": torch, "F": F, "MyModel": MyModel}
    scope |= {"loader": loader, "total_steps": 20, "run": 0, "losses": losses}
    exec(code, scope)
    assert losses[-1] < losses[0]


def test_the_trainer_trains_head_and_adapters_under_noise(tmp_path, monkeypatch):
    """The program for Hugging Face, on a small BERT and random data."""
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[gpt2]"')
    if not transformers.is_torch_available():
        pytest.skip("transformers asks for PyTorch 2.6")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, num_labels=2, **sizes)
    model = transformers.BertForSequenceClassification(config)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    data = []
    for i in range(16):
        data.append({"input_ids": torch.arange(i, i + 5), "labels": i % 2})
    settings = {"max_steps": 4, "learning_rate": 0.01, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments("out", gradient_accumulation_steps=2, disable_tqdm=True, **settings)

    strengths = []

    def perturbed(model, sigma, seed):
        strengths.append((sigma, seed))
        return flatlora.perturbed(model, sigma, seed)

    scope = vars(flatlora) | {"Trainer": transformers.Trainer, "perturbed": perturbed}
    exec(code, scope | {"model": model, "arguments": arguments, "data": data})

    merged = transformers.BertForSequenceClassification.from_pretrained("merged").state_dict()
    attention = "bert.encoder.layer.0.attention.self"
    for name in (f"{attention}.query.weight", "classifier.weight", "classifier.bias"):
        assert not torch.equal(merged[name], before[name])
    key = f"{attention}.key.weight"
    assert torch.equal(merged[key], before[key])

    sigmas = [sigma for sigma, _ in strengths]
    seeds = [seed for _, seed in strengths]
    expected = [flatlora.sigma_at(step, 4, 0.05) for step in range(4)]
    assert sigmas[::2] == pytest.approx(expected)
    assert sigmas[1::2] == sigmas[::2]  # two micro-batches per step
    assert seeds[1::2] == seeds[::2]
    assert len(set(seeds)) == 4


def test_what_it_names_exists():
    for name in ("LoRALinear", "inject_lora", "merge_lora", "perturbed", "flat_lora_step", "sam_step", "sharpness"):
        assert f"`{name}" in README
        assert hasattr(flatlora, name)
    for name in ("perturbed_peft", "save_peft", "load_peft"):
        assert f"`{name}" in README
        assert hasattr(train_gpt2, name)
    source = (ROOT / "train_gpt2.py").read_text("utf-8")
    options = set(re.findall(r"--[a-z-]+", source))
    for name in vars(train_gpt2.Recipe):
        options.add(f"--{name.replace('_', '-')}")
    for command in re.findall(r"python train_gpt2\.py[^`\n]*", README):
        assert set(re.findall(r"--[a-z-]+", command)) <= options, command
