"""``medseg-ssl VERB …``: finds the command and turns how it ends into an exit code.

Exit codes: 0 done, 1 a failure with one line that says what and what to do, 2 wrong usage or config, 130 and 143 when
interrupted or terminated. Nothing heavy is imported before a command runs, so that help is there at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """Where a command lives and what it does."""

    module: str
    help: str


VERBS = {
    "demo": Verb("finetune.demo", "the whole story on an embedded phantom archive, offline, in minutes"),
    "prepare": Verb("pretrain.prepare", "raw scans -> archive"),
    "inspect": Verb("pretrain.inspect", "what is in an archive"),
    "pretrain": Verb("pretrain.run", "config + archive -> encoder.safetensors"),
    "import": Verb("pretrain.import_weights", "public weights (nnU-Net, OpenMind, MONAI, …) -> encoder file"),
    "probe": Verb("pretrain.probe", "frozen-feature evaluations of an encoder"),
    "finetune": Verb(
        "finetune.run", "labeled archive, with an encoder or from scratch -> segmenter.safetensors"
    ),
    "evaluate": Verb("finetune.evaluate", "segmenter + archive -> cases.csv with Dice, NSD, HD95 in mm"),
    "predict": Verb("finetune.predict", "segmenter + scans -> label maps in the scans' own space"),
    "export": Verb("finetune.export_weights", "encoder or segmenter -> nnU-Net, MONAI, TorchScript, ONNX"),
    "compare": Verb("finetune.compare", "inits x label budgets x draws -> curve, table, report.html"),
    "transfer": Verb(
        "finetune.transfer", "sources x targets: which data to pretrain on -> matrix, controls, report.html"
    ),
    "estimate": Verb(
        "pretrain.estimate", "config -> parameters, memory, disk, steps/s and hours, before a start"
    ),
    "bench": Verb("pretrain.bench", "measured speed of this machine, and the fastest options of a config"),
    "report": Verb("finetune.report", "pictures and tables of any runs -> one HTML file"),
}


DEPRECATION = "`torch.jit.interface` is deprecated"
"""Said by torch 2.15 when lightly and torchvision are imported; nothing that a user could act on."""


ONE_REQUEST_S = 3.0
"""SIGTERM sent twice within it is one request, in training too."""


class Terminated(BaseException):
    """SIGTERM outside the training loop (which saves first and ends with its own message)."""


def usage() -> str:
    """The help text."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: medseg-ssl VERB [arguments] [--debug]",
            "",
            "Self-supervised and cross-modal pretraining for 3D medical imaging, and the labels it saves.",
            "",
            *lines,
            "",
            "'medseg-ssl VERB --help' explains a verb; --version prints the version.",
        ]
    )


def locate(module: str) -> str:
    """Full name of a command's module: inside the installed package, or at the top of a checkout."""
    inside = f"medseg_ssl.{module}"
    try:
        found = importlib.util.find_spec(inside) is not None
    except ModuleNotFoundError:
        found = False
    return inside if found else module


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit code; nothing but a broken interpreter raises out of here."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage() + "\n")
        return 0 if words else 2
    if words[0] == "--version":
        from medseg_ssl import __version__

        sys.stdout.write(f"medseg-ssl {__version__}\n")
        return 0
    if words[0] not in VERBS:
        close = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return _say(f"no verb named {words[0]!r}{hint}; known: {', '.join(VERBS)}", code=2)
    return run(lambda rest: importlib.import_module(locate(VERBS[words[0]].module)).main(rest), words[1:])


def run(command: Callable[[list[str]], Any], argv: list[str] | None = None) -> int:
    """Call a command's ``main`` and turn how it ends into an exit code and at most one line.

    Args:
        command: takes the arguments, returns what it made, raises ``UserError`` with a ``code``.
        argv: the arguments, None takes the process's own.
    """
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    _hush_deprecation()
    before = _on_terminate(_Terminator())
    try:
        command(list(words))  # with --debug, which every command's parser knows
    except SystemExit as error:  # argparse's --help
        return error.code if isinstance(error.code, int) else 0
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _end(error)
    finally:
        if before is not None:
            _on_terminate(before)
    return 0


def script(command: Callable[[list[str]], Any]) -> None:
    """End a script (``python -m pretrain.run``) as the verb of the same name would."""
    raise SystemExit(run(command))


def _hush_deprecation() -> None:
    # by the environment too: fits run in processes of their own
    warnings.filterwarnings("ignore", message=DEPRECATION, category=FutureWarning)
    given = os.environ.get("PYTHONWARNINGS", "")
    rule = f"ignore:{DEPRECATION}:FutureWarning"
    if rule not in given:
        os.environ["PYTHONWARNINGS"] = f"{given},{rule}" if given else rule


def _end(error: BaseException) -> int:
    code = getattr(error, "code", None)
    if isinstance(error, Terminated):
        return _say("stopped by SIGTERM", code=143)
    if isinstance(error, KeyboardInterrupt):
        return _say("stopped by SIGINT", code=130)
    if code in (1, 2, 130, 143):  # UserError and its kin, without importing the config machinery for it
        return _say(f"{'' if code in (130, 143) else 'error: '}{error}", code=code)
    if isinstance(error, BrokenPipeError):
        # whoever read our output has left; keep the interpreter from complaining about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return _say(f"error: {error.strerror}:{place}" if place else f"error: {error.strerror}", code=1)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _say(
            "error: out of memory; make data.batch_size or the crop size smaller (run with --debug)", code=1
        )
    return _say(f"internal error {type(error).__name__}: {error}; run with --debug for the traceback", code=1)


def _say(line: str, *, code: int) -> int:
    sys.stderr.write(" ".join(line.split()) + "\n")
    return code


class _Terminator:
    """Handler of SIGTERM that raises ``Terminated``.

    ``timeout`` and batch systems often send it twice: the second would break off the ending of workers.
    """

    def __init__(self) -> None:
        self._at = -ONE_REQUEST_S

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._at >= ONE_REQUEST_S:
            self._at = now
            raise Terminated


def _on_terminate(handler: Any) -> Any:
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not in the main thread
        return None


if __name__ == "__main__":
    raise SystemExit(main())
