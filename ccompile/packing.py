"""Models packed into `.ccz` files, unpacked, and loaded: the same bytes come out, checked before anyone sees them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import accounting, choosing, coders, container, disk, files
from ccompile.accounting import Account, TensorAccount
from ccompile.container import Digest, Index, Writer
from ccompile.errors import CcompileError, ModelError
from ccompile.splice import Cut, Piece, cut, refuse_external, size_of
from ccompile.wire import Buffer, split

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

    from ccompile import Provider
    from ccompile.choosing import Choice


def pack(model: Path, output: Path, against: Path | None = None) -> Account:
    """Write a model as a packed file, whole or not at all, and return what it is made of.

    Unpacked, the model file is the same, byte by byte; one with external data becomes one file with everything inside.
    against: the model before compression, whose weights the ratio counts. The file written is decoded before it takes
    its name. Raises ModelError when a model cannot be read, CcompileError when the output cannot be written.
    """
    _check_output(output, [path for path in (model, against) if path is not None])
    proto, _, buffers, beside = files.read(model)
    _check_output(output, beside)
    weights = accounting.weights_in(proto if against is None else files.read(against)[0])
    pieces = _cut(buffers[0], model)
    told: list[tuple[list[TensorAccount], int]] = []
    disk.write_whole(output, lambda out: told.append(_write(out, pieces, proto)), _decodes)
    ((tensors, structure),) = told
    packed = output.stat().st_size
    parts = structure + sum(account.bytes_packed for account in tensors)
    return Account(tuple(tensors), weights, sum(map(len, buffers)), packed, structure, packed - parts)


def _check_output(output: Path, inputs: Iterable[Path]) -> None:
    for path in inputs:
        if path.resolve() == output.resolve():
            raise CcompileError(f"the output would overwrite {path}", str(output), "Choose another path.")
    if not output.parent.is_dir():
        raise CcompileError("the folder of the output does not exist", str(output.parent), "Make it first.")
    disk.probe(output)


def _cut(buffer: Buffer, path: Path) -> list[Piece]:
    try:
        return cut(buffer, lambda tensor: files.external_data(tensor, path))
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"not an ONNX model: {error}", str(path), "The file is damaged, or of another format."
        ) from error


def _write(out: IO[bytes], pieces: Sequence[Piece], proto: onnx.ModelProto) -> tuple[list[TensorAccount], int]:
    """Write the parts, and return the tensors' accounts and the bytes of all else."""
    writer, digest = Writer(out), Digest()
    rest = b"".join(piece for piece in pieces if not isinstance(piece, Cut))
    structure = _add(writer, 0, len(rest), choosing.choose_text(rest))
    values, decoded = accounting.codebooks(proto), accounting.decoded_shapes(proto)
    accounts: list[TensorAccount] = []
    position = 0
    for piece in pieces:
        digest.add(piece.data if isinstance(piece, Cut) else piece)
        if not isinstance(piece, Cut):
            position += len(piece)
            continue
        data, shape = np.frombuffer(piece.data, np.uint8), decoded.get(piece.name, ())
        choice = choosing.choose(data, piece.width, piece.is_float, piece.shape, shape)
        cost = _add(writer, position, size_of(piece), choice)
        codebook = accounting.bytes_of(values.get(piece.name, ()), proto)
        accounts.append(accounting.account_of(piece, cost, _form(choice), codebook, choice.view.width, shape))
    writer.finish(digest)
    return accounts, structure


def _add(writer: Writer, position: int, size: int, choice: Choice) -> int:
    return writer.add(position, size, choice.view, choice.filler, choice.streams)


def _form(choice: Choice) -> str:
    names = [coders.name_of(stream.coder) for stream in choice.streams]
    return f"{choice.view}: {' + '.join(names)}"


def _decodes(path: Path) -> None:
    """Raise ModelError when the file written does not decode to the model it was made from."""
    with path.open("rb") as file:
        for _ in container.pieces(file, container.read_index(file, str(path), limit=1 << 62), str(path)):
            pass


