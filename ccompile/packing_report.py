"""The account of a packed model as a table, as lines and as data. Builds renderables; prints nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ccompile.accounting import FLOAT32, Account, TensorAccount
from ccompile.report import size, table

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLUMNS = (
    *("tensor", "type", "form", "elements", "values", "commonest", "H", "Huffman", "bits"),
    *("index", "codebook", "relative", "packed"),
)
_DROP = ("form", "codebook", "relative", "index", "type", "elements", "commonest")


def account_table(account: Account) -> RenderableType:
    """Return a row per tensor: entropy, Huffman length and real bits per element, then bytes in theory and packed."""
    return table(_COLUMNS, [_row(tensor) for tensor in account.tensors], left=3, drop=_DROP)


def _row(tensor: TensorAccount) -> list[str]:
    symbols = tensor.symbols
    order0 = ["-"] * 4
    bytes_of_symbols = "-"
    if symbols is not None:
        order0 = [
            str(symbols.distinct),
            f"{symbols.commonest:.1%}",
            f"{symbols.entropy:.3f}",
            f"{symbols.huffman:.3f}",
        ]
        bytes_of_symbols = size(symbols.relative)
    return [
        tensor.name or "(unnamed)",
        tensor.dtype.lower(),
        tensor.form,
        str(tensor.elements),
        *order0,
        f"{tensor.bits:.3f}",
        size(tensor.bytes_index) if symbols else "-",
        size(tensor.bytes_codebook) if tensor.bytes_codebook else "-",
        bytes_of_symbols,
        size(tensor.bytes_packed),
    ]


def account_lines(account: Account, output: str, is_against: bool) -> list[str]:
    """Return the totals in words."""
    tensors = sum(tensor.bytes_packed for tensor in account.tensors)
    parts = f"tensors {size(tensors)}, structure {size(account.bytes_structure)}"
    whose = "the source's" if is_against else "its"
    weights = f"{whose} {account.weights:,} weights as float32 ({size(FLOAT32 * account.weights)})"
    return [
        f"bits per weight: {account.bits:.3f} of everything; {parts}, container {size(account.bytes_container)}",
        f"{output}: {size(account.bytes_packed)}, {account.ratio:.2f}x smaller than {weights}, "
        f"{account.ratio_model:.2f}x than the model file",
    ]


def as_data(account: Account) -> dict[str, Any]:
    """Return the account as plain data, what is computed included."""
    tensors = [
        asdict(tensor)
        | {
            "bits": tensor.bits,
            "bytes_index": tensor.bytes_index,
            "symbols": None if tensor.symbols is None else tensor.symbols._asdict(),
        }
        for tensor in account.tensors
    ]
    totals = {"bits": account.bits, "ratio": account.ratio, "ratio_model": account.ratio_model}
    return asdict(account) | totals | {"tensors": tensors}
