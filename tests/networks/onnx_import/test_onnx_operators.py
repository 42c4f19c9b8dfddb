"""Each operator of ONNX's own test cases gives what ONNX Runtime gives, in several opsets."""

import warnings
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch

from onebyone.core.errors import ModelError
from onebyone.networks.onnx_import import OPERATORS, read, read_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

OPSETS = (9, 12)
# What is refused, and why; each by name, so that nothing else is refused unseen.
REFUSED = (
    "average pooling with dilation", "as in training", "of type number", "of numbers",
    "no input or no output", "not from values", "linear_before_reset", "batch in front",
    "returns its mean", "peepholes", "maximum of integers", "positions of the maxima",
    "must be a tensor", "operators of opset", "values of tensors", "zero-size dimension",
    "cubic_coeff_a", "cubic resizing", "tf_crop_and_resize", "antialias", "keep_aspect_ratio",
    "is not supported",
)  # fmt: skip
# Operators whose cases have no input that is a tensor, or are all refused: tests of networks have
# them, in test_importing.py.
NO_CASES = (
    "Constant", "ConstantOfShape", "GRU", "GlobalLpPool", "LayerNormalization", "Not", "Range",
    "Upsample",
)  # fmt: skip
# Equal values may come in any order; `Identity` of what is no tensor.
NOT_COMPARED = (
    "top_k_same_values", "identity_sequence", "identity_opt", "_uint16", "_uint32", "_uint64",
    "_ui64", "test_bitwise_not_3d", "bfloat16", "BFLOAT16",
)  # fmt: skip


@cache
def cases():
    """ONNX's test cases of one node, by operator."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    grouped = defaultdict(list)
    for case in found:
        nodes = case.model.graph.node
        if len(nodes) == 1 and not any(word in case.name for word in NOT_COMPARED):
            grouped[nodes[0].op_type].append(case)
    return grouped


def array(value):
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def with_constants(case):
    """Return a case's model in which all inputs but the first are constants, and the first."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    given = [np.array(array(value)) for value in case.data_sets[0][0]]
    names = [each.name for each in model.graph.input]
    for name, value in list(zip(names, given, strict=True))[1:]:
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    del model.graph.input[1:]
    model.ir_version = min(model.ir_version, 10)
    return model, given[0]


def in_opsets(model):
    """The model, and what ONNX's own converter makes of it for older operators."""
    yield model
    newest = model.opset_import[0].version
    for opset in OPSETS:
        if opset < newest:
            try:
                yield onnx.version_converter.convert_version(model, opset)
            except Exception:  # noqa: BLE001 - it cannot convert all
                continue


def expected(model, first, case):
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return session.run(None, {session.get_inputs()[0].name: first})
    except Exception:  # noqa: BLE001 - not of this type, or not yet in this opset
        return [array(value) for value in case.data_sets[0][1]]


def read_or_reason(file, shape):
    try:
        return read(read_file(file), [shape]).network, ""
    except ModelError as error:
        return None, str(error)


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator_gives_what_onnx_runtime_gives(operator, tmp_path, recwarn):
    ran = refused = 0
    for case in cases().get(operator, []):
        try:
            whole, first = with_constants(case)
        except (IndexError, ValueError, TypeError, NotImplementedError):
            continue  # no input, sequences, and types that NumPy has not
        if first.dtype.kind not in "fiub" or first.dtype.name.startswith(
            ("float8", "int4", "uint4")
        ):
            continue
        for model in in_opsets(whole):
            file = tmp_path / "case.onnx"
            onnx.save(model, file)
            network, reason = read_or_reason(file, first.shape)
            if network is None:
                assert any(known in reason for known in REFUSED), f"{case.name}: {reason}"
                refused += 1
                continue
            with torch.no_grad():
                found = network(torch.from_numpy(first.copy()))
            found = found if isinstance(found, tuple) else (found,)
            wanted = expected(model, first, case)
            for own, want in zip(found, wanted, strict=True):
                where = f"{case.name}, opset {model.opset_import[0].version}"
                assert tuple(own.shape) == np.shape(want), where
                mine, theirs = own.to(torch.float64).numpy(), np.asarray(want).astype(np.float64)
                np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5, err_msg=where)
            ran += 1
    assert ran or operator in NO_CASES, f"no case of {operator} ran, {refused} were refused"
