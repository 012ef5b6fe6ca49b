"""Processes for tests.

Importing torch takes seconds, and so do the imports of an optimizer's first step. So each process is forked from one
that has done these imports and nothing else. On systems other than Linux such a fork is not reliable.
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
