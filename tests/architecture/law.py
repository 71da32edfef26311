"""The import law: which module may know which."""

import ast
import sys
from collections.abc import Iterator

from tests.architecture.sources import Import, imports_of, is_below

LAYERS = (
    "flashdreams_kernels",
    "flashdreams.attention",
    "flashdreams.parallel",
    "flashdreams.infra",
    "flashdreams.models",
    "flashdreams.integrations",
    "flashdreams.registry",
    "flashdreams.serving",
    "flashdreams.planning",
    "flashdreams.checking",
    "flashdreams.plan",
    "flashdreams.check",
    "flashdreams.run",
    "flashdreams.serve",
    "flashdreams.commands",
)
"""From the lowest to the highest: a module imports its own layer and those before it."""

RUNTIME = "flashdreams.runtime"
"""Beside the layers: below all of them but the kernels, which know no one."""

LEAVES = ("flashdreams.infra.config", "flashdreams.parallel.plan")
"""Standard library only; known to all, but of plans the runtime knows nothing."""

METHODS_MAY_USE = (
    "flashdreams.infra",
    "flashdreams.models",
    "flashdreams.attention",
    RUNTIME,
    "flashdreams.parallel.plan",
)
"""What an integration, in the repository or outside, is built on."""

BASE_PACKAGES = {
    "torch", "numpy", "safetensors", "tyro", "yaml", "mediapy", "imageio_ffmpeg",
    "huggingface_hub", "jinja2", "matplotlib", "tqdm", "PIL", "psutil",
}  # fmt: skip
"""Third parties of the base install; all others are imported where they are needed."""

SERVE_PACKAGES = {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"}
"""Third parties of the extra ``serve`` that make up the web side, which is imported only once it is
asked for."""

WEB = (
    "flashdreams.serving.protocol",
    "flashdreams.serving.web",
    "flashdreams.serving.fleet.relay",
)
"""Who may import those where it begins."""

ENVIRONMENT = ("flashdreams.parallel.environment", "flashdreams.parallel.siblings")
"""Who may read torchrun's variables; the second begins before PyTorch is imported."""

TORCHRUN_VARIABLES = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
}  # fmt: skip


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is unlawful in a file, one line each.

    Args:
        source: the file's text.
        module: its dotted name; outside ``flashdreams`` it is judged as a method of someone's own.
        is_package: whether it is an ``__init__.py``.
    """
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    judged = [(item, _judge(module, item)) for item in imports_of(tree, package)]
    found = [f"{module}:{i.line}: imports {i.name}: {reason}" for i, reason in judged if reason]
    return found + [f"{module}:{line}: {text}" for line, text in _secrets_named(tree, module)]


def _judge(module: str, item: Import) -> str | None:
    first = item.name.split(".")[0]
    if first in sys.stdlib_module_names:
        return None
    if is_below(module, *LEAVES):
        return "a leaf imports the standard library only"
    own = module.split(".")[0]
    if first not in ("flashdreams", "flashdreams_kernels", own):
        return _judge_third_party(module, item)
    if is_below(module, "flashdreams.integrations"):
        return _judge_method(".".join(module.split(".")[:3]), item)
    if own not in ("flashdreams", "flashdreams_kernels"):
        return None if first == own else _judge_method(own, item)
    return _judge_layers(module, item.name)


def _judge_third_party(module: str, item: Import) -> str | None:
    in_parallel = is_below(module, "flashdreams.parallel")
    if is_below(item.name, "torch.distributed") and not in_parallel:
        return "torch.distributed belongs to flashdreams.parallel"
    in_programs = is_below(module, "flashdreams_kernels.programs")
    base = BASE_PACKAGES | ({"triton"} if in_programs else set())
    if is_below(module, *WEB):
        base = base | SERVE_PACKAGES
    if not item.lazy and item.name.split(".")[0] not in base:
        return "an optional package is imported inside the function that needs it"
    return None


def _judge_method(home: str, item: Import) -> str | None:
    if is_below(item.name, home):
        return None if item.relative else "its own files relatively, so that it can be moved"
    if is_below(item.name, "flashdreams.integrations"):
        return "integrations do not know each other"
    if not is_below(item.name, *METHODS_MAY_USE):
        return f"a method is built on {', '.join(METHODS_MAY_USE)} only"
    return None


def _judge_layers(module: str, name: str) -> str | None:
    if is_below(module, RUNTIME):
        allowed = is_below(name, RUNTIME, "flashdreams.infra.config")
        return None if allowed else "runtime knows infra.config only"
    if is_below(module, "flashdreams_kernels"):
        allowed = is_below(name, "flashdreams_kernels")
        return None if allowed else "the kernels know nobody"
    if is_below(name, *LEAVES, RUNTIME) or name == "flashdreams":
        return None
    if is_below(module, "flashdreams.models") and is_below(name, "flashdreams.parallel"):
        return "models know no more of parallel than its plans"
    layer = next((place for place, at in enumerate(LAYERS) if is_below(module, at)), -1)
    if not is_below(name, *LAYERS[: layer + 1]):
        return f"{module} lies below it"
    return None


def _secrets_named(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """What only ``flashdreams.parallel`` may name, other than by an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_below(module, "flashdreams.parallel"):
            if ast.unparse(node) == "torch.distributed":
                yield node.lineno, "torch.distributed belongs to flashdreams.parallel"
        elif isinstance(node, ast.Constant) and module not in ENVIRONMENT:
            name = node.value if isinstance(node.value, str) else ""
            if name in TORCHRUN_VARIABLES or name.startswith("TORCHELASTIC_"):
                yield node.lineno, f"{name} belongs to flashdreams.parallel.environment"
