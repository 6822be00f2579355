"""An object store for the tests, as far as nbdkit's S3 plugin asks one: objects in memory, any
signature is good, and every request takes some milliseconds.

usage: s3_server.py PORT-FILE MILLISECONDS

Writes the port that it listens at on 127.0.0.1 into PORT-FILE. GET of /-/counts tells what it was
asked for so far, as JSON: objects (those that there are now), puts, gets, deletes, put_bytes and
got_bytes.
"""

import collections
import http.server
import json
import os
import re
import sys
import threading
import time
import urllib.parse
import xml.etree.ElementTree
from xml.sax.saxutils import escape

MOST_LISTED = 1000


class Store:
    """The objects, by bucket and key. Thread safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._objects = {}
        self._counts = collections.Counter(puts=0, gets=0, deletes=0, put_bytes=0, got_bytes=0)

    def put(self, key, data):
        with self._lock:
            self._objects[key] = data
            self._counts.update(puts=1, put_bytes=len(data))

    def get(self, key):
        """None where there is none."""
        with self._lock:
            self._counts.update(gets=1)
            return self._objects.get(key)

    def sent(self, size):
        with self._lock:
            self._counts.update(got_bytes=size)

    def delete(self, keys):
        with self._lock:
            self._counts.update(deletes=1)
            for key in keys:
                self._objects.pop(key, None)

    def sizes(self, bucket, prefix, after):
        """The keys that begin so and come after that one, with the sizes of their objects."""
        begin = f"/{bucket}/"
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(begin + prefix))
            return [(key[len(begin):], len(self._objects[key])) for key in keys
                    if key[len(begin):] > after]

    def counts(self):
        with self._lock:
            return {"objects": len(self._objects), **self._counts}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, delay):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = Store()
        self.delay = delay


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet, and not one for each line of its header

    def log_message(self, *arguments):
        pass

    def handle_expect_100(self):
        # The client waits a second for this before it sends what it wants to put.
        answered = super().handle_expect_100()
        self.wfile.flush()
        return answered

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def answer_xml(self, status, text):
        self.answer(status, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode(),
                    Content_Type="application/xml")

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def work(self):
        """What a store far away takes for any request."""
        time.sleep(self.server.delay)

    def do_PUT(self):
        data = self.body()
        self.work()
        self.server.store.put(self.path, data)
        self.answer(200, ETag='"0"')

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/-/counts":
            self.answer(200, json.dumps(self.server.store.counts()).encode())
            return
        self.work()
        query = urllib.parse.parse_qs(url.query)
        if "list-type" in query:
            self.list_objects(url.path.strip("/"), query)
            return
        data = self.server.store.get(self.path)
        if data is None:
            self.answer_xml(404, "<Error><Code>NoSuchKey</Code></Error>")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.server.store.sent(len(data))
            self.answer(200, data)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.server.store.sent(last + 1 - first)
        self.answer(206, data[first:last + 1],
                    Content_Range=f"bytes {first}-{last}/{len(data)}")

    def list_objects(self, bucket, query):
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        found = self.server.store.sizes(bucket, prefix, after)
        listed = found[:MOST_LISTED]
        text = "".join(f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>"
                       for key, size in listed)
        if len(found) > len(listed):
            text += (f"<NextContinuationToken>{escape(listed[-1][0])}</NextContinuationToken>"
                     "<IsTruncated>true</IsTruncated>")
        else:
            text += "<IsTruncated>false</IsTruncated>"
        self.answer_xml(200, f"<ListBucketResult>{text}</ListBucketResult>")

    def do_POST(self):
        url = urllib.parse.urlsplit(self.path)
        request = xml.etree.ElementTree.fromstring(self.body())
        self.work()
        keys = [element.text for element in request.iter() if element.tag.endswith("Key")]
        self.server.store.delete(f"/{url.path.strip('/')}/{key}" for key in keys)
        self.answer_xml(200, "<DeleteResult></DeleteResult>")


def main():
    port_file, milliseconds = sys.argv[1:]
    server = Server(int(milliseconds) / 1000)
    with open(port_file + ".new", "w", encoding="ascii") as file:
        file.write(str(server.server_address[1]))
    os.rename(port_file + ".new", port_file)
    server.serve_forever()


main()
