"""Memory of a pass with many timesteps, counted at full size on the meta device."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashdreams.attention.core import AttentionCore
from flashdreams.infra.config import derive_config
from flashdreams.models.wan import transformer
from flashdreams.models.wan.config import WAN_TRANSFORMER_TI2V_5B
from flashdreams.models.wan.transformer import WanTransformer

GB = 1e9
FRAMES, TOKENS = 31, 31 * 880


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still alive: the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        made = func(*args, **(kwargs or {}))
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for x in filter(is_tensor, tree_leaves(made)):
            storage = x.untyped_storage()
            if storage._cdata not in known:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


def is_tensor(x) -> bool:
    return isinstance(x, Tensor)


def model_of_5b(**overrides) -> WanTransformer:
    """The published size for 121 frames at 704x1280, without memory for it."""
    sizes = dict(streaming=False, len_t=FRAMES, window_size_t=FRAMES, residual_dtype="float32")
    config = derive_config(WAN_TRANSFORMER_TI2V_5B, **{**sizes, **overrides})
    with torch.device("meta"):
        model = config.setup().cast().eval()
    for core in model.modules():
        if isinstance(core, AttentionCore):  # as a flash kernel: no matrix of scores
            core.backend = lambda q, k, v, *, scale: torch.empty_like(q)
    return model


@torch.no_grad()
def peak_of_pass(model: WanTransformer, timesteps: tuple[int, ...]) -> float:
    """GB of activations of one ``predict_flow``."""
    cache = model.initialize_cache(text=torch.empty(1, 7, 4096, device="meta"))
    rotations = torch.empty(TOKENS, model.config.head_dim // 2, 2, device="meta")
    cache.inputs.rotations = rotations
    latent = torch.empty(model.latent_shape(1), device="meta")
    with PeakMemory() as memory:
        model.predict_flow(latent, torch.empty(timesteps, device="meta"), cache)
    return memory.peak / GB


def expand_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: the modulations of all blocks for all tokens."""
    lazy = transformer.modulation_rows

    def rows_of(model: WanTransformer, modulation: Tensor, size: torch.Size):
        rows = lazy(model, modulation, size)
        return [rows(place) for place in range(len(model.blocks) + 1)].__getitem__

    monkeypatch.setattr(transformer, "modulation_rows", rows_of)


def test_one_block_s_modulations_are_expanded_at_a_time():
    """One block's 6 rows of 3072 values for 27280 tokens are 2.0 GB, those of all 61 GB."""
    model = model_of_5b()
    uniform = peak_of_pass(model, (1,))
    per_frame = peak_of_pass(model, (1, FRAMES))
    per_token = peak_of_pass(model, (1, TOKENS))
    block = TOKENS * 6 * 3072 * 4 / GB
    assert 1 < uniform < 4
    assert per_frame - uniform < 1.05 * block
    assert per_token - uniform < 2.5 * block


def test_modulations_of_all_blocks_at_once_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    model = model_of_5b()
    expand_all(monkeypatch)
    assert peak_of_pass(model, (1, FRAMES)) > 60


def test_the_peak_does_not_depend_on_the_number_of_blocks():
    few, many = model_of_5b(num_layers=2), model_of_5b(num_layers=30)
    assert peak_of_pass(few, (1, FRAMES)) == peak_of_pass(many, (1, FRAMES))
