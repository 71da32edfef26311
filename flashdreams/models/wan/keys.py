"""Names under which other publishers keep the tensors of the Wan transformer."""

from flashdreams.runtime.checkpoint import KeyMap

_BLOCK = r"^(blocks\.\d+)\."

DIFFUSERS_KEYS = KeyMap(
    name="diffusers",
    marker=r"condition_embedder\.",
    rename=(
        (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        (_BLOCK + r"attn1\.", r"\1.self_attn."),
        (_BLOCK + r"attn2\.", r"\1.cross_attn."),
        (_BLOCK + r"(self|cross)_attn\.to_([qkv])\.", r"\1.\2_attn.\3."),
        (_BLOCK + r"(self|cross)_attn\.to_out\.0\.", r"\1.\2_attn.o."),
        (_BLOCK + r"cross_attn\.add_([kv])_proj\.", r"\1.cross_attn.\2_img."),
        (_BLOCK + r"cross_attn\.norm_added_k\.", r"\1.cross_attn.norm_k_img."),
        (_BLOCK + r"norm2\.", r"\1.norm3."),
        (_BLOCK + r"ffn\.net\.0\.proj\.", r"\1.ffn.0."),
        (_BLOCK + r"ffn\.net\.2\.", r"\1.ffn.2."),
        (_BLOCK + r"scale_shift_table$", r"\1.modulation"),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
    ),
)
"""``WanTransformer3DModel`` of the ``diffusers`` package, T2V and I2V; no tensor changes shape.

Source: the state dicts of ``diffusers.WanTransformer3DModel`` beside those of the official files.
"""

WAN_KEY_MAPS = (DIFFUSERS_KEYS,)
"""Every naming scheme beside the official one, for ``checkpoint_key_maps``."""
