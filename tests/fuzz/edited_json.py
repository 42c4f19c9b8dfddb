"""JSON as a hand, a fault or an enemy leaves it: what records are fuzzed with."""

import copy
import json

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 1e-320, 1e308, -1e308, 0.5, 1.5])
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "macs", "eager", "pair", "<b>&", "\u202e", "a" * 999, "../../etc/passwd"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths(value, path=()):
    """Return the paths of all values within JSON content."""
    found = [path] if path else []
    children = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value[:5])  # any further are like these
    for key, child in children:
        found += paths(child, (*path, key))
    return found


def _set(content, path, change):
    *above, last = path
    place = content
    for key in above:
        place = place[key]
    change(place, last)


@st.composite
def edits(draw, content, *, most=3):
    """Draw the content with one to three edits, as JSON text."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, most))):
        known = paths(content)
        if not known:
            break
        path = draw(st.sampled_from(known))
        kind = draw(st.sampled_from(["set", "set", "delete", "rename", "add", "swap", "same"]))
        value = draw(VALUES)
        if kind == "swap":
            value = content
            for key in draw(st.sampled_from(known)):
                value = value[key]
            value = copy.deepcopy(value)

        def change(place, last, kind=kind, value=value):
            if kind == "delete":
                del place[last]
            elif kind == "rename" and isinstance(place, dict):
                place[f"{last}s"] = place.pop(last)
            elif kind == "add" and isinstance(place, dict):
                place["new"] = value
            elif kind == "same" and isinstance(place, list):
                place.append(copy.deepcopy(place[last]))
            else:
                place[last] = value

        _set(content, path, change)
    return json.dumps(content)


@st.composite
def damaged_text(draw, text):
    """Draw text as bytes of which some are others, are missing, or come twice."""
    content = bytearray(text.encode())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "twice"]))
        if kind == "change" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 200))]
        elif kind == "insert":
            content[place:place] = draw(
                st.sampled_from([b"[" * 200, b'{"a":' * 200, b"NaN", b"1e999", b"\x00", b"\xff", b"9" * 500])
            )  # fmt: skip
        else:
            content[place:place] = content[place : place + 100]
    return bytes(content)
