"""The three files of the project lie beside this folder, and the tests share reference.py."""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))
sys.path.insert(0, str(TESTS))

torch.set_num_threads(1)  # the models are tiny, and beside a busy process a second thread is waited for
