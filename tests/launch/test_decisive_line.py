"""Finding the line of a server's log that says why it could not start. The logs are vLLM's, shortened."""

from __future__ import annotations

import pytest

from chiasm.launch.supervisor import decisive_line

WORKER = "(Worker pid=7302) ERROR 11-24 02:22:18 [multiproc_executor.py:1063] "
ENGINE = "(EngineCore pid=7286) ERROR 11-24 02:22:18 [core.py:1510] "
NO_ROOM = "Available memory on node 0 (5.48/11.84 GiB) is less than requested memory for kv (465.66 GiB)."

WRONG_FLAG = """
usage: vllm [-h] [-v] {chat,complete,serve,launch,bench,collect-env,run-batch} ...
vllm: error: unrecognized arguments: --frobnicate 3
"""
NO_MEMORY = f"""
(APIServer pid=7180) WARNING 11-24 02:21:42 [system_utils.py:255] This can cause errors like `OSError: Too many open files`.
{WORKER}WorkerProc hit an exception.
{WORKER}Traceback (most recent call last):
{WORKER}    raise ValueError(
{WORKER}ValueError: {NO_ROOM}
{ENGINE}Traceback (most recent call last):
{ENGINE}RuntimeError: Worker failed with error '{NO_ROOM}', please check the stack trace above for the root cause
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': 1}}
"""
NO_SUCH_ARCHITECTURE = """
  File "/lib/pydantic/_internal/_dataclasses.py", line 121, in __init__
    s.__pydantic_validator__.validate_python(ArgsKwargs(args, kwargs), self_instance=s)
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Transformers does not recognize this architecture. [type=value_error, input_value=ArgsKwargs(())]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""
CONFIGURED_WRONG = """
(Worker pid=7539) ERROR 11-24 02:23:13 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=7539) ERROR 11-24 02:23:13 [multiproc_executor.py:953] chiasm.errors.ConfigurationError: there is no such setting
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""
OUT_OF_GPU_MEMORY = f"""
{WORKER}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.
{ENGINE}Exception: WorkerProc initialization failed due to an exception in a background process.
"""
NOTHING_BUT_HEARSAY = "RuntimeError: Engine core initialization failed. See root cause above."
BARE = "Traceback (most recent call last):\n  File 'x', line 1\nKeyboardInterrupt"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (WRONG_FLAG, "unrecognized arguments: --frobnicate 3"),
        (NO_MEMORY, NO_ROOM),
        (NO_SUCH_ARCHITECTURE, "Transformers does not recognize this architecture."),
        (CONFIGURED_WRONG, "there is no such setting"),
        (OUT_OF_GPU_MEMORY, "CUDA out of memory. Tried to allocate 20.00 MiB."),
        (NOTHING_BUT_HEARSAY, "Engine core initialization failed. See root cause above."),
        (BARE, "KeyboardInterrupt"),
        ("INFO 11-24 02:21:42 [api.py:1] all is well\n", None),
        ("", None),
    ],
)
def test_the_line_is_the_cause_and_not_another_process_report_of_it(log: str, line: str | None) -> None:
    assert decisive_line(log.splitlines()) == line


def test_it_is_one_line_of_bounded_length() -> None:
    line = decisive_line([f"ValueError: {'x' * 10_000}"])
    assert line is not None
    assert len(line) == 600
