"""Embeddings that go to a device: the copy is made beside the steps, and the step takes it over."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from chiasm.ec_transfer import device, peers, sources

from .instance import embedding_of
from .peers import CONNECTORS, Encoder, LanguageModel


@pytest.mark.parametrize("connector", CONNECTORS)
def test_it_is_copied_on_a_reading_thread_and_taken_over_on_the_thread_of_the_step(
    connector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, torch.Tensor]] = []

    def to_device(tensor: torch.Tensor, name: str) -> torch.Tensor:
        copy = device.to_device(tensor, name)
        calls.append(("copied", threading.current_thread().name, copy))
        return copy

    def take_over(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(("taken over", threading.current_thread().name, tensor))
        return device.take_over(tensor)

    monkeypatch.setattr(sources, "to_device", to_device)
    monkeypatch.setattr(peers, "take_over", take_over)
    with (
        contextlib.closing(Encoder(connector)) as encoder,
        contextlib.closing(
            LanguageModel(connector, device="meta")  # a device that every machine has; what is on it has no bytes
        ) as model,
    ):
        name = encoder.encode("cat")
        model.scheduler.expect({name: encoder.place})
        model.load(model.admit("r", "cat"))
        loaded = model.memory[name]
    assert (loaded.device.type, loaded.shape) == ("meta", embedding_of("cat").shape)
    (copied, reading, copy), (taken, stepping, same) = calls
    assert (copied, taken) == ("copied", "taken over")
    assert copy is same is loaded
    assert reading.startswith("ec-read")
    assert stepping == threading.current_thread().name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("connector", CONNECTORS)
def test_it_is_copied_to_a_gpu_on_another_stream_than_that_of_the_step(connector: str) -> None:
    with (
        contextlib.closing(Encoder(connector)) as encoder,
        contextlib.closing(LanguageModel(connector, device="cuda:0")) as model,
    ):
        name = encoder.encode("cat", embedding_of("cat").cuda())
        model.scheduler.expect({name: encoder.place})
        model.load(model.admit("r", "cat"))
        loaded = model.memory[name]
        assert loaded.device == torch.device("cuda:0")
        assert torch.equal(loaded.cpu(), embedding_of("cat"))
        # Memory belongs to the stream on which it was allocated, which is the one of the copy.
        (stream,) = [
            segment["stream"]
            for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            if segment["address"] <= loaded.data_ptr() < segment["address"] + segment["total_size"]
        ]
        assert stream == device._stream("cuda:0").cuda_stream
        assert stream != torch.cuda.current_stream("cuda:0").cuda_stream
