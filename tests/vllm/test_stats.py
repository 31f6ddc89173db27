"""The connector's counters on /metrics and in vLLM's log."""

from __future__ import annotations

from pathlib import Path

from .processes import Server
from .wire import chat, encode, image_bytes, name_of, published


def test_counters_of_an_encoder(encoder: Server, store: Path) -> None:
    names = ("misses", "saves", "saved_bytes", "save_seconds")
    before = {name: encoder.count(name) for name in names}
    data = image_bytes(50)
    encode(encoder, data)
    encoder.until(lambda: encoder.count("saves") == before["saves"] + 1)
    assert encoder.count("misses") == before["misses"] + 1
    size = (store / f"{name_of(data)}.safetensors").stat().st_size - 4096
    assert encoder.count("saved_bytes") == before["saved_bytes"] + size
    assert encoder.count("save_seconds") > before["save_seconds"]


def test_counters_of_a_pd(encoder: Server, pd: Server) -> None:
    names = ("hits", "loads", "loaded_bytes", "load_seconds")
    before = {name: pd.count(name) for name in names}
    pd.answer(chat(published(encoder, image_bytes(51)), "what is it?"))
    pd.until(lambda: pd.count("loads") == before["loads"] + 1)
    assert pd.count("hits") == before["hits"] + 1
    assert pd.count("loaded_bytes") > before["loaded_bytes"]
    assert pd.count("load_seconds") > before["load_seconds"]


def test_counters_in_the_log(encoder: Server, pd: Server) -> None:
    pd.answer(chat(published(encoder, image_bytes(52)), "what is it?"))
    pd.until(lambda: "EC Transfer metrics: hits=" in pd.text())
    encoder.until(lambda: "EC Transfer metrics: misses=" in encoder.text())
