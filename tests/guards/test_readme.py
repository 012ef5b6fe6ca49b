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
    assert len(README.split()) <= 1700


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


@pytest.fixture
def transformers(tmp_path, monkeypatch):
    found = pytest.importorskip("transformers", reason='needs pip install -e ".[gpt2]"')
    if not found.is_torch_available():
        pytest.skip("transformers asks for PyTorch 2.6")
    monkeypatch.chdir(tmp_path)
    return found


def test_the_program_for_hugging_face_runs_as_it_stands(transformers, monkeypatch):
    (code,) = blocks("python")
    before = {}
    strengths = []

    def inject_lora(model, **options):
        before.update({name: p.clone() for name, p in model.state_dict().items()})
        return flatlora_inject_lora(model, **options)

    def perturbed(model, sigma, seed):
        strengths.append(sigma)
        return flatlora_perturbed(model, sigma, seed)

    flatlora_inject_lora = flatlora.inject_lora
    flatlora_perturbed = flatlora.perturbed
    monkeypatch.setattr(flatlora, "inject_lora", inject_lora)
    monkeypatch.setattr(flatlora, "perturbed", perturbed)
    exec(code, {"__name__": "program"})

    merged = transformers.BertForSequenceClassification.from_pretrained("merged").state_dict()
    attention = "bert.encoder.layer.0.attention.self"
    for name in (f"{attention}.query.weight", "classifier.weight", "classifier.bias"):
        assert not torch.equal(merged[name], before[name])
    key = f"{attention}.key.weight"
    assert torch.equal(merged[key], before[key])
    assert strengths == pytest.approx([flatlora.sigma_at(step, 24, 0.05) for step in range(24)])


def flat_trainer(transformers, steps, **options):
    """The page's trainer for a BERT with dropout: two micro-batches per step, activations checkpointed."""
    (code,) = blocks("python")
    scope = {"__name__": "program"}
    exec(code[: code.index("config =")], scope)

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
    flatlora.inject_lora(model, targets=["query", "value"], modules_to_save=["classifier"])
    data = [{"input_ids": torch.arange(i, i + 5), "labels": i % 2} for i in range(16)]
    arguments = transformers.TrainingArguments(
        "out",
        max_steps=steps,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return scope["FlatTrainer"](model, arguments, train_dataset=data)


def test_the_trainers_micro_batches_share_one_noise(transformers, monkeypatch):
    drawn = []
    trainer = flat_trainer(transformers, 3)

    def step_under_noise(self, model, *args, **kwargs):
        layer = flatlora.lora_layers(model)["bert.encoder.layer.0.attention.self.query"]
        drawn.append(layer.noise)
        return plain_step(self, model, *args, **kwargs)

    plain_step = transformers.Trainer.training_step
    monkeypatch.setattr(transformers.Trainer, "training_step", step_under_noise)
    trainer.train()
    assert len(drawn) == 6
    for first, second in zip(drawn[2::2], drawn[3::2]):
        assert torch.equal(first.signed_std * first.normals, second.signed_std * second.normals)
    assert not torch.equal(drawn[2].normals, drawn[4].normals)


def test_the_trainer_goes_on_from_its_checkpoint(transformers):
    whole = flat_trainer(transformers, 4)
    whole.train()
    resumed = flat_trainer(transformers, 4)
    resumed.train(resume_from_checkpoint="out/checkpoint-2")
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name


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
