"""A text encoder whose weights stay in host memory, on a real GPU."""

import pytest
import torch

from flashdreams.infra.component import load_component
from flashdreams.models.umt5 import UMT5TextEncoder
from tests.tiny_umt5 import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

pytest.importorskip("transformers")
TOKENS = [[3, 4, 5, 6, 1], [7, 1]]


def test_embeddings_have_the_same_bits_and_the_device_holds_one_layer():
    sizes = {"text_dim": 512, "ffn_dim": 4096, "num_layers": 6, "text_len": 8, "dtype": "bfloat16"}
    found, peaks = [], []
    for offload in (False, True):
        torch.manual_seed(0)
        encoder = UMT5TextEncoder(tiny_config(**sizes, offload=offload))
        before = torch.cuda.memory_allocated()
        load_component(encoder, torch.device("cuda"))
        encoder.embed(TOKENS)  # what libraries allocate at their first call
        torch.cuda.reset_peak_memory_stats()
        found.append(encoder.embed(TOKENS))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        nbytes = [x.nbytes for x in encoder.parameters()]
        del encoder
    assert torch.equal(*found) and found[1].is_cuda
    assert peaks[0] >= sum(nbytes)
    assert peaks[1] < 3 * max(nbytes) + 16e6 < sum(nbytes) / 2, "a few layers, and activations"
