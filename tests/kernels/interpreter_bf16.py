"""Makes Triton's interpreter compute in bf16. Importing this module patches it for the whole process.

The interpreter (Triton 3.6 to 3.9) keeps bf16 values as raw uint16 and computes on the bit patterns: sums, products and
`tl.dot` of bf16 blocks are silently wrong, and fp32 -> bf16 truncates. Here such operations widen to fp32, compute, and
round back to nearest even, which is what the hardware does. Only an atomic add on bf16 stays unsupported.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def _widen_bits(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _round_bits(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return Handle(_widen_bits(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_fp32(operation: Callable) -> Callable:
    @functools.wraps(operation)
    def wide(self: Any, *args: Any) -> Any:
        if not any(map(_is_bf16, args)):
            return operation(self, *args)
        result = operation(self, *map(_widen, args))
        if result.data.dtype == np.bool_ or result.dtype.scalar != tl.float32:
            return result  # a comparison
        return Handle(_round_bits(result.data), tl.bfloat16)

    return wide


def _patch() -> None:
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt"):
        if hasattr(Builder, name):
            setattr(Builder, name, _in_fp32(getattr(Builder, name)))

    dot, cast, fp_to_fp, reduce = (
        Builder.create_dot,
        Builder.cast_impl,
        Builder.create_fp_to_fp,
        interpreter.ReduceOps.apply_impl,
    )

    def wide_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), accumulator, *rest)

    def exact_cast(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == new:
            return source
        if old == tl.bfloat16:
            return exact_cast(self, _widen(source), target)
        if new == tl.bfloat16:
            return Handle(_round_bits(exact_cast(self, source, tl.float32).data), tl.bfloat16)
        return cast(self, source, target)

    def exact_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return exact_cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def widen_tensor(value: Any) -> Any:
        if not (isinstance(value, tl.core.tensor) and value.dtype.scalar == tl.bfloat16):
            return value
        shape = [int(length) for length in value.shape]
        return tl.core.tensor(_widen(value.handle), tl.block_type(tl.float32, shape) if shape else tl.float32)

    def wide_reduce(self: Any, values: Any) -> Any:
        return reduce(self, tuple(map(widen_tensor, values)) if isinstance(values, tuple) else widen_tensor(values))

    Builder.create_dot = wide_dot
    Builder.cast_impl = exact_cast
    Builder.create_fp_to_fp = exact_fp_to_fp
    interpreter.ReduceOps.apply_impl = wide_reduce


_patch()
