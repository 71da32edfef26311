"""Many servers behind one address, placed and scaled by Ray Serve.

    pip install 'flashdreams[serve,ray]'
    python launch/ray_serve.py toy-world --state-dir /shared/toy --min-replicas 2 --max-replicas 4
    python launch/ray_serve.py self-forcing-wan2.1-t2v-1.3b --state-dir /shared/sf \\
        --gpus 2 --host 0.0.0.0 --token "$TOKEN" -- --max-sessions 2

Arguments after ``--`` are passed to every ``flashdreams-serve``. A replica is one server on one
group of GPUs of one node; sessions of a removed or failed replica continue on another one.
``--state-dir`` must be a folder shared by all nodes.
"""

import argparse
import math
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from flashdreams.serving.fleet.members import Fleet
from flashdreams.serving.fleet.relay import create_relay
from flashdreams.serving.fleet.replica import DRAIN_S, START_S, ServerProcess
from flashdreams.serving.web.settings import WebSettings, is_loopback

APPLICATION = "flashdreams"


class Replica:
    """One server, with the methods that Ray Serve calls."""

    def __init__(self, words: Sequence[str], root: str, gpus: int, local: bool) -> None:
        import httpx

        name = f"r{serve.get_replica_context().replica_id.unique_id}"[:24]
        host = "127.0.0.1" if local else ray.util.get_node_ip_address()
        self._server = ServerProcess(words, Path(root), name, host=host, ranks=max(1, gpus))
        self._server.wait(START_S)
        self._client = httpx.AsyncClient()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Load figures of the server, for `wanted_replicas`."""
        from flashdreams.serving.fleet.members import Health, probe

        health = await probe(self._client, self._server.member) or Health()
        return {name: float(getattr(health, name)) for name in ("sessions", "queued", "places")}

    def check_health(self) -> None:
        """Raise if the server has ended, so that Ray Serve starts another replica."""
        self._server.check()

    def name(self) -> str:
        """Name of the server."""
        return self._server.name

    def __del__(self) -> None:
        """On removal of the replica, write its sessions to disk for another one."""
        if server := getattr(self, "_server", None):
            server.stop()


def wanted_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """How many replicas to run, so that all sessions and all waiting clients have a place.

    Ray Serve keeps it between ``min_replicas`` and ``max_replicas``, and waits before it acts.

    Args:
        context: autoscaling context of Ray Serve, with the last figures of all replicas.
    """
    metrics = context.aggregated_metrics or {}
    return wanted(
        context.target_num_replicas,
        {name: sum(metrics.get(name, {}).values()) for name in ("sessions", "queued", "places")},
        len(metrics.get("places", {})),
    ), {}


def wanted(now: int, total: dict[str, float], known: int) -> int:
    """See `wanted_replicas`.

    Args:
        now: current target number of replicas.
        total: ``sessions`` with a place, ``queued``, and ``places``, of all replicas.
        known: replicas whose figures are in ``total``.
    """
    if not known or total["places"] < 1:
        return now  # no figures yet
    places = total["places"] / known
    return math.ceil((total["sessions"] + total["queued"]) / places)


def build(options: argparse.Namespace) -> Any:
    """The application: a relay in front of replicas."""
    root = str(Path(options.state_dir).absolute())
    local = is_loopback(options.host)
    settings = WebSettings(
        host=options.host,
        port=options.port,
        token=options.token,
        allowed_origins=tuple(options.allowed_origins),
    )
    bundle = {"CPU": options.cpus, **({"GPU": float(options.gpus)} if options.gpus else {})}
    replica = serve.deployment(
        Replica,
        name="Replica",
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "upscale_delay_s": options.upscale_delay_s,
            "downscale_delay_s": options.downscale_delay_s,
            "policy": {"policy_function": wanted_replicas},
        },
        # One bundle is on one node, so that the GPUs of a group can use NVLink.
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=DRAIN_S + 10,
        graceful_shutdown_wait_loop_s=0.5,
    )

    class Relay:
        """Holds the replicas, so that they belong to the same application."""

        def __init__(self, replicas: Any) -> None:
            self.replicas = replicas

    def ingress() -> Any:
        return create_relay(Fleet(Path(root)), settings)

    relay = serve.deployment(
        serve.ingress(ingress)(Relay),
        name="Relay",
        num_replicas=options.relays,
        max_ongoing_requests=settings.max_sockets * 4,
        ray_actor_options={"num_cpus": options.relay_cpus},
        graceful_shutdown_timeout_s=10,
    )
    return relay.bind(replica.bind(options.words, root, options.gpus, local))


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("slug", help="what to serve")
    parser.add_argument("--state-dir", required=True, help="folder that all nodes share")
    parser.add_argument("--gpus", type=int, default=0, help="of each replica; 0: on the CPU")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each replica")
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--upscale-delay-s", type=float, default=10.0)
    parser.add_argument("--downscale-delay-s", type=float, default=300.0)
    parser.add_argument("--relays", type=int, default=1, help="processes that pass data on")
    parser.add_argument("--relay-cpus", type=float, default=0.5)
    parser.add_argument("--host", default="127.0.0.1", help="any but loopback needs --token")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", help="what clients have to know")
    parser.add_argument("--allowed-origins", nargs="*", default=[])
    typed = sys.argv[1:] if argv is None else list(argv)
    end = typed.index("--") if "--" in typed else len(typed)
    options = parser.parse_args(typed[:end])
    options.words = [options.slug, *typed[end + 1 :]]  # after --: for every flashdreams-serve
    return options


def main() -> None:
    """Serve on the cluster of ``RAY_ADDRESS`` or on this machine, until SIGTERM."""
    options, stop = read_options(), threading.Event()
    application = build(options)  # reports errors before anything is started
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(application, name=APPLICATION)
    for number in (signal.SIGTERM, signal.SIGINT):  # replaces Ray's handlers
        signal.signal(number, lambda number, frame: stop.set())
    print(f"READY http://{options.host}:{options.port}/ {options.slug}", flush=True)
    while not stop.wait(1.0):  # a wait without timeout would block signals
        continue
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
