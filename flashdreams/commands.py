"""Entry points of the commands: they answer signals before they import what takes time."""

from flashdreams.runtime.first_signals import begin_command


def run() -> None:
    """``flashdreams-run``."""
    begin_command("flashdreams-run")
    from flashdreams.run import entry_point

    entry_point()


def serve() -> None:
    """``flashdreams-serve``."""
    begin_command("flashdreams-serve")
    from flashdreams.serve import entry_point

    entry_point()


def check() -> None:
    """``flashdreams-check``."""
    begin_command("flashdreams-check")
    from flashdreams.check import entry_point

    entry_point()


def plan() -> None:
    """``flashdreams-plan``."""
    begin_command("flashdreams-plan")
    from flashdreams.plan import entry_point

    entry_point()


def client() -> None:
    """``flashdreams-client``."""
    begin_command("flashdreams-client")
    from flashdreams.serving.client_command import entry_point

    entry_point()
