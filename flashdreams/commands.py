"""Entry points of the commands: they answer signals before they import what takes time."""

from collections.abc import Callable
from importlib import import_module

from flashdreams.runtime.first_signals import begin_command


def _command(program: str, module: str) -> Callable[[], None]:
    def start() -> None:
        begin_command(program)
        import_module(module).entry_point()

    return start


run = _command("flashdreams-run", "flashdreams.run")
serve = _command("flashdreams-serve", "flashdreams.serve")
check = _command("flashdreams-check", "flashdreams.check")
plan = _command("flashdreams-plan", "flashdreams.plan")
client = _command("flashdreams-client", "flashdreams.serving.client_command")
