"""What servers, proxies and disks do to a download, and that it ends in the published bytes or in one clear error; all against a server on loopback."""
import errno
import hashlib
import io
import json
import threading
import time
import zipfile
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from dal_med.data import download as module
from dal_med.data.download import Download, download
from dal_med.data.fetch import PUBLISHED, fetch

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
SHA256 = 'sha256:' + hashlib.sha256(CONTENT).hexdigest()
FAST = dict(progress=False, pause=.01)


class Server:
    "Serves `content`; a test plants faults: `drop` (bytes after which the next answers break off), `status` (of the next answers), and switches for odd behaviour."

    def __init__(self):
        self.content, self.etag, self.modified = CONTENT, '"v1"', None
        self.drop, self.status, self.headers = [], [], {}
        self.knows_ranges = self.knows_if_range = self.says_length = True
        self.asked = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *_): pass
            def do_GET(self): outer.answer(self)

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
        self.base = f'http://127.0.0.1:{self.server.server_port}'
        self.url = f'{self.base}/file.bin'

    def answer(self, request):
        self.asked.append(dict(request.headers, path=request.path))
        request.close_connection = True
        if self.status:
            code, headers = self.status.pop(0)
            request.send_response(code)
            for name, value in {**headers, 'Content-Length': 0}.items(): request.send_header(name, str(value))
            return request.end_headers()
        start, wanted, total = 0, request.headers.get('Range'), len(self.content)
        same = request.headers.get('If-Range') in (None, self.etag, self.modified) or not self.knows_if_range
        if wanted and self.knows_ranges and same: start = int(wanted[6:-1])
        headers = dict(self.headers)
        if start >= total:
            request.send_response(416)
            headers |= {'Content-Range': f'bytes */{total}', 'Content-Length': 0}
        else:
            request.send_response(206 if start else 200)
            if start: headers['Content-Range'] = f'bytes {start}-{total - 1}/{total}'
            if self.says_length: headers['Content-Length'] = total - start
            if self.etag: headers['ETag'] = self.etag
            if self.modified: headers['Last-Modified'] = self.modified
        for name, value in headers.items(): request.send_header(name, str(value))
        request.end_headers()
        body = self.content[start:]
        if self.drop: body = body[:self.drop.pop(0)]
        try: request.wfile.write(body)
        except OSError: pass

    @property
    def ranges(self): return [a.get('Range') for a in self.asked]


@pytest.fixture
def server(monkeypatch):
    for name in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    s = Server()
    yield s
    s.server.shutdown()
    s.server.server_close()


def get(server, folder, checksum=SHA256, size=None, **options):
    return download(Download('file.bin', server.url, size, checksum), folder, **{**FAST, **options})


def left(folder): return sorted(f.name for f in folder.iterdir())


def test_dropped_connections_are_resumed(server, tmp_path):
    server.drop = [100_000, 50_000, 0]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, 'bytes=100000-', 'bytes=150000-', 'bytes=150000-'] and left(tmp_path) == ['file.bin']


def test_a_later_call_goes_on(server, tmp_path):
    server.drop = [100_000]
    with pytest.raises(ConnectionError, match='what has arrived is kept'): get(server, tmp_path, tries=1)
    assert left(tmp_path) == ['file.bin.part', 'file.bin.part.json']
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1]['Range'] == 'bytes=100000-' and server.asked[-1]['If-Range'] == '"v1"'


@pytest.mark.parametrize('knows_if_range', [True, False], ids=['honoured', 'ignored'])
def test_a_changed_file_is_fetched_anew(server, tmp_path, knows_if_range):
    "The halves of two versions are never joined, whether or not the server knows If-Range."
    server.drop, server.knows_if_range = [100_000], knows_if_range
    with pytest.raises(ConnectionError): get(server, tmp_path, checksum='', tries=1)
    server.content, server.etag = OTHER, '"v2"'
    assert get(server, tmp_path, checksum='').read_bytes() == OTHER


def test_a_changed_date_counts_where_there_is_no_etag(server, tmp_path):
    server.drop, server.etag, server.modified = [100_000], 'W/"weak"', formatdate(10**9, usegmt=True)
    with pytest.raises(ConnectionError): get(server, tmp_path, checksum='', tries=1)
    server.content, server.modified = OTHER, formatdate(10**9 + 60, usegmt=True)
    assert get(server, tmp_path, checksum='').read_bytes() == OTHER
    assert server.asked[1]['If-Range'] == formatdate(10**9, usegmt=True)


def test_without_any_mark_and_checksum_it_starts_anew(server, tmp_path):
    server.drop, server.etag = [100_000], None
    assert get(server, tmp_path, checksum='').read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_ignored_range_starts_anew(server, tmp_path):
    server.drop, server.knows_ranges = [100_000], False
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, 'bytes=100000-']


def test_a_server_that_always_breaks_off_at_the_same_byte_is_given_up(server, tmp_path):
    server.drop, server.knows_ranges = [100_000]*50, False
    with pytest.raises(ConnectionError, match='no connection after 6 tries'): get(server, tmp_path, pause=.001)
    assert len(server.asked) < 10


