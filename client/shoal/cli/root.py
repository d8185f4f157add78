"""The root of the ``shoal`` command, and what every failure becomes: one sentence on stderr and exit status 1.

The rule: a person sees a traceback only where they asked for it (``--debug``). Bad usage is click's, with status 2.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from shoal.errors import ShoalError

#: By command: its module here. It is imported when the command is used, so that none waits for what others need.
COMMANDS = {
    "cat": "files",
    "dataset": "dataset",
    "dev": "dev",
    "doctor": "doctor",
    "get": "files",
    "ls": "files",
    "mount": "mount",
    "node": "node",
    "plan": "plan",
    "prefetch": "prefetch",
    "status": "status",
    "umount": "mount",
}


class Failure(click.ClickException):
    """A failed command. Like click's own, but for the lower-case word that all Shoal programs begin with."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


class _Root(click.Group):
    """Turns every exception of a command into a `Failure`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # Of an unknown one click says which of all are like it.
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            self.add_command(getattr(importlib.import_module(f"shoal.cli.{COMMANDS[name]}"), name))
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own business; it ends quietly where the reader of a pipe went away
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            raise Failure(sentence(error)) from error


def sentence(error: Exception) -> str:
    """What a person reads of `error`."""
    match error:
        case ShoalError():
            return str(error)
        case OSError(strerror=str(reason), filename=name) if name is not None:
            return f"{name}: {reason}"
        case OSError():
            return str(error)
    return f"unexpected {type(error).__name__}: {error}; 'shoal --debug …' shows where"


EXAMPLES = """\b
Examples:
  shoal dev                                        # in another shell; then paste its export lines here
  shoal dataset add flights s3://bucket/flights
  shoal prefetch flights
  shoal ls shoal://flights
"""


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--debug", is_flag=True, envvar="SHOAL_DEBUG", show_envvar=True, help="Show where an error came from.")
@click.version_option(package_name="shoal", message="%(prog)s %(version)s")
def main(debug: bool) -> None:
    """A dataset cache for GPU clusters: the cluster's own drives as one cache, read through one URL.

    Commands find the cluster by --endpoint or SHOAL_ENDPOINT: http://HOST:PORT of the controller or of any cache node.
    """
