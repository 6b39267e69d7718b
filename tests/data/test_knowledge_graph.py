"""Reading knowledge graphs from archives and folders; errors name the file and the line."""

import numpy as np
import pytest
from knowledge_graphs import TEST, TRAIN, VALID, write_archive, write_folder
from knowledge_graphs import mirror as mirror

import jaxhpo
from jaxhpo.data import knowledge_graph


def test_reads_a_folder(tmp_path):
    graph = knowledge_graph(write_folder(tmp_path))
    assert graph.entities == ("b", "a") and graph.relations == ("likes", "is") and graph.sizes == (2, 2)
    assert graph.train.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert graph.validation.tolist() == [[1, 1, 0]] and graph.test.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert all(part.dtype == np.int32 for part in graph[:3])
    assert graph.known.tolist() == graph.train.tolist() + graph.validation.tolist()
    assert graph.triples.tolist() == graph.known.tolist() + graph.test.tolist()


@pytest.mark.parametrize("inside", ["", "nations/"])
def test_reads_an_archive_in_the_mirror(mirror, inside):
    write_archive(mirror / "kg" / "nations.tar.gz", inside=inside)
    (mirror / "folder").mkdir()
    ours, folders = knowledge_graph("nations"), knowledge_graph(write_folder(mirror / "folder"))
    assert all(np.array_equal(a, b) for a, b in zip(ours, folders, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: "\ufeff" + text,
    ],
    ids=["CRLF", "no last line end", "byte order mark"],
)
def test_line_ends_and_byte_order_mark_are_ignored(tmp_path, change):
    plain = knowledge_graph(write_folder(tmp_path))
    other = knowledge_graph(write_folder(tmp_path, *map(change, (TRAIN, VALID, TEST))))
    assert all(np.array_equal(a, b) for a, b in zip(plain, other, strict=True))


def test_names_may_hold_spaces_and_unusual_line_separators(tmp_path):
    graph = knowledge_graph(write_folder(tmp_path, train="b\tlikes\ta\u2028 c\nb\tis\ta\n"))
    assert graph.entities == ("b", "a\u2028 c", "a")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train": "a\tis\tb\na is b\nb\tis\ta\n"}, r"train\.txt:2 is malformed: 'a is b' is not three names"),
        ({"valid": "a\tis\tb\tc\n\na\tis\n"}, r"valid\.txt:1 is malformed \(so are 2 more lines\)"),
        ({"test": "a\tis\tb\n\nb\tis\ta\n"}, r"test\.txt:2 is malformed: ''"),
        ({"test": "a\t\tb\n"}, r"test\.txt:1 is malformed"),
        ({"valid": ""}, r"valid\.txt is empty"),
        ({"train": b"a\tis\tb\n\xff\tis\tb\n"}, r"train\.txt:2 is not UTF-8"),
        ({"test": None}, r"lacks test\.txt"),
    ],
    ids=["spaces", "fields", "blank", "no relation", "empty", "encoding", "missing"],
)
def test_invalid_folder_is_named(tmp_path, files, says):
    with pytest.raises(jaxhpo.JaxhpoError, match=says):
        knowledge_graph(write_folder(tmp_path, **files))


@pytest.mark.parametrize("source", ["nation", 3, ["nations"], "nation" * 1000, ""])
def test_unknown_graph_is_named(source):
    with pytest.raises(jaxhpo.JaxhpoError, match="'nation.*fb15k-237|3.*neither|got '', which is neither a folder"):
        knowledge_graph(source)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b"<html>"), "nations.tar.gz is not a complete gzipped tar archive"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-30]),
            "nations.tar.gz is not a complete gzipped tar archive",
        ),
        (lambda path: write_archive(path, test=None), r"graph nations lacks test\.txt"),
        (lambda path: write_archive(path, train="a b\n"), r"nations\.tar\.gz:train\.txt:1 is malformed"),
    ],
    ids=["no archive", "truncated", "missing file", "malformed line"],
)
def test_damaged_archive_is_named(mirror, damage, says):
    write_archive(mirror / "kg" / "nations.tar.gz")
    damage(mirror / "kg" / "nations.tar.gz")
    with pytest.raises(jaxhpo.JaxhpoError, match=says):
        knowledge_graph("nations")


def test_archive_with_another_checksum_is_refused(tmp_path, monkeypatch):
    """Some readers do not notice a flipped bit, and would return another graph."""
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    write_archive(tmp_path / "kg" / "nations.tar.gz")
    with pytest.raises(jaxhpo.JaxhpoError, match=r"nations\.tar\.gz is damaged or not the published file.*not feb3e3e"):
        knowledge_graph("nations")