def test_complete_part_is_only_verified(server, tmp_path):
    "Killed between the last byte and the new name: the server answers 416."
    server.drop = [100_000]
    with pytest.raises(ConnectionError): get(server, tmp_path, tries=1)
    (tmp_path/'file.bin.part').write_bytes(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT and server.ranges[-1] == 'bytes=300000-'


def test_too_long_part_starts_anew(server, tmp_path):
    server.drop = [100_000]
    with pytest.raises(ConnectionError): get(server, tmp_path, tries=1)
    (tmp_path/'file.bin.part').write_bytes(CONTENT + b'more')
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_damaged_state_starts_anew(server, tmp_path):
    (tmp_path/'file.bin.part').write_bytes(b'?'*1000)
    (tmp_path/'file.bin.part.json').write_text('{')
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_unknown_length(server, tmp_path):
    server.says_length = False
    assert get(server, tmp_path, size=len(CONTENT)).read_bytes() == CONTENT


def test_wrong_checksum_removes_the_file(server, tmp_path):
    server.content = OTHER
    with pytest.raises(ValueError, match='has the sha256 checksum .* its publisher says .* the file was removed'): get(server, tmp_path)
    assert left(tmp_path) == []


def test_wrong_size_removes_the_file(server, tmp_path):
    with pytest.raises(ValueError, match='has 300,000 bytes, its publisher says 299,999'): get(server, tmp_path, checksum='', size=299_999)
    assert left(tmp_path) == []


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    (tmp_path/'file.bin').write_bytes(b'mine')
    with pytest.raises(FileExistsError, match='move it away'): get(server, tmp_path)
    assert (tmp_path/'file.bin').read_bytes() == b'mine' and not server.asked


def test_damaged_zip_without_checksum(server, tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z: z.writestr('a.txt', b'abcdef'*1000)
    server.content = file.getvalue().replace(b'abcdefabcdef', b'abcdefabcdeX', 1)
    with pytest.raises(ValueError, match=r'damaged zip archive \(a.txt\)'): download(Download('a.zip', server.url), tmp_path, **FAST)
    server.content = b'<html>please log in</html>'
    with pytest.raises(ValueError, match='damaged zip archive'): download(Download('a.zip', server.url), tmp_path, **FAST)
    assert left(tmp_path) == []


def test_busy_server_is_waited_for(server, tmp_path):
    server.status = [(503, {'Retry-After': 1}), (429, {}), (500, {})]
    began = time.monotonic()
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert 1 <= time.monotonic() - began < 3


def test_a_long_wait_is_left_to_the_user(server, tmp_path):
    server.status = [(429, {'Retry-After': 7200})]
    with pytest.raises(OSError, match='left alone for 120 minutes'): get(server, tmp_path)


@pytest.mark.parametrize('code, message', [(404, 'does not exist'), (403, 'refuses access'), (407, 'the proxy wants a user'), (418, 'status 418')])
def test_final_answers_are_not_repeated(server, tmp_path, code, message):
    server.status = [(code, {})]
    with pytest.raises(OSError, match=message): get(server, tmp_path)
    assert len(server.asked) == 1


def test_offline(server, tmp_path):
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ConnectionError, match='check the network, and the proxy in HTTPS_PROXY'): get(server, tmp_path, tries=2)


def test_rate_limit(server, tmp_path):
    began = time.monotonic()
    get(server, tmp_path, rate=400_000)
    assert .7 < time.monotonic() - began < 2
    with pytest.raises(ValueError, match='rate is 0'): get(server, tmp_path, rate=0)


def test_full_disk_before_and_during(server, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(module.shutil, 'disk_usage', lambda _: type('Usage', (), dict(free=1000)))
        with pytest.raises(OSError, match='GB more and the disk') as e: get(server, tmp_path)
        assert e.value.errno == errno.ENOSPC and len(server.asked) == 1
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(module.tqdm, 'update', full)
        with pytest.raises(OSError, match='is full'): get(server, tmp_path)
        assert len(server.asked) == 2
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_proxy_is_used(server, tmp_path, monkeypatch):
    "The host of the address exists nowhere, so only the proxy can have answered."
    monkeypatch.setenv('HTTP_PROXY', server.base)
    monkeypatch.setenv('http_proxy', server.base)
    got = download(Download('file.bin', 'http://archive.invalid/file.bin', None, SHA256), tmp_path, **FAST)
    assert got.read_bytes() == CONTENT and server.asked[0]['path'] == 'http://archive.invalid/file.bin'


def test_encryption_is_not_given_up(server, tmp_path, monkeypatch):
    "A redirect from https to http; planted behind `get`, as there is no certificate on loopback."
    session = module.new_session()
    plain = session.get
    monkeypatch.setattr(session, 'get', lambda url, **options: plain(server.url, **options))
    with pytest.raises(OSError, match='is not encrypted'): download(Download('file.bin', 'https://archive.invalid/file.bin'), tmp_path, session=session, **FAST)
    assert module.new_session().verify is True


def test_bar_shows_what_is_there_and_the_time_left(server, tmp_path, capsys):
    server.drop = [100_000]
    with pytest.raises(ConnectionError): get(server, tmp_path, tries=1)
    get(server, tmp_path, progress=True)
    assert '100k/300k' in (shown := capsys.readouterr().err) and '300k/300k' in shown


def test_licence_is_shown_before_anything_is_asked(server, tmp_path, capsys):
    server.status = [(404, {})]
    with pytest.raises(FileNotFoundError): fetch('isic2019', tmp_path, base_url=server.base, tries=1)
    assert 'CC BY-NC 4.0' in capsys.readouterr().out
    with pytest.raises(PermissionError, match='https://derm.cs.sfu.ca'): fetch('derm7pt', tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize('content', [b'<html>', b'[]', b'{"data": [{"label": "x"}]}', json.dumps(dict(data=[dict(label='../x', dataFile=dict(id=1))])).encode()])
def test_a_listing_that_is_none(server, tmp_path, content):
    server.content = content
    with pytest.raises(ValueError, match='by hand from'): fetch('ham10000', tmp_path, progress=False, base_url=server.base)
    assert left(tmp_path) == []


def test_every_address_is_encrypted():
    for p in PUBLISHED.values():
        for url in (p.page, p.listing, *(f.url for f in p.files)): assert not url or url.startswith('https://')
