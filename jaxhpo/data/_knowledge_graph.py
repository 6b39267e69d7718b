"""Knowledge graphs as integer triples of head, relation and tail."""

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
KEPT = "They are kept, but"


class KnowledgeGraph(NamedTuple):
    """Triples (subject, relation, object) in three parts. `entities[i]` is the name of entity i.

    Attributes:
      train: int32 (n, 3), for training.
      validation: int32 (n, 3), for choosing hyperparameters.
      test: int32 (n, 3), for one final evaluation.
      entities: names, in the order of their first occurrence in the three files: those missing in train come last.
      relations: likewise.

    Example:
      >>> from jaxhpo.data import KnowledgeGraph
      >>> train, validation, test = np.array([[0, 0, 1], [1, 0, 2]]), np.array([[0, 1, 2]]), np.array([[2, 1, 0]])
      >>> graph = KnowledgeGraph(train, validation, test, ("Ann", "Bob", "Eve"), ("knows", "likes"))
      >>> graph.sizes, len(graph.known), [graph.entities[i] for i in graph.train[:, 0]]
      ((3, 2), 3, ['Ann', 'Bob'])
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
        """Triples of train and validation, which a masked validation loss leaves out."""
        return np.concatenate([self.train, self.validation])

    @property
    def triples(self) -> np.ndarray:
        """Triples of all parts, which filtered ranks leave out."""
        return np.concatenate([self.known, self.test])

    def halves(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint random halves of the validation triples, to tune by and to report (one more, if odd)."""
        check_count("seed", seed, 0)
        order = np.random.default_rng(seed).permutation(len(self.validation))
        middle = len(order) // 2
        return self.validation[order[:middle]], self.validation[order[middle:]]


def knowledge_graph(source: str | os.PathLike) -> KnowledgeGraph:
    r"""Read a knowledge graph by its name, or from a folder of `train.txt`, `valid.txt` and `test.txt`.

    Each line is a triple: head, relation and tail, separated by tabs, in UTF-8; lines may end in CRLF. A named graph is
    read from `<JAXHPO_DATA_DIR>/kg/<archive>` if that environment variable is set and the file exists. Otherwise it is
    downloaded once (at most 4 MB), into pooch's cache. Its sha256 is verified either way.

    A triple that stands in a part twice is read once, with a warning. It keeps the following triples, and warns with
    their number and the first line:

    - names that begin or end with a blank, which differ from those without;
    - triples of the validation or test part that `train.txt` also contains, and of the test part that `valid.txt` does;
    - triples with an entity or a relation that `train.txt` lacks. Such an embedding is never trained towards an answer,
      and is ranked with the others by the scores it has.

    Args:
      source: `"nations"` (14 entities, 55 relations, 1592 + 199 + 201 triples), `"umls"` (135, 46, 5216 + 652 + 661),
        `"kinships"` (104, 25, 8544 + 1068 + 1074), `"wn18rr"` (40 943, 11, 86 835 + 3034 + 3134), `"fb15k-237"`
        (14 541, 237, 272 115 + 17 535 + 20 466), or the path of a folder.

    Returns:
      A `KnowledgeGraph`.

    Raises:
      ImportError: a file must be downloaded, and pooch is not installed.
      JaxhpoError: an unknown name or folder, a missing or damaged file, a malformed line (with file and line), a part
        without triples.

    Example:
      >>> from jaxhpo.data import knowledge_graph
      >>> graph = knowledge_graph("nations")  # doctest: +SKIP
      >>> graph.sizes, graph.train.shape  # doctest: +SKIP
      ((14, 55), (1592, 3))
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for name, line in {"train": "Ann\tknows\tBob", "valid": "Bob\tknows\tAnn", "test": "Bob\tknows\tBob"}.items():
      ...     _ = (folder / f"{name}.txt").write_text(line)
      >>> graph = knowledge_graph(folder)
      >>> graph.entities, graph.validation.tolist()
      (('Ann', 'Bob'), [[1, 0, 0]])

    References:
      Kok, Domingos. Statistical Predicate Invention. 2007.
      Dettmers, Minervini, Stenetorp, Riedel. Convolutional 2D Knowledge Graph Embeddings. 2018. arXiv:1707.01476
    """
    files = _from_archive(source) if isinstance(source, str) and source in ARCHIVES else _from_folder(source)
    missing = [name for name in FILES if name not in files]
    if missing:
        raise JaxhpoError(
            f"The graph {source} lacks {', '.join(missing)}: add it, one head, relation and tail a line, between tabs."
        )
    parts = {path: _parse(path, content) for path, content in (files[name] for name in FILES)}
    _warn_of_suspicious(parts)
    parts = {path: list(dict.fromkeys(part)) for path, part in parts.items()}
    triples = [triple for part in parts.values() for triple in part]
    entities = {name: i for i, name in enumerate(dict.fromkeys(name for s, _, o in triples for name in (s, o)))}
    relations = {name: i for i, name in enumerate(dict.fromkeys(p for _, p, _ in triples))}
    train, validation, test = (
        np.array([(entities[s], relations[p], entities[o]) for s, p, o in part], np.int32) for part in parts.values()
    )
    return KnowledgeGraph(train, validation, test, tuple(entities), tuple(relations))


