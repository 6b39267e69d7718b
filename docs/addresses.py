"""Writes the addresses of the repository, and the version, into the files that have them: `python docs/addresses.py`.

They follow from two constants: `[tool.jaxhpo] repository` in pyproject.toml, "OWNER/NAME", empty while the repository
has no address, and `__version__` in jaxhpo/__init__.py. Without an address, links are relative, and badges and lists of
addresses are absent; after the constant is set back the files are what they were before. The links of the pages here
stay as they are: `sources.py` makes them those of the site, by the same constant.
"""

import json
import pathlib
import posixpath
import re
import tomllib

PICTURES = (".png", ".svg", ".gif", ".jpg")
# The target of a link or picture, in Markdown or HTML. Code is told by its target, which is no file.
TARGET = re.compile(r"""(\]\(|\b(?:src|href)=")([^\s)"#]+)""")
PROJECT_URLS = re.compile(r"^\[project\.urls\]\n(?:.+\n)*\n", re.MULTILINE)
COLAB = "https://colab.research.google.com"


class Addresses:
    """The files of a tree, as its constants would have them.

    Args:
      root: folder of the repository.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.project = (root / "pyproject.toml").read_text()
        read = tomllib.loads(self.project)
        self.repository = read["tool"]["jaxhpo"]["repository"]
        if self.repository and not re.fullmatch(r"[\w-]+/[\w.-]+", self.repository):
            raise SystemExit(f"[tool.jaxhpo] repository is {self.repository!r}: write 'OWNER/NAME', or ''.")
        # What the files have now was written with the address that is here.
        self.before = read["project"].get("urls", {}).get("Repository", "").removeprefix("https://github.com/")
        self.version = re.search(r'^__version__ = "(.*)"', (root / "jaxhpo/__init__.py").read_text(), re.M)[1]
        headings = dict(re.findall(r"^## \[(.+)\] - (\S+)", (root / "CHANGELOG.md").read_text(), re.M))
        if self.version not in headings:
            raise SystemExit(f"CHANGELOG.md has no heading `## [{self.version}] - DATE`, which `__version__` names.")
        self.date = headings[self.version]

    def texts(self) -> dict[pathlib.Path, str]:
        """Every file that has an address or the version, and its text."""
        root, readme = self.root, self.root / "README.md"
        found = {path: self.notebook(path) for path in sorted((root / "notebooks").glob("*.ipynb"))}
        found[readme] = self.badged(self.relinked(readme, readme.read_text()))
        found[root / "pyproject.toml"] = self.with_urls()
        found[root / "CITATION.cff"] = self.citation((root / "CITATION.cff").read_text())
        return found

    def relinked(self, page: pathlib.Path, text: str) -> str:
        """A text whose links to files of the repository are absolute where it has an address."""
        folder = page.parent.relative_to(self.root).as_posix()

        def link(match):
            before, target = match.groups()
            path = self.path_of(target) or posixpath.normpath(posixpath.join(folder, target))
            path += "/" * (target.endswith("/") and not path.endswith("/"))
            if ":" in path or not (self.root / path).exists():
                return match[0]
            if self.repository:
                return before + self.address_of(path)
            if not self.path_of(target):
                return match[0]
            return before + posixpath.relpath(path, folder) + "/" * path.endswith("/")

        return TARGET.sub(link, text)

    def path_of(self, address: str) -> str:
        """The file that an address of the time before names, or nothing."""
        on_github = re.match(rf"https://github\.com/{re.escape(self.before)}/(?:blob|tree)/main/(.+)", address)
        raw = re.match(rf"https://raw\.githubusercontent\.com/{re.escape(self.before)}/main/(.+)", address)
        found = self.before and (on_github or raw)
        return found[1] if found else ""

    def address_of(self, path: str) -> str:
        """The address of a file."""
        if path.endswith(PICTURES):
            return f"https://raw.githubusercontent.com/{self.repository}/main/{path}"
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"https://github.com/{self.repository}/{kind}/main/{path}"

    def badged(self, text: str) -> str:
        """README with its line of badges below the title."""
        tests = f"https://github.com/{self.repository}/actions/workflows/tests.yml"
        pypi = "[![PyPI](https://img.shields.io/pypi/v/jaxhpo)](https://pypi.org/project/jaxhpo)"
        pages = f"[![documentation](https://img.shields.io/badge/docs-site-blue)]({site(self.repository)})"
        badges = f"[![tests]({tests}/badge.svg)]({tests}) {pages} {pypi}"
        return with_line(text, badges if self.repository else "", r"\[!\[tests\]")

    def notebook(self, path: pathlib.Path) -> str:
        """A notebook with its badge below the title, and its links."""
        content = json.loads(path.read_text())
        badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
        badge += f"({COLAB}/github/{self.repository}/blob/main/notebooks/{path.name})"
        for i, cell in enumerate(content["cells"]):
            if cell["cell_type"] == "markdown":
                text = self.relinked(path, "".join(cell["source"]))
                text = with_line(text, badge if self.repository else "", r"\[!\[Open in Colab\]") if i == 0 else text
                cell["source"] = text.splitlines(keepends=True)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def with_urls(self) -> str:
        """pyproject.toml with its table of addresses."""
        at = f"https://github.com/{self.repository}"
        urls = {"Documentation": site(self.repository), "Repository": at, "Issues": f"{at}/issues"}
        urls["Changelog"] = f"{at}/blob/main/CHANGELOG.md"
        table = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
        before, own, after = PROJECT_URLS.sub("", self.project).partition("[project.scripts]\n")
        return before + (f"[project.urls]\n{table}\n" if self.repository else "") + own + after

    def citation(self, text: str) -> str:
        """CITATION.cff with this version, its date and the addresses."""
        text = re.sub(r"^(?:url|repository-code): .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^version: .*", f"version: {self.version}", text, flags=re.MULTILINE)
        text = re.sub(r"^date-released: .*", f"date-released: {self.date}", text, flags=re.MULTILINE)
        if self.repository:
            text += f"url: {site(self.repository)}\nrepository-code: https://github.com/{self.repository}\n"
        return text


def site(repository: str) -> str:
    """The address of the documentation, on GitHub's pages."""
    owner, _, name = repository.partition("/")
    return f"https://{owner.lower()}.github.io/{name}/"


def with_line(text: str, line: str, mark: str) -> str:
    """A text whose title has a line below it, in the place of one that begins with a mark."""
    title, _, rest = text.partition("\n")
    rest = re.sub(rf"\A\n{mark}.*\n?", "", rest)
    return "\n".join([title, "", line, rest] if line else [title, rest] if rest else [title])


def main() -> None:
    """Writes the files that differ, and prints their names."""
    root = pathlib.Path(__file__).resolve().parents[1]
    for path, text in Addresses(root).texts().items():
        if path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(root))


if __name__ == "__main__":
    main()
