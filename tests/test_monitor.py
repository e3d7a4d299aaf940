"""The monitor in headless Chromium: it loads and grows, filters, shows failures, escapes what it shows, and serves this machine's browser and nothing else."""
import http.client, json, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from dal_med.data.atomic import write_json
from dal_med.run.views import anchor
from tiny import run_once

pytest.importorskip('panel', reason='the monitor needs Panel: pip install "dal_med[monitor]"')
playwright = pytest.importorskip('playwright.sync_api', reason='browser tests need playwright')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='browser tests need Chromium on the path')
HOSTILE = '<img src=x onerror=hacked=1>'
ERROR = 'ValueError: budget is 0 <b>in bold</b>'


def copy_run(source: Path, dest: Path, **settings):
    "A run folder made from another, as if it had run with other settings."
    shutil.copytree(source, dest, ignore=shutil.ignore_patterns('*.safetensors', '.lock'))
    identity = json.loads((dest/'run.json').read_text())
    identity['settings'] |= settings
    write_json(dest/'run.json', identity)


def notebook(path: Path, *outputs):
    cells = [dict(cell_type='code', id='a', source='run()', metadata={}, outputs=list(outputs), execution_count=1)]
    write_json(path, dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    "Six runs of one sweep, all copies of one; beside it a secret that must not be served."
    root = tmp_path_factory.mktemp('monitor')
    run_once(root/'one', root/'.cache'/'dal_med')
    out = root/'sweep'
    for name, settings in {'entropy-seed0': {}, 'entropy-seed1': dict(seed=1), 'random-seed0': dict(strategy='random', generator='none'), HOSTILE: dict(seed=2), 'growing': dict(strategy='margin'),
                           'broken': dict(strategy='random', seed=1, generator='none')}.items(): copy_run(root/'one', out/'runs'/name, **settings)
    for name in ('entropy-seed0', 'entropy-seed1', 'random-seed0', HOSTILE):
        notebook(out/'notebooks'/f'{name}.ipynb', dict(output_type='display_data', metadata={}, data={'text/html': '<script>hacked=1</script>', 'text/plain': 'a table of <numbers>'}))
    notebook(out/'failed'/'broken.ipynb', dict(output_type='error', ename='ValueError', evalue=ERROR.split(': ')[1], traceback=[ERROR]))
    os.rename(out/'runs'/'growing'/'rounds'/'02', root/'later')
    (out/'runs'/'broken'/'progress.json').write_text('{"done": .5, "rou')
    write_json(out/'sweep.json', dict(cwd=str(root), runs={'not-begun': dict(settings=dict(strategy='coreset', generator='none', seed=0, rounds=3), dataset='phantom')}))
    (root/'secret.txt').write_text('secret')
    return out


@pytest.fixture(scope='module')
def server(sweep):
    "The command itself, on a free port."
    process = subprocess.Popen([sys.executable, '-c', 'import sys; from dal_med.run.monitor import dal_monitor; dal_monitor(sys.argv[1], port=0, no_browser=True)', str(sweep)],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    port = int(re.search(r'http://127\.0\.0\.1:(\d+)/', process.stdout.readline())[1])
    for _ in range(200):
        try: socket.create_connection(('127.0.0.1', port), .2).close(); break
        except OSError: time.sleep(.1)
    yield port
    process.send_signal(signal.SIGINT)
    process.wait(20)


@pytest.fixture(scope='module')
def page(server):
    "A laptop's screen on the monitor, with everything it asked for and complained about."
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1366, height=768))
        page.requests, page.complaints = [], []
        page.on('request', lambda r: page.requests.append(r.url))
        page.on('console', lambda m: page.complaints.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: page.complaints.append(str(e)))
        page.goto(f'http://127.0.0.1:{server}/')
        page.locator('table.runs').wait_for()
        page.get_by_text('points as a table').first.wait_for()
        yield page
        browser.close()


def rows(page): return page.locator('table.runs tbody tr')


