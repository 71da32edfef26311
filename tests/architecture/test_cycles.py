"""No import circle, hidden or not: imports in functions and for type checkers count as well."""

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from tests.architecture.sources import PACKAGES, imports_of, module_name, python_files


def _cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _imported_modules(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    package = module if is_package else module.rpartition(".")[0]
    names = [item.name for item in imports_of(ast.parse(source), package)]
    found = {name if name in known else name.rpartition(".")[0] for name in names}
    return (found & known) - {module}


def _graph(sources: Mapping[str, tuple[str, bool]]) -> dict[str, set[str]]:
    known = set(sources)
    return {
        module: _imported_modules(source, module, is_package, known)
        for module, (source, is_package) in sources.items()
    }


def test_no_module_imports_itself_through_others() -> None:
    sources = {
        module_name(file): (file.read_text("utf-8"), file.name == "__init__.py")
        for file in python_files(*PACKAGES)
    }
    graph = _graph(sources)
    assert sum(map(len, graph.values())) > 300
    assert _cycle(graph) == []


def test_a_circle_is_noticed_however_it_is_hidden() -> None:
    """Negative control: in a function, for type checkers, through a third module, relative."""
    plain = ("from flashdreams.infra.b import x", False)
    for hidden in (
        "def f():\n    import flashdreams.infra.a",
        "if typing.TYPE_CHECKING:\n    from flashdreams.infra.a import y",
        "from . import a",
    ):
        graph = _graph({"flashdreams.infra.a": plain, "flashdreams.infra.b": (hidden, False)})
        assert set(_cycle(graph)) == {"flashdreams.infra.a", "flashdreams.infra.b"}
    through = _graph(
        {
            "flashdreams.infra.a": plain,
            "flashdreams.infra.b": ("import flashdreams.infra.c", False),
            "flashdreams.infra.c": ("import flashdreams.infra.a", False),
        }
    )
    assert len(set(_cycle(through))) == 3
    assert _cycle(_graph({"flashdreams.infra.a": plain, "flashdreams.infra.b": ("", False)})) == []
