"""A session that another server has left is taken up by the one that its client comes to."""

import pytest
import torch

from flashdreams.serving import restart
from flashdreams.serving.interface import Refused
from flashdreams.serving.limits import ServingLimits
from tests.live import Client, Visit, served, toy_runner, until


def fleet(tmp_path, name):
    """Limits of one of several servers with a shared folder."""
    return {"adopt_from": tmp_path / "state", "state_dir": tmp_path / "state" / name, "name": name}


def test_session_goes_on_at_another_server(tmp_path):
    with served(toy_runner(tmp_path / "whole")) as server:
        visit = Visit(server.host)
        visit.keys("w")
        whole = visit.ask(6)
    with served(toy_runner(tmp_path / "b"), **fleet(tmp_path, "b")) as other:
        with served(toy_runner(tmp_path / "a"), **fleet(tmp_path, "a")) as server:
            visit = Visit(server.host)
            assert visit.id.startswith("a-")
            visit.keys("w")
            first = visit.ask(3)
        going_on = Visit(other.host, session=visit.id)
        assert torch.equal(torch.cat([first, going_on.ask(3)]), whole)
        assert not list((tmp_path / "state" / "a").glob("a-*"))
        going_on.close()


def test_session_of_a_server_that_lives_stays_there(tmp_path, monkeypatch):
    monkeypatch.setattr(restart, "ADOPT_S", 0.2)
    with served(toy_runner(tmp_path / "a"), **fleet(tmp_path, "a"), snapshot_every=0.01) as server:
        visit = Visit(server.host)
        visit.ask(2)
        until(lambda: any((tmp_path / "state" / "a").glob("a-*/state-*")))
        with served(toy_runner(tmp_path / "b"), **fleet(tmp_path, "b")) as other:
            visit.ask(2)
            with pytest.raises(Refused, match="still runs"):
                other.host.attach(visit.id, Client())
        visit.ask(1)


@pytest.mark.parametrize("token", ["../../../etc/passwd", "a" * 15, "*" * 20, "a-unknown-session"])
def test_tokens_that_are_none_touch_no_folder(tmp_path, token):
    with (
        served(toy_runner(tmp_path / "b"), **fleet(tmp_path, "b")) as server,
        pytest.raises(Refused, match="no such session"),
    ):
        server.host.attach(token, Client())


def test_two_servers_do_not_share_a_folder(tmp_path):
    with (
        served(toy_runner(tmp_path / "a"), **fleet(tmp_path, "a")),
        pytest.raises(ValueError, match="another server uses it"),
        served(toy_runner(tmp_path / "b"), **fleet(tmp_path, "a")),
    ):
        pass


def test_limits_say_what_a_shared_folder_needs(tmp_path):
    with pytest.raises(ValueError, match="needs a --state-dir in it"):
        ServingLimits(adopt_from=tmp_path, state_dir=tmp_path.parent / "elsewhere")
    with pytest.raises(ValueError, match="24 letters"):
        ServingLimits(name="a b")
    with pytest.raises(ValueError, match=r"--pause-after-s 0: must be at least 0\.1"):
        ServingLimits(pause_after_s=0)
    ServingLimits(pause_after_s=0.1)
