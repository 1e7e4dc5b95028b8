"""A checkpoint as RETRO-pytorch saves it: its names and shapes, random weights."""

import torch


def norm_weights(prefix: str, width: int, norm: str) -> dict[str, torch.Tensor]:
    if norm == "layer":
        return {f"{prefix}.weight": torch.rand(width) + 0.5, f"{prefix}.bias": torch.randn(width)}
    weights = {f"{prefix}.gamma": torch.rand(width) + 0.5}
    return weights | ({f"{prefix}.weight": torch.randn(width)} if norm == "gated_rms" else {})


def attention_weights(prefix: str, width: int, context: int, inner: int, null: bool) -> dict[str, torch.Tensor]:
    weights = {
        f"{prefix}.to_q.weight": torch.randn(inner, width) / 4,
        f"{prefix}.to_k.weight": torch.randn(inner, context) / 4,
        f"{prefix}.to_v.weight": torch.randn(inner, context) / 4,
        f"{prefix}.to_out.weight": torch.randn(width, inner) / 4,
        f"{prefix}.to_out.bias": torch.randn(width) / 4,
    }
    return weights | ({f"{prefix}.null_k": torch.randn(inner), f"{prefix}.null_v": torch.randn(inner)} if null else {})


def linear_weights(prefix: str, into: int, out: int) -> dict[str, torch.Tensor]:
    return {f"{prefix}.weight": torch.randn(out, into) / 4, f"{prefix}.bias": torch.randn(out) / 4}


def checkpoint(norm: str, is_deepnet: bool, encoder_width: int) -> dict[str, torch.Tensor]:
    """3 decoder layers, of which 0 and 2 read; 2 encoder layers; 8 heads of 32."""
    torch.manual_seed(0)
    inner, width = 8 * 32, 24
    weights = {
        "token_emb.weight": torch.randn(19, encoder_width),
        "pos_emb.weight": torch.randn(32, encoder_width),
        **linear_weights("to_logits", width, 19),
        **linear_weights("encoder.project_out", encoder_width, width),
        "encoder.rotary_pos_emb.inv_freq": torch.ones(16),
        "decoder.rotary_pos_emb.inv_freq": torch.ones(16),
    }
    if encoder_width != width:
        weights |= linear_weights("to_decoder_model_dim", encoder_width, width)
    for part, layers, own in (("encoder", 2, encoder_width), ("decoder", 3, width)):
        for index in range(layers):
            layer = f"{part}.layers.{index}"
            weights |= attention_weights(f"{layer}.0.fn", own, own, inner, False)
            weights |= norm_weights(f"{layer}.0.norm", own, norm)
            if part == "encoder":
                weights |= attention_weights(f"{layer}.1.fn", own, width, inner, False)
            elif index != 1:
                weights |= attention_weights(f"{layer}.1.fn.cross_attn", own, width, inner, True)
            if part == "encoder" or index != 1:
                weights |= norm_weights(f"{layer}.1.norm", own, norm)
            weights |= linear_weights(f"{layer}.2.fn.ff.0", own, 4 * own)
            weights |= linear_weights(f"{layer}.2.fn.ff.3", 4 * own, own)
            weights |= norm_weights(f"{layer}.2.norm", own, norm)
        if not is_deepnet:
            weights |= norm_weights(f"{part}.norm_out", own, norm)
    return {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}
