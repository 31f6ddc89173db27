"""Pages in Prometheus' text format."""

from __future__ import annotations

from chiasm.prometheus import read_samples, total

_PAGE = """\
# HELP loads What was loaded.
# TYPE loads counter
vllm:loads_total{engine="0",way="a, b} 1"} 3.0
vllm:loads_total{engine="1",way="x"} 2.0
vllm:loads_totally 7
this is {{{ no sample
plain 1.5
"""


def test_samples_have_a_name_labels_and_a_value() -> None:
    samples = read_samples(_PAGE)
    assert [(one.name, one.value) for one in samples] == [
        ("vllm:loads_total", 3.0),
        ("vllm:loads_total", 2.0),
        ("vllm:loads_totally", 7.0),
        ("plain", 1.5),
    ]
    assert samples[0].labels == {"engine": "0", "way": "a, b} 1"}


def test_lines_that_are_not_valid_are_left_out() -> None:
    assert read_samples("<html>\nb{, ={}\n{\nx\n\nx y\n") == []


def test_a_metric_is_summed_over_its_labels() -> None:
    samples = read_samples(_PAGE)
    assert total(samples, "vllm:loads_total") == 5
    assert total(samples, "vllm:loads_total", engine="1") == 2
    assert total(samples, "vllm:loads") is None
    assert total(samples, "vllm:loads_total", engine="2") is None
