"""What a user of a torch optimizer relies on, as one suite that torch's own AdamW passes too."""

import pytest

# Plain asserts in the checks are to explain themselves as those of test modules do.
pytest.register_assert_rewrite("tests.contract.checks", "tests.contract.harness")