def test_warns_of_names_with_blanks_and_of_triples_in_two_parts(tmp_path):
    with pytest.warns(UserWarning, match=r"train\.txt: 1 of 3 triples hold names.*line 2 \('a '\)"):
        graph = knowledge_graph(write_folder(tmp_path, train="b\tlikes\ta\nb\tlikes\ta \nb\tis\tb\n"))
    assert graph.entities == ("b", "a", "a ")
    with pytest.warns(UserWarning, match=r"test\.txt: 3 of 3 triples are in train\.txt too, the first at line 1"):
        knowledge_graph(write_folder(tmp_path, test=TRAIN))
    with pytest.warns(UserWarning, match=r"test\.txt: 1 of 3 triples are in valid\.txt too, the first at line 3"):
        graph = knowledge_graph(write_folder(tmp_path, test=TEST + VALID))
    assert len(graph.test) == 3  # kept


@pytest.mark.parametrize(("part", "text"), [("train", TRAIN), ("validation", VALID), ("test", TEST)])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_triple_that_stands_in_a_part_twice_is_read_once(tmp_path, part, text, ending):
    plain = knowledge_graph(write_folder(tmp_path))
    again, file = text.splitlines()[-1] + ending, {"validation": "valid"}.get(part, part)
    lines = text.count("\n")
    says = rf"{file}\.txt: 2 of {lines + 2} triples stand there before, the first at line {lines + 1}.*read once"
    with pytest.warns(UserWarning, match=says):
        graph = knowledge_graph(write_folder(tmp_path, **{file: text + 2 * again}))
    assert all(np.array_equal(a, b) for a, b in zip(graph, plain, strict=True))


def test_long_line_is_abbreviated_in_the_message(tmp_path):
    with pytest.raises(jaxhpo.JaxhpoError, match=r"test\.txt:1 is malformed") as error:
        knowledge_graph(write_folder(tmp_path, test="a" * 10**6 + "\n"))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("valid", "says"),
    [
        ("a\tis\tb\na\tis\tc\nd\tis\tc\n", r"valid\.txt: 2 of 3 triples.*line 2 \(entity 'c'\)"),
        ("d\tis\tb\n", r"1 of 1 triples.*line 1 \(entity 'd'\)"),
        ("a\thates\tb\n", r"1 of 1 triples.*line 1 \(relation 'hates'\)"),
    ],
)
def test_names_missing_in_train_are_kept_and_counted(tmp_path, valid, says):
    with pytest.warns(UserWarning, match=says):
        graph = knowledge_graph(write_folder(tmp_path, valid=valid))
    assert len(graph.validation) == valid.count("\n")
    assert graph.entities[:2] == ("b", "a") and graph.relations[:2] == ("likes", "is")  # names in train come first


def test_halves_are_disjoint_and_seeded(tmp_path):
    lines = [f"a\tis\t{i}\n" for i in range(7)]
    train = "".join(f"{i}\tis\ta\n" for i in range(7))
    graph = knowledge_graph(write_folder(tmp_path, train, "".join(lines), "0\tis\t1\n"))
    tuned, reported = graph.halves(1)
    assert (len(tuned), len(reported)) == (3, 4)
    assert sorted([*tuned.tolist(), *reported.tolist()]) == sorted(graph.validation.tolist())
    np.testing.assert_array_equal(tuned, graph.halves(1)[0])
    assert tuned.tolist() != graph.halves(2)[0].tolist()


# Entities, relations and triples of the three parts, as counted by their publishers; then the triples of validation and
# test with an entity that train lacks, counted with awk in the upstream files.
REAL = {
    "nations": (14, 55, 1592, 199, 201, 0, 0),
    "umls": (135, 46, 5216, 652, 661, 0, 0),
    "kinships": (104, 25, 8544, 1068, 1074, 0, 0),
    "wn18rr": (40_943, 11, 86_835, 3034, 3134, 210, 210),
    "fb15k-237": (14_541, 237, 272_115, 17_535, 20_466, 9, 28),
}


@pytest.mark.parametrize(
    "name", ["nations", "umls", "kinships", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wn18rr", "fb15k-237"))]
)
def test_published_graphs(name, recwarn):
    *sizes, unseen_in_validation, unseen_in_test = REAL[name]
    try:
        graph = knowledge_graph(name)
    except (ImportError, jaxhpo.JaxhpoError) as error:
        pytest.skip(str(error))
    assert [*graph.sizes, *map(len, graph[:3])] == sizes
    counts = [str(w.message).split(": ")[1].split(" of ")[0] for w in recwarn]
    assert counts == [str(n) for n in (unseen_in_validation, unseen_in_test) if n]
    assert not any("\r" in name for name in graph.entities)  # FB15k-237 has CRLF
    assert len(np.unique(graph.train, axis=0)) == len(graph.train)
