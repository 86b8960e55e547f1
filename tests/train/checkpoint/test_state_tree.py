"""Trees of tensors and plain values, taken apart and put together: exact, and strangers' refused with a ValueError."""

import json
import math
import random
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from helpers.optimizer_cases import parameters, run
from helpers.training_cases import same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from twinflow.memory.adamw_8bit import adamw_8bit
from twinflow.memory.quantised_linear import pack
from twinflow.train.checkpoint.state_tree import MOST_DEPTH, decode, encode

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex32, torch.complex64, torch.complex128,
)  # fmt: skip


def through_bytes(tree):
    tensors, text = encode(tree)
    return decode(load(save(tensors)), text.encode())


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-(1 << 4000), 1 << 4000) | st.floats() | st.binary()
    | st.text(st.characters(exclude_categories=())) | st.sampled_from([torch.float8_e5m2, torch.device("cuda:3")])
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=())) | st.integers(), inner)
    ),
    max_leaves=20,
)


@given(TREES)
@settings(deadline=None)
def test_plain_values_come_back(tree):
    assert same(through_bytes(tree), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(dtype):
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (24, 16), dtype=torch.uint8)
    base = raw.view(dtype)
    tree = {
        "whole": base, "strided": base[::2, 1:2], "transposed": base.T, "empty": base[:0], "scalar": base[0, 0],
        "none": base.new_empty(0, 3, 0),
    }  # fmt: skip
    found = through_bytes(tree)
    assert same(found, {name: value.contiguous() for name, value in tree.items()})
    assert found["scalar"].shape == ()


def test_lazy_conjugates_come_back():
    value = torch.randn(3, dtype=torch.complex64)
    assert torch.equal(through_bytes([value.conj()])[0], value.conj().resolve_conj())
    assert torch.equal(through_bytes([value.conj().imag])[0], -value.imag)


def test_keys_that_look_alike_are_kept_apart():
    tree = {1: torch.ones(1), "1": torch.zeros(1), "__metadata__": torch.ones(2), "a']['b": torch.ones(3)}
    tree |= {"a": {"b": torch.ones(4)}, "\ud800": torch.ones(5), "\\ud800": torch.ones(6), "dict": [["x", 1]]}
    assert same(through_bytes(tree), tree)


def test_memory_that_is_shared_is_stored_twice():
    base = torch.arange(6.0)
    first, second, rest = through_bytes([base, base, base[3:]])
    assert torch.equal(first, base) and torch.equal(second, base) and torch.equal(rest, base[3:])
    first.zero_()
    assert torch.equal(second, base)


def test_parameters_and_ordered_dicts_become_plain():
    found = through_bytes(OrderedDict(nn.Linear(2, 3).state_dict()) | {"p": nn.Parameter(torch.ones(2))})
    assert type(found) is dict and type(found["p"]) is torch.Tensor and not found["p"].requires_grad


