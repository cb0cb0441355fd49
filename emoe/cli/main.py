"""The program `emoe`: one file a verb; errors that a user can put right are one line and exit status 2."""

from __future__ import annotations

import os
import sys

import typer

import emoe
from emoe.cli import (
    analyze,
    compare,
    convert,
    doctor,
    estimate,
    evaluate,
    export,
    extend,
    finetune,
    frontier,
    inspect,
    models,
    pretrain,
    prune,
    push,
    recover,
    report,
    sweep,
    tune,
)
from emoe.cli.options import speaks
from emoe.cli.progress import silence_libraries
from emoe.errors import Finished, UserError

try:  # typer 0.29 carries its own copy of click; earlier ones use the installed one
    from typer._click import exceptions as click
except ImportError:
    from click import exceptions as click

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="emoe",
    help="Turn a pretrained dense Llama or GPT model into its Emergent Mixture-of-Experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert")(convert.convert)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("finetune")(finetune.finetune)
app.command("push")(push.push)
app.command("frontier")(frontier.frontier)
app.command("inspect")(inspect.inspect)
app.command("pretrain")(pretrain.pretrain)
app.command("recover")(recover.recover)
app.command("tune")(tune.tune)
app.command("analyze")(analyze.analyze)
app.command("prune")(prune.prune)
app.command("extend")(extend.extend)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("estimate")(estimate.estimate)
app.command("models")(models.models)
app.command("fetch")(models.fetch)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emoe {emoe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Turn a pretrained dense Llama or GPT model into its Emergent Mixture-of-Experts."""
    silence_libraries()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = [_from_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    try:
        status = typer.main.get_command(app).main(args=arguments, prog_name="emoe", standalone_mode=False)
        if status == INTERRUPTED:  # typer 0.29 makes a status of the exception
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0  # a command that failed in part exits with 1
    except Finished as done:
        print(f"emoe: {done}", file=sys.stderr)
        return 0
    except UserError as error:
        message = str(error)
    except click.NoArgsIsHelpError as error:
        typer.echo(error.ctx.get_help())
        return 2
    except click.ClickException as error:
        message = error.format_message()
    except (KeyboardInterrupt, typer.Abort):
        print(f"emoe: interrupted{_how_to_go_on(arguments)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 141
    except OSError as error:  # a full disk, a folder that may not be read
        message = f"{error.filename or 'the system'}: {error.strerror or error}"
    if speaks():
        print("emoe: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _from_home(argument: str) -> str:
    """An argument with ``~`` expanded, which a shell leaves alone within quotes and in ``--model=~/x``."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + os.path.expanduser(value)


def _how_to_go_on(arguments: list[str]) -> str:
    """What a command can do with work that was interrupted."""
    command = typer.main.get_command(app).commands.get(next(iter(arguments), ""))
    if command is not None and any("--resume" in option.opts for option in command.params):
        return "; --resume goes on with unfinished work"
    return "; the same command goes on with unfinished work" if command and command.name == "sweep" else ""


if __name__ == "__main__":
    sys.exit(main())
