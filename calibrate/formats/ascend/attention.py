"""Makes the tensors and the description by which a checkpoint in the format `ascend` asks for quantized attention.

For an attention module A, MindIE-SD reads the type from the description of `A.quant_type`, which is no tensor, and the
tensors `A.q_rot` and `A.k_rot`, (width, width) in the dtype of the model, by which it multiplies query and key. It then
sets the attribute `fa_quant` of the module, and does nothing else: the attention stays float unless the code of the
model calls `module.fa_quant(query, key, value, layout=...)`. The attention of diffusers does not.
"""

from collections.abc import Mapping

import torch

from octavo.capture.errors import UsageError
from octavo.capture.tensors import Planned

from ...attention.measure import AttentionRow
from ...attention.names import ASCEND
from ...attention.rotations import rotation_of
from .names import QUANT_TYPE, ROTATIONS


def attention_tensors(
    rows: Mapping[str, AttentionRow], dtype: torch.dtype
) -> tuple[dict[str, Planned], dict[str, str]]:
    """Returns two dicts: from tensor name to tensor, and from name to entry of the description.

    `rows` is a dict from attention module to the row that says its type and rotation, as `chosen_rows` returns it;
    `dtype` is that of the model. MindIE-SD needs the tensors `q_rot` and `k_rot` of each module, so they are the
    identity where the row has no rotation. Raises UsageError for a row with a type that is not MindIE-SD's.
    """
    tensors: dict[str, Planned] = {}
    description: dict[str, str] = {}
    for module, row in rows.items():
        if row.type not in ASCEND:
            raise UsageError(
                f"format ascend: attention of {module} is quantized as {row.type}. Give the type {' or '.join(ASCEND)}."
            )
        rotation = rotation_of(row.width) if row.rotated else torch.eye(row.width, device="cpu")
        description[f"{module}.{QUANT_TYPE}"] = row.type
        for name in ROTATIONS:
            tensors[f"{module}.{name}"] = Planned.of(rotation.to(dtype))
            description[f"{module}.{name}"] = "FLOAT"
    return tensors, description
