"""The command line: the group of commands, and how it ends. Everything heavy is imported where it is used."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import click

from ccompile import __version__
from ccompile.commands import bisect, cache, check, compare, diff, inspect, lint, pack, passes, target
from ccompile.commands.compile import compile_command
from ccompile.commands.console import BUG, OK, WRONG
from ccompile.commands.ending import ending_soon, interruptible
from ccompile.commands.report import report_command
from ccompile.errors import CcompileError


class _DefaultToCompile(click.Group):
    """`ccompile MODEL -s SPEC -o OUT` is the compile; a known first word is a subcommand."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            _refuse_misspelt(args[0], self.commands)
            args = ["compile", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("ccompile", "MODEL -s SPEC -o OUT [OPTIONS]")
        formatter.write_usage("ccompile", "COMMAND [ARGS]...")


def _refuse_misspelt(word: str, commands: Collection[str]) -> None:
    """Refuse a first word that is no file and looks like a command (`insepct`)."""
    from difflib import get_close_matches

    near = get_close_matches(word, commands, n=1, cutoff=0.7)
    if near and not Path(word).exists():
        raise click.UsageError(f"There is no file and no command `{word}`. Did you mean `{near[0]}`?")


@click.group(cls=_DefaultToCompile, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="ccompile")
def cli() -> None:
    """Compile an ONNX model to a smaller and faster one under a YAML spec, verified after every pass.

    \b
        ccompile model.onnx -s spec.yaml -o out.onnx

    \b
    Exit codes: 0 done, every contract and gate held; 1 a contract or gate broke (no model is
    written, the evidence says which); 2 the spec, the model, the data or the command line is
    wrong; 130 interrupted; 70 ccompile itself failed.
    """  # noqa: D301  (click wants a real \\b)


for _command in (
    compile_command,
    inspect.inspect,
    lint.lint,
    passes.passes_command,
    report_command,
    passes.schema,
    diff.diff,
    bisect.bisect,
    cache.cache,
    check.check,
    compare.compare,
    pack.pack,
    pack.unpack,
    target.target,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    with ending_soon(), interruptible() as interrupts:
        _main(arguments, interrupts)


def _main(arguments: Sequence[str] | None, interrupts: Sequence[int]) -> None:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (started with >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        code = cli.main(list(arguments) if arguments is not None else None, "ccompile", standalone_mode=False)
        sys.stdout.flush()
    except CcompileError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = WRONG
    except (KeyboardInterrupt, click.exceptions.Abort):
        code = _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except OSError as error:
        click.echo(f"error: {error.filename or 'standard output'}: {error.strerror or error}", err=True)
        code = WRONG
    except MemoryError:
        click.echo("error: out of memory: nothing was written", err=True)
        code = WRONG
    except Exception:  # noqa: BLE001  (the last frame: a bug of ours must not look like exit 1)
        code = _interrupted(interrupts[0]) if interrupts else _failed()  # a library may have made one of it
    sys.exit(code or OK)


def _interrupted(number: int = signal.SIGINT) -> int:
    click.echo("interrupted: the output is the previous one, or whole", err=True)
    return 128 + number


def _failed() -> int:
    import traceback

    traceback.print_exc()
    click.echo("ccompile itself failed: please report this with the lines above", err=True)
    return BUG


if __name__ == "__main__":
    main()
