"""Entry points of the commands: they answer signals before they import what takes time."""

from flashdreams.runtime.first_signals import end_at_once


def run() -> None:
    """``flashdreams-run``."""
    end_at_once("flashdreams-run")
    from flashdreams.run import entry_point

    entry_point()


def serve() -> None:
    """``flashdreams-serve``."""
    end_at_once("flashdreams-serve")
    from flashdreams.serve import entry_point

    entry_point()


def check() -> None:
    """``flashdreams-check``."""
    end_at_once("flashdreams-check")
    from flashdreams.check import entry_point

    entry_point()


def plan() -> None:
    """``flashdreams-plan``."""
    end_at_once("flashdreams-plan")
    from flashdreams.plan import entry_point

    entry_point()


def client() -> None:
    """``flashdreams-client``."""
    end_at_once("flashdreams-client")
    from flashdreams.serving.client_command import entry_point

    entry_point()