def test_random_states_come_back():
    random.seed(3), np.random.seed(4)
    random.gauss(0, 1)
    states = [random.getstate(), np.random.get_state(), np.random.default_rng(5).bit_generator.state]
    states += [np.random.get_state(legacy=False), torch.get_rng_state()]
    assert same(through_bytes(states), states)


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes", "radam"])
def test_an_optimizers_state_resumes_with_the_same_bits(library):
    weights = parameters()
    make = torch.optim.RAdam if library == "radam" else lambda w, lr: adamw_8bit(w, lr=lr, library=library)
    optimizer = make(weights, lr=1e-2)
    run(weights, optimizer, range(3))
    state = through_bytes(optimizer.state_dict())
    resumed = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = make(resumed, lr=1.0)
    other.load_state_dict(state)
    run(weights, optimizer, range(3, 6))
    run(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def packed():
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    pack(weight, "int8")
    return weight


@pytest.mark.parametrize(
    "make",
    [
        lambda: {1, 2}, object, lambda: Counter("aa"), lambda: np.float32(1), lambda: torch.Size([1]), packed,
        lambda: torch.eye(2).to_sparse(), lambda: torch.empty(2, device="meta"), lambda: np.array(["a"]),
        lambda: np.array([object()]), lambda: np.zeros(2, ">f4"), lambda: print, lambda: 1j,
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_path(make):
    with pytest.raises(TypeError, match=r"encode: tree\['optimizer'\]\[0\]\[7\] must be .*, got "):
        encode({"optimizer": [{7: make()}]})


@pytest.mark.parametrize("key", [True, None, 1.0, (1,), b"a"])
def test_other_keys_are_refused(key):
    with pytest.raises(TypeError, match=r"encode: tree\['a'\] must have str and int keys, got "):
        encode({"a": {key: 1}})


def nested(depth):
    return [nested(depth - 1)] if depth else []


def test_depth_is_bounded_both_ways():
    assert same(through_bytes(nested(MOST_DEPTH)), nested(MOST_DEPTH))
    cycle = []
    cycle.append(cycle)
    for tree in (nested(MOST_DEPTH + 1), cycle):
        with pytest.raises(ValueError, match="encode: tree must be nested at most 64 deep"):
            encode(tree)
    for bomb in ("[" * 80 + "]" * 80, '{"dict": [["a", ' * 80 + "1" + "]]}" * 80, "[" * 1_000_000):
        with pytest.raises(ValueError, match="decode: json_text must be"):
            decode({}, f'{{"format": "twinflow state", "version": 1, "tree": {bomb}}}')


def refused(node, tensors=None):
    with pytest.raises(ValueError, match=r"^decode: ") as raised:
        decode(tensors or {}, json.dumps({"format": "twinflow state", "version": 1, "tree": node}))
    assert len(str(raised.value)) < 500


BAD = (
    {}, {"pickle": "gASV"}, {"tuple": 3}, {"dict": {"a": 1}}, {"dict": [["a"]]}, {"dict": [["a", 1], ["a", 2]]},
    {"dict": [[None, 1]]}, {"dict": [[[1], 1]]}, {"dict": [[True, 1]]}, {"int": "1_0"}, {"int": "12"}, {"int": 3},
    {"float": "00"}, {"float": 3}, {"bytes": "x"}, {"bytes": None}, {"dtype": "nn"}, {"dtype": 3}, {"dtype": "load"},
    {"device": "nowhere"}, {"device": 3}, {"device": "cuda:-7"}, {"tensor": "a"}, {"tensor": ["a"]}, {"tensor": None},
    {"complex": "a"}, {"array": "a"}, {"torchao 8-bit": []}, {"torchao 8-bit": ["a", "b", "c", 1, "float32"]},
    {"int": "0x1", "float": "00"},
)  # fmt: skip


@pytest.mark.parametrize("node", BAD, ids=str)
def test_unknown_nodes_are_refused(node):
    refused(node)


def test_tensors_that_do_not_fit_their_node_are_refused():
    ones = torch.ones(3)
    refused({"tensor": "a"}, {"a": ones, "b": ones})
    refused([{"tensor": "a"}, {"tensor": "a"}], {"a": ones})
    refused({"complex": "a"}, {"a": ones})
    refused({"array": "a"}, {"a": ones.bfloat16()})
    state = {"torchao 8-bit": ["c", "s", "q", True, "float32"]}
    good = {"c": torch.zeros(512, dtype=torch.uint8), "s": torch.ones(2), "q": torch.ones(256)}
    bad = {"c": torch.zeros(511, dtype=torch.uint8), "s": torch.ones(0), "q": torch.ones(255)}
    for name, value in bad.items():
        refused(state, good | {name: value})
        refused(state, good | {name: value.double()})
    refused({"torchao 8-bit": ["c", "s", "q", True, "int8"]}, good)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '{"tree": 1}', '{"format": "other", "version": 1, "tree": 1}', b"\xff\xfe\x00", "1" * 5000,
     '{"format": "twinflow state", "version": 2, "tree": 1}', '{"format": "twinflow state", "version": true}',
     '{"format": "twinflow state", "version": true, "tree": 1}',
     '{"format": "twinflow state", "version": 1, "tree": NaN}', '{"format": "twinflow state", "version": 1}'],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"^decode: json_text must be"):
        decode({}, text)


def test_a_text_of_an_absurd_size_is_refused_unread(monkeypatch):
    monkeypatch.setattr("twinflow.train.checkpoint.state_tree.MOST_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="at most 10 bytes, got 11"):
        decode({}, "x" * 11)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.sampled_from(["a", "b", "float32", "0x1f"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["tuple", "int", "float", "bytes", "dtype", "device", "tensor", "complex",
                                           "array", "torchao 8-bit"]), inner, max_size=1)
        | st.fixed_dictionaries({"dict": st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)})
    ),
)  # fmt: skip


@given(JSON)
@settings(deadline=None)
def test_a_strangers_tree_is_read_or_refused(node):
    tensors = {"a": torch.ones(2), "b": torch.zeros(4, dtype=torch.uint8)}
    try:
        tree = decode(tensors, json.dumps({"format": "twinflow state", "version": 1, "tree": node}))
    except ValueError as error:
        assert str(error).startswith("decode: ")
    else:
        encode(tree)


@given(st.data())
@settings(deadline=None)
def test_a_damaged_text_is_read_or_refused(data):
    tree = {"a": [1, (2.5, math.inf), b"xy", torch.float16], 3: {"x": torch.ones(2), "y": 1 << 80}}
    tensors, text = encode(tree)
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(tensors, bytes(raw))
    except ValueError as error:
        assert str(error).startswith("decode: ")
