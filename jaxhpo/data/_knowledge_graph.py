"""Knowledge graphs: triples of head, relation and tail, as integers."""

from __future__ import annotations

import os
import pathlib
import reprlib
import tarfile
import warnings
import zlib
from typing import NamedTuple

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import check_count
from jaxhpo.data._download import fetch

ADDRESS = "https://github.com/TimDettmers/ConvE/raw/master/"
ARCHIVES = {
    "nations": ("nations.tar.gz", "feb3e3e027103089934ea7dfb67d2048d8a43e65d6757a86f2e037acb66f640b"),
    "umls": ("umls.tar.gz", "26223aa91f0ec8db2324e0f489b9a4425e04d1d0df72ce5cfd62af4b91aee6fd"),
    "kinships": ("kinship.tar.gz", "a3cb9ca67213eb38133aebc12901195e283d844ebd59f1a6cbf2d4fa12ced4e6"),
    "wn18rr": ("WN18RR.tar.gz", "1eb9152f804c140d163462c0d49f65e5a0b30ab5fbb375c5e3353c11a6249060"),
    "fb15k-237": ("FB15k-237.tar.gz", "311df7930f842a02979eaa7a802484a6afe62303c07f915f1e6edbc30cbe05e8"),
}
FILES = ("train.txt", "valid.txt", "test.txt")


