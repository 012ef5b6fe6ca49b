"""Processes for tests.

To import torch takes seconds, and so does what the first step of an optimizer imports. So each of them is forked from
one process that has imported these and has done nothing else.
"""

import multiprocessing
import os

CONTEXT = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])


def started(function, *arguments):
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def ended(process):
    """Its exit code: minus the signal that killed it, or None if it does not end."""
    process.join(100)
    return process.exitcode
