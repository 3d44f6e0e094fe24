"""Packed models: the same file comes back, small ones stay small, and hostile ones are refused."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import ZOO, Net
from driver import draw_feeds
from onnx import TensorProto, helper, numpy_helper
from runs import scratch_files

import ccompile
from ccompile import choosing, coders, decoding, files, forms, packing, views
from ccompile.container import Digest, Writer
from ccompile.errors import CcompileError, ModelError
from ccompile.numerics.huffman import entropy

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def clusters(count: int, bits: int, zeros: float, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return cluster indices of normal weights, the smallest of which are pruned to index 0."""
    weights = np.random.default_rng(seed).standard_normal(count)
    kept = np.abs(weights) > np.quantile(np.abs(weights), zeros)
    centroids = np.linspace(-3, 3, (1 << bits) - 1)
    nearest = 1 + np.searchsorted((centroids[1:] + centroids[:-1]) / 2, weights)
    return np.where(kept, nearest, 0).astype(np.uint8)


def packed_nibbles(indices: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> bytes:
    return (indices[::2] | indices[1::2] << 4).astype(np.uint8).tobytes()


def clustered(rows: int = 60, columns: int = 40, bits: int = 4, zeros: float = 0.9) -> onnx.ModelProto:
    """Return y = x W, W[columns, rows] = codebook[indices], as clustering stores it."""
    indices = packed_nibbles(clusters(rows * columns, bits, zeros))
    stored = [
        helper.make_tensor("indices", TensorProto.UINT4, [columns, rows], indices, raw=True),
        numpy_helper.from_array(np.linspace(-1, 1, 1 << bits).astype(np.float32), "codebook"),
    ]
    nodes = [
        helper.make_node("Cast", ["indices"], ["wide"], "cast", to=TensorProto.INT32),
        helper.make_node("Gather", ["codebook", "wide"], ["w"], "gather"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "matmul"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", w]) for n, w in (("x", columns), ("y", rows)))
    main = helper.make_graph(nodes, "g", [x], [y], stored, doc_string="kept")
    made = helper.make_model(main, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(made, {"author": "somebody"})
    return made


def saved(proto: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


def there_and_back(path: Path, folder: Path) -> bytes:
    packing.pack(path, folder / "m.ccz")
    size = packing.unpack(folder / "m.ccz", folder / "back.onnx")
    data = (folder / "back.onnx").read_bytes()
    assert size == len(data)
    assert not scratch_files(folder)
    return data


# --------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("name", ZOO)
def test_a_model_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    path = saved(ir.to_proto(ZOO[name](0)), tmp_path)
    assert there_and_back(path, tmp_path) == path.read_bytes()


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_a_famous_net_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    path = LIGHT / f"light_{name}.onnx"
    assert there_and_back(path, tmp_path) == path.read_bytes()
    assert (tmp_path / "m.ccz").stat().st_size < path.stat().st_size / 3


def test_subgraphs_functions_and_metadata_come_back(tmp_path: Path) -> None:
    proto = clustered()
    proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], []))
    constant = numpy_helper.from_array(np.arange(900, dtype=np.int64).reshape(30, 30), "c")
    branch = helper.make_graph([helper.make_node("Constant", [], ["o"], value=constant)], "b", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    path = saved(proto, tmp_path)
    assert there_and_back(path, tmp_path) == path.read_bytes()


def test_the_same_model_makes_the_same_packed_file(tmp_path: Path) -> None:
    path = saved(clustered(), tmp_path)
    for name in ("a.ccz", "b.ccz"):
        packing.pack(path, tmp_path / name)
    assert (tmp_path / "a.ccz").read_bytes() == (tmp_path / "b.ccz").read_bytes()


def external_model(folder: Path) -> Path:
    """Save a model of which one weight stands in a subfolder."""
    (folder / "data").mkdir()
    weights = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    (folder / "data" / "w.bin").write_bytes(b"skipped!" + weights.tobytes())
    away = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[40, 60], doc_string="kept")
    away.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "data/w.bin"), ("offset", "8")):
        away.external_data.add(key=key, value=value)
    proto = clustered()
    del proto.graph.node[:2], proto.graph.initializer[:]
    proto.graph.initializer.append(away)
    return saved(proto, folder)


