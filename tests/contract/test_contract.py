"""Every check of the contract against every optimizer it applies to, torch's own AdamW first.

That AdamW passes shows the suite to be fair; that the published package does not (``test_published``) shows that it
can fail. Neighbouring tests compare numbers with the reference; they cannot see what a trainer trips over.
"""

from __future__ import annotations

import pytest

from tests.contract import checks  # noqa: F401  (enters the checks)
from tests.contract.expected import FAILING, TORCH_FAULTS, reason
from tests.contract.harness import CHECKS
from tests.contract.subjects import OURS, SUBJECTS, TORCH


def _cases() -> list[object]:
    cases = []
    for subject in SUBJECTS.values():
        for check in CHECKS.values():
            if check.applies(subject):
                why = reason(check.name, subject.name)
                marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
                cases.append(pytest.param(check.name, subject.name, marks=marks, id=f"{subject.name}-{check.name}"))
    return cases


@pytest.mark.parametrize(("check", "subject"), _cases())
def test_contract(check: str, subject: str) -> None:
    CHECKS[check].run(SUBJECTS[subject])
