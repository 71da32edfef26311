"""What neither the machine nor the shell around the tests may decide."""

import os
import signal
import sys
from multiprocessing.forkserver import ensure_running

import pytest

FROM_OUTSIDE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_"),
    *("FLASHDREAMS_RUNNER_CONFIGS", "FORCE_COLOR", "NO_COLOR", "TRITON_INTERPRET"),
    "GIT_",  # a hook's git would commit to the repository that it stands in
    *("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),  # the tests' hub is local
)
"""Beginnings of the names of variables, in capitals."""

for name in [name for name in os.environ if name.upper().startswith(FROM_OUTSIDE)]:
    del os.environ[name]

os.environ["COLUMNS"] = "80"  # help is laid out for the terminal

# Before PyTorch is imported, and for every process that a test starts: threads cost more than they
# give at these sizes, most of all where other work competes for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Jobs in a shell's background ignore interrupts, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    from tests.goldens import GoldenCases

    config.pluginmanager.register(GoldenCases())


def pytest_collection_finish() -> None:
    """Let the server that ranks are forked from import what they need, beside the first tests."""
    if "tests.harness" in sys.modules:
        ensure_running()
