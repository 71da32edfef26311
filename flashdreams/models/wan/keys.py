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

_VAE_ENDS = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"^(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.middle.0."),
    (r"^(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.middle.1."),
    (r"^(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.middle.2."),
)
"""Names outside of the levels, in both autoencoders."""


def _residual_names(blocks: str) -> tuple[tuple[str, str], ...]:
    """Names inside of a residual block; ``blocks`` matches the block, without groups."""
    names = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    return tuple((rf"^({blocks})\.{theirs}\.", rf"\1.{ours}.") for theirs, ours in names.items())


VAE_DIFFUSERS_KEYS = KeyMap(
    name="diffusers",
    marker=r"(en|de)coder\.conv_in\.",
    rename=(
        *_VAE_ENDS,
        (r"^encoder\.down_blocks\.", "encoder.downsamples."),
        *(
            (rf"^decoder\.up_blocks\.{level}\.{layer}\.", f"decoder.upsamples.{4 * level + place}.")
            for level in range(4)
            for place, layer in enumerate(
                (r"resnets\.0", r"resnets\.1", r"resnets\.2", r"upsamplers\.0")
            )
        ),
        *_residual_names(r"(?:en|de)coder\.[a-z]+samples\.\d+|(?:en|de)coder\.middle\.[02]"),
    ),
)
"""``AutoencoderKLWan`` of the ``diffusers`` package at its default layout: four levels, each of
three residual blocks and an upsampling in the decoder; no tensor changes shape.

Source: the state dict of ``diffusers.AutoencoderKLWan`` beside that of ``Wan2.1_VAE.pth``.
"""

_LEVEL = r"^(encoder|decoder)\.(down|up)_blocks\.(\d+)\."

VAE22_DIFFUSERS_KEYS = KeyMap(
    name="diffusers",
    marker=r"(en|de)coder\.conv_in\.",
    rename=(
        *_VAE_ENDS,
        (_LEVEL + r"resnets\.", r"\1.\2samples.\3.\2samples."),
        (_LEVEL + r"downsampler\.", r"\1.\2samples.\3.\2samples.2."),
        (_LEVEL + r"upsampler\.", r"\1.\2samples.\3.\2samples.3."),
        *_residual_names(
            r"(?:en|de)coder\.[a-z]+samples\.\d+\.[a-z]+samples\.\d+"
            r"|(?:en|de)coder\.middle\.[02]"
        ),
    ),
)
"""``AutoencoderKLWan`` with ``is_residual=True`` at the layout of Wan 2.2: two residual blocks and
a downsampling per level of the encoder, three and an upsampling in the decoder.

Source: the state dict of ``diffusers.AutoencoderKLWan`` beside that of ``Wan2.2_VAE.pth``.
"""
