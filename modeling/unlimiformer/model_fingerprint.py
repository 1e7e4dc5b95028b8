"""Which weights made a memory, so that no others read it unawares."""

import hashlib

import torch
from transformers import PreTrainedModel


def model_fingerprint(model: PreTrainedModel) -> str:
    """A short digest of a model's weights: names, shapes, dtypes and up to 64 evenly spaced numbers of each.

    It tells apart checkpoints and training steps, not a change of single numbers.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in sorted(model.named_parameters()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
