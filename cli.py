"""The ``moesim`` command."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import typer

from configs.errors import UserError
from policies.errors import PolicyError
from replay.commands import calibrate, quality, replay, validate
from sim import commands as simulation
from sim import commands_advise as advise
from sim import commands_fit_engine as fit_engine
from sim import commands_serve as serve
from sim import simulate
from tracer.commands import export, imports, inspect, subset, trace, train_predictor

app = typer.Typer(
    help="Which expert caching and prefetching policy, at which GPU memory budget, over which "
    "link, gives which latency.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
importer = typer.Typer(
    help="Turn another tool's routing file into a trace.",
    rich_markup_mode=None,
)
# Typer reports wrong usage by click's UsageError, and carries click inside since 0.26: this public
# name leads to the class in either case.
_UsageError: Any = typer.BadParameter.__bases__[0]
_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command line; what a user can mend ends in one line on stderr and exit code 2.

    SIGTERM ends it as Ctrl-C does: what runs is stopped and scratch files are removed.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = app(standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except (UserError, PolicyError) as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; name a place that can be written and has room")
    except (typer.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        print("moesim: interrupted", file=sys.stderr)
    raise SystemExit(status if isinstance(status, int) else 0)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    line = " ".join(message.split())
    print(f"moesim: error: {line}", file=sys.stderr)
    raise SystemExit(2)


@app.callback(invoke_without_command=True)
@importer.callback(invoke_without_command=True)
def _help_without_command(context: typer.Context) -> None:
    """Show the help when no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


# In the order in which they are used, which is the order of the help.
trace.register(app)
app.add_typer(importer, name="import")
imports.register(importer)
inspect.register(app)
subset.register(app)
train_predictor.register(app)
simulation.register(app)
advise.register(app)
serve.register(app)
fit_engine.register(app)
calibrate.register(app)
replay.register(app)
validate.register(app)
quality.register(app, simulate)
export.register(app)


if __name__ == "__main__":
    main()
