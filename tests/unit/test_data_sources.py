"""Sources: which documents, in which order, and what is said when there are none."""

import json
from pathlib import Path

import datasets
import pytest

from data.sources import Source, open_source
from recipes.errors import ConfigError, DataError
from recipes.schema import SourceConfig
from tests.fixtures.corpus import make_texts, write_jsonl

TEXTS = make_texts(150)


def source(**keys) -> Source:
    return open_source("data.sources[0]", SourceConfig(output="unused", **keys))


def read(**keys) -> list[str]:
    opened = source(**keys)
    return list(opened.documents(opened.inputs([])))


def test_jsonl_and_parquet_give_the_text_column_in_order(tmp_path):
    first = write_jsonl(tmp_path / "b.jsonl", TEXTS[:70])
    second = write_jsonl(tmp_path / "a.jsonl", TEXTS[70:])
    assert read(dataset="json", data_files=[str(first), str(second)]) == TEXTS
    assert read(dataset="json", data_files=[str(tmp_path / "*.jsonl")]) == TEXTS[70:] + TEXTS[:70]
    rows = datasets.Dataset.from_dict({"body": TEXTS, "n": list(range(len(TEXTS)))})
    rows.to_parquet(tmp_path / "c.parquet")
    files = [str(tmp_path / "c.parquet")]
    assert read(dataset="parquet", data_files=files, text_key="body") == TEXTS


def test_text_files_are_whole_documents(tmp_path):
    texts = ["one\n\ntwo\n", "  three  \n", "four without end"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    assert read(dataset="text", data_files=[str(tmp_path / "*.txt")]) == texts


def test_empty_texts_are_counted(tmp_path):
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "b"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    opened = source(dataset="json", data_files=[str(tmp_path / "x.jsonl")])
    assert list(opened.documents(opened.inputs([]))) == ["a", "b"]
    assert opened.skipped == {"empty": 2}


def test_cap_stops_before_it_is_exceeded(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", ["x" * 400] * 10)
    keys = {"dataset": "json", "data_files": [str(file)]}
    assert len(read(**keys, max_megabytes=0.0011)) == 2
    assert len(read(**keys, max_megabytes=0.0012)) == 3
    assert read(**keys, max_megabytes=0.0003) == []


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Importable packages `zeta` and `alpha` with tests, duplicates, empty and Latin-1 files."""
    for name, count in (("zeta_package", 6), ("alpha_package", 3)):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "tests").mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "tests" / "test_x.py").write_text("never read")
        (folder / "notes.txt").write_text("never read")
        (folder / "latin.py").write_bytes(b"# gr\xfcn " + name.encode())
        (folder / "same.py").write_text("the same in both\n")
        for i in range(count):
            (folder / "sub" / f"m{i}.py").write_text(f"{name} {i} " + "x" * 100)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["zeta_package", "alpha_package"]


def test_code_is_sorted_deduplicated_and_free_of_tests(packages):
    opened = source(dataset="code", packages=packages)
    files = opened.inputs([])
    assert [f.name for f in files] == (
        ["zeta_package/same.py"]
        + [f"zeta_package/sub/m{i}.py" for i in range(6)]
        + [f"alpha_package/sub/m{i}.py" for i in range(3)]
    )
    assert opened.skipped == {"empty": 2, "undecodable": 2, "duplicates": 1}
    texts = list(opened.documents(files))
    assert texts == [Path(f.path).read_text() for f in files]


def test_a_package_is_one_document_in_path_order(packages):
    files = source(dataset="code", packages=packages)
    parts = list(files.documents(files.inputs([])))
    whole = source(dataset="packages", packages=packages)
    found = list(whole.documents(whole.inputs([])))
    assert whole.inputs([]) == files.inputs([])
    assert len(found) == 2 and found[0].startswith(parts[0])
    assert "\n".join(parts) == "\n".join(found)


def test_code_cap_is_shared_between_packages(packages):
    opened = source(dataset="code", packages=packages, max_megabytes=0.0006)
    names = [f.name for f in opened.inputs([])]
    assert names == [f.name for f in opened.inputs([])]
    taken = {p: sum(n.startswith(p) and "/sub/" in n for n in names) for p in packages}
    assert taken["zeta_package"] in (2, 3)
    assert taken["alpha_package"] == 2
    assert sum(f.bytes for f in opened.inputs([])) <= 600


def test_standard_library_without_tests_and_other_packages():
    opened = source(dataset="code", packages=["stdlib"], max_megabytes=1)
    names = [f.name for f in opened.inputs([])]
    assert len(names) > 10
    assert not [n for n in names if "/test/" in n or "site-packages" in n or "/tests/" in n]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"dataset": "json"}, ConfigError, r"sources\[0\].dataset=json reads files; set .*data_f"),
        ({"dataset": "jsonl", "data_files": ["x"]}, ConfigError, "jsonl is not a kind of file"),
        ({"dataset": "tests"}, ConfigError, "dataset=tests is not a kind of file"),
        ({"dataset": "code"}, ConfigError, r"sources\[0\].packages is empty"),
        ({"dataset": "code", "packages": ["no_such"]}, DataError, "no_such is not installed"),
        ({"dataset": "code", "packages": ["a b"]}, DataError, "a b is not installed"),
        ({"dataset": "code", "packages": ["math"]}, DataError, "math has no Python source"),
        ({"dataset": "text", "data_files": ["no/*.txt"]}, DataError, r"no/\*.txt matches no file"),
        ({"dataset": "code", "max_megabytes": 0.0}, ConfigError, "max_megabytes=0.0 must be"),
        ({"dataset": "some/name"}, DataError, "some/name cannot be read from the hub.*network"),
    ],
)
def test_what_is_wrong_with_the_recipe(keys, error, message):
    with pytest.raises(error, match=message):
        read(**keys)


def test_what_is_wrong_with_the_files(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS[:3])
    with pytest.raises(DataError, match="text_key=body is no column of .*good.jsonl.*n, text"):
        read(dataset="json", data_files=[str(good)], text_key="body")
    with pytest.raises(DataError, match="text_key=n holds int, not text"):
        read(dataset="json", data_files=[str(good)], text_key="n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="cannot read .*bad.jsonl as json"):
        read(dataset="json", data_files=[str(bad)])
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(DataError, match="cannot read .*latin.txt as text"):
        read(dataset="text", data_files=[str(tmp_path / "*.txt")])
    with pytest.raises(DataError, match="as parquet"):
        read(dataset="parquet", data_files=[str(good)])
