#!/usr/bin/env bash
# One node: every GPU runs one rank of the same command.
#
#   launch/torchrun.sh toy-world --total-blocks 40
#   RANKS=4 launch/torchrun.sh self-forcing-wan2.1-t2v-1.3b --total-blocks 7
#   RANKS=2 launch/torchrun.sh docs/source/examples/cluster_job.py
#
# RANKS   ranks to start; default: the number of GPUs, or 1 without any
# LOGS    folder for the output of every rank in separate files; default: none
# PYTHON  interpreter; default: python
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: [RANKS=N] $0 <slug or script.py> [options]" >&2
    exit 2
fi

gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
fi
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
if [[ ! $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "RANKS=$ranks must be a whole number from 1 on" >&2
    exit 2
fi

if [[ $1 == *.py ]]; then
    program=("$@")
else
    program=(-m flashdreams.run "$@")
fi

if [[ -n ${LOGS:-} ]]; then
    program=(--log-dir "$LOGS" --tee 3 "${program[@]}")
fi

# --standalone uses a free port, so that several runs fit on one machine.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --standalone --nproc-per-node "$ranks" "${program[@]}"
