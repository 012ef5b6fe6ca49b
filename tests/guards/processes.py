"""Processes for tests.

To import torch takes seconds, and so does what the first step of an optimizer imports. So each of them is forked from
one process that has imported these and has done nothing else. Other systems than Linux do not fork such a process well.
"""

import multiprocessing
import sys

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])


def started(function, *arguments):
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def ended(process):
    """Its exit code: minus the signal that killed it, or None if it does not end."""
    process.join(100)
    return process.exitcode
