"""Access to the golden numbers of the models' official code, where a machine has them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

VARIABLE = "FLASHDREAMS_GOLDENS_DIR"


def golden_path(folder: str, file: str) -> Path:
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} is not set: golden numbers are not on this machine")
    return Path(root) / folder / file


def load_golden(folder: str, file: str) -> dict[str, torch.Tensor]:
    return load_file(golden_path(folder, file))


def golden_config(folder: str) -> dict:
    return json.loads(golden_path(folder, "config.json").read_text())
