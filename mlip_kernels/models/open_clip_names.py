"""Parameters under open_clip's names and under ours: its own image tower against a timm trunk, text towers alike."""

from __future__ import annotations

import torch
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor

MODULES = (
    ("transformer.resblocks.", "blocks."),
    ("conv1.", "patch_embed.proj."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
"""Parts of names in open_clip's image tower and in timm's."""
TRUNK = "visual.trunk."
BIAS = TRUNK + "patch_embed.proj.bias"
POSITIONS = TRUNK + "pos_embed"


def ours(state: dict[str, Tensor], *, patch_bias: bool) -> dict[str, Tensor]:
    """The state of a ``CLIP`` or ``CustomTextCLIP`` of open_clip under the names of an `MLIP`.

    Args:
        state: its state dict. The image tower is open_clip's own or a ``TimmModel`` with a linear head.
        patch_bias: whether the trunk has a bias of patches, which open_clip's own has not: 0, then.
    """
    result = {}
    for name, value in convert_to_custom_text_state_dict(state).items():
        if name == "visual.class_embedding":
            result[TRUNK + "cls_token"] = value[None, None]
        elif name == "visual.positional_embedding":
            result[POSITIONS] = value[None]
        elif name == "visual.proj":
            result["visual_projection.weight"] = value.T.contiguous()
        elif name == "visual.head.proj.weight":
            result["visual_projection.weight"] = value
        elif name == "logit_scale":
            result[name] = value.reshape(())
        elif name.startswith("visual.") and not name.startswith(TRUNK):
            result[TRUNK + _renamed(name.removeprefix("visual."), MODULES)] = value
        else:
            result[name] = value
    if patch_bias and BIAS not in result:
        result[BIAS] = torch.zeros_like(result[TRUNK + "cls_token"].flatten())
    return result


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an `MLIP` under the names of open_clip's ``CLIP`` with its own image tower; others are left out.

    A bias of patches, which that tower has not, goes into the positions of the patches.
    """
    back = tuple((ours, theirs) for theirs, ours in MODULES)
    result = {}
    for name, value in state.items():
        if name == TRUNK + "cls_token":
            result["visual.class_embedding"] = value.flatten()
        elif name == POSITIONS:
            result["visual.positional_embedding"] = _positions(state)
        elif name == "visual_projection.weight":
            result["visual.proj"] = value.T.contiguous()
        elif name.startswith(TRUNK) and name != BIAS:
            result["visual." + _renamed(name.removeprefix(TRUNK), back)] = value
        elif name.startswith("text."):
            result[name.removeprefix("text.")] = value
        elif name == "logit_scale":
            result[name] = value
    return result


def _positions(state: dict[str, Tensor]) -> Tensor:
    positions = state[POSITIONS][0]
    if BIAS not in state:
        return positions
    return torch.cat([positions[:1], positions[1:] + state[BIAS]])


def _renamed(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for before, after in parts:
        name = name.replace(before, after) if before.startswith(".") else _with_start(name, before, after)
    return name


def _with_start(name: str, before: str, after: str) -> str:
    return after + name.removeprefix(before) if name.startswith(before) else name
