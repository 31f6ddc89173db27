"""Copies of embeddings to a GPU, beside the steps that compute on it."""

from __future__ import annotations

import functools

import torch


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return the tensor on ``device``, complete; the same one if it is there already.

    It is copied to CUDA on a stream of its own, so no step waits for the copy. The thread that uses it calls ``take_over``.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    stream = _stream(device)
    with torch.cuda.stream(stream):
        copy = tensor.to(device)
    stream.synchronize()
    return copy


def take_over(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of ``to_device`` for use on this thread's CUDA stream, which may still use it when it is freed."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


@functools.cache
def _stream(device: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
