"""The three files of the project lie beside this folder, and the tests share reference.py."""

import os
import sys
from pathlib import Path

# The models are tiny, and a second thread would only be waited for. What the tests start inherits the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))
sys.path.insert(0, str(TESTS))

torch.set_num_threads(1)
