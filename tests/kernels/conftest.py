"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PROGRAMS = "flashdreams_kernels.programs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, ``-m gpu`` runs the tests of this folder, too."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.gpu)


def switch_to_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Interpret all programs, also if triton was imported long ago as a compiler."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    package = importlib.import_module(PROGRAMS)
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    programs = [importlib.import_module(f"{PROGRAMS}.{name}") for name in names]
    patch.setenv("TRITON_INTERPRET", "1")
    for module in (tl, tl.standard, *programs):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, InterpretedFunction(value.fn))
    # Triton 3.7 looks through the whole language again whenever a program calls a function, which
    # takes longer than the function: let it do so once, where a program starts.
    patch_language = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch.setattr(interpreter, "_patch_lang", lambda _: patch_language(everything))
    patch.setattr(InterpretedFunction, "__call__", _call_as_is)


def _call_as_is(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        switch_to_interpreter(patch)
        yield torch.device("cpu")