def get(port, path, **headers):
    "A request as it stands: no library tidies the path."
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=10)
    connection.putrequest('GET', path, skip_host='Host' in headers)
    for name, value in headers.items(): connection.putheader(name.replace('_', '-'), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode('utf-8', 'replace')


def test_the_list_is_there(page):
    assert rows(page).count() == 7
    head = page.get_by_role('status').inner_text()
    assert '7 runs' in head and '1 failed' in head and '1 waiting' in head and '4 finished' in head
    assert page.get_by_text('1 files could not be read').count() == 1  # the torn progress.json
    assert rows(page).filter(has_text='broken').filter(has_text='failed').count() == 1


def test_a_name_is_text(page):
    assert page.get_by_role('link', name=HOSTILE).inner_text() == HOSTILE
    page.get_by_role('link', name=HOSTILE).click()
    playwright.expect(page.locator('tr[aria-current=true] th')).to_have_text(HOSTILE)
    assert page.evaluate('typeof hacked') == 'undefined'


def test_curve_grows_when_a_round_lands(page, sweep):
    points = lambda: int(page.get_by_text('points as a table').first.inner_text().split()[0])
    assert page.evaluate('Bokeh.documents.length') == 1
    before, labels = points(), rows(page).filter(has_text='growing').inner_text()
    os.rename(sweep.parent/'later', sweep/'runs'/'growing'/'rounds'/'02')
    playwright.expect(page.get_by_text('points as a table').first).to_contain_text(f'{before + 1} points', timeout=5000)
    assert rows(page).filter(has_text='growing').inner_text() != labels


def test_filter(page):
    page.get_by_label('Strategy').select_option('random')
    playwright.expect(rows(page)).to_have_count(2)
    page.get_by_label('Strategy').select_option('all')
    page.get_by_label('Name contains').fill('seed1')
    page.get_by_label('Name contains').press('Enter')
    playwright.expect(rows(page)).to_have_count(1)
    page.get_by_label('Name contains').fill('')
    page.get_by_label('Name contains').press('Enter')
    playwright.expect(rows(page)).to_have_count(7)


def test_failed_run_shows_its_error(page):
    page.get_by_label('Run', exact=True).select_option('broken')
    block = page.get_by_role('alert')
    playwright.expect(block).to_contain_text(ERROR)
    assert 'Cell 1: run()' in block.inner_text()


def test_keyboard_reaches_and_chooses_a_run(page):
    link = page.get_by_role('link', name='entropy-seed1')
    link.focus()
    page.keyboard.press('Enter')
    playwright.expect(page.locator('tr[aria-current=true] th')).to_have_text('entropy-seed1')
    page.wait_for_timeout(400)  # the list was redrawn under it
    assert page.evaluate('(() => { let e = document.activeElement; while (e && e.shadowRoot) e = e.shadowRoot.activeElement; return e && e.getAttribute("href"); })()') == f'#{anchor("entropy-seed1")}'
    playwright.expect(page.get_by_text('What was queried: round 2')).to_be_visible()
    assert page.locator('figure img[alt]').count() > 12


def test_executed_notebook_is_a_still_page(page, server):
    with page.context.expect_page() as opened: page.get_by_role('link', name='executed notebook').click()
    still = opened.value
    assert 'a table of <numbers>' in still.inner_text('body')
    assert still.locator('script').count() == 0
    still.close()
    assert get(server, '/notebook/broken')[0] == 200 and 'ValueError' in get(server, '/notebook/broken')[1]


def test_nothing_else_is_served(server, sweep):
    for path in ('/notebook/../../secret.txt', '/notebook/..%2f..%2fsecret.txt', '/notebook/%2e%2e/%2e%2e/secret.txt', f'/notebook/{sweep.parent}/secret.txt', '/notebook/not-begun', '/notebook/',
                 '/static/../../../../../../../../etc/passwd', '/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd', '/static/extensions/panel/../../../../../../etc/passwd',
                 '/components/dal_med.run.monitor/Page/_css/x', '/sweep.json', '/runs/broken/run.json', '/../secret.txt', '/%2e%2e/secret.txt'):
        status, body = get(server, path)
        assert status in (403, 404), f'{path}: {status}'
        assert 'secret' not in body.replace('secret.txt', '') and 'root:' not in body


def test_this_machine_only(server):
    listening = [l.split()[1] for name in ('tcp', 'tcp6') for l in Path(f'/proc/net/{name}').read_text().splitlines()[1:] if l.split()[3] == '0A']
    assert [a for a in listening if a.endswith(f':{server:04X}')] == [f'0100007F:{server:04X}']
    upgrade = dict(Upgrade='websocket', Connection='Upgrade', Sec_WebSocket_Key='dGhlIHNhbXBsZSBub25jZQ==', Sec_WebSocket_Version='13')
    assert get(server, '/ws', Origin='http://evil.example', **upgrade)[0] == 403
    assert get(server, '/notebook/broken', Host='evil.example')[0] == 403  # a name that was made to point here


def test_no_complaint_and_no_request_elsewhere(page, server):
    assert page.complaints == []
    assert {r.split('/')[2] for r in page.requests if r.startswith(('http', 'ws'))} == {f'127.0.0.1:{server}'}
    assert all(r.startswith((f'http://127.0.0.1:{server}/', f'ws://127.0.0.1:{server}/', f'blob:http://127.0.0.1:{server}/', 'data:')) for r in page.requests)


def test_without_panel_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['panel'] = None; from dal_med.run.monitor import dal_monitor; dal_monitor(sys.argv[1])"
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "dal_med[monitor]"' in done.stderr and 'Traceback' not in done.stderr
