"""Reading and writing ONNX files: streamed, whole or not at all, and safe against what a file may hold."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from builders import conv_bn_net, mlp
from onnx import TensorProto, helper, numpy_helper

from ccompile import files, graph, onnx_io, runtime, wire
from ccompile.errors import CcompileError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ccompile.core import Array

SETTINGS = runtime.Settings(threads=1)
W = np.arange(600, dtype=np.float32).reshape(20, 30)


def add_model(*tensors: TensorProto, shape: tuple[int, ...] = (20, 30)) -> onnx.ModelProto:
    """Return y = x + w."""
    names = ["x", *(tensor.name for tensor in tensors)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    main = helper.make_graph([helper.make_node("Sum", names, ["y"], name="sum")], "g", [x], [y], list(tensors))
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(name: str = "w", shape: tuple[int, ...] = (20, 30), **entries: Any) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def written(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def weight(source: onnx_io.Source, name: str = "w") -> Array:
    tensor = source.model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        onnx_io.load(path)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("array", [W, W[:1, :5], np.float32(3)], ids=["large", "small", "scalar"])
def test_weights_are_read_as_they_are_and_cannot_be_written(tmp_path: Path, array: Array) -> None:
    source = onnx_io.load(written(tmp_path, add_model(numpy_helper.from_array(np.asarray(array), "w"))))
    np.testing.assert_array_equal(weight(source), array)
    with pytest.raises(ValueError, match="read-only"):
        weight(source)[...] = 0


def test_a_large_weight_is_a_view_of_the_one_buffer_read(tmp_path: Path) -> None:
    proto = add_model(numpy_helper.from_array(W, "w"))
    skeleton, weights, (buffer,), _ = files.read(written(tmp_path, proto))
    assert np.shares_memory(weights["w"], np.frombuffer(buffer, np.uint8))
    assert skeleton.ByteSize() < wire.LARGE


def test_weights_in_typed_fields_are_read(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, W.shape, W.reshape(-1).tolist())
    assert not tensor.raw_data
    np.testing.assert_array_equal(weight(onnx_io.load(written(tmp_path, add_model(tensor)))), W)


def test_the_wire_format_is_split_and_whole_again() -> None:
    proto = add_model(numpy_helper.from_array(W, "w"), numpy_helper.from_array(W[0], "b"))
    skeleton, weights = wire.split(memoryview(proto.SerializeToString()))
    back = onnx.ModelProto.FromString(skeleton)
    assert list(weights) == [0]
    back.graph.initializer[0].raw_data = bytes(weights[0])
    assert back == proto


def test_what_is_no_file_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("not a model at all")
    assert "cannot read the model" in refusal(tmp_path / "gone.onnx")
    assert "cannot read the model" in refusal(tmp_path)
    assert "empty" in refusal(tmp_path / "empty.onnx")
    assert "not an ONNX model" in refusal(tmp_path / "text.onnx")


@pytest.mark.parametrize("dims", [(20, 31), (-20, 30), (-20, -30), (2**40, 2**40)])
def test_a_weight_whose_shape_does_not_fit_its_bytes_is_refused(tmp_path: Path, dims: tuple[int, int]) -> None:
    tensor = numpy_helper.from_array(W, "w")
    tensor.dims[:] = dims
    assert "`w`" in refusal(written(tmp_path, add_model(tensor)))


@pytest.mark.parametrize("kind", [0, 99])
def test_a_weight_of_an_unknown_type_is_refused(tmp_path: Path, kind: int) -> None:
    tensor = numpy_helper.from_array(W, "w")
    tensor.data_type = kind
    assert f"initializer `w` has the unknown data type {kind}" in refusal(written(tmp_path, add_model(tensor)))


# ------------------------------------------------------------------------------------------------ external data


@pytest.mark.parametrize("entries", [{}, {"offset": 64}, {"offset": 64, "length": 2400}])
def test_external_data_is_read_from_its_offset(tmp_path: Path, entries: dict[str, Any]) -> None:
    (tmp_path / "w.bin").write_bytes(b"\7" * entries.get("offset", 0) + W.tobytes())
    source = onnx_io.load(written(tmp_path, add_model(external(location="w.bin", **entries))))
    np.testing.assert_array_equal(weight(source), W)
    with pytest.raises(ValueError, match="read-only"):
        weight(source)[...] = 0
    assert source.size == (tmp_path / "m.onnx").stat().st_size + W.nbytes


def test_external_data_in_a_folder_beside_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(W.tobytes())
    np.testing.assert_array_equal(
        weight(onnx_io.load(written(tmp_path, add_model(external(location="data/w.bin"))))), W
    )


def test_the_digest_covers_external_data(tmp_path: Path) -> None:
    path = written(tmp_path, add_model(external(location="w.bin")))
    digests = []
    for array in (W, W + 1):
        (tmp_path / "w.bin").write_bytes(array.tobytes())
        digests.append(onnx_io.load(path).digest)
    assert digests[0] != digests[1]


def test_missing_external_data_is_refused_with_its_tensor(tmp_path: Path) -> None:
    text = refusal(written(tmp_path, add_model(external(location="gone.bin"))))
    assert "tensor `w`" in text
    assert "gone.bin" in text


@pytest.mark.parametrize(
    "entries",
    [
        {"length": 2400, "offset": 4},
        {"length": 9999},
        {"length": 2396},
        {"offset": 2404},
        {"offset": -4},
        {"length": -1},
        {"offset": "x"},
        {"offset": 2**70},
        {"offset": 2400},
    ],
)
def test_external_data_that_does_not_fit_is_refused_with_its_tensor(tmp_path: Path, entries: dict[str, Any]) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    assert "`w`" in refusal(written(tmp_path, add_model(external(location="w.bin", **entries))))


@pytest.mark.parametrize(
    "where", ["../w.bin", "a/../../w.bin", "ABSOLUTE", "link.bin", "linked/w.bin", "", ".", "a\0b"]
)
def test_external_data_outside_the_folder_is_refused_with_its_tensor(tmp_path: Path, where: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (home / "link.bin").symlink_to(tmp_path / "w.bin")
    (home / "linked").symlink_to(tmp_path)
    location = where.replace("ABSOLUTE", str(tmp_path / "w.bin"))
    text = refusal(written(home, add_model(external(location=location))))
    assert "tensor `w`" in text
    assert "outside the model's folder" in text


def test_a_link_to_a_file_in_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "link.bin").symlink_to("w.bin")
    np.testing.assert_array_equal(weight(onnx_io.load(written(tmp_path, add_model(external(location="link.bin"))))), W)


def test_external_data_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for location in ("w.bin", "pipe"):
        assert "tensor `w`" in refusal(written(tmp_path, add_model(external(location=location))))


def test_empty_external_data_is_read_or_refused_by_its_shape(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"")
    source = onnx_io.load(written(tmp_path, add_model(external(shape=(0, 30), location="w.bin"), shape=(0, 30))))
    assert weight(source).shape == (0, 30)
    assert "`w`" in refusal(written(tmp_path, add_model(external(location="w.bin"))))


@pytest.mark.parametrize(("dtype", "size"), [(TensorProto.BFLOAT16, 1200), (TensorProto.INT4, 300)])
def test_external_data_of_types_that_numpy_lacks_is_read(tmp_path: Path, dtype: int, size: int) -> None:
    tensor = external(location="w.bin")
    tensor.data_type = dtype
    content = np.random.default_rng(0).integers(0, 128, size, np.uint8).tobytes()
    (tmp_path / "w.bin").write_bytes(content)
    source = onnx_io.load(written(tmp_path, add_model(tensor)))
    kept = source.model.graph.initializers["w"].const_value
    assert kept is not None
    assert kept.tobytes() == content
    assert source.size == (tmp_path / "m.onnx").stat().st_size + size
    (tmp_path / "w.bin").write_bytes(content[:-1])
    assert "`w`" in refusal(tmp_path / "m.onnx")


def test_strings_as_external_data_are_refused(tmp_path: Path) -> None:
    tensor = external(location="w.bin")
    tensor.data_type = TensorProto.STRING
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    assert "tensor `w`: strings" in refusal(written(tmp_path, add_model(tensor)))


def test_external_data_inside_attributes_is_read_and_digested(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=external("t", location="w.bin"))
    proto = add_model()
    proto.graph.node.insert(0, constant)
    proto.graph.node[1].input.append("w")
    path, digests = written(tmp_path, proto), []
    for array in (W, W + 1):
        (tmp_path / "w.bin").write_bytes(array.tobytes())
        source = onnx_io.load(path)
        np.testing.assert_array_equal(graph.constant(source.model.graph.node("Constant_w").outputs[0]), array)
        digests.append(source.digest)
    assert digests[0] != digests[1]


# ------------------------------------------------------------------------------------------------ writing


def outputs(path: Path) -> Array:
    x = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    found: Array = next(iter(runtime.run_file(path, {"x": x}, SETTINGS).values()))
    return found


def test_beyond_the_limit_weights_go_to_a_file_named_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert onnx_io.save(mlp(0), path) is None
    inside = outputs(path)
    data = onnx_io.save(mlp(0), path, limit=100)
    assert data is not None
    assert data.parent == tmp_path
    np.testing.assert_array_equal(outputs(path), inside)
    back = onnx_io.load(path).model
    for name, value in mlp(0).graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(weight(onnx_io.Source(back, path, "", 0), name), value.const_value.numpy())
    assert onnx_io.save(mlp(0), path, limit=100) == data


def test_the_data_file_of_the_build_before_is_removed_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    strange = tmp_path / "m.onnx.mine.data"
    strange.touch()
    first, second = (onnx_io.save(mlp(seed), path, limit=100) for seed in (0, 1))
    assert first is not None
    assert second is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m.onnx", strange.name, second.name])
    outputs(path)


def test_a_model_that_fits_again_removes_its_data_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx_io.save(mlp(0), path, limit=100)
    onnx_io.save(mlp(1), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("limit", [100, files.MESSAGE_LIMIT])
def test_a_model_that_is_not_approved_changes_nothing(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "m.onnx"
    onnx_io.save(mlp(0), path, limit=limit)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def refuse(found: Path, data: Path | None) -> None:
        assert (data is not None and data.exists()) == (limit == 100)
        outputs(found)  # it is complete, and beside the model that it will replace
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        onnx_io.save(mlp(1), path, limit=limit, approve=refuse)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CcompileError, match="cannot write"):
        onnx_io.save(mlp(0), tmp_path / "gone" / "m.onnx")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        onnx_io.save(conv_bn_net(0), tmp_path / name, {"k": "v"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    onnx_io.save(onnx_io.load(tmp_path / "a").model, tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_initializers_keep_their_order(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(W if large else W[:1], f"w{i}") for i, large in enumerate([0, 1, 0, 1])]
    onnx_io.save(onnx_io.load(written(tmp_path, add_model(*tensors))).model, tmp_path / "o.onnx")
    assert [t.name for t in onnx.load(tmp_path / "o.onnx").graph.initializer] == ["w0", "w1", "w2", "w3"]


# ------------------------------------------------------------------------------------------------ damage


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    bits = np.frombuffer(content, np.uint8).copy()
    for at in rng.integers(len(bits), size=int(rng.integers(1, 4))):
        bits[at] ^= np.uint8(1 << int(rng.integers(8)))
    return bits.tobytes()


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _spliced(content: bytes, rng: np.random.Generator) -> bytes:
    a, b, c = sorted(int(at) for at in rng.integers(len(content), size=3))
    return content[:a] + content[b:c] + content[a:]


@pytest.mark.parametrize("damage", [_flipped, _cut, _spliced])
def test_a_damaged_file_is_refused_or_runs_but_never_gives_a_traceback(
    tmp_path: Path, damage: Callable[[bytes, np.random.Generator], bytes]
) -> None:
    whole, path = tmp_path / "whole.onnx", tmp_path / "damaged.onnx"
    onnx_io.save(conv_bn_net(0), whole)
    content, refused = whole.read_bytes(), 0
    structure = len(content) - sum(math.prod(t.dims) * 4 for t in onnx.load(whole).graph.initializer)
    assert structure > 900
    rng = np.random.default_rng(0)
    x = np.zeros((1, 4, 10, 10), np.float32)
    for _ in range(200):
        path.write_bytes(damage(content, rng))
        try:
            runtime.Session(onnx_io.load(path).model, SETTINGS).run({"x": x})
        except ModelError:
            refused += 1
    assert refused > 20
