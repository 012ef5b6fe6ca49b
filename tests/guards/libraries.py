"""Optional libraries, which the project does not require."""

import importlib
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network


def library(name):
    """The module. If it is missing, the calling test is skipped or, if FLATLORA_ALL_TESTS is set, fails."""
    if "FLATLORA_ALL_TESTS" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason='needs pip install -e ".[peft]"')


# In PyTorch 2.6, compiled models keep W + eps, PEFT models do not compile to one graph, and `fully_shard` needs a GPU.
needs_torch_27 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="needs PyTorch 2.7"
)
