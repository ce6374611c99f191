"""Every link of the built site leads somewhere: the file is there, the anchor is in it, a link to the source meets a
definition, and no page needs another host to be read."""
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
SOURCE = f'{get_config().git_url}/blob/{get_config().branch}/'
SITE = ROOT/'_docs'
NEEDED = {'script', 'img', 'iframe', 'source', 'video', 'link'}  # what a page loads, as opposed to what it points at


@dataclass
class Page(HTMLParser):
    "The anchors and links of one HTML file."
    anchors: set = field(default_factory=set)
    links: list = field(default_factory=list)

    def __post_init__(self): super().__init__()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [(tag, a[k]) for k in ('href', 'src') if a.get(k)]


@cache
def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding='utf-8'))
    return page


@cache
def read_lines(path: Path) -> list[str]: return path.read_text(encoding='utf-8').splitlines()


def source_fault(link: str) -> str | None:
    "What is wrong with a link into the repository."
    name, _, line = link.removeprefix(SOURCE).partition('#')
    if not (ROOT/name).is_file(): return 'the repository has no such file'
    if line and not is_definition(ROOT/name, line[1:]): return 'no definition is in this line'
    return None


def is_definition(path: Path, number: str) -> bool:
    "Whether a function or a class begins in a line, which is counted from 1."
    lines = read_lines(path)
    if not number.isdecimal() or not 0 < int(number) <= len(lines): return False
    return re.match(r'\s*(async def|def|class) ', lines[int(number) - 1]) is not None


def fault(path: Path, tag: str, link: str) -> str | None:
    "What is wrong with a link of the page at `path`, if anything."
    if link.startswith(SOURCE): return source_fault(link)
    url = urlsplit(link)
    if url.scheme or url.netloc:
        return 'the page loads this from another host' if tag in NEEDED and url.scheme != 'data' else None
    target = (path.parent/unquote(url.path)).resolve() if url.path else path
    if target.is_dir():
        target = target/'index.html'
    if SITE not in target.parents or not target.is_file(): return 'there is no such file'
    if url.fragment and target.suffix == '.html' and unquote(url.fragment) not in read_page(target).anchors:
        return f'{target.relative_to(SITE)} has no such anchor'
    return None


def check() -> tuple[int, list[str]]:
    "The number of links looked at, and a line for each that leads nowhere."
    n, faults = 0, []
    for path in sorted(SITE.rglob('*.html')):
        for tag, link in read_page(path).links:
            n += 1
            if why := fault(path, tag, link):
                faults.append(f'{path.relative_to(SITE)}: {link}: {why}')
    return n, faults


if __name__ == '__main__':
    n, faults = check()
    for line in faults:
        print(line)
    print(f'{n} links looked at, {len(faults)} broken')
    sys.exit(bool(faults) or not n)
