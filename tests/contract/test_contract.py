"""Every check of the contract against every optimizer it applies to, torch's own AdamW first.

That AdamW passes shows the suite to be fair; that the published package does not (``test_published``) shows that it
can fail. Neighbouring tests compare numbers with the reference; they cannot see what a trainer trips over.
"""

from __future__ import annotations

import pytest

from tests.contract import checks, known_failures
from tests.contract.harness import CHECKS
from tests.contract.subjects import SUBJECTS

assert checks.__all__, "the checks enter themselves when they are imported"


def _cases() -> list[object]:
    cases = []
    for subject in SUBJECTS.values():
        for check in CHECKS.values():
            if check.applies(subject):
                why = known_failures.reason(check.name, subject.name)
                marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
                cases.append(pytest.param(check.name, subject.name, marks=marks, id=f"{subject.name}-{check.name}"))
    return cases


@pytest.mark.parametrize(("check", "subject"), _cases())
def test_contract(check: str, subject: str) -> None:
    CHECKS[check].run(SUBJECTS[subject])


@pytest.mark.parametrize("table", [known_failures.FAILING, known_failures.TORCH_FAULTS], ids=["ours", "torch"])
def test_the_tables_speak_of_checks_and_subjects(table: dict[str, dict[str, str]]) -> None:
    """A misspelt entry would excuse nothing and stay for ever."""
    for check, patterns in table.items():
        assert check in CHECKS
        for pattern in patterns:
            subjects = [s for name, s in SUBJECTS.items() if known_failures.matches(pattern, name)]
            assert any(CHECKS[check].applies(subject) for subject in subjects)


def test_adamw_holds_everything_but_faults_of_its_fused_kernel() -> None:
    assert not any(known_failures.matches(p, n) for table in known_failures.FAILING.values() for p in table
                   for n in SUBJECTS if n.startswith("AdamW"))  # fmt: skip
    assert {p for table in known_failures.TORCH_FAULTS.values() for p in table} == {"AdamW fused"}
