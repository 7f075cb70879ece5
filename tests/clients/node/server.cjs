// A WebSocket server as Node applications have it: server.cjs ADDRESS PORT. Sends each message back; prints "ready".

const { WebSocketServer } = require("ws");

const [host, port] = process.argv.slice(2);
// It would compress, if it were asked to.
const server = new WebSocketServer({ host, port: Number(port), perMessageDeflate: true });
server.on("connection", (socket) => socket.on("message", (data, binary) => socket.send(data, { binary })));
server.on("listening", () => console.log("ready"));
