"""The import law holds, and the test of it notices a breach."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.law import violations
from tests.architecture.sources import EXAMPLE_PACKAGES, PACKAGES, ROOT, module_name, python_files


def _in_file(file: Path) -> list[str]:
    return violations(file.read_text("utf-8"), module_name(file), file.name == "__init__.py")


def test_every_file_obeys_the_import_law() -> None:
    files = python_files(*PACKAGES)
    assert len(files) > 50
    assert not [text for file in files for text in _in_file(file)]


def test_the_example_packages_use_what_a_method_may_use() -> None:
    files = python_files(*EXAMPLE_PACKAGES)
    assert files
    assert not [text for file in files for text in _in_file(file)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flashdreams_kernels.adaln", "from flashdreams.runtime.transfer import to_device"),
        ("flashdreams_kernels.adaln", "import flashdreams.infra.config"),
        ("flashdreams_kernels.adaln", "import triton"),
        ("flashdreams.runtime.noise", "from flashdreams.infra.pipeline import INIT_SEED"),
        ("flashdreams.runtime.noise", "from flashdreams.parallel import plan"),
        ("flashdreams.attention.core", "from flashdreams.parallel import plan, mesh"),
        ("flashdreams.attention.core", "from flashdreams.parallel.mesh import Mesh"),
        ("flashdreams.attention.core", "def f():\n    import flashdreams.models.clip"),
        ("flashdreams.attention.backends", "import flash_attn"),
        ("flashdreams.parallel.mesh", "from flashdreams.infra.runner import Runner"),
        ("flashdreams.parallel.plan", "import torch"),
        ("flashdreams.infra.config", "from flashdreams.infra.component import Component"),
        ("flashdreams.infra.pipeline", "from ..models import clip"),
        ("flashdreams.infra.pipeline", "import torch.distributed as dist"),
        ("flashdreams.infra.pipeline", "from torch import distributed"),
        ("flashdreams.infra.pipeline", "import torch\ntorch.distributed.get_rank()"),
        ("flashdreams.infra.runner", "import os\nos.environ['RANK']"),
        ("flashdreams.parallel.mesh", "import os\nos.environ.get('MASTER_ADDR')"),
        ("flashdreams.models.clip", "from flashdreams.parallel.mesh import Mesh"),
        ("flashdreams.models.clip", "from flashdreams.integrations.toy_world import camera"),
        ("flashdreams.models.clip", "import transformers"),
        ("flashdreams.models.clip", "if TYPE_CHECKING:\n    from flashdreams.run import main"),
        ("flashdreams.integrations.wan21.config", "from ..toy_world.camera import CameraEncoder"),
        ("flashdreams.integrations.wan21.config", "from flashdreams.integrations import toy_world"),
        ("flashdreams.integrations.wan21.config", "import flashdreams.integrations.wan21.runner"),
        ("flashdreams.integrations.wan21.config", "from flashdreams.registry import discover"),
        ("flashdreams.integrations.wan21.config", "import flashdreams_kernels"),
        ("flashdreams.registry", "from flashdreams.run import main"),
        ("flashdreams.registry", "from flashdreams.planning.devices import DEVICES"),
        ("flashdreams.planning.memory", "from flashdreams.checking.report import Report"),
        ("flashdreams.checking.trace", "import torch.distributed"),
        ("flashdreams.infra.runner", "from flashdreams.planning.memory import plan_memory"),
        ("flashdreams.serving.interface", "from pydantic import BaseModel"),
        ("flashdreams.serving.web.codec", "import av"),
        ("customized_method.runner", "from flashdreams.parallel.environment import init"),
        ("customized_method.runner", "from flashdreams.registry import discover"),
        ("customized_method.runner", "import torch.distributed"),
    ],
)
def test_a_breach_is_noticed(module: str, source: str) -> None:
    """Negative control: one line each that the law forbids."""
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flashdreams_kernels.programs.adaln", "import triton.language as tl"),
        ("flashdreams.runtime.noise", "import numpy\nimport flashdreams.infra.config"),
        ("flashdreams.attention.core", "import flashdreams_kernels, flashdreams.runtime.noise"),
        ("flashdreams.attention.backends", "def f():\n    import flash_attn"),
        ("flashdreams.parallel.mesh", "import torch.distributed, flashdreams.attention.core"),
        ("flashdreams.parallel.environment", "import os\nos.environ['RANK']"),
        ("flashdreams.infra.component", "from flashdreams.parallel.plan import ParallelPlan"),
        ("flashdreams.infra.recorder", "import flashdreams"),
        ("flashdreams.models.clip", "from flashdreams.parallel import plan"),
        ("flashdreams.integrations.wan21.config", "from .runner import A\nfrom . import b"),
        ("flashdreams.serving.web.app", "from fastapi import FastAPI"),
        ("flashdreams.run", "from flashdreams import registry, infra"),
        ("flashdreams.run", "import flashdreams.planning.memory"),
        ("flashdreams.check", "import flashdreams.checking.checks, flashdreams.registry"),
        ("customized_method.config", "import customized_method.runner, flashdreams.models.clip"),
    ],
)
def test_what_the_law_allows_is_let_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_importing_flashdreams_brings_nothing_along() -> None:
    check = (
        "import sys; old = set(sys.modules); import flashdreams; print(*(set(sys.modules) - old))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["flashdreams"]
