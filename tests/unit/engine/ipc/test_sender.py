from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from engine.ipc.link import Link
from engine.ipc.sender import BufferedSender
from engine.ipc.wire import Message, StartText


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    writing, reading = socket.socketpair()
    with writing, reading:
        yield writing, reading


@pytest.mark.timeout(30)
def test_a_reader_that_stands_still_holds_nobody_up_and_gets_everything_in_order(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sender, size = BufferedSender(pair[0]), 1 << 20  # more than the socket takes
    sent = [StartText(str(number) * size) for number in range(8)]
    for message in sent:
        sender.send(message)
    link, received = Link(pair[1]), list[Message]()
    while len(received) < len(sent):
        received += link.receive()
    assert received == sent
    sender.send(StartText("after"))
    assert link.receive() == (StartText("after"),)


@pytest.mark.timeout(30)
def test_messages_keep_their_order_while_the_reader_catches_up(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sender, link, received = BufferedSender(pair[0]), Link(pair[1]), list[Message]()
    sent = [StartText(f"{number} " + "x" * 5000) for number in range(2000)]

    def read() -> None:
        while len(received) < len(sent):
            received.extend(link.receive())

    reader = threading.Thread(target=read)
    reader.start()
    for message in sent:
        sender.send(message)
    reader.join()
    assert received == sent


def test_messages_to_a_reader_that_is_gone_are_lost_without_an_error(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sender = BufferedSender(pair[0])
    pair[1].close()
    for _ in range(3):
        sender.send(StartText("x"))
