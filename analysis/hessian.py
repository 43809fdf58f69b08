"""What the Hessian study left behind, as tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

FORMAT_VERSION = 1
UNIT_ORDER = ("TENSOR", "ATTENTION_HEAD", "TOKEN", "OUT_NEURON", "IN_NEURON")


@dataclass(frozen=True)
class HessianReport:
    """A finished study.

    Attributes:
        folder: where it lies.
        report: the content of ``report.json``.
    """

    folder: Path
    report: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> HessianReport:
        """Read a study's folder.

        Raises:
            FileNotFoundError: there is no finished study.
            ValueError: damaged, or of another format version.
        """
        path = folder / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; run `make hessian` to its end first")
        try:
            report = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run `make hessian` again") from error
        if report.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version={report.get('format_version')}, this release reads {FORMAT_VERSION}; "
                "run `make hessian OUT=another/folder`"
            )
        return cls(folder, report)

    def arrays(self, stage: str) -> dict[str, np.ndarray]:
        """The stored arrays of a stage.

        Raises:
            KeyError: no such stage.
        """
        if stage not in self.report["files"]:
            raise KeyError(f"the study has no stage {stage!r}; it has {sorted(self.report['files'])}")
        with np.load(self.folder / "data" / self.report["files"][stage], allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    @property
    def evidence(self) -> pd.DataFrame:
        """One row per model, tensor, candidate unit and checkpoint; ``lift`` and ``explained`` added."""
        table = pd.DataFrame(self.report["evidence"])
        table["lift"] = table["mass_inside"] / table["expected"].replace(0.0, np.nan)
        table["explained"] = 1 - table["jensen"] / table["jensen_null"].replace(0.0, np.nan)
        return table

    def by_role(self, model: str, checkpoint: float = 1.0) -> pd.DataFrame:
        """Medians over a model's tensors, one row per role and unit, in reading order.

        Raises:
            ValueError: nothing was measured there.
        """
        table = self.evidence
        chosen = table[(table.model == model) & (table.checkpoint == checkpoint)]
        if chosen.empty:
            raise ValueError(f"no evidence for model={model!r} at checkpoint={checkpoint}")
        columns = ["n_blocks", "z", "lift", "mean_ratio", "jensen", "jensen_null", "explained"]
        grouped = chosen.groupby(["role", "unit"], sort=False)[columns].median().reset_index()
        grouped["n"] = chosen.groupby(["role", "unit"], sort=False).size().to_numpy()
        order = {unit: i for i, unit in enumerate(UNIT_ORDER)}
        roles = {role: i for i, role in enumerate(dict.fromkeys(chosen.role))}
        key = grouped.role.map(roles) * 10 + grouped.unit.map(order)
        return grouped.iloc[np.argsort(key.to_numpy(), kind="stable")].reset_index(drop=True)

    @property
    def check(self) -> pd.DataFrame:
        """Training runs that check the rules: model, arm, seed, step (list), loss (list), final."""
        table = pd.DataFrame(self.report["check"])
        table["final"] = [losses[-1] for losses in table.loss]
        return table
