"""The parallel plan of the Wan transformer."""

from flashdreams.parallel.plan import ParallelPlan, TensorStyle


def wan_plan(*, image: bool, control: bool) -> ParallelPlan:
    """How a Wan transformer may be split.

    Args:
        image: it has image cross-attention.
        control: it has a control embedding.

    Cross-attention cores are absent on purpose: the text is replicated, so queries that are split
    over the sequence need no communication.
    """
    attention = ("blocks.*.self_attn", "blocks.*.cross_attn")
    tensor: dict[str, TensorStyle] = {
        f"{name}.{proj}": "colwise" for name in attention for proj in ("q", "k", "v")
    }
    tensor |= {f"{name}.o": "rowwise" for name in attention}
    tensor |= {f"{name}.{norm}": "norm" for name in attention for norm in ("norm_q", "norm_k")}
    tensor |= {"blocks.*.ffn.0": "colwise", "blocks.*.ffn.2": "rowwise"}
    if image:
        tensor |= {"blocks.*.cross_attn.k_img": "colwise", "blocks.*.cross_attn.v_img": "colwise"}
        tensor |= {"blocks.*.cross_attn.norm_k_img": "norm"}
    split = {"flatten_tokens": 1, "token_places": 0, "rope": 0}
    if control:
        split["control_embedding"] = 1
    return ParallelPlan(
        tensor=tensor,
        split=split,
        gather={"head": 1},
        attention=("blocks.*.self_attn.core",),
    )
