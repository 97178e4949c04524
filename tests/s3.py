"""An S3-compatible server on this machine, in a process of its own."""

import contextlib
import socket
import socketserver
import subprocess
import sys
import threading

# What it holds is gone with it. Parts of an upload may be small, for tests that send several.
_SERVER = """
import os, sys
os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "1"
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
SECRET = "a-secret-of-nobody-0123456789"


@contextlib.contextmanager
def s3_server():
    """The environment in which all AWS tools find the server, and nothing else."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        try:
            port = int(running.stdout.readline())
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "AKIANOBODY0123456789",
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": "/dev/null",
                "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        finally:
            running.kill()


def call(method, **arguments):
    """One request by s3fs, as tests make that look at a bucket themselves."""
    from llfast import s3

    return s3._filesystem().call_s3(method, **arguments)


def keys(url):
    """All keys beneath `s3://bucket/prefix`, without the prefix, in order."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = call("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
    return [each["Key"].removeprefix(f"{prefix}/") for each in found]


class Proxy(socketserver.ThreadingTCPServer):
    """What lies between a client and a server: it counts bytes, and breaks connections.

    Attributes:
        fetched: bytes that have come from the server.
        sent: bytes that have gone to it.
        most_fetched: connections break beyond it; None for never.
        most_sent: the same the other way.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, url):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.server = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fetched = self.sent = 0
        self.most_fetched = self.most_sent = None
        self._counting = threading.Lock()

    def passes(self, way, count):
        """Whether so many more bytes may pass."""
        with self._counting:
            setattr(self, way, getattr(self, way) + count)
            most = getattr(self, f"most_{way}")
            return most is None or getattr(self, way) <= most


class _Connection(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(self.server.server) as there:
            ways = ((self.request, there, "sent"), (there, self.request, "fetched"))
            threads = [threading.Thread(target=self.pump, args=way) for way in ways]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def pump(self, source, target, way):
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 14)) and self.server.passes(way, len(data)):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(url):
    """A proxy of the server at a URL."""
    with Proxy(url) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
