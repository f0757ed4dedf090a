"""Defines the schemas of AscendQuant and AscendDequant, which onnx needs to check a graph that contains them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUANT, DEQUANT = "AscendQuant", "AscendDequant"
_SINCE = 1  # the first opset of the default domain that the two schemas are valid for; 1 means all opsets


@contextmanager
def ascend_operators() -> Iterator[None]:
    """Context manager inside which onnx.checker knows AscendQuant and AscendDequant."""
    from onnx import defs

    schemas = [schema for schema in _schemas() if not defs.has(schema.name, "")]
    for schema in schemas:
        defs.register_schema(schema)
    try:
        yield
    finally:
        for schema in schemas:
            defs.deregister_schema(schema.name, _SINCE, "")


def _schemas() -> list[Any]:
    from onnx.defs import OpSchema

    def parameter(name: str, kind: str) -> Any:
        return OpSchema.FormalParameter(name, f"tensor({kind})")

    def attribute(name: str, kind: Any) -> Any:
        return OpSchema.Attribute(name, kind, required=True)

    numbers = OpSchema.AttrType
    quant = OpSchema(
        QUANT, "", _SINCE, "clamp(round(x * scale + offset), -128, 127)",
        inputs=[parameter("x", "float")], outputs=[parameter("y", "int8")],
        attributes=[
            attribute("scale", numbers.FLOAT), attribute("offset", numbers.FLOAT), attribute("quant_bit", numbers.INT),
        ],
    )  # fmt: skip
    dequant = OpSchema(
        DEQUANT, "", _SINCE, "x * the float32 in the low half of deq_scale, one number for each output channel",
        inputs=[parameter("x", "int32"), parameter("deq_scale", "uint64")], outputs=[parameter("y", "float")],
    )  # fmt: skip
    return [quant, dequant]
