"""Tables of the Hessian study's results."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.documents import damaged, is_finite, read_object

FORMAT_VERSION = 1
_MEND = "delete it and run `make hessian` again"
_NUMBERS = ("n_blocks", "mass_inside", "expected", "z", "mean_ratio", "jensen", "jensen_null", "checkpoint")
"""Numeric fields of a row of evidence; pandas would silently leave missing ones out of a median."""
UNIT_ORDER = ("TENSOR", "ATTENTION_HEAD", "TOKEN", "OUT_NEURON", "IN_NEURON", "FACTORED")


@dataclass(frozen=True)
class HessianReport:
    """A finished study.

    Attributes:
        folder: the study's folder.
        report: the content of ``report.json``.
    """

    folder: Path
    report: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> HessianReport:
        """Read a study's folder.

        Raises:
            FileNotFoundError: the folder has no finished study.
            ValueError: the study is damaged or has another format version.
        """
        path = folder / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; run `make hessian` to its end first")
        report = read_object(path, _MEND)
        if report.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version={report.get('format_version')}, this release reads {FORMAT_VERSION}; "
                "run `make hessian OUT=another/folder`"
            )
        for key, kind in (("evidence", list), ("check", list), ("files", dict)):
            if not isinstance(report.get(key), kind):
                raise damaged(path, f"it has no {key}", _MEND)
        for why in (_odd_evidence(report["evidence"]), _odd_check(report["check"])):
            if why:
                raise damaged(path, why, _MEND)
        return cls(folder, report)

    def require(self, *keys: str) -> None:
        """Check that the report has these parts.

        Raises:
            ValueError: a part is missing; the message names the first one.
        """
        for key in keys:
            if not isinstance(self.report.get(key), dict):
                raise damaged(self.folder / "report.json", f"it has no {key}", _MEND)

    def arrays(self, stage: str) -> dict[str, np.ndarray]:
        """Load the stored arrays of a stage.

        Raises:
            KeyError: the study has no such stage.
            ValueError: the stage's file is missing or damaged.
        """
        if stage not in self.report["files"]:
            raise KeyError(f"the study has no stage {stage!r}; it has {sorted(self.report['files'])}")
        path = self.folder / "data" / self.report["files"][stage]
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, though {self.folder / 'report.json'} names it; run `make hessian` again"
            )
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError) as error:
            raise damaged(path, str(error), _MEND) from error

    @property
    def evidence(self) -> pd.DataFrame:
        """Evidence with one row per model, tensor, candidate unit and checkpoint, including lift and explained gap."""
        table = pd.DataFrame(self.report["evidence"])
        table["lift"] = table["mass_inside"] / table["expected"].replace(0.0, np.nan)
        table["explained"] = 1 - table["jensen"] / table["jensen_null"].replace(0.0, np.nan)
        return table

    def by_role(self, model: str, checkpoint: float = 1.0) -> pd.DataFrame:
        """Return medians over a model's tensors, one row per role and unit, ordered by role and by ``UNIT_ORDER``.

        Args:
            model: name of the model.
            checkpoint: share of training done, 0 to 1.

        Raises:
            ValueError: there is no evidence for this model and checkpoint.
        """
        table = self.evidence
        chosen = table[(table.model == model) & (table.checkpoint == checkpoint)]
        if chosen.empty:
            raise ValueError(
                f"no evidence for model={model!r} at checkpoint={checkpoint}; the models are "
                f"{sorted(table.model.unique())} and the checkpoints {sorted(table.checkpoint.unique())}"
            )
        columns = ["n_blocks", "z", "lift", "mean_ratio", "jensen", "jensen_null", "explained"]
        grouped = chosen.groupby(["role", "unit"], sort=False)[columns].median().reset_index()
        grouped["n"] = chosen.groupby(["role", "unit"], sort=False).size().to_numpy()
        order = {unit: i for i, unit in enumerate(UNIT_ORDER)}
        roles = {role: i for i, role in enumerate(dict.fromkeys(chosen.role))}
        key = grouped.role.map(roles) * 10 + grouped.unit.map(order)
        return grouped.iloc[np.argsort(key.to_numpy(), kind="stable")].reset_index(drop=True)

    @property
    def check(self) -> pd.DataFrame:
        """Training runs that check the rules, with model, arm, seed, step (a list), loss (a list) and final loss."""
        table = pd.DataFrame(self.report["check"])
        table["final"] = [losses[-1] for losses in table.loss]
        return table


def _odd_evidence(rows: list[Any]) -> str:
    """Describe the first invalid row of evidence; return "" if all are valid."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            return f"evidence[{i}] is no object"
        if missing := [key for key in ("model", "tensor", "role", "unit") if not isinstance(row.get(key), str)]:
            return f"evidence[{i}] has no {missing[0]}"
        for key in _NUMBERS:
            value = row.get(key)
            # mean_ratio is infinite if all of the mass lies inside the blocks.
            if not is_finite(value) and not (key == "mean_ratio" and value == math.inf):
                return f"evidence[{i}] ({row['tensor']} by {row['unit']}) has {key}={value!r}, no finite number"
    return ""


def _odd_check(runs: list[Any]) -> str:
    """Describe what is wrong with the training runs that check the rules; return "" if nothing is.

    Every run needs a loss for each step, and all arms of a model need the same seeds.
    """
    seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        if not isinstance(run, dict) or not {"model", "arm", "seed", "step", "loss"} <= run.keys():
            return f"check[{i}] is no training run"
        name = f"the check run model={run['model']} arm={run['arm']} seed={run['seed']}"
        steps, losses = run["step"], run["loss"]
        if not isinstance(losses, list) or not isinstance(steps, list) or not losses or len(losses) != len(steps):
            return f"{name} has no loss for each step"
        if odd := [loss for loss in losses if not is_finite(loss)]:
            return f"{name} has loss={odd[0]!r}, no finite number"
        seeds[run["model"], run["arm"]].append(run["seed"])
    for (model, arm), arm_seeds in seeds.items():
        if len(set(arm_seeds)) < len(arm_seeds):
            return f"the check runs of model={model} arm={arm} have a seed twice: {arm_seeds}"
        first_arm = next(other for (other_model, _), other in seeds.items() if other_model == model)
        if sorted(arm_seeds) != sorted(first_arm):
            return f"the check runs of model={model} arm={arm} have the seeds {arm_seeds}, other arms have {first_arm}"
    return ""