def test_a_model_with_external_data_becomes_one_file(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    found = onnx.ModelProto.FromString(there_and_back(path, tmp_path))
    expected = onnx.load(path)
    onnx.external_data_helper.convert_model_from_external_data(expected)
    expected.graph.initializer[0].ClearField("data_location")
    assert found == expected


def test_a_model_beyond_protobuf_gets_external_data_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = clustered()
    proto.graph.initializer[0].doc_string = "kept"
    packing.pack(saved(proto, tmp_path), tmp_path / "m.ccz")
    monkeypatch.setattr(files, "MESSAGE_LIMIT", 1000)
    packing.unpack(tmp_path / "m.ccz", tmp_path / "back.onnx")
    (beside,) = tmp_path.glob("back.onnx.*.data")
    assert beside.stat().st_size == 1200
    found = onnx.load(tmp_path / "back.onnx")
    for tensor in found.graph.initializer:
        tensor.ClearField("data_location")
    assert found == proto
    assert not scratch_files(tmp_path)
    x = np.ones((1, 40), np.float32)
    np.testing.assert_array_equal(*(load(path).run(None, {"x": x})[0] for path in (tmp_path / "m.ccz",) * 2))


# --------------------------------------------------------------------------------------------- load


def load(path: Path) -> InferenceSession:
    return ccompile.load(path, providers=["CPUExecutionProvider"])


def test_a_loaded_model_computes_what_the_file_does(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = ZOO["residual"](0)
    path = saved(ir.to_proto(model), tmp_path)
    packing.pack(path, tmp_path / "m.ccz")
    feeds = draw_feeds(model)[0]
    expected = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    found = load(tmp_path / "m.ccz").run(None, feeds)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_options_of_the_session_are_passed_on(tmp_path: Path) -> None:
    import onnxruntime as ort

    packing.pack(saved(clustered(), tmp_path), tmp_path / "m.ccz")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    session = ccompile.load(str(tmp_path / "m.ccz"), options, ["CPUExecutionProvider"], [{}])
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert (tmp_path / "seen.onnx").exists()


def test_a_model_beyond_the_limit_is_not_loaded(tmp_path: Path) -> None:
    packing.pack(saved(clustered(), tmp_path), tmp_path / "m.ccz")
    with pytest.raises(ModelError, match="more than 100"):
        ccompile.load(tmp_path / "m.ccz", limit=100)


# --------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(("bits", "zeros"), [(3, 0.92), (4, 0.9), (4, 0.0)])
def test_clustered_weights_come_within_3_percent_of_their_entropy(bits: int, zeros: float) -> None:
    indices = clusters(266_200, bits, zeros)
    choice = choosing.choose(np.frombuffer(packed_nibbles(indices), np.uint8), 4, False)
    bound = entropy(np.bincount(indices)) * indices.size / 8
    assert bound * 0.99 < choice.cost < bound * 1.03


def test_a_sparse_clustered_net_is_packed_40_times_smaller(tmp_path: Path) -> None:
    account = packing.pack(saved(clustered(300, 784, 3, 0.92), tmp_path), tmp_path / "m.ccz")
    assert account.weights == 235_200
    assert account.ratio > 40
    assert account.bytes_packed == (tmp_path / "m.ccz").stat().st_size


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_codes_that_passes_store_in_bytes_come_near_their_entropy(bits: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    codes = np.where(rng.random((300, 200)) < 0.1, rng.integers(0, 1 << bits, (300, 200)), 0).astype(np.uint8)
    net = Net(0)
    model = net.model(net.node("MatMul", net.input("x", ["N", 300]), net.weight("w", (300, 200)), name="fc"))
    means = decoding.Means(opset=18)
    form = forms.Codebook(np.linspace(-1, 1, 1 << bits).astype(np.float32), codes, codes.shape, means)
    model.graph[0].replace_input_with(1, form.put(decoding.Place(model.graph[0], means)))
    del model.graph.initializers["w"]
    path = saved(ir.to_proto(model), tmp_path)
    account = packing.pack(path, tmp_path / "m.ccz")
    (tensor,) = account.tensors
    assert tensor.elements == account.weights == codes.size
    assert tensor.symbols is not None
    assert tensor.symbols.entropy == pytest.approx(entropy(np.bincount(codes.reshape(-1))))
    assert tensor.bytes_codebook == 4 << bits
    assert 7.9 * tensor.bytes_packed < 1.06 * tensor.symbols.entropy * codes.size
    assert there_and_back(path, tmp_path) == path.read_bytes()


def test_bitmasks_are_positions(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random(80_000) < 0.05
    data = np.packbits(mask, bitorder="little")
    choice = choosing.choose(data, 8, False, data.shape)
    assert choice.cost < 1.05 * entropy(np.bincount(mask)) * mask.size / 8


def test_constant_tensors_take_next_to_nothing() -> None:
    choice = choosing.choose(np.zeros(4 << 20, np.uint8), 32, True)
    assert choice.cost < 1000


def test_pruned_floats_are_stored_without_their_zeros() -> None:
    rng = np.random.default_rng(0)
    weights = np.where(rng.random(20_000) < 0.1, rng.standard_normal(20_000), 0).astype(np.float32)
    choice = choosing.choose(weights.view(np.uint8), 32, True)
    assert choice.view.sparse
    assert choice.cost < 0.1 * weights.nbytes + 20_000 / 8


def test_large_tensors_are_chosen_for_by_samples_and_decode(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(700_000).astype(np.float32).view(np.uint8)
    choice = choosing.choose(weights, 32, True)
    assert choice.view.spread
    streams = choice.streams
    decoded = views.join(
        choice.filler,
        weights.size,
        choice.view,
        lambda i, n: np.frombuffer(coders.decode(streams[i].data, streams[i].coder, n), np.uint8),
    )
    np.testing.assert_array_equal(decoded, weights)
    assert choice.cost < 0.9 * weights.size


def test_noise_is_not_made_larger() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(10_000), np.uint8)
    assert choosing.choose(noise, 8, False).cost <= 10_000 + 4


def test_slow_coders_are_left_out_where_they_would_read_much() -> None:
    slowly = np.tile(np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8), 3)
    for coder in (stream.coder for stream in choosing.choose(slowly, 32, True).streams):
        assert coder < coders.FIRST_LZMA


# --------------------------------------------------------------------------------------------- accounting


def test_the_account_adds_up_to_the_file(tmp_path: Path) -> None:
    account = packing.pack(saved(clustered(), tmp_path), tmp_path / "m.ccz")
    parts = sum(tensor.bytes_packed for tensor in account.tensors)
    assert account.bytes_packed == parts + account.bytes_structure + account.bytes_container
    assert account.bytes_container < 40
    assert account.bytes_model == (tmp_path / "m.onnx").stat().st_size


def test_the_account_of_indices_is_the_survey_s(tmp_path: Path) -> None:
    account = packing.pack(saved(clustered(60, 40, 4, 0.9), tmp_path), tmp_path / "m.ccz")
    (tensor,) = account.tensors
    symbols = tensor.symbols
    assert symbols is not None
    counts = np.bincount(clusters(2400, 4, 0.9))
    assert tensor.elements == account.weights == 2400  # the codebook's 16 values are no weights
    assert tensor.bytes_codebook == 16 * 4
    assert tensor.bytes_index == 1200
    assert symbols.distinct == np.count_nonzero(counts)
    assert symbols.commonest == counts[0] / 2400
    assert symbols.entropy == pytest.approx(entropy(counts))
    assert symbols.entropy <= symbols.huffman < symbols.entropy + 1
    others, bits = 2400 - counts[0], (symbols.distinct - 2).bit_length()
    assert others * (5 + bits) / 8 <= symbols.relative <= (others + 2400 / 32) * (5 + bits) / 8 + 1
    assert tensor.bits == 8 * tensor.bytes_packed / 2400


def test_the_ratio_counts_the_weights_of_the_source(tmp_path: Path) -> None:
    source = saved(ir.to_proto(ZOO["mlp"](0)), tmp_path, "source.onnx")
    weights = sum(tensor.size for tensor in map(numpy_helper.to_array, onnx.load(source).graph.initializer))
    account = packing.pack(saved(clustered(), tmp_path), tmp_path / "m.ccz", against=source)
    assert account.weights == weights
    assert account.ratio == 4 * weights / (tmp_path / "m.ccz").stat().st_size


def test_scales_of_integers_count_as_their_codebook(tmp_path: Path) -> None:
    proto = clustered()
    del proto.graph.node[:2], proto.graph.initializer[:]
    integers = np.random.default_rng(0).integers(-127, 128, (40, 60)).astype(np.int8)
    for name, array in (("q", integers), ("scales", np.ones(60, np.float32)), ("zeros", np.zeros(60, np.int8))):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "scales", "zeros"], ["w"], axis=1))
    account = packing.pack(saved(proto, tmp_path), tmp_path / "m.ccz")
    (tensor,) = account.tensors
    assert account.weights == tensor.elements == 2400
    assert tensor.is_weight
    assert tensor.bytes_codebook == 60 * 4 + 60


