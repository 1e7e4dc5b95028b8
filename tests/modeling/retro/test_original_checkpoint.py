"""A checkpoint in RETRO-pytorch's names gives the model that computes what RETRO-pytorch computes.

The reference below reads the checkpoint under its own names and follows the published equations, with the positions
that RETRO-pytorch really used; that package is not needed to run it.
"""

import math

import pytest
import torch
from original_retro import checkpoint

from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.modeling.retro.original_checkpoint import load_original

CHUNK = 4


class Reference:
    """RETRO-pytorch's forward for one row, from its weights, token by token where it matters."""

    def __init__(self, weights: dict[str, torch.Tensor], is_deepnet: bool) -> None:
        self.w, self.is_deepnet = weights, is_deepnet
        self.scales = {"decoder": (3 * 3) ** 0.25, "encoder": 0.81 * (2**4 * 3) ** 0.0625}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        if f"{name}.bias" in self.w:
            return torch.nn.functional.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        normed = x / x.square().mean(-1, keepdim=True).sqrt() * self.w[f"{name}.gamma"]
        gate = self.w.get(f"{name}.weight")
        return normed if gate is None else normed * torch.sigmoid(x * gate)

    def sublayer(self, part, name, x, function):
        if self.is_deepnet:
            return self.norm(f"{name}.norm", self.scales[part] * x + function(x))
        return x + function(self.norm(f"{name}.norm", x))

    def out(self, part, x):
        return x if self.is_deepnet else self.norm(f"{part}.norm_out", x)

    def rotate(self, x, positions):
        """(rows, heads, 32), all of whose 32 dimensions turn."""
        angles = torch.tensor([[p * 10000 ** (-i / 16) for i in range(16)] for p in positions], dtype=x.dtype)[:, None]
        a, b = x[..., :16], x[..., 16:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def attend(self, name, x, context, places, mask=None):
        """`mask` (rows, context) of what may be seen; the null slot, if there is one, always may."""
        q, k, v = (
            (source @ self.w[f"{name}.to_{letter}.weight"].T).unflatten(-1, (8, 32))
            for letter, source in (("q", x), ("k", context), ("v", context))
        )
        q, k = self.rotate(q, places[0]), self.rotate(k, places[1])
        if f"{name}.null_k" in self.w:
            k = torch.cat([self.w[f"{name}.null_k"].view(1, 8, 32), k])
            v = torch.cat([self.w[f"{name}.null_v"].view(1, 8, 32), v])
            mask = None if mask is None else torch.nn.functional.pad(mask, (1, 0), value=True)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(32)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e300)
        return self.linear(f"{name}.to_out", torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))

    def feed_forward(self, layer, x):
        return self.linear(f"{layer}.2.fn.ff.3", torch.nn.functional.gelu(self.linear(f"{layer}.2.fn.ff.0", x)))

    def encode(self, ids, chunk):
        x, real, rows = self.w["token_emb.weight"][ids], ids != 0, range(len(ids))
        for index in range(2):
            layer = f"encoder.layers.{index}"
            seen = real.expand(len(ids), -1)
            x = self.sublayer(
                "encoder",
                f"{layer}.0",
                x,
                lambda y: self.attend(f"{layer}.0.fn", y, y, (rows, rows), seen),  # noqa: B023
            )
            x = self.sublayer(
                "encoder",
                f"{layer}.1",
                x,
                lambda y: self.attend(f"{layer}.1.fn", y, chunk, (rows, range(CHUNK))),  # noqa: B023
            )
            x = self.sublayer("encoder", f"{layer}.2", x, lambda y: self.feed_forward(layer, y))  # noqa: B023
        return self.linear("encoder.project_out", self.out("encoder", x))

    def cross(self, name, x, encoded, found):
        rows = [torch.zeros_like(x[0])] * min(CHUNK - 1, len(x))
        for p in range(CHUNK - 1, len(x)):
            chunk, place = (p + 1) // CHUNK - 1, 2 * CHUNK - 2 if (p + 1) % CHUNK == 0 else 0
            context, real = torch.cat(encoded[chunk]), (found[chunk] != 0).flatten()[None]
            positions = [*range(found.shape[-1])] * found.shape[1]
            rows.append(self.attend(f"{name}.1.fn.cross_attn", x[p : p + 1], context, ([place], positions), real)[0])
        return torch.stack(rows)

    def logits(self, ids, found):
        x = self.w["token_emb.weight"][ids] + self.w["pos_emb.weight"][: len(ids)]
        if "to_decoder_model_dim.weight" in self.w:
            x = self.linear("to_decoder_model_dim", x)
        rows, encoded = range(len(ids)), None
        past = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        for index in range(3):
            layer = f"decoder.layers.{index}"
            x = self.sublayer(
                "decoder",
                f"{layer}.0",
                x,
                lambda y: self.attend(f"{layer}.0.fn", y, y, (rows, rows), past),  # noqa: B023
            )
            if index != 1:
                if encoded is None:
                    encoded = [
                        [self.encode(one, x[u * CHUNK : (u + 1) * CHUNK]) for one in of_chunk]
                        for u, of_chunk in enumerate(found)
                    ]
                x = self.sublayer("decoder", f"{layer}.1", x, lambda y: self.cross(layer, y, encoded, found))  # noqa: B023
            x = self.sublayer("decoder", f"{layer}.2", x, lambda y: self.feed_forward(layer, y))  # noqa: B023
        return self.linear("to_logits", self.out("decoder", x))


KINDS = {
    "as shipped": ("rms", False, 16),
    "one width": ("rms", False, 24),
    "gated norms": ("gated_rms", False, 16),
    "deepnet": ("layer", True, 16),
    "gated deepnet": ("gated_rms", True, 16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_checkpoint_gives_the_originals_logits(kind, tmp_path):
    norm, is_deepnet, encoder_width = KINDS[kind]
    weights = checkpoint(norm, is_deepnet, encoder_width)
    torch.save(weights, tmp_path / "retro.pt")
    model = load_original(tmp_path / "retro.pt", chunk_size=CHUNK).double().eval()
    model.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    ids = torch.randint(1, 19, (11,))
    found = torch.randint(1, 19, (2, 2, 8))
    found[0, 1, 5:] = 0
    expected = Reference(weights, is_deepnet).logits(ids, found)
    torch.testing.assert_close(model(ids[None], retrieved=found[None]).logits[0], expected, rtol=3e-4, atol=3e-4)


def test_a_converted_model_saves_and_loads_as_any_other(tmp_path):
    torch.save(checkpoint("rms", False, 16), tmp_path / "retro.pt")
    model = load_original(tmp_path / "retro.pt", chunk_size=CHUNK, eos_token_id=3).eval()
    model.save_pretrained(tmp_path / "ours")
    loaded = RetroForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.randint(1, 19, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.config.rope, loaded.config.eos_token_id) == ("legacy", 3)


def test_other_files_are_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt must hold the state dict of a RETRO-pytorch model"):
        load_original(tmp_path / "other.pt")
    weights = checkpoint("rms", False, 16)
    del weights["decoder.layers.1.2.fn.ff.3.bias"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"layers.1.feed_forward.down.bias is missing or surplus"):
        load_original(tmp_path / "less.pt")
