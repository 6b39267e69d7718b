"""Checks every link and anchor of the built site that leads within it: python docs/links.py [docs/_build/html]."""

import html.parser
import pathlib
import sys
import urllib.parse


class Page(html.parser.HTMLParser):
    """Links and anchors of a page.

    Args:
      text: the page.
    """

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Collects them."""
        given = dict(attributes)
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}


def broken(site: pathlib.Path) -> tuple[list[str], int]:
    """The links that lead nowhere, and the number of all that were followed."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    found, count = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            anchor = urllib.parse.unquote(parts.fragment)
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found, count


def main() -> int:
    """Print them, and return 1 where there are any."""
    site = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "_build" / "html")
    found, count = broken(site)
    print(*found, f"{count} links within the site, {len(found)} broken", sep="\n")
    return int(bool(found) or count == 0)


if __name__ == "__main__":
    raise SystemExit(main())