def test_floats_that_all_differ_have_no_indices(tmp_path: Path) -> None:
    account = packing.pack(saved(ir.to_proto(ZOO["mlp"](0)), tmp_path), tmp_path / "m.ccz")
    assert account.tensors
    assert all(tensor.symbols is None and not tensor.bytes_index for tensor in account.tensors)


# --------------------------------------------------------------------------------------------- refusals


def refusal(data: bytes, folder: Path) -> str:
    """Unpack and load bytes; both must refuse, and nothing may be left behind."""
    (folder / "bad.ccz").write_bytes(data)
    with pytest.raises(ModelError) as caught:
        packing.unpack(folder / "bad.ccz", folder / "out.onnx")
    with pytest.raises(ModelError) as again:
        load(folder / "bad.ccz")
    assert str(again.value) == str(caught.value)
    assert not (folder / "out.onnx").exists()
    assert not scratch_files(folder)
    return str(caught.value)


def holding(model: bytes) -> bytes:
    """Return a packed file with right checksums, whatever it holds."""
    out, digest = io.BytesIO(), Digest()
    writer = Writer(out)
    digest.add(model)
    choice = choosing.choose_text(model)
    writer.add(0, len(model), choice.view, 0, choice.streams)
    writer.finish(digest)
    return out.getvalue()


