# An image for clusters: CUDA, the engine, a user without root rights.
#
#   docker build -t flashdreams .
#   mkdir -p outputs
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" \
#       -v "$PWD/outputs:/workspace/outputs" flashdreams toy-world
#   docker run --rm --gpus all --shm-size 8g --entrypoint torchrun flashdreams \
#       --standalone --nproc-per-node 8 -m flashdreams.run self-forcing-wan2.1-t2v-1.3b
#
# PyTorch's wheels carry their own CUDA libraries, so the small "base" image is enough. Take a tag
# whose CUDA version the driver of your nodes supports.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${CUDA_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gcc and the Python headers: Triton compiles a small launcher for every kernel at run time.
# The distribution's release is what is pinned; its mirrors keep no older versions of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/workspace/cache/huggingface \
    TRITON_CACHE_DIR=/workspace/cache/triton

RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install "torch>=2.11,<2.15"

# Sources in one layer after the large packages: a changed line does not fetch PyTorch again.
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY flashdreams flashdreams
# Versions are those that pyproject.toml allows.
# hadolint ignore=DL3013
RUN pip install ".[text,gpu,serve]" \
    && flashdreams-run --help && flashdreams-serve --help

RUN groupadd --gid 10001 dreamer \
    && useradd --uid 10001 --gid dreamer --no-create-home --home-dir /workspace dreamer \
    && install -d -m 1777 /workspace /workspace/outputs /workspace/cache
WORKDIR /workspace
# By number, for clusters that see to it that it is not root's.
USER 10001:10001

# Also for a --user that has no entry in /etc/passwd, who then can write to mounted folders of hers.
ENV HOME=/workspace USER=dreamer

# Mount a folder here to keep weights and compiled kernels from one run to the next.
VOLUME ["/workspace/cache"]

ENTRYPOINT ["tini", "-g", "--", "flashdreams-run"]
CMD ["--help"]
