import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flashdreams.runtime.termination import GRACE_S
from flashdreams.serve import DRAIN_S

LAUNCH = Path(__file__).parents[2] / "launch"

TORCHRUN_WAITS_S = 30
"""Before it kills a rank that does not react to a signal."""

SCRIPT = """
import torch
import torch.distributed as dist
from flashdreams.parallel import environment

place = environment.init("cpu")
total = torch.tensor([float(place.rank)])
dist.all_reduce(total)
if place.is_rank_zero:
    print(f"sum over {place.world_size} ranks: {total.item():.0f}", flush=True)
environment.shutdown()
"""

STUBS = {
    "scontrol": """#!/bin/sh
test "$1 $2" = "show hostnames" && printf '127.0.0.1\\n127.0.0.1\\n'
""",
    # Two "nodes" of this machine: the same command twice, at the same time.
    "srun": """#!/bin/sh
test "$1" = --kill-on-bad-exit=1 && shift
test "$SRUN_CPUS_PER_TASK" = 4 || exit 9
SLURM_NODEID=1 "$@" & first=$!
SLURM_NODEID=0 "$@" & second=$!
wait $first; a=$?
wait $second; b=$?
exit $((a > b ? a : b))
""",
}

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def start(command, folder, **variables):
    script = folder / "job.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        cwd=LAUNCH.parent,
    )


@needs_bash
def test_scripts_parse_and_say_how_they_are_used():
    for name in ("torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
        done = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True)
        assert done.returncode == 2 and "usage:" in done.stderr


@needs_bash
def test_torchrun_script_refuses_a_number_of_ranks_that_is_none(tmp_path):
    done = start(["bash", str(LAUNCH / "torchrun.sh"), "toy-world"], tmp_path, RANKS="0")
    assert done.returncode == 2 and done.stderr == "RANKS=0 must be a whole number from 1 on\n"


@needs_bash
@pytest.mark.slow
def test_torchrun_script_starts_a_node(tmp_path):
    logs = tmp_path / "logs"
    done = start(["bash", str(LAUNCH / "torchrun.sh")], tmp_path, RANKS="2", LOGS=str(logs))
    assert done.returncode == 0, done.stderr
    assert "sum over 2 ranks: 1\n" in done.stdout
    said = {log.parent.name: log.read_text() for log in logs.glob("*/*/*/stdout.log")}
    assert said == {"0": "sum over 2 ranks: 1\n", "1": ""}


@needs_bash
@pytest.mark.slow
def test_slurm_script_joins_two_nodes(tmp_path):
    for name, text in STUBS.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "4",
        "LOGS": str(tmp_path / "logs"),
    }
    done = start(
        ["bash", str(LAUNCH / "slurm.sbatch")],
        tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        RANKS_PER_NODE="2",
        **job,
    )
    assert done.returncode == 0, done.stderr
    assert "2 nodes x 2 ranks, rendezvous at 127.0.0.1:" in done.stdout
    assert "sum over 4 ranks: 6\n" in done.stdout
    logs = {log.parent.name: log.read_text() for log in tmp_path.glob("logs/*/*/*/stdout.log")}
    assert logs.keys() == {"0", "1"} and len([*tmp_path.glob("logs/*/*/*/stdout.log")]) == 4


def test_manifest_of_servers_agrees_with_itself():
    found = list(yaml.safe_load_all((LAUNCH / "kubernetes_serve.yaml").read_text()))
    service, pods, claim, servers = found
    template = servers["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    command, mounts = container["command"], {m["mountPath"] for m in container["volumeMounts"]}
    assert service["spec"]["sessionAffinity"] == "ClientIP"
    selectors = (service["spec"]["selector"], pods["spec"]["selector"])
    assert all(selector == labels for selector in selectors)
    assert servers["spec"]["selector"]["matchLabels"] == labels
    assert servers["spec"]["serviceName"] == pods["metadata"]["name"]
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    preparing = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > preparing + DRAIN_S
    port = str(container["ports"][0]["containerPort"])
    assert command[command.index("--port") + 1] == port
    assert template["metadata"]["annotations"]["prometheus.io/port"] == port
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    own = command[command.index("--state-dir") + 1]
    assert own == f"{command[command.index('--adopt-from') + 1]}/$(POD_NAME)"
    assert "/state" in mounts and own.startswith("/state/")
    names = {item["name"]: item for item in container["env"]}
    assert names["TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "token"
    dockerfile = (LAUNCH.parent / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}:" in dockerfile
    assert "serve]" in dockerfile


def test_kubernetes_manifest_agrees_with_itself():
    service, claim, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    command = container["command"]
    assert service["spec"]["clusterIP"] == "None"
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > TORCHRUN_WAITS_S > GRACE_S
    variables = {item["name"]: item.get("value") for item in container["env"]}
    dockerfile = (LAUNCH.parent / "Dockerfile").read_text()
    for name in ("HF_HOME", "TRITON_CACHE_DIR"):
        assert f"{name}={variables[name]}" in dockerfile
    assert f"USER {pod['securityContext']['runAsUser']}:" in dockerfile
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["batch.kubernetes.io/job-name"] == job["metadata"]["name"]
    assert f"--nnodes={job['spec']['completions']}" in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in command
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={host}" in command
    assert f"--master-port={service['spec']['ports'][0]['port']}" in command
