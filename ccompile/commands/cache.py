"""`ccompile cache`: what is kept of earlier compiles; and the options of commands that use it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccompile.commands.console import OK, echo
from ccompile.commands.options import FILE

if TYPE_CHECKING:
    from ccompile.caching import Cache

_FOLDER = click.option("--cache", "folder", type=FILE, metavar="DIR", help="The cache [that of the user].")


def cache_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command `--cache` and `--no-cache`, which it takes as `cache`, a Cache."""

    @_FOLDER
    @click.option("--no-cache", is_flag=True, help="Do all work, and keep nothing of it.")
    @functools.wraps(command)
    def with_cache(folder: Path | None, no_cache: bool, **others: Any) -> int:
        from ccompile.caching import Cache, open_store

        if no_cache and folder is not None:
            raise click.UsageError("--cache and --no-cache exclude each other.")
        return command(cache=Cache(None if no_cache else open_store(folder)), **others)

    return with_cache


def tell_cache(cache: Cache, quiet: bool) -> None:
    """Tell what the cache spared, and on the standard error what was wrong with it."""
    if quiet:
        return
    for note in cache.notes:
        echo(f"cache: {note}", err=True)
    if cache.is_repeated:
        echo("cache: nothing has changed, nothing was run")
    elif cache.hits:
        echo(f"cache: {cache.hits} of {cache.hits + cache.misses} steps were known")


@click.group()
def cache() -> None:
    """Show or clear what is kept of earlier compiles.

    It lies in $CCOMPILE_CACHE, or in the user's cache folder, and takes up to $CCOMPILE_CACHE_GB gigabytes [4]: what
    was used least recently goes first.
    """


@cache.command()
@_FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(folder: Path | None, as_json: bool) -> int:
    """Show where the cache is, and how much it holds."""
    from ccompile import report
    from ccompile.caching import open_store

    store = open_store(folder)
    used = store.usage()
    if as_json:
        echo(json.dumps({"folder": str(store.folder), "limit": store.limit, **vars(used)}, indent=1))
    else:
        held = f"{report.size(used.nbytes)} of at most {report.size(store.limit)}"
        echo(f"{store.folder}: {held}, {used.records} results, {used.objects} contents")
    return OK


@cache.command()
@_FOLDER
def clear(folder: Path | None) -> int:
    """Remove everything that the cache holds."""
    from ccompile import report
    from ccompile.caching import open_store

    store = open_store(folder)
    echo(f"{store.folder}: {report.size(store.clear().nbytes)} removed")
    return OK
