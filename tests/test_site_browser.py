"The built site in a real browser: read, searched and followed from the disk and from a server, in light and in dark."
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SITE = Path(__file__).resolve().parent.parent/'_docs'
FLAGS = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,900'''.split()


def first_of(*names: str) -> str | None: return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    binary, driver = first_of('chromium', 'chromium-browser', 'google-chrome'), first_of('chromedriver')
    if not driver:
        pytest.fail('no chromedriver: scripts/install_browser.sh says how to get one')
    options = webdriver.ChromeOptions()
    if binary:
        options.binary_location = binary
    for flag in [*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("profile")}']:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope='module')
def server():
    "The site at an address, as Pages would serve it."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


@pytest.fixture(params=['disk', 'server'])
def home(request):
    assert (SITE/'index.html').exists(), 'the site is not built: make docs'
    return SITE.as_uri() if request.param == 'disk' else request.getfixturevalue('server')


def wait(browser, condition): return WebDriverWait(browser, 10).until(condition)


def luminance(browser) -> float:
    "How light the page's ground is, 0 to 255."
    colour = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    return sum(map(int, colour[colour.index('(') + 1:-1].split(',')[:3]))/3


def test_search_finds_a_name_and_leads_to_it(browser, home):
    browser.get(f'{home}/index.html')
    wait(browser, lambda b: b.find_element(By.CSS_SELECTOR, '.smalldocs-search input')).send_keys('atomic_write')
    hits = wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, '.search-result'))
    assert any('atomic_write' in h.text for h in hits)
    target = hits[0].get_attribute('href')
    hits[0].click()
    wait(browser, lambda b: b.current_url == target)
    assert 'atomic_write' in browser.find_element(By.TAG_NAME, 'main').text
    anchor = target.partition('#')[2]
    assert not anchor or browser.execute_script('return document.getElementById(arguments[0]) !== null', anchor)


def test_pages_load_without_errors_and_fit_a_phone(browser, home):
    "All of them from a server; from the disk, where only the paths between folders differ, one of each folder."
    pages = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html'))
    if home.startswith('file:'):
        pages = [*{Path(page).parent: page for page in pages}.values()]
    browser.set_window_size(500, 900)
    try:
        for page in pages:
            browser.get(f'{home}/{page}')
            assert browser.find_element(By.TAG_NAME, 'main').text.strip(), f'{page} is empty'
            wide, window = browser.execute_script('return [document.documentElement.scrollWidth, window.innerWidth]')
            assert wide <= window, f'{page}: {wide} > {window}'
    finally:
        browser.set_window_size(1300, 900)
    errors = [e for e in browser.get_log('browser') if e['level'] == 'SEVERE']
    assert pages and not errors, errors


def test_light_and_dark(browser, home):
    browser.get(f'{home}/index.html')
    browser.execute_script('localStorage.clear()')
    browser.refresh()
    assert luminance(browser) > 200
    browser.find_element(By.CSS_SELECTOR, '.quarto-color-scheme-toggle').click()
    wait(browser, lambda b: luminance(b) < 60)
    browser.refresh()
    assert luminance(browser) < 60, 'the choice is forgotten'
    browser.execute_script('localStorage.clear()')
