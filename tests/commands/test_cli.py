import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from medseg_ssl import cli, commandline
from medseg_ssl.config import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "numpy",
    "monai",
    "timm",
    "lightly",
    "wandb",
    "nibabel",
    "scipy",
    "plotly",
    "pydantic",
    "yaml",
)


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from medseg_ssl import cli; cli.main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(eval(done.stdout.splitlines()[-1]))
    assert not loaded & set(HEAVY)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "medseg_ssl.cli", "--help"], cwd=ROOT, capture_output=True, check=True
        )
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3


def test_every_verb_exists_and_its_help_needs_no_torch():
    verbs = sorted(cli.VERBS)
    code = f"""
import sys
from medseg_ssl import cli
for verb in {verbs}:
    print(verb, cli.main([verb, '--help']), 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    for verb in verbs:
        assert f"\n{verb} 0 False\n" in done.stdout, done.stderr
        assert f"usage: medseg-ssl {verb}" in done.stdout


def test_no_verb_shows_the_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: medseg-ssl VERB" in capsys.readouterr().out


def test_unknown_verb_is_corrected(capsys):
    assert cli.main(["pretrian"]) == 2
    assert "no verb named 'pretrian' (did you mean 'pretrain'?)" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("medseg-ssl ")


def raises(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such thing"), 1, "error: no such thing"),
        (ConfigError("wrong key"), 2, "error: wrong key"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (cli.Terminated(), 143, "stopped by SIGTERM"),
        (
            ZeroDivisionError("x"),
            1,
            "internal error ZeroDivisionError: x; run with --debug for the traceback",
        ),
        (OSError(28, "No space left on device", "a.csv"), 1, "error: No space left on device: a.csv"),
        (MemoryError(), 1, "error: out of memory"),
    ],
)
def test_every_end_has_its_code_and_one_line(capsys, error, code, line):
    assert cli.run(raises(error), []) == code
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1


def test_debug_shows_the_traceback(capsys):
    assert cli.run(raises(UserError("no such thing")), ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_reaches_the_command():
    seen = []
    assert cli.run(seen.extend, ["a", "--debug"]) == 0
    assert seen == ["a", "--debug"]


def test_interrupted_training_keeps_its_own_words(capsys):
    from medseg_ssl.train.interrupt import Interrupted

    assert cli.run(raises(Interrupted(15, "stopped by SIGTERM after step 3 of 9")), []) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3 of 9\n"


def test_sigterm_outside_of_training(tmp_path):
    waits = "cli.run(lambda words: (os.kill(os.getpid(), 15), time.sleep(9)), [])"
    code = f"import os, sys, time\nfrom medseg_ssl import cli\nsys.exit({waits})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 143
    assert done.stderr == "stopped by SIGTERM\n"


def test_parser_errors_are_config_errors():
    parser = commandline.Parser(prog="x")
    with pytest.raises(ConfigError, match="x: unrecognized arguments: --nope"):
        parser.parse_args(["--nope"])


def test_configs_are_found_by_path_and_by_name(tmp_path):
    assert commandline.find_config("mae", kind="pretrain").name == "mae.yaml"
    own = tmp_path / "own.yaml"
    own.touch()
    assert commandline.find_config(str(own), kind="pretrain") == own
    with pytest.raises(
        ConfigError, match=r"no pretrain config named 'maee' \(did you mean 'mae'\?\); known: .*mae"
    ):
        commandline.find_config("maee", kind="pretrain")
    with pytest.raises(ConfigError, match=r"no config file configs/none\.yaml"):
        commandline.find_config("configs/none.yaml", kind="pretrain")


def test_deprecations_inside_torch_are_not_the_users_business(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error::BytesWarning")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def command(words):
            warnings.warn(
                "`torch.jit.interface` is deprecated. Please use something.", FutureWarning, stacklevel=1
            )
            warnings.warn("our own", FutureWarning, stacklevel=1)

        assert cli.run(command, []) == 0
    assert [str(w.message) for w in caught] == ["our own"]
    assert os.environ["PYTHONWARNINGS"].startswith("error::BytesWarning,ignore:`torch.jit.interface`")


def test_a_second_sigterm_does_not_break_off_the_ending():
    ended = []

    def command(words):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("workers")

    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(command, []) == 143
    assert ended == ["workers"]
    assert signal.getsignal(signal.SIGTERM) is before
