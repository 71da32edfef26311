"""``launch/slurm.sbatch`` under a real SLURM: a controller and two nodes, all on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashdreams.integrations.toy_world import config

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
NODES = ("flashdreams1", "flashdreams2")
LIMIT_S = 150

WITHOUT = [name for name in PROGRAMS if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WITHOUT), reason=f"not installed: {', '.join(WITHOUT)}"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
        reason="needs the toy world's weights",
    ),
]

CONF = """
ClusterName=flashdreams
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES State=UP
"""

START = """
set -eu
mount --make-rprivate /
cp /etc/hosts "$FOLDER/hosts"
echo "127.0.0.1 {nodes}" >> "$FOLDER/hosts"
mount --bind "$FOLDER/hosts" /etc/hosts
munged --force --foreground --socket="$FOLDER/munge.socket" --key-file="$FOLDER/munge.key" \\
    --pid-file="$FOLDER/munge.pid" --log-file="$FOLDER/munge.log" --seed-file="$FOLDER/munge.seed" &
sleep 1
slurmctld -D -c -f "$SLURM_CONF" &
for node in {nodes}; do slurmd -D -N $node -f "$SLURM_CONF" & done
wait
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


class Cluster:
    """The daemons of a small SLURM in a mount namespace with host names of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o400)
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(folder=folder, host=host, ports=free_ports(3), nodes=NODES)
        (folder / "slurm.conf").write_text(conf)
        (folder / "state").mkdir()
        self.env = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "FOLDER": str(folder),
            "PYTHON": sys.executable, "RANKS_PER_NODE": "2", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        }  # fmt: skip
        with (folder / "daemons").open("wb") as said:
            script = START.format(nodes=" ".join(NODES))
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", script],
                env=self.env, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def call(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, cwd=self.folder)
        return done.stdout + done.stderr

    def log(self) -> str:
        logs = [self.folder / "daemons", *self.folder.glob("*.log")]
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs if log.exists())

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while self.call("sinfo", "-h", "-N", "-o", "%t").split() != ["idle", "idle"]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"no SLURM can be started here: {self.log()}")
            time.sleep(0.5)

    def submit(self, *words: str) -> str:
        """The number of a job on both nodes."""
        options = ["--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1"]
        script = str(ROOT / "launch" / "slurm.sbatch")
        said = self.call("sbatch", *options, "--mem=0", script, *words).strip()
        assert said.isdigit(), said
        return said

    def wait_for(self, job: str) -> str:
        """What a job wrote, once it has ended."""
        deadline = time.monotonic() + LIMIT_S
        while self.call("squeue", "-h", "-j", job, "-o", "%T").strip() not in ("", "COMPLETED"):
            if "Invalid job id" in self.call("squeue", "-h", "-j", job):
                break
            assert time.monotonic() < deadline, self.said(job) + self.log()
            time.sleep(0.5)
        return self.said(job)

    def said(self, job: str) -> str:
        path = self.folder / f"flashdreams-{job}.log"
        return path.read_text(errors="replace").replace("\r", "\n") if path.exists() else ""

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.wait_until_idle()
        yield found
    finally:
        found.stop()


def toy(folder: Path, blocks: int) -> list[str]:
    options = ["toy-world", "--total-blocks", str(blocks), "--device", "cpu"]
    return [*options, "--output-dir", str(folder)]


def checksums(folder: Path) -> list[str]:
    records = json.loads((folder / "stats_toy-world.json").read_text())["records"]
    return [record["latent_sha256"] for record in records]


def test_two_nodes_make_what_one_process_makes(cluster: Cluster, tmp_path: Path) -> None:
    strict = ["--parallel.strict", "True"]
    said = cluster.wait_for(cluster.submit(*toy(tmp_path / "four", 8), *strict))
    assert "2 nodes x 2 ranks, rendezvous at flashdreams1:" in said
    assert (tmp_path / "four" / "toy-world.mp4").is_file(), said + cluster.log()
    command = [sys.executable, "-m", "flashdreams.run", *toy(tmp_path / "one", 8), *strict]
    subprocess.run(command, env=cluster.env, check=True, capture_output=True)
    assert len(checksums(tmp_path / "one")) == 8
    assert checksums(tmp_path / "four") == checksums(tmp_path / "one")


def test_a_job_that_is_cancelled_leaves_its_stats(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(*toy(tmp_path, 100_000))
    lines = tmp_path / "stats_toy-world.partial.jsonl"
    deadline = time.monotonic() + LIMIT_S
    while not lines.exists() or lines.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < deadline, cluster.said(job) + cluster.log()
        time.sleep(0.2)
    cluster.call("scancel", "--signal=TERM", job)
    said = cluster.wait_for(job)
    assert "terminated" in said, said
    assert len(checksums(tmp_path)) >= 9 and not lines.exists()
    assert (tmp_path / "toy-world.partial.mp4").stat().st_size > 0
