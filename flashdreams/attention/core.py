"""The attention core: write the cache, attend. Parallel strategies wrap it."""

from torch import Tensor, nn

from flashdreams.attention.backends import BACKENDS, AttentionBackend, bind_kv_splits, sdpa
from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.fp8 import FP8, attend, quantize
from flashdreams.runtime.region import Region


class AttentionCore(nn.Module):
    """Attention without projections; owns no parameters, so wrapping it renames none.

    The number of heads is taken from the tensors, because sharding changes it.
    """

    def __init__(self, head_dim: int, backend: AttentionBackend = sdpa) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.backend = backend
        self.strict = False
        """Whether a head's result must not depend on the number of heads."""
        self.kv_splits = 1
        """KV splits of attention over an fp8 cache on a GPU."""

    def new_cache(self, spec: KVCacheSpec, cursor: Cursor) -> KVCache:
        """Allocate storage for one rollout; a wrapper changes the spec first."""
        return KVCache(spec, cursor, layout=self)

    def cache_region(self, region: Region) -> Region:
        """Which entries of a region of ``[B, slots, N, D]`` of the whole model are cached here."""
        return region

    def written_region(self, region: Region) -> Region:
        """Which of these this rank writes to a file; all ranks together write each once."""
        return region

    def share_maxima(self, maxima: Tensor) -> Tensor:
        """Largest values over all ranks; see `CacheLayout`. Without wrappers, its own."""
        return maxima

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend to the cache, the current chunk included; without a cache to ``k`` and ``v``.

        Args:
            q: ``[B, L, N, D]``, rotated; e4m3 where the cache ``quantizes_early``.
            k: ``[B, L, N, D]``, rotated (``[B, S, N, D]`` without a cache).
            v: like ``k``.
            cache: this layer's keys and values; the chunk's slots are overwritten.

        Returns:
            ``[B, L, N, D]``.
        """
        if cache is None:
            return self.backend(q, k, v, scale=self.scale)
        if cache.scales is not None:
            cache.calibrate(q, k, v)
            cache.write(k, v)
            return self.attend_stored(q, cache)
        k, v = cache.update(k, v)
        return self.backend(q, k, v, scale=self.scale)

    def attend_stored(self, q: Tensor, cache: KVCache) -> Tensor:
        """Attend to an fp8 cache into which the current chunk was written.

        Args:
            q: ``[B, L, N, D]``, quantized or not.
            cache: with the chunk's keys and values.

        Returns:
            ``[B, L, N, D]`` in the type of the cache's spec.
        """
        q = q if q.dtype == FP8 else quantize(q, cache.q_scale)
        scales = (cache.q_scale, cache.k.scale, cache.v.scale)
        options = {"scale": self.scale, "dtype": cache.spec.dtype, "backend": self.backend}
        return attend(q, *cache.stored(), scales, **options, num_splits=self.kv_splits)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """Write the current chunk into the cache without attending; arguments as in ``forward``.

        Raises:
            ValueError: the cache still needs the queries of this pass for its scales.
        """
        if cache.calibrates:
            raise ValueError(
                "The first chunk of an fp8 cache sets the scales of the queries, too: where "
                "cache.calibrates, call the attention core's forward instead of its write."
            )
        cache.write(k, v)


def bind_cores(module: nn.Module, name: str, splits: int | None) -> None:
    """Set the KV splits of all cores in a module that run a backend by name.

    Args:
        module: a core, or a wrapper of one; cores with their own backend are not changed.
        name: one of `flashdreams.attention.backends.BACKENDS`.
        splits: of each call; None, where a backend has none, changes nothing.
    """
    if splits is None:
        return
    for core in module.modules():
        if not isinstance(core, AttentionCore):
            continue
        core.kv_splits = splits
        if core.backend is BACKENDS[name]:
            core.backend = bind_kv_splits(name, splits)
