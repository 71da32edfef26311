import contextlib
import io
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import TINY_RUNNER
from flashdreams.parallel import environment, stopping
from tests.harness import run_ranks


def test_a_single_process_makes_no_group(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = environment.init("cpu")
    assert (found.rank, found.local_rank, found.world_size) == (0, 0, 1)
    assert found.is_rank_zero and found.device == torch.device("cpu") and found.store is None
    assert not dist.is_initialized()
    assert environment.first_on_node(lambda: "done") == "done"
    assert environment.from_rank_zero(lambda: "done") == "done"
    environment.shutdown()


@pytest.mark.parametrize(
    ("device", "variables", "message"),
    [
        ("tpu9", {}, "Unknown device 'tpu9'"),
        ("meta", {}, "is not supported"),
        ("cuda:99", {}, "this node has"),
        ("cpu", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not one of WORLD_SIZE=2 .*unset RANK"),
        ("cpu", {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT"),
        ("cpu", {"RANK": "x"}, "RANK='x' must be a whole number"),
    ],
)
def test_impossible_places_are_refused(device, variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        environment.init(device)


def take_places(path):
    found = environment.init("cpu")
    with open(path, "a") as log:

        def write():
            log.write(f"{found.rank}\n")
            log.flush()
            return found.rank

        result = environment.first_on_node(write)

    def fail():
        raise KeyError("broken download")

    kind = KeyError if found.is_rank_zero else RuntimeError
    with pytest.raises(kind, match="broken download" if found.is_rank_zero else "its own message"):
        environment.first_on_node(fail)
    with pytest.raises(kind, match="broken download" if found.is_rank_zero else "its own message"):
        environment.from_rank_zero(fail)
    shared = environment.from_rank_zero(lambda: torch.full((2,), float(found.rank)))
    assert torch.equal(shared, torch.zeros(2))
    return found.rank, found.world_size, result


def test_ranks_of_an_existing_group_take_turns(tmp_path):
    results = run_ranks(take_places, 3, str(tmp_path / "log"))
    assert results == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]
    assert (tmp_path / "log").read_text().startswith("0\n")


def log_beside_a_runner(folder, own_format):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        if own_format is not None:
            logging.basicConfig(format=own_format)
        derive_config(TINY_RUNNER, output_dir=Path(folder)).setup()
        for name in ("flashdreams.somewhere", "plug_in"):
            logging.getLogger(name).info("all is well")
            logging.getLogger(name).warning("look here")
    return stderr.getvalue().splitlines()


def test_a_runner_marks_messages_with_their_rank(tmp_path):
    first, second = run_ranks(log_beside_a_runner, 2, str(tmp_path), None)
    assert first == [
        "[rank 0] INFO flashdreams.somewhere: all is well",
        "[rank 0] WARNING flashdreams.somewhere: look here",
        "[rank 0] WARNING plug_in: look here",
    ]
    assert second == [
        "[rank 1] WARNING flashdreams.somewhere: look here",
        "[rank 1] WARNING plug_in: look here",
    ]


def test_a_program_that_has_set_up_logging_keeps_its_form(tmp_path):
    first, second = run_ranks(log_beside_a_runner, 2, str(tmp_path), "program: %(message)s")
    assert first == ["program: all is well", "program: look here", "program: look here"]
    assert second == ["program: look here", "program: look here"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_rank_ends_without_the_interpreters_own_end(ranks, monkeypatch):
    """A thread of gloo that frees a tensor aborts an interpreter that is ending."""
    left = []
    monkeypatch.setattr(environment, "group_size", lambda: ranks)
    monkeypatch.setattr(stopping, "raise_on_sigterm", lambda *args, **kwargs: None)
    monkeypatch.setattr(stopping, "leave", lambda code, at_once: left.append((code, at_once)))
    stopping.run_command("program", lambda argv: 2)
    assert left == [(2, ranks > 1)]
