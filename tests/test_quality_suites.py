"""Great Expectations as it is used: crashes are errors, details come from the second pass, nothing is kept."""

import gc
import math
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from eval_platform.quality import suites


def frame(values):
    n = len(values)
    return pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "repeat": 0, "part": "p", "log_likelihood": values})


def test_a_crashed_expectation_is_an_error():
    broken = frame([-1.0, -2.0]).drop(columns="log_likelihood")
    checks = suites.validate(broken, suites.likelihood_rules())
    assert [check.passed for check in checks] == [False, False]
    assert all(check.severity == "error" for check in checks)
    assert all("could not run" in check.reason and "log_likelihood" in check.reason for check in checks)


def test_a_crash_of_one_expectation_leaves_the_others():
    missing = pd.DataFrame({"sample_id": ["a", "a"], "value": [1.0, math.nan]})
    checks = suites.validate(missing, suites.metric_rules())
    assert [check.passed for check in checks] == [False, False]
    assert "could not run" not in checks[0].reason
    assert "could not run" in checks[1].reason


def test_severity_is_great_expectations_own():
    import great_expectations.expectations as gxe

    rule = suites.Rule("few", gxe.ExpectTableRowCountToEqual(value=3, severity="warning"), "{observed} rows")
    (check,) = suites.validate(frame([-1.0]), [rule])
    assert (check.severity, check.passed, check.reason) == ("warning", False, "1 rows")


def test_counts_and_examples_are_of_what_failed():
    (present, in_range) = suites.validate(frame([-1.0, math.nan, 2.0, -math.inf, 3.0, 4.0]), suites.likelihood_rules())
    assert present.observed["unexpected"] == 1
    assert in_range.observed["unexpected"] == 4
    assert len(in_range.observed["examples"]) == 3
    assert "sample_id s2, repeat 0, part p, log_likelihood 2" in in_range.reason


def test_a_frame_is_not_kept_when_the_next_one_came():
    first = frame([-1.0])
    gone = weakref.ref(first)
    suites.validate(first, suites.likelihood_rules())
    del first
    suites.validate(frame([-1.0]), suites.likelihood_rules())
    gc.collect()
    assert gone() is None


def test_threads_do_not_mix_their_frames():
    good, bad = frame([-1.0] * 5), frame([math.nan] * 5)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda data: suites.validate(data, suites.likelihood_rules()), [good, bad] * 6))
    assert [checks[0].passed for checks in found] == [True, False] * 6


_FRESH_PROCESS = """
import sys
from eval_platform.quality import suites, warm
print("great_expectations" in sys.modules, "torch" in sys.modules)
import pandas
warm()
frame = pandas.DataFrame({"log_likelihood": [-1.0, float("nan")]})
checks = suites.validate(frame, suites.likelihood_rules())
print([check.passed for check in checks], checks[0].observed["examples"])
"""


def test_great_expectations_is_imported_late_once_and_says_nothing():
    done = subprocess.run([sys.executable, "-c", _FRESH_PROCESS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "[False, True] ['row 1']"]
    assert done.stderr == ""