def test_every_flipped_byte_of_a_packed_model_is_refused(tmp_path: Path) -> None:
    packing.pack(saved(clustered(20, 30), tmp_path), tmp_path / "m.ccz")
    data = (tmp_path / "m.ccz").read_bytes()
    for at in range(len(data)):
        assert refusal(bytes([*data[:at], data[at] ^ 1 << at % 8, *data[at + 1 :]]), tmp_path)


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    assert "not a whole ONNX model" in refusal(holding(b"\x3a\x7fno model"), tmp_path)


def test_a_packed_model_that_points_to_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(9600))
    away = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[40, 60], data_location=TensorProto.EXTERNAL)
    away.external_data.add(key="location", value="../secret")
    proto = clustered()
    proto.graph.initializer.append(away)
    assert "tensor `w` points to external data" in refusal(holding(proto.SerializeToString()), tmp_path)


def test_external_data_outside_the_folder_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = external_model(tmp_path / "inside")
    (tmp_path / "w.bin").write_bytes(bytes(9608))
    path.write_bytes(path.read_bytes().replace(b"data/w.bin", b"/etc/hosts"))
    with pytest.raises(ModelError, match="outside the model's folder"):
        packing.pack(path, tmp_path / "m.ccz")
    assert not (tmp_path / "m.ccz").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the packed model"):
        load(tmp_path / "none.ccz")


def test_inputs_are_not_overwritten(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    for output in (path, tmp_path / "data" / "w.bin", tmp_path / "data" / ".." / "m.onnx"):
        before = output.read_bytes()
        with pytest.raises(CcompileError, match="would overwrite"):
            packing.pack(path, output)
        assert output.read_bytes() == before
    packing.pack(path, tmp_path / "m.ccz")
    with pytest.raises(CcompileError, match="would overwrite"):
        packing.unpack(tmp_path / "m.ccz", tmp_path / "m.ccz")


def test_a_failed_unpack_leaves_what_was_there(tmp_path: Path) -> None:
    packing.pack(saved(clustered(), tmp_path), tmp_path / "m.ccz")
    data = bytearray((tmp_path / "m.ccz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.ccz").write_bytes(data)
    (tmp_path / "old.onnx").write_bytes(b"old")
    with pytest.raises(ModelError):
        packing.unpack(tmp_path / "m.ccz", tmp_path / "old.onnx")
    assert (tmp_path / "old.onnx").read_bytes() == b"old"
    assert not scratch_files(tmp_path)


def test_a_packed_file_that_does_not_decode_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_bytes_of", lambda elements, width: np.zeros(1200, np.uint8))
    monkeypatch.setattr(views, "candidates", lambda *_: iter([views.View(4, spread=True)]))
    with pytest.raises(ModelError, match="checksum of the model"):
        packing.pack(saved(clustered(), tmp_path), tmp_path / "m.ccz")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_unpacking_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.full((100, 500), i, np.float32), f"w{i}") for i in range(16)]
    proto = clustered()
    proto.graph.initializer.extend(tensors)
    packing.pack(saved(proto, tmp_path), tmp_path / "m.ccz")
    tracemalloc.start()
    packing.unpack(tmp_path / "m.ccz", tmp_path / "back.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 200_000 < peak < 1_600_000  # a tensor, its planes and what decodes one: less than half of the model
