"""Requests that nobody should make of the pack's routes: each gets its status and no more, and the film goes on."""

import contextlib
import json
import socket
import struct
import time
import urllib.request

import av
import pytest

SECONDS_TO_WAIT = 200
LONG = "a" * 20_000
WATCH, LIST = "/liveavatar/stream/{id}.mp4", "/liveavatar/streams"

NO_STREAM = [  # 404
    "/liveavatar/stream/nothing.mp4",
    "/liveavatar/stream/.mp4",
    "/liveavatar/stream/..mp4",
    "/liveavatar/stream/",
    "/liveavatar/stream",
    "/liveavatar/",
    "/liveavatar/stream/{id}",
    "/liveavatar/stream/{id}.mp4.live",
    "/liveavatar/stream/{id}.MP4",
    "/liveavatar/stream/{id}.mp4/",
    "/liveavatar/stream/{id}.mp4/../../../etc/passwd",
    "/liveavatar/stream/../../system_stats",
    "/liveavatar/stream/%2e%2e%2f%2e%2e%2fcomfyui.log",
    "/liveavatar/stream/..%5C..%5Ctiny_host.json.mp4",
    "/liveavatar/stream/..%2F..%2F..%2Fetc%2Fpasswd%00.mp4",
    "/liveavatar/stream/%2Fetc%2Fpasswd.mp4",
    "/liveavatar/stream/file:%2F%2F%2Fetc%2Fpasswd.mp4",
    "/liveavatar/stream/%00.mp4",
    "/liveavatar/stream/%ff%fe.mp4",
    "/liveavatar/stream/%F0%9F%8E%AC.mp4",
    "/liveavatar/stream/" + LONG[:4000] + ".mp4",
    "/liveavatar/stream/%27%3B%20DROP%20TABLE%20streams.mp4",
    "/liveavatar/stream/%3Cscript%3Ealert(1)%3C%2Fscript%3E.mp4",
    "/liveavatar/stream/__proto__.mp4",
    "/liveavatar/stream/{id}.mp4%0d%0aSet-Cookie:%20a=b",
    "/liveavatar/stream/{id}/delete",
]
WRONG_METHOD = [  # 405
    ("POST", WATCH),
    ("PUT", WATCH),
    ("DELETE", WATCH),
    ("PATCH", WATCH),
    ("TRACE", WATCH),
    ("POST", LIST),
    ("DELETE", LIST),
    ("GET", "/liveavatar/stream/{id}/stop"),
]
FROM_ELSEWHERE = [  # 403
    (WATCH, "Origin: http://elsewhere.example"),
    (WATCH, "Origin: http://127.0.0.1:1"),
    (WATCH, "Sec-Fetch-Site: cross-site"),
    ("/api" + WATCH, "Sec-Fetch-Site: cross-site"),
    (LIST, "Origin: http://elsewhere.example"),
    (LIST, "Sec-Fetch-Site: cross-site"),
]
MALFORMED = [  # 400
    f"GET /liveavatar/stream/{LONG}.mp4 HTTP/1.1\r\n\r\n",
    f"GET {LIST} HTTP/1.1\r\nX-Long: {LONG}\r\n\r\n",
    f"GET {LIST} HTTP/1.1\r\nno colon\r\n\r\n",
    f"FETCH {LIST} HTTP/1.1\r\n\r\n",
    f"GET {LIST} HTTP/9.x\r\n\r\n",
    f"GET {LIST} HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    f"GET {LIST} HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS greeting\r\n\r\n",
]
NO_RANGE = ["bytes=abc", "bytes=-1", "bytes=9-2", "bytes=0-1,5-6", "bytes=99999999999-", "frames=1-2"]  # ignored: 200
UNFINISHED = [
    "",
    "GET",
    "GET " + WATCH + " HTTP/1.1\r\nHost: ",
    "POST " + WATCH + " HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nfew",
    "GET " + WATCH + " HTTP/1.1\r\n\r\n",  # whose answer nobody reads
]


@pytest.fixture(scope="module")
def film(server):
    """The id of a film in the making."""
    name = hand_made(server, "open", node="", seconds=4, width=96, height=64)["id"]
    hand_made(server, "write", id=name, blocks=2)
    yield name
    hand_made(server, "close", id=name)


def hand_made(server, action: str, **wanted: object):
    request = urllib.request.Request(f"{server.url}/hand_made/{action}", json.dumps(wanted).encode())
    with urllib.request.urlopen(request, timeout=SECONDS_TO_WAIT) as answer:
        return json.load(answer)


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), SECONDS_TO_WAIT)


def send(server, request: str) -> tuple[int, bytes]:
    """Status and body of what comes back until the server hangs up."""
    with connect(server) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read all of it
            connection.sendall(request.encode("latin-1"))
        answer = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65_536):
                answer += data
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def ask(server, path: str, *headers: str, method: str = "GET") -> tuple[int, bytes]:
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close", *headers]
    return send(server, "\r\n".join(lines) + "\r\n\r\n")


def test_bad_requests(server, film) -> None:
    asked = [
        *((path, 404, ask(server, path.format(id=film))) for path in NO_STREAM),
        *((f"{method} {path}", 405, ask(server, path.format(id=film), method=method)) for method, path in WRONG_METHOD),
        *((f"{path} {header}", 403, ask(server, path.format(id=film), header)) for path, header in FROM_ELSEWHERE),
        *((request, 400, send(server, request)) for request in MALFORMED),
    ]
    assert {what[:80]: status for what, wanted, (status, _) in asked if status != wanted} == {}
    for what, _, (_, body) in asked:
        assert len(body) < 500, what[:80]
        for secret in (b"Traceback", b"ftyp", b"root:", film.encode(), str(server.base).encode(), b"site-packages"):
            assert secret not in body, what[:80]
    for nonsense in NO_RANGE:
        status, body = ask(server, f"/liveavatar/stream/{film}.mp4?so_far", f"Range: {nonsense}")
        assert status == 200 and b"ftyp" in body[:40]
    unharmed(server, film)


def test_unfinished_requests(server, film) -> None:
    """Five of each are left open, others cut off; meanwhile everybody else is served."""
    with contextlib.ExitStack() as opened:
        for request in UNFINISHED * 5:
            opened.enter_context(connect(server)).sendall(request.format(id=film).encode())
        for request in UNFINISHED:
            with connect(server) as cut:
                cut.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing is a reset
                cut.sendall(request.format(id=film).encode())
        unharmed(server, film)
    unharmed(server, film)


def test_no_more_viewers_than_there_is_room_for(server, film) -> None:
    path = f"/liveavatar/stream/{film}.mp4"
    with contextlib.ExitStack() as opened:
        for _ in range(65):
            viewer = opened.enter_context(connect(server))
            viewer.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            if b" 503 " in viewer.recv(64):
                break
        status, body = ask(server, path)
        assert status == 503 and b"64 viewers" in body
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while ask(server, path + "?so_far")[0] == 503:
        assert time.monotonic() < deadline, "who has gone still takes a place, though nothing is sent"
    unharmed(server, film)


def unharmed(server, film: str) -> None:
    assert ask(server, "/system_stats")[0] == 200
    (state,) = (state for state in json.loads(urllib.request.urlopen(server.url + LIST).read()) if state["id"] == film)
    assert not state["ended"]
    with urllib.request.urlopen(f"{server.url}/liveavatar/stream/{film}.mp4?so_far") as answer:
        with av.open(answer) as file:
            assert sum(1 for _ in file.decode(video=0)) > 0
    assert "live.py" not in server.log.read_text(errors="replace"), "an error of ours"