def _from_archive(name) -> dict[str, tuple[str, bytes]]:
    """Path and content of each file, by its name."""
    file, sha256 = ARCHIVES[name]
    path = fetch("kg", file, ADDRESS + file, sha256)
    try:
        with tarfile.open(path, "r:gz") as archive:
            streams = {pathlib.PurePath(m.name).name: archive.extractfile(m) for m in archive if m.isfile()}
            return {name: (f"{path}:{name}", stream.read()) for name, stream in streams.items() if stream}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise JaxhpoError(f"{path} is not a complete gzipped tar archive ({error}): download it again.") from error


def _from_folder(source) -> dict[str, tuple[str, bytes]]:
    """Path and content of each file, by its name."""
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        raise JaxhpoError(
            f"`source` got {reprlib.repr(source)}, which is neither a folder nor a known graph: write one of "
            f"{list(ARCHIVES)}, or the path of a folder that holds {', '.join(FILES)}."
        )
    paths = [path for path in (pathlib.Path(source, name) for name in FILES) if path.is_file()]
    return {path.name: (str(path), path.read_bytes()) for path in paths}


def _parse(path, content) -> list[tuple[str, ...]]:
    """The triples of names in a file."""
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JaxhpoError(f"{path}:{line} is not UTF-8 ({error}): save the file in that encoding.") from error
    # Not `splitlines`, which also splits at characters that a name may hold.
    triples = [tuple(line.removesuffix("\r").split("\t")) for line in (lines[:-1] if lines[-1] == "" else lines)]
    bad = [i for i, names in enumerate(triples) if len(names) != 3 or not all(map(str.strip, names))]
    if bad:
        more = f" (so are {len(bad) - 1} more lines)" if bad[1:] else ""
        raise JaxhpoError(
            f"{path}:{bad[0] + 1} is malformed{more}: {reprlib.repr(lines[bad[0]])} is not three names, head, relation "
            "and tail, separated by tabs. Correct or remove the line."
        )
    if not triples:
        raise JaxhpoError(f"{path} is empty, but each part needs triples: move some lines of the other parts there.")
    return triples


def _warn_of_suspicious(parts) -> None:
    """Warn of triples that stand twice, in a part or in two, of blanks around names, and of names that train lacks."""
    first, second, third = parts
    lines = {path: {triple: i for i, triple in reversed([*enumerate(part, 1)])} for path, part in parts.items()}
    trained_names = {name for triple in lines[first] for name in _names(triple)}

    def repeated(path, line, triple):
        return [reprlib.repr(triple)] if lines[path][triple] < line else []

    def blanks(path, line, triple):
        return [reprlib.repr(name) for name in triple if name != name.strip()]

    def untrained(path, line, triple):
        return [f"{kind} {reprlib.repr(name)}" for kind, name in _names(triple) if (kind, name) not in trained_names]

    def in_train(path, line, triple):
        return [reprlib.repr(triple)] if triple in lines[first] else []

    def in_validation(path, line, triple):
        return [reprlib.repr(triple)] if triple in lines[second] else []

    for paths, find, problem, consequence in (
        (parts, repeated, "stand there before", "Each is read once, so that no mean counts it twice"),
        (parts, blanks, "hold names that begin or end with a blank", f"{KEPT} 'a ' and 'a' are different names"),
        ((second, third), untrained, "hold a name that train.txt lacks", f"{KEPT} its embedding is ranked untrained"),
        ((second, third), in_train, "are in train.txt too", f"{KEPT} what is measured there says nothing of new facts"),
        ((third,), in_validation, "are in valid.txt too", f"{KEPT} the hyperparameters have been chosen by them"),
    ):
        for path in paths:
            triples = enumerate(parts[path], 1)
            found = [(line, culprits[0]) for line, triple in triples if (culprits := find(path, line, triple))]
            if found:
                line, culprit = found[0]
                warnings.warn(
                    f"{path}: {len(found)} of {len(parts[path])} triples {problem}, the first at line {line} "
                    f"({culprit}). {consequence}.",
                    stacklevel=3,
                )


def _names(triple):
    s, p, o = triple
    return ("entity", s), ("entity", o), ("relation", p)
