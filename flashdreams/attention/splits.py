"""The number of KV splits of an attention call, by how well its waves fill the GPU."""

import math

import torch

TILE_QUERIES = 128
"""Queries of one tile of FlashAttention-3 at head size 128."""

MAX_SPLITS = 4

COST_OF_A_SPLIT = 0.045
"""Fraction of the time that each further split costs, independent of the number of keys."""

KEYS_PER_COST = 900
"""The same in proportion to the keys: splits of so many keys cost as much as they save.

Both are fitted to FlashAttention-3 on an H200, 4680 queries, 12 heads of 128, 1 to 4 splits:
664, 703, 593, 587 TFLOP/s over 32760 keys, 655 and 666 with 1 and 2 over 14040.
"""


def choose_kv_splits(
    queries: int, keys: int, num_heads: int, batch_size: int, num_processors: int
) -> int:
    """The number of KV splits, 1 to `MAX_SPLITS`, that keeps multiprocessors busiest.

    A call is as many tiles as there are runs of 128 queries, heads and batch entries; they run in
    waves of one per multiprocessor, and the last wave is rarely full. Twice as many tiles with half
    the keys fill it better, at the cost of a second pass that merges them.

    Args:
        queries: query tokens L of the call.
        keys: key tokens S.
        num_heads: N.
        batch_size: B.
        num_processors: streaming multiprocessors.

    Returns:
        A number that follows from these sizes alone.
    """
    tiles = math.ceil(queries / TILE_QUERIES) * num_heads * batch_size

    def relative_rate(splits: int) -> float:
        waves = tiles * splits / num_processors
        cost = (COST_OF_A_SPLIT + KEYS_PER_COST / max(keys, 1)) * (splits - 1)
        return waves / math.ceil(waves) * (1 - cost)

    return max(range(1, MAX_SPLITS + 1), key=relative_rate)


def count_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for a CPU, where nothing is split."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
