"""A network's inputs as a record: written as a call, read strictly, and named where refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from onebyone.core.errors import NetworkInputError, RecordError
from onebyone.core.records import InputSpec, TensorSpec
from onebyone.core.tensor_trees import (
    first_examples,
    only_tensor,
    repeated,
    spec_of,
    tensors_in,
)

IMAGE = torch.zeros(2, 3, 8, 8)
SEVERAL = {
    "image": IMAGE,
    "mask": torch.ones(2, 8, 8, dtype=torch.bool),
    "ids": torch.tensor([[4, -1, 9], [0, 7, 2]]),
    "boxes": [torch.zeros(2, 4), (torch.zeros(2, 1),)],
    "options": {"scale": 0.5, "prior": None, "name": "it's", 3: -2, "flag": True},
    "table": torch.zeros(5, 6),
}


def test_one_tensor_is_the_simplest_case():
    spec = InputSpec.of_shape((4, 3, 8, 8))
    assert spec.is_single
    assert spec.is_image
    assert spec.batch == 4
    assert spec.single("a stage").sample == (3, 8, 8)
    assert str(spec) == "4×3×8×8"
    assert spec.example_text() == "3×8×8"
    assert spec == spec_of(torch.zeros(4, 3, 8, 8)) == spec_of((torch.zeros(4, 3, 8, 8),))


def test_a_tree_is_written_as_it_is_called_and_called_as_it_is_written():
    spec = spec_of(SEVERAL)
    assert spec.call == (
        "(image=image, mask=mask, ids=ids, boxes=[boxes_0, (boxes_1_0,)], options={'scale': 0.5, "
        "'prior': None, 'name': \"it's\", 3: -2, 'flag': True}, table=table)"
    )
    named = dict(zip([each.name for each in spec.tensors], tensors_in(SEVERAL), strict=True))
    again = spec.arguments(named)
    assert again.keys() == SEVERAL.keys()
    assert again["options"] == SEVERAL["options"]
    assert isinstance(again["boxes"], list)
    assert isinstance(again["boxes"][1], tuple)
    assert all(a is b for a, b in zip(tensors_in(again), tensors_in(SEVERAL), strict=True))


def test_a_record_says_types_batches_and_the_range_of_integers():
    by_name = {each.name: each for each in spec_of(SEVERAL).tensors}
    assert by_name["ids"].values == (-1, 9)
    assert by_name["mask"].dtype == "bool"
    assert by_name["mask"].values is None
    assert not by_name["table"].batched
    assert str(spec_of(SEVERAL)) == (
        "image=2×3×8×8, mask=2×8×8 bool, ids=2×3 int64, boxes=[2×4, (2×1,)], options={'scale': "
        "0.5, 'prior': None, 'name': \"it's\", 3: -2, 'flag': True}, table=5×6"
    )
    assert spec_of((IMAGE, 3)).example_text() == "3×8×8, 3"


def test_positional_arguments_keep_their_names_and_order():
    inputs = (IMAGE, None, [torch.zeros(2, 1)], 3)
    assert spec_of(inputs, names=("x", "memory")).call == "(x, None, [input_2_0], 3)"


def test_names_are_valid_and_differ():
    spec = spec_of({"a": {"b c": IMAGE, "b_c": IMAGE, "class": IMAGE}, "a_b_c": IMAGE})
    assert [each.name for each in spec.tensors] == ["a_b_c", "a_b_c_2", "a_class", "a_b_c_3"]


def test_a_batch_changes_only_where_there_is_one():
    spec = spec_of(SEVERAL).with_batch(7)
    shapes = {each.name: each.shape for each in spec.tensors}
    assert shapes["image"] == (7, 3, 8, 8)
    assert shapes["table"] == (5, 6)
    assert spec.batch == 7
    assert spec.same_examples(spec_of(SEVERAL))
    assert not spec.same_examples(InputSpec.of_shape((7, 3, 8, 8)))


def test_a_list_of_pictures_is_a_batch_that_no_tensor_has():
    pictures = ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7), torch.zeros(3, 8, 8)],)
    spec = spec_of(pictures)
    assert spec.batch == 3
    assert not any(each.batched for each in spec.tensors)
    assert first_examples(pictures, 1) == pictures
    assert spec.with_batch(3) == spec
    with pytest.raises(NetworkInputError, match="Keep the batch of the example, 3"):
        spec.with_batch(1)


def test_the_first_examples_repeat_to_the_batch():
    one = first_examples(SEVERAL, 1)
    assert [len(tensor) for tensor in tensors_in(one)] == [1, 1, 1, 1, 1, 5]
    many = repeated(one, 4)
    assert [len(tensor) for tensor in tensors_in(many)] == [4, 4, 4, 4, 4, 5]
    assert_close(many["ids"], SEVERAL["ids"][:1].expand(4, 3))


@pytest.mark.parametrize(
    "inputs", [{"x": IMAGE}, (IMAGE, IMAGE), (IMAGE, None), ([IMAGE],), ({"x": IMAGE},)]
)
def test_a_stage_for_one_tensor_names_itself_and_the_call(inputs):
    with pytest.raises(NetworkInputError, match=r"the stage needs .* one tensor .* called with \("):
        spec_of(inputs).single("the stage")
    with pytest.raises(NetworkInputError, match="Wrap it in a module that takes one tensor"):
        only_tensor(inputs, "the stage")
    assert only_tensor((IMAGE,), "the stage") is IMAGE


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "at least one tensor, got none"),
        ({"n": 3}, "at least one tensor, got none"),
        ((IMAGE, object()), "got a object as 'input_1'"),
        ((IMAGE, float("nan")), "got a float as 'input_1'"),
        ((IMAGE, torch.zeros(2, 0)), "'input_1' cannot be recorded.* above 0|at least 1"),
        ((IMAGE, torch.Size([2])), "got a Size as 'input_1'"),
    ],
)
def test_what_no_record_holds_is_refused_by_name(inputs, message):
    with pytest.raises(NetworkInputError, match=message):
        spec_of(inputs)


def test_a_record_is_read_back_from_json():
    spec = spec_of(SEVERAL)
    assert InputSpec.from_json(spec.to_json()) == spec


def edited(**changes):
    spec = spec_of((IMAGE, torch.zeros(2, 4)))
    return json.dumps({**json.loads(spec.to_json()), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("(input_0)", "each of the tensors input_0, input_1 once"),
        ("(input_0, input_0, input_1)", "each of the tensors"),
        ("(input_0, input_1, other)", "each of the tensors"),
        ("()", "positional or keyword arguments"),
        ("(input_0, y=input_1)", "positional or keyword arguments"),
        ("(input_0, *input_1)", "must be the arguments of a call"),
        ("(**input_0)", "must be the arguments of a call"),
        ("(x=input_0, x=input_1)", "must be the arguments of a call"),
        ("(input_0, input_1)(3)", "must be the arguments of a call"),
        ("(input_0, input_1) + 1", "must be the arguments of a call"),
        ("input_0, input_1", "must be the arguments of a call"),
        ("(input_0, __import__('os'), input_1)", "must be the arguments of a call"),
        ("(input_0, input_1.data)", "must be the arguments of a call"),
        ("(input_0, [input_1 for _ in ()])", "must be the arguments of a call"),
        ("(input_0, input_1, 1e999)", "must be the arguments of a call"),
        ("(input_0, input_1, b'x')", "must be the arguments of a call"),
        ("(input_0, input_1, -True)", "must be the arguments of a call"),
        ("(input_0, input_1, {**{}})", "must be the arguments of a call"),
        ("(input_0, input_1, " + "[" * 60 + "]" * 60 + ")", "must be the arguments of a call"),
        ("(" * 9000, "must be the arguments of a call"),
        ("(input_0, input_1, '" + "a" * 30_000 + "')", "at most 20,000 characters"),
        ("(input_0, input_1", "must be the arguments of a call"),
        ("(\0)", "must be the arguments of a call"),
    ],
)
def test_a_call_holds_names_and_literals_alone(call, message):
    with pytest.raises(RecordError, match=message):
        InputSpec.from_json(edited(call=call))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (({"name": "a b"},), "a name as in Python, got 'a b'"),
        (({"name": "class"},), "a name as in Python, got 'class'"),
        (({"dtype": "float33"},), "Invalid enum value 'float33'"),
        (({"shape": []},), "must have a dimension for the batch"),
        (({"values": [3, 1]},), "the least and the largest"),
        (({}, {"name": "b", "shape": [3, 1]}), "must have the same"),
        (({"sizes": 1},), "no field 'sizes'"),
    ],
)
def test_tensors_are_read_strictly(tensors, message):
    plain = {"name": "a", "shape": [2, 3], "dtype": "float32", "batched": True, "values": None}
    whole = [{**plain, **each} for each in tensors]
    text = json.dumps({"tensors": whole, "call": "(a, b)" if len(whole) > 1 else "(a)"})
    with pytest.raises(RecordError, match=message):
        InputSpec.from_json(text)


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from([IMAGE, torch.zeros(2), torch.zeros(()), torch.zeros(3, 4)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_tree_is_read_back_as_it_is(tree):
    inputs = (IMAGE, tree)
    spec = spec_of(inputs)
    assert InputSpec.from_json(spec.to_json()) == spec
    named = dict(zip([each.name for each in spec.tensors], tensors_in(inputs), strict=True))
    assert repr(spec.arguments(named)) == repr(inputs)


def test_a_tensor_prints_its_type_where_it_is_not_float32():
    assert str(TensorSpec(name="x", shape=(), dtype="int64", batched=False)) == "scalar int64"
