"""A WebSocket server as Python applications have it: server.py ADDRESS PORT. Sends each message back; prints "ready"."""

import asyncio
import sys

import websockets


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def main(address, port):
    async with websockets.serve(echo, address, int(port)):
        print("ready", flush=True)
        await asyncio.Future()


asyncio.run(main(*sys.argv[1:]))
