"""What a run writes down: the run folder first, Weights & Biases as its mirror. The only door to wandb."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.config import UserError
from medseg_ssl.train.progress import Progress
from medseg_ssl.train.run_folder import WARNINGS, kind_of_warning
from medseg_ssl.train.settings import WandbConfig

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES_SHOWN = 4


class Recorder:
    """The books of a run; on other than the main process every method does nothing.

    Args:
        run: the run folder.
        writes: True on the main process.
        wandb: how to mirror, None does not.
        config: the resolved config, shown in the mirror.
        progress: where the steps are shown; None shows nothing.
        total_steps: length of the run, for the progress.
        tags: words to find the run by in the mirror.
        group: runs of one group stand together in the mirror; None has none.
    """

    def __init__(
        self,
        run: Path,
        *,
        writes: bool = True,
        wandb: WandbConfig | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        total_steps: int = 0,
        tags: Sequence[str] = (),
        group: str | None = None,
    ) -> None:
        self.run = Path(run)
        self.writes = writes
        self.total_steps = total_steps
        self._wandb = wandb
        self._pictures = wandb is not None and wandb.pictures
        self._config = dict(config or {})
        self._progress = progress
        self._tags = tuple(tags)
        self._group = group
        self._mirror: Any = None
        self._mirror_id: str | None = None
        self._warned: set[str] = set()
        self._began = time.time()

    # -- life ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the mirror's id."""
        return {"wandb_id": self._mirror_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the checkpoint ``state`` (empty: begin): later lines are cut off, the mirror reopens."""
        if not self.writes:
            return
        self._truncate(int(state.get("step", 0)))
        self._open_mirror(state.get("wandb_id"))

    def close(self) -> None:
        """Finish the mirror."""
        if self._mirror is not None:
            self._mirror.finish()
            self._mirror = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- scalars, words ------------------------------------------------------------------------------------------------

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``; keys are ``train/…``, ``eval/<evaluation>/…`` or ``system/…``.

        Raises:
            UserError: the line cannot be written (full disk).
        """
        if not self.writes:
            return
        # strict JSON has no NaN: a score that does not exist is null
        row = {k: (float(v) if v - v == 0 else None) for k, v in scalars.items()}
        line = json.dumps({"step": step, "time_s": round(time.time() - self._began, 3), **row})
        try:
            with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.run / 'metrics.jsonl'}: {error.strerror}") from error
        if self._mirror is not None:
            self._mirror.log({"step": step, **{k: v for k, v in row.items() if v is not None}})
        if self._progress is not None and "train/loss" in scalars:
            speed = scalars.get("system/samples_per_s", 0.0)
            self._progress.note(f"loss {scalars['train/loss']:.4g} · {speed:.3g} samples/s")

    def advance(self, step: int) -> None:
        """Tell the progress bar that ``step`` steps are done."""
        if self._progress is not None and self.writes:
            self._progress.advance(step, self.total_steps)

    def warn(self, message: str) -> None:
        """Say something once on the terminal and keep it in ``warnings.txt``."""
        kind = kind_of_warning(message)
        if not self.writes or kind in self._warned:
            return
        self._warned.add(kind)
        with open(self.run / WARNINGS, "a", encoding="utf-8") as file:
            file.write(message + "\n")
        if self._progress is not None:
            self._progress.say(f"warning: {message}")

    # -- pictures, tables ----------------------------------------------------------------------------------------------

    def image(self, name: str, volume: Tensor, *, step: int) -> Path | None:
        """Middle slices in three planes of (B, D, H, W) or (B, C, D, H, W) as ``images/NAME-STEP.png``.

        They show real subjects, so the mirror gets them only where ``wandb.pictures`` allows it.
        """
        if not self.writes:
            return None
        from PIL import Image

        folder = self.run / "images"
        folder.mkdir(exist_ok=True)
        path = folder / f"{_safe(name)}-{step:07d}.png"
        picture = Image.fromarray(mid_slices(volume))
        picture.save(path)
        if self._mirror is not None and self._pictures:
            import wandb

            self._mirror.log({"step": step, f"images/{name}": wandb.Image(picture)})
        return path

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path | None:
        """A table as ``tables/NAME.csv`` and in the mirror."""
        if not self.writes:
            return None
        import csv

        folder = self.run / "tables"
        folder.mkdir(exist_ok=True)
        path = folder / f"{_safe(name)}.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
        self._open_mirror(self._mirror_id)
        if self._mirror is not None:
            import wandb

            self._mirror.log(
                {f"tables/{name}": wandb.Table(columns=list(columns), data=[list(r) for r in rows])}
            )
        return path

    def curve(
        self,
        name: str,
        series: Mapping[str, Sequence[tuple[float, float]]],
        *,
        x: str,
        y: str,
        title: str = "",
    ) -> Path | None:
        """A line chart of named series of (x, y): its points as a table here, a table and a chart in the mirror."""
        columns = ["series", x, y]
        rows = [[line, px, py] for line, points in series.items() for px, py in points]
        path = self.table(name, columns, rows)
        if self._mirror is not None:
            import wandb

            chart = wandb.plot.line_series(
                xs=[[p[0] for p in points] for points in series.values()],
                ys=[[p[1] for p in points] for points in series.values()],
                keys=list(series),
                title=title or name,
                xname=x,
            )
            self._mirror.log({f"curves/{name}": chart})
        return path

    def chart(self, name: str, figure: Mapping[str, Any]) -> None:
        """A plotly figure (a plain dict) in the mirror alone."""
        if not self.writes:
            return
        self._open_mirror(self._mirror_id)
        if self._mirror is not None:
            import plotly.graph_objects as go
            import wandb

            self._mirror.log({f"charts/{name}": wandb.Plotly(go.Figure(figure))})

    def summary(self, values: Mapping[str, float]) -> None:
        """Numbers of the run as a whole in the mirror alone; those that do not exist (NaN) are left out."""
        if not self.writes:
            return
        self._open_mirror(self._mirror_id)
        if self._mirror is not None:
            self._mirror.summary.update({k: float(v) for k, v in values.items() if v - v == 0})

    def artifact(
        self, name: str, kind: str, files: Mapping[str, Path], *, about: Mapping[str, Any] | None = None
    ) -> None:
        """Files in the mirror alone, under names of their own: no path goes with them.

        Args:
            name: of the artifact; other characters than letters, digits, ``-``, ``_`` and ``.`` become ``_``.
            kind: such as ``encoder`` or ``budgets``.
            files: name within the artifact to the file.
            about: what is known of it.
        """
        if not self.writes:
            return
        self._open_mirror(self._mirror_id)
        if self._mirror is not None:
            import wandb

            made = wandb.Artifact(_safe(name), type=kind, metadata=dict(about or {}))
            for inner, file in files.items():
                made.add_file(str(file), name=inner)
            self._mirror.log_artifact(made)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _truncate(self, step: int) -> None:
        path = self.run / "metrics.jsonl"
        if not path.is_file():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)

    def _open_mirror(self, known_id: str | None) -> None:
        """Start or reopen the mirror; no host, user, path, code or git state goes with it."""
        mode = mirror_mode(self._wandb)
        if mode == "disabled" or self._mirror is not None:
            self._mirror_id = known_id or self._mirror_id
            return
        assert self._wandb is not None
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str((self.run / "wandb").resolve()))
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.run.joinpath("wandb").mkdir(exist_ok=True)
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="local",
            quiet=True,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._mirror_id = known_id or self._mirror_id or secrets.token_hex(4)
        self._mirror = wandb.init(
            project=self._wandb.project,
            entity=self._wandb.entity,
            dir=str(self.run),
            id=self._mirror_id,
            name=self._mirror_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            config=self._config,
            tags=list(self._tags),
            group=self._group,
            settings=settings,
        )
        self._mirror.define_metric("*", step_metric="step")


