"""The front page: its size and links, the tests and figures that it names, and its code, which runs unchanged."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatlora

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
EVIDENCE = (ROOT / "tests" / "evidence" / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", ROOT / "tests" / "evidence" / "README.md"]


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, flags=re.S | re.M)


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def after_the_diff(diff):
    """The code after a diff: its added and unchanged lines."""
    lines = [line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("-")]
    return "".join(lines)


# ---- The page ----


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 210
    assert len(README.split()) <= 1600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_and_named_tests_are_there(page):
    text = page.read_text("utf-8")
    for target in re.findall(r'(?:\]\(|src="|srcset=")([^)\s#"]+)', text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    sources = "".join(path.read_text("utf-8") for path in Path(ROOT, "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name


def test_each_measured_number_stands_in_the_evidence():
    measured = re.findall(r"[+-]\d+\.\d+|±\d+\.\d+|\d\.\d\d\b", section("Should I use it?") + section("Cost"))
    assert measured
    for number in measured:
        assert number in EVIDENCE, number


def test_named_functions_and_options_exist():
    for name in re.findall(r"`(\w+)`", section("The method beside the code")):
        assert hasattr(flatlora, name), name
    source = (ROOT / "train_gpt2.py").read_text("utf-8")
    for command in re.findall(r"python train_gpt2\.py[^`\n]*", README):
        for option in re.findall(r"--([a-z0-9-]+)", command):
            assert f'"--{option}"' in source, option


# ---- Its code ----


class MyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.v_proj(self.q_proj(x).tanh())


def test_the_loop_for_any_model_trains_and_merges():
    x, y = torch.randn(16, 8), torch.randint(8, (16,))
    scope = {"torch": torch, "F": F, "MyModel": MyModel, "batches": [(x, y)] * 20, "total_steps": 20}
    torch.manual_seed(0)
    before = F.cross_entropy(MyModel()(x), y)
    torch.manual_seed(0)
    exec(after_the_diff(blocks("diff")[1]), scope)
    assert type(scope["model"].q_proj) is nn.Linear
    assert F.cross_entropy(scope["model"](x), y) < before


def test_the_lines_for_saving_and_loading(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imports, _, saving, loading = blocks("python")[2].splitlines()
    models = [flatlora.inject_lora(MyModel(), targets=["q_proj"]) for _ in range(2)]
    scope = {"torch": torch}
    exec(imports, scope)

    exec(saving, scope | {"model": models[0]})
    exec(loading, scope | {"model": models[1]})

    assert torch.equal(models[1].q_proj.lora_A, models[0].q_proj.lora_A)


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """transformers and peft, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    pytest.importorskip("accelerate", reason='needs pip install -e ".[peft]"')
    return pytest.importorskip("transformers"), pytest.importorskip("peft")


def tiny_llama(transformers, layers=1):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))


def test_the_loop_for_a_peft_model_trains(libraries):
    transformers, peft = libraries
    model = tiny_llama(transformers)
    tokens = torch.arange(10)[None]
    batch = {"input_ids": tokens, "labels": tokens}
    before = model(**batch).loss
    scope = {"torch": torch, "model": model, "batches": [batch] * 20, "total_steps": 20}
    scope |= {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    exec(after_the_diff(blocks("diff")[0]), scope)
    assert scope["model"](**batch).loss < before


def test_the_loop_for_accelerate_gives_the_same_step_as_the_full_batch(libraries):
    """Compared with one step by hand. Both micro-batches see the noise of their optimizer step."""
    transformers, _ = libraries
    import accelerate

    rows = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(0))

    def loss_fn(model, batch):
        return model(input_ids=batch, labels=batch).loss

    def adapted():
        model = flatlora.inject_lora(tiny_llama(transformers), targets=["q_proj"])
        nn.init.ones_(model.model.layers[0].self_attn.q_proj.lora_B)
        return model, torch.optim.SGD(flatlora.lora_parameters(model), lr=0.1)

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*adapted())
    scope = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "step": 3, "total_steps": 10}
    scope |= {"loss_fn": loss_fn, "perturbed": flatlora.perturbed, "sigma_at": flatlora.sigma_at}
    for row in rows:
        exec(blocks("python")[1], scope | {"batch": row[None]}, scope)
    assert scope["step"] == 4

    by_hand, optimizer = adapted()
    sigma = flatlora.sigma_at(3, 10, sigma=0.05)
    flatlora.flat_lora_step(by_hand, loss_fn, [row[None] for row in rows], optimizer, sigma, seed=3)
    for given, expected in zip(flatlora.lora_parameters(model), flatlora.lora_parameters(by_hand)):
        torch.testing.assert_close(given, expected)


def test_the_program_for_the_trainer_runs_unchanged(libraries, monkeypatch):
    transformers, peft = libraries
    strengths = []

    def recorded(model, sigma, seed):
        strengths.append(sigma)
        return original(model, sigma, seed)

    original = flatlora.perturbed
    monkeypatch.setattr(flatlora, "perturbed", recorded)
    scope = {"__name__": "program"}
    torch.manual_seed(0)
    exec(blocks("python")[0], scope)
    assert strengths == pytest.approx([flatlora.sigma_at(step, 24, 0.05) for step in range(24)])

    torch.manual_seed(0)
    untrained = transformers.LlamaForCausalLM(scope["config"]).state_dict()
    merged = transformers.LlamaForCausalLM.from_pretrained("merged").state_dict()
    adapters = peft.utils.load_peft_weights("adapter")
    name = "model.layers.0.self_attn.q_proj"
    A = adapters[f"base_model.model.{name}.lora_A.weight"]
    B = adapters[f"base_model.model.{name}.lora_B.weight"]
    assert B.any()
    torch.testing.assert_close(merged[f"{name}.weight"], untrained[f"{name}.weight"] + 16 / 8 * B @ A)


def test_the_trainers_micro_batches_share_one_noise(libraries, monkeypatch):
    transformers, _ = libraries
    scope = {"__name__": "program"}
    program = blocks("python")[0]
    exec(program[: program.index("config =")], scope)
    drawn = []

    def recorded(merged, sigma, seed, name):
        drawn.append((seed, name))
        return original(merged, sigma, seed, name)

    original = flatlora.draw_noise
    monkeypatch.setattr(flatlora, "draw_noise", recorded)
    model = flatlora.inject_lora(tiny_llama(transformers), targets=["q_proj"])
    data = [{"input_ids": torch.arange(i, i + 5), "labels": torch.arange(i, i + 5)} for i in range(12)]
    arguments = transformers.TrainingArguments(
        "out",
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
    )
    scope["FlatTrainer"](model, arguments, train_dataset=data).train()
    name = "model.layers.0.self_attn.q_proj"
    assert drawn == [((42, step, 0), name) for step in (1, 1, 2, 2)]  # at step 0 sigma is 0
