"""Weights from files that others made: tensors alone are read, never code."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a local state dict by name, from `.safetensors` or torch's own format.

    Of a training checkpoint, that is what it holds under `state_dict`.

    Raises:
        ValueError: if there is no such file, or it holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        loaded = loaded.get("state_dict", loaded)
        return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    except FileNotFoundError:
        raise ValueError(f"pretrained {path}: no such file; give a local state dict, or null") from None
    except Exception as error:  # each reader has its own zoo of errors for a broken file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"pretrained {path}: no state dict of tensors ({reason})") from None
