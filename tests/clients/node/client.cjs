// A WebSocket client as Node applications have it: client.cjs WHAT URL [COUNT]. Prints what came of it as one line of JSON.

const assert = require("node:assert");
const { once } = require("node:events");
const WebSocket = require("ws");

// Longest that anything here takes that is answered at all, and how long a connection may go unanswered before it counts as
// refused, in milliseconds.
const PATIENCE = 10_000;
const UNANSWERED = 2_000;

async function open(url) {
    const socket = new WebSocket(url, { handshakeTimeout: UNANSWERED });
    await once(socket, "open");
    return socket;
}

async function echo(socket, message) {
    const answered = once(socket, "message");
    socket.send(message);
    const [answer, isBinary] = await answered;
    assert.strictEqual(isBinary, typeof message !== "string");
    assert.ok(Buffer.from(message).equals(answer));
}

async function converse(url) {
    const socket = await open(url);
    for (const message of ["", "h\u00e9llo \u{1f600}", "x".repeat(60_000), Buffer.alloc(0), Buffer.alloc(51_200, 7)]) {
        await echo(socket, message);
    }
    const answered = once(socket, "message");
    const ponged = once(socket, "pong");
    socket.send("in ", { fin: false });
    socket.ping("are you there?");
    socket.send("three ", { fin: false });
    socket.send("fragments");
    assert.strictEqual((await answered)[0].toString(), "in three fragments");
    assert.strictEqual((await ponged)[0].toString(), "are you there?");
    const closed = once(socket, "close");
    socket.close(4000, "bye");
    const [code, reason] = await closed;
    assert.deepStrictEqual([code, reason.toString()], [4000, "bye"]);
    return { converse: "ok" };
}

async function oversize(url) {
    const socket = await open(url);
    // It may find the connection closed while it sends.
    socket.on("error", () => {});
    const closed = once(socket, "close");
    socket.send("x".repeat(70_000));
    return { code: (await closed)[0] };
}

async function crowd(url, count) {
    const tried = await Promise.allSettled(Array.from({ length: Number(count) }, () => open(url)));
    const sockets = tried.filter((one) => one.status === "fulfilled").map((one) => one.value);
    await Promise.all(sockets.map((socket) => echo(socket, "hello")));
    await Promise.all(
        sockets.map((socket) => {
            const closed = once(socket, "close");
            socket.close();
            return closed;
        }),
    );
    return { open: sockets.length };
}

const [what, ...rest] = process.argv.slice(2);
setTimeout(() => {
    console.error(`no end after ${PATIENCE} ms`);
    process.exit(1);
}, PATIENCE).unref();
({ converse, oversize, crowd })[what](...rest).then((outcome) => {
    console.log(JSON.stringify(outcome));
    process.exit(0);
});
