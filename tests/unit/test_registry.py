"""Discovery of runners, from entry points and from the environment."""

import importlib.metadata
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashdreams import registry
from flashdreams.registry import GROUP, VARIABLE, PluginError, Registry, discover

PLUGIN = """
from dataclasses import dataclass, field
from flashdreams.infra.config import InstantiateConfig

class Thing:
    pass

@dataclass(kw_only=True)
class StandInConfig(InstantiateConfig):
    _target: type = field(default_factory=lambda: Thing)
    runner_name: str
    description: str = ""

ONE = StandInConfig(runner_name="{prefix}-one", description="first of {prefix}")
MANY = {{n: StandInConfig(runner_name=n) for n in ("{prefix}-one", "{prefix}-two")}}
SHARED = StandInConfig(runner_name="shared", description="{prefix}")
WRONG_KEY = {{"{prefix}-other": ONE, "{prefix}-three": StandInConfig(runner_name="{prefix}-three")}}
NOT_ONE = {{"x": 3}}
BAD_NAME = StandInConfig(runner_name="../up")
NUMBER = 3
CALLS = []

class Holder:
    inner = ONE

def one():
    CALLS.append(1)
    return ONE

def many():
    return MANY

def failing():
    raise OSError("cannot reach the licence server")
"""


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three importable plug-in modules and no installed ones."""
    for prefix in ("alpha", "beta"):
        (tmp_path / f"fd_{prefix}.py").write_text(PLUGIN.format(prefix=prefix))
    (tmp_path / "fd_broken.py").write_text("import fd_missing_dependency\n")
    (tmp_path / "fd_exit.py").write_text("raise SystemExit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    _install(monkeypatch, {})
    for name in ("fd_alpha", "fd_beta", "fd_broken", "fd_exit"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def _install(monkeypatch: pytest.MonkeyPatch, points: dict[tuple[str, str], str]) -> None:
    """Pretend that packages are installed: (package, entry point) -> reference."""
    found = [
        SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name=package))
        for (package, name), value in points.items()
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == GROUP else [])


def _env(monkeypatch: pytest.MonkeyPatch, text: str) -> Registry:
    monkeypatch.setenv(VARIABLE, text)
    return discover()


@pytest.mark.parametrize(
    ("attr", "slugs"),
    [
        ("ONE", ["alpha-one"]),
        ("MANY", ["alpha-one", "alpha-two"]),
        ("one", ["alpha-one"]),
        ("many", ["alpha-one", "alpha-two"]),
        ("Holder.inner", ["alpha-one"]),
    ],
)
def test_a_config_a_mapping_or_a_callable_registers(
    monkeypatch: pytest.MonkeyPatch, attr: str, slugs: list[str]
) -> None:
    found = _env(monkeypatch, f"alpha=fd_alpha:{attr}")
    assert list(found) == slugs
    assert not found.broken
    assert not found.collisions
    assert found.resolve(slugs[0]).runner_name == slugs[0]  # type: ignore[attr-defined]
    _install(monkeypatch, {("alpha-package", "alpha"): f"fd_alpha:{attr}"})
    monkeypatch.delenv(VARIABLE)
    assert list(discover()) == slugs


def test_nothing_registered_is_an_empty_mapping() -> None:
    assert dict(discover()) == {}


def test_spaces_and_empty_items_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _env(monkeypatch, " a = fd_alpha:ONE ,, b=fd_beta:ONE,")
    assert list(found) == ["alpha-one", "beta-one"]


def test_a_label_resolves_where_it_differs_from_the_slug(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _env(monkeypatch, "label=fd_alpha:ONE,several=fd_beta:MANY")
    assert found.resolve("label") is found["alpha-one"]
    assert "label" not in found
    with pytest.raises(ValueError, match="registers several runners: beta-one, beta-two"):
        found.resolve("several")


def test_the_variable_beats_what_is_installed_and_the_message_names_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _install(monkeypatch, {("b-package", "theirs"): "fd_beta:SHARED"})
    found = _env(monkeypatch, "mine=fd_alpha:SHARED")
    assert found["shared"].description == "alpha"  # type: ignore[attr-defined]
    (message,) = found.collisions["shared"]
    assert message.startswith("slug 'shared' of theirs=fd_beta:SHARED from the package b-package")
    assert "hidden by mine=fd_alpha:SHARED from FLASHDREAMS_RUNNER_CONFIGS" in message
    assert "'theirs' still names it" in message
    assert found.resolve("theirs").description == "beta"  # type: ignore[attr-defined]
    assert str(found.origin("shared")) == "mine=fd_alpha:SHARED from FLASHDREAMS_RUNNER_CONFIGS"


def test_an_unknown_slug_names_the_nearest_and_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _env(monkeypatch, "several=fd_beta:MANY,label=fd_alpha:ONE")
    with pytest.raises(ValueError) as caught:
        found.resolve("alpha-on")
    message = "Unknown slug 'alpha-on'. Did you mean 'alpha-one'? Valid slugs: "
    assert str(caught.value) == message + "beta-one, beta-two, alpha-one."


def test_packages_are_taken_in_the_order_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {("z", "a"): "fd_beta:SHARED", ("a", "z"): "fd_alpha:SHARED"}
    _install(monkeypatch, points)
    assert discover()["shared"].description == "alpha"  # type: ignore[attr-defined]


def test_the_same_object_twice_is_no_collision(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _env(monkeypatch, "a=fd_alpha:ONE,b=fd_alpha:one")
    assert list(found) == ["alpha-one"]
    assert not found.collisions


@pytest.mark.parametrize(
    ("item", "slug", "message"),
    [
        ("bad=fd_broken:ONE", "bad", "ModuleNotFoundError: No module named 'fd_missing_dep"),
        ("bad=fd_nowhere:ONE", "bad", "No module named 'fd_nowhere'"),
        ("bad=fd_alpha:NOTHING", "bad", "has no attribute 'NOTHING'"),
        ("bad=fd_alpha:NUMBER", "bad", "must be a RunnerConfig, a mapping .* got int"),
        ("bad=fd_alpha:NOT_ONE", "x", "'x' must be a RunnerConfig, got int"),
        ("bad=fd_alpha:failing", "bad", "OSError: cannot reach the licence server"),
        ("bad=fd_exit:ONE", "bad", "SystemExit: 5"),
        ("bad=fd_alpha:BAD_NAME", "../up", "runner_name '../up' must be of letters"),
        ("bad=fd_alpha", "bad", "is not of the form slug=module:attr"),
        ("bad", "bad", "is not of the form slug=module:attr"),
        ("bad=fd_alpha:WRONG_KEY", "alpha-other", "'alpha-other' must equal .* 'alpha-one'"),
    ],
)
def test_a_broken_plugin_is_marked_and_breaks_nothing_else(
    monkeypatch: pytest.MonkeyPatch, item: str, slug: str, message: str
) -> None:
    found = _env(monkeypatch, f"{item},beta=fd_beta:ONE")
    assert "beta-one" in found
    (broken,) = found.broken
    assert broken.slug == slug
    with pytest.raises(PluginError, match=message) as error:
        found.resolve(slug)
    assert error.value.__cause__ is broken.error
    assert item.split("=")[0] in str(error.value)


def test_a_broken_plugin_raises_its_own_traceback_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _env(monkeypatch, "bad=fd_alpha:failing")
    with pytest.raises(PluginError) as error:
        found.resolve("bad")
    text = "".join(traceback.format_exception(error.value))
    assert 'raise OSError("cannot reach the licence server")' in text


def test_the_rest_of_a_mapping_survives_a_wrong_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(_env(monkeypatch, "a=fd_alpha:WRONG_KEY")) == ["alpha-three"]


def test_an_interrupt_during_discovery_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fd_interrupt.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        _env(monkeypatch, "a=fd_interrupt:ONE")


def test_an_unknown_slug_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _env(monkeypatch, "alpha=fd_alpha:MANY")
    with pytest.raises(ValueError) as error:
        found.resolve("alpha-tow")
    assert "Unknown slug 'alpha-tow'. Did you mean 'alpha-two'" in str(error.value)
    assert "Valid slugs: alpha-one, alpha-two" in str(error.value)


def test_a_slug_wins_over_the_label_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _env(monkeypatch, "beta-one=fd_alpha:ONE,x=fd_beta:ONE")
    assert found.resolve("beta-one").runner_name == "beta-one"  # type: ignore[attr-defined]


def test_the_variable_finds_modules_in_the_working_directory(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "fd_local.py").write_text(PLUGIN.format(prefix="local"))
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; from flashdreams import registry; "
        "registry.entry_points = lambda group: []; print(*registry.discover())"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=folder,
        env={VARIABLE: "local=fd_local:ONE"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout.split() == ["local-one"]


def test_this_package_registers_through_the_public_group() -> None:
    points = importlib.metadata.entry_points(group=GROUP)
    assert "toy-world" in [p.name for p in points if p.dist and p.dist.name == "flashdreams"]