def mirror_mode(config: WandbConfig | None) -> Any:
    """``online``, ``offline`` or ``disabled``; never online within a test."""
    if config is None or "disabled" in (config.mode, os.environ.get("WANDB_MODE")):
        return "disabled"
    if "PYTEST_CURRENT_TEST" in os.environ or config.mode == "offline":
        return "offline"
    if config.mode == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return "online"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, written as the process died


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def mid_slices(volume: Tensor) -> Any:
    """Axial, coronal and sagittal middle slices side by side, a row per sample and channel.

    The picture is uint8 (H, W), or (H, W, 3) for classes.

    Rows show superior or anterior above, and the patient's right at the left, as radiologists do. Float volumes are
    stretched between their 0.5th and 99.5th percentile; integer volumes are classes, shown in colours.
    """
    import numpy as np

    array = volume.detach().cpu()
    array = (array.float() if array.is_floating_point() else array).numpy()[:SAMPLES_SHOWN]
    array = array.reshape(-1, *array.shape[-3:])[:, ::-1, ::-1, ::-1]
    d, h, w = array.shape[-3:]
    height, width = max(d, h), max(w, h)
    colour = (3,) if array.dtype.kind in "iu" else ()
    sheet = np.zeros((len(array) * (height + 2), 3 * (width + 2), *colour), dtype=np.uint8)
    for i, item in enumerate(array):
        shades = _shades(item)
        for j, tile in enumerate((shades[d // 2], shades[:, h // 2], shades[:, :, w // 2])):
            top, left = i * (height + 2), j * (width + 2)
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _shades(volume_DHW: Any) -> Any:
    import numpy as np

    if volume_DHW.dtype.kind in "iu":
        return _palette()[volume_DHW]
    if volume_DHW.dtype.kind == "b":
        return volume_DHW.astype(np.uint8) * 255
    low, high = np.percentile(volume_DHW, (0.5, 99.5))
    return (np.clip((volume_DHW - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _palette() -> Any:
    import numpy as np

    colours = np.random.Generator(np.random.PCG64(5)).integers(60, 256, size=(256, 3)).astype(np.uint8)
    named = [
        (0, 0, 0),
        (230, 80, 60),
        (70, 160, 230),
        (240, 200, 60),
        (90, 190, 110),
        (180, 100, 210),
        (80, 210, 210),
    ]
    colours[: len(named)] = named
    colours[255] = (110, 110, 110)  # unknown
    return colours
