"""Commands in processes of their own, which start at once and can be killed at any moment.

A fork server imports torch and transformers a single time: from then on a process costs
milliseconds instead of seconds, and a test can kill hundreds.
"""

import multiprocessing
import os
import signal
import sys

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "llfast.cli",
        "llfast.fleet",
        "llfast.nearest",
        "pyarrow.parquet",
        "transformers.tokenization_utils_tokenizers",
        *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("gpt2", "llama", "mixtral")),
    ]
)
_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.link"}
DEADLINE_SECONDS = 120


def barrier(parties):
    """Something that processes can wait at until all are there."""
    return _CONTEXT.Barrier(parties)


def start(arguments, log, *, save_seconds=None, die_at=None, meet=None, environment=None):
    """Run a command in a process of its own; returns it, to be waited for or killed.

    Args:
        arguments: the words after `llfast`.
        log: the file for what it prints.
        save_seconds: how often it keeps finished texts, if not as often as usual.
        die_at: (folder, n): it kills itself before the n-th file that it opens, renames, removes
            or makes in the folder.
        meet: a barrier that it waits at before it begins.
        environment: variables that it has besides those of the first process.
    """
    words = [str(each) for each in arguments]
    options = (str(log), save_seconds, die_at, meet, environment or {})
    process = _CONTEXT.Process(target=_run, args=(words, *options))
    process.start()
    return process


def finish(process):
    """Wait for the end of a process; returns its exit status, negative if a signal ended it."""
    process.join(DEADLINE_SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a command did not end in {DEADLINE_SECONDS} s")
    return process.exitcode


def run(arguments, log, **options):
    """Start and finish."""
    return finish(start(arguments, log, **options))


def _run(words, log, save_seconds, die_at, meet, environment):
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from llfast import partial
    from llfast.__main__ import main

    torch.set_num_threads(1)
    if save_seconds is not None:
        partial._SECONDS_BETWEEN_SAVES = save_seconds
    sys.argv = ["llfast", *words]
    if meet is not None:
        meet.wait(DEADLINE_SECONDS)
    if die_at is not None:
        sys.addaudithook(_Killer(*die_at))
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class _Killer:
    def __init__(self, folder, count):
        self.folder = f"{folder}/"
        self.count = count

    def __call__(self, event, arguments):
        if event not in _CHANGES or not str(arguments[0]).startswith(self.folder):
            return
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
