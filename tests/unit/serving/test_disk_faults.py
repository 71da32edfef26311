"""Disks that are full or damaged: one session has no copy, the others and the server go on."""

import errno
import os
from pathlib import Path

import pytest
import torch

from flashdreams.parallel.environment import OtherRankError
from flashdreams.serving import restart
from flashdreams.serving.engine import Order, SessionEngine
from flashdreams.serving.interface import Opening, Refused
from flashdreams.serving.restart import SessionFolder
from tests.live import Client, Visit, served, until


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()


def snapshots(folder: Path, session: str) -> list[Path]:
    return list((folder / session).glob("state-*"))


def test_session_whose_opening_cannot_be_written_lives_without_a_copy(
    runner, folder, monkeypatch, caplog
):
    monkeypatch.setattr(restart, "write_whole", full_disk)
    with served(runner, state_dir=folder, snapshot_every=0.01) as server:
        ill, well = Visit(server.host, Opening(image=image())), Visit(server.host)
        assert len(ill.ask(2)) == len(well.ask(2)) == 2
        until(lambda: "without a copy on disk" in caplog.text and snapshots(folder, well.id))
        assert len(ill.ask(1)) == 1
    assert not snapshots(folder, ill.id), "a reset of it would lack its image"
    assert "shutting down" in ill.client.end[0] and "restarts" in well.client.end[0]


@pytest.mark.parametrize("fault", ["short", "a flipped bit", "gone"])
def test_damaged_opening_leaves_one_session_out(runner, folder, caplog, fault):
    """A reset would begin with another image, without an error."""
    with served(runner, state_dir=folder) as server:
        bad, good = Visit(server.host, Opening(image=image())), Visit(server.host)
        bad.ask(1), good.ask(1)
    path = folder / bad.id / "opening.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink() if fault == "gone" else path.write_bytes(data[:9] if fault == "short" else data)
    with served(runner, state_dir=folder) as server:
        with pytest.raises(Refused):
            server.host.attach(bad.id, Client())
        assert len(Visit(server.host, session=good.id).ask(1)) == 1
    assert "opening.safetensors" in caplog.text


def test_what_cannot_be_deleted_is_said_and_stays(tmp_path, monkeypatch, caplog):
    folder = SessionFolder(tmp_path, None)
    for number in (1, 2):
        folder.snapshot_path("s", number).mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", full_disk)
    folder.forget_older(folder.snapshot_path("s", 2))
    folder.forget("s")
    assert caplog.text.count("stays on disk") == 2
    monkeypatch.undo()
    folder.forget_older(folder.snapshot_path("s", 2))
    assert snapshots(tmp_path, "s") == [folder.snapshot_path("s", 2)]
    folder.forget("s")
    folder.forget("s")
    folder.forget_older(folder.snapshot_path("s", 2))
    assert not (tmp_path / "s").exists() and "Older snapshots" in caplog.text


def test_drain_that_cannot_write_keeps_the_older_snapshot(runner, folder, monkeypatch):
    with served(runner, state_dir=folder, snapshot_every=0.01) as server:
        visit = Visit(server.host)
        visit.ask(2)
        until(lambda: snapshots(folder, visit.id))
        monkeypatch.setattr(server.engine, "_snapshot", full_disk)
        visit.ask(3)
    assert "resume the session" in visit.client.end[0]
    assert len(snapshots(folder, visit.id)) == 1
    with served(runner, state_dir=folder) as server:
        assert len(Visit(server.host, session=visit.id).ask(1)) == 1


def test_drain_goes_on_after_a_session_that_cannot_come_back_to_the_device(
    runner, folder, monkeypatch
):
    with served(runner, state_dir=folder, park_after_s=0.0) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.ask(1), well.ask(1)
        for visit in (ill, well):
            server.host.detach(visit.id)
            visit.client.wait(lambda visit=visit: visit.client.states[-1][0] == "parked")
        unpark = server.engine._unpark

        def fail(order):
            return full_disk() if order.session == ill.id else unpark(order)

        monkeypatch.setattr(server.engine, "_unpark", fail)
    assert "shutting down" in ill.client.end[0] and not (folder / ill.id).exists()
    assert "resume the session" in well.client.end[0] and snapshots(folder, well.id)


def test_drain_brings_no_session_back_that_has_ended(runner, folder, monkeypatch):
    with served(runner, state_dir=folder, park_after_s=0.0) as server:
        visit = Visit(server.host)
        visit.ask(1)
        server.host.detach(visit.id)
        visit.client.wait(lambda: visit.client.states[-1][0] == "parked")
        monkeypatch.setattr(server.engine, "_unpark", lambda order: pytest.fail("for nothing"))
        with server.host.lock:
            server.drain()
            server.host.sessions[visit.id].closing = True
    assert visit.client.end[1] and not (folder / visit.id).exists()


def test_the_rank_whose_file_failed_says_why(tmp_path, monkeypatch, caplog):
    """Rank zero only knows that it was another one."""
    engine = SessionEngine(None, {}, None, None, tmp_path)
    orders = iter([Order(kind="snapshot"), Order(kind="snapshot"), Order(kind="stop")])
    errors = iter([OSError("no space left"), OtherRankError("see its own message")])

    def fail(order):
        raise next(errors)

    monkeypatch.setattr(engine, "_exchange", lambda order: next(orders))
    monkeypatch.setattr(engine, "carry_out", fail)
    engine.follow()
    (record,) = caplog.records
    assert record.getMessage() == "snapshot of a session failed: no space left"
