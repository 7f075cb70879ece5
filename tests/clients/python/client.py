"""A WebSocket client as Python applications have it: client.py WHAT URL [COUNT]. Prints what came of it as one line of JSON."""

import asyncio
import json
import sys

import websockets

# Longest that anything here takes that is answered at all.
PATIENCE = 10
# How long a connection may go unanswered before it counts as refused.
UNANSWERED = 2


async def converse(url):
    async with websockets.connect(url) as socket:
        for message in ["", "h\u00e9llo \U0001f600", "x" * 60_000, b"", bytes(range(256)) * 200]:
            await socket.send(message)
            assert await socket.recv() == message, message[:20]
        await socket.send(["in ", "three ", "fragments"])
        assert await socket.recv() == "in three fragments"
        await (await socket.ping(b"are you there?"))
        await socket.close(4000, "bye")
        assert (socket.close_code, socket.close_reason) == (4000, "bye"), (socket.close_code, socket.close_reason)
    return {"converse": "ok"}


async def oversize(url):
    async with websockets.connect(url) as socket:
        await socket.send("x" * 70_000)
        try:
            await socket.recv()
        except websockets.ConnectionClosed as closed:
            return {"code": closed.rcvd.code}
    return {"code": None}


async def crowd(url, count):
    async def one():
        try:
            return await websockets.connect(url, open_timeout=UNANSWERED)
        except (TimeoutError, OSError, websockets.InvalidHandshake):
            return None

    sockets = [socket for socket in await asyncio.gather(*(one() for _ in range(int(count)))) if socket]
    for socket in sockets:
        await socket.send("hello")
        assert await socket.recv() == "hello"
    await asyncio.gather(*(socket.close() for socket in sockets))
    return {"open": len(sockets)}


async def main(what, *arguments):
    doing = {"converse": converse, "oversize": oversize, "crowd": crowd}[what]
    print(json.dumps(await asyncio.wait_for(doing(*arguments), PATIENCE)))


asyncio.run(main(*sys.argv[1:]))
