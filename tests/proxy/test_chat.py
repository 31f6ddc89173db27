"""The way of a request that goes well."""

from __future__ import annotations

from .conftest import Start, ask, image, picture
from .instances import FakeInstance


async def test_text_passes_byte_for_byte_and_touches_no_encoder(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    body = b'{ "model":"tiny" ,\n "messages":[{"role":"user","content":"h\\u00e9llo \xc3\xa9"}],"x":1.50,"x":[1e2]}'
    answer = await front.post(body)
    assert answer.status == 200
    assert [received.body for received in pd.received] == [body]
    assert not encoder.received


async def test_pixels_go_to_the_encoder_and_their_size_to_pd(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    answer = await front.post(ask("what is it?", image(picture(size=(30, 20)))))
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["message"]["content"] == "a cat"
    print(answer.headers, encoder.received, pd.received)
