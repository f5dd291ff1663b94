"""Servers and proxies on this machine that behave as badly as a test needs."""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import contextmanager, suppress
from typing import NamedTuple

import pytest

from conditions import FOREVER_S
from outbox.failures import UploadFailure

TOKEN = "tok-123/abc+def=="

HEAD = b"HTTP/1.1 500 \r\n"
ACCEPTED = b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"


class Row(NamedTuple):
    id: int = 1
    payload_json: str = '{"a":1}'
    event_type: str = "counted"
    occurred_at_ms: int = 1_795_521_600_123

    @property
    def event_id(self) -> str:
        return f"event-{self.id}"


BATCH = [Row()]


def failure_of(client, batch=BATCH):
    with pytest.raises(UploadFailure) as caught:
        client.upload(batch)
    return caught.value


def forget_environment(monkeypatch):
    """Take away what would change where requests go and whom they trust."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


class Peer:
    """A TCP server that does `serve(connection, stopped)`; of several the n-th connection gets the n-th or the last."""

    def __init__(self, *serves):
        self.stopped = threading.Event()
        self._serves = serves
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that a large upload has to wait for the reader.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._listen)]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(FOREVER_S)
        self._listener.close()

    def wait_for_the_end(self):
        """Wait until every connection so far is closed on this side."""
        for thread in self._threads[1:]:
            thread.join(FOREVER_S)
            assert not thread.is_alive()

    def _listen(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            serve = self._serves[min(len(self._threads), len(self._serves)) - 1]
            self._threads.append(threading.Thread(target=self._run, args=(serve, connection)))
            self._threads[-1].start()

    def _run(self, serve, connection):
        with connection, suppress(OSError):
            serve(connection, self.stopped)


def read_request(connection):
    """Return the head and the body of a request."""
    received = bytearray()
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        received += piece
    # Bytes would be copied with each piece of a large body, which could outlast the deadline of an upload.
    head, _, body = received.partition(b"\r\n\r\n")
    length = int((head.lower() + b"\r\n").partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    while len(body) < length:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        body += piece
    return head.decode("latin-1"), bytes(body)


def answers(text):
    def serve(connection, stopped):
        read_request(connection)
        connection.sendall(text)

    return serve


def repeats(head, piece, every_s=0.0):
    """Answer with the head, and then with the piece again and again."""

    def serve(connection, stopped):
        read_request(connection)
        connection.sendall(head)
        while not stopped.wait(every_s):
            connection.sendall(piece)

    return serve


def drips(head, piece=b"x"):
    return repeats(head, piece, every_s=0.02)


def reset(connection):
    """End a connection in the way that the other side gets an error, not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- proxies ---


def _pump(source, sink, stopped):
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


class Proxy:
    """A proxy for plain requests and tunnels, all of which it leads to one server. `back` is the way back in a tunnel."""

    def __init__(self, target, back=_pump):
        self.heads = []
        self._target = target
        self._back = back

    def __call__(self, connection, stopped):
        head, body = read_request(connection)
        self.heads.append(head)
        with socket.create_connection(("127.0.0.1", self._target)) as onward:
            if head.startswith("CONNECT "):
                connection.sendall(b"HTTP/1.1 200 go\r\n\r\n")
                back = threading.Thread(target=self._back, args=(onward, connection, stopped))
                back.start()
                _pump(connection, onward, stopped)
                back.join()
            else:
                onward.sendall(head.encode("latin-1") + b"\r\nConnection: close\r\n\r\n" + body)
                _pump(onward, connection, stopped)


@contextmanager
def proxied(server):
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    with Peer(proxy) as peer:
        yield proxy, peer.url


# --- TLS ---


def certificate(folder, names="DNS:localhost,IP:127.0.0.1", until="20991231000000Z"):
    """Make a certificate that no authority has signed, and its key; return the one file that they are in."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    (folder / "index.txt").touch()
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca = own\n"
        "[own]\ndatabase = index.txt\nnew_certs_dir = .\nrand_serial = yes\ndefault_md = sha256\npolicy = any\n"
        "copy_extensions = copy\n"
        "[any]\ncommonName = supplied\n"
    )
    new = [openssl, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "csr.pem"]
    sign = [openssl, "ca", "-batch", "-selfsign", "-config", "ca.cnf", "-keyfile", "key.pem", "-in", "csr.pem"]
    for command in (
        [*new, "-subj", "/CN=localhost", "-addext", f"subjectAltName={names}"],
        [*sign, "-notext", "-out", "cert.pem", "-startdate", "20200101000000Z", "-enddate", until],
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


def authority(folder):
    """Make an authority, and certificates of a server and a client that it has signed; return the three files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make certificates")

    def run(*command):
        subprocess.run([openssl, *command], cwd=folder, check=True, capture_output=True)

    # Without the key's use and its authority, Python 3.13 and later refuse them.
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    new = ["req", "-newkey", "rsa:2048", "-nodes"]
    may_sign = ("-addext", "keyUsage=critical,keyCertSign")
    run(*new, "-x509", "-subj", "/CN=authority", *may_sign, "-days", "9999", "-keyout", "ca.key", "-out", "ca.crt")
    sign = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "9999"]
    for name in ("server", "client"):
        run(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        run("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.crt")
        both = (folder / f"{name}.key").read_bytes() + (folder / f"{name}.crt").read_bytes()
        (folder / f"{name}.pem").write_bytes(both)
    return folder / "ca.crt", folder / "server.pem", folder / "client.pem"


@contextmanager
def tls_peer(certificate, *serves, clients_of=None):
    """Serve over TLS. With `clients_of`, clients need a certificate that this authority has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if clients_of is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients_of)

    def over_tls(serve):
        def serve_tls(connection, stopped):
            with context.wrap_socket(connection, server_side=True) as secure:
                serve(secure, stopped)

        return serve_tls

    with Peer(*map(over_tls, serves)) as peer:
        peer.url = f"https://127.0.0.1:{peer.port}"
        yield peer
