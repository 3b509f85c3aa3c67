"""Table of contents of the command line, and its one exit door."""

import contextlib
import difflib
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from nexus.errors import DeviceError, NexusError, OutputError, is_full
from nexus_cli import convert, doctor, eval, gallery, help, info, models, music, output, sample, train
from nexus_cli.options import EXIT_CODES

app = typer.Typer(name="nexus", no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
for _command, _name in ((train.train, "train"), (sample.sample, "sample"), (music.music, "music"),
                        (convert.convert, "convert"),
                        (eval.evaluate, "eval"), (info.info, "info"), (gallery.gallery, "gallery"),
                        (doctor.doctor, "doctor"), (help.explain, "help")):
    app.command(_name, epilog=EXIT_CODES, no_args_is_help=_name not in ("doctor", "help"))(_command)
app.add_typer(models.app, name="models")

_PROMPTS = {"-p", "--prompt", "-n", "--negative-prompt", "--set"}


def _show_version(asked: bool) -> None:
    if asked:
        from nexus import __version__
        typer.echo(f"nexus {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context,
         version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                               help="Show the version and exit.")] = False) -> None:
    """Train, sample, convert and evaluate generative models of pictures and sound."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(argv: list[str] | None = None) -> None:
    """Run one command and leave the process with its exit code (nexus help exit-codes)."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminated)
    code = _run(arguments)
    code = _flush(code)
    sys.exit(code)


def _terminated(number: int, frame) -> None:
    raise SystemExit(128 + number)


def _run(arguments: list[str]) -> int:
    loud = any(re.fullmatch(r"-[a-zA-Z]*v[a-zA-Z]*v[a-zA-Z]*", word) for word in arguments) \
        or arguments.count("-v") + arguments.count("--verbose") >= 2
    try:
        code = app(arguments, prog_name="nexus", standalone_mode=False)
        if code == 130:                                 # typer's answer to Ctrl-C
            output.complain("interrupted", None)
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        output.complain("interrupted", None)
        return 130
    except output.PipeClosedError as error:
        output.silence_stdout()
        return error.code
    except NexusError as error:
        output.complain(str(error), error.hint)
        _trace(loud)
        return error.code
    except typer.TyperException as error:
        return _usage(error)
    except MemoryError:
        output.complain("out of memory", "a smaller --size or --batch-size, or --dtype bfloat16")
        return DeviceError.code
    except Exception as error:
        _trace(loud)
        return _unexpected(error)


def _trace(loud: bool) -> None:
    if loud:
        traceback.print_exc(file=sys.stderr)


def _usage(error: typer.TyperException) -> int:
    """A wrong flag or value: one line, and the nearest flag or the help to read."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if not message:                                     # no arguments: the help was shown
        return 2
    context = getattr(error, "ctx", None)
    wrong = getattr(error, "option_name", None)
    hint = f"{context.command_path} --help" if context is not None else "nexus --help"
    if wrong and message.startswith("No such option"):
        message = f"no such option: {wrong}"
        near = difflib.get_close_matches(wrong, _known(context), 1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else hint
    output.complain(message, hint)
    return getattr(error, "exit_code", 2)


def _known(context) -> list[str]:
    return [name for parameter in context.command.params for name in parameter.opts] if context is not None else []


def _unexpected(error: Exception) -> int:
    """A bug, or the device's complaint that it is full: one line, and where the traceback is."""
    first = (str(error).splitlines() or [""])[0][:300]
    if is_full(error):
        output.complain(f"out of memory: {first}", "a smaller --size or --batch-size, or --dtype bfloat16")
        return DeviceError.code
    output.complain(f"internal error: {type(error).__name__}: {first}",
                    f"this is a bug in nexus; the details are in {_log()}")
    return 1


def _log() -> str:
    """Write the traceback of the current exception to a log file; the name of that file."""
    import tempfile

    from nexus.atomic import write_text
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nexus"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = traceback.format_exc()
    for folder in (state, Path(tempfile.gettempdir())):
        with contextlib.suppress(NexusError):
            return str(write_text(folder / name, text.encode("utf-8", "backslashreplace").decode(), exists="overwrite"))
    traceback.print_exc(file=sys.stderr)
    return "the lines above"


def _flush(code: int) -> int:
    """Nothing may be lost silently in a closed pipe or on a full disk when the process ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        output.silence_stdout()
        return code or output.PipeClosedError.code
    except (OSError, ValueError) as error:
        output.silence_stdout()
        output.complain(f"cannot write to standard output: {getattr(error, 'strerror', None) or error}", None)
        return code or OutputError.code
    return code


def normalise(arguments: list[str]) -> list[str]:
    """Peers' spelling to ours: --batch_size is --batch-size, and a bare --grid is --grid=auto."""
    result: list[str] = []
    for index, word in enumerate(arguments):
        if word == "--":
            return result + arguments[index:]
        before = arguments[index - 1] if index else ""
        if before not in _PROMPTS and re.fullmatch(r"--[a-z]+(_[a-z]+)+(=.*)?", word, re.DOTALL):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if word == "--grid" and before not in _PROMPTS and not re.fullmatch(r"[0-9]+x[0-9]+|auto", following):
            word = "--grid=auto"
        result.append(word)
    return result
