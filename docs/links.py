"""Checks every link and anchor of the built site that leads within it: python docs/links.py [docs/_build/html]."""

import argparse
import html.parser
import pathlib
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
    pages = {path.resolve(): Page(path.read_text("utf-8", errors="replace")) for path in site.rglob("*.html")}
    found, count = [], 0
    for path, page in pages.items():
        for link in page.links:
            try:
                parts = urllib.parse.urlsplit(link)
            except ValueError:  # no address at all
                found.append(f"{path.relative_to(site.resolve())}: {link}")
                continue
            if parts.scheme or parts.netloc:
                continue
            count += 1
            if link in ("#", "#top"):  # HTML's names of a page's top
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            anchor = urllib.parse.unquote(parts.fragment)
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found, count


def main() -> int:
    """Print them, and return 1 where there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    built = pathlib.Path(__file__).parent / "_build" / "html"
    parser.add_argument("site", nargs="?", type=pathlib.Path, default=built, help="folder of pages")
    site = parser.parse_args().site
    if not site.is_dir():
        parser.error(f"`{site}` is not a folder: build the site first, `python -m sphinx -b html docs {built}`")
    found, count = broken(site)
    print(*found, f"{count} links within the site, {len(found)} broken", sep="\n")
    return int(bool(found) or count == 0)


if __name__ == "__main__":
    raise SystemExit(main())
