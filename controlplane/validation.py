"""Checks that a deployment must pass before it is stored."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.config import LOAD_FORMATS, QUANTIZATIONS
from engine.errors import ModelError
from phalanx.runtime.errors import PhalanxError
from phalanx.store.records import SHAPE_LIMIT, LayoutRecord
from phalanx.v1 import control_pb2

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_MODEL_CHARS = 4096  # the longest path on Linux
_DTYPES = ("", "float32", "bfloat16", "float16")


def check_spec(spec: control_pb2.DeploymentSpec) -> None:
    """Check every field of a spec.

    Raises:
        PhalanxError: INVALID_ARGUMENT, which names the first field whose value is not allowed.
    """
    if not _NAME.fullmatch(spec.name):
        raise PhalanxError(
            "INVALID_ARGUMENT",
            f"name {spec.name!r} must be 1 to 63 lower-case letters, digits, '-' or '.', "
            "with a letter or digit at both ends",
            param="name",
        )
    if not spec.model:
        raise PhalanxError("INVALID_ARGUMENT", "model must be a directory", param="model")
    if len(spec.model) > _MODEL_CHARS:
        message = f"model must have at most {_MODEL_CHARS} characters"
        raise PhalanxError("INVALID_ARGUMENT", message, param="model")
    for field in ("replicas", "tp", "pp"):
        if spec.HasField(field) and getattr(spec, field) < 1:
            raise PhalanxError("INVALID_ARGUMENT", f"{field} must be at least 1", param=field)
        if getattr(spec, field) > SHAPE_LIMIT:
            raise PhalanxError("INVALID_ARGUMENT", f"{field} must be at most {SHAPE_LIMIT}", param=field)
    if spec.dtype not in _DTYPES:
        choices = ", ".join(_DTYPES[1:])
        raise PhalanxError("INVALID_ARGUMENT", f"dtype must be one of {choices}, or empty", param="dtype")
    for field, known in (("load_format", LOAD_FORMATS), ("quantization", QUANTIZATIONS)):
        if getattr(spec, field) not in ("", *known):
            choices = ", ".join(filter(None, known))
            message = f"{field} must be one of {choices}, or empty"
            raise PhalanxError("INVALID_ARGUMENT", message, param=field)


def check_model(model: str, tp: int, pp: int, load_format: str = "") -> tuple[LayoutRecord, ...]:
    """The smaller layouts that the model can run in, best first.

    A directory that this process cannot see is not checked; the workers check it when they load it.
    Reads files, so call it outside the event loop.

    Raises:
        PhalanxError: the model cannot be served in this layout.
    """
    from engine.weights.layouts import smaller_layouts, smaller_sizes
    from engine.weights.locate import check_weights
    from engine.weights.model_config import ModelConfig, check_layout

    # os.path.isdir is False for every path that cannot be looked up; Path.is_dir raises for some of them.
    if not os.path.isdir(model):
        return tuple(LayoutRecord(*size) for size in smaller_sizes(tp, pp))

    path = Path(model)
    try:
        config = ModelConfig.load(path)
        check_layout(config, tp, pp)
        if load_format != "dummy":
            check_weights(path, tp, pp)
        smaller = smaller_layouts(path, config, tp, pp)
    except ModelError as error:
        raise PhalanxError(error.reason, error.message, param="model") from error
    return tuple(LayoutRecord(layout.tp, layout.pp, layout.weights) for layout in smaller)