def unpack(packed: Path, output: Path, limit: int | None = None) -> int:
    """Write the model of a packed file, whole or not at all, and return its bytes; one tensor is held at a time.

    Beyond protobuf's 2 GiB the weights go to a file beside the model, as `files.write` names it.
    limit: bytes that the model may have; as `container.default_limit` when None.
    Raises ModelError when the packed file is damaged, or holds no model, or one that points to other files.
    """
    _check_output(output, [packed])
    with _opened(packed) as file:
        index = container.read_index(file, str(packed), limit)
        if index.size <= files.MESSAGE_LIMIT:
            disk.write_whole(output, lambda out: _copy(file, index, packed, out), lambda path: _approve(path, packed))
        else:
            _unpack_beside(file, index, packed, output)
    return index.size


@contextlib.contextmanager
def _opened(packed: Path) -> Iterator[IO[bytes]]:
    try:
        file = packed.open("rb")
    except OSError as error:
        raise ModelError(
            f"cannot read the packed model: {error.strerror}", str(packed), "Is the path right?"
        ) from error
    with file:
        yield file


def _copy(file: IO[bytes], index: Index, packed: Path, out: IO[bytes]) -> None:
    for piece in container.pieces(file, index, str(packed)):
        out.write(piece)


def _approve(path: Path, packed: Path) -> None:
    _refuse_other_files(memoryview(np.memmap(path, np.uint8, mode="r")), packed)  # type: ignore[arg-type]


def _refuse_other_files(model: Buffer, packed: Path) -> None:
    """Raise ModelError when the bytes are no model or keep tensors elsewhere: who packs puts everything inside."""
    try:
        cut(model, refuse_external)
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"what it holds is not a whole ONNX model: {error}",
            str(packed),
            "`ccompile pack` does not make such files.",
        ) from error


def _unpack_beside(file: IO[bytes], index: Index, packed: Path, output: Path) -> None:
    """Unpack a model that is too large for one message: into a scratch file, and from there with external data."""
    scratch = disk.scratch_of(output.with_name(output.name + ".whole"))
    try:
        with disk.writing(output):
            with scratch.open("wb") as out:
                _copy(file, index, packed, out)
            model = memoryview(np.memmap(scratch, np.uint8, mode="r"))  # type: ignore[arg-type]
        _refuse_other_files(model, packed)
        proto, weights = _with_placeholders(model, packed)
        files.write(proto, weights, output, limit=-1)
    finally:
        scratch.unlink(missing_ok=True)


def _with_placeholders(model: Buffer, packed: Path) -> tuple[onnx.ModelProto, Mapping[str, ir.TensorProtocol]]:
    """Return a model whose large initializers are external placeholders, and their bytes by name."""
    skeleton, views = split(model)
    proto = onnx.ModelProto.FromString(skeleton)
    weights: dict[str, ir.TensorProtocol] = {}
    for place, data in views.items():
        tensor = proto.graph.initializer[place]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        weights[tensor.name] = ir.Tensor(np.frombuffer(data, np.uint8), name=tensor.name)
    if len(weights) < len(views):
        raise ModelError("two initializers have one name", str(packed), "Such a model cannot have external data.")
    return proto, weights


def load(
    packed: Path | str,
    sess_options: SessionOptions | None = None,
    providers: Sequence[Provider] | None = None,
    provider_options: Sequence[Mapping[str, str]] | None = None,
    limit: int | None = None,
) -> InferenceSession:
    """Return an onnxruntime.InferenceSession of a packed model; the options are the session's own.

    Memory: the model and one tensor, then what the session takes. Beyond 2 GiB a temporary folder is used.
    Raises ModelError as `unpack` does; what the session refuses is its own error.
    """
    import onnxruntime as ort

    path = Path(packed)
    with _opened(path) as file:
        index = container.read_index(file, str(path), limit)
        if index.size <= files.MESSAGE_LIMIT:
            model = _whole(file, index, path)
            return ort.InferenceSession(model, sess_options, providers, provider_options)
        with tempfile.TemporaryDirectory() as folder:
            _unpack_beside(file, index, path, Path(folder) / "model.onnx")
            name = str(Path(folder) / "model.onnx")
            return ort.InferenceSession(name, sess_options, providers, provider_options)


def _whole(file: IO[bytes], index: Index, packed: Path) -> bytes:
    """Return the model's bytes."""
    model = io.BytesIO()
    _copy(file, index, packed, model)
    _refuse_other_files(model.getbuffer(), packed)
    return model.getvalue()