class KnowledgeGraph(NamedTuple):
    """Triples (subject, relation, object) in three parts. `entities[i]` is the name of entity i.

    Attributes:
      train: int32 (n, 3), what is trained on.
      validation: likewise, what hyperparameters are chosen by.
      test: likewise, what is looked at once, at the end.
      entities: names, in the order in which the three files hold them: those that train lacks come last.
      relations: likewise.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    entities: tuple[str, ...]
    relations: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of entities and of relations."""
        return len(self.entities), len(self.relations)

    @property
    def known(self) -> np.ndarray:
        """Triples of train and validation: what a masked validation loss leaves out."""
        return np.concatenate([self.train, self.validation])

    @property
    def triples(self) -> np.ndarray:
        """Triples of all parts: what filtered ranks leave out."""
        return np.concatenate([self.known, self.test])

    def halves(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint random halves of the validation triples: to tune by, and to report (one more, if odd)."""
        check_count("seed", seed, 0)
        order = np.random.default_rng(seed).permutation(len(self.validation))
        middle = len(order) // 2
        return self.validation[order[:middle]], self.validation[order[middle:]]


def knowledge_graph(source: str | os.PathLike) -> KnowledgeGraph:
    """A knowledge graph by its name, or from a folder of `train.txt`, `valid.txt` and `test.txt`.

    A line is a triple: head, relation and tail, separated by tabs, in UTF-8; lines may end in CRLF. A named graph is
    read from `<JAXHPO_DATA_DIR>/kg/<archive>` where that environment variable is set and the file exists; else
    downloaded once (at most 4 MB), into pooch's cache. Its sha256 is verified either way.

    Warned of are, with their number and the first line: names that begin or end with a blank, which are others than
    those without; triples of the validation or test part that `train.txt` holds too.

    Triples of an entity or a relation that `train.txt` lacks are kept, and counted in a warning. Such an embedding is
    never trained towards an answer: it is ranked with the others, by what scores it has.

    Args:
      source: `"nations"` (14 entities, 55 relations, 1592 + 199 + 201 triples), `"umls"` (135, 46, 5216 + 652 + 661),
        `"kinships"` (104, 25, 8544 + 1068 + 1074), `"wn18rr"` (40 943, 11, 86 835 + 3034 + 3134), `"fb15k-237"`
        (14 541, 237, 272 115 + 17 535 + 20 466), or the path of a folder.

    Returns:
      A `KnowledgeGraph`.

    Raises:
      ImportError: a file must be downloaded, and pooch is not installed.
      JaxhpoError: no such name or folder, a missing or damaged file, a malformed line (with file and line), no triples.

    Example:
      >>> from jaxhpo.data import knowledge_graph
      >>> graph = knowledge_graph("nations")  # doctest: +SKIP
      >>> graph.sizes, graph.train.shape  # doctest: +SKIP
      ((14, 55), (1592, 3))

    References:
      Kok, Domingos. Statistical Predicate Invention. 2007.
      Dettmers, Minervini, Stenetorp, Riedel. Convolutional 2D Knowledge Graph Embeddings. 2018. arXiv:1707.01476
    """
    parts = _from_archive(source) if isinstance(source, str) and source in ARCHIVES else _from_folder(source)
    triples = [_parse(*part) for part in parts]
    entities = dict.fromkeys(name for part in triples for s, _, o in part for name in (s, o))
    relations = dict.fromkeys(p for part in triples for _, p, _ in part)
    entity, relation = ({name: i for i, name in enumerate(names)} for names in (entities, relations))
    train, validation, test = (
        np.array([(entity[s], relation[p], entity[o]) for s, p, o in part], np.int32) for part in triples
    )
    for (path, _), named in zip(parts, triples, strict=True):
        _warn_of_blanks(path, named)
    trained = set(map(tuple, triples[0]))
    for (path, _), part, named in zip(parts[1:], (validation, test), triples[1:], strict=True):
        _warn_of_unseen(path, part, train, list(entities), list(relations))
        _warn_of_shared(path, named, trained)
    return KnowledgeGraph(train, validation, test, tuple(entities), tuple(relations))


def _from_archive(name) -> list[tuple[str, bytes]]:
    """Name and content of each of the three files."""
    file, sha256 = ARCHIVES[name]
    path = fetch("kg", file, ADDRESS + file, sha256)
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = {pathlib.PurePath(m.name).name: m for m in archive if m.isfile()}
            contents = [(f, archive.extractfile(members[f])) for f in FILES if f in members]
            parts = [(f"{path}:{f}", stream.read()) for f, stream in contents if stream]
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise JaxhpoError(f"{path} is no gzipped tar archive, or incomplete ({error}): download it again.") from error
    if len(parts) < len(FILES):
        raise JaxhpoError(f"{path} holds {sorted(members)}, but {', '.join(FILES)} are needed: take it from {ADDRESS}.")
    return parts


def _from_folder(source) -> list[tuple[str, bytes]]:
    try:
        folder = pathlib.Path(source)
    except TypeError:
        raise JaxhpoError(f"`source` got {source!r}, which is neither of {list(ARCHIVES)} nor a path.") from None
    if not str(source) or not _is_folder(folder):
        raise JaxhpoError(
            f"`source` got {reprlib.repr(str(source))}, which is no folder and none of the known graphs: write one of "
            f"{list(ARCHIVES)}, or the path of a folder that holds {', '.join(FILES)}."
        )
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing:
        raise JaxhpoError(
            f"The folder {folder} lacks {', '.join(missing)}, and all of {', '.join(FILES)} are needed: a triple a "
            "line, head, relation and tail separated by tabs."
        )
    return [(str(folder / f), (folder / f).read_bytes()) for f in FILES]


def _is_folder(path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long for a file
        return False


def _parse(path, content) -> list[list[str]]:
    """The triples of names in a file."""
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JaxhpoError(f"{path}:{line} is not UTF-8 ({error}): save the file in that encoding.") from error
    # Not `splitlines`, which also splits at characters that a name may hold.
    triples = [line.removesuffix("\r").split("\t") for line in (lines[:-1] if lines[-1] == "" else lines)]
    bad = [i for i, fields in enumerate(triples) if len(fields) != 3 or not all(map(str.strip, fields))]
    if bad:
        more = f" (so are {len(bad) - 1} more lines)" if bad[1:] else ""
        raise JaxhpoError(
            f"{path}:{bad[0] + 1} is malformed{more}: {reprlib.repr(lines[bad[0]])} is not three names, head, relation "
            "and tail, separated by tabs. Mend or remove the line."
        )
    if not triples:
        raise JaxhpoError(f"{path} is empty, but each part needs triples: move some of the other parts' lines there.")
    return triples


def _warn_of_unseen(path, part, train, entities, relations):
    seen = [np.isin(part[:, [0, 2]], train[:, [0, 2]]), np.isin(part[:, 1:2], train[:, 1])]
    unseen = ~np.concatenate(seen, axis=1)
    rows = np.flatnonzero(unseen.any(1))
    if rows.size:
        s, p, o = part[rows[0]]
        column = int(np.argmax(unseen[rows[0]]))
        what, name = [("entity", entities[s]), ("entity", entities[o]), ("relation", relations[p])][column]
        warnings.warn(
            f"{path}: {rows.size} of {len(part)} triples hold an entity or a relation that train.txt lacks, the "
            f"first at line {rows[0] + 1} ({what} {reprlib.repr(name)}). They are kept, and ranked with embeddings "
            "that were never trained to be an answer.",
            stacklevel=3,
        )


def _warn_of_blanks(path, triples):
    lines = [i for i, names in enumerate(triples) if any(name != name.strip() for name in names)]
    if lines:
        warnings.warn(
            f"{path}: {len(lines)} lines hold names that begin or end with a blank, the first is line {lines[0] + 1} "
            f"({reprlib.repr(triples[lines[0]])}). They are kept so: 'a ' is another name than 'a'.",
            stacklevel=3,
        )


def _warn_of_shared(path, triples, trained):
    lines = [i for i, triple in enumerate(triples) if tuple(triple) in trained]
    if lines:
        warnings.warn(
            f"{path}: {len(lines)} of {len(triples)} triples are in train.txt too, the first is line {lines[0] + 1}. "
            "They are kept, and what is measured on them says nothing of new facts.",
            stacklevel=3,
        )
